"""kill -9 at each step that a process takes on the disk."""

from __future__ import annotations

import multiprocessing
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

STEPS = ("os.mkdir", "os.rename", "os.remove", "os.rmdir", "shutil.rmtree", "open")
KILLED = 9


def killed_at_every_step(work: Callable[[], object], output: Path) -> Iterator[int]:
    """Run `work` in a process of its own, which dies before its first step, its second, ..., until it ends by itself.

    Steps are what Python's audit events name: folders and files that are made, renamed or removed, and files that are
    opened beside or in `output`. Nothing is put right on the way out, as with a kill. Yields after each death.
    """
    process = multiprocessing.get_context("fork").Process
    step = 0
    while True:
        child = process(target=_run, args=(work, os.path.join(output.parent, f".{output.name}"), step))
        child.start()
        child.join()
        if child.exitcode != KILLED:
            assert child.exitcode == 0, f"failed by itself with code {child.exitcode}"
            return
        yield step
        step += 1


def _run(work: Callable[[], object], beside: str, step: int) -> None:
    taken = 0

    def watch(event: str, arguments: tuple) -> None:
        nonlocal taken
        if event in STEPS and (event != "open" or str(arguments[0]).startswith(beside)):
            if taken == step:
                os._exit(KILLED)
            taken += 1

    sys.addaudithook(watch)
    work()
