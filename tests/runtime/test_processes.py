"""Work that one process does for all, and errors that end all; each case in real processes."""

from __future__ import annotations

import os

import pytest
import rank_cases
from ranks import in_processes

pytestmark = [pytest.mark.distributed, pytest.mark.slow]


def test_work_may_take_longer_than_a_collective():
    assert [end.value for end in in_processes(rank_cases.longer_than_the_timeout, 3.0)] == ["from 0"] * 2


@pytest.mark.parametrize("failing", [0, 1])
@pytest.mark.parametrize("where", ["before", "collective"])
def test_an_error_on_any_process_ends_every_process_with_its_text(failing, where):
    ends = in_processes(rank_cases.fails_inside, failing, where)
    assert (ends[failing].kind, ends[failing].error) == ("InputError", "that is wrong")
    place = "the main process" if failing == 0 else "process 1"
    other = ends[1 - failing]
    assert other.kind == "GraftError"
    assert other.error == f"the run failed on {place}: InputError: that is wrong"


def test_an_error_in_a_nested_block_has_the_name_of_that_block():
    ends = in_processes(rank_cases.fails_inside, 2, "nested", count=3)
    assert (ends[2].kind, ends[2].error) == ("OSError", "no space left")
    assert {end.error for end in ends[:2]} == {"the part failed on process 2: OSError: no space left"}


def test_an_error_that_was_caught_is_over():
    ends = in_processes(rank_cases.goes_on_after_an_error)
    assert ends[0].value == ["", "the part failed on process 1: ValueError: of 1", "of 0", "fine"]
    assert ends[1].value == ["of 1", "", "the part failed on the main process: ValueError: of 0", "fine"]


def test_a_killed_process_ends_the_others():
    ends = in_processes(rank_cases.is_killed, 1.0, count=3)
    assert ends[2].error == "exit code -9"
    assert all("the work: process 2 has given no sign of life for 1 s." in end.error for end in ends[:2])


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a file system needs root")
@pytest.mark.parametrize(("data", "what"), [(False, "values"), (True, "reference log probabilities")])
def test_a_folder_that_the_machines_do_not_share_is_found(tmp_path, data, what):
    ends = in_processes(rank_cases.in_a_folder_of_its_own, str(tmp_path / "shared"), private=True, data=data)
    assert ends[1].kind == "ConfigError"
    assert ends[1].error.startswith(f"process 1 does not see the {what}, which the main process writes to {tmp_path}")
    assert f"looking for the {what} failed on process 1: ConfigError: process 1 does not see" in ends[0].error
    assert not [path for path in (tmp_path / "shared").rglob("*") if path.is_file()]


@pytest.mark.parametrize(("data", "found"), [(False, ["seen"]), (True, [1])])
def test_a_shared_folder_is_used(tmp_path, data, found):
    ends = in_processes(rank_cases.in_a_folder_of_its_own, str(tmp_path / "shared"), private=False, data=data)
    assert [(end.error, end.value) for end in ends] == [("", found)] * 2
    assert not list((tmp_path / "shared").rglob(".shadow*"))


def test_the_first_process_holds_the_store_until_the_others_have_left():
    """A good run must not fail because the first process, which is done, ends before the others have looked."""
    assert [end.error for end in in_processes(rank_cases.looks_late)] == ["", ""]
