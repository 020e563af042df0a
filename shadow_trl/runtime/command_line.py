"""Parsers of command lines: unknown words are errors with the nearest known one, and help keeps lines as they are."""

from __future__ import annotations

import argparse
import contextlib
import difflib
import sys
import textwrap
from collections.abc import Iterable
from typing import Any, NoReturn

from ..errors import ConfigError


def nearest(word: str, known: Iterable[str]) -> str:
    """Return ` (did you mean ...?)` with the known word that is most like `word`, "" where none is like it.

    >>> nearest("grfat", ["graft", "gap"]), nearest("knit", ["graft", "gap"])
    (' (did you mean graft?)', '')
    """
    near = difflib.get_close_matches(word, list(known), n=1)
    return f" (did you mean {near[0]}?)" if near else ""


def stdout_is_kept(asked: bool) -> contextlib.AbstractContextManager[Any]:
    """Send to stderr what the block prints, where stdout is `asked` to have nothing but the JSON that follows it."""
    return contextlib.redirect_stdout(sys.stderr) if asked else contextlib.nullcontext()


class Parser(argparse.ArgumentParser):
    """A parser without abbreviations, of which every error is a ConfigError."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs, allow_abbrev=False, formatter_class=_Help)

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """As in argparse, but for words that there are none of."""
        # Before argparse, which would miss the required option that was misspelt and not say what was given.
        words = [str(word) for word in args or ()]
        commands = next((one.choices for one in self._actions if isinstance(one, argparse._SubParsersAction)), None)
        if commands is not None:
            first = words[0] if words else "-"
            if not first.startswith("-") and first not in commands:
                self.error(f"there is no command {first}{nearest(first, commands)}: it is one of {', '.join(commands)}")
        else:
            known = list(self._option_string_actions)
            for option in (word.partition("=")[0] for word in words):
                if option.startswith("--") and option not in known:
                    self.error(f"there is no option {option}{nearest(option, known)}")
        return super().parse_known_args(args, namespace)

    def error(self, message: str) -> NoReturn:
        """Raise ConfigError with the command whose help tells more."""
        raise ConfigError(f"{message}. See `{self.prog} --help`.")


class _Help(argparse.HelpFormatter):
    """Wraps each line of a description or an epilogue by itself; what is indented stays as it is."""

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        lines = (line if line.startswith(" ") else textwrap.fill(line, width) for line in text.splitlines())
        return textwrap.indent("\n".join(lines), indent)


class Switch(argparse.Action):
    """An option that is `on` or `off`."""

    def __call__(self, parser: Any, namespace: argparse.Namespace, values: Any, option_string: Any = None) -> None:
        """Set whether it is on."""
        setattr(namespace, self.dest, values == "on")
