"""Whole weights of a sharded model on their way to the disk: each in a file of its own, and not in host memory.

The engines gather one weight after another on one process, which copies it to host memory and keeps it until all are
there. Of a large model no host has room for that.
"""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from ..errors import GraftError, ShadowError
from ..results.folder import Scratch

if TYPE_CHECKING:
    from accelerate import Accelerator

logger = logging.getLogger(__name__)

_SMALL = 2**16
"""Bytes up to which a copy stays in memory."""


@contextmanager
def whole_weights(accelerator: Accelerator, *, wanted: bool, folder: Path) -> Iterator[None]:
    """Let the engine save whole weights to `folder`, if `wanted`; on their way there they take no host memory.

    FSDP with SHARDED_STATE_DICT writes none and says nothing; nor does ZeRO-3 that was not told to gather.
    """
    plugin = getattr(accelerator.state, "fsdp_plugin", None)
    engine: Any = getattr(accelerator, "deepspeed_engine_wrapped", None)  # once it has prepared the model
    if not wanted or (plugin is None and engine is None):
        yield
        return
    if plugin is not None:
        settings, name, whole = plugin, "state_dict_type", type(plugin.state_dict_type).FULL_STATE_DICT
    else:
        settings, name, whole = engine.engine._config.zero_config, "gather_16bit_weights_on_model_save", True
    before = getattr(settings, name)
    setattr(settings, name, whole)
    try:
        with copies_on_disk(folder) if accelerator.is_main_process else nullcontext():
            yield
    finally:
        setattr(settings, name, before)


@contextmanager
def no_word_of_shards() -> Iterator[None]:
    """Let a ValueError on saving be a GraftError.

    transformers takes any ValueError for DeepSpeed's word that it gathers no weights. One process alone would then save
    its shards, for which it would wait for the others.
    """
    try:
        yield
    except ValueError as error:
        failed = GraftError(str(error.args[0]) if isinstance(error, ShadowError) and error.args else str(error))
        failed.ending = getattr(error, "ending", "")
        raise failed from error


@contextmanager
def copies_on_disk(folder: Path) -> Iterator[None]:
    """Let the copies of tensors that this thread makes in host memory lie in files in `folder` while the context lasts.

    The operating system reads them when they are used, and drops them from memory when it has need of it. They have no
    names and are gone with their tensors. Where there is no room for one it stays in memory, with a warning.
    """
    with Scratch(folder / "gathered") as scratch, _OnDisk(scratch.part):
        yield


class _OnDisk(TorchFunctionMode):
    """Puts what `Tensor.cpu`, `Tensor.to` and `Tensor.contiguous` copy to host memory into files."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self._folder, self._has_room = folder, True

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        if not self._has_room or type(found) is not Tensor or found.device.type != "cpu" or found.nbytes <= _SMALL:
            return found
        moved = func is Tensor.cpu or (func is Tensor.to and any(isinstance(one, torch.device) for one in args[1:]))
        if not moved and not (func is Tensor.contiguous and found.data_ptr() != args[0].data_ptr()):
            return found
        try:
            return _in_file(found.detach(), self._folder)
        except OSError as error:
            self._has_room = False
            logger.warning("The weights that are gathered for saving stay in host memory: %s.", error)
            return found


def _in_file(tensor: Tensor, folder: Path) -> Tensor:
    with tempfile.NamedTemporaryFile(dir=folder) as file:
        file.write(tensor.contiguous().view(-1).view(torch.uint8).numpy().data)
        file.flush()
        # Mapped: a file that no name leads to cannot be cut short.
        return torch.from_file(file.name, shared=False, size=tensor.numel(), dtype=tensor.dtype).view(tensor.shape)
