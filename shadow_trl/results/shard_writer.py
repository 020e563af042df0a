"""One file of a result, written in pieces by several threads."""

from __future__ import annotations

import errno
import mmap
import os
from contextlib import suppress
from pathlib import Path

ALIGNMENT = 4096
"""Offsets and sizes that direct writes need to be multiples of."""


class ShardWriter:
    """One file of known size, written in pieces from any thread, past the page cache where the file system allows it.

    Filling fresh pages of the page cache costs more than the arithmetic of a graft; a direct write needs none.

    Args:
        path: the file, which must not exist.
        size: its bytes.
        direct: whether to try direct writes.
    """

    def __init__(self, path: Path, size: int, direct: bool = True) -> None:
        self.path, self.size = path, size
        self._file = self._direct = -1
        self._direct_wanted = direct and hasattr(os, "O_DIRECT")
        self.opened = False

    def open(self) -> None:
        """Create the file with its room on the disk."""
        self.opened = True
        self._file = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
        if self._direct_wanted:
            with suppress(OSError):
                self._direct = os.open(self.path, os.O_WRONLY | os.O_DIRECT | os.O_CLOEXEC)
        if self.size and hasattr(os, "posix_fallocate"):
            try:
                os.posix_fallocate(self._file, 0, self.size)
            except OSError as error:
                if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL):
                    raise

    def write(self, offset: int, buffer: mmap.mmap, length: int) -> None:
        """Write the first `length` bytes of `buffer`, whose size is a multiple of `ALIGNMENT`, at `offset`."""
        if self._direct >= 0 and offset % ALIGNMENT == 0:
            padded = -(-length // ALIGNMENT) * ALIGNMENT
            try:
                return _write_all(self._direct, buffer, padded, offset)
            except OSError as error:
                if error.errno != errno.EINVAL:
                    raise
        _write_all(self._file, buffer, length, offset)

    def close(self) -> None:
        """Cut the padding, wait until the file is on the disk, close it."""
        os.ftruncate(self._file, self.size)
        os.fsync(self._file)
        self.abandon()

    def abandon(self) -> None:
        """Close the file as it is."""
        for descriptor in (self._file, self._direct):
            if descriptor >= 0:
                os.close(descriptor)
        self._file = self._direct = -1


class HollowWriter:
    """A file of which the header alone is written: it has its size, and takes hardly any room.

    Args:
        path: the file, which must not exist.
        size: its bytes.
        header: those at its begin.
    """

    def __init__(self, path: Path, size: int, header: bytes) -> None:
        self.path, self.size, self.header = path, size, header
        self.opened = False

    def open(self) -> None:
        """Create the file."""
        self.opened = True
        with open(self.path, "xb") as file:
            file.write(self.header)
            file.truncate(self.size)

    def write(self, offset: int, buffer: mmap.mmap, length: int) -> None:
        """Leave the weights out."""

    def close(self) -> None:
        """Do nothing: the file is complete."""

    abandon = close


def _write_all(descriptor: int, buffer: mmap.mmap, length: int, offset: int) -> None:
    view = memoryview(buffer)
    done = 0
    while done < length:
        done += os.pwrite(descriptor, view[done:length], offset + done)
