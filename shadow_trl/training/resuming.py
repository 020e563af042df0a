"""Checkpoints that load back whatever the layout of the model on disk.

transformers 5 gives some models (mixture of experts, vision-language) other names in memory than on disk, and resumes
by the names on disk: weights whose names differ stay silently as they were (transformers issue 48805).
"""

from __future__ import annotations

from typing import Any

from accelerate.logging import get_logger

from ..checkpoints.checkpoint import Checkpoint
from .loading import is_adapted

logger = get_logger(__name__)


def reload_converted(model: Any, folder: str) -> None:
    """Load the weights of a checkpoint into `model` again where its names on disk are not those in memory.

    Args:
        model: the model in training, after transformers has resumed it. Under an adapter nothing is done: the names of
            an adapter are those in memory.
        folder: a checkpoint of this model, as `save_pretrained` writes it.
    """
    if is_adapted(model):
        return
    state = model.state_dict()
    unknown = [name for name in Checkpoint.open(folder).specs if name not in state]
    if not unknown:
        return
    logger.warning(
        "%d weights of %s have other names on disk than in memory (%s, ...); they are loaded through from_pretrained.",
        len(unknown),
        folder,
        unknown[0],
    )
    fresh = type(model).from_pretrained(folder, dtype=model.dtype)
    model.load_state_dict(fresh.state_dict())
