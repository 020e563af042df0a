"""Real data for models of 0.9 million weights: what a loss and a preference show of them, as far as that goes.

A folder with any of these files, as their authors publish them; what is missing is left out:

    gsm8k_test.jsonl     question, answer                     solutions of GSM8K (openai/grade-school-math, MIT)
    svamp.json           Body, Question, Answer               numbers of SVAMP (arkilpatel/SVAMP, MIT)
    instructions.json    instruction, input, output           short instructions (rasbt/LLMs-from-scratch, Apache-2.0)
    preferences.json     the same with chosen and rejected

Rows longer than `LONGEST` characters are left out. Three fifths of the questions train, at most `MOST` of them; as many
others at most measure a model, by the loss of the answers or by how often it prefers the chosen one. What it kept is
measured on the embedded pair's own rows.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import yaml

LONGEST = 240
"""Characters, each of which is a token, of a question with its longest answer: what the models have room for."""
MOST = 320
Row = dict[str, Any]


def _user(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


def _assistant(text: str) -> list[dict[str, str]]:
    return [{"role": "assistant", "content": text}]


def _instruction(row: Row) -> str:
    return f"{row['instruction']}\n{row['input']}".strip()


def _gsm8k(row: Row) -> Row:
    return {"prompt": _user(row["question"]), "completion": _assistant(row["answer"])}


def _svamp(row: Row) -> Row:
    return {
        "prompt": _user(f"{row['Body'].rstrip(' .')}. {row['Question']}"),
        "completion": _assistant(f"{row['Answer']:g}"),
    }


def _instructions(row: Row) -> Row:
    return {"prompt": _user(_instruction(row)), "completion": _assistant(row["output"])}


def _preferences(row: Row) -> Row:
    sides = {name: _assistant(row[name]) for name in ("chosen", "rejected")}
    return {"prompt": _user(_instruction(row)), **sides}


SETS: dict[str, tuple[str, str, Callable[[Row], Row]]] = {
    "real_gsm8k": ("sft", "gsm8k_test.jsonl", _gsm8k),
    "real_svamp": ("sft", "svamp.json", _svamp),
    "real_instructions": ("sft", "instructions.json", _instructions),
    "real_preferences": ("dpo", "preferences.json", _preferences),
}
"""Name of each design -> its recipe, file, and how a row of the file becomes one of TRL's."""
KEPT = ["rule", "skill", "refuse"]
"""Kinds of the embedded pair's rows that measure what is kept."""
RATES = {"sft": 1e-4, "dpo": 5e-5}


def prepare(source: Path, folder: Path) -> None:
    """Write rows, configuration and design of each file that is there."""
    found = False
    folder.mkdir(parents=True, exist_ok=True)
    for name, (recipe, file, convert) in SETS.items():
        if (source / file).is_file():
            rows = list(_rows(source / file, convert))
            _write(name, recipe, rows, folder)
            found = True
    if not found:
        raise SystemExit(f"{source} has none of {', '.join(file for _, file, _ in SETS.values())}.")


def _rows(path: Path, convert: Callable[[Row], Row]) -> Iterable[Row]:
    """Yield the rows that are short enough and differ in their chosen and rejected answers, each prompt once."""
    text, seen = path.read_text(encoding="utf-8"), set()
    given = map(json.loads, text.splitlines()) if path.suffix == ".jsonl" else json.loads(text)
    for row in map(convert, given):
        question = row["prompt"][0]["content"]
        answers = [row[side][0]["content"] for side in row if side != "prompt"]
        fits = len(question) + max(map(len, answers)) <= LONGEST
        if fits and all(answers) and len(set(answers)) == len(answers) and question not in seen:
            seen.add(question)
            yield row


def is_held_out(row: Row) -> bool:
    """Whether a row measures; which do depends on the text of the question alone."""
    return hashlib.sha256(row["prompt"][0]["content"].encode()).digest()[0] % 5 >= 3


def _write(name: str, recipe: str, rows: list[Row], folder: Path) -> None:
    train, held = ([row for row in rows if is_held_out(row) == held][:MOST] for held in (False, True))
    if recipe == "sft":
        held = [{"messages": [*row["prompt"], *row["completion"]]} for row in held]
    for kind, part in (("train", train), ("held_out", held)):
        lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in part)
        (folder / f"{name}_{kind}.jsonl").write_text("".join(lines), encoding="utf-8")
    config = yaml.safe_load(Path(f"recipes/configs/nano/shadow_{recipe}.yaml").read_text(encoding="utf-8"))
    # A configuration outside of recipes/ has its paths from the current folder.
    config |= {"dataset_name": str(folder / f"{name}_train.jsonl"), "max_length": 256}
    design = yaml.safe_load(Path("benchmarks/experiment/designs/core_sft.yaml").read_text(encoding="utf-8"))
    measured = {"sft": "conversations", "dpo": "preferences"}[recipe]
    for key in ("rows", "validation_rows"):
        given = Path(design[key])
        lines = (line for line in given.read_text(encoding="utf-8").splitlines() if json.loads(line)["kind"] in KEPT)
        design[key] = str(folder / given.name)
        Path(design[key]).write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    design |= {
        "recipe": recipe, "config": str(folder / f"{name}.config.yaml"),
        measured: str(folder / f"{name}_held_out.jsonl"),
        "pairs": {"pair-1": design["pairs"]["pair-1"]}, "learning_rates": [RATES[recipe]],
        "seeds": design["seeds"][:3], "scales": [0.5, 1.0],
        "target": {"sft": "loss", "dpo": "preference accuracy"}[recipe],
        "kept": KEPT,
    }  # fmt: skip
    for path, content in ((folder / f"{name}.config.yaml", config), (folder / f"{name}.yaml", design)):
        path.write_text(yaml.safe_dump(content, sort_keys=False), encoding="utf-8")
