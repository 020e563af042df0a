"""What the machine lacks is told in one way, whoever says it first."""

from __future__ import annotations

import errno

import numpy
import pytest
import torch
from safetensors import SafetensorError

from shadow_trl.errors import ConfigError
from shadow_trl.runtime.machine import lack


def raised(work) -> Exception:
    with pytest.raises(Exception) as found:  # noqa: PT011
        work()
    return found.value


@pytest.mark.parametrize(
    ("work", "told"),
    [
        (lambda: torch.empty(2**58), "not enough memory"),
        (lambda: numpy.empty(2**58), "not enough memory"),
        (lambda: bytearray(2**62), "not enough memory"),
    ],
    ids=["torch", "numpy", "python"],
)
def test_memory_that_cannot_be_had(work, told):
    found = lack(raised(work))
    assert told in str(found)
    assert found.exit_code == 1


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (OSError(errno.ENOMEM, "Cannot allocate memory"), "not enough memory"),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), "lower the batch size"),
        (MemoryError(), "not enough memory: MemoryError"),
        (RuntimeError("can't start new thread"), "no thread or process"),
        (BlockingIOError(errno.EAGAIN, "Resource temporarily unavailable"), "no thread or process"),
        (OSError(errno.EMFILE, "Too many open files"), "ulimit -n"),
        (OSError(errno.ENOSPC, "No space left on device"), "the disk is full"),
        (OSError(errno.EDQUOT, "Disk quota exceeded"), "the disk is full"),
        (SafetensorError("I/O error: No space left on device (os error 28)"), "the disk is full"),
        (RuntimeError("PytorchStreamWriter failed writing file data/0: file write failed"), "the disk is full"),
    ],
)
def test_what_is_lacking_is_told_with_a_way_out(error, told):
    assert told in str(lack(error))


@pytest.mark.parametrize(
    "error", [RuntimeError("shapes differ"), OSError(errno.EACCES, "denied"), ValueError("out of memory"),
              ConfigError("there is not enough memory in the option"), KeyError("x")]
)  # fmt: skip
def test_other_errors_are_not_called_a_lack(error):
    assert lack(error) is None
