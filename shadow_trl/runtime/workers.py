"""Python processes on this machine that share out work, each started afresh: no thread or lock of this one is copied.

They are not those of `multiprocessing`, which run the user's script once more to find what they are to call.
"""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from multiprocessing import Pipe
from multiprocessing.connection import Connection, wait
from threading import Lock
from typing import Any

from ..errors import GraftError

_CHILD = """
import json, sys
sys.path[:] = json.loads(sys.argv[2])
from shadow_trl.runtime.workers import serve
serve(int(sys.argv[1]))
"""
_PROGRESS, _RESULT, _ERROR = "progress", "result", "error"


def in_workers(
    work: Callable[[Any, Callable[[int], None]], Any], items: Sequence[Any], progress: Callable[[int], None]
) -> list[Any]:
    """Call `work(item, progress)` for each item in a process of its own; return the results in the order of `items`.

    Whatever ends this call, none of the processes is left. Those of a killed one end when they next report progress.

    Args:
        work: a function of a module; it, the items, results and errors can be pickled.
        items: what is shared out.
        progress: called here with what `work` gives to its own.

    Raises:
        Exception: the first error of `work`; the others are stopped.
        GraftError: a process was killed.
    """
    workers: list[_Worker] = []
    try:
        for item in items:
            workers.append(_Worker())  # known before anything else can fail
            workers[-1].begin(work, item)
        results: dict[int, Any] = {}
        while len(results) < len(items):
            busy = {worker.pipe: number for number, worker in enumerate(workers) if number not in results}
            for pipe in wait(list(busy)):
                number = busy[pipe]  # type: ignore[index]
                kind, value = workers[number].said(number, len(items))
                if kind == _ERROR:
                    raise value
                if kind == _RESULT:
                    results[number] = value
                else:
                    progress(value)
        return [results[number] for number in range(len(items))]
    finally:
        for worker in workers:
            worker.end()


class _Worker:
    """One process, and this end of the pipe to it."""

    def __init__(self) -> None:
        self.pipe, theirs = Pipe()
        with theirs:
            # A session of its own: Ctrl-C comes to this process alone, which ends the others.
            self._process = subprocess.Popen(
                [sys.executable, "-c", _CHILD, str(theirs.fileno()), json.dumps(sys.path)],
                stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, pass_fds=[theirs.fileno()], start_new_session=True,
            )  # fmt: skip

    def begin(self, work: Callable[..., Any], item: Any) -> None:
        with suppress(ConnectionError):  # it is gone, which is found when it is listened to
            self.pipe.send((work, item))

    def said(self, number: int, count: int) -> tuple[str, Any]:
        try:
            return self.pipe.recv()
        except (EOFError, ConnectionError) as error:
            code = self._process.wait()
            how = f"was killed by signal {-code}" if code < 0 else f"ended with exit code {code}"
            raise GraftError(
                f"process {number + 1} of the {count} that share the work {how}. Where memory ran out, use fewer "
                "processes."
            ) from error

    def end(self) -> None:
        self._process.kill()
        self._process.wait()
        self.pipe.close()


def serve(number: int) -> None:
    """Do the work that comes through the pipe of descriptor `number`, in a process that `in_workers` started."""
    pipe, lock = Connection(number), Lock()

    def tell(kind: str, value: Any) -> None:
        with lock:
            pipe.send((kind, value))

    try:
        work, item = pipe.recv()
        tell(_RESULT, work(item, lambda count: tell(_PROGRESS, count)))
    except (EOFError, ConnectionError):  # nobody listens any more
        os._exit(1)
    except BaseException as error:
        try:
            tell(_ERROR, copy.copy(error))  # which is made anew here as it would be there
        except Exception:
            tell(_ERROR, GraftError(f"{type(error).__name__}: {error}"))
