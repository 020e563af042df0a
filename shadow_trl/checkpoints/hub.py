"""Where a checkpoint lies: a local folder, or a repository of the Hugging Face hub that is downloaded once."""

from __future__ import annotations

import os
import re
import stat
from pathlib import Path
from typing import Any, NamedTuple

from ..errors import CheckpointError, ConfigError
from .json_files import is_file_name, is_there

Source = str | os.PathLike[str]
_SMALL = (
    "*.json",
    "*.txt",
    "*.model",
    "*.jinja",
    "*.tiktoken",
    "*.spm",
    "LICENSE*",
    "NOTICE*",
    "USE_POLICY*",
    "*.py",
    "README.md",
)
_LONGEST_NAME = 200
"""Bytes of a folder's name that leave room, of the 255 of a disk, for the endings of what lies beside it meanwhile."""
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


def local_folder(source: Source) -> Path | None:
    """Return the folder on this machine that `source` names, None where there is none of that name.

    Raises:
        CheckpointError: a name that nothing can have, or a folder that may not be looked at.
    """
    name = os.fspath(source)
    reason = _impossible(name)
    try:
        folder = Path(name).expanduser()
        if not reason:
            return folder if stat.S_ISDIR(folder.stat().st_mode) else None
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        reason = str(error.strerror)
    except RuntimeError:
        reason = "there is no such user"
    raise CheckpointError(
        f"cannot look for {name!r}: {reason}. Give a checkpoint's folder or a hub id like owner/name."
    )


def output_folder(output: Source) -> Path:
    """Return the path of a folder that is to be written, whether or not something is there.

    Raises:
        ConfigError: a name that no folder can have, or that leads through something that is no folder.
    """
    name = os.fspath(output)
    path, reason = Path(name), _impossible(name)
    try:
        if not reason:
            path.lstat()
    except FileNotFoundError:
        if len(os.fsencode(path.name)) > _LONGEST_NAME:
            reason = f"the name of the folder has more than {_LONGEST_NAME} bytes"
    except OSError as error:
        reason = str(error.strerror)
    if reason:
        raise ConfigError(f"cannot write to {name!r}: {reason}. Choose another output.")
    return path


def _impossible(name: str) -> str:
    """Return why nothing on a disk can have this name, "" where something can."""
    try:
        name.encode()
    except UnicodeEncodeError:
        return "it is not valid UTF-8"
    return "the name is empty" if not name else "it has the character NUL" if "\0" in name else ""


def is_commit(revision: str | None) -> bool:
    """Whether a revision can never mean another version: a whole commit, not a branch or a tag."""
    return bool(revision and re.fullmatch("[0-9a-f]{40}", revision))


def locate(source: Source, revision: str | None = None, *, weights: bool = True, card: bool = False) -> Located:
    """Find a folder or hub id. A branch may move; what is found has the commit that it is at now.

    Args:
        source: a folder, or `owner/name`, optionally with `@revision`. A folder that exists wins.
        revision: branch, tag or commit; not together with `@revision`.
        weights: whether the weights are needed too.
        card: whether the card is needed and nothing else. Default False.

    Raises:
        CheckpointError: neither a folder nor a repository that can be reached.
    """
    name, tail = os.fspath(source), ""
    if local_folder(name) is None:
        name, _, tail = name.partition("@")
    if tail and revision is not None and tail != revision:
        raise CheckpointError(f"{source} and revision={revision!r} name two revisions. Give one of them.")
    revision, folder = tail or revision, local_folder(name)
    if folder is not None:
        # `main` is what a folder has: TRL's scripts pass it with every model.
        if revision not in (None, "main") and (tail or is_hub_id(name)):
            raise CheckpointError(f"{name} is a local folder, which has no revision {revision!r}. Leave it out.")
        return Located(name, None, folder)
    if not is_hub_id(name):
        raise CheckpointError(f"there is no folder {source}. Give a checkpoint's folder or a hub id like owner/name.")
    if revision is not None and (not revision.isprintable() or ".." in revision or revision.startswith("/")):
        raise CheckpointError(f"{revision!r} is not a revision of {name}. Give a branch, a tag or a commit.")
    path = _download(name, revision, weights, card)
    return Located(name, path.name, path, revision)


def is_hub_id(source: str) -> bool:
    """Whether `source` has the form of a hub id (a folder of the same name may exist all the same)."""
    name = source.partition("@")[0]
    return bool(_HUB_ID.fullmatch(name)) and not name.startswith(".") and ".." not in name


def inside(folder: Path, name: str, *, below: bool = False) -> Path:
    """Return the path of file `name` in `folder`.

    Args:
        folder: of a checkpoint or result.
        name: of a weight file in it.
        below: whether it may be any file, in a folder below too. Default False.

    Raises:
        CheckpointError: the name or a link leads out of the folder. Links of the hub cache into the blobs of the same
            repository are fine.
    """
    what = "file" if below else "weight file"
    if not is_file_name(name) or (not below and "/" in name):
        raise CheckpointError(
            f"{folder}: the {what} {name!r} lies outside the folder; it is not read. Download or save the "
            "checkpoint again."
        )
    path = folder / name
    if not is_there(path):
        raise CheckpointError(f"{folder} lacks the {what} {name}. Download or save the checkpoint again.")
    if leads_out(folder, name):
        raise CheckpointError(
            f"{path} is a link to {os.path.realpath(path)}, outside the checkpoint's folder; it is not read. Put the "
            f"file itself there, as `cp -rL {folder} COPY` does for all, or give the folder that it is in."
        )
    return path


def leads_out(folder: Path, name: str) -> bool:
    """Whether file `name` of `folder` is, or is below, a link out of it; the hub cache's links to blobs are not."""
    real, home = Path(os.path.realpath(folder / name)), Path(os.path.realpath(folder))
    return home not in real.parents and not (
        home.parent.name == "snapshots" and real.parent == home.parent.parent / "blobs"
    )


def brief(error: Exception) -> str:
    """Return what the hub's client says first, without an address on lines of its own, or the kind of its error."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return " ".join(lines[:2] if lines and "Error." in lines[0] else lines[:1]) or type(error).__name__


def _download(name: str, revision: str | None, weights: bool, card: bool) -> Path:
    from huggingface_hub import constants, snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    # Before huggingface_hub 2.0, offline mode does not keep it from asking for the files of a commit.
    here: Any = {"local_files_only": constants.is_offline_mode()}

    def fetch(*patterns: str) -> Path:
        # Weights in sub-folders are other formats of the same model.
        kept: Any = {"allow_patterns": list(patterns), "ignore_patterns": ["*/*"], **here}
        return Path(snapshot_download(name, revision=revision, **kept))

    try:
        if card:
            return fetch("README.md")
        folder = fetch(*_SMALL)
        revision = folder.name  # the branch may move before the next request
        snapshot_download(name, revision=revision, allow_patterns=["additional_chat_templates/*.jinja"], **here)
        if weights:
            names = {entry.name for entry in folder.iterdir()}
            pickled = "pytorch_model.bin.index.json" in names and "model.safetensors.index.json" not in names
            safe = ("model*.safetensors", "adapter_model.safetensors", "delta*.safetensors")
            folder = fetch(*_SMALL, *(("pytorch_model*.bin",) if pickled else safe))
            if not pickled and not any(folder.glob("*.safetensors")):
                folder = fetch(*_SMALL, "pytorch_model*.bin", "adapter_model.bin")
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError, ValueError) as error:
        at = f"@{revision}" if revision else ""
        raise CheckpointError(
            f"{name}{at} is neither a folder here nor a repository that could be fetched from the hub: {_reason(error)}"
        ) from error
    return folder


def _reason(error: Exception) -> str:
    """Return why a download failed, and what to do about it."""
    from huggingface_hub import constants, errors

    log_in = "log in with `hf auth login`, or set HF_TOKEN"
    if isinstance(error, errors.GatedRepoError):
        return f"its authors ask for an agreement. Accept it on the model's page, and {log_in}."
    if isinstance(error, errors.RevisionNotFoundError):
        return "the repository has no such revision. Give a branch, a tag or a commit that it has."
    if isinstance(error, errors.RepositoryNotFoundError):
        return f"there is no such repository, or you may not see it. Check the name; for a private one, {log_in}."
    if constants.is_offline_mode():
        return (
            "offline mode is on, and the cache lacks it. Unset HF_HUB_OFFLINE, or give the folder of a copy that you "
            "have here."
        )
    if isinstance(error, errors.LocalEntryNotFoundError):
        cause = f" ({error.__cause__})" if error.__cause__ is not None else ""
        return (
            f"the hub could not be reached{cause}, and the cache lacks it. Check the connection, or give the folder of "
            "a copy that you have here."
        )
    return f"{brief(error)} Check the name, the revision and your access to it."
