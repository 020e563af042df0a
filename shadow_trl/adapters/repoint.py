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
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..checkpoints.checkpoint import ADAPTER_CONFIG, Checkpoint
from ..errors import AdapterError, list_names
from ..layouts.model_names import ModelNames
from .kinds import START_FOLDER
from .lora import PREFIX, WEIGHTS, LoraModule, nearest_names, no_factors, read_lora, streams
from .stored import MemoryWeights, StoredValues, module_of, read_stored


def read_start(adapter: Checkpoint) -> Checkpoint | None:
    """Return the adapter as it was before training, None where it was not kept or cannot be subtracted as a whole."""
    if no_factors(adapter.specs):
        return None
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


def write_adapter(adapter: Checkpoint, base: Checkpoint, instruct: Checkpoint, scale: float, folder: Path) -> int:
    """Write `adapter` into `folder` as an adapter of INSTRUCT and return the number of its modules.

    Args:
        adapter: of a kind without obstacles, its start already subtracted.
        base: what it was trained on, as training loaded it; its weights are read only where full values are stored.
        instruct: the model it is for; its name and revision as the user gave them go into the config.
        scale: multiplier of the delta.
        folder: where; must exist.
    """
    config = {**adapter.adapter_config, "base_model_name_or_path": instruct.source, "revision": instruct.revision}
    (folder / ADAPTER_CONFIG).write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    stored = StoredValues(adapter, others=list(adapter.specs))
    plain = streams(adapter, instruct)
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
        delta = stored.delta(name, origin)
        value = receiver[name].double() + scale * delta
        key, ids = stored.rows[name] if name in stored.rows else (stored.values[name], None)
        tensors[key] = (value if ids is None else value[ids]).float()
    ordered = {name: tensors[name].contiguous() for name in adapter.specs}
    save_file(ordered, folder / WEIGHTS, metadata={"format": "pt"})
    return modules


def _check_modules(stored: StoredValues, adapter: Checkpoint, receiver: MemoryWeights) -> int:
    """Refuse tensors of an adapter whose module INSTRUCT lacks; return the number of modules and full values."""
    known = {name.rpartition(".")[0] for name in receiver.names.memory}
    modules = {key: module_of(key, known) for key in stored.others}
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


def _scaled(name: str, tensor: Tensor, scale: float) -> Tensor:
    if scale != 1.0 and re.search(r"\.lora_B\.weight$|\.lora_embedding_B$", name):
        return tensor.float() * scale
    return tensor.clone()


def _factors(adapter: Checkpoint, lora: LoraModule) -> tuple[Tensor, Tensor]:
    """Return (factor * lora_B, lora_A) in fp32."""
    return (adapter.tensor(lora.left).double() * lora.factor).float(), adapter.tensor(lora.right).float()


def _as_plain(side: Checkpoint) -> Checkpoint:
    return replace(side, adapter_config={**side.adapter_config, "init_lora_weights": True})
