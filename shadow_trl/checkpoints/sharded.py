"""Checkpoints that an engine wrote for itself: named by their files, with the command that makes a model of them."""

from __future__ import annotations

import shlex
from pathlib import Path

_THEN = "Then give OUT in its place, with --base-dtype if training loaded BASE in a narrower dtype than its files have."


def way_out(folder: Path) -> str | None:
    """Return what the engine's checkpoint in `folder` is and how to convert it; None where there is none."""
    for shards in (folder, *sorted(folder.glob("pytorch_model_fsdp_*"))):
        if (shards / ".metadata").is_file() and any(shards.glob("*.distcp")):
            return (
                f"the shards of a torch distributed checkpoint, as FSDP saves with SHARDED_STATE_DICT, and no whole "
                f"weights. Merge them with\n  accelerate merge-weights {_quoted(shards)} OUT\n{_THEN}"
            )
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
