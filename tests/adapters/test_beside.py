"""Where a result loads from: dense beside its adapter with a local INSTRUCT, an adapter with one from the hub."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import huggingface_hub
import pytest
import torch
from adapter_cases import adapter_delta, adapter_on, error, weights_of
from families import load
from hub_cache import into_cache
from peft import LoraConfig
from runs import LORA
from tiny import make_pair
from transformers import AutoModelForCausalLM

from shadow_trl import graft, verify
from shadow_trl.checkpoints.manifest import read_manifest
from shadow_trl.evaluation.models import load as load_to_score

OLD, NEW = "a" * 40, "b" * 40


@pytest.fixture(scope="module")
def adapter(tied_pair, tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained") / "adapter"
    adapter_on(tied_pair, folder, LoraConfig(**LORA))
    return folder


def test_a_dense_graft_has_its_adapter_beside_it(tied_pair, adapter, tmp_path):
    out = tmp_path / "out"
    report = graft(base=tied_pair[0], instruct=tied_pair[1], tuned=adapter, output=out, progress=False)
    assert (report.form, report.beside) == ("model", "adapter")
    assert f"The same as an adapter for instruct: {out / 'adapter'}" in report.text()
    # Nothing of it is rounded: on INSTRUCT it adds what the trained adapter adds to BASE.
    assert error(adapter_delta(tied_pair[1], out / "adapter"), adapter_delta(tied_pair[0], adapter)) < 1e-7
    assert not (out / "adapter" / "config.json").exists()
    assert read_manifest(out / "adapter")["form"] == "adapter"
    assert all(verify(folder, progress=False).same for folder in (out, out / "adapter"))
    graft(base=tied_pair[0], instruct=tied_pair[1], tuned=adapter, output=out, overwrite=True, progress=False)
    (out / "adapter" / "adapter_config.json").write_text("{}")
    assert any("adapter/" in what for what in verify(out, progress=False).not_compared)


def test_a_dense_graft_loads_from_anywhere(adapter, tmp_path, monkeypatch):
    pair = make_pair(tmp_path / "pair", gap=0.3)
    monkeypatch.chdir(tmp_path)
    graft(base="pair/base", instruct="pair/instruct", tuned=adapter, output="out", progress=False)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    shutil.move(pair[1], tmp_path / "moved")
    found = weights_of(AutoModelForCausalLM.from_pretrained("../out"))
    stored = load(tmp_path / "out")
    assert all(torch.equal(found[name], value) for name, value in stored.items())


@pytest.mark.parametrize(
    ("options", "beside"),
    [
        ({"dtype": "bfloat16", "rounding": "stochastic"}, True),  # of the dense form alone
        ({"format": "model"}, False),
        ({"format": "adapter"}, False),
        ({"instruct_scale": 0.9}, False),
        ({"modules": "layers.0"}, False),
    ],
)
def test_there_is_one_where_it_is_the_same_graft(tied_pair, adapter, tmp_path, options, beside):
    out = tmp_path / "out"
    graft(base=tied_pair[0], instruct=tied_pair[1], tuned=adapter, output=out, progress=False, **options)
    assert (out / "adapter").is_dir() == beside


def test_the_call_in_the_card_loads_the_commit_that_was_grafted(tied_pair, adapter, tmp_path, monkeypatch):
    other = make_pair(tmp_path / "other", gap=0.9)[1]
    cache = tmp_path / "cache"
    into_cache(cache, "own/instruct", OLD, tied_pair[1], branch="main")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr("transformers.utils.hub.constants.HF_HUB_CACHE", str(cache))
    report = graft(base=tied_pair[0], instruct="own/instruct", tuned=adapter, output=tmp_path / "out", progress=False)
    assert report.form == "adapter"
    assert not (tmp_path / "out" / "adapter").exists()
    into_cache(cache, "own/instruct", NEW, other, branch="main")  # main has moved
    code = re.search(r"```python\n(.*?)```", (tmp_path / "out/README.md").read_text(), re.DOTALL)[1]
    assert report.load in code.replace("FOLDER", str(tmp_path / "out"))
    names: dict = {}
    exec(code.replace("FOLDER", str(tmp_path / "out")), names)
    before = load(tied_pair[1])["model.embed_tokens.weight"]
    for model in (names["model"].base_model.model, load_to_score(tmp_path / "out", dtype="float32")):
        assert torch.equal(model.get_input_embeddings().weight, before)
        lora = [value for name, value in model.named_parameters() if "lora_B" in name]
        assert lora
        assert all(value.any() for value in lora)


@pytest.mark.parametrize(("task", "vision"), [("CAUSAL_LM", True), (None, False)])
def test_the_call_names_instruct_where_peft_cannot_tell_its_class(tmp_path, task, vision):
    from shadow_trl.checkpoints.checkpoint import Checkpoint
    from shadow_trl.results.usage import loading_call

    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "task_type": task}))
    kind = "AutoModelForImageTextToText" if vision else "AutoModelForCausalLM"
    config = {"vision_config": {}} if vision else {}
    hub = Checkpoint("own/instruct", OLD, Path(), config=config)
    assert loading_call(tmp_path, hub) == (
        f'PeftModel.from_pretrained({kind}.from_pretrained("own/instruct", revision="{OLD}"), "FOLDER")'
    )
    local = Checkpoint(str(tmp_path), None, tmp_path, config=config)
    assert str(tmp_path) not in loading_call(tmp_path, local)
