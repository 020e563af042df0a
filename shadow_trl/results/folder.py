"""Results, written whole or not at all: to a hidden sibling that is synced and renamed when it is complete.

A kill at any moment leaves at most such siblings, which the next run for the same folder removes or restores.
"""

from __future__ import annotations

import errno
import fcntl
import glob
import os
import shutil
import threading
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path

from ..checkpoints.manifest import MANIFEST_NAME, read_manifest
from ..errors import CheckpointError, ConfigError, GraftError, OutputExistsError

_PART = "shadow-part"
_OLD = "shadow-old"


class OutputFolder:
    """The folder of a result while it is made: `with OutputFolder(path) as part: ...` and `commit()` at its end.

    Args:
        path: where the result goes.
        overwrite: whether a result of the same kind may be replaced; it is kept until the new one is there.
        kind: of the result, as its manifest names it. Default `graft`.

    Raises:
        OutputExistsError: something is at `path` and `overwrite` is off, or what is there is of another kind.
    """

    def __init__(self, path: Path, overwrite: bool = False, kind: str = "graft") -> None:
        self.path = Path(os.path.abspath(path))
        self.overwrite, self.kind = overwrite, kind
        self.part = self.path.with_name(f".{self.path.name}.{_PART}-{os.getpid()}-{threading.get_ident():x}")
        self._made: list[Path] = []
        self._lock = -1

    def __enter__(self) -> OutputFolder:
        recover(self.path)
        check_free(self.path, self.overwrite, self.kind)
        try:
            self._made = make_parents(self.path.parent)
            self.part.mkdir()
            self._lock = _lock(self.part)
        except OSError as error:
            self._discard()
            raise GraftError(f"cannot write to {self.path}: {error.strerror}.") from error
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if self.part.exists():  # not committed
            self._discard()
        if self._lock >= 0:
            os.close(self._lock)
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise GraftError(
                f"the disk of {self.path} is full ({free_bytes(self.path):,} bytes free). Make room or write elsewhere."
            ) from error

    def commit(self) -> None:
        """Sync everything and move the result to its place; an older result is removed after that."""
        for path in (*self.part.rglob("*"), self.part):
            sync(path)
        old = _old(self.path)
        if self.path.exists():
            os.rename(self.path, old)
        try:
            os.rename(self.part, self.path)
        except OSError:
            if old.exists():
                os.rename(old, self.path)
            raise
        sync(self.path.parent)
        _remove(old)

    def _discard(self) -> None:
        shutil.rmtree(self.part, ignore_errors=True)
        remove_empty(self._made)


def remove_empty(folders: list[Path]) -> None:
    """Remove folders that `make_parents` made, as far as nothing lies in them by now."""
    for folder in reversed(folders):
        with suppress(OSError):
            folder.rmdir()


def check_free(path: Path, overwrite: bool, kind: str = "graft") -> None:
    """Raise OutputExistsError unless a result of this kind can be put at `path`."""
    old = _old(path)
    if not os.path.lexists(path) and not old.exists():
        return
    if not overwrite:
        raise OutputExistsError(
            f"{path} exists. Choose another output, remove it, or pass --overwrite (in training, graft_overwrite)."
        )
    there = path if os.path.lexists(path) else old
    manifest = None
    with suppress(CheckpointError):
        manifest = read_manifest(there)
    if there.is_symlink() or not there.is_dir() or manifest is None or manifest.get("kind") != kind:
        raise OutputExistsError(
            f"{path} exists and is no {kind} (it has no {MANIFEST_NAME} of kind {kind}), so it is not overwritten. "
            "Choose another output or remove it yourself."
        )


def check_place(path: Path, inputs: Iterable[tuple[str, Path]]) -> None:
    """Raise ConfigError if `path` is, in (TUNED's may hold it) or around the folder of an input (role, folder)."""
    place = Path(os.path.realpath(path))
    for role, folder in inputs:
        home = folder.resolve()
        if place == home:
            how = "is"
        elif home in place.parents and role != "tuned":
            how = "lies in"
        elif place in home.parents:
            how = "lies around"
        else:
            continue
        raise ConfigError(
            f"the output {path} {how} the folder of {role} ({folder}): the input would be changed or replaced. Choose "
            "another output."
        )


def check_space(path: Path, needed: int) -> None:
    """Raise GraftError if the disk of `path` has not `needed` bytes free."""
    free = free_bytes(path)
    if needed > free:
        raise GraftError(
            f"the result needs {needed:,} bytes and the disk of {path} has {free:,} free. Make room or write elsewhere."
        )


def free_bytes(path: Path) -> int:
    """Return the bytes free for this user on the disk on which `path` is or would be."""
    path = Path(os.path.abspath(path))
    return shutil.disk_usage(next(folder for folder in (path, *path.parents) if folder.exists())).free


def recover(path: Path) -> None:
    """Clean up after a killed run for the same folder: restore or remove the old result, remove unfinished parts."""
    path = Path(os.path.abspath(path))
    if not path.parent.is_dir():
        return
    for part in path.parent.glob(f".{glob.escape(path.name)}.{_PART}-*"):
        lock = _lock(part)
        if lock >= 0:
            _remove(part)
            os.close(lock)
    old = _old(path)
    if old.exists() and path.exists():
        _remove(old)
    elif old.exists():
        os.rename(old, path)
        sync(path.parent)


def sync(path: Path) -> None:
    """Wait until a file or folder is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _old(path: Path) -> Path:
    return path.with_name(f".{path.name}.{_OLD}")


def make_parents(folder: Path) -> list[Path]:
    """Make a folder with the folders above it; return those that were not there, outermost first."""
    missing = [path for path in (folder, *folder.parents) if not path.exists()][::-1]
    for path in missing:
        path.mkdir(exist_ok=True)
    return missing


def _lock(folder: Path) -> int:
    """Return a descriptor that holds the lock of `folder`, -1 if it is gone or another process may hold the lock."""
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except FileNotFoundError:
        return -1
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        return -1
    return descriptor


def _remove(folder: Path) -> None:
    shutil.rmtree(folder, onerror=_ignore_missing)


def _ignore_missing(function: Callable[..., object], path: str, info: tuple[object, BaseException, object]) -> None:
    if not isinstance(info[1], FileNotFoundError):
        raise info[1]
