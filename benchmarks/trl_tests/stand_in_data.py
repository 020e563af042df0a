"""Small data sets in the formats of those that TRL's tests take from the hub, by the same names."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

Row = dict[str, Any]

THINGS = ("bread", "rain", "snow", "iron", "glass", "ink", "wool", "salt", "fire", "sand", "wood", "milk", "honey",
          "paper", "silk", "clay", "steel", "oil", "tea")  # fmt: skip
TRAIN = 17
"""Rows to train on, as many as TRL's; the other two are for evaluation."""


def write_data(folder: Path) -> None:
    """Write all data sets below `folder`, each in a folder of its name and of its configuration."""
    for name, configurations in DATA.items():
        for configuration, make in configurations.items():
            rows = [make(thing) for thing in THINGS]
            place = folder / "trl-internal-testing" / name / configuration
            place.mkdir(parents=True)
            for split, part in (("train", rows[:TRAIN]), ("test", rows[TRAIN:])):
                (place / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))


def words() -> list[str]:
    """Return all rows as texts, for a tokenizer to be trained on."""
    every = (make(thing) for configurations in DATA.values() for make in configurations.values() for thing in THINGS)
    return [json.dumps(row) for row in every]


def _turns(*contents: str) -> list[Row]:
    return [{"role": ("user", "assistant")[at % 2], "content": content} for at, content in enumerate(contents)]


def _asked(thing: str) -> tuple[str, str, str]:
    return f"What is {thing}?", f"It is {thing}.", "Nobody knows that."


def _standard(thing: str) -> dict[str, Row]:
    question, good, bad = _asked(thing)
    preferred = {"chosen": f" {good}", "rejected": f" {bad}"}
    return {
        "language_modeling": {"text": f"{question} {good}"},
        "prompt_only": {"prompt": question},
        "prompt_completion": {"prompt": question, "completion": f" {good}"},
        "preference": {"prompt": question, **preferred},
        "implicit_prompt_preference": {name: f"{question}{text}" for name, text in preferred.items()},
        "unpaired_preference": {"prompt": question, "completion": f" {good}", "label": len(thing) % 2 == 0},
    }


def _conversational(thing: str) -> dict[str, Row]:
    question, good, bad = _asked(thing)
    prompt, (chosen, rejected) = _turns(question), (_turns(question, text) for text in (good, bad))
    return {
        "language_modeling": {"messages": chosen},
        "prompt_only": {"prompt": prompt},
        "prompt_completion": {"prompt": prompt, "completion": chosen[1:]},
        "preference": {"prompt": prompt, "chosen": chosen[1:], "rejected": rejected[1:]},
        "implicit_prompt_preference": {"chosen": chosen, "rejected": rejected},
        "unpaired_preference": {"prompt": prompt, "completion": chosen[1:], "label": len(thing) % 2 == 0},
    }


def _harmony(thing: str) -> dict[str, Row]:
    """Return rows for gpt-oss, whose answers say what was thought before."""
    more = {"reasoning_effort": "low", "model_identity": "You are a small model."}
    rows = {name: _conversational(thing)[name] for name in ("language_modeling", "prompt_completion", "preference")}
    for row in rows.values():
        for turns in row.values():
            for turn in turns:
                turn["thinking"] = "Hm." if turn["role"] == "assistant" else None
    return {name: {**row, "chat_template_kwargs": more} for name, row in rows.items()}


def _toolcall(thing: str) -> dict[str, Row]:
    called = {"type": "function", "function": {"name": "weigh", "arguments": {"thing": thing}}}
    tool = {"name": "weigh", "description": "Weighs a thing.", "parameters": {
        "type": "object", "properties": {"thing": {"type": "string"}}, "required": ["thing"]}}  # fmt: skip
    asked = [
        {"role": "user", "content": f"How heavy is {thing}?", "tool_calls": None, "name": None},
        {"role": "assistant", "content": None, "tool_calls": [called], "name": None},
        {"role": "tool", "content": "3 kg", "tool_calls": None, "name": "weigh"},
    ]
    good, bad = (
        [{"role": "assistant", "content": text, "tool_calls": None, "name": None}] for text in ("3 kg.", "No.")
    )
    tools = json.dumps([{"type": "function", "function": tool}])
    return {
        "language_modeling": {"messages": asked + good, "tools": tools},
        "preference": {"prompt": asked, "chosen": good, "rejected": bad, "tools": tools},
    }


def _of(rows: Any, name: str) -> Any:
    return lambda thing: rows(thing)[name]


DATA = {
    "zen": {
        f"{form}_{name}": _of(rows, name)
        for form, rows in (("standard", _standard), ("conversational", _conversational))
        for name in rows(THINGS[0])
    },
    "harmony": {name: _of(_harmony, name) for name in _harmony(THINGS[0])},
    "toolcall": {name: _of(_toolcall, name) for name in _toolcall(THINGS[0])},
}
