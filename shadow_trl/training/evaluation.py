"""Evaluation of the graft while BASE is in training: the figures of the model that will be shipped."""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Callable
from dataclasses import replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch

from ..checkpoints.checkpoint import Checkpoint
from ..checkpoints.manifest import Entry
from ..errors import ConfigError, GraftError, list_names
from ..grafting.options import GraftOptions
from ..layouts.model_names import ModelNames
from .exchange import GraftExchange
from .loading import bare_model
from .start import Start

if TYPE_CHECKING:
    from transformers import Trainer as _Trainer
else:
    _Trainer = object  # the mixin stands before a TRL trainer, whatever that one is


class KeptReferences:
    """Reference log probabilities of one evaluation, kept for a second pass over the same batches.

    Under LoRA the reference `init` is the policy with its adapter off. During the evaluation of the graft that would be
    INSTRUCT, so the values of the pass before, with BASE's weights in place, are used again.
    """

    def __init__(self) -> None:
        self.again = False  # whether this is the second pass
        self._values: deque[tuple[tuple[int, ...], Any]] = deque()

    def of(self, inputs: dict[str, torch.Tensor], compute: Callable[[], Any]) -> Any:
        """Return `compute()` of a batch, kept in the first pass and taken from there in the second.

        Raises:
            GraftError: the second pass brings another batch than the first.
        """
        ids = inputs["input_ids"]
        batch = (*ids.shape, int(ids.sum()))
        if not self.again:
            self._values.append((batch, compute()))
            return self._values[-1][1]
        if not self._values or self._values[0][0] != batch:
            raise GraftError(
                "the evaluation data came in another order the second time, so the reference log probabilities cannot "
                "be used again. Use a data set with a fixed order, or eval_grafted=False."
            )
        return self._values.popleft()[1]


class GraftedEvaluation(_Trainer):
    """Adds `eval_grafted_*` to every evaluation when `eval_grafted` is set: INSTRUCT + the current delta.

    Only `evaluation_loop` changes: a second pass over the data with the weights exchanged. One log and one
    `on_evaluate` come out of both, and the plain figures are those of TRL.
    """

    args: Any
    _start: Start
    _metrics: dict[str, Any]
    _references: KeptReferences | None = None  # while both passes last

    def evaluation_loop(
        self,
        dataloader: Any,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> Any:
        """As in `Trainer`; with `eval_grafted`, a second pass on the graft adds its figures to those of the first."""
        run = super().evaluation_loop
        if not self.args.eval_grafted or description != "Evaluation":
            return run(dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix)
        self._references = KeptReferences()
        try:
            output = run(dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix)
            self._references.again = True
            # TRL's `log` adds what is in here to the figures of the evaluation; the graft's must not be among them.
            plain, self._metrics["eval"] = self._metrics["eval"], defaultdict(list)
            prefix = f"{metric_key_prefix}_grafted"
            try:
                with self._exchange.grafted():
                    second = run(dataloader, description, prediction_loss_only, ignore_keys, prefix)
                means = {f"{prefix}_{key}": sum(values) / len(values) for key, values in self._metrics["eval"].items()}
            finally:
                self._metrics["eval"] = plain
        finally:
            self._references = None
        return output._replace(metrics={**(output.metrics or {}), **(second.metrics or {}), **means})

    @cached_property
    def _exchange(self) -> GraftExchange:
        """The exchange of this run; INSTRUCT, and BASE where it is needed, are read once, to host memory."""
        assert self.model is not None
        start = self._start
        kwargs = {"dtype": bare_model(self.model).dtype, "device_map": None}
        loading = replace(start.loading, quantization_config=None, kwargs=kwargs)
        options = GraftOptions(**self.args.graft_options())
        instruct, base = loading.load(start.instruct).state_dict(), {}
        # Below an adapter BASE is needed where it was put on something else: on the full model of a stage before.
        if not start.adapter_on_base:
            base = loading.load(start.base).state_dict()
        return GraftExchange(self.model, instruct, base, options, receiver(options, start.instruct))


def receiver(options: GraftOptions, instruct: Entry) -> Callable[[str], bool]:
    """Return the test whether a weight in memory receives the delta; `modules` is searched in INSTRUCT's names on disk.

    Args:
        options: of the graft.
        instruct: folder or hub id of INSTRUCT.

    Raises:
        ConfigError: `modules` selects a part only of what is one weight in memory, as single experts are.
    """
    chosen = options.selector()
    if options.patterns() is None:
        return chosen
    checkpoint = Checkpoint.open(str(instruct))
    stored = ModelNames(checkpoint).groups(checkpoint.specs)
    count = {place: sum(chosen(name) for name in names) for place, names in stored.items()}
    split = [f"{place}  {count[place]} of {len(names)} weights on disk" for place, names in stored.items()
             if count[place] not in (0, len(names))]  # fmt: skip
    if split:
        raise ConfigError(
            f"eval_grafted=True is not possible here: graft_modules selects parts of {len(split)} weights that are "
            f"one in memory.\n{list_names(split)}\nSelect all or none of their parts, or pass eval_grafted=False. "
            "Nothing was written."
        )
    return lambda place: count[place] > 0 if place in count else chosen(place)
