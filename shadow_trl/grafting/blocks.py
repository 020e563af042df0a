"""A weight in blocks: how it is cut, and one block of its graft computed from the sides on the disk."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from ..arithmetic.grafter import BLOCK, BlockGrafter
from ..arithmetic.sums import Sums
from .jobs import LowRank, WeightJob
from .options import GraftOptions

if TYPE_CHECKING:
    from numpy import ndarray
    from torch import Tensor


class JobGrafter:
    """Computes blocks of weights as the options say; one for each thread. Only a product of factors needs torch."""

    def __init__(self, options: GraftOptions) -> None:
        how = {name: getattr(options, name) for name in ("scale", "instruct_scale", "rounding", "seed", "stats")}
        self.blocks = BlockGrafter(**how)
        self.factors: dict[str, tuple[LowRank, Tensor]] = {}
        self.scratch: Tensor | None = None
        self.memory = np.empty((3, 8 * BLOCK), np.uint8)  # one row for each side

    def graft(self, job: WeightJob, out: ndarray, start: int, stop: int) -> Sums:
        """Write elements `start` to `stop` of a weight, delta added, into `out`, in its dtype; return their sums."""
        instruct = job.instruct.array(start, stop, self.memory[0])
        base = job.base.array(start, stop, self.memory[1]) if job.base is not None else None
        name = job.instruct.name
        if job.tuned is not None and base is not None:
            return self.blocks.graft(
                out, instruct, base, job.tuned.array(start, stop, self.memory[2]), name=name, index=start
            )
        assert job.low_rank is not None
        product = self._product(job.low_rank, start, stop)
        return self.blocks.add_product(
            out, instruct, product, factor=job.low_rank.factor, base=base, name=name, index=start
        )

    def _product(self, low_rank: LowRank, start: int, stop: int) -> ndarray:
        """Return elements `start` to `stop` of left @ right, fp32, in memory that the next call uses again."""
        import torch

        row, skip = divmod(start, low_rank.columns)
        rows = -(-stop // low_rank.columns) - row
        left, right = self._factors(low_rank, row, rows)
        if self.scratch is None or self.scratch.numel() < rows * low_rank.columns:
            self.scratch = torch.empty(rows * low_rank.columns)
        product = self.scratch[: rows * low_rank.columns]
        torch.mm(left, right, out=product.view(rows, low_rank.columns))
        return product[skip : skip + stop - start].numpy()

    def _factors(self, low_rank: LowRank, row: int, rows: int) -> tuple[Tensor, Tensor]:
        """Return copies of some rows of the left factor and of the right factor, fp32; the right one stays for more."""
        import torch

        left, right = low_rank.left, low_rank.right
        cached = self.factors.get("right")
        if cached is None or cached[0] is not low_rank:
            whole = right.tensor()
            whole = whole.T if low_rank.transposed else whole
            cached = (low_rank, whole.to(torch.float32).contiguous())
            self.factors["right"] = cached
        if low_rank.transposed:
            wanted = left.tensor().T[row : row + rows]
        else:
            rank = left.spec.shape[1]
            wanted = left.block(row * rank, (row + rows) * rank).view(-1, rank)
        return wanted.to(torch.float32, copy=True), cached[1]


class Block(NamedTuple):
    """Elements `start` to `stop` of a flattened weight; `grafted` says whether the delta is added to them."""

    start: int
    stop: int
    grafted: bool


def blocks_of(job: WeightJob, first: int, last: int) -> Iterator[Block]:
    """Cut elements `first` to `last` of a weight into blocks, each grafted or copied as a whole."""
    runs = job.runs if job.runs is not None else ((0, last),)
    at = first
    for run_start, run_stop in runs if job.grafted else ():
        start, stop = max(run_start, at), min(run_stop, last)
        if start >= stop:
            continue
        for low in range(at, start, BLOCK):
            yield Block(low, min(low + BLOCK, start), False)
        at = start
        while at < stop:
            end = min(at + BLOCK, stop)
            if job.low_rank is not None and end < stop:  # whole rows, where a block has room for one
                whole = end - end % job.low_rank.columns
                end = whole if whole > at else end
            yield Block(at, end, True)
            at = end
    for low in range(at, last, BLOCK):
        yield Block(low, min(low + BLOCK, last), False)
