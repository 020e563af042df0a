"""Do BASE and INSTRUCT mean the same by the same token id, and do they split text in the same way?"""

from __future__ import annotations

import filecmp
from collections.abc import Iterator
from dataclasses import dataclass, field
from operator import itemgetter

from ..checkpoints.checkpoint import read_json
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


@dataclass(frozen=True)
class VocabularyDifference:
    """Where two vocabularies do not agree, in the order of the ids; empty when they are the same."""

    moved: dict[str, tuple[int, int]] = field(default_factory=dict)
    """Token of both sides -> its id in BASE and in INSTRUCT."""
    renamed: dict[int, tuple[str, str]] = field(default_factory=dict)
    """Id -> its token in BASE and in INSTRUCT, each unknown to the other side."""
    base_only: dict[str, int] = field(default_factory=dict)
    """Token of BASE -> its id, which INSTRUCT does not use."""
    instruct_only: dict[str, int] = field(default_factory=dict)

    def rows(self, roles: tuple[str, str] = ("base", "instruct")) -> Iterator[str]:
        """Yield one row for each token that differs, with both sides' values."""
        for token, (base_id, instruct_id) in self.moved.items():
            yield both_sides(f"token {token!r}", f"id {base_id}", f"id {instruct_id}", roles)
        for index, (base_token, instruct_token) in self.renamed.items():
            yield both_sides(f"id {index}", f"token {base_token!r}", f"token {instruct_token!r}", roles)
        for token, index in self.instruct_only.items():
            yield both_sides(f"token {token!r}", "no such token", f"id {index}", roles)
        for token, index in self.base_only.items():
            yield both_sides(f"token {token!r}", f"id {index}", "no such token", roles)

    def __len__(self) -> int:
        """Return the number of tokens and ids that differ; 0 when the same tokens have the same ids."""
        return len(self.moved) + len(self.renamed) + len(self.base_only) + len(self.instruct_only)


def same_tokenizer_files(base: Vocabulary, instruct: Vocabulary) -> bool:
    """True when both sides have the same tokenizer.json, byte for byte, and the same tokens to append to it."""
    ours, theirs = base.folder / "tokenizer.json", instruct.folder / "tokenizer.json"
    both = ours.is_file() and theirs.is_file()
    return both and filecmp.cmp(ours, theirs, shallow=False) and base.appended == instruct.appended


def vocabulary_difference(base: Vocabulary, instruct: Vocabulary) -> VocabularyDifference:
    """Compare two vocabularies token by token and id by id."""
    if same_tokenizer_files(base, instruct) or base.ids == instruct.ids:
        return VocabularyDifference()
    ours, theirs = base.ids, instruct.ids
    moved = {token: (index, theirs[token]) for token, index in ours.items() if theirs.get(token, index) != index}
    base_only, instruct_only = _lacking(ours, theirs), _lacking(theirs, ours)
    tokens = {index: token for token, index in instruct_only.items()}
    renamed = {index: (token, tokens[index]) for token, index in base_only.items() if index in tokens}
    return VocabularyDifference(
        dict(sorted(moved.items(), key=itemgetter(1))),
        renamed,
        {token: index for token, index in base_only.items() if index not in renamed},
        {token: index for token, index in instruct_only.items() if index not in renamed},
    )


def _lacking(ids: dict[str, int], other: dict[str, int]) -> dict[str, int]:
    """Return the tokens of `ids` that `other` lacks, in the order of their ids."""
    return dict(sorted(((token, index) for token, index in ids.items() if token not in other), key=itemgetter(1)))


def compare_vocabularies(base: Vocabulary, instruct: Vocabulary, *, shared: bool = False) -> Findings:
    """Check that both sides turn text into the same token ids.

    Args:
        base: tokenizer of BASE.
        instruct: tokenizer of INSTRUCT.
        shared: whether tokens that one side lacks, and reserved tokens that INSTRUCT renamed, are only a warning.

    Returns:
        Findings: one for all tokens that differ and one for all probe texts that are encoded differently.

    """
    missing = [side.label for side in (base, instruct) if not side.exists]
    if missing:
        text = f"no tokenizer in {' and '.join(missing)}: it was not checked that both sides use the same token ids."
        return Findings(warnings=[text])
    findings = Findings()
    if same_tokenizer_files(base, instruct):
        return findings
    difference = vocabulary_difference(base, instruct)
    if difference:
        findings.add(_explain(base, instruct, difference, shared=shared))
    other = _split_otherwise(base, instruct)
    if other:
        message = (
            f"{len(other)} of {len(PROBE_TEXTS)} probe texts become other token ids in base than in instruct.\n"
            f"{list_names(other)}\nThe tokenizers split text differently, so base would be trained on ids that it "
            "never saw together. Give the base that instruct was made from."
        )
        (findings.warnings if shared and difference else findings.errors).append(message)
    return findings


def compare_trained_vocabulary(tuned: Vocabulary, instruct: Vocabulary, role: str = "instruct") -> Findings:
    """Check that TUNED was, or will be, trained on the token ids that INSTRUCT's tokenizer gives to the result.

    Tokens that have another id on each side are an error; tokens of one side only, texts that are split differently,
    and an end of text at which the result would not stop, are a warning. Nothing is found where a side has no
    tokenizer. `role` names `instruct` in messages.
    """
    findings, roles = Findings(), ("tuned", role)
    if not (tuned.exists and instruct.exists):
        return findings
    if role == "instruct":
        findings.add(_compare_ends(tuned, instruct))
    if same_tokenizer_files(tuned, instruct):
        return findings
    difference = vocabulary_difference(tuned, instruct)
    if difference:
        verb = "token differs" if len(difference) == 1 else "tokens differ"
        text = f"{len(difference)} {verb} between the tokenizers of tuned ({tuned.label}) and {role}.\n"
        text += list_names(difference.rows(roles))
        if _means_others(tuned, instruct, difference):
            way_out = f"The same ids mean other tokens in the grafted model. Train with {role}'s tokenizer."
            findings.errors.append(f"{text}\n{way_out}")
            return findings
        findings.warnings.append(f"{text}\nThe grafted model has instruct's tokenizer.")
    if other := _split_otherwise(tuned, instruct, roles):
        findings.warnings.append(
            f"{len(other)} of {len(PROBE_TEXTS)} probe texts become other token ids with the tokenizer of tuned "
            f"({tuned.label}) than with {role}'s; the grafted model has instruct's.\n{list_names(other)}"
        )
    return findings


def _compare_ends(tuned: Vocabulary, instruct: Vocabulary) -> Findings:
    """Warn where the token that ended texts in training does not end generation with INSTRUCT's files."""
    end = tuned.named.get("eos_token")
    configs = [read_json(instruct.folder / name) for name in ("generation_config.json", "config.json")]
    # config.json counts where generation_config.json says nothing
    found = next((config["eos_token_id"] for config in configs if config.get("eos_token_id") is not None), None)
    ids = set(found if isinstance(found, list) else [found]) - {None}
    if end is None or not ids or instruct.id_of(end) in ids or end == instruct.named.get("eos_token"):
        return Findings()
    names = ", ".join(map(str, sorted(ids)))
    return Findings(
        warnings=[
            f"the eos_token of the tokenizer of tuned ({tuned.label}) is {end!r} (id {instruct.id_of(end)}), at which "
            f"the grafted model does not stop: instruct's eos_token_id is {names}. If texts ended with it in training, "
            "generate with eos_token_id set to these ids and that one."
        ]
    )


def _split_otherwise(one: Vocabulary, two: Vocabulary, roles: tuple[str, str] = ("base", "instruct")) -> list[str]:
    """Return a row for each probe text that becomes other ids on the two sides."""
    encodings = zip(PROBE_TEXTS, one.encode(PROBE_TEXTS), two.encode(PROBE_TEXTS), strict=True)
    return [both_sides(repr(text), ours, theirs, roles) for text, ours, theirs in encodings if ours != theirs]


def _means_others(one: Vocabulary, two: Vocabulary, difference: VocabularyDifference) -> bool:
    """Whether an id means two tokens that are not both reserved or added ones."""
    added = one.added.keys() | two.added.keys()
    return bool(difference.moved) or not all(added.issuperset(tokens) for tokens in difference.renamed.values())


def _explain(base: Vocabulary, instruct: Vocabulary, difference: VocabularyDifference, *, shared: bool) -> Findings:
    """Put `difference` into words: an error, or with `shared` a warning where the shared rows can be grafted alone."""
    verb = "token differs" if len(difference) == 1 else "tokens differ"
    head = f"{len(difference)} {verb} between the vocabularies of base and instruct.\n{list_names(difference.rows())}\n"
    if _means_others(base, instruct, difference):
        way_out = "The same ids mean other tokens: instruct was not made from this base. Give the one it was made from."
        return Findings(errors=[head + way_out])
    if shared:
        outcome = "Their rows stay as they are in instruct; only rows that both have are grafted."
        return Findings(warnings=[head + outcome])
    return Findings(errors=[head + SHARED_ADVICE])
