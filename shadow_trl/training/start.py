"""The start of a run, described from the trainer's arguments before any model is loaded."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trl.trainer.utils import get_config_model_id

from ..adapters.kinds import is_subtracted, start_setting
from ..checkpoints.checkpoint import ADAPTER_CONFIG, Checkpoint, read_json
from ..checkpoints.manifest import Entry
from .loading import Loading, bare_model, is_adapted
from .origins import Origins, require_base, require_instruct, resolve_origins


@dataclass(frozen=True)
class Start:
    """What training starts from, and what the delta is measured from.

    Args:
        model: as given: a name, or a loaded model.
        origins: the names of policy, BASE and INSTRUCT.
        loading: how the policy is loaded, and so any model beside it.
        adapter: settings of the adapter that will be trained, as PEFT stores them; None in full fine-tuning.
        base_named: whether the user named the origin of the delta.
    """

    model: Any
    origins: Origins
    loading: Loading
    adapter: Mapping[str, Any] | None
    base_named: bool

    @classmethod
    def of(cls, given: Mapping[str, Any], config: Any, *, base_model: str | None, instruct_model: str | None) -> Start:
        """Return the start of a run with the arguments `given` to the TRL trainer and the two of ours.

        Raises:
            InputError: as `resolve_origins`.
        """
        model, base = given["model"], base_model or config.base_model
        origins = resolve_origins(
            (model if isinstance(model, str) else get_config_model_id(bare_model(model).config)) or None,
            base=base,
            instruct=instruct_model or config.instruct_model,
            policy_revision=(config.model_init_kwargs or {}).get("revision"),
            base_revision=config.base_revision,
            instruct_revision=config.instruct_revision,
        )
        adapter = None
        if given.get("peft_config") is not None:
            adapter = given["peft_config"].to_dict()
        elif is_adapted(model):
            adapter = model.peft_config[model.active_adapters[0]].to_dict()
        elif origins.adapter is not None:
            adapter = read_json(Path(origins.adapter) / ADAPTER_CONFIG)
        # A copy: the trainer changes its config while it is built.
        loading = Loading(copy.copy(config), given.get("quantization_config"))
        loading = loading.like(origins.policy if origins.adapter or isinstance(model, str) else model)
        return cls(model, origins, loading, adapter, bool(base))

    @property
    def in_memory(self) -> bool:
        """Whether the model was given as an object."""
        return not isinstance(self.model, str)

    @property
    def loads_adapter(self) -> bool:
        """Whether the adapter of an earlier run is loaded and trained further."""
        return self.origins.adapter is not None and not self.in_memory

    @property
    def is_free(self) -> bool:
        """Whether the model may hold anything: an object whose origin was named is not compared with that origin."""
        return self.in_memory and self.base_named

    @property
    def is_raw_base(self) -> bool:
        """Whether training starts from BASE's own weights, so that the delta starts at zero."""
        # A loaded model with an adapter has the name of the model below it, and need not be BASE.
        return self.origins.from_raw_base and not self.is_free and not is_adapted(self.model)

    @property
    def adapter_on_base(self) -> bool:
        """Whether an adapter is trained on BASE, not on the full model of an earlier run."""
        return self.adapter is not None and self.origins.policy == self.origins.base

    @property
    def adapter_changes_base(self) -> bool:
        """Whether the model without its adapter is BASE less the adapter's start (PiSSA, OLoRA, ...)."""
        return self.adapter is not None and is_subtracted(start_setting(self.adapter))

    @property
    def is_quantised(self) -> bool:
        """Whether the policy is quantised, by its own attributes, the arguments, or its config on the disk."""
        names = ("is_quantized", "is_loaded_in_4bit", "is_loaded_in_8bit")
        if self.in_memory:
            return any(getattr(bare_model(self.model), name, False) for name in names)
        if self.loading.quantization_config or (self.loading.args.model_init_kwargs or {}).get("quantization_config"):
            return True
        policy = Checkpoint.open(str(self.origins.policy), weights=False)
        return policy.quantisation is not None

    @property
    def base(self) -> Entry:
        """BASE; InputError where it is not known."""
        return require_base(self.origins)

    @property
    def instruct(self) -> Entry:
        """INSTRUCT; ConfigError where it is not known."""
        return require_instruct(self.origins)
