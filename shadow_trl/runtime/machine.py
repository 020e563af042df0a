"""What the machine has not got: room on a disk, memory, threads, open files."""

from __future__ import annotations

import errno
import os
import re
import shutil
from pathlib import Path

from ..errors import GraftError

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
# How torch, numpy, CUDA and C++ say it, beside MemoryError.
_NO_MEMORY = re.compile(r"not enough memory|can't allocate memory|cannot allocate memory|out of memory|bad_alloc", re.I)
_LACKS = {
    "disk": "the disk is full: {}. Make room or write elsewhere.",
    "memory": "there is not enough memory: {}. End other programs, or give this one more (`ulimit -v`, a container's "
    "limit); in training, lower the batch size.",
    "threads": "no thread or process can be started: {}. End other programs, or raise the limit (`ulimit -u`).",
    "files": "too many files are open: {}. Raise the limit (`ulimit -n`).",
}


def lack(error: BaseException) -> GraftError | None:
    """Return the error to show where `error` says that the machine lacks something, in whose words ever; else None."""
    number, text, says = getattr(error, "errno", None), str(error), isinstance(error, RuntimeError)
    if is_full(error):
        kind = "disk"
    elif number == errno.ENOMEM or isinstance(error, MemoryError) or (says and _NO_MEMORY.search(text)):
        kind = "memory"
    elif number == errno.EAGAIN or (says and "can't start new thread" in text):
        kind = "threads"
    elif number in (errno.EMFILE, errno.ENFILE):
        kind = "files"
    else:
        return None
    return GraftError(_LACKS[kind].format((text.splitlines() or [type(error).__name__])[0].rstrip(".")))


def is_full(error: BaseException | None) -> bool:
    """Whether `error` says that a disk is full, also in the words of the safetensors library and of torch.save."""
    if isinstance(error, OSError):
        return error.errno in _FULL
    if isinstance(error, RuntimeError):
        return "PytorchStreamWriter failed writing file" in str(error)
    return type(error).__name__ == "SafetensorError" and any(f"os error {code}" in str(error) for code in _FULL)


def check_space(path: Path, needed: int) -> None:
    """Raise GraftError if the disk of `path` has not `needed` bytes free."""
    free = free_bytes(path)
    if needed > free:
        raise GraftError(
            f"the result needs {needed:,} bytes and the disk of {path} has {free:,} free. Make room or write elsewhere."
        )


def free_bytes(path: Path) -> int:
    """Return the bytes free for this user on the disk on which `path` is or would be."""
    path = Path(os.path.abspath(path))
    return shutil.disk_usage(next(folder for folder in (path, *path.parents) if folder.exists())).free
