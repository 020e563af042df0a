"""The best low-rank form of a delta: truncated singular value decomposition."""

from __future__ import annotations

import torch
from torch import Tensor

EXACT = 768
"""Smaller side up to which the whole decomposition is worked out, in float64; it costs the cube of this side."""
OVERSAMPLING = 16
"""Directions beyond the rank that the random projection tries; Halko et al. find 5 to 10 enough."""
ITERATIONS = 6
"""Power iterations: they make a slowly falling spectrum fall quickly."""
SEED = 0
"""Of the random projection, so that the same delta gives the same adapter."""


def truncate(delta: Tensor, rank: int) -> tuple[Tensor, Tensor, float]:
    """Return the factors of the rank-`rank` matrix that is nearest to `delta`: `delta ~ left @ right`.

    The singular values are shared out evenly between the factors. Where the smaller side of `delta` is at most `EXACT`,
    or the rank is not small against it, the decomposition is exact in float64. Else it is a random projection with
    `OVERSAMPLING` further directions and `ITERATIONS` power iterations, in float32, from a fixed seed: its energy is
    at most that of the exact one, and the same to about 1e-3 of it or better even where the spectrum is flat.

    Args:
        delta: (out, in), any floating dtype, finite.
        rank: r, at least 1; more than min(out, in) counts as that.

    Returns:
        left (out, r) and right (r, in), fp32, and the energy: |left @ right|^2 / |delta|^2, the kept share of the
        squared Frobenius norm, 0 to 1; 1 where `delta` is zero.

    Source: Eckart, Young (1936); Halko, Martinsson, Tropp (arXiv 0909.4061), algorithms 4.4 and 5.1.

    >>> left, right, energy = truncate(torch.diag(torch.tensor([2.0, 1.0])), 1)
    >>> (left @ right).round(decimals=5).abs(), round(energy, 6)
    (tensor([[2., 0.],
            [0., 0.]]), 0.8)
    """
    if delta.dim() != 2 or rank < 1:
        raise ValueError(f"truncate needs a matrix and a rank of at least 1, got {tuple(delta.shape)} and {rank}")
    smaller = min(delta.shape)
    rank = min(rank, smaller)
    total = float(torch.linalg.vector_norm(delta, dtype=torch.float64)) ** 2
    if total == 0.0:
        return torch.zeros(delta.shape[0], rank), torch.zeros(rank, delta.shape[1]), 1.0
    if smaller <= EXACT or rank + OVERSAMPLING >= smaller // 2:
        u, s, vt = torch.linalg.svd(delta.double(), full_matrices=False)
        u, s, vt = u[:, :rank], s[:rank], vt[:rank]
    else:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(SEED)
            u, s, v = torch.svd_lowrank(delta.float(), q=rank + OVERSAMPLING, niter=ITERATIONS)
        u, s, vt = u[:, :rank], s[:rank], v[:, :rank].T
    root = s.sqrt()
    energy = min(float(s.double().square().sum()) / total, 1.0)
    return (u * root).float().contiguous(), (root[:, None] * vt).float().contiguous(), energy
