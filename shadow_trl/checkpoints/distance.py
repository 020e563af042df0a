"""How far weights of two checkpoints lie apart, summed block by block."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np

from ..arithmetic import kernel
from ..arithmetic.sums import Sums
from ..runtime.threads import run_threads
from .checkpoint import Place

_CHUNK = 512 * 1024
"""Elements that a thread takes at a time."""


Sides = tuple[str, Place, Place] | tuple[str, Place, Place, Place]
"""Name, place in BASE, place in the model whose distance is measured, and in one that sets a direction."""


def measure_gap(pairs: Sequence[Sides], progress: Callable[[int], None] | None = None) -> dict[str, Sums]:
    """Return for each weight the sums of which sigma is made.

    Args:
        pairs: (name, place in BASE, place in INSTRUCT), or (name, place in BASE, in TUNED, in INSTRUCT), which also
            gives the sums of the angle between TUNED - BASE and INSTRUCT - BASE. Shapes are equal; each place is read
            with its casts.
        progress: called with the number of bytes read since the last call, from several threads.
    """
    sizes = [base.spec.numel for _, base, *_ in pairs]
    chunks = [(n, low, min(low + _CHUNK, size)) for n, size in enumerate(sizes) for low in range(0, size, _CHUNK)]
    found: dict[tuple[int, int, int], Sums] = {}

    def make_worker() -> Callable[[tuple[int, int, int]], None]:
        memory = np.empty((3, 8 * _CHUNK), np.uint8)  # one row for each side

        def work(chunk: tuple[int, int, int]) -> None:
            number, low, high = chunk
            places = pairs[number][1:]
            sides = [place.array(low, high, into) for place, into in zip(places, memory, strict=False)]
            gap, size, dd, dg, gg = kernel.distances(*sides, *[None] * (3 - len(sides)))
            found[chunk] = Sums(high - low, gap, size, dd=dd, dg=dg, gg=gg, finite=math.isfinite(gap + size))
            for place in places:
                if progress is not None:
                    progress((high - low) * place.spec.itemsize)

        return work

    run_threads(chunks, make_worker)
    totals: dict[str, Sums] = {}
    for chunk in chunks:  # in order, so that the sums do not depend on the threads
        totals.setdefault(pairs[chunk[0]][0], Sums()).__iadd__(found[chunk])
    return totals
