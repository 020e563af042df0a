"""What an adapter is: a product that streams, a delta that means the same on INSTRUCT, or one that needs BASE.

What is not in the lists of known types and settings is merged into BASE by PEFT. `get_delta_weight` of PEFT is no
test for it: for DoRA it gives the product alone. The config says all that is needed, peft is not imported.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from ..errors import AdapterError, list_names

START_FOLDER = "shadow/start"
"""Where, below an adapter, the same adapter lies as it was before training."""

# Settings that say where an adapter is from, how it was trained or where it sits: they do not change the product.
_HARMLESS = frozenset({
    "task_type", "inference_mode", "revision", "base_model_name_or_path", "peft_type", "peft_version",
    "auto_mapping", "r", "target_modules", "exclude_modules", "lora_alpha", "lora_dropout", "fan_in_fan_out",
    "use_rslora", "layers_to_transform", "layers_pattern", "rank_pattern", "alpha_pattern", "megatron_core",
    "loftq_config", "eva_config", "corda_config", "runtime_config", "qalora_group_size", "lora_ga_config",
    "ensure_weight_tying", "velora_config",
})  # fmt: skip
_ADAPTIVE = ("init_r", "target_r", "tinit", "tfinal", "deltaT", "beta1", "beta2", "orth_reg_weight", "total_step")
PLAIN_STARTS = (True, False, None, "gaussian", "orthogonal", "eva", "mica")
"""Initialisations of LoRA that leave the weights under the adapter as they were."""
# Those that change them, so that training starts from BASE (LoftQ: from near BASE, by what quantising it loses) only
# together with the product: the delta is the product less its start.
_SUBTRACTED_STARTS = ("pissa", "olora", "corda", "lora_ga", "loftq")
# Why loading such an adapter does not make the weights under it what they were in training.
_LOST_STARTS = {
    "pissa_niter_": "PEFT changes the weights under it at random",
    "corda": "PEFT needs the inputs of the layers that it was made from",
    "lora_ga": "PEFT leaves the weights under it as they are without the gradients that it was made from",
    "loftq": "PEFT quantises the weights under it again, which needs a GPU",
}
# Beside the factors of linear layers: full values, a delta once BASE's are subtracted, and factors of bare parameters.
_PARTS = ("bias", "modules_to_save", "trainable_token_indices", "target_parameters")
NOTHING: tuple[Any, ...] = (None, False, [], {}, "none")

_NO_DELTA = {
    **dict.fromkeys(
        ("PROMPT_TUNING", "MULTITASK_PROMPT_TUNING", "P_TUNING", "PREFIX_TUNING", "CPT", "CARTRIDGE"),
        "it learns a prompt, not weights",
    ),
    "ADAPTION_PROMPT": "it adds attention to a learnt prompt",
    **dict.fromkeys(("XLORA", "POLY", "LILY"), "its delta depends on the input"),
    "SHADOW": "it adds layers beside the model",
}
_NO_DELTA_SETTINGS = {
    "alora_invocation_tokens": "the adapter acts after certain tokens only",
    "arrow_config": "the delta depends on the input",
    "layer_replication": "the adapter adds layers that no INSTRUCT has",
}

# Types beside LoRA and AdaLoRA whose stored tensors mean the same delta on any weights, some with these values only.
_SAME_DELTA = frozenset({
    "LOHA", "LOKR", "VERA", "PVERA", "VBLORA", "UNILORA", "RANDLORA", "FOURIERFT", "WAVEFT", "C3A", "GRALORA",
    "DELORA", "SHIRA", "MISS", "BEFT", "LN_TUNING", "TRAINABLE_TOKENS",
})  # fmt: skip
_SAME_DELTA_WITH: dict[str, tuple[str, tuple[Any, ...]]] = {
    "PVERA": ("sample_at_inference", (False, None)),
    "SHIRA": ("mask_type", ("random", None)),
    "MISS": ("init_weights", (True, None)),
}
SCALABLE = ("LORA", "LN_TUNING", "TRAINABLE_TOKENS")
"""Types whose stored tensors can be multiplied by a scale."""


@dataclass(frozen=True)
class AdapterKind:
    """What can be done with an adapter of a config.

    Args:
        beyond: what makes it more than a plain LoRA, `factor * lora_B @ lora_A`, as `name = value  (why)`; empty where
            its settings are those of one (`lora.streams` looks at its weights).
        obstacles: settings that leave no exact adapter form on INSTRUCT, in the same form.
        subtracted: whether the delta is the product less the product before training, and nothing else.
    """

    beyond: tuple[str, ...]
    obstacles: tuple[str, ...] = ()
    subtracted: bool = False

    @property
    def needs_base(self) -> bool:
        """Whether BASE's weights are needed to work out the delta."""
        return bool(self.beyond) and not self.subtracted


def kind_of(config: Mapping[str, Any]) -> AdapterKind:
    """Return the kind of an adapter, from its settings as PEFT stores them in `adapter_config.json`.

    Raises:
        AdapterError: the adapter has no weight delta.
    """
    check_has_delta(config)
    name = peft_type(config)
    if name in ("LORA", "ADALORA"):
        return _kind_of_lora(config, adaptive=name == "ADALORA")
    setting, values = _SAME_DELTA_WITH.get(name, ("", ()))
    wrong = [f"peft_type = {name}"] if name not in _SAME_DELTA else []
    if setting in config and config[setting] not in values:
        wrong.append(f"{setting} = {config[setting]}")
    why = "the delta depends on the weights under it"
    return AdapterKind((f"peft_type = {name}",), tuple(f"{item}  ({why})" for item in wrong))


def _kind_of_lora(config: Mapping[str, Any], *, adaptive: bool) -> AdapterKind:
    start = start_setting(config)
    subtracted = is_subtracted(start)
    parts = [f"{name} = {config[name]}" for name in _PARTS if config.get(name) not in NOTHING]
    known = {"init_lora_weights", *_PARTS, *_HARMLESS, *(_ADAPTIVE if adaptive else ())}
    wrong = [f"{name} = {value}" for name, value in config.items() if value and name not in known]
    if start not in PLAIN_STARTS and not subtracted:
        wrong.insert(0, f"init_lora_weights = {start}  (not known: it may change the weights under the adapter)")
    beyond = [*(["peft_type = ADALORA"] if adaptive else []), *wrong, *parts]
    if subtracted:
        beyond.append(f"init_lora_weights = {start}  (changes the weights under the adapter)")
        wrong += [f"{part}  (with init_lora_weights = {start})" for part in parts]
    return AdapterKind(tuple(beyond), tuple(wrong), subtracted and not wrong)


def start_setting(config: Mapping[str, Any]) -> Any:
    """Return `init_lora_weights` as PEFT compares it, in small letters; True for the types that do not look at it."""
    value = config.get("init_lora_weights", True)
    if peft_type(config) != "LORA":
        return True  # AdaLoRA has the setting and starts from zero whatever it says
    return value.lower() if isinstance(value, str) else value


def is_subtracted(start: Any) -> bool:
    """Whether an initialisation of LoRA changes the weights under it, so that its product starts from something."""
    return isinstance(start, str) and start.startswith(_SUBTRACTED_STARTS)


def lost_start(start: Any) -> str | None:
    """Return why loading an adapter of this `start_setting` does not restore the weights under it; None if it does."""
    if start in (*PLAIN_STARTS, "pissa", "olora"):
        return None
    known = (why for name, why in _LOST_STARTS.items() if str(start).startswith(name))
    return next(known, "this package does not know what PEFT does to the weights under it")


def more_than_a_product(start: Any, reasons: Iterable[str]) -> AdapterError:
    """Return the error for an adapter whose start can only be subtracted, and that is more than a product."""
    return AdapterError(
        f"an adapter of init_lora_weights={start!r} is grafted as the product less its start, since on loading "
        f"{lost_start(start)}, and this one is more than a product.\n{list_names(reasons)}\nLeave these out, or use "
        "'pissa' or 'olora', whose start PEFT works out again."
    )


def check_has_delta(config: Mapping[str, Any]) -> None:
    """Refuse an adapter that changes no weight.

    Raises:
        AdapterError: prompt learning, or an adapter whose effect depends on the input.
    """
    name = peft_type(config)
    reasons = [f"peft_type = {name}  ({_NO_DELTA[name]})"] if name in _NO_DELTA else []
    reasons += [f"{item} = {config[item]}  ({why})" for item, why in _NO_DELTA_SETTINGS.items() if config.get(item)]
    if reasons:
        raise AdapterError(
            f"this adapter has no weight delta, so there is nothing to graft.\n{list_names(reasons)}\n"
            "Train an adapter that changes weights, such as LoRA, or train with graft=False."
        )


def peft_type(config: Mapping[str, Any]) -> str:
    """Return the type of an adapter as it is stored, such as `LORA`."""
    value = config.get("peft_type")
    return str(getattr(value, "value", value))
