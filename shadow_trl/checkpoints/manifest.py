"""Provenance: `shadow.json` says what a run and its checkpoints were trained from, or what a graft or delta is made of.

A manifest of kind `delta` is of form `delta`, or `adapter` for a LoRA made from one.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import logging
import os
import re
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import CheckpointError, InputError
from .hub import Source

if TYPE_CHECKING:
    from .checkpoint import Checkpoint

logger = logging.getLogger(__name__)

MANIFEST_NAME = "shadow.json"
FORMAT = 1
KINDS = ("run", "graft", "delta")

_PACKAGES = ("shadow-trl", "torch", "transformers", "trl", "peft", "accelerate", "safetensors")


@dataclass(frozen=True)
class Entry:
    """What a manifest says of one side: `str()` is the name to open it by, `vars()` what is written.

    Args:
        source: folder or hub id, as the user gave it.
        revision: on the hub; None where none was given.
        digests: file -> `sha256:<hex>`; None where none were taken.
        folder: whether it was a local folder; None where that is not recorded: then a folder of that name wins.
    """

    source: str
    revision: str | None = None
    digests: dict[str, str] | None = None
    folder: bool | None = None

    @classmethod
    def of(cls, source: str, revision: str | None, digests: dict[str, str] | None) -> Entry:
        """Return the entry of a side that is there now."""
        return cls(source, revision, digests, Path(source).expanduser().is_dir())

    @classmethod
    def read(cls, manifest: Mapping[str, Any] | None, role: str) -> Entry | None:
        """Return what `manifest` says of `role`, None where it says nothing."""
        found = (manifest or {}).get(role)
        if not manifest or not found:
            return None
        digests = found.get("digests")
        # Version 0.1.0 did not record it; its runs took digests of every folder and of nothing else.
        folder = found.get("folder", digests is not None if manifest.get("kind") == "run" else None)
        return cls(str(found["source"]), found.get("revision"), digests, folder)

    def __str__(self) -> str:
        return f"{self.source}@{self.revision}" if self.revision else self.source

    def recorded(self) -> dict[str, Any]:
        """Return what a run writes of the side as it is now: of a local folder with digests of its weights."""
        return vars(Entry.of(self.source, self.revision, weight_digests(self.source)))

    def find(self, home: Path, role: str) -> Entry:
        """Return the entry with the name under which the side is found now: from the current folder, else from `home`.

        What was a folder is never looked up on the hub, and what came from there is never taken from a folder.

        Raises:
            CheckpointError: it was a folder, which is at neither place; the message names `role`.
        """
        if places := self._places(home):
            return replace(self, source=str(places[0]), revision=None)
        if self.folder:
            raise CheckpointError(
                f"{role} of {home} is gone: {self.source} is neither a folder here nor in {home}. {way_out(role)}"
            )
        return self

    def changed(self, folder: Path) -> list[str]:
        """Return the names of the files whose digest is recorded and that `folder` lacks or has otherwise."""
        digests = (self.digests or {}).items()
        return [n for n, digest in digests if not (folder / n).is_file() or file_digest(folder / n) != digest]

    def names(self, side: Checkpoint, home: Path) -> bool:
        """Whether it is `side`, by the same name and revision or as another path of the same folder."""
        places = self._places(home) if side.path.is_dir() else []
        return str(self) == str(side) or any(place.samefile(side.path) for place in places)

    def _places(self, home: Path) -> list[Path]:
        places = [] if self.folder is False else [Path(self.source).expanduser(), home / self.source]
        return [place for place in places if place.is_dir()]


def way_out(role: str) -> str:
    """Return what helps where the side that a manifest names for `role` is gone or has changed."""
    if role == "policy":
        return "Restore it, or merge the adapter into the right model and start from that."
    return f"Restore it, or name it: --{role}, in training {role}_model=..."


def read_manifest(folder: Source) -> dict[str, Any] | None:
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
            f"{path} is not a manifest: its `kind` is none of {', '.join(KINDS)}. Restore it or remove it."
        )
    if content.get("format", 0) > FORMAT:
        raise CheckpointError(
            f"{path} was written by a newer shadow_trl (format {content['format']}, here {FORMAT}). Update shadow-trl."
        )
    return content


def kind_found(manifest: Mapping[str, Any] | None) -> str:
    """Return what a folder has instead of the manifest that was looked for, for messages."""
    return f"its {MANIFEST_NAME} is of kind {manifest['kind']}" if manifest else f"it has no {MANIFEST_NAME}"


def write_manifest(folder: Source, content: Mapping[str, Any]) -> Path:
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
        with suppress(importlib.metadata.PackageNotFoundError):
            found[package] = importlib.metadata.version(package)
    return found


def file_digest(path: Source) -> str:
    """Return `sha256:<hex>` of a file; a large file of the hub cache is not read, its blob's name is the digest."""
    real = Path(path).resolve()
    # Names of 40 digits are those of small files under git, and no SHA-256.
    if real.parent.name == "blobs" and re.fullmatch(r"[0-9a-f]{64}", real.name):
        return f"sha256:{real.name}"
    with open(real, "rb") as file:
        return f"sha256:{hashlib.file_digest(file, 'sha256').hexdigest()}"


def weight_digests(source: str) -> dict[str, str] | None:
    """Return `{file name: digest}` of the weight files of a local folder, None for a hub id."""
    folder = Path(source).expanduser()
    if not folder.is_dir():
        return None
    return {path.name: file_digest(path) for path in sorted(folder.glob("*.safetensors"))}


def from_manifest(role: str, manifest: Mapping[str, Any], folder: Path, given: Entry | None = None) -> Entry | None:
    """Return the name and revision of `role`: what was given, else what the manifest of `folder` says.

    Raises:
        InputError: the manifest names a folder that is not to be found or has changed.
    """
    entry = Entry.read(manifest, role)
    if given is not None:
        if entry and str(given) != str(entry):
            logger.warning("%s is %s as given; %s names %s.", role, given, folder / MANIFEST_NAME, entry)
        return given
    if entry is None:
        return None
    found = entry.find(folder, role)
    changed = found.changed(Path(found.source))
    if changed:
        raise InputError(
            f"{role} of the run in {folder} has changed since: {len(changed)} of {len(found.digests or {})} weight "
            f"files of {found} are missing or differ ({', '.join(sorted(changed))}). The delta would be measured from "
            f"other weights than the run started from. {way_out(role)}"
        )
    return Entry(found.source, found.revision)


def stage_below(tuned: Source, base: str | None = None) -> tuple[str, str] | None:
    """Return (start, base) of an adapter that was trained on the full model of an earlier run, else None.

    Args:
        tuned: folder of what was trained; a folder without a manifest, or a full model, is no such adapter.
        base: BASE as the user named it; wins over the manifest.

    Raises:
        InputError: the manifest names a folder that is not to be found or has changed.
    """
    folder = Path(tuned)
    manifest = read_manifest(folder) if (folder / "adapter_config.json").is_file() else None
    if manifest is None or manifest["kind"] != "run" or Entry.read(manifest, "policy") == Entry.read(manifest, "base"):
        return None
    start = from_manifest("policy", manifest, folder)
    origin = from_manifest("base", manifest, folder, Entry(base) if base else None)
    if start is None or origin is None:
        raise InputError(f"{MANIFEST_NAME} of {folder} does not name what the adapter was trained on, or its BASE.")
    return str(start), str(origin)


def adapter_base(config: Mapping[str, Any], folder: Path) -> Entry | None:
    """Return the model that the `adapter_config.json` in `folder` names, found from here or there; None if none."""
    name = config.get("base_model_name_or_path")
    return Entry(str(name), config.get("revision")).find(folder, "base") if name else None
