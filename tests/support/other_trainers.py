"""TRL's other trainers, plain and as Shadow trainers, on the same tiny data; their losses and references by hand."""

from __future__ import annotations

import importlib
import math
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from releases import has
from runs import log_probability, settings
from safetensors.torch import load_file
from stages import tuned_weights, weights
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


def check_sum(pair: tuple, run: Path, scale: float) -> None:
    """Check the graft in float32 against INSTRUCT + scale * (TUNED - BASE) in float64, from the files alone."""
    base, instruct, tuned = weights(pair[0]), weights(pair[1]), tuned_weights(pair[0], run)
    found, moved = load_file(run / "grafted/model.safetensors"), 0.0
    assert found.keys() == instruct.keys()
    for name, value in instruct.items():
        expected = value + scale * (tuned[name] - base[name])
        largest = torch.stack([expected.abs(), value.abs(), tuned[name].abs(), base[name].abs()]).amax(0)
        assert ((found[name].double() - expected).abs() <= 2**-22 * largest + 1e-9).all(), name
        moved = max(moved, (expected - value).abs().max().item())
    assert moved > 1e-4


def kto_by_hand(
    models: tuple[Any, Any], tokenizer: Any, rows: Any, beta: float, *, batch: int | None = None
) -> tuple[float, float]:
    """Loss and KL term of one step (2402.01306, equations 7 and 8) with a policy and a reference, in float64.

    Each row is paired with the answer of the row before it, of its batch of `batch` rows (default all).
    """

    def ratio(prompt: dict, answer: dict) -> float:
        row = {"prompt": prompt["prompt"], "completion": answer["completion"]}
        policy, other = (log_probability(model, tokenizer, row, "completion") for model in models)
        return policy - other

    rows = list(rows)
    size = batch or len(rows)
    batches = [rows[first : first + size] for first in range(0, len(rows), size)]
    paired = [ratio(row, several[place - 1]) for several in batches for place, row in enumerate(several)]
    kl = max(0.0, sum(paired) / len(rows))
    gains = [beta * (ratio(row, row) - kl) * (1 if row["label"] else -1) for row in rows]
    return sum(1 - 1 / (1 + math.exp(-gain)) for gain in gains) / len(rows), kl


def generated_log_probabilities(model: Any, batch: dict, temperature: float) -> torch.Tensor:
    """log p of each generated token, by a softmax in float64 over the logits of `model`."""
    ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], 1)
    mask = torch.cat([batch["prompt_mask"], batch["completion_mask"]], 1)
    with torch.no_grad():
        logits = model(ids, attention_mask=mask).logits.double() / temperature
    scores = logits[:, :-1].log_softmax(-1).gather(2, ids[:, 1:, None])[..., 0]
    return scores[:, -batch["completion_ids"].size(1) :]
