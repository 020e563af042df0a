"""The trials of `benchmarks/reliability` in small, and that they would notice what they are there for."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
from repository import ROOT

PLACE = ROOT / "benchmarks" / "reliability"


@pytest.fixture
def trials(monkeypatch):
    """The modules of the trials: (family, processes)."""
    monkeypatch.syspath_prepend(str(PLACE))
    import family
    import processes

    return family, processes


@pytest.mark.slow
@pytest.mark.parametrize(
    "words",
    [
        ["kills", "changes", "disks", "--kills=14", "--fresh-kills=2", "--changes=12", "--disks=3"],
        ["trainings", "--trainings=3"],
        ["fuzz", "--seconds=30"],
        ["many", "large", "--grafts=30", "--tensors=1000"],
    ],
    ids=lambda words: words[0],
)
def test_nothing_is_lost_left_or_told_falsely(words):
    done = subprocess.run([sys.executable, str(PLACE), *words, "--seed=1"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("\n| ") >= 1


@pytest.mark.parametrize(
    ("code", "out", "err", "changed", "kind"),
    [
        (1, "", "Traceback (most recent call last):\n  x\nKeyError: 1", False, "tracebacks"),
        (-7, "", "", False, "tracebacks"),
        (None, "", "", False, "hangs"),
        (2, "", "", False, "false"),
        (1, "", "Interrupted. Nothing was written.", True, "false"),
        (2, "", "ConfigError: no. Nothing was written.", False, None),
        (1, "the folder is another graft", "", False, None),
        (-9, "", "", True, None),
        (0, "", "", True, None),
    ],
)
def test_a_bad_end_is_counted(trials, code, out, err, changed, kind):
    _, processes = trials
    tally = processes.Tally("x")
    processes.judge_message(tally, "x", processes.Ended(code, out, err, 0.0), changed)
    assert dict(tally.faults) == ({kind: 1} if kind else {})


def test_litter_is_what_is_hidden_or_temporary(trials, tmp_path):
    _, processes = trials
    for name in ("out/model.safetensors", ".out.shadow-part-1-0/x", "tmp/y"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    assert processes.litter(tmp_path) == [".out.shadow-part-1-0", "tmp/y"]


def test_a_file_that_is_cut_short_or_changed_is_noticed(trials, tmp_path):
    family, _ = trials
    weights = family.dyadic(0, {"a": (2, 3), "b": (4,)})
    family.write_file(tmp_path / "x.safetensors", weights)
    assert family.same(family.read_file(tmp_path / "x.safetensors"), weights)
    assert not family.same(weights, {**weights, "b": weights["b"] + np.float32(2**-10)})
    data = (tmp_path / "x.safetensors").read_bytes()
    (tmp_path / "x.safetensors").write_bytes(data[:-4])
    with pytest.raises(ValueError, match="b is not whole"):
        family.read_file(tmp_path / "x.safetensors")
