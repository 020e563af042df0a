"""How a result is loaded and served: the words of the report, the card and the end of a training."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..arithmetic.sums import is_whole
from ..checkpoints.checkpoint import ADAPTER_CONFIG, Checkpoint
from ..checkpoints.hub import local_folder
from ..checkpoints.json_files import read_json

FOLDER = "FOLDER"
"""Stands for the folder of a result in its own card, which is read from anywhere."""


def loading_call(result: Path, instruct: Checkpoint, folder: str = FOLDER, *, text_class: str | None = None) -> str:
    """Return the Python call that loads a result, with the commit of INSTRUCT that it was made for.

    `AutoModelForCausalLM` on the folder of an adapter would take INSTRUCT from the main branch of its repository.

    Args:
        result: where it is now, complete.
        instruct: INSTRUCT of the graft.
        folder: where it will be. Default: `FOLDER`.
        text_class: of a multimodal INSTRUCT, if it is that class alone that an adapter is for.
    """
    whole = "vision_config" in instruct.config and text_class is None
    kind = "AutoModelForImageTextToText" if whole else "AutoModelForCausalLM"
    if not (result / ADAPTER_CONFIG).is_file():
        return f'{kind}.from_pretrained("{folder}")'
    task = read_json(result / ADAPTER_CONFIG).get("task_type")
    if task == "CAUSAL_LM" and kind == "AutoModelForCausalLM":
        return f'AutoPeftModelForCausalLM.from_pretrained("{folder}")'
    pinned = f', revision="{instruct.revision}"' if instruct.revision else ""
    # A card is published: it shows no path of this machine.
    name = "INSTRUCT" if folder == FOLDER and local_folder(instruct.source) is not None else instruct.source
    return f'PeftModel.from_pretrained({kind}.from_pretrained("{name}"{pinned}), "{folder}")'


def text_class_caution(text_class: str) -> str:
    """Return what to know of an adapter for the text-only class of a multimodal INSTRUCT before it is served."""
    return (
        f"The adapter's modules have the names of {text_class}, the language part alone. A server that loads the whole "
        "multimodal model, as vLLM does, may find none of them and serve INSTRUCT as it is, without a word. Ask it "
        "something that only training taught, or serve the dense form (shadow-trl graft --format model)."
    )


def kept(figures: Mapping[str, Any]) -> str | None:
    """Return how much of the delta arrives and the dtype to serve with; None where it was not measured.

    Args:
        figures: `form`, `dtype`, `realised` and `realised_in_bf16` of a graft, as its report and manifest have them.
    """
    dtype, realised, loaded = (figures.get(name) for name in ("dtype", "realised", "realised_in_bf16"))
    if figures.get("form") == "adapter":
        return "Nothing of the adapter is lost to rounding. Serve it unmerged, as merging rounds it."
    if realised is None or loaded is None:
        return None
    share = f"{realised:.1%} of the delta arrives in {dtype}"
    if dtype == "bfloat16":
        return f"{share}. Serve in bfloat16."
    other = " or bfloat16" if is_whole(loaded) else ""
    return f"{share}, {loaded:.1%} after a load in bfloat16. Serve in {dtype}{other}."


def loading_lines(figures: Mapping[str, Any], load: str) -> list[str]:
    """Return the part of a card on loading and serving the result, which the call `load` loads."""
    kinds = dict.fromkeys(re.findall(r"\b(\w+)\.from_pretrained", load))
    imports = [f"from {'peft' if 'Peft' in kind else 'transformers'} import {kind}" for kind in kinds]
    code = ["```python", *imports, "", f"model = {load}", "```"]
    told = [text for text in (kept(figures),) if text is not None]
    if figures.get("text_class"):
        told.append(text_class_caution(figures["text_class"]))
    return ["", "## Loading", "", *code, *(line for text in told for line in ("", text))]
