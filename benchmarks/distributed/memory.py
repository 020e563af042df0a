"""DPO with `ref_policy="instruct"` beside TRL's with its adapter off: memory and time of a step under each engine."""

from __future__ import annotations

import argparse
import shutil
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import inputs
import metered
from ranks import in_processes

ARMS = {
    "trl": {"plain": True},
    "shadow": {"ref_policy": "instruct"},
}
MIB = 2**20


def measure(folder: Path, options: argparse.Namespace) -> Iterator[str]:
    """Train both arms in turns under each engine; yield the lines of the tables."""
    cut = range(2 * options.length, 2 * options.length + 1)  # to `length` by the trainers
    made = inputs.make(folder, hidden=options.hidden, layers=options.layers, rows=options.rows, answers=cut)
    yield f"A model of {made.bytes / 1e9:.2f} GB in {options.processes} processes, {options.length} tokens, batch 1.\n"
    yield "| engine | | loading, MiB | reference values, MiB | training, MiB | step, CPU s | step, s |"
    yield "|---|---|---|---|---|---|---|"
    ratios = []
    for engine in options.engines:
        found: dict[str, list[dict[str, float]]] = {arm: [] for arm in ARMS}
        for _ in range(options.rounds):
            for arm, how in ARMS.items():
                found[arm].append(_run(made, folder / "out", engine, options, **how))
        for arm, rounds in found.items():
            yield f"| {engine} | {arm} | " + " | ".join(_cell([one.get(key) for one in rounds]) for key in _KEYS) + " |"
        ratios += _ratios(engine, found, made.bytes / MIB, options.processes)
    yield "\n| engine | | measured | goal |\n|---|---|---|---|"
    yield from ratios


_KEYS = ("loading", "reference", "training", "cpu", "wall")


def _run(made: inputs.Inputs, out: Path, engine: str, options: argparse.Namespace, **how: Any) -> dict[str, float]:
    settings: dict[str, Any] = {
        "lora": True, "rows": str(made.rows["dpo"]), "max_length": options.length, "max_steps": options.rows // 2,
        "per_device_train_batch_size": 1, "learning_rate": 1e-4, **({} if "plain" in how else {"graft": False}), **how,
    }  # fmt: skip
    ends = in_processes(
        metered.run, engine, "dpo", made.pair, str(out), count=options.processes, limit=options.limit, **settings
    )
    shutil.rmtree(out, ignore_errors=True)
    for end in ends:
        if end.error:
            raise RuntimeError(f"{engine}: {end.error}")
    peaks = {part: max(end.value["peaks"][part] for end in ends) for part in ends[0].value["peaks"]}
    steps = [end.value["steps"][1:] for end in ends]  # the first one allocates
    cpu, wall = (max(statistics.median(one[place] for one in rank) for rank in steps) for place in (0, 1))
    return {**peaks, "cpu": cpu, "wall": wall}


def _cell(values: list[float | None]) -> str:
    known = [value for value in values if value is not None]
    return f"{statistics.median(known):.4g}" if known else ""


def _ratios(engine: str, found: dict[str, list[dict[str, float]]], model: float, processes: int) -> Iterator[str]:
    def compared(key: str) -> str:
        ratios = [one[key] / other[key] for one, other in zip(found["shadow"], found["trl"], strict=True)]
        low, middle, high = min(ratios), statistics.median(ratios), max(ratios)
        return f"{middle:.3f}" + (f" ({low:.3f} to {high:.3f})" if len(ratios) > 1 else "")

    share = 1 if engine == "ddp" else processes
    if engine.startswith("zero") and engine != "zero3":
        share = 1  # ZeRO-1 and ZeRO-2 share out no weights
    peak = statistics.median(one["reference"] for one in found["shadow"])
    yield (
        f"| {engine} | reference values / shards of policy and reference ({2 * model / share:.0f} MiB) "
        f"| {peak * share / (2 * model):.3f} | 1.10 |"
    )
    yield f"| {engine} | training, shadow / TRL | {compared('training')} | 1.02 |"
    for key, name in (("cpu", "CPU s"), ("wall", "s")):
        yield f"| {engine} | step ({name}), shadow / TRL | {compared(key)} | 1.02 |"
