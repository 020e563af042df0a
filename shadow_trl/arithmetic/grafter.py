"""The arithmetic of a graft on tensors: `grafted = instruct + scale * (tuned - base)`, rounded once, and its figures.

Everything works on blocks: `BlockGrafter` holds scratch memory for one thread and takes equal pieces of the flattened
tensors. Three bf16 tensors at scale 1 are summed in fp32, which is exact enough to round once (see `_sum`); every other
mix is summed in float64 and rounded to odd on the way to 16 bits, so that it is rounded once as well.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .rounding import HALF, random_bits, round_stochastic, round_to_odd
from .sums import Sums

BLOCK = 512 * 1024
"""Elements of a block. Smaller ones stay in faster caches, but the threads then wait for each other between calls."""
_WIDE_BLOCK = 128 * 1024
"""Elements that are in fp64 at a time: slower, so the threads wait less often, and larger, so memory counts more."""


def graft_tensor(
    instruct: Tensor,
    base: Tensor,
    tuned: Tensor,
    *,
    scale: float = 1.0,
    instruct_scale: float = 1.0,
    dtype: torch.dtype | None = None,
    rounding: str = "nearest",
    seed: int = 0,
    name: str = "",
) -> Tensor:
    """Add to INSTRUCT what training added to BASE.

    `grafted = instruct + scale * (tuned - base)`; with another `instruct_scale` b,
    `grafted = base + scale * (tuned - base) + b * (instruct - base)`. The sum is exact or in float64, rounded once.

    Args:
        instruct: weight of INSTRUCT, any shape; fp32, bf16, fp16 or fp64.
        base: weight of BASE, same shape, in the dtype in which training loaded it.
        tuned: the same weight after training, same shape.
        scale: multiplier of the delta. Default 1.
        instruct_scale: multiplier of the instruction delta (instruct - base). Default 1.
        dtype: dtype of the result. Default that of `instruct`.
        rounding: `nearest` (ties to even), or `stochastic`: up or down with the probability that keeps the mean.
        seed: chooses the random numbers of stochastic rounding, together with `name` and each element's index alone.
        name: name of the weight.

    Returns:
        the grafted weight, shape of `instruct`, in `dtype`.

    Source: Shadow-FT (arXiv 2505.12716), equation 2; RE-Adapt (arXiv 2405.15007) for `instruct_scale`.

    >>> one = torch.ones(2)
    >>> graft_tensor(5 * one, one, torch.tensor([1.0, 2.0]), scale=0.5)
    tensor([5.0000, 5.5000])
    """
    if not instruct.shape == base.shape == tuned.shape:
        raise ValueError(f"shapes differ: instruct {instruct.shape}, base {base.shape}, tuned {tuned.shape}")
    grafted = torch.empty(instruct.shape, dtype=dtype or instruct.dtype)
    grafter = BlockGrafter(scale, instruct_scale, rounding=rounding, seed=seed, stats=False)
    flat = [tensor.detach().contiguous().view(-1) for tensor in (grafted, instruct, base, tuned)]
    for start in range(0, grafted.numel(), BLOCK):
        pieces = [tensor[start : start + BLOCK] for tensor in flat]
        grafter.graft(*pieces, name=name, index=start)
    return grafted


def graft_low_rank(
    instruct: Tensor,
    left: Tensor,
    right: Tensor,
    *,
    factor: float = 1.0,
    scale: float = 1.0,
    rounding: str = "nearest",
    seed: int = 0,
    name: str = "",
) -> Tensor:
    """Return `instruct + scale * factor * (left @ right)`, the graft of a LoRA, in the dtype of `instruct`.

    Args:
        instruct: weight of INSTRUCT, (out, in); fp32, bf16, fp16 or fp64.
        left: lora_B, (out, r).
        right: lora_A, (r, in).
        factor: alpha / r of LoRA. Default 1.
        scale: multiplier of the delta. Default 1.
        rounding: `nearest` or `stochastic`, as in `graft_tensor`.
        seed: of stochastic rounding.
        name: name of the weight, for stochastic rounding.

    >>> graft_low_rank(torch.zeros(1, 2), torch.ones(1, 1), torch.tensor([[1.0, 2.0]]), factor=2.0, scale=0.5)
    tensor([[1., 2.]])
    """
    if instruct.shape != (left.shape[0], right.shape[1]):
        raise ValueError(f"shapes differ: instruct {instruct.shape}, left {left.shape}, right {right.shape}")
    instruct, left, right = (side.detach().contiguous() for side in (instruct, left.float(), right.float()))
    grafted = torch.empty_like(instruct)
    grafter = BlockGrafter(scale, rounding=rounding, seed=seed, stats=False)
    columns = instruct.shape[1]
    rows = max(BLOCK // columns, 1)
    for first in range(0, instruct.shape[0], rows):
        out, block = (side[first : first + rows].view(-1) for side in (grafted, instruct))
        grafter.add_low_rank(
            out, block, left[first : first + rows], right, 0, factor=factor, name=name, index=first * columns
        )
    return grafted


class BlockGrafter:
    """Grafts blocks of flattened tensors with scratch memory of its own; one for each thread.

    Args:
        scale, instruct_scale, rounding, seed: as in `graft_tensor`.
        stats: whether to measure sigma, realised and noise along the way. Default True.
        size: elements of the largest block. Default `BLOCK`.
    """

    def __init__(
        self,
        scale: float = 1.0,
        instruct_scale: float = 1.0,
        *,
        rounding: str = "nearest",
        seed: int = 0,
        stats: bool = True,
        size: int = BLOCK,
    ) -> None:
        self.scale = scale
        self.instruct_scale = instruct_scale
        self.rounding = rounding
        self.seed = seed
        self.stats = stats
        self.size = size
        self._scratch: dict[tuple[str, torch.dtype], Tensor] = {}

    def graft(
        self, out: Tensor, instruct: Tensor, base: Tensor, tuned: Tensor, *, name: str = "", index: int = 0
    ) -> Sums:
        """Write the graft of one block into `out` and return its sums.

        Args:
            out: where it goes, (n,), the dtype of the result.
            instruct: (n,).
            base: (n,).
            tuned: (n,).
            name: name of the weight, for stochastic rounding.
            index: index of the block's first element in the flattened weight.
        """
        plain = self.scale == 1.0 and self.instruct_scale == 1.0 and self.rounding == "nearest"
        sides = (out, instruct, base, tuned)
        narrow = plain and all(side.dtype == torch.bfloat16 for side in sides)
        step = BLOCK if narrow else _WIDE_BLOCK
        sums = Sums()
        for start in range(0, out.numel(), step):
            piece, *others = (side[start : start + step] for side in sides)
            part = Sums(piece.numel())
            total, minus = self._sum(part, torch.float32 if narrow else torch.float64, *others)
            self._store(piece, total, name, index + start)
            sums += self._add_figures(part, piece, total, minus)
        return sums

    def add_low_rank(
        self,
        out: Tensor,
        instruct: Tensor,
        left: Tensor,
        right: Tensor,
        skip: int,
        *,
        factor: float,
        base: Tensor | None = None,
        name: str = "",
        index: int = 0,
    ) -> Sums:
        """Write `instruct + scale * factor * (left @ right)` of one block into `out` and return its sums.

        Args:
            out: where it goes, (n,).
            instruct: (n,); the block begins `skip` elements into the first row and may end within the last.
            left: rows of lora_B, (rows, r), fp32.
            right: lora_A, (r, columns), fp32.
            skip: elements of the first row before the block.
            factor: alpha / r of LoRA.
            base: (n,), needed at another instruct scale only.
            name: as in `graft`.
            index: as in `graft`.
        """
        product = self._get("product", torch.float32, left.shape[0] * right.shape[1])
        torch.mm(left, right, out=product.view(left.shape[0], right.shape[1]))
        minus = product[skip : skip + out.numel()]
        # Adding zero turns -0.0 into 0.0: x - 0.0 keeps the sign of a zero x.
        minus.mul_(-self.scale * factor).add_(0.0)
        if self.instruct_scale == 1.0 and self.rounding == "nearest" and instruct.dtype != torch.float64:
            total = self._get("total", torch.float32, out.numel()).copy_(instruct).sub_(minus)
        else:
            wide = self._get("minus", torch.float64, out.numel()).copy_(minus)
            minus, total = wide, self._get("total", torch.float64, out.numel()).copy_(instruct)
            if base is not None:
                self._shift(minus, total, base)
            total.sub_(minus)
        self._store(out, total, name, index)
        return self._add_figures(Sums(out.numel()), out, total, minus)

    def _sum(
        self, sums: Sums, dtype: torch.dtype, instruct: Tensor, base: Tensor, tuned: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Return (exact sum, instruct - exact sum) and add the gap of BASE and INSTRUCT to `sums` where it is wanted.

        The sum is instruct - (base - tuned). For bf16 at scale 1, fp32 is exact: exponents within 2^16 make
        `base - tuned` exact (8 bits of mantissa, 24 in fp32), and the sum too unless it carries beyond the largest
        exponent; a lost bit is then far below a tie of bf16, whose rounding it cannot turn. So the one rounding that
        counts is the last. Everything else is summed in fp64.
        """
        minus, total, spare = (self._get(name, dtype, instruct.numel()) for name in ("minus", "total", "spare"))
        minus.copy_(base)
        total.copy_(instruct)
        if self.stats:
            sums.gap, sums.size = _gap_of(minus, total, spare)
            if not math.isfinite(sums.gap + sums.size):  # too large for fp32, or not finite, which is found below
                sums.gap, sums.size = _gap_of(
                    minus.double(), total.double(), torch.empty_like(spare, dtype=torch.float64)
                )
        minus.sub_(spare.copy_(tuned))
        if self.scale != 1.0:
            minus.mul_(self.scale)
        self._shift(minus, total, base)
        # x - 0.0 keeps the sign of a zero x, x - (-0.0) does not; only a base of -0.0 makes one at scale 1.
        if dtype == torch.float64 or int(base.view(torch.int16).min()) == -(2**15):
            minus.add_(0.0)
        return total.sub_(minus), minus

    def _shift(self, minus: Tensor, total: Tensor, base: Tensor) -> None:
        """Add `(1 - b) * (instruct - base)` to `minus`: instruct less that is `b * instruct + (1 - b) * base`."""
        if self.instruct_scale != 1.0:
            shift = self._get("spare", torch.float64, total.numel()).copy_(base).neg_().add_(total)
            minus.add_(shift, alpha=1.0 - self.instruct_scale)

    def _store(self, out: Tensor, total: Tensor, name: str, index: int) -> None:
        if out.dtype not in HALF:
            out.copy_(total)
        elif self.rounding == "stochastic":
            for start in range(0, out.numel(), _WIDE_BLOCK):
                stop = start + _WIDE_BLOCK
                self._store_stochastic(out[start:stop], total[start:stop], name, index + start)
        elif total.dtype == torch.float64:
            out.copy_(round_to_odd(total, self._get("spare", torch.float64, out.numel())))
        else:
            out.copy_(total)

    def _store_stochastic(self, out: Tensor, total: Tensor, name: str, index: int) -> None:
        n = out.numel()
        value = self._get("rounded", torch.float64, n).copy_(total)
        draws = random_bits(self.seed, name, index, self._get("draws", torch.int64, 2 * n).view(2, n))
        out.copy_(round_stochastic(value, draws, out.dtype, self._get("spare", torch.float64, n)))

    def _add_figures(self, sums: Sums, out: Tensor, total: Tensor, minus: Tensor) -> Sums:
        if not self.stats:
            sums.finite = math.isfinite(out.sum()) or is_finite(out)
            return sums
        error = self._get("spare", total.dtype, out.numel()).copy_(out).sub_(total)
        sums.dd, sums.ed, sums.ee = _dots(error, minus)
        sums.bd = sums.ed if out.dtype == torch.bfloat16 else self._error_in_bf16(out, total, minus)
        if not math.isfinite(sums.dd + sums.ed + sums.ee):
            sums.finite = is_finite(out) and is_finite(total)
            if sums.finite:  # the squares overflow fp32, the values do not
                sums.dd, sums.ed, sums.ee = _dots(error.double(), minus.double())
        return sums

    def _error_in_bf16(self, out: Tensor, total: Tensor, minus: Tensor) -> float:
        """Return the sum over (stored, then rounded to bf16, less exact) times the change."""
        loaded = self._get("loaded", torch.bfloat16, out.numel()).copy_(out)
        error = torch.sub(loaded, total, out=self._get("lost", total.dtype, out.numel()))
        _, along, _ = _dots(error, minus)
        return along if math.isfinite(along) else _dots(error.double(), minus.double())[1]

    def _get(self, name: str, dtype: torch.dtype, n: int) -> Tensor:
        key = (name, dtype)
        found = self._scratch.get(key)
        if found is None or found.numel() < n:
            found = self._scratch[key] = torch.empty(max(n, self.size), dtype=dtype)
        return found if found.numel() == n else found[:n]


def _gap_of(base: Tensor, instruct: Tensor, spare: Tensor) -> tuple[float, float]:
    gap = float(torch.sub(base, instruct, out=spare).abs_().sum())
    return gap, sum(float(torch.abs(side, out=spare).sum()) for side in (base, instruct))


def is_finite(tensor: Tensor) -> bool:
    """Whether every element is a finite number."""
    return bool(torch.isfinite(tensor).all())


def _dots(error: Tensor, minus: Tensor) -> tuple[float, float, float]:
    dd = float(torch.dot(minus, minus))
    if dd < 1e-30 and minus.dtype == torch.float32:  # squares of small deltas vanish in fp32
        error, minus = error.double(), minus.double()
        dd = float(torch.dot(minus, minus))
    return dd, -float(torch.dot(error, minus)), float(torch.dot(error, error))
