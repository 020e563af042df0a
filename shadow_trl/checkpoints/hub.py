"""Where a checkpoint lies: a local folder, or a repository of the Hugging Face hub that is downloaded once."""

from __future__ import annotations

import os
import re
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from ..errors import CheckpointError

Source = str | os.PathLike[str]
_SMALL = ("*.json", "*.txt", "*.model", "*.jinja", "*.tiktoken", "*.spm", "LICENSE*", "NOTICE*", "USE_POLICY*", "*.py")
_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")


class Located(NamedTuple):
    """A checkpoint that was found.

    Args:
        name: folder or hub id, without the revision.
        revision: commit of a repository, whatever was asked for; None for a folder.
        path: the folder on this machine.
        asked: revision that was asked for; None where none was.
    """

    name: str
    revision: str | None
    path: Path
    asked: str | None = None


def is_commit(revision: str | None) -> bool:
    """Whether a revision can never mean another version: a whole commit, not a branch or a tag."""
    return bool(revision and re.fullmatch("[0-9a-f]{40}", revision))


def locate(source: Source, revision: str | None = None, *, weights: bool = True) -> Located:
    """Find a folder or hub id. A branch may move; what is found has the commit that it is at now.

    Args:
        source: a folder, or `owner/name`, optionally with `@revision`. A folder that exists wins.
        revision: branch, tag or commit; not together with `@revision`.
        weights: whether the weights are needed too.

    Raises:
        CheckpointError: neither a folder nor a repository that can be reached.
    """
    name, tail = os.fspath(source), ""
    if not Path(name).expanduser().is_dir():
        name, _, tail = name.partition("@")
    if tail and revision is not None and tail != revision:
        raise CheckpointError(f"{source} and revision={revision!r} name two revisions. Give one of them.")
    revision, folder = tail or revision, Path(name).expanduser()
    if folder.is_dir():
        # `main` is what a folder has: TRL's scripts pass it with every model.
        if revision not in (None, "main") and (tail or is_hub_id(name)):
            raise CheckpointError(f"{name} is a local folder, which has no revision {revision!r}. Leave it out.")
        return Located(name, None, folder)
    if not is_hub_id(name):
        raise CheckpointError(f"there is no folder {source}. Give a checkpoint's folder or a hub id like owner/name.")
    path = _download(name, revision, weights)
    return Located(name, path.name, path, revision)


def is_hub_id(source: str) -> bool:
    """Whether `source` has the form of a hub id (a folder of the same name may exist all the same)."""
    name = source.partition("@")[0]
    return bool(_HUB_ID.fullmatch(name)) and not name.startswith(".") and ".." not in name


def inside(folder: Path, name: str) -> Path:
    """Return the path of file `name` in `folder`.

    Raises:
        CheckpointError: the name or a link leads out of the folder. Links of the hub cache into the blobs of the same
            repository are fine.
    """
    pure = PurePosixPath(name)
    if pure.is_absolute() or len(pure.parts) != 1 or name in (".", "..") or "\\" in name or "\0" in name:
        raise CheckpointError(f"{folder}: the weight file {name!r} lies outside the folder; it is not read.")
    path, real, home = folder / name, (folder / name).resolve(), folder.resolve()
    blobs = home.parent.parent / "blobs"
    if real.parent != home and not (home.parent.name == "snapshots" and real.parent == blobs):
        raise CheckpointError(
            f"{path} is a link to {real}, outside the checkpoint's folder; it is not read. Put the file itself there, "
            f"as `cp -rL {folder} COPY` does for all, or give the folder that it is in."
        )
    if not path.is_file():
        raise CheckpointError(f"{folder} lacks the weight file {name}. Download or save the checkpoint again.")
    return path


def _download(name: str, revision: str | None, weights: bool) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    def fetch(*patterns: str) -> Path:
        # Weights in sub-folders are other formats of the same model.
        return Path(snapshot_download(name, revision=revision, allow_patterns=list(patterns), ignore_patterns=["*/*"]))

    try:
        folder = fetch(*_SMALL)
        revision = folder.name  # the branch may move before the next request
        snapshot_download(name, revision=revision, allow_patterns=["additional_chat_templates/*.jinja"])
        if weights:
            names = {entry.name for entry in folder.iterdir()}
            pickled = "pytorch_model.bin.index.json" in names and "model.safetensors.index.json" not in names
            safe = ("model*.safetensors", "adapter_model.safetensors", "delta*.safetensors")
            folder = fetch(*_SMALL, *(("pytorch_model*.bin",) if pickled else safe))
            if not pickled and not any(folder.glob("*.safetensors")):
                folder = fetch(*_SMALL, "pytorch_model*.bin", "adapter_model.bin")
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        at = f"@{revision}" if revision else ""
        raise CheckpointError(
            f"{name}{at} is neither a folder here nor a repository that could be fetched from the hub: {reason} "
            "Check the name, the revision, your access to it and whether offline mode is on."
        ) from error
    return folder
