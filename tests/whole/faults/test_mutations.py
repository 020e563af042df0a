"""Do the tests notice? Each fault is put into a copy of the package, and the tests named beside it must fail there.

A fault that no longer finds its line says so: the code moved on, and the fault has to be put where it moved to.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
from repository import ROOT

pytestmark = pytest.mark.slow


@dataclass(frozen=True)
class Fault:
    """`old` becomes `new` in a module of the package; `test` must fail then."""

    room: str
    old: str
    new: str
    test: str


FAULTS = {
    "sum: bf16 without the last bit of the delta": Fault(
        "arithmetic/kernel", "minus = minus + zero", "minus = minus * type(scale)(1 + 2**-20)",
        "arithmetic/test_grafter.py::test_16_bit_inputs_within_2_to_16_are_rounded_correctly",
    ),
    "sum: the sign of the delta": Fault(
        "arithmetic/kernel", "total = own - minus", "total = own + minus",
        "operations/test_graft.py::test_every_weight_is_the_sum",
    ),
    "sum: the scale is forgotten": Fault(
        "arithmetic/grafter", "np.float64(self.scale)", "np.float64(1.0)",
        "operations/test_graft.py::test_every_weight_is_the_sum",
    ),
    "sum: -0.0 becomes 0.0": Fault(
        "arithmetic/kernel", "minus = minus + zero", "minus = minus - zero",
        "arithmetic/test_grafter.py::test_equal_tuned_and_base_give_instruct_bit_by_bit",
    ),
    "rounding: twice, by way of fp32": Fault(
        "arithmetic/kernel", "_in_steps(np.float64(value), least, digits, limit, -1.0))",
        "_in_steps(np.float64(np.float32(value)), least, digits, limit, -1.0))",
        "arithmetic/test_grafter.py::test_fp32_tuned_that_lies_next_to_a_tie_is_rounded_once",
    ),
    "rounding: the draws do not depend on the index": Fault(
        "arithmetic/kernel", "_random(key, index + n)", "_random(key, n)",
        "arithmetic/test_rounding.py::test_draws_depend_on_seed_name_and_index_alone",
    ),
    "rounding: stochastic rounding is biased": Fault(
        "arithmetic/kernel", "np.floor(steps + draw)", "np.floor(steps + draw * 0.5)",
        "arithmetic/test_rounding.py::test_stochastic_rounding_keeps_the_mean",
    ),
    "commit: the old result goes before the new one is there": Fault(
        "results/folder", "            os.rename(self.path, old)\n", "            _remove(self.path)\n",
        "results/test_folder.py::test_the_old_result_stays_until_the_new_one_is_in_place",
    ),
    "commit: renamed before it is synced": Fault(
        "results/folder",
        '        for path in (*self.part.rglob("*"), self.part):\n',
        "        for path in ():\n",
        "results/test_folder.py::test_files_are_synced_before_the_rename",
    ),
    "count: copied weights count as grafted": Fault(
        "grafting/jobs", "grafted = [job for job in weights if job.grafted]", "grafted = list(weights)",
        "operations/test_graft.py::test_linear_selects_the_weights_of_seven_projections",
    ),
    "count: one too few": Fault(
        "grafting/jobs", "grafted=len(grafted),", "grafted=len(grafted) - 1,",
        "operations/test_graft.py::test_every_weight_is_the_sum",
    ),
    "delta: zeros are not zero": Fault(
        "checkpoints/delta", "numpy.zeros(size, numpy.uint8)", "numpy.ones(size, numpy.uint8)",
        "operations/test_delta.py::test_the_delta_is_the_difference_in_fp32",
    ),
    "verify: only sizes are compared": Fault(
        "operations/differences", "if np.array_equal(stored, made):", "if stored.size == made.size:",
        "operations/test_verify.py::test_a_flipped_bit_is_named",
    ),
    "low rank: the smallest values are kept": Fault(
        "arithmetic/low_rank", "u[:, :rank], s[:rank], vt[:rank]", "u[:, -rank:], s[-rank:], vt[-rank:]",
        "arithmetic/test_low_rank.py::test_the_error_is_that_of_the_values_left_out",
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def runner(tmp_path_factory):
    """A process that runs the tests of a folder, see `runner.py`. It does not see the package of this one."""
    words = [sys.executable, str(Path(__file__).with_name("runner.py"))]
    hidden = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen(words, cwd=tmp_path_factory.mktemp("runner"), env=hidden, **pipes) as process:
        yield process
        process.stdin.close()


def run_tests(runner: subprocess.Popen[str], folder: Path, *names: str) -> tuple[int, str]:
    """Return the exit code of pytest, and what it printed."""
    print(json.dumps([str(folder), *(f"tests/{name}" for name in names)]), file=runner.stdin, flush=True)
    return int(runner.stdout.readline()), (folder / "pytest.log").read_text()


@pytest.fixture
def copy(tmp_path):
    shutil.copytree(ROOT / "shadow_trl", tmp_path / "shadow_trl", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(ROOT / "tests", tmp_path / "tests", ignore=shutil.ignore_patterns("__pycache__", "faults"))
    shutil.copyfile(ROOT / "pyproject.toml", tmp_path / "pyproject.toml")
    return tmp_path


def test_without_a_fault_all_of_these_tests_pass(runner, copy):
    """Else a failure below would prove nothing. The copy is what is tested, not the package beside it."""
    (copy / "tests" / "test_place.py").write_text(
        "import pathlib\nimport shadow_trl\n\n\ndef test_place():\n"
        "    assert pathlib.Path(shadow_trl.__file__).parts[:-2] == pathlib.Path(__file__).parts[:-2]\n"
    )
    code, shown = run_tests(runner, copy, "test_place.py", *sorted({fault.test for fault in FAULTS.values()}))
    assert code == 0, shown[-3000:]


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_is_noticed(runner, copy, name):
    fault = FAULTS[name]
    path = copy / "shadow_trl" / f"{fault.room}.py"
    text = path.read_text()
    assert text.count(fault.old) == 1, f"{fault.room}.py has no such line any more: {fault.old!r}"
    path.write_text(text.replace(fault.old, fault.new))
    code, shown = run_tests(runner, copy, fault.test)
    assert code == 1, f"nobody noticed: {name}\n{shown[-3000:]}"
    assert "FAILED tests/" in shown
