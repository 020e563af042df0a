"""Measured models as JSON: values of rows that are 0 or 1 as bits, others as numbers."""

from __future__ import annotations

import base64
from dataclasses import asdict
from typing import Any

import numpy as np

from shadow_trl.evaluation.measured import Measured, Settings


def pack(values: tuple[float, ...]) -> Any:
    """Return the values of rows in a short form that loses nothing."""
    if set(values) <= {0.0, 1.0}:
        bits = np.packbits(np.array(values, dtype=bool))
        return {"rows": len(values), "bits": base64.b64encode(bits.tobytes()).decode()}
    return list(values)


def unpack(packed: Any) -> tuple[float, ...]:
    """Return what `pack` was given."""
    if isinstance(packed, list):
        return tuple(packed)
    bits = np.frombuffer(base64.b64decode(packed["bits"]), dtype=np.uint8)
    return tuple(map(float, np.unpackbits(bits, count=packed["rows"])))


def to_dict(model: Measured) -> dict[str, Any]:
    """Return a measured model as plain values; settings that do not apply are left out."""
    settings = {name: value for name, value in asdict(model.settings).items() if value is not None}
    values = {split: {part: pack(one) for part, one in parts.items()} for split, parts in model.values.items()}
    return {
        "settings": settings, "pair": model.pair, "seed": model.seed, "values": values, "seconds": dict(model.seconds),
    }  # fmt: skip


def from_dict(plain: dict[str, Any]) -> Measured:
    """Return what `to_dict` was given."""
    values = {split: {part: unpack(one) for part, one in parts.items()} for split, parts in plain["values"].items()}
    return Measured(Settings(**plain["settings"]), values, plain["pair"], plain["seed"], plain["seconds"])
