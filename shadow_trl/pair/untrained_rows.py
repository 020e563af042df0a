"""Do the rows of INSTRUCT's special tokens in BASE's embedding look trained? Only slices are read."""

from __future__ import annotations

import math
from collections.abc import Iterable

import numpy as np
from numpy import ndarray

from ..checkpoints.checkpoint import Checkpoint, Place
from ..errors import Findings, list_names
from .templates import read_templates, template_tokens
from .token_rows import embedding_name, vocabulary_of
from .vocabularies import Vocabulary

SAMPLE = 512
"""Ordinary rows that the special rows are compared with."""
SMALL = 0.5
"""A row is far too small when its norm is below this share of the norm that all but 1% of the ordinary rows reach."""
SAME = 0.02
"""Two rows are the same when they are closer than this share of their norm; trained rows never are."""
NEAR = 0.2
"""Two rows are near twins when they are closer than this share of their norm and hardly any two ordinary rows are."""
NEAR_MEAN = 0.1
"""A row is a copy of the mean row when it is closer to it than this share of the ordinary rows' median distance."""


@np.errstate(divide="ignore", invalid="ignore", over="ignore")  # of values that the graft itself will name
def check_template_rows(base: Checkpoint, instruct: Checkpoint, template: str | None = None) -> Findings:
    """Warn about special tokens of the chat template whose rows in BASE's embedding do not look trained.

    `template` is the text of the one that training uses, by default INSTRUCT's.

    A row is named when it is far smaller than ordinary rows, equal or close to the row of another added token, equal
    to the unused rows behind the vocabulary, or a copy of the mean row. BASE has then never seen that token: what
    training does to it has to be learnt from scratch, and such grafts were worse than the untouched INSTRUCT.
    """
    name, vocabulary = embedding_name(base), vocabulary_of(instruct)
    if name is None or not vocabulary.exists or not base.specs[name].is_float:
        return Findings()
    templates = {"default": template} if template else read_templates(instruct.path)
    used = template_tokens(templates, vocabulary.added, vocabulary.named)
    matrix = Place(base, name)
    tokens = {token: vocabulary.added[token] for token in used if vocabulary.added[token] < matrix.spec.shape[0]}
    ordinary, unused = _samples(vocabulary, matrix.spec.shape[0])
    if not tokens or len(ordinary) < 8:
        return Findings()
    rows, known = _rows(matrix, tokens.values()), _rows(matrix, ordinary)
    added = {token: index for token, index in vocabulary.added.items() if index < matrix.spec.shape[0]}
    twins = _twins(rows, tokens, added, matrix)
    doubts = _untrained(rows, twins, known, _rows(matrix, unused))
    if not doubts:
        return Findings()
    where = {token: "" if used[token] else " (not in a plain conversation)" for token in tokens}
    lines = list_names(f"{token!r} (id {tokens[token]}){where[token]}: {doubt}" for token, doubt in doubts.items())
    whose = "the given" if template else "instruct's"
    headline = f"{len(doubts)} of the {len(tokens)} special tokens of {whose} chat template look untrained in base"
    advice = (
        "Base has to learn them from the training data alone, and the graft may come out worse than the untouched "
        "instruct. Full fine-tuning, or an adapter that trains the embedding, can learn them; a base that has seen "
        "these tokens is better."
    )
    return Findings(warnings=[f"{headline} ({name}).\n{lines}\n{advice}"])


def _samples(vocabulary: Vocabulary, rows: int) -> tuple[list[int], list[int]]:
    """Return ids of at most SAMPLE ordinary tokens, evenly spread, and of at most SAMPLE rows behind the vocabulary."""
    added = set(vocabulary.added.values())
    known = sorted(index for index in vocabulary.ids.values() if index < rows and index not in added)
    end = max(vocabulary.ids.values(), default=rows) + 1
    step = -(-len(known) // SAMPLE) or 1
    return known[::step], list(range(end, min(rows, end + SAMPLE)))


def _rows(matrix: Place, ids: Iterable[int]) -> ndarray:
    """Return the rows `ids` of `matrix` in fp64, (ids, columns); nothing else of it is read."""
    columns = matrix.spec.shape[1]
    return np.reshape([matrix.numbers(row * columns, (row + 1) * columns) for row in ids], (-1, columns))


def _twins(rows: ndarray, tokens: dict[str, int], added: dict[str, int], matrix: Place) -> dict[str, tuple[float, str]]:
    """Return for each of `tokens`, with rows (tokens, hidden), how near the nearest other added token is, and which."""
    names, ids = list(added), list(added.values())
    parts = (_rows(matrix, ids[start : start + SAMPLE]) for start in range(0, len(ids), SAMPLE))
    apart = np.concatenate([_relative_distances(rows, part) for part in parts], axis=1)
    found: dict[str, tuple[float, str]] = {}
    for (token, index), distances in zip(tokens.items(), apart, strict=True):
        distances[[place for place, other in enumerate(ids) if other == index]] = math.inf
        found[token] = (float(distances.min()), names[int(distances.argmin())])
    return found


def _relative_distances(rows: ndarray, others: ndarray) -> ndarray:
    """Return the distances (rows, others) as shares of the norms of `rows`; infinite for a row of zeros."""
    squares = (rows**2).sum(axis=1)[:, None] + (others**2).sum(axis=1) - 2 * rows @ others.T
    norms = np.linalg.norm(rows, axis=1, keepdims=True)
    return np.nan_to_num(np.sqrt(np.maximum(squares, 0.0)) / norms, nan=math.inf, posinf=math.inf)


def _untrained(
    rows: ndarray, twins: dict[str, tuple[float, str]], ordinary: ndarray, unused: ndarray
) -> dict[str, str]:
    """Return why rows (tokens, hidden) do not look trained, by token, with the figures; others are left out.

    They are compared with those of ordinary tokens, (sample, hidden), and of no token, (any number, hidden); fp64.
    `twins` has the tokens in the order of the rows, and the nearest added token of each.
    """
    among = _relative_distances(ordinary, ordinary)
    np.fill_diagonal(among, math.inf)
    distinct = np.quantile(among.min(axis=1), 0.05) > NEAR  # else close rows say nothing
    norms, mean = np.linalg.norm(ordinary, axis=1), ordinary.mean(axis=0)
    typical, low = float(np.median(norms)), float(np.quantile(norms, 0.01))
    spread = float(np.median(np.linalg.norm(ordinary - mean, axis=1)))
    doubts: dict[str, str] = {}
    for row, (name, (near, other)) in zip(rows, twins.items(), strict=True):
        norm, distance = float(np.linalg.norm(row)), float(np.linalg.norm(row - mean))
        if norm < SMALL * low:
            doubts[name] = f"norm {norm:.3g}, ordinary rows have {typical:.3g} (99% of them at least {low:.3g})"
        elif near <= SAME:
            doubts[name] = f"same row as {other!r}"
        elif _like_unused(row, unused, ordinary):
            doubts[name] = f"direction of the {len(unused)} unused rows behind the vocabulary"
        elif distance < NEAR_MEAN * spread:
            doubts[name] = f"distance {distance:.3g} from the mean row, ordinary rows have {spread:.3g}"
        elif distinct and near <= NEAR:
            doubts[name] = f"{near:.2g} of its norm from the row of {other!r}, ordinary rows are further apart"
    return doubts


def _like_unused(row: ndarray, unused: ndarray, ordinary: ndarray) -> bool:
    """True when `row` points where the unused rows point and ordinary rows do not."""
    # Unused rows of a trained model all moved the same way (weight decay, and the softmax of a tied head), so their
    # mean is a direction that separates them from trained rows; where it does not, no row is named.
    if len(unused) < 4 or not unused.any():
        return False
    blank = unused.mean(axis=0)
    here, own, trained = (_cosines(side, blank) for side in (row[None], unused, ordinary))
    return bool(np.quantile(trained, 0.99) < np.quantile(own, 0.1) <= here[0])


def _cosines(rows: ndarray, direction: ndarray) -> ndarray:
    """Return the cosine of the angle of each row with `direction`; 0 for a row of zeros."""
    return rows @ direction / np.maximum(np.linalg.norm(rows, axis=1) * np.linalg.norm(direction), 1e-300)
