"""TRL's trainers, run on BASE, that graft what was learnt onto INSTRUCT when training ends."""

from __future__ import annotations

from contextlib import ExitStack
from typing import TYPE_CHECKING, Any, ClassVar

from trl import DPOTrainer, SFTTrainer
from trl.trainer.utils import hash_module

from .config import ShadowDPOConfig, ShadowSFTConfig
from .loading import loaded_as
from .mixin import ShadowMixin
from .origins import require_base, require_instruct
from .reference import (
    REF_COLUMNS,
    Reference,
    check_reference_options,
    decide_precompute,
    drop_reference_adapter,
    graft_of_start,
    load_reference,
    prepared,
    reference_key,
    shared_on_disk,
    with_content_fingerprint,
)

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["ShadowDPOTrainer", "ShadowMixin", "ShadowSFTTrainer"]


class ShadowSFTTrainer(ShadowMixin, SFTTrainer):
    """TRL's `SFTTrainer` on BASE; `train()` ends with the graft onto INSTRUCT (Shadow-FT, 2505.12716, equation 2)."""

    _config_class = ShadowSFTConfig
    _tag_names: ClassVar[list[str]] = [*SFTTrainer._tag_names, "shadow-ft"]  # type: ignore[misc]


class ShadowDPOTrainer(ShadowMixin, DPOTrainer):
    """TRL's `DPOTrainer` on BASE with a choice of reference policy; `train()` ends with the graft onto INSTRUCT.

    Only the reference changes (`ShadowDPOConfig.ref_policy`): it is loaded as the policy was, used for the reference
    log probabilities, and released when they were computed before training.
    """

    _config_class = ShadowDPOConfig
    _tag_names: ClassVar[list[str]] = [*DPOTrainer._tag_names, "shadow-ft"]  # type: ignore[misc]

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        # What is opened here is held until TRL's __init__ has computed the reference log probabilities of all its data.
        with ExitStack() as scope:
            self._initialising: ExitStack | None = scope
            super().__init__(*args, **kwargs)
        self._initialising = None
        if self._reference is not None:
            drop_reference_adapter(self.model)

    def _choose_reference(self, config: Any, given: dict[str, Any]) -> None:
        check_reference_options(config, ref_model=given.get("ref_model"))
        self._reference = self._reference_source(config)
        self._loading = {
            "args": self._loading_args,
            "policy": loaded_as(self.origins.policy if self.origins.adapter else given["model"], config),
            "quantization_config": given.get("quantization_config"),
        }
        decide_precompute(config, given, other_reference=self._reference is not None)
        if self._reference is not None and not config.precompute_ref_log_probs:
            given["ref_model"] = self._load_reference()

    def _reference_source(self, config: Any) -> Reference | None:
        """Return what the reference is loaded from, None where it is the policy as it starts."""
        origins = self.origins
        if config.ref_policy == "init" or (config.ref_policy == "base" and origins.from_raw_base):
            # TRL's reference is the model without its adapter: with PiSSA or OLoRA not what training starts from.
            if self._adapter_changes_base and origins.adapter is None and origins.policy is not None:
                return Reference(origins.policy, origins.policy_revision)
            return None
        if config.ref_policy == "base":
            return Reference(require_base(origins), origins.base_revision)
        # A graft of an untrained BASE adds nothing: it is INSTRUCT.
        grafted = config.ref_policy == "grafted" and not origins.from_raw_base
        return Reference(require_instruct(origins), origins.instruct_revision, grafted=grafted)

    def _load_reference(self) -> PreTrainedModel:
        assert self._reference is not None
        if self._reference.grafted:
            return graft_of_start(self.origins, **self._loading)
        return load_reference(self._reference.source, revision=self._reference.revision, **self._loading)

    def _precompute_ref_logps(self, dataset: Any, name: str, batch_size: int) -> Any:
        """As TRL, with the chosen reference, in memory for just this long. Columns that are there already are used."""
        if set(dataset.column_names or ()) >= REF_COLUMNS:
            return dataset
        dataset = with_content_fingerprint(shared_on_disk(dataset, self.accelerator))
        policy_hash = self._precompute_model_hash
        with ExitStack() as here:
            if self._reference is not None and self.ref_model is None:
                scope = self._initialising or here
                self.ref_model = scope.enter_context(prepared(self._load_reference(), self.accelerator))
                scope.callback(setattr, self, "ref_model", None)
            reference_hash = policy_hash if self._reference is None else hash_module(self.ref_model)  # type: ignore[arg-type]
            self._precompute_model_hash = reference_key(reference_hash, self.args)
            here.callback(setattr, self, "_precompute_model_hash", policy_hash)
            return super()._precompute_ref_logps(dataset, name, batch_size)

    def _compute_loss(self, model: Any, inputs: Any, return_outputs: bool) -> Any:
        """As TRL. In the two passes of `eval_grafted`, both take the reference log probabilities of the first."""
        if self.precompute_ref_logps or not self._references.active:
            return super()._compute_loss(model, inputs, return_outputs)
        reference = self.ref_model or self.model
        chosen, rejected = self._references.through(inputs, lambda: self.compute_ref_log_probs(reference, inputs))
        self.precompute_ref_logps = True  # so that TRL takes them from the batch
        try:
            known = {**inputs, "ref_chosen_logps": chosen, "ref_rejected_logps": rejected}
            return super()._compute_loss(model, known, return_outputs)
        finally:
            self.precompute_ref_logps = False
