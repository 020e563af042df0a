"""Several adapters and checkpoints at once, each with its weight, and adapters in sub-folders."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from adapter_cases import product
from families import LINEAR, family, load, lora

from shadow_trl import extract_delta, graft
from shadow_trl.checkpoints.manifest import read_manifest
from shadow_trl.cli import main
from shadow_trl.errors import AdapterError, CheckpointError, ConfigError
from shadow_trl.grafting.tuned import weighted_sources

FP32 = torch.float32

pytestmark = [
    pytest.mark.filterwarnings("ignore::UserWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning:transformers"),
]


# Several at once


@pytest.mark.parametrize("form", ["model", "adapter"])
def test_several_plain_loras_add_with_their_weights(sides, tmp_path, form):
    one = lora(tmp_path / "one", rank=2, alpha=4)
    two = lora(tmp_path / "two", rank=3, alpha=3, seed=9, modules=("q_proj", "up_proj"))
    report = graft(**sides, tuned=[f"{one}:0.5", (two, -2)], output=tmp_path / "out", format=form)
    names = [name for name in LINEAR if name.split(".")[-2] in ("q_proj", "down_proj", "up_proj")]
    assert (report.form, report.grafted) == (form, len(names))
    before = load(sides["instruct"])
    for name in names:
        wanted = 0.5 * product(one, name, 2.0) - 2 * product(two, name, 1.0)
        if form == "adapter":
            found = product(tmp_path / "out", name, 1.0)
        else:
            found = load(tmp_path / "out")[name].double() - before[name].double()
        assert float((found - wanted).norm() / wanted.norm()) < 1e-5
    manifest = read_manifest(tmp_path / "out")
    assert manifest["tuned"]["source"] == str(one)
    assert manifest["tuned_2"]["source"] == str(two)
    assert manifest["tuned_weights"] == [0.5, -2.0]
    if form == "adapter":
        config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
        assert config["r"] == config["lora_alpha"] == 5
        assert {config["rank_pattern"][name.removesuffix(".weight")] for name in names if "q_proj" not in name} == {
            2,
            3,
        }
        assert config["alpha_pattern"] == config["rank_pattern"]


def test_a_full_checkpoint_and_an_adapter_add(sides, tmp_path):
    tuned, adapter = tmp_path / "models" / "tuned", lora(tmp_path / "one")
    graft(**sides, tuned=[f"{tuned}:0.25", f"{adapter}:2"], output=tmp_path / "out")
    base, full, before = load(sides["base"]), load(tuned), load(sides["instruct"])
    for name, value in load(tmp_path / "out").items():
        delta = 0.25 * (full[name].double() - base[name].double())
        delta = delta + 2 * product(adapter, name, 2.0) if name in LINEAR else delta
        total = before[name].double() + delta
        assert float((value.double() - total).abs().max()) < 1e-7
    with pytest.raises(AdapterError, match="a sum, which has an adapter form for plain LoRAs only"):
        graft(**sides, tuned=[tuned, adapter], output=tmp_path / "out2", format="adapter")


@pytest.mark.parametrize("base_dtype", ["tuned", "bfloat16"])
def test_a_cast_of_base_on_loading_is_no_part_of_a_sum(tmp_path, base_dtype):
    found = family(tmp_path / "models", dtypes=(FP32, FP32, torch.bfloat16))
    adapter = lora(tmp_path / "one")
    tuned = [(found.pop("tuned"), 0.5), (adapter, 2.0)]
    graft(**found, tuned=tuned, output=tmp_path / "out", base_dtype=base_dtype, progress=False)
    base, full, before = load(found["base"]), load(tuned[0][0]), load(found["instruct"])
    for name, value in load(tmp_path / "out").items():
        total = before[name].double() + 0.5 * (full[name].double() - base[name].bfloat16().double())
        total = total + 2 * product(adapter, name, 2.0) if name in LINEAR else total
        assert float((value.double() - total).abs().max()) < 1e-7


def test_weights_on_the_command_line(sides, tmp_path, capsys):
    one = lora(tmp_path / "one")
    argv = ["graft", "--base", str(sides["base"]), "--instruct", str(sides["instruct"]), "--quiet"]
    argv += ["--tuned", f"{one}:0.5", "--tuned", f"{one}:0.5", "--output", str(tmp_path / "twice")]
    assert main(argv) == 0
    graft(**sides, tuned=one, output=tmp_path / "once")
    for name, value in load(tmp_path / "twice").items():
        torch.testing.assert_close(value, load(tmp_path / "once")[name], rtol=1e-6, atol=1e-8)
    with pytest.raises(ConfigError, match="is no weight"):
        weighted_sources([("a", float("nan")), "b"])
    assert weighted_sources("C:/models/a") == [("C:/models/a", 1.0)]


def test_what_is_no_tuned_is_refused_among_several(sides, tmp_path):
    one = lora(tmp_path / "one")
    extract_delta(base=sides["base"], tuned=one, output=tmp_path / "delta", progress=False)
    before = sorted(tmp_path.iterdir())
    with pytest.raises(ConfigError, match="graft --delta"):
        graft(**sides, tuned=[one, f"{tmp_path / 'delta'}:0.5"], output=tmp_path / "new" / "out")
    with pytest.raises(ConfigError, match="None is no folder or hub id"):
        graft(**sides, tuned=[one, None], output=tmp_path / "new" / "out")
    with pytest.raises(CheckpointError, match="no folder gone"):
        graft(**{**sides, "instruct": "gone/"}, tuned=[one, one], output=tmp_path / "new" / "out")
    assert sorted(tmp_path.iterdir()) == before


def test_a_delta_has_no_weight(sides, tmp_path):
    one = lora(tmp_path / "one")
    with pytest.raises(CheckpointError, match=r"there is no folder .*one:0\.5"):
        extract_delta(base=sides["base"], tuned=f"{one}:0.5", output=tmp_path / "delta", progress=False)


def test_adapters_of_two_bases_are_refused(sides, tmp_path):
    one = lora(tmp_path / "one", base_model_name_or_path="a")
    two = lora(tmp_path / "two", base_model_name_or_path="b")
    with pytest.raises(ConfigError, match=r"2 bases\.\n  a\n  b"):
        graft(instruct=sides["instruct"], tuned=[one, two], output=tmp_path / "out", progress=False)
    with pytest.raises(ConfigError, match=r"2 bases\.\n  a\n  not known(.*)give base"):
        graft(instruct=sides["instruct"], tuned=[one, sides["base"]], output=tmp_path / "out", progress=False)


# Folders


def test_an_adapter_is_named_within_its_folder(sides, tmp_path):
    folder = tmp_path / "several"
    lora(folder / "french")
    lora(folder / "german")
    with pytest.raises(AdapterError, match=r"2 adapters in sub-folders(.|\n)*  french\n  german\nName one"):
        graft(**sides, tuned=folder, output=tmp_path / "out")
    report = graft(**sides, tuned=folder / "german", output=tmp_path / "out")
    assert not any("further adapters" in warning for warning in report.warnings)
    for path in (folder / "german").iterdir():
        shutil.copy(path, folder / path.name)
    lora(folder / "grafted", base_model_name_or_path="instruct")  # of another model: a run's own result
    lora(folder / "checkpoint-5")
    report = graft(**sides, tuned=folder, output=tmp_path / "out2")
    assert any("further adapters, which are not grafted: french, german." in warning for warning in report.warnings)


def test_full_checkpoints_that_name_no_base_need_one(sides, tmp_path):
    tuned = [(tmp_path / "models" / "tuned", 0.5), (sides["base"], 0.5)]
    with pytest.raises(ConfigError, match=r"base is missing(.|\n)*Nothing was written"):
        graft(instruct=sides["instruct"], tuned=tuned, output=tmp_path / "out", progress=False)
    assert not (tmp_path / "out").exists()
