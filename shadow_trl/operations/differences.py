"""What differs between the folder of a graft and the same graft made again: weights, other files, figures, card."""

from __future__ import annotations

import math
import threading
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from ..checkpoints.checkpoint import ADAPTER_CONFIG, Checkpoint
from ..checkpoints.digests import file_digest
from ..checkpoints.hub import local_folder
from ..checkpoints.json_files import read_json
from ..checkpoints.manifest import MANIFEST_NAME
from ..results.cards import CARD_NAME

if TYPE_CHECKING:
    from numpy import ndarray

# What of the manifest is no figure: facts about the files, prose, and what the graft is made again from.
_NO_FIGURES = {
    "trained", "kind", "format", "versions", "card", "files", "options", "warnings", "dense_because",
    "rounded_because", "beside", "text_class",
}  # fmt: skip
_FIGURE_TOLERANCE = 1e-6
"""Sums of another processor may add up in another order."""
_FP32_TOLERANCE = 1e-5
"""Without numba sums were in fp32: off by up to 5e-6 in a model of a billion parameters."""


class Comparison:
    """What differs between the weights of a folder and those that are shown to it, by name; for several threads."""

    def __init__(self, there: Checkpoint) -> None:
        self.there = there
        self.counts: dict[str, int] = {}
        self.largest: dict[str, float] = {}
        self._lock = threading.Lock()

    def add(self, name: str, start: int, stop: int, made: ndarray) -> None:
        """Compare elements `start` to `stop` with the bytes `made`; other shapes and dtypes are not told here."""
        import numpy as np

        spec = self.there.specs.get(name)
        if spec is None or stop > spec.numel or made.size != (stop - start) * spec.itemsize:
            return
        stored = self.there.content(name, start, stop)
        if np.array_equal(stored, made):
            return
        unequal = (stored != made).reshape(-1, spec.itemsize).any(axis=1)
        one, other = (spec.numbers(side.view(spec.numpy_dtype))[unequal] for side in (stored, made))
        with np.errstate(invalid="ignore"):
            apart = float(np.nan_to_num(np.abs(one - other), nan=math.inf, posinf=math.inf).max())
        with self._lock:
            self.counts[name] = self.counts.get(name, 0) + int(unequal.sum())
            self.largest[name] = max(self.largest.get(name, 0.0), apart)  # NaN against a number: as far as can be

    def read(self, again: Checkpoint) -> None:
        """Compare all weights of another folder."""
        from ..arithmetic.grafter import BLOCK

        for name, spec in again.specs.items():
            for start in range(0, spec.numel, BLOCK):
                stop = min(start + BLOCK, spec.numel)
                self.add(name, start, stop, again.content(name, start, stop))


def other_weights(there: Checkpoint, again: Checkpoint, comparison: Comparison) -> dict[str, str]:
    """Return name -> what is different about it, for each weight of either folder."""
    found = {name: "not in the graft" for name in there.specs if name not in again.specs}
    for name, spec in again.specs.items():
        other = there.specs.get(name)
        if other is None:
            found[name] = "missing in the folder"
        elif (other.shape, other.code) != (spec.shape, spec.code):
            found[name] = f"{other.code} {list(other.shape)} instead of {spec.code} {list(spec.shape)}"
        elif name in comparison.counts:
            differ, apart = comparison.counts[name], comparison.largest[name]
            found[name] = f"{differ} of {spec.numel} values, by at most {apart:.3g}"
    return found


def other_files(there: Checkpoint, again: Checkpoint) -> tuple[list[str], list[str]]:
    """Return the names of the equal files, and those that are missing, changed or not of the graft."""
    ours, theirs = _files(there), _files(again)
    changed = {name for name in ours & theirs if _content(there, name) != _content(again, name)}
    return sorted((ours & theirs) - changed - {path.name for path in again.files}), [
        *(f"{name}  missing" for name in sorted(theirs - ours)),
        *(f"{name}  changed" for name in sorted(changed)),
        *(f"{name}  not of the graft" for name in sorted(ours - theirs)),
    ]


def _files(side: Checkpoint) -> set[str]:
    found = {path.relative_to(side.path) for path in side.path.rglob("*") if path.is_file()}
    names = {str(name) for name in found if not any(part.startswith(".") for part in name.parts)}
    return names - {MANIFEST_NAME, CARD_NAME}


def stored_in(*sides: Checkpoint) -> set[str | None]:
    """Return the names of the files that hold weights, and of their indices."""
    return {name for side in sides for name in (side.index, *(path.name for path in side.files))}


def compare_card(there: Checkpoint, manifest: Mapping[str, Any], equal: list[str], files: list[str]) -> list[str]:
    """Add the card to the files that are equal or to those that differ; else return why it was not compared."""
    path = there.path / CARD_NAME
    if "card" not in manifest or local_folder(there.source) is None:
        return [
            f"{CARD_NAME}, of which {MANIFEST_NAME} has no digest"
            if "card" not in manifest
            else f"{CARD_NAME} on the hub"
        ]
    if path.is_file() and file_digest(path) == manifest["card"]:
        equal.append(CARD_NAME)
    else:
        files.append(f"{CARD_NAME}  {'changed' if path.is_file() else 'missing'}")
    return []


def other_figures(there: Mapping[str, Any], again: Mapping[str, Any]) -> list[str]:
    """Return the entries of the manifest that differ: counts, names, figures, and options that there are none of."""
    tolerance = _FIGURE_TOLERANCE if "numba" in there["versions"] else _FP32_TOLERANCE
    ours, theirs = (_flat({key: value for key, value in side.items() if key not in _NO_FIGURES and not _is_side(value)})
                    for side in (there, again))  # fmt: skip
    return [
        *(f"{key}  missing" for key in theirs.keys() - ours.keys()),
        *(
            f"{k}  {ours[k]!r} instead of {theirs[k]!r}"
            for k in ours.keys() & theirs.keys()
            if not _near(ours[k], theirs[k], tolerance)
        ),
        *(f"{key}  not of the graft" for key in ours.keys() - theirs.keys()),
        *(f"options.{key}  not of the graft" for key in there["options"].keys() - again["options"].keys()),
    ]


def _is_side(value: Any) -> bool:
    return isinstance(value, dict) and "source" in value


def _flat(value: Any, prefix: str = "") -> dict[str, Any]:
    """Return dotted key -> value, in which no value is a dictionary that has entries."""
    if not isinstance(value, dict) or not value:
        return {prefix: value}
    parts = [_flat(inner, f"{prefix}.{key}" if prefix else str(key)) for key, inner in value.items()]
    return {key: inner for part in parts for key, inner in part.items()}


def _near(one: Any, other: Any, tolerance: float) -> bool:
    if isinstance(one, float) and isinstance(other, float):
        return math.isclose(one, other, rel_tol=tolerance, abs_tol=tolerance**2)
    return type(one) is type(other) and one == other


def _content(side: Checkpoint, name: str) -> Any:
    path = side.path / name
    if path in side.headers:
        return side.headers[path].metadata  # the weights behind it are compared by name
    if path.name != ADAPTER_CONFIG:
        return path.read_bytes()
    # The model's name in it is as the user gave it; a path may lead there from another folder by another name.
    named = ("base_model_name_or_path", "revision")
    return {key: value for key, value in read_json(path).items() if key not in named}
