"""Every option of TRL's that makes sense for a graft trains the same weights as plain TRL."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from datasets import Dataset, IterableDataset
from runs import lora, saved_files, settings
from tiny import preference_data, sft_data
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

from shadow_trl import ShadowDPOConfig, ShadowDPOTrainer, ShadowSFTConfig, ShadowSFTTrainer

pytestmark = pytest.mark.filterwarnings("ignore")

DPO_OPTIONS: dict[str, dict] = {
    **{
        f"loss-{loss}": {"loss_type": [loss]}
        for loss in (
            *("sigmoid", "hinge", "ipo", "nca_pair", "robust", "bco_pair", "sppo_hard", "aot", "aot_unpaired"),
            *("apo_zero", "apo_down", "discopop", "sft", "sigmoid_norm"),
        )
    },
    "loss-exo_pair": {"loss_type": ["exo_pair"], "label_smoothing": 1e-3},
    "several losses": {"loss_type": ["sigmoid", "sft"], "loss_weights": [0.8, 0.2]},
    "label_smoothing": {"label_smoothing": 0.1, "loss_type": ["robust"]},
    "ld_alpha": {"ld_alpha": 0.5},
    "forward_kl": {"f_divergence_type": "forward_kl"},
    "js_divergence": {"f_divergence_type": "js_divergence"},
    "alpha_divergence": {"f_divergence_type": "alpha_divergence", "f_alpha_divergence_coef": 0.3},
    "weighting": {"use_weighting": True},
    "gradient checkpointing": {"gradient_checkpointing": True},
    "accumulation": {"gradient_accumulation_steps": 2},
    "max_length": {"max_length": 12},
    "bf16": {"bf16": True},
    "dropout on": {"disable_dropout": False},
    "no eval": {"eval_strategy": "no"},
    "padding free": {"padding_free": True},  # TRL 1.16 says that it is off for now, and pads
    "end is kept": {"max_length": 12, "truncation_mode": "keep_end"},
}
SFT_OPTIONS: dict[str, dict] = {
    "NEFTune": {"neftune_noise_alpha": 5.0},
    "packing": {"packing": True, "max_length": 32},
    "assistant only": {"assistant_only_loss": True},
    "whole sequence": {"completion_only_loss": False},
    "completion only": {"completion_only_loss": True},
    "gradient checkpointing": {"gradient_checkpointing": True},
    "dft": {"loss_type": "dft"},
    "bf16": {"bf16": True},
}


# In the default run; the others are marked slow.
QUICK = {"several losses", "ld_alpha", "NEFTune", "packing"}


def listed(options: dict[str, dict]) -> list:
    return [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in options]


def train_both(build, tmp_path: Path) -> None:
    """Build and train plain TRL, then Shadow: the seed is set while building, and training goes on from there."""
    plain = build("plain")
    plain.train()
    plain.save_model()
    build("shadow").train()
    expected = saved_files(tmp_path / "plain")
    assert expected
    assert saved_files(tmp_path / "shadow") == expected
    assert (tmp_path / "shadow" / "grafted").is_dir()


def dpo_builder(pair, tmp_path, *, policy: str, data, peft: bool, **options):
    def build(which: str):
        shared = {"model": str(pair[0]), "train_dataset": data, "peft_config": lora() if peft else None}
        if which == "shadow":
            args = ShadowDPOConfig(**settings(tmp_path / "shadow", ref_policy=policy, **options))
            return ShadowDPOTrainer(instruct_model=str(pair[1]), args=args, **shared)
        precompute = policy == "instruct" and isinstance(data, Dataset)
        instruct = AutoModelForCausalLM.from_pretrained(pair[1], dtype=torch.float32)
        return DPOTrainer(
            ref_model=instruct if policy == "instruct" else None,
            args=DPOConfig(**settings(tmp_path / "plain", precompute_ref_log_probs=precompute, **options)),
            processing_class=AutoTokenizer.from_pretrained(pair[1]),
            **shared,
        )

    return build


def sft_builder(pair, tmp_path, *, data, peft: bool, formatting_func=None, **options):
    def build(which: str):
        shared = {"model": str(pair[0]), "train_dataset": data, "peft_config": lora() if peft else None}
        shared["formatting_func"] = formatting_func
        if which == "shadow":
            args = ShadowSFTConfig(**settings(tmp_path / "shadow", **options))
            return ShadowSFTTrainer(instruct_model=str(pair[1]), args=args, **shared)
        args = SFTConfig(**settings(tmp_path / "plain", **options))
        return SFTTrainer(args=args, processing_class=AutoTokenizer.from_pretrained(pair[1]), **shared)

    return build


@pytest.mark.parametrize("name", listed(DPO_OPTIONS))
def test_dpo_option(pair, tmp_path, name):
    # The reference and the kind of training take turns: every option meets one of each, and the suite stays short.
    place = list(DPO_OPTIONS).index(name)
    policy, peft = ("instruct", "init")[place % 2], place % 3 == 0
    build = dpo_builder(pair, tmp_path, policy=policy, data=preference_data(), peft=peft, **DPO_OPTIONS[name])
    train_both(build, tmp_path)


@pytest.mark.parametrize("policy", ["init", pytest.param("instruct", marks=pytest.mark.slow)])
def test_dpo_on_a_stream(pair, tmp_path, policy):
    def rows():
        yield from preference_data()

    data = IterableDataset.from_generator(rows)
    train_both(dpo_builder(pair, tmp_path, policy=policy, data=data, peft=False), tmp_path)


@pytest.mark.slow
def test_dpo_with_activation_offloading_does_what_trl_does(pair, tmp_path):
    # Whether offloading runs without an accelerator is TRL's matter: both trainers must do the same.
    outcomes = []
    for which in ("plain", "shadow"):
        build = dpo_builder(
            pair, tmp_path, policy="init", data=preference_data(), peft=False, activation_offloading=True
        )
        try:
            trainer = build(which)
            trainer.train()
            trainer.save_model()
            outcomes.append(saved_files(tmp_path / which))
        except Exception as error:
            outcomes.append(f"{type(error).__name__}: {error}")
    assert outcomes[0] == outcomes[1]


@pytest.mark.parametrize("name", listed(SFT_OPTIONS))
def test_sft_option(pair, tmp_path, name):
    data = sft_data()
    if name in ("assistant only", "packing"):
        data = data.map(lambda row: {"messages": row["prompt"] + row["completion"]}, remove_columns=data.column_names)
    peft = list(SFT_OPTIONS).index(name) % 2 == 0
    train_both(sft_builder(pair, tmp_path, data=data, peft=peft, **SFT_OPTIONS[name]), tmp_path)


@pytest.mark.slow
def test_sft_on_a_stream(pair, tmp_path):
    def rows():
        yield from sft_data()

    train_both(sft_builder(pair, tmp_path, data=IterableDataset.from_generator(rows), peft=True), tmp_path)


@pytest.mark.slow
def test_formatting_function(pair, tmp_path):
    def text(row: dict) -> str:
        return f"{row['prompt'][0]['content']}={row['completion'][0]['content']}"

    build = sft_builder(pair, tmp_path, data=sft_data(), peft=False, formatting_func=text, completion_only_loss=False)
    train_both(build, tmp_path)
