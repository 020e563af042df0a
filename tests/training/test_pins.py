"""What is on the hub stays what it was when it was loaded: its branches move, the delta does not."""

from __future__ import annotations

from pathlib import Path

import huggingface_hub
import pytest
from hub_cache import into_cache
from runs import lora, settings, sft
from safetensors.torch import load_file
from tiny import make_pair, sft_data
from transformers import AutoModelForCausalLM

from shadow_trl import ShadowSFTConfig, ShadowSFTTrainer, graft
from shadow_trl.checkpoints.manifest import read_manifest
from shadow_trl.errors import InputError

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


def test_a_loaded_model_that_is_no_longer_main_is_refused(hub):
    model = AutoModelForCausalLM.from_pretrained("own/base")
    assert sft(PAIR, Path("out"), model=model).origins.base.revision == OLD
    hub(NEW)
    with pytest.raises(InputError, match=f"differ from those of own/base@{NEW}"):
        sft(PAIR, Path("out"), model=model)
