"""Checkpoints of a run that training can resume from: which are complete, and which is the last."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from accelerate.logging import get_logger
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from ..checkpoints.checkpoint import Checkpoint
from ..errors import ConfigError, InputError, ShadowError, list_names
from ..runtime.machine import lack

logger = get_logger(__name__)

# Written by `Trainer`; by FSDP, whole and in shards, of which the metadata are written last.
_OPTIMIZER = ("optimizer.pt", "optimizer.bin", "optimizer_0/.metadata")
_FSDP = ("pytorch_model_fsdp.bin", "pytorch_model_fsdp_0/.metadata")
# Written by DeepSpeed in the folder that `latest` names, with its own optimizer and scheduler.
_DEEPSPEED = ("model_states.pt", "optim_states.pt")


def fault_of(checkpoint: Path) -> str | None:
    """Return why a checkpoint cannot be resumed from, None where it is complete.

    Files that a killed process left empty or cut short count as missing: headers are compared with sizes, and torch's
    files are archives whose directory is at their end.
    """
    if (fault := _fault_of_state(checkpoint)) is not None:
        return fault
    shards = _shards_of_deepspeed(checkpoint)
    if (missing := _missing_states(checkpoint, shards)) is not None:
        return missing
    archives = [*checkpoint.glob("*.pt*"), *checkpoint.glob("*.bin"), *(shards.glob("*.pt") if shards else ())]
    for path in sorted(archives):  # *.pth: the random generators
        if not zipfile.is_zipfile(path):
            return f"{path.relative_to(checkpoint)} is empty or cut short"
    if shards is not None or any((checkpoint / name).is_file() for name in _FSDP):
        return None  # beside it there are whole weights only where a graft was to read them
    try:
        Checkpoint.open(checkpoint)
    except InputError as reason:
        return str(reason).splitlines()[0].rstrip(".")
    return None


def _fault_of_state(checkpoint: Path) -> str | None:
    """Return what is wrong with the state, which a trainer writes last."""
    try:
        state = json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return "trainer_state.json is missing or cut short"
    step = state.get("global_step") if isinstance(state, dict) else None
    return None if isinstance(step, int) else "trainer_state.json has no number of steps"


def _missing_states(checkpoint: Path, shards: Path | None) -> str | None:
    """Return what is missing of optimizer and scheduler, which DeepSpeed has in `shards`; None where all is there."""
    if shards is not None:
        absent = [name for name in _DEEPSPEED if not any(shards.glob(f"*{name}"))]
        return f"{shards.name}/*{absent[0]}, which `latest` names, are missing" if absent else None
    for names in (_OPTIMIZER, ("scheduler.pt",)):
        if not any((checkpoint / name).is_file() for name in names):
            return f"{names[0]} is missing (save_only_model leaves it out)"
    return None


def _shards_of_deepspeed(checkpoint: Path) -> Path | None:
    """Return the folder in which DeepSpeed saved its states, None where it saved none."""
    latest = checkpoint / "latest"
    if not latest.is_file():
        return None
    return checkpoint / Path(latest.read_text(encoding="utf-8", errors="replace").strip()).name


def last_complete(folder: Path) -> str | None:
    """Return the last complete checkpoint in the folder of a run, None if there is none; later ones are named."""
    numbered = {
        int(number): path
        for path in folder.glob(f"{PREFIX_CHECKPOINT_DIR}-*")
        if (number := path.name.rpartition("-")[2]).isdecimal() and path.is_dir()
    }
    for _, path in sorted(numbered.items(), reverse=True):
        fault = fault_of(path)
        if fault is None:
            return str(path)
        logger.warning("%s is not complete and is skipped: %s.", path, fault)
    return None


@contextmanager
def of_another_run(checkpoint: str | None) -> Iterator[None]:
    """Let what torch raises on reading a complete checkpoint of another model or optimizer be a ConfigError."""
    try:
        yield
    except (RuntimeError, ValueError, LookupError, TypeError, AttributeError) as error:
        if checkpoint is None or isinstance(error, ShadowError) or lack(error) is not None:
            raise
        raise ConfigError(
            f"cannot resume from {checkpoint}, which is not of a run with this model and optimizer: "
            f"{type(error).__name__}: {str(error)[:500]}\nGive the options of the run that wrote it, or leave "
            "resume_from_checkpoint out."
        ) from error


def checkpoint_of(given: Any, output_dir: str | Path) -> str | None:
    """Return the checkpoint that `resume_from_checkpoint` means: a folder as given, or the last complete one for True.

    Raises:
        ConfigError: it is not there, or not complete.
    """
    if given is None or given is False or str(given).lower() in ("false", "none"):
        return None
    if given is not True and str(given).lower() != "true":
        fault = fault_of(Path(given)) if Path(given).is_dir() else "there is no such folder"
        if fault is not None:
            raise ConfigError(f"cannot resume from {given}: {fault}. {_there(Path(output_dir))}")
        return str(given)
    found = last_complete(Path(output_dir))
    if found is None:
        raise ConfigError(
            f"cannot resume: {output_dir} holds no complete checkpoint. Leave resume_from_checkpoint out."
        )
    return found


def _there(folder: Path) -> str:
    """Say which checkpoints of the run can be resumed from."""
    found = sorted(str(path) for path in folder.glob(f"{PREFIX_CHECKPOINT_DIR}-*") if fault_of(path) is None)
    return f"Complete are:\n{list_names(found)}" if found else f"There is no complete checkpoint in {folder}."
