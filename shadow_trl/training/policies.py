"""Trainers whose reference policy can be chosen: it is loaded as the policy was, and held no longer than it is used."""

from __future__ import annotations

from collections.abc import Collection
from contextlib import ExitStack
from types import ModuleType
from typing import TYPE_CHECKING, Any, ClassVar
from unittest.mock import patch

from ..errors import ConfigError
from .adapter import drop_reference_adapter
from .engines import dtype_at_start, is_shared_out, refuse_tensor_parallel, uses_fsdp
from .loading import is_adapted
from .mixin import ShadowMixin
from .older import hash_at_start, kept_as, refuse_values_of_a_part
from .preflight import check_reference_options
from .reference import (
    Reference,
    decide_precompute,
    graft_of_start,
    load_reference,
    prepared,
    reference_key,
    release,
    shard_reference,
    shared_on_disk,
    weights_hash,
)

if TYPE_CHECKING:
    from transformers import PreTrainedModel
    from trl import DPOTrainer as _Trainer
else:
    _Trainer = object  # each stands before a TRL trainer, whatever that one is


class ReferencePolicy(ShadowMixin):
    """A trainer with a choice of reference policy (`ReferenceArguments.ref_policy`); the loss stays TRL's.

    `_trl_module` is where TRL's trainer is defined. A subclass says how TRL is given a reference of ours.
    """

    _trl_module: ClassVar[ModuleType]
    _reference: Reference | None
    _of_object: PreTrainedModel | None
    ref_model: Any

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        # What is opened here is held until TRL's __init__ has computed the reference log probabilities of all its data.
        with ExitStack() as scope:
            self._initialising: ExitStack | None = scope
            scope.enter_context(patch.object(self._trl_module, "prepare_fsdp", shard_reference))
            super().__init__(*args, **kwargs)
        self._initialising = None
        self._of_object = None
        if self._reference is not None:
            drop_reference_adapter(self.model)
            self._after_start()

    def _choose_reference(self, config: Any, given: dict[str, Any]) -> None:
        check_reference_options(config, ref_model=given.get("ref_model"))
        start = self._start
        self._reference = Reference.of(start, config.ref_policy)
        # In full fine-tuning TRL loads the start by its name, which an object may have left behind.
        by_name = self._reference is None and start.adapter is None and given.get("ref_model") is None
        policy = start.origins.policy
        elsewhere = policy is not None and policy.asked is not None  # the name alone leads to the main branch
        left_behind = by_name and start.in_memory and (elsewhere or not start.is_compared)
        preferred = self._reference is not None or left_behind
        stays = self._stays_in_memory(config, given, preferred=preferred and given.get("ref_model") is None)
        if left_behind and stays:
            self._reference = Reference(None)
        # What an object holds is known from the object alone, until an adapter or training changes it.
        self._of_object = None
        if start.in_memory and self._reference is not None and self._reference.of_object:
            grafted = self._reference.grafted
            self._of_object = graft_of_start(start) if grafted else load_reference(start.model, loading=start.loading)
        if self._reference is not None and stays:
            self._hand_over(config, given)

    def _stays_in_memory(self, config: Any, given: dict[str, Any], *, preferred: bool) -> bool:
        """Return whether a reference of ours is used as long as TRL's; `preferred`: whether it is another model."""
        raise NotImplementedError

    def _hand_over(self, config: Any, given: dict[str, Any]) -> None:
        """Load the reference, and let TRL take it in the place of its own."""
        raise NotImplementedError

    def _after_start(self) -> None:
        """Do what is left to do with a reference of ours once TRL has made its trainer."""
        raise NotImplementedError

    def _load_reference(self) -> PreTrainedModel:
        assert self._reference is not None
        if self._reference.source is not None and not self._reference.grafted:
            return load_reference(self._reference.source, loading=self._start.loading)
        if not self._start.in_memory:
            return graft_of_start(self._start)
        model, self._of_object = self._of_object, None
        if model is None:
            raise ConfigError(
                "the reference is no longer known: the model was given as an object, which training has "
                "changed. Give this data as eval_dataset to the trainer, or save the start and pass model=folder."
            )
        return model


class PrecomputedReference(ReferencePolicy, _Trainer):
    """The reference of a trainer that takes a `ref_model` and can compute its log probabilities before training.

    `_ref_names` are the columns that TRL puts them into, `_takes_values` whether rows may come with them.
    """

    _ref_names: ClassVar[tuple[str, str]]
    _takes_values: ClassVar[bool] = True
    precompute_ref_logps: bool

    def _stays_in_memory(self, config: Any, given: dict[str, Any], *, preferred: bool) -> bool:
        decide_precompute(config, given, preferred=preferred, has_values=self._has_values)
        refuse_tensor_parallel(config, given["model"])
        if self._reference is None:
            refuse_values_of_a_part(config)
        # Under FSDP, TRL precomputes with a reference of its own, the policy by its name, unless it is given one.
        return uses_fsdp(config) or not config.precompute_ref_log_probs

    def _hand_over(self, config: Any, given: dict[str, Any]) -> None:
        given["ref_model"] = self._load_reference()

    def _after_start(self) -> None:
        if self.precompute_ref_logps and self.ref_model is not None:
            release(self.ref_model, self.accelerator)
            self.ref_model = None

    def _has_values(self, columns: Collection[str]) -> bool:
        """Return whether rows with these columns come with their reference log probabilities."""
        return self._takes_values and set(columns) >= set(self._ref_names)

    def _hold_reference(self, scope: ExitStack) -> None:
        """Load the reference; it is released when `scope` ends."""
        self.ref_model = scope.enter_context(prepared(self._load_reference(), self.accelerator, self.args))
        scope.callback(setattr, self, "ref_model", None)

    def evaluate(self, eval_dataset: Any = None, *args: Any, **kwargs: Any) -> dict[str, float]:
        """As TRL. For new rows a reference that was released is loaded again, in full fine-tuning as well."""
        new = eval_dataset is not None and not isinstance(eval_dataset, str)
        with ExitStack() as scope:
            # Under an adapter it is loaded where the values are computed, if they are not there yet.
            if new and self.precompute_ref_logps and self.ref_model is None and not is_adapted(self.model):
                sets = eval_dataset.values() if isinstance(eval_dataset, dict) else [eval_dataset]
                if all(self._has_values(one.column_names or ()) for one in sets):
                    # Nothing will be computed with it; TRL asks whether there is a reference before it looks.
                    self.ref_model = self.model
                    scope.callback(setattr, self, "ref_model", None)
                elif self._reference is not None:
                    self._hold_reference(scope)
            return super().evaluate(eval_dataset, *args, **kwargs)

    def _precompute_ref_logps(self, dataset: Any, name: str, batch_size: int) -> Any:
        """As TRL, with the chosen reference, in memory for just this long. Columns that are there already are used."""
        if self._has_values(dataset.column_names or ()):
            return dataset
        if not hasattr(dataset, "select_columns") or not hasattr(dataset, "cache_files"):
            return super()._precompute_ref_logps(dataset, name, batch_size)  # TRL says why it cannot
        dataset = shared_on_disk(dataset, self.accelerator)
        with ExitStack() as here:
            if self._reference is not None and self.ref_model is None:
                self._hold_reference(self._initialising or here)
            model = self.accelerator.unwrap_model(self.ref_model or self.model)
            # TRL's is of the policy as it starts, whatever it has become, or of the reference it was given, before FSDP
            # shares it out. ZeRO-3 has done so by then, and TRL's would be the same for all models.
            known = self._reference is None or uses_fsdp(self.args)
            shared = any(map(is_shared_out, model.parameters()))
            weights = (known and not shared and hash_at_start(self)) or weights_hash(model)
            precision = f"{self.accelerator.mixed_precision} {dtype_at_start(self.accelerator, model)}"
            key = reference_key(weights, model, self.args, self.data_collator, precision)
            here.enter_context(kept_as(self, key))
            return super()._precompute_ref_logps(dataset, name, batch_size)

    def _compute_loss(self, model: Any, inputs: Any, return_outputs: bool) -> Any:
        """As TRL. Reference log probabilities that come with the data are used, whether or not others are computed.

        In the two passes of `eval_grafted`, both take the reference log probabilities of the first.
        """
        known = self._has_values(inputs)
        if self.precompute_ref_logps or (not known and self._references is None):
            return super()._compute_loss(model, inputs, return_outputs)
        if self._references is not None and not known:
            reference = self.ref_model or self.model
            values = self._references.of(inputs, lambda: self.compute_ref_log_probs(reference, inputs))
            inputs = {**inputs, **dict(zip(self._ref_names, values, strict=True))}
        self.precompute_ref_logps = True  # so that TRL takes them from the batch
        try:
            return super()._compute_loss(model, inputs, return_outputs)
        finally:
            self.precompute_ref_logps = False
