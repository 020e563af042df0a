"""Tasks of lm-eval (the extra `eval`), answered by a model that is loaded, with the value of each row."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from ..errors import ConfigError, GraftError, InputError, list_names

_NO_SHARES = ("perplexity", "bits_per_byte", "bleu", "ter", "chrf", "rouge", "likelihood", "brier_score", "loss")
"""What is in the names of lm-eval's metrics that are not between 0 and 1."""


@dataclass(frozen=True)
class HarnessTask:
    """One task, with the metric that is taken of it.

    Args:
        name: what was asked for, a group for each of its tasks: `gsm8k` or `gsm8k:exact_match,flexible-extract`.
        task: lm-eval's own.
        metric: lm-eval's name of it, a mean over rows.
        filtered: the filter of answers, as lm-eval names it.
        rows: places of the rows that are asked.
    """

    name: str
    task: Any
    metric: str
    filtered: str
    rows: tuple[int, ...]

    @property
    def higher(self) -> bool:
        """Whether more is better."""
        return bool(self.task.higher_is_better().get(self.metric, True))

    @property
    def share(self) -> bool:
        """Whether rows have values from 0 to 1."""
        return not any(word in self.metric for word in _NO_SHARES)

    def halves(self) -> tuple[HarnessTask, HarnessTask]:
        """Return the task on two halves of its rows; which half one is in depends on its text alone.

        Raises:
            InputError: too few rows.
        """
        sides: tuple[list[int], list[int]] = ([], [])
        docs = list(self.task.eval_docs)
        for at in self.rows:
            text = json.dumps(self.task.doc_to_text(docs[at]), sort_keys=True, default=str)
            sides[hashlib.sha256(text.encode()).digest()[0] % 2].append(at)
        if min(map(len, sides)) < 2:
            raise InputError(f"the {len(self.rows)} rows of the task {self.task.task_name} are too few for two halves.")
        first, second = (replace(self, rows=tuple(side)) for side in sides)
        return first, second

    def values(self, model: Any, tokenizer: Any, batch_size: int) -> list[float]:
        """Return the metric of each row that has it, in their order, with the tokenizer's chat template.

        Raises:
            GraftError: no row has the metric, or values are no shares where they should be.
        """
        from lm_eval import simple_evaluate

        name = self.task.task_name
        found = simple_evaluate(
            model=_served(model, tokenizer, batch_size), tasks=[self.task], samples={name: list(self.rows)},
            apply_chat_template=True, bootstrap_iters=0, log_samples=True,
        )  # fmt: skip
        # A task may have metrics of some of its rows only.
        values = {
            one["doc_id"]: one[self.metric]
            for one in found["samples"][name]
            if one["filter"] == self.filtered and self.metric in one["metrics"]
        }
        kept = [float(values[at]) for at in self.rows if at in values]
        if not kept or (self.share and not all(0.0 <= value <= 1.0 for value in kept)):
            raise GraftError(f"the task {name} gave {kept[:5] or 'nothing'} as shares of {self.metric}.")
        return kept


def harness_tasks(names: Sequence[str], folders: Sequence[str] = ()) -> tuple[HarnessTask, ...]:
    """Find tasks of lm-eval, and load their data.

    Args:
        names: each `NAME`, or `NAME:METRIC,FILTER` as lm-eval prints it; a group stands for its tasks, whose rows have
            equal weight. Default metric and filter: the first of the task.
        folders: with task files of one's own, before those of lm-eval.

    Raises:
        ConfigError: lm-eval is not installed, there is no such task or metric, or it runs code that models write.
        InputError: its data cannot be loaded.
    """
    if not names:
        return ()
    try:
        from lm_eval.tasks import TaskManager
    except ImportError as reason:
        raise ConfigError(f"tasks need lm-eval ({reason}): pip install 'shadow-trl[eval]'.") from reason
    own = TaskManager(include_path=list(folders), include_defaults=False) if folders else None
    plain = [name.partition(":")[0] for name in names]
    # Reading all of lm-eval's tasks takes a minute.
    known = own if own is not None and set(plain) <= set(own.task_index) else TaskManager(include_path=list(folders))
    if missing := [name for name in plain if name not in known.task_index]:
        raise ConfigError(f"{len(missing)} tasks are none that lm-eval knows:\n{list_names(missing)}")
    found: list[HarnessTask] = []
    for asked, name in zip(names, plain, strict=True):
        try:
            tasks = known.load([name])["tasks"].values()
        except Exception as reason:  # of data sets, networks and the task's own code
            raise InputError(f"cannot load the task {name}: {type(reason).__name__}: {reason}") from reason
        found += [_chosen(asked, task) for task in tasks]
    return tuple(found)


def _chosen(asked: str, task: Any) -> HarnessTask:
    """Return the task with the metric and filter that `asked` names."""
    from lm_eval.api.metrics import mean

    how = task.aggregation()
    filters = [one.name for one in getattr(task, "_filters", ())] or ["none"]
    metric, _, filtered = asked.partition(":")[2].partition(",")
    metric, filtered = metric or next(iter(how)), filtered or filters[0]
    if how.get(metric) is not mean or filtered not in filters:
        means = [one for one, way in how.items() if way is mean]
        raise ConfigError(
            f"{asked} is no mean over rows of {task.task_name}, whose means are {', '.join(means) or 'none'}, with the "
            f"filters {', '.join(filters)}. Write NAME:METRIC,FILTER."
        )
    if getattr(task, "UNSAFE_CODE", False):
        raise ConfigError(f"{task.task_name} runs code that the model writes. Run it with lm_eval, in a container.")
    return HarnessTask(asked, task, metric, filtered, tuple(range(len(task.eval_docs))))


def _served(model: Any, tokenizer: Any, batch_size: int) -> Any:
    """Return `model` as lm-eval calls it. It ties weights that the configuration ties; those of `model` stay apart."""
    from lm_eval.models.huggingface import HFLM

    head = model.get_output_embeddings()
    own = None if head is None else head.weight
    # Answers are short: a model that would think first would be cut off there.
    served = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size, enable_thinking=False)
    if own is not None and head.weight is not own:
        head.weight = own
    return served
