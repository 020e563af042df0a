"""Several real processes on this machine, forked from a server that has imported the libraries once."""

from __future__ import annotations

import multiprocessing
import os
import socket
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

_SERVER = multiprocessing.get_context("forkserver")
# What is slow to import; the test's own code is imported in each process anew.
_PRELOADED = ["torch", "trl", "peft", "transformers.models.qwen3.modeling_qwen3"]
_SERVER.set_forkserver_preload(_PRELOADED)


def preload(module: str) -> None:
    """Let the server import `module` too, if it is not running yet; the processes import it themselves otherwise."""
    _SERVER.set_forkserver_preload([*_PRELOADED, module])


@dataclass
class Ended:
    """How one process ended: what the work returned, or the error that left it; neither where it was killed."""

    value: Any = None
    error: str = ""
    kind: str = ""
    seconds: float = 0.0


def in_processes(
    work: Callable[..., Any], *given: Any, count: int = 2, limit: float = 120, **named: Any
) -> list[Ended]:
    """Call `work(rank, ...)`, a function of a module in tests/support, in `count` processes; return how each ended."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    ends, pipes, started = [Ended() for _ in range(count)], [], []
    for rank in range(count):
        here, there = _SERVER.Pipe(duplex=False)
        process = _SERVER.Process(target=_rank, args=(there, rank, count, port, work, given, named), daemon=True)
        process.start()
        there.close()
        pipes.append(here)
        started.append(process)
    stop = time.monotonic() + limit
    try:
        for rank, (pipe, process) in enumerate(zip(pipes, started, strict=True)):
            if not pipe.poll(max(0.0, stop - time.monotonic())):
                raise TimeoutError(f"process {rank} of {count} did not end within {limit} s")
            try:
                ends[rank] = pipe.recv()
            except EOFError:
                process.join()
                ends[rank].error = f"exit code {process.exitcode}"
    finally:
        for process in started:
            process.join(5)
            process.kill()
    return ends


def _rank(pipe: Any, rank: int, count: int, port: int, work: Callable[..., Any], given: tuple, named: dict) -> None:
    import torch

    torch.set_num_threads(1)
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(count), LOCAL_WORLD_SIZE=str(count),
        MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), GLOO_SOCKET_IFNAME="lo", TOKENIZERS_PARALLELISM="false",
    )  # fmt: skip
    ended, begun = Ended(), time.monotonic()
    try:
        ended.value = work(rank, *given, **named)
    except BaseException as error:
        ended.error, ended.kind = str(error), type(error).__name__
        traceback.print_exc()
    ended.seconds = time.monotonic() - begun
    pipe.send(ended)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(bool(ended.error))
