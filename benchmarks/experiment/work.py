"""Making cells: two at once on two cores, each in a process with one thread; what is there is not made again."""

from __future__ import annotations

import contextlib
import hashlib
import json
import multiprocessing
import shutil
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from designs import AFTER_SFT, Cell, folder_of, read_design, sft_run, training_of
from filelock import FileLock
from stored import to_dict

from shadow_trl.checkpoints.digests import file_digest
from shadow_trl.evaluation.measured import Measured, Settings
from shadow_trl.recipes.arms import RUNS, measure_arms, prepare_training, train_once
from shadow_trl.recipes.design import Design, Training
from shadow_trl.results.folder import whole_file


def run(todo: list[Cell], output: Path, workers: int) -> int:
    """Make the cells in their order; return 1 if one failed, after all others were made."""
    (output / "cells").mkdir(parents=True, exist_ok=True)
    started, failed = time.perf_counter(), 0
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, mp_context=context) as pool:
        waiting = {pool.submit(make, cell, output): cell for cell in todo}
        for number, done in enumerate(as_completed(waiting), start=1):
            cell, reason = waiting[done], done.exception()
            failed += reason is not None
            said = f"failed: {reason}" if reason is not None else f"{done.result():.0f} s"
            spent = time.perf_counter() - started
            print(f"{spent:6.0f} s  {number} of {len(todo)}  {cell.design} {cell.training}: {said}", flush=True)
    return int(failed > 0)


def make(cell: Cell, output: Path) -> float:
    """Make a cell unless it is there; return the seconds it took."""
    started = time.perf_counter()
    with _quiet(output / "logs" / cell.file):
        if cell.design == AFTER_SFT:
            _make_stages(output, int(cell.training.partition("_")[0].partition("-")[2]))
        design = read_design(cell.design, cell.source, output)
        training = training_of(design, cell.training)
        folder, file = folder_of(design, output), output / "cells" / cell.file
        options, record = prepare_training(design, training, folder, {})
        digest = _digest(design, record)
        if file.exists() and json.loads(file.read_text())["digest"] == digest:
            return 0.0
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(folder / f"{training.name}.lock"):  # another design may have the same training
            seconds = train_once(design, folder / RUNS / training.name, options, record, progress=False)
        models = [to_dict(model) for model in _measured(cell, design, training, folder)]
        found = {"digest": digest, "design": cell.design, "training": cell.training, "train": seconds, "models": models}
        file.parent.mkdir(parents=True, exist_ok=True)
        with whole_file(file) as new:
            new.write_text(json.dumps(found) + "\n", encoding="utf-8")
    return time.perf_counter() - started


def _measured(cell: Cell, design: Design, training: Training, folder: Path) -> Iterator[Measured]:
    known = [] if cell.first else [Measured(Settings("instruct"), {}, training.pair)]
    yield from measure_arms(design, training, folder, design.tried(), design.data.exams(), known, lambda text: None)


def _digest(design: Design, record: dict[str, Any]) -> str:
    """Return a digest of all that a cell depends on: its training, what is measured and on which rows."""
    measured = {
        name: file_digest(Path(value)) if name in ("rows", "validation_rows", "conversations", "preferences") else value
        for name, value in asdict(design).items()
        if value and name not in ("seeds", "learning_rates", "pairs", "config")
    }
    text = json.dumps([record, measured], sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()


def _make_stages(output: Path, seed: int) -> None:
    """Make what DPO starts from after SFT, of the core's SFT on the first pair."""
    from shadow_trl import graft

    run, folder = sft_run(output, seed), output / "after_sft" / str(seed)
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(folder / "made.lock"):
        if (folder / "made").exists():
            return
        for name, source in (("tuned", run), ("direct", run / "direct")):
            shutil.rmtree(folder / name, ignore_errors=True)
            # Without its manifest: it is the BASE of its own pair here.
            shutil.copytree(source, folder / name, ignore=shutil.ignore_patterns("shadow.json", "direct", "*.bin"))
        graft(
            base="data/nano-base", instruct="data/nano-instruct", tuned=str(run), output=str(folder / "shadow"),
            dtype="float32", overwrite=True,
        )  # fmt: skip
        (folder / "shadow" / "shadow.json").unlink()
        (folder / "made").touch()


@contextlib.contextmanager
def _quiet(log: Path) -> Iterator[None]:
    """Send what is printed inside the block to a file."""
    log = log.with_suffix(".log")
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("a", encoding="utf-8") as file, contextlib.redirect_stdout(file), contextlib.redirect_stderr(file):
        yield


def estimate(todo: list[Cell], output: Path, workers: int) -> str:
    """Time a few steps and one scoring of each design; return what is left, as a table with its sum."""
    lines = ["| design | cells | left | steps | seconds a cell | minutes left |", "|---|---|---|---|---|---|"]
    total = 0.0
    for name in dict.fromkeys(cell.design for cell in todo):
        own = [cell for cell in todo if cell.design == name]
        left = [cell for cell in own if not (output / "cells" / cell.file).exists()]
        design = read_design(name, own[0].source, output)
        if name == AFTER_SFT:  # as large as the core's pairs
            design = replace(design, pairs={"pair-1": ["data/nano-base", "data/nano-instruct"]})
        steps, seconds = _cost(design)
        total += seconds * len(left)
        lines.append(
            f"| {name} | {len(own)} | {len(left)} | {steps} | {seconds:.0f} | {seconds * len(left) / 60:.1f} |"
        )
    lines.append(f"\n{total / 60:.0f} minutes of one core, about {total / 60 / workers:.0f} with {workers} at once.")
    return "\n".join(lines)


def _cost(design: Design) -> tuple[int, float]:
    """Return the steps of a training and the seconds of a cell, from trainings of 1 and 4 steps and one scoring."""
    from shadow_trl.evaluation.models import load, tokenizer_and_ends
    from shadow_trl.recipes.data import load_data
    from shadow_trl.recipes.run import train_stage

    training = next(design.trainings())
    spent: dict[int, float] = {}
    with tempfile.TemporaryDirectory() as folder, _quiet(Path(folder, "steps")):
        for steps in (1, 1, 4):  # the first warms up
            short = replace(training, values={**training.values, "max_steps": steps, "compare_direct": False})
            options = short.options(design, Path(folder, f"{len(spent)}-{steps}-{time.time_ns()}"))
            data = load_data(options)
            started = time.perf_counter()
            train_stage(design.recipe, options, data)
            spent[steps] = time.perf_counter() - started
        tokenizer, ends = tokenizer_and_ends(training.instruct)
        model = load(training.instruct, dtype=design.score_dtype)
        started = time.perf_counter()
        for exam in design.data.exams().values():
            exam.take(model, tokenizer, ends)
        scored = time.perf_counter() - started
    args = options.training
    rows = len(data["train_dataset"])
    whole = round(-(-rows // args.per_device_train_batch_size) * training_epochs(training))
    step = (spent[4] - spent[1]) / 3
    one = spent[1] + (whole - 1) * step
    tried = len(design.tried())
    plain = sum(settings.arm == "shadow" for settings, _ in design.tried())
    return whole, one * (1 + design.direct) + scored * (tried + design.direct * plain)


def training_epochs(training: Training) -> float:
    """Return the passes over the data of a training."""
    return float(training.values.get("num_train_epochs", 3))
