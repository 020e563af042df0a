"""What is written beside a graft: the manifest in full, and the model card."""

from __future__ import annotations

import importlib.metadata
import json

import pytest
import torch
import xxhash
from families import family, lora, shapes
from huggingface_hub import ModelCard

from shadow_trl import graft
from shadow_trl.checkpoints.checkpoint import Checkpoint
from shadow_trl.checkpoints.manifest import (
    FORMAT,
    Entry,
    as_trained,
    from_manifest,
    read_manifest,
    stage_below,
    write_manifest,
)
from shadow_trl.errors import CheckpointError, InputError
from shadow_trl.results.cards import write_model_card


def test_the_manifest_has_everything_that_a_second_graft_needs(tmp_path):
    sides = family(tmp_path, generation_config_DOT_json="{}")
    options = {"scale": 0.5, "instruct_scale": 0.9, "modules": "linear", "dtype": "float16", "rounding": "stochastic"}
    report = graft(**sides, output=tmp_path / "out", seed=11, base_dtype="bfloat16", progress=False, **options)
    found = read_manifest(tmp_path / "out")
    assert (found["kind"], found["format"], found["form"], found["dtype"]) == ("graft", FORMAT, "model", "float16")
    assert found["options"] == {
        **options, "seed": 11, "vocab": "strict", "chat_template": "instruct", "max_shard_size": None, "untie": False,
        "base_dtype": "bfloat16",
    }  # fmt: skip
    for role, folder in sides.items():
        assert (found[role]["source"], found[role]["revision"]) == (str(folder), None)
        files = ["model.safetensors", *(["config.json", "generation_config.json"] if role == "instruct" else [])]
        wanted = {name: f"xxh3:{xxhash.xxh3_128_hexdigest((folder / name).read_bytes())}" for name in files}
        assert found[role]["digests"] == wanted
    assert (found["grafted"], found["copied"]) == (14, len(shapes()) - 14)
    for figure in ("sigma", "delta_norm", "realised", "noise"):
        assert found[figure] == getattr(report, figure) is not None
    assert found["by_kind"] == report.by_kind
    for package in ("torch", "transformers", "trl", "peft", "accelerate", "safetensors"):
        assert found["versions"][package] == importlib.metadata.version(package)
    assert found["warnings"] == report.warnings
    assert found["left_out"] == []


def card_of(manifest, tmp_path, **options):
    return ModelCard.load(write_model_card(tmp_path, manifest, **options))


def test_the_card_of_a_graft_of_hub_models(tmp_path):
    sides = {"base": "Qwen/Qwen3-0.6B-Base", "instruct": "Qwen/Qwen3-0.6B@v1", "tuned": "me/tuned"}
    manifest = {role: {"source": source} for role, source in sides.items()} | {"options": {"scale": 0.5}}
    card = card_of(manifest, tmp_path)
    assert card.data.base_model == ["Qwen/Qwen3-0.6B"]
    assert card.data.to_dict()["base_model_relation"] == "finetune"
    assert card.data.library_name == "transformers"
    assert {"shadow-trl", "shadow-ft"} <= set(card.data.tags)
    assert "`grafted = instruct + scale * (tuned - base)`" in card.text
    assert "| scale | 0.5 |" in card.text
    assert "eprint" in card.text or "arXiv:2505.12716" in card.text
    assert "@article{shadowft2025" in card.text
    assert "Shadow-FT: Tuning Instruct Model via Training on Paired Base Model" in card.text


def test_what_was_a_folder_is_never_called_a_model_of_the_hub(tmp_path):
    """The process may have changed its folder since `owner/base` was found."""
    sides = {role: {"source": f"owner/{role}", "folder": role == "base"} for role in ("base", "instruct", "tuned")}
    card = card_of(sides, tmp_path)
    assert card.data.base_model == ["owner/instruct"]
    assert "| base | base |" in card.text


def test_the_card_of_an_adapter_and_of_another_instruct_scale(tmp_path):
    manifest = {role: {"source": f"owner/{role}"} for role in ("base", "instruct", "tuned")}
    card = card_of(manifest, tmp_path, adapter=True)
    assert (card.data.library_name, card.data.to_dict()["base_model_relation"]) == ("peft", "adapter")
    assert "lora" in card.data.tags
    card = card_of({**manifest, "options": {"scale": 1.0, "instruct_scale": 0.5}}, tmp_path)
    assert "base + scale * (tuned - base) + instruct_scale * (instruct - base)" in card.text


def test_a_card_says_what_instruct_is_and_how_the_update_was_learnt(tmp_path):
    trained = {
        "trainer": "ShadowDPOTrainer", "ref_policy": None, "datasets": ["own/rows"],
        "training": {"learning_rate": 1e-05, "rows_per_step": 32, "adapter": "LORA of rank 8"},
        "scores": {"eval_grafted_loss": 0.25},
    }  # fmt: skip
    manifest = {"instruct": {"source": "own/it", "folder": False}, "sigma": 0.01234567, "realised": 0.5, "noise": None}
    sides = family(tmp_path)
    (sides["instruct"] / "README.md").write_text(
        "---\nlicense: other\nlicense_name: own|licence\nlicense_link: LICENSE\npipeline_tag: text-to-text\n"
        "base_model: own/base\nlanguage:\n- de\nextra_gated_prompt: no\n---\nIts text.\n"
    )
    card = card_of({**manifest, "trained": trained}, tmp_path, instruct=Checkpoint.open(sides["instruct"]))
    assert card.data.to_dict() == {
        "license": "other", "license_name": "own|licence", "license_link": "LICENSE", "pipeline_tag": "text-to-text",
        "language": ["de"], "base_model": ["own/it"], "base_model_relation": "finetune", "datasets": ["own/rows"],
        "library_name": "transformers", "tags": ["shadow-trl", "shadow-ft", "trl"],
    }  # fmt: skip
    for line in (
        "| sigma | 0.01235 |", "| realised | 0.5 |", "| trainer | ShadowDPOTrainer |", "| learning rate | 1e-05 |",
        "| rows per step | 32 |", "| adapter | LORA of rank 8 |", "| data sets | own/rows |",
        "| eval_grafted_loss | 0.25 |",
    ):  # fmt: skip
        assert line in card.text
    assert "noise" not in card.text
    for broken in ("---\n[\n---\n", "no head", "---\n- a\n---\n"):
        (sides["instruct"] / "README.md").write_text(broken)
        data = card_of(manifest, tmp_path, instruct=Checkpoint.open(sides["instruct"])).data
        assert (data.license, data.pipeline_tag) == (None, "text-generation")


def test_a_card_tells_no_path_of_this_machine(tmp_path):
    sides = family(tmp_path)
    adapter = lora(tmp_path / "lora", base_model_name_or_path=str(sides["base"]))
    graft(**sides, output=tmp_path / "out", progress=False)
    graft(**{**sides, "tuned": adapter}, output=tmp_path / "adapter", format="adapter", progress=False)
    for folder in ("out", "adapter"):
        text = (tmp_path / folder / "README.md").read_text()
        assert str(tmp_path) not in text
        assert ModelCard(text).data.base_model is None
        assert "| instruct | instruct |" in text


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "cannot read"),
        ("[]", "its `kind` is none of run, graft, delta"),
        ('{"kind": "soup"}', "its `kind` is none of run, graft, delta"),
        (json.dumps({"kind": "delta", "format": FORMAT + 1}), "newer shadow_trl"),
    ],
)
def test_a_manifest_that_cannot_be_read_is_an_error(tmp_path, content, message):
    assert read_manifest(tmp_path) is None
    (tmp_path / "shadow.json").write_text(content)
    with pytest.raises(CheckpointError, match=message):
        read_manifest(tmp_path)


def test_figures_are_null_where_nothing_was_measured(tmp_path):
    graft(**family(tmp_path), output=tmp_path / "out", digest="none", stats=False, progress=False)
    found = read_manifest(tmp_path / "out")
    assert [found[name] for name in ("sigma", "delta_norm", "realised", "noise")] == [None] * 4
    assert all(found[role]["digests"] is None for role in ("base", "instruct", "tuned"))
    assert torch.__version__.startswith(found["versions"]["torch"].split("+")[0])


def test_what_is_given_wins_over_the_manifest_and_a_difference_is_said(tmp_path, caplog):
    commit, manifest = "a" * 40, {"kind": "run"}
    manifest["base"] = {"source": "own/base", "revision": "a" * 40, "asked": "v1", "folder": False}
    for given in (Entry("own/base", commit), Entry("own/base"), Entry("own/base", "v1")):  # the same by another name
        assert from_manifest("base", manifest, tmp_path, given) == Entry("own/base", commit)
    assert not caplog.text
    for given in (Entry("own/other"), Entry("own/base", "v2")):
        assert from_manifest("base", manifest, tmp_path, given) == given
        assert f"base is {given} as given; {tmp_path / 'shadow.json'} names own/base@{commit}." in caplog.text
    caplog.clear()
    assert from_manifest("instruct", manifest, tmp_path, Entry("own/other")) == Entry("own/other")
    assert from_manifest("instruct", manifest, tmp_path) is None
    assert not caplog.text


def test_base_is_the_commit_that_the_run_records(tmp_path, caplog):
    commit, other = "a" * 40, "b" * 40
    assert as_trained("own/base", tmp_path) == "own/base"  # no run
    write_manifest(tmp_path, {"kind": "run", "base": {"source": "own/base", "revision": commit, "asked": "v1"}})
    for given in (None, "own/other", "own/base@v2", f"own/base@{other}", tmp_path):
        assert as_trained(given, tmp_path) == given
    assert not caplog.text
    assert as_trained("own/base", tmp_path) == f"own/base@{commit}"
    assert f"base is own/base@{commit}, the commit that {tmp_path / 'shadow.json'} records." in caplog.text
    write_manifest(tmp_path, {"kind": "run", "base": {"source": "base"}})  # a folder has no commit
    assert as_trained("base", tmp_path) == "base"


def test_an_adapter_on_a_stage_that_is_not_named_is_refused(tmp_path):
    (tmp_path / "adapter_config.json").write_text("{}")
    assert stage_below(tmp_path) is None  # of no run
    names = {role: {"source": str(tmp_path / role), "folder": False} for role in ("base", "policy")}
    write_manifest(tmp_path, {"kind": "run", "base": names["base"], "policy": names["base"]})
    assert stage_below(tmp_path) is None  # on BASE itself
    write_manifest(tmp_path, {"kind": "run", **names})
    assert stage_below(tmp_path) == (str(tmp_path / "policy"), str(tmp_path / "base"))
    for role, entry in names.items():
        write_manifest(tmp_path, {"kind": "run", role: entry})
        with pytest.raises(InputError, match="does not name what the adapter was trained on, or its BASE"):
            stage_below(tmp_path)
