"""Provenance: `shadow.json` beside a run, a graft or a delta.

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
