"""Correct rounding by integers and fractions, independent of torch's conversions.

torch converts float64 to 16 bits by way of float32, which rounds twice: it is no oracle for one rounding.
"""

from __future__ import annotations

from fractions import Fraction

import torch

# dtype -> (bits of the significand with the hidden one, smallest exponent of a normal number, largest finite number)
FORMATS = {
    torch.bfloat16: (8, -126, Fraction(255, 128) * 2**127),
    torch.float16: (11, -14, Fraction(65504)),
    torch.float32: (24, -126, Fraction(2**24 - 1, 2**23) * 2**127),
}


def exact(tensor: torch.Tensor) -> list[Fraction]:
    """Return the elements as fractions; fp32 and 16-bit values are exact in float64."""
    return [Fraction(value) for value in tensor.double().flatten().tolist()]


def step_at(value: Fraction, dtype: torch.dtype) -> Fraction:
    """Return the distance of neighbouring numbers of `dtype` around `value`."""
    bits, low, _ = FORMATS[dtype]
    exponent = low
    size = abs(value)
    if size:
        exponent = max(size.numerator.bit_length() - size.denominator.bit_length(), low)
        if Fraction(2) ** exponent > size:
            exponent = max(exponent - 1, low)
    return Fraction(2) ** (exponent - bits + 1)


def round_exact(value: Fraction, dtype: torch.dtype) -> Fraction:
    """Round to the nearest number of `dtype`, ties to even; beyond the largest there is no answer."""
    step = step_at(value, dtype)
    rounded = round(value / step) * step  # Python rounds a fraction to the even integer
    assert abs(rounded) <= FORMATS[dtype][2], "overflow"
    return rounded
