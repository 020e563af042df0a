"""How far weights of two checkpoints lie apart, summed block by block in numpy: a gap does not wait for torch."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np

from ..arithmetic.sums import Sums
from ..runtime.threads import run_threads
from .checkpoint import Place

_BLOCK = 512 * 1024
"""Elements that are summed at a time, as in `grafter.BLOCK`: between calls of numpy the threads wait for each other."""
_CHUNK = 4 * _BLOCK
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
        scratch = np.empty((4, _BLOCK), np.float32)

        def work(chunk: tuple[int, int, int]) -> None:
            number, low, high = chunk
            places = pairs[number][1:]
            sums = Sums()
            for start in range(low, high, _BLOCK):
                sums += _block_gap(places, start, min(start + _BLOCK, high), scratch)
            found[chunk] = sums
            for place in places:
                if progress is not None:
                    progress((high - low) * place.spec.itemsize)

        return work

    run_threads(chunks, make_worker)
    totals: dict[str, Sums] = {}
    for chunk in chunks:  # in order, so that the sums do not depend on the threads
        totals.setdefault(pairs[chunk[0]][0], Sums()).__iadd__(found[chunk])
    return totals


def _block_gap(places: Sequence[Place], start: int, stop: int, scratch: np.ndarray) -> Sums:
    """Return the sums over elements `start` to `stop`; in fp64, not `scratch`, (4, n), where fp32 is too narrow."""
    sides = [_values(place, start, stop) for place in places]
    wide = np.empty((4, stop - start)) if "F64" in [place.spec.code for place in places] else None
    with np.errstate(over="ignore", invalid="ignore"):
        found = _sums_of(sides, scratch[:, : stop - start] if wide is None else wide)
        if wide is None and not all(map(math.isfinite, found)):
            found = _sums_of(sides, np.empty((4, stop - start)))
    gap, size, *products = found
    dd, dg, gg = products or (0.0, 0.0, 0.0)
    return Sums(stop - start, gap, size, dd=dd, dg=dg, gg=gg, finite=math.isfinite(gap + size))


def _values(place: Place, start: int, stop: int) -> tuple[np.ndarray, str]:
    """Return elements as stored, or as training loaded them, and the code of their dtype."""
    if not place.casts:
        return place.array(start, stop), place.spec.code
    return place.block(start, stop).double().numpy(), "F64"


def _sums_of(sides: Sequence[tuple[np.ndarray, str]], scratch: np.ndarray) -> list[float]:
    """Return sum|d| and the sum of both sizes; with a third side d*d, d*g and g*g as well."""
    for (values, code), out in zip(sides, scratch, strict=False):
        _widen(values, code, out)
    products: list[float] = []
    if len(sides) > 2:
        base, learnt, gap, delta = scratch
        np.subtract(gap, base, out=gap)
        np.subtract(learnt, base, out=delta)
        products = [float(delta @ delta), float(delta @ gap), float(gap @ gap)]
    np.subtract(scratch[0], scratch[1], out=scratch[2])
    first, second, apart = np.add.reduce(np.abs(scratch[:3], out=scratch[:3]), axis=1).tolist()
    return [apart, first + second, *products]


def _widen(values: np.ndarray, code: str, out: np.ndarray) -> None:
    """Write numbers into `out`, fp32 or fp64; the bits of bf16 are the upper half of those of fp32."""
    if code != "BF16":
        np.copyto(out, values, casting="unsafe")
    elif out.dtype == np.float32:
        np.left_shift(values, 16, out=out.view(np.uint32), dtype=np.uint32)
    else:
        np.copyto(out, np.left_shift(values, 16, dtype=np.uint32).view(np.float32))
