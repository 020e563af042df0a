"""Random rounding: the mean is kept, and the draws depend on seed, name and index alone."""

from __future__ import annotations

import hashlib
import math
from fractions import Fraction

import pytest
import torch
from graft_tensor import graft_tensor
from oracle import BF16, FP16, FP32, ZEROS, bits, step_at, weights

from shadow_trl.arithmetic.grafter import BlockGrafter, array_of

FP64 = torch.float64


def rounded(value: torch.Tensor, dtype: torch.dtype, seed: int = 0, name: str = "w", index: int = 0) -> torch.Tensor:
    """Return fp64 values rounded by a graft without a delta, as the elements from `index` on of a weight."""
    found, zero = torch.empty(value.shape, dtype=dtype), torch.zeros_like(value)
    grafter = BlockGrafter(rounding="stochastic", seed=seed)
    grafter.graft(*map(array_of, (found, value, zero, zero)), name=name, index=index)
    return found


@pytest.mark.parametrize(
    ("dtype", "value"), [(BF16, 1 + 2**-9), (FP16, 1 + 2**-12), (FP16, 2**-24 * 0.25), (BF16, -3e-39)]
)
def test_stochastic_rounding_keeps_the_mean(dtype, value):
    count = 200_000
    found = rounded(torch.full((count,), value, dtype=FP64), dtype).double()
    step = float(step_at(Fraction(value), dtype))
    lower = math.floor(abs(value) / step) * step
    share = (abs(value) - lower) / step
    assert set(found.abs().tolist()) == {lower, lower + step}
    deviation = math.sqrt(share * (1 - share) / count) * step
    assert abs(abs(found.mean().item()) - abs(value)) < 4 * deviation


@pytest.mark.parametrize("dtype", [BF16, FP16])
def test_stochastic_rounding_leaves_representable_values(dtype):
    value = torch.cat([ZEROS, weights(0, 3000, FP32, -20, 14)]).to(dtype)
    assert bits(rounded(value.double(), dtype)) == bits(value)


def test_draws_depend_on_seed_name_and_index_alone():
    value = torch.full((1000,), 1 + 2**-8, dtype=FP64)  # up or down, by one bit of each draw
    whole = rounded(value, BF16, 3, "a.weight")
    assert torch.equal(rounded(value[:100], BF16, 3, "a.weight", 400), whole[400:500])
    assert not torch.equal(rounded(value, BF16, 4, "a.weight"), whole)
    assert not torch.equal(rounded(value, BF16, 3, "b.weight"), whole)
    assert 400 < (whole > 1).sum() < 600


def splitmix64(state: int, count: int) -> list[int]:
    """Steele, Lea, Flood, "Fast splittable pseudorandom number generators", in Python's integers."""
    found = []
    for _ in range(count):
        state = (state + 0x9E3779B97F4A7C15) % 2**64
        mixed = (state ^ state >> 30) * 0xBF58476D1CE4E5B9 % 2**64
        mixed = (mixed ^ mixed >> 27) * 0x94D049BB133111EB % 2**64
        found.append(mixed ^ mixed >> 31)
    return found


def test_the_oracle_is_splitmix64():
    assert splitmix64(0, 3) == [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F]  # published test vectors


@pytest.mark.parametrize("dtype", [BF16, FP16])
@pytest.mark.parametrize(("seed", "name", "low"), [(0, "", -20), (7, "model.norm.weight", -140), (7, "w", -1030)])
def test_stochastic_rounding_adds_the_draw_below_the_last_bit_and_cuts(dtype, seed, name, low):
    """Normal and subnormal values of the dtype and of fp64, against exact fractions and the published generator."""
    generator = torch.Generator().manual_seed(0)
    digits = (1 + torch.rand(200, generator=generator, dtype=FP64)) * (-1.0) ** torch.arange(200)
    value = torch.ldexp(digits, torch.randint(low, low + 25, (200,), generator=generator))
    key = int.from_bytes(hashlib.sha256(f"{seed}\0{name}".encode()).digest()[:8], "little")
    draws = [value >> 32 for value in splitmix64(key, 200)]
    found = rounded(value, dtype, seed, name).double()
    for x, draw, stored in zip(value.tolist(), draws, found.tolist(), strict=True):
        step = step_at(Fraction(x), dtype)
        assert abs(Fraction(stored)) == math.floor(abs(Fraction(x)) / step + Fraction(draw, 2**32)) * step
        assert math.copysign(1, stored) == math.copysign(1, x)


def test_stochastic_graft_realises_deltas_that_nearest_loses():
    count = 100_000
    base = weights(0, count, BF16, -7, -5)
    tuned = base.float() + 1e-5
    nearest = graft_tensor(base, base, tuned)
    random = graft_tensor(base, base, tuned, rounding="stochastic", seed=1, name="w")
    assert (nearest.double() - base.double()).mean().item() < 5e-6
    assert (random.double() - base.double()).mean().item() == pytest.approx(1e-5, rel=0.1)
