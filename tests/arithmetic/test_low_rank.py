"""Truncated singular value decomposition of a delta, against the definition in float64."""

from __future__ import annotations

import pytest
import torch

from shadow_trl.arithmetic import low_rank
from shadow_trl.arithmetic.low_rank import truncate


def matrix(rows, columns, spectrum, seed=0):
    """Return U diag(spectrum) V^T with random orthonormal U and V, float64."""
    generator = torch.Generator().manual_seed(seed)
    count = len(spectrum)
    u, v = (
        torch.linalg.qr(torch.randn(size, count, generator=generator, dtype=torch.float64))[0]
        for size in (rows, columns)
    )
    return (u * torch.tensor(spectrum, dtype=torch.float64)) @ v.T


@pytest.mark.parametrize("shape", [(6, 9), (9, 6)])
@pytest.mark.parametrize("rank", [1, 2, 4])
def test_the_error_is_that_of_the_values_left_out(shape, rank):
    """Eckart and Young: with singular values 8, 4, 2, 1 the squared error of rank r is the sum of the squares left."""
    values = [8.0, 4.0, 2.0, 1.0]
    delta = matrix(*shape, values)
    left, right, energy = truncate(delta.float(), rank)
    assert (left.shape, right.shape) == ((shape[0], rank), (rank, shape[1]))
    assert left.dtype == right.dtype == torch.float32
    rest = sum(value**2 for value in values[rank:])
    assert float((left.double() @ right.double() - delta).square().sum()) == pytest.approx(rest, abs=1e-9)
    assert energy == pytest.approx(1 - rest / 85, rel=1e-6)


def test_ranks_beyond_the_matrix_and_zero_deltas():
    left, right, energy = truncate(matrix(3, 5, [2.0, 1.0, 0.5]), 10)
    assert (left.shape, right.shape) == ((3, 3), (3, 5))
    assert energy == pytest.approx(1)
    left, right, energy = truncate(torch.zeros(4, 5), 2)
    assert not left.any()
    assert not right.any()
    assert energy == 1.0
    for wrong in ((torch.zeros(3), 1), (torch.zeros(2, 2), 0)):
        with pytest.raises(ValueError, match="needs a matrix"):
            truncate(*wrong)


def test_bf16_and_tiny_deltas_are_decomposed_in_float64():
    delta = matrix(20, 30, [1e-24, 5e-25]).float()
    left, right, energy = truncate(delta, 2)
    assert float((left.double() @ right.double() - delta.double()).norm() / delta.double().norm()) < 1e-6
    assert energy == pytest.approx(1)
    assert truncate(matrix(20, 30, [1.0, 0.5]).bfloat16(), 2)[2] > 0.999


@pytest.mark.parametrize(
    ("size", "rank", "exact"),
    [
        (100, 4, True),  # small: whatever the rank
        (102, 35, True),  # large, but 35 + 16 directions are half of it
        (102, 34, False),
    ],
)
def test_the_decomposition_is_exact_up_to_a_size_and_from_half_of_the_directions_on(size, rank, exact, monkeypatch):
    """Of a flat spectrum the projection misses part of what can be kept, the whole decomposition nothing."""
    monkeypatch.setattr(low_rank, "EXACT", 100)
    monkeypatch.setattr(low_rank, "ITERATIONS", 0)
    noise = torch.randn(size, size, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    squares = torch.linalg.svdvals(noise).square()
    missed = 1 - truncate(noise, rank)[2] / float(squares[:rank].sum() / squares.sum())
    assert (abs(missed) < 1e-12) if exact else (missed > 1e-2)


@pytest.mark.parametrize("shape", [(300, 500), (500, 300)])
def test_the_random_projection_of_large_matrices(shape, monkeypatch):
    """A low rank comes back to 1e-6; of a flat spectrum nearly all that can be kept is; the seed is fixed."""
    monkeypatch.setattr(low_rank, "EXACT", 100)
    delta = matrix(*shape, [1.0, 0.7, 0.1, 1e-3], seed=3).float()
    left, right, energy = truncate(delta, 8)
    assert float((left.double() @ right.double() - delta.double()).norm() / delta.double().norm()) < 2e-6
    assert energy == pytest.approx(1, abs=1e-6)
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    squares = torch.linalg.svdvals(noise.double()).square()
    best = float(squares[:8].sum() / squares.sum())
    state = torch.get_rng_state()
    left, right, energy = truncate(noise, 8)
    assert torch.equal(torch.get_rng_state(), state)
    assert best * (1 - 2e-2) < energy <= best * (1 + 1e-6)
    kept = 1 - float((noise.double() - left.double() @ right.double()).square().sum() / noise.double().square().sum())
    assert energy == pytest.approx(kept, rel=1e-4)
    torch.manual_seed(5)
    assert torch.equal(truncate(noise, 8)[0], left)
