"""JSON files that others wrote: read in one place, and checked against the schema of their kind (`schemas`)."""

from __future__ import annotations

import errno
import json
import math
import os
import re
import stat
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from types import NoneType, UnionType
from typing import (
    Annotated,
    Any,
    Literal,
    NamedTuple,
    Required,
    Union,
    get_args,
    get_origin,
    get_type_hints,
    is_typeddict,
)

from ..errors import CheckpointError, list_names

_LARGEST = 2**27  # bytes; an index of a million weights has about 100 MB
_DEEPEST = 64
_WORDS = {str: "text", bool: "true or false", int: "a whole number", float: "a finite number", NoneType: "null"}


class Rule(NamedTuple):
    """What a value must be beyond its type, as metadata of `Annotated`.

    Args:
        wanted: in words, as the end of "must be ...".
        holds: whether a value of the right type is one.
    """

    wanted: str
    holds: Callable[[Any], bool]


def is_there(path: Path) -> bool:
    """Whether there is a file at `path`.

    Raises:
        CheckpointError: what is there is no file, such as a folder or a pipe, or may not be read; that cannot be told,
            as in a folder that may not be entered; or it is a link to nothing.
    """
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            raise ValueError("it is not a file")
        if not os.access(path, os.R_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
        return True
    except (FileNotFoundError, NotADirectoryError) as error:
        if path.is_symlink():
            raise CheckpointError(f"{path} is a link to a file that is not there. Restore it or remove it.") from error
        return False
    except (OSError, ValueError) as error:
        raise unreadable(path, error) from error


def unreadable(path: Path | str, error: Exception) -> CheckpointError:
    """Return the error for a file or folder that is there, or may be, and that cannot be read."""
    reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    way_out = "Download or save it again."
    if isinstance(error, PermissionError):
        way_out = "Change its permissions, or those of the folders above it."
    return CheckpointError(f"cannot read {path}: {reason}. {way_out}")


def read_text(path: Path) -> str | None:
    """Return the text of a UTF-8 file, None where there is none; CheckpointError where it cannot be read."""
    if not is_there(path):
        return None
    try:
        if path.stat().st_size > _LARGEST:
            raise ValueError(f"it has more than {_LARGEST:,} bytes")
        return path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise unreadable(path, error) from error


def read_json(path: Path, schema: Any = dict[str, Any]) -> dict[str, Any]:
    """Return the JSON object in `path`, {} when there is no such file.

    Args:
        path: of the file.
        schema: what it must be: a `TypedDict`, whose keys are checked where they are there, or another annotation.
            Default: any object.

    Raises:
        CheckpointError: the file cannot be read, is no JSON, or has values of the wrong kind; all of them are named.
    """
    text = read_text(path)
    if text is None:
        return {}
    try:
        content = parse(text, unique=path.name.endswith(".index.json"))
    except ValueError as error:
        raise unreadable(path, error) from error
    check(content, schema, path)
    return content


def parse(text: str, *, unique: bool = False) -> Any:
    """Return what a JSON text holds.

    Args:
        text: the JSON.
        unique: whether an object may not have a key twice: which one counts differs between readers. Default False.

    Raises:
        ValueError: it is no JSON, is nested too deeply, has NaN or half a surrogate pair, or a key twice.
    """
    try:
        content = json.loads(text, parse_constant=_constant, object_pairs_hook=_once if unique else None)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error
    level = [content]
    for _ in range(_DEEPEST):
        level = [inner for outer in level for inner in _values(outer) if isinstance(inner, (dict, list))]
    if level:
        raise ValueError(f"it is nested more than {_DEEPEST} levels deep")
    if re.search(r"\\u[dD][89a-fA-F]", text):
        try:
            json.dumps(content, ensure_ascii=False).encode()
        except UnicodeEncodeError as error:
            raise ValueError("it has half of a surrogate pair, which is no character") from error
    return content


def check(content: Any, schema: Any, path: Path) -> None:
    """Raise CheckpointError if `content`, of the file `path`, is not what `schema` says; every wrong value is named."""
    wrong = [
        f"{at.lstrip('.') or 'the file'}  {_shown(value)}, must be {wanted}"
        for at, value, wanted in _wrong(content, schema, "")
    ]
    if wrong:
        verb = "value of it is" if len(wrong) == 1 else "values of it are"
        raise CheckpointError(
            f"cannot use {path}: {len(wrong)} {verb} of the wrong kind.\n{list_names(wrong)}\n"
            "Download or save it again."
        )


def _constant(name: str) -> float:
    # Configs state bounds as Infinity; NaN has no meaning in any of them.
    if name == "NaN":
        raise ValueError("it has NaN, which is no number")
    return float(name)


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"it has the key {next(name for name in names if names.count(name) > 1)!r} twice")
    return found


def _values(content: Any) -> Any:
    return content.values() if isinstance(content, dict) else content if isinstance(content, list) else ()


def _shown(value: Any) -> str:
    if value is _MISSING:
        return "missing"
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else f"{text[:57]}..."


_MISSING = object()


@cache
def _fields(schema: Any) -> dict[str, Any]:
    return get_type_hints(schema, include_extras=True)


def _wrong(value: Any, kind: Any, at: str) -> Iterator[tuple[str, Any, str]]:
    """Yield (place, value, what it must be) of everything in `value` that is not of the annotated `kind`."""
    origin, inner = get_origin(kind), get_args(kind)
    if origin in (Union, UnionType):
        found_by = [list(_wrong(value, option, at)) for option in inner]
        if all(found_by):
            deeper = (found for found in found_by if found[0][0] != at)
            wanted = " or ".join(dict.fromkeys(found[0][2] for found in found_by))
            yield from next(deeper, [(at, value, wanted)])
    elif origin is Annotated:
        found = list(_wrong(value, inner[0], at))
        if any(place != at for place, *_ in found):
            yield from found
        elif found or not inner[1].holds(value):
            yield at, value, inner[1].wanted
    elif is_typeddict(kind) or origin in (dict, list):
        yield from _wrong_inside(value, kind, at)
    elif origin is Literal:
        if value not in inner:
            yield at, value, f"one of {', '.join(map(str, inner))}"
    elif kind is not Any and not _is(value, kind):
        yield at, value, _WORDS[kind]


def _wrong_inside(value: Any, kind: Any, at: str) -> Iterator[tuple[str, Any, str]]:
    """Yield what `_wrong` does, of an object or a list."""
    if get_origin(kind) is list:
        if not isinstance(value, list):
            yield at, value, "a list"
            return
        inner = {f"{at}[{number}]": (item, get_args(kind)[0]) for number, item in enumerate(value)}
    elif not isinstance(value, dict):
        yield at, value, "an object"
        return
    elif is_typeddict(kind):
        inner = {}
        for name, hint in _fields(kind).items():
            needed = get_origin(hint) is Required
            if name in value or needed:
                inner[f"{at}.{name}"] = (value.get(name, _MISSING), get_args(hint)[0] if needed else hint)
    else:
        inner = {f"{at}.{name}": (item, get_args(kind)[1]) for name, item in value.items()}
    for place, (item, wanted) in inner.items():
        yield from _wrong(item, wanted, place)


def _is(value: Any, kind: Any) -> bool:
    if kind is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool) and _finite(value)
    return isinstance(value, kind) and (kind is not int or not isinstance(value, bool))


def _finite(value: float) -> bool:
    try:
        return math.isfinite(value)
    except OverflowError:  # a whole number beyond the largest float
        return False


def is_file_name(name: str) -> bool:
    """Whether `name` is the relative path of a file that lies in a folder or below it, as spelt."""
    parts = name.split("/")
    return "\0" not in name and "\\" not in name and not os.path.isabs(name) and not {"", ".", ".."} & {*parts}
