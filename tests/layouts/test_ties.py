"""Ties: whether a head is on the disk, and whether it has a delta of its own."""

from __future__ import annotations

import itertools
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import (
    ROLES,
    assert_sum,
)
from layout_cases import edit_config, graft_by_layout, open_all, rename, rewrite, run_graft, with_head
from safetensors.torch import load_file

from shadow_trl.checkpoints.checkpoint import Checkpoint
from shadow_trl.errors import PairMismatchError
from shadow_trl.layouts.plan import resolve
from shadow_trl.operations.graft import graft


@pytest.mark.parametrize("heads", list(itertools.product([None, "copy", "own"], repeat=3)))
def test_every_combination_of_heads(heads: tuple[str | None, ...], families: Any, tmp_path: Path) -> None:
    """The head of each side: not on disk, equal to the embedding, or another one that is loaded untied."""
    family = families("qwen3")
    folders = tuple(
        with_head(family / role, tmp_path / role, head, tied=False if head == "own" else None)
        for role, head in zip(ROLES, heads, strict=True)
    )
    base, instruct, tuned = heads
    conflict = instruct != "own" and "own" in (base, tuned)
    if conflict:
        with pytest.raises(PairMismatchError, match=r"(?s)delta of its own.*lm_head\.weight.*--untie"):
            resolve(*open_all(*folders))
    layout = graft_by_layout(tmp_path, "qwen3", folders, untie=conflict)
    assert layout.tier == "equal"
    assert layout.config_edits == ({"tie_word_embeddings": False} if conflict else {})
    stored = [weight.name for weight in layout.weights]
    expected = list(Checkpoint.open(str(folders[1])).specs)
    assert stored == (expected if instruct or not conflict else [*expected, "lm_head.weight"])
    assert not layout.left_out
    assert not layout.warnings
    if instruct == "copy" and not conflict:  # random rounding must treat both copies alike
        (head,) = [weight for weight in layout.weights if weight.name == "lm_head.weight"]
        assert head.instruct == "model.embed_tokens.weight"


def test_a_frozen_head_on_a_frozen_embedding_is_no_delta(families: Any, tmp_path: Path) -> None:
    """BASE and TUNED both have the same head of their own and the same embedding: a tied INSTRUCT stays tied."""
    family = families("qwen3")
    base = with_head(family / "base", tmp_path / "base", "own", tied=False)
    frozen = load_file(base / "model.safetensors")

    def change(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {**weights, **{name: frozen[name] for name in ("model.embed_tokens.weight", "lm_head.weight")}}

    tuned = rewrite(family / "tuned", tmp_path / "tuned", change)
    edit_config(tuned, tie_word_embeddings=False)
    layout = resolve(*open_all(base, family / "instruct", tuned))
    assert "lm_head.weight" not in [weight.name for weight in layout.weights]
    assert not layout.config_edits


def test_a_frozen_head_on_a_trained_embedding_is_a_delta_of_its_own(families: Any, tmp_path: Path) -> None:
    family = families("qwen3")
    base = with_head(family / "base", tmp_path / "base", "own", tied=False)
    head = load_file(base / "model.safetensors")["lm_head.weight"]
    tuned = rewrite(family / "tuned", tmp_path / "tuned", lambda weights: {**weights, "lm_head.weight": head})
    edit_config(tuned, tie_word_embeddings=False)
    with pytest.raises(PairMismatchError, match="--untie"):
        resolve(*open_all(base, family / "instruct", tuned))
    graft_by_layout(tmp_path, "qwen3", (base, family / "instruct", tuned), untie=True)


def test_a_head_of_its_own_counts_more_than_a_config_that_says_tied(families: Any, tmp_path: Path) -> None:
    """transformers loads two different weights untied, whatever the config says, and so does the result."""
    family = families("qwen3")
    folders = tuple(with_head(family / role, tmp_path / role, "own", tied=True) for role in ROLES)
    layout = graft_by_layout(tmp_path, "qwen3", folders)
    assert {(weight.name, weight.instruct) for weight in layout.weights} >= {("lm_head.weight", "lm_head.weight")}
    assert not layout.config_edits


def test_untie_reaches_the_sub_config(families: Any, tmp_path: Path) -> None:
    family = families("gemma3")

    def change(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {**weights, "lm_head.weight": weights["model.language_model.embed_tokens.weight"].flip(0).contiguous()}

    tuned = rewrite(family / "tuned-memory", tmp_path / "tuned", change)
    edit_config(tuned, tie_word_embeddings=False)
    folders = (family / "base", family / "instruct", tuned)
    with pytest.raises(PairMismatchError, match="--untie"):
        resolve(*open_all(*folders))
    layout = graft_by_layout(tmp_path, "gemma3", folders, untie=True)
    assert layout.config_edits == {"tie_word_embeddings": False, "text_config.tie_word_embeddings": False}
    assert layout.weights[-1].name == "lm_head.weight"


def test_the_head_may_be_the_copy_that_is_stored(families: Any, tmp_path: Path) -> None:
    """Some tools keep lm_head and drop the embedding of a tied model; transformers ties either way."""
    family = families("qwen3")
    tuned = rename(family / "tuned", tmp_path / "tuned", ("model.embed_tokens.weight", "lm_head.weight"))
    layout = graft_by_layout(tmp_path, "qwen3", (family / "base", family / "instruct", tuned))
    assert {w.tuned for w in layout.weights if w.name == "model.embed_tokens.weight"} == {"lm_head.weight"}


def test_an_untied_checkpoint_without_head_is_refused(families: Any, tmp_path: Path) -> None:
    family = families("llama")

    def change(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {name: tensor for name, tensor in weights.items() if name != "lm_head.weight"}

    tuned = rewrite(family / "tuned", tmp_path / "tuned", change)
    with pytest.raises(PairMismatchError, match=r"tuned .*tie_word_embeddings false.*no lm_head\.weight"):
        resolve(*open_all(family / "base", family / "instruct", tuned))


def test_graft_unties_and_says_so_in_the_config(families: Any, tmp_path: Path) -> None:
    family = families("qwen3")
    tuned = with_head(family / "tuned", tmp_path / "tuned", "own", tied=False)
    folders = (family / "base", family / "instruct", tuned)
    with pytest.raises(PairMismatchError, match="--untie"):
        run_graft(folders, tmp_path / "grafted")
    assert not (tmp_path / "grafted").exists()
    run_graft(folders, tmp_path / "grafted", untie=True)
    assert_sum("qwen3", *folders, tmp_path / "grafted")
    assert json.loads((tmp_path / "grafted/config.json").read_text())["tie_word_embeddings"] is False


def test_stochastic_rounding_treats_copies_of_a_tied_head_alike(families: Any, tmp_path: Path) -> None:
    family = families("qwen3")
    folders = [with_head(family / role, tmp_path / role, "copy") for role in ROLES]
    base, instruct, tuned = folders
    graft(
        base=base, instruct=instruct, tuned=tuned, output=tmp_path / "grafted", rounding="stochastic", seed=3,
        digest="none", progress=False,
    )  # fmt: skip
    written = load_file(tmp_path / "grafted/model.safetensors")
    assert torch.equal(written["lm_head.weight"], written["model.embed_tokens.weight"])


def test_untie_without_need_is_said(families: Any, tmp_path: Path) -> None:
    family = families("qwen3")
    folders = (family / "base", family / "instruct", family / "tuned")
    report = run_graft(folders, tmp_path / "grafted", untie=True)
    assert any("untie changes nothing" in warning for warning in report.warnings)
    assert "lm_head.weight" not in Checkpoint.open(tmp_path / "grafted").specs


def test_pickled_tuned_with_both_names_of_a_tied_weight(families: Any, tmp_path: Path) -> None:
    """A .bin file holds embedding and head of a tied model, and both are views of one storage."""
    family = families("qwen3")
    weights = load_file(family / "tuned/model.safetensors")
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"]
    shutil.copytree(family / "tuned", tmp_path / "tuned")
    (tmp_path / "tuned/model.safetensors").unlink()
    torch.save(weights, tmp_path / "tuned/pytorch_model.bin")
    folders = (family / "base", family / "instruct", tmp_path / "tuned")
    run_graft(folders, tmp_path / "grafted")
    assert_sum("qwen3", *folders, tmp_path / "grafted")
