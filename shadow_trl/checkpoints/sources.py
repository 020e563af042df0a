"""What a manifest or a user names as a side of a run: where it is found, whether it changed, how it is recorded."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..errors import InputError
from .manifest import MANIFEST_NAME, Entry, file_digest, read_manifest, way_out

logger = logging.getLogger(__name__)


def stage_below(tuned: str | os.PathLike[str], base: str | None = None) -> tuple[str, str] | None:
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
    start, start_revision = from_manifest("policy", manifest, folder, (None, None))
    origin, origin_revision = from_manifest("base", manifest, folder, (base, None))
    assert start is not None
    assert origin is not None
    return with_revision(start, start_revision), with_revision(origin, origin_revision)


def adapter_base(config: Mapping[str, Any], folder: Path) -> Entry | None:
    """Return the model under an adapter, found from the current folder or else from the adapter's.

    Args:
        config: content of `adapter_config.json`.
        folder: of the adapter.

    Returns:
        its name and revision; None where the adapter names none.
    """
    name = config.get("base_model_name_or_path")
    return Entry(str(name), config.get("revision")).find(folder, "base") if name else None


def describe(source: str | None, revision: str | None) -> dict[str, Any] | None:
    """Return the manifest's entry of a source: name, revision and, for a local folder, digests of its weights."""
    if source is None:
        return None
    return vars(Entry.of(source, revision, weight_digests(source)))


def weight_digests(source: str) -> dict[str, str] | None:
    """Return `{file name: digest}` of the weight files of a local folder, None for a hub id."""
    folder = Path(source).expanduser()
    if not folder.is_dir():
        return None
    return {path.name: file_digest(path) for path in sorted(folder.glob("*.safetensors"))}


def with_revision(source: str, revision: str | None) -> str:
    """Return `source@revision`, the form in which a graft takes its inputs, or `source` where there is no revision."""
    return str(Entry(source, revision))


def from_manifest(
    role: str, manifest: Mapping[str, Any], folder: Path, given: tuple[str | None, str | None]
) -> tuple[str | None, str | None]:
    """Return (source, revision) of `role`: what the user gave, else what the manifest of `folder` says."""
    entry = Entry.read(manifest, role)
    if given[0] is not None:
        name = with_revision(given[0], given[1])
        if entry and name != str(entry):
            logger.warning("%s is %s as given; %s names %s.", role, name, folder / MANIFEST_NAME, entry)
        return given
    if entry is None:
        return None, None
    found = entry.find(folder, role)
    changed = found.changed(Path(found.source))
    if changed:
        raise InputError(
            f"{role} of the run in {folder} has changed since: {len(changed)} of {len(found.digests or {})} weight "
            f"files of {found} are missing or differ ({', '.join(sorted(changed))}). The delta would be measured from "
            f"other weights than the run started from. {way_out(role)}"
        )
    return found.source, found.revision
