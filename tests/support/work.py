"""What processes of `in_workers` are asked to do in tests."""

from __future__ import annotations

import errno
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

from shadow_trl.errors import GraftError

WAITS = """
import sys
from pathlib import Path
import work
from shadow_trl.runtime.endings import exit_code
from shadow_trl.runtime.workers import in_workers
folder = Path(sys.argv[1])
sys.exit(exit_code(lambda: len(in_workers(work.waits, [folder / "waitsa", folder / "waitsb"], lambda count: None))))
"""


class Strange(Exception):
    """An error that cannot be made again from its text."""

    def __init__(self, first: int, last: int) -> None:
        super().__init__(f"{first} of {last}")


def doubled(item: int, progress: Callable[[int], None]) -> tuple[int, int]:
    print("a line that a library prints")
    progress(item)
    time.sleep(0.2 * item)
    return 2 * item, os.getpid()


def waits(path: Path, progress: Callable[[int], None]) -> None:
    part = path.with_name(f"{path.name}.part")
    part.write_text(str(os.getpid()))
    part.rename(path)
    for _ in range(1200):
        time.sleep(0.05)
        progress(0)


def fails(item: tuple[str, Path], progress: Callable[[int], None]) -> None:
    kind, folder = item
    if kind == "waits":
        waits(folder / "waits", progress)
    while not (folder / "waits").is_file():
        time.sleep(0.02)
    if kind == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    if kind == "ended":
        os._exit(7)
    error = GraftError("two weights")
    error.ending = "Nothing was written."
    raise {"ours": error, "of the disk": OSError(errno.ENOSPC, "No space left"), "strange": Strange(3, 4)}[kind]
