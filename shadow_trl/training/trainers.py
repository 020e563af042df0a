"""TRL's trainers, run on BASE, that graft what was learnt onto INSTRUCT when training ends."""

from __future__ import annotations

from typing import Any, ClassVar

from trl import DPOTrainer, SFTTrainer
from trl.trainer import dpo_trainer

from .config import ShadowDPOConfig, ShadowSFTConfig
from .mixin import ShadowMixin
from .policies import PrecomputedReference
from .settings import Forms


class ShadowSFTTrainer(ShadowMixin, SFTTrainer):
    """TRL's `SFTTrainer` on BASE; `train()` ends with the graft onto INSTRUCT (Shadow-FT, 2505.12716, equation 2)."""

    config_class = ShadowSFTConfig
    _figures = "_metrics"
    _tag_names: ClassVar[list[str]] = [*SFTTrainer._tag_names, "shadow-ft"]  # type: ignore[misc]

    def _data_forms(self, config: Any) -> Forms:
        text = config.dataset_text_field
        return [{"messages"}, {"prompt", "completion"}, {text}, {"conversations"}, {"input_ids"}]


class ShadowDPOTrainer(PrecomputedReference, DPOTrainer):
    """TRL's `DPOTrainer` on BASE with a choice of reference policy; `train()` ends with the graft onto INSTRUCT.

    Only the reference changes (`ShadowDPOConfig.ref_policy`): it is loaded as the policy was, used for the reference
    log probabilities, and released when they were computed before training.
    """

    config_class = ShadowDPOConfig
    _figures = "_metrics"
    _trl_module: ClassVar = dpo_trainer
    _ref_names = ("ref_chosen_logps", "ref_rejected_logps")
    _tag_names: ClassVar[list[str]] = [*DPOTrainer._tag_names, "shadow-ft"]  # type: ignore[misc]

    def _data_forms(self, config: Any) -> Forms:
        return [{"chosen", "rejected"}]
