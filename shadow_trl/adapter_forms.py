"""Writing the adapter form of a graft: an adapter for INSTRUCT that means there what the trained one means on BASE.

Three things may stand in an adapter's file. Factors of a delta: copied, multiplied by the scale. Full values of weights
(`modules_to_save`, biases, token rows, the embedding that PEFT saves beside its adapter): they are BASE's plus what was
learnt, so INSTRUCT less BASE is added. Products that start inside BASE's weights (PiSSA, OLoRA): the start is
subtracted by twice the rank.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .adapter import PREFIX, WEIGHTS, LoraModule, is_plain, nearest_names, read_lora
from .adapter_kinds import START_FOLDER
from .checkpoint import ADAPTER_CONFIG, Checkpoint
from .conversion import ModelNames
from .errors import AdapterError, list_names

# What PEFT puts between the name of a module and the name of its weight.
_WRAPPED = re.compile(r"\.(?:base_layer|ln_tuning_layers|modules_to_save|original_module)(?=\.)")
_TOKENS = re.compile(r"(?P<module>.+?)(?:\.token_adapter)?\.trainable_tokens_delta")


class MemoryWeights:
    """The weights of a checkpoint by the names that they have in memory, read one at a time.

    Args:
        checkpoint: where they are.
        names: how transformers calls them.
    """

    def __init__(self, checkpoint: Checkpoint, names: ModelNames) -> None:
        self.checkpoint = checkpoint
        self.names = names
        self._groups = names.groups(checkpoint.specs)

    def __contains__(self, name: object) -> bool:
        return name in self._groups

    def sources(self, name: str) -> list[str]:
        """Return the names on disk of what makes weight `name`; of the embedding for a head that shares it."""
        if name not in self._groups and self.names.ties.get(name) in self._groups:
            name = self.names.ties[name]
        return self._groups.get(name, [])

    def __getitem__(self, name: str) -> Tensor:
        """Return weight `name`, in the dtype that it has on disk.

        Raises:
            AdapterError: there is no such weight.
        """
        sources = self.sources(name)
        if not sources:
            raise AdapterError(
                f"{self.checkpoint} has no weight {name}, which the adapter changes.\n"
                f"{list_names(nearest_names([name], self._groups))}\nGive the models that the adapter belongs to. "
                "Nothing was written."
            )
        made = self.names.to_memory({source: self.checkpoint.tensor(source) for source in sources})
        return next(iter(made.values()))


@dataclass(frozen=True)
class StoredValues:
    """The full values in an adapter's file.

    Args:
        adapter: the adapter.
        values: name of a weight in memory -> name in the file, for whole weights.
        rows: the same for token rows, with the ids of the tokens.
        others: names in the file of everything else.
    """

    adapter: Checkpoint
    values: dict[str, str] = field(default_factory=dict)
    rows: dict[str, tuple[str, list[int]]] = field(default_factory=dict)
    others: list[str] = field(default_factory=list)

    @property
    def names(self) -> list[str]:
        """Names in memory of the weights of which full values are stored."""
        return [*self.values, *self.rows]

    def delta(self, name: str, base: Tensor, base_dtype: str | None) -> Tensor:
        """Return what training added to weight `name`, float64: zero outside the stored rows.

        Args:
            name: in memory.
            base: BASE's weight.
            base_dtype: dtype in which training loaded BASE; `tuned` for that of the stored value.
        """
        key, ids = self.rows[name] if name in self.rows else (self.values[name], None)
        stored = self.adapter.tensor(key)
        origin = as_loaded(base, stored, base_dtype)
        if ids is None:
            _check_shape(self.adapter, key, stored, origin)
            return stored.double() - origin
        _check_shape(self.adapter, key, stored, origin[ids])
        delta = torch.zeros_like(origin)
        delta[ids] = stored.double() - origin[ids]
        return delta


def read_stored(adapter: Checkpoint, memory: Mapping[str, Any]) -> StoredValues:
    """Sort the tensors of an adapter into full values and the rest.

    Args:
        adapter: of any type.
        memory: names of the weights of the model under it.
    """
    found = StoredValues(adapter)
    for key in adapter.specs:
        name = key.removeprefix(PREFIX)
        plain = _WRAPPED.sub("", name)
        tokens = _TOKENS.fullmatch(name)
        if tokens is not None:
            weight = f"{tokens['module']}.weight"
            found.rows[weight] = (key, _token_ids(adapter, tokens["module"]))
        elif plain in memory:
            found.values[plain] = key
        else:
            found.others.append(key)
    return found


def as_loaded(base: Tensor, stored: Tensor, base_dtype: str | None) -> Tensor:
    """Return BASE's weight as training saw it, in float64."""
    if base_dtype is None:
        return base.double()
    return base.to(stored.dtype if base_dtype == "tuned" else getattr(torch, base_dtype)).double()


def read_start(adapter: Checkpoint) -> Checkpoint | None:
    """Return the adapter as it was before training, None where it was not kept."""
    folders = [adapter.path / START_FOLDER]
    if adapter.path.name.startswith("checkpoint-"):
        folders.append(adapter.path.parent / START_FOLDER)
    found = next((folder for folder in folders if (folder / ADAPTER_CONFIG).is_file()), None)
    if found is None:
        return None
    start = Checkpoint.open(str(found))
    here, there = ({name: spec.shape for name, spec in side.specs.items()} for side in (adapter, start))
    if here != there:
        raise AdapterError(
            f"the start of adapter {adapter} in {START_FOLDER} has other weights than the adapter: "
            f"{len(here.items() ^ there.items())} names or shapes differ. Remove it, or put the right one there. "
            "Nothing was written."
        )
    return start


def less_start(adapter: Checkpoint, start: Checkpoint, folder: Path) -> Checkpoint:
    """Write `B @ A - B0 @ A0` as a plain LoRA of twice the rank into `folder`, and return it.

    Source: PEFT's `path_initial_model_for_weight_conversion`.
    """
    now, before = (read_lora(_as_plain(side)) for side in (adapter, start))
    factors = {}
    for name, lora in now.items():
        left, right = (_factors(side, module) for side, module in ((adapter, lora), (start, before[name])))
        factors[name] = (torch.cat([left[0], -right[0]], 1), torch.cat([left[1], right[1]], 0))
    return write_factors(factors, adapter.adapter_config, folder)


def concatenated(adapters: list[tuple[Checkpoint, float]], folder: Path) -> Checkpoint:
    """Write the weighted sum of plain LoRAs as one into `folder`, exactly: the ranks add up.

    Args:
        adapters: each with its weight.
        folder: new or empty.
    """
    parts: dict[str, list[tuple[Tensor, Tensor]]] = {}
    for adapter, weight in adapters:
        for name, lora in read_lora(adapter).items():
            left, right = _factors(adapter, lora)
            parts.setdefault(name, []).append((left * weight, right))
    factors = {name: (torch.cat([x for x, _ in found], 1), torch.cat([y for _, y in found], 0))
               for name, found in parts.items()}  # fmt: skip
    first = adapters[0][0].adapter_config
    narrow = {"layers_to_transform": None, "layers_pattern": None, "exclude_modules": None}
    return write_factors(factors, {**first, **narrow, "target_modules": sorted(factors)}, folder)


def write_factors(factors: Mapping[str, tuple[Tensor, Tensor]], config: Mapping[str, Any], folder: Path) -> Checkpoint:
    """Write products of two factors as a plain LoRA with alpha equal to the rank, and return it.

    Args:
        factors: module -> (left (out, r), right (r, in)), fp32; the delta is `left @ right`.
        config: settings that are kept beside rank, alpha and initialisation.
        folder: made here.
    """
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    ranks = {name: right.shape[0] for name, (_, right) in factors.items()}
    rank = max(ranks.values())
    # Loaders without patterns of rank divide alpha by r: that is 1 for every module.
    other = {name: found for name, found in ranks.items() if found != rank}
    settings = {
        **config, "r": rank, "lora_alpha": rank, "rank_pattern": other, "alpha_pattern": dict(other),
        "use_rslora": False, "init_lora_weights": True,
    }  # fmt: skip
    (folder / ADAPTER_CONFIG).write_text(json.dumps(settings, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    tensors = {}
    for name, (left, right) in factors.items():
        tensors[f"{PREFIX}{name}.lora_A.weight"] = right.contiguous()
        tensors[f"{PREFIX}{name}.lora_B.weight"] = left.contiguous()
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    return Checkpoint.open(str(folder))


def write_adapter(
    adapter: Checkpoint,
    base: Checkpoint,
    instruct: Checkpoint,
    scale: float,
    folder: Path,
    *,
    base_dtype: str | None = None,
) -> int:
    """Write `adapter` into `folder` as an adapter of INSTRUCT and return the number of its modules.

    Args:
        adapter: of a kind without obstacles, its start already subtracted.
        base: what it was trained on; its weights are read only where full values are stored.
        instruct: the model it is for; its name and revision as the user gave them go into the config.
        scale: multiplier of the delta.
        folder: where; must exist.
        base_dtype: as in `merge_into_base`.
    """
    config = {**adapter.adapter_config, "base_model_name_or_path": instruct.source, "revision": instruct.revision}
    (folder / ADAPTER_CONFIG).write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    stored = StoredValues(adapter, others=list(adapter.specs))
    plain = is_plain(adapter)
    if not plain:
        names = ModelNames(base)
        stored = read_stored(adapter, names.memory)
        origin, receiver = MemoryWeights(base, names), MemoryWeights(instruct, ModelNames(instruct))
    modules = len(adapter.specs) // 2 if plain else _check_modules(stored, adapter, receiver)
    if scale == 1.0 and adapter.files[0].name == WEIGHTS and not stored.names:
        shutil.copyfile(adapter.files[0], folder / WEIGHTS)
        return modules
    from safetensors.torch import save_file

    tensors = {name: _scaled(name, adapter.tensor(name), scale) for name in stored.others}
    for name in stored.names:
        delta = stored.delta(name, origin[name], base_dtype)
        value = receiver[name].double() + scale * delta
        key, ids = stored.rows[name] if name in stored.rows else (stored.values[name], None)
        tensors[key] = (value if ids is None else value[ids]).float()
    ordered = {name: tensors[name].contiguous() for name in adapter.specs}
    save_file(ordered, folder / WEIGHTS, metadata={"format": "pt"})
    return modules


def _check_modules(stored: StoredValues, adapter: Checkpoint, receiver: MemoryWeights) -> int:
    """Refuse tensors of an adapter whose module INSTRUCT lacks; return the number of modules and full values."""
    known = {name.rpartition(".")[0] for name in receiver.names.memory}
    inside = {part for name in known for part in _parents(name)}
    modules = {key: module_of(key, inside) for key in stored.others}
    # Tensors that all modules share belong to none.
    lost = [key for key, module in modules.items() if module is None and not key.startswith("base_model.")]
    lost += [key for key, module in modules.items() if module is None and key.startswith(PREFIX)]
    lost += [stored.values.get(name, name) for name in stored.names if name not in receiver.names.memory]
    if lost:
        plain = [name.removeprefix(PREFIX) for name in lost]
        raise AdapterError(
            f"{len(lost)} of {len(adapter.specs)} weights of adapter {adapter} belong to modules that instruct "
            f"{receiver.checkpoint} lacks.\n{list_names(nearest_names(plain, known))}\n"
            "Give the instruct that belongs to the adapter's base. Nothing was written."
        )
    return len({module for module in modules.values() if module is not None}) + len(stored.names)


def module_of(key: str, known: set[str]) -> str | None:
    """Return the module of the plain model that a tensor of an adapter belongs to; None for one that all share."""
    parts = key.removeprefix(PREFIX).split(".")
    names = (".".join(parts[:end]) for end in range(len(parts) - 1, 0, -1))
    return next((name for name in names if name in known), None)


def _parents(name: str) -> list[str]:
    parts = name.split(".")
    return [".".join(parts[:end]) for end in range(max(len(parts) - 1, 1), len(parts) + 1)]


def _scaled(name: str, tensor: Tensor, scale: float) -> Tensor:
    if scale != 1.0 and re.search(r"\.lora_B\.weight$|\.lora_embedding_B$", name):
        return tensor.float() * scale
    return tensor.clone()


def _factors(adapter: Checkpoint, lora: LoraModule) -> tuple[Tensor, Tensor]:
    """Return (factor * lora_B, lora_A) in fp32."""
    return (adapter.tensor(lora.left).double() * lora.factor).float(), adapter.tensor(lora.right).float()


def _as_plain(side: Checkpoint) -> Checkpoint:
    return replace(side, adapter_config={**side.adapter_config, "init_lora_weights": True})


def _token_ids(adapter: Checkpoint, module: str) -> list[int]:
    config = adapter.adapter_config
    ids = config.get("token_indices") or config.get("trainable_token_indices")
    if isinstance(ids, dict):
        ids = next((found for name, found in ids.items() if module == name or module.endswith(f".{name}")), None)
    if not isinstance(ids, list):
        raise AdapterError(
            f"adapter {adapter} has token rows of {module}, and its config does not say of which tokens. Save it "
            "again. Nothing was written."
        )
    return [int(row) for row in ids]


def _check_shape(adapter: Checkpoint, key: str, stored: Tensor, base: Tensor) -> None:
    if stored.shape != base.shape:
        raise AdapterError(
            f"adapter {adapter}: {key} has the shape {tuple(stored.shape)}, the weight in base {tuple(base.shape)}. "
            "Give the base that the adapter was trained on. Nothing was written."
        )
