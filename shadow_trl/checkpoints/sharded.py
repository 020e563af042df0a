"""Checkpoints that an engine wrote for itself: named by their files, with the command that makes a model of them."""

from __future__ import annotations

import shlex
from collections.abc import Iterable
from pathlib import Path

from .json_files import is_there
from .shard_metadata import METADATA

_THEN = "Then give OUT in its place, with --base-dtype if training loaded BASE in a narrower dtype than its files have."
_FOLDER = "pytorch_model_fsdp_0"
"""Where accelerate saves the shards of a model, in a checkpoint of training."""


def shards_of(folder: Path) -> Path | None:
    """Return the folder of the torch distributed checkpoint that `folder` is or has; None where there is none."""
    return next((place for place in (folder, folder / _FOLDER) if is_there(place / METADATA)), None)


def home_of(folder: Path, configs: Iterable[str], weights: Iterable[str]) -> Path:
    """Return the folder that shards belong to: that of the checkpoint where `folder` is accelerate's part of one.

    Args:
        folder: any.
        configs: names of the files of which a checkpoint has one.
        weights: names of whole weights, which would be read in the place of the shards.
    """
    above = folder.parent
    is_part = folder.name == _FOLDER and shards_of(folder) is not None
    own = is_part and any(is_there(folder / name) for name in configs)
    found = is_part and any(is_there(above / name) for name in configs)
    return above if found and not own and not any(is_there(above / name) for name in weights) else folder


def merge_command(shards: Path) -> str:
    """Return the command that writes the weights of a torch distributed checkpoint whole, to OUT."""
    return f"accelerate merge-weights {_quoted(shards)} OUT"


def way_out(folder: Path) -> str | None:
    """Return what the engine's checkpoint in `folder` is and how to convert it; None where there is none."""
    if any(folder.glob("global_step*")) and (folder / "zero_to_fp32.py").is_file():
        return (
            "the shards of a DeepSpeed ZeRO checkpoint, and no whole weights. Merge them with\n"
            f"  python {_quoted(folder / 'zero_to_fp32.py')} {_quoted(folder)} OUT\n{_THEN} With "
            "bf16.enabled, that is --base-dtype bfloat16: the fp32 weights of the optimiser started from BASE rounded."
        )
    if (single := folder / "pytorch_model_fsdp.bin").is_file():
        return (
            "the weights that FSDP saves with FULL_STATE_DICT, under a name that transformers does not load. Copy them "
            f"with\n  mkdir OUT && cp {_quoted(single)} OUT/pytorch_model.bin\n{_THEN}"
        )
    return None


def _quoted(path: Path) -> str:
    return shlex.quote(str(path))
