"""Names of the hub, of older checkpoints and in memory, experts single and fused: all are one model."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from architectures import (
    ROLES,
    SCALE,
    assert_sum,
    in_memory,
    model_class,
)
from layout_cases import graft_by_layout, open_all, rename, rewrite, run_graft
from safetensors.torch import load_file

from shadow_trl.checkpoints.checkpoint import Checkpoint
from shadow_trl.layouts.plan import resolve
from shadow_trl.operations.checks import check_graft


@pytest.mark.parametrize("name", ["gemma3", "qwen2_5_vl"])
@pytest.mark.parametrize("other", [("tuned",), ("instruct",), ("base", "tuned")])
def test_renamed_vision_language(name: str, other: tuple[str, ...], families: Any, tmp_path: Path) -> None:
    family = families(name)
    folders = [family / (f"{role}-memory" if role in other else role) for role in ROLES]
    layout = graft_by_layout(tmp_path, name, tuple(folders))
    assert layout.tier == "renamed"
    assert [weight.name for weight in layout.weights] == list(Checkpoint.open(str(folders[1])).specs)
    assert not any(weight.copied for weight in layout.weights)
    assert not layout.left_out


@pytest.mark.parametrize("name", ["qwen3_moe", "mixtral", "glm4v_moe"])
@pytest.mark.parametrize("other", [("tuned",), ("instruct",), ("base", "tuned"), ("base",)])
def test_converted_experts(name: str, other: tuple[str, ...], families: Any, tmp_path: Path) -> None:
    family = families(name)
    folders = [family / (f"{role}-memory" if role in other else role) for role in ROLES]
    layout = graft_by_layout(tmp_path, name, tuple(folders))
    assert layout.tier == "converted"
    assert layout.converts == tuple(sorted(({*ROLES} - {*other} if "instruct" in other else {*other}) - {"instruct"}))
    assert [weight.name for weight in layout.weights] == list(Checkpoint.open(str(folders[1])).specs)
    assert not any(weight.copied for weight in layout.weights)


HUB_STYLES = {
    "gemma3": [
        ("vision_tower.", "vision_tower.vision_model."),
        ("model.vision_tower.", "vision_tower.vision_model."),
    ],
    "qwen2_5_vl": [("model.visual.", "visual."), ("model.language_model.", "model.")],
    "qwen3": [("model.", "")],  # saved from the bare model, without its head
}


@pytest.mark.parametrize("name", HUB_STYLES)
@pytest.mark.parametrize("other", [("base",), ("instruct",), ("base", "tuned")])
def test_names_of_older_checkpoints(name: str, other: tuple[str, ...], families: Any, tmp_path: Path) -> None:
    family = families(name)
    folders = [family / (f"{role}-memory" if name == "qwen2_5_vl" else role) for role in ROLES]
    for number, role in enumerate(ROLES):
        if role in other:
            folders[number] = rename(folders[number], tmp_path / role, *HUB_STYLES[name])
    layout = graft_by_layout(tmp_path, name, tuple(folders))
    assert layout.tier == "renamed"
    assert not any(weight.copied for weight in layout.weights)


def test_single_experts_under_two_prefixes_are_only_renamed(families: Any, tmp_path: Path) -> None:
    family = families("mixtral")

    def change(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {name.replace(".block_sparse_moe.", ".mlp."): tensor for name, tensor in weights.items()}

    tuned = rewrite(family / "tuned", tmp_path / "tuned", change)
    layout = graft_by_layout(tmp_path, "mixtral", (family / "base", family / "instruct", tuned))
    assert layout.tier == "renamed"


def test_names_of_a_trained_hub_checkpoint_stay_those_of_the_hub(families: Any, tmp_path: Path) -> None:
    """What transformers 5 saves after loading old names has the old names: TUNED follows BASE, not INSTRUCT."""
    old = rename(families("gemma3") / "base", tmp_path / "old", *HUB_STYLES["gemma3"])
    model = model_class("gemma3").from_pretrained(old, dtype="auto")
    model.save_pretrained(tmp_path / "saved")
    assert load_file(tmp_path / "saved/model.safetensors").keys() == load_file(old / "model.safetensors").keys()


def test_conversion_keeps_every_value_and_dtype(families: Any, tmp_path: Path) -> None:
    """A router in fp32 among bf16 experts stays fp32, on the way to fused experts and back."""
    family = families("qwen3_moe")

    def change(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {name: tensor.float() + 1e-7 if "mlp.gate." in name else tensor for name, tensor in weights.items()}

    mixed = rewrite(family / "tuned", tmp_path / "mixed", change)
    base, fused, tuned, single = open_all(family / "base-memory", family / "instruct-memory", mixed, family / "base")
    sources = resolve(base, fused, tuned, scratch=tmp_path / "one").sides
    assert sources["base"] is base
    there = sources["tuned"]
    assert there.specs.keys() == fused.specs.keys()
    assert {there.specs[name].code for name in there.specs if "mlp.gate." in name} == {"F32"}
    sources = resolve(single, single, there, scratch=tmp_path / "two").sides
    back = sources["tuned"]
    assert back.specs.keys() == tuned.specs.keys()
    for name in tuned.specs:
        assert back.specs[name].code == tuned.specs[name].code
        assert torch.equal(back.tensor(name), tuned.tensor(name))


def test_conversion_is_announced_with_its_size(families: Any, tmp_path: Path, caplog: Any) -> None:
    family = families("mixtral")
    resolve(*open_all(family / "base", family / "instruct", family / "tuned-memory"), scratch=tmp_path / "scratch")
    (record,) = caplog.records
    assert record.levelname == "WARNING"
    assert "GB" in record.getMessage()
    assert "tuned-memory" in record.getMessage()


def hybrid(families: Any, target: Path, role: str) -> Path:
    """Make a checkpoint with single experts in its first layer and fused ones in its second."""
    family = families("mixtral")
    fused = load_file(family / f"{role}-memory/model.safetensors")

    def change(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        kept = {name: tensor for name, tensor in weights.items() if ".layers.1." not in name}
        return kept | {name: tensor for name, tensor in fused.items() if ".layers.1." in name}

    return rewrite(family / role, target, change)


def test_a_layout_that_saving_cannot_make_gives_way_to_that_in_memory(families: Any, tmp_path: Path) -> None:
    family = families("mixtral")
    instruct = hybrid(families, tmp_path / "instruct", "instruct")
    layout = graft_by_layout(tmp_path, "mixtral", (family / "base", instruct, family / "tuned"))
    assert layout.converts == ("base", "instruct", "tuned")
    memory = Checkpoint.open(str(family / "instruct-memory"))
    assert {weight.name for weight in layout.weights} == set(memory.specs)
    assert any(warning.startswith("instruct ") and "in memory" in warning for warning in layout.warnings)


def test_hybrids_of_one_kind_are_equal(families: Any, tmp_path: Path) -> None:
    folders = tuple(hybrid(families, tmp_path / role, role) for role in ROLES)
    assert graft_by_layout(tmp_path, "mixtral", folders).tier == "equal"


def test_a_small_shard_size_gives_the_same_checkpoint(families: Any, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr("shadow_trl.layouts.model_names.SHARD_BYTES", 3000)
    family = families("mixtral")
    tuned = family / "tuned-memory"
    graft_by_layout(tmp_path, "mixtral", (family / "base", family / "instruct", tuned))
    assert len(list((tmp_path / "scratch/tuned").glob("*.safetensors"))) > 3


def test_conversions_over_block_limits_take_everything_at_once(families: Any, tmp_path: Path, monkeypatch: Any) -> None:
    """Blocks of single experts cannot be fused; that shows without reading a weight."""
    monkeypatch.setattr("shadow_trl.layouts.model_names.LAYER", re.compile(r"(.*\.\d+)\."))
    family = families("mixtral")
    graft_by_layout(tmp_path, "mixtral", (family / "base", family / "instruct-memory", family / "tuned"))


@pytest.mark.parametrize("name", ["gemma3", "qwen2_5_vl", "qwen3_moe", "mixtral"])
@pytest.mark.parametrize("other", [("tuned",), ("base", "tuned")])
def test_graft_over_layouts(name: str, other: tuple[str, ...], families: Any, tmp_path: Path) -> None:
    """The result has INSTRUCT's names and nothing of the conversion stays behind."""
    family = families(name)
    folders = tuple(family / (f"{role}-memory" if role in other else role) for role in ROLES)
    run_graft(folders, tmp_path / "grafted")
    assert_sum(name, *folders, tmp_path / "grafted")
    assert [path.name for path in tmp_path.iterdir()] == ["grafted"]
    assert not any(path.is_dir() for path in (tmp_path / "grafted").iterdir())
    assert Checkpoint.open(tmp_path / "grafted").specs.keys() == Checkpoint.open(folders[1]).specs.keys()


def test_check_graft_writes_nothing_for_layouts_that_need_conversion(families: Any, tmp_path: Path) -> None:
    family = families("mixtral")
    check_graft(base=family / "base-memory", instruct=family / "instruct", output=tmp_path / "grafted", adapter=False)
    assert list(tmp_path.iterdir()) == []


def test_graft_onto_a_layout_that_saving_cannot_make(families: Any, tmp_path: Path) -> None:
    family = families("mixtral")
    folders = (family / "base", hybrid(families, tmp_path / "instruct", "instruct"), family / "tuned-memory")
    report = run_graft(folders, tmp_path / "grafted")
    assert_sum("mixtral", *folders, tmp_path / "grafted")
    assert any(warning.startswith("instruct ") and "in memory" in warning for warning in report.warnings)


@pytest.mark.parametrize("name", ["gemma3", "qwen2_5_vl"])
@pytest.mark.parametrize("instruct_scale", [1.0, 0.5])
def test_adapter_lands_on_names_of_an_older_checkpoint(
    name: str, instruct_scale: float, families: Any, tmp_path: Path
) -> None:
    """An adapter has the names in memory, INSTRUCT those of the hub: the dense graft is still the merged adapter."""
    family = families(name)
    model = model_class(name).from_pretrained(family / "base", dtype=torch.float32)
    config = peft.LoraConfig(r=2, target_modules=r".*language_model.*\.(q_proj|down_proj)", init_lora_weights=False)
    tuned = peft.get_peft_model(model, config)
    tuned.save_pretrained(tmp_path / "adapter")
    folders = (family / "base", family / "instruct", tmp_path / "adapter")
    run_graft(folders, tmp_path / "grafted", format="model", instruct_scale=instruct_scale)
    t = dict(tuned.merge_and_unload().state_dict())
    b, i, r = (in_memory(name, folder) for folder in (*folders[:2], tmp_path / "grafted"))
    rest = 1 - SCALE - instruct_scale
    for key, value in r.items():
        expected = SCALE * t[key].double() + instruct_scale * i[key].double() + rest * b[key].double()
        torch.testing.assert_close(value.double(), expected, rtol=1e-6, atol=1e-6, msg=key)
