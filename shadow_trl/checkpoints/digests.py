"""Digests of files, which name their algorithm: `sha256:<hex>`, `xxh3:<hex>`."""

from __future__ import annotations

import hashlib
import os
import re
from pathlib import Path
from typing import Any

from ..errors import CheckpointError
from .hub import Source, local_folder
from .shard_metadata import METADATA
from .sharded import shards_of


def file_digest(path: Source, algorithm: str = "sha256") -> str:
    """Return `algorithm:<hex>` of a file.

    Args:
        path: of the file. A large one of the hub cache is not read for SHA-256: the name of its blob is the digest.
        algorithm: `sha256`, which nobody can forge, or `xxh3` (XXH3, 128 bits), which is many times faster.

    Raises:
        CheckpointError: an algorithm that this version does not know.
    """
    import xxhash

    real = Path(os.path.realpath(path))
    known: dict[str, Any] = {"sha256": hashlib.sha256, "xxh3": xxhash.xxh3_128}
    if algorithm not in known:
        raise CheckpointError(f"the digest of {path} is of the unknown kind {algorithm!r}. Update shadow-trl.")
    if algorithm == "sha256" and _is_named_by_digest(real):
        return f"sha256:{real.name}"
    with open(real, "rb") as file:
        return f"{algorithm}:{hashlib.file_digest(file, known[algorithm]).hexdigest()}"


def input_digest(path: Source, algorithm: str) -> str:
    """Return what is recorded of an input file: `file_digest`, or SHA-256 in the place of `xxh3` where it is known."""
    known = algorithm == "xxh3" and _is_named_by_digest(Path(os.path.realpath(path)))
    return file_digest(path, "sha256" if known else algorithm)


def _is_named_by_digest(path: Path) -> bool:
    """Whether the hub cache calls a file by its SHA-256; names of 40 digits are those of small files under git."""
    return path.parent.name == "blobs" and re.fullmatch(r"[0-9a-f]{64}", path.name) is not None


def weight_digests(source: Source, below: str | None = None) -> dict[str, str] | None:
    """Return `{file name: digest}` of the weight files of a local folder, None for a hub id.

    Args:
        source: folder or hub id. Where there are no whole weights, its shards count.
        below: a folder in it whose weight files belong to them. Default: no other.
    """
    folder = local_folder(source)
    if folder is None:
        return None
    files = {*folder.glob("*.safetensors")}
    files = files or {path for name in ("pytorch_model*.bin", "adapter_model.bin") for path in folder.glob(name)}
    if not files and (shards := shards_of(folder)) is not None:
        files = {shards / METADATA, *shards.glob("*.distcp")}
    files |= {*(folder / below).glob("*.safetensors")} if below is not None else set()
    return {str(path.relative_to(folder)): file_digest(path, "xxh3") for path in sorted(files)}
