"""Exact-match scores of greedy answers, kind by kind, with their sampling error."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from ..errors import InputError, list_names
from .greedy import answers, greedy

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Scores:
    """Which rows a model answered exactly right, kind by kind.

    Args:
        hits: for every kind of row, in the order of the rows, whether the answer was right.

    The share p of a kind with n rows has the binomial standard error sqrt(p * (1 - p) / n); means are taken over
    kinds, each with the same weight, however many rows they have.

    >>> scores = Scores({"target": (True, True, True, False), "rule": (True, False)})
    >>> scores.share("target"), round(scores.error("target"), 4), scores.mean(scores.kinds)
    (0.75, 0.2165, 0.625)

    """

    hits: Mapping[str, tuple[bool, ...]]

    @property
    def kinds(self) -> tuple[str, ...]:
        """The kinds of rows, in the order in which they first occur."""
        return tuple(self.hits)

    def share(self, kind: str) -> float:
        """Return the share of right answers of a kind, 0 to 1."""
        return sum(self.hits[kind]) / len(self.hits[kind])

    def error(self, kind: str) -> float:
        """Return the binomial standard error of `share(kind)`: sqrt(p * (1 - p) / n)."""
        share = self.share(kind)
        return math.sqrt(share * (1.0 - share) / len(self.hits[kind]))

    def mean(self, kinds: Sequence[str]) -> float:
        """Return the mean of the shares of some kinds, 0 to 1."""
        return math.fsum(map(self.share, kinds)) / len(kinds)

    def mean_error(self, kinds: Sequence[str]) -> float:
        """Return the standard error of `mean(kinds)`: sqrt(sum of squared errors) / number of kinds."""
        return math.sqrt(sum(self.error(kind) ** 2 for kind in kinds)) / len(kinds)


def difference(left: Scores, right: Scores, kinds: Iterable[str]) -> tuple[float, float]:
    """Return how much better `left` is than `right` on the same rows, with the standard error of that difference.

    For each kind the difference is the mean of d = left_hit - right_hit over the rows, each d in {-1, 0, 1}, and its
    variance is (mean(d^2) - mean(d)^2) / n: rows that both models answer alike add no noise, whereas two separate
    binomial errors would count it twice. Kinds are averaged with equal weight.

    Args:
        left: scores of the first model.
        right: scores of the second model, of the same rows.
        kinds: the kinds to take the mean over.

    Returns:
        Difference of the shares, -1 to 1, and its standard error.

    >>> difference(Scores({"rule": (True, True, False, True)}), Scores({"rule": (True, False, False, True)}), ["rule"])
    (0.25, 0.21650635094610965)

    """
    means, variances = [], []
    for kind in kinds:
        steps = [int(one) - int(other) for one, other in zip(left.hits[kind], right.hits[kind], strict=True)]
        mean = sum(steps) / len(steps)
        means.append(mean)
        variances.append((sum(step * step for step in steps) / len(steps) - mean * mean) / len(steps))
    return math.fsum(means) / len(means), math.sqrt(sum(variances)) / len(means)


def read_rows(path: str | Path) -> list[dict[str, Any]]:
    """Read the rows of a JSONL file, one object `{"prompt": messages, "answer": str, "kind": str}` per line.

    `answer` may be a list of strings, each of them right.

    Args:
        path: the file. A row without `kind` is of the kind "all".

    Returns:
        The rows, each with its kind.

    Raises:
        InputError: there is no such file, it has no rows, or some rows cannot be scored; each is listed.

    """
    wanted = '{"prompt": [{"role": ..., "content": ...}, ...], "answer": "..." or ["...", ...], "kind": ...}'
    return [{"kind": "all", **row} for row in read_lines(path, _fault_of, wanted)]


def read_lines(path: str | Path, fault_of: Callable[[Any], str | None], wanted: str) -> list[dict[str, Any]]:
    """Read a JSONL file of rows to score.

    Args:
        path: the file.
        fault_of: why a row cannot be scored, or None.
        wanted: what a row looks like, for the error.

    Raises:
        InputError: as of `read_rows`.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as reason:
        raise InputError(f"cannot read the rows to score from {path}: {reason}.") from reason
    rows, faults = [], []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            fault = fault_of(row)
        except json.JSONDecodeError as reason:
            fault = f"not JSON ({reason})"
        if fault:
            faults.append(f"line {number}: {fault}")
        else:
            rows.append(row)
    if faults:
        raise InputError(
            f"{len(faults)} of {len(faults) + len(rows)} rows in {path} cannot be scored; expected {wanted}.\n"
            f"{list_names(faults)}"
        )
    if not rows:
        raise InputError(f"there are no rows to score in {path}.")
    return rows


def _fault_of(row: Any) -> str | None:
    """Return why `row` cannot be scored, or None."""
    if not isinstance(row, dict):
        return f"a {type(row).__name__}, not an object"
    if fault := fault_of_messages(row, "prompt"):
        return fault
    answers = _answers(row)
    if not answers or not all(isinstance(answer, str) for answer in answers):
        return "`answer` is neither a string nor a list of strings"
    if not isinstance(row.get("kind", "all"), str):
        return "`kind` is not a string"
    return None


def fault_of_messages(row: Row, name: str) -> str | None:
    """Return why `row[name]` is not a conversation, or None."""
    messages = row.get(name)
    if not isinstance(messages, list) or not messages:
        return f"`{name}` is not a list of messages"
    if not all(isinstance(message, dict) and {"role", "content"} <= set(message) for message in messages):
        return f"a message of `{name}` lacks `role` or `content`"
    return None


def _answers(row: Row) -> Sequence[str]:
    """Return the right answers of a row; what is no list counts as one."""
    answer = row.get("answer")
    return answer if isinstance(answer, list) else [answer]  # type: ignore[list-item]


def score(
    model: Any,
    tokenizer: Any,
    rows: Sequence[Row],
    *,
    batch_size: int = 128,
    max_new_tokens: int = 32,
    eos_token_ids: Iterable[int] | None = None,
    progress: str | None = None,
) -> Scores:
    """Return which rows `model` answers exactly right when it decodes greedily.

    An answer ends at the first end token, or after `max_new_tokens`; special tokens and white space around it do not
    count. Sampling settings of the model's generation config are ignored, so that models that ship different ones are
    compared fairly. Rows of similar length share a batch, padded on the left; the scores keep the order of the rows.
    Rows with the same prompt are answered once. In float32 the answers do not depend on the batches.

    Args:
        model: a causal language model of transformers, on any device, in any dtype.
        tokenizer: a tokenizer with a chat template; its padding settings are not used.
        rows: `{"prompt": messages, "answer": str or list, "kind": str}`; see `read_rows`.
        batch_size: rows per forward pass. Default 128.
        max_new_tokens: longest answer in tokens; a longer one is cut off and counts as wrong. Default 32.
        eos_token_ids: tokens that end an answer. Default: those of the model's generation config and the tokenizer's
            EOS.
        progress: title of a progress bar. Default: no bar.

    Returns:
        The hits of every kind, in the order of the rows.

    Raises:
        InputError: no rows, no chat template, or no end token.

    """
    right = answered_right(
        model, tokenizer, rows, batch_size=batch_size, max_new_tokens=max_new_tokens, eos_token_ids=eos_token_ids,
        progress=progress,
    )  # fmt: skip
    return scores_of(rows, right)


def scores_of(rows: Sequence[Row], right: Sequence[bool]) -> Scores:
    """Return the scores of `rows`, of which `right` says whether each was answered right."""
    hits: dict[str, list[bool]] = {}
    for row, hit in zip(rows, right, strict=True):
        hits.setdefault(row.get("kind", "all"), []).append(hit)
    return Scores({kind: tuple(values) for kind, values in hits.items()})


def answered_right(
    model: Any,
    tokenizer: Any,
    rows: Sequence[Row],
    *,
    batch_size: int = 128,
    max_new_tokens: int = 32,
    eos_token_ids: Iterable[int] | None = None,
    progress: str | None = None,
) -> list[bool]:
    """Return for each row whether `model` answers it right; arguments and errors as of `score`."""
    if not rows:
        raise InputError("there are no rows to score.")
    if not getattr(tokenizer, "chat_template", None):
        raise InputError("scoring needs a tokenizer with a chat template; give INSTRUCT's.")
    ends = end_tokens(model.generation_config, tokenizer) if eos_token_ids is None else sorted(set(eos_token_ids))
    if not ends:
        raise InputError("neither the model's generation config nor the tokenizer names an end token (EOS).")
    render = partial(tokenizer.apply_chat_template, add_generation_prompt=True, return_dict=False)
    prompts = [tuple(render(list(row["prompt"]))) for row in rows]
    # Longest first: a batch that does not fit into memory fails at once.
    order = sorted(dict.fromkeys(prompts), key=len, reverse=True)
    starts = tqdm(range(0, len(order), batch_size), desc=progress, disable=progress is None)
    given: dict[tuple[int, ...], str] = {}
    with greedy(model, ends, max_new_tokens):
        for start in starts:
            batch = order[start : start + batch_size]
            for prompt, tokens in zip(batch, answers(model, batch, ends), strict=True):
                given[prompt] = tokenizer.decode(tokens, skip_special_tokens=True).strip()
    return [
        given[prompt] in (answer.strip() for answer in _answers(row)) for row, prompt in zip(rows, prompts, strict=True)
    ]


def end_tokens(generation: Any, tokenizer: Any) -> list[int]:
    """Return the ids that end an answer: those of a generation config, which may be None, and the tokenizer's EOS."""
    named = getattr(generation, "eos_token_id", None)
    ids = list(named) if isinstance(named, (list, tuple)) else [named]
    return sorted({int(token) for token in (*ids, tokenizer.eos_token_id) if token is not None})
