"""What a bf16 graft loses against an fp32 graft, rounded to the nearest or at random, by the size of the delta.

    python benchmarks/precision.py                       # the tables of docs/precision.md, some minutes on one core
    python benchmarks/precision.py --seeds 1 --rows 50   # a quick look

Trains the embedded BASE with SFT once a seed, scales each delta to the standard deviations asked for, and grafts it
onto the embedded INSTRUCT three times: in fp32, in bf16 to the nearest, in bf16 at random. The models are compared in
fp32 arithmetic, so that only the stored weights differ. Prints Markdown: mean over the seeds, and from where to where.
"""

from __future__ import annotations

import argparse
import shlex
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, PrinterCallback
from transformers.utils import logging

from shadow_trl import ShadowSFTConfig, ShadowSFTTrainer, graft
from shadow_trl.evaluation.scoring import read_rows, score

DATA = Path(__file__).resolve().parent.parent / "data"
BASE, INSTRUCT = DATA / "nano-base", DATA / "nano-instruct"
FORMS: dict[str, dict[str, str]] = {
    "fp32": {"dtype": "float32"},
    "bf16 nearest": {"dtype": "bfloat16", "rounding": "nearest"},
    "bf16 stochastic": {"dtype": "bfloat16", "rounding": "stochastic"},
}
Figures = dict[str, list[float]]


def main() -> None:
    """Train, graft, compare, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3, help="trainings, seeds 0, 1, ... (default 3)")
    parser.add_argument("--stds", type=float, nargs="+", default=[1e-3, 3e-4, 1e-4, 3e-5, 1e-5])
    parser.add_argument("--rows", type=int, default=450, help="rows of data/sft-validation.jsonl that are scored")
    options = parser.parse_args()
    logging.disable_progress_bar()
    torch.set_num_threads(1)
    started = time.perf_counter()
    rows = read_rows(DATA / "sft-validation.jsonl")
    rows = rows[:: max(len(rows) // options.rows, 1)][: options.rows]  # of every kind
    tokenizer = AutoTokenizer.from_pretrained(INSTRUCT)
    found: dict[tuple[float, str], Figures] = defaultdict(lambda: defaultdict(list))
    trained = []
    untouched = _logits(INSTRUCT, tokenizer, rows)
    with tempfile.TemporaryDirectory(prefix="shadow-precision-") as scratch:
        for seed in range(options.seeds):
            tuned, std = _train(seed, Path(scratch) / f"tuned-{seed}")
            trained.append(std)
            for wanted in options.stds:
                models = _grafts(tuned, wanted / std, seed, Path(scratch) / f"{seed}-{wanted}")
                exact = _logits(models["fp32"][0], tokenizer, rows)
                for form, (folder, report) in models.items():
                    figures = _compare(_logits(folder, tokenizer, rows), exact, untouched)
                    figures |= {"realised": report.realised, "noise": report.noise}
                    figures["score"] = 100 * _score(folder, tokenizer, rows)
                    for name, value in figures.items():
                        found[wanted, form][name].append(value)
                    print(f"seed {seed}  std {wanted:g}  {form}  {figures}", file=sys.stderr, flush=True)
    _print(found, trained, len(rows), 100 * _score(INSTRUCT, tokenizer, rows))
    print(f"{time.perf_counter() - started:.0f} s in all", file=sys.stderr)


def _train(seed: int, folder: Path) -> tuple[Path, float]:
    """Train BASE for 40 steps with the SFT recipe's settings; return TUNED, fp32, and the std of its delta."""
    settings = ShadowSFTConfig(
        output_dir=str(folder), graft=False, seed=seed, max_steps=40, learning_rate=1e-4, report_to="none",
        per_device_train_batch_size=16, save_strategy="no", logging_strategy="no", use_cpu=True, disable_tqdm=True,
        lr_scheduler_type="cosine", warmup_steps=0.1, assistant_only_loss=False, activation_checkpointing=False,
    )  # fmt: skip
    data = Dataset.from_json(str(DATA / "sft.jsonl"), cache_dir=str(folder / "cache"))
    trainer = ShadowSFTTrainer(
        model=str(BASE), args=settings, train_dataset=data, processing_class=AutoTokenizer.from_pretrained(INSTRUCT)
    )
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    trainer.save_model()
    base, tuned = load_file(BASE / "model.safetensors"), load_file(folder / "model.safetensors")
    delta = torch.cat([(tuned[name].double() - base[name].double()).flatten() for name in base])
    return folder, float(delta.std())


def _grafts(tuned: Path, scale: float, seed: int, folder: Path) -> dict[str, Any]:
    """Return form -> (folder, report) of the delta times `scale` on INSTRUCT."""
    found = {}
    for form, given in FORMS.items():
        place = folder / form.replace(" ", "-")
        options: dict[str, Any] = {**given, "scale": scale, "seed": seed, "digest": "none", "progress": False}
        report = graft(base=BASE, instruct=INSTRUCT, tuned=tuned, output=place, **options)
        found[form] = place, report
    return found


def _model(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


@torch.inference_mode()
def _logits(folder: Path, tokenizer: Any, rows: list[Any], count: int = 150) -> torch.Tensor:
    """Return the logits, (tokens, vocabulary), fp32, at every token of `count` conversations with their answers."""
    model = _model(folder)
    found = []
    for row in rows[:: max(len(rows) // count, 1)]:
        answer = row["answer"] if isinstance(row["answer"], str) else row["answer"][0]
        chat = [*row["prompt"], {"role": "assistant", "content": answer}]
        ids = tokenizer.apply_chat_template(chat, return_tensors="pt", return_dict=True)["input_ids"]
        found.append(model(input_ids=ids).logits[0])
    return torch.cat(found)


def _compare(logits: torch.Tensor, exact: torch.Tensor, untouched: torch.Tensor) -> dict[str, float]:
    """Compare with the fp32 graft; the delta's own effect is what that differs from INSTRUCT by."""
    # The same number added to all logits of a token changes nothing: it is taken out.
    one, two, three = (part.double() - part.double().mean(-1, keepdim=True) for part in (logits, exact, untouched))
    apart, effect = one - two, two - three
    right, found = two.log_softmax(-1), one.log_softmax(-1)
    kl = (right.exp() * (right - found)).sum(-1)
    top = (one.argmax(-1) != two.argmax(-1)).double().mean()
    return {
        "rms": float(apart.square().mean().sqrt()),
        "max": float(apart.abs().max()),
        "relative": float(apart.norm() / effect.norm()),
        "kl": float(kl.mean()),
        "top": 100 * float(top),
    }


def _score(folder: Path, tokenizer: Any, rows: list[Any]) -> float:
    found = score(_model(folder), tokenizer, rows)
    return found.mean(found.kinds)


def _print(found: dict[tuple[float, str], Figures], trained: list[float], rows: int, untouched: float) -> None:
    print(f"`python benchmarks/precision.py {shlex.join(sys.argv[1:])}`".replace(" `", "`") + "\n")
    stds = ", ".join(f"{std:.3g}" for std in trained)
    print(f"Trainings: {len(trained)}, seeds from 0; std of their deltas before scaling: {stds}.")
    print(f"{rows} rows of data/sft-validation.jsonl; INSTRUCT untouched scores {untouched:.1f}.\n")
    print("| std of the delta | graft | realised | noise | RMS of logits | largest | of the delta's effect "
          "| KL | other top token, % | exact match, % |")  # fmt: skip
    print("|---|---|---|---|---|---|---|---|---|---|")
    names = ("realised", "noise", "rms", "max", "relative", "kl", "top", "score")
    for (std, form), figures in found.items():
        cells = [_spread(figures[name], 1 if name == "score" else None) for name in names]
        print(f"| {std:g} | {form} | {' | '.join(cells)} |")


def _spread(values: list[float], digits: int | None) -> str:
    def shown(value: float) -> str:
        return f"{value:.{digits}f}" if digits is not None else f"{value:.2g}"

    mean, low, high = (shown(value) for value in (sum(values) / len(values), min(values), max(values)))
    return mean if low == high else f"{mean} ({low} to {high})"


if __name__ == "__main__":
    main()
