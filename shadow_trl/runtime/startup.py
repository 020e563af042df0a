"""The start of a process: importing torch without the garbage collector or a signal in the way."""

from __future__ import annotations

import gc
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from .endings import undisturbed


@contextmanager
def importing_torch() -> Iterator[None]:
    """Import torch while the context lasts, with the collector off; what was imported is left out of later collections.

    The collector would walk again and again over modules that live as long as the process, at the import and once more
    at the exit: about a third of what `import torch` costs a short command. A signal waits: an exception that rises in
    torch's own start, in C++, aborts the process before it can clean up. Where torch is there already, nothing is done:
    the process is somebody else's.
    """
    if "torch" in sys.modules:
        yield
        return
    enabled = gc.isenabled()
    gc.disable()
    try:
        with undisturbed():
            yield
        if enabled:
            gc.freeze()
    finally:
        if enabled:
            gc.enable()
