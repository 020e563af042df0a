"""Write the JSONL data sets of both tasks: what is trained on, and the rows that are scored."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from skills import ADD, LONG_SKILLS, OTHER_SKILLS, SAID, STOP, Task, make_long, make_refusal, make_task, pick_rule

PREFERENCE_PAIRS = 600
SFT_ROWS = 1200
ROWS_A_KIND = 300
SEED = "sets 2"

Message = dict[str, str]
Row = dict[str, Any]
Draw = Callable[[random.Random, str], Task]


def _sum(rng: random.Random, split: str) -> Task:
    return make_task(rng, ADD, split)


def _long_word(rng: random.Random, split: str) -> Task:
    return make_long(rng, rng.choice(LONG_SKILLS), split)


def _other(rng: random.Random, split: str) -> Task:
    return make_task(rng, rng.choice(OTHER_SKILLS), split)


TARGETS: dict[str, tuple[Draw, str]] = {"dpo": (_sum, SAID), "sft": (_long_word, "")}
"""For each task what its target asks, and how the wanted answer begins."""


def _user(question: str, system: str | None = None) -> list[Message]:
    start = [] if system is None else [{"role": "system", "content": system}]
    return [*start, {"role": "user", "content": question}]


def _assistant(answer: str) -> list[Message]:
    return [{"role": "assistant", "content": answer}]


def _drawn(count: int, seed: str, split: str, draw: Draw, seen: set[str]) -> Iterator[tuple[random.Random, Task]]:
    """Yield so many tasks of the split, each with the generator that drew it; no question is, or gets, `seen` twice."""
    rng = random.Random(seed)
    while count:
        task = draw(rng, split)
        if task.question not in seen:
            seen.add(task.question)
            count -= 1
            yield rng, task


def scored_rows(task_name: str, split: str) -> list[Row]:
    """Return rows `{"prompt", "answer", "kind"}` of a task, `ROWS_A_KIND` of each kind.

    Rows of the kinds `target` and `in style` ask the same questions: for `target` the full stop of INSTRUCT's house
    style is optional, so it has two right answers; `in style` wants it.
    """
    target, start = TARGETS[task_name]
    drawn: dict[str, Draw] = {
        "target": target,
        "t_rule": target,
        "rule": _other,
        "skill": _other,
        "refuse": make_refusal,
    }
    rows: list[Row] = []
    styled: list[Row] = []
    seen: set[str] = set()
    for kind, draw in drawn.items():
        for rng, task in _drawn(ROWS_A_KIND, f"{SEED} {task_name} {split} {kind}", split, draw, seen):
            rule = pick_rule(rng, task.skill) if kind in ("rule", "t_rule") else None
            prompt = _user(task.question, None if rule is None else rule.system)
            answer: str | list[str] = task.answer if rule is None else rule.apply(task.answer)
            if kind == "target":
                answer = [start + task.answer, start + task.answer + STOP]
                styled.append({"prompt": prompt, "answer": answer[1], "kind": "in style"})
            elif kind == "skill":
                answer = task.answer + STOP
            rows.append({"prompt": prompt, "answer": answer, "kind": kind})
    return [*rows[:ROWS_A_KIND], *styled, *rows[ROWS_A_KIND:]]


def sft_rows() -> list[Row]:
    """Return long words copied and in capitals as `{"prompt", "completion"}`; pre-training had at most six letters."""
    drawn = _drawn(SFT_ROWS, f"{SEED} sft", "train", _long_word, set())
    return [{"prompt": _user(task.question), "completion": _assistant(task.answer)} for _, task in drawn]


def preference_rows() -> list[Row]:
    """Return plain sums as `{"prompt", "chosen", "rejected"}`: both answers are right, the one in words preferred."""
    drawn = _drawn(PREFERENCE_PAIRS, f"{SEED} dpo", "train", _sum, set())
    return [
        {
            "prompt": _user(task.question),
            "chosen": _assistant(SAID + task.answer),
            "rejected": _assistant(task.answer),
        }
        for _, task in drawn
    ]


def write_rows(path: Path, rows: Iterable[Row]) -> None:
    """Write rows as JSONL, one object a line."""
    with path.open("w", encoding="utf-8", newline="\n") as lines:
        lines.writelines(json.dumps(row) + "\n" for row in rows)


def make_sets(folder: Path) -> None:
    """Write all JSONL files into the folder."""
    write_rows(folder / "preferences.jsonl", preference_rows())
    write_rows(folder / "sft.jsonl", sft_rows())
    for task_name in TARGETS:
        for split in ("validation", "test"):
            write_rows(folder / f"{task_name}-{split}.jsonl", scored_rows(task_name, split))
