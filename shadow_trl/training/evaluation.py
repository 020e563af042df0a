"""Evaluation of the graft while BASE is in training: the figures of the model that will be shipped.

No second model on the accelerator: weights are exchanged one by one with copies in host memory, and back bit for bit.
"""

from __future__ import annotations

import random
from collections import defaultdict, deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy
import torch
from torch import nn

from ..arithmetic.grafter import graft_tensor
from ..checkpoints.checkpoint import Checkpoint
from ..checkpoints.manifest import Entry
from ..errors import ConfigError, GraftError, list_names
from ..grafting.options import GraftOptions
from ..layouts.model_names import ModelNames
from .loading import bare_model, dtypes_before, is_adapted
from .origins import Start

if TYPE_CHECKING:
    from transformers import Trainer as _Trainer
else:
    _Trainer = object  # the mixin stands before a TRL trainer, whatever that one is


class KeptReferences:
    """Reference log probabilities of one evaluation, kept for a second pass over the same batches.

    Under LoRA the reference `init` is the policy with its adapter off, which would be INSTRUCT in the second pass.
    """

    def __init__(self) -> None:
        self.again = False  # whether this is the second pass
        self._values: deque[tuple[tuple[int, ...], Any]] = deque()

    def of(self, inputs: dict[str, torch.Tensor], compute: Callable[[], Any]) -> Any:
        """Return `compute()` of a batch; in the second pass, GraftError for a batch that was not next in the first."""
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
            stages = dtypes_before(str(start.origins.policy) if start.origins.policy != start.origins.base else None)
            below = replace(loading, kwargs={**kwargs, "dtype": (*stages, kwargs["dtype"])[0]}).load(start.base)
            for dtype in stages[1:]:
                below.to(getattr(torch, dtype))
            base = below.state_dict()
        return GraftExchange(self.model, instruct, base, options, receiver(options, start.instruct))


def receiver(options: GraftOptions, instruct: Entry) -> Callable[[str], bool]:
    """Return the test whether a weight in memory receives the delta; `modules` is searched in INSTRUCT's names on disk.

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
            f"one in memory.\n{list_names(split)}\nSelect all or none of their parts, or pass eval_grafted=False."
        )
    return lambda place: count[place] > 0 if place in count else chosen(place)


@dataclass
class GraftExchange:
    """Exchanges the weights of a model in training for `instruct + scale * (current - base)`, and back.

    Under a LoRA on BASE the frozen weights become INSTRUCT's and the adapter, which is the delta, stays. In full
    fine-tuning, and below a LoRA on something else than BASE, each weight becomes the sum as the graft is written, in
    the model's dtype.

    Args:
        model: the model in training.
        instruct: INSTRUCT's weights by the names of the model in memory, in host memory.
        base: BASE's, the same; empty under a LoRA on BASE.
        options: of the graft; under LoRA the scale alone counts.
        receives: whether the weight of a name receives the delta.

    Raises:
        ConfigError: the model has a weight that INSTRUCT or BASE lacks or has in another shape.
    """

    model: nn.Module
    instruct: Mapping[str, torch.Tensor]
    base: Mapping[str, torch.Tensor]
    options: GraftOptions
    receives: Callable[[str], bool]

    def __post_init__(self) -> None:
        # By the names of the plain model: PEFT puts its own parts between them.
        self.weights = {
            _plain_name(name): parameter
            for name, parameter in bare_model(self.model).named_parameters()
            if not is_adapted(self.model) or (not parameter.requires_grad and "lora_" not in name)
        }
        unfit = [
            f"{name}: {tuple(weight.shape)} in training, "
            f"{tuple(side[name].shape) if name in side else 'absent'} in {role}"
            for name, weight in sorted(self.weights.items())
            for role, side in (("INSTRUCT", self.instruct), ("BASE", self.base))
            if side and (name not in side or side[name].shape != weight.shape)
        ]
        if unfit:
            raise ConfigError(
                f"eval_grafted=True is not possible here: {len(unfit)} of {len(self.weights)} weights cannot be "
                f"exchanged.\n{list_names(unfit)}\nPass eval_grafted=False and score the grafted folder after "
                "training."
            )

    @contextmanager
    def grafted(self) -> Iterator[None]:
        """Make the model the graft while the context lasts; weights and random state are as before afterwards."""
        with torch.no_grad(), ExitStack() as way_back:
            way_back.enter_context(torch.random.fork_rng())
            way_back.callback(random.setstate, random.getstate())
            way_back.callback(numpy.random.set_state, numpy.random.get_state())
            for name, parameter in self.weights.items():
                kept = parameter.detach().to("cpu", copy=True)
                way_back.callback(parameter.copy_, kept)
                parameter.copy_(self._grafted(name, kept))
            self._scale_adapter(way_back)
            with torch.enable_grad():
                yield

    def _grafted(self, name: str, current: torch.Tensor) -> torch.Tensor:
        if not self.base or not self.receives(name):
            return self.instruct[name]
        options = self.options
        return graft_tensor(
            self.instruct[name], self.base[name].to(current.dtype), current, scale=options.scale,
            instruct_scale=options.instruct_scale, rounding=options.rounding, seed=options.seed, name=name,
        )  # fmt: skip

    def _scale_adapter(self, way_back: ExitStack) -> None:
        """Multiply an adapter by the scale of the graft, and by 0 where the graft leaves a weight alone."""
        for name, module in bare_model(self.model).named_modules():
            scaling = getattr(module, "scaling", None)
            if isinstance(scaling, dict) and hasattr(module, "lora_A"):
                way_back.callback(scaling.update, dict(scaling))
                factor = self.options.scale if self.receives(f"{_plain_name(name)}.weight") else 0.0
                scaling.update({adapter: value * factor for adapter, value in scaling.items()})


def _plain_name(name: str) -> str:
    return name.replace(".base_layer", "")
