"""Plans: each weight of INSTRUCT finds its weights of BASE and TUNED, or is named; the graft is the sum in memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import (
    CONFIGS,
    ROLES,
    assert_sum,
)
from layout_cases import edit_config, graft_by_layout, open_all, rename, rewrite, run_graft

from shadow_trl.checkpoints.checkpoint import Checkpoint
from shadow_trl.errors import PairMismatchError
from shadow_trl.layouts.plan import resolve


@pytest.mark.parametrize("name", CONFIGS)
def test_equal_layouts(name: str, families: Any, tmp_path: Path) -> None:
    family = families(name)
    layout = graft_by_layout(tmp_path, name, (family / "base", family / "instruct", family / "tuned"))
    assert layout.tier == "equal"
    assert [weight.name for weight in layout.weights] == list(Checkpoint.open(str(family / "instruct")).specs)
    assert not any(weight.copied for weight in layout.weights)
    assert [layout.left_out, layout.warnings, layout.config_edits, layout.converts] == [[], [], {}, ()]


def test_delta_without_base(families: Any) -> None:
    family = families("llama")
    instruct, delta = open_all(family / "instruct", family / "tuned")
    layout = resolve(None, instruct, delta)
    assert [(weight.base, weight.tuned) for weight in layout.weights] == [(None, name) for name in instruct.specs]


# Weights without a counterpart


def extended(source: Path, target: Path, **more: torch.Tensor) -> Path:
    return rewrite(source, target, lambda weights: {**weights, **{k.replace("__", "."): v for k, v in more.items()}})


def test_an_unknown_weight_of_instruct_is_named(families: Any, tmp_path: Path) -> None:
    family = families("llama")
    instruct = extended(family / "instruct", tmp_path / "instruct", model__adapter__weight=torch.ones(2))
    message = r"(?s)1 weight without a counterpart.*model\.adapter\.weight.*instruct only, not in base and tuned"
    with pytest.raises(PairMismatchError, match=message):
        resolve(*open_all(family / "base", instruct, family / "tuned"))


def test_an_unknown_weight_of_tuned_is_named(families: Any, tmp_path: Path) -> None:
    family = families("llama")
    tuned = extended(family / "tuned", tmp_path / "tuned", model__adapter__weight=torch.ones(2))
    with pytest.raises(PairMismatchError, match=r"(?s)without a matching weight.*model\.adapter\.weight.*tuned only"):
        resolve(*open_all(family / "base", family / "instruct", tuned))


@pytest.mark.parametrize("changed", [False, True])
def test_a_weight_that_instruct_lacks_must_be_without_a_delta(changed: bool, families: Any, tmp_path: Path) -> None:
    family = families("llama")
    base = extended(family / "base", tmp_path / "base", extra__weight=torch.ones(2, dtype=torch.bfloat16))
    value = torch.tensor([1.0, 1.5 if changed else 1.0])
    tuned = extended(family / "tuned", tmp_path / "tuned", extra__weight=value)
    checkpoints = open_all(base, family / "instruct", tuned)
    if changed:
        with pytest.raises(PairMismatchError, match=r"(?s)without a matching weight.*extra\.weight"):
            resolve(*checkpoints)
    else:
        assert resolve(*checkpoints).left_out == ["base: extra.weight", "tuned: extra.weight"]


def test_all_keys_are_listed_when_nothing_fits(families: Any, tmp_path: Path) -> None:
    family = families("llama")
    tuned = rename(family / "tuned", tmp_path / "tuned", ("model.layers.0.", "model.blocks.0."))
    message = r"(?s)9 weights without a counterpart.*model\.layers\.0\..*not in tuned"
    with pytest.raises(PairMismatchError, match=message):
        resolve(*open_all(family / "base", family / "instruct", tuned))


def test_other_architecture_is_refused(families: Any) -> None:
    with pytest.raises(PairMismatchError, match="without a counterpart"):
        resolve(*open_all(families("llama") / "base", families("gpt_oss") / "instruct", families("llama") / "tuned"))


def test_names_that_transformers_does_not_know_are_listed(families: Any, tmp_path: Path) -> None:
    family = families("llama")
    instruct = rename(family / "instruct", tmp_path / "instruct", ("model.", "strange."))
    edit_config(instruct, model_type="strange", architectures=["StrangeForCausalLM"])
    with pytest.raises(PairMismatchError, match=r"strange\.layers"):
        resolve(*open_all(family / "base", instruct, family / "tuned"))


def test_buffers_that_loading_computes_are_copied_with_a_word(families: Any, tmp_path: Path) -> None:
    """Old checkpoints store inv_freq; a checkpoint saved by transformers 5 does not."""
    family = families("llama")
    buffer = {"model__layers__0__self_attn__rotary_emb__inv_freq": torch.ones(4)}
    base = extended(family / "base", tmp_path / "base", **buffer)
    instruct = extended(family / "instruct", tmp_path / "instruct", **buffer)
    layout = resolve(*open_all(base, instruct, family / "tuned"))
    assert [w.name for w in layout.weights if w.copied] == ["model.layers.0.self_attn.rotary_emb.inv_freq"]
    assert "inv_freq" in layout.warnings[0]
    assert resolve(*open_all(base, family / "instruct", family / "tuned")).left_out == [
        "base: model.layers.0.self_attn.rotary_emb.inv_freq"
    ]


@pytest.mark.parametrize("changed", [False, True])
def test_whole_numbers_are_copied_unless_training_changed_them(changed: bool, families: Any, tmp_path: Path) -> None:
    family = families("llama")
    folders = [
        extended(family / role, tmp_path / role, model__steps=torch.tensor([3 + (changed and role == "tuned")]))
        for role in ROLES
    ]
    if changed:
        with pytest.raises(PairMismatchError, match=r"(?s)whole numbers.*model\.steps.*I64"):
            resolve(*open_all(*folders))
    else:
        assert [weight.name for weight in resolve(*open_all(*folders)).weights if weight.copied] == ["model.steps"]


def test_two_names_of_one_weight_are_refused(families: Any, tmp_path: Path) -> None:
    family = families("gemma3")
    name = "language_model.model.norm.weight"

    def change(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {**weights, "model.language_model.norm.weight": weights[name].clone()}

    tuned = rewrite(family / "tuned", tmp_path / "tuned", change)
    with pytest.raises(PairMismatchError, match=r"(?s)same weight in memory.*language_model\.model\.norm\.weight"):
        resolve(*open_all(family / "base", family / "instruct-memory", tuned))


@pytest.mark.parametrize("name", CONFIGS)
def test_graft_of_every_architecture(name: str, families: Any, tmp_path: Path) -> None:
    family = families(name)
    folders = (family / "base", family / "instruct", family / "tuned")
    run_graft(folders, tmp_path / "grafted")
    assert_sum(name, *folders, tmp_path / "grafted")
