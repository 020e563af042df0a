"""Trainings that are killed and resumed: the graft must be that of an undisturbed run, bit by bit."""

from __future__ import annotations

import itertools
import json
import random
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from family import Weights, read_file, read_model, same
from processes import Running, Tally, judge_message, litter, run, workplace

SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT)
SETTINGS = {
    "max_steps": 12, "save_steps": 3, "save_strategy": "steps", "per_device_train_batch_size": 4, "learning_rate": 1e-3,
    "bf16": False, "activation_checkpointing": False, "dataloader_pin_memory": False, "report_to": "none", "seed": 3,
    "use_cpu": True, "logging_steps": 6, "graft_overwrite": True, "max_length": 64,
}  # fmt: skip
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "SFT": ("sft", {}),
    "DPO": ("dpo", {"ref_policy": "grafted"}),
    "SFT, graft_every_save": ("sft", {"graft_every_save": True}),
    "DPO, LoRA": ("dpo", {"use_peft": True, "lora_r": 4, "lora_target_modules": "all-linear", "learning_rate": 1e-2}),
}


def kill_trainings(root: Path, count: int, *, seed: int = 0) -> Iterator[Tally]:
    """Kill `count` trainings, each kind and each signal in turn, and resume each until it ends."""
    import shadow_trl.recipes.run  # noqa: F401  # before the forks

    tally, source = Tally("kills of a training"), random.Random(seed)
    _prepare(root)
    wanted = {kind: _undisturbed(kind, root) for kind in KINDS} if count else {}
    for number in itertools.count():
        if tally.runs == count:
            break
        kind, sign = list(KINDS)[number % len(KINDS)], SIGNALS[number // len(KINDS) % len(SIGNALS)]
        right, seconds = wanted[kind]
        moment = source.uniform(0.1, 1.0) * seconds
        label = f"{kind}, {sign.name} after {moment:.2f} of {seconds:.2f} s"
        with workplace(root) as work:
            _one(tally, work, (kind, right, sign, moment), label)
    yield tally


def _one(tally: Tally, work: Path, what: tuple[str, Weights, signal.Signals, float], label: str) -> None:
    kind, right, sign, moment = what
    running = Running(_words(kind, work), work)
    running.at(moment, lambda: running.send(sign))
    ended = running.wait()
    tally.runs += ended.code != 0
    tally.facts["more had ended before"] += ended.code == 0
    judge_message(tally, label, ended, changed=(work / "run").exists() and any((work / "run").rglob("*.*")))
    found = _complete(work / "run")
    tally.facts["resumed from a checkpoint" if found else "began anew"] += 1
    again = run(_words(kind, work) + (["--resume_from_checkpoint", "true"] if found else []), work)
    if again.code != 0:
        tally.fault("lost", f"{label}: resumed from {found}: exit {again.code}: {again.err.strip()[-300:]}")
        return
    if not same(_result(work), right):
        tally.fault("lost", f"{label}: resumed from {found}: another graft than that of an undisturbed run")
    if litter(work):
        tally.fault("left", f"{label}: after the next run {litter(work)}")


def _result(work: Path) -> Weights:
    grafted = work / "run" / "grafted"
    return read_model(grafted)


def _complete(run: Path) -> list[str]:
    """Return the checkpoints of a run that can be resumed from, by looking at what is in them."""
    found = []
    for folder in sorted(run.glob("checkpoint-*")):
        try:
            json.loads((folder / "trainer_state.json").read_text())
            weights = [read_file(path) for path in folder.glob("*.safetensors")]
        except (OSError, ValueError):
            continue
        if weights and all((folder / name).is_file() for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth")):
            found.append(folder.name)
    return found


def _words(kind: str, work: Path) -> list[str]:
    command, more = KINDS[kind]
    home = work.parent
    values = {
        **SETTINGS, "model_name_or_path": str(home / "base"), "instruct_model": str(home / "instruct"),
        "dataset_name": str(home / f"{command}.jsonl"), "output_dir": "run", **more,
    }  # fmt: skip
    path = home / "run.yaml"
    path.write_text(json.dumps(values))  # JSON is YAML
    return [command, "--config", str(path)]


def _prepare(root: Path) -> None:
    from rows import write_rows
    from tiny import make_pair, preference_data, sft_data

    root.mkdir(parents=True, exist_ok=True)
    make_pair(root)
    write_rows(root / "sft.jsonl", list(sft_data()))
    write_rows(root / "dpo.jsonl", list(preference_data()))


def _undisturbed(kind: str, root: Path) -> tuple[Weights, float]:
    """Return the graft of two undisturbed runs, which must agree, and the seconds of one."""
    results = []
    for _ in range(2):
        with workplace(root) as work:
            ended = run(_words(kind, work), work)
            assert ended.code == 0, ended.err
            assert not litter(work), litter(work)
            results.append((_result(work), ended.seconds))
    assert same(results[0][0], results[1][0]), f"{kind} is not deterministic"
    return results[1]
