"""Processes that share out work: their results, their errors, and that none is left."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import time

import pytest
import work

from shadow_trl.errors import GraftError
from shadow_trl.runtime.workers import in_workers


def gone(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return True
    return False


def test_results_come_in_order_and_progress_is_told(capfd):
    told: list[int] = []
    found = in_workers(work.doubled, [3, 1], told.append)
    assert [double for double, _ in found] == [6, 2]
    assert len({process for _, process in found} | {os.getpid()}) == 3
    assert sorted(told) == [1, 3]
    assert not capfd.readouterr().out  # what a library prints there is not of a result


@pytest.mark.parametrize(
    ("kind", "error", "text"),
    [
        ("ours", GraftError, "two weights"), ("of the disk", OSError, "No space left"),
        ("strange", GraftError, "Strange: 3 of 4"), ("killed", GraftError, "process 2 of the 2 .* killed by signal 9"),
        ("ended", GraftError, "process 2 of the 2 .* exit code 7"),
    ],
)  # fmt: skip
def test_an_error_of_one_ends_all(tmp_path, kind, error, text):
    begun = time.monotonic()
    with pytest.raises(error, match=text) as found:
        in_workers(work.fails, [("waits", tmp_path), (kind, tmp_path)], lambda count: None)
    assert time.monotonic() - begun < 50  # the other one waits for a minute
    assert gone(int((tmp_path / "waits").read_text()))
    if kind == "of the disk":
        assert found.value.errno == errno.ENOSPC
    if kind == "ours":
        assert str(found.value) == "two weights. Nothing was written."


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_none_is_left_when_the_first_one_is_stopped(tmp_path, number):
    command, paths = [sys.executable, "-c", work.WAITS, str(tmp_path)], {"PYTHONPATH": os.pathsep.join(sys.path)}
    process = subprocess.Popen(command, env={**os.environ, **paths}, stderr=subprocess.PIPE, text=True)
    end = time.monotonic() + 60
    while not all((tmp_path / f"waits{one}").is_file() for one in "ab"):
        assert time.monotonic() < end
        time.sleep(0.05)
    process.send_signal(number)
    _, said = process.communicate(timeout=60)
    if number != signal.SIGKILL:
        assert process.returncode == 128 + number, said
    ids = [int((tmp_path / f"waits{one}").read_text()) for one in "ab"]
    while not all(map(gone, ids)):
        assert time.monotonic() < end
        time.sleep(0.05)
