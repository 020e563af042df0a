"""Torch distributed checkpoints, as FSDP writes them with SHARDED_STATE_DICT: read in parts, never gathered.

torch's own reader is not used: it unpickles `.metadata` without a check, and reads every entry of a file whole. Each
entry is what torch.save writes: its description is read without its numbers, and those at their place in the file.
"""

from __future__ import annotations

import io
import re
import zipfile
from collections import Counter, defaultdict
from functools import lru_cache
from pathlib import Path
from typing import Any

from ..errors import CheckpointError, list_names
from .header import CODES, TensorSpec, check_archive, nbytes_of, stamp
from .hub import inside
from .json_files import unreadable
from .pieces import Piece, not_whole
from .shard_metadata import METADATA, Chunk, Described, ShardedTensor, read_entry, read_metadata

_STATE = "model"
"""Key of the model in what accelerate, and most scripts, save; the state of the optimiser has another."""
_TRAINED = re.compile(r"\.(lora_|modules_to_save\.|trainable_tokens_|token_adapter\.)|\.original_module\.")
_FACTOR = re.compile(r"(.+\.lora_[AB])\.[^.]+(\.weight)")


def read_shards(folder: Path) -> tuple[dict[str, TensorSpec], dict[Path, tuple[int, ...] | None]]:
    """Return name -> spec of the weights in a folder of shards, and path -> `stamp` of the files that hold them.

    Names are those in memory, as merging the shards would write them. What is not of the model, as the state of an
    optimiser, is left out. Of a whole model under a LoRA the factors are taken, which are what was trained.

    Raises:
        CheckpointError: the files are damaged, do not hold what `.metadata` says, or lead out of the folder; a weight
            is not there as a whole; or the names are of no model.
    """
    try:
        there = tuple((path, stamp(path)) for path in sorted(folder.iterdir()))
    except OSError as error:
        raise unreadable(folder, error) from error
    specs = _specs(folder, there)
    used = {folder / METADATA} | {piece.file for spec in specs.values() for piece in spec.pieces}
    return dict(specs), {path: found for path, found in there if path in used}


# A graft opens what was trained more than once, and a large model has a hundred thousand entries.
@lru_cache(maxsize=4)
def _specs(folder: Path, there: tuple[tuple[Path, tuple[int, ...] | None], ...]) -> dict[str, TensorSpec]:
    """Read all of a folder whose files are `there`, as their stamps tell."""
    tensors = _named(folder, list(read_metadata(folder)))
    by_file: dict[str, list[tuple[str, Chunk]]] = defaultdict(list)
    for name, tensor in tensors.items():
        _check(folder, name, tensor)
        for chunk in tensor.chunks:
            by_file[chunk.file].append((name, chunk))
    pieces: dict[str, list[Piece]] = {name: [] for name in tensors}
    known: dict[bytes, Described] = {}
    for file in sorted(by_file):
        _read_places(inside(folder, file), by_file[file], tensors, pieces, known)
    return {name: _spec(folder, tensor, pieces[name]) for name, tensor in tensors.items()}


def _check(folder: Path, name: str, tensor: ShardedTensor) -> None:
    if tensor.code not in CODES.values():
        raise CheckpointError(f"{folder} holds a tensor of {tensor.code}, which safetensors cannot store: {name}.")
    reason = not_whole(tensor.shape, [(chunk.begin, chunk.shape) for chunk in tensor.chunks])
    if reason:
        raise CheckpointError(
            f"{folder}: weight {name} is not whole: {reason}. Save the checkpoint again, or copy all of its files."
        )


def _spec(folder: Path, tensor: ShardedTensor, pieces: list[Piece]) -> TensorSpec:
    file = pieces[0].file if pieces else folder / METADATA
    size = nbytes_of(tensor.code, tensor.shape)
    return TensorSpec(tensor.code, tensor.shape, file, None, size, tuple(pieces))


def _named(folder: Path, tensors: list[ShardedTensor]) -> dict[str, ShardedTensor]:
    """Return the model's tensors by their names."""
    inner = [(tensor.path[tensor.path.index(_STATE) + 1 :], tensor) for tensor in tensors if _STATE in tensor.path[:-1]]
    found = inner or [(tensor.path, tensor) for tensor in tensors]
    if not inner and (others := [".".join(path) for path, _ in found if len(path) > 1]):
        raise CheckpointError(
            f"{folder} holds no weights under the key {_STATE!r} but\n{list_names(others)}\nSave the model's state "
            f"alone, or as {{{_STATE!r}: state}}, as accelerate does."
        )
    names = [(".".join(path), tensor) for path, tensor in found]
    if wrong := [repr(name) for name, _ in names if not name.isprintable()]:
        raise CheckpointError(
            f"{folder}: {len(wrong)} tensors have names that no weight can have.\n{list_names(wrong)}"
        )
    if any(".base_layer." in name for name, _ in names):
        names = _factors(folder, names)
    counts = Counter(name for name, _ in names)
    if twice := [name for name, count in counts.items() if count > 1]:
        raise CheckpointError(
            f"{folder} holds {len(twice)} weights twice, of two models or two adapters.\n{list_names(twice)}\nSave the "
            "one that was trained alone."
        )
    return dict(names)


def _factors(folder: Path, names: list[tuple[str, ShardedTensor]]) -> list[tuple[str, ShardedTensor]]:
    """Return the factors of a LoRA, as PEFT names them in a file of its own, of a whole model under one."""
    matches = [(_FACTOR.fullmatch(name), name, tensor) for name, tensor in names]
    others = [name for match, name, _ in matches if match is None and _TRAINED.search(name)]
    if others:
        raise CheckpointError(
            f"{folder} holds a whole model under an adapter that is more than a plain LoRA.\n{list_names(others)}\n"
            "Save the adapter alone (save_pretrained of PEFT) and give that."
        )
    return [(f"{match[1]}{match[2]}", tensor) for match, _, tensor in matches if match is not None]


def _read_places(
    path: Path,
    chunks: list[tuple[str, Chunk]],
    tensors: dict[str, ShardedTensor],
    pieces: dict[str, list[Piece]],
    known: dict[bytes, Described],
) -> None:
    """Find the numbers of every chunk of one file and add them to `pieces`."""
    end = 0
    try:
        with open(path, "rb", buffering=0) as file:
            size = file.seek(0, io.SEEK_END)
            for name, chunk in sorted(chunks, key=lambda item: item[1].offset):
                if not end <= chunk.offset <= chunk.offset + chunk.length <= size:
                    raise ValueError(f"bytes {chunk.offset} to {chunk.offset + chunk.length} are no place of their own")
                end = chunk.offset + chunk.length
                tensor = tensors[name]
                offset = chunk.offset + _numbers(io.BufferedReader(_Window(file, chunk)), tensor.code, chunk, known)
                pieces[name].append(Piece(tensor.shape, chunk.begin, chunk.shape, path, offset))
    except OSError as error:
        raise unreadable(path, error) from error
    except Exception as error:  # whatever the steps of a pickle raise on what torch.save did not write
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise CheckpointError(
            f"{path} does not hold the shards that {METADATA} names: {name}: {reason}. Only plain tensors are read "
            "from them, and nothing of them was run. Save or copy the checkpoint again."
        ) from error


def _numbers(entry: io.BufferedReader, code: str, chunk: Chunk, known: dict[bytes, Described]) -> int:
    """Return the byte of an entry at which the numbers of its tensor begin, row by row.

    Entries of one dtype and shape have the same pickle: what it says is looked up in `known`.
    """
    with zipfile.ZipFile(entry) as archive:
        check_archive(archive)
        parts = {part.filename.partition("/")[2]: part for part in archive.infolist()}
        description, storage = archive.read(parts["data.pkl"]), parts["data/0"]
    entry.seek(storage.header_offset)
    head = entry.read(30)  # of a fixed size, with those of the name and of what follows it at its end
    begin = storage.header_offset + 30 + int.from_bytes(head[26:28], "little") + int.from_bytes(head[28:30], "little")
    if description not in known:
        known[description] = read_entry(description)
    found = known[description]
    if (found.code, found.shape) != (code, chunk.shape):
        raise ValueError(f"it is {found.code} {found.shape} and not {code} {chunk.shape}")
    if found.high > storage.file_size or begin + found.high > chunk.length:
        raise ValueError("its numbers reach out of their place")
    return begin + found.low


class _Window(io.RawIOBase):
    """The bytes of one entry of a file, as a file."""

    def __init__(self, file: io.RawIOBase, chunk: Chunk) -> None:
        self._file, self._first, self._size, self._at = file, chunk.offset, chunk.length, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._at = max(offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._size}[whence], 0)
        return self._at

    def readinto(self, buffer: Any) -> int:
        wanted = max(min(len(buffer), self._size - self._at), 0)
        self._file.seek(self._first + self._at)
        found = self._file.read(wanted) or b""
        buffer[: len(found)] = found
        self._at += len(found)
        return len(found)
