"""GRPO and RLOO on BASE: answers are generated and rewarded as TRL does, and the run ends with a graft."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from trl import GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer
from trl.trainer import grpo_trainer, rloo_trainer

from ..errors import ConfigError, one_of
from .config import ReferenceArguments
from .older import needs_newest_trl
from .policies import ReferencePolicy
from .reference import prepare
from .settings import Forms

needs_newest_trl("a Shadow trainer that samples its data")

GRPO_LOSSES = ("grpo", "dr_grpo", "dapo", "bnpo", "cispo", "sapo", "luspo", "vespo")
"""TRL's, which names them only when the loss of the first batch is computed."""


@dataclass
class OnlineArguments(ReferenceArguments):
    """The choice of the reference policy (`ReferenceArguments`), which acts where beta is not 0."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.ref_policy != "init" and self.beta == 0:  # type: ignore[attr-defined]
            raise ConfigError(
                f"ref_policy={self.ref_policy!r} has no effect with beta=0: no reference policy is in the loss. Pass a "
                "beta above 0, or leave ref_policy out."
            )


@dataclass
class ShadowGRPOConfig(OnlineArguments, GRPOConfig):
    """TRL's `GRPOConfig` with the arguments of the graft and of the reference policy (`ReferenceArguments`)."""

    def __post_init__(self) -> None:
        one_of("loss_type", self.loss_type, GRPO_LOSSES)
        one_of("importance_sampling_level", self.importance_sampling_level, ("token", "sequence"))
        super().__post_init__()


@dataclass
class ShadowRLOOConfig(OnlineArguments, RLOOConfig):
    """TRL's `RLOOConfig` with the arguments of the graft and of the reference policy (`ReferenceArguments`)."""


class OnlineReference(ReferencePolicy):
    """The reference of a trainer that makes its own where beta is not 0, and takes none."""

    beta: float
    temperature: float

    def _data_forms(self, config: Any) -> Forms:
        return [{"prompt"}]

    def _pin_model(self, given: dict[str, Any]) -> None:
        args = given["args"]
        before = args.model_init_kwargs
        super()._pin_model(given)
        if args.model_init_kwargs is not before:
            # TRL would load a reward model with the revision of BASE too.
            rewards = given.get("reward_funcs") or []
            rewards = rewards if isinstance(rewards, list) else [rewards]
            given["reward_funcs"] = [
                _reward(one, args, before or {}) if isinstance(one, str) else one for one in rewards
            ]

    def _choose_reference(self, config: Any, given: dict[str, Any]) -> None:
        self._reference, self._beta = None, config.beta
        if config.beta:  # without it the loss has no reference
            super()._choose_reference(config, given)

    def _stays_in_memory(self, config: Any, given: dict[str, Any], *, preferred: bool) -> bool:
        return True

    def _hand_over(self, config: Any, given: dict[str, Any]) -> None:
        for option in ("sync_ref_model", "cast_lm_head_to_fp32"):
            if getattr(config, option, False):
                raise ConfigError(
                    f"{option}=True acts on the reference that TRL makes by the name of the model, and the reference "
                    "of this run is another. Leave it out, or pass the model as a folder with ref_policy='init'."
                )
        self._held = self._load_reference()
        config.beta = 0.0  # so that TRL makes none

    def _after_start(self) -> None:
        self.args.beta = self.beta = self._beta
        self.ref_model = prepare(self._held, self.accelerator, self.args, temperature=self.temperature)
        del self._held


def _reward(name: str, args: Any, options: dict[str, Any]) -> Any:
    """Load a reward model as TRL does."""
    from transformers import AutoModelForSequenceClassification

    how = {"trust_remote_code": args.trust_remote_code, **options}
    if args.distributed_state.distributed_type in ("MULTI_GPU", "DEEPSPEED"):
        how["device_map"] = None
    return AutoModelForSequenceClassification.from_pretrained(name, num_labels=1, **how)


class ShadowGRPOTrainer(OnlineReference, GRPOTrainer):
    """TRL's `GRPOTrainer` on BASE with a choice of reference policy; `train()` ends with the graft onto INSTRUCT."""

    config_class = ShadowGRPOConfig
    _trl_module: ClassVar = grpo_trainer
    _tag_names: ClassVar[list[str]] = [*GRPOTrainer._tag_names, "shadow-ft"]  # type: ignore[misc]


class ShadowRLOOTrainer(OnlineReference, RLOOTrainer):
    """TRL's `RLOOTrainer` on BASE with a choice of reference policy; `train()` ends with the graft onto INSTRUCT."""

    config_class = ShadowRLOOConfig
    _trl_module: ClassVar = rloo_trainer
    _tag_names: ClassVar[list[str]] = [*RLOOTrainer._tag_names, "shadow-ft"]  # type: ignore[misc]
