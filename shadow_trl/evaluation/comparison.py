"""Arms side by side: their scores, the settings chosen on validation, and what the test rows say of them."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np

from ..errors import ConfigError, InputError
from .exam import Metric, Values
from .statistics import Difference, Table, compare, holm, verdict

SPLITS = ("validation", "test")


@dataclass(frozen=True)
class Settings:
    """What an arm was made with; None where that does not apply.

    Args:
        arm: `instruct`, `direct`, `shadow`, `re-adapt` or `chat-vector`.
        learning_rate: of the training.
        scale: multiplier of what training changed.
        modules: weights that receive the delta.
        ref_policy: of DPO.
        instruct_scale: multiplier of INSTRUCT, where it is not 1.
        guidance_power: of SFT that INSTRUCT guided.
    """

    arm: str
    learning_rate: float | None = None
    scale: float | None = None
    modules: str | None = None
    ref_policy: str | None = None
    instruct_scale: float | None = None
    guidance_power: float | None = None

    def words(self) -> str:
        """Return the settings beside the arm, as a table shows them."""
        said = [f"rate {self.learning_rate:g}"] if self.learning_rate is not None else []
        said += [f"scale {self.scale:g}"] if self.scale is not None else []
        said += [self.modules] if self.modules is not None and self.modules != "all" else []
        said += [f"instruct scale {self.instruct_scale:g}"] if self.instruct_scale is not None else []
        said += [f"reference {self.ref_policy}"] if self.ref_policy is not None else []
        said += [f"guidance {self.guidance_power:g}"] if self.guidance_power is not None else []
        return ", ".join(said)


@dataclass(frozen=True)
class Measured:
    """One model with the values of its rows.

    Args:
        settings: what it was made with.
        values: split -> values of the rows.
        pair: name of the pair.
        seed: of the training; None where nothing was trained, or it is not known.
        seconds: what the model cost by kind of work, such as `train`, `graft` and `score`.
    """

    settings: Settings
    values: Mapping[str, Values]
    pair: str
    seed: int | None = None
    seconds: Mapping[str, float] = field(default_factory=dict)

    @property
    def training(self) -> tuple[str, int | None]:
        """Which training it is of."""
        return self.pair, self.seed


@dataclass(frozen=True)
class Test:
    """The comparison of two selected arms by one metric, on the test rows."""

    a: str
    b: str
    metric: Metric
    found: Difference
    p_adjusted: float
    verdict: str


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
    """

    models: Sequence[Measured]
    metrics: Sequence[Metric]
    target: str
    keep: str | None
    within: float = 1.0
    margin: float = 2.0
    notes: Sequence[str] = ()

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
        rule = f"{word} {self.target} on validation"
        if self.keep is None:
            return rule
        bound = "at least INSTRUCT's minus" if self.by_name[self.keep].higher else "at most INSTRUCT's plus"
        return f"{rule} with {self.keep} {bound} {self.within:g}"

    def mean(self, settings: Settings, metric: Metric, split: str) -> float:
        """Return a metric of settings, the mean over trainings, as it is shown."""
        found = [metric.of(model.values[split]) for model in self.groups[settings]]
        return sum(found) / len(found)

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
            said = verdict(one, p, margin=margin, unit=unit, digits=1 if metric.share else 3, higher=metric.higher)
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
        sizes: dict[str, int] = {}
        for training in keys:
            pair, seed = training
            found = [side.get(training, side.get((pair, None)) if seed is not None else None) for side in sides]
            if found[0] is not None and found[1] is not None:
                both[0].append(found[0])
                both[1].append(found[1])
                sizes[pair] = sizes.get(pair, 0) + 1
        if not both[0]:
            raise InputError(f"{a.arm} and {b.arm} have no training in common.")
        left, right = (
            {part: metric.factor * np.array([model.values["test"][part] for model in side]) for part in metric.parts}
            for side in both
        )
        return left, right, len(sizes) if len(set(sizes.values())) == 1 else 1

    def to_dict(self) -> dict[str, Any]:
        """Return everything as plain values for JSON; shares, their differences and intervals are in percent."""
        return {
            "arms": list(self._arms()),
            "selected": {arm: vars(one) if one is not None else None for arm, one in self.selected.items()},
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
                    "rows": sum(map(len, values.values())), "seconds": dict(model.seconds),
                }  # fmt: skip


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
