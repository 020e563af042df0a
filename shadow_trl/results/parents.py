"""The folders above a result: made where they are missing, removed where nothing came into them."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path


def make_parents(folder: Path) -> list[Path]:
    """Make a folder with the folders above it; return those that were not there, outermost first."""
    missing = missing_parents(folder)
    for path in missing:
        path.mkdir(exist_ok=True)
    return missing


def missing_parents(folder: Path) -> list[Path]:
    """Return a folder and those above it, as far as they are not there, outermost first."""
    return [path for path in (folder, *folder.parents) if not path.exists()][::-1]


def remove_empty(folders: list[Path]) -> None:
    """Remove folders that `make_parents` made, as far as nothing lies in them by now."""
    for folder in reversed(folders):
        with suppress(OSError):
            folder.rmdir()
