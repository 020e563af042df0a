"""Engines that share one model out over several processes: which of them can end in a graft, and what they must write.

Of torch's FSDP2 the weights are gathered when a graft is to read them. The others are refused before a model is loaded.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from accelerate.utils import ParallelismConfig, parse_flag_from_env

from ..errors import ConfigError, list_names

if TYPE_CHECKING:
    from accelerate import Accelerator

_FSDP2 = "Use FSDP2 (accelerate launch with fsdp_version: 2, or fsdp_config={'version': 2})"
_PLAIN = "plain data parallelism (accelerate launch --multi_gpu)"


def refuse_engines(config: Any) -> None:
    """Refuse the engines and offloads of a training config that cannot end in a graft.

    Raises:
        ConfigError: DeepSpeed, FSDP1, FSDP where accelerate would not use it, `cpu_ram_efficient_loading` or
            `eval_grafted` under FSDP, context or sequence parallelism, or weights offloaded to the disk.
    """
    if config.deepspeed or parse_flag_from_env("ACCELERATE_USE_DEEPSPEED"):
        raise ConfigError(
            "DeepSpeed is not supported: ZeRO-3 would compute wrong reference values, and no stage of it was tested "
            f"with a graft. {_FSDP2}, or {_PLAIN}."
        )
    if uses_fsdp(config):
        _check_fsdp(config)
    parallelism = _parallelism(config)
    if parallelism is not None and (parallelism.cp_enabled or parallelism.sp_enabled):
        raise ConfigError(
            "context and sequence parallelism cut one row over several processes, with which neither the losses nor "
            f"the reference values of a graft were compared. Set cp_size and sp_size to 1, or use {_PLAIN}."
        )
    device_map = (config.model_init_kwargs or {}).get("device_map")
    if "disk" in (device_map.values() if isinstance(device_map, dict) else (device_map,)):
        raise ConfigError(
            "device_map puts weights on the disk, where they are not trained: the graft would have none of their "
            f"delta. Leave device_map out. {_FSDP2}."
        )


def uses_fsdp(config: Any) -> bool:
    """Return whether a training config, or the launcher, asks for FSDP."""
    return bool(config.fsdp or parse_flag_from_env("ACCELERATE_USE_FSDP"))


def _check_fsdp(config: Any) -> None:
    settings = config.fsdp_config if config.fsdp and isinstance(config.fsdp_config, dict) else {}
    version = int(settings.get("version", 2) if config.fsdp else os.environ.get("FSDP_VERSION", "1"))
    if version != 2 or settings.get("xla"):
        raise ConfigError(f"FSDP1 and FSDP of XLA are not supported: no graft was tested with them. {_FSDP2}.")
    kind = str(config.distributed_state.distributed_type)
    if kind.endswith((".NO", ".MULTI_CPU")):
        raise ConfigError(
            f"FSDP was asked for, and accelerate would not use it here ({kind}): every process would train the whole "
            f"model. Launch it on accelerators with accelerate launch, or leave fsdp out for {_PLAIN}."
        )
    if parse_flag_from_env("FSDP_CPU_RAM_EFFICIENT_LOADING"):
        raise ConfigError(
            "cpu_ram_efficient_loading loads weights on the first process of a machine only; the others get those of "
            "the policy from FSDP2, not those of a reference. Set it to false (accelerate launch takes it for true: "
            "--fsdp_cpu_ram_efficient_loading false); each process then holds the whole model while it is loaded."
        )
    if config.eval_grafted:
        raise ConfigError(
            "eval_grafted=True is not possible under FSDP yet: the weights in training are shared out over the "
            f"processes. Pass eval_grafted=False and score the grafted folder after training, or use {_PLAIN}."
        )


def refuse_tensor_parallel(config: Any, model: Any) -> None:
    """Refuse reference values computed before training where single weights are shared out over the processes.

    Args:
        config: its `precompute_ref_log_probs` is decided.
        model: as given to the trainer, a name or a loaded model.

    Raises:
        ConfigError: tensor parallelism together with `precompute_ref_log_probs`.
    """
    given, parallelism = config.model_init_kwargs or {}, _parallelism(config)
    used = any(given.get(name) for name in ("tp_plan", "tp_size", "distributed_config"))
    used = used or getattr(model, "tp_size", None) is not None or bool(parallelism and parallelism.tp_enabled)
    if used and config.precompute_ref_log_probs:
        raise ConfigError(
            "tensor parallelism shares single weights out over the processes, and TRL cannot compute reference values "
            f"with such a model before training. Pass precompute_ref_log_probs=False, or leave tp_plan out. {_FSDP2}."
        )


def refuse_offloaded(model: Any) -> None:
    """Refuse a loaded model with weights that are not in memory, which training would leave as they are.

    Raises:
        ConfigError: a parameter is on the meta device, as those that `device_map="auto"` moves to the disk.
    """
    missing = [name for name, parameter in model.named_parameters() if parameter.is_meta]
    if missing:
        raise ConfigError(
            f"{len(missing)} weights of the model are not in memory but offloaded, so training would leave them as "
            f"they are and the graft would have none of their delta.\n{list_names(missing)}\nLeave device_map and "
            f"offload_folder out. {_FSDP2}."
        )


def refuse_lifted(accelerator: Accelerator, model: Any) -> None:
    """Refuse 16-bit weights to train that FSDP2 would lift to fp32: a graft could not tell in which dtype they started.

    Raises:
        ConfigError: FSDP with mixed precision and a model loaded in 16 bits.
    """
    if getattr(accelerator.state, "fsdp_plugin", None) is None or accelerator.mixed_precision == "no":
        return
    narrow = [name for name, weight in model.named_parameters() if weight.requires_grad and weight.dtype.itemsize < 4]
    if narrow:
        raise ConfigError(
            f"FSDP2 with mixed precision trains {len(narrow)} weights in fp32 that were loaded in 16 bits, so TUNED "
            "would not show where the delta starts. Load the model in float32 (dtype: float32, TRL's default), which "
            "needs no more memory in training, or set mixed precision to no."
        )


def in_shards(accelerator: Accelerator) -> bool:
    """Whether FSDP writes the model of a checkpoint in shards."""
    plugin = getattr(accelerator.state, "fsdp_plugin", None)
    return plugin is not None and plugin.state_dict_type is type(plugin.state_dict_type).SHARDED_STATE_DICT


@contextmanager
def whole_weights(accelerator: Accelerator, *, wanted: bool) -> Iterator[None]:
    """Let FSDP save whole weights, if `wanted`: with SHARDED_STATE_DICT, `save_model` writes none and says nothing."""
    plugin = getattr(accelerator.state, "fsdp_plugin", None)
    if plugin is None or not wanted:
        yield
        return
    before = plugin.state_dict_type
    plugin.state_dict_type = type(before).FULL_STATE_DICT
    try:
        yield
    finally:
        plugin.state_dict_type = before


def _parallelism(config: Any) -> ParallelismConfig | None:
    if config.parallelism_config is not None:
        return config.parallelism_config
    return ParallelismConfig() if parse_flag_from_env("ACCELERATE_USE_PARALLELISM_CONFIG") else None
