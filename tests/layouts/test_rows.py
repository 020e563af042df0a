"""Token rows: vocabularies of other sizes, and the rows that both sides share."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from architectures import (
    ROLES,
    SCALE,
    in_memory,
)
from layout_cases import carry_out, edit_config, open_all, rewrite, run_graft
from tokenizers import Tokenizer
from tokenizers.models import WordLevel

from shadow_trl.errors import PairMismatchError
from shadow_trl.layouts.plan import resolve


def with_rows(source: Path, target: Path, rows: int) -> Path:
    """Copy a checkpoint with `rows` token rows: the first ones, or more random ones after them."""

    def change(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        for name in ("model.embed_tokens.weight", "lm_head.weight"):
            if name in weights:
                more = torch.randn(rows, 16, generator=torch.Generator().manual_seed(rows)).bfloat16()
                weights[name] = torch.cat([weights[name], more])[:rows].contiguous()
        return weights

    folder = rewrite(source, target, change)
    edit_config(folder, vocab_size=rows)
    return folder


@pytest.mark.parametrize("name", ["llama", "qwen3"])
@pytest.mark.parametrize("rows", [36, 43])
def test_other_number_of_token_rows(name: str, rows: int, families: Any, tmp_path: Path) -> None:
    family = families(name)
    instruct = with_rows(family / "instruct", tmp_path / "instruct", rows)
    checkpoints = open_all(family / "base", instruct, family / "tuned")
    message = rf"(?s)(2|1) of .* weights differ in shape.*embed_tokens.*base +\(40, 16\).*instruct +\({rows}, 16\)"
    with pytest.raises(PairMismatchError, match=message) as caught:
        resolve(*checkpoints)
    assert f"{abs(rows - 40)} {'more' if rows > 40 else 'fewer'} token rows" in str(caught.value)
    assert "--vocab shared" in str(caught.value)
    shared = [row for row in range(41) if row != 7]  # token 7 means something else, 40 is beyond BASE
    layout = resolve(*checkpoints, rows=shared)
    sources = dict(zip(ROLES, checkpoints, strict=True))
    result = in_memory(name, carry_out(layout, sources, tmp_path / "grafted"))
    b, i, t = (in_memory(name, folder) for folder in (family / "base", instruct, family / "tuned"))
    for key, value in result.items():
        expected = i[key].double()
        if key in ("model.embed_tokens.weight", "lm_head.weight"):
            for row in range(min(rows, 40)):
                if row != 7:
                    expected[row] += SCALE * (t[key][row].double() - b[key][row].double())
        else:
            expected += SCALE * (t[key].double() - b[key].double())
        assert torch.equal(value, expected.float()), key
    assert "only the token rows that both sides share" in layout.warnings[0]


def test_shared_rows_of_equal_vocabularies_graft_everything(families: Any) -> None:
    family = families("llama")
    layout = resolve(*open_all(*(family / role for role in ROLES)), rows=range(40))
    assert all(weight.rows is None for weight in layout.weights)


def test_weights_left_out_by_the_user_may_differ(families: Any, tmp_path: Path) -> None:
    family = families("llama")
    instruct = with_rows(family / "instruct", tmp_path / "instruct", 43)
    checkpoints = open_all(family / "base", instruct, family / "tuned")
    layout = resolve(*checkpoints, wanted=lambda name: "_proj" in name)
    assert {weight.name for weight in layout.weights if weight.copied} == {
        name for name in checkpoints[1].specs if "_proj" not in name
    }


def test_shared_rows_end_to_end(families: Any, tmp_path: Path) -> None:
    """INSTRUCT has one token more and two rows of padding: its three rows stay, the others are grafted."""
    family = families("qwen3")
    folders = []
    for role in ROLES:
        vocabulary = {f"t{row}": row for row in range(40)}
        folder = shutil.copytree(family / role, tmp_path / role)
        if role == "instruct":
            shutil.rmtree(folder)
            folder = with_rows(family / role, folder, 43)
            vocabulary["<|new|>"] = 40
        tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="t0"))
        transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="t0").save_pretrained(folder)
        folders.append(folder)
    base, instruct, tuned = folders
    with pytest.raises(PairMismatchError, match="--vocab shared"):
        run_graft((base, instruct, tuned), tmp_path / "grafted")
    run_graft((base, instruct, tuned), tmp_path / "grafted", vocab="shared")
    b, i, t, r = (in_memory("qwen3", folder) for folder in (*folders, tmp_path / "grafted"))
    key = "model.embed_tokens.weight"
    expected = i[key].double()
    expected[:40] += SCALE * (t[key].double() - b[key].double())
    assert torch.equal(r[key], expected.float())
