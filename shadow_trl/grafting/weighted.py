"""What is given as TUNED: one source, or several each with a weight."""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Any

from ..errors import ConfigError

Source = str | os.PathLike[str]


def weighted_sources(tuned: Any) -> list[tuple[Source, float]]:
    """Return (source, weight) of what is grafted: one source, or several each with a weight.

    Args:
        tuned: a folder or hub id, optionally with `:weight` at its end (a folder of that name wins); a pair of source
            and weight; or a list of these.

    Raises:
        ConfigError: an empty list, or what is no source or no weight.

    >>> weighted_sources("out"), weighted_sources(["a:0.5", ("b", 2)])
    ([('out', 1.0)], [('a', 0.5), ('b', 2.0)])
    """
    items = list(tuned) if isinstance(tuned, (list, tuple)) and not _is_weighted(tuned) else [tuned]
    if not items:
        raise ConfigError("tuned is an empty list: there is nothing to graft. Nothing was written.")
    found: list[tuple[Source, float]] = []
    for item in items:
        source, weight = item if _is_weighted(item) else _split(item)
        if not isinstance(source, (str, os.PathLike)):
            raise ConfigError(f"tuned: {source!r} is no folder or hub id. Nothing was written.")
        try:
            found.append((source, float(weight)))
        except (TypeError, ValueError):
            found.append((source, math.nan))
        if not math.isfinite(found[-1][1]):
            raise ConfigError(f"tuned: {weight!r} is no weight of {source}. Nothing was written.")
    return found


def _is_weighted(item: Any) -> bool:
    return isinstance(item, tuple) and len(item) == 2 and isinstance(item[1], (int, float))


def _split(item: Any) -> tuple[Any, float]:
    if not isinstance(item, (str, os.PathLike)):
        return item, 1.0
    head, colon, tail = os.fspath(item).rpartition(":")
    if not colon or Path(item).expanduser().exists():
        return item, 1.0
    try:
        return head, float(tail)
    except ValueError:
        return item, 1.0
