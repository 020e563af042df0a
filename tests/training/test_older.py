"""What older releases of the libraries lack is made up for, or refused; with newer ones the rest is theirs."""

from __future__ import annotations

import pytest
from runs import dpo, lora, settings

from shadow_trl import ShadowDPOConfig, ShadowSFTConfig
from shadow_trl.errors import AdapterError
from shadow_trl.training import older


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
