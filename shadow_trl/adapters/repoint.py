"""Adapters written: one for INSTRUCT that means there what the trained one means on BASE, and plain LoRAs of sums."""

from __future__ import annotations

import json
import shutil
from collections import defaultdict
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
from .lora import PREFIX, WEIGHTS, nearest_names, needs_patterns, read_lora, streams
from .stored import MemoryWeights, StoredValues, may_change, module_of, read_stored


def read_start(adapter: Checkpoint) -> Checkpoint | None:
    """Return the adapter as it was before training, None where it was not kept."""
    folders = [adapter.path / START_FOLDER]
    if adapter.path.name.startswith("checkpoint-"):
        folders.append(adapter.path.parent / START_FOLDER)
    found = next((folder for folder in folders if (folder / ADAPTER_CONFIG).is_file()), None)
    if found is None:
        return None
    start = Checkpoint.open(str(found))
    here, there = ({n: spec.shape for n, spec in side.specs.items() if ".lora_" in n} for side in (adapter, start))
    if here != there:
        raise AdapterError(
            f"the start of adapter {adapter} in {START_FOLDER} has other weights than the adapter: "
            f"{len(here.items() ^ there.items())} names or shapes differ. Remove it, or put the right one there."
        )
    return start


def less_start(adapter: Checkpoint, start: Checkpoint, folder: Path) -> Checkpoint:
    """Write `B @ A - B0 @ A0` as a plain LoRA of twice the rank into `folder`, and return it.

    Source: PEFT's `path_initial_model_for_weight_conversion`.
    """
    now, before = (
        replace(side, adapter_config={**side.adapter_config, "init_lora_weights": True}) for side in (adapter, start)
    )
    return write_factors(_summed([(now, 1.0), (before, -1.0)]), adapter.adapter_config, folder)


def concatenated(adapters: list[tuple[Checkpoint, float]], folder: Path) -> Checkpoint:
    """Write the weighted sum of plain LoRAs, given each with its weight, as one into `folder`, exactly."""
    factors = _summed(adapters)
    narrow = {"layers_to_transform": None, "layers_pattern": None, "exclude_modules": None}
    config = {**adapters[0][0].adapter_config, **narrow, "target_modules": sorted(factors)}
    return write_factors(factors, config, folder)


def _summed(adapters: list[tuple[Checkpoint, float]]) -> dict[str, tuple[Tensor, Tensor]]:
    """Return module -> (left, right) in fp32 of the weighted sum of plain LoRAs; the ranks add up."""
    parts: dict[str, list[tuple[Tensor, Tensor]]] = defaultdict(list)
    for adapter, weight in adapters:
        for name, lora in read_lora(adapter).items():
            left = (adapter.tensor(lora.left).double() * lora.factor).float() * weight
            parts[name].append((left, adapter.tensor(lora.right).float()))
    return {name: (torch.cat([x for x, _ in found], 1), torch.cat([y for _, y in found], 0))
            for name, found in parts.items()}  # fmt: skip


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
    _write_config(folder, {
        **config, "r": rank, "lora_alpha": rank, "rank_pattern": other, "alpha_pattern": other,
        "use_rslora": False, "init_lora_weights": True,
    })  # fmt: skip
    tensors = {}
    for name, (left, right) in factors.items():
        tensors[f"{PREFIX}{name}.lora_A.weight"] = right.contiguous()
        tensors[f"{PREFIX}{name}.lora_B.weight"] = left.contiguous()
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    return Checkpoint.open(str(folder))


def write_adapter(
    adapter: Checkpoint, base: Checkpoint, instruct: Checkpoint, scale: float, folder: Path
) -> tuple[int, list[str]]:
    """Write `adapter` into `folder` as an adapter of INSTRUCT.

    Args:
        adapter: of a kind without obstacles, its start already subtracted.
        base: what it was trained on, as training loaded it; its weights are read only where full values are stored.
        instruct: the model it is for; its name and revision as the user gave them go into the config.
        scale: multiplier of the delta.
        folder: where; must exist.

    Returns:
        the number of its modules, and a line for each stored weight that is narrower than BASE's.
    """
    named = {"base_model_name_or_path": instruct.source, "revision": instruct.revision}
    plain = streams(adapter, instruct)
    if plain and needs_patterns(adapter):
        factors = _summed([(adapter, scale)])
        write_factors(factors, {**adapter.adapter_config, **named}, folder)
        return len(factors), []
    _write_config(folder, {**adapter.adapter_config, **named})
    if plain:
        stored, modules, narrow = StoredValues(adapter, others=list(adapter.specs)), len(adapter.specs) // 2, []
    else:
        names, receiving = (ModelNames.under(side, may_change(adapter)) for side in (base, instruct))
        stored = read_stored(adapter, names.memory)
        origin, receiver = MemoryWeights(base, names), MemoryWeights(instruct, receiving)
        modules, narrow = _check_modules(stored, receiver), stored.narrow(origin)
    if scale == 1.0 and adapter.files[0].name == WEIGHTS and not stored.values:
        shutil.copyfile(adapter.files[0], folder / WEIGHTS)
        return modules, narrow
    from safetensors.torch import save_file

    tensors = {}
    for key in stored.others:
        scaled = scale != 1.0 and key.endswith((".lora_B.weight", ".lora_embedding_B"))
        tensors[key] = adapter.tensor(key).float() * scale if scaled else adapter.tensor(key)
    for name, (key, rows) in stored.values.items():
        tensors[key] = (receiver[name][rows].double() + scale * stored.delta(name, origin)[rows]).float()
    ordered = {name: tensors[name].contiguous() for name in adapter.specs}
    save_file(ordered, folder / WEIGHTS, metadata={"format": "pt"})
    return modules, narrow


def _write_config(folder: Path, config: Mapping[str, Any]) -> None:
    (folder / ADAPTER_CONFIG).write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _check_modules(stored: StoredValues, receiver: MemoryWeights) -> int:
    """Refuse tensors of an adapter whose module INSTRUCT lacks; return the number of modules and full values."""
    known = {name.rpartition(".")[0] for name in receiver.names.memory}
    modules = {key: module_of(key, known) for key in stored.others}
    # A tensor that all modules share belongs to none, and has its name from the layers that PEFT adds beside the model.
    shared = [key for key in stored.others if key.startswith("base_model.") and not key.startswith(PREFIX)]
    lost = [key for key, module in modules.items() if module is None and key not in shared]
    lost += [key for name, (key, _) in stored.values.items() if name not in receiver.names.memory]
    if lost:
        rows = nearest_names([name.removeprefix(PREFIX) for name in lost], known)
        raise AdapterError(
            f"{len(lost)} of {len(stored.adapter.specs)} weights of adapter {stored.adapter} belong to modules that "
            f"instruct {receiver.checkpoint} lacks.\n{list_names(rows)}\n"
            "Give the instruct that belongs to the adapter's base."
        )
    return len({module for module in modules.values() if module is not None}) + len(stored.values)
