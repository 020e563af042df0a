"""Provenance: `shadow.json` says what a run and its checkpoints were trained from, or what a graft or delta is made of.

A manifest of kind `delta` is of form `delta`, or `adapter` for a LoRA made from one.
"""

from __future__ import annotations

import functools
import json
import logging
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import CheckpointError, InputError, list_names
from ..runtime.versions import installed
from .digests import file_digest, weight_digests
from .hub import Source, is_commit, is_hub_id, leads_out, local_folder, locate
from .json_files import check, is_there, read_json
from .schemas import Delta, Graft, Manifest, Run, Side

if TYPE_CHECKING:
    from .checkpoint import Checkpoint

logger = logging.getLogger(__name__)

MANIFEST_NAME = "shadow.json"
GRAFTED_FOLDER = "grafted"
"""Folder of a run in which its graft is."""
FORMAT = 1
KINDS = {"run": Run, "graft": Graft, "delta": Delta}
TRAINED = ("trainer", "ref_policy", "training", "datasets", "scores")
"""What the manifest of a run says of how it was trained, which that of a graft repeats as `trained`."""
_ROLES = re.compile(r"(?:base|instruct|policy|start|adapter|tuned|delta)(?:_\d+)?")

_PACKAGES = ("shadow-trl", "torch", "transformers", "trl", "peft", "accelerate", "safetensors", "numba")


@dataclass(frozen=True)
class Entry:
    """What a manifest says of one side: `str()` is the name to open it by, `vars()` what is written.

    Two are one origin when name and revision are equal.

    Args:
        source: folder or hub id, as the user gave it.
        revision: on the hub: the commit once it is known, before that what was asked for; None for a folder.
        digests: file -> `algorithm:<hex>`; None where none were taken.
        folder: whether it was a local folder; None where that is not recorded: then a folder of that name wins.
        asked: revision that was asked for, where `revision` is the commit; None where none was.
    """

    source: str
    revision: str | None = None
    digests: dict[str, str] | None = field(default=None, compare=False)
    folder: bool | None = field(default=None, compare=False)
    asked: str | None = field(default=None, compare=False)

    @classmethod
    def of(cls, side: Checkpoint, digests: dict[str, str] | None) -> Entry:
        """Return the entry of a side that was opened."""
        return cls(side.source, side.revision, digests, local_folder(side.source) is not None, side.asked)

    @classmethod
    def read(cls, manifest: Mapping[str, Any] | None, role: str) -> Entry | None:
        """Return what `manifest` says of `role`, None where it says nothing."""
        found = (manifest or {}).get(role)
        if not manifest or not found:
            return None
        digests = found.get("digests")
        # Version 0.1.0 did not record it; its runs took digests of every folder and of nothing else.
        folder = found.get("folder", digests is not None if manifest.get("kind") == "run" else None)
        return cls(str(found["source"]), found.get("revision"), digests, folder, found.get("asked"))

    def __str__(self) -> str:
        return f"{self.source}@{self.revision}" if self.revision else self.source

    @property
    def is_folder(self) -> bool:
        """Whether it is, or was, a folder of this machine."""
        if self.folder is not None:
            return self.folder
        places = map(local_folder, (self.source, self.source.partition("@")[0]))
        return any(place is not None for place in places) or not is_hub_id(self.source)

    def recorded(self) -> dict[str, Any]:
        """Return what a run writes of the side as it is now: of a local folder with digests of its weights."""
        digests = weight_digests(self.source)
        return vars(replace(self, digests=digests, folder=digests is not None))

    def pinned(self) -> Entry:
        """Return the entry with the commit that its revision is at now; a folder, or a commit, stays as it is.

        Raises:
            CheckpointError: no folder and no repository that can be reached, or a folder with a repository's name.
        """
        if is_commit(self.revision) and local_folder(self.source) is None:
            return self
        found = locate(self.source, self.revision, weights=False)
        return replace(self, source=found.name, revision=found.revision, asked=found.asked)

    def covers(self, given: Entry) -> bool:
        """Whether this has the commit of what was `given`: the same name, with no other revision."""
        return is_commit(self.revision) and given.source == self.source and given.revision in (None, self.asked)

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
        return [
            name
            for name, digest in (self.digests or {}).items()
            if not is_there(folder / name)
            or leads_out(folder, name)
            or file_digest(folder / name, digest.partition(":")[0]) != digest
        ]

    def names(self, side: Checkpoint, home: Path) -> bool:
        """Whether it is `side`, by the same name and revision or as another path of the same folder."""
        places = self._places(home) if side.path.is_dir() else []
        named = self.source == side.source and self.revision in (side.revision, side.asked)
        return named or any(place.samefile(side.path) for place in places)

    def _places(self, home: Path) -> list[Path]:
        places: list[Source] = [] if self.folder is False else [self.source, home / self.source]
        return [place for place in map(local_folder, places) if place is not None]


def way_out(role: str) -> str:
    """Return what helps where the side that a manifest names for `role` is gone or has changed."""
    kind = role.partition("_")[0]  # the second of several is `tuned_2`
    if kind not in ("base", "instruct", "tuned", "delta"):
        return "Restore it, or merge the adapter into the right model and start from that."
    training = f", in training {role}_model=..." if kind in ("base", "instruct") else ""
    return f"Restore it, or name it: --{kind}{training}"


def read_manifest(folder: Source) -> dict[str, Any] | None:
    """Return the manifest of `folder` as a dictionary, None where there is none.

    Raises:
        CheckpointError: `shadow.json` is there but is no manifest that this version reads.
    """
    path = Path(folder) / MANIFEST_NAME
    if not is_there(path):
        return None
    content: Any = read_json(path, Any)
    if not isinstance(content, dict) or content.get("kind") not in tuple(KINDS):
        raise CheckpointError(
            f"{path} is not a manifest: its `kind` is none of {', '.join(KINDS)}. Restore it or remove it."
        )
    check(content, Manifest, path)
    if content.get("format", 0) > FORMAT:
        raise CheckpointError(
            f"{path} was written by a newer shadow_trl (format {content['format']}, here {FORMAT}). Update shadow-trl."
        )
    check(content, KINDS[content["kind"]], path)
    check({role: side for role, side in content.items() if _ROLES.fullmatch(role)}, dict[str, Side | None], path)
    return content


def entries_of(manifest: Mapping[str, Any]) -> dict[str, Entry]:
    """Return what a manifest says of every side, by role."""
    found = {role: Entry.read(manifest, role) for role in manifest if _ROLES.fullmatch(role)}
    return {role: entry for role, entry in found.items() if entry is not None}


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


@functools.cache
def versions() -> dict[str, str]:
    """Return the installed version of every package that can change the numbers, without importing any."""
    return {package: version for package in _PACKAGES if (version := installed(package)) is not None}


def check_weights(folder: Path) -> None:
    """Check that the weights in the folder of a run are those that its manifest was written for.

    Raises:
        InputError: they are others; a manifest of version 0.1.0 does not say.
    """
    manifest = read_manifest(folder) or {}
    recorded = manifest.get("weights") if manifest.get("kind") == "run" else None
    changed = Entry(str(folder), digests=recorded).changed(folder)
    if changed:
        raise InputError(
            f"{len(changed)} of {len(recorded or {})} weight files in {folder} are not those that its {MANIFEST_NAME} "
            f"describes.\n{list_names(changed)}\nA later run into this folder was cut off while it saved, or the files "
            "were changed afterwards. Use a checkpoint or train again; if the weights are right, remove "
            f"{MANIFEST_NAME} and name base and instruct."
        )


def from_manifest(role: str, manifest: Mapping[str, Any], folder: Path, given: Entry | None = None) -> Entry | None:
    """Return the name and revision of `role`: what was given, else what the manifest of `folder` says.

    Raises:
        InputError: the manifest names a folder that is not to be found or has changed.
    """
    entry = Entry.read(manifest, role)
    if given is not None and not (entry and entry.covers(given)):
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
    return replace(found, digests=None)


def as_trained(base: Source | None, tuned: Path) -> Source | None:
    """Return `base` at the commit that the run in `tuned` was trained on, where it names no other revision."""
    entry = Entry.read(read_manifest(tuned), "base")
    if base is None or entry is None or not entry.covers(Entry(os.fspath(base))):
        return base
    logger.warning("base is %s, the commit that %s records.", entry, tuned / MANIFEST_NAME)
    return str(entry)


def stage_below(tuned: Source, base: str | None = None) -> tuple[str, str] | None:
    """Return (start, base) of an adapter that was trained on the full model of an earlier run, else None.

    Args:
        tuned: folder of what was trained; a folder without a manifest, or a full model, is no such adapter.
        base: BASE as the user named it; wins over the manifest, whose commit of the same name is taken.

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
    if not name:
        return None
    named, manifest = Entry(str(name), config.get("revision")), read_manifest(folder)
    # The manifest of its run knows the commit, and whether it was a folder.
    known = (Entry.read(manifest, role) for role in ("policy", "base"))
    return next((e for e in known if e and e.source == name), named).find(folder, "base")
