"""Score models on rows of this folder by exact match of their greedy answers, kind by kind.

Example: `python data/score.py data/nano-base data/nano-instruct`
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from shadow_trl.evaluation.scoring import read_rows, score

HERE = Path(__file__).resolve().parent
ANSWER_TOKENS = 16
"""Most tokens of an answer; the longest right one has 14 characters and one `<|end|>`."""


def main() -> None:
    """Print a Markdown table: one line a model, one column a kind of row."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", help="model folders")
    parser.add_argument("--rows", type=Path, default=HERE / "dpo-test.jsonl", help="rows (default: dpo-test.jsonl)")
    parser.add_argument("--tokenizer", default=str(HERE / "nano-instruct"), help="folder with the chat template")
    options = parser.parse_args()
    rows = read_rows(options.rows)
    tokenizer = AutoTokenizer.from_pretrained(options.tokenizer)
    kinds = list(dict.fromkeys(row["kind"] for row in rows))
    print("| model | " + " | ".join(kinds) + " |")
    print("|---" * (len(kinds) + 1) + "|")
    for name in options.models:
        model = AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32)
        scores = score(model, tokenizer, rows, max_new_tokens=ANSWER_TOKENS)
        print(f"| {Path(name).name} | " + " | ".join(f"{100 * scores.share(kind):.1f}" for kind in kinds) + " |")


if __name__ == "__main__":
    main()
