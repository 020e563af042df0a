"""From the models of a comparison to what is measured: each graft in memory, by the options of the run's own graft."""

from __future__ import annotations

import gc
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from ..checkpoints.checkpoint import Checkpoint
from ..checkpoints.hub import Source, local_folder
from ..checkpoints.manifest import GRAFTED_FOLDER, read_manifest
from ..errors import ConfigError
from ..grafting.files import main_dtype
from ..grafting.options import GraftOptions
from ..operations.in_memory import MemoryGraft, OpenGrafts, open_grafts
from ..results.folder import check_place
from .exam import Exam, Values
from .measured import Measured, Settings
from .models import load

PAIR = "pair"
"""Name of the only pair."""

WRITTEN_WITH = ("dtype", "rounding", "seed", "vocab", "untie")
"""Options of a graft that every arm has from the run; its scale and modules are what is compared."""

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
        form = manifest.get("form", asked.format)
        if form == "adapter" or (form == "auto" and grafts.form(asked) == "adapter"):
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
        plan += [_like(step, "direct", tuned, "float32", rounding="nearest", vocab="strict") for step in plain]
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
    kind, rounding = (source.dtype, source.rounding) if isinstance(source, MemoryGraft) else (None, None)
    model = load(source, dtype=dtype, device=device)
    del source
    made = time.perf_counter()
    values: dict[str, Values] = {split: one.take(model, tokenizer, ends) for split, one in exams.items()}
    del model
    gc.collect()
    seconds = {"make": round(made - started, 2), "score": round(time.perf_counter() - made, 2)}
    return Measured(step.settings, values, step.pair, step.seed, seconds, kind, rounding)
