"""The sum on tensors: rounded once, line by line of its contract, against fractions."""

from __future__ import annotations

import itertools
import math
from fractions import Fraction

import pytest
import torch
from graft_tensor import graft_tensor
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import BF16, DTYPES, FP16, FP32, ZEROS, bits, exact, exact_sum, step_at, weights, wrong

from shadow_trl.arithmetic.grafter import BLOCK, BlockGrafter, array_of, graft_low_rank
from shadow_trl.arithmetic.sums import Sums

MIXES = list(itertools.product(DTYPES, repeat=3))


# --- contract C5, line by line -------------------------------------------------------------------------------------


@pytest.mark.parametrize("output", [BF16, FP16])
@pytest.mark.parametrize(("instruct", "base", "tuned"), list(itertools.product((BF16, FP16), repeat=3)))
def test_16_bit_inputs_within_2_to_16_are_rounded_correctly(instruct, base, tuned, output):
    high = 0 if FP16 in (instruct, base, tuned, output) else 5
    sides = [weights(n, 1500, d, high - 16, high) for n, d in enumerate((instruct, base, tuned))]
    grafted = graft_tensor(*sides, dtype=output)
    assert wrong(grafted, exact_sum(*sides)) == []


def test_bf16_sums_next_to_every_kind_of_tie_are_rounded_correctly():
    """All sums of a few numbers near powers of two: carries and ties with a last digit 2^-23 below them."""
    near = [
        1.0,
        1 + 2**-7,
        1 + 3 * 2**-7,
        2 - 2**-7,
        2**-8,
        2**-7 - 2**-15,
        2**-15,
        255 * 2**-23,
        2**-16,
        2**-16 * (1 + 2**-7),
    ]
    values = [sign * value for value in near for sign in (1, -1)]
    sides = [
        torch.tensor(side, dtype=torch.float64).to(BF16)
        for side in zip(*itertools.product(values, repeat=3), strict=True)
    ]
    assert wrong(graft_tensor(*sides), exact_sum(*sides)) == []


def test_bf16_subnormal_and_huge_sums_are_rounded_correctly():
    for low, high in ((-140, -126), (-133, -118), (110, 125)):
        sides = [weights(n, 1500, BF16, low, high) for n in range(3)]
        assert wrong(graft_tensor(*sides), exact_sum(*sides)) == []


@pytest.mark.parametrize("output", [BF16, FP16])
def test_fp32_tuned_of_16_bit_others_is_rounded_correctly(output):
    base, instruct = weights(0, 4000, BF16, -9, -3), weights(1, 4000, BF16, -9, -3)
    tuned = base.float() + weights(2, 4000, FP32, -20, -8)
    grafted = graft_tensor(instruct, base, tuned, dtype=output)
    assert wrong(grafted, exact_sum(instruct, base, tuned)) == []


def test_fp32_tuned_that_lies_next_to_a_tie_is_rounded_once():
    # 2 + 2^-7 is a tie of bf16; with 2^-23 less it must go down, fp32 would round the sum to the tie and then up.
    instruct, base = torch.tensor([1 + 3 * 2**-7], dtype=BF16), torch.tensor([1.0], dtype=BF16)
    tuned = torch.tensor([2 - 2**-23], dtype=FP32)
    assert graft_tensor(instruct, base, tuned).item() == 2 + 2 * 2**-7
    assert (instruct.float() + (tuned - base.float())).to(BF16).item() == 2 + 4 * 2**-7


@pytest.mark.parametrize("output", [BF16, FP16])
@pytest.mark.parametrize("scale", [0.7, -0.3, 2.0, 0.1])
def test_16_bit_output_at_other_scales_is_the_float64_sum_rounded_once(scale, output):
    # 0.7 itself is rounded; 0.7 * 5 is a tie of the 16-bit sum in float64 and would be none with the digits of 0.7.
    sides = [weights(n, 3000, BF16, -8, 0) for n in range(3)]
    grafted = graft_tensor(*sides, scale=scale, dtype=output)
    rows = zip(*(side.tolist() for side in sides), strict=True)
    assert wrong(grafted, [Fraction(i + scale * (t - b)) for i, b, t in rows]) == []


@pytest.mark.parametrize("scale", [2.0, -0.5])
def test_exact_scales_are_rounded_correctly(scale):
    sides = [weights(n, 3000, BF16, -8, 0) for n in range(3)]
    assert wrong(graft_tensor(*sides, scale=scale), exact_sum(*sides, scale=scale)) == []


@pytest.mark.parametrize(("instruct", "base", "tuned"), MIXES)
@pytest.mark.parametrize("scale", [1.0, 0.7])
def test_fp32_output_is_the_sum_in_float64_rounded_once(instruct, base, tuned, scale):
    i, b, t = (weights(n, 400, d, -13, 12) for n, d in enumerate((instruct, base, tuned)))
    grafted = graft_tensor(i, b, t, scale=scale, dtype=FP32)
    expected = [
        float(torch.tensor(x + scale * (z - y), dtype=torch.float64).to(FP32))
        for x, y, z in zip(i.tolist(), b.tolist(), t.tolist(), strict=True)
    ]
    assert grafted.tolist() == expected


@pytest.mark.parametrize("output", DTYPES)
@pytest.mark.parametrize(("instruct", "base", "tuned"), MIXES)
def test_error_is_bounded_everywhere(instruct, base, tuned, output):
    low, high = (-24, 12) if FP16 in (instruct, base, tuned, output) else (-133, 120)
    i, b, t = (weights(n, 300, d, low, high) for n, d in enumerate((instruct, base, tuned)))
    grafted = graft_tensor(i, b, t, dtype=output)
    largest = [max(abs(x) for x in row) for row in zip(exact(i), exact(b), exact(t), strict=True)]
    for found, total, size in zip(exact(grafted), exact_sum(i, b, t), largest, strict=True):
        assert abs(found - total) <= size / 2**23 + step_at(total, output) / 2


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("other", DTYPES)
@pytest.mark.parametrize("scale", [1.0, 0.7, -2.0])
def test_equal_tuned_and_base_give_instruct_bit_by_bit(dtype, other, scale):
    instruct = torch.cat([ZEROS, weights(0, 200, FP32, -14, 10)]).to(dtype)
    base = torch.cat([torch.tensor([0.0, 0.0, -0.0, -0.0, 3.0, -0.0]), weights(1, 200, FP32, -14, 10)]).to(other)
    tuned = base.clone()
    tuned[:4] = torch.tensor([-0.0, 0.0, 0.0, 0.0])  # equal by value, not by sign
    assert bits(graft_tensor(instruct, base, tuned, scale=scale)) == bits(instruct)


def test_negative_zero_survives_an_unequal_zero_in_bf16():
    instruct, base, tuned = (torch.tensor([value], dtype=BF16) for value in (-0.0, -0.0, 0.0))
    assert bits(graft_tensor(instruct, base, tuned)) == bits(instruct)


@pytest.mark.parametrize("dtype", DTYPES)
def test_instruct_equal_to_base_gives_tuned(dtype):
    base, change = weights(0, 2000, dtype, -6, 0), weights(1, 2000, dtype, -8, 2)
    tuned = (base.double() + change.double()).to(dtype)
    kept = tuned.double().abs() >= base.double().abs() * 2**-16
    assert torch.equal(graft_tensor(base.clone(), base, tuned)[kept], tuned[kept])


def test_two_stages_add_up_in_fp32():
    base, sft, dpo, instruct = (weights(n, 500, FP32, -8, -4) for n in range(4))
    once = graft_tensor(instruct, base, dpo)
    twice = graft_tensor(graft_tensor(instruct, base, sft), sft, dpo)
    torch.testing.assert_close(once, twice, rtol=1e-6, atol=2**-4 * 1e-6)


@pytest.mark.parametrize(("scale", "instruct_scale"), [(0.5, 0.25), (1.0, 2.0), (1.0, 0.0), (0.0, 1.0)])
def test_instruct_scale_moves_the_instruction_delta(scale, instruct_scale):
    i, b, t = (weights(n, 20_000, BF16, -24, 0) for n in range(3))  # too far apart for fp32
    grafted = graft_tensor(i, b, t, scale=scale, instruct_scale=instruct_scale)
    assert wrong(grafted, exact_sum(i, b, t, scale, instruct_scale)) == []


def test_blocks_do_not_change_the_result():
    sides = [weights(n, BLOCK + 77, BF16, -8, -2) for n in range(3)]
    whole = graft_tensor(*sides)
    tail = graft_tensor(*(side[BLOCK:] for side in sides))
    assert torch.equal(whole[BLOCK:], tail)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(7, 5), (3, BLOCK // 2 + 9), (2000, 700)])
def test_low_rank_delta_is_the_float64_sum_in_every_block(dtype, shape):
    generator = torch.Generator().manual_seed(3)
    left, right = torch.randn(shape[0], 2, generator=generator), torch.randn(2, shape[1], generator=generator)
    instruct = torch.randn(shape, generator=generator).to(dtype)
    found = graft_low_rank(instruct, left, right, factor=2.0, scale=0.25)
    delta = 0.5 * (left.double() @ right.double())
    error = (found.double() - (instruct.double() + delta)).abs()
    step = {FP32: 2**-24, BF16: 2**-8, FP16: 2**-11}[dtype]
    size = left.double().abs() @ right.double().abs() + instruct.double().abs()
    assert found.dtype == dtype
    assert (error <= (instruct.double() + delta).abs() * step + 2**-21 * size).all()


def test_low_rank_delta_of_zero_is_instruct_bit_by_bit():
    instruct = torch.tensor([[0.0, -0.0, 1.0]])
    assert bits(graft_low_rank(instruct, torch.zeros(1, 1), torch.ones(1, 3))) == bits(instruct)


def test_shapes_must_agree():
    with pytest.raises(ValueError, match="shapes differ"):
        graft_low_rank(torch.ones(2, 3), torch.ones(2, 1), torch.ones(1, 2))


# --- figures -------------------------------------------------------------------------------------------------------


def measured(out: torch.Tensor, *sides: torch.Tensor, stats: bool = True) -> Sums:
    return BlockGrafter(stats=stats).graft(*map(array_of, (out, *sides)))


@pytest.mark.parametrize("dtypes", [(BF16, BF16, BF16), (BF16, BF16, FP32), (FP32, FP32, FP32)])
@pytest.mark.parametrize("output", [BF16, FP32])
def test_figures_equal_their_definitions(dtypes, output):
    i, b = weights(0, 5000, dtypes[0], -8, -4), weights(1, 5000, dtypes[1], -8, -4)
    t = (b.double() + weights(2, 5000, FP32, -14, -9).double()).to(FP32).to(dtypes[2])
    out = torch.empty(5000, dtype=output)
    sums = measured(out, i, b, t)
    wide = [x.double() for x in (i, b, t, out)]
    delta, stored = wide[2] - wide[1], wide[3] - wide[0]
    assert sums.sigma == pytest.approx(
        float((wide[1] - wide[0]).abs().sum() / (wide[1].abs() + wide[0].abs()).sum()), rel=1e-5
    )
    assert sums.delta_norm == pytest.approx(float(delta.norm()), rel=1e-5)
    assert sums.realised == pytest.approx(float(stored @ delta / (delta @ delta)), rel=1e-4)
    assert sums.noise == pytest.approx(float((stored - delta).norm() / delta.norm()), rel=1e-3, abs=1e-7)
    assert sums.elements == 5000
    assert sums.finite


def test_figures_of_tiny_and_huge_deltas_do_not_vanish_or_overflow():
    for exponent in (-100, 100):
        i, b = torch.zeros(64, dtype=BF16), torch.zeros(64, dtype=BF16)
        t = torch.full((64,), 2.0**exponent, dtype=BF16)
        sums = measured(torch.empty(64, dtype=BF16), i, b, t)
        assert sums.delta_norm == 8 * 2.0**exponent
        assert (sums.realised, sums.noise, sums.finite) == (1.0, 0.0, True)


def test_no_delta_has_no_figures():
    one = torch.ones(8, dtype=BF16)
    sums = measured(torch.empty(8, dtype=BF16), one, one, one)
    assert (sums.sigma, sums.delta_norm, sums.realised, sums.noise) == (0.0, 0.0, None, None)


@pytest.mark.parametrize("stats", [True, False])
@pytest.mark.parametrize("side", range(3))
@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("dtype", DTYPES)
def test_values_that_are_not_finite_are_seen(stats, side, value, dtype):
    sides = [weights(n, 1000, dtype, -6, 0) for n in range(3)]
    sides[side][437] = value
    assert not measured(torch.empty(1000, dtype=dtype), *sides, stats=stats).finite


@pytest.mark.parametrize("stats", [True, False])
def test_overflow_of_the_output_is_seen(stats):
    i, b, t = (torch.tensor([value], dtype=FP16) for value in (8000.0, 1.0, 60000.0))
    assert not measured(torch.empty(1, dtype=FP16), i, b, t, stats=stats).finite
    big = torch.full((4,), 3e38, dtype=BF16)
    sums = measured(torch.empty(4, dtype=BF16), big, big, big, stats=stats)
    assert sums.finite  # the sum of the block overflows, no element does


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(*[st.floats(-1e4, 1e4, width=32)] * 3), min_size=1, max_size=20),
    st.tuples(*[st.sampled_from(DTYPES)] * 4),
)
def test_any_values_are_within_the_bound(rows, dtypes):
    i, b, t = (
        torch.tensor(side, dtype=FP32).to(dtype) for side, dtype in zip(zip(*rows, strict=True), dtypes, strict=False)
    )
    grafted = graft_tensor(i, b, t, dtype=dtypes[3])
    largest = [max(abs(x) for x in row) for row in zip(exact(i), exact(b), exact(t), strict=True)]
    for found, total, size in zip(exact(grafted), exact_sum(i, b, t), largest, strict=True):
        assert abs(found - total) <= size / 2**23 + step_at(total, dtypes[3]) / 2
