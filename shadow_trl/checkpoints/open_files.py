"""Files that are read at places, again and again, by several threads, while others may change them."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import CheckpointError, GraftError, list_names
from .header import stamp

if TYPE_CHECKING:
    import numpy

_MOST = 16
"""Files that stay open: a process may have about a thousand, and a checkpoint can have that many."""


class OpenFiles:
    """The files of one checkpoint, each opened when it is first read."""

    def __init__(self) -> None:
        self._known: dict[Path, _Descriptor] = {}

    def __reduce__(self) -> tuple[type[OpenFiles], tuple[()]]:
        return OpenFiles, ()  # another process opens them anew

    def read(
        self,
        path: Path,
        offset: int,
        size: int,
        expected: tuple[int, ...] | None,
        into: numpy.ndarray | None = None,
    ) -> numpy.ndarray:
        """Return `size` bytes of `path` from `offset` on, (size,) uint8.

        Args:
            path: of the file.
            offset: of the first byte.
            size: number of bytes.
            expected: `stamp` of the file when its header was read.
            into: memory to use, uint8, at least as many: fresh memory costs more than what is read. Default: new.

        Raises:
            GraftError: the file was cut short, replaced or written to since then.
            CheckpointError: it cannot be read.
        """
        import numpy

        found = numpy.empty(size, numpy.uint8) if into is None else into[:size]
        view, done = found.data, 0
        try:
            file = self._known.get(path) or self._opened(path)
            same = stamp(file.number) == expected
            while same and done < size:
                count = os.preadv(file.number, [view[done:]], offset + done)
                done += count
                same = count > 0
        except OSError as error:
            raise CheckpointError(f"cannot read {path}: {error.strerror}. Restore it, or use a copy.") from error
        if not same:
            raise changed([path])
        return found

    def _opened(self, path: Path) -> _Descriptor:
        if len(self._known) >= _MOST:
            self._known.clear()  # a thread that reads one of them holds it open
        file = self._known[path] = _Descriptor(path)
        return file


def changed(paths: Sequence[Path]) -> GraftError:
    """Return the error for input files that are no longer what they were when their headers were read."""
    return GraftError(
        f"{len(paths)} input files were replaced or written to while they were read: the result could be a mixture.\n"
        f"{list_names(map(str, paths))}\nWait for what writes them, or use a copy."
    )


class _Descriptor:
    """A file that is closed when nobody reads it any more."""

    def __init__(self, path: Path) -> None:
        self.number = os.open(path, os.O_RDONLY | os.O_CLOEXEC)

    def __del__(self) -> None:
        if hasattr(self, "number"):
            os.close(self.number)
