"""Evaluation of the graft while BASE is in training: the figures of the model that will be shipped."""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch

from ..checkpoints.checkpoint import Checkpoint
from ..errors import ConfigError, GraftError, list_names
from ..grafting.options import GraftOptions
from ..layouts.model_names import ModelNames
from .exchange import GraftExchange, check_exchangeable
from .loading import bare_model, is_adapted, load_model
from .origins import Origins, require_base, require_instruct

if TYPE_CHECKING:
    from transformers import Trainer as _Trainer
else:
    _Trainer = object  # the mixin stands before a TRL trainer, whatever that one is


class ReferenceRecord:
    """Reference log probabilities of one evaluation, kept for a second pass over the same batches.

    Under LoRA the reference `init` is the policy with its adapter off. During the evaluation of the graft that would be
    INSTRUCT, so the values of the pass before, with BASE's weights in place, are used again.
    """

    def __init__(self) -> None:
        self._values: deque[tuple[tuple[Any, ...], Any]] = deque()
        self._mode = "off"

    @property
    def active(self) -> bool:
        """Whether one of the two passes is under way."""
        return self._mode != "off"

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Keep what is computed while the context lasts."""
        self._values.clear()
        self._mode = "record"
        try:
            yield
        finally:
            self._mode = "off"

    @contextmanager
    def replaying(self) -> Iterator[None]:
        """Give the kept values again, in the order they came."""
        self._mode = "replay"
        try:
            yield
        finally:
            self._mode = "off"
            self._values.clear()

    def through(self, inputs: dict[str, torch.Tensor], compute: Callable[[], Any]) -> Any:
        """Return `compute()` of a batch, kept in the first pass and taken from there in the second.

        Raises:
            GraftError: the second pass brings another batch than the first.
        """
        ids = inputs["input_ids"]
        batch = (*ids.shape, int(ids.sum()))
        if self._mode == "record":
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

    origins: Origins
    args: Any
    _loading_args: Any
    _metrics: dict[str, Any]

    @property
    def _references(self) -> ReferenceRecord:
        if not hasattr(self, "_reference_record"):
            self._reference_record = ReferenceRecord()
        return self._reference_record

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
        with self._references.recording():
            output = run(dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix)
        # TRL's `log` adds what lies in here to the figures of the evaluation; the graft's must not be among them.
        plain, self._metrics["eval"] = self._metrics["eval"], defaultdict(list)
        prefix = f"{metric_key_prefix}_grafted"
        try:
            with self._exchange().grafted(), self._references.replaying():
                second = run(dataloader, description, prediction_loss_only, ignore_keys, prefix)
            means = {f"{prefix}_{key}": sum(values) / len(values) for key, values in self._metrics["eval"].items()}
        finally:
            self._metrics["eval"] = plain
        return output._replace(metrics={**(output.metrics or {}), **(second.metrics or {}), **means})

    def _exchange(self) -> GraftExchange:
        """Return the exchange of this run; INSTRUCT, and BASE where it is needed, are read once, to host memory."""
        if not hasattr(self, "_graft_exchange"):
            assert self.model is not None
            bare = bare_model(self.model)

            def weights(source: str, revision: str | None) -> dict[str, torch.Tensor]:
                kwargs = {"dtype": bare.dtype, "device_map": None}
                return load_model(source, args=self._loading_args, revision=revision, policy=kwargs).state_dict()

            options = GraftOptions(**self.args.graft_options())
            # Below an adapter BASE is needed where it lies on something else: on the full model of a stage before.
            on_base = is_adapted(self.model) and self.origins.policy == self.origins.base
            self._graft_exchange = GraftExchange(
                self.model,
                weights(require_instruct(self.origins), self.origins.instruct_revision),
                {} if on_base else weights(require_base(self.origins), self.origins.base_revision),
                scale=options.scale,
                instruct_scale=options.instruct_scale,
                receives=receiver(options, require_instruct(self.origins), self.origins.instruct_revision),
            )
        return self._graft_exchange

    def _check_grafted_evaluation(self) -> None:
        if self.args.eval_grafted:
            check_exchangeable(self.model, self.args)
            self._exchange()  # what does not fit must be found before training


def receiver(options: GraftOptions, instruct: str, revision: str | None) -> Callable[[str], bool]:
    """Return the test whether a weight in memory receives the delta; `modules` is searched in INSTRUCT's names on disk.

    Args:
        options: of the graft.
        instruct: folder or hub id of INSTRUCT.
        revision: of it.

    Raises:
        ConfigError: `modules` selects a part only of what is one weight in memory, as single experts are.
    """
    chosen = options.selector()
    if options.patterns() is None:
        return chosen
    checkpoint = Checkpoint.open(instruct, revision)
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
