"""Do BASE and INSTRUCT mean the same by the same token id, and do they split text in the same way?"""

from __future__ import annotations

import filecmp
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from ..errors import Findings, both_sides, list_names
from .vocabularies import Vocabulary

PROBE_TEXTS = (
    "The quick brown fox jumps over the lazy dog, doesn't it?",
    "  def area(r):\n\t\treturn 3.14159 * r ** 2  # two tabs\n\n\n",
    "1234567890 + 42 = 1234567932; x_1 <= 0.5e-3 && y != NULL",
    "naïve café Straße ¡Ñandú! Привет, мир. 你好，世界 こんにちは 안녕하세요 שלום مرحبا नमस्ते",
    "🙂👩‍🚀 ½ ﬁ … “quoted” — http://example.org/a?b=c%20d CamelCaseWORD",
)
"""Words, spaces, code, digits, scripts, compatibility forms, emoji: what normalisers, splitters, merges disagree on."""
SHARED_ADVICE = (
    "To keep those rows as they are in instruct and graft the rows that both have, pass --vocab shared "
    "(in a training config: graft_vocab: shared)."
)


class Moved(NamedTuple):
    """A token of both sides with different ids."""

    token: str
    base_id: int
    instruct_id: int


class Renamed(NamedTuple):
    """An id whose token is another on each side, and unknown to the other side."""

    id: int
    base_token: str
    instruct_token: str


class OneSided(NamedTuple):
    """A token of one side with an id that the other does not use."""

    token: str
    id: int


@dataclass(frozen=True)
class VocabularyDifference:
    """Where two vocabularies do not agree; every list is sorted by id and empty when they are the same."""

    moved: list[Moved] = field(default_factory=list)
    renamed: list[Renamed] = field(default_factory=list)
    base_only: list[OneSided] = field(default_factory=list)
    instruct_only: list[OneSided] = field(default_factory=list)

    def rows(self) -> Iterator[str]:
        """Yield one row for each token that differs, with both sides' values."""
        for token, base_id, instruct_id in self.moved:
            yield both_sides(f"token {token!r}", f"id {base_id}", f"id {instruct_id}")
        for index, base_token, instruct_token in self.renamed:
            yield both_sides(f"id {index}", f"token {base_token!r}", f"token {instruct_token!r}")
        for token, index in self.instruct_only:
            yield both_sides(f"token {token!r}", "no such token", f"id {index}")
        for token, index in self.base_only:
            yield both_sides(f"token {token!r}", f"id {index}", "no such token")

    def __len__(self) -> int:
        """Return the number of tokens and ids that differ; 0 when the same tokens have the same ids."""
        return len(self.moved) + len(self.renamed) + len(self.base_only) + len(self.instruct_only)


def same_tokenizer_files(base: Vocabulary, instruct: Vocabulary) -> bool:
    """True when both sides have the same tokenizer.json, byte for byte, and the same tokens to append to it."""
    ours, theirs = base.folder / "tokenizer.json", instruct.folder / "tokenizer.json"
    if not (ours.is_file() and theirs.is_file() and filecmp.cmp(ours, theirs, shallow=False)):
        return False
    return base.appended == instruct.appended


def vocabulary_difference(base: Vocabulary, instruct: Vocabulary) -> VocabularyDifference:
    """Compare two vocabularies token by token and id by id."""
    if same_tokenizer_files(base, instruct) or base.ids == instruct.ids:
        return VocabularyDifference()
    tokens = {index: token for token, index in instruct.ids.items()}
    moved = [
        Moved(token, index, instruct.ids[token])
        for token, index in base.ids.items()
        if instruct.ids.get(token, index) != index
    ]
    base_only = [OneSided(token, index) for token, index in base.ids.items() if token not in instruct.ids]
    instruct_only = [OneSided(token, index) for token, index in instruct.ids.items() if token not in base.ids]
    renamed = [
        Renamed(one.id, one.token, tokens[one.id])
        for one in base_only
        if one.id in tokens and tokens[one.id] not in base.ids
    ]
    ids = {one.id for one in renamed}
    return VocabularyDifference(
        moved=sorted(moved, key=lambda one: one.base_id),
        renamed=sorted(renamed),
        base_only=sorted((one for one in base_only if one.id not in ids), key=lambda one: one.id),
        instruct_only=sorted((one for one in instruct_only if one.id not in ids), key=lambda one: one.id),
    )


def compare_vocabularies(base: Vocabulary, instruct: Vocabulary, *, shared: bool = False) -> Findings:
    """Check that both sides turn text into the same token ids.

    Args:
        base: tokenizer of BASE.
        instruct: tokenizer of INSTRUCT.
        shared: only the rows of tokens that both sides have are to be grafted (`--vocab shared`): tokens that one side
            lacks, and reserved tokens that INSTRUCT renamed, are then a warning.

    Returns:
        Findings: one error for all tokens that differ and one for all probe texts that are encoded differently.

    """
    missing = [side.label for side in (base, instruct) if not side.exists]
    if missing:
        text = f"no tokenizer in {' and '.join(missing)}: it was not checked that both sides use the same token ids."
        return Findings(warnings=[text])
    difference = vocabulary_difference(base, instruct)
    findings = Findings()
    if difference:
        findings.add(_explain(base, instruct, difference, shared=shared))
    other = [] if same_tokenizer_files(base, instruct) else _encoded_differently(base, instruct)
    if other:
        headline = f"{len(other)} of {len(PROBE_TEXTS)} probe texts become other token ids in base than in instruct."
        message = (
            f"{headline}\n{list_names(other)}\n"
            "The tokenizers split text differently, so base would be trained on ids that it never saw together. Give "
            "the base that instruct was made from."
        )
        (findings.warnings if shared and difference else findings.errors).append(message)
    return findings


def _encoded_differently(base: Vocabulary, instruct: Vocabulary) -> list[str]:
    """Return a row with both sides' ids for each probe text that they encode differently."""
    encodings = zip(PROBE_TEXTS, base.encode(PROBE_TEXTS), instruct.encode(PROBE_TEXTS), strict=True)
    return [both_sides(repr(text), ours, theirs) for text, ours, theirs in encodings if ours != theirs]


def _explain(base: Vocabulary, instruct: Vocabulary, difference: VocabularyDifference, *, shared: bool) -> Findings:
    """Put `difference` into words: an error, or with `shared` a warning where the shared rows can be grafted alone."""
    added = base.added.keys() | instruct.added.keys()
    other_words = [one for one in difference.renamed if not {one.base_token, one.instruct_token} <= added]
    foreign = bool(difference.moved or other_words)
    count, rows = len(difference), list_names(difference.rows())
    verb = "token differs" if count == 1 else "tokens differ"
    message = f"{count} {verb} between the vocabularies of base and instruct.\n{rows}\n"
    if foreign:
        way_out = "The same ids mean other tokens: instruct was not made from this base. Give the one it was made from."
        return Findings(errors=[message + way_out])
    if shared:
        outcome = "Their rows stay as they are in instruct; only rows that both have are grafted."
        return Findings(warnings=[message + outcome])
    return Findings(errors=[message + SHARED_ADVICE])


def runs_of(ids: Sequence[int]) -> list[range]:
    """Return sorted `ids` as ranges of neighbours: [0, 1, 2, 5] -> [range(0, 3), range(5, 6)]."""
    runs: list[range] = []
    for index in ids:
        if runs and runs[-1].stop == index:
            runs[-1] = range(runs[-1].start, index + 1)
        else:
            runs.append(range(index, index + 1))
    return runs
