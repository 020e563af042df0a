from __future__ import annotations

import itertools
import json
import os

import pytest
import torch
import xxhash
from families import CONFIG, LINEAR, family, load, moved, shapes, tensors, write
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from oracle import exact, round_exact
from safetensors import safe_open
from safetensors.torch import save_file

from shadow_trl import graft
from shadow_trl.checkpoints.manifest import read_manifest
from shadow_trl.errors import CheckpointError, ConfigError, GraftError, InputError, OutputExistsError, PairMismatchError
from shadow_trl.grafting import stream as streaming
from shadow_trl.operations import graft as operations
from shadow_trl.operations.checks import check_graft

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


def run(sides, output, **options):
    return graft(**sides, output=output, progress=False, **options)


def expected(sides, dtype=None, scale=1.0):
    """The graft summed in float64; exact for these numbers, and far from ties of the output."""
    base, instruct, tuned = (load(sides[role]) for role in ("base", "instruct", "tuned"))
    found = {}
    for name, value in instruct.items():
        total = value.double() + scale * (tuned[name].double() - base[name].double())
        found[name] = total.to(FP32).to(dtype or value.dtype)
    return found


def assert_equal(found, wanted):
    assert set(found) == set(wanted)
    for name, value in wanted.items():
        assert found[name].dtype == value.dtype, name
        assert torch.equal(found[name], value), name


# --- values and files ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtypes", [(BF16, BF16, BF16), (BF16, BF16, FP32), (FP32, FP32, FP32), (BF16, FP16, FP32)])
@pytest.mark.parametrize("scale", [1.0, 0.5])
def test_every_weight_is_the_sum(tmp_path, dtypes, scale):
    sides = family(tmp_path, dtypes=dtypes, shards=(1, 2, 3))
    report = run(sides, tmp_path / "out", scale=scale)
    assert_equal(load(tmp_path / "out"), expected(sides, scale=scale))
    assert (report.form, report.grafted, report.copied) == ("model", len(shapes()), 0)


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    dtypes=st.tuples(*[st.sampled_from([BF16, FP16, FP32])] * 3),
    output=st.sampled_from(["auto", "float32", "bfloat16", "float16"]),
    shards=st.tuples(*[st.integers(1, 4)] * 3),
    scale=st.sampled_from([1.0, 0.0, -1.0, 0.3]),
    size=st.sampled_from([None, 1, 700, "1KB", "1GB"]),
)
def test_random_families_are_the_sum_in_float64_rounded_once(tmp_path_factory, dtypes, output, shards, scale, size):
    root = tmp_path_factory.mktemp("family")
    sides = family(root, dtypes=dtypes, shards=shards)
    run(sides, root / "out", dtype=output, scale=scale, max_shard_size=size, digest="none")
    base, instruct, tuned = (load(sides[role]) for role in ("base", "instruct", "tuned"))
    for name, found in load(root / "out").items():
        assert found.dtype == (instruct[name].dtype if output == "auto" else getattr(torch, output))
        total = instruct[name].double() + scale * (tuned[name].double() - base[name].double())
        assert exact(found) == [round_exact(value, found.dtype) for value in exact(total)], name


def test_files_and_headers_are_those_of_instruct(tmp_path):
    sides = family(tmp_path, shards=(1, 3, 2))
    run(sides, tmp_path / "out")
    names = sorted(path.name for path in sides["instruct"].glob("*.safetensors*"))
    assert sorted(path.name for path in (tmp_path / "out").glob("*.safetensors*")) == names
    for name in names:
        before, after = (sides["instruct"] / name).read_bytes(), (tmp_path / "out" / name).read_bytes()
        if name.endswith(".json"):
            assert after == before
        else:
            length = 8 + int.from_bytes(before[:8], "little")
            assert after[:length] == before[:length]
            assert len(after) == len(before)


def test_another_dtype_keeps_shards_order_and_metadata(tmp_path):
    sides = family(tmp_path, shards=(1, 2, 1))
    run(sides, tmp_path / "out", dtype="float32")
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == 4 * sum(torch.Size(shape).numel() for shape in shapes().values())
    for path in sides["instruct"].glob("*.safetensors"):
        with safe_open(path, "pt") as before, safe_open(tmp_path / "out" / path.name, "pt") as after:
            assert list(after.keys()) == list(before.keys())
            assert after.metadata() == before.metadata() == {"format": "pt", "note": "x"}


@pytest.mark.parametrize(("size", "files"), [("1GB", 1), (576, None), (1, len(shapes()))])
def test_shards_are_repacked(tmp_path, size, files):
    sides = family(tmp_path, shards=(1, 2, 1))
    run(sides, tmp_path / "out", max_shard_size=size)
    paths = sorted((tmp_path / "out").glob("*.safetensors"))
    assert_equal(load(tmp_path / "out"), expected(sides))
    if files:
        assert len(paths) == files
    assert (tmp_path / "out" / "model.safetensors.index.json").exists() == (len(paths) > 1)
    sizes, weight_map = [], {}
    for number, path in enumerate(paths, start=1):
        whole = f"model-{number:05d}-of-{len(paths):05d}.safetensors"
        assert path.name == ("model.safetensors" if len(paths) == 1 else whole)
        content = path.read_bytes()
        length = int.from_bytes(content[:8], "little")
        header = json.loads(content[8 : 8 + length])
        assert header.pop("__metadata__") == {"format": "pt"}
        data = len(content) - 8 - length
        assert size == 1 or data <= (size if isinstance(size, int) else 10**9) or len(header) == 1
        weight_map |= dict.fromkeys(header, path.name)
        ranges = sorted(entry["data_offsets"] for entry in header.values())
        sizes.append([stop - start for start, stop in ranges])
    # A file ends only where the next weight has no room.
    assert all(sum(one) + other[0] > size for one, other in itertools.pairwise(sizes))
    if len(paths) > 1:
        index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
        assert index == {"metadata": {"total_size": sum(map(sum, sizes))}, "weight_map": weight_map}


def test_a_bin_instruct_becomes_safetensors(tmp_path):
    sides = family(tmp_path)
    weights, wanted = load(sides["instruct"]), expected(sides)
    (sides["instruct"] / "model.safetensors").unlink()
    names = list(weights)
    weight_map = {name: f"pytorch_model-0000{1 + (n > 5)}-of-00002.bin" for n, name in enumerate(names)}
    for file in set(weight_map.values()):
        torch.save({name: weights[name] for name in names if weight_map[name] == file}, sides["instruct"] / file)
    (sides["instruct"] / "pytorch_model.bin.index.json").write_text(
        json.dumps({"metadata": {}, "weight_map": weight_map})
    )
    run(sides, tmp_path / "out")
    assert_equal(load(tmp_path / "out"), wanted)
    assert not list((tmp_path / "out").glob("*.bin*"))
    for file in (tmp_path / "out").glob("*.safetensors"):
        with safe_open(file, "pt") as opened:
            assert opened.metadata() == {"format": "pt"}  # without it transformers loads none
    assert set(json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())["weight_map"]) == set(names)


def test_an_odd_header_length_does_not_matter(tmp_path, monkeypatch):
    """Old files do not pad their header: tensors begin at odd bytes, elements straddle chunks."""
    monkeypatch.setattr(streaming, "CHUNK", 4096)
    sides = family(tmp_path)
    path = sides["instruct"] / "model.safetensors"
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = content[8 : 8 + length].rstrip() + b" "
    header += b" " * ((len(header) + 1) % 2)
    path.write_bytes(len(header).to_bytes(8, "little") + header + content[8 + length :])
    assert len(header) % 2 == 1
    run(sides, tmp_path / "out")
    assert (tmp_path / "out" / "model.safetensors").stat().st_size == path.stat().st_size > 4096
    assert_equal(load(tmp_path / "out"), expected(sides))


def test_chunks_blocks_and_threads_do_not_change_the_bytes(tmp_path, monkeypatch):
    sides = family(tmp_path, dtypes=(BF16, BF16, FP32))
    for rounding in ("nearest", "stochastic"):
        wanted = None
        for chunk, block, cores in ((4 * 2**20, 2**18, 3), (4096, 1000, 2), (4096, 77, 1)):
            monkeypatch.setattr(streaming, "CHUNK", chunk)
            monkeypatch.setattr(streaming, "BLOCK", max(block, 1))
            monkeypatch.setattr(os, "sched_getaffinity", lambda process, cores=cores: set(range(cores)))
            run(sides, tmp_path / "out", rounding=rounding, seed=7, overwrite=True, digest="none")
            found = (tmp_path / "out" / "model.safetensors").read_bytes()
            wanted = wanted or found
            assert found == wanted


def test_stochastic_rounding_follows_the_seed_not_the_shards(tmp_path):
    sides = family(tmp_path, dtypes=(BF16, BF16, FP32), delta=1e-5)
    outputs = {}
    for name, options in (
        ("a", {}),
        ("b", {"max_shard_size": 500}),
        ("c", {"seed": 1}),
        ("d", {"rounding": "nearest"}),
    ):
        run(sides, tmp_path / name, **{"rounding": "stochastic", **options})
        outputs[name] = load(tmp_path / name)
    assert_equal(outputs["b"], outputs["a"])
    for other in ("c", "d"):
        assert any(not torch.equal(outputs["a"][name], outputs[other][name]) for name in shapes())


def test_overwriting_keeps_files_of_the_user(tmp_path):
    sides = family(tmp_path)
    run(sides, tmp_path / "out")
    run(sides, tmp_path / "out", overwrite=True)
    (tmp_path / "out" / "results.json").write_text("{}")
    with pytest.raises(OutputExistsError, match=r"1 files that the graft in it did not write.*\n  results\.json\n"):
        run(sides, tmp_path / "out", overwrite=True)
    assert (tmp_path / "out" / "results.json").exists()


def test_two_grafts_to_one_output_keep_the_first(tmp_path, monkeypatch):
    sides, real = family(tmp_path), operations.check_result

    def late(*given):
        monkeypatch.setattr(operations, "check_result", real)
        with pytest.raises(OutputExistsError, match="is writing to"):
            run(sides, tmp_path / "out", scale=2.0)
        real(*given)

    monkeypatch.setattr(operations, "check_result", late)
    run(sides, tmp_path / "out")
    assert read_manifest(tmp_path / "out")["options"]["scale"] == 1.0
    assert not list(tmp_path.glob(".*"))


def test_small_files_are_instructs(tmp_path):
    extra = {
        "tokenizer_DOT_json": '{"a":  1}', "chat_template_DOT_jinja": "{{ x }}", "generation_config_DOT_json": "{ }",
        "preprocessor_config_DOT_json": "{}", "LICENSE": "text", "README_DOT_md": "old", "training_args_DOT_bin": "x",
        "trainer_state_DOT_json": "{}", "optimizer_DOT_pt": "x", "model_DOT_gguf": "x", "_DOT_hidden": "x",
        "notes_DOT_py": "x",
    }  # fmt: skip
    sides = family(tmp_path, **extra)
    templates = sides["instruct"] / "additional_chat_templates"
    templates.mkdir()
    (templates / "tool.jinja").write_text("t")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("shadow_trl.grafting.inputs.ModelPair.check", lambda self, **options: [])
        run(sides, tmp_path / "out")
    names = sorted(str(path.relative_to(tmp_path / "out")) for path in (tmp_path / "out").rglob("*") if path.is_file())
    assert names == [
        "LICENSE", "README.md", "additional_chat_templates/tool.jinja", "chat_template.jinja", "config.json",
        "generation_config.json", "model.safetensors", "preprocessor_config.json", "shadow.json", "tokenizer.json",
    ]  # fmt: skip
    for name in names:
        if name not in ("README.md", "model.safetensors", "shadow.json"):
            assert (tmp_path / "out" / name).read_bytes() == (sides["instruct"] / name).read_bytes()
    assert "grafted" in (tmp_path / "out" / "README.md").read_text()


def test_the_config_states_the_dtype_that_was_written(tmp_path):
    config = {**CONFIG, "vision_config": {"torch_dtype": "bfloat16", "depth": 2}, "rope_scaling": {"type": "x"}}
    base = tensors(0)
    sides = {
        role: write(tmp_path / role, moved(base, n, 1e-3), config=config)
        for n, role in enumerate(("base", "instruct", "tuned"))
    }
    run(sides, tmp_path / "same")
    assert (tmp_path / "same" / "config.json").read_bytes() == (sides["instruct"] / "config.json").read_bytes()
    run(sides, tmp_path / "out", dtype="float32")
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert written["dtype"] == written["vision_config"]["torch_dtype"] == "float32"
    assert {**written, "dtype": 0, "vision_config": 0} == {**config, "dtype": 0, "vision_config": 0}


def test_the_manifest_says_what_was_done(tmp_path):
    sides = family(tmp_path)
    report = run(sides, tmp_path / "out", scale=0.5, modules=["q_proj", "norm"])
    manifest = read_manifest(tmp_path / "out")
    assert manifest["kind"] == "graft"
    assert manifest["tuned"]["source"] == str(sides["tuned"])
    assert manifest["options"]["modules"] == ["q_proj", "norm"]
    assert manifest["options"]["scale"] == 0.5
    assert manifest["sigma"] == report.sigma
    digest = xxhash.xxh3_128_hexdigest((sides["tuned"] / "model.safetensors").read_bytes())
    assert manifest["tuned"]["digests"]["model.safetensors"] == f"xxh3:{digest}"
    run(sides, tmp_path / "bare", digest="none", stats=False)
    bare = read_manifest(tmp_path / "bare")
    assert bare["tuned"]["digests"] is None
    assert bare["sigma"] is None


# --- selections and special scales ---------------------------------------------------------------------------------


def test_linear_selects_the_weights_of_seven_projections(tmp_path):
    sides = family(tmp_path)
    report = run(sides, tmp_path / "out", modules="linear")
    found, instruct, wanted = load(tmp_path / "out"), load(sides["instruct"]), expected(sides)
    assert report.grafted == len(LINEAR) == 14
    assert report.copied == len(shapes()) - 14
    assert_equal(found, {name: (wanted if name in LINEAR else instruct)[name] for name in shapes()})


def test_regular_expressions_select(tmp_path):
    sides = family(tmp_path)
    assert run(sides, tmp_path / "a", modules=r"layers\.1\.").grafted == 9
    assert run(sides, tmp_path / "b", modules=["q_proj", r"^model\.norm"]).grafted == 5
    with pytest.raises(ConfigError, match=r"1 of 2 expressions of modules match no weight(.|\n)*w_proj"):
        run(sides, tmp_path / "c", modules=["q_proj", "w_proj"])
    with pytest.raises(ConfigError, match="is not a regular expression"):
        run(sides, tmp_path / "c", modules="(")
    assert not (tmp_path / "c").exists()


@pytest.mark.parametrize("dtype", [BF16, FP16, FP32])
@pytest.mark.parametrize("case", ["scale 0", "equal"])
def test_nothing_learnt_is_instruct_bit_by_bit(tmp_path, dtype, case):
    base = tensors(0, dtype)
    instruct = moved(base, 1, 1e-3)
    for name in instruct:
        instruct[name].view(-1)[::3] = -0.0
        base[name].view(-1)[::2] = -0.0
    sides = {"base": write(tmp_path / "base", base), "instruct": write(tmp_path / "instruct", instruct)}
    sides["tuned"] = write(tmp_path / "tuned", base if case == "equal" else moved(base, 2, 1e-2))
    report = run(sides, tmp_path / "out", scale=0.0 if case == "scale 0" else 1.0)
    weights = "model.safetensors"
    assert (tmp_path / "out" / weights).read_bytes() == (sides["instruct"] / weights).read_bytes()
    if case == "equal":
        assert any("delta is zero" in warning for warning in report.warnings)


def test_stages_add_up(tmp_path):
    """graft(SFT then DPO) = graft(SFT) + (DPO - SFT)."""
    sides = family(tmp_path, dtypes=(FP32,) * 3)
    dpo = write(tmp_path / "dpo", moved(load(sides["tuned"]), 9, 1e-2))
    run({**sides, "tuned": dpo}, tmp_path / "once")
    run(sides, tmp_path / "first")
    run({"base": sides["tuned"], "instruct": tmp_path / "first", "tuned": dpo}, tmp_path / "second")
    second = load(tmp_path / "second")
    for name, value in load(tmp_path / "once").items():
        assert float((value - second[name]).norm() / value.norm()) < 1e-6


def test_figures_and_warnings(tmp_path):
    sides = family(tmp_path, dtypes=(BF16, BF16, FP32), delta=3e-6)
    report = run(sides, tmp_path / "out", rounding="nearest")
    base, instruct, tuned, out = (
        torch.cat([load(folder)[name].double().flatten() for name in shapes()])
        for folder in (sides["base"], sides["instruct"], sides["tuned"], tmp_path / "out")
    )
    delta, stored = tuned - base, out - instruct
    assert report.sigma == pytest.approx(
        float((base - instruct).abs().sum() / (base.abs() + instruct.abs()).sum()), rel=1e-4
    )
    assert report.delta_norm == pytest.approx(float(delta.norm()), rel=1e-4)
    assert report.realised == pytest.approx(float(stored @ delta / (delta @ delta)), rel=1e-3, abs=1e-3)
    assert report.noise == pytest.approx(float((stored - delta).norm() / delta.norm()), rel=1e-3)
    assert set(report.by_kind) == {"embed_tokens", "norm", "bias", *(name.split(".")[-2] for name in LINEAR)}
    assert report.by_kind["q_proj"]["weights"] == 2
    assert sum(kind["elements"] for kind in report.by_kind.values()) == len(delta)
    (lost,) = [warning for warning in report.warnings if "rounded" in warning]
    assert f"keeps {report.realised:.3g} of the delta with noise of {report.noise:.3g} times" in lost
    assert "--dtype float32" in lost
    exact = run(sides, tmp_path / "fp32", dtype="float32")
    assert exact.realised == pytest.approx(1, abs=1e-2)
    assert exact.noise < 1e-2


def test_a_narrower_tuned_is_told(tmp_path):
    sides = family(tmp_path, dtypes=(FP32, FP32, BF16))
    assert any("narrower than base's" in warning for warning in run(sides, tmp_path / "a").warnings)
    sides["tuned"] = write(tmp_path / "cast", {name: value.to(BF16) for name, value in load(sides["base"]).items()})
    report = run(sides, tmp_path / "b", base_dtype="tuned")
    assert not any("narrower than" in warning for warning in report.warnings)
    assert_equal(load(tmp_path / "b"), load(sides["instruct"]))


# --- what is refused -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"scale": float("nan")}, "scale must be a finite number"),
        ({"instruct_scale": float("inf")}, "instruct_scale must be a finite number"),
        ({"dtype": "int8"}, "dtype must be one of"),
        ({"rounding": "up"}, "rounding must be one of"),
        ({"rounding": "stochastic", "dtype": "float32"}, "no meaning with dtype"),
        ({"format": "adapter"}, "there is no exact adapter form"),
        ({"format": "adapter", "dtype": "float16"}, "has no room for dtype"),
        ({"max_shard_size": "5 apples"}, "is not a valid size"),
        ({"modules": []}, "empty list"),
        ({"seed": 1.5}, "seed must be an integer"),
        ({"vocab": "any"}, "vocab must be one of"),
        ({"digest": "md5"}, "digest must be one of"),
    ],
)
def test_wrong_options_are_refused(tmp_path, options, message):
    sides = family(tmp_path)
    before = sorted(tmp_path.iterdir())
    with pytest.raises(InputError, match=message):
        run(sides, tmp_path / "out", **options)
    assert sorted(tmp_path.iterdir()) == before


def test_stochastic_rounding_of_an_fp32_model_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="no meaning here"):
        run(family(tmp_path, dtypes=(FP32,) * 3), tmp_path / "out", rounding="stochastic")


def test_wrong_folders_are_refused(tmp_path):
    sides = family(tmp_path)
    (tmp_path / "empty").mkdir()
    before = sorted(tmp_path.iterdir())
    for role in sides:
        with pytest.raises(CheckpointError, match="there is no folder"):
            run({**sides, role: tmp_path / "nothing"}, tmp_path / "out")
        with pytest.raises(CheckpointError, match="has no weights"):
            run({**sides, role: tmp_path / "empty"}, tmp_path / "out")
        with pytest.raises((ConfigError, OutputExistsError)):
            run(sides, sides[role])
        with pytest.raises((ConfigError, OutputExistsError)):
            run(sides, sides[role], overwrite=True)
    with pytest.raises(ConfigError, match="lies in the folder of base"):
        run(sides, sides["base"] / "out")
    with pytest.raises(ConfigError, match="base is missing"):
        graft(instruct=sides["instruct"], tuned=sides["tuned"], output=tmp_path / "out")
    assert sorted(tmp_path.iterdir()) == before


def test_other_shapes_are_refused_by_name(tmp_path):
    sides = family(tmp_path)
    weights = load(sides["instruct"])
    weights["model.layers.1.mlp.up_proj.weight"] = torch.zeros(24, 9, dtype=BF16)
    sides["instruct"] = write(tmp_path / "other", weights)
    with pytest.raises(PairMismatchError, match=r"model\.layers\.1\.mlp\.up_proj\.weight"):
        run(sides, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("role", ["base", "instruct", "tuned"])
@pytest.mark.parametrize("stats", [True, False])
def test_values_that_are_not_finite_are_named(tmp_path, role, stats):
    sides = family(tmp_path)
    weights = load(sides[role])
    weights["model.norm.weight"][3] = float("nan")
    weights["model.layers.0.mlp.up_proj.weight"][2, 5] = float("inf")
    save_file(weights, sides[role] / "model.safetensors", metadata={"format": "pt"})
    before = sorted(tmp_path.iterdir())
    with pytest.raises(GraftError, match="2 weights have values that are infinite or not a number") as caught:
        run(sides, tmp_path / "out", stats=stats)
    assert f"model.norm.weight  not finite in {role} " in str(caught.value)
    assert sorted(tmp_path.iterdir()) == before


def test_overflow_of_fp16_is_an_error_with_a_way_out(tmp_path):
    sides = family(tmp_path, dtypes=(FP16,) * 3)
    for role, value in (("base", 1.0), ("instruct", 8000.0), ("tuned", 60000.0)):
        weights = load(sides[role])
        weights["model.norm.weight"][0] = value
        save_file(weights, sides[role] / "model.safetensors")
    with pytest.raises(GraftError, match=r"model\.norm\.weight  not finite in result in float16(.|\n)*--dtype float32"):
        run(sides, tmp_path / "out")
    run(sides, tmp_path / "out", dtype="float32")


def test_whole_numbers_are_copied(tmp_path):
    sides = family(tmp_path)
    for role, folder in sides.items():
        save_file(
            {**load(folder), "model.position_ids": torch.arange(7) + (role == "instruct")}, folder / "model.safetensors"
        )
    report = run(sides, tmp_path / "out", dtype="float32")
    found = load(tmp_path / "out")
    assert torch.equal(found.pop("model.position_ids"), torch.arange(7) + 1)
    assert report.copied == 1
    assert all(value.dtype == FP32 for value in found.values())


def test_check_graft_refuses_before_training(tmp_path):
    sides = family(tmp_path)
    common = {"base": sides["base"], "instruct": sides["instruct"]}
    check_graft(**common, output=tmp_path / "run" / "grafted", adapter=False)
    check_graft(**common, output=tmp_path / "out", adapter=True, format="adapter")
    with pytest.raises(InputError, match="no exact adapter form of this graft"):
        check_graft(**common, output=tmp_path / "out", adapter=False, format="adapter")
    with pytest.raises(ConfigError, match="match no weight"):
        check_graft(**common, output=tmp_path / "out", adapter=False, modules="w_proj")
    with pytest.raises(ConfigError, match="lies in the folder"):
        check_graft(**common, output=sides["instruct"] / "grafted", adapter=False)
    with pytest.raises(ConfigError, match="unexpected keyword"):
        check_graft(**common, output=tmp_path / "out", adapter=False, sclae=1.0)
    (tmp_path / "out").mkdir()
    with pytest.raises(OutputExistsError):
        check_graft(**common, output=tmp_path / "out", adapter=False)
    weights = load(sides["instruct"])
    weights["model.norm.weight"] = torch.ones(9, dtype=BF16)
    with pytest.raises(PairMismatchError):
        check_graft(**{**common, "instruct": write(tmp_path / "x", weights)}, output=tmp_path / "new", adapter=False)
