"""Configurations of the Shadow trainers: TRL's own, plus the arguments of the graft."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field
from typing import Any, TypeVar

from trl import DPOConfig, SFTConfig

from ..errors import ConfigError

_Config = TypeVar("_Config", bound="ShadowArguments")


def _choice(default: Any, choices: list[str], text: str) -> Any:
    return field(default=default, metadata={"help": text, "choices": choices})


@dataclass
class ShadowArguments:
    """Arguments of the graft `grafted = instruct + graft_scale * (tuned - base)`, shared by the SFT and DPO configs.

    Args:
        instruct_model: folder or hub id of INSTRUCT, the model that receives the delta. The trainer's argument of the
            same name wins. Left out when `model` came from a shadow run.
        base_model: folder or hub id of the origin of the delta. Default: `model` itself, or what the run in `model`
            started from.
        instruct_revision: branch, tag or commit of INSTRUCT on the hub.
        base_revision: branch, tag or commit of BASE on the hub.
        graft: whether `train()` ends with saving TUNED and grafting. Default True.
        graft_scale: multiplier of the delta. Default 1.0.
        instruct_scale: multiplier b of INSTRUCT in `a*T + b*I + (1-a-b)*B` (RE-Adapt). Default 1.0.
        graft_modules: which weights receive the delta: `all`, `linear` (the projections of attention and MLP, as the
            paper's code), or regular expressions searched in the names of weights. Default `all`.
        graft_format: `model` (dense weights), `adapter` (a PEFT adapter for INSTRUCT), or `auto`: the adapter where an
            exact one exists and INSTRUCT is a hub id. Default `auto`.
        graft_dtype: dtype of the grafted weights: `auto` (that of each INSTRUCT tensor), `float32`, `bfloat16` or
            `float16`. Default `auto`.
        graft_rounding: `nearest`, or `stochastic`: unbiased, for deltas below the output dtype's step. Default
            `nearest`.
        graft_seed: seed of the stochastic rounding. Default 0.
        graft_vocab: `strict`, or `shared`: graft the token rows that BASE and INSTRUCT both have. Default `strict`.
        graft_overwrite: replace a `grafted/` folder that is already in `output_dir`. Default False.
        pair_check: how BASE and INSTRUCT are compared before training: `headers` (configs, shapes, tokenizers) or
            `weights` (their distance as well). Default: `weights` for full fine-tuning, `headers` for adapters.
        graft_every_save: graft every checkpoint as well, into `checkpoint-N/shadow/grafted`. Default False.
        eval_grafted: evaluate INSTRUCT + the current delta beside BASE at every evaluation, as `eval_grafted_*`.
            Default False.
        allow_wide_gap: train although BASE and INSTRUCT differ by sigma above 0.5. Default False.

    Raises:
        ConfigError: a value that an argument cannot have.
    """

    instruct_model: str | None = field(
        default=None, metadata={"help": "Folder or hub id of INSTRUCT, the model that receives the delta."}
    )
    base_model: str | None = field(
        default=None, metadata={"help": "Folder or hub id of the origin of the delta. Default: the model itself."}
    )
    instruct_revision: str | None = field(default=None, metadata={"help": "Branch, tag or commit of INSTRUCT."})
    base_revision: str | None = field(default=None, metadata={"help": "Branch, tag or commit of BASE."})
    graft: bool = field(default=True, metadata={"help": "Whether `train()` ends with saving TUNED and grafting."})
    graft_scale: float = field(default=1.0, metadata={"help": "Multiplier of the delta."})
    instruct_scale: float = field(default=1.0, metadata={"help": "Multiplier b of INSTRUCT in a*T + b*I + (1-a-b)*B."})
    graft_modules: list[str] | str = field(
        default_factory=lambda: ["all"],
        metadata={"help": "Which weights receive the delta: all, linear, or regular expressions on their names."},
    )
    graft_format: str = _choice("auto", ["auto", "model", "adapter"], "Form of the result: dense weights or adapter.")
    graft_dtype: str = _choice(
        "auto", ["auto", "float32", "bfloat16", "float16"], "Dtype of the grafted weights; auto: that of INSTRUCT."
    )
    graft_rounding: str = _choice("nearest", ["nearest", "stochastic"], "How sums are rounded to the output dtype.")
    graft_seed: int = field(default=0, metadata={"help": "Seed of the stochastic rounding."})
    graft_vocab: str = _choice("strict", ["strict", "shared"], "What to do with token rows only one side has.")
    graft_overwrite: bool = field(default=False, metadata={"help": "Replace an existing `grafted/` folder."})
    pair_check: str | None = _choice(
        None, ["headers", "weights"], "How BASE and INSTRUCT are compared. Default: weights when fully fine-tuning."
    )
    graft_every_save: bool = field(
        default=False, metadata={"help": "Graft every checkpoint too, into checkpoint-N/shadow/grafted."}
    )
    eval_grafted: bool = field(
        default=False, metadata={"help": "Evaluate INSTRUCT + the current delta too, as eval_grafted_*."}
    )
    allow_wide_gap: bool = field(default=False, metadata={"help": "Train although sigma of the pair is above 0.5."})

    def __post_init__(self) -> None:
        self._check_shadow_arguments()
        post_init = getattr(super(), "__post_init__", None)
        if post_init is not None:
            post_init()

    def _check_shadow_arguments(self) -> None:
        if isinstance(self.graft_modules, list) and self.graft_modules in (["all"], ["linear"]):
            self.graft_modules = self.graft_modules[0]
        if not self.graft_modules or not all(isinstance(pattern, str) for pattern in self.graft_modules):
            raise ConfigError(f"graft_modules must be all, linear or regular expressions, not {self.graft_modules!r}.")
        for name in ("graft_scale", "instruct_scale"):
            if not math.isfinite(getattr(self, name)):
                raise ConfigError(f"{name} must be a finite number, not {getattr(self, name)!r}.")
        # Values from YAML reach the dataclass without passing argparse's `choices`.
        for item in dataclasses.fields(self):
            if item.name in _CHECKED_CHOICES and (value := getattr(self, item.name)) != item.default:
                choices = item.metadata["choices"]
                if value not in choices:
                    raise ConfigError(f"{item.name} must be one of {', '.join(choices)}, not {value!r}.")

    def graft_options(self) -> dict[str, Any]:
        """Return the keyword arguments that `graft` and `check_graft` share."""
        return {
            "scale": self.graft_scale,
            "instruct_scale": self.instruct_scale,
            "modules": self.graft_modules,
            "format": self.graft_format,
            "dtype": self.graft_dtype,
            "rounding": self.graft_rounding,
            "seed": self.graft_seed,
            "vocab": self.graft_vocab,
            "overwrite": self.graft_overwrite,
        }

    @classmethod
    def upgrade(cls: type[_Config], args: Any) -> _Config:
        """Return `args`, a plain TRL or transformers config, as this class, with our defaults for what it lacks."""
        if isinstance(args, cls):
            return args
        values = args.to_dict()
        # `to_dict` masks tokens.
        values.update({name: getattr(args, name) for name in values if name.endswith("_token")})
        known = {item.name for item in dataclasses.fields(cls) if item.init}
        unknown = sorted(set(values) - known)
        if unknown:
            raise ConfigError(f"{type(args).__name__} has arguments that {cls.__name__} lacks: {', '.join(unknown)}.")
        return cls(**values)


@dataclass
class ShadowSFTConfig(ShadowArguments, SFTConfig):
    """TRL's `SFTConfig` with the arguments of the graft (`ShadowArguments`)."""


@dataclass
class ShadowDPOConfig(ShadowArguments, DPOConfig):
    """TRL's `DPOConfig` with the arguments of the graft (`ShadowArguments`) and the choice of the reference policy.

    Args:
        ref_policy: which policy pi_ref of the DPO loss (2305.18290, equation 7) is: `init` (the policy as it starts,
            TRL's default), `base` (the origin of the delta), `instruct`, or `grafted` (what a graft of the start
            would ship: INSTRUCT itself when training starts from a raw BASE). Default `init`.
        precompute_ref_log_probs: as in TRL, or None: True when the reference is not `init` and the data is map-style
            text, else False with a notice. Default None.
    """

    ref_policy: str = _choice(
        "init", ["init", "base", "instruct", "grafted"], "Which model is the reference policy of the DPO loss."
    )
    precompute_ref_log_probs: bool | None = field(  # type: ignore[assignment]
        default=None,
        metadata={
            "help": "Whether to compute the reference log probabilities before training. Default: True when the "
            "reference is not init and the data is map-style text."
        },
    )


_CHECKED_CHOICES = {
    item.name
    for item in (*dataclasses.fields(ShadowArguments), *dataclasses.fields(ShadowDPOConfig))
    if "choices" in item.metadata and item.name not in {other.name for other in dataclasses.fields(DPOConfig)}
}
