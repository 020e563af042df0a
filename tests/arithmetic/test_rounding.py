"""Random rounding: the mean is kept, and the draws depend on seed, name and index alone."""

from __future__ import annotations

import hashlib
import math
from fractions import Fraction

import pytest
import torch
from oracle import BF16, FP16, FP32, ZEROS, bits, step_at, weights

from shadow_trl.arithmetic.grafter import graft_tensor, random_bits, round_stochastic


def bits_for(seed: int, name: str, index: int, count: int) -> torch.Tensor:
    return random_bits(seed, name, index, torch.empty(2, count, dtype=torch.int64))


def rounded_with(value: torch.Tensor, draws: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return round_stochastic(value.clone(), draws.clone(), dtype, torch.empty_like(value))


@pytest.mark.parametrize(
    ("dtype", "value"), [(BF16, 1 + 2**-9), (FP16, 1 + 2**-12), (FP16, 2**-24 * 0.25), (BF16, -3e-39)]
)
def test_stochastic_rounding_keeps_the_mean(dtype, value):
    count = 200_000
    rounded = rounded_with(torch.full((count,), value, dtype=torch.float64), bits_for(0, "w", 0, count), dtype)
    step = float(step_at(Fraction(value), dtype))
    lower = math.floor(abs(value) / step) * step
    share = (abs(value) - lower) / step
    assert set(rounded.abs().tolist()) == {lower, lower + step}
    deviation = math.sqrt(share * (1 - share) / count) * step
    assert abs(abs(rounded.mean().item()) - abs(value)) < 4 * deviation
    assert torch.equal(rounded.to(dtype).double(), rounded)


@pytest.mark.parametrize("dtype", [BF16, FP16])
def test_stochastic_rounding_leaves_representable_values(dtype):
    value = torch.cat([ZEROS, weights(0, 3000, FP32, -20, 14)]).to(dtype).double()
    rounded = rounded_with(value, torch.full(value.shape, 2**32 - 1), dtype)
    assert bits(rounded.to(dtype)) == bits(value.to(dtype))


def test_draws_depend_on_seed_name_and_index_alone():
    whole = bits_for(3, "a.weight", 0, 1000)
    assert torch.equal(bits_for(3, "a.weight", 400, 100), whole[400:500])
    assert not torch.equal(bits_for(4, "a.weight", 0, 1000), whole)
    assert not torch.equal(bits_for(3, "b.weight", 0, 1000), whole)
    assert 0 <= whole.min() < 0.01 * 2**32
    assert 0.99 * 2**32 < whole.max() < 2**32
    assert abs(whole.double().mean().item() / 2**32 - 0.5) < 4 / math.sqrt(12 * 1000)


def splitmix64(state: int, count: int) -> list[int]:
    """Steele, Lea, Flood, "Fast splittable pseudorandom number generators", in Python's integers."""
    found = []
    for _ in range(count):
        state = (state + 0x9E3779B97F4A7C15) % 2**64
        mixed = (state ^ state >> 30) * 0xBF58476D1CE4E5B9 % 2**64
        mixed = (mixed ^ mixed >> 27) * 0x94D049BB133111EB % 2**64
        found.append(mixed ^ mixed >> 31)
    return found


@pytest.mark.parametrize(("seed", "name"), [(0, ""), (7, "model.norm.weight")])
def test_the_generator_is_splitmix64(seed, name):
    assert splitmix64(0, 3) == [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F]  # published test vectors
    key = int.from_bytes(hashlib.sha256(f"{seed}\0{name}".encode()).digest()[:8], "little")
    assert bits_for(seed, name, 0, 100).tolist() == [value >> 32 for value in splitmix64(key, 100)]


@pytest.mark.parametrize("dtype", [BF16, FP16])
@pytest.mark.parametrize("low", [-20, -140, -1030])
def test_stochastic_rounding_adds_the_draw_below_the_last_bit_and_cuts(dtype, low):
    """Normal and subnormal values of the dtype and of fp64, against exact fractions."""
    generator = torch.Generator().manual_seed(0)
    digits = (1 + torch.rand(200, generator=generator, dtype=torch.float64)) * (-1.0) ** torch.arange(200)
    value = torch.ldexp(digits, torch.randint(low, low + 25, (200,), generator=generator))
    draws = bits_for(7, "w", 0, 200)
    rounded = rounded_with(value, draws, dtype)
    for x, draw, found in zip(value.tolist(), draws.tolist(), rounded.tolist(), strict=True):
        step = step_at(Fraction(x), dtype)
        assert abs(Fraction(found)) == math.floor(abs(Fraction(x)) / step + Fraction(draw, 2**32)) * step
        assert math.copysign(1, found) == math.copysign(1, x)


def test_stochastic_graft_realises_deltas_that_nearest_loses():
    count = 100_000
    base = weights(0, count, BF16, -7, -5)
    tuned = base.float() + 1e-5
    nearest = graft_tensor(base, base, tuned)
    random = graft_tensor(base, base, tuned, rounding="stochastic", seed=1, name="w")
    assert (nearest.double() - base.double()).mean().item() < 5e-6
    assert (random.double() - base.double()).mean().item() == pytest.approx(1e-5, rel=0.1)
