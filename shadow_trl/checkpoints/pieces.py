"""Tensors that are stored in pieces, each a box of them row by row: where in the files a range of elements is."""

from __future__ import annotations

import bisect
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    import numpy


class Run(NamedTuple):
    """Elements `start` to `stop` of a flattened tensor, at element `at` of a piece."""

    start: int
    stop: int
    at: int


@dataclass(frozen=True)
class Piece:
    """A box of a tensor, stored row by row.

    Args:
        whole: shape of the tensor.
        begin: of the box, in each dimension.
        shape: of the box; no dimension is 0.
        file: that holds it.
        offset: byte of the file at which it begins.
    """

    whole: tuple[int, ...]
    begin: tuple[int, ...]
    shape: tuple[int, ...]
    file: Path
    offset: int

    def runs(self, start: int, stop: int) -> Iterator[Run]:
        """Yield what the piece has of elements `start` to `stop` of the flattened tensor."""
        length, count = self._run
        first = bisect.bisect_right(range(count), start - length, key=self._place)
        for number in range(first, count):
            place = self._place(number)
            if place >= stop:
                return
            low, high = max(place, start), min(place + length, stop)
            yield Run(low, high, number * length + low - place)

    def _place(self, number: int) -> int:
        """Return the element of the flattened tensor at which a run begins."""
        found = 0
        for begin, size, step in self._outer:
            number, index = divmod(number, size)
            found += (begin + index) * step
        return found

    @cached_property
    def _split(self) -> int:
        """The dimension after which the box has all of the tensor."""
        sizes = list(zip(self.shape, self.whole, strict=True))
        return next((i for i in range(len(sizes) - 1, 0, -1) if sizes[i][0] != sizes[i][1]), 0)

    @cached_property
    def _run(self) -> tuple[int, int]:
        """Length of the stretches of the tensor that the piece has in one, and their number."""
        return math.prod(self.shape[self._split :]), math.prod(self.shape[: self._split])

    @cached_property
    def _outer(self) -> list[tuple[int, int, int]]:
        """Begin of the box, number of runs along it, and elements of a step, by dimension, the innermost first."""
        steps = [math.prod(self.whole[i + 1 :]) for i in range(len(self.whole))]
        sizes = [size if i < self._split else 1 for i, size in enumerate(self.shape)]
        return list(zip(self.begin, sizes, steps, strict=True))[::-1]


def gathered(
    pieces: Sequence[Piece], itemsize: int, start: int, stop: int, read: Callable[[Path, int, int, int], numpy.ndarray]
) -> numpy.ndarray:
    """Return the bytes of elements `start` to `stop` of a flattened tensor, uint8.

    Args:
        pieces: of the tensor.
        itemsize: bytes of an element.
        start: first element.
        stop: element after the last.
        read: given a file, an offset in it and a range of elements from there on, returns their bytes.
    """
    import numpy

    found = numpy.empty((stop - start) * itemsize, numpy.uint8)
    for piece in pieces:
        for run in piece.runs(start, stop):
            low, high = (run.start - start) * itemsize, (run.stop - start) * itemsize
            found[low:high] = read(piece.file, piece.offset, run.at, run.at + run.stop - run.start)
    return found


def not_whole(shape: tuple[int, ...], boxes: Sequence[tuple[tuple[int, ...], tuple[int, ...]]]) -> str:
    """Return why boxes (begin, shape) do not make up a tensor of `shape`, each element once; "" where they do."""
    for begin, size in boxes:
        fits = len(begin) == len(size) == len(shape)
        if not fits or any(b + n > whole for b, n, whole in zip(begin, size, shape, strict=True)):
            return f"its part {size} at {begin} reaches out of {shape}"
    active: list[tuple[tuple[int, ...], tuple[int, ...]]] = []
    for begin, size in sorted(boxes) if shape else []:
        active = [one for one in active if one[0][0] + one[1][0] > begin[0]]
        for other, other_size in active:
            if all(b < o + m and o < b + n for b, n, o, m in zip(begin, size, other, other_size, strict=True)):
                return f"its parts {other_size} at {other} and {size} at {begin} overlap"
        active.append((begin, size))
    found, wanted = sum(math.prod(size) for _, size in boxes), math.prod(shape)
    return f"its parts have {found} of its {wanted} elements" if found != wanted else ""
