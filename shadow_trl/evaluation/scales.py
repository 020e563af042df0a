"""A run that exists, tried at several scales and on several modules: no training, no folders of weights."""

from __future__ import annotations

import gc
import shlex
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from accelerate import PartialState

from ..checkpoints.checkpoint import Checkpoint
from ..checkpoints.hub import Source, local_folder, output_folder
from ..checkpoints.manifest import GRAFTED_FOLDER, read_manifest
from ..errors import ConfigError, ends_with, list_names
from ..grafting.files import main_dtype
from ..grafting.options import GraftOptions, declared
from ..operations.in_memory import MemoryGraft, OpenGrafts, open_grafts
from ..results.folder import OutputFolder, check_free, check_place, recover
from ..runtime.processes import say
from .comparison import Comparison, Measured, Settings, choose_target
from .comparison_report import write_comparison
from .exam import Exam, Values, function_named
from .likelihood import read_conversations, read_pairs
from .models import load, tokenizer_and_ends
from .scoring import Row, read_rows
from .trained import Trained, read_trained

PAIR = "pair"
"""Name of the only pair."""

WRITTEN_WITH = ("dtype", "rounding", "seed", "vocab", "untie")
"""Options of a graft that every arm has from the run; its scale and modules are what is compared."""

OF_DTYPE = "the dtype that was asked for"
OF_THE_RUN = "the dtype and rounding that the run's manifest tells, INSTRUCT's dtype where there is none"

Tried = Sequence[tuple[Settings, Mapping[str, Any]]]
"""What is tried with each tuned model: how it is shown, and what differs from the run's own graft."""


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
    """

    rows: str | None = None
    validation_rows: str | None = None
    conversations: str | None = None
    preferences: str | None = None
    functions: tuple[str, ...] = ()
    kept: tuple[str, ...] = ()
    batch_size: int = 64
    max_new_tokens: int = 64

    @property
    def chosen_on(self) -> str:
        """What the settings are chosen on, in words."""
        if self.validation_rows is None:
            return "half of the prompts"
        return "the validation rows" + (" and half of the other data" if self.conversations or self.preferences else "")

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
            self.kept, self.batch_size, self.max_new_tokens,
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
    recover(folder)
    check_free(folder, overwrite=False)
    exams = data.exams()
    metrics = exams["test"].metrics
    chosen = choose_target(metrics, target, keep)
    tried = tried_with(scales, modules, graft_dtype)
    if not (within >= 0.0 and margin > 0.0):
        raise ConfigError("a comparison needs `within` of at least 0 and a margin above 0.")
    state = PartialState()
    if state.num_processes > 1:
        raise ConfigError(f"compare works in one process, and {state.num_processes} were started. Start one.")
    tokenizer, ends = tokenizer_and_ends(sources.instruct)
    with ExitStack() as opened, OutputFolder(folder) as place:
        plan = steps_of(sources, tried, folder, opened)
        warnings = check_all(plan, folder, scales[0])
        trainings, unmeasured = _trainings(sources, plan)
        take = partial(measure, exams=exams, tokenizer=tokenizer, ends=ends, dtype=dtype)
        models = []
        for number, step in enumerate(plan, start=1):
            if progress:
                say(f"{number} of {len(plan)}: {' '.join([step.settings.arm, step.settings.words()]).strip()}")
            models.append(take(step, device=device or state.device))
        told = OF_DTYPE if graft_dtype is not None else OF_THE_RUN
        notes = [
            note_of_splits(data, exams),
            note_of_weights(models, said=told),
            *_notes(sources),
            *unmeasured,
            *(f"Warning: {warning}" for warning in warnings),
        ]
        comparison = Comparison(
            models, metrics, *chosen, within=within, margin=margin, notes=notes, chosen_on=data.chosen_on,
            rows={split: len(exam) for split, exam in exams.items()}, trainings=trainings,
        )  # fmt: skip
        comparison = replace(comparison, command=graft_command(comparison, sources, plan))
        write_comparison(comparison, place.part)
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


def tried_with(scales: Sequence[float], modules: Sequence[str], dtype: str | None) -> Tried:
    """Return what is tried with each tuned model, checked; `dtype` as `graft_dtype` of `compare_scales`."""
    if not scales or not modules:
        raise ConfigError("a comparison needs at least one scale and one choice of modules.")
    asked: dict[str, Any] = {} if dtype is None else {"dtype": dtype, "rounding": "nearest"}
    tried: list[tuple[Settings, dict[str, Any]]] = [
        (Settings("shadow", scale=scale, modules=name), {"scale": scale, "modules": name, **asked})
        for name in dict.fromkeys(modules)
        for scale in dict.fromkeys(scales)
    ]
    for _, changes in tried:
        GraftOptions(**changes)
    return tried


def as_written(tuned: Source, grafts: OpenGrafts) -> dict[str, Any]:
    """Return the options `WRITTEN_WITH` of the graft that the run in `tuned` has written, or would write.

    An adapter is added to INSTRUCT's weights unrounded: in memory that is the sum in fp32. Of what is no run nothing is
    known: {}.
    """
    run = local_folder(tuned)
    places = [] if run is None else [(run / GRAFTED_FOLDER, "graft"), (run, "run")]
    for folder, kind in places:
        manifest = read_manifest(folder)
        if manifest is None or manifest["kind"] != kind or "options" not in manifest:
            continue
        recorded = manifest["options"]
        known = {name: recorded[name] for name in WRITTEN_WITH if name in recorded}
        asked = GraftOptions(**known, format=recorded.get("format", "auto"))
        if manifest.get("form", asked.format if asked.format != "auto" else grafts.form(asked)) == "adapter":
            known |= {"dtype": "float32", "rounding": "nearest"}
        return known
    return {}


def steps_of(
    sources: Sources, tried: Tried, folder: Path, opened: ExitStack, written: Mapping[str, Any] | None = None
) -> list[Step]:
    """Open the models beside `folder` for as long as `opened`; return all steps, INSTRUCT first.

    All grafts have the options `written`, by default those of the run in `sources.tuned`, see `as_written`.
    """
    plan, instruct = [Step(Settings("instruct"), instruct=sources.instruct)], sources.instruct
    grafts = opened.enter_context(open_grafts(base=sources.base, instruct=instruct, tuned=sources.tuned, beside=folder))
    written = as_written(sources.tuned, grafts) if written is None else written
    shadow = [Step(one, grafts, GraftOptions(**{**written, **changes, "format": "model"})) for one, changes in tried]
    plain = [step for step in shadow if step.settings.arm == "shadow"]
    if sources.direct is not None:
        tuned = opened.enter_context(open_grafts(base=instruct, instruct=instruct, tuned=sources.direct, beside=folder))
        # What direct tuning wrote, in fp32: rounding it to INSTRUCT's dtype is no part of it.
        plan += [_like(step, "direct", tuned, "float32", rounding="nearest") for step in plain]
    plan += shadow
    if sources.chat_vector:
        # The sides change places: INSTRUCT - BASE is what TUNED receives. The dtype stays that of the graft.
        stored = main_dtype(Checkpoint.open(instruct).specs.values()) or "auto"
        sides = opened.enter_context(
            open_grafts(base=sources.base, instruct=sources.tuned, tuned=instruct, beside=folder)
        )
        plan += [
            _like(step, "chat-vector", sides, step.options.dtype if step.options.dtype != "auto" else stored)
            for step in plain
        ]
    return plan


def _like(step: Step, arm: str, grafts: OpenGrafts, dtype: str, **changes: Any) -> Step:
    """Return the step of another arm at the same scale and modules."""
    settings, options = replace(step.settings, arm=arm), replace(step.options, dtype=dtype, **changes)
    return step._replace(settings=settings, grafts=grafts, options=options)


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
    kind = source.dtype if isinstance(source, MemoryGraft) else None
    model = load(source, dtype=dtype, device=device)
    del source
    made = time.perf_counter()
    values: dict[str, Values] = {split: one.take(model, tokenizer, ends) for split, one in exams.items()}
    del model
    gc.collect()
    seconds = {"make": round(made - started, 2), "score": round(time.perf_counter() - made, 2)}
    return Measured(step.settings, values, step.pair, step.seed, seconds, kind, step.options.rounding if kind else None)


def _trainings(sources: Sources, plan: Sequence[Step]) -> tuple[list[Trained], list[str]]:
    """Return what is known of the trainings of TUNED and of INSTRUCT, and notes on what could not be measured."""
    step = next(step for step in plan if step.settings.arm == "shadow")
    assert step.grafts is not None
    direct = [] if sources.direct is None else [read_trained(sources.direct, "instruct", PAIR)]
    tuned, note = read_trained(sources.tuned, "base", PAIR).measured(step.grafts, step.options)
    return [tuned, *direct], [] if note is None else [note]


def _notes(sources: Sources) -> list[str]:
    notes = ["One training: the intervals are over rows alone. Another seed may train another model."]
    if sources.direct is None:
        notes.append("INSTRUCT tuned directly was not compared: --direct names it.")
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
