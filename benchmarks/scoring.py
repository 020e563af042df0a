"""Scoring of exact answers beside `generate`, row by row.

    python benchmarks/scoring.py [--rows 900] [--rounds 3]

INSTRUCT of the embedded pair answers rows of data/dpo-test.jsonl greedily: with `scoring.score`, in batches, and with
transformers' `generate` and its cache, one row at a time, both with one thread and the same longest answer. Rounds
alternate; each first answers a batch that is not timed. Prints a Markdown table and whether both found the same
answers right. Exit code 1 if they did not.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig

from shadow_trl.evaluation.models import load, tokenizer_and_ends
from shadow_trl.evaluation.scoring import Row, read_rows, score

ROOT = Path(__file__).resolve().parents[1]
LONGEST = 32


def one_by_one(model: Any, tokenizer: Any, ends: list[int], rows: Sequence[Row]) -> list[bool]:
    """Return which rows `generate` answers right, in batches of one, as a short script would do it."""
    found = []
    config = GenerationConfig(do_sample=False, max_new_tokens=LONGEST, eos_token_id=ends, pad_token_id=ends[0])
    with torch.inference_mode():
        for row in rows:
            given = tokenizer.apply_chat_template(row["prompt"], add_generation_prompt=True, return_tensors="pt")
            written = model.generate(**given, generation_config=config)[0, given["input_ids"].shape[1] :]
            answer = row["answer"] if isinstance(row["answer"], list) else [row["answer"]]
            text = tokenizer.decode(written, skip_special_tokens=True).strip()
            found.append(text in [one.strip() for one in answer])
    return found


def in_batches(model: Any, tokenizer: Any, ends: list[int], rows: Sequence[Row], size: int) -> list[bool]:
    """Return which rows `score` finds right, in their order."""
    hits = score(model, tokenizer, rows, batch_size=size, max_new_tokens=LONGEST, eos_token_ids=ends).hits
    left = {kind: iter(values) for kind, values in hits.items()}
    return [next(left[row["kind"]]) for row in rows]


def main() -> int:
    """Time both in turns."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--rows", type=int, default=900, help="spread over the file (default %(default)s)")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[64, 128, 256])
    options = parser.parse_args()
    torch.set_num_threads(1)
    instruct = ROOT / "data/nano-instruct"
    model = load(instruct, dtype="float32")
    tokenizer, ends = tokenizer_and_ends(instruct)
    rows = read_rows(ROOT / "data/dpo-test.jsonl")
    rows = rows[:: max(1, len(rows) // options.rows)][: options.rows]
    ways: dict[str, Callable[[Sequence[Row]], list[bool]]] = {
        "generate, batch 1": lambda some: one_by_one(model, tokenizer, ends, some)
    }
    for size in options.batch_sizes:
        ways[f"score, batch {size}"] = lambda some, size=size: in_batches(model, tokenizer, ends, some, size)
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    answers: dict[str, list[bool]] = {}
    for _ in range(options.rounds):
        for name, way in ways.items():
            way(rows[:8])
            started = time.process_time()
            answers[name] = way(rows)
            seconds[name].append(time.process_time() - started)
    first, *others = ways
    print(f"{len(rows)} rows, {len({str(row['prompt']) for row in rows})} prompts; CPU seconds.\n")
    print("| | median s | all s | rows a second | times as fast | answers found right |")
    print("|---|---|---|---|---|---|")
    slow = statistics.median(seconds[first])
    for name, all_of_it in seconds.items():
        middle = statistics.median(all_of_it)
        print(
            f"| {name} | {middle:.2f} | {' '.join(f'{one:.2f}' for one in all_of_it)} | {len(rows) / middle:.0f} "
            f"| {slow / middle:.1f} | {sum(answers[name])} |"
        )
    same = all(answers[name] == answers[first] for name in others)
    print(f"\nThe same rows are right: {'yes' if same else 'no'}.")
    return 0 if same else 1


if __name__ == "__main__":
    sys.exit(main())
