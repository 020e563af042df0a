"""Matches expressions with names in all ways in which PEFT and this package do; run by `limited`, alone."""

from __future__ import annotations

import re
from typing import Any

_FORMS = ("{}", "(?:{})$", r"(.*\.)?({})$", r".*\.{}$", r"(^|.*\.){}($|\..*)", r"(?:^|.*?\.){}\.(?P<idx>\d+)\.")


def answer(asked: tuple[list[str], list[str]]) -> Any:
    """Return the first of the expressions that is none, with the reason; [] where all are."""
    patterns, names = asked
    for pattern in patterns:
        try:
            found = [re.compile(form.replace("{}", pattern)) for form in _FORMS]
        except (re.error, RecursionError, OverflowError) as error:
            return [pattern, str(error)]
        for name in names:
            found[0].search(name)
            for form in found[1:]:
                form.match(name)
    return []
