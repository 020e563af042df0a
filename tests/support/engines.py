"""Runs of the trainers in several processes: DDP, or FSDP2 and DeepSpeed with the CPU in the place of accelerators."""

from __future__ import annotations

import ctypes
import gc
import hashlib
import importlib
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Event, Thread
from typing import Any

from rank_cases import hide
from tiny import preference_data, sft_data

LAUNCHED = {
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_RESHARD_AFTER_FORWARD": "true",
    "FSDP_STATE_DICT_TYPE": "FULL_STATE_DICT",
    "FSDP_CPU_RAM_EFFICIENT_LOADING": "false",
}
"""What `accelerate launch --use_fsdp --fsdp_version 2` puts into the environment."""

LAUNCHED_ZERO3 = {
    "ACCELERATE_USE_DEEPSPEED": "true",
    "ACCELERATE_DEEPSPEED_ZERO_STAGE": "3",
    "ACCELERATE_DEEPSPEED_ZERO3_INIT": "true",
    "ACCELERATE_DEEPSPEED_ZERO3_SAVE_16BIT_MODEL": "true",
}
"""What `accelerate launch` with TRL's zero3.yaml puts into the environment, but for its mixed precision."""

_SPEED = ("runtime", "_per_second")


def on_the_cpu() -> None:
    """Let accelerate take the CPUs for accelerators: on others it falls back from FSDP to DDP without a word."""
    import accelerate.accelerator
    import torch
    import transformers.training_args
    from accelerate import PartialState
    from accelerate.utils import DistributedType

    import shadow_trl.training.evaluation

    def set_device(state: Any) -> None:
        state.device = torch.device("cpu")

    PartialState._prepare_backend = lambda *_, **__: ("gloo", DistributedType.MULTI_GPU)  # type: ignore[method-assign]
    PartialState.set_device = set_device  # type: ignore[method-assign]
    # So what is moved off accelerators for a while is moved in tests as well.
    shadow_trl.training.evaluation._HOST = ("meta",)
    transformers.training_args.is_torch_bf16_gpu_available = lambda: True
    accelerate.accelerator.is_bf16_available = lambda *_, **__: True


def deepspeed_on_the_cpu() -> None:
    """Let DeepSpeed take torch's collectives for the CPU, in the place of those that it would build."""
    importlib.import_module("deepspeed.comm.torch").build_shm_op = lambda: None  # type: ignore[attr-defined]


def deepspeed_settings(stage: int, **zero: Any) -> dict[str, Any]:
    batches = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")
    left_to_the_trainer = dict.fromkeys([*batches, "gradient_clipping"], "auto")
    return {**left_to_the_trainer, "bf16": {"enabled": "auto"}, "zero_optimization": {"stage": stage, **zero}}


def run(
    rank: int,
    engine: str,
    kind: str,
    pair: tuple[str, str],
    out: str,
    *,
    plain: bool = False,
    lora: bool | dict[str, Any] = False,
    fsdp: dict[str, Any] | None = None,
    zero: dict[str, Any] | None = None,
    resume: str | None = None,
    rows: str | None = None,
    reference: str | None = None,
    callbacks: list[Any] | None = None,
    environment: dict[str, str] | None = None,
    machines: bool = False,
    freeze: str | None = None,
    **changes: Any,
) -> dict[str, Any]:
    """Train under `engine` and return what was seen.

    Engines are single, ddp, fsdp2, launched (FSDP2 by the environment), zero1, zero2, zero3 (with settings of `zero`)
    and launched_zero3. The trainer is ours or, if `plain`, TRL's, with the model in `reference` for its reference, if
    given; the data is that in the folder `rows`, if given. With `machines`, each process is on one of its own, where
    the folder above `out` is another one. Weights whose names `freeze` finds are not trained.
    """
    import datasets
    import other_trainers
    from peft import LoraConfig
    from runs import LORA, SETTINGS
    from transformers import AutoModelForCausalLM

    if machines:
        os.environ["LOCAL_WORLD_SIZE"] = "1"
        if rank:
            hide(str(Path(out).parent))
    # File-backed caches of one test must not be those of another.
    datasets.config.HF_DATASETS_CACHE = Path(out).parent / "cache"
    args = {"output_dir": out, **SETTINGS, **other_trainers.OPTIONS.get(kind, {})}
    args |= {"per_device_train_batch_size": 2, **changes}
    if engine not in ("single", "ddp"):
        on_the_cpu()
        del args["use_cpu"]
    if engine == "single":
        for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE"):
            del os.environ[name]
    if engine == "launched":
        os.environ.update({**LAUNCHED, **(environment or {})})
    if engine == "fsdp2":
        args |= {
            "fsdp": True,
            "fsdp_config": {"version": 2, "transformer_layer_cls_to_wrap": ["Qwen3DecoderLayer"], **(fsdp or {})},
        }
    if "zero" in engine:
        deepspeed_on_the_cpu()
    if engine == "launched_zero3":
        os.environ.update(LAUNCHED_ZERO3)
    elif "zero" in engine:
        args["deepspeed"] = deepspeed_settings(int(engine[-1]), **(zero or {}))
    data = datasets.load_from_disk(rows) if rows else _data_of(kind)
    common = {
        "model": pair[0],
        "train_dataset": data,
        "eval_dataset": data if args.get("eval_strategy", "no") != "no" else None,
        "peft_config": LoraConfig(**LORA, **(lora if isinstance(lora, dict) else {})) if lora else None,
        "callbacks": callbacks,
        **({"ref_model": AutoModelForCausalLM.from_pretrained(reference, dtype="float32")} if reference else {}),
        **({"reward_funcs": other_trainers.length_of_answer} if kind in other_trainers.OPTIONS else {}),
    }
    trainer = _trainer(kind, plain, pair[1], args, common)
    _freeze(trainer.model, freeze)
    state = trainer.accelerator
    assert state.num_processes == int(os.environ.get("WORLD_SIZE", "1"))
    assert (state.num_processes == 1) == (engine == "single")
    wanted = {"single": "NO", "ddp": "MULTI_CPU"}.get(engine, "DEEPSPEED" if "zero" in engine else "FSDP")
    assert str(state.distributed_type) == f"DistributedType.{wanted}"
    assert state.is_fsdp2 == (wanted == "FSDP")
    if wanted == "DEEPSPEED":
        assert state.deepspeed_plugin.zero_stage == int(engine[-1])
    plugin = getattr(state.state, "fsdp_plugin", None)
    seen: dict[str, Any] = {
        "generated": _generated(trainer),
        "read_by_one": plugin is not None and plugin.cpu_ram_efficient_loading,
        "references": _references(trainer),
        "reference": getattr(trainer, "ref_model", None) is not None,
        "kept": _elements_beside(trainer.model),
        "room": _room_in_evaluation(trainer),
    }
    kept_on_disk(seen)
    trainer.train(resume_from_checkpoint=resume)
    if plain:
        trainer.save_model()
    seen["losses"] = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    seen["logged"] = [_without_times(entry) for entry in trainer.state.log_history]
    seen["evaluated"] = [
        {name: value for name, value in entry.items() if name.startswith("eval_") and not name.endswith(_SPEED)}
        for entry in trainer.state.log_history
        if "eval_loss" in entry
    ]
    state.wait_for_everyone()
    return seen


def run_each(
    rank: int, engine: str, pair: tuple[str, str], out: str, cases: dict[str, tuple[str, dict[str, Any]]]
) -> dict[str, dict[str, Any]]:
    """Run each case, the kind of trainer and what `run` is called with, in a folder of its name; return what was seen.

    One start of the processes does for all of them. A case may have a pair of its own.
    """
    return {
        name: run(rank, engine, kind, out=f"{out}/{name}", **{"pair": pair, **how})
        for name, (kind, how) in cases.items()
    }


def kept_on_disk(seen: dict[str, Any]) -> None:
    """Let the smallest weight be kept on the disk while others are gathered; count the bytes of all in `seen`."""
    from shadow_trl.training import gathering

    original, gathering._SMALL, seen["on_disk"] = gathering._in_file, 0, 0

    def keep(tensor: Any, folder: Path) -> Any:
        seen["on_disk"] += tensor.nbytes
        return original(tensor, folder)

    gathering._in_file = keep


def save_whole(rank: int, out: str, *, layers: int, on_disk: bool) -> int:
    """Save a model that is sharded by FSDP2 whole, as accelerate gathers it; 13 MiB a layer.

    Return the bytes of anonymous memory, which only a process that ends gives back, that this one took for it at most.
    """
    from contextlib import nullcontext

    import torch
    import torch.distributed
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
    from torch.distributed.fsdp import fully_shard
    from transformers import AutoModelForCausalLM, LlamaConfig

    from shadow_trl.training.gathering import copies_on_disk

    torch.distributed.init_process_group("gloo")
    torch.manual_seed(0)
    sizes = {"hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": layers, "vocab_size": 512}
    model = AutoModelForCausalLM.from_config(LlamaConfig(**sizes, num_attention_heads=8))
    for layer in model.model.layers:
        fully_shard(layer)
    fully_shard(model)
    with watched_memory() as seen, copies_on_disk(Path(out)) if on_disk and rank == 0 else nullcontext():
        options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True, cpu_offload=True)
        state = get_model_state_dict(model, options=options)
        if rank == 0:
            model.save_pretrained(out, state_dict=state)
    torch.distributed.destroy_process_group()
    return max(seen) - seen[0]


@contextmanager
def watched_memory() -> Iterator[list[int]]:
    """Give a list that gets the bytes of anonymous memory of this process, every few milliseconds."""

    def now() -> int:
        return int(Path("/proc/self/status").read_text().partition("RssAnon:")[2].split()[0]) * 1024

    def watch() -> None:
        while not over.wait(0.002):
            seen.append(now())

    gc.collect()
    libc = ctypes.CDLL(None)
    libc.mallopt(-3, 2**18)  # M_MMAP_THRESHOLD, fixed: what is freed goes back at once, and what counts is in use
    libc.malloc_trim(0)
    over, seen = Event(), [now()]
    thread = Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield seen
    finally:
        over.set()
        thread.join()


def save_shards(rank: int, model: str, out: str, name: str) -> None:
    """Save the model of a folder in shards, as FSDP2 and accelerate do, without training it."""
    import torch
    import torch.distributed
    import torch.distributed.checkpoint as dcp
    from architectures import model_class
    from torch.distributed.checkpoint.state_dict import get_model_state_dict
    from torch.distributed.fsdp import fully_shard

    torch.distributed.init_process_group("gloo")
    loaded = model_class(name).from_pretrained(model)
    fully_shard(loaded)
    dcp.save({"model": get_model_state_dict(loaded)}, checkpoint_id=out)
    torch.distributed.destroy_process_group()


def _trainer(kind: str, plain: bool, instruct: str, args: dict[str, Any], common: dict[str, Any]) -> Any:
    from other_trainers import classes
    from transformers import AutoTokenizer

    trainer, config = classes(kind.upper(), plain=plain)
    if plain:
        return trainer(args=config(**args), processing_class=AutoTokenizer.from_pretrained(instruct), **common)
    return trainer(args=config(**args), instruct_model=instruct, **common)


def _freeze(model: Any, expression: str | None) -> None:
    for name, weight in model.named_parameters() if expression is not None else ():
        weight.requires_grad_(weight.requires_grad and re.search(expression, name) is None)


def _data_of(kind: str) -> Any:
    from other_trainers import KINDS, data_of

    return data_of(kind) if kind in KINDS else {"sft": sft_data, "dpo": preference_data}[kind]()


def _without_times(entry: dict[str, float]) -> dict[str, float]:
    return {name: value for name, value in entry.items() if not name.endswith(_SPEED) and "time" not in name}


def _generated(trainer: Any) -> list[dict[str, Any]]:
    """Return a list that will have the tensors of each batch that a trainer generates, as lists."""
    seen: list[dict[str, Any]] = []
    generate = getattr(trainer, "_generate_and_score_completions", None)

    def keep(inputs: Any) -> Any:
        batch = generate(inputs)
        seen.append({name: value.tolist() for name, value in batch.items() if hasattr(value, "tolist")})
        return batch

    if generate is not None:
        trainer._generate_and_score_completions = keep
    return seen


def _elements_beside(policy: Any) -> int:
    """Return how many elements the weights of other models have in memory, in the shards of ZeRO-3 too."""
    gc.collect()
    own = {id(parameter) for parameter in policy.parameters()}
    found = [item for item in gc.get_objects() if type(item).__name__ == "Qwen3ForCausalLM"]
    weights = {id(weight): weight for model in found for weight in model.parameters() if id(weight) not in own}
    shards = [getattr(weight, "ds_tensor", weight) for weight in weights.values()]
    return sum(tensor.numel() for tensor in (*weights.values(), *shards))


def _room_in_evaluation(trainer: Any) -> list[int]:
    """Return a list that will have the bytes that this process holds of the policy, in each step of an evaluation."""
    from transformers import TrainerCallback

    policy, seen = trainer.model, []

    class Watch(TrainerCallback):
        def on_prediction_step(self, *_: Any, **__: Any) -> None:
            # The optimizer has the shards of layers that are whole at the moment.
            trained = (weight for group in trainer.optimizer.param_groups for weight in group["params"])
            weights = (*policy.parameters(), *trained)
            held = [getattr(weight, "_local_tensor", weight).untyped_storage() for weight in weights]
            seen.append(sum({storage.data_ptr(): storage.nbytes() for storage in held}.values()))

    trainer.add_callback(Watch)
    return seen


def _references(trainer: Any) -> list[float]:
    data = trainer.train_dataset
    return [value for name in ("ref_chosen_logps", "ref_logps") if name in data.column_names for value in data[name]]


def weights(folder: Path) -> dict[str, str]:
    """Return the digest of each weight file in `folder`."""
    files = sorted([*folder.glob("*.safetensors"), *folder.glob("*config.json")])
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}
