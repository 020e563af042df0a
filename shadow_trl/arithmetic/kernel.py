"""The arithmetic of a graft, compiled by numba: one loop over the elements of a block, whatever their dtypes.

Arrays hold numbers, or the bits of 16-bit numbers that the loops read and write themselves: `uint16` those of bf16,
`int16` those of fp16. What is computed in, fp32 or fp64, is the type of the argument `scale`.

No addition of the graft is reordered or fused, so its bits are the same on every machine. The sums for the figures are
in fp64, and may be added up in any order (`_add`), without which they could not be computed several at a time.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numba import njit, types
from numba.extending import intrinsic, overload

BITS = {"BF16": "uint16", "F16": "int16", "F32": "float32", "F64": "float64"}
"""Code of a dtype -> the numpy dtype in which the loops take it."""
HALF = (np.dtype("uint16"), np.dtype("int16"))
"""Those of 16 bits."""
_FORMATS = {types.uint16: (-126, 7, 2.0**128), types.int16: (-14, 10, 2.0**16)}
"""Exponent of the smallest normal number, digits after the point, and the power of two that is too large."""
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_MIX = np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB)


def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """Compile for each mix of dtypes when it first comes, kept on the disk where there is a place for it."""
    try:
        compiled = njit(nogil=True, cache=True, error_model="numpy")(function)
    except RuntimeError:  # no place, neither beside this file nor in the home folder
        return njit(nogil=True, error_model="numpy")(function)

    def call(*given: Any) -> Any:
        try:
            return compiled(*given)
        except OSError:  # the disk of the cache is full: what was compiled is in memory
            return compiled(*given)

    return call


@_compiled
def graft(
    out: Any, instruct: Any, base: Any, tuned: Any, product: Any, scale: Any, shift: Any, key: Any, index: int,
    measured: Any,
) -> Any:  # fmt: skip
    """Write `instruct - ((base - tuned) * scale + shift * (instruct - base))`, rounded once, into `out`.

    Arguments that are None cost nothing: their part of the loop is left out when it is compiled.

    Args:
        out: (n,), the result.
        instruct: (n,).
        base: (n,); None where nothing asks for it.
        tuned: (n,); None where there is a product.
        product: (n,), in the place of `(base - tuned) * scale`; None for that.
        scale: of the delta; its type, np.float32 or np.float64, is that of the sum.
        shift: 1 - instruct_scale; None for 0.
        key: of the random numbers (np.uint64), for stochastic rounding to 16 bits; None for rounding to nearest.
        index: of the first element in its weight.
        measured: True to sum up what the figures need; None to leave them 0.

    Returns:
        whether all of the result is finite, sum|base - instruct|, sum|base| + |instruct|, and with d the exact change,
        e = stored - exact, f = stored and rounded to bf16 - exact: sum d*d, sum e*d, sum e*e, sum f*d.
    """
    zero = scale - scale
    bad = False
    gap = size = dd = ed = ee = fd = 0.0
    for n in range(out.size):
        own = _load(instruct, n, scale)
        if product is None:
            minus = (_load(base, n, scale) - _load(tuned, n, scale)) * scale
        else:
            minus = _load(product, n, scale)
        if shift is not None:
            minus = minus + (own - _load(base, n, scale)) * shift
        minus = minus + zero  # x - 0.0 keeps the sign of a zero x, x - (-0.0) does not
        total = own - minus
        stored = _nearest(out, total) if key is None else _drawn(out, total, _random(key, index + n))
        _store(out, n, stored)
        bad |= not np.isfinite(stored)
        if measured is not None:
            if product is None:
                other = _load(base, n, scale)
                gap = _add(gap, np.float64(abs(other - own)))
                size = _add(size, np.float64(abs(other)) + np.float64(abs(own)))
            delta, exact = np.float64(minus), np.float64(total)
            error = np.float64(stored) - exact
            dd = _add(dd, delta * delta)
            ed = _add(ed, -error * delta)
            ee = _add(ee, error * error)
            fd = _add(fd, -(_to_bf16(out, stored) - exact) * delta)
    return not bad, gap, size, dd, ed, ee, fd


@_compiled
def distances(base: Any, other: Any, third: Any) -> Any:
    """Return sum|base - other|, sum|base| + |other|, and with d = other - base and g = third - base d*d, d*g, g*g.

    `third` may be None; the last three sums are then 0.
    """
    gap = size = dd = dg = gg = 0.0
    for n in range(base.size):
        origin, end = _load(base, n, 0.0), _load(other, n, 0.0)
        gap = _add(gap, abs(end - origin))
        size = _add(size, abs(origin) + abs(end))
        if third is not None:
            way = _load(third, n, 0.0) - origin
            dd = _add(dd, (end - origin) * (end - origin))
            dg = _add(dg, (end - origin) * way)
            gg = _add(gg, way * way)
    return gap, size, dd, dg, gg


@_compiled
def convert(out: Any, values: Any) -> Any:
    """Write `values` into `out`, rounded to nearest, and return whether all of them are finite there."""
    bad = False
    for n in range(out.size):
        stored = _nearest(out, _load(values, n, 0.0))
        _store(out, n, stored)
        bad |= not np.isfinite(stored)
    return not bad


@_compiled
def all_finite(values: Any) -> Any:
    """Return whether every number is finite."""
    bad = False
    for n in range(values.size):
        bad |= not np.isfinite(_load(values, n, 0.0))
    return not bad


@njit
def _random(key: Any, counter: Any) -> Any:
    """Return a number in [0, 1), a multiple of 2^-32: SplitMix64 of a counter.

    Source: Steele, Lea, Flood, "Fast splittable pseudorandom number generators", OOPSLA 2014.
    """
    state = key + (np.uint64(counter) + np.uint64(1)) * _GOLDEN
    state = (state ^ (state >> np.uint64(30))) * _MIX[0]
    state = (state ^ (state >> np.uint64(27))) * _MIX[1]
    return np.float64((state ^ (state >> np.uint64(31))) >> np.uint64(32)) * 2.0**-32


@intrinsic
def _add(context: Any, total: Any, value: Any) -> Any:
    """Add numbers of one type in an order that may be changed."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.fadd(*arguments, flags=("reassoc", "nsz"))

    return total(total, total), generate


def _load(values: Any, n: int, like: Any) -> Any:
    """Return element n in the type of `like`."""


@overload(_load, strict=False)
def _load_(values: Any, n: int, like: Any) -> Any:
    if isinstance(values, types.NoneType):  # in a branch that is typed, though never taken
        return lambda values, n, like: like - like
    if values.dtype == types.uint16:
        return lambda values, n, like: type(like)(np.uint32(np.uint32(values[n]) << np.uint32(16)).view(np.float32))
    if values.dtype == types.int16:
        return lambda values, n, like: type(like)(_from_half(np.uint64(np.uint16(values[n]))))
    return lambda values, n, like: type(like)(values[n])


@njit
def _from_half(bits: Any) -> Any:
    """Return the number whose fp16 bits are the lower 16 of `bits`, fp64."""
    exponent, mantissa = (bits >> np.uint64(10)) & np.uint64(31), bits & np.uint64(1023)
    high = np.uint64(2047) if exponent == np.uint64(31) else exponent + np.uint64(1008)
    normal = np.uint64((high << np.uint64(52)) | (mantissa << np.uint64(42))).view(np.float64)
    size = np.float64(mantissa) * 2.0**-24 if exponent == np.uint64(0) else normal
    return -size if bits & np.uint64(0x8000) else size


def _nearest(out: Any, value: Any) -> Any:
    """Return `value` rounded to the dtype of `out`, ties to even, in its own type."""


@overload(_nearest, strict=False)
def _nearest_(out: Any, value: Any) -> Any:
    if out.dtype == types.uint16 and value == types.float32:
        return lambda out, value: _bf16_of(value)
    if out.dtype in _FORMATS:
        least, digits, limit = _FORMATS[out.dtype]
        return lambda out, value: type(value)(_in_steps(np.float64(value), least, digits, limit, -1.0))
    dtype = out.dtype
    return lambda out, value: type(value)(dtype(value))


def _drawn(out: Any, value: Any, draw: Any) -> Any:
    """Return `value` rounded to 16 bits: away from zero where its cut part and `draw`, in [0, 1), come to a step."""


@overload(_drawn, strict=False)
def _drawn_(out: Any, value: Any, draw: Any) -> Any:
    least, digits, limit = _FORMATS[out.dtype]
    return lambda out, value, draw: _in_steps(np.float64(value), least, digits, limit, draw)


@njit
def _in_steps(value: Any, least: int, digits: int, limit: float, draw: Any) -> Any:
    """Round fp64 to a multiple of the step that numbers of 16 bits have at its size; a draw below 0: to nearest.

    See `_FORMATS`; from `limit` on the result is infinite.
    """
    exponent = max(
        np.int64((np.float64(value).view(np.uint64) >> np.uint64(52)) & np.uint64(2047)) - 1023, np.int64(least)
    )
    step = np.uint64(np.uint64(exponent - digits + 1023) << np.uint64(52)).view(np.float64)
    steps = abs(value) * np.uint64(np.uint64(digits - exponent + 1023) << np.uint64(52)).view(np.float64)
    size = (np.rint(steps) if draw < 0.0 else np.floor(steps + draw)) * step
    return np.copysign(np.inf if size >= limit else size, value)


@njit
def _bf16_of(value: Any) -> Any:
    """Round fp32 to bf16, to nearest, as fp32."""
    bits = np.float32(value).view(np.uint32)
    rounded = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) & np.uint32(0xFFFF0000)
    return (
        value if np.isnan(value) else np.uint32(rounded).view(np.float32)
    )  # the carry of a NaN would make it a number


def _to_bf16(out: Any, value: Any) -> Any:
    """Return what was stored in `out` once it is rounded to bf16, as fp64."""


@overload(_to_bf16, strict=False)
def _to_bf16_(out: Any, value: Any) -> Any:
    if out.dtype == types.uint16:
        return lambda out, value: np.float64(value)
    least, digits, limit = _FORMATS[types.uint16]
    return lambda out, value: _in_steps(np.float64(value), least, digits, limit, -1.0)


def _store(out: Any, n: int, value: Any) -> None:
    """Write a number that the dtype of `out` has."""


@overload(_store, strict=False)
def _store_(out: Any, n: int, value: Any) -> Any:
    def bf16(out: Any, n: int, value: Any) -> None:
        out[n] = np.uint16(np.float32(value).view(np.uint32) >> np.uint32(16))

    def fp16(out: Any, n: int, value: Any) -> None:
        out[n] = np.int16(_to_half(np.float64(value)))

    def number(out: Any, n: int, value: Any) -> None:
        out[n] = value

    return {types.uint16: bf16, types.int16: fp16}.get(out.dtype, number)


@njit
def _to_half(value: Any) -> Any:
    """Return the bits of a number that fp16 has."""
    bits = np.float64(value).view(np.uint64)
    sign, size = (bits >> np.uint64(48)) & np.uint64(0x8000), abs(value)
    normal = ((bits >> np.uint64(42)) & np.uint64(0x1FFFFF)) - np.uint64(1008 << 10)
    small = np.uint64(min(size, 1.0) * 2.0**24)
    known = small if size < 2.0**-14 else normal
    known = np.uint64(0x7C00) if np.isinf(value) else known
    return sign | (np.uint64(0x7E00) if np.isnan(value) else known)
