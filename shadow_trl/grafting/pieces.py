"""What the pipeline of a graft works on: jobs for weights, and files made of jobs."""

from __future__ import annotations

import bisect
import math
from collections.abc import Iterator
from dataclasses import dataclass, field

from ..arithmetic.grafter import BLOCK
from ..checkpoints.checkpoint import Place
from ..checkpoints.header import dtype_of


@dataclass(frozen=True)
class LowRank:
    """A delta `factor * left @ right` of rank r.

    Args:
        left: lora_B, (rows, r) on disk; lora_A, (r, rows), when `transposed`.
        right: lora_A, (r, columns) on disk; lora_B, (columns, r), when `transposed`.
        factor: what the product is multiplied with.
        columns: columns of the weight.
        transposed: whether the weight is stored as (in, out), as GPT-2 does.
    """

    left: Place
    right: Place
    factor: float
    columns: int
    transposed: bool = False


@dataclass(frozen=True)
class WeightJob:
    """What to write for one tensor of the result.

    Args:
        name: name in the result.
        code: dtype in the result, in the words of safetensors.
        shape: its shape.
        instruct: where INSTRUCT's weight lies.
        base, tuned: where the delta comes from; None where there is none.
        low_rank: the delta as a product, in the place of `tuned`.
        runs: ranges of elements that receive the delta, the others are copied; None for all.
    """

    name: str
    code: str
    shape: tuple[int, ...]
    instruct: Place
    base: Place | None = None
    tuned: Place | None = None
    low_rank: LowRank | None = None
    runs: tuple[tuple[int, int], ...] | None = None

    @property
    def grafted(self) -> bool:
        """Whether the weight receives a delta."""
        return self.tuned is not None or self.low_rank is not None

    def copied(self) -> WeightJob:
        """Return the job that writes INSTRUCT's weight as it is."""
        return WeightJob(self.name, self.code, self.shape, self.instruct)


@dataclass
class OutputFile:
    """One file of the result: its header, then its tensors one after another.

    Args:
        name: file name.
        header: bytes before the first tensor.
        jobs: the tensors in the order of their bytes.
        starts: byte of the file at which each begins.
        size: bytes of the file.
    """

    name: str
    header: bytes
    jobs: list[WeightJob]
    starts: list[int] = field(init=False)
    size: int = field(init=False)

    def __post_init__(self) -> None:
        self.starts, at = [], len(self.header)
        for job in self.jobs:
            self.starts.append(at)
            at += math.prod(job.shape) * dtype_of(job.code).itemsize
        self.size = at

    def parts(self, low: int, high: int) -> Iterator[tuple[WeightJob, int]]:
        """Yield the tensors with bytes in `low` to `high`, each with the byte of the file at which it begins."""
        first = max(bisect.bisect_right(self.starts, low) - 1, 0)
        for job, start in zip(self.jobs[first:], self.starts[first:], strict=True):
            if start >= high:
                return
            yield job, start


def blocks_of(job: WeightJob, first: int, last: int) -> Iterator[tuple[int, int, bool]]:
    """Cut elements `first` to `last` into blocks: (start, stop, whether the delta is added)."""
    runs = job.runs if job.runs is not None else ((0, last),)
    at = first
    for run_start, run_stop in runs if job.grafted else ():
        start, stop = max(run_start, at), min(run_stop, last)
        if start >= stop:
            continue
        for low in range(at, start, BLOCK):
            yield low, min(low + BLOCK, start), False
        at = start
        while at < stop:
            end = min(at + BLOCK, stop)
            if job.low_rank is not None and end < stop:  # whole rows, where a block has room for one
                end = max(end // job.low_rank.columns * job.low_rank.columns, 0) or end
                end = end if end > at else min(at + BLOCK, stop)
            yield at, end, True
            at = end
    for low in range(at, last, BLOCK):
        yield low, min(low + BLOCK, last), False
