"""Provenance: `shadow.json` beside a run, a graft or a delta, and the model card of a graft or a delta.

Three kinds of manifest. `kind: run` lies in the folder that a Shadow trainer writes (and in its checkpoints) and says
what was trained from what. `kind: graft` lies in the grafted folder and says what was added to what, with figures.
`kind: delta` lies beside a delta on its own (`form: delta`) or a LoRA made from one (`form: adapter`).
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..errors import CheckpointError

MANIFEST_NAME = "shadow.json"
FORMAT = 1
KINDS = ("run", "graft", "delta")

_PACKAGES = ("shadow-trl", "torch", "transformers", "trl", "peft", "accelerate", "safetensors")
_CITATION = """\
@article{shadowft2025,
  title   = {Shadow-FT: Tuning Instruct Model via Training on Paired Base Model},
  journal = {arXiv preprint arXiv:2505.12716},
  year    = {2025}
}"""


def read_manifest(folder: str | os.PathLike[str]) -> dict[str, Any] | None:
    """Return the manifest of `folder` as a dictionary, None where there is none.

    Raises:
        CheckpointError: `shadow.json` is there but is no manifest that this version reads.
    """
    path = Path(folder) / MANIFEST_NAME
    if not path.is_file():
        return None
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"cannot read {path}: {error}. Restore the file or remove it.") from error
    if not isinstance(content, dict) or content.get("kind") not in KINDS:
        raise CheckpointError(
            f"{path} is no manifest of a run, a graft or a delta: its `kind` is none of {', '.join(KINDS)}. Restore it "
            "or remove it."
        )
    if content.get("format", 0) > FORMAT:
        raise CheckpointError(
            f"{path} was written by a newer shadow_trl (format {content['format']}, this version reads {FORMAT}). "
            "Update shadow-trl."
        )
    return content


def write_manifest(folder: str | os.PathLike[str], content: Mapping[str, Any]) -> Path:
    """Write `content` as the manifest of `folder`, whole or not at all; return its path.

    Args:
        folder: an existing folder.
        content: must have `kind` (`run`, `graft` or `delta`). `format` and `versions` are added.
    """
    path = Path(folder) / MANIFEST_NAME
    full = {"kind": content["kind"], "format": FORMAT, **content, "versions": versions()}
    # A reader never sees half a file: the rename is atomic within a folder.
    part = path.with_name(f".{MANIFEST_NAME}.{os.getpid()}.part")
    part.write_text(json.dumps(full, indent=2, ensure_ascii=False, default=str) + "\n", encoding="utf-8")
    os.replace(part, path)
    return path


def versions() -> dict[str, str]:
    """Return the installed version of every package that can change the numbers, without importing any."""
    found = {}
    for package in _PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def file_digest(path: str | os.PathLike[str]) -> str:
    """Return `sha256:<hex>` of a file; a large file of the hub cache is not read, its blob's name is the digest.

    The hub cache stores each file under `blobs/<name>`: 64 hexadecimal digits are the SHA-256 of a large file. Names
    of 40 digits (small files under git) are no SHA-256 and are not used.
    """
    real = Path(path).resolve()
    if real.parent.name == "blobs" and re.fullmatch(r"[0-9a-f]{64}", real.name):
        return f"sha256:{real.name}"
    with open(real, "rb") as file:
        return f"sha256:{hashlib.file_digest(file, 'sha256').hexdigest()}"


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
