"""Configurations of the Shadow trainers: TRL's own, plus the arguments of the graft."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any, TypeVar

from trl import DPOConfig, SFTConfig

from ..errors import ConfigError, one_of
from ..grafting.options import declared
from .older import use_new_names, with_new_names

_Config = TypeVar("_Config", bound="ShadowArguments")

PAIR_CHECKS = ("headers", "weights")
DPO_LOSSES = (
    "sigmoid", "hinge", "ipo", "exo_pair", "nca_pair", "robust", "bco_pair", "sppo_hard", "aot", "aot_unpaired",
    "apo_zero", "apo_down", "discopop", "sft", "sigmoid_norm",
)  # fmt: skip
"""TRL's, which names them only when the loss of the first batch is computed."""
DIVERGENCES = ("reverse_kl", "forward_kl", "js_divergence", "alpha_divergence")
"""The same."""
REF_POLICIES = ("init", "base", "instruct", "grafted")


def _argument(default: Any, text: str, **parsing: Any) -> Any:
    return field(default=default, metadata={"help": text, **parsing})


def _of_graft(name: str) -> Any:
    """Return the field for an option of the graft: its default, choices and help are those it is declared with."""
    option = declared()[name]
    return _argument(option.default, option.help, choices=option.choices)


@dataclass
@with_new_names
class ShadowArguments:
    """Arguments of the graft `grafted = instruct + graft_scale * (tuned - base)`, shared by all configs.

    Put before a TRL config in the list of bases of a dataclass: `class MyConfig(ShadowArguments, SFTConfig)`.

    Args:
        instruct_model: folder or hub id of INSTRUCT, the model that receives the delta. The trainer's argument of the
            same name wins. Left out when `model` came from a shadow run.
        base_model: folder or hub id of the origin of the delta. Default: `model` itself, or what the run in `model`
            started from.
        instruct_revision: branch, tag or commit of INSTRUCT on the hub.
        base_revision: the same of BASE.
        find_base: whether to take BASE from the table of known pairs, or from INSTRUCT's card, where no model is given.
            Default False: an error says what was found.
        graft: whether `train()` ends with saving TUNED and grafting. Default True.
        graft_scale: the option `scale` of `shadow_trl.graft`, with its values and default.
        instruct_scale: the option `instruct_scale` of `shadow_trl.graft`, with its values and default.
        graft_modules: the option `modules` of `shadow_trl.graft`, with its values and default.
        graft_format: the option `format` of `shadow_trl.graft`, with its values and default.
        graft_dtype: the option `dtype` of `shadow_trl.graft`, with its values and default.
        graft_rounding: the option `rounding` of `shadow_trl.graft`, with its values and default.
        graft_seed: the option `seed` of `shadow_trl.graft`, with its values and default.
        graft_vocab: the option `vocab` of `shadow_trl.graft`, with its values and default.
        graft_chat_template: the option `chat_template` of `shadow_trl.graft`, with its values and default.
        graft_overwrite: the option `overwrite` of `shadow_trl.graft`, with its values and default.
        pair_check: how BASE and INSTRUCT are compared before training: `headers` (configs, shapes, tokenizers) or
            `weights` (their distance as well). Default: `weights` for full fine-tuning, `headers` for adapters.
        graft_every_save: graft every checkpoint as well, into `checkpoint-N/shadow/grafted`. Default False.
        eval_grafted: evaluate INSTRUCT + the current delta beside BASE at every evaluation, as `eval_grafted_*`.
            Default False.
        allow_wide_gap: train although BASE and INSTRUCT differ by sigma above 0.5. Default False.

    Raises:
        ConfigError: a value that an argument cannot have.
    """

    instruct_model: str | None = _argument(None, "Folder or hub id of INSTRUCT, the model that receives the delta.")
    base_model: str | None = _argument(
        None, "Model from which the delta is measured: folder or hub id. Default: the model itself."
    )
    instruct_revision: str | None = _argument(None, "Branch, tag or commit of INSTRUCT.")
    base_revision: str | None = _argument(None, "Branch, tag or commit of BASE.")
    find_base: bool = _argument(
        False, "Take BASE from the table of known pairs or the card of INSTRUCT where no model is given."
    )
    graft: bool = _argument(True, "Whether `train()` saves TUNED and grafts at the end.")
    graft_scale: float = _of_graft("scale")
    instruct_scale: float = _of_graft("instruct_scale")
    graft_modules: list[str] | str = field(  # transformers' parser takes the default of a list from a factory alone
        default_factory=lambda: declared()["modules"].default, metadata=_of_graft("modules").metadata
    )
    graft_format: str = _of_graft("format")
    graft_dtype: str = _of_graft("dtype")
    graft_rounding: str = _of_graft("rounding")
    graft_seed: int = _of_graft("seed")
    graft_vocab: str = _of_graft("vocab")
    graft_chat_template: str = _of_graft("chat_template")
    graft_overwrite: bool = _of_graft("overwrite")
    pair_check: str | None = _argument(
        None, "How BASE and INSTRUCT are compared. Default: weights when fully fine-tuning.", choices=PAIR_CHECKS
    )
    graft_every_save: bool = _argument(False, "Graft every checkpoint too, into checkpoint-N/shadow/grafted.")
    eval_grafted: bool = _argument(False, "Evaluate INSTRUCT + the current delta too, as eval_grafted_*.")
    allow_wide_gap: bool = _argument(False, "Train even if sigma of the pair is above 0.5.")

    def __post_init__(self) -> None:
        # Values from YAML reach the dataclass without passing argparse's `choices`.
        for option in declared().values():
            if (name := option.argument) is not None:
                setattr(self, name, option.checked(name, getattr(self, name)))
        if self.pair_check is not None:
            one_of("pair_check", self.pair_check, PAIR_CHECKS)
        use_new_names(self)
        super().__post_init__()  # type: ignore[misc]

    def graft_options(self) -> dict[str, Any]:
        """Return the keyword arguments that `graft` and `check_graft` share."""
        return {name: getattr(self, item.argument) for name, item in declared().items() if item.argument is not None}

    @classmethod
    def upgrade(cls: type[_Config], args: Any) -> _Config:
        """Return `args`, a plain TRL or transformers config, as this class, with our defaults for what it lacks.

        Fields that a subclass of TRL's config has besides are kept as attributes.
        """
        if isinstance(args, cls):
            return args
        values = args.to_dict()
        # `to_dict` masks tokens.
        values.update({name: getattr(args, name) for name in values if name.endswith("_token")})
        known = {item.name for item in dataclasses.fields(cls) if item.init}
        unknown = sorted(set(values) - known)
        trl_config = cls.__mro__[cls.__mro__.index(ShadowArguments) + 1]
        if unknown and not isinstance(args, trl_config):
            raise ConfigError(f"{type(args).__name__} has arguments that {cls.__name__} lacks: {', '.join(unknown)}.")
        config = cls(**{name: value for name, value in values.items() if name in known})
        for name in unknown:
            setattr(config, name, getattr(args, name))
        return config


@dataclass
class ShadowSFTConfig(ShadowArguments, SFTConfig):
    """TRL's `SFTConfig` with the arguments of the graft (`ShadowArguments`)."""


@dataclass
class ReferenceArguments(ShadowArguments):
    """Arguments of the graft (`ShadowArguments`) and the choice of the reference policy, where the loss has one.

    Args:
        ref_policy: which policy pi_ref of the loss (of DPO, 2305.18290, equation 7) is: `init` (the policy as it
            starts, TRL's default), `base` (the origin of the delta), `instruct`, or `grafted` (what a graft of the
            start would ship: INSTRUCT itself when training starts from a raw BASE). Default `init`.
    """

    ref_policy: str = _argument("init", "Reference policy of the loss.", choices=REF_POLICIES)

    def __post_init__(self) -> None:
        one_of("ref_policy", self.ref_policy, REF_POLICIES)
        super().__post_init__()


@dataclass
class PrecomputingArguments(ReferenceArguments):
    """The same (`ReferenceArguments`), where the reference can be used before training and released.

    Args:
        precompute_ref_log_probs: as in TRL, or None: True when the reference is not `init` and the data is map-style
            text, else False with a notice. Default None.
    """

    precompute_ref_log_probs: bool | None = _argument(
        None,
        "Whether to compute the reference log probabilities before training. Default: True when the reference is not "
        "init and the data is map-style text.",
        nargs="?",
        const=True,
    )


@dataclass
class ShadowDPOConfig(PrecomputingArguments, DPOConfig):  # type: ignore[misc]
    """TRL's `DPOConfig` with the arguments of the graft and of the reference policy (`PrecomputingArguments`)."""

    def __post_init__(self) -> None:
        losses = [self.loss_type] if isinstance(self.loss_type, str) else self.loss_type
        for loss in losses:
            one_of("loss_type", loss, DPO_LOSSES)
        if self.beta == 0 and (divided := [loss for loss in losses if loss in ("ipo", "sppo_hard")]):
            raise ConfigError(f"beta is 0, by which loss_type={divided[0]} divides. Give a larger one.")
        one_of("f_divergence_type", self.f_divergence_type, DIVERGENCES)
        super().__post_init__()
