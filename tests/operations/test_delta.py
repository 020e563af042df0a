"""The delta on its own: what is written, that a graft of it is the direct graft, and its low-rank form."""

from __future__ import annotations

import hashlib
import json
import shutil

import pytest
import torch
from families import CONFIG, family, load, lora, moved, shapes, tensors, write
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from oracle import exact, round_exact
from safetensors.torch import save_file
from tiny import make_pair, make_tokenizer

from shadow_trl import extract_delta, gap, graft
from shadow_trl.adapters.lora import base_model_of
from shadow_trl.checkpoints.checkpoint import Checkpoint
from shadow_trl.checkpoints.manifest import read_manifest
from shadow_trl.cli import main
from shadow_trl.errors import AdapterError, CheckpointError, ConfigError, GraftError, InputError, OutputExistsError
from shadow_trl.training.origins import resolve_origins

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
QUIET = {"progress": False}


def extract(sides, output, **options):
    return extract_delta(base=sides["base"], tuned=sides["tuned"], output=output, progress=False, **options)


def direct(sides, output, **options):
    return graft(**sides, output=output, progress=False, **options)


def by_delta(sides, delta, output, **options):
    return graft(instruct=sides["instruct"], delta=delta, output=output, progress=False, **options)


def same_bits(one, other):
    first, second = load(one), load(other)
    assert list(first) == list(second)
    for name, value in first.items():
        whole = {2: torch.int16, 4: torch.int32}[value.dtype.itemsize]
        assert value.dtype == second[name].dtype, name
        assert torch.equal(value.view(whole), second[name].view(whole)), name


# --- what is written -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("dtypes", "is_exact"), [((BF16, BF16, BF16), True), ((BF16, BF16, FP32), False)])
def test_the_delta_is_the_difference_in_fp32(tmp_path, dtypes, is_exact):
    sides = family(tmp_path, dtypes=dtypes, shards=(2, 1, 1))
    if not is_exact:  # BASE plus fp32 noise less BASE is that noise again: other numbers need more than 24 bits
        sides["tuned"] = write(tmp_path / "other", tensors(5, FP32))
    report = extract(sides, tmp_path / "delta")
    base, tuned, found = load(sides["base"]), load(sides["tuned"]), load(tmp_path / "delta")
    assert set(found) == set(shapes())
    total = 0.0
    for name, value in found.items():
        wanted = tuned[name].double() - base[name].double()
        total += float(wanted.square().sum())
        assert value.dtype == FP32
        assert torch.equal(value, wanted.float())
    assert report.exact is is_exact
    assert (report.form, report.weights, report.dtype) == ("delta", len(shapes()), "float32")
    assert report.delta_norm == pytest.approx(total**0.5, rel=1e-6)
    files = sorted(path.name for path in (tmp_path / "delta").iterdir())
    assert files == [
        "README.md", "base_config.json", "delta-00001-of-00002.safetensors", "delta-00002-of-00002.safetensors",
        "delta.safetensors.index.json", "shadow.json",
    ]  # fmt: skip
    index = json.loads((tmp_path / "delta" / "delta.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == 4 * sum(torch.Size(shape).numel() for shape in shapes().values())


def test_a_smaller_dtype_is_rounded_once_and_told(tmp_path):
    sides = family(tmp_path, dtypes=(BF16, BF16, FP32))
    report = extract(sides, tmp_path / "delta", dtype="bfloat16")
    base, tuned = load(sides["base"]), load(sides["tuned"])
    for name, value in load(tmp_path / "delta").items():
        difference = exact(tuned[name].double() - base[name].double())  # 53 bits hold it
        assert value.dtype == BF16
        assert exact(value) == [round_exact(number, BF16) for number in difference]
    assert report.exact is False
    assert 0 < report.noise < 2.0**-8  # half a step of eight bits
    assert read_manifest(tmp_path / "delta")["dtype"] == "bfloat16"


def test_a_delta_in_16_bits_draws_no_advice_that_a_delta_refuses(tmp_path):
    sides = family(tmp_path, dtypes=(BF16, BF16, BF16))
    extract(sides, tmp_path / "delta", dtype="bfloat16")
    assert not [text for text in by_delta(sides, tmp_path / "delta", tmp_path / "out").warnings if "base_dtype" in text]


def test_manifest_and_card_say_what_it_is(tmp_path):
    sides = family(tmp_path)
    extract(sides, tmp_path / "delta")
    manifest = read_manifest(tmp_path / "delta")
    assert (manifest["kind"], manifest["form"], manifest["exact"]) == ("delta", "delta", True)
    for role in ("base", "tuned"):
        assert manifest[role]["source"] == str(sides[role])
        digest = hashlib.sha256((sides[role] / "model.safetensors").read_bytes()).hexdigest()
        assert manifest[role]["digests"] == {"model.safetensors": f"sha256:{digest}"}
    assert {"torch", "shadow-trl"} <= manifest["versions"].keys()
    assert "instruct" not in manifest
    card = (tmp_path / "delta" / "README.md").read_text()
    assert "delta = tuned - base" in card
    assert "arXiv:2505.12716" in card
    assert str(tmp_path) not in card


def test_a_delta_does_not_load_as_a_model(tmp_path):
    from transformers import AutoModelForCausalLM

    sides = family(tmp_path)
    extract(sides, tmp_path / "delta")
    with pytest.raises((OSError, ValueError)):
        AutoModelForCausalLM.from_pretrained(tmp_path / "delta")


def test_the_dense_delta_of_an_adapter(tmp_path):
    sides = family(tmp_path)
    adapter = lora(tmp_path / "lora", rank=2, alpha=4, base_model_name_or_path=str(sides["base"]))
    extract_delta(tuned=adapter, output=tmp_path / "delta", progress=False)
    factors, found = load(adapter), load(tmp_path / "delta")
    assert set(found) == set(shapes())
    for name, value in found.items():
        module = f"base_model.model.{name.removesuffix('.weight')}"
        if f"{module}.lora_A.weight" in factors:
            product = factors[f"{module}.lora_B.weight"].double() @ factors[f"{module}.lora_A.weight"].double()
            torch.testing.assert_close(value.double(), 2.0 * product, rtol=1e-5, atol=1e-8)
        else:
            assert not value.any()
    direct({**sides, "tuned": adapter}, tmp_path / "a", dtype="float32")
    by_delta(sides, tmp_path / "delta", tmp_path / "b", dtype="float32")
    for name, value in load(tmp_path / "a").items():
        torch.testing.assert_close(load(tmp_path / "b")[name], value, rtol=1e-6, atol=1e-8)


# --- grafting it ---------------------------------------------------------------------------------------------------


@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    dtypes=st.tuples(*[st.sampled_from([BF16, FP16])] * 3),
    output=st.sampled_from(["auto", "float32", "bfloat16", "float16"]),
    shards=st.tuples(*[st.integers(1, 3)] * 3),
    scale=st.sampled_from([1.0, 0.0, -1.0, 0.3]),
    rounding=st.sampled_from(["nearest", "stochastic"]),
    modules=st.sampled_from(["all", "linear", ["q_proj", "norm"]]),
    delta=st.sampled_from([1e-2, 1e-4]),
    zeros=st.booleans(),
)
def test_a_graft_of_the_delta_has_the_bits_of_the_direct_one(
    tmp_path_factory, dtypes, output, shards, scale, rounding, modules, delta, zeros
):
    root = tmp_path_factory.mktemp("family")
    sides = family(root, dtypes=dtypes, shards=shards, delta=delta)
    if zeros and shards == (1, 1, 1):
        for place in sides.values():
            weights = load(place)
            for value in weights.values():
                value.view(-1)[:: 2 + len(place.name)] = -0.0
            save_file(weights, place / "model.safetensors", metadata={"format": "pt"})
    options = {"scale": scale, "dtype": output, "modules": modules, "seed": 3, "digest": "none"}
    options["rounding"] = "nearest" if output == "float32" else rounding
    assert extract(sides, root / "delta", digest="none").exact is True
    one = direct(sides, root / "one", **options)
    other = by_delta(sides, root / "delta", root / "other", **options)
    same_bits(root / "one", root / "other")
    assert (one.grafted, one.copied, one.dtype) == (other.grafted, other.copied, other.dtype)


def test_negative_zeros_of_instruct_are_kept(tmp_path):
    base = tensors(0)
    instruct = moved(base, 1, 1e-3)
    for name in instruct:
        instruct[name].view(-1)[::3] = -0.0
        base[name].view(-1)[::2] = -0.0
    sides = {"base": write(tmp_path / "base", base), "instruct": write(tmp_path / "instruct", instruct)}
    sides["tuned"] = sides["base"]
    report = extract(sides, tmp_path / "delta")
    assert any("delta is zero" in warning for warning in report.warnings)
    by_delta(sides, tmp_path / "delta", tmp_path / "out")
    weights = "model.safetensors"
    assert (tmp_path / "out" / weights).read_bytes() == (sides["instruct"] / weights).read_bytes()


def test_it_lands_on_another_instruct_without_base(tmp_path):
    sides = family(tmp_path)
    extract(sides, tmp_path / "delta")
    newer = write(tmp_path / "newer", moved(load(sides["instruct"]), 9, 1e-3))
    direct({**sides, "instruct": newer}, tmp_path / "one")
    shutil.rmtree(sides["base"])
    shutil.rmtree(sides["tuned"])
    report = by_delta({"instruct": newer}, tmp_path / "delta", tmp_path / "other")
    same_bits(tmp_path / "one", tmp_path / "other")
    assert report.sigma is None
    assert not any("far apart" in warning for warning in report.warnings)
    assert all(kind["sigma"] is None for kind in report.by_kind.values())


def test_figures_and_manifest_of_a_graft_of_a_delta(tmp_path):
    sides = family(tmp_path, delta=1e-4)
    extract(sides, tmp_path / "delta")
    one, other = direct(sides, tmp_path / "one"), by_delta(sides, tmp_path / "delta", tmp_path / "other")
    for figure in ("delta_norm", "realised", "noise"):
        assert getattr(other, figure) == pytest.approx(getattr(one, figure), rel=1e-4)
    manifest = read_manifest(tmp_path / "other")
    assert manifest["delta"]["source"] == str(tmp_path / "delta")
    assert set(manifest["delta"]["digests"]) == {"delta.safetensors"}
    for role in ("base", "tuned"):
        assert manifest[role] == read_manifest(tmp_path / "delta")[role]
    assert "instruct + scale * (tuned - base)" in (tmp_path / "other" / "README.md").read_text()


@pytest.mark.parametrize("with_base", [False, True])
def test_vocabularies_are_checked_with_and_without_base(tmp_path, with_base):
    base, instruct = make_pair(tmp_path, dtype=BF16)
    weights = load(base)
    generator = torch.Generator().manual_seed(3)
    trained = {n: (v.float() + 1e-2 * torch.randn(v.shape, generator=generator)).to(BF16) for n, v in weights.items()}
    tuned = tmp_path / "tuned"
    shutil.copytree(base, tuned)
    save_file(trained, tuned / "model.safetensors", metadata={"format": "pt"})
    extract_delta(base=base, tuned=tuned, output=tmp_path / "delta", **QUIET)
    assert (tmp_path / "delta" / "tokenizer.json").is_file()

    # INSTRUCT with two more token rows, one of them a token.
    more = load(instruct)
    rows = more["model.embed_tokens.weight"]
    more["model.embed_tokens.weight"] = torch.cat([rows, torch.randn(2, 16, generator=generator).to(BF16)])
    save_file(more, instruct / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((instruct / "config.json").read_text())
    (instruct / "config.json").write_text(json.dumps({**config, "vocab_size": 51}))
    tokenizer = make_tokenizer(template=True)
    tokenizer.add_tokens(["<|new|>"])
    tokenizer.save_pretrained(instruct)
    sides = {"base": base, "instruct": instruct, "tuned": tuned}
    direct(sides, tmp_path / "one", vocab="shared")
    given = {"base": base} if with_base else {}
    if not with_base:
        base.rename(tmp_path / "gone")
    with pytest.raises(InputError, match="vocab shared"):
        graft(**given, instruct=instruct, delta=tmp_path / "delta", output=tmp_path / "other", **QUIET)
    graft(**given, instruct=instruct, delta=tmp_path / "delta", output=tmp_path / "other", vocab="shared", **QUIET)
    same_bits(tmp_path / "one", tmp_path / "other")
    grafted = load(tmp_path / "other")["model.embed_tokens.weight"]
    assert torch.equal(grafted[49:], more["model.embed_tokens.weight"][49:])


@pytest.mark.parametrize("heads", [(None, None, "own"), ("copy", None, "copy"), ("own", "own", "own")])
def test_heads(tmp_path, heads):
    """A head that only TUNED has of its own lands where INSTRUCT may take it; equal copies stay one weight."""
    base = tensors(0)
    sides = {}
    weights = {"base": base, "instruct": moved(base, 1, 1e-3), "tuned": moved(base, 2, 1e-2)}
    for (role, found), head in zip(weights.items(), heads, strict=True):
        if head is not None:
            embedding = found["model.embed_tokens.weight"]
            found["lm_head.weight"] = (embedding * (1.0 if head == "copy" else 1.5)).clone()
        config = {**CONFIG, "tie_word_embeddings": head != "own"}
        sides[role] = write(tmp_path / role, found, config=config)
    extract(sides, tmp_path / "delta")
    needs = heads == (None, None, "own")
    if needs:
        with pytest.raises(InputError, match="--untie"):
            by_delta(sides, tmp_path / "delta", tmp_path / "other")
    direct(sides, tmp_path / "one", untie=needs)
    by_delta(sides, tmp_path / "delta", tmp_path / "other", untie=needs)
    same_bits(tmp_path / "one", tmp_path / "other")
    assert (tmp_path / "one" / "config.json").read_bytes() == (tmp_path / "other" / "config.json").read_bytes()


# --- what is refused -----------------------------------------------------------------------------------------------


def test_a_delta_is_no_model(tmp_path):
    sides = family(tmp_path)
    delta = tmp_path / "delta"
    extract(sides, delta)
    before = sorted(tmp_path.iterdir())
    for role in sides:
        with pytest.raises(ConfigError, match="graft --delta"):
            direct({**sides, role: delta}, tmp_path / "out")
        with pytest.raises(ConfigError, match="graft --delta"):
            gap(**{**sides, role: delta}, progress=False)
    with pytest.raises(ConfigError, match="graft --delta"):
        extract({**sides, "tuned": delta}, tmp_path / "out")
    with pytest.raises(ConfigError, match="graft --delta"):
        resolve_origins(str(delta))
    assert sorted(tmp_path.iterdir()) == before


def test_what_is_no_delta_is_refused(tmp_path):
    sides = family(tmp_path)
    direct(sides, tmp_path / "grafted")
    before = sorted(tmp_path.iterdir())
    with pytest.raises(CheckpointError, match=r"not a delta: it has no shadow\.json"):
        by_delta(sides, sides["tuned"], tmp_path / "out")
    with pytest.raises(CheckpointError, match=r"not a delta: its shadow\.json is of kind graft"):
        by_delta(sides, tmp_path / "grafted", tmp_path / "out")
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"instruct_scale": 0.5}, "instruct_scale=0.5 needs the weights of BASE"),
        ({"base_dtype": "tuned"}, "base_dtype='tuned' needs the weights of BASE"),
        ({"format": "adapter"}, "there is no exact adapter form"),
        ({"tuned": "x"}, "give either tuned or delta"),
    ],
)
def test_options_that_need_tuned_are_refused(tmp_path, options, message):
    sides = family(tmp_path)
    extract(sides, tmp_path / "delta")
    with pytest.raises(InputError, match=message):
        by_delta(sides, tmp_path / "delta", tmp_path / "out", **options)
    with pytest.raises(ConfigError, match="give either tuned or delta"):
        graft(instruct=sides["instruct"], output=tmp_path / "out", progress=False)
    assert not (tmp_path / "out").exists()


def test_another_base_is_refused_by_its_digest(tmp_path):
    sides = family(tmp_path)
    extract(sides, tmp_path / "delta")
    by_delta(sides, tmp_path / "delta", tmp_path / "out", base=sides["base"])
    other = write(tmp_path / "other", moved(load(sides["base"]), 7, 1e-3))
    with pytest.raises(ConfigError, match=r"1 of 1 files are missing or differ(.|\n)*model\.safetensors"):
        by_delta(sides, tmp_path / "delta", tmp_path / "b", base=other)
    report = by_delta(sides, tmp_path / "delta", tmp_path / "c", base=sides["base"], digest="none")
    assert any("it was not checked" in warning for warning in report.warnings)


def test_an_adapter_receives_no_delta(tmp_path):
    extract(family(tmp_path), tmp_path / "delta")
    adapter = lora(tmp_path / "adapter")
    with pytest.raises(InputError, match=rf"^instruct {adapter} is an adapter, not a model"):
        by_delta({"instruct": adapter}, tmp_path / "delta", tmp_path / "out")


def test_another_architecture_is_refused_by_what_the_delta_keeps(tmp_path):
    sides = family(tmp_path)
    extract(sides, tmp_path / "delta")
    config = {**CONFIG, "num_attention_heads": 4}
    other = write(tmp_path / "other", load(sides["instruct"]), config=config)
    kept = f"{tmp_path / 'delta'} (what the delta keeps of base)"
    for there, named in ((True, str(sides["base"])), (False, kept)):  # BASE itself is read as long as it is there
        if not there:
            shutil.rmtree(sides["base"])
        with pytest.raises(InputError, match="num_attention_heads") as found:
            by_delta({"instruct": other}, tmp_path / "delta", tmp_path / "out")
        assert f"base      {named}\n" in str(found.value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dtype": "auto"}, "dtype of a delta must be one of"),
        ({"dtype": "int8"}, "dtype must be one of"),
        ({"rank": 0}, "rank must be a whole number"),
        ({"rank": 2.0}, "rank must be a whole number"),
        ({"digest": "md5"}, "digest must be one of"),
        ({"max_shard_size": "x"}, "is not a valid size"),
    ],
)
def test_wrong_options_are_refused(tmp_path, options, message):
    sides = family(tmp_path)
    before = sorted(tmp_path.iterdir())
    with pytest.raises(ConfigError, match=message):
        extract(sides, tmp_path / "delta", **options)
    assert sorted(tmp_path.iterdir()) == before


def test_missing_base_quantised_sides_and_an_existing_output_are_refused(tmp_path):
    sides = family(tmp_path)
    with pytest.raises(ConfigError, match="base is missing"):
        extract_delta(tuned=sides["tuned"], output=tmp_path / "delta", progress=False)
    config = {**CONFIG, "quantization_config": {"quant_method": "gptq"}}
    packed = write(tmp_path / "packed", load(sides["base"]), config=config)
    for role in ("base", "tuned"):
        with pytest.raises(CheckpointError, match="quantised"):
            extract({**sides, role: packed}, tmp_path / "delta")
    direct(sides, tmp_path / "grafted")
    with pytest.raises(OutputExistsError, match="is not a delta"):
        extract(sides, tmp_path / "grafted", overwrite=True)
    extract(sides, tmp_path / "delta")
    with pytest.raises(OutputExistsError):
        extract(sides, tmp_path / "delta")
    extract(sides, tmp_path / "delta", overwrite=True, dtype="float16")
    with pytest.raises(OutputExistsError, match="is not a graft"):
        direct(sides, tmp_path / "delta", overwrite=True)


@pytest.mark.parametrize("rank", [None, 2])
def test_values_that_are_not_finite_are_named_and_nothing_is_left(tmp_path, rank):
    sides = family(tmp_path)
    weights = load(sides["tuned"])
    weights["model.layers.1.mlp.up_proj.weight"][0, 0] = float("nan")
    save_file(weights, sides["tuned"] / "model.safetensors", metadata={"format": "pt"})
    before = sorted(tmp_path.iterdir())
    with pytest.raises(GraftError, match=r"model\.layers\.1\.mlp\.up_proj\.weight"):
        extract(sides, tmp_path / "delta", rank=rank)
    assert sorted(tmp_path.iterdir()) == before


# --- the low-rank form ---------------------------------------------------------------------------------------------


def test_a_lora_of_at_most_the_rank_comes_back(tmp_path):
    """TUNED = BASE with a merged LoRA of rank 2 in fp32: the adapter of rank 3 loads with PEFT and is that delta."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    base, _ = make_pair(tmp_path)
    weights = load(base)
    generator = torch.Generator().manual_seed(4)
    deltas = {}
    for name, value in weights.items():
        if "_proj" in name:
            left = torch.randn(value.shape[0], 2, generator=generator, dtype=torch.float64)
            right = torch.randn(2, value.shape[1], generator=generator, dtype=torch.float64)
            deltas[name] = 0.1 * left @ right
    tuned = tmp_path / "tuned"
    shutil.copytree(base, tuned)
    merged = {name: (v.double() + deltas[name]).float() if name in deltas else v for name, v in weights.items()}
    save_file(merged, tuned / "model.safetensors", metadata={"format": "pt"})
    report = extract_delta(base=base, tuned=tuned, output=tmp_path / "lora", rank=3, progress=False)
    assert report.kept == pytest.approx(1, abs=1e-9)
    assert len(report.modules) == len(deltas) == 14
    assert not report.lost
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), tmp_path / "lora").merge_and_unload()
    state = model.state_dict()
    for name, delta in deltas.items():
        found = state[name].double() - weights[name].double()
        stored = merged[name].double() - weights[name].double()
        assert float((found - stored).norm() / stored.norm()) < 1e-6
        assert float((found - delta).norm() / delta.norm()) < 1e-6


def test_energies_are_those_of_the_singular_values_and_losses_are_named(tmp_path):
    sides = family(tmp_path)
    report = extract(sides, tmp_path / "lora", rank=2)
    base, tuned = load(sides["base"]), load(sides["tuned"])
    deltas = {name: tuned[name].double() - base[name].double() for name in shapes()}
    total = sum(float(delta.square().sum()) for delta in deltas.values())
    kept = 0.0
    for name, delta in deltas.items():
        share = float(delta.square().sum()) / total
        if "_proj.weight" in name:
            squares = torch.linalg.svdvals(delta).square()
            energy = float(squares[:2].sum() / squares.sum())
            kept += energy * share
            module = report.modules[name.removesuffix(".weight")]
            assert module["energy"] == pytest.approx(energy, rel=1e-9)
            assert module["share"] == pytest.approx(share, rel=1e-9)
        else:
            assert report.lost[name] == pytest.approx(share, rel=1e-9)
    assert report.kept == pytest.approx(kept, rel=1e-9)
    assert any("model.embed_tokens.weight" in warning for warning in report.warnings)
    manifest = read_manifest(tmp_path / "lora")
    assert (manifest["kind"], manifest["form"], manifest["rank"]) == ("delta", "adapter", 2)
    assert manifest["modules"] == report.modules
    assert manifest["lost"] == report.lost
    factors = load(tmp_path / "lora")
    name = "model.layers.1.mlp.down_proj"
    product = factors[f"base_model.model.{name}.lora_B.weight"] @ factors[f"base_model.model.{name}.lora_A.weight"]
    left, sizes, right = torch.linalg.svd(deltas[f"{name}.weight"], full_matrices=False)
    torch.testing.assert_close(product.double(), (left[:, :2] * sizes[:2]) @ right[:2], rtol=1e-5, atol=1e-9)


def test_the_adapter_is_an_adapter_of_base_for_everything_else(tmp_path):
    sides = family(tmp_path)
    adapter = tmp_path / "lora"
    extract(sides, adapter, rank=100)  # more than any side: everything is kept, filled up with zeros
    assert base_model_of(Checkpoint.open(adapter)) == str(sides["base"])
    report = graft(instruct=sides["instruct"], tuned=adapter, output=tmp_path / "one", dtype="float32", progress=False)
    assert report.grafted == 14
    direct(sides, tmp_path / "two", dtype="float32", modules="linear")
    for name, value in load(tmp_path / "two").items():
        torch.testing.assert_close(load(tmp_path / "one")[name], value, rtol=1e-5, atol=1e-8)
    origins = resolve_origins(str(adapter), instruct=str(sides["instruct"]))
    assert (str(origins.base), origins.adapter) == (str(sides["base"]), str(adapter))
    with pytest.raises(CheckpointError, match="Give it as tuned"):
        by_delta(sides, adapter, tmp_path / "three")


def test_rank_needs_a_full_tuned_with_a_linear_delta(tmp_path):
    sides = family(tmp_path)
    adapter = lora(tmp_path / "lora", base_model_name_or_path=str(sides["base"]))
    with pytest.raises(AdapterError, match="is an adapter already"):
        extract({**sides, "tuned": adapter}, tmp_path / "out", rank=2)
    with pytest.raises(ConfigError, match="no linear module"):
        extract({**sides, "tuned": sides["base"]}, tmp_path / "out", rank=2)
    assert not (tmp_path / "out").exists()


# --- the command ---------------------------------------------------------------------------------------------------


def test_the_command_line(tmp_path, capsys):
    sides = family(tmp_path)
    two = ["--base", str(sides["base"]), "--tuned", str(sides["tuned"])]
    assert main(["delta", *two, "--output", str(tmp_path / "delta")]) == 0
    assert f"{len(shapes())} weights, float32, exact" in capsys.readouterr().out
    assert main(["delta", *two, "--output", str(tmp_path / "lora"), "--rank", "2", "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert len(printed["modules"]) == 14
    assert main(["delta", *two, "--output", str(tmp_path / "lora2"), "--rank", "2"]) == 0
    assert "loses" in capsys.readouterr().out
    command = ["graft", "--instruct", str(sides["instruct"]), "--output", str(tmp_path / "out")]
    assert main([*command, "--delta", str(tmp_path / "delta"), "--tuned", str(sides["tuned"])]) == 2
    assert "not allowed with" in capsys.readouterr().err
    assert main(command) == 2
    assert "--tuned --delta is required" in capsys.readouterr().err
    assert main([*command, "--delta", str(tmp_path / "delta")]) == 0
    direct(sides, tmp_path / "one")
    same_bits(tmp_path / "one", tmp_path / "out")
