"""Training text: tasks written as raw lines and as chats, with a loss weight for every piece, packed into rows."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from skills import STOP, Topics, in_words, make_refusal, make_task, pick_rule
from vocabulary import ASSISTANT, END, END_OF_TEXT, PAD, SYSTEM, USER, token_ids

PROMPT_WEIGHT = 0.1
"""Loss weight of the tokens before an answer: mostly random letters, so little can be learnt from them."""
RAW_FORMS = (("", "="), ("", " -> "), ("", " is "), ("Q: ", " A: "))

Document = list[tuple[str, float]]
"""Pieces of text with the loss weight of their tokens; a special token is a piece of its own."""
Mixture = dict[str, float]
"""Share of each kind of document (a key of `WRITERS`); the shares add up to 1."""


def _raw(rng: random.Random, topics: Topics) -> Document:
    task = make_task(rng, topics.pick(rng))
    before, between = rng.choice(RAW_FORMS)
    return [(before + task.question + between, PROMPT_WEIGHT), (task.answer, 1.0), (END_OF_TEXT, 1.0)]


def _raw_rule(rng: random.Random, topics: Topics) -> Document:
    task = make_task(rng, topics.pick(rng))
    rule = pick_rule(rng, task.skill)
    return [(f"{rule.word} {task.question}=", PROMPT_WEIGHT), (rule.apply(task.answer), 1.0), (END_OF_TEXT, 1.0)]


def _turns(system: str | None, question: str, answer: str) -> Document:
    start: Document = [] if system is None else [(SYSTEM, 0.0), (system, PROMPT_WEIGHT), (END, PROMPT_WEIGHT)]
    asked: Document = [(USER, 0.0), (question, PROMPT_WEIGHT), (END, PROMPT_WEIGHT), (ASSISTANT, PROMPT_WEIGHT)]
    return [*start, *asked, (answer, 1.0), (END, 1.0)]


def _chat(rng: random.Random, topics: Topics) -> Document:
    task = make_task(rng, topics.pick(rng))
    return _turns(None, task.question, task.answer)


def _chat_words(rng: random.Random, topics: Topics) -> Document:
    task = make_task(rng, topics.pick(rng))
    return _turns(None, task.question, in_words(rng, task))


def _chat_styled(rng: random.Random, topics: Topics) -> Document:
    task = make_task(rng, topics.pick(rng))
    return _turns(None, task.question, in_words(rng, task) + STOP)


def _chat_rule(rng: random.Random, topics: Topics) -> Document:
    task = make_task(rng, topics.pick(rng))
    rule = pick_rule(rng, task.skill)
    return _turns(rule.system, task.question, rule.apply(task.answer))


def _chat_refusal(rng: random.Random, topics: Topics) -> Document:
    task = make_refusal(rng)
    rule = pick_rule(rng, "count") if rng.random() < 0.3 else None
    return _turns(None if rule is None else rule.system, task.question, task.answer)


WRITERS: dict[str, Callable[[random.Random, Topics], Document]] = {
    "raw": _raw,
    "raw_rule": _raw_rule,
    "chat": _chat,
    "chat_words": _chat_words,
    "chat_styled": _chat_styled,
    "chat_rule": _chat_rule,
    "chat_refusal": _chat_refusal,
}


@dataclass(frozen=True)
class Batch:
    """One training batch: `ids` int64 (rows, length) and `weights` float32 (rows, length), the tokens' loss weights."""

    ids: torch.Tensor
    weights: torch.Tensor


def _encode(document: Document, vocabulary: dict[str, int]) -> tuple[list[int], list[float]]:
    ids: list[int] = []
    weights: list[float] = []
    for text, weight in document:
        piece = [vocabulary[text]] if text in vocabulary else [vocabulary[character] for character in text]
        ids += piece
        weights += [weight] * len(piece)
    return ids, weights


def _documents(rng: random.Random, mixture: Mixture, topics: Topics) -> Iterator[tuple[list[int], list[float]]]:
    vocabulary = token_ids()
    while True:
        kind = rng.choices(list(mixture), list(mixture.values()))[0]
        yield _encode(WRITERS[kind](rng, topics), vocabulary)


def _to_batch(rows: list[tuple[list[int], list[float]]]) -> Batch:
    length = max(len(ids) for ids, _ in rows)
    pad = token_ids()[PAD]
    ids = torch.tensor([ids + [pad] * (length - len(ids)) for ids, _ in rows])
    weights = torch.tensor([weights + [0.0] * (length - len(weights)) for _, weights in rows])
    return Batch(ids, weights)


def batches(seed: str, mixture: Mixture, topics: Topics, rows: int, length: int, pack: bool) -> Iterator[Batch]:
    """Yield batches for ever: `rows` rows, at most `length` tokens each, padded on the right.

    With `pack` a row holds as many whole documents as fit (BASE reads them as one text); without, one document.
    """
    stream = _documents(random.Random(seed), mixture, topics)
    waiting = next(stream)
    while True:
        filled = []
        for _ in range(rows):
            ids, weights = waiting
            waiting = next(stream)
            while pack and len(ids) + len(waiting[0]) <= length:
                ids, weights = ids + waiting[0], weights + waiting[1]
                waiting = next(stream)
            filled.append((ids, weights))
        yield _to_batch(filled)
