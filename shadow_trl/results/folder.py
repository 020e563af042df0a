"""Results, written whole or not at all: to a hidden sibling that is synced and renamed when it is complete.

A kill at any moment leaves at most such siblings, which the next run for the same folder removes or restores.
"""

from __future__ import annotations

import errno
import fcntl
import glob
import itertools
import os
import shutil
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Self

from ..checkpoints.manifest import MANIFEST_NAME, read_manifest
from ..errors import CheckpointError, ConfigError, GraftError, OutputExistsError, list_names
from ..runtime.endings import undisturbed
from ..runtime.machine import free_bytes, is_full
from .lock import RunLock, spelt_once
from .parents import make_parents, remove_empty

_PART = "shadow-part"
_OLD = "shadow-old"
_NUMBERS = itertools.count()
_TRIES = 3


class Scratch:
    """A hidden folder beside `path` that is gone afterwards: `with Scratch(path) as scratch: ... scratch.part`.

    Those that killed runs left for the same `path` go first; those of running ones stay.

    Args:
        path: what it is for; need not exist.
    """

    mode = 0o700

    def __init__(self, path: Path) -> None:
        self.path = spelt_once(path)
        self.part = self._new_part()
        self._made: list[Path] = []
        self._held = -1

    def __enter__(self) -> Self:
        _remove_dead(self.path)
        try:
            with undisturbed():
                self._make_part()
        except BaseException as error:
            self._leave()
            if isinstance(error, OSError):
                raise GraftError(f"cannot write to {self.path}: {error.strerror}.") from error
            raise
        return self

    def _make_part(self) -> None:
        self._made = make_parents(self.path.parent)
        for _ in range(_TRIES):
            self.part.mkdir(self.mode)
            self._held = _lock(self.part)
            if self._held >= 0 and self.part.exists():
                return
            # Another run that starts now may take it for one of a dead run before it is locked.
            shutil.rmtree(self.part, ignore_errors=True)
            self.part = self._new_part()
        self.part.mkdir(self.mode)  # a file system without locks

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        with undisturbed():
            self._leave()
        if is_full(error):
            raise GraftError(
                f"the disk of {self.path} is full ({free_bytes(self.path):,} bytes free). Make room or write elsewhere."
            ) from error

    def _leave(self) -> None:
        if self.part.exists():  # not committed
            shutil.rmtree(self.part, ignore_errors=True)
            remove_empty(self._made)
        if self._held >= 0:
            os.close(self._held)
            self._held = -1

    def _new_part(self) -> Path:
        return self.path.with_name(f".{self.path.name}.{_PART}-{os.getpid()}-{next(_NUMBERS)}")


class OutputFolder(Scratch):
    """The folder of a result while it is made: `with OutputFolder(path) as place: ...` and `commit()` at its end.

    Only one at a time can be made for a path; others are refused.

    Args:
        path: where the result goes.
        overwrite: whether a result of the same kind may be replaced; it is kept until the new one is there.
        kind: of the result, as its manifest names it. Default `graft`.

    Raises:
        OutputExistsError: something is at `path` and `overwrite` is off, what is there is of another kind or holds
            files of the user, or another run is making a result for it.
    """

    mode = 0o777

    def __init__(self, path: Path, overwrite: bool = False, kind: str = "graft") -> None:
        super().__init__(path)
        self.overwrite = overwrite
        self.kind = kind
        self._lock = RunLock(self.path)

    def __enter__(self) -> Self:
        made: list[Path] = []
        try:
            with undisturbed():
                made += make_parents(self.path.parent)
                self._lock.acquire()
                _restore(self.path)
                check_free(self.path, self.overwrite, self.kind)
                super().__enter__()
        except BaseException:
            self._leave()
            self._lock.release()
            remove_empty(made)
            raise
        self._made = made
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        with undisturbed():
            try:
                super().__exit__(kind, error, trace)
            finally:
                self._lock.release()
                remove_empty(self._made)

    def commit(self) -> None:
        """Sync everything and move the result to its place; an older result is removed after that.

        Raises:
            OutputExistsError: something has come to be at the path since the work began. It stays as it is.
        """
        for path in (*self.part.rglob("*"), self.part):
            sync(path)
        with undisturbed():
            self._take_place()

    def _take_place(self) -> None:
        check_free(self.path, self.overwrite, self.kind)
        old = _free_old(self.path)
        try:
            if self.overwrite and self.path.exists():
                os.rename(self.path, old)
            os.rename(self.part, self.path)  # fails where somebody's folder came there since the check
        except BaseException as error:  # an interrupt as well
            if old.exists() and not self.path.exists():
                os.rename(old, self.path)
            if isinstance(error, OSError) and error.errno in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
                raise OutputExistsError(f"{self.path} was written by another run meanwhile, and is kept.") from error
            raise
        sync(self.path.parent)
        _remove_old(old)


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Yield where a new file is to be written; it takes the place of `path` when it is complete."""
    with Scratch(path) as scratch:
        yield scratch.part / path.name
        os.replace(scratch.part / path.name, path)


def check_free(path: Path, overwrite: bool, kind: str = "graft") -> None:
    """Raise OutputExistsError unless a result of this kind can be put at `path`."""
    if not os.path.lexists(path):
        return
    if not overwrite:
        raise OutputExistsError(
            f"{path} exists. Choose another output, remove it, or pass --overwrite (in training, graft_overwrite)."
        )
    manifest = None
    with suppress(CheckpointError):
        manifest = read_manifest(path)
    if path.is_symlink() or not path.is_dir() or manifest is None or manifest.get("kind") != kind:
        raise OutputExistsError(
            f"{path} exists and is not a {kind} (it has no {MANIFEST_NAME} of kind {kind}), so it is not overwritten. "
            "Choose another output or remove it yourself."
        )
    # Version 0.1.0 did not record which files it wrote.
    known = manifest.get("files")
    others = set(files_in(path)) - {*known, MANIFEST_NAME} if known is not None else set()
    if others:
        raise OutputExistsError(
            f"{path} holds {len(others)} files that the {kind} in it did not write, which overwriting would remove.\n"
            f"{list_names(sorted(others))}\nMove them away or choose another output."
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


def recover(path: Path) -> None:
    """Clean up after a killed run for the same folder: restore or remove the old result, remove unfinished parts.

    While another run makes a result for it, nothing is touched.
    """
    path = spelt_once(path)
    if next(_siblings(path, "shadow-"), None) is None:
        return
    lock = RunLock(path)
    with suppress(OutputExistsError, GraftError):
        lock.acquire()
        try:
            _remove_dead(path)
            _restore(path)
        finally:
            lock.release()


def _restore(path: Path) -> None:
    """Give `path` its old result back where a kill came between two renames, else remove what is left of old ones."""
    for old in sorted(_siblings(path, _OLD), reverse=True):
        if os.path.lexists(path):
            _remove_old(old)
        else:
            os.rename(old, path)
            sync(path.parent)


def _remove_dead(path: Path) -> None:
    for part in _siblings(path, f"{_PART}-"):
        held = _lock(part)
        if held >= 0:
            shutil.rmtree(part, ignore_errors=True)
            os.close(held)


def _siblings(path: Path, kind: str) -> Iterator[Path]:
    return path.parent.glob(f".{glob.escape(path.name)}.{kind}*")


def files_in(folder: Path) -> list[str]:
    """Return the paths of all files in `folder`, relative to it, sorted."""
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if not path.is_dir() or path.is_symlink())


def sync(path: Path) -> None:
    """Wait until a file or folder is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _free_old(path: Path) -> Path:
    # One that could not be removed, as another user's, keeps its name.
    names = (path.with_name(f".{path.name}.{_OLD}-{number:03d}") for number in itertools.count())
    return next(name for name in names if not os.path.lexists(name))


def _lock(folder: Path) -> int:
    """Return a descriptor that holds the lock of `folder`, -1 if it is gone, or others may hold it."""
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError:
        return -1
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        return -1
    return descriptor


def _remove_old(folder: Path) -> None:
    try:
        shutil.rmtree(folder, onerror=_ignore_missing)
    except OSError as error:
        # The result is in place: what cannot be removed, as another user's, is no reason to call that a failure.
        warnings.warn(f"the result that was replaced could not be removed: {error}. Remove {folder}.", stacklevel=3)


def _ignore_missing(function: Callable[..., object], path: str, info: tuple[object, BaseException, object]) -> None:
    if not isinstance(info[1], FileNotFoundError):
        raise info[1]
