"""Renders a chat template; run by `limited`, alone, for a template can ask for any time and memory."""

from __future__ import annotations

import json
import sys
from contextlib import suppress
from datetime import datetime
from typing import Any

from jinja2 import TemplateError
from jinja2.sandbox import ImmutableSandboxedEnvironment

_TURNS = [
    {"role": role, "content": text}
    for role, text in (("system", "a"), ("user", "b"), ("assistant", "c"), ("user", "d"))
]
_LONGEST = 1_000_000
"""Characters of a conversation of four letters."""


def answer(asked: tuple[str, dict[str, str]]) -> str:
    """Return short conversations as the template writes them, with tokens by role; joined by NUL."""
    template, named = asked
    extensions = ["jinja2.ext.loopcontrols"]
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=extensions)
    environment.filters["tojson"] = lambda value, **options: json.dumps(value, ensure_ascii=False)
    environment.globals.update(raise_exception=_refuse, strftime_now=lambda form: datetime.now().strftime(form))
    parts: list[Any] = [{**turn, "content": [{"type": "text", "text": turn["content"]}]} for turn in _TURNS]
    rendered: list[str] = []
    # Templates refuse roles and forms in many ways, and some do not compile; their text is searched as well.
    with suppress(Exception):
        compiled = environment.from_string(template)
        for turns in (_TURNS, _TURNS[1:], parts, parts[1:]):  # with and without a system message
            try:
                rendered.append(compiled.render(messages=turns, add_generation_prompt=True, **named))
            except MemoryError:
                sys.exit(1)
            except Exception:  # nosec B112
                continue
    if any(len(text) > _LONGEST for text in rendered):
        sys.exit(1)
    return "\0".join(rendered)


def _refuse(message: str) -> None:
    raise TemplateError(message)
