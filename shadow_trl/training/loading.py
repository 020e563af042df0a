"""Models loaded as TRL's trainers load the policy, and the adapter of an earlier run put on one of them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from accelerate.utils import is_peft_model

from ..errors import AdapterError, list_names

if TYPE_CHECKING:
    from peft import PeftConfig, PeftModel
    from transformers import PreTrainedModel

# What an adapter's config says of its origin and use, not of its form.
_NOT_FORM = {"base_model_name_or_path", "revision", "inference_mode", "task_type", "peft_version", "auto_mapping"}


def load_model(
    source: str,
    *,
    args: Any,
    revision: str | None = None,
    policy: Mapping[str, Any] | None = None,
    quantization_config: Any = None,
) -> PreTrainedModel:
    """Load the model in `source` with the keyword arguments the policy is loaded with.

    Args:
        source: folder or hub id.
        args: a TRL config; its `model_init_kwargs` load the policy and so load this model.
        revision: of `source` on the hub; replaces the policy's. Default the main branch.
        policy: keyword arguments that win over `model_init_kwargs`, `dtype` of the policy above all.
        quantization_config: as given for the policy.

    Returns:
        the model. The state of the random generators is as before: loading must not change what is trained.
    """
    from trl.trainer.utils import create_model_from_path

    # The config's own parsing has made a dictionary of what was a string on the command line.
    kwargs = {**cast("dict[str, Any]", args.model_init_kwargs or {}), **(policy or {}), "revision": revision or "main"}
    kwargs.setdefault("trust_remote_code", args.trust_remote_code)
    if quantization_config is not None:
        kwargs["quantization_config"] = quantization_config
    if args.distributed_state.distributed_type in ("MULTI_GPU", "DEEPSPEED"):
        kwargs["device_map"] = None  # as TRL: `auto` would spread one rank's model over every device
    with torch.random.fork_rng():
        return create_model_from_path(source, **kwargs)


def loaded_as(model: Any, config: Any) -> dict[str, Any]:
    """Return the keyword arguments that load another model in the way `model` is or will be loaded."""
    if not isinstance(model, str):
        bare = bare_model(model)
        return {"dtype": bare.dtype, "attn_implementation": bare.config._attn_implementation}
    dtype = (config.model_init_kwargs or {}).get("dtype", "float32")
    if dtype not in ("auto", None):
        return {"dtype": dtype}
    from transformers import AutoConfig

    # INSTRUCT's own dtype may be another one than BASE's.
    return {"dtype": AutoConfig.from_pretrained(model, trust_remote_code=config.trust_remote_code).dtype or "float32"}


def load_adapter(adapter: str, model: PreTrainedModel, *, trainable: bool) -> PeftModel:
    """Put the PEFT adapter in the folder `adapter` on `model`, in fp32 as PEFT trains it; return the wrapped model."""
    from peft import PeftModel

    with torch.random.fork_rng():
        return PeftModel.from_pretrained(model, adapter, is_trainable=trainable)


def check_same_adapter(peft_config: PeftConfig, adapter: str) -> None:
    """Check that a `peft_config` given beside the folder of an adapter describes that same adapter.

    Raises:
        AdapterError: a setting differs; the adapter cannot go on with other settings.
    """
    stored = json.loads((Path(adapter) / "adapter_config.json").read_text(encoding="utf-8"))
    given = json.loads(json.dumps(peft_config.to_dict(), default=_plain))
    changed = [
        f"{name}: {stored.get(name)!r} in {adapter}, {given.get(name)!r} in peft_config"
        for name in sorted(stored.keys() | given.keys())
        if name not in _NOT_FORM and _unordered(stored.get(name)) != _unordered(given.get(name))
    ]
    # "all-linear" is written as the names it stood for.
    changed = [line for line in changed if not (line.startswith("target_modules:") and "'all-linear'" in line)]
    if changed:
        raise AdapterError(
            f"the adapter in {adapter} goes on, but peft_config differs from it in {len(changed)} settings.\n"
            f"{list_names(changed)}\nLeave peft_config out to train the same adapter further. To start a new one, "
            "merge the old one first (PeftModel.merge_and_unload, then save_pretrained) and pass that folder as model "
            "with base_model=... naming BASE. Nothing was written."
        )


def _plain(value: Any) -> Any:
    return sorted(value) if isinstance(value, set) else str(getattr(value, "value", value))


def _unordered(value: Any) -> Any:
    # Names are stored from a set, in an order of their own; nothing given and nothing listed are the same.
    return sorted(value) if isinstance(value, list) and all(isinstance(item, str) for item in value) else value or None


def adapter_settings(peft_config: PeftConfig | None, model: Any, adapter: str | None) -> dict[str, Any] | None:
    """Return the settings of the adapter that will be trained, None in full fine-tuning.

    Args:
        peft_config: of a new adapter.
        model: name, or loaded model that may have an adapter.
        adapter: folder of an adapter that goes on.
    """
    if peft_config is not None:
        return peft_config.to_dict()
    if is_adapted(model):
        return model.peft_config[model.active_adapters[0]].to_dict()
    if adapter is not None:
        return json.loads((Path(adapter) / "adapter_config.json").read_text(encoding="utf-8"))
    return None


def is_adapted(model: Any) -> bool:
    """Return whether `model` is a loaded model with a PEFT adapter; a name, or None, is not."""
    return model is not None and not isinstance(model, str) and is_peft_model(model)


def bare_model(model: Any) -> Any:
    """Return the model below the adapter, or `model` where it has none."""
    return model.get_base_model() if is_adapted(model) else model
