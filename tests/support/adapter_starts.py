"""Initialisations of LoRA that need data or a quantiser before training: each puts an adapter on a model.

CorDA and LoRA-GA look at the model before the adapter is made, EVA after it. LoftQ quantises the weights under it.
"""

from __future__ import annotations

from typing import Any

import peft
import torch
from peft.tuners.lora import layer as lora_layer


def batches(count: int = 4) -> list[dict[str, torch.Tensor]]:
    """Return token ids to calibrate on, with labels."""
    generator = torch.Generator().manual_seed(5)
    found = [torch.randint(2, 49, (4, 12), generator=generator) for _ in range(count)]
    return [{"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids} for ids in found]


def eva(model: Any, config: Any) -> Any:
    """Put an adapter on `model` that starts in the directions of the layers' inputs."""
    wrapped = peft.get_peft_model(model, config)
    peft.initialize_lora_eva_weights(wrapped, batches(), show_progress_bar=False)
    return wrapped


def corda(model: Any, config: Any) -> Any:
    """Put an adapter on `model` that starts in directions chosen by the covariance of the layers' inputs."""
    prepare_corda(model, config)
    return peft.get_peft_model(model, config)


def prepare_corda(model: Any, config: Any) -> None:
    """Leave at the layers of `model` what CorDA starts from."""
    from peft.tuners.lora.corda import preprocess_corda

    def run() -> None:
        for batch in batches():  # its hook takes one sequence at a time
            for ids in batch["input_ids"]:
                model(input_ids=ids[None])

    preprocess_corda(model, config, run_model=run)


def lora_ga(model: Any, config: Any) -> Any:
    """Put an adapter on `model` that starts in directions of the gradient of its weights."""
    prepare_lora_ga(model, config)
    return peft.get_peft_model(model, config)


def prepare_lora_ga(model: Any, config: Any) -> None:
    """Leave at the layers of `model` the gradients that LoRA-GA starts from."""
    from peft.tuners.lora.loraga import preprocess_loraga

    def step() -> None:
        for batch in batches():
            model(**batch).loss.backward()

    preprocess_loraga(model, config, step)


def loftq(model: Any, config: Any) -> Any:
    """Put an adapter on `model` that starts as the nearest product to what quantising takes from the weights.

    PEFT's quantiser needs CUDA and bitsandbytes. Its place is taken by one that rounds each row to 15 steps; what PEFT
    does with the result is PEFT's own.
    """
    kept = lora_layer.loftq_init
    lora_layer.loftq_init = rounded
    try:
        return peft.get_peft_model(model, config)
    finally:
        lora_layer.loftq_init = kept


def rounded(
    weight: torch.Tensor, num_bits: int, reduced_rank: int, num_iter: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return (the rounded weight, lora_A, lora_B), as PEFT's `loftq_init` does."""
    assert (num_bits, num_iter) == (4, 1)
    weight = weight.detach()
    step = weight.abs().amax(1, keepdim=True) / 7
    rounded = (weight / step).round() * step
    left, values, right = torch.linalg.svd(weight - rounded, full_matrices=False)
    root = values[:reduced_rank].sqrt()
    return rounded, (root[:, None] * right[:reduced_rank]).contiguous(), (left[:, :reduced_rank] * root).contiguous()
