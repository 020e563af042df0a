"""Correct rounding by integers and fractions, independent of torch's conversions.

torch converts float64 to 16 bits by way of float32, which rounds twice: it is no oracle for one rounding.
"""

from __future__ import annotations

from collections.abc import Mapping
from fractions import Fraction

import torch

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
DTYPES = (BF16, FP16, FP32)
ZEROS = torch.tensor([0.0, -0.0, 0.0, -0.0, 1.5, -0.0])

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


def bits(tensor: torch.Tensor) -> list[int]:
    """Return the bits of the elements as whole numbers."""
    return tensor.view({2: torch.int16, 4: torch.int32}[tensor.element_size()]).tolist()


def weights(seed: int, count: int, dtype: torch.dtype, low: int, high: int) -> torch.Tensor:
    """Random signs and digits, exponents from `low` to `high`, cut to the dtype's digits."""
    generator = torch.Generator().manual_seed(seed)
    digits = 1 + torch.rand(count, generator=generator, dtype=torch.float64)
    exponents = torch.randint(low, high + 1, (count,), generator=generator)
    signs = torch.randint(0, 2, (count,), generator=generator) * 2 - 1
    return torch.ldexp(digits * signs, exponents).to(FP32).to(dtype)


def exact_sum(
    instruct: torch.Tensor, base: torch.Tensor, tuned: torch.Tensor, scale: float = 1.0, instruct_scale: float = 1.0
) -> list[Fraction]:
    """Return scale * tuned + instruct_scale * instruct + the rest of BASE, exactly."""
    a, b = Fraction(scale), Fraction(instruct_scale)
    return [a * t + b * i + (1 - a - b) * o for i, o, t in zip(exact(instruct), exact(base), exact(tuned), strict=True)]


def wrong(grafted: torch.Tensor, sums: list[Fraction]) -> list[int]:
    """Return the places where the tensor is not the exact sum, rounded once."""
    found = exact(grafted)
    return [n for n, (f, s) in enumerate(zip(found, sums, strict=True)) if f != round_exact(s, grafted.dtype)]


def relative_distance(one: Mapping[str, torch.Tensor], other: Mapping[str, torch.Tensor]) -> float:
    """Return sum|one - other| / (sum|one| + sum|other|) over all weights, in float64."""
    apart = sum(float((one[name].double() - other[name].double()).abs().sum()) for name in one)
    return apart / sum(float(side[name].double().abs().sum()) for side in (one, other) for name in one)
