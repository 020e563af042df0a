"""SFT guided by INSTRUCT: the weighted loss by hand in float64, nothing at power 0, and what it does not go with."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from interrupts import files_of
from releases import needs
from runs import settings
from tiny import sft_data
from transformers import AutoModelForCausalLM
from trl import SFTConfig, SFTTrainer

from shadow_trl import ShadowSFTConfig, ShadowSFTTrainer
from shadow_trl.errors import ConfigError
from shadow_trl.training.guidance import GuidedSFTTrainer, GuidedShadowSFTTrainer

pytestmark = [
    pytest.mark.filterwarnings("ignore"),
    needs("trl", "1.16", "older ones are refused, as tests/training/test_older.py shows"),
]


def shadow(pair: tuple[Path, Path], folder: Path, *, trainer: type = GuidedShadowSFTTrainer, power=None, **changes):
    guidance = {} if power is None else {"guidance_power": power}
    args = ShadowSFTConfig(**settings(folder, **changes))
    base, instruct = map(str, pair)
    return trainer(model=base, instruct_model=instruct, args=args, train_dataset=sft_data(), **guidance)


def by_hand(policy: Path, guide: Path, batch: dict, power: float) -> float:
    """Return sum(p_guide ** power * nll) / tokens over the labels, all in float64."""
    found = []
    for folder in (policy, guide):
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64).eval()
        with torch.no_grad():
            logits = model(batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1]
        labels = batch["labels"][:, 1:]
        picked = logits.log_softmax(-1).gather(-1, labels.clamp(min=0)[..., None])[..., 0]
        found.append(picked[labels != -100])
    return (-(power * found[1]).exp() * found[0]).sum().item() / len(found[0])


@pytest.mark.parametrize("power", [0.5, 2.0])
@pytest.mark.parametrize("completion_only", [True, False])
def test_each_token_counts_as_much_as_instruct_expects_it(pair, tmp_path, power, completion_only):
    trainer = shadow(pair, tmp_path, power=power, completion_only_loss=completion_only)
    trainer._weigh()
    batch = next(iter(trainer.get_train_dataloader()))
    expected = by_hand(*pair, batch, power)
    trainer.model.train()
    tokens = (batch["labels"][:, 1:] != -100).sum()
    assert trainer.compute_loss(trainer.model, dict(batch), num_items_in_batch=tokens).item() == pytest.approx(
        expected, rel=1e-5
    )
    plain = by_hand(*pair, batch, 0.0)
    assert abs(expected - plain) > 0.01 * plain
    trainer.model.eval()
    assert trainer.compute_loss(trainer.model, dict(batch)).item() == pytest.approx(plain, rel=1e-5)


def test_direct_tuning_is_guided_by_what_instruct_is_before(pair, tmp_path):
    args = SFTConfig(**settings(tmp_path))
    trainer = GuidedSFTTrainer(model=str(pair[1]), args=args, train_dataset=sft_data(), guidance_power=1.0)
    trainer.model.train()
    trainer._weigh()
    batch = next(iter(trainer.get_train_dataloader()))
    tokens = (batch["labels"][:, 1:] != -100).sum()
    loss = trainer.compute_loss(trainer.model, dict(batch), num_items_in_batch=tokens).item()
    assert loss == pytest.approx(by_hand(pair[1], pair[1], batch, 1.0), rel=1e-5)


@pytest.mark.slow
def test_power_0_is_no_guidance(pair, tmp_path):
    shadow(pair, tmp_path / "guided", power=0.0).train()
    shadow(pair, tmp_path / "plain", trainer=ShadowSFTTrainer).train()
    shadow(pair, tmp_path / "other", power=1.0).train()
    plain = files_of(tmp_path / "plain" / "grafted")["model.safetensors"]
    assert files_of(tmp_path / "guided" / "grafted")["model.safetensors"] == plain
    assert files_of(tmp_path / "other" / "grafted")["model.safetensors"] != plain
    for name, trainer, guidance in (("a", GuidedSFTTrainer, {"guidance_power": 0.0}), ("b", SFTTrainer, {})):
        args = SFTConfig(**settings(tmp_path / name))
        one = trainer(model=str(pair[1]), args=args, train_dataset=sft_data(), **guidance)
        one.train()
        one.save_model()
    assert (tmp_path / "a/model.safetensors").read_bytes() == (tmp_path / "b/model.safetensors").read_bytes()


@pytest.mark.parametrize(
    ("changes", "word"), [({"packing": True}, "packing"), ({"loss_type": "dft"}, "loss_type other than nll")]
)
def test_other_losses_are_refused_before_training(pair, tmp_path, changes, word):
    with pytest.raises(ConfigError, match=f"guidance_power does not go with .*{word}"):
        shadow(pair, tmp_path, power=0.5, **changes)
