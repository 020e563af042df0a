"""Exceptions of shadow_trl.

Two families: bad input, found before any work is done (`InputError`, exit code 2 of the command line), and a failure at
run time (`GraftError`, exit code 1). Every message says what failed, how many, each name with both sides' values, a way
out, and what is on the disk now.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

_STOPS = (".", "!", "?", ":")


class ShadowError(Exception):
    """Base class of every error raised on purpose by shadow_trl."""

    exit_code = 1
    ending = ""
    """What is on the disk now, as the last sentence of the message: see `ends_with`."""

    def __str__(self) -> str:
        return with_ending(super().__str__(), self.ending)


class InputError(ShadowError, ValueError):
    """The input cannot be worked with; found before any work is done."""

    exit_code = 2


class ConfigError(InputError):
    """An option has a value that it cannot have, or options contradict each other."""


class CheckpointError(InputError):
    """A checkpoint is missing, has no weights, is quantised, damaged, or points outside its own folder."""


class PairMismatchError(InputError):
    """BASE and INSTRUCT do not belong together: other architecture, shapes, vocabularies or templates."""


class AdapterError(InputError):
    """An adapter has no weight delta, matches nothing on INSTRUCT, or has no exact form there."""


class OutputExistsError(InputError):
    """The output folder already holds a result and overwriting was not asked for."""


class VersionError(InputError, ImportError):
    """A library is not installed in a release that can be worked with."""


class GraftError(ShadowError, RuntimeError):
    """A graft failed after it had started: values that are not finite, a full disk."""


class UploadError(ShadowError, RuntimeError):
    """What was written could not be published; it is whole on the disk."""


def with_ending(text: str, ending: str) -> str:
    """Return `text` with `ending` as its last sentence."""
    if not ending:
        return text
    # A list of names at the end is no sentence that another could follow on its line.
    listed = text.rpartition("\n")[2].startswith("  ")
    return f"{text}\n{ending}" if listed else f"{text}{'' if text.endswith(_STOPS) else '.'} {ending}"


@contextmanager
def ends_with(ending: str | Callable[[], str], *, instead: bool = False) -> Iterator[None]:
    """Let whatever leaves the block, or the decorated function, end with what is on the disk now.

    Args:
        ending: a sentence, or a function that makes one when the error comes.
        instead: whether it takes the place of what an inner block said. Default False: the innermost knows best.
    """
    try:
        yield
    except BaseException as error:
        # An interrupt and a full disk are none of our errors, and end all the same: `runtime.endings` prints them.
        if instead or not getattr(error, "ending", ""):
            error.ending = ending if isinstance(ending, str) else ending()  # type: ignore[attr-defined]
        raise


def one_of(name: str, value: str, allowed: Sequence[str]) -> str:
    """Return `value` if it is one of `allowed`; raise ConfigError with the `name` of the option if not."""
    if value not in allowed:
        raise ConfigError(f"{name} must be one of {', '.join(allowed)}; got {value!r}.")
    return value


def list_names(lines: Iterable[str], *, limit: int = 10) -> str:
    """Return `lines` indented by two spaces, one a row, cut after `limit` with the number left out.

    >>> print(list_names(["a", "b", "c"], limit=2))
      a
      b
      ... and 1 more
    """
    rows = list(lines)
    shown = [f"  {row}" for row in rows[:limit]]
    if len(rows) > limit:
        shown.append(f"  ... and {len(rows) - limit} more")
    return "\n".join(shown)


def both_sides(name: str, one: object, two: object, roles: tuple[str, str] = ("base", "instruct")) -> str:
    """Return `name` with the values of two sides under it, one a line, as a row for `list_names`.

    >>> print(list_names([both_sides("hidden_size", 64, 128)]))
      hidden_size
        base      64
        instruct  128
    """
    return "\n".join([name, *(f"    {role:<9} {value}" for role, value in zip(roles, (one, two), strict=True))])


@dataclass
class Findings:
    """What the checks of a pair found, so that one error can tell everything at once."""

    errors: list[str] = field(default_factory=list)
    """Reasons to refuse the pair: a headline, the names with both sides' values, a way out."""
    warnings: list[str] = field(default_factory=list)
    """Reasons to look twice; the work can go on."""

    def add(self, found: Findings) -> None:
        """Take over what another check found."""
        self.errors += found.errors
        self.warnings += found.warnings
