"""The lock of an output while one run makes a result for it."""

from __future__ import annotations

import os
import socket
from contextlib import suppress
from pathlib import Path

from filelock import FileLock, Timeout

from ..errors import GraftError, OutputExistsError
from ..runtime.endings import Terminated, undisturbed
from ..runtime.machine import is_full

_LOCK = "shadow-lock"


def spelt_once(path: Path) -> Path:
    """Return the one spelling of an output: links and `..` above it are resolved, a link at its place is not."""
    whole = path.name in ("", "..")
    return Path(os.path.realpath(path)) if whole else Path(os.path.realpath(path.parent)) / path.name


class RunLock:
    """A file beside an output that names who makes a result for it.

    The kernel drops the lock of a process that died. Where the file system has no locks, nothing is held: the rename
    decides then.

    Args:
        path: of the output, in any spelling.
    """

    def __init__(self, path: Path) -> None:
        self._path = path = spelt_once(path)
        self._file = path.with_name(f".{path.name}.{_LOCK}")
        self._lock = FileLock(self._file, blocking=False, thread_local=False)

    def acquire(self) -> None:
        """Take it; OutputExistsError where another run has it, GraftError where nothing can be written beside it."""
        try:
            with undisturbed():
                self._take()
        except (KeyboardInterrupt, Terminated):
            self.release()
            raise

    def _take(self) -> None:
        try:
            self._lock.acquire()
            self._file.write_text(f"process {os.getpid()} on {socket.gethostname()}", encoding="utf-8")
        except Timeout as error:
            holder = ""
            with suppress(OSError):
                holder = self._file.read_text(encoding="utf-8")
            raise OutputExistsError(
                f"another run ({holder or 'unknown'}) is writing to {self._path}. Wait until it ends, or choose "
                "another output."
            ) from error
        except (OSError, NotImplementedError) as error:
            if is_full(error) or isinstance(error, PermissionError):
                raise GraftError(f"cannot write to {self._path}: {error}.") from error

    def release(self) -> None:
        """Give it back; where it is not held nothing is done."""
        with undisturbed():
            if self._lock.is_locked:
                self._file.unlink(missing_ok=True)  # while it is held: a next holder makes a file of its own
                self._lock.release()
