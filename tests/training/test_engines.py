"""Engines and offloads that cannot end in a graft are refused by name before a model is loaded."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from accelerate import PartialState
from accelerate.utils import ParallelismConfig
from peft import PeftType
from runs import settings
from tiny import sft_data, tiny_config
from torch import nn
from transformers import AutoModelForCausalLM

from shadow_trl import ShadowDPOConfig, ShadowSFTConfig, ShadowSFTTrainer
from shadow_trl.errors import ConfigError
from shadow_trl.runtime.processes import run_on_main
from shadow_trl.training.engines import (
    dtype_at_start,
    lifts_weights,
    refuse_engines,
    refuse_offloaded,
    refuse_tensor_parallel,
    refuse_trained_tokens,
)
from shadow_trl.training.resuming import fault_of


@pytest.mark.parametrize(
    ("given", "environment", "message"),
    [
        ({}, {"ACCELERATE_USE_FSDP": "true"}, "FSDP1 .* not supported"),
        ({"fsdp": True, "fsdp_config": {"version": 1}}, {}, "FSDP1 .* not supported"),
        ({}, {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}, r"would not use it here \(DistributedType.NO\)"),
        ({"fsdp": True}, {}, r"would not use it here \(DistributedType.NO\)"),
        ({"parallelism_config": ParallelismConfig(cp_size=2)}, {}, "context and sequence parallelism"),
        (
            {},
            {"ACCELERATE_USE_PARALLELISM_CONFIG": "true", "PARALLELISM_CONFIG_CP_SIZE": "2"},
            "context and sequence parallelism",
        ),
        ({"model_init_kwargs": {"device_map": {"": "cpu", "lm_head": "disk"}}}, {}, "on the disk"),
    ],
)
def test_engines_that_are_refused(tmp_path, monkeypatch, given, environment, message):
    # The config is made first: accelerate's own checks, some of them for accelerators only, are not what is tested.
    config = ShadowSFTConfig(**settings(tmp_path, **given))
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match=message):
        refuse_engines(config, "model")


def test_fsdp2_on_accelerators_is_not_refused(tmp_path, monkeypatch):
    config = ShadowSFTConfig(**settings(tmp_path, fsdp=True, eval_grafted=True))
    monkeypatch.setattr(config.distributed_state, "distributed_type", "DistributedType.MULTI_GPU")
    monkeypatch.setenv("FSDP_CPU_RAM_EFFICIENT_LOADING", "true")  # as accelerate launch sets it unless told otherwise
    refuse_engines(config, "model")


def deepspeed_config(folder, *, kind: str = "DEEPSPEED", zero: dict | None = None, **given):
    """Return a config with the plugin that `accelerate launch --use_deepspeed` makes, which needs the package."""
    changes = {name: given.pop(name) for name in ("tensor_parallel",) if name in given}
    config = ShadowSFTConfig(**settings(folder, **given))
    settings_of_all = {"zero_optimization": {"stage": 3, **(zero or {})}, **changes}
    config.deepspeed_plugin = SimpleNamespace(deepspeed_config=settings_of_all)
    config.distributed_state = SimpleNamespace(distributed_type=f"DistributedType.{kind}")
    return config


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"kind": "NO"}, r"would not use it here \(DistributedType.NO\)(.|\n)*accelerate launch --use_deepspeed"),
        ({"eval_grafted": True}, "eval_grafted=True is not possible under ZeRO-3(.|\n)*eval_grafted=False"),
        ({"zero": {"offload_param": {"device": "nvme"}}}, "offload_param.device=nvme(.|\n)*Set it to cpu"),
        ({"zero": {"stage": 2}, "tensor_parallel": {"autotp_size": 2}}, "autotp_size(.|\n)*Leave it out"),
        ({"zero": {"stage": 2, "zero_quantized_weights": True}}, "zero_quantized_weights(.|\n)*to false"),
    ],
)
def test_what_deepspeed_cannot_end_in_a_graft_with_is_refused(tmp_path, given, message):
    with pytest.raises(ConfigError, match=message):
        refuse_engines(deepspeed_config(tmp_path, **given), "model")


def test_zero_is_taken_and_zero3_with_the_name_of_a_model(tmp_path):
    model = nn.Linear(2, 2)
    for stage in (1, 2):
        refuse_engines(deepspeed_config(tmp_path, zero={"stage": stage}, eval_grafted=True), model)
    offload = {"offload_param": {"device": "cpu"}, "offload_optimizer": {"device": "cpu"}}
    refuse_engines(deepspeed_config(tmp_path, zero=offload), "model")
    with pytest.raises(ConfigError, match=r"given as an object(.|\n)*Pass the name or the folder"):
        refuse_engines(deepspeed_config(tmp_path), model)


@pytest.mark.parametrize(
    "adapter", [{"peft_type": "LORA", "trainable_token_indices": [3]}, {"peft_type": PeftType.TRAINABLE_TOKENS}]
)
def test_single_token_rows_are_refused_under_zero3_alone(tmp_path, adapter):
    with pytest.raises(ConfigError, match=r"trainable_token_indices(.|\n)*Use ZeRO-2"):
        refuse_trained_tokens(deepspeed_config(tmp_path), adapter)
    refuse_trained_tokens(deepspeed_config(tmp_path, zero={"stage": 2}), adapter)
    refuse_trained_tokens(deepspeed_config(tmp_path), {"peft_type": "LORA", "trainable_token_indices": None})
    refuse_trained_tokens(ShadowSFTConfig(**settings(tmp_path)), adapter)


def test_several_gpus_in_one_process_are_refused_with_the_way_out(pair, tmp_path):
    config = ShadowSFTConfig(**settings(tmp_path / "out"))
    config._n_gpu = 2  # as transformers finds them where no launcher started the process
    with pytest.raises(ConfigError, match=r"nn\.DataParallel(.|\n)*accelerate launch(.|\n)*Nothing was written"):
        ShadowSFTTrainer(str(pair[0]), instruct_model=str(pair[1]), args=config, train_dataset=sft_data())
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("plugin", "precision", "shared", "expected"),
    [
        (object(), "bf16", False, "bfloat16"),
        (object(), "fp16", False, "float16"),
        (object(), "no", False, "float32"),
        (object(), "bf16", True, "float32"),  # made in another dtype on loading, and not cast again
        (None, "bf16", False, "float32"),  # autocast: the weights stay as they are
    ],
)
def test_the_dtype_that_training_starts_in(plugin, precision, shared, expected):
    model = AutoModelForCausalLM.from_config(tiny_config())
    if shared:
        for parameter in model.parameters():
            parameter.ds_id = 0
    accelerator = SimpleNamespace(state=SimpleNamespace(deepspeed_plugin=plugin), mixed_precision=precision)
    assert dtype_at_start(accelerator, model) == expected


@pytest.mark.parametrize(
    "given", [{"model_init_kwargs": {"tp_plan": "auto"}}, {"parallelism_config": ParallelismConfig(tp_size=2)}]
)
def test_tensor_parallelism_is_refused_with_values_computed_before_training(tmp_path, given):
    refuse_tensor_parallel(ShadowDPOConfig(**settings(tmp_path, precompute_ref_log_probs=False, **given)), "model")
    config = ShadowDPOConfig(**settings(tmp_path, precompute_ref_log_probs=True, **given))
    with pytest.raises(ConfigError, match="tensor parallelism"):
        refuse_tensor_parallel(config, "model")


def test_weights_that_are_not_in_memory_are_named():
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2, device="meta"))
    with pytest.raises(ConfigError, match=r"2 weights of the model are not in memory(.|\n)*  1\.weight\n  1\.bias"):
        refuse_offloaded(model)
    refuse_offloaded(model.to_empty(device=torch.device("cpu")))


def test_processes_that_do_not_know_each_other_are_refused(monkeypatch):
    state, done = PartialState(cpu=True), []
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match=r"2 processes were launched .* this one sees 1"):
        run_on_main(state, lambda: done.append(1), what="the work")
    assert not done


@pytest.mark.parametrize(
    ("plugin", "precision", "dtypes", "lifted"),
    [
        (object(), "bf16", (torch.bfloat16, torch.bfloat16), True),
        (object(), "bf16", (torch.float32, torch.float32), False),
        (object(), "no", (torch.bfloat16, torch.float32), False),
        (None, "bf16", (torch.bfloat16, torch.float32), False),
        (object(), "bf16", (torch.bfloat16, torch.float32), None),
    ],
)
def test_whether_fsdp2_lifts_weights(plugin, precision, dtypes, lifted):
    accelerator = SimpleNamespace(state=SimpleNamespace(fsdp_plugin=plugin), mixed_precision=precision)
    model = nn.Sequential(*(nn.Linear(2, 2, bias=False, dtype=dtype) for dtype in dtypes))
    if lifted is None:
        with pytest.raises(ConfigError, match=r"1 of 2 were loaded in 16 bits(.|\n)*0\.weight"):
            lifts_weights(accelerator, model)
        model[1].requires_grad_(False)
        lifted = True  # what is frozen is saved as it was loaded
    assert lifts_weights(accelerator, model) == lifted
    assert not lifts_weights(accelerator, model.requires_grad_(False))


@pytest.mark.parametrize(
    "names",
    [("optimizer.bin", "pytorch_model_fsdp.bin"), ("optimizer_0/.metadata", "pytorch_model_fsdp_0/.metadata")],
)
def test_a_checkpoint_of_fsdp_is_complete_with_the_files_of_its_own(tmp_path, names):
    for name in ("trainer_state.json", "scheduler.pt", *names):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        if path.suffix in (".pt", ".bin"):
            torch.save({}, path)
        else:
            path.write_text('{"global_step": 1}')
    assert fault_of(tmp_path) is None
    (tmp_path / names[0]).unlink()
    assert "optimizer.pt is missing" in str(fault_of(tmp_path))


def test_a_checkpoint_of_deepspeed_is_complete_with_the_states_that_latest_names(tmp_path):
    (tmp_path / "trainer_state.json").write_text('{"global_step": 1}')
    (tmp_path / "latest").write_text("global_step7\n")
    shards = [tmp_path / f"global_step7/zero_pp_rank_{rank}_mp_rank_00_{name}_states.pt"
              for rank in range(2) for name in ("model", "optim")]  # fmt: skip
    shards[0].parent.mkdir()
    for path in shards:
        torch.save({}, path)
    assert fault_of(tmp_path) is None
    shards[1].write_bytes(b"")
    assert fault_of(tmp_path) == f"{shards[1].relative_to(tmp_path)} is empty or cut short"
    shards[1].unlink()
    shards[3].unlink()
    assert fault_of(tmp_path) == "global_step7/*optim_states.pt, which `latest` names, are missing"
    (tmp_path / "latest").write_text(f"../../{tmp_path.name}/global_step7")  # no way out of the folder is followed
    assert "global_step7/*optim_states.pt" in str(fault_of(tmp_path))
