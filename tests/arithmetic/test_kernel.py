"""Every 16-bit number and many others, converted, beside numpy and torch; where what was compiled is kept."""

from __future__ import annotations

import os
import subprocess
import sys

import numpy as np
import pytest
import torch

from shadow_trl.arithmetic import kernel

ALL = np.arange(2**16, dtype=np.uint16)


def converted(values: np.ndarray, dtype: str) -> np.ndarray:
    found = np.empty(values.shape, dtype)
    assert kernel.convert(found, values) == kernel.all_finite(found)
    return found


def random_numbers(dtype: str) -> np.ndarray:
    """Return numbers of every size, subnormal ones, infinities and NaN among them, and those next to fp16's ties."""
    rng = np.random.default_rng(0)
    bits = rng.integers(0, 2**64, 300_000, np.uint64, endpoint=False)
    wild = bits.view(np.float64) if dtype == "float64" else (bits >> np.uint64(32)).astype(np.uint32).view(np.float32)
    near = rng.integers(0, 2**11, 300_000) * 2.0 ** rng.integers(-26, 8, 300_000)
    ties = near * rng.choice([1, 1 + 2.0**-20, 1 - 2.0**-20, 1 + 2.0**-40], 300_000) * rng.choice([-1, 1], 300_000)
    return np.concatenate([wild, ties.astype(dtype)])


def same(found: np.ndarray, wanted: np.ndarray) -> bool:
    """Whether floats have the same bits, or both are no number."""
    numbers = ~np.isnan(wanted)
    return np.array_equal(np.isnan(found), ~numbers) and found[numbers].tobytes() == wanted[numbers].tobytes()


def test_every_number_of_16_bits_is_read_and_written():
    halves, brains = ALL.view(np.float16), torch.from_numpy(ALL.copy()).view(torch.bfloat16).double().numpy()
    for bits, wanted in ((ALL.view(np.int16), halves.astype(np.float64)), (ALL, brains)):
        wide = converted(bits, "float64")
        assert same(wide, wanted)
        numbers = ~np.isnan(wanted)
        assert np.array_equal(converted(wide, bits.dtype.name)[numbers], bits[numbers])


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_numbers_are_rounded_as_numpy_and_torch_round_them(dtype):
    values = random_numbers(dtype)
    with np.errstate(over="ignore", invalid="ignore"):
        assert same(converted(values, "int16").view(np.float16), values.astype(np.float16))
        assert same(converted(values, "float32"), values.astype(np.float32))
    if dtype == "float32":  # torch takes fp64 to bf16 by way of fp32
        wanted = torch.from_numpy(values).bfloat16().float().numpy()
        assert same((converted(values, "uint16").astype(np.uint32) << 16).view(np.float32), wanted)


SUM = """
import numpy as np
from shadow_trl.arithmetic import kernel
found, one = np.empty(3, np.float32), np.ones(3, np.float32)
assert kernel.graft(found, 5 * one, one, 3 * one, None, np.float64(1), None, None, 0, None)[0]
assert found.tolist() == [7.0, 7.0, 7.0]
"""
CASES = {
    "kept": ("", True),
    "no place": (
        "from numba.core import caching\ndef none(self):\n    raise OSError(30, 'Read-only file system')\n"
        "caching._CacheLocator.ensure_cache_path = none\n", False,
    ),
    "full disk": (
        "from numba.core import caching\ndef full(self, *given):\n    raise OSError(28, 'No space left on device')\n"
        "caching.IndexDataCacheFile.save = full\n", False,
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_a_sum_needs_no_place_to_keep_what_was_compiled(tmp_path, case):
    before, kept = CASES[case]
    environment = {**os.environ, "NUMBA_CACHE_DIR": str(tmp_path)}
    subprocess.run([sys.executable, "-c", before + SUM], check=True, env=environment)
    assert any(path.is_file() for path in tmp_path.rglob("*.nbc")) == kept
