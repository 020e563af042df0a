"""The model card, `README.md`, of a graft or a delta."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..checkpoints.hub import Source, is_hub_id
from ..checkpoints.manifest import MANIFEST_NAME, Entry
from .usage import loading_lines

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


def write_model_card(folder: Source, manifest: Mapping[str, Any], *, adapter: bool = False, load: str = "") -> Path:
    """Write the `README.md` of a graft, a model or an `adapter`, from its manifest into `folder`; return its path.

    `load` is the Python call that loads the result.
    """
    names = _names(manifest, "instruct", "base", "tuned")
    options = manifest.get("options", {})
    scales = {name: options.get(name, 1.0) for name in ("scale", "instruct_scale")}
    formula = "grafted = instruct + scale * (tuned - base)"
    if scales["instruct_scale"] != 1.0:
        formula = "grafted = base + scale * (tuned - base) + instruct_scale * (instruct - base)"
    lines = [f"# {names['instruct']} with a grafted update", "", f"`{formula}`", "", *_table({**names, **scales})]
    lines += [
        f"The update was learnt on the base model and added to the instruct model. `{MANIFEST_NAME}` beside this file "
        f"says what was added, with digests and figures. {_TEMPLATE[manifest.get('chat_template')]}"
    ]
    lines += loading_lines(manifest, load)
    front = _base_models(manifest, "instruct", "base", relation="adapter" if adapter else "merge")
    front += ["library_name: " + ("peft" if adapter else "transformers")]
    return _write(folder, front, ["trl", *(["lora"] if adapter else [])], lines)


def write_delta_card(folder: Source, manifest: Mapping[str, Any]) -> Path:
    """Write the `README.md` of a delta, or of the LoRA made from one, from its manifest; return its path."""
    names = _names(manifest, "base", "tuned")
    lines = [f"# What training added to {names['base']}", ""]
    if manifest["form"] == "adapter":
        front = [*_base_models(manifest, "base", relation="adapter"), "library_name: peft"]
        lines += ["`lora_B @ lora_A ~ tuned - base`, by truncated singular value decomposition.", ""]
    else:
        front = _base_models(manifest, "base")
        lines += ["`delta = tuned - base`. This is no model. Add it to an instruct model of the base with", ""]
        lines += ["    shadow-trl graft --delta FOLDER --instruct INSTRUCT --output OUTPUT", ""]
    lines += [*_table(names), f"`{MANIFEST_NAME}` beside this file has digests and figures."]
    return _write(folder, front, ["lora"] if manifest["form"] == "adapter" else [], lines)


def _write(folder: Source, front: list[str], tags: list[str], lines: list[str]) -> Path:
    front = [*front, "tags:", *(f"- {tag}" for tag in ("shadow-trl", "shadow-ft", *tags))]
    citation = ["## Citation", "", "```bibtex", _CITATION, "```", ""]
    path = Path(folder) / "README.md"
    path.write_text("\n".join(["---", *front, "---", "", *lines, "", *citation]), encoding="utf-8")
    return path


def _base_models(manifest: Mapping[str, Any], *roles: str, relation: str | None = None) -> list[str]:
    # Only a hub id is a valid `base_model`; a local folder would be a dead link on the hub.
    found = [f"- {name}" for role, name in _names(manifest, *roles).items() if _on_hub(manifest, role)]
    return ["base_model:", *found, *([f"base_model_relation: {relation}"] if relation else [])] if found else []


def _table(rows: Mapping[str, Any]) -> list[str]:
    return ["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows.items()), ""]


def _names(manifest: Mapping[str, Any], *roles: str) -> dict[str, str]:
    # A card is published: of a local path only the folder's name is shown.
    sources = {role: manifest[role]["source"] for role in roles if manifest.get(role)}
    return {
        role: source.partition("@")[0] if _on_hub(manifest, role) else Path(source).name
        for role, source in sources.items()
    }


def _on_hub(manifest: Mapping[str, Any], role: str) -> bool:
    entry = Entry.read(manifest, role)
    if entry is None or "/" not in entry.source or not is_hub_id(entry.source):
        return False
    # Version 0.1.0 did not record whether it was a folder.
    return not Path(entry.source.partition("@")[0]).exists() if entry.folder is None else not entry.folder
