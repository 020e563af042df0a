"""`compare --config`: arms trained with the same data, seeds and rates, then measured side by side."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

from accelerate import PartialState

from ..checkpoints.digests import weight_digests
from ..checkpoints.hub import locate, output_folder
from ..checkpoints.json_files import read_json
from ..checkpoints.manifest import versions
from ..errors import ConfigError
from ..evaluation.comparison import Comparison, choose_target
from ..evaluation.comparison_report import write_comparison
from ..evaluation.measured import Measured
from ..evaluation.models import tokenizer_and_ends
from ..evaluation.scales import OF_DTYPE, note_of_splits, note_of_weights
from ..evaluation.steps import WRITTEN_WITH, Sources, Step, Tried, check_all, measure, steps_of
from ..evaluation.trained import Trained, read_trained, rows_seen
from ..operations.in_memory import open_grafts
from ..results.folder import whole_file
from ..results.lock import RunLock
from ..results.written import tells_what_is_written
from ..runtime.processes import say
from .data import load_data
from .design import Design, Training
from .options import Options
from .record import check_record, record_of
from .run import DIRECT_FOLDER, find_models, prepare, train_stage

DONE = "training.json"
"""In the folder of a training that is complete: the seconds of each step, and the rows that it went through."""
RUNS = "runs"


def compare_arms(config: Path, output: str | Path, *, progress: bool = True) -> Comparison:
    """Train every arm that the YAML file names, measure all of them, and write the comparison.

    Trainings that an earlier call has completed in `output` with the same options, data, models and versions are used
    again; one that was interrupted is made anew.

    Args:
        config: see `Design`.
        output: folder of `runs/`, comparison.json, comparison.md and comparison.html.
        progress: whether each step is named. Default True.

    Raises:
        InputError: bad input, found before the first training.
    """
    folder = output_folder(output)
    with tells_what_is_written(folder, instead=True):
        design = Design.read(config)
        state = PartialState()
        if state.num_processes > 1:
            raise ConfigError(f"compare works in one process, and {state.num_processes} were started. Start one.")
        choose_target(design.data.exams()["test"].metrics, design.target, design.keep)
        tried = design.tried()
        trainings = list(design.trainings())
        digests: dict[str, Any] = {}
        prepared = [prepare_training(design, training, folder, digests) for training in trainings]
        for options, _ in prepared:
            if design.chat_vector and options.model.use_peft:
                raise ConfigError(
                    "chat_vector adds INSTRUCT - BASE to TUNED, which use_peft makes an adapter. Leave one out."
                )
        written = prepared[0][0].training.graft_options()
        _check_grafts(trainings, tried, folder, {name: written[name] for name in WRITTEN_WITH if name in written})
        lock = RunLock(folder)
        lock.acquire()
        try:
            for training, ready in zip(trainings, prepared, strict=True):
                train_once(design, folder / RUNS / training.name, *ready, progress)
            found = _compared(design, trainings, folder, progress)
            write_comparison(found, folder)
        finally:
            lock.release()
    return found


def _compared(design: Design, trainings: list[Training], folder: Path, progress: bool) -> Comparison:
    """Measure the arms of all trainings, which are complete."""
    exams, tell = design.data.exams(), say if progress else lambda text: None
    models: list[Measured] = []
    for training in trainings:
        models += measure_arms(design, training, folder, design.tried(), exams, models, tell)
    models.sort(key=lambda model: model.settings.arm != "instruct")
    trained, unmeasured = _trained(trainings, folder)
    told = f"the dtype and rounding that {design.config} says" if design.graft_dtype is None else OF_DTYPE
    notes = [note_of_splits(design.data, exams), note_of_weights(models, said=told), _number(trainings), *unmeasured]
    metrics = exams["test"].metrics
    return Comparison(
        models, metrics, *choose_target(metrics, design.target, design.keep), within=design.within,
        margin=design.margin, chosen_on=design.data.chosen_on, notes=notes,
        rows={split: len(exam) for split, exam in exams.items()}, trainings=trained,
    )  # fmt: skip


def _check_grafts(trainings: list[Training], tried: Tried, folder: Path, written: Mapping[str, Any]) -> None:
    """Check the grafts of each pair, with BASE in the place of TUNED, which has the same weights by name."""
    for base, instruct in dict.fromkeys((training.base, training.instruct) for training in trainings):
        tokenizer_and_ends(instruct)
        with ExitStack() as opened:
            steps = steps_of(Sources(instruct, base, base), tried, folder, opened, written)
            check_all(steps, folder, tried[0][1]["scale"])


def _trained(trainings: list[Training], folder: Path) -> tuple[list[Trained], list[str]]:
    """Return what each training cost and changed, and notes on what could not be measured."""
    found, notes = [], []
    for training in trainings:
        run = folder / RUNS / training.name
        done = read_json(run / DONE)
        made = {
            "learning_rate": training.learning_rate, "seed": training.seed, "guidance_power": training.guidance,
            "rows": done["rows"],
        }  # fmt: skip
        spent = done["seconds"]["train and graft"]
        base = read_trained(run, "base", training.pair, seconds=spent, ref_policy=training.ref_policy, **made)
        with open_grafts(base=training.base, instruct=training.instruct, tuned=run, beside=run / "measured") as grafts:
            base, note = base.measured(grafts)
        found.append(base)
        notes += [] if note is None else [note]
        if training.values["compare_direct"]:
            spent = done["seconds"]["tune INSTRUCT directly"]
            found.append(read_trained(run / DIRECT_FOLDER, "instruct", training.pair, seconds=spent, **made))
    return found, notes


def _number(trainings: list[Training]) -> str:
    pairs = len({training.pair for training in trainings})
    seeds = len({training.seed for training in trainings})
    return f"Pairs: {pairs}. Seeds: {seeds}. The intervals are over trainings and rows."


def prepare_training(
    design: Design, training: Training, folder: Path, digests: dict[str, Any]
) -> tuple[Options, dict[str, Any]]:
    """Check a training; return its options and all that its weights depend on. `digests` keeps those of models."""
    run = folder / RUNS / training.name
    options = training.options(design, run)
    prepare(options)
    find_models(options)
    record = record_of(options)
    for side in (training.base, training.instruct):
        if side not in digests:
            digests[side] = weight_digests(side) or str(locate(side).path)
    record["models"] = {"base": digests[training.base], "instruct": digests[training.instruct]}
    record["versions"] = versions()
    record = json.loads(json.dumps(record))
    if (run / "options.json").exists():
        check_record(run, record)
    return options, record


def train_once(design: Design, run: Path, options: Options, record: dict[str, Any], progress: bool) -> dict[str, float]:
    """Make the training in `run` unless it is complete; return the seconds of its steps."""
    direct = run / DIRECT_FOLDER
    if (run / DONE).exists() and (direct.exists() or not options.recipe.compare_direct):
        return dict(read_json(run / DONE)["seconds"])
    shutil.rmtree(run, ignore_errors=True)
    if progress:
        say(f"Training {run.name}")
    data = load_data(options)
    _, _, seconds = train_stage(design.recipe, options, data, record=record)
    rows = rows_seen(run, None if options.streams else len(data["train_dataset"]))
    with whole_file(run / DONE) as new:
        new.write_text(json.dumps({"seconds": seconds, "rows": rows}) + "\n", encoding="utf-8")
    return seconds


def measure_arms(
    design: Design, training: Training, folder: Path, tried: Tried, exams: dict[str, Any],
    known: list[Measured], tell: Callable[[str], None],
) -> Iterator[Measured]:  # fmt: skip
    """Measure the arms of a training; INSTRUCT once a pair."""
    run = folder / RUNS / training.name
    direct = run / DIRECT_FOLDER
    made = str(direct) if design.direct and direct.exists() else None
    sources = Sources(training.instruct, str(run), training.base, made, design.chat_vector)
    tokenizer, ends = tokenizer_and_ends(training.instruct)
    with ExitStack() as opened:
        steps = steps_of(sources, tried, run / "measured", opened)
        for step in steps:
            here = _step_of(training, step)
            if any((model.settings, model.training) == (here.settings, (here.pair, here.seed)) for model in known):
                continue
            tell(f"{training.name}: {here.settings.arm} {here.settings.words()}")
            device = PartialState().device
            yield measure(here, exams=exams, tokenizer=tokenizer, ends=ends, dtype=design.score_dtype, device=device)


def _step_of(training: Training, step: Step) -> Step:
    """Return a step with what its model was trained with."""
    if step.grafts is None:
        return step._replace(pair=training.pair)
    policy = None if step.settings.arm == "direct" else training.ref_policy
    how: dict[str, Any] = {"ref_policy": policy, "guidance_power": training.guidance}
    settings = replace(step.settings, learning_rate=training.learning_rate, **how)
    return step._replace(settings=settings, pair=training.pair, seed=training.seed)
