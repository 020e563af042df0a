"""What the oldest releases of TRL, transformers, PEFT and accelerate that are supported lack.

Each piece names the release that made it unnecessary: it is deleted when that one is the oldest in
`runtime.versions`. `adapters.peft_layers` has two more of PEFT 0.21, `checkpoints.hub` one of huggingface_hub 2.0.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import field
from pathlib import Path
from typing import Any, TypeVar
from unittest.mock import patch

from accelerate import __version__ as accelerate_release
from packaging.version import Version
from peft import __version__ as peft_release
from transformers import PreTrainedModel, TrainingArguments
from transformers.integrations import is_fsdp_enabled
from trl import DPOTrainer
from trl import __version__ as trl_release
from trl.trainer import dpo_trainer, sft_trainer

from ..errors import AdapterError, ConfigError, VersionError
from .loading import is_adapted

_Config = TypeVar("_Config")


def with_new_names(config: type[_Config]) -> type[_Config]:
    """Give a class of arguments, before it is made a dataclass, those that TRL's lacks by their names of today.

    Until transformers 5.21: `activation_checkpointing`, which was called `gradient_checkpointing`.
    """
    if not hasattr(TrainingArguments, "activation_checkpointing"):
        more = {"help": "Recompute activations in the backward pass: slower, less memory.", "nargs": "?", "const": True}
        config.__annotations__["activation_checkpointing"] = "bool | None"
        config.activation_checkpointing = field(default=None, metadata=more)  # type: ignore[attr-defined]
    return config


def use_new_names(args: Any) -> None:
    """Give what `args` say by the names of today the names that the libraries read. Until transformers 5.21."""
    if args.activation_checkpointing is not None:
        args.gradient_checkpointing = args.activation_checkpointing


def add_head(model: PreTrainedModel, args: Any, **head: Any) -> None:
    """Give a model the head that TRL gives the policy; `head` says what it is to compute.

    Until TRL 1.15: one of its own for each trainer, and for DPO none.
    """
    if hasattr(dpo_trainer, "add_fused_lm_head"):
        dpo_trainer.add_fused_lm_head(model, **head)
    elif getattr(args, "loss_type", None) == "chunked_nll":
        older: Any = sft_trainer
        size, nested = older._CHUNKED_LM_HEAD_CHUNK_SIZE, hasattr(model.config, "text_config")
        older._patch_chunked_ce_lm_head(model, chunk_size=size, is_vlm=nested)


def needs_newest_trl(what: str) -> None:
    """Refuse `what` with a TRL whose trainers have not the head that it builds on. Until TRL 1.15.

    Raises:
        VersionError: TRL is older.
    """
    if not hasattr(dpo_trainer, "add_fused_lm_head"):
        raise VersionError(f"{what} needs TRL 1.16 or newer; {trl_release} is installed: pip install -U 'trl>=1.16'.")


def hash_at_start(trainer: Any) -> str | None:
    """Return TRL's hash of the weights that the reference values come from. Until TRL 1.14: None."""
    found = getattr(trainer, "_precompute_model_hash", None)
    return None if found is None else str(found)


def refuse_values_of_a_part(config: Any) -> None:
    """Refuse the values of the policy before training where one process alone has read it. Until TRL 1.15.

    Newer ones load a reference for them, which is shared out like the policy.

    Raises:
        ConfigError: FSDP with `cpu_ram_efficient_loading`.
    """
    if not hasattr(dpo_trainer, "add_fused_lm_head") and config.precompute_ref_log_probs and is_fsdp_enabled():
        raise ConfigError(
            f"TRL {trl_release} would compute the reference values of each process with weights that under "
            "cpu_ram_efficient_loading the first one alone has read. Set fsdp_cpu_ram_efficient_loading to false, pass "
            "precompute_ref_log_probs=False, or install TRL 1.16: pip install -U 'trl>=1.16'."
        )


@contextmanager
def kept_as(trainer: Any, key: str) -> Iterator[None]:
    """Let `key` stand for the model where TRL looks for kept reference values. Until TRL 1.14: in place of its hash."""
    with ExitStack() as stack:
        if hasattr(trainer, "_precompute_model_hash"):
            stack.enter_context(patch.object(trainer, "_precompute_model_hash", key))
        else:
            stack.enter_context(patch.object(dpo_trainer, "hash_module", lambda _: key))
        yield


def has_own_liger_loss(args: Any) -> bool:
    """Whether TRL computes the loss of DPO past `_compute_loss`, which Shadow-DPO overrides. Until TRL 1.14."""
    return hasattr(args, "ref_policy") and hasattr(DPOTrainer, "_compute_loss_liger")


def refuse_lost_optimizer(checkpoint: str | os.PathLike[str]) -> None:
    """Refuse to resume from an optimizer that FSDP saved in shards. Until accelerate 1.13: it reads none of its state.

    Raises:
        ConfigError: accelerate is older, and `checkpoint` has such an optimizer.
    """
    if Version(accelerate_release) < Version("1.13") and Path(checkpoint, "optimizer_0").is_dir():
        raise ConfigError(
            f"{checkpoint} cannot be resumed: accelerate {accelerate_release} would start with a new optimizer: FSDP "
            "saved this one in shards. Install accelerate 1.13 (pip install -U 'accelerate>=1.13'), or train anew with "
            "state_dict_type FULL_STATE_DICT in fsdp_config."
        )


def refuse_lost_biases(model: Any) -> None:
    """Refuse an adapter whose biases are trained and not saved. Until PEFT 0.21: those of adapted layers alone.

    Raises:
        AdapterError: `bias` of its settings ends in `_only`.
    """
    if not is_adapted(model) or Version(peft_release) >= Version("0.21"):
        return
    bias = str(getattr(model.peft_config[model.active_adapters[0]], "bias", "none"))
    if bias.endswith("_only"):
        raise AdapterError(
            f"bias={bias!r} of the adapter needs PEFT 0.21 or newer: {peft_release} trains these biases and does not "
            "save them. Install it, or pass bias='none' or bias='all'."
        )
