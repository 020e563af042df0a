"""What belongs together stays together: the delta with the BASE that was loaded, a manifest with its weights."""

from __future__ import annotations

import math
import shutil
from pathlib import Path

import huggingface_hub
import pytest
import torch
import xxhash
from hub_cache import into_cache
from other_trainers import build
from peft import LoraConfig
from runs import dpo, lora, settings, sft
from safetensors.torch import load_file, save_file
from tiny import make_pair, sft_data
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer, TrainerCallback

from shadow_trl import ShadowSFTConfig, ShadowSFTTrainer, extract_delta, graft
from shadow_trl.checkpoints.manifest import read_manifest
from shadow_trl.errors import AdapterError, InputError

OLD, NEW, INSTRUCT = "a" * 40, "b" * 40, "c" * 40
PAIR = (Path("own/base"), Path("own/instruct"))


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A pair on the hub: `main` of BASE is OLD, its `next` NEW. Returns what moves `main` to another commit."""
    cache, sides = tmp_path / "cache", make_pair(tmp_path / "pair")
    other = make_pair(tmp_path / "other", gap=0.5)[1]
    into_cache(cache, "own/base", OLD, sides[0], branch="main")
    into_cache(cache, "own/base", NEW, other, branch="next")
    into_cache(cache, "own/instruct", INSTRUCT, sides[1], branch="main")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(cache))
    # transformers took the folder when it was imported.
    monkeypatch.setattr("transformers.utils.hub.constants.HF_HUB_CACHE", str(cache))
    monkeypatch.chdir(tmp_path)
    return (cache / "models--own--base" / "refs" / "main").write_text


def snapshot(commit: str, name: str = "base") -> Path:
    return Path("cache", f"models--own--{name}", "snapshots", commit)


def check_delta(tuned: dict, grafted: Path, base: Path) -> None:
    """Check `grafted` against INSTRUCT + (TUNED - BASE) in float64."""
    origin, receiver = (
        load_file(base / "model.safetensors"),
        load_file(snapshot(INSTRUCT, "instruct") / "model.safetensors"),
    )
    found = load_file(grafted / "model.safetensors")
    for name, value in receiver.items():
        expected = value.double() + (tuned[name].double() - origin[name].double())
        assert (found[name].double() - expected).abs().max() < 1e-6, name


@pytest.mark.parametrize("peft_config", [None, lora()], ids=["full", "lora"])
def test_a_revision_of_base_alone_is_what_is_trained(hub, peft_config):
    trainer = sft(PAIR, Path("out"), base_revision="next", peft_config=peft_config)
    started = trainer.model.get_base_model() if peft_config else trainer.model
    wanted = load_file(snapshot(NEW) / "model.safetensors")
    assert started.get_input_embeddings().weight.equal(wanted["model.embed_tokens.weight"])
    assert trainer.origins.from_raw_base
    trainer.train()
    if peft_config is None:
        check_delta(load_file("out/model.safetensors"), Path("out/grafted"), snapshot(NEW))
    entries = read_manifest("out")
    assert [(entries[role]["revision"], entries[role]["asked"]) for role in ("base", "policy")] == [(NEW, "next")] * 2


def test_two_revisions_are_two_origins(hub):
    trainer = sft(PAIR, Path("out"), base_revision="next", model_init_kwargs={"revision": "main"})
    assert (trainer.origins.policy.revision, trainer.origins.base.revision) == (OLD, NEW)
    assert not trainer.origins.from_raw_base
    trainer.train()
    check_delta(load_file("out/model.safetensors"), Path("out/grafted"), snapshot(NEW))


def test_main_moves_during_training_before_the_next_stage_and_before_a_graft(hub):
    trainer = sft(PAIR, Path("one"))
    hub(NEW)
    trainer.train()
    first = load_file("one/model.safetensors")
    check_delta(first, Path("one/grafted"), snapshot(OLD))
    second = ShadowSFTTrainer("one", args=ShadowSFTConfig(**settings(Path("two"))), train_dataset=sft_data())
    second.train()
    check_delta(load_file("two/model.safetensors"), Path("two/grafted"), snapshot(OLD))
    graft(base="own/base", instruct="own/instruct", tuned="one", output="three", progress=False)
    check_delta(first, Path("three"), snapshot(OLD))
    # A revision that is asked for by its name wins, with a warning.
    report = graft(base="own/base@next", instruct="own/instruct", tuned="one", output="four", progress=False)
    check_delta(first, Path("four"), snapshot(NEW))
    assert any("trained on another base" in text for text in report.warnings)


def test_the_base_of_an_adapter_is_the_commit_that_it_was_trained_on(hub):
    sft(PAIR, Path("one"), peft_config=lora()).train()
    hub(NEW)
    graft(instruct="own/instruct", tuned="one", output="two", format="model", progress=False)
    assert read_manifest("two")["base"]["revision"] == OLD
    second = ShadowSFTTrainer("one", args=ShadowSFTConfig(**settings(Path("three"))), train_dataset=sft_data())
    wanted = load_file(snapshot(OLD) / "model.safetensors")["model.embed_tokens.weight"]
    assert second.model.get_base_model().get_input_embeddings().weight.equal(wanted)
    assert second.origins.policy == second.origins.base


@pytest.mark.parametrize("precompute", [None, False], ids=["precomputed", "in memory"])
def test_the_reference_of_a_loaded_model_is_the_revision_that_was_loaded(hub, precompute):
    """At the first step the policy is the reference: the margin is 0. By its name alone, BASE is that of `main`."""
    model = AutoModelForCausalLM.from_pretrained("own/base", revision="next", dtype=torch.float32)
    changes = {"base_revision": "next", "precompute_ref_log_probs": precompute, "max_steps": 1}
    trainer = dpo(PAIR, Path("out"), model=model, **changes)
    trainer.train()
    first = next(row for row in trainer.state.log_history if "loss" in row)
    assert abs(first["loss"] - math.log(2)) < 1e-6
    assert abs(first["rewards/margins"]) < 1e-6


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["GRPO", pytest.param("RLOO", marks=pytest.mark.slow)])
def test_a_reward_model_is_not_loaded_by_the_revision_of_base(hub, kind):
    scores = AutoModelForSequenceClassification.from_pretrained(snapshot(OLD), num_labels=1)
    scores.save_pretrained("scores")
    AutoTokenizer.from_pretrained(snapshot(OLD)).save_pretrained("scores")
    into_cache(Path("cache"), "own/scores", "d" * 40, Path("scores"), branch="main")
    trainer = build(kind, PAIR, Path("out"), base_revision="next", reward_funcs="own/scores")
    assert trainer.reward_funcs[0].score.weight.equal(scores.score.weight)
    wanted = load_file(snapshot(NEW) / "model.safetensors")["model.embed_tokens.weight"]
    assert trainer.model.get_input_embeddings().weight.equal(wanted)
    assert trainer.ref_model.get_input_embeddings().weight.equal(wanted)


@pytest.mark.filterwarnings("ignore")
def test_a_generating_trainer_measures_a_loaded_model_from_its_revision(hub):
    model = AutoModelForCausalLM.from_pretrained("own/base", revision="next", dtype=torch.float32)
    trainer = build("GRPO", PAIR, Path("out"), model=model, base_revision="next", max_steps=1)
    trainer.train()
    assert trainer.state.log_history[0]["kl"] == pytest.approx(0, abs=1e-6)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["CPO", pytest.param("ORPO", marks=pytest.mark.slow)])
def test_an_experimental_trainer_loads_the_commit_and_spreads_it_over_no_devices(hub, kind):
    """TRL takes `device_map="auto"` there once it is told anything about loading, with which DDP cannot train."""
    trainer = build(kind, PAIR, Path("out"), base_revision="next", max_steps=1)
    assert trainer.args.model_init_kwargs["device_map"] is None
    wanted = load_file(snapshot(NEW) / "model.safetensors")["model.embed_tokens.weight"]
    assert trainer.model.get_input_embeddings().weight.equal(wanted)
    trainer.train()
    assert read_manifest("out")["base"]["revision"] == NEW


def test_a_loaded_model_that_is_no_longer_main_is_refused(hub):
    model = AutoModelForCausalLM.from_pretrained("own/base")
    assert sft(PAIR, Path("out"), model=model).origins.base.revision == OLD
    hub(NEW)
    with pytest.raises(InputError, match=f"differ from those of own/base@{NEW}"):
        sft(PAIR, Path("out"), model=model)


class Dies(TrainerCallback):
    def on_step_end(self, *args, **kwargs):
        raise KeyboardInterrupt


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def pissa() -> LoraConfig:
    return LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"], init_lora_weights="pissa")


@pytest.mark.parametrize("peft_config", [None, pissa()], ids=["full", "pissa"])
def test_a_run_that_dies_leaves_the_run_before_as_it_was(tmp_path, peft_config):
    pair, other = make_pair(tmp_path / "pair"), make_pair(tmp_path / "other", gap=0.5)
    sft(pair, tmp_path / "out", peft_config=peft_config).train()
    before = files(tmp_path / "out")
    changes = {"graft_overwrite": True, "peft_config": peft_config}
    second = sft((other[1], pair[1]), tmp_path / "out", allow_wide_gap=True, pair_check="headers", **changes)
    second.add_callback(Dies())
    with pytest.raises(KeyboardInterrupt):
        second.train()
    assert files(tmp_path / "out") == before


@pytest.mark.parametrize("peft_config", [None, pissa()], ids=["full", "pissa"])
def test_weights_of_another_run_are_refused_under_a_manifest(tmp_path, peft_config):
    """What a run leaves that is cut off between its weights and its manifest."""
    pair = make_pair(tmp_path / "pair")
    for name, steps in (("one", 1), ("two", 2)):
        sft(pair, tmp_path / name, peft_config=peft_config, max_steps=steps).train()
    weights = "model.safetensors" if peft_config is None else "adapter_model.safetensors"
    shutil.copy(tmp_path / "two" / weights, tmp_path / "one" / weights)
    message = f"1 of {1 if peft_config is None else 2} weight files in .*one are not those"
    sides = {"base": pair[0], "instruct": pair[1]}
    for number, tuned in enumerate((tmp_path / "one", [(tmp_path / "one", 0.5)])):
        with pytest.raises(InputError, match=message):
            graft(**sides, tuned=tuned, output=tmp_path / f"graft{number}", progress=False)
    with pytest.raises(InputError, match=message):
        extract_delta(base=pair[0], tuned=tmp_path / "one", output=tmp_path / "delta", progress=False)
    with pytest.raises(InputError, match=message):
        ShadowSFTTrainer(
            str(tmp_path / "one"), args=ShadowSFTConfig(**settings(tmp_path / "next")), train_dataset=sft_data()
        )
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one", "pair", "two"]


def test_the_start_of_an_adapter_is_bound_to_it_in_each_checkpoint(tmp_path):
    pair = make_pair(tmp_path / "pair")
    options = {"peft_config": pissa(), "save_strategy": "steps", "save_steps": 1}
    sft(pair, tmp_path / "out", **options).train()
    shutil.move(tmp_path / "out" / "checkpoint-1", tmp_path / "alone")
    report = graft(base=pair[0], instruct=pair[1], tuned=tmp_path / "alone", output=tmp_path / "graft", progress=False)
    assert report.grafted
    start = tmp_path / "alone" / "shadow" / "start" / "adapter_model.safetensors"
    save_file({name: value + 1 for name, value in load_file(start).items()}, start)
    with pytest.raises(InputError, match=r"(?s)1 of 2 weight files.*shadow/start/adapter_model.safetensors"):
        graft(base=pair[0], instruct=pair[1], tuned=tmp_path / "alone", output=tmp_path / "again", progress=False)


def test_a_start_that_is_drawn_anew_cannot_be_resumed(tmp_path):
    pair = make_pair(tmp_path / "pair")
    options = {"save_strategy": "steps", "save_steps": 1}
    drawn = LoraConfig(r=2, lora_alpha=2, target_modules=["q_proj", "v_proj"], init_lora_weights="pissa_niter_1")
    for name, config in (("drawn", drawn), ("exact", pissa())):
        sft(pair, tmp_path / name, peft_config=config, **options).train()
    again = sft(pair, tmp_path / "drawn", peft_config=drawn, graft_overwrite=True, seed=4, **options)
    with pytest.raises(AdapterError, match="has another start"):
        again.train(resume_from_checkpoint=str(tmp_path / "drawn" / "checkpoint-1"))
    again = sft(pair, tmp_path / "exact", peft_config=pissa(), graft_overwrite=True, **options)
    again.train(resume_from_checkpoint=str(tmp_path / "exact" / "checkpoint-1"))


def test_a_base_in_pickled_files_that_changed_is_refused(tmp_path):
    pair = make_pair(tmp_path / "pair")
    state = load_file(pair[0] / "model.safetensors")
    (pair[0] / "model.safetensors").unlink()
    torch.save(state, pair[0] / "pytorch_model.bin")
    sft(pair, tmp_path / "out").train()
    digest = xxhash.xxh3_128((pair[0] / "pytorch_model.bin").read_bytes()).hexdigest()
    assert read_manifest(tmp_path / "out")["base"]["digests"] == {"pytorch_model.bin": f"xxh3:{digest}"}
    torch.save({name: value + 1e-3 for name, value in state.items()}, pair[0] / "pytorch_model.bin")
    with pytest.raises(InputError, match=r"has changed since: 1 of 1 .*pytorch_model.bin"):
        ShadowSFTTrainer(
            str(tmp_path / "out"), args=ShadowSFTConfig(**settings(tmp_path / "next")), train_dataset=sft_data()
        )
    report = graft(base=pair[0], instruct=pair[1], tuned=tmp_path / "out", output=tmp_path / "graft", progress=False)
    assert any("with other weights" in text for text in report.warnings)
