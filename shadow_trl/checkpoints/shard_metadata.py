"""The pickles of a torch distributed checkpoint, read so that nothing in them is ever imported or called.

They are `.metadata`, and the description of a tensor that torch.save puts before its numbers.

torch's own reader unpickles the file without a check, which runs whatever it names. Here every class that such a file
names becomes an empty stand-in that remembers what it was given, and any other name is an error.
"""

from __future__ import annotations

import io
import os
import pickle
import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from ..errors import CheckpointError
from .header import CODES, itemsize_of, nbytes_of
from .json_files import unreadable

METADATA = ".metadata"
_LARGEST = 2**28  # bytes; a hundred thousand shards have about 10 MB
_KNOWN = {
    "torch.distributed.checkpoint.metadata": (
        "Metadata", "TensorStorageMetadata", "BytesStorageMetadata", "ChunkStorageMetadata", "TensorProperties",
        "MetadataIndex", "StorageMeta", "_MEM_FORMAT_ENCODING",
    ),
    "torch.distributed.checkpoint.filesystem": ("_StorageInfo", "_StoragePrefix"),
    "torch.serialization": ("_get_layout",),
    "torch": ("Size", "device"),
    "pathlib": ("Path", "PosixPath", "PurePosixPath"),
    "pathlib._local": ("Path", "PosixPath", "PurePosixPath"),
    "collections": ("OrderedDict",),
}  # fmt: skip
_DTYPE = re.compile(r"bool|q?u?int\d+(x\d+)?|b?float\d+\w*|complex\d+")
_STORAGES = {
    "DoubleStorage": "F64", "FloatStorage": "F32", "HalfStorage": "F16", "BFloat16Storage": "BF16",
    "LongStorage": "I64", "IntStorage": "I32", "ShortStorage": "I16", "CharStorage": "I8", "ByteStorage": "U8",
    "BoolStorage": "BOOL",
}  # fmt: skip
_IN_ENTRY = {
    "torch._utils": ("_rebuild_tensor_v2",), "torch": tuple(_STORAGES), "collections": ("OrderedDict",),
}  # fmt: skip


@dataclass(frozen=True)
class Chunk:
    """A box of a tensor and the bytes of a file that hold it, in whatever form the file has.

    Args:
        begin: of its first element, in each dimension of the tensor.
        shape: of the box.
        file: name of the file, as stated.
        offset: byte of the file at which its entry begins.
        length: bytes of the entry.
    """

    begin: tuple[int, ...]
    shape: tuple[int, ...]
    file: str
    offset: int
    length: int


@dataclass(frozen=True)
class ShardedTensor:
    """A tensor as `.metadata` describes it; nothing of it is checked against the files.

    Args:
        path: its place in the nested dictionary that was saved, such as ("model", "lm_head.weight").
        code: dtype in the words of safetensors; the name of another dtype as torch calls it.
        shape: of the whole tensor.
        chunks: the boxes that it is made of, without the empty ones.
    """

    path: tuple[str, ...]
    code: str
    shape: tuple[int, ...]
    chunks: tuple[Chunk, ...]


def read_metadata(folder: Path) -> Iterator[ShardedTensor]:
    """Yield the tensors that `.metadata` of `folder` describes; entries of other kinds are left out.

    Raises:
        CheckpointError: the file is too large, no such pickle, or names something that no such file needs.
    """
    path = folder / METADATA
    try:
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            if size > _LARGEST:
                raise ValueError(f"it has {size:,} bytes, and at most {_LARGEST:,} are read")
            content = _Unpickler(file.read(size), _KNOWN).load()
        yield from _tensors(content)
    except OSError as error:
        raise unreadable(path, error) from error
    except Exception as error:  # whatever the steps of a pickle raise on values that they were not made for
        reason = str(error) or type(error).__name__
        raise CheckpointError(
            f"{path} does not describe a torch distributed checkpoint: {reason}. None of it was executed. Save or copy "
            "the checkpoint again."
        ) from error


class Described(NamedTuple):
    """What the pickle of an entry says of its tensor: dtype, shape, and the bytes of the storage that it takes."""

    code: str
    shape: tuple[int, ...]
    low: int
    high: int


def read_entry(description: bytes) -> Described:
    """Read the pickle that torch.save makes of one plain tensor; ValueError for any other."""
    made = _Unpickler(description, _IN_ENTRY).load()
    if not isinstance(made, _StandIn) or made.name != "_rebuild_tensor_v2" or any(made.given[6:]):
        raise ValueError(f"it is {type(made).__name__} and no plain tensor")
    (kind, storage, key, *_), offset, size, strides = made.given[:4]
    if kind != "storage" or key != "0":
        raise ValueError(f"its numbers are in {str(key)[:60]!r}")
    shape, step = tuple(map(_count, size)), 1
    for length, stride in zip(reversed(shape), reversed(strides), strict=True):
        if length != 1 and stride != step and 0 not in shape:
            raise ValueError("it is not stored row by row")
        step *= length
    code = _STORAGES[storage.name]
    low = _count(offset) * itemsize_of(code)
    return Described(code, shape, low, low + nbytes_of(code, shape))


class _StandIn:
    """An object of the pickle: the name of its class, and what it was made of. Two are never equal."""

    name = ""
    given: tuple[Any, ...]
    state: Any

    def __new__(cls, *given: Any) -> _StandIn:
        self = super().__new__(cls)
        self.given, self.state = given, None
        return self

    def __setstate__(self, state: Any) -> None:
        self.state = state


# In Python, not in C: there an index of a few bytes takes memory of any size.
class _Unpickler(pickle._Unpickler):
    """Makes stand-ins of the known names, new ones for each file, and refuses all others."""

    def __init__(self, content: bytes, known: Mapping[str, Collection[str]]) -> None:
        super().__init__(io.BytesIO(content))
        self._known = known
        self._classes: dict[tuple[str, str], Any] = {}

    def persistent_load(self, given: Any) -> Any:
        return given

    def find_class(self, module: str, name: str) -> Any:
        if name not in self._known.get(module, ()) and not (module == "torch" and _DTYPE.fullmatch(name)):
            raise ValueError(f"it names {module}.{name}, which no such file needs")
        if (module, name) == ("collections", "OrderedDict"):
            return dict
        made = self._classes.get((module, name))
        if made is None:
            made = self._classes[module, name] = type(name, (_StandIn,), {"name": name})
        return made


def _tensors(content: Any) -> Iterator[ShardedTensor]:
    described, stored, paths = _fields(content, "Metadata", "state_dict_metadata", "storage_data", "planner_data")
    places: dict[tuple[str, tuple[int, ...]], tuple[str, int, int]] = {}
    for index, info in _dict(stored).items():
        name, begin = _fields(index, "MetadataIndex", "fqn", "offset")
        if begin is not None:
            places[_text(name), _size(begin)] = _place(info)
    for name, entry in _dict(described).items():
        if isinstance(entry, _StandIn) and entry.name == "BytesStorageMetadata":
            continue
        properties, size, boxes = _fields(entry, "TensorStorageMetadata", "properties", "size", "chunks")
        if not (isinstance(properties, _StandIn) and isinstance(properties.state, tuple) and properties.state):
            raise ValueError(f"tensor {name!r} has no dtype")
        chunks = tuple(_chunk(_text(name), box, places) for box in boxes)
        path = _dict(paths or {}).get(name, (name,))
        dtype = getattr(properties.state[0], "name", "")
        yield ShardedTensor(
            tuple(map(str, path)), CODES.get(dtype, dtype), _size(size), tuple(c for c in chunks if 0 not in c.shape)
        )


def _chunk(name: str, box: Any, places: dict[tuple[str, tuple[int, ...]], tuple[str, int, int]]) -> Chunk:
    offsets, sizes = map(_size, _fields(box, "ChunkStorageMetadata", "offsets", "sizes"))
    if 0 in sizes:  # of a process without a part of this tensor
        return Chunk(offsets, sizes, "", 0, 0)
    if (name, offsets) not in places:
        raise ValueError(f"tensor {name!r} has no bytes for its part at {offsets}")
    return Chunk(offsets, sizes, *places[name, offsets])


def _place(info: Any) -> tuple[str, int, int]:
    file, offset, length, changed = _fields(
        info, "_StorageInfo", "relative_path", "offset", "length", "transform_descriptors"
    )
    if changed:
        raise ValueError(f"the files were changed as they were written, by {changed!r}, and cannot be read in parts")
    return _text(file), _count(offset), _count(length)


def _fields(found: Any, name: str, *fields: str) -> list[Any]:
    """Return some fields of an object of class `name`; None for those that it has not."""
    if not isinstance(found, _StandIn) or found.name != name or not isinstance(found.state, dict):
        raise ValueError(f"it has {type(found).__name__} where {name} is expected")
    return [found.state.get(key) for key in fields]


def _size(found: Any) -> tuple[int, ...]:
    if not isinstance(found, _StandIn) or found.name != "Size" or len(found.given) != 1:
        raise ValueError(f"it has {type(found).__name__} where a size is expected")
    return tuple(map(_count, found.given[0]))


def _count(found: Any) -> int:
    if type(found) is not int or not 0 <= found < 2**63:
        raise ValueError(f"it has {str(found)[:60]!r} where a whole number from 0 on is expected")
    return found


def _text(found: Any) -> str:
    if not isinstance(found, str):
        raise ValueError(f"it has {type(found).__name__} where a name is expected")
    return found


def _dict(found: Any) -> dict[Any, Any]:
    if not isinstance(found, dict):
        raise ValueError(f"it has {type(found).__name__} where a table is expected")
    return found
