"""Arms side by side: their scores, the settings chosen on validation, and what the test rows say of them."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np

from ..errors import ConfigError, InputError
from .exam import Metric
from .measured import Measured, Settings
from .statistics import Difference, Table, compare, holm, interval_of, verdict
from .trained import Trained

SPLITS = ("validation", "test")


@dataclass(frozen=True)
class Test:
    """The comparison of two selected arms by one metric, on the test rows."""

    a: str
    b: str
    metric: Metric
    found: Difference
    p_adjusted: float
    verdict: str

    @property
    def digits(self) -> int:
        """Digits behind the point with which it is shown."""
        return digits_of(self.metric, self.found.value)


@dataclass(frozen=True)
class Comparison:
    """All measured models, and what follows from them.

    Args:
        models: each with the same rows; the first is INSTRUCT.
        metrics: by which they are compared.
        target: name of the metric that is to be high (or low, where less is better).
        keep: name of the metric of what must not get worse; None for no condition.
        within: by how much `keep` may be worse than INSTRUCT's, in its unit. Default 1.
        margin: points up to which a difference of shares does not matter. Default 2.
        notes: what a reader has to know.
        chosen_on: the rows by which settings are selected, in words.
        command: writes the chosen graft; None where there is none.
        rows: split -> rows of all sorts that each model answered.
        trainings: what was trained for it.
    """

    models: Sequence[Measured]
    metrics: Sequence[Metric]
    target: str
    keep: str | None
    within: float = 1.0
    margin: float = 2.0
    notes: Sequence[str] = ()
    chosen_on: str = "the validation rows"
    command: str | None = None
    rows: Mapping[str, int] = field(default_factory=dict)
    trainings: Sequence[Trained] = ()

    @property
    def by_name(self) -> dict[str, Metric]:
        """The metrics by their names."""
        return {metric.name: metric for metric in self.metrics}

    @cached_property
    def groups(self) -> dict[Settings, list[Measured]]:
        """The models of each settings, one a training."""
        found: dict[Settings, list[Measured]] = {}
        for model in self.models:
            found.setdefault(model.settings, []).append(model)
        return found

    @property
    def condition(self) -> str:
        """The rule by which settings are selected, in words."""
        word = "highest" if self.by_name[self.target].higher else "lowest"
        rule = f"{word} {self.target}"
        if self.keep is not None:
            bound = "at least INSTRUCT's minus" if self.by_name[self.keep].higher else "at most INSTRUCT's plus"
            rule += f" with {self.keep} {bound} {self.within:g}"
        return f"{rule}, on {self.chosen_on}"

    def mean(self, settings: Settings, metric: Metric, split: str) -> float:
        """Return a metric of settings, the mean over trainings, as it is shown."""
        found = [metric.of(model.values[split]) for model in self.groups[settings]]
        return math.fsum(found) / len(found)

    @cached_property
    def intervals(self) -> dict[str, dict[str, tuple[float, float]]]:
        """The interval of each metric of each selected arm, on test, as it is shown."""
        return {
            arm: {
                metric.name: interval_of(
                    self._table(metric, models, "test"), bound=metric.factor if metric.share else None,
                    pairs=_pairs_in(models),
                )
                for metric in self.metrics
            }
            for arm, settings in self.selected.items()
            if settings is not None
            for models in [sorted(self.groups[settings], key=lambda model: str(model.training))]
        }  # fmt: skip

    def shown(self, settings: Settings, name: str, split: str, *, interval: bool = False) -> str:
        """Return a metric as text, percent with one digit, others three; of selected settings with its `interval`."""
        metric = self.by_name[name]
        digits = 1 if metric.share else 3
        text = f"{self.mean(settings, metric, split):.{digits}f}"
        if not interval:
            return text
        low, high = self.intervals[settings.arm][name]
        return f"{text} ({low:.{digits}f} to {high:.{digits}f})"

    @cached_property
    def selected(self) -> dict[str, Settings | None]:
        """The chosen settings of each arm; None where no settings meet the condition."""
        target = self.by_name[self.target]
        arms: dict[str, list[Settings]] = {}
        for settings in self.groups:
            arms.setdefault(settings.arm, []).append(settings)
        best: dict[str, Settings | None] = {}
        for arm, several in arms.items():
            fit = [settings for settings in several if self._meets(settings)]
            sign = 1.0 if target.higher else -1.0
            best[arm] = max(fit, key=lambda one: sign * self.mean(one, target, "validation"), default=None)
        return best

    def _meets(self, settings: Settings) -> bool:
        if self.keep is None:
            return True
        keep, instruct = self.by_name[self.keep], self.models[0].settings
        sign = 1.0 if keep.higher else -1.0
        lost = sign * (self.mean(instruct, keep, "validation") - self.mean(settings, keep, "validation"))
        return lost <= self.within + 1e-9

    @cached_property
    def tests(self) -> list[Test]:
        """Every two selected arms by every metric, on test; p values adjusted for the number of all of them."""
        chosen = [settings for settings in self.selected.values() if settings is not None]
        pairs = [(a, b) for b, a in itertools.combinations(chosen, 2)]
        cases = [(a, b, metric) for a, b in pairs for metric in self.metrics]
        found = [self.compared(a, b, metric) for a, b, metric in cases]
        adjusted = holm([one.p for one in found])
        tests = []
        for (a, b, metric), one, p in zip(cases, found, adjusted, strict=True):
            margin, unit = (self.margin, "points") if metric.share else (None, "")
            digits = digits_of(metric, one.value)
            said = verdict(one, p, margin=margin, unit=unit, digits=digits, higher=metric.higher)
            tests.append(Test(a.arm, b.arm, metric, one, p, said))
        return tests

    def compared(self, a: Settings, b: Settings, metric: Metric) -> Difference:
        """Return how much more `a` has of a metric than `b`, on the test rows of the trainings that both have."""
        left, right, pairs = self._tables(a, b, metric)
        return compare(left, right, bound=metric.factor if metric.share else None, pairs=pairs)

    def _tables(self, a: Settings, b: Settings, metric: Metric) -> tuple[dict[str, Table], dict[str, Table], int]:
        """Return the test values of both, one line for each training that both have, and of how many pairs they are.

        INSTRUCT stands for all seeds. Pairs count as one where they have not as many trainings each.
        """
        sides = [{model.training: model for model in self.groups[one]} for one in (a, b)]
        keys = sorted({*sides[0], *sides[1]}, key=str)
        both: list[list[Measured]] = [[], []]
        for training in keys:
            pair, seed = training
            found = [side.get(training, side.get((pair, None)) if seed is not None else None) for side in sides]
            if found[0] is not None and found[1] is not None:
                both[0].append(found[0])
                both[1].append(found[1])
        if not both[0]:
            raise InputError(f"{a.arm} and {b.arm} have no training in common.")
        left, right = (self._table(metric, side, "test") for side in both)
        return left, right, _pairs_in(both[0])

    @staticmethod
    def _table(metric: Metric, models: Sequence[Measured], split: str) -> dict[str, Table]:
        """Return the values of a metric as they are shown, one line a model."""
        return {
            part: metric.factor * np.array([model.values[split][part] for model in models]) for part in metric.parts
        }

    def to_dict(self) -> dict[str, Any]:
        """Return everything as plain values for JSON; shares, their differences and intervals are in percent."""
        return {
            "arms": list(self._arms()),
            "selected": {arm: vars(one) if one is not None else None for arm, one in self.selected.items()},
            "intervals": self.intervals,
            "tests": [
                {
                    "a": test.a, "b": test.b, "metric": test.metric.name, "difference": test.found.value,
                    "interval": list(test.found.interval), "p": test.found.p, "p_adjusted": test.p_adjusted,
                    "verdict": test.verdict,
                }
                for test in self.tests
            ],
            "metrics": {
                metric.name: {"higher": metric.higher, "unit": "%" if metric.share else None} for metric in self.metrics
            },
            "trainings": [vars(one) for one in self.trainings],
            "condition": self.condition,
            "margin": self.margin,
            "notes": list(self.notes),
        }  # fmt: skip

    def _arms(self) -> Iterable[dict[str, Any]]:
        for model in self.models:
            for split in SPLITS:
                values = model.values[split]
                scores = {metric.name: metric.of(values) for metric in self.metrics}
                yield {
                    **vars(model.settings), "pair": model.pair, "seed": model.seed, "split": split, "scores": scores,
                    "rows": self.rows.get(split), "seconds": dict(model.seconds),
                    "dtype": model.dtype, "rounding": model.rounding,
                }  # fmt: skip


def digits_of(metric: Metric, difference: float) -> int:
    """Return the digits behind the point of a difference: one of points, else three, more where it is smaller.

    >>> loss = Metric("loss", ("loss",), share=False)
    >>> digits_of(loss, 0.25), digits_of(loss, 0.00031), digits_of(loss, 0.0)
    (3, 5, 3)
    """
    if metric.share:
        return 1
    return 3 if difference == 0.0 else min(9, max(3, 1 - math.floor(math.log10(abs(difference)))))


def _pairs_in(models: Sequence[Measured]) -> int:
    """Return of how many pairs the models are; 1 where the pairs have not as many trainings each."""
    sizes = Counter(model.pair for model in models)
    return len(sizes) if len(set(sizes.values())) == 1 else 1


def choose_target(metrics: Sequence[Metric], target: str | None, keep: str | None) -> tuple[str, str | None]:
    """Return the names of the metrics to select by: those given, else `target` (or the first) and `kept`.

    Raises:
        ConfigError: there is no such metric.
    """
    names = [metric.name for metric in metrics]
    for option, name in (("target", target), ("keep", keep)):
        if name is not None and name not in names:
            raise ConfigError(f"{option} is {name!r}, which is no metric of this comparison: {', '.join(names)}.")
    usual = "target" if "target" in names else names[0]
    return target or usual, keep or ("kept" if "kept" in names else None)
