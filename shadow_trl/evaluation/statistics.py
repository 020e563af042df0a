"""Whether one model is better than another, better by how much, and whether the rows suffice to say so.

A comparison reads two tables of values on the same rows: one table a part (a kind of rows, or a loss), one line a
training (pair and seed), one column a row. All statistics weigh parts equally, then trainings, then rows.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import ConfigError

Table = NDArray[np.float64]
"""Values of shape (trainings, rows)."""

LEVEL = 0.95
POWER = 0.8
RESAMPLES = 2000
_BATCH = 200


@dataclass(frozen=True)
class Difference:
    """How much better `a` is than `b`, in the unit of the values.

    Args:
        value: mean of a - b.
        interval: of `LEVEL`, over trainings and rows.
        p: of the paired test over the rows, given these trainings.
        rows: compared rows.
        trainings: compared trainings.
        error: standard error of `value`.
        row_error: standard error that the rows alone give `value`; more rows make it smaller.
    """

    value: float
    interval: tuple[float, float]
    p: float
    rows: int
    trainings: int
    error: float
    row_error: float


def compare(
    a: Mapping[str, Table], b: Mapping[str, Table], *, bound: float | None = None, pairs: int = 1, seed: int = 0
) -> Difference:
    """Compare two models on the rows that both have answered.

    The interval is a bootstrap over trainings and rows that draws both independently, since all trainings answer the
    same rows (Owen 2007, "The pigeonhole bootstrap"). Trainings of several pairs of models are drawn in two steps,
    pairs and then trainings of each drawn pair, since those of one pair are alike. With `bound`, each part gets two
    rows more, one in favour of each model (Bonett and Price 2012): without them, two models that answer ten rows alike
    would be called equal for sure. With fewer than about ten trainings, or pairs where there are several, the interval
    is narrower than its level says.

    The p value is of a permutation test that swaps the models row by row.

    Args:
        a: part -> values, (trainings, rows); one training stands for as many as `b` has.
        b: the same parts with the same rows.
        bound: largest difference that a row can have, such as 1 for shares; None where there is none.
        pairs: number of pairs; the trainings are in their order, as many of each. Default 1.
        seed: of the random draws.

    >>> same = {"all": np.ones((1, 1000))}
    >>> low, high = compare(same, same, bound=1.0).interval
    >>> -0.005 < low < 0 < high < 0.005
    True

    """
    steps = {part: values - b[part] for part, values in a.items()}  # one training broadcasts
    value = float(np.mean([table.mean() for table in steps.values()]))
    tables = list(steps.values())
    rows, trainings = sum(table.shape[1] for table in tables), tables[0].shape[0]
    p = _swapped(tables, seed)
    if bound is not None:
        tables = [np.hstack([table, np.tile([bound, -bound], (trainings, 1))]) for table in tables]
    both = _bootstrap(tables, seed, pairs)
    only_rows = both if trainings == 1 else _bootstrap([table.mean(0, keepdims=True) for table in tables], seed)
    low, high = (float(end) for end in both.confidence_interval)
    return Difference(
        value, (low, high), p, rows, trainings, float(both.standard_error), float(only_rows.standard_error)
    )


def interval_of(
    values: Mapping[str, Table], *, bound: float | None = None, pairs: int = 1, seed: int = 0
) -> tuple[float, float]:
    """Return the interval of one model's mean over parts, trainings and rows; see `compare` for how it is made.

    Args:
        values: part -> values, (trainings, rows).
        bound: largest value that a row can have, from 0: each part gets one row more at either end, so that a model
            that answers ten rows right is not called perfect. None where there is none.
        pairs: as of `compare`. Default 1.
        seed: of the random draws.

    >>> low, high = interval_of({"all": np.ones((1, 10))}, bound=1.0)
    >>> low < 0.85, high
    (True, 1.0)
    """
    tables = [
        table if bound is None else np.hstack([table, np.tile([bound, 0.0], (len(table), 1))])
        for table in values.values()
    ]
    low, high = _bootstrap(tables, seed, pairs).confidence_interval
    return float(low), float(high)


def _bootstrap(tables: Sequence[Table], seed: int, pairs: int = 1) -> Any:
    """Return scipy's bootstrap of the mean over tables, rows of each drawn on their own and trainings once for all."""
    from scipy.stats import bootstrap

    trainings = tables[0].shape[0]
    each = trainings // pairs
    rows = [np.arange(table.shape[1]) for table in tables]
    draws: list[NDArray[np.int64]] = []
    if each > 1 and pairs > 1:  # pairs, and for each drawn one which of its trainings
        draws = [np.arange(pairs), *[np.arange(each)] * pairs]
    elif trainings > 1:
        draws = [np.arange(trainings)]

    def lines_of(drawn: Sequence[NDArray[np.int64]]) -> NDArray[np.int64]:
        if len(drawn) < 2:
            return drawn[0] if drawn else np.zeros(1, np.int64)
        return np.concatenate([drawn[0][..., at, None] * each + one for at, one in enumerate(drawn[1:])], axis=-1)

    def mean(*drawn: NDArray[np.int64], axis: int = -1) -> Any:
        lines, columns = lines_of(drawn[: len(draws)]), drawn[len(draws) :]
        parts = (
            table[lines[..., :, None], column[..., None, :]].mean((-1, -2))
            for table, column in zip(tables, columns, strict=True)
        )
        return sum(parts) / len(tables)

    if any(table.shape[1] < 2 for table in tables):
        raise ConfigError("a comparison needs at least 2 rows of each kind.")
    return bootstrap(
        [*draws, *rows], mean, n_resamples=RESAMPLES, batch=_BATCH, confidence_level=LEVEL, method="percentile",
        rng=np.random.default_rng(seed),
    )  # fmt: skip


def _swapped(tables: Sequence[Table], seed: int) -> float:
    """Return the p value of scipy's permutation test over the rows on which the models differ."""
    from scipy.stats import permutation_test

    weighed = np.concatenate([table.mean(0) / table.shape[1] for table in tables])
    moved = weighed[weighed != 0.0]  # a swap of equal values changes nothing
    if moved.size < 2:  # a swap of one row has p = 1 whichever way it goes
        return 1.0

    def total(x: Table, y: Table, axis: int = -1) -> Any:
        return (x - y).sum(axis)

    found = permutation_test(
        (moved, np.zeros_like(moved)), total, permutation_type="samples", vectorized=True, n_resamples=4999,
        batch=_BATCH, rng=np.random.default_rng(seed),
    )  # fmt: skip
    return float(found.pvalue)


def holm(values: Sequence[float]) -> list[float]:
    """Return p values adjusted for their number as Holm does: the k-th smallest of m is multiplied by m - k + 1.

    Source: Holm (1979), "A simple sequentially rejective multiple test procedure".

    >>> holm([0.01, 0.04, 0.03])
    [0.03, 0.06, 0.06]

    """
    order, highest = sorted(range(len(values)), key=values.__getitem__), 0.0
    adjusted = [0.0] * len(values)
    for place, at in enumerate(order):
        highest = max(highest, min(1.0, (len(values) - place) * values[at]))
        adjusted[at] = highest
    return adjusted


def verdict(
    found: Difference, p_adjusted: float, *, margin: float | None, unit: str, digits: int = 1, higher: bool = True
) -> str:
    """Say what a difference shows.

    Args:
        found: in the unit of `margin`.
        p_adjusted: its p value, adjusted for the number of comparisons.
        margin: differences up to this do not matter; None: every difference matters.
        unit: word behind a number, such as "points"; may be empty.
        digits: behind the decimal point.
        higher: whether more is better. Default True.

    Returns:
        "no difference above ..." where the interval is inside the margin (without one, "no difference on any row" where
        all are equal), "better by ..." or "worse by ..." where it excludes 0 and `p_adjusted` is at most 1 - LEVEL,
        else "too few rows to tell", with the number of rows that would tell.
    """
    low, high = found.interval
    unit = f" {unit}" if unit else ""
    if margin is not None and -margin < low and high < margin:
        return f"no difference above {margin:g}{unit}"
    if (low > 0 or high < 0) and p_adjusted <= 1.0 - LEVEL + 1e-12:
        word = "better" if (low > 0) == higher else "worse"
        ends = (low, high) if low > 0 else (-high, -low)
        return f"{word} by {abs(found.value):.{digits}f}{unit} ({ends[0]:.{digits}f} to {ends[1]:.{digits}f})"
    if margin is None and low == high == found.value == 0.0:
        return "no difference on any row"
    wanted = rows_that_tell(found, margin=margin)
    if wanted is None:
        return "too few rows to tell: more trainings (seeds) would tell, rows alone would not"
    return f"too few rows to tell: about {wanted:,} are needed, there are {found.rows:,}"


def rows_that_tell(found: Difference, *, margin: float | None) -> int | None:
    """Return how many rows would tell with a chance of `POWER`, if the difference is what it is here.

    They tell once the interval is short enough to exclude 0 or to lie inside the margin, whichever needs fewer. None:
    the trainings differ too much among themselves for any number of rows.
    """
    from scipy.stats import norm

    distance = max(abs(found.value), (margin or 0.0) - abs(found.value))
    allowed = distance / (norm.ppf((1.0 + LEVEL) / 2.0) + norm.ppf(POWER))
    room = allowed**2 - max(0.0, found.error**2 - found.row_error**2)
    if room <= 0.0:
        return None
    # Corrections for many comparisons and the errors' own errors can ask for more than there are though this does not.
    return max(found.rows + 1, math.ceil(found.rows * found.row_error**2 / room))
