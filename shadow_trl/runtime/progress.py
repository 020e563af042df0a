"""A bar on a terminal while bytes are written or read."""

from __future__ import annotations

import sys
import threading
from typing import Any


class Progress:
    """A tqdm bar on stderr, or nothing where nobody looks.

    Args:
        total: bytes.
        shown: whether a bar is wanted; it is shown only if stderr is a terminal.
    """

    def __init__(self, total: int, shown: bool) -> None:
        self._bar: Any = None
        self._lock = threading.Lock()
        if shown and sys.stderr is not None and sys.stderr.isatty():
            from tqdm import tqdm

            self._bar = tqdm(total=total, unit="B", unit_scale=True, desc="graft", leave=False)

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *error: object) -> None:
        if self._bar is not None:
            self._bar.close()

    def add(self, count: int) -> None:
        """Count `count` more bytes as done; may be called from any thread."""
        if self._bar is not None:
            with self._lock:
                self._bar.update(count)
