"""Torch distributed checkpoints as several processes write them, cut at will; written with torch's own classes."""

from __future__ import annotations

import io
import pickle
from collections.abc import Callable, Iterable, Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

Box = tuple[tuple[int, ...], tuple[int, ...]]
"""Where a part of a tensor begins, and its shape."""


def cut(shape: tuple[int, ...], parts: int, along: Iterable[int] = (0,)) -> list[Box]:
    """Cut a shape into about equal parts along some dimensions, as FSDP2 does: the last ones may be empty."""
    boxes: list[Box] = [((0,) * len(shape), tuple(shape))]
    for dimension in [one for one in along if one < len(shape)]:
        step = -(-shape[dimension] // parts)
        edges = [min(step * number, shape[dimension]) for number in range(parts + 1)]
        boxes = [
            (
                (*begin[:dimension], low, *begin[dimension + 1 :]),
                (*size[:dimension], high - low, *size[dimension + 1 :]),
            )
            for begin, size in boxes
            for low, high in pairwise(edges)
        ]
    return boxes


def entry(value: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def write_shards(
    folder: Path,
    tensors: Mapping[str, torch.Tensor],
    *,
    parts: int = 2,
    along: Iterable[int] = (0,),
    change: Callable[[Metadata], object] = lambda content: None,
) -> Path:
    """Write {"model": tensors} as `parts` processes do, part i of each tensor into file i.

    Args:
        folder: new.
        tensors: names and values.
        parts: of each dimension that is cut.
        along: the dimensions.
        change: what is done to `.metadata` before it is written.
    """
    folder.mkdir(parents=True)
    content = Metadata({}, {}, {})
    files: dict[str, bytes] = {}
    for name, tensor in tensors.items():
        key, boxes = f"model.{name}", cut(tuple(tensor.shape), parts, along)
        for number, (begin, size) in enumerate(boxes):
            if 0 in size and tensor.numel():
                continue
            part = tensor[tuple(slice(b, b + n) for b, n in zip(begin, size, strict=True))].clone()
            file = f"__{number % parts}_0.distcp"
            data, before = entry(part), files.get(file, b"")
            files[file] = before + data
            content.storage_data[MetadataIndex(key, begin)] = _StorageInfo(file, len(before), len(data))
        chunks = [ChunkStorageMetadata(torch.Size(begin), torch.Size(size)) for begin, size in boxes]
        properties = TensorProperties(dtype=tensor.dtype)
        content.state_dict_metadata[key] = TensorStorageMetadata(properties, torch.Size(tensor.shape), chunks)
        content.planner_data[key] = ("model", name)
    change(content)
    for file, data in files.items():
        (folder / file).write_bytes(data)
    (folder / ".metadata").write_bytes(pickle.dumps(content))
    return folder
