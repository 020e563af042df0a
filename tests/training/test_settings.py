"""TRL's own options and the data are checked before anything is loaded; what is complete enough to resume from."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from runs import dpo, settings
from safetensors.torch import load_file, save_file
from tiny import make_pair, preference_data, sft_data
from transformers import AutoModelForSequenceClassification, BitsAndBytesConfig
from trl import DPOTrainer

from shadow_trl import ShadowDPOConfig, ShadowDPOTrainer, ShadowSFTConfig, ShadowSFTTrainer
from shadow_trl.errors import ConfigError
from shadow_trl.training.config import DPO_LOSSES
from shadow_trl.training.resuming import checkpoint_of, fault_of, last_complete
from shadow_trl.training.settings import check_columns, check_first_row, check_settings

NAN, INFINITE = float("nan"), float("inf")


def check(folder: Path, **changes: Any) -> None:
    config = ShadowDPOConfig(**settings(folder / "out"))
    for name, value in changes.items():
        setattr(config, name, value)
    check_settings(config)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"learning_rate": NAN}, "learning_rate is nan, not a finite number"),
        ({"learning_rate": INFINITE}, "learning_rate is inf, not a finite number"),
        ({"learning_rate": -1.0}, "Invalid learning rate: -1.0"),
        ({"weight_decay": NAN}, "weight_decay is nan"),
        ({"weight_decay": -1.0}, "weight_decay is -1.0; it must be at least 0"),
        ({"adam_beta1": 2.0}, "Invalid beta parameter at index 0: 2.0"),
        ({"adam_epsilon": -1.0}, "Invalid epsilon value: -1.0"),
        ({"max_grad_norm": NAN}, "max_grad_norm is nan"),
        ({"beta": NAN}, "beta is nan"),
        ({"beta": -0.1}, "beta is -0.1; it must be at least 0"),
        ({"label_smoothing": -INFINITE}, "label_smoothing is -inf"),
        ({"per_device_train_batch_size": 0}, "per_device_train_batch_size is 0; it must be at least 1"),
        ({"per_device_eval_batch_size": -2}, "per_device_eval_batch_size is -2; it must be at least 1"),
        ({"gradient_accumulation_steps": 0}, "gradient_accumulation_steps is 0; it must be at least 1"),
        ({"max_length": 0}, "max_length is 0; it must be at least 1"),
        ({"num_train_epochs": -1.0}, "num_train_epochs is -1.0; it must be at least 0"),
        ({"neftune_noise_alpha": -1.0}, "neftune_noise_alpha is -1.0; it must be at least 0"),
        ({"output_dir": ""}, "output_dir is empty"),
        ({"output_dir": "x" * 300}, "output_dir: cannot write to (.|\n)*too long"),
        ({"output_dir": "a\0b"}, "output_dir: cannot write to (.|\n)*NUL"),
        ({"output_dir": "~nobody-of-this-name/out"}, "there is no such user"),
        ({"seed": -1}, r"seed is -1; it must be from 0 to 2\^32 - 1"),
        ({"seed": 2**32}, "seed is 4294967296; it must be from 0"),
        ({"dataloader_num_workers": -1}, "dataloader_num_workers is -1; it must be at least 0"),
        ({"precompute_ref_batch_size": -1}, "precompute_ref_batch_size is -1; it must be at least 1"),
        ({"loss_weights": [1.0, NAN]}, r"loss_weights is \[1.0, nan\], not a finite number"),
        ({"label_smoothing": 0.5}, "label_smoothing is 0.5; it must be at least 0 and below 0.5"),
        ({"label_smoothing_factor": 2.0}, "label_smoothing_factor is 2.0; it must be from 0 to 1"),
        ({"ld_alpha": 7.0}, "ld_alpha is 7.0; it must be from 0 to 1"),
        ({"discopop_tau": 0.0}, "discopop_tau is 0.0; it must be above 0"),
        ({"model_init_kwargs": [1]}, r"model_init_kwargs is \[1\], not a mapping"),
        ({"lr_scheduler_kwargs": {"nope": 3}}, "lr_scheduler_type='linear' with (.|\n)*nope"),
        ({"lr_scheduler_kwargs": {"min_lr": NAN}}, "lr_scheduler_kwargs is (.|\n)*not a finite number"),
        ({"lr_scheduler_type": "cosine_with_min_lr"}, "lr_scheduler_type='cosine_with_min_lr' (.|\n)*min_lr_rate"),
        ({"report_to": ["zzz"]}, "report_to names 'zzz', which transformers does not know"),
        ({"learning_rate": NAN, "beta": NAN}, "learning_rate is nan(.|\n)*beta is nan"),
    ],
)  # fmt: skip
def test_options_that_would_fail_or_spoil_the_weights_are_refused(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        check(tmp_path, **changes)


@pytest.mark.parametrize(
    "changes",
    [
        {"lr_scheduler_type": "cosine_with_min_lr", "lr_scheduler_kwargs": {"min_lr": 1e-7}},
        {"ld_alpha": 1.0},
        {"lr_scheduler_type": "warmup_stable_decay", "lr_scheduler_kwargs": {"num_decay_steps": 5000}},
        {"lr_scheduler_type": "reduce_lr_on_plateau"},
        {"lr_scheduler_type": "constant"},
        {},
        {"max_grad_norm": INFINITE},
        {"max_length": None},
        {"learning_rate": 0.0},
        {"optim": "sgd"},
        {"beta": 0.0},
    ],
)
def test_options_that_work_pass(tmp_path: Path, changes: dict[str, Any]) -> None:
    check(tmp_path, **changes)


def test_what_is_not_installed_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers.integrations import integration_utils

    monkeypatch.setattr(integration_utils, "get_available_reporting_integrations", lambda: ["tensorboard"])
    with pytest.raises(ConfigError, match="report_to names wandb, which is not installed"):
        check(tmp_path, report_to=["tensorboard", "wandb"])
    check(tmp_path, report_to=["tensorboard"])
    monkeypatch.setattr("transformers.utils.is_bitsandbytes_available", lambda: False)
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(ConfigError, match="bitsandbytes"):
        check(tmp_path, optim="adamw_bnb_8bit")
    monkeypatch.setattr("transformers.utils.is_liger_kernel_available", lambda: False)
    with pytest.raises(ConfigError, match="pip install liger-kernel"):
        check(tmp_path, use_liger_kernel=True)
    monkeypatch.setattr("transformers.utils.is_liger_kernel_available", lambda: True)
    monkeypatch.setattr(DPOTrainer, "_compute_loss_liger", None, raising=False)  # as TRL has it until 1.14
    with pytest.raises(ConfigError, match=r"use_liger_kernel in DPO needs TRL 1\.14"):
        check(tmp_path, use_liger_kernel=True)
    check_settings(ShadowSFTConfig(**settings(tmp_path / "out"), use_liger_kernel=True))
    with pytest.raises(ConfigError, match="pip install bitsandbytes"):
        check(tmp_path, model_init_kwargs={"quantization_config": BitsAndBytesConfig(load_in_4bit=True)})


def test_an_output_folder_below_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match=r"out' cannot be a folder: .*/file is a file"):
        check(tmp_path, output_dir=str(tmp_path / "file/out"))


@pytest.mark.parametrize(
    ("adapter", "message"),
    [
        ({"r": 0}, r"r \(lora_r\) of the adapter is 0; it must be at least 1"),
        ({"lora_dropout": 2.0}, "lora_dropout of the adapter is 2.0; it must be from 0 to 1"),
        ({"target_modules": "("}, "target_modules of the adapter is not a regular expression"),
    ],
)
def test_settings_of_an_adapter_that_peft_looks_at_late(tmp_path: Path, adapter: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        check_settings(ShadowDPOConfig(**settings(tmp_path / "out")), None, LoraConfig(**adapter))
    check_settings(ShadowDPOConfig(**settings(tmp_path / "out")), None, LoraConfig(target_modules="all-linear"))


TURN = {"role": "user", "content": "a"}


@pytest.mark.parametrize(
    ("row", "fits"),
    [
        ({"messages": [TURN]}, True),
        ({"messages": [{"role": "assistant", "content": None, "tool_calls": [{"name": "f"}]}]}, True),
        ({"conversations": [{"from": "human", "value": "a"}]}, True),
        ({"text": "a"}, True),
        ({"messages": None, "text": "a"}, True),
        ({"prompt": [TURN], "completion": [TURN]}, True),
        ({"messages": "a"}, False),
        ({"messages": []}, False),
        ({"messages": [{"content": "a"}]}, False),
        ({"messages": [{"role": "user", "content": None}]}, False),
        ({"messages": [{"role": "user", "content": 3}]}, False),
        ({"text": None}, False),
        ({"text": 3}, False),
        ({"prompt": "a", "completion": [TURN]}, False),
        ({"prompt": [TURN], "completion": []}, False),
    ],
)
def test_values_of_another_kind_are_refused(row: dict[str, Any], fits: bool) -> None:
    data, forms = Dataset.from_list([row]), [*SFT_FORMS, {"conversations"}]
    if fits:
        check_first_row("train_dataset", {"one": data}, forms)
        return
    with pytest.raises(ConfigError, match=r"the first row of train_dataset is of no form(.|\n)*  \w+  "):
        check_first_row("train_dataset", data, forms)


def test_data_without_a_row_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="train_dataset has no rows"):
        check_first_row("train_dataset", Dataset.from_list([]), SFT_FORMS)
    pair = make_pair(tmp_path)
    with pytest.raises(ConfigError, match=r"train_dataset has no row left(.|\n)*Nothing was written"):
        ShadowSFTTrainer(
            str(pair[0]), instruct_model=str(pair[1]), train_dataset=sft_data(),
            args=ShadowSFTConfig(**{**settings(tmp_path / "out"), "max_length": 1}),
        )  # fmt: skip
    assert not (tmp_path / "out").exists()


SFT_FORMS = [{"messages"}, {"prompt", "completion"}, {"text"}]


@pytest.mark.parametrize(
    ("columns", "fits"),
    [
        (["messages"], True),
        (["prompt", "completion", "id"], True),
        (["text"], True),
        (["instruction", "input", "output"], False),
        (["prompt", "chosen", "rejected"], False),
        (["prompt"], False),
    ],
)
def test_data_of_another_form_is_refused(columns: list[str], fits: bool) -> None:
    data = Dataset.from_dict({name: ["a"] for name in columns})
    if fits:
        check_columns("train_dataset", data, SFT_FORMS)
        check_columns("eval_dataset", {"one": data}, SFT_FORMS)
        return
    with pytest.raises(ConfigError, match=f"train_dataset has the columns {', '.join(columns)}.*\n  messages\n"):
        check_columns("train_dataset", data, SFT_FORMS)
    with pytest.raises(ConfigError, match="eval_dataset 'one' has the columns"):
        check_columns("eval_dataset", {"one": data}, SFT_FORMS)


def test_trainers_refuse_before_anything_is_made(tmp_path: Path) -> None:
    pair = make_pair(tmp_path)
    with pytest.raises(ConfigError, match=r"train_dataset has the columns prompt, chosen, rejected(.|\n)*Nothing was"):
        ShadowSFTTrainer(
            str(pair[0]), instruct_model=str(pair[1]), args=ShadowSFTConfig(**settings(tmp_path / "out")),
            train_dataset=preference_data(),
        )  # fmt: skip
    with pytest.raises(ConfigError, match=r"columns prompt, completion(.|\n)*\n  chosen and rejected\n"):
        dpo(pair, tmp_path / "out", data=sft_data())
    with pytest.raises(ConfigError, match="learning_rate is nan"):
        dpo(pair, tmp_path / "out", learning_rate=NAN)
    assert not (tmp_path / "out").exists()


def test_a_model_that_classifies_is_refused(tmp_path: Path) -> None:
    """As a folder and as an object; TRL fails on it with an AttributeError."""
    pair = make_pair(tmp_path)
    model = AutoModelForSequenceClassification.from_pretrained(pair[0])
    with pytest.raises(ConfigError, match="is a Qwen3ForSequenceClassification, which predicts no tokens"):
        dpo(pair, tmp_path / "out", model=model)
    config = json.loads((pair[0] / "config.json").read_text())
    (pair[0] / "config.json").write_text(json.dumps({**config, "architectures": ["Qwen3Model"]}))
    with pytest.raises(ConfigError, match="is a Qwen3Model, which predicts no tokens"):
        dpo(pair, tmp_path / "out", peft_config=LoraConfig(target_modules=["q_proj"], modules_to_save=["score"]))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("above", [False, True])
def test_a_refusal_after_loading_takes_back_the_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, above: bool
) -> None:
    """TRL makes it while the trainer is built; one that was there before, or is not empty, stays."""
    pair, out = make_pair(tmp_path), tmp_path / "runs/out"
    if above:
        (tmp_path / "runs").mkdir()
    with pytest.raises(ConfigError, match="model_init_kwargs has 'frobnicate'"):
        dpo(pair, out, model_init_kwargs={"frobnicate": 1})

    def refuse(self: Any, config: Any) -> None:
        assert out.is_dir()
        raise ConfigError("refused")

    with monkeypatch.context() as patched:
        patched.setattr(ShadowDPOTrainer, "_check_loaded", refuse)
        with pytest.raises(ConfigError, match="refused"):
            dpo(pair, out)
    assert (tmp_path / "runs").exists() == above
    with pytest.raises(ConfigError, match="cannot resume from nowhere"):
        dpo(pair, out).train(resume_from_checkpoint="nowhere")
    assert not out.exists()
    out.mkdir(parents=True)
    with pytest.raises(ConfigError, match="cannot resume from nowhere"):
        dpo(pair, out).train(resume_from_checkpoint="nowhere")
    assert out.is_dir()


def test_the_losses_of_dpo_are_those_that_trl_names(tmp_path: Path) -> None:
    """TRL names them in the error of the first batch, and nowhere before."""
    with pytest.raises(ConfigError, match="loss_type"):
        ShadowDPOConfig(**settings(tmp_path), loss_type="nonsense")
    with pytest.raises(ConfigError, match=r"^loss_type must be one of .*nonsense"):
        ShadowDPOConfig(**settings(tmp_path), loss_type=["sft", "nonsense"])
    with pytest.raises(ConfigError, match=r"^f_divergence_type must be one of .*nonsense"):
        ShadowDPOConfig(**settings(tmp_path), f_divergence_type="nonsense")
    with pytest.raises(ConfigError, match="beta is 0, by which loss_type=ipo divides"):
        ShadowDPOConfig(**settings(tmp_path), loss_type=["sft", "ipo"], beta=0.0)
    trainer = dpo(make_pair(tmp_path), tmp_path / "out")
    trainer.loss_types = ["nonsense"]
    batch = next(iter(trainer.get_train_dataloader()))
    with pytest.raises(ValueError, match="Should be one of") as found:
        trainer.compute_loss(trainer.model, batch)
    assert str(found.value).partition("Should be one of ")[2] == str(list(DPO_LOSSES))


# Resuming


def checkpoint(folder: Path, step: int, model: Path) -> Path:
    """A complete checkpoint with the weights of `model`."""
    made = folder / f"checkpoint-{step}"
    shutil.copytree(model, made)
    (made / "trainer_state.json").write_text(json.dumps({"global_step": step}))
    for name in ("optimizer.pt", "scheduler.pt"):
        torch.save({}, made / name)
    return made


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


@pytest.mark.parametrize(
    ("damage", "fault"),
    [
        (lambda made: (made / "trainer_state.json").unlink(), "trainer_state.json"),
        (lambda made: cut(made / "trainer_state.json"), "trainer_state.json"),
        (lambda made: (made / "trainer_state.json").write_text("[1]"), "trainer_state.json has no number of steps"),
        (lambda made: (made / "trainer_state.json").write_text("{}"), "trainer_state.json has no number of steps"),
        (lambda made: (made / "optimizer.pt").write_bytes(b""), "optimizer.pt"),
        (lambda made: (made / "scheduler.pt").unlink(), "scheduler.pt"),
        (lambda made: cut(made / "optimizer.pt"), "optimizer.pt is empty or cut short"),
        (lambda made: (made / "rng_state.pth").touch(), "rng_state.pth is empty or cut short"),
        (lambda made: cut(made / "model.safetensors"), "model.safetensors"),
        (lambda made: (made / "model.safetensors").unlink(), "weights"),
    ],
)
def test_the_last_complete_checkpoint_is_taken_and_the_others_named(
    tmp_path: Path, damage: Any, fault: str, caplog: pytest.LogCaptureFixture
) -> None:
    pair = make_pair(tmp_path)
    whole = [checkpoint(tmp_path / "out", step, pair[0]) for step in (9, 10)]
    (tmp_path / "out/checkpoint-x").mkdir()
    (tmp_path / "out/checkpoint-\u00b2").mkdir()
    assert fault_of(whole[1]) is None
    assert last_complete(tmp_path / "out") == checkpoint_of(True, tmp_path / "out") == str(whole[1])  # 10, not "9"
    damage(whole[1])
    assert fault in str(fault_of(whole[1]))
    with caplog.at_level("WARNING"):
        assert checkpoint_of("true", tmp_path / "out") == str(whole[0])
    assert f"{whole[1]} is not complete and is skipped: " in caplog.text
    with pytest.raises(ConfigError, match=rf"cannot resume from {whole[1]}: (.|\n)*Complete are:\n  {whole[0]}"):
        checkpoint_of(str(whole[1]), tmp_path / "out")
    assert checkpoint_of(str(whole[0]), tmp_path / "out") == str(whole[0])


def test_without_a_checkpoint_there_is_nothing_to_resume_from(tmp_path: Path) -> None:
    for nothing in (None, False, "false"):
        assert checkpoint_of(nothing, tmp_path) is None
    with pytest.raises(ConfigError, match=r"holds no complete checkpoint\. Leave resume_from_checkpoint out"):
        checkpoint_of(True, tmp_path)
    with pytest.raises(ConfigError, match="cannot resume from nowhere: there is no such folder"):
        checkpoint_of("nowhere", tmp_path)


def test_a_checkpoint_of_another_model_or_optimizer_is_refused(tmp_path: Path) -> None:
    """torch stops in the middle of loading the first, and at the first step with the second."""
    trainer = dpo(make_pair(tmp_path), tmp_path / "out", optim="sgd")
    trainer.create_optimizer_and_scheduler(1)
    made = checkpoint(tmp_path / "out", 1, tmp_path / "base")
    torch.save(trainer.lr_scheduler.state_dict(), made / "scheduler.pt")
    groups = [{"lr": 1.0, "params": group["params"]} for group in trainer.optimizer.state_dict()["param_groups"]]
    for name, state in (("momentum", {"state": {}, "param_groups": groups}), ("param_groups", {})):
        torch.save(state, made / "optimizer.pt")
        with pytest.raises(ConfigError, match=rf"cannot resume from {made}, which is not of a run (.|\n)*{name}"):
            trainer._load_optimizer_and_scheduler(str(made))
    weights = load_file(made / "model.safetensors")
    save_file(
        {name: value[:1].clone() for name, value in weights.items()}, made / "model.safetensors", {"format": "pt"}
    )
    with pytest.raises(ConfigError, match=rf"cannot resume from {made}, which is not of a run (.|\n)*size mismatch"):
        trainer._load_from_checkpoint(str(made))
