"""What a model gives to answers that it did not write: their loss, and which of two it prefers."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from ..errors import InputError
from .scoring import Row, fault_of_messages, read_lines

Answer = tuple[list[int], int]
"""Token ids of a conversation, and at which of them its last answer begins."""


def read_conversations(path: str | Path) -> list[dict[str, Any]]:
    """Read a JSONL file of conversations `{"messages": [...]}` whose last message is the assistant's.

    Raises:
        InputError: there is no such file, it has no rows, or some cannot be scored; each is listed.
    """
    return read_lines(path, _fault_of_conversation, '{"messages": [..., {"role": "assistant", "content": ...}]}')


def read_pairs(path: str | Path) -> list[dict[str, Any]]:
    """Read a JSONL file of preferences `{"prompt": messages, "chosen": messages, "rejected": messages}`.

    Raises:
        InputError: there is no such file, it has no rows, or some cannot be scored; each is listed.
    """
    return read_lines(path, _fault_of_pair, '{"prompt": messages, "chosen": messages, "rejected": messages}')


def _fault_of_conversation(row: Any) -> str | None:
    if not isinstance(row, dict):
        return f"a {type(row).__name__}, not an object"
    if fault := fault_of_messages(row, "messages"):
        return fault
    return None if row["messages"][-1]["role"] == "assistant" else "the last message is not the assistant's"


def _fault_of_pair(row: Any) -> str | None:
    if not isinstance(row, dict):
        return f"a {type(row).__name__}, not an object"
    faults = (fault_of_messages(row, name) for name in ("prompt", "chosen", "rejected"))
    return next(filter(None, faults), None)


def losses(model: Any, tokenizer: Any, rows: Sequence[Row], *, batch_size: int = 64) -> tuple[list[float], list[float]]:
    """Return for each conversation the loss of its last answer and the share of its tokens that are the likeliest.

    Args:
        model: a causal language model of transformers in evaluation mode.
        tokenizer: with a chat template.
        rows: `{"messages": [...]}`, see `read_conversations`.
        batch_size: conversations in a forward pass. Default 64.

    Returns:
        the mean negative log-probability of an answer's tokens, nats, and the share of right tokens, 0 to 1.
    """
    answers = [_answer(tokenizer, row["messages"][:-1], row["messages"][-1:]) for row in rows]
    found = _answer_tokens(model, answers, batch_size)
    return [-float(logps.mean()) for logps, _ in found], [float(first.double().mean()) for _, first in found]


def margins(model: Any, tokenizer: Any, rows: Sequence[Row], *, batch_size: int = 64) -> list[float]:
    """Return for each preference log p(chosen | prompt) - log p(rejected | prompt), nats; arguments as of `losses`."""
    sides = [_answer(tokenizer, row["prompt"], row[name]) for name in ("chosen", "rejected") for row in rows]
    sums = [float(logps.sum()) for logps, _ in _answer_tokens(model, sides, batch_size)]
    return [good - bad for good, bad in zip(sums[: len(rows)], sums[len(rows) :], strict=True)]


def _answer(tokenizer: Any, prompt: list[Any], answer: list[Any]) -> Answer:
    """Return the token ids of a conversation and where its answer begins, as TRL finds it."""
    before = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_dict=False)
    whole = tokenizer.apply_chat_template([*prompt, *answer], return_dict=False)
    if whole[: len(before)] != before or len(whole) == len(before):
        raise InputError(
            "the chat template does not put the answer behind the prompt of a conversation, so that its tokens cannot "
            f"be told. Its prompt ends with {prompt[-1]['content']!r}."
        )
    return whole, len(before)


@torch.inference_mode()
def _answer_tokens(model: Any, answers: Sequence[Answer], batch_size: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Return the log-probability of each token of each answer, and whether it is the likeliest; fp64 and bool."""
    order = sorted(range(len(answers)), key=lambda at: len(answers[at][0]), reverse=True)
    found: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
    for start in range(0, len(order), batch_size):
        batch = order[start : start + batch_size]
        width = len(answers[batch[0]][0])
        ids = torch.tensor([answers[at][0] + [0] * (width - len(answers[at][0])) for at in batch]).to(model.device)
        seen = torch.tensor([[1] * len(answers[at][0]) + [0] * (width - len(answers[at][0])) for at in batch])
        logits = model(input_ids=ids, attention_mask=seen.to(model.device)).logits
        for line, at in enumerate(batch):
            whole, begin = answers[at]
            told = logits[line, begin - 1 : len(whole) - 1].double()
            tokens = ids[line, begin : len(whole)]
            logps = told.log_softmax(-1).gather(-1, tokens[:, None])[:, 0]
            found[at] = logps.cpu(), (told.argmax(-1) == tokens).cpu()
    return [found[at] for at in range(len(answers))]
