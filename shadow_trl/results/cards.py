"""The model card, `README.md`, of a graft or a delta."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..checkpoints.manifest import MANIFEST_NAME

_CITATION = """\
@article{shadowft2025,
  title   = {Shadow-FT: Tuning Instruct Model via Training on Paired Base Model},
  journal = {arXiv preprint arXiv:2505.12716},
  year    = {2025}
}"""


def write_model_card(folder: str | os.PathLike[str], manifest: Mapping[str, Any], *, adapter: bool = False) -> Path:
    """Write the `README.md` of a grafted model or adapter from its manifest; return its path.

    Args:
        folder: the folder of the graft, not yet renamed into place.
        manifest: the content of its `shadow.json`; `base`, `instruct`, `tuned` (each with `source`) and `options`.
        adapter: whether the folder holds an adapter.
    """
    names = {role: _card_name(manifest[role]["source"]) for role in ("instruct", "base", "tuned") if manifest.get(role)}
    options = manifest.get("options", {})
    scale = options.get("scale", 1.0)
    instruct_scale = options.get("instruct_scale", 1.0)
    formula = "grafted = instruct + scale * (tuned - base)"
    if instruct_scale != 1.0:
        formula = "grafted = base + scale * (tuned - base) + instruct_scale * (instruct - base)"
    lines = ["---"]
    # Only a hub id is a valid `base_model`; a local folder would be a dead link on the hub.
    hub_models = [
        names[role] for role in ("instruct", "base") if role in names and _is_hub_id(manifest[role]["source"])
    ]
    if hub_models:
        lines += ["base_model:", *[f"- {name}" for name in hub_models]]
        lines += [f"base_model_relation: {'adapter' if adapter else 'merge'}"]
    lines += ["library_name: " + ("peft" if adapter else "transformers")]
    lines += ["tags:", "- shadow-trl", "- shadow-ft", "- trl", *(["- lora"] if adapter else []), "---", ""]
    lines += [f"# {names['instruct']} with a grafted update", "", f"`{formula}`", ""]
    lines += ["| | |", "|---|---|", *[f"| {role} | {name} |" for role, name in names.items()]]
    lines += [f"| scale | {scale} |", f"| instruct_scale | {instruct_scale} |", ""]
    lines += [
        f"The update was learnt on the base model and added to the instruct model. `{MANIFEST_NAME}` beside this file "
        "says what was added, with digests and figures. Tokenizer, chat template and generation config are those of "
        "the instruct model.",
        "",
        "## Citation",
        "",
        "```bibtex",
        _CITATION,
        "```",
        "",
    ]
    path = Path(folder) / "README.md"
    path.write_text("\n".join(lines), encoding="utf-8")
    return path


def write_delta_card(folder: str | os.PathLike[str], manifest: Mapping[str, Any]) -> Path:
    """Write the `README.md` of a delta, or of the LoRA made from one, from its manifest; return its path.

    Args:
        folder: the folder of the delta, not yet renamed into place.
        manifest: the content of its `shadow.json`; `base`, `tuned` (each with `source`) and `form`.
    """
    names = {role: _card_name(manifest[role]["source"]) for role in ("base", "tuned")}
    adapter = manifest["form"] == "adapter"
    lines = ["---"]
    if _is_hub_id(manifest["base"]["source"]):
        lines += ["base_model:", f"- {names['base']}", *(["base_model_relation: adapter"] if adapter else [])]
    lines += [*(["library_name: peft"] if adapter else []), "tags:", "- shadow-trl", "- shadow-ft"]
    lines += [*(["- lora"] if adapter else []), "---", "", f"# What training added to {names['base']}", ""]
    if adapter:
        lines += ["`lora_B @ lora_A ~ tuned - base`, by truncated singular value decomposition.", ""]
    else:
        lines += ["`delta = tuned - base`. This is no model. Add it to an instruct model of the base with", ""]
        lines += ["    shadow-trl graft --delta FOLDER --instruct INSTRUCT --output OUTPUT", ""]
    lines += ["| | |", "|---|---|", *[f"| {role} | {name} |" for role, name in names.items()], ""]
    lines += [f"`{MANIFEST_NAME}` beside this file has digests and figures.", ""]
    lines += ["## Citation", "", "```bibtex", _CITATION, "```", ""]
    path = Path(folder) / "README.md"
    path.write_text("\n".join(lines), encoding="utf-8")
    return path


def _is_hub_id(source: str) -> bool:
    return bool(re.fullmatch(r"[\w.\-]+/[\w.\-]+(@[\w.\-/]+)?", source)) and not Path(source.partition("@")[0]).exists()


def _card_name(source: str) -> str:
    # A card is published: of a local path only the folder's name is told.
    return source.partition("@")[0] if _is_hub_id(source) else Path(source).name
