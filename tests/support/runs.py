"""The settings of short runs, and the two trainers made with them."""

from __future__ import annotations

from pathlib import Path

import torch
from datasets import Dataset
from peft import LoraConfig
from tiny import preference_data, sft_data

from shadow_trl import ShadowDPOConfig, ShadowDPOTrainer, ShadowSFTConfig, ShadowSFTTrainer

SETTINGS = {
    "use_cpu": True,
    "bf16": False,
    "gradient_checkpointing": False,
    "max_steps": 2,
    "per_device_train_batch_size": 4,
    "learning_rate": 1e-2,
    "report_to": "none",
    "save_strategy": "no",
    "logging_steps": 1,
    "disable_tqdm": True,
    "seed": 3,
}


LORA = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}


def lora(**changes) -> LoraConfig:
    return LoraConfig(**LORA, **changes)


def settings(folder: Path, **changes) -> dict:
    given = {"output_dir": str(folder), **SETTINGS, **changes}
    torch.manual_seed(given["seed"])  # older releases of TRL draw a new adapter before they set the seed
    return given


def dpo(pair: tuple[Path, Path], folder: Path, *, model=None, data: Dataset | None = None, **changes):
    peft_config = changes.pop("peft_config", None)
    extra = {name: changes.pop(name) for name in ("ref_model", "processing_class", "eval_dataset") if name in changes}
    return ShadowDPOTrainer(
        model=str(pair[0]) if model is None else model,
        instruct_model=str(pair[1]),
        args=ShadowDPOConfig(**settings(folder, **changes)),
        train_dataset=preference_data() if data is None else data,
        peft_config=peft_config,
        **extra,
    )


def sft(pair: tuple[Path, Path], folder: Path, *, model=None, peft_config=None, **changes) -> ShadowSFTTrainer:
    return ShadowSFTTrainer(
        model=str(pair[0]) if model is None else model,
        instruct_model=str(pair[1]),
        args=ShadowSFTConfig(**settings(folder, **changes)),
        train_dataset=sft_data(),
        peft_config=peft_config,
    )


def saved_files(folder: Path) -> dict[str, bytes]:
    names = [*(path.name for path in folder.glob("*.safetensors")), "config.json", "adapter_config.json"]
    return {name: (folder / name).read_bytes() for name in names if (folder / name).exists()}


def log_probability(model, tokenizer, row: dict, answer: str) -> float:
    """Sum of log p(token) over the answer's tokens, by hand: one sequence, no padding, float64 softmax."""
    prompt = tokenizer.apply_chat_template(row["prompt"], add_generation_prompt=True, return_dict=False)
    whole = tokenizer.apply_chat_template(row["prompt"] + row[answer], return_dict=False)
    with torch.no_grad():
        logits = model(torch.tensor([whole])).logits[0].double()
    scores = logits.log_softmax(-1)
    return sum(scores[place - 1, whole[place]].item() for place in range(len(prompt), len(whole)))
