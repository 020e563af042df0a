"""CPO (with SimPO) and ORPO on BASE, which TRL has among its experimental trainers: to import this warns of it."""

from __future__ import annotations

import os
import warnings
from dataclasses import dataclass
from typing import Any, ClassVar

from trl.import_utils import TRLExperimentalWarning, suppress_experimental_warning

with suppress_experimental_warning():
    from trl.experimental.cpo import CPOConfig, CPOTrainer
    from trl.experimental.orpo import ORPOConfig, ORPOTrainer

from ..errors import ConfigError
from .config import ShadowArguments
from .mixin import ShadowMixin
from .older import needs_newest_trl
from .settings import Forms

needs_newest_trl("a Shadow trainer of TRL's experimental ones")

# TRL's own warning comes with the first import of the folder, of which its other trainers import a part in silence.
if not os.environ.get("TRL_EXPERIMENTAL_SILENCE"):
    warnings.warn(
        "ShadowCPOTrainer and ShadowORPOTrainer build on TRL's experimental trainers, which may change in any release. "
        "TRL_EXPERIMENTAL_SILENCE=1 silences this.",
        TRLExperimentalWarning,
        stacklevel=2,
    )


@dataclass
class ShadowCPOConfig(ShadowArguments, CPOConfig):
    """TRL's `CPOConfig` with the arguments of the graft (`ShadowArguments`); SimPO is `loss_type="simpo"`."""

    def __post_init__(self) -> None:
        if self.beta == 0 and self.loss_type in ("ipo", "simpo", "alphapo"):
            raise ConfigError(f"beta is 0, by which loss_type={self.loss_type!r} divides. Give a larger one.")
        super().__post_init__()


@dataclass
class ShadowORPOConfig(ShadowArguments, ORPOConfig):
    """TRL's `ORPOConfig` with the arguments of the graft (`ShadowArguments`)."""


class PairsWithoutReference(ShadowMixin):
    """A trainer on pairs of answers whose loss has no reference policy."""

    _figures = "_stored_metrics"
    _loads_as = "auto"

    def _data_forms(self, config: Any) -> Forms:
        return [{"chosen", "rejected"}]

    def _choose_processing_class(self, config: Any, given: dict[str, Any]) -> None:
        super()._choose_processing_class(config, given)
        tokenizer = given.get("processing_class")
        if tokenizer is not None and tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token  # TRL does so too, after it has asked for its number

    def _pin_model(self, given: dict[str, Any]) -> None:
        args = given["args"]
        before = args.model_init_kwargs
        super()._pin_model(given)
        if before is None and args.model_init_kwargs is not None:
            # TRL spreads a model over all devices as soon as it is told anything about loading it.
            args.model_init_kwargs["device_map"] = None


class ShadowCPOTrainer(PairsWithoutReference, CPOTrainer):
    """TRL's `CPOTrainer` on BASE; `train()` ends with the graft onto INSTRUCT."""

    config_class = ShadowCPOConfig
    _tag_names: ClassVar[list[str]] = [*CPOTrainer._tag_names, "shadow-ft"]  # type: ignore[misc]


class ShadowORPOTrainer(PairsWithoutReference, ORPOTrainer):
    """TRL's `ORPOTrainer` on BASE; `train()` ends with the graft onto INSTRUCT."""

    config_class = ShadowORPOConfig
    _tag_names: ClassVar[list[str]] = [*ORPOTrainer._tag_names, "shadow-ft"]  # type: ignore[misc]
