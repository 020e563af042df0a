"""A run that exists, tried at several scales and on several modules: no training, no folders of weights."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from accelerate import PartialState

from ..checkpoints.hub import Source, output_folder
from ..errors import ConfigError, ends_with, list_names
from ..grafting.options import declared
from ..results.folder import OutputFolder, check_free, recover
from ..runtime.processes import run_on_main, say, together
from .comparison import Comparison, choose_target
from .comparison_report import write_comparison
from .exam import Exam, function_named
from .harness import harness_tasks
from .likelihood import read_conversations, read_pairs
from .measured import Measured
from .models import tokenizer_and_ends
from .scoring import Row, read_rows
from .steps import PAIR, WRITTEN_WITH, Sources, Step, check_all, measure, steps_of, tried_with
from .trained import Trained, read_trained

OF_DTYPE = "the dtype that was asked for"
OF_THE_RUN = "the dtype and rounding that the run's manifest records, INSTRUCT's dtype where there is none"


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

    @property
    def chosen_on(self) -> str:
        """What the settings are chosen on, in words."""
        if self.validation_rows is None:
            return "half of the prompts"
        more = self.conversations or self.preferences or self.tasks
        return "the validation rows" + (" and half of the other data" if more else "")

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
    graft_dtype: str | None = None,
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
        graft_dtype: as `dtype` of `graft`, rounded to nearest. Default: as the run in `tuned` writes its graft, which
            its manifest tells; `auto` where there is none.
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
            trainings, notes = run_on_main(state, lambda: _trainings(sources, plan), what="measuring the weights")
            take = partial(measure, exams=exams, tokenizer=tokenizer, ends=ends, dtype=dtype)
            models = []
            for number, step in enumerate(plan, start=1):
                if progress:
                    say(f"{number} of {len(plan)}: {' '.join([step.settings.arm, step.settings.words()]).strip()}")
                models.append(take(step, device=device or state.device))
            told = OF_DTYPE if graft_dtype is not None else OF_THE_RUN
            notes = [note_of_splits(data, exams), note_of_weights(models, said=told), *_notes(sources), *notes]
            comparison = Comparison(
                models, metrics, *chosen, within=within, margin=margin, chosen_on=data.chosen_on,
                notes=[*notes, *(f"Warning: {warning}" for warning in warnings)],
                rows={split: len(exam) for split, exam in exams.items()}, trainings=trainings,
            )  # fmt: skip
            comparison = replace(comparison, command=graft_command(comparison, sources, plan))
            if place is not None:
                write_comparison(comparison, place.part)
                place.commit()
    return comparison


def _trainings(sources: Sources, plan: Sequence[Step]) -> tuple[list[Trained], list[str]]:
    """Return what is known of the trainings of TUNED and of INSTRUCT, and notes on what could not be measured."""
    step = next(step for step in plan if step.settings.arm == "shadow")
    assert step.grafts is not None
    direct = [] if sources.direct is None else [read_trained(sources.direct, "instruct", PAIR)]
    tuned, note = read_trained(sources.tuned, "base", PAIR).measured(step.grafts)
    return [tuned, *direct], [] if note is None else [note]


def _notes(sources: Sources) -> list[str]:
    notes = ["One training: the intervals are over rows alone. Another seed may train another model."]
    if sources.direct is None:
        notes.append("INSTRUCT tuned directly was not compared: give it with --direct.")
    return notes


def note_of_splits(data: Data, exams: dict[str, Exam]) -> str:
    """Say which rows chose the settings and which are the test."""
    sizes = {name: len(exam) for name, exam in exams.items()}
    how = data.chosen_on[0].upper() + data.chosen_on[1:]
    how += ", picked by their digests," if data.validation_rows is None else ""
    return f"{how} chose the settings ({sizes['validation']:,} rows); the other {sizes['test']:,} rows are the test."


def note_of_weights(models: Sequence[Measured], *, said: str) -> str:
    """Say in which dtype the weights of each arm are; `said` tells why those of the grafts are."""
    found = [f"{model.settings.arm} in {model.precision}" for model in models if model.dtype is not None]
    return f"Weights: {', '.join(dict.fromkeys(found))}. The grafts have {said}."


def graft_command(comparison: Comparison, sources: Sources, plan: Sequence[Step]) -> str | None:
    """Return the command that writes the chosen graft, None where no settings meet the condition."""
    chosen = comparison.selected.get("shadow")
    if chosen is None or chosen.scale is None or chosen.modules is None:
        return None
    options = next(step.options for step in plan if step.settings == chosen)
    words = ["shadow-trl", "graft"]
    for name, source in (("base", sources.base), ("instruct", sources.instruct), ("tuned", sources.tuned)):
        words += [f"--{name}", str(source)] if source is not None else []
    # What was measured is dense, whatever TUNED is.
    words += ["--scale", repr(chosen.scale), "--modules", chosen.modules, "--format", "model"]
    for name in WRITTEN_WITH:
        value = getattr(options, name)
        if value != declared()[name].default:
            words += [f"--{name}"] if value is True else [f"--{name}", str(value)]
    return shlex.join([*words, "--output", "grafted"])
