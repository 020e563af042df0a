"""Regular expressions from files: refused where one would take too long. The matching is tried by `matching`."""

from __future__ import annotations

import re
from collections.abc import Iterable
from functools import lru_cache
from pathlib import Path

from ..errors import ConfigError
from .limited import SECONDS, answer_of

_PLAIN = re.compile(r"[\w.\\-]*")
"""Names, with or without escaped dots: no way to match them takes long."""


def check_patterns(what: str, patterns: Iterable[str], names: Iterable[str]) -> None:
    """Raise ConfigError if one of the expressions of `what` is none, or takes too long on one of `names`."""
    asked = tuple(sorted({pattern for pattern in patterns if not _PLAIN.fullmatch(pattern)}))
    if not asked:
        return
    wrong = _first_wrong(asked, tuple(names))
    if wrong is None:
        raise ConfigError(
            f"{what}: matching {', '.join(map(repr, asked))} with the names of weights takes more than {SECONDS} "
            "seconds. Write it without a repetition inside of a repetition."
        )
    if wrong:
        raise ConfigError(f"{what}: {wrong[0]!r} is not a regular expression ({wrong[1]}). Correct it.")


@lru_cache(maxsize=8)
def _first_wrong(patterns: tuple[str, ...], names: tuple[str, ...]) -> list[str] | None:
    return answer_of(Path(__file__).with_name("matching.py"), [patterns, names])
