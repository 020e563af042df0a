"""Checkpoints: a graft of each, and an interrupted run that ends in the same bytes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from interrupts import InterruptAfter, Interrupted, files_of
from runs import lora, settings
from safetensors.torch import load_file
from tiny import make_tokenizer, preference_data, sft_data
from transformers import AutoModelForCausalLM, Qwen3MoeConfig

from shadow_trl import ShadowDPOConfig, ShadowDPOTrainer, ShadowSFTConfig, ShadowSFTTrainer, graft
from shadow_trl.checkpoints.manifest import read_manifest

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning:transformers")


def trainer_of(pair, folder: Path, kind: str, *, with_lora: bool, callbacks=None, **changes):
    shared = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, **changes}
    trainer_class, config_class, data = {
        "sft": (ShadowSFTTrainer, ShadowSFTConfig, sft_data()),
        "dpo": (ShadowDPOTrainer, ShadowDPOConfig, preference_data()),
    }[kind]
    if kind == "dpo":
        shared["ref_policy"] = "instruct"
    return trainer_class(
        model=str(pair[0]),
        instruct_model=str(pair[1]),
        args=config_class(**settings(folder, **shared)),
        train_dataset=data,
        peft_config=lora() if with_lora else None,
        callbacks=callbacks,
    )


@pytest.mark.parametrize("with_lora", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("kind", [pytest.param("sft", marks=pytest.mark.slow), "dpo"])
def test_resumed_run_gives_the_same_graft(pair, tmp_path, kind, with_lora):
    trainer_of(pair, tmp_path / "whole", kind, with_lora=with_lora).train()
    with pytest.raises(Interrupted):
        trainer_of(pair, tmp_path / "cut", kind, with_lora=with_lora, callbacks=[InterruptAfter(2)]).train()
    assert not (tmp_path / "cut" / "grafted").exists()
    trainer_of(pair, tmp_path / "cut", kind, with_lora=with_lora).train(resume_from_checkpoint=True)
    assert files_of(tmp_path / "cut" / "grafted") == files_of(tmp_path / "whole" / "grafted")
    assert files_of(tmp_path / "cut") == files_of(tmp_path / "whole")


@pytest.mark.parametrize("policy", ["init", pytest.param("grafted", marks=pytest.mark.slow)])
def test_resumed_second_stage_of_one_adapter_gives_the_same_graft(pair, tmp_path, policy):
    """Beside the adapter in training lies TRL's frozen copy of it, which no checkpoint has."""
    trainer_of(pair, tmp_path / "sft", "sft", with_lora=True, save_strategy="no").train()

    def go_on(name: str, callbacks=None) -> ShadowDPOTrainer:
        shared = {
            "max_steps": 4,
            "save_strategy": "steps",
            "save_steps": 2,
            "ref_policy": policy,
            "lr_scheduler_type": "constant",
        }
        args = ShadowDPOConfig(**settings(tmp_path / name, **shared))
        return ShadowDPOTrainer(str(tmp_path / "sft"), None, args, train_dataset=preference_data(), callbacks=callbacks)

    go_on("whole").train()
    with pytest.raises(Interrupted):
        go_on("cut", [InterruptAfter(2)]).train()
    go_on("cut").train(resume_from_checkpoint=True)
    assert files_of(tmp_path / "cut") == files_of(tmp_path / "whole")
    assert files_of(tmp_path / "cut" / "grafted") == files_of(tmp_path / "whole" / "grafted")


@pytest.mark.parametrize("with_lora", [False, True], ids=["full", "lora"])
def test_every_checkpoint_is_grafted_and_rotation_removes_it(pair, tmp_path, with_lora):
    trainer = trainer_of(
        pair, tmp_path, "sft", with_lora=with_lora, save_steps=1, save_total_limit=2, graft_every_save=True, max_steps=3
    )
    trainer.train()
    assert sorted(path.name for path in tmp_path.glob("checkpoint-*")) == ["checkpoint-2", "checkpoint-3"]
    for step in (2, 3):
        checkpoint = tmp_path / f"checkpoint-{step}"
        written = files_of(checkpoint / "shadow" / "grafted")
        graft(base=pair[0], instruct=pair[1], tuned=checkpoint, output=tmp_path / f"again-{step}", base_dtype="tuned")
        assert written == files_of(tmp_path / f"again-{step}")
        assert read_manifest(checkpoint / "shadow" / "grafted")["kind"] == "graft"
    assert files_of(tmp_path / "checkpoint-3/shadow/grafted") == files_of(tmp_path / "grafted")
    # Resuming is not confused by what lies in the checkpoint, and grafts a later one again.
    resumed = trainer_of(
        pair,
        tmp_path,
        "sft",
        with_lora=with_lora,
        save_steps=1,
        graft_every_save=True,
        max_steps=4,
        graft_overwrite=True,
    )
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert resumed.state.global_step == 4
    assert (tmp_path / "checkpoint-4/shadow/grafted").is_dir()


@pytest.fixture(scope="module")
def moe_pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A mixture of experts: one weight an expert on disk, all experts in one weight in memory."""
    config = Qwen3MoeConfig(
        vocab_size=49,
        hidden_size=16,
        intermediate_size=32,
        moe_intermediate_size=8,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        num_experts=4,
        num_experts_per_tok=2,
        pad_token_id=0,
        eos_token_id=1,
        bos_token_id=None,
    )
    folder = tmp_path_factory.mktemp("moe")
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    model.generation_config.eos_token_id = 1
    model.save_pretrained(folder / "base")
    make_tokenizer(template=False).save_pretrained(folder / "base")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.02 * parameter.abs().mean() * torch.randn_like(parameter))
    model.save_pretrained(folder / "instruct")
    make_tokenizer(template=True).save_pretrained(folder / "instruct")
    return folder / "base", folder / "instruct"


def test_mixture_of_experts_resumes_with_all_its_weights(moe_pair, tmp_path):
    trainer_of(moe_pair, tmp_path / "whole", "sft", with_lora=False).train()
    with pytest.raises(Interrupted):
        trainer_of(moe_pair, tmp_path / "cut", "sft", with_lora=False, callbacks=[InterruptAfter(2)]).train()
    names = load_file(tmp_path / "cut" / "checkpoint-2" / "model.safetensors").keys()
    in_memory = AutoModelForCausalLM.from_pretrained(moe_pair[0]).state_dict().keys()
    assert set(names) - set(in_memory)  # or the test would show nothing
    trainer_of(moe_pair, tmp_path / "cut", "sft", with_lora=False).train(resume_from_checkpoint=True)
    assert files_of(tmp_path / "cut" / "grafted") == files_of(tmp_path / "whole" / "grafted")


@pytest.mark.parametrize("which", ["pair", "moe_pair"])
def test_best_checkpoint_is_what_is_grafted(request, tmp_path, which):
    pair = request.getfixturevalue(which)
    trainer = ShadowSFTTrainer(
        model=str(pair[0]),
        instruct_model=str(pair[1]),
        args=ShadowSFTConfig(
            **settings(
                tmp_path,
                max_steps=3,
                learning_rate=1e-2,
                save_strategy="steps",
                save_steps=1,
                eval_strategy="steps",
                eval_steps=1,
                load_best_model_at_end=True,
                metric_for_best_model="eval_loss",
                greater_is_better=True,  # losses fall: the first checkpoint counts as the best
            )
        ),
        train_dataset=sft_data(),
        eval_dataset=sft_data(4),
    )
    trainer.train()
    best = Path(trainer.state.best_model_checkpoint)
    assert best.name != "checkpoint-3", "choose a setting in which the last is not the best"
    graft(base=pair[0], instruct=pair[1], tuned=best, output=tmp_path / "again", base_dtype="tuned")
    assert files_of(tmp_path / "grafted") == files_of(tmp_path / "again")
