"""The files of a result beside its arithmetic: how weights are spread over files, and their index."""

from __future__ import annotations

import bisect
import json
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from ..checkpoints.checkpoint import Checkpoint
from ..checkpoints.header import FLOATS, TORCH_NAMES, TensorSpec, build_header, nbytes_of
from .jobs import WeightJob

INDEX = "model.safetensors.index.json"
_PACKED = 5 * 10**9
"""Bytes of a file where nothing tells how weights are to be spread over files."""


@dataclass
class OutputFile:
    """One file of the result: its header, then its tensors one after another.

    Args:
        name: file name.
        header: bytes before the first tensor.
        jobs: the tensors in the order of their bytes.
        starts: byte of the file at which each begins.
        size: bytes of the file.
    """

    name: str
    header: bytes
    jobs: list[WeightJob]
    starts: list[int] = field(init=False)
    size: int = field(init=False)

    def __post_init__(self) -> None:
        self.starts, at = [], len(self.header)
        for job in self.jobs:
            self.starts.append(at)
            at += nbytes_of(job.code, job.shape)
        self.size = at

    def parts(self, low: int, high: int) -> Iterator[tuple[WeightJob, int]]:
        """Yield the tensors with bytes in `low` to `high`, each with the byte of the file at which it begins."""
        first = max(bisect.bisect_right(self.starts, low) - 1, 0)
        for job, start in zip(self.jobs[first:], self.starts[first:], strict=True):
            if start >= high:
                return
            yield job, start


def plan_files(jobs: list[WeightJob], instruct: Checkpoint, max_shard_size: int | None) -> list[OutputFile]:
    """Spread `jobs` over files: as INSTRUCT's, or newly packed into files of at most `max_shard_size` bytes.

    The files of a torch distributed checkpoint hold pieces of weights: then newly packed too.
    """
    in_pieces = any(spec.pieces for spec in instruct.specs.values())
    if max_shard_size is not None or in_pieces:
        return _packed(jobs, max_shard_size or _PACKED)
    named = {path: _safetensors_name(path.name) for path in instruct.files}
    by_file: dict[Path, list[WeightJob]] = {path: [] for path in instruct.files}
    for job in jobs:
        by_file[instruct.specs[job.instruct.name].file].append(job)
    files = []
    for path, inside in by_file.items():
        header = instruct.headers.get(path)
        same = header is not None and [(job.name, job.code) for job in inside] == [
            (name, spec.code) for name, spec in header.specs.items()
        ]
        metadata = header.metadata if header is not None else {"format": "pt"}
        raw = header.raw if header is not None and same else _header(inside, metadata)
        files.append(OutputFile(named[path], raw, inside))
    return files


def write_index(files: list[OutputFile], instruct: Checkpoint, folder: Path) -> None:
    """Write the index that names the file of each weight; INSTRUCT's own bytes where they state the same."""
    if len(files) == 1 and files[0].name == "model.safetensors":
        return
    weight_map = {job.name: file.name for file in files for job in file.jobs}
    total = sum(nbytes_of(job.code, job.shape) for file in files for job in file.jobs)
    if instruct.index is not None:
        text = (instruct.path / instruct.index).read_text(encoding="utf-8")
        index = json.loads(text)
        changed = any(
            job.code != job.instruct.checkpoint.specs[job.instruct.name].code for file in files for job in file.jobs
        )
        metadata = index.get("metadata") or {}
        if index["weight_map"] == weight_map and not changed and metadata.get("total_size") == total:
            (folder / INDEX).write_text(text, encoding="utf-8")
            return
        metadata = {**metadata, "total_size": total}
    else:
        metadata = {"total_size": total}
    content = {"metadata": metadata, "weight_map": dict(sorted(weight_map.items()))}
    (folder / INDEX).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def main_dtype(jobs: Iterable[WeightJob | TensorSpec]) -> str | None:
    """Return the torch name of the floating dtype that most elements have, None without any."""
    counts: Counter[str] = Counter()
    for job in jobs:
        if job.code in FLOATS:
            counts[job.code] += nbytes_of("U8", job.shape)
    return TORCH_NAMES[counts.most_common(1)[0][0]] if counts else None


def _packed(jobs: list[WeightJob], limit: int) -> list[OutputFile]:
    groups: list[list[WeightJob]] = [[]]
    room = limit
    for job in jobs:
        size = nbytes_of(job.code, job.shape)
        if size > room and groups[-1]:
            groups.append([])
            room = limit
        groups[-1].append(job)
        room -= size
    names = [f"model-{number:05d}-of-{len(groups):05d}.safetensors" for number in range(1, len(groups) + 1)]
    named = zip(names if len(groups) > 1 else ["model.safetensors"], groups, strict=True)
    return [OutputFile(name, _header(group, {"format": "pt"}), group) for name, group in named]


def _header(jobs: list[WeightJob], metadata: dict[str, str] | None) -> bytes:
    return build_header({job.name: (job.code, job.shape) for job in jobs}, metadata)


def _safetensors_name(name: str) -> str:
    if name.endswith(".safetensors"):
        return name
    return name.replace("pytorch_model", "model", 1).removesuffix(".bin") + ".safetensors"
