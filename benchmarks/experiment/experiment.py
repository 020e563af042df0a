"""The stored cells as comparisons: which models belong together, and by what they are measured."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from shadow_trl.evaluation.comparison import Comparison
from shadow_trl.evaluation.exam import Metric
from shadow_trl.evaluation.measured import Measured, Settings

TASKS = {"dpo": "DPO", "sft": "SFT"}
KEPT = {"dpo": ("t_rule", "rule", "skill", "refuse"), "sft": ("rule", "skill", "refuse")}
RATES = {"dpo": 5e-5, "sft": 1e-4}
"""Learning rates of the recipes, at which one factor is changed."""
REFERENCE = {"dpo": "instruct", "sft": None}
SHOWN = ("target", "in style", "kept")


def metrics_of(task: str) -> tuple[Metric, ...]:
    """Return the metrics of a task on the embedded pairs: each kind of rows, and what is kept."""
    kinds = ("target", "in style", "t_rule", "rule", "skill", "refuse")
    return (*(Metric(kind, (kind,)) for kind in kinds), Metric("kept", KEPT[task]))


@dataclass(frozen=True)
class Experiment:
    """All cells: `design`, `training`, `models`, seconds, and for the core the delta beside the gap.

    Args:
        cells: as gather.py makes them.
        known: recipe -> pair -> what BASE and INSTRUCT knew before.
    """

    cells: Sequence[dict[str, Any]]
    known: dict[str, Any]

    def models(self, design: str, fits: Callable[[Measured], bool] = lambda model: True) -> list[Measured]:
        """Return the models of a design that fit, INSTRUCT first."""
        found = [model for cell in self.cells if cell["design"] == design for model in cell["models"] if fits(model)]
        return sorted(found, key=lambda model: model.settings.arm != "instruct")

    @cached_property
    def seeds(self) -> dict[str, list[int]]:
        """The seeds of which the core has every pair and rate, by task: the others are left out."""
        return {task: whole_seeds(self.models(f"core_{task}")) for task in TASKS}

    def core(self, task: str, *, within: float = 1.0, pair: str | None = None, seeds: int | None = None) -> Comparison:
        """Return the core of a task, of one pair where it is named, of the first `seeds` where they are given."""
        chosen = {None, *self.seeds[task][:seeds]}
        models = self.models(f"core_{task}", lambda one: one.seed in chosen and pair in (None, one.pair))
        return compared(models, task, within=within)

    def gaps(self, task: str, pair: str, rate: float | None = None) -> list[dict[str, Any]]:
        """Return what the deltas of the core are beside the gap of a pair, at one rate or at all."""
        return [
            cell["gap"]
            for cell in self.cells
            for one in cell["models"][-1:]  # all but INSTRUCT are of one training
            if cell["design"] == f"core_{task}" and one.pair == pair and one.seed in self.seeds[task]
            and rate in (None, one.settings.learning_rate)
        ]  # fmt: skip

    @property
    def pairs(self) -> list[str]:
        """Names of the pairs."""
        return sorted({model.pair for model in self.models("core_dpo")})


def whole_seeds(models: Sequence[Measured]) -> list[int]:
    """Return the seeds of which there is every training that another seed has."""
    keys = {(one.seed, one.pair, one.settings.learning_rate, one.settings.guidance_power) for one in models if one.seed}
    seeds, wanted = sorted({seed for seed, *_ in keys}), {tuple(rest) for _, *rest in keys}
    return [seed for seed in seeds if all((seed, *rest) in keys for rest in wanted)]


def compared(models: Sequence[Measured], task: str, *, within: float = 1.0) -> Comparison:
    """Return a comparison by the metrics of a task."""
    pairs, seeds = (len({getattr(one, of) for one in models} - {None}) for of in ("pair", "seed"))
    note = f"{TASKS[task]}. Pairs: {pairs}. Seeds: {seeds}. The intervals are over pairs, trainings and rows."
    return Comparison(models, metrics_of(task), "target", "kept", within=within, notes=[note])


def without_guidance(task: str, arm: str, rate: float, scale: float) -> Settings:
    """Return the settings of the core."""
    policy = REFERENCE[task] if arm == "shadow" else None
    return Settings(arm, learning_rate=rate, scale=scale, modules="all", ref_policy=policy)


def best(comparison: Comparison, arm: str) -> Settings | None:
    """Return what is chosen on validation for an arm."""
    return comparison.selected.get(arm)


def mean(comparison: Comparison, settings: Settings, name: str) -> float:
    """Return a metric on the test rows, the mean over trainings."""
    return comparison.mean(settings, comparison.by_name[name], "test")


def spread(comparison: Comparison, settings: Settings) -> float:
    """Return the largest range over trainings of the shown metrics."""
    values = [
        [comparison.by_name[name].of(model.values["test"]) for model in comparison.groups[settings]] for name in SHOWN
    ]
    return max(max(several) - min(several) for several in values)


def renamed(models: Sequence[Measured], arm: str, new: str) -> list[Measured]:
    """Return the models of an arm under another name."""
    return [replace(model, settings=replace(model.settings, arm=new)) for model in models if model.settings.arm == arm]


def rates_of(core: Comparison) -> list[float]:
    """Return the learning rates of a comparison."""
    return sorted({one.learning_rate for one in core.groups if one.learning_rate is not None})


def table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a Markdown table."""
    lines = ["| " + " | ".join(row) + " |" for row in (heads, *rows)]
    return "\n".join([lines[0], "|---" * len(heads) + "|", *lines[1:]])
