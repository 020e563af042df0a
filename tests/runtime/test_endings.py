"""The end of a process: one message, true of the disk, and the exit code."""

from __future__ import annotations

import errno
import os
import signal
import sys
import threading
import time
import weakref

import pytest

from shadow_trl.errors import ConfigError, GraftError, ends_with
from shadow_trl.results.folder import Scratch
from shadow_trl.results.written import tells_what_is_written
from shadow_trl.runtime.endings import exit_code, undisturbed


def ending(capsys, work) -> tuple[int, str]:
    code = exit_code(work)
    return code, capsys.readouterr().err.removesuffix("\n")


@pytest.mark.parametrize(
    ("error", "code", "text"),
    [
        (ConfigError("no."), 2, "ConfigError: no. It is so."),
        (GraftError("no:\n  a"), 1, "GraftError: no:\n  a\nIt is so."),
        (KeyboardInterrupt(), 130, "Interrupted. It is so."),
        (PermissionError(errno.EACCES, "denied", "x"), 1, "PermissionError: [Errno 13] denied: 'x'. It is so."),
        (MemoryError(), 1, "GraftError: there is not enough memory: MemoryError. End other programs, or give this one "
         "more (`ulimit -v`, a container's limit); in training, lower the batch size. It is so."),
    ],
)  # fmt: skip
def test_every_end_is_one_message_and_a_code(capsys, monkeypatch, error, code, text):
    def work():
        with ends_with("It is so."):
            raise error

    assert ending(capsys, work) == (code, text)
    monkeypatch.setenv("RANK", "2")
    assert ending(capsys, work) == (code, f"[process 2] {text}")


def test_faults_of_the_program_are_raised_and_a_good_end_is_silent(capsys):
    with pytest.raises(KeyError):
        exit_code(lambda: {}["x"])
    with pytest.raises(SystemExit):
        exit_code(lambda: sys.exit(3))
    assert ending(capsys, lambda: 0) == (0, "")


def test_sigterm_cleans_up_once_and_says_what_is_there(tmp_path, capsys):
    before = signal.getsignal(signal.SIGTERM)

    def work():
        with tells_what_is_written(tmp_path), Scratch(tmp_path / "out") as scratch:
            (scratch.part / "weights").write_text("x")
            (tmp_path / "done").write_text("x")
            try:
                os.kill(os.getpid(), signal.SIGTERM)
            finally:
                os.kill(os.getpid(), signal.SIGTERM)  # while it cleans up

    assert ending(capsys, work) == (143, f"Terminated. Written so far: {tmp_path / 'done'}.")
    assert [path.name for path in tmp_path.iterdir()] == ["done"]
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_use_that_others_have_for_sigterm_is_left_to_them(capsys):
    seen = []
    before = signal.signal(signal.SIGTERM, lambda number, frame: seen.append(number))
    try:
        assert exit_code(lambda: os.kill(os.getpid(), signal.SIGTERM) or 0) == 0
    finally:
        signal.signal(signal.SIGTERM, before)
    assert seen == [signal.SIGTERM]
    codes = []
    thread = threading.Thread(target=lambda: codes.append(exit_code(lambda: 0)))  # only a main thread gets signals
    thread.start()
    thread.join()
    assert codes == [0]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_is_not_lost_where_python_drops_its_exception(number, capsys):
    def called(_: object) -> None:  # by a weak reference: what rises here is dropped
        os.kill(os.getpid(), number)
        dropped.append(sum(range(9)))

    dropped: list[int] = []

    def work() -> int:
        held = threading.Event()
        reference = weakref.ref(held, called)
        del held
        assert reference() is None
        time.sleep(10)
        return 0

    hook = sys.unraisablehook
    assert exit_code(work) == 128 + number
    assert dropped == []
    assert capsys.readouterr().err in ("Interrupted\n", "Terminated\n")
    assert sys.unraisablehook is hook


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signals_wait_for_steps_that_belong_together(number, capsys):
    steps = []

    def work() -> int:
        with undisturbed():
            steps.append("first")
            os.kill(os.getpid(), number)
            with undisturbed():
                os.kill(os.getpid(), number)
                steps.append("second")
            steps.append("third")
        steps.append("never")
        return 0

    assert exit_code(work) == 128 + number
    assert steps == ["first", "second", "third"]
    assert capsys.readouterr().err.startswith(("Interrupted", "Terminated"))
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
