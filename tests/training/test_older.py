"""What older releases of the libraries lack is made up for, or refused; with newer ones the rest is theirs."""

from __future__ import annotations

import importlib
import sys

import pytest
from runs import dpo, lora, settings
from trl.trainer import dpo_trainer

from shadow_trl import ShadowDPOConfig, ShadowSFTConfig
from shadow_trl.errors import AdapterError, VersionError
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
