"""Which rounding and dtype keep the delta, where the user leaves them open: tried on a sample of every weight."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np

from ..arithmetic.kernel import BITS
from ..arithmetic.sums import Sums
from .blocks import JobGrafter, blocks_of
from .jobs import Jobs, WeightJob
from .options import GraftOptions
from .reports import drowns

_HALF = ("BF16", "F16")
_SAMPLE = 16 * 2**20
"""Elements that are tried, of all weights together."""
_PARTS, _PART = 8, 8 * 2**10
"""Stretches of one weight, and the elements of each: small weights are tried whole, of many weights less of each."""


@dataclass(frozen=True)
class Precision:
    """How a dense result is rounded.

    Args:
        jobs: the plan, in the dtype that is written.
        options: with the rounding, and where it is chosen the dtype, in the place of `auto`.
        because: why it is not rounded to nearest in INSTRUCT's dtype, where that was chosen here.
    """

    jobs: Jobs
    options: GraftOptions
    because: str | None = None


def choose_precision(jobs: Jobs, options: GraftOptions) -> Precision:
    """Choose the rounding, and the dtype, where `rounding` is `auto`; what the user chose stays.

    To nearest, unless that keeps less than 0.9 of the delta. Then stochastic, which keeps its size. Where that puts so
    much noise on the delta that its effect is lost in it, the result is in float32, if `dtype` is `auto` too.
    """
    if options.rounding != "auto":
        return Precision(jobs, options)
    nearest = replace(options, rounding="nearest")
    near = _tried(jobs, nearest)
    # What is not finite ends the graft, with its names.
    if near.realised is None or not near.finite or not drowns(near.realised, near.noise, "nearest"):
        return Precision(jobs, nearest)
    because = f"rounding to nearest would keep {near.realised:.2g} of the delta"
    stochastic = replace(options, rounding="stochastic")
    drawn = _tried(jobs, stochastic)
    if options.dtype != "auto" or not drowns(drawn.realised, drawn.noise, "stochastic"):
        return Precision(jobs, stochastic, because)
    because += f", and stochastic rounding {drawn.realised:.2g} with noise of {drawn.noise:.2g} times its norm"
    wide = replace(nearest, dtype="float32")
    return Precision(jobs.in_dtype(wide), wide, because)


def _tried(jobs: Jobs, options: GraftOptions) -> Sums:
    """Return the sums over all that is rounded to 16 bits, extrapolated from a sample of each weight."""
    rounded = [job for job in jobs.weights if job.grafted and job.code in _HALF]
    grafter, total = JobGrafter(replace(options, stats=True)), Sums()
    for job in rounded:
        found = Sums()
        for start, stop in _stretches(job, _SAMPLE // len(rounded)):
            for block in (block for block in blocks_of(job, start, stop) if block.grafted):
                out = np.empty(block.stop - block.start, BITS[job.code])
                found += grafter.graft(job, out, block.start, block.stop)
        if found.elements:
            total += found.times(_grafted_elements(job) / found.elements)
    return total


def _stretches(job: WeightJob, room: int) -> Iterator[tuple[int, int]]:
    """Yield ranges of elements, evenly over those that receive the delta: all of them where there is room."""
    runs = job.runs if job.runs is not None else ((0, job.instruct.spec.numel),)
    whole = _grafted_elements(job)
    if whole <= min(room, _PARTS * _PART):
        yield from runs
        return
    parts = max(min(room // _PART, _PARTS), 1)
    for number in range(parts):
        at = (2 * number + 1) * whole // (2 * parts)  # of the elements that receive the delta
        for start, stop in runs:
            if at < stop - start:
                yield start + at, min(start + at + _PART, stop)
                break
            at -= stop - start


def _grafted_elements(job: WeightJob) -> int:
    return job.instruct.spec.numel if job.runs is None else sum(stop - start for start, stop in job.runs)
