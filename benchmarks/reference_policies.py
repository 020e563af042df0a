"""The four reference policies of Shadow-DPO on the embedded pair: where each starts, and what each trains.

    python benchmarks/reference_policies.py --json docs/reference-policies.json --plot docs/reference-policies.svg
    python benchmarks/reference_policies.py --read docs/reference-policies.json --plot docs/reference-policies.svg

For every seed: Shadow-SFT on BASE, then Shadow-DPO with each `ref_policy`, from BASE and from the folder of SFT, at
each learning rate; the graft of every run is scored on the test rows. The second form draws and prints what the first
measured. Some ten minutes on one core; offline.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import statistics
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
POLICIES = ("init", "base", "instruct", "grafted")
STARTS = ("base", "sft")
KEPT = ("t_rule", "rule", "skill", "refuse")
Record = dict[str, Any]
_SCORED: dict[str, dict[str, float]] = {}


def settings(folder: Path, seed: int, **changes: Any) -> dict[str, Any]:
    """Return the arguments that both stages share: those of recipes/configs/nano, in float32."""
    return {
        "output_dir": str(folder),
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "max_length": 256,
        "lr_scheduler_type": "linear",
        "per_device_train_batch_size": 32,
        "per_device_eval_batch_size": 64,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "logging_strategy": "no",
        "graft_dtype": "float32",
        "seed": seed,
        **changes,
    }


def rows(name: str, folder: Path) -> Any:
    """Return the rows of a file in data/."""
    from datasets import Dataset

    return Dataset.from_json(str(ROOT / "data" / name), cache_dir=str(folder / "cache"))


def train_sft(folder: Path, seed: int) -> None:
    """Run the SFT stage of the embedded pair into `folder`."""
    from shadow_trl import ShadowSFTConfig, ShadowSFTTrainer

    ShadowSFTTrainer(
        model=str(ROOT / "data/nano-base"),
        instruct_model=str(ROOT / "data/nano-instruct"),
        args=ShadowSFTConfig(**settings(folder, seed, learning_rate=1e-4, num_train_epochs=1)),
        train_dataset=rows("sft.jsonl", folder.parent),
    ).train()


def train_dpo(start: Path, folder: Path, seed: int, policy: str, learning_rate: float) -> Record:
    """Run the DPO stage; return the margin over all pairs before it, the delta it adds, and the graft's scores."""
    from shadow_trl import ShadowDPOConfig, ShadowDPOTrainer

    args = ShadowDPOConfig(
        **settings(folder, seed, learning_rate=learning_rate, num_train_epochs=1, beta=0.1, ref_policy=policy)
    )
    data = rows("preferences.jsonl", folder.parent)
    trainer = ShadowDPOTrainer(
        model=str(start),
        instruct_model=str(ROOT / "data/nano-instruct"),
        args=args,
        train_dataset=data,
        eval_dataset=data,
    )
    before = {name: weight.detach().double().clone() for name, weight in trainer.model.named_parameters()}
    first = trainer.evaluate()
    trainer.train()
    delta = {name: weight.detach().double() - before[name] for name, weight in trainer.model.named_parameters()}
    return {
        "margin": first["eval_rewards/margins"],
        "loss": first["eval_loss"],
        "delta": delta,
        "digest": hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest(),
        "scores": score_graft(folder / "grafted"),
    }


def score_graft(folder: Path) -> dict[str, float]:
    """Return exact match in percent, kind by kind, on data/dpo-test.jsonl; equal bytes are scored once."""
    digest = hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
    if digest in _SCORED:
        return _SCORED[digest]
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from shadow_trl.evaluation.scoring import read_rows, score

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    found = score(model, tokenizer, read_rows(ROOT / "data/dpo-test.jsonl"), batch_size=256, max_new_tokens=16)
    _SCORED[digest] = {kind: 100 * found.share(kind) for kind in found.kinds}
    return _SCORED[digest]


def cosine(one: dict[str, Any], other: dict[str, Any]) -> float:
    """Return the cosine of two deltas over all weights."""
    product = sum(float((one[name] * other[name]).sum()) for name in one)
    return product / (norm(one) * norm(other))


def norm(delta: dict[str, Any]) -> float:
    """Return the Euclidean norm of a delta over all weights."""
    return math.sqrt(sum(float((weight * weight).sum()) for weight in delta.values()))


def measure(seeds: Iterable[int], learning_rates: Iterable[float]) -> list[Record]:
    """Run everything and return one record a run."""
    import torch

    torch.set_num_threads(1)  # a model of 0.9 million weights is slower with more
    records = []
    for seed in seeds:
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            train_sft(folder / "sft", seed)
            starts = {"base": ROOT / "data/nano-base", "sft": folder / "sft"}
            records.append(
                {"start": "sft", "policy": "none", "seed": seed, "scores": score_graft(starts["sft"] / "grafted")}
            )
            for start, rate in ((start, rate) for start in STARTS for rate in learning_rates):
                deltas: dict[str, Any] = {}
                for policy in POLICIES:
                    record = train_dpo(starts[start], folder / f"{start}-{rate}-{policy}", seed, policy, rate)
                    deltas[policy] = record.pop("delta")
                    record.update(norm=norm(deltas[policy]), cosine=cosine(deltas[policy], deltas["init"]))
                    records.append({"start": start, "policy": policy, "seed": seed, "rate": rate, **record})
                    print(f"seed {seed}, from {start}, {rate:g}, {policy}: margin {record['margin']:+.3f}", flush=True)
    return records


def grouped(records: list[Record]) -> dict[tuple[str, float, str], list[Record]]:
    """Return the records of the DPO runs by start, learning rate and policy, each list in the order of seeds."""
    groups: dict[tuple[str, float, str], list[Record]] = defaultdict(list)
    for record in records:
        if record["policy"] in POLICIES:
            groups[record["start"], record["rate"], record["policy"]].append(record)
    return groups


def kept(scores: dict[str, float]) -> float:
    """Return the mean over the kinds of rows that training did not show."""
    return statistics.mean(scores[kind] for kind in KEPT)


SHOWN: dict[str, Callable[[dict[str, float]], float]] = {
    "target": lambda scores: scores["target"],
    "in style": lambda scores: scores["in style"],
    "kept": kept,
}


def spread(values: list[float], digits: int) -> str:
    """Return mean and standard deviation over the seeds as text."""
    deviation = statistics.stdev(values) if len(values) > 1 else 0.0
    return f"{statistics.mean(values):.{digits}f} ± {deviation:.{digits}f}"


def table(records: list[Record]) -> str:
    """Return the Markdown table of all groups: mean and standard deviation over the seeds."""
    lines = [
        "| start | learning rate | ref_policy | margin before | loss before | norm of the delta | cosine with init | "
        "target, % | in style, % | kept, % |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for (start, rate, policy), group in grouped(records).items():
        cells = [
            spread([record["margin"] for record in group], 3),
            spread([record["loss"] for record in group], 3),
            spread([record["norm"] for record in group], 4),
            spread([record["cosine"] for record in group], 4),
            *(spread([value(record["scores"]) for record in group], 1) for value in SHOWN.values()),
        ]
        lines.append(f"| {start} | {rate:g} | {policy} | {' | '.join(cells)} |")
    starts = [record["scores"] for record in records if record["policy"] == "none"]
    cells = [spread([value(scores) for scores in starts], 1) for value in SHOWN.values()]
    lines.append(f"| sft | graft before DPO | | | | | | {' | '.join(cells)} |")
    return "\n".join(lines)


def differences(records: list[Record]) -> str:
    """Return how each policy differs from init on the same seeds, and which policies trained the same bytes."""
    columns = " | ".join(f"{name} - init's, points" for name in SHOWN)
    lines = [f"| start | learning rate | ref_policy | {columns} | same bytes as |", "|---|---|---|---|---|---|---|"]
    groups = grouped(records)
    for (start, rate, policy), group in groups.items():
        if policy == "init":
            continue
        pairs = list(zip(group, groups[start, rate, "init"], strict=True))
        apart = [
            spread([value(one["scores"]) - value(other["scores"]) for one, other in pairs], 2)
            for value in SHOWN.values()
        ]
        same = []
        for name in POLICIES[: POLICIES.index(policy)]:
            both = zip(group, groups[start, rate, name], strict=True)
            if equal := sum(one["digest"] == other["digest"] for one, other in both):
                same.append(f"{name} ({equal} of {len(group)})")
        lines.append(f"| {start} | {rate:g} | {policy} | {' | '.join(apart)} | {', '.join(same) or '-'} |")
    return "\n".join(lines)


def draw(records: list[Record], file: Path) -> None:
    """Draw, for DPO after SFT, the margin before training, and target and style after it, one dot a seed."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    mpl.rcParams["svg.hashsalt"] = "reference-policies"  # the same figure gives the same bytes
    groups = grouped(records)
    rates = sorted({rate for start, rate, _ in groups if start == "sft"})
    figure = Figure(figsize=(9, 3.2 * len(rates)), layout="constrained")
    values = {}
    for rate in rates:
        runs = [groups["sft", rate, policy] for policy in POLICIES]
        values[f"margin before training, lr {rate:g}"] = [[record["margin"] for record in group] for group in runs]
        for name in ("target", "in style"):
            values[f"{name} after DPO, %, lr {rate:g}"] = [[r["scores"][name] for r in group] for group in runs]
    panels = figure.subplots(len(rates), 3, squeeze=False).flatten()
    for panel, (title, columns) in zip(panels, values.items(), strict=True):
        for place, column in enumerate(columns):
            panel.plot([place] * len(column), column, "o", color="tab:blue", alpha=0.5, markersize=5)
            panel.plot([place - 0.25, place + 0.25], [statistics.mean(column)] * 2, color="black", linewidth=1.5)
        panel.set(title=title, xticks=range(len(POLICIES)), xticklabels=POLICIES, xlim=(-0.5, len(POLICIES) - 0.5))
        if "%" in title:
            panel.set_ylim(0, 100)
        else:
            panel.axhline(0.0, color="grey", linewidth=0.8, linestyle=":")
    figure.savefig(file, metadata={"Date": None} if file.suffix == ".svg" else None)


def main() -> None:
    """Measure or read, then print the tables and draw the figure."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--learning_rates", type=float, nargs="+", default=[5e-5])
    parser.add_argument("--json", type=Path, help="file to write the records to")
    parser.add_argument("--read", type=Path, help="file of records to show instead of measuring")
    parser.add_argument("--plot", type=Path, help="image file; needs matplotlib")
    options = parser.parse_args()
    if options.read:
        records = json.loads(options.read.read_text(encoding="utf-8"))
    else:
        records = measure(options.seeds, options.learning_rates)
    if options.json:
        options.json.write_text(json.dumps(records, indent=1) + "\n", encoding="utf-8")
    print(f"\n{table(records)}\n\n{differences(records)}")
    if options.plot:
        draw(records, options.plot)


if __name__ == "__main__":
    main()
