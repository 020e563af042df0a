"""KTO on BASE: TRL's loss and data, with the choice of the reference policy, and a graft at the end."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from trl import KTOConfig, KTOTrainer
from trl.trainer import kto_trainer

from ..errors import ConfigError
from .config import PrecomputingArguments
from .older import needs_newest_trl
from .policies import PrecomputedReference
from .settings import Forms

needs_newest_trl("ShadowKTOTrainer")


@dataclass
class ShadowKTOConfig(PrecomputingArguments, KTOConfig):  # type: ignore[misc]
    """TRL's `KTOConfig` with the arguments of the graft and of the reference policy (`PrecomputingArguments`)."""


class ShadowKTOTrainer(PrecomputedReference, KTOTrainer):  # type: ignore[misc]
    """TRL's `KTOTrainer` on BASE with a choice of reference policy; `train()` ends with the graft onto INSTRUCT."""

    config_class = ShadowKTOConfig
    _figures = "_metrics"
    _trl_module: ClassVar = kto_trainer
    _ref_names = ("ref_logps", "ref_KL_logps")
    _takes_values = False  # those of the KL term belong to rows in batches of one size
    _tag_names: ClassVar[list[str]] = [*KTOTrainer._tag_names, "shadow-ft"]  # type: ignore[misc]

    def _data_forms(self, config: Any) -> Forms:
        return [{"prompt", "completion", "label"}, {"chosen", "rejected"}]

    def _choose_reference(self, config: Any, given: dict[str, Any]) -> None:
        train, evaluated = given.get("train_dataset"), given.get("eval_dataset")
        columns = {
            column
            for data in (train, *(evaluated.values() if isinstance(evaluated, Mapping) else [evaluated]))
            for column in getattr(data, "column_names", None) or ()
        }
        if found := sorted(columns & set(self._ref_names)):
            raise ConfigError(
                f"the data has {' and '.join(found)}. KTO pairs each prompt with the completion of another row of its "
                "batch, so such values hold for one order and size of batches only. Remove these columns "
                "(dataset.remove_columns); precompute_ref_log_probs=True computes them once for all runs."
            )
        if config.eval_grafted and columns & {"image", "images"}:
            raise ConfigError(
                "eval_grafted=True is not possible with images: TRL's KTO computes reference values from the text "
                "alone. Pass eval_grafted=False and score the grafted folder after training."
            )
        super()._choose_reference(config, given)

    def _precompute_ref_logps(self, dataset: Any, name: str, batch_size: int) -> Any:
        """As TRL, with the chosen reference. Columns that are there are of batches before: they are replaced."""
        there = [column for column in self._ref_names if column in (dataset.column_names or ())]
        return super()._precompute_ref_logps(dataset.remove_columns(there) if there else dataset, name, batch_size)
