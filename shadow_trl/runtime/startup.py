"""The start of a process: importing torch without the garbage collector in the way."""

from __future__ import annotations

import gc
import sys
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def collector_paused() -> Iterator[None]:
    """Import torch while the context lasts, with the collector off; what was imported is left out of later collections.

    The collector would walk again and again over modules that live as long as the process, at the import and once more
    at the exit: about a third of what `import torch` costs a short command. Where torch is there already, nothing is
    done: the process is somebody else's.
    """
    if "torch" in sys.modules or not gc.isenabled():
        yield
        return
    gc.disable()
    try:
        yield
        gc.freeze()
    finally:
        gc.enable()
