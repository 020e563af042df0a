"""Engines and offloads that cannot end in a graft are refused by name before a model is loaded."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from accelerate import PartialState
from accelerate.utils import ParallelismConfig
from runs import settings
from torch import nn

from shadow_trl import ShadowDPOConfig, ShadowSFTConfig
from shadow_trl.errors import ConfigError
from shadow_trl.runtime.processes import run_on_main
from shadow_trl.training.engines import lifts_weights, refuse_engines, refuse_offloaded, refuse_tensor_parallel
from shadow_trl.training.resuming import fault_of


@pytest.mark.parametrize(
    ("given", "environment", "message"),
    [
        ({}, {"ACCELERATE_USE_DEEPSPEED": "true"}, "DeepSpeed is not supported"),
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
        refuse_engines(config)


def test_fsdp2_on_accelerators_is_not_refused(tmp_path, monkeypatch):
    config = ShadowSFTConfig(**settings(tmp_path, fsdp=True, eval_grafted=True))
    monkeypatch.setattr(config.distributed_state, "distributed_type", "DistributedType.MULTI_GPU")
    monkeypatch.setenv("FSDP_CPU_RAM_EFFICIENT_LOADING", "true")  # as accelerate launch sets it unless told otherwise
    refuse_engines(config)


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
            path.write_text("{}")
    assert fault_of(tmp_path) is None
    (tmp_path / names[0]).unlink()
    assert "optimizer.pt is missing" in str(fault_of(tmp_path))
