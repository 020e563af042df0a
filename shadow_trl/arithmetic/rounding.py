"""Rounding float64 to 16 bits once: to the nearest, or up and down at random with the mean kept."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor

HALF = (torch.bfloat16, torch.float16)
_MANTISSA_BITS = {torch.bfloat16: 7, torch.float16: 10}
_MIN_EXPONENT = {torch.bfloat16: -126, torch.float16: -14}
_GOLDEN = 0x9E3779B97F4A7C15


def random_bits(seed: int, name: str, index: int, scratch: Tensor) -> Tensor:
    """Return integers in [0, 2^32), each a function of the seed, the weight's name and the element's index alone.

    Counter-based (SplitMix64 of key + index), so that shards, threads and blocks do not change them.

    Args:
        seed: any integer.
        name: name of the weight.
        index: index of the first element in the flattened weight.
        scratch: (2, n), int64, overwritten: fresh memory of this size would cost more than the numbers.

    Returns:
        (n,), int64, the first row of `scratch`.

    Source: Steele, Lea, Flood, "Fast splittable pseudorandom number generators", OOPSLA 2014.
    """
    key = int.from_bytes(hashlib.sha256(f"{seed}\0{name}".encode()).digest()[:8], "little")
    state, spare = scratch
    torch.arange(index + 1, index + state.numel() + 1, out=state)
    state.mul_(_signed(_GOLDEN)).add_(_signed(key))  # int64 wraps as unsigned does
    for shift, multiplier in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        state.bitwise_xor_(_shift_right(state, shift, spare)).mul_(_signed(multiplier))
    state.bitwise_xor_(_shift_right(state, 31, spare))
    return _shift_right(state, 32, state)


def round_stochastic(value: Tensor, draws: Tensor, dtype: torch.dtype, spare: Tensor) -> Tensor:
    """Round to a 16-bit dtype, away from zero with the probability that keeps the mean; representable values stay.

    Args:
        value: float64, (n,), finite; overwritten.
        draws: random integers in [0, 2^32), (n,); overwritten.
        dtype: bfloat16 or float16.
        spare: float64, (n,), overwritten.

    Returns:
        `value` with values of `dtype` (beyond its largest: that become infinite on conversion).
    """
    if dtype == torch.bfloat16 and float(torch.abs(value, out=spare).min()) >= 2.0**-126:
        # Without subnormals the step is 2^45 in the bits of fp64, at any exponent: add a part of it and cut.
        value.view(torch.int64).add_(draws.bitwise_left_shift_(13)).bitwise_and_(-(2**45))
        return value
    spare.copy_(draws).mul_(2.0**-32)
    exponent = torch.frexp(value).exponent.sub_(1).clamp_(min=_MIN_EXPONENT[dtype])
    step = torch.ldexp(torch.ones_like(value), exponent - _MANTISSA_BITS[dtype])
    sign = value.clone()
    return value.abs_().div_(step).add_(spare).floor_().mul_(step).copysign_(sign)


def round_to_odd(value: Tensor, spare: Tensor) -> Tensor:
    """Cut float64 to the 24 bits of fp32 with the last bit set where anything was cut off.

    Conversion to fp32 is then exact and the conversion from fp32 to 16 bits the only rounding (Boldo, Melquiond 2008).
    Without it a value next to a tie is rounded twice.
    """
    cut = 2**29 - 1
    bits, low = value.view(torch.int64), spare.view(torch.int64)
    torch.bitwise_and(bits, cut, out=low)
    low.add_(cut).bitwise_or_(bits).bitwise_and_(~cut)
    return spare.float()


def _shift_right(value: Tensor, bits: int, out: Tensor) -> Tensor:
    return torch.bitwise_right_shift(value, bits, out=out).bitwise_and_(2 ** (64 - bits) - 1)


def _signed(value: int) -> int:
    return (value ^ 2**63) - 2**63
