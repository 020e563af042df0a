"""The best low-rank approximation of a delta."""

from __future__ import annotations

import torch
from torch import Tensor


def truncate(delta: Tensor, rank: int) -> tuple[Tensor, Tensor, float]:
    """Return the product of two factors that is nearest to a delta (truncated singular value decomposition).

    Args:
        delta: (out, in), any floating dtype.
        rank: of the factors; at most min(out, in) is used.

    Returns:
        left (out, r) and right (r, in), fp32, with `left @ right` near `delta`; and the kept share of the squared
        Frobenius norm, 1.0 for a delta of zeros.
    """
    wide = delta.double() if delta.numel() < 2**22 else delta.float()
    left, sizes, right = torch.linalg.svd(wide, full_matrices=False)
    kept = sizes[:rank]
    total = float(sizes.double().square().sum())
    energy = float(kept.double().square().sum()) / total if total > 0 else 1.0
    root = kept.sqrt()
    return (left[:, :rank] * root).float().contiguous(), (root[:, None] * right[:rank]).float().contiguous(), energy
