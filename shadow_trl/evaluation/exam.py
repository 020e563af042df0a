"""What models are compared on: held-out data of several sorts, and the metrics made of the values of their rows."""

from __future__ import annotations

import hashlib
import importlib
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from ..errors import ConfigError, GraftError, InputError, list_names
from ..runtime.processes import share_out
from .harness import HarnessTask
from .likelihood import losses, margins
from .scoring import Row, answered_right

Values = Mapping[str, tuple[float, ...]]
"""Part (a kind of rows, or a measure of other data) -> the value of each row."""


@dataclass(frozen=True)
class Metric:
    """A figure by which models are compared: the mean over parts of the mean over rows.

    Args:
        name: of the metric.
        parts: what it is the mean of, with equal weight.
        higher: whether more is better.
        share: whether rows have values from 0 to 1, shown in percent.
    """

    name: str
    parts: tuple[str, ...]
    higher: bool = True
    share: bool = True

    @property
    def factor(self) -> float:
        """What a value is multiplied with where it is shown."""
        return 100.0 if self.share else 1.0

    def of(self, values: Values) -> float:
        """Return the metric as it is shown: percent for shares, else the unit of the values."""
        means = [math.fsum(values[part]) / len(values[part]) for part in self.parts]
        return self.factor * math.fsum(means) / len(means)


@dataclass(frozen=True)
class Exam:
    """Held-out data on which a model is measured; every sort may be absent.

    Args:
        rows: `{"prompt", "answer", "kind"}`: exact match of greedy answers, see `scoring.score`.
        conversations: `{"messages"}`: loss and token accuracy of the last answer.
        pairs: `{"prompt", "chosen", "rejected"}`: preference accuracy and margin, without a reference.
        functions: name -> function of (model, tokenizer, rows) that returns one number a row; more is better, unless
            the function has an attribute `higher_is_better` that is False.
        kept: kinds of rows that training should leave alone, whose mean is the metric `kept`.
        batch_size: rows in a forward pass. Default 64.
        max_new_tokens: longest answer in tokens. Default 64.
        tasks: of lm-eval, see `harness.harness_tasks`; those with one name are one metric.
    """

    rows: Sequence[Row] = ()
    conversations: Sequence[Row] = ()
    pairs: Sequence[Row] = ()
    functions: Mapping[str, Callable[..., Sequence[float]]] | None = None
    kept: tuple[str, ...] = ()
    batch_size: int = 64
    max_new_tokens: int = 64
    tasks: Sequence[HarnessTask] = ()

    def __post_init__(self) -> None:
        if not (self.rows or self.conversations or self.pairs or self.tasks):
            raise ConfigError("there is nothing to compare by: give rows, conversations, preferences or tasks.")
        if self.functions and not self.rows:
            raise ConfigError("a function is given the rows to score, and there are none.")
        kinds = self.kinds
        if wrong := [kind for kind in self.kept if kind not in kinds]:
            raise ConfigError(
                f"{len(wrong)} kinds to be kept have no rows:\n{list_names(wrong)}\nThe kinds of the rows are: "
                f"{', '.join(kinds) or 'none'}."
            )

    def __len__(self) -> int:
        """Return the number of rows of all sorts."""
        return len(self.rows) + len(self.conversations) + len(self.pairs) + sum(len(task.rows) for task in self.tasks)

    @property
    def kinds(self) -> tuple[str, ...]:
        """The kinds of the rows, in the order in which they first occur."""
        return tuple(dict.fromkeys(row.get("kind", "all") for row in self.rows))

    @property
    def metrics(self) -> tuple[Metric, ...]:
        """The metrics that the data give."""
        kinds = self.kinds
        found = [Metric(kind, (kind,)) for kind in kinds]
        if self.kept:
            found.append(Metric("kept", self.kept))
        elif len(kinds) > 1:
            found.append(Metric("mean", kinds))
        if self.conversations:
            found += [
                Metric("loss", ("loss",), higher=False, share=False),
                Metric("token accuracy", ("token accuracy",)),
            ]
        if self.pairs:
            found.append(Metric("preference accuracy", ("preference accuracy",)))
            found.append(Metric("preference margin", ("preference margin",), share=False))
        for name, function in (self.functions or {}).items():
            found.append(Metric(name, (name,), getattr(function, "higher_is_better", True), share=False))
        for task in {task.name: task for task in self.tasks}.values():
            found.append(Metric(task.name, (task.name,), task.higher, task.share))
        names = [metric.name for metric in found]
        if repeated := sorted({name for name in names if names.count(name) > 1}):
            raise ConfigError(f"{len(repeated)} metrics have the name of another one:\n{list_names(repeated)}")
        return tuple(found)

    def take(self, model: Any, tokenizer: Any, ends: Sequence[int]) -> Values:
        """Measure a model on all data; several processes measure different rows, and all return the values of all.

        Args:
            model: a causal language model of transformers in evaluation mode.
            tokenizer: with a chat template; one for all models that are compared.
            ends: tokens that end an answer.

        Raises:
            GraftError: values that are not finite, or a function that returned something else than a number a row.
        """
        found: dict[str, tuple[float, ...]] = {}
        size = self.batch_size
        if self.rows:
            right = share_out(
                self.rows,
                partial(
                    answered_right, model, tokenizer, batch_size=size, max_new_tokens=self.max_new_tokens,
                    eos_token_ids=ends,
                ),
                what="answering the rows",
            )  # fmt: skip
            for kind in self.kinds:
                of_kind = (hit for row, hit in zip(self.rows, right, strict=True) if row.get("kind", "all") == kind)
                found[kind] = tuple(map(float, of_kind))
        if self.conversations:
            both = share_out(
                self.conversations,
                lambda some: list(zip(*losses(model, tokenizer, some, batch_size=size), strict=True)),
                what="reading the conversations",
            )
            found |= {"loss": tuple(loss for loss, _ in both), "token accuracy": tuple(right for _, right in both)}
        if self.pairs:
            margin = share_out(
                self.pairs, partial(margins, model, tokenizer, batch_size=size), what="reading the preferences"
            )
            found["preference margin"] = tuple(margin)
            found["preference accuracy"] = tuple(float(value > 0.0) for value in margin)
        for name, function in (self.functions or {}).items():
            found[name] = tuple(share_out(self.rows, partial(_called, name, function, model, tokenizer), what=name))
        if self.tasks:
            # A whole task to a process: which examples it shows depends on the rows before.
            values = share_out(
                self.tasks,
                lambda some: [task.values(model, tokenizer, size) for task in some],
                what="answering the tasks",
            )
            for task, more in zip(self.tasks, values, strict=True):
                found[task.name] = (*found.get(task.name, ()), *more)
        if bad := [name for name, values in found.items() if not all(map(math.isfinite, values))]:
            raise GraftError(f"{len(bad)} measures have values that are not finite:\n{list_names(bad)}")
        return found

    def halves(self, validation_rows: Sequence[Row] = ()) -> dict[str, Exam]:
        """Return two exams with half of the data each, `validation` and `test`, that share no prompt.

        Which half a prompt is in depends on its text alone. With `validation_rows` all rows are for the test.
        """
        rows = (validation_rows, self.rows) if validation_rows else _halves(self.rows, "rows")
        split = [rows, _halves(self.conversations, "conversations"), _halves(self.pairs, "pairs")]
        halves = [task.halves() for task in self.tasks]
        first, second = (
            replace(self, rows=rows, conversations=talks, pairs=pairs, tasks=[both[side] for both in halves])
            for side, (rows, talks, pairs) in enumerate(zip(*split, strict=True))
        )
        return {"validation": first, "test": second}


def _called(
    name: str, function: Callable[..., Sequence[float]], model: Any, tokenizer: Any, rows: Sequence[Row]
) -> list[float]:
    values = [float(value) for value in function(model, tokenizer, list(rows))]
    if len(values) != len(rows):
        raise GraftError(f"the metric {name} returned {len(values)} numbers for {len(rows)} rows.")
    return values


def _halves(rows: Sequence[Row], sort: str) -> tuple[list[Row], list[Row]]:
    """Split rows by the digest of their prompts, so that a prompt of several kinds is in one half only."""
    sides: tuple[list[Row], list[Row]] = ([], [])
    for row in rows:
        prompt = row["messages"][:-1] if sort == "conversations" else row["prompt"]
        sides[hashlib.sha256(json.dumps(prompt, sort_keys=True).encode()).digest()[0] % 2].append(row)
    for kind in dict.fromkeys(row.get("kind", "all") for row in rows):
        sizes = [sum(row.get("kind", "all") == kind for row in side) for side in sides]
        if min(sizes) < 2:
            raise InputError(
                f"the {sum(sizes)} {sort} of the kind {kind} are too few to choose settings on one half of the prompts "
                f"and to test them on the other: {sizes[0]} and {sizes[1]} would be there. Give more."
            )
    return sides


def function_named(text: str) -> Callable[..., Sequence[float]]:
    """Return the function that `module:function` names.

    Raises:
        ConfigError: there is none.
    """
    module, colon, name = text.partition(":")
    try:
        found = getattr(importlib.import_module(module), name) if colon and name else None
    except (ImportError, ValueError, AttributeError) as reason:
        raise ConfigError(f"cannot import the metric {text}: {reason}.") from reason
    if not callable(found):
        raise ConfigError(f"{text!r} is no metric: write module:function.")
    return found
