"""PEFT's configs of adapters: read, narrowed to one module, and what PEFT needs to see to set up its layers."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import fields
from typing import Any

from ..checkpoints.checkpoint import Checkpoint
from ..errors import AdapterError, list_names
from .kinds import is_plain_start, peft_type, start_setting

# Types that PEFT sets up without a look at the weights under them: their layers are made before a weight is read.
_BLIND = frozenset({
    "LORA", "ADALORA", "LOHA", "LOKR", "VERA", "PVERA", "VBLORA", "UNILORA", "RANDLORA", "FOURIERFT", "WAVEFT",
    "C3A", "GRALORA", "DELORA", "SHIRA", "MISS", "HIRA", "HRA", "IA3", "OFT", "BOFT", "ROAD", "GLORA", "BEFT",
})  # fmt: skip
_AUXILIARY = {"modules_to_save": None, "trainable_token_indices": None}


def peft_config_of(adapter: Checkpoint) -> Any:
    """Return PEFT's config of the adapter less what is not PEFT's layers: full values are handled here."""
    from peft import PeftConfig

    config = PeftConfig.from_pretrained(str(adapter.path))
    known = {item.name for item in fields(config)} | {"peft_version"}
    strange = [
        f"{name} = {value}"
        for name, value in adapter.adapter_config.items()
        if name not in known and value not in (None, False, [], {}, "none")
    ]
    if strange:
        # PEFT itself ignores them, with a warning.
        raise AdapterError(
            f"adapter {adapter} has settings that the installed PEFT does not know.\n{list_names(strange)}\n"
            "Update peft, or merge the adapter with the version that trained it. Nothing was written."
        )
    for name, value in _AUXILIARY.items():
        if hasattr(config, name):
            setattr(config, name, value)
    if getattr(config, "bias", "none") != "none":
        config.bias = "none"
    config.inference_mode = True
    if hasattr(config, "init_lora_weights") and is_plain_start(start_setting(config.to_dict())):
        config.init_lora_weights = (
            True  # the factors are in the file: none is made from the weights (MiCA) or at random
        )
    return config


def tuner_of(config: Any) -> Any:
    """Return PEFT's class for the type of a config."""
    from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING

    return PEFT_TYPE_TO_TUNER_MAPPING[config.peft_type]


def is_blind(config: Any) -> bool:
    """Whether PEFT sets up its layers of this type without a look at the weights under them."""
    settings = config.to_dict()
    changes = settings.get("kasa_config") or not is_plain_start(start_setting(settings))
    return not changes and peft_type(settings) in _BLIND


def only_module(config: Any, module: str) -> Any:
    """Return the config for one module by its full name."""
    one = deepcopy(config)
    one.target_modules = {module}
    for name in ("exclude_modules", "layers_to_transform", "layers_pattern"):
        if hasattr(one, name):
            setattr(one, name, None)
    return one
