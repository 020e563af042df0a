"""Where reference log probabilities are kept between runs, and what their values depend on.

TRL caches them beside the data under a key of the data and the weights. The key here has the rest of what the values
depend on, and rows in memory get a file that all processes find.
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from accelerate.utils import is_peft_model

from ..runtime.processes import run_on_main
from .loading import bare_model

if TYPE_CHECKING:
    from accelerate import Accelerator
    from trl import DPOConfig


def reference_key(model_hash: str, model: Any, args: DPOConfig) -> str:
    """Return the part of the cache's key that does not come from the data: the model, and how its values are summed.

    Args:
        model_hash: of the reference's weights and dtypes.
        model: the reference; its config turns weights into values, and so do the settings of its adapters.
        args: of the run; `ld_alpha` weighs tokens, the lengths cut them, mixed precision rounds.
    """
    from datasets.fingerprint import Hasher

    adapters = model.peft_config if is_peft_model(model) else {}
    settings = {name: _without_names(config.to_dict()) for name, config in adapters.items()}
    how = (args.ld_alpha, args.max_length, args.truncation_mode, args.bf16, args.fp16)
    return Hasher.hash(
        (model_hash, type(bare_model(model)).__name__, _settings(bare_model(model).config), settings, *how)
    )


def _settings(config: Any) -> list[Any]:
    """Return what a config and those inside it say, with the kernels of attention, which `to_dict` leaves out."""
    inside = [getattr(config, name, None) for name in config.sub_configs]
    return [
        {name: value for name, value in _without_names(config.to_dict()).items() if name not in config.sub_configs},
        config._attn_implementation,
        *(_settings(one) for one in inside if one is not None),
    ]


def _without_names(settings: dict[str, Any]) -> dict[str, Any]:
    # The graft of a start is loaded from a folder that has another name in every run.
    return {name: value for name, value in settings.items() if name not in ("_name_or_path", "base_model_name_or_path")}


def shared_on_disk(dataset: Any, accelerator: Accelerator) -> Any:
    """Return `dataset` from a file all processes can read; unchanged on one process, or where it is in a file already.

    TRL's cache of reference log probabilities is beside the data's file. Data in memory has one temporary folder a
    process, where the other processes find nothing.
    """
    import datasets

    if accelerator.num_processes == 1 or not isinstance(dataset, datasets.Dataset) or dataset.cache_files:
        return dataset
    folder = Path(datasets.config.HF_DATASETS_CACHE) / "shadow_trl" / dataset._fingerprint

    def save() -> str:
        if not folder.exists():
            # Renamed when it is whole: a run that is killed here must not leave half of the rows to the next.
            folder.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(prefix=".shadow-", dir=folder.parent) as unfinished:
                dataset.save_to_disk(f"{unfinished}/rows")
                os.rename(f"{unfinished}/rows", folder)
        return str(folder)

    return datasets.load_from_disk(run_on_main(accelerator, save, what="saving the data"))
