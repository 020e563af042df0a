"""Losses and preferences against one row at a time, without padding, token by token."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from tiny import make_tokenizer, tiny_config
from transformers import AutoModelForCausalLM

from shadow_trl.errors import InputError
from shadow_trl.evaluation.likelihood import losses, margins, read_conversations, read_pairs


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    config = tiny_config()
    config.initializer_range = 0.5
    return AutoModelForCausalLM.from_config(config).eval()


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer(template=True)


def said(role: str, text: str) -> dict[str, str]:
    return {"role": role, "content": text}


def by_hand(model, tokenizer, question: str, answer: str) -> tuple[list[float], list[bool]]:
    """Log-probability of each token of the answer and its end, from the text that TEMPLATE makes."""
    ids = tokenizer(f"<|user|>{question}<|end|><|assistant|>").input_ids
    logps, first = [], []
    for token in tokenizer(f"{answer}<|end|>").input_ids:
        with torch.no_grad():
            logits = model(torch.tensor([ids])).logits[0, -1].double()
        logps.append(float(logits.log_softmax(-1)[token]))
        first.append(int(logits.argmax()) == token)
        ids = [*ids, token]
    return logps, first


TALKS = [("a", "bc"), ("why is it so", "7"), ("count to five", "1 2 3 4 5"), ("x", "")]


@pytest.mark.parametrize("batch_size", [1, 3])
def test_losses_are_those_of_each_answer_alone(model, tokenizer, batch_size):
    rows = [{"messages": [said("user", one), said("assistant", two)]} for one, two in TALKS]
    loss, right = losses(model, tokenizer, rows, batch_size=batch_size)
    for found, share, talk in zip(loss, right, TALKS, strict=True):
        logps, first = by_hand(model, tokenizer, *talk)
        assert found == pytest.approx(-sum(logps) / len(logps), abs=1e-5)
        assert share == pytest.approx(sum(first) / len(first))


def test_margins_are_differences_of_whole_answers(model, tokenizer):
    cases = [("a", "long answer", "no"), ("b c", "1", "22")]
    rows = [
        {"prompt": [said("user", q)], "chosen": [said("assistant", y)], "rejected": [said("assistant", n)]}
        for q, y, n in cases
    ]
    for found, (question, good, bad) in zip(margins(model, tokenizer, rows), cases, strict=True):
        wanted = sum(by_hand(model, tokenizer, question, good)[0]) - sum(by_hand(model, tokenizer, question, bad)[0])
        assert found == pytest.approx(wanted, abs=1e-4)


def test_a_model_without_preference_gives_every_token_the_same(tokenizer):
    """All weights zero: the loss is log(number of tokens)."""
    flat = AutoModelForCausalLM.from_config(tiny_config()).eval()
    for weight in flat.parameters():
        weight.data.zero_()
    loss, _ = losses(flat, tokenizer, [{"messages": [said("user", "a"), said("assistant", "bcd")]}])
    assert loss == [pytest.approx(math.log(49), abs=1e-6)]


def test_a_template_that_moves_the_prompt_is_refused(model):
    other = make_tokenizer(template=True)
    other.chat_template = "{{ messages | length }}{% for m in messages %}{{ m.content }}{% endfor %}"
    with pytest.raises(InputError, match="does not put the answer behind the prompt"):
        losses(model, other, [{"messages": [said("user", "a"), said("assistant", "b")]}])


@pytest.mark.parametrize(
    ("read", "row", "fault"),
    [
        (read_conversations, {"messages": [said("user", "a")]}, "the last message is not the assistant's"),
        (read_conversations, {"prompt": []}, "`messages` is not a list of messages"),
        (read_conversations, 7, "a int, not an object"),
        (read_pairs, {"prompt": [said("user", "a")], "chosen": "b", "rejected": "c"}, "`chosen` is not a list"),
        (read_pairs, {"prompt": [{}], "chosen": [], "rejected": []}, "a message of `prompt` lacks `role`"),
    ],
)
def test_rows_that_cannot_be_measured_are_listed(tmp_path: Path, read, row, fault):
    (tmp_path / "rows.jsonl").write_text("\n" + json.dumps(row) + "\n")
    with pytest.raises(InputError, match=f"line 2: {fault}"):
        read(tmp_path / "rows.jsonl")
