"""The arithmetic of a graft: `grafted = instruct + scale * (tuned - base)`, rounded once, and its figures.

`BlockGrafter` takes equal pieces of flattened weights as arrays, `graft_low_rank` whole tensors. Three bf16 arrays at
scale 1 are summed in fp32, which is exact enough to round once: exponents within 2^16 make `base - tuned` exact (8 bits
of mantissa, 24 in fp32), and the sum too unless it carries beyond the largest exponent; a lost bit is then far below a
tie of bf16, whose rounding it cannot turn. Every other mix is summed in fp64.
"""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

import numpy as np
from numpy import ndarray

from . import kernel
from .kernel import HALF
from .sums import Sums

if TYPE_CHECKING:
    from torch import Tensor

BLOCK = 512 * 1024
"""Elements of a block. Smaller ones stay in faster caches, but the threads then wait for each other between calls."""


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
        instruct: weight of INSTRUCT, (out, in); fp32, bf16, fp16 or fp64, on the CPU.
        left: lora_B, (out, r).
        right: lora_A, (r, in).
        factor: alpha / r of LoRA. Default 1.
        scale: multiplier of the delta. Default 1.
        rounding: `nearest` (ties to even), or `stochastic`: up or down with the probability that keeps the mean.
        seed: chooses the random numbers of stochastic rounding, together with `name` and each element's index alone.
        name: name of the weight.

    >>> import torch
    >>> graft_low_rank(torch.zeros(1, 2), torch.ones(1, 1), torch.tensor([[1.0, 2.0]]), factor=2.0, scale=0.5)
    tensor([[1., 2.]])
    """
    if instruct.shape != (left.shape[0], right.shape[1]):
        raise ValueError(f"shapes differ: instruct {instruct.shape}, left {left.shape}, right {right.shape}")
    left, right = left.detach().float(), right.detach().float()
    grafted = instruct.new_empty(instruct.shape)
    grafter = BlockGrafter(scale, rounding=rounding, seed=seed, stats=False)
    columns = instruct.shape[1]
    rows = max(BLOCK // columns, 1)
    for first in range(0, instruct.shape[0], rows):
        out, block = (array_of(side[first : first + rows]) for side in (grafted, instruct))
        product = array_of(left[first : first + rows] @ right)
        grafter.add_product(out, block, product, factor=factor, name=name, index=first * columns)
    return grafted


def array_of(tensor: Tensor) -> ndarray:
    """Return the elements of a tensor, flattened, as the kernel takes them; in the same memory if it is contiguous."""
    import torch

    flat = tensor.detach().contiguous().view(-1)
    bits = {torch.bfloat16: torch.uint16, torch.float16: torch.int16}.get(flat.dtype)
    return (flat if bits is None else flat.view(bits)).numpy()


class BlockGrafter:
    """Grafts blocks of flattened weights, given as arrays in the dtypes of `kernel.BITS`.

    `grafted = instruct + scale * (tuned - base)`; with another `instruct_scale` b,
    `grafted = base + scale * (tuned - base) + b * (instruct - base)`. The sum is exact or in float64, rounded once.

    Source: Shadow-FT (arXiv 2505.12716), equation 2; RE-Adapt (arXiv 2405.15007) for `instruct_scale`.

    Args:
        scale: multiplier of the delta. Default 1.
        instruct_scale: multiplier of the instruction delta (instruct - base). Default 1.
        rounding, seed: as in `graft_low_rank`.
        stats: whether to measure sigma, realised and noise along the way. Default True.
    """

    def __init__(
        self,
        scale: float = 1.0,
        instruct_scale: float = 1.0,
        *,
        rounding: str = "nearest",
        seed: int = 0,
        stats: bool = True,
    ) -> None:
        self.scale = scale
        self.shift = None if instruct_scale == 1.0 else np.float64(1.0 - instruct_scale)
        self.stochastic = rounding == "stochastic"
        self.seed = seed
        self.stats = stats

    def graft(
        self, out: ndarray, instruct: ndarray, base: ndarray, tuned: ndarray, *, name: str = "", index: int = 0
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
        bf16 = all(side.dtype == np.uint16 for side in (out, instruct, base, tuned))
        narrow = bf16 and self.scale == 1.0 and self.shift is None and not self.stochastic
        scale = np.float32(1.0) if narrow else np.float64(self.scale)
        return self._sum(out, instruct, base, tuned, None, scale, name, index)

    def add_product(
        self,
        out: ndarray,
        instruct: ndarray,
        product: ndarray,
        *,
        factor: float,
        base: ndarray | None = None,
        name: str = "",
        index: int = 0,
    ) -> Sums:
        """Write `instruct + scale * factor * product` of one block into `out` and return its sums.

        Args:
            out: where it goes, (n,).
            instruct: (n,).
            product: of lora_B and lora_A, (n,), fp32; overwritten.
            factor: alpha / r of LoRA.
            base: (n,), needed at another instruct scale only.
            name: as in `graft`.
            index: as in `graft`.
        """
        np.multiply(product, np.float32(-self.scale * factor), out=product)
        narrow = self.shift is None and not self.stochastic and instruct.dtype != np.float64
        return self._sum(out, instruct, base, None, product, np.float32(1) if narrow else np.float64(1), name, index)

    def _sum(
        self,
        out: ndarray,
        instruct: ndarray,
        base: ndarray | None,
        tuned: ndarray | None,
        product: ndarray | None,
        scale: np.floating,
        name: str,
        index: int,
    ) -> Sums:
        key = self._key(name) if self.stochastic and out.dtype in HALF else None
        measured = True if self.stats else None
        finite, gap, size, dd, ed, ee, bd = kernel.graft(
            out, instruct, base, tuned, product, scale, self.shift, key, index, measured
        )
        return Sums(out.size, gap, size, dd=dd, ed=ed, ee=ee, bd=bd, finite=finite)

    def _key(self, name: str) -> np.uint64:
        """Return what starts the random numbers of a weight: shards, threads and blocks do not change them."""
        return np.uint64(int.from_bytes(hashlib.sha256(f"{self.seed}\0{name}".encode()).digest()[:8], "little"))
