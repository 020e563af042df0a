"""The chat template and the special tokens: whether BASE has trained rows for what INSTRUCT's template uses."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from pair_cases import EMBEDDING, add_rows, add_tokens, edit_json, edit_weights, refusal, set_rows
from safetensors.torch import load_file

from shadow_trl.pair.pairs import ModelPair
from shadow_trl.pair.special_tokens import special_ids
from shadow_trl.pair.token_rows import vocabulary_of


def drop_template(folder: Path) -> None:
    (folder / "chat_template.jinja").unlink()


def test_a_missing_template_is_an_error_only_when_it_is_needed(sides):
    drop_template(sides[1])
    assert ModelPair.open(*sides).check() == []
    assert "instruct has no chat template, but the training data are conversations" in refusal(
        sides, need_template=True
    )


def test_a_swapped_pair_is_refused(sides):
    assert "The two look swapped" in refusal((sides[1], sides[0]))


def test_other_templates_and_eos_are_fine(sides):
    (sides[0] / "chat_template.jinja").write_text("{{ messages[0]['content'] }}")
    edit_json(sides[0] / "generation_config.json", eos_token_id=3)
    edit_json(sides[0] / "tokenizer_config.json", eos_token="<|pad|>")
    assert ModelPair.open(*sides).check(need_template=True) == []


@pytest.mark.parametrize("file", ["generation_config.json", "config.json"])
def test_special_ids_beyond_the_rows_of_base_are_refused(sides, file):
    edit_json(sides[1] / file, eos_token_id=[1, 49])
    text = refusal(sides)
    assert "1 special id of instruct has no row in base's embedding of 49 rows" in text
    assert f"id 49  eos_token_id (49) of {file}" in text


def test_special_tokens_of_the_tokenizer_beyond_the_rows_of_base_are_refused(sides):
    for folder in sides:  # the same on both sides, so that the vocabularies agree
        edit_json(folder / "tokenizer_config.json", pad_token="<|padding|>")
    assert "id 49  pad_token '<|padding|>' of the tokenizer" in refusal(sides)


def test_template_tokens_beyond_the_rows_of_base_are_refused(sides):
    for folder in sides:
        add_tokens(folder, "<|think|>", "<|unused|>", template=folder == sides[1])
    template = (sides[1] / "chat_template.jinja").read_text()
    (sides[1] / "chat_template.jinja").write_text(template + "{% if tools %}<|think|>{% endif %}")
    text = refusal(sides)
    assert "id 49  '<|think|>' of the chat template" in text
    assert "<|unused|>" not in text  # nothing uses it: Gemma's text models have such tokens


def test_ids_of_minus_one_and_of_images_are_left_alone(sides):
    edit_json(sides[1] / "config.json", pad_token_id=-1, image_token_id=49)
    pair = ModelPair.open(*sides)
    assert pair.check() == []
    assert set(special_ids(pair.instruct, vocabulary_of(pair.instruct)).values()) == {0, 1, 2, 3, 4}


USER, ASSISTANT = 3, 4


@pytest.mark.parametrize(
    ("row", "reason"),
    [(torch.zeros(16), "norm 0, ordinary rows have"), (torch.full((16,), 1e-4), "norm 0.0004, ordinary rows have")],
)
def test_template_tokens_with_tiny_rows_are_named(sides, row, reason):
    set_rows(sides[0], {USER: row})
    (warning,) = ModelPair.open(*sides).check()
    assert warning.startswith("1 of the 4 special tokens of instruct's chat template look untrained in base")
    assert f"'<|user|>' (id 3): {reason}" in warning


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("value", [torch.inf, torch.nan])
def test_rows_that_are_not_finite_give_no_warning_of_numpy(sides, value):
    """The graft itself names them."""
    set_rows(sides[0], {USER: torch.full((16,), value), 9: torch.full((16,), value)})
    ModelPair.open(*sides).check()


def test_the_tokens_of_the_template_that_training_uses_count(sides):
    set_rows(sides[0], {USER: torch.zeros(16)})
    check = ModelPair.open(*sides).check
    assert check(template="{{ messages[0]['content'] + '<|system|>' }}") == []
    (sides[1] / "chat_template.jinja").unlink()
    (warning,) = check(template="{{ messages[0]['content'] + '<|user|>' }}", need_template=True)
    assert warning.startswith("1 of the 1 special tokens of the given chat template look untrained in base")


def test_template_tokens_with_the_same_row_are_named(sides):
    row = load_file(sides[0] / "model.safetensors")[EMBEDDING][USER].clone()
    set_rows(sides[0], {ASSISTANT: row})
    (warning,) = ModelPair.open(*sides).check()
    assert "'<|user|>' (id 3): same row as '<|assistant|>'" in warning
    assert "'<|assistant|>' (id 4): same row as '<|user|>'" in warning


def test_template_tokens_like_the_mean_row_are_named(sides):
    rows = load_file(sides[0] / "model.safetensors")[EMBEDDING][5:]
    offset = torch.full((16,), 0.05)  # rows of real models have a mean that is no zero
    edit_weights(sides[0], lambda w: {**w, EMBEDDING: w[EMBEDDING] + offset})
    set_rows(sides[0], {USER: rows.mean(dim=0) + offset})
    (warning,) = ModelPair.open(*sides).check()
    assert "'<|user|>' (id 3): distance" in warning
    assert "from the mean row" in warning


def test_template_tokens_like_the_unused_rows_are_named(sides):
    torch.manual_seed(3)
    drift = 0.05 * torch.randn(16)
    unused = drift + 0.005 * torch.randn(8, 16)
    for folder in sides:
        add_rows(folder, 8)
    set_rows(sides[0], {49 + index: row for index, row in enumerate(unused)})
    set_rows(sides[0], {USER: drift + 0.001 * torch.randn(16)})
    (warning,) = ModelPair.open(*sides).check()
    assert "1 of the 4 special tokens" in warning
    assert "'<|user|>' (id 3): direction of the 8 unused rows behind the vocabulary" in warning


def test_a_token_of_another_branch_of_the_template_is_marked(sides):
    (sides[1] / "chat_template.jinja").write_text("{{ messages[0]['content'] }}{% if tools %}<|user|>{% endif %}")
    set_rows(sides[0], {USER: torch.zeros(16)})
    (warning,) = ModelPair.open(*sides).check()
    assert "'<|user|>' (id 3) (not in a plain conversation): norm 0" in warning


def test_a_template_token_with_the_row_of_an_added_token_outside_the_template_is_named(sides):
    for folder in sides:
        add_rows(folder, 2)
        add_tokens(folder, "<|spare|>", "<|other|>", template=folder == sides[1])
    rows = load_file(sides[0] / "model.safetensors")[EMBEDDING]
    assert ModelPair.open(*sides).check() == []
    set_rows(sides[0], {USER: rows[49].clone()})
    (warning,) = ModelPair.open(*sides).check()
    assert "1 of the 4 special tokens" in warning
    assert "'<|user|>' (id 3): same row as '<|spare|>'" in warning
    away = torch.randn(16)
    set_rows(sides[0], {USER: rows[49] + 0.12 * rows[49].norm() * away / away.norm()})
    (warning,) = ModelPair.open(*sides).check()
    assert "'<|user|>' (id 3): 0.12 of its norm from the row of '<|spare|>'" in warning
    # close rows are nothing special where ordinary rows are as close
    set_rows(sides[0], {index: 1.05 * rows[index + 1] for index in range(5, 25, 2)})
    assert ModelPair.open(*sides).check() == []
