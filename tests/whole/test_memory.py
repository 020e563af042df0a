"""Peak resident memory of whole processes: it is bounded, whatever the size of the model or of its largest tensor."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from families import load, write
from shards import write_shards

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's account of memory"),
]
COMMAND = "import sys\nfrom shadow_trl.cli import main\nassert main(sys.argv[1:]) == 0"
MIB = 2**20
SIZE = 192 * MIB
"""Bytes of each model in one tensor: more than may be in memory at once."""


@pytest.fixture(scope="module")
def sides(tmp_path_factory):
    root = tmp_path_factory.mktemp("family")
    base = torch.randn(SIZE // 2, generator=torch.Generator().manual_seed(0)).bfloat16()
    models = {"base": base, "instruct": base * 1.25, "tuned": base + 0.5}
    return [f"--{role}={write(root / role, {'model.weight': weight})}" for role, weight in models.items()]


def peak(program: str, *words: str) -> int:
    """Run a program in a python of its own and return the most memory it had, bytes.

    The kernel's count of the memory itself; what `wait` returns for a child starts with the peak of its parent.
    """
    program += "\nprint(next(line.split()[1] for line in open('/proc/self/status') if line.startswith('VmHWM')))"
    done = subprocess.run([sys.executable, "-c", program, *words], check=True, capture_output=True, text=True)
    return int(done.stdout.split()[-1]) * 1024


@pytest.mark.parametrize("options", [[], ["--dtype=float32"], ["--scale=0.7"], ["--rounding=stochastic"]], ids=" ".join)
def test_a_graft_needs_hardly_more_than_importing_torch(sides, tmp_path, options):
    words = ["graft", *sides, f"--output={tmp_path / 'output'}", "--quiet", *options]
    assert peak(COMMAND, *words) - peak("import torch") <= 30 * MIB
    assert peak(COMMAND, "verify", str(tmp_path / "output"), "--quiet") - peak("import torch") <= 30 * MIB


def test_a_graft_of_shards_needs_hardly_more_than_importing_torch(sides, tmp_path):
    """Cut into four files: torch's own reader would hold a quarter at once, and merging them all."""
    weights = load(Path(sides[2].removeprefix("--tuned=")))
    shards = write_shards(tmp_path / "shards", weights, parts=4)
    words = ["graft", *sides[:2], f"--tuned={shards}", f"--output={tmp_path / 'output'}", "--quiet"]
    assert peak(COMMAND, *words) - peak("import torch") <= 30 * MIB


def test_a_gap_needs_no_more_than_importing_torch(sides):
    assert peak(COMMAND, "gap", *sides, "--quiet") <= peak("import torch")
