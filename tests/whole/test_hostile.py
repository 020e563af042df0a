"""Bad input is one clear error with exit code 2, nothing written, no traceback, no hang."""

from __future__ import annotations

import os
import random
import shutil
from pathlib import Path

import pytest
from hostile import Case, Sound, cases, ends_well

from shadow_trl import cli

SAMPLE = 60


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    return Sound(tmp_path_factory.mktemp("sound"))


def refused(case: Case, folder: Path, capsys) -> None:
    folder.mkdir()
    argv = case.make(folder)
    before, begun = sorted(folder.rglob("*")), sum(os.times()[:4])
    assert cli.main(argv) == 2, case.name
    took, said = sum(os.times()[:4]) - begun, capsys.readouterr()  # of processors, children's too
    assert not said.out, case.name
    assert said.err.count("Error: ") == 1, (case.name, said.err)
    assert ends_well(argv, said.err), (case.name, said.err)
    assert case.expected in said.err, (case.name, said.err)
    assert "Traceback" not in said.err, case.name
    assert sorted(folder.rglob("*")) == before, case.name
    assert took < 15, (case.name, took)
    shutil.rmtree(folder)


def test_a_sample_of_bad_input_is_refused(sound, tmp_path, capsys):
    quick = [case for case in cases(sound) if not case.name.startswith(("template: ", "pattern: "))]
    for number, case in enumerate(random.Random(7).sample(quick, SAMPLE)):
        refused(case, tmp_path / str(number), capsys)


@pytest.mark.slow
def test_all_bad_input_is_refused(sound, tmp_path, capsys):
    every = cases(sound)
    assert len(every) >= 300
    for number, case in enumerate(every):
        refused(case, tmp_path / str(number), capsys)


def test_what_the_cases_start_from_is_accepted(sound, tmp_path, capsys):
    """Else they could be refused for another reason than theirs."""
    for side in ("", "adapter", "delta"):
        assert cli.main(sound.argv(tmp_path / f"x{side}", side)) == 0
        capsys.readouterr()
    for command in ("gap", "delta"):
        assert cli.main(sound.argv(tmp_path / command, command=command)) == 0
    assert cli.main(sound.argv(tmp_path / "y", "graft")) == 0
