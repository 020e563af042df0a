"""Greedy answers of a batch of prompts: those that each row would get alone."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

_CLOSE = 64 * torch.finfo(torch.float32).eps
"""Share of the largest logit; between a batch and a row alone, 12 times eps was the largest difference seen."""


@contextmanager
def greedy(model: Any, ends: list[int], max_new_tokens: int) -> Iterator[None]:
    """Give `model` a plain greedy generation config inside the block: `generate` fills gaps from the model's own."""
    from transformers import GenerationConfig

    kept, training = model.generation_config, model.training
    # Answers are cut at the first end token, so any id will do as padding.
    model.generation_config = GenerationConfig(
        do_sample=False, max_new_tokens=max_new_tokens, eos_token_id=ends, pad_token_id=ends[0], use_cache=True
    )
    model.eval()
    try:
        with torch.inference_mode():
            yield
    finally:
        model.generation_config = kept
        model.train(training)


class _Margins:
    """Note how near the second likeliest token came to the likeliest, at the closest step of each row's answer.

    Called by `generate` as a logits processor, which changes nothing; without waiting for the device.
    """

    def __init__(self, ends: list[int]) -> None:
        self._ends = ends
        self._width = 0
        self._least: torch.Tensor | None = None

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        first, second = scores.topk(2).values.unbind(-1)
        margin = (first - second) / scores.abs().amax(-1).clamp(min=torch.finfo(scores.dtype).tiny)
        if self._least is None:
            self._width, self._least = input_ids.shape[1], margin
        else:
            ended = torch.isin(input_ids[:, self._width :], torch.tensor(self._ends, device=scores.device)).any(-1)
            self._least = torch.where(ended, self._least, torch.minimum(self._least, margin))
        return scores

    @property
    def close(self) -> list[int]:
        """The rows in which rounding may have decided."""
        return [] if self._least is None else (self._least < _CLOSE).nonzero()[:, 0].tolist()


def answers(model: Any, prompts: Sequence[Sequence[int]], ends: list[int]) -> list[list[int]]:
    """Return the token ids of the greedy answer to each prompt, as if it were alone, without the end token.

    A batch is added up in another order than a row alone. Where that may have decided between two tokens, the row is
    answered again alone. In 16 bits it could be nearly every row: there the answers are those of the batch.
    """
    margins = _Margins(ends)
    found = _answer(model, prompts, ends, margins)
    if len(prompts) > 1 and model.dtype in (torch.float32, torch.float64):
        for at in margins.close:
            (found[at],) = _answer(model, [prompts[at]], ends, _Margins(ends))
    return found


def _answer(model: Any, prompts: Sequence[Sequence[int]], ends: list[int], margins: _Margins) -> list[list[int]]:
    """Return the greedy answers of one batch."""
    width = max(map(len, prompts))
    padding = [width - len(prompt) for prompt in prompts]
    ids = torch.tensor([[ends[0]] * gap + [*prompt] for gap, prompt in zip(padding, prompts, strict=True)])
    seen = torch.tensor([[0] * gap + [1] * len(prompt) for gap, prompt in zip(padding, prompts, strict=True)])
    given = {"input_ids": ids.to(model.device), "attention_mask": seen.to(model.device)}
    written = model.generate(**given, logits_processor=[margins])[:, width:].tolist()
    return [row[: next((at for at, token in enumerate(row) if token in ends), len(row))] for row in written]
