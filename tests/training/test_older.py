"""What older releases of the libraries lack is made up for, or refused; with newer ones the rest is theirs."""

from __future__ import annotations

import importlib
import sys
from types import SimpleNamespace

import pytest
import torch
from runs import dpo, lora, settings, sft
from trl.trainer import dpo_trainer

from shadow_trl import ShadowDPOConfig, ShadowSFTConfig
from shadow_trl.errors import AdapterError, ConfigError, VersionError
from shadow_trl.training import older
from shadow_trl.training.guidance import GuidedSFTTrainer, GuidedShadowSFTTrainer


@pytest.fixture
def older_trl(monkeypatch):
    """TRL as it was before its trainers had the head that some of ours build on."""
    monkeypatch.delattr(dpo_trainer, "add_fused_lm_head", raising=False)
    monkeypatch.setattr(older, "trl_release", "1.14.0")


@pytest.mark.parametrize("config", [ShadowSFTConfig, ShadowDPOConfig])
def test_checkpointing_of_activations_goes_by_its_name_of_today(tmp_path, config):
    given = settings(tmp_path / "out", activation_checkpointing=True)
    del given["gradient_checkpointing"]
    assert config(**given).gradient_checkpointing
    assert not config(**{**given, "activation_checkpointing": False}).gradient_checkpointing


def test_biases_that_peft_would_not_save_are_refused_before_training(pair, tmp_path, monkeypatch):
    monkeypatch.setattr(older, "peft_release", "0.20.0")
    with pytest.raises(AdapterError, match=r"bias='lora_only' .* needs PEFT 0\.21 or newer: 0\.20\.0 trains these"):
        dpo(pair, tmp_path / "out", peft_config=lora(bias="lora_only"))
    assert not (tmp_path / "out").exists()
    older.refuse_lost_biases(dpo(pair, tmp_path / "out", peft_config=lora(bias="all")).model)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("module", "what"),
    [
        ("kto", "ShadowKTOTrainer"),
        ("online", "a Shadow trainer that samples its data"),
        ("experimental", "a Shadow trainer of TRL's experimental ones"),
    ],
)
def test_a_trainer_that_needs_a_newer_trl_is_refused_when_it_is_imported(older_trl, monkeypatch, module, what):
    name = f"shadow_trl.training.{module}"
    monkeypatch.delitem(sys.modules, name, raising=False)
    with pytest.raises(VersionError) as refused:
        importlib.import_module(name)
    assert str(refused.value) == f"{what} needs TRL 1.16 or newer; 1.14.0 is installed: pip install -U 'trl>=1.16'."
    assert name not in sys.modules


@pytest.mark.parametrize("trainer", [GuidedSFTTrainer, GuidedShadowSFTTrainer])
def test_guidance_is_refused_before_anything_is_loaded(older_trl, trainer):
    with pytest.raises(VersionError, match=r"^guidance needs TRL 1\.16 or newer; 1\.14\.0 is installed: pip install"):
        trainer("no such model", guidance_power=1.0)


@pytest.mark.parametrize(("precompute", "part"), [(True, True), (True, False), (False, True)])
def test_values_of_a_policy_that_one_process_has_read_are_refused(older_trl, monkeypatch, precompute, part):
    monkeypatch.setattr(older, "is_fsdp_enabled", lambda: part)  # so transformers reads weights on one process alone
    config = SimpleNamespace(precompute_ref_log_probs=precompute)
    if not (precompute and part):
        older.refuse_values_of_a_part(config)
        return
    with pytest.raises(ConfigError, match=r"^TRL 1\.14\.0 .*fsdp_cpu_ram_efficient_loading to false"):
        older.refuse_values_of_a_part(config)


def test_an_optimizer_in_shards_that_would_not_be_read_is_refused_before_the_first_step(pair, tmp_path, monkeypatch):
    monkeypatch.setattr(older, "accelerate_release", "1.10.0")
    trainer = sft(pair, tmp_path / "out")
    checkpoint = tmp_path / "checkpoint-1"
    for name in ("optimizer_0", "pytorch_model_fsdp_0"):
        (checkpoint / name).mkdir(parents=True)
        (checkpoint / name / ".metadata").touch()
    torch.save({}, checkpoint / "scheduler.pt")
    (checkpoint / "trainer_state.json").write_text('{"global_step": 1}')
    with pytest.raises(ConfigError, match=r"accelerate 1\.10\.0 would start with a new optimizer"):
        trainer.train(resume_from_checkpoint=str(checkpoint))
    assert trainer.state.global_step == 0
