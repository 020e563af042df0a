"""What an adapter's file holds: full values of weights, rows of tokens, and the tensors of its modules.

Names are those that a weight has in memory, as adapters have them; transformers' rules say where it lies on disk.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import EllipsisType
from typing import Any

import torch
from torch import Tensor

from ..checkpoints.checkpoint import Checkpoint
from ..checkpoints.header import dtype_of, narrower
from ..checkpoints.weight_names import is_of_tokens
from ..errors import AdapterError, list_names
from ..layouts.model_names import ModelNames
from .lora import PREFIX, nearest_names

# What PEFT puts between the name of a module and the name of its weight.
_WRAPPED = re.compile(r"\.(?:base_layer|ln_tuning_layers|modules_to_save|original_module)(?=\.)")
_TOKENS = re.compile(r"(?P<module>.+?)(?:\.token_adapter)?\.trainable_tokens_delta")


class MemoryWeights:
    """The weights of a checkpoint by the names that they have in memory, read one at a time.

    Args:
        checkpoint: where they are.
        names: what transformers calls them.
        dtype: of a model that they were loaded for. Default: as on disk.
    """

    def __init__(self, checkpoint: Checkpoint, names: ModelNames, dtype: torch.dtype | None = None) -> None:
        self.checkpoint = checkpoint
        self.names = names
        self.dtype = dtype
        self._groups = names.groups(checkpoint.specs)

    def __contains__(self, name: object) -> bool:
        return name in self._groups

    def sources(self, name: str) -> list[str]:
        """Return the names on disk of what makes weight `name`; of the embedding for a head that shares it."""
        if name not in self._groups and self.names.ties.get(name) in self._groups:
            name = self.names.ties[name]
        return self._groups.get(name, [])

    def __getitem__(self, name: str) -> Tensor:
        """Return weight `name`; AdapterError where there is none."""
        sources = self.sources(name)
        if not sources:
            raise AdapterError(
                f"{self.checkpoint} has no weight {name}, which the adapter changes.\n"
                f"{list_names(nearest_names([name], self._groups))}\nGive the models that the adapter belongs to."
            )
        made = self.names.to_memory({source: self.checkpoint.tensor(source) for source in sources})
        found = next(iter(made.values()))
        return found if self.dtype is None else found.to(self.dtype)


@dataclass(frozen=True)
class StoredValues:
    """What an adapter's file holds.

    Args:
        adapter: the adapter.
        values: weights of which full values are stored: name in memory -> name in the file, and ids of the tokens whose
            rows these are, `...` for the whole weight.
        others: names in the file of everything else.
    """

    adapter: Checkpoint
    values: dict[str, tuple[str, list[int] | EllipsisType]] = field(default_factory=dict)
    others: list[str] = field(default_factory=list)

    def delta(self, name: str, base: MemoryWeights) -> Tensor:
        """Return what training added to weight `name` (in memory) of `base`, float64: zero outside the stored rows.

        Raises:
            AdapterError: the stored values have another shape than BASE's.
        """
        key, rows = self.values[name]
        stored, origin = self.adapter.tensor(key), self._loaded(name, base).double()
        before = origin[rows]
        if stored.shape != before.shape:
            raise AdapterError(
                f"adapter {self.adapter}: {key} has the shape {tuple(stored.shape)}, the weight in base "
                f"{tuple(before.shape)}. Give the base that the adapter was trained on."
            )
        if rows is ...:
            return stored.double() - origin
        delta = torch.zeros_like(origin)
        delta[rows] = stored.double() - before
        return delta

    def grown(self, name: str, base: MemoryWeights) -> Tensor | None:
        """Return a whole weight with another number of rows than BASE's, float64; None where the shapes are the same.

        BASE's rows get their delta, further rows are as stored.
        """
        key, rows = self.values[name]
        stored, origin, loaded = self.adapter.tensor(key), base[name], self._loaded(name, base)
        if rows is not ... or stored.shape == origin.shape or stored.shape[1:] != origin.shape[1:]:
            return None
        value, shared = stored.double(), min(len(stored), len(origin))
        value[:shared] += origin[:shared].double() - loaded[:shared].double()
        return value

    def narrow(self, base: MemoryWeights) -> list[str]:
        """Return a line for each stored weight with fewer digits than BASE's, where no cast of BASE is known."""
        specs = base.checkpoint.specs
        return narrower(
            (name, specs[source], self.adapter.specs[key])
            for name, (key, _) in self.values.items()
            for source in base.sources(name)[:1]
            if not self._casts(name, base.checkpoint)
        )

    def _loaded(self, name: str, base: MemoryWeights) -> Tensor:
        """Return weight `name` of BASE as training loaded it."""
        found = base[name]
        for code in self._casts(name, base.checkpoint):
            found = found.to(dtype_of(code))
        return found

    def _casts(self, name: str, base: Checkpoint) -> tuple[str, ...]:
        key, rows = self.values[name]
        # PEFT keeps rows of tokens in fp32 from the first stage on; whole weights it loads in the dtype of each stage.
        return (base if rows is ... else base.loaded(base.loaded_in[:1])).casts(self.adapter.specs[key])


def read_stored(adapter: Checkpoint, memory: Mapping[str, Any]) -> StoredValues:
    """Sort the tensors of an adapter of any type; `memory` has the names of the weights of the model under it."""
    found, rows = StoredValues(adapter), {}
    for key in adapter.specs:
        name = key.removeprefix(PREFIX)
        plain, tokens = _WRAPPED.sub("", name), _TOKENS.fullmatch(name)
        if tokens is not None:
            rows[f"{tokens['module']}.weight"] = (key, _token_ids(adapter, tokens["module"]))
        elif plain in memory:
            found.values[plain] = (key, ...)
        else:
            found.others.append(key)
    found.values.update(rows)
    return found


def token_rows(adapter: Checkpoint) -> dict[str, list[int] | EllipsisType]:
    """Return name in the file -> ids of the tokens whose rows it changes, `...` for all, of every tensor that does."""
    found: dict[str, list[int] | EllipsisType] = {}
    for key in adapter.specs:
        tokens = _TOKENS.fullmatch(key.removeprefix(PREFIX))
        if tokens is not None:
            found[key] = _token_ids(adapter, tokens["module"])
        elif is_of_tokens(key):
            found[key] = ...
    return found


def may_change(adapter: Checkpoint) -> set[str]:
    """Return every name that a weight under a tensor of the adapter can have in memory."""
    paths = [_WRAPPED.sub("", name.removeprefix(PREFIX)).split(".") for name in adapter.specs]
    return {".".join([*path[:end], "weight"]) for path in paths for end in range(1, len(path))}


def module_of(key: str, known: set[str]) -> str | None:
    """Return the module of the plain model that a tensor of an adapter belongs to; None for one that all share."""
    parts = key.removeprefix(PREFIX).split(".")
    names = (".".join(parts[:end]) for end in range(len(parts) - 1, 0, -1))
    return next((name for name in names if name in known), None)


def _token_ids(adapter: Checkpoint, module: str) -> list[int]:
    config = adapter.adapter_config
    ids = config.get("token_indices") or config.get("trainable_token_indices")
    if isinstance(ids, dict):
        ids = next((found for name, found in ids.items() if module == name or module.endswith(f".{name}")), None)
    if not isinstance(ids, list):
        raise AdapterError(
            f"adapter {adapter} has token rows of {module}, and its config does not say which tokens these are. "
            "Save it again."
        )
    return ids
