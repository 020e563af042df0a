"""A dense result in memory: the bytes that the files of a graft would have, and the weights in them."""

from __future__ import annotations

import mmap

import torch
from torch import Tensor

from ..checkpoints.header import dtype_of, nbytes_of
from .files import plan_files
from .jobs import Jobs
from .options import GraftOptions
from .stream import Outcome, stream_to


class MemoryFile:
    """One file that stays in memory; see `ShardWriter`."""

    def __init__(self, size: int) -> None:
        self.bytes = torch.empty(size, dtype=torch.uint8)
        self.opened = True

    def open(self) -> None:
        """Do nothing: the room is there."""

    def write(self, offset: int, buffer: mmap.mmap, length: int) -> None:
        """Keep the first `length` bytes of `buffer`, which begin at `offset`."""
        self.bytes[offset : offset + length] = torch.frombuffer(buffer, dtype=torch.uint8, count=length)

    def close(self) -> None:
        """Do nothing: there is nothing to wait for."""

    abandon = close


def in_memory(jobs: Jobs, options: GraftOptions) -> tuple[dict[str, Tensor], Outcome]:
    """Return the weights of a dense result by name, bit by bit those that a graft would write, and what was measured.

    They are computed as the same chunks of the same files. Memory: the result twice while the last file is taken apart.
    """
    files = plan_files(jobs.weights, jobs.layout, options.max_shard_size)  # type: ignore[arg-type]
    memory = [MemoryFile(file.size) for file in files]
    outcome = stream_to(files, memory, options)
    weights = {}
    while files:
        file, whole = files.pop(), memory.pop().bytes
        for job, start in zip(file.jobs, file.starts, strict=True):
            # Copied: headers of any length come before them, and a view needs its alignment.
            part = whole[start : start + nbytes_of(job.code, job.shape)].clone()
            weights[job.name] = part.view(dtype_of(job.code)).view(job.shape)
    return weights, outcome
