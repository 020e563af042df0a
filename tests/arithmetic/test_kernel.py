"""Where what was compiled is kept, or cannot be."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

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
