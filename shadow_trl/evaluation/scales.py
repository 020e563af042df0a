"""A run that exists, tried at several scales and on several modules: no training, no folders of weights."""

from __future__ import annotations

import gc
import shlex
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from accelerate import PartialState

from ..checkpoints.hub import Source, output_folder
from ..errors import ConfigError, ends_with, list_names
from ..grafting.options import GraftOptions
from ..operations.in_memory import OpenGrafts, open_grafts
from ..results.folder import OutputFolder, check_free, check_place, recover
from ..runtime.processes import run_on_main, say, together
from .comparison import Comparison, Measured, Settings, choose_target
from .comparison_report import write_comparison
from .exam import Exam, Values, function_named
from .harness import harness_tasks
from .likelihood import read_conversations, read_pairs
from .models import load, tokenizer_and_ends
from .scoring import Row, read_rows

PAIR = "pair"
"""Name of the only pair."""


@dataclass(frozen=True)
class Sources:
    """The models of a comparison without training.

    Args:
        instruct: INSTRUCT.
        tuned: BASE after training.
        base: BASE; may be left out for an adapter that names it.
        direct: INSTRUCT after the same training, or None.
        chat_vector: whether TUNED + scale * (INSTRUCT - BASE) is an arm too: at scale 1 the graft's own sum. TUNED and
            `base` are full models then.
    """

    instruct: Source
    tuned: Source
    base: Source | None = None
    direct: Source | None = None
    chat_vector: bool = False


@dataclass(frozen=True)
class Data:
    """Held-out data by their files; each may be absent.

    Args:
        rows, conversations, preferences: files, see `Exam`.
        validation_rows: rows to choose the settings on. Default: half of the prompts of each file.
        functions: metrics, each as `module:function`.
        kept, batch_size, max_new_tokens: see `Exam`.
        tasks, task_folders: of lm-eval, see `harness.harness_tasks`; half of the rows of each for each split.
    """

    rows: str | None = None
    validation_rows: str | None = None
    conversations: str | None = None
    preferences: str | None = None
    functions: tuple[str, ...] = ()
    kept: tuple[str, ...] = ()
    batch_size: int = 64
    max_new_tokens: int = 64
    tasks: tuple[str, ...] = ()
    task_folders: tuple[str, ...] = ()

    def exams(self) -> dict[str, Exam]:
        """Read the files; return the exam of each split, `validation` and `test`.

        Raises:
            InputError: a file or a row that cannot be used, or too few of them.
        """
        if self.batch_size < 1 or self.max_new_tokens < 1:
            raise ConfigError("the batch size and the longest answer must be at least 1.")
        whole = Exam(
            read_rows(self.rows) if self.rows else (),
            read_conversations(self.conversations) if self.conversations else (),
            read_pairs(self.preferences) if self.preferences else (),
            {name: function_named(name) for name in self.functions},
            self.kept, self.batch_size, self.max_new_tokens, harness_tasks(self.tasks, self.task_folders),
        )  # fmt: skip
        if self.validation_rows is None:
            return whole.halves()
        rows = read_rows(self.validation_rows)
        if {row["kind"] for row in rows} != set(whole.kinds):
            kinds = ", ".join(dict.fromkeys(row["kind"] for row in rows))
            raise ConfigError(
                f"the rows to choose on and to test on are of other kinds: {kinds} in {self.validation_rows}, and "
                f"{', '.join(whole.kinds) or 'none'} in {self.rows}."
            )
        common = _prompts(rows) & _prompts(whole.rows)
        if common:
            raise ConfigError(
                f"{len(common)} prompts are in both {self.validation_rows} and {self.rows}: what settings are chosen "
                f"on cannot test them.\n{list_names(sorted(common))}"
            )
        return whole.halves(rows)


def _prompts(rows: Sequence[Row]) -> set[str]:
    return {" / ".join(str(message["content"]) for message in row["prompt"]) for row in rows}


@ends_with("Nothing was written.")
def compare_scales(
    sources: Sources,
    data: Data,
    *,
    output: Source,
    scales: Sequence[float] = (0.25, 0.5, 0.75, 1.0, 1.25),
    modules: Sequence[str] = ("all",),
    graft_dtype: str = "auto",
    target: str | None = None,
    keep: str | None = None,
    within: float = 1.0,
    margin: float = 2.0,
    dtype: str = "float32",
    device: Any = None,
    progress: bool = True,
) -> Comparison:
    """Measure INSTRUCT, the graft and INSTRUCT tuned directly at each scale; choose on validation, compare on test.

    Every graft is computed from the sources by the arithmetic of `graft`, so its scores are those of the written graft.

    Args:
        sources: the models.
        data: held-out data.
        output: folder of comparison.json, comparison.md and comparison.html; must not exist.
        scales: multipliers of what training changed.
        modules: choices of weights that receive the delta: `all`, `linear`, `attention`, `mlp` or an expression.
        graft_dtype: as `dtype` of `graft`. Default `auto`: what `graft` would write is what is measured.
        target: metric that is to be high. Default: `target` where there is one, else the first.
        keep: metric that must not get worse. Default: `kept` where there is one.
        within: by how much it may. Default 1.
        margin: points up to which a difference does not matter. Default 2.
        dtype: in which all models answer, `auto` for that of their weights. Default float32.
        device: where they answer. Default: the accelerator of this machine, else the CPU.
        progress: whether each model is named before it is measured. Default True.

    Returns:
        the comparison, as it was written.

    Raises:
        InputError: bad input, found before the first model is measured.
        GraftError: values that are not finite.
    """
    folder = output_folder(output)
    state = PartialState()
    with together(state, what="the comparison"):
        run_on_main(state, lambda: recover(folder), what="looking at the output")
        check_free(folder, overwrite=False)
        exams = data.exams()
        metrics = exams["test"].metrics
        chosen = choose_target(metrics, target, keep)
        tried = tried_with(scales, modules, graft_dtype)
        if not (within >= 0.0 and margin > 0.0):
            raise ConfigError("a comparison needs `within` of at least 0 and a margin above 0.")
        tokenizer, ends = tokenizer_and_ends(sources.instruct)
        with ExitStack() as opened:
            place = opened.enter_context(OutputFolder(folder)) if state.is_main_process else None
            plan = steps_of(sources, tried, folder, opened)
            warnings = check_all(plan, folder, scales[0])
            take = partial(measure, exams=exams, tokenizer=tokenizer, ends=ends, dtype=dtype)
            models = []
            for number, step in enumerate(plan, start=1):
                if progress:
                    say(f"{number} of {len(plan)}: {' '.join([step.settings.arm, step.settings.words()]).strip()}")
                models.append(take(step, device=device or state.device))
            notes = [*_notes(sources, data, exams), *(f"Warning: {warning}" for warning in warnings)]
            comparison = Comparison(models, metrics, *chosen, within=within, margin=margin, notes=notes)
            if place is not None:
                write_comparison(comparison, place.part, command=graft_command(comparison, sources, graft_dtype))
                place.commit()
    return comparison


class Step(NamedTuple):
    """One model to make and to measure; without `grafts` it is INSTRUCT."""

    settings: Settings
    grafts: OpenGrafts | None = None
    options: GraftOptions = GraftOptions()
    instruct: Source = ""
    pair: str = PAIR
    seed: int | None = None


def tried_with(scales: Sequence[float], modules: Sequence[str], dtype: str) -> list[tuple[Settings, GraftOptions]]:
    """Return what is tried with each tuned model, checked."""
    if not scales or not modules:
        raise ConfigError("a comparison needs at least one scale and one choice of modules.")
    return [
        (
            Settings("shadow", scale=scale, modules=name),
            GraftOptions(scale=scale, modules=name, format="model", dtype=dtype),
        )
        for name in dict.fromkeys(modules)
        for scale in dict.fromkeys(scales)
    ]


def steps_of(
    sources: Sources, tried: Sequence[tuple[Settings, GraftOptions]], folder: Path, opened: ExitStack
) -> list[Step]:
    """Open the models beside `folder` for as long as `opened`; return all steps, INSTRUCT first."""
    plan, instruct = [Step(Settings("instruct"), instruct=sources.instruct)], sources.instruct
    if sources.direct is not None:
        grafts = opened.enter_context(
            open_grafts(base=instruct, instruct=instruct, tuned=sources.direct, beside=folder)
        )
        # What direct tuning wrote, in fp32: rounding it to INSTRUCT's dtype is no part of it.
        plan += [
            Step(replace(one, arm="direct"), grafts, replace(how, dtype="float32"))
            for one, how in tried
            if one.arm == "shadow"
        ]
    grafts = opened.enter_context(open_grafts(base=sources.base, instruct=instruct, tuned=sources.tuned, beside=folder))
    plan += [Step(one, grafts, how) for one, how in tried]
    if sources.chat_vector:
        # The sides change places: INSTRUCT - BASE is what TUNED receives.
        grafts = opened.enter_context(
            open_grafts(base=sources.base, instruct=sources.tuned, tuned=instruct, beside=folder)
        )
        plan += [Step(replace(one, arm="chat-vector"), grafts, how) for one, how in tried if one.arm == "shadow"]
    return plan


def check_all(plan: Sequence[Step], folder: Path, scale: float) -> list[str]:
    """Check every graft of one scale, since the others differ in nothing that can be wrong; return the warnings."""
    warnings: dict[str, None] = {}
    for step in plan:
        if step.grafts is not None and step.settings.scale == scale:
            folders, found = step.grafts.check(step.options)
            check_place(folder, folders)
            # INSTRUCT is its own BASE where it was tuned directly.
            warnings |= dict.fromkeys(found if step.settings.arm == "shadow" else ())
    return list(warnings)


def measure(
    step: Step, *, exams: dict[str, Exam], tokenizer: Any, ends: list[int], dtype: str, device: Any
) -> Measured:
    """Make and measure a model; only one is in memory at a time."""
    started = time.perf_counter()
    source = step.instruct if step.grafts is None else step.grafts.graft(step.options)
    model = load(source, dtype=dtype, device=device)
    del source
    made = time.perf_counter()
    values: dict[str, Values] = {split: one.take(model, tokenizer, ends) for split, one in exams.items()}
    del model
    gc.collect()
    seconds = {"make": round(made - started, 2), "score": round(time.perf_counter() - made, 2)}
    return Measured(step.settings, values, step.pair, step.seed, seconds)


def _notes(sources: Sources, data: Data, exams: dict[str, Exam]) -> list[str]:
    notes = [
        note_of_halves(data, exams),
        "One training: the intervals are over rows alone. Another seed may train another model.",
    ]
    if sources.direct is None:
        notes.append("INSTRUCT tuned directly was not compared: --direct names it.")
    return notes


def note_of_halves(data: Data, exams: dict[str, Exam]) -> str:
    """Say which rows chose the settings and which are the test."""
    sizes = {name: len(exam.rows) + len(exam.conversations) + len(exam.pairs) for name, exam in exams.items()}
    how = "Half of the prompts, chosen by their digests," if data.validation_rows is None else "The validation rows"
    return f"{how} chose the settings ({sizes['validation']:,} rows); the other {sizes['test']:,} rows are the test."


def graft_command(comparison: Comparison, sources: Sources, graft_dtype: str = "auto") -> str | None:
    """Return the command that writes the chosen graft, None where no settings meet the condition."""
    chosen = comparison.selected.get("shadow")
    if chosen is None or chosen.scale is None or chosen.modules is None:
        return None
    words = ["shadow-trl", "graft"]
    for name, source in (("base", sources.base), ("instruct", sources.instruct), ("tuned", sources.tuned)):
        words += [f"--{name}", str(source)] if source is not None else []
    # What was measured is dense, whatever TUNED is.
    words += ["--scale", repr(chosen.scale), "--modules", chosen.modules, "--format", "model"]
    words += ["--dtype", graft_dtype] if graft_dtype != "auto" else []
    return shlex.join([*words, "--output", "grafted"])
