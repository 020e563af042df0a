"""Sums over the elements of weights, from which the figures of a graft and of a gap are made."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields, replace

POOR_REALISED = 0.1
"""Distance of `realised` from 1 from which rounding changes what the delta does (docs/precision.md)."""


def is_whole(realised: float) -> bool:
    """Whether stored weights hold the delta at its size, by their share `realised` of it."""
    return abs(realised - 1) <= POOR_REALISED


@dataclass
class Sums:
    """Sums over elements from which the figures of a graft are made; d is the exact change, e = stored - exact.

    Args:
        elements: number of elements.
        gap: sum of |base - instruct|.
        size: sum of |base| + |instruct|.
        dd: sum of d*d.
        ed: sum of e*d.
        ee: sum of e*e.
        bd: sum of f*d, where f is the error of what is stored once it is rounded to bf16.
        dg: sum of d*g, with g = instruct - base; 0 where it was not asked for.
        gg: sum of g*g; the same.
        finite: False when an input or an output is not finite.
    """

    elements: int = 0
    gap: float = 0.0
    size: float = 0.0
    dd: float = 0.0
    ed: float = 0.0
    ee: float = 0.0
    bd: float = 0.0
    dg: float = 0.0
    gg: float = 0.0
    finite: bool = True

    def __iadd__(self, other: Sums) -> Sums:
        for part in fields(self)[:-1]:
            setattr(self, part.name, getattr(self, part.name) + getattr(other, part.name))
        self.finite = self.finite and other.finite
        return self

    def times(self, factor: float) -> Sums:
        """Return the sums over `factor` times as many elements of the same kind."""
        figures = {part.name: getattr(self, part.name) * factor for part in fields(self)[1:-1]}
        return replace(self, elements=round(self.elements * factor), **figures)

    @property
    def sigma(self) -> float | None:
        """Relative distance of BASE and INSTRUCT, sum|B-I| / (sum|B| + sum|I|); None where nothing was measured."""
        return self.gap / self.size if self.size > 0 else None

    @property
    def delta_norm(self) -> float:
        """Euclidean norm of the exact change."""
        return math.sqrt(self.dd)

    @property
    def realised(self) -> float | None:
        """<r,d>/<d,d> with r the change that was stored: 1 where the dtype keeps all of the delta. None for d = 0."""
        return 1.0 + self.ed / self.dd if self.dd > 0 else None

    @property
    def realised_in_bf16(self) -> float | None:
        """The same share after the stored weights were loaded in bf16, to nearest."""
        return 1.0 + self.bd / self.dd if self.dd > 0 and math.isfinite(self.bd) else None

    @property
    def noise(self) -> float | None:
        """|r-d|/|d|: what rounding put beside the delta, relative to its norm. None for d = 0."""
        return math.sqrt(self.ee / self.dd) if self.dd > 0 else None

    @property
    def cosine(self) -> float | None:
        """<d,g> / (|d| |g|), the cosine of the angle between the change and the gap. None where either is 0."""
        size = math.sqrt(self.dd) * math.sqrt(self.gg)
        return self.dg / size if size > 0 and math.isfinite(size) else None
