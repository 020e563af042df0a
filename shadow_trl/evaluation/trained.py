"""The trainings behind the arms of a comparison: what each cost, how its loss fell, how far it moved the weights."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeGuard

from ..checkpoints.hub import Source, local_folder
from ..checkpoints.json_files import read_json
from ..errors import ShadowError
from ..operations.in_memory import OpenGrafts
from .measured import Measured

STATE_NAME = "trainer_state.json"
"""In which transformers keeps the log of a training."""


@dataclass(frozen=True)
class Trained:
    """One training.

    Args:
        side: what was trained: `base`, for every graft, or `instruct`, for direct tuning.
        pair: name of the pair.
        learning_rate, seed, ref_policy, guidance_power: as in `Settings` and `Measured`; None where they are not known.
        seconds: of the training, the loading and saving of its model included where that is known.
        rows: rows of the data that it went through, each as often as it was seen.
        steps: of the optimiser.
        curve: (step, loss) as they were logged.
        by_layer, by_kind: of BASE, for each group of weights `sigma`, the gap of the pair, and `delta`, the same
            measure of what training changed; see `GapReport`.
    """

    side: str
    pair: str
    learning_rate: float | None = None
    seed: int | None = None
    ref_policy: str | None = None
    guidance_power: float | None = None
    seconds: float | None = None
    rows: int | None = None
    steps: int | None = None
    curve: tuple[tuple[int, float], ...] = ()
    by_layer: Mapping[str, Mapping[str, Any]] | None = None
    by_kind: Mapping[str, Mapping[str, Any]] | None = None

    def measured(self, grafts: OpenGrafts) -> tuple[Trained, str | None]:
        """Return it with the distances of the weights; where they cannot be had, as it is and the reason."""
        try:
            found = grafts.gap()
        except ShadowError as reason:  # a figure beside the scores must not cost them
            first = str(reason).partition("\n")[0]
            return self, f"How far training moved the weights of {self.pair} was not measured: {first}"
        return replace(self, by_layer=found.by_layer, by_kind=found.by_kind), None


def read_trained(
    folder: Source, side: str, pair: str, *, seconds: float | None = None, rows: int | None = None, **made_with: Any
) -> Trained:
    """Return the training whose result is in `folder`, with what its log tells.

    Args:
        folder: of the trained model; without a log, as on the hub, only what is given is known.
        side: see `Trained`.
        pair: see `Trained`.
        seconds: see `Trained`. Default: what the log says.
        rows: see `Trained`.
        **made_with: learning rate, seed and reference.

    Raises:
        CheckpointError: the log cannot be read.
    """
    home = local_folder(folder)
    state = read_json(home / STATE_NAME) if home is not None else {}
    history = state.get("log_history")
    logged = [entry for entry in history if isinstance(entry, dict)] if isinstance(history, list) else []
    curve = tuple(
        (step, float(loss)) for step, loss in ((entry.get("step"), entry.get("loss")) for entry in logged)
        if isinstance(step, int) and _is_number(loss)
    )  # fmt: skip
    if seconds is None:
        spent = (entry.get("train_runtime") for entry in logged)
        seconds = next((float(one) for one in spent if _is_number(one)), None)
    steps = state.get("global_step")
    return Trained(
        side,
        pair,
        **made_with,
        seconds=seconds,
        rows=rows,
        steps=steps if isinstance(steps, int) else None,
        curve=curve,
    )


def _is_number(value: Any) -> TypeGuard[float]:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def rows_seen(folder: Path, rows: int | None) -> int | None:
    """Return how many rows the training in `folder` went through, of a data set of `rows`."""
    passes = read_json(folder / STATE_NAME).get("epoch")
    return round(passes * rows) if rows is not None and _is_number(passes) else None


def costs(
    arms: Iterable[str], models: Sequence[Measured], trainings: Sequence[Trained]
) -> tuple[list[str], list[list[str]]]:
    """Return what each arm cost as a table, its heads and rows; a training counts for every arm that it is for."""
    heads = [
        "arm",
        "models",
        "trainings",
        "rows trained on",
        "optimiser steps",
        "training, s",
        "making, s",
        "scoring, s",
    ]
    rows = []
    for arm in arms:
        own = [model for model in models if model.settings.arm == arm]
        side = {"instruct": None, "direct": "instruct"}.get(arm, "base")
        made = [one for one in trainings if one.side == side]
        sums = [_sum([getattr(one, name) for one in made]) for name in ("rows", "steps", "seconds")]
        spent = [sum(model.seconds.get(kind, 0.0) for model in own) for kind in ("make", "score")]
        seconds = (f"{one:.1f}" if one is not None else "" for one in (sums[2], *spent))
        counts = (f"{one:,}" if one is not None else "" for one in (len(own), len(made), *sums[:2]))
        rows.append([arm, *counts, *seconds])
    return heads, rows


def _sum(values: Sequence[Any]) -> Any:
    """Return the sum, None where one is not known or there are none."""
    return sum(values) if values and None not in values else None
