"""Token rows: which of them both sides share, and which tokens are only one side's."""

from __future__ import annotations

import json

import pytest
from pair_cases import EMBEDDING, add_rows, add_tokens, refusal

from shadow_trl.errors import PairMismatchError
from shadow_trl.pair.pairs import ModelPair
from shadow_trl.pair.token_rows import explain_rows, shared_rows


def test_more_token_rows_are_refused_with_their_number_and_the_advice(sides):
    add_rows(sides[1], 3)
    add_tokens(sides[1], "<|tool|>", "<|call|>")
    text = refusal(sides)
    assert f"{EMBEDDING}\n    base      (49, 16)\n    instruct  (52, 16)" in text
    assert (
        "The instruct model has 3 more token rows (1 of them padding). Only in instruct: '<|tool|>', '<|call|>'."
        in text
    )
    assert "pass --vocab shared" in text


def test_padding_rows_are_called_padding(sides):
    add_rows(sides[0], 2)
    text = refusal(sides)
    assert "The base model has 2 more token rows (padding that belongs to no token). To keep" in text


def test_shared_accepts_more_rows_and_names_the_tokens(sides):
    add_rows(sides[1], 3)
    add_tokens(sides[1], "<|tool|>")
    (warning,) = ModelPair.open(*sides).check(vocab="shared", level="weights")
    assert "'<|tool|>'" in warning
    pair = ModelPair.open(*sides)
    assert shared_rows(pair.base, pair.instruct) == tuple(range(49))
    assert explain_rows(pair.base, pair.instruct) == (
        "The instruct model has 3 more token rows (2 of them padding). Only in instruct: '<|tool|>'."
    )


def test_shared_rows_leave_out_renamed_tokens_and_keep_common_padding(sides):
    for folder, tokens in zip(sides, (("<|r0|>", "<|r1|>"), ("<|r0|>", "<|think|>")), strict=True):
        add_rows(folder, 4)
        add_tokens(folder, *tokens, template=folder == sides[1])
    pair = ModelPair.open(*sides)
    # 49 characters, <|r0|> at 49, the renamed token at 50, padding of both sides at 51 and 52
    assert shared_rows(pair.base, pair.instruct) == (*range(50), 51, 52)
    assert explain_rows(pair.base, pair.instruct) == "Only in instruct: '<|think|>'. Only in base: '<|r1|>'."


def test_shared_rows_need_both_tokenizers(sides):
    (sides[0] / "tokenizer.json").unlink()
    pair = ModelPair.open(*sides)
    with pytest.raises(PairMismatchError, match=f"{sides[0]} has no tokenizer"):
        shared_rows(pair.base, pair.instruct)


def test_another_vocabulary_is_refused(sides):
    file = sides[1] / "tokenizer.json"
    content = json.loads(file.read_text())
    words = content["model"]["vocab"]
    words["a"], words["b"] = words["b"], words["a"]
    file.write_text(json.dumps(content))
    text = refusal(sides)
    assert "2 tokens differ between the vocabularies" in text
    assert "token 'a'\n    base      id 5\n    instruct  id 6" in text
