"""The pipeline of a graft: chunks of the output files, computed and written by a few threads side by side.

A chunk is a page-aligned range of bytes of one output file. A thread reads the inputs' bytes of that range block by
block, computes them into its own buffer, and writes the buffer. While one thread waits for the disk another computes.
Memory does not depend on the size of any tensor.
"""

from __future__ import annotations

import math
import mmap
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import numpy as np

from ..arithmetic import kernel
from ..arithmetic.grafter import BLOCK
from ..arithmetic.kernel import BITS
from ..arithmetic.sums import Sums
from ..checkpoints.header import TORCH_NAMES, itemsize_of
from ..results.shard_writer import ShardWriter
from ..runtime.threads import run_threads
from ..runtime.workers import in_workers
from .blocks import JobGrafter, blocks_of
from .files import OutputFile
from .jobs import WeightJob
from .options import GraftOptions

CHUNK = 4 * 2**20
"""Bytes of a chunk."""


@dataclass
class NotFinite:
    """A weight with values that are infinite or not a number.

    Args:
        dtype: torch name of the dtype of the result.
        sides: on which they are; empty where only the result overflows.
    """

    dtype: str
    sides: list[str] = field(default_factory=list)


@dataclass
class Outcome:
    """What was measured.

    Args:
        sums: name of each weight -> its sums.
        bad: name of each weight with values that are not finite -> where they are.
    """

    sums: dict[str, Sums] = field(default_factory=dict)
    bad: dict[str, NotFinite] = field(default_factory=dict)


Seen = Callable[[str, int, int, np.ndarray], None]
"""Takes a weight's name, the first element of a block, the one behind its last, and the bytes of the result, uint8."""


class Writer(Protocol):
    """Where the bytes of one file go: see `ShardWriter`."""

    opened: bool

    def open(self) -> None:
        """Make room for the file."""

    def write(self, offset: int, buffer: mmap.mmap, length: int) -> None:
        """Write the first `length` bytes of `buffer` at `offset`."""

    def close(self) -> None:
        """End the file when it is complete."""

    def abandon(self) -> None:
        """Leave the file as it is."""


def stream(
    files: Sequence[OutputFile],
    folder: Path,
    options: GraftOptions,
    progress: Callable[[int], None] | None = None,
) -> Outcome:
    """Compute every file and write it into `folder`, which must exist; see `stream_to`."""
    return stream_to(files, [ShardWriter(folder / file.name, file.size) for file in files], options, progress)


def stream_to(
    files: Sequence[OutputFile],
    writers: Sequence[Writer],
    options: GraftOptions,
    progress: Callable[[int], None] | None = None,
    seen: Seen | None = None,
) -> Outcome:
    """Compute every file and write it.

    Args:
        files: what to write.
        writers: where the bytes of each go.
        options: how to sum.
        progress: called with the number of bytes written since the last call, from several threads.
        seen: called with every block, from several threads.

    Returns:
        the sums of each weight, and the weights with values that are not finite; with any of these the files are not
        complete.
    """
    outcome = Outcome()
    left = [-(-file.size // CHUNK) for file in files]
    chunks = [(number, low) for number, file in enumerate(files) for low in range(0, file.size, CHUNK)]
    found: dict[tuple[int, int], list[tuple[str, Sums]]] = {}
    lock = threading.Lock()

    def make_worker() -> Callable[[tuple[int, int]], None]:
        worker = _Worker(options, outcome, lock, seen)

        def work(chunk: tuple[int, int]) -> None:
            number, low = chunk
            with lock:
                if not writers[number].opened:
                    writers[number].open()
            length = min(CHUNK, files[number].size - low)
            found[chunk] = worker.fill(files[number], low, low + length)
            if not outcome.bad:
                writers[number].write(low, worker.buffer, length)
            with lock:
                left[number] -= 1
                last = not left[number]
            if last:
                writers[number].close()
            if progress is not None:
                progress(length)

        return work

    products = any(job.low_rank is not None for file in files for job in file.jobs)
    try:
        with _one_thread_each() if products else nullcontext():
            run_threads(chunks, make_worker)
    finally:
        for writer in writers:
            writer.abandon()
    for chunk in chunks:  # in order, so that the sums do not depend on the threads
        for name, sums in found[chunk]:
            outcome.sums.setdefault(name, Sums()).__iadd__(sums)
    return outcome


def stream_in_processes(
    files: Sequence[OutputFile], folder: Path, options: GraftOptions, progress: Callable[[int], None]
) -> Outcome:
    """Do what `stream` does, with the files shared out over as many processes as the options say.

    The files and what was measured are the same for every number of processes.
    """
    count = min(options.processes, len(files))
    if count <= 1:
        return stream(files, folder, options, progress)
    shares: list[list[OutputFile]] = [[] for _ in range(count)]
    for file in sorted(files, key=lambda file: file.size, reverse=True):
        min(shares, key=lambda share: sum(other.size for other in share)).append(file)
    found = in_workers(_stream_share, [(share, folder, options) for share in shares], progress)
    # In the order of the files: sums of many weights depend on it.
    sums = {name: value for one in found for name, value in one.sums.items()}
    bad = {name: value for one in found for name, value in one.bad.items()}
    names = [job.name for file in files for job in file.jobs]
    return Outcome(
        {name: sums[name] for name in names if name in sums}, {name: bad[name] for name in names if name in bad}
    )


def _stream_share(share: tuple[list[OutputFile], Path, GraftOptions], progress: Callable[[int], None]) -> Outcome:
    return stream(*share, progress)


@contextmanager
def _one_thread_each() -> Iterator[None]:
    """Let torch compute with the thread that calls it alone: the others are beside it."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


class _Worker:
    """The buffer and scratch memory of one thread."""

    def __init__(self, options: GraftOptions, outcome: Outcome, lock: threading.Lock, seen: Seen | None) -> None:
        self.outcome = outcome
        self.seen = seen
        self.lock = lock
        self.buffer = mmap.mmap(-1, CHUNK)
        self.bytes = np.frombuffer(self.buffer, np.uint8)
        self.grafter = JobGrafter(options)
        self.spare = np.empty(8 * BLOCK, np.uint8)

    def fill(self, file: OutputFile, low: int, high: int) -> list[tuple[str, Sums]]:
        """Compute bytes `low` to `high` of `file` into the buffer."""
        if low < len(file.header):
            head = file.header[low:high]
            self.buffer[: len(head)] = head
        found = []
        for job, begin in file.parts(low, high):
            size = itemsize_of(job.code)
            first = max(low - begin, 0) // size
            last = min(-(-(high - begin) // size), math.prod(job.shape))
            if first >= last:
                continue
            sums = Sums()
            for block in blocks_of(job, first, last):
                sums += self._block(job, *block, begin + block.start * size - low)
            found.append((job.name, sums))
        return found

    def _block(self, job: WeightJob, start: int, stop: int, delta: bool, at: int) -> Sums:
        """Compute one block; `at` is the byte of the buffer at which it goes, negative for a cut first element."""
        itemsize = itemsize_of(job.code)
        nbytes = (stop - start) * itemsize
        whole = at % itemsize == 0  # as a chunk is of every itemsize: else its ends cut through an element
        target = self.bytes[at : at + nbytes] if whole else self.spare[:nbytes]
        if delta:
            sums = self.grafter.graft(job, target.view(BITS[job.code]), start, stop)
        elif job.instruct.spec.code != job.code:
            sums = Sums(finite=kernel.convert(target.view(BITS[job.code]), job.instruct.array(start, stop)))
        else:
            target[:] = job.instruct.content(start, stop, self.grafter.memory[0])
            sums = Sums(finite=job.code not in BITS or kernel.all_finite(target.view(BITS[job.code])))
        if not sums.finite:
            self._blame(job, start, stop, delta)
        if self.seen is not None:
            known = 1 if at < 0 else 0  # the chunk before had the first element
            self.seen(job.name, start + known, stop, target[known * itemsize :])
        if not whole:
            skip = max(-at, 0)
            room = min(nbytes - skip, CHUNK - max(at, 0))
            self.bytes[max(at, 0) : max(at, 0) + room] = target[skip : skip + room]
        return sums

    def _blame(self, job: WeightJob, start: int, stop: int, delta: bool) -> None:
        sides = []
        places = {"instruct": job.instruct, **({"base": job.base, "tuned": job.tuned} if delta else {})}
        for side, place in places.items():
            if place is not None and not kernel.all_finite(place.array(start, stop)):
                sides.append(f"{side} {place.checkpoint}")
        for factor in (job.low_rank.left, job.low_rank.right) if delta and job.low_rank is not None else ():
            if not kernel.all_finite(factor.array(0, factor.spec.numel)):
                sides.append(f"tuned {factor.checkpoint}")
        with self.lock:
            known = self.outcome.bad.setdefault(job.name, NotFinite(TORCH_NAMES[job.code])).sides
            known.extend(side for side in sides if side not in known)
