"""The model card, `README.md`, of a graft or a delta.

A card is published: it names models and data sets of the hub, and of a local folder only the last part of its path.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import yaml

from ..checkpoints.checkpoint import Checkpoint
from ..checkpoints.hub import Source, is_hub_id, local_folder
from ..checkpoints.manifest import MANIFEST_NAME, Entry
from .usage import loading_call, loading_lines

CARD_NAME = "README.md"

_CITATION = """\
@article{shadowft2025,
  title   = {Shadow-FT: Tuning Instruct Model via Training on Paired Base Model},
  journal = {arXiv preprint arXiv:2505.12716},
  year    = {2025}
}"""

_TEMPLATE = {
    None: "Tokenizer, chat template and generation config are those of the instruct model.",
    "instruct": (
        "Tokenizer, chat template and generation config are those of the instruct model. What was trained has another "
        "chat template: conversations that it was trained on had another form."
    ),
    "trained": (
        "Tokenizer and generation config are those of the instruct model; the chat template is the one that the base "
        "model was trained with."
    ),
}


_FRONT = re.compile(r"\A---[ \t]*\r?\n(.*?)\r?\n---[ \t]*(?:\r?\n|\Z)", re.DOTALL)
_OF_INSTRUCT = ("license", "license_name", "license_link", "language", "pipeline_tag")
"""What a graft's card takes over from INSTRUCT's."""
_FIGURES = ("sigma", "realised", "noise")


def write_model_card(
    folder: Source, manifest: Mapping[str, Any], *, adapter: bool = False, instruct: Checkpoint | None = None
) -> Path:
    """Write the `README.md` of a graft from its manifest into `folder`; return its path.

    Args:
        folder: of the graft.
        manifest: of the graft; `trained` says how TUNED was trained.
        adapter: whether the graft is an adapter. Default: a model.
        instruct: INSTRUCT, whose card has the licence and the pipeline tag. Default: these are not known, nor is how
            the graft is loaded.
    """
    names = _names(manifest, "instruct", "base", "tuned")
    options = manifest.get("options", {})
    scales = {name: options.get(name, 1.0) for name in ("scale", "instruct_scale")}
    formula = "grafted = instruct + scale * (tuned - base)"
    if scales["instruct_scale"] != 1.0:
        formula = "grafted = base + scale * (tuned - base) + instruct_scale * (instruct - base)"
    figures = {name: f"{manifest[name]:.4g}" for name in _FIGURES if manifest.get(name) is not None}
    lines = [f"# {names['instruct']} with a grafted update", "", f"`{formula}`", ""]
    lines += _table({**names, **scales, **figures})
    lines += [
        f"The update was learnt on the base model and added to the instruct model. `{MANIFEST_NAME}` beside this file "
        f"says what was added, with digests and figures. {_TEMPLATE[manifest.get('chat_template')]}"
    ]
    if instruct is not None:
        lines += loading_lines(manifest, loading_call(Path(folder), instruct, text_class=manifest.get("text_class")))
    trained = manifest.get("trained", {})
    for title, rows in (("How the update was learnt", _training(trained)), ("Scores", trained.get("scores", {}))):
        lines += ["", f"## {title}", "", *_table(rows)[:-1]] if rows else []
    front = {
        **_taken_over(instruct),
        **_base_models(manifest, "instruct", relation="adapter" if adapter else "finetune"),
        "library_name": "peft" if adapter else "transformers",
        **({"datasets": trained["datasets"]} if trained.get("datasets") else {}),
    }
    return _write(folder, front, ["trl", *(["lora"] if adapter else [])], lines)


def write_delta_card(folder: Source, manifest: Mapping[str, Any]) -> Path:
    """Write the `README.md` of a delta, or of the LoRA made from one, from its manifest; return its path."""
    names = _names(manifest, "base", "tuned")
    lines = [f"# What training added to {names['base']}", ""]
    if manifest["form"] == "adapter":
        front = {**_base_models(manifest, "base", relation="adapter"), "library_name": "peft"}
        lines += ["`lora_B @ lora_A ~ tuned - base`, by truncated singular value decomposition.", ""]
    else:
        front = _base_models(manifest, "base")
        lines += ["`delta = tuned - base`. This is not a model. Add it to an instruct model of the base with", ""]
        lines += ["    shadow-trl graft --delta FOLDER --instruct INSTRUCT --output OUTPUT", ""]
    lines += [*_table(names), f"`{MANIFEST_NAME}` beside this file has digests and figures."]
    return _write(folder, front, ["lora"] if manifest["form"] == "adapter" else [], lines)


def front_of(folder: Path) -> dict[str, Any]:
    """Return the metadata at the head of the card in `folder`; {} where there is none that can be read."""
    with suppress(OSError, ValueError, yaml.YAMLError, RecursionError):
        found = _FRONT.match((folder / CARD_NAME).read_text(encoding="utf-8-sig"))
        values = yaml.safe_load(found[1]) if found else {}
        return values if isinstance(values, dict) else {}
    return {}


def amend(folder: Path, *, title: str | None = None, datasets: Iterable[str] = (), tags: Iterable[str] = ()) -> None:
    """Add to the card in `folder` what its reader should know besides: data sets of the hub and tags, or a title."""
    front, path = front_of(folder), folder / CARD_NAME
    for name, values in (("datasets", datasets), ("tags", tags)):
        if more := [*values]:
            front[name] = list(dict.fromkeys([*front.get(name, ()), *more]))
    text = _FRONT.sub("", path.read_text(encoding="utf-8"), count=1)
    if title is not None:
        text = re.sub(r"^# .*$", lambda _: f"# {title}", text, count=1, flags=re.MULTILINE)
    path.write_text(_with_front(front, text), encoding="utf-8")


def without_local_models(folder: Path) -> None:
    """Take the models that are no hub ids out of the head of the card in `folder`, as PEFT writes the path of BASE."""
    front = front_of(folder)
    named = front.get("base_model")
    local = [str(one) for one in (named if isinstance(named, list) else [named]) if one and not _is_hub_model(one)]
    if not local:
        return
    path = folder / CARD_NAME
    del front["base_model"]
    tags = front.get("tags")
    if isinstance(tags, list):
        front["tags"] = [tag for tag in tags if not any(str(tag).endswith(f":{one}") for one in local)]
    text = _FRONT.sub("", path.read_text(encoding="utf-8"), count=1)
    path.write_text(_with_front(front, text), encoding="utf-8")


def _write(folder: Source, front: Mapping[str, Any], tags: list[str], lines: list[str]) -> Path:
    front = {**front, "tags": ["shadow-trl", "shadow-ft", *tags]}
    citation = ["## Citation", "", "```bibtex", _CITATION, "```", ""]
    path = Path(folder) / CARD_NAME
    path.write_text(_with_front(front, "\n".join(["", *lines, "", *citation])), encoding="utf-8")
    return path


def _with_front(front: Mapping[str, Any], text: str) -> str:
    head = yaml.safe_dump(dict(front), sort_keys=False, allow_unicode=True, default_flow_style=False)
    return f"---\n{head}---\n{text}"


def _taken_over(instruct: Checkpoint | None) -> dict[str, Any]:
    """Return what the graft's card has from INSTRUCT's; a pipeline tag where that has none."""
    if instruct is None:
        return {}
    found = {name: value for name, value in front_of(instruct.path).items() if name in _OF_INSTRUCT and value}
    tag = "image-text-to-text" if "vision_config" in instruct.config else "text-generation"
    return {"pipeline_tag": tag, **found}


def _training(trained: Mapping[str, Any]) -> dict[str, Any]:
    known = {name: trained.get(name) for name in ("trainer", "ref_policy")}
    rows = {**known, **trained.get("training", {}), "data sets": ", ".join(trained.get("datasets", ()))}
    return {name.replace("_", " "): value for name, value in rows.items() if value not in (None, "")}


def _base_models(manifest: Mapping[str, Any], *roles: str, relation: str | None = None) -> dict[str, Any]:
    # Only a hub id is a valid `base_model`; a local folder would be a dead link on the hub.
    found = [name for role, name in _names(manifest, *roles).items() if _on_hub(manifest, role)]
    related = {"base_model_relation": relation} if relation else {}
    return {"base_model": found, **related} if found else {}


def _table(rows: Mapping[str, Any]) -> list[str]:
    cells = {str(name): str(value).replace("|", "\\|").replace("\n", " ") for name, value in rows.items()}
    return ["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in cells.items()), ""]


def _names(manifest: Mapping[str, Any], *roles: str) -> dict[str, str]:
    # A card is published: of a local path only the folder's name is shown.
    sources = {role: manifest[role]["source"] for role in roles if manifest.get(role)}
    return {
        role: source.partition("@")[0] if _on_hub(manifest, role) else Path(source).absolute().name
        for role, source in sources.items()
    }


def _on_hub(manifest: Mapping[str, Any], role: str) -> bool:
    entry = Entry.read(manifest, role)
    return entry is not None and "/" in entry.source and is_hub_id(entry.source) and not entry.is_folder


def _is_hub_model(name: Any) -> bool:
    return isinstance(name, str) and is_hub_id(name) and local_folder(name) is None
