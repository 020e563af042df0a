"""Checkpoints, read: opening reads headers only, weights are read block by block as they are asked for.

Nothing is mapped into memory: a file that is cut short while it is mapped kills the process that reads it.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import CheckpointError, list_names
from . import hub, sharded
from .header import CODES, Header, TensorSpec, dtype_of, load_pickled, pickled_specs, read_header, stamp
from .hub import Source
from .json_files import is_there, read_json, unreadable
from .open_files import OpenFiles
from .pieces import gathered
from .schemas import AdapterConfig, Index, ModelConfig
from .shards import read_shards
from .weight_names import COMPUTED_ON_LOAD

if TYPE_CHECKING:
    import numpy
    import torch

ADAPTER_CONFIG = "adapter_config.json"
# In the order in which transformers and PEFT look for them.
_MODEL = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")
_ADAPTER = ("adapter_model.safetensors", "adapter_model.bin")
_COMPILED = "_orig_mod."  # what torch.compile calls the module that it wraps

# Tensors that stand beside or instead of a weight in GPTQ, AWQ, bitsandbytes and compressed-tensors checkpoints.
_PACKED_NAME = re.compile(
    r"\.(?:qweight|qzeros|g_idx|SCB|weight_packed|weight_scale(?:_inv)?|absmax|quant_map|weight_blocks|\w+_blocks)$"
)


@dataclass
class Checkpoint:
    """A model or adapter folder whose headers were read.

    Args:
        source: folder or hub id as the user gave it, without the revision.
        revision: commit on the hub, None for a folder.
        path: the folder on this machine.
        is_adapter: whether it is a PEFT adapter.
        config: content of config.json, {} where there is none (an adapter has none).
        adapter_config: content of adapter_config.json, {} for a model.
        index: name of the index file, None for a single file.
        files: the weight files, in the order of the index.
        specs: name of each tensor on disk to its `TensorSpec`, in file order.
        headers: header of each safetensors file.
        loaded_in: of BASE: torch names of the dtypes that it went through as stage after stage of training loaded the
            model; () as stored. `tuned` at the end stands for the dtype of each weight of TUNED: weights that are in
            another one than the rest were left in it by every stage.
        before: of a checkpoint with changed weights in wider dtypes: what each weight was; None where nothing changed.
        asked: revision as the user gave it, None where none was given.
        stamps: `stamp` of each weight file before it was first read.
    """

    source: str
    revision: str | None
    path: Path
    is_adapter: bool = False
    config: dict[str, Any] = field(default_factory=dict)
    adapter_config: dict[str, Any] = field(default_factory=dict)
    index: str | None = None
    files: list[Path] = field(default_factory=list)
    specs: dict[str, TensorSpec] = field(default_factory=dict)
    headers: dict[Path, Header] = field(default_factory=dict)
    loaded_in: tuple[str, ...] = ()
    before: dict[str, TensorSpec] | None = None
    asked: str | None = None
    stamps: dict[Path, tuple[int, ...] | None] = field(default_factory=dict, repr=False)
    _open: OpenFiles = field(default_factory=OpenFiles, repr=False)

    @classmethod
    def open(cls, source: Source, revision: str | None = None, *, weights: bool = True) -> Checkpoint:
        """Read the headers and the configuration of `source`.

        Args:
            source: a folder or a hub id, either optionally with `@revision` at its end; a folder of that name wins.
            revision: revision on the hub; an error together with `@revision`.
            weights: False reads no header and downloads no weight; `specs` is empty then.

        Raises:
            CheckpointError: no such folder or repository, no weights, a damaged or quantised checkpoint, or a file that
                points outside the checkpoint.
        """
        name, commit, path, asked = hub.locate(source, revision, weights=weights)
        home = sharded.home_of(path, (ADAPTER_CONFIG, "config.json"), (*_MODEL, *_ADAPTER))
        name, path = (name, path) if home == path else (str(home), home)
        is_adapter = is_there(path / ADAPTER_CONFIG)
        if is_adapter and any(is_there(path / file) for file in _MODEL):
            raise CheckpointError(
                f"{name} holds both a model and an adapter ({ADAPTER_CONFIG}): it is not clear which one is meant. "
                "Move one of them to a folder of its own."
            )
        config = read_json(path / "config.json", ModelConfig)
        adapter_config = read_json(path / ADAPTER_CONFIG, AdapterConfig) if is_adapter else {}
        checkpoint = cls(name, commit, path, is_adapter, config, adapter_config, asked=asked)
        if weights:
            checkpoint._read_headers()
        return checkpoint

    def __str__(self) -> str:
        return f"{self.source}@{self.revision}" if self.revision else self.source

    @property
    def quantisation(self) -> str | None:
        """Name of the quantisation method in config.json, None where there is none."""
        for section in [self.config, *(value for value in self.config.values() if isinstance(value, dict))]:
            found = section.get("quantization_config") or section.get("compression_config")
            if found:
                return str(found.get("quant_method", "unknown") if isinstance(found, dict) else found)
        return None

    def check_not_quantised(self, role: str) -> None:
        """Raise CheckpointError if the weights are packed: no delta can be taken from or added to packed weights."""
        packed = [
            f"{name}  {spec.code}"
            for name, spec in self.specs.items()
            if spec.code.startswith(("F8", "F4", "F6_")) or _PACKED_NAME.search(name)
        ]
        method = self.quantisation or (f"{len(packed)} packed tensors" if packed else None)
        if method is not None:
            listed = f"\n{list_names(packed)}" if packed else ""
            raise CheckpointError(
                f"cannot graft: {role} {self} is quantised ({method}), nothing can be added to its weights.{listed}\n"
                "Give the 16-bit or 32-bit checkpoint that it was made from, graft, and quantise the result."
            )

    def loaded(self, dtypes: Sequence[str]) -> Checkpoint:
        """Return the same checkpoint as training loaded it: a view with this `loaded_in`."""
        view = copy.copy(self)
        view.loaded_in = tuple(dtypes)
        return view

    def casts(self, tuned: TensorSpec | None) -> tuple[str, ...]:
        """Return the codes of the dtypes that a weight of BASE went through to become `tuned`; () as stored."""
        codes = tuple(CODES[dtype] for dtype in self.loaded_in if dtype != "tuned")
        follows = self.loaded_in[-1:] == ("tuned",) and tuned is not None and codes[-1:] != (tuned.code,)
        return (tuned.code,) if follows and tuned is not None else codes

    def spec_before(self, name: str) -> TensorSpec | None:
        """Return what weight `name` was before it was changed in a wider dtype; None where that is not known."""
        return self.specs[name] if self.before is None else self.before.get(name)

    def tensor(self, name: str) -> torch.Tensor:
        """Return tensor `name` in its shape and dtype, read anew: a whole copy, see `block`."""
        spec = self.specs[name]
        return self.block(name, 0, spec.numel).view(spec.shape)

    def block(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Return elements `start` to `stop` of the flattened tensor `name`.

        Raises:
            GraftError: the file was cut short, replaced or written to since its header was read.
            CheckpointError: it cannot be read.
        """
        import torch

        dtype = self.specs[name].dtype
        if stop == start:
            return torch.empty(0, dtype=dtype)
        return torch.from_numpy(self.content(name, start, stop)).view(dtype)

    def content(self, name: str, start: int, stop: int, into: numpy.ndarray | None = None) -> numpy.ndarray:
        """Return the bytes of elements `start` to `stop` as stored, uint8; errors as of `block`.

        They are in `into`, see `OpenFiles.read`, where that was given and they lie in a row.
        """
        spec = self.specs[name]
        if spec.in_place:
            return self._bytes(spec, start, stop, into)
        import torch

        return self._pickled[spec.file][name].reshape(-1)[start:stop].view(torch.uint8).numpy()

    def _bytes(self, spec: TensorSpec, start: int, stop: int, into: numpy.ndarray | None = None) -> numpy.ndarray:
        def read(file: Path, offset: int, first: int, last: int, into: numpy.ndarray | None = None) -> numpy.ndarray:
            size = (last - first) * spec.itemsize
            return self._open.read(file, offset + first * spec.itemsize, size, self.stamps[file], into)

        if spec.offset is not None:
            return read(spec.file, spec.offset, start, stop, into)
        return gathered(spec.pieces, spec.itemsize, start, stop, read)

    def __getstate__(self) -> dict[str, Any]:
        # Another process loads anew what had to be loaded as a whole.
        return {name: value for name, value in vars(self).items() if name != "_pickled"}

    @cached_property
    def _pickled(self) -> dict[Path, dict[str, torch.Tensor]]:
        kept = {spec.file for spec in self.specs.values() if not spec.in_place}
        return {path: load_pickled(path) for path in self.files if path in kept}

    def _read_headers(self) -> None:
        whole = any(is_there(self.path / name) for name in self._weight_names())
        if not whole and (folder := sharded.shards_of(self.path)) is not None:
            self._read_shards(folder)
            return
        self.files, self.index = self._weight_files()
        for path in self.files:
            self.stamps[path] = stamp(path)
            if path.suffix == ".safetensors":
                self.headers[path] = read_header(path)
                specs = self.headers[path].specs
            else:
                specs = pickled_specs(path)
            twice = [f"{name}  in {self.specs[name].file.name} and {path.name}" for name in specs if name in self.specs]
            if twice:
                raise CheckpointError(
                    f"{self}: {len(twice)} tensors are stored twice, and readers differ in which they take.\n"
                    f"{list_names(twice)}\nLoad the model and save it again with transformers (save_pretrained), which "
                    "stores each once."
                )
            self.specs.update(specs)
        if self.index is not None:
            self._check_index(read_json(self.path / self.index, Index)["weight_map"])
        if not self.specs:
            raise CheckpointError(f"{self} has weight files without a tensor. Download or save the model again.")
        if compiled := [name for name in self.specs if _COMPILED in name]:
            raise CheckpointError(
                f"{self} was saved from inside torch.compile: {len(compiled)} names have its {_COMPILED!r} in them, by "
                f"which no model is loaded.\n{list_names(compiled)}\nSave the model that it holds "
                "(model._orig_mod.save_pretrained(folder)), or take that part out of the names in the files."
            )

    def _read_shards(self, folder: Path) -> None:
        self.specs, self.stamps = read_shards(folder)
        self.files = list(self.stamps)
        if not self.specs:
            raise CheckpointError(f"{self} has shards of no tensor. Copy or save the checkpoint again.")
        if not self.is_adapter and any(".lora_" in name for name in self.specs):
            raise CheckpointError(
                f"{self} holds the shards of an adapter and no {ADAPTER_CONFIG}, which has its scale. Copy that of the "
                f"run's output folder to {self.path}."
            )

    def _check_index(self, weight_map: dict[str, str]) -> None:
        # torchtune lists all weights of the checkpoint that it read, and writes those that a model has.
        wrong = [
            f"{name}  {file}"
            for name, file in weight_map.items()
            if (self.specs[name].file.name != file if name in self.specs else not COMPUTED_ON_LOAD.search(name))
        ]
        if wrong:
            raise CheckpointError(
                f"{self}: {len(wrong)} weights of {self.index} are not in the file it names.\n{list_names(wrong)}\n"
                "The folder mixes files of two checkpoints or a download is incomplete: fetch or save it again."
            )

    def _weight_names(self) -> tuple[str, ...]:
        return _ADAPTER if self.is_adapter else _MODEL

    def _weight_files(self) -> tuple[list[Path], str | None]:
        names = self._weight_names()
        for name in names:
            if not is_there(self.path / name):
                continue
            if not name.endswith(".index.json"):
                return [hub.inside(self.path, name)], None
            weight_map = read_json(self.path / name, Index)["weight_map"]
            files = [hub.inside(self.path, file) for file in dict.fromkeys(weight_map.values())]
            kind = Path(name.removesuffix(".index.json")).suffix
            if strange := [file.name for file in files if file.suffix != kind]:
                raise CheckpointError(
                    f"{self}: {len(strange)} files that {name} names are not {kind} files.\n{list_names(strange)}\n"
                    "Download or save the checkpoint again."
                )
            return files, name
        try:
            found = sorted(
                path.name for path in self.path.iterdir() if path.suffix in (".safetensors", ".bin", ".gguf")
            )
        except OSError as error:
            raise unreadable(self.path, error) from error
        if (in_shards := sharded.way_out(self.path)) is not None:
            raise CheckpointError(f"{self} holds {in_shards}")
        others = f" It holds {', '.join(found[:5])}, which is no layout that transformers loads." if found else ""
        if gguf := [name for name in found if name.endswith(".gguf")]:
            others = (
                f" It holds {', '.join(gguf[:5])}: GGUF, the format of llama.cpp. Give the model it was made from, or "
                "convert it to safetensors first (from_pretrained(folder, gguf_file=...), then save_pretrained)."
            )
        raise CheckpointError(f"{self} has no weights: none of {', '.join(names)} is in {self.path}.{others}")


@dataclass(frozen=True)
class Place:
    """A tensor on disk, and the dtype in which it is read.

    Args:
        checkpoint: which checkpoint.
        name: its name there.
        casts: codes of the dtypes that its elements are rounded to, in this order, as they are read. Default: none.
    """

    checkpoint: Checkpoint
    name: str
    casts: tuple[str, ...] = ()

    @property
    def spec(self) -> TensorSpec:
        """Its dtype on disk, shape and place."""
        return self.checkpoint.specs[self.name]

    def block(self, start: int, stop: int) -> torch.Tensor:
        """Return elements `start` to `stop` of the flattened tensor, see `Checkpoint.block`."""
        found = self.checkpoint.block(self.name, start, stop)
        for code in self.casts:
            found = found.to(dtype_of(code))
        return found

    def tensor(self) -> torch.Tensor:
        """Return the whole tensor in its shape, read as `block` reads it."""
        return self.block(0, self.spec.numel).view(self.spec.shape)

    def array(self, start: int, stop: int, into: numpy.ndarray | None = None) -> numpy.ndarray:
        """Return what `block` returns in `TensorSpec.numpy_dtype`; a safetensors file without casts needs no torch.

        `into` is as for `Checkpoint.content`.
        """
        if self.casts:
            from ..arithmetic.grafter import array_of

            return array_of(self.block(start, stop))
        return self.content(start, stop, into).view(self.spec.numpy_dtype)

    def numbers(self, start: int, stop: int) -> numpy.ndarray:
        """Return the same elements in fp64."""
        return self.spec.numbers(self.array(start, stop))

    def content(self, start: int, stop: int, into: numpy.ndarray | None = None) -> numpy.ndarray:
        """Return the bytes as stored, see `Checkpoint.content`."""
        return self.checkpoint.content(self.name, start, stop, into)
