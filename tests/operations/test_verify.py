"""`verify`: a graft is recognised, and whatever was changed about it is named."""

from __future__ import annotations

import json
import os
import shutil

import pytest
import torch
from families import family, load, lora, moved, write
from safetensors.torch import load_file, save_file
from tiny import make_pair

from shadow_trl import extract_delta, graft, verify
from shadow_trl.checkpoints.manifest import read_manifest
from shadow_trl.cli import main
from shadow_trl.errors import CheckpointError, ConfigError, GraftError, InputError
from shadow_trl.results import shard_writer
from shadow_trl.runtime import machine

BF16, FP32 = torch.bfloat16, torch.float32
NAME = "model.layers.1.mlp.up_proj.weight"


@pytest.fixture
def sides(tmp_path):
    return family(tmp_path, dtypes=(BF16, BF16, FP32), shards=(1, 2, 1), delta=1e-3)


def run(sides, output, **options):
    return graft(**sides, output=output, progress=False, **options)


def check(folder, **sides):
    return verify(folder, progress=False, **sides)


def edit(path, change):
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"scale": 0.3, "modules": ["q_proj", "norm"], "rounding": "stochastic", "seed": 7},
        {"dtype": "float32", "instruct_scale": 0.5, "max_shard_size": 1000},
        {"base_dtype": "bfloat16", "digest": "none", "stats": False},
    ],
)
def test_a_graft_is_that_graft(tmp_path, sides, options):
    run(sides, tmp_path / "out", **options)
    before = sorted(tmp_path.rglob("*"))
    for given in ({}, sides):
        report = check(tmp_path / "out", **given)
        assert report.same
        assert report.compared == len(load(sides["instruct"]))
        assert "is that graft" in report.text()
    assert sorted(tmp_path.rglob("*")) == before


def test_no_weight_is_written_to_be_compared(tmp_path, sides, monkeypatch):
    """Nor does the disk need room for one."""
    run(sides, tmp_path / "out")
    most = sum(path.stat().st_size for path in (tmp_path / "out").glob("*.safetensors")) // 2
    monkeypatch.setattr(machine, "free_bytes", lambda path: most)
    monkeypatch.setattr(shard_writer.ShardWriter, "write", None)
    assert check(tmp_path / "out").same
    with pytest.raises(GraftError, match=r"needs .* bytes and the disk of"):
        run(sides, tmp_path / "again")


def test_a_flipped_bit_is_named(tmp_path, sides):
    run(sides, tmp_path / "out")
    path = next(path for path in sorted((tmp_path / "out").glob("*.safetensors")) if NAME in load_file(path))
    tensors = load_file(path)
    before = tensors[NAME][3, 5].item()
    tensors[NAME].view(torch.int16)[3, 5] ^= 1
    save_file(tensors, path, metadata={"format": "pt", "note": "x"})
    report = check(tmp_path / "out")
    step = abs(tensors[NAME][3, 5].item() - before)
    assert report.weights == {NAME: f"1 of 192 values, by at most {step:.3g}"}
    assert not report.files
    assert not report.digests
    assert "1 of 20 weights differ" in report.text()
    assert NAME in report.text()


def test_the_sign_of_a_zero_and_nan_count(tmp_path, sides):
    run(sides, tmp_path / "out", max_shard_size="1GB")
    weights = load(tmp_path / "out")
    weights["model.norm.weight"][0] = float("nan")
    weights[NAME][0, 0] = float("inf")
    save_file(weights, tmp_path / "out" / "model.safetensors", metadata={"format": "pt"})
    report = check(tmp_path / "out")
    assert report.weights["model.norm.weight"] == "1 of 8 values, by at most inf"
    assert report.weights[NAME] == "1 of 192 values, by at most inf"
    run(sides, tmp_path / "zero", scale=0.0, max_shard_size="1GB")
    weights = load(tmp_path / "zero")
    instruct = load(sides["instruct"])
    instruct["model.norm.weight"][1] = 0.0
    weights["model.norm.weight"][1] = -0.0
    sides["instruct"] = write(tmp_path / "instruct2", instruct)
    save_file(weights, tmp_path / "zero" / "model.safetensors", metadata={"format": "pt"})
    assert check(tmp_path / "zero", instruct=sides["instruct"]).weights == {
        "model.norm.weight": "1 of 8 values, by at most 0"
    }


def test_another_tuned_is_named_by_its_digest_and_its_weights(tmp_path, sides):
    run(sides, tmp_path / "out")
    other = write(tmp_path / "other", moved(load(sides["tuned"]), 9, 1e-2))
    report = check(tmp_path / "out", tuned=other)
    assert report.digests == ["tuned: model.safetensors"]
    assert len(report.weights) == report.compared
    run(sides, tmp_path / "bare", digest="none")
    report = check(tmp_path / "bare", tuned=other)
    assert not report.digests
    assert len(report.weights) == report.compared


def test_equal_weights_in_another_file_are_other_inputs(tmp_path, sides):
    run(sides, tmp_path / "out")
    other = write(tmp_path / "other", load(sides["tuned"]), shards=2)
    report = check(tmp_path / "out", tuned=other)
    assert not report.weights
    assert report.digests == ["tuned: model.safetensors"]
    assert not report.same


def test_another_scale_in_the_manifest_is_another_graft(tmp_path, sides):
    run(sides, tmp_path / "out", scale=0.5)
    edit(tmp_path / "out" / "shadow.json", lambda content: content["options"].update(scale=0.6))
    report = check(tmp_path / "out")
    assert report.weights
    assert not report.files


def test_changed_missing_and_added_files_are_named(tmp_path):
    base, instruct = make_pair(tmp_path, dtype=BF16)
    run({"base": base, "instruct": instruct, "tuned": base}, tmp_path / "out")
    assert check(tmp_path / "out").same
    edit(tmp_path / "out" / "tokenizer_config.json", lambda content: content.update(eos_token="<|pad|>"))
    edit(tmp_path / "out" / "config.json", lambda content: content.update(rope_theta=1.0))
    (tmp_path / "out" / "generation_config.json").unlink()
    (tmp_path / "out" / "modeling_x.py").write_text("x")
    (tmp_path / "out" / "README.md").write_text("another card")
    report = check(tmp_path / "out")
    assert not report.weights
    assert report.files == [
        "generation_config.json  missing", "config.json  changed", "tokenizer_config.json  changed",
        "modeling_x.py  not of the graft", "README.md  changed",
    ]  # fmt: skip
    assert report.equal == ["chat_template.jinja", "tokenizer.json"]
    (tmp_path / "out" / "README.md").unlink()
    assert check(tmp_path / "out").files[-1] == "README.md  missing"


def test_index_and_header_metadata_are_compared(tmp_path, sides):
    run(sides, tmp_path / "out")
    index = tmp_path / "out" / "model.safetensors.index.json"
    whole = index.read_text()
    edit(index, lambda content: content["metadata"].update(total_size=1))
    assert check(tmp_path / "out").files == ["model.safetensors.index.json  changed"]
    index.write_text(whole)
    shard = tmp_path / "out" / "model-00001-of-00002.safetensors"
    save_file(load_file(shard), shard, metadata={"format": "pt", "note": "y"})
    save_file({}, tmp_path / "out" / "model-00003-of-00002.safetensors")
    assert check(tmp_path / "out").files == [
        f"{shard.name}  changed",
        "model-00003-of-00002.safetensors  not of the graft",
    ]


@pytest.mark.parametrize("size", ["1GB", 600])
def test_another_spread_over_files_is_another_result(tmp_path, sides, size):
    run(sides, tmp_path / "out", max_shard_size=size)
    assert check(tmp_path / "out").same
    edit(tmp_path / "out" / "shadow.json", lambda content: content["options"].update(max_shard_size=None))
    report = check(tmp_path / "out")
    assert not report.weights
    assert any(row.startswith("model") for row in report.files)


FIGURES = {
    "sigma": lambda content: content.update(sigma=content["sigma"] * 1.001),
    "delta_norm": lambda content: content.update(delta_norm=None),
    "realised": lambda content: content.pop("realised"),
    "grafted": lambda content: content.update(grafted=content["grafted"] - 1),
    "by_kind.norm.elements": lambda content: content["by_kind"]["norm"].update(elements=1),
    "left_out": lambda content: content.update(left_out=["x"]),
    "score": lambda content: content.update(score=99.9),
    "options.rounds": lambda content: content["options"].update(rounds=3),
}


@pytest.mark.parametrize("name", FIGURES)
def test_figures_of_the_manifest_are_compared(tmp_path, name):
    sides = family(tmp_path)
    run(sides, tmp_path / "out")
    edit(tmp_path / "out" / "shadow.json", FIGURES[name])
    report = check(tmp_path / "out")
    assert [row.split("  ")[0] for row in report.figures] == [name]
    assert not report.same
    assert not report.files
    assert not report.weights


def test_it_says_what_it_compared(tmp_path):
    sides = family(tmp_path, LICENSE="x")
    run(sides, tmp_path / "out")
    text = check(tmp_path / "out").text()
    assert "20 weights, the figures of shadow.json and LICENSE, config.json, README.md are equal." in text
    assert "Not compared: warnings, versions and paths in shadow.json. The inputs were compared by" in text
    edit(tmp_path / "out" / "shadow.json", lambda content: content.pop("card"))
    text = check(tmp_path / "out").text()
    assert "config.json are equal. Not compared" in text
    assert "README.md, of which shadow.json has no digest" in text


def test_missing_added_and_reshaped_weights_are_named(tmp_path, sides):
    run(sides, tmp_path / "out", max_shard_size="1GB")
    weights = load(tmp_path / "out")
    del weights["model.norm.weight"]
    weights["model.extra.weight"] = torch.zeros(3)
    weights[NAME] = weights[NAME].float()
    save_file(weights, tmp_path / "out" / "model.safetensors", metadata={"format": "pt"})
    assert check(tmp_path / "out").weights == {
        "model.extra.weight": "not in the graft",
        NAME: "F32 [24, 8] instead of BF16 [24, 8]",
        "model.norm.weight": "missing in the folder",
    }


def test_a_graft_of_a_delta_and_through_a_delta(tmp_path):
    sides = family(tmp_path)
    extract_delta(base=sides["base"], tuned=sides["tuned"], output=tmp_path / "delta", progress=False)
    graft(instruct=sides["instruct"], delta=tmp_path / "delta", output=tmp_path / "one", progress=False)
    run(sides, tmp_path / "two")
    assert check(tmp_path / "one").same
    assert check(tmp_path / "one", base=sides["base"], tuned=sides["tuned"]).same
    assert check(tmp_path / "two", delta=tmp_path / "delta").same
    other = write(tmp_path / "other", moved(load(sides["tuned"]), 9, 1e-2))
    extract_delta(base=sides["base"], tuned=other, output=tmp_path / "delta2", progress=False)
    report = check(tmp_path / "one", delta=tmp_path / "delta2")
    assert report.digests == ["delta: delta.safetensors"]
    assert report.weights


def test_the_adapter_form(tmp_path):
    sides = family(tmp_path)
    adapter = lora(tmp_path / "lora", base_model_name_or_path=str(sides["base"]))
    run({**sides, "tuned": adapter}, tmp_path / "out", format="adapter", scale=0.5)
    assert check(tmp_path / "out").same
    weights = load(tmp_path / "out")
    name = next(iter(weights))
    weights[name][0, 0] += 1.0
    save_file(weights, tmp_path / "out" / "adapter_model.safetensors", metadata={"format": "pt"})
    edit(tmp_path / "out" / "adapter_config.json", lambda content: content.update(lora_alpha=99))
    report = check(tmp_path / "out")
    assert list(report.weights) == [name]
    assert report.files == ["adapter_config.json  changed"]
    run({**sides, "tuned": adapter}, tmp_path / "dense", format="model")
    assert check(tmp_path / "dense").same


def test_sources_are_found_from_here_and_from_the_folder(tmp_path, sides, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run({role: os.path.relpath(folder) for role, folder in sides.items()}, "out")
    assert check("out").same
    monkeypatch.chdir(tmp_path / "out")
    with pytest.raises(CheckpointError, match="neither a folder here"):
        check(".")
    for role in sides:
        shutil.copytree(tmp_path / role, tmp_path / "out" / "inputs" / role)
    edit(tmp_path / "out" / "shadow.json", lambda content: [
        content[role].update(source=f"inputs/{role}") for role in sides
    ])  # fmt: skip
    monkeypatch.chdir(tmp_path)
    # The inputs lie in the folder now, as no graft has them; the weights are found and equal.
    report = check("out")
    assert not report.weights
    assert not report.digests
    assert all("not of the graft" in row for row in report.files)


def test_a_sum_is_found_again_and_by_name(tmp_path):
    sides = family(tmp_path, dtypes=(FP32,) * 3)
    one, two = (lora(tmp_path / name, seed=seed) for name, seed in (("one", 5), ("two", 6)))
    run({**sides, "tuned": [f"{one}:0.5", (two, 0.25)]}, tmp_path / "out")
    run({**sides, "tuned": f"{one}:0.5"}, tmp_path / "single")
    assert check(tmp_path / "out").same
    for place in (one, two):
        place.rename(place.with_name(f"{place.name}-moved"))
    one, two = tmp_path / "one-moved", tmp_path / "two-moved"
    assert check(tmp_path / "out", tuned=[f"{one}:0.5", (two, 0.25)]).same
    assert check(tmp_path / "single", tuned=(one, 0.5)).same
    assert main(["verify", str(tmp_path / "out"), "--tuned", f"{one}:0.5", "--tuned", f"{two}:0.25", "--quiet"]) == 0
    found = check(tmp_path / "out", tuned=[(two, 0.25), (one, 0.5)])
    assert found.digests == ["tuned: adapter_model.safetensors", "tuned_2: adapter_model.safetensors"]


def test_what_is_no_graft_is_refused(tmp_path, sides):
    with pytest.raises(CheckpointError, match=r"is not a graft: it has no shadow\.json"):
        check(sides["tuned"])
    extract_delta(base=sides["base"], tuned=sides["tuned"], output=tmp_path / "delta", progress=False)
    with pytest.raises(ConfigError, match="is a delta, not a model"):
        check(tmp_path / "delta")
    run(sides, tmp_path / "out")
    with pytest.raises(ConfigError, match="either tuned or delta"):
        check(tmp_path / "out", tuned="x", delta="y")
    edit(tmp_path / "out" / "shadow.json", lambda content: content.pop("instruct"))
    with pytest.raises(InputError, match="names no instruct"):
        check(tmp_path / "out")


def test_exit_codes_and_output(tmp_path, sides, capsys):
    run(sides, tmp_path / "out", max_shard_size="1GB")
    folder = str(tmp_path / "out")
    given = [word for role, place in sides.items() for word in (f"--{role}", str(place))]
    assert main(["verify", folder, *given]) == 0
    assert capsys.readouterr().out.count("\n") == 1
    assert main(["verify", folder, "--quiet"]) == 0
    assert capsys.readouterr().out == ""
    weights = load(tmp_path / "out")
    weights[NAME].view(torch.int16)[0, 0] ^= 1
    save_file(weights, tmp_path / "out" / "model.safetensors", metadata={"format": "pt"})
    assert main(["verify", folder, "--quiet"]) == 1
    assert NAME in capsys.readouterr().out
    assert main(["verify", folder, "--json"]) == 1
    assert json.loads(capsys.readouterr().out)["same"] is False
    assert main(["verify", str(sides["base"])]) == 2
    assert read_manifest(tmp_path / "out")["kind"] == "graft"
