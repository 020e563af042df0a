"""Headers of safetensors files, read without torch and checked before a byte behind them is trusted; .bin files."""

from __future__ import annotations

import json
import math
import os
import sys
import zipfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import CheckpointError, list_names
from .json_files import parse, unreadable
from .pieces import Piece

if TYPE_CHECKING:
    import numpy
    import torch

_MAX_HEADER = 100_000_000  # the limit of the safetensors library itself

# Code in the header -> (bits of an element, name of the torch dtype)
_DTYPES = {
    "F64": (64, "float64"), "F32": (32, "float32"), "F16": (16, "float16"), "BF16": (16, "bfloat16"),
    "I64": (64, "int64"), "I32": (32, "int32"), "I16": (16, "int16"), "I8": (8, "int8"), "U8": (8, "uint8"),
    "BOOL": (8, "bool"), "U16": (16, "uint16"), "U32": (32, "uint32"), "U64": (64, "uint64"), "C64": (64, "complex64"),
    "F8_E4M3": (8, "float8_e4m3fn"), "F8_E5M2": (8, "float8_e5m2"), "F8_E8M0": (8, "float8_e8m0fnu"),
    "F8_E4M3FNUZ": (8, "float8_e4m3fnuz"), "F8_E5M2FNUZ": (8, "float8_e5m2fnuz"),
    "F4": (4, "float4_e2m1fn_x2"), "F6_E2M3": (6, ""), "F6_E3M2": (6, ""),
}  # fmt: skip
TORCH_NAMES = {code: name for code, (_, name) in _DTYPES.items()}
CODES = {name: code for code, (_, name) in _DTYPES.items() if name}
_DIGITS = {"F64": 53, "F32": 24, "F16": 11, "BF16": 8}
FLOATS = tuple(_DIGITS)


@dataclass(frozen=True)
class TensorSpec:
    """Where a tensor lies.

    Args:
        code: dtype in the words of safetensors, such as `BF16`.
        shape: its shape; () for a scalar.
        file: the file that holds it.
        offset: byte of the file at which it begins; None where a .bin file has to be loaded as a whole, or for pieces.
        nbytes: bytes that it takes.
        pieces: what it is stored in, where `file` does not hold all of it. Default: none.
    """

    code: str
    shape: tuple[int, ...]
    file: Path
    offset: int | None
    nbytes: int
    pieces: tuple[Piece, ...] = ()

    @property
    def numel(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def in_place(self) -> bool:
        """Whether ranges of its elements can be read alone."""
        return self.offset is not None or bool(self.pieces)

    @property
    def itemsize(self) -> int:
        """Bytes of one element."""
        return itemsize_of(self.code)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype as torch calls it; imports torch."""
        return dtype_of(self.code)

    @property
    def numpy_dtype(self) -> str:
        """The dtype as the arithmetic takes it: of 16-bit numbers it is given the bits (`arithmetic.kernel.BITS`)."""
        return {"BF16": "uint16", "F16": "int16"}.get(self.code, TORCH_NAMES[self.code])

    def numbers(self, stored: numpy.ndarray) -> numpy.ndarray:
        """Return elements given in `numpy_dtype` as numbers, in fp64."""
        import numpy

        from ..arithmetic import kernel

        if not self.is_float:
            return stored.astype(numpy.float64)
        found = numpy.empty(stored.size)
        kernel.convert(found, stored)
        return found

    @property
    def is_float(self) -> bool:
        """Whether the elements are numbers that a graft can add to (not packed, not integers)."""
        return self.code in FLOATS


def narrower(weights: Iterable[tuple[str, TensorSpec, TensorSpec]]) -> list[str]:
    """Return a line for each of (name, BASE's, TUNED's) where TUNED's numbers have fewer digits than BASE's."""
    return [
        f"{name}  base {base.code}, tuned {tuned.code}"
        for name, base, tuned in weights
        if base.is_float and tuned.is_float and _DIGITS[tuned.code] < _DIGITS[base.code]
    ]


def itemsize_of(code: str) -> int:
    """Return the bytes of one element of a safetensors code."""
    return _DTYPES[code][0] // 8


def dtype_of(code: str) -> torch.dtype:
    """Return the torch dtype of a safetensors code such as `BF16`; imports torch."""
    import torch

    return getattr(torch, TORCH_NAMES[code])


@dataclass(frozen=True)
class Header:
    """The header of one file.

    Args:
        raw: its bytes as they are on disk: the length, the JSON and its padding.
        metadata: `__metadata__` of the file, None where there is none.
        specs: the tensors in the order of their bytes.
    """

    raw: bytes
    metadata: dict[str, str] | None
    specs: dict[str, TensorSpec]


def stamp(file: Path | int) -> tuple[int, ...] | None:
    """Return what changes when a file, by path or descriptor, is replaced or written to; None without a file.

    These are device, inode, size and the time of the last change. The kernel sets that one, unlike the time of the last
    write, which anybody can restore; it also changes with the file's permissions and links.
    """
    try:
        found = os.stat(file)
    except OSError:
        return None
    return found.st_dev, found.st_ino, found.st_size, found.st_ctime_ns


def read_header(path: Path) -> Header:
    """Read and check the header of `path`.

    Raises:
        CheckpointError: the file is cut short, its header is no JSON, or a tensor's place or size is not possible.
    """
    try:
        size = os.path.getsize(path)
        with open(path, "rb") as file:
            start = file.read(8)
            length = int.from_bytes(start, "little")
            if len(start) < 8 or length > min(size - 8, _MAX_HEADER):
                raise ValueError(f"its header should have {length} bytes, the file has {size}")
            raw = file.read(length)
        # As strict as the safetensors library, which reads nothing but UTF-8 and no name twice.
        content = parse(raw.decode(), unique=True)
        if raw[:1] != b"{":
            raise ValueError("its header does not begin with a brace")
        metadata = content.pop("__metadata__", None)
        if metadata is not None and not (
            isinstance(metadata, dict) and all(isinstance(value, str) for value in metadata.values())
        ):
            raise ValueError("its header has metadata that is not text")
        found = [(name, _spec(path, name, entry, 8 + length)) for name, entry in content.items()]
        specs = dict(sorted(found, key=lambda item: (item[1].offset, item[1].nbytes)))
        _check_places(specs, 8 + length, size)
    except OSError as error:
        raise unreadable(path, error) from error
    except ValueError as error:
        raise CheckpointError(
            f"{path} is not a complete safetensors file: {error}. Download or save it again."
        ) from error
    return Header(start + raw, metadata, specs)


def load_pickled(path: Path, device: str = "cpu") -> dict[str, torch.Tensor]:
    """Return the tensors of a .bin file; on the device `meta` without their values. CheckpointError for other content.

    The file is not mapped into memory, see `open_files`.
    """
    import torch

    try:
        # Compressed parts could be of any size.
        archive = zipfile.is_zipfile(path)
        if archive:
            with zipfile.ZipFile(path) as opened:
                check_archive(opened)
        content = torch.load(path, map_location=device, weights_only=True, mmap=False)
    except Exception as error:
        raise CheckpointError(
            f"cannot read {path}: {str(error).splitlines()[0] if str(error) else type(error).__name__}. Only plain "
            "tensors are loaded from .bin files (weights_only=True). Give a safetensors checkpoint."
        ) from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} is not a dictionary of tensors. Give a safetensors checkpoint.")
    wrong = [
        f"{name!r}  {what}" for name, value in content.items() if (what := not_plain(name, value, device, archive))
    ]
    # Views of few numbers can stand for any number of them.
    views = sum(value.nbytes for value in content.values() if not wrong and not value.is_contiguous())
    if not wrong and views > path.stat().st_size:
        wrong = [f"views of few numbers, which would take {views:,} bytes in a file of {path.stat().st_size:,}"]
    if wrong:
        raise CheckpointError(
            f"{path} is not a dictionary of tensors: {len(wrong)} entries are something else.\n"
            f"{list_names(wrong)}\n"
            "Give a safetensors checkpoint."
        )
    return {name: tensor.detach() for name, tensor in content.items()}


def check_archive(archive: zipfile.ZipFile) -> None:
    """Raise ValueError if the numbers in what torch.save wrote are not those of memory, byte by byte."""
    for part in archive.infolist():
        if part.compress_type != zipfile.ZIP_STORED:
            raise ValueError("it is compressed, which torch.save does not do")
        if part.filename.endswith("/byteorder") and archive.read(part) != sys.byteorder.encode():
            raise ValueError("it was written by a machine with another order of bytes")


def not_plain(name: Any, value: Any, device: str, archive: bool) -> str:
    """Return what an entry of a .bin file is, where it is no name with a plain tensor; else ""."""
    import torch

    if not isinstance(value, torch.Tensor):
        return f"is {type(value).__name__}"
    if not isinstance(name, str) or not name.isprintable():
        return "is no name"
    if value.device.type != device or value.layout != torch.strided or value.is_quantized:
        return f"is a tensor of another kind: {value.device}, {value.layout}, {value.dtype}"
    if archive and device == "meta" and getattr(value.untyped_storage(), "_checkpoint_offset", None) is None:
        return "is a tensor without values"  # it was on the device meta when it was saved
    return ""


def pickled_specs(path: Path) -> dict[str, TensorSpec]:
    """Return the specs of the tensors of a .bin file; CheckpointError for a dtype that safetensors cannot store."""
    specs = {}
    for name, tensor in load_pickled(path, "meta").items():
        code = CODES.get(str(tensor.dtype).removeprefix("torch."))
        if code is None:
            raise CheckpointError(f"{path} holds a tensor of {tensor.dtype}, which safetensors cannot store.")
        # Files of torch < 1.6 have no such place.
        begin = getattr(tensor.untyped_storage(), "_checkpoint_offset", None) if tensor.is_contiguous() else None
        offset = None if begin is None else begin + tensor.storage_offset() * tensor.itemsize
        specs[name] = TensorSpec(code, tuple(tensor.shape), path, offset, tensor.nbytes)
    return specs


def build_header(tensors: dict[str, tuple[str, tuple[int, ...]]], metadata: dict[str, str] | None) -> bytes:
    """Return the bytes of a header whose tensors (name -> code, shape) follow one another without holes."""
    content: dict[str, Any] = {} if metadata is None else {"__metadata__": metadata}
    offset = 0
    for name, (code, shape) in tensors.items():
        end = offset + nbytes_of(code, shape)
        content[name] = {"dtype": code, "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(content, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def nbytes_of(code: str, shape: tuple[int, ...]) -> int:
    """Return the bytes that a tensor of this dtype and shape takes."""
    return math.prod(shape) * _DTYPES[code][0] // 8


def _spec(path: Path, name: str, entry: Any, data: int) -> TensorSpec:
    known = entry if isinstance(entry, dict) else {}
    code, sizes, places = (known.get(key) for key in ("dtype", "shape", "data_offsets"))
    if not isinstance(sizes, list) or not isinstance(places, list) or len(places) != 2:
        raise ValueError(f"tensor {name!r} has no dtype, shape and data_offsets but {str(entry)[:60]}")
    if not isinstance(code, str) or code not in _DTYPES:
        raise ValueError(f"tensor {name!r} has the unknown dtype {code!r}")
    shape, (begin, end) = tuple(sizes), places
    whole = all(type(size) is int and size >= 0 for size in (*shape, begin, end))
    # torch counts in 64 bits, also along the other dimensions of an empty tensor.
    if not whole or max(begin, end, 8 * math.prod(max(size, 1) for size in shape)) >= 2**63:
        raise ValueError(f"tensor {name!r} has the shape {shape} at {begin}:{end}")
    if end - begin != nbytes_of(code, shape):
        raise ValueError(f"tensor {name!r}, {code} {shape}, cannot take {end - begin} bytes")
    return TensorSpec(code, shape, path, data + begin, end - begin)


def _check_places(specs: dict[str, TensorSpec], data: int, size: int) -> None:
    expected = data
    for name, spec in specs.items():
        if spec.offset != expected:
            raise ValueError(f"tensor {name!r} begins at byte {spec.offset}, not at {expected}")
        expected += spec.nbytes
    if expected != size:
        raise ValueError(f"its tensors end at byte {expected}, the file at {size}")
