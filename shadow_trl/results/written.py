"""What a command has written when it fails, found by looking."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from ..checkpoints.header import stamp
from ..errors import ends_with
from .parents import missing_parents, remove_empty

_SHOWN = 8


@contextmanager
def tells_what_is_written(*outputs: Path, instead: bool = False) -> Iterator[None]:
    """Let whatever leaves the block end with what it wrote to `outputs`; folders that it made and left empty go.

    Args:
        outputs: files and folders that the block may write.
        instead: as for `ends_with`.
    """
    before = [_stamps(path) for path in outputs]
    missing = [folder for path in outputs for folder in missing_parents(path)]
    try:
        with ends_with(lambda: _sentence(outputs, before), instead=instead):
            yield
    except BaseException:
        remove_empty(missing)
        raise


def _sentence(outputs: Sequence[Path], before: Sequence[dict[Path, object]]) -> str:
    new: dict[Path, None] = {}
    for path, old in zip(outputs, before, strict=True):
        changed = (found for found, found_stamp in _stamps(path).items() if found_stamp != old.get(found))
        new |= dict.fromkeys(path / Path(*found.relative_to(path).parts[:1]) for found in changed)
    if not new:
        return "Nothing was written."
    more = f" and {len(new) - _SHOWN} more" if len(new) > _SHOWN else ""
    return f"Written so far: {', '.join(map(str, list(new)[:_SHOWN]))}{more}."


def _stamps(path: Path, depth: int = 2) -> dict[Path, object]:
    """Return file, or folder that is not empty, at most `depth` below `path` -> its stamp, sorted."""
    if depth and path.is_dir() and not path.is_symlink():
        found: dict[Path, object] = {}
        with suppress(OSError):
            for entry in sorted(path.iterdir()):
                found |= _stamps(entry, depth - 1)
        return found
    there = any(path.iterdir()) if path.is_dir() else os.path.lexists(path)
    return {path: stamp(path)} if there else {}
