"""Engines that share one model out over several processes: which of them can end in a graft, and what they must write.

Of torch's FSDP2 and DeepSpeed's ZeRO the weights are gathered when a graft is to read them. The others are refused
before a model is loaded.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from accelerate.utils import ParallelismConfig, parse_flag_from_env

from ..errors import ConfigError, list_names

if TYPE_CHECKING:
    from accelerate import Accelerator

_FSDP2 = "Use FSDP2 (accelerate launch with fsdp_version: 2, or fsdp_config={'version': 2})"
_PLAIN = "plain data parallelism (accelerate launch --multi_gpu)"


def refuse_engines(config: Any, model: Any) -> None:
    """Refuse the engines and offloads of a training config that cannot end in a graft.

    Args:
        config: of the run.
        model: as given to the trainer, a name or a loaded model.

    Raises:
        ConfigError: FSDP1, FSDP or DeepSpeed where accelerate would not use it, `eval_grafted`, a loaded model or
            weights on NVMe under ZeRO-3, weights that DeepSpeed quantises, context or sequence parallelism or
            DeepSpeed's tensor parallelism, or weights offloaded to the disk.
    """
    if config.deepspeed_plugin is not None:
        _check_zero(config, model)
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


def load_for(config: Any | None) -> None:
    """Let models be loaded for the engine of `config`, whole for None: transformers asks the last config instead."""
    from transformers.integrations import unset_hf_deepspeed_config

    unset_hf_deepspeed_config()
    if config is not None and config.deepspeed_plugin is not None:
        config.deepspeed_plugin.set_deepspeed_weakref()


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


def _check_zero(config: Any, model: Any) -> None:
    kind, settings = str(config.distributed_state.distributed_type), config.deepspeed_plugin.deepspeed_config
    zero = settings.get("zero_optimization", {})
    if not kind.endswith(".DEEPSPEED"):
        raise ConfigError(
            f"DeepSpeed was asked for, and accelerate would not use it here ({kind}). Launch the run with accelerate "
            "launch --use_deepspeed or torchrun, without use_cpu, or leave deepspeed out."
        )
    if settings.get("tensor_parallel", {}).get("autotp_size", 1) > 1:
        raise ConfigError(
            "tensor_parallel.autotp_size shares single weights out over the processes, with which no graft was tested. "
            "Leave it out: ZeRO-3 shares the weights out as well."
        )
    if zero.get("zero_quantized_weights") or zero.get("zero_quantized_nontrainable_weights"):
        raise ConfigError(
            "ZeRO++ gathers weights quantised, so TUNED would be saved with an error that is not a delta. Set "
            "zero_quantized_weights and zero_quantized_nontrainable_weights to false."
        )
    if zero.get("stage") != 3:
        return
    if config.eval_grafted:
        raise ConfigError(
            "eval_grafted=True is not possible under ZeRO-3: the weights in training are shared out over the "
            f"processes. Pass eval_grafted=False and score the grafted folder after training, or use {_PLAIN}."
        )
    if zero.get("offload_param", {}).get("device") == "nvme":
        raise ConfigError(
            "offload_param.device=nvme keeps the weights on the disk, with which no graft was tested. Set it to cpu."
        )
    if not isinstance(model, str):
        raise ConfigError(
            "the model was given as an object, and ZeRO-3 shares weights out while they are loaded, so it could not be "
            "compared with BASE on the disk. Pass the name or the folder of the model."
        )


def refuse_trained_tokens(config: Any, adapter: Mapping[str, Any] | None) -> None:
    """Refuse single token rows that are trained under ZeRO-3, with ConfigError; `adapter` has PEFT's settings."""
    plugin, settings = config.deepspeed_plugin, adapter or {}
    is_zero3 = plugin is not None and plugin.deepspeed_config.get("zero_optimization", {}).get("stage") == 3
    if is_zero3 and (settings.get("trainable_token_indices") or settings.get("peft_type") == "TRAINABLE_TOKENS"):
        raise ConfigError(
            "single token rows (trainable_token_indices) are not supported under ZeRO-3: PEFT makes them on CUDA "
            "alone, and no graft was tested with them. Use ZeRO-2, or leave trainable_token_indices out."
        )


@contextmanager
def refuses_data_parallel(config: Any) -> Iterator[None]:
    """Refuse several GPUs in one process, which are known once the model is loaded; TRL itself does since 1.16.

    Raises:
        ConfigError: transformers would wrap the model in `nn.DataParallel`.
    """
    refused = None
    try:
        yield
    except ValueError as error:
        if config.n_gpu <= 1 or "nn.DataParallel" not in str(error):
            raise
        refused = error
    if config.n_gpu > 1:
        raise ConfigError(
            f"{config.n_gpu} GPUs are visible to a process that no launcher started: transformers would train with "
            "nn.DataParallel, which is not supported. Start a process for each with `accelerate launch` or `torchrun`, "
            "or make one GPU visible with CUDA_VISIBLE_DEVICES."
        ) from refused


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


def lifts_weights(accelerator: Accelerator, model: Any) -> bool:
    """Return whether FSDP2 will train, and save, weights in fp32 that were loaded in 16 bits.

    Raises:
        ConfigError: it would do so with some of them only, after which nothing shows which.
    """
    if getattr(accelerator.state, "fsdp_plugin", None) is None or accelerator.mixed_precision == "no":
        return False
    trained = {name: weight.dtype for name, weight in model.named_parameters() if weight.requires_grad}
    narrow = [name for name, dtype in trained.items() if dtype.itemsize < 4]
    if narrow and len(narrow) < len(trained):
        raise ConfigError(
            f"FSDP2 with mixed precision trains all weights in fp32, {len(narrow)} of {len(trained)} were loaded in 16 "
            f"bits, and TUNED would not show which.\n{list_names(narrow)}\nLoad the model in one dtype (dtype: "
            "float32, TRL's default, which needs no more memory in training), or set mixed precision to no."
        )
    return bool(narrow)


def in_shards(accelerator: Accelerator) -> bool:
    """Whether FSDP writes the model of a checkpoint in shards."""
    plugin = getattr(accelerator.state, "fsdp_plugin", None)
    return plugin is not None and plugin.state_dict_type is type(plugin.state_dict_type).SHARDED_STATE_DICT


def gather_trained_head(accelerator: Accelerator, model: Any) -> None:
    """Let FSDP2 gather the head of a loaded `model` for every pass, so that its gradient is that of all processes.

    TRL reads the weight of the head and never calls it. Where accelerate makes a block of the head alone, as under an
    adapter or where the last norm is not right below the model, nothing gathers that block: each process would train
    its shard with the gradient of its own rows, and say nothing.
    """
    if getattr(accelerator.state, "fsdp_plugin", None) is None:
        return
    head = model.get_output_embeddings()
    if head is None or not any(weight.requires_grad for weight in head.parameters()):
        return
    from torch.distributed.fsdp import FSDPModule

    def gather(*_: Any) -> None:
        for block in head.modules():
            if isinstance(block, FSDPModule):
                block.unshard()

    model.register_forward_pre_hook(gather)


@contextmanager
def gathered(parameters: Iterable[Any], *, changed: bool = False) -> Iterator[None]:
    """Give parameters that ZeRO-3 has shared out their whole values while the context lasts; others have them anyway.

    Args:
        parameters: of any number; all processes give the same.
        changed: whether the values are changed in the context, to the same on all processes.
    """
    shared = [parameter for parameter in parameters if is_shared_out(parameter)]
    if not shared:
        yield
        return
    import deepspeed

    with deepspeed.zero.GatheredParameters(shared, modifier_rank=0 if changed else None):
        yield


def is_shared_out(parameter: Any) -> bool:
    """Return whether ZeRO-3 has shared a parameter out, which leaves an empty tensor in its place."""
    return hasattr(parameter, "ds_id")


def dtype_at_start(accelerator: Accelerator, model: Any) -> str:
    """Return the dtype of the weights that training of a loaded `model` starts from.

    DeepSpeed casts them to that of its mixed precision, but for those that ZeRO-3 has shared out on loading.
    """
    loaded = str(model.dtype).removeprefix("torch.")
    if not uses_deepspeed(accelerator) or any(map(is_shared_out, model.parameters())):
        return loaded
    return {"bf16": "bfloat16", "fp16": "float16"}.get(str(accelerator.mixed_precision), loaded)


def uses_deepspeed(accelerator: Accelerator) -> bool:
    """Return whether the weights are in the hands of DeepSpeed, of whatever ZeRO stage."""
    return getattr(accelerator.state, "deepspeed_plugin", None) is not None


def forget(engine: Any) -> None:
    """Free weights and optimizer of a destroyed engine of DeepSpeed: ZeRO-3 keeps both in a cache that never ends."""
    for parameter in engine.module.parameters():
        for tensor in (parameter, getattr(parameter, "ds_tensor", parameter)):
            tensor.data = tensor.new_empty(0)
    for holder in (engine.optimizer, engine):
        if holder is not None:
            vars(holder).clear()


def _parallelism(config: Any) -> ParallelismConfig | None:
    if config.parallelism_config is not None:
        return config.parallelism_config
    return ParallelismConfig() if parse_flag_from_env("ACCELERATE_USE_PARALLELISM_CONFIG") else None
