"""TRL's trainers, run on BASE, that graft what was learnt onto INSTRUCT when training ends."""

from __future__ import annotations

from contextlib import ExitStack
from typing import TYPE_CHECKING, Any, ClassVar

from trl import DPOTrainer, SFTTrainer
from trl.trainer.utils import hash_module

from ..errors import ConfigError
from .config import ShadowDPOConfig, ShadowSFTConfig
from .loading import is_adapted, loaded_as
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
)
from .reference_cache import policy_hash, reference_key, shared_on_disk, with_content_fingerprint

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
    _reference: Reference | None
    _tag_names: ClassVar[list[str]] = [*DPOTrainer._tag_names, "shadow-ft"]  # type: ignore[misc]

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        # What is opened here is held until TRL's __init__ has computed the reference log probabilities of all its data.
        with ExitStack() as scope:
            self._initialising: ExitStack | None = scope
            super().__init__(*args, **kwargs)
        self._initialising = None
        if self._reference is not None:
            drop_reference_adapter(self.model)
            self._start = None

    def _choose_reference(self, config: Any, given: dict[str, Any]) -> None:
        check_reference_options(config, ref_model=given.get("ref_model"))
        # What an object holds is known from the object alone, and only until training changes it.
        self._start = None if isinstance(given["model"], str) else given["model"]
        self._start_known = self._start is None
        self._reference = self._reference_source(config)
        self._loading = {
            "args": self._loading_args,
            "policy": loaded_as(self.origins.policy if self.origins.adapter else given["model"], config),
            "quantization_config": given.get("quantization_config"),
        }
        # In full fine-tuning TRL loads the start by its name, which an object may have left behind.
        by_name = self._reference is None and not (self._start_is_free and not self._trains_adapter)
        decide_precompute(config, given, preferred=not by_name and given.get("ref_model") is None)
        if self._reference is not None and not config.precompute_ref_log_probs:
            given["ref_model"] = self._load_reference()

    def _reference_source(self, config: Any) -> Reference | None:
        """Return what the reference is loaded from, None where it is the policy as it starts."""
        origins = self.origins
        # A loaded model with an adapter has the name of the model below it, and need not be BASE.
        raw = origins.from_raw_base and not self._start_is_free and not is_adapted(self._start)
        if config.ref_policy == "init" or (config.ref_policy == "base" and raw):
            # TRL's reference is the model without its adapter: with PiSSA or OLoRA not what training starts from.
            if self._adapter_changes_base and origins.adapter is None and origins.policy is not None:
                return Reference(origins.policy, origins.policy_revision)
            return None
        if config.ref_policy == "base":
            return Reference(require_base(origins), origins.base_revision)
        # A graft of an untrained BASE adds nothing: it is INSTRUCT.
        grafted = config.ref_policy == "grafted" and not raw
        return Reference(require_instruct(origins), origins.instruct_revision, grafted=grafted)

    def _load_reference(self) -> PreTrainedModel:
        assert self._reference is not None
        if not self._reference.grafted:
            return load_reference(self._reference.source, revision=self._reference.revision, **self._loading)
        if self._start is None and not self._start_known:
            raise ConfigError(
                "the graft of the start is no longer known: the model was given as an object, which training has "
                "changed. Give this data as eval_dataset to the trainer, or save the start and pass model=folder."
            )
        return graft_of_start(self.origins, start=self._start, **self._loading)

    def _hold_reference(self, scope: ExitStack) -> None:
        """Load the reference; it is released when `scope` ends."""
        self.ref_model = scope.enter_context(prepared(self._load_reference(), self.accelerator))
        scope.callback(setattr, self, "ref_model", None)

    def evaluate(self, eval_dataset: Any = None, *args: Any, **kwargs: Any) -> dict[str, float]:
        """As TRL. For new rows a reference that was released is loaded again, in full fine-tuning as well."""
        new = eval_dataset is not None and not isinstance(eval_dataset, str)
        with ExitStack() as scope:
            # Under an adapter it is loaded where the values are computed, if they are not there yet.
            if new and self.precompute_ref_logps and self.ref_model is None and not is_adapted(self.model):
                sets = eval_dataset.values() if isinstance(eval_dataset, dict) else [eval_dataset]
                if all(set(one.column_names or ()) >= REF_COLUMNS for one in sets):
                    # Nothing will be computed with it; TRL asks whether there is a reference before it looks.
                    self.ref_model = self.model  # type: ignore[assignment]
                    scope.callback(setattr, self, "ref_model", None)
                elif self._reference is not None:
                    self._hold_reference(scope)
            return super().evaluate(eval_dataset, *args, **kwargs)

    def _precompute_ref_logps(self, dataset: Any, name: str, batch_size: int) -> Any:
        """As TRL, with the chosen reference, in memory for just this long. Columns that are there already are used."""
        if set(dataset.column_names or ()) >= REF_COLUMNS:
            return dataset
        if not hasattr(dataset, "select_columns") or not hasattr(dataset, "cache_files"):
            return super()._precompute_ref_logps(dataset, name, batch_size)  # TRL says why it cannot
        dataset = with_content_fingerprint(shared_on_disk(dataset, self.accelerator))
        with ExitStack() as here:
            if self._reference is not None and self.ref_model is None:
                self._hold_reference(self._initialising or here)
            here.callback(setattr, self, "_precompute_model_hash", self._precompute_model_hash)
            model = self.ref_model
            self._precompute_model_hash = reference_key(
                policy_hash(self.model) if model is None else hash_module(model), self.args
            )
            return super()._precompute_ref_logps(dataset, name, batch_size)

    def _compute_loss(self, model: Any, inputs: Any, return_outputs: bool) -> Any:
        """As TRL. Reference log probabilities that come with the data are used, whether or not others are computed.

        In the two passes of `eval_grafted`, both take the reference log probabilities of the first.
        """
        known = inputs.keys() >= REF_COLUMNS
        if self.precompute_ref_logps or not (known or self._references.active):
            return super()._compute_loss(model, inputs, return_outputs)
        if not known:
            reference = self.ref_model or self.model
            chosen, rejected = self._references.through(inputs, lambda: self.compute_ref_log_probs(reference, inputs))
            inputs = {**inputs, "ref_chosen_logps": chosen, "ref_rejected_logps": rejected}
        self.precompute_ref_logps = True  # so that TRL takes them from the batch
        try:
            return super()._compute_loss(model, inputs, return_outputs)
        finally:
            self.precompute_ref_logps = False
