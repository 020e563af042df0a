"""Adapters that need PEFT's own arithmetic, merged into BASE one module at a time.

PEFT puts the adapter on a model without memory for its weights; then each layer gets BASE's weight in fp32 (fp64 where
BASE is fp32), is merged by PEFT's own `merge`, and is emptied again.
"""

from __future__ import annotations

import ctypes
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from copy import deepcopy
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..checkpoints.checkpoint import ADAPTER_CONFIG, Checkpoint
from ..checkpoints.overlay import Overlay
from ..errors import AdapterError, list_names
from ..layouts.model_names import ModelNames
from .kinds import NOTHING, PLAIN_STARTS, START_FOLDER, lost_start, peft_type, start_setting
from .lora import check_config_patterns, nearest_names, no_factors
from .repoint import read_start
from .stored import MemoryWeights, StoredValues, may_change, module_of, read_stored

# Types that PEFT sets up without a look at the weights under them: their layers are made before a weight is read.
_BLIND = frozenset({
    "LORA", "ADALORA", "LOHA", "LOKR", "VERA", "PVERA", "VBLORA", "UNILORA", "RANDLORA", "FOURIERFT", "WAVEFT",
    "C3A", "GRALORA", "DELORA", "SHIRA", "MISS", "HIRA", "HRA", "IA3", "OFT", "BOFT", "ROAD", "GLORA", "BEFT",
})  # fmt: skip


def merge_into_base(base: Checkpoint, adapter: Checkpoint, folder: Path) -> Overlay:
    """Return BASE with an adapter of any type merged, in BASE's layout.

    DoRA starts near BASE, by the rounding of its magnitudes: what its start makes of BASE is subtracted, where it was
    kept.

    Args:
        base: what the adapter was trained on. The adapter is a delta to it as training loaded it, its layers in the
            last of the dtypes in `loaded_in`; the delta is added to BASE as stored.
        adapter: of any PEFT type with a weight delta.
        folder: for the changed weights; made here, removed by the caller.

    Raises:
        AdapterError: an adapter that PEFT cannot merge, or weights of it that have no place in its base.
    """
    start = read_start(adapter) if adapter.adapter_config.get("use_dora") else None
    before = None if start is None else _merged_less(base, start, folder / "start", None)
    return _merged_less(base, adapter, folder, before)


def _merged_less(base: Checkpoint, adapter: Checkpoint, folder: Path, before: Overlay | None) -> Overlay:
    """Return BASE with an adapter merged, less what `before`, BASE with its start merged, differs from BASE by."""
    names = ModelNames.under(base, may_change(adapter))
    weights = MemoryWeights(base, names)
    moved = None if before is None else MemoryWeights(before, names)
    stored = read_stored(adapter, names.memory)
    result, rules = Overlay.over(base, adapter, folder), names.rules_of(base.specs)
    has_rows = any(rows is not ... for _, rows in stored.values.values())
    together = has_rows or bool(adapter.adapter_config.get("ensure_weight_tying"))
    shared = {alias: name for alias, name in names.ties.items() if alias not in weights}

    def keep(name: str, value: Tensor) -> None:
        for alias, other in shared.items():
            # When the embedding changes, a head that shares its weight stays as it was.
            if name == alias or (name == other and not together):
                (key,) = names.to_disk({alias: torch.empty(0, device="meta")}, rules)
                result.detach(key, weights.sources(other)[0])
        if moved is not None:
            value = value.double() - (moved[name].double() - weights[name].double())
        result.put(names.to_disk({name: value}, rules))

    dtypes = [dtype for dtype in base.loaded_in if dtype != "tuned"]
    loaded = MemoryWeights(base, names, getattr(torch, dtypes[-1])) if dtypes else weights
    left = dict.fromkeys(stored.values)
    result.narrow += stored.narrow(weights)
    for name, value in _changed_by_layers(adapter, stored, loaded):
        merged = weights[name].double() + (value - loaded[name].double()) if dtypes else value
        if name in left:
            del left[name]
            merged = merged.double() + stored.delta(name, weights)
        keep(name, merged)
    for name in left:
        if (whole := stored.grown(name, weights)) is not None:
            keep(name, whole)
            continue
        delta = stored.delta(name, weights)
        if bool(delta.any()):
            keep(name, weights[name].double() + delta)
    return result


def _peft_config(adapter: Checkpoint) -> Any:
    """Return PEFT's config of an adapter without full values, which are handled here."""
    from peft import PeftConfig

    with _refused_by_peft(adapter):
        config = PeftConfig.from_pretrained(str(adapter.path))
    known = {item.name for item in fields(config)} | {"peft_version"}
    strange = [
        f"{name} = {value}"
        for name, value in adapter.adapter_config.items()
        if name not in known and value not in NOTHING
    ]
    if strange:  # PEFT itself ignores them, with a warning
        raise AdapterError(
            f"adapter {adapter} has settings that the installed PEFT does not know.\n{list_names(strange)}\n"
            "Update peft, or merge the adapter with the version that trained it."
        )
    settings = {"modules_to_save": None, "trainable_token_indices": None, "bias": "none", "inference_mode": True}
    if start_setting(config.to_dict()) in PLAIN_STARTS:
        settings["init_lora_weights"] = True  # the factors are in the file: none is made from the weights or at random
    _set(config, settings)
    return config


@contextmanager
def _refused_by_peft(adapter: Checkpoint) -> Iterator[None]:
    """Let what PEFT raises about the settings of an adapter, of many kinds, be an error that names the adapter."""
    try:
        yield
    except (ImportError, LookupError, TypeError, ValueError, AttributeError, NotImplementedError) as error:
        raise AdapterError(
            f"PEFT cannot use the settings of adapter {adapter}: {type(error).__name__}: {error}. Correct "
            f"{ADAPTER_CONFIG}, or merge the adapter with the version of PEFT that trained it."
        ) from error


def _set(config: Any, settings: dict[str, Any]) -> None:
    """Change those settings that a config has."""
    for name, value in settings.items():
        if hasattr(config, name):
            setattr(config, name, value)


def _changed_by_layers(
    adapter: Checkpoint, stored: StoredValues, weights: MemoryWeights
) -> Iterator[tuple[str, Tensor]]:
    """Yield (name in memory, merged weight) of every weight that PEFT's layers change."""
    tensors = {name: adapter.tensor(name) for name in stored.others}
    if not tensors:
        return
    from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING

    config = _peft_config(adapter)
    settings = config.to_dict()
    # PEFT before 0.21 does not say which kinds have layers that share what they add: any might.
    shared = getattr(PEFT_TYPE_TO_TUNER_MAPPING[config.peft_type], "uses_shared_state", True)
    _check_start(adapter, tensors)
    model = _without_values(weights.names.model)
    modules = {name for name, _ in model.named_modules() if name}
    check_config_patterns(adapter, modules)
    owners = {name: module_of(name, modules) for name in tensors}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of PEFT, on how its layers are made
        plain = start_setting(settings) in PLAIN_STARTS and not settings.get("kasa_config")
        if plain and peft_type(settings) in _BLIND:
            yield from _merged(model, config, tensors, weights, adapter, seen=False)
        elif shared or None in owners.values():
            _fill(model, weights, weights.names.memory)
            yield from _merged(model, config, tensors, weights, adapter, seen=True)
        else:
            narrow = dict.fromkeys(("exclude_modules", "layers_to_transform", "layers_pattern"))
            for owner in sorted({str(owner) for owner in owners.values()}):
                alone = deepcopy(config)
                _set(alone, {**narrow, "target_modules": {owner}})
                one = {name: tensor for name, tensor in tensors.items() if owners[name] == owner}
                _fill(model, weights, [f"{owner}.{key}" for key, _ in model.get_submodule(owner).named_parameters()])
                yield from _merged(model, alone, one, weights, adapter, seen=True)


def _check_start(adapter: Checkpoint, names: Iterable[str]) -> None:
    """Refuse an adapter under which PEFT would not make the weights what they were in training."""
    start = start_setting(adapter.adapter_config)
    lost, others = lost_start(start), no_factors(names)
    if lost is None:
        return
    why, way = "its start was not kept", f"Put the adapter as it was before training into the sub-folder {START_FOLDER}"
    if others:
        why, way = f"it is more than a product: {others[0]}", "Merge it in the process that trained it"
    raise AdapterError(
        f"the delta of adapter {adapter}, initialised by init_lora_weights={start!r}, cannot be found: {why}, and on "
        f"loading, {lost}. {way}."
    )


def _merged(
    model: nn.Module,
    config: Any,
    tensors: dict[str, Tensor],
    weights: MemoryWeights,
    adapter: Checkpoint,
    *,
    seen: bool,
) -> Iterator[tuple[str, Tensor]]:
    """Put an adapter on `model` by PEFT, and yield what merging makes of each layer; the adapter is off at the end.

    `model` has no values, or BASE's where `seen`: where PEFT has set its layers up on them and may have changed them.
    """
    from peft import get_peft_model
    from peft.tuners.tuners_utils import BaseTunerLayer

    with torch.random.fork_rng(), _refused_by_peft(adapter):
        wrapped = get_peft_model(model, config)
    _load(wrapped, tensors, adapter)
    _give_back()
    for name, child in wrapped.base_model.named_children():
        if name != "model":
            child.to(_wide(weights))  # what layers share
    layers: dict[str, Any] = {}
    for name, module in model.named_modules():
        inside = any(name.startswith(f"{other}.") for other in layers)
        if isinstance(module, BaseTunerLayer) and not inside:
            layers[name] = module
    uses = Counter(id(value) for layer in layers.values() for value in layer.parameters())
    for name, layer in layers.items():
        yield from _merge_layer(name, layer, weights, adapter, seen)
        for value in layer.parameters():
            if uses[id(value)] == 1:
                value.data = torch.empty(0)
        _give_back()
    wrapped.unload()


def _merge_layer(
    name: str, layer: Any, weights: MemoryWeights, adapter: Checkpoint, seen: bool
) -> Iterator[tuple[str, Tensor]]:
    below = layer.get_base_layer()
    own, wide = {id(value) for value in below.parameters()}, _wide(weights)
    for value in [*layer.parameters(), *layer.buffers()]:
        if value.is_floating_point() and id(value) not in own:
            value.data = value.data.to(wide)
    origin = {key: weights[f"{name}.{key}"].to(wide, copy=True) for key, _ in below.named_parameters()}
    for key, value in below.named_parameters():
        value.data = value.data.to(wide) if seen else origin[key].clone()
    try:
        with torch.no_grad():
            if hasattr(layer, "unload_and_optionally_merge_module"):
                layer.unload_and_optionally_merge_module(merge=True, safe_merge=False, adapter_names=None)
            else:
                layer.merge()
    except (NotImplementedError, RuntimeError, ValueError) as error:
        raise AdapterError(
            f"PEFT cannot merge {name} of adapter {adapter}, a {type(layer).__name__}: {error}"
        ) from error
    for key, value in below.named_parameters():
        if not torch.equal(value.data, origin[key]):
            yield f"{name}.{key}", value.data
        value.data = torch.empty(0)


def _load(wrapped: Any, tensors: dict[str, Tensor], adapter: Checkpoint) -> None:
    """Give PEFT the adapter's tensors; each must land."""
    from peft import set_peft_model_state_dict
    from peft.mapping import PEFT_TYPE_TO_PREFIX_MAPPING

    try:
        found: Any = set_peft_model_state_dict(wrapped, dict(tensors))
    except (RuntimeError, KeyError, TypeError) as error:
        raise AdapterError(f"PEFT cannot load adapter {adapter}: {error}") from error
    state = wrapped.state_dict(keep_vars=True)
    # PEFT before 0.21 does not load the projections that the layers of VeRA share: it draws its own.
    shared = {name for name in found.unexpected_keys if f"{name}.default" in state}
    for name in shared:
        state[f"{name}.default"].data.copy_(tensors[name])
    if unexpected := [name for name in found.unexpected_keys if name not in shared]:
        lines = nearest_names(unexpected, dict(wrapped.get_base_model().named_modules()))
        raise AdapterError(
            f"{len(unexpected)} of {len(tensors)} weights of adapter {adapter} have no module in its base.\n"
            f"{list_names(lines)}\nGive the base that it was trained on."
        )
    prefix = PEFT_TYPE_TO_PREFIX_MAPPING[wrapped.peft_config["default"].peft_type]
    # Layers that share a tensor have it under a name each, and one of them is in the file.
    absent = set(found.missing_keys) - {f"{name}.default" for name in shared}
    there = {id(value) for name, value in state.items() if name not in absent}
    missing = sorted(name for name in absent if f".{prefix}" in name and id(state[name]) not in there)
    if missing:
        raise AdapterError(
            f"adapter {adapter} lacks {len(missing)} weights of modules that its config names.\n{list_names(missing)}\n"
            "The file is incomplete: save or fetch it again."
        )


def _wide(weights: MemoryWeights) -> torch.dtype:
    """Return the dtype to merge in: fp32 for a BASE of 16 bits, else fp64, so that the graft rounds once."""
    wide = any(spec.is_float and spec.itemsize >= 4 for spec in weights.checkpoint.specs.values())
    return torch.float64 if wide else torch.float32


def _give_back() -> None:
    """Return freed memory to the system: between long-lived small blocks glibc keeps that of whole weights."""
    with suppress(OSError, AttributeError):  # another C library
        ctypes.CDLL(None).malloc_trim(0)


def _without_values(model: nn.Module) -> nn.Module:
    """Take a model off the meta device; each weight is one zero that is seen in the weight's shape."""
    for module in model.modules():
        for key, value in module._parameters.items():
            if value is not None:
                module._parameters[key] = nn.Parameter(torch.zeros(()).expand(value.shape), requires_grad=False)
        for key, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[key] = torch.zeros(buffer.shape, dtype=buffer.dtype)
    return model


def _fill(model: nn.Module, weights: MemoryWeights, names: Iterable[str]) -> None:
    """Give the model BASE's values of some weights, in fp32 as TRL loads them, because PEFT will read them."""
    for name in filter(weights.sources, names):
        module, _, key = name.rpartition(".")
        owner = model.get_submodule(module)
        if key in owner._parameters:
            setattr(owner, key, nn.Parameter(weights[name].float().clone(), requires_grad=False))
