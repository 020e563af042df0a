"""TRL's other trainers, plain and as Shadow trainers, on the same tiny data; also trained in two processes."""

from __future__ import annotations

import importlib
import os
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset
from releases import has
from runs import lora, saved_files, settings
from tiny import preference_data
from transformers import AutoTokenizer

os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")

KINDS = ("KTO", "GRPO", "RLOO", "CPO", "ORPO")
WITHOUT_REFERENCE = ("CPO", "ORPO")
GENERATING = {"num_generations": 2, "max_completion_length": 4, "beta": 0.1}
OPTIONS: dict[str, dict] = {"GRPO": GENERATING, "RLOO": GENERATING}


def kto_data(rows: int = 16) -> Dataset:
    return Dataset.from_list(
        [
            {
                "prompt": [{"role": "user", "content": f"{row}+1"}],
                "completion": [{"role": "assistant", "content": f"no {row}" if row % 2 else str(row + 1)}],
                "label": row % 2 == 0,
            }
            for row in range(rows)
        ]
    )


def data_of(kind: str, rows: int = 16) -> Dataset:
    if kind in OPTIONS:
        return preference_data(rows).select_columns("prompt")
    return kto_data(rows) if kind == "KTO" else preference_data(rows)


def length_of_answer(completions: list, **_: Any) -> list[float]:
    return [float(len(completion[0]["content"])) for completion in completions]


def classes(kind: str, *, plain: bool = False) -> tuple[type, type]:
    """Return the trainer and the config of a kind; with a TRL that is too old for them, skip the test."""
    module = "shadow_trl"
    if not plain and kind in KINDS and not has("trl", "1.16"):
        pytest.skip("TRL 1.16: older ones are refused, as tests/training/test_older.py shows")
    if plain:
        module = f"trl.experimental.{kind.lower()}" if kind in WITHOUT_REFERENCE else "trl"
    prefix = "" if plain else "Shadow"
    found = importlib.import_module(module)
    return getattr(found, f"{prefix}{kind}Trainer"), getattr(found, f"{prefix}{kind}Config")


def build(kind: str, pair: tuple, folder: Path, *, plain: bool = False, model: Any = None, **changes: Any) -> Any:
    """Return a trainer of the kind; `plain`: TRL's own on BASE, with INSTRUCT's tokenizer."""
    trainer, config = classes(kind, plain=plain)
    extra = {name: changes.pop(name) for name in ("train_dataset", "eval_dataset", "callbacks") if name in changes}
    extra.setdefault("train_dataset", data_of(kind))
    if kind in OPTIONS:
        extra["reward_funcs"] = changes.pop("reward_funcs", length_of_answer)
    if "ref_model" in changes:
        extra["ref_model"] = changes.pop("ref_model")
    if plain:
        extra["processing_class"] = AutoTokenizer.from_pretrained(pair[1])
    else:
        extra["instruct_model"] = str(pair[1])
    peft_config = changes.pop("peft_config", None)
    args = config(**settings(folder, **{**OPTIONS.get(kind, {}), **changes}))
    return trainer(model=str(pair[0]) if model is None else model, args=args, peft_config=peft_config, **extra)


def train_all(rank: int, base: str, instruct: str, output: str) -> dict[str, bool]:
    """Train every kind, full or with a LoRA, as TRL's and as ours, in each of two processes; whether they are equal."""
    found = {}
    for place, kind in enumerate(KINDS):
        folders = [Path(output, f"{kind}-{name}") for name in ("plain", "shadow")]
        for folder, plain in zip(folders, (True, False), strict=True):
            config = lora() if place % 2 else None
            trainer = build(kind, (base, instruct), folder, plain=plain, peft_config=config)
            # A run that fell back to one process would pass every other check.
            assert (trainer.accelerator.num_processes, trainer.accelerator.process_index) == (2, rank)
            trainer.train()
            if plain:
                trainer.save_model()
        found[kind] = saved_files(folders[0]) == saved_files(folders[1]) != {}
    return found
