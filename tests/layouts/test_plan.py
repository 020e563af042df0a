"""Names, layouts, ties and vocabularies: whatever the files look like, the graft is the sum of the models in memory."""

from __future__ import annotations

import itertools
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from architectures import (
    CONFIGS,
    ROLES,
    SCALE,
    assert_sum,
    in_memory,
    model_class,
)
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel

from shadow_trl.checkpoints.checkpoint import Checkpoint
from shadow_trl.errors import ConfigError, PairMismatchError
from shadow_trl.layouts.plan import Layout, plan, resolve
from shadow_trl.operations.gap import gap
from shadow_trl.operations.graft import check_graft, graft


def rewrite(source: Path, target: Path, change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> Path:
    """Copy a checkpoint with other weights."""
    shutil.copytree(source, target)
    save_file(change(load_file(source / "model.safetensors")), target / "model.safetensors", metadata={"format": "pt"})
    return target


def rename(source: Path, target: Path, *pairs: tuple[str, str]) -> Path:
    """Copy a checkpoint with prefixes of names replaced."""

    def change(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        renamed = {}
        for name, tensor in weights.items():
            old, new = next(((old, new) for old, new in pairs if name.startswith(old)), ("", ""))
            renamed[new + name.removeprefix(old)] = tensor
        return renamed

    return rewrite(source, target, change)


def edit_config(folder: Path, **values: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **values}))


def open_all(*folders: Path) -> list[Checkpoint]:
    return [Checkpoint.open(str(folder)) for folder in folders]


def carry_out(layout: Layout, sources: dict[str, Checkpoint], output: Path) -> Path:
    """Do what a layout says, in float64, and write a float32 checkpoint with INSTRUCT's config."""
    result = {}
    for weight in layout.weights:
        start = sources["instruct"].tensor(weight.instruct).double()
        grafted = start.clone()
        if not weight.copied:
            assert weight.base is not None
            base, tuned = sources["base"].tensor(weight.base), sources["tuned"].tensor(weight.tuned)
            rows = slice(None) if weight.rows is None else list(weight.rows)
            grafted[rows] = start[rows] + SCALE * (tuned.double()[rows] - base.double()[rows])
        result[weight.name] = grafted.float()
    output.mkdir()
    save_file(result, output / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((sources["instruct"].path / "config.json").read_text())
    for key, value in layout.config_edits.items():
        *parents, last = key.split(".")
        part = config
        for parent in parents:
            part = part[parent]
        part[last] = value
    (output / "config.json").write_text(json.dumps(config))
    return output


def graft_by_layout(tmp_path: Path, name: str, folders: tuple[Path, Path, Path], **options: Any) -> Layout:
    base, instruct, tuned = open_all(*folders)
    layout, sources = resolve(base, instruct, tuned, scratch=tmp_path / "scratch", **options)
    assert_sum(name, *folders, carry_out(layout, sources, tmp_path / "grafted"))
    return layout


@pytest.mark.parametrize("name", CONFIGS)
def test_equal_layouts(name: str, families: Any, tmp_path: Path) -> None:
    family = families(name)
    layout = graft_by_layout(tmp_path, name, (family / "base", family / "instruct", family / "tuned"))
    assert layout.tier == "equal"
    assert [weight.name for weight in layout.weights] == list(Checkpoint.open(str(family / "instruct")).specs)
    assert not any(weight.copied for weight in layout.weights)
    assert [layout.left_out, layout.warnings, layout.config_edits, layout.converts] == [[], [], {}, ()]


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
    _, sources = resolve(base, fused, tuned, scratch=tmp_path / "one")
    assert sources["base"] is base
    there = sources["tuned"]
    assert there.specs.keys() == fused.specs.keys()
    assert {there.specs[name].code for name in there.specs if "mlp.gate." in name} == {"F32"}
    _, sources = resolve(single, single, there, scratch=tmp_path / "two")
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


# Ties: whether a head is on disk, and whether it has a delta of its own.


def with_head(source: Path, target: Path, head: str | None, *, tied: bool | None = None) -> Path:
    """Copy a tied checkpoint: no head on disk, a "copy" of the embedding, or an "own" one."""

    def change(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        embedding = weights["model.embed_tokens.weight"]
        if head == "copy":
            weights["lm_head.weight"] = embedding.clone()
        elif head == "own":
            weights["lm_head.weight"] = embedding.flip(0).contiguous()
        return weights

    folder = rewrite(source, target, change)
    if tied is not None:
        edit_config(folder, tie_word_embeddings=tied)
    return folder


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
            plan(*open_all(*folders))
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
    layout = plan(*open_all(base, family / "instruct", tuned))
    assert "lm_head.weight" not in [weight.name for weight in layout.weights]
    assert not layout.config_edits


def test_a_frozen_head_on_a_trained_embedding_is_a_delta_of_its_own(families: Any, tmp_path: Path) -> None:
    family = families("qwen3")
    base = with_head(family / "base", tmp_path / "base", "own", tied=False)
    head = load_file(base / "model.safetensors")["lm_head.weight"]
    tuned = rewrite(family / "tuned", tmp_path / "tuned", lambda weights: {**weights, "lm_head.weight": head})
    edit_config(tuned, tie_word_embeddings=False)
    with pytest.raises(PairMismatchError, match="--untie"):
        plan(*open_all(base, family / "instruct", tuned))
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
        plan(*open_all(*folders))
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
        plan(*open_all(family / "base", family / "instruct", tuned))


def test_delta_without_base(families: Any) -> None:
    family = families("llama")
    instruct, delta = open_all(family / "instruct", family / "tuned")
    layout = plan(None, instruct, delta)
    assert [(weight.base, weight.tuned) for weight in layout.weights] == [(None, name) for name in instruct.specs]


# Vocabularies


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
        plan(*checkpoints)
    assert f"{abs(rows - 40)} {'more' if rows > 40 else 'fewer'} token rows" in str(caught.value)
    assert "--vocab shared" in str(caught.value)
    shared = [row for row in range(41) if row != 7]  # token 7 means something else, 40 is beyond BASE
    layout = plan(*checkpoints, vocab="shared", rows=shared)
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
    layout = plan(*open_all(*(family / role for role in ROLES)), vocab="shared", rows=range(40))
    assert all(weight.rows is None for weight in layout.weights)


def test_weights_left_out_by_the_user_may_differ(families: Any, tmp_path: Path) -> None:
    family = families("llama")
    instruct = with_rows(family / "instruct", tmp_path / "instruct", 43)
    checkpoints = open_all(family / "base", instruct, family / "tuned")
    layout = plan(*checkpoints, wanted=lambda name: "_proj" in name)
    assert {weight.name for weight in layout.weights if weight.copied} == {
        name for name in checkpoints[1].specs if "_proj" not in name
    }


@pytest.mark.parametrize("options", [{"vocab": "share"}, {"vocab": "shared"}])
def test_bad_options(options: dict[str, Any], families: Any) -> None:
    family = families("llama")
    with pytest.raises(ConfigError, match="vocab"):
        plan(*open_all(*(family / role for role in ROLES)), **options)


# Weights without a counterpart


def extended(source: Path, target: Path, **more: torch.Tensor) -> Path:
    return rewrite(source, target, lambda weights: {**weights, **{k.replace("__", "."): v for k, v in more.items()}})


def test_an_unknown_weight_of_instruct_is_named(families: Any, tmp_path: Path) -> None:
    family = families("llama")
    instruct = extended(family / "instruct", tmp_path / "instruct", model__adapter__weight=torch.ones(2))
    message = r"(?s)1 weight without a counterpart.*model\.adapter\.weight.*instruct only, not in base and tuned"
    with pytest.raises(PairMismatchError, match=message):
        plan(*open_all(family / "base", instruct, family / "tuned"))


def test_an_unknown_weight_of_tuned_is_named(families: Any, tmp_path: Path) -> None:
    family = families("llama")
    tuned = extended(family / "tuned", tmp_path / "tuned", model__adapter__weight=torch.ones(2))
    with pytest.raises(PairMismatchError, match=r"(?s)would land nowhere.*model\.adapter\.weight.*tuned only"):
        plan(*open_all(family / "base", family / "instruct", tuned))


@pytest.mark.parametrize("changed", [False, True])
def test_a_weight_that_instruct_lacks_must_be_without_a_delta(changed: bool, families: Any, tmp_path: Path) -> None:
    family = families("llama")
    base = extended(family / "base", tmp_path / "base", extra__weight=torch.ones(2, dtype=torch.bfloat16))
    value = torch.tensor([1.0, 1.5 if changed else 1.0])
    tuned = extended(family / "tuned", tmp_path / "tuned", extra__weight=value)
    checkpoints = open_all(base, family / "instruct", tuned)
    if changed:
        with pytest.raises(PairMismatchError, match=r"(?s)would land nowhere.*extra\.weight"):
            plan(*checkpoints)
    else:
        assert plan(*checkpoints).left_out == ["base: extra.weight", "tuned: extra.weight"]


def test_all_keys_are_listed_when_nothing_fits(families: Any, tmp_path: Path) -> None:
    family = families("llama")
    tuned = rename(family / "tuned", tmp_path / "tuned", ("model.layers.0.", "model.blocks.0."))
    message = r"(?s)9 weights without a counterpart.*model\.layers\.0\..*not in tuned"
    with pytest.raises(PairMismatchError, match=message):
        plan(*open_all(family / "base", family / "instruct", tuned))


def test_other_architecture_is_refused(families: Any) -> None:
    with pytest.raises(PairMismatchError, match="without a counterpart"):
        plan(*open_all(families("llama") / "base", families("gpt_oss") / "instruct", families("llama") / "tuned"))


def test_names_that_transformers_does_not_know_are_listed(families: Any, tmp_path: Path) -> None:
    family = families("llama")
    instruct = rename(family / "instruct", tmp_path / "instruct", ("model.", "strange."))
    edit_config(instruct, model_type="strange", architectures=["StrangeForCausalLM"])
    with pytest.raises(PairMismatchError, match=r"strange\.layers"):
        plan(*open_all(family / "base", instruct, family / "tuned"))


def test_buffers_that_loading_computes_are_copied_with_a_word(families: Any, tmp_path: Path) -> None:
    """Old checkpoints store inv_freq; a checkpoint saved by transformers 5 does not."""
    family = families("llama")
    buffer = {"model__layers__0__self_attn__rotary_emb__inv_freq": torch.ones(4)}
    base = extended(family / "base", tmp_path / "base", **buffer)
    instruct = extended(family / "instruct", tmp_path / "instruct", **buffer)
    layout = plan(*open_all(base, instruct, family / "tuned"))
    assert [w.name for w in layout.weights if w.copied] == ["model.layers.0.self_attn.rotary_emb.inv_freq"]
    assert "inv_freq" in layout.warnings[0]
    assert plan(*open_all(base, family / "instruct", family / "tuned")).left_out == [
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
            plan(*open_all(*folders))
    else:
        assert [weight.name for weight in plan(*open_all(*folders)).weights if weight.copied] == ["model.steps"]


def test_two_names_of_one_weight_are_refused(families: Any, tmp_path: Path) -> None:
    family = families("gemma3")
    name = "language_model.model.norm.weight"

    def change(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {**weights, "model.language_model.norm.weight": weights[name].clone()}

    tuned = rewrite(family / "tuned", tmp_path / "tuned", change)
    with pytest.raises(PairMismatchError, match=r"(?s)same weight in memory.*language_model\.model\.norm\.weight"):
        plan(*open_all(family / "base", family / "instruct-memory", tuned))


# End to end, through the function that people call


def run_graft(folders: tuple[Path, Path, Path], output: Path, **options: Any) -> Any:
    base, instruct, tuned = folders
    return graft(
        base=base, instruct=instruct, tuned=tuned, output=output, scale=SCALE, dtype="float32", digest="none",
        progress=False, **options,
    )  # fmt: skip


@pytest.mark.parametrize("name", CONFIGS)
def test_graft_of_every_architecture(name: str, families: Any, tmp_path: Path) -> None:
    family = families(name)
    folders = (family / "base", family / "instruct", family / "tuned")
    run_graft(folders, tmp_path / "grafted")
    assert_sum(name, *folders, tmp_path / "grafted")


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


@pytest.mark.parametrize("other", ["qwen3_moe", "gemma3"])
def test_gap_over_layouts(other: str, families: Any) -> None:
    family = families(other)
    report = gap(family / "base", family / "instruct-memory", family / "tuned", progress=False)
    b, i, t = (in_memory(other, family / role) for role in ROLES)
    if other == "gemma3":  # one weight under two names
        for state in (b, i, t):
            state.pop("lm_head.weight")
    apart = sum((i[key].double() - b[key].double()).abs().sum() for key in b)
    size = sum(i[key].double().abs().sum() + b[key].double().abs().sum() for key in b)
    assert report.sigma == pytest.approx(float(apart / size), rel=1e-6)
    moved = sum((t[key].double() - b[key].double()).abs().sum() for key in b)
    assert report.delta_to_gap == pytest.approx(float(moved / apart), rel=1e-6)


def test_gap_of_a_head_that_one_side_has_of_its_own(families: Any, tmp_path: Path) -> None:
    family = families("qwen3")
    base = with_head(family / "base", tmp_path / "base", "own", tied=False)
    report = gap(base, family / "instruct", progress=False)
    b, i = in_memory("qwen3", base), in_memory("qwen3", family / "instruct")
    apart = sum((i[key].double() - b[key].double()).abs().sum() for key in b)
    size = sum(i[key].double().abs().sum() + b[key].double().abs().sum() for key in b)
    assert report.sigma == pytest.approx(float(apart / size), rel=1e-6)
