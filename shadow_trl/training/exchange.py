"""Turn the model in training into the graft it would give, in place, and back bit for bit.

No second model on the accelerator: weights are exchanged one by one with copies in host memory.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import numpy
import torch
from accelerate.utils import is_peft_model
from torch import nn

from ..arithmetic.grafter import graft_tensor
from ..errors import ConfigError, list_names
from ..grafting.options import GraftOptions


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
            for name, parameter in _below_adapter(self.model).named_parameters()
            if not is_peft_model(self.model) or (not parameter.requires_grad and "lora_" not in name)
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
                "training. Nothing was written."
            )

    @contextmanager
    def grafted(self) -> Iterator[None]:
        """Make the model the graft while the context lasts; weights and random state are as before afterwards."""
        kept: dict[str, torch.Tensor] = {}
        with torch.no_grad(), ExitStack() as way_back:
            way_back.enter_context(_random_state_kept())
            way_back.callback(self._restore, kept)
            for name, parameter in self.weights.items():
                kept[name] = parameter.detach().to("cpu", copy=True)
                parameter.copy_(self._grafted(name, kept[name]))
            if is_peft_model(self.model):
                way_back.enter_context(self._scaled_adapter())
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

    @contextmanager
    def _scaled_adapter(self) -> Iterator[None]:
        """Multiply the adapter by the scale of the graft, and by 0 where the graft leaves a weight alone."""
        before: list[tuple[dict[str, float], dict[str, float]]] = []
        for name, module in _below_adapter(self.model).named_modules():
            scaling = getattr(module, "scaling", None)
            if isinstance(scaling, dict) and hasattr(module, "lora_A"):
                before.append((scaling, dict(scaling)))
                factor = self.options.scale if self.receives(f"{_plain_name(name)}.weight") else 0.0
                scaling.update({adapter: value * factor for adapter, value in scaling.items()})
        try:
            yield
        finally:
            for scaling, values in before:
                scaling.update(values)

    def _restore(self, kept: Mapping[str, torch.Tensor]) -> None:
        for name, tensor in kept.items():
            self.weights[name].copy_(tensor)


def _below_adapter(model: nn.Module) -> nn.Module:
    return model.get_base_model() if is_peft_model(model) else model  # type: ignore[operator]


def _plain_name(name: str) -> str:
    return name.replace(".base_layer", "")


@contextmanager
def _random_state_kept() -> Iterator[None]:
    states = random.getstate(), numpy.random.get_state()
    with torch.random.fork_rng():
        try:
            yield
        finally:
            random.setstate(states[0])
            numpy.random.set_state(states[1])
