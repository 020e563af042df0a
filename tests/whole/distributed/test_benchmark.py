"""benchmarks/distributed in small, and that its table would show what is not equal."""

from __future__ import annotations

import re
import subprocess
import sys
from argparse import Namespace
from types import ModuleType

import pytest
from repository import ROOT

PLACE = ROOT / "benchmarks" / "distributed"


@pytest.fixture
def table(monkeypatch) -> ModuleType:
    for folder in (PLACE.parent, PLACE):
        monkeypatch.syspath_prepend(str(folder))
    import table

    return table


@pytest.mark.parametrize(
    ("found", "expected", "shown"),
    [
        ([1.0, -2.0], [1.0, -2.0], "0"),
        ([1.0, -2.5], [1.0, -2.0], "2.5e-01"),
        ([0.5], [0.0], "5.0e-01"),
        ([], [], ""),
        ([1.0], [], "1 values, not 0"),
        ([], [1.0], "0 values, not 1"),
        ([float("nan")], [1.0], "nan"),
    ],
)
def test_the_largest_difference_is_shown(table, found, expected, shown):
    assert table.difference(found, expected) == shown


def test_the_figures_of_the_graft_are_those_that_are_compared(table):
    def seen(loss, entropy, margins, *, plain=1.0):
        figures = {"loss": loss, "entropy": entropy, "margins": margins, "accuracy": plain / 2}
        trained = {"eval_loss": 3.0, "eval_entropy": 1.0, "eval_margins": 1.0, "eval_accuracy": plain}
        return {"evaluated": [{**trained, **{f"eval_grafted_{name}": figures[name] for name in figures}}]}

    expected = seen(2.0, 4.0, 0.5)
    assert table.evaluated(seen(2.0, 4.0, 0.5), expected) == "0; accuracy 0"
    assert table.evaluated(seen(2.5, 4.0, 0.25), expected) == "2.5e-01; margins 5.0e-01"
    # TRL's own figure is another one as well.
    assert table.evaluated(seen(2.0, 4.5, 0.5, plain=2.0), expected) == "0; entropy 1.2e-01"


@pytest.mark.parametrize(
    ("found", "expected", "shown"),
    [
        ({"a": "1"}, {"a": "1"}, "yes"),
        ({"a": "1"}, {"a": "2"}, "**no**"),
        ({"a": "1"}, {"a": "1", "b": "2"}, "**no**"),
        ({}, {}, "**no**"),
    ],
)
def test_folders_without_equal_weights_are_not_the_same(table, found, expected, shown):
    assert table.same(found, expected) == shown


@pytest.mark.slow
@pytest.mark.distributed
def test_two_processes_are_compared_with_one_and_with_trl(table, tmp_path):
    size = {"hidden": 32, "layers": 1, "rows": 20, "length": 4, "processes": 2, "limit": 240}
    asked = Namespace(engines=["ddp"], only=["SFT, LoRA"], **size)
    *_, row = table.compare(tmp_path, asked)
    engine, case, losses, references, grafted, tuned, graft, _, training = (
        cell.strip() for cell in row[1:-1].split("|")
    )
    assert (engine, case, references, tuned, graft) == ("ddp", "SFT, LoRA", "", "yes", "yes")
    assert float(losses) < 1e-6
    loss, _, other = grafted.partition("; ")
    assert float(loss) < 1e-6
    assert float(other.split()[-1]) < 1e-5  # TRL takes the mean over batches, which are others in one process
    assert float(training) > 0


@pytest.mark.slow
@pytest.mark.distributed
def test_memory_and_steps_are_set_beside_those_of_trl():
    words = ["memory", "--hidden=32", "--layers=1", "--rows=6", "--length=24", "--engines", "ddp"]
    done = subprocess.run([sys.executable, PLACE, *words], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    rows = [line[1:-1].split("|") for line in done.stdout.splitlines() if line.startswith("| ddp")]
    trl, shadow, *ratios = [[cell.strip() for cell in row] for row in rows]
    assert [row[1] for row in (trl, shadow)] == ["trl", "shadow"]
    assert trl[3] == ""
    assert all(float(cell) > 0 for cell in shadow[2:])
    assert len(ratios) == 4
    assert all(re.fullmatch(r"\d+\.\d+", row[2]) for row in ratios)
