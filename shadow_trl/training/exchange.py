"""Turn the model in training into the graft it would give, in place, and back bit for bit.

No second model on the accelerator: weights are exchanged one by one with copies in host memory.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy
import torch
from accelerate.utils import is_peft_model
from torch import nn

from ..adapters.kinds import kind_of
from ..errors import ConfigError, list_names


class GraftExchange:
    """Exchanges the weights of a model in training for `instruct + scale * (current - base)`, and back.

    Under a LoRA on BASE the frozen weights become INSTRUCT's and the adapter, which is the delta, stays. In full
    fine-tuning, and below a LoRA on something else than BASE, each weight becomes the sum, worked out in fp32 and
    rounded to the model's dtype.

    Args:
        model: the model in training.
        instruct: INSTRUCT's weights by the names of the model in memory, in host memory.
        base: BASE's, the same; empty under a LoRA on BASE.
        scale: multiplier of the delta.
        instruct_scale: multiplier b of INSTRUCT in `a*T + b*I + (1-a-b)*B`; 1.0 under LoRA.
        receives: whether the weight of a name receives the delta.

    Raises:
        ConfigError: the model has a weight that INSTRUCT or BASE lacks or has in another shape.
    """

    def __init__(
        self,
        model: nn.Module,
        instruct: Mapping[str, torch.Tensor],
        base: Mapping[str, torch.Tensor],
        *,
        scale: float,
        instruct_scale: float,
        receives: Callable[[str], bool],
    ) -> None:
        self.model = model
        self.instruct = instruct
        self.base = base
        self.scale = scale
        self.instruct_scale = instruct_scale
        self.receives = receives
        # By the names of the plain model: PEFT puts its own parts between them.
        self.weights = {
            _plain_name(name): parameter
            for name, parameter in _below_adapter(model).named_parameters()
            if not is_peft_model(model) or (not parameter.requires_grad and "lora_" not in name)
        }
        unfit = [
            f"{name}: {tuple(weight.shape)} in training, "
            f"{tuple(side[name].shape) if name in side else 'absent'} in {role}"
            for name, weight in sorted(self.weights.items())
            for role, side in (("INSTRUCT", instruct), ("BASE", base))
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
        instruct = self.instruct[name]
        if not self.base or not self.receives(name):
            return instruct
        base = self.base[name].to(current.dtype).float()
        delta = current.float() - base
        if self.instruct_scale == 1.0:
            return instruct.float() + self.scale * delta
        return base + self.scale * delta + self.instruct_scale * (instruct.float() - base)

    @contextmanager
    def _scaled_adapter(self) -> Iterator[None]:
        """Multiply the adapter by the scale of the graft, and by 0 where the graft leaves a weight alone."""
        before: list[tuple[dict[str, float], dict[str, float]]] = []
        for name, module in _below_adapter(self.model).named_modules():
            scaling = getattr(module, "scaling", None)
            if isinstance(scaling, dict) and hasattr(module, "lora_A"):
                before.append((scaling, dict(scaling)))
                factor = self.scale if self.receives(f"{_plain_name(name)}.weight") else 0.0
                scaling.update({adapter: value * factor for adapter, value in scaling.items()})
        try:
            yield
        finally:
            for scaling, values in before:
                scaling.update(values)

    def _restore(self, kept: Mapping[str, torch.Tensor]) -> None:
        for name, tensor in kept.items():
            self.weights[name].copy_(tensor)


def check_exchangeable(model: Any, args: Any) -> None:
    """Refuse `eval_grafted` where an exchange of weights would not give the graft.

    Args:
        model: the model in training.
        args: a `ShadowSFTConfig` or `ShadowDPOConfig`.

    Raises:
        ConfigError: a quantised BASE, an adapter that is not the same delta on INSTRUCT, or an `instruct_scale`
            that needs BASE's weights below an adapter.
    """
    reasons = []
    if any(getattr(model, name, False) for name in ("is_quantized", "is_loaded_in_4bit", "is_loaded_in_8bit")):
        reasons.append("BASE is quantised: its weights cannot be exchanged for INSTRUCT's")
    if is_peft_model(model):
        settings = model.peft_config[model.active_adapters[0]].to_dict()
        reasons += [f"the adapter is more than a plain LoRA: {name}" for name in kind_of(settings).beyond]
        if args.instruct_scale != 1.0:
            reasons.append("instruct_scale other than 1 needs BASE's weights beside the adapter")
    if reasons:
        raise ConfigError(
            f"eval_grafted=True is not possible here.\n{list_names(reasons)}\nPass eval_grafted=False and score the "
            "grafted folder after training. Nothing was written."
        )


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
