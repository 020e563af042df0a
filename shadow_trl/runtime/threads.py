"""A few threads that take work in order, each with memory of its own."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Sequence
from typing import TypeVar

_Chunk = TypeVar("_Chunk")


def run_threads(chunks: Sequence[_Chunk], make_worker: Callable[[], Callable[[_Chunk], None]]) -> None:
    """Hand `chunks` in order to threads, each with a worker of its own; raise the first error when all stopped."""
    cores = len(os.sched_getaffinity(0)) + 1 if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    count = max(1, min(len(chunks), cores, 4))
    waiting = iter(chunks)
    errors: list[BaseException] = []
    lock = threading.Lock()

    def run() -> None:
        try:
            work = make_worker()
            while not errors:
                with lock:
                    chunk = next(waiting, None)
                if chunk is None:
                    return
                work(chunk)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, name=f"graft-{number}", daemon=True) for number in range(count)]
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    except BaseException as error:  # Ctrl-C: the threads stop at their next chunk
        errors.append(error)
        for thread in threads:
            if thread.ident is not None:  # the one that did not start, and those behind it, cannot be waited for
                thread.join()
        raise
    if errors:
        raise errors[0]
