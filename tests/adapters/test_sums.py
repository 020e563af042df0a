"""Grafts of adapters beyond one plain LoRA: several at once, shared heads, named folders, truncation, trainers."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys

import pytest
import torch
from adapter_cases import CASES, adapter_delta, error, merged_weights, train
from families import LINEAR, family, load, lora
from peft import LoraConfig, PeftModel, get_peft_model
from runs import LORA, settings, sft
from safetensors.torch import load_file, save_file
from tiny import config_of, make_pair, make_tokenizer, preference_data, sft_data
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, GPT2Config, GPTNeoXConfig, Qwen3MoeConfig

from shadow_trl import ShadowDPOConfig, ShadowDPOTrainer, ShadowSFTConfig, ShadowSFTTrainer, extract_delta, graft
from shadow_trl.adapters.kinds import check_has_delta, kind_of
from shadow_trl.checkpoints.manifest import read_manifest, write_manifest
from shadow_trl.cli import main
from shadow_trl.errors import AdapterError, CheckpointError, ConfigError, PairMismatchError
from shadow_trl.grafting.weighted import weighted_sources

FP32 = torch.float32
pytestmark = [
    pytest.mark.filterwarnings("ignore::UserWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning:transformers"),
]


def case(name: str):
    return next(item for item in CASES if item.name == name)


def product(adapter, name: str, factor: float) -> torch.Tensor:
    found = load_file(adapter / "adapter_model.safetensors")
    module = f"base_model.model.{name.removesuffix('.weight')}"
    key = f"{module}.lora_B.weight"
    return factor * found[key].double() @ found[f"{module}.lora_A.weight"].double() if key in found else torch.zeros(())


@pytest.fixture
def sides(tmp_path):
    found = family(tmp_path / "models", dtypes=(FP32,) * 3)
    return {"base": found["base"], "instruct": found["instruct"], "progress": False}


@pytest.fixture(scope="module")
def tied_pair(tmp_path_factory):
    return make_pair(tmp_path_factory.mktemp("tied"), gap=0.3)


def adapter_on(pair, folder, config):
    """Save an adapter of random values on BASE; return the model in memory and BASE's weights, float64."""
    torch.manual_seed(0)
    below = AutoModelForCausalLM.from_pretrained(pair[0])
    before = {name: value.detach().double().clone() for name, value in below.named_parameters(remove_duplicate=False)}
    model = get_peft_model(below, config)
    with torch.no_grad():
        for value in model.parameters():
            if value.requires_grad:
                value.add_(0.1 * torch.randn_like(value))
    model.save_pretrained(folder)
    return model, before


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


@pytest.mark.parametrize("base_dtype", ["tuned", "bfloat16"])
def test_a_cast_of_base_is_no_part_of_a_merged_adapter(tied_pair, tmp_path, base_dtype):
    model, before = adapter_on(tied_pair, tmp_path / "one", LoraConfig(**LORA, use_dora=True))
    sides = {"base": tied_pair[0], "instruct": tied_pair[1], "tuned": tmp_path / "one", "progress": False}
    graft(**sides, output=tmp_path / "out", base_dtype=base_dtype)
    if base_dtype == "bfloat16":  # what DoRA does depends on the weights under it: those that training loaded
        bare = AutoModelForCausalLM.from_pretrained(tied_pair[0], dtype=torch.bfloat16).double()
        before = {name: value.detach().clone() for name, value in bare.named_parameters(remove_duplicate=False)}
        model = PeftModel.from_pretrained(bare, tmp_path / "one")
    merged = dict(model.double().merge_and_unload().named_parameters(remove_duplicate=False))
    instruct = load(tied_pair[1])
    for name, value in load(tmp_path / "out").items():
        total = instruct[name].double() + merged[name].detach() - before[name]
        assert float((value.double() - total).abs().max()) < 1e-7, name


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


def test_the_stage_below_is_found_by_any_name_of_the_folder(sides, tmp_path, monkeypatch):
    models = tmp_path / "models"
    one = lora(tmp_path / "run", base_model_name_or_path=str(models / "tuned"))
    entry = {role: {"source": str(models / name)} for role, name in (("base", "base"), ("policy", "tuned"))}
    write_manifest(one, {"kind": "run", **entry})
    monkeypatch.setenv("HOME", str(tmp_path))
    graft(**sides, tuned="~/run", output=tmp_path / "out")
    base, start, before = load(sides["base"]), load(models / "tuned"), load(sides["instruct"])
    for name, value in load(tmp_path / "out").items():
        total = before[name].double() + start[name].double() - base[name].double()
        total = total + product(one, name, 2.0) if name in LINEAR else total
        assert float((value.double() - total).abs().max()) < 1e-7


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
    report = graft(**sides, tuned=folder, output=tmp_path / "out2")
    assert any("further adapters, which are not grafted: french, german" in warning for warning in report.warnings)


def test_plain_loras_need_neither_peft_nor_transformers_nor_base(sides, tmp_path):
    adapter = lora(tmp_path / "one")
    (sides["base"] / "model.safetensors").unlink()
    program = (
        "import sys\nfrom shadow_trl import graft\nb, i, t, o = sys.argv[1:]\n"
        "graft(base=b, instruct=i, tuned=t, output=o, progress=False)\n"
        "print([name for name in ('peft', 'transformers', 'trl', 'accelerate') if name in sys.modules])"
    )
    paths = [str(sides["base"]), str(sides["instruct"]), str(adapter), str(tmp_path / "out")]
    done = subprocess.run([sys.executable, "-c", program, *paths], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


# Heads and embeddings


def test_head_of_a_tied_model(tied_pair, tmp_path):
    model, _ = adapter_on(tied_pair, tmp_path / "adapter", LoraConfig(**{**LORA, "target_modules": ["lm_head"]}))
    sides = {"base": tied_pair[0], "instruct": tied_pair[1], "tuned": tmp_path / "adapter", "progress": False}
    with pytest.raises(Exception, match="--untie"):
        graft(**sides, output=tmp_path / "dense")
    graft(**sides, output=tmp_path / "dense", untie=True)
    head = model.base_model.model.lm_head
    wanted = head.get_delta_weight("default").detach().double()
    embed = load(tied_pair[1])["model.embed_tokens.weight"]
    found = load(tmp_path / "dense")
    assert torch.equal(found["model.embed_tokens.weight"], embed)
    assert float((found["lm_head.weight"].double() - embed.double() - wanted).norm() / wanted.norm()) < 1e-6
    # As an adapter too: PEFT has stored BASE's head beside the factors, which must not come with them.
    graft(**sides, output=tmp_path / "form", format="adapter")
    stored = load_file(tmp_path / "form" / "adapter_model.safetensors")
    assert torch.equal(stored["base_model.model.lm_head.base_layer.weight"], embed)
    with torch.no_grad():
        loaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tied_pair[1]), tmp_path / "form")
        dense = AutoModelForCausalLM.from_pretrained(tmp_path / "dense")
        ids = torch.arange(2, 20)[None]
        torch.testing.assert_close(loaded(ids).logits, dense(ids).logits, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["qwen3", "gpt2"])
def test_a_plain_lora_on_the_head_of_a_tied_model(kind, tmp_path):
    """Nothing but factors in the file, and (GPT-2) no word of ties in the config: BASE has no weight of that name."""
    if kind == "qwen3":
        base, instruct = make_pair(tmp_path / "pair", gap=0.3)
        body, embedding = "q_proj", "model.embed_tokens.weight"
    else:
        settings = {"vocab_size": 49, "n_embd": 16, "n_layer": 2, "n_head": 2, "bos_token_id": 1, "eos_token_id": 1}
        base, instruct = (tmp_path / "pair" / role for role in ("base", "instruct"))
        for seed, side in enumerate((base, instruct)):
            torch.manual_seed(seed)
            AutoModelForCausalLM.from_config(GPT2Config(**settings)).save_pretrained(side)
            make_tokenizer(template=side is instruct).save_pretrained(side)
            told = {key: value for key, value in config_of(side).items() if key != "tie_word_embeddings"}
            (side / "config.json").write_text(json.dumps(told))
        body, embedding = "c_fc", "transformer.wte.weight"
    config = LoraConfig(**{**LORA, "target_modules": ["lm_head", body]})
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), config)
    with torch.no_grad():
        for value in model.parameters():
            value.add_(0.05 * torch.randn_like(value) if value.requires_grad else 0.0)
    model.save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
    sides = {"base": base, "tuned": tmp_path / "adapter", "progress": False}
    with pytest.raises(PairMismatchError, match="--untie"):
        graft(**sides, instruct=instruct, output=tmp_path / "dense")
    graft(**sides, instruct=instruct, output=tmp_path / "dense", untie=True)
    extract_delta(**sides, output=tmp_path / "delta")
    before, after, delta = (load(folder) for folder in (instruct, tmp_path / "dense", tmp_path / "delta"))
    wanted = {"lm_head.weight": product(tmp_path / "adapter", "lm_head.weight", 2.0)}
    for name in before:
        found = product(tmp_path / "adapter", name, 2.0)
        if found.any():
            wanted[name] = found if body == "q_proj" else found.T
    assert len(wanted) == 3
    assert after.keys() == {*before, "lm_head.weight"}
    for name, value in after.items():
        change = value.double() - before[embedding if name == "lm_head.weight" else name].double()
        if name not in wanted:
            assert not change.any()
            continue
        for found in (change, delta[name].double()):
            assert float((found - wanted[name]).norm() / wanted[name].norm()) < 1e-5
    path = tmp_path / "adapter" / "adapter_model.safetensors"
    save_file({name.replace(".1.", ".7."): value for name, value in load_file(path).items()}, path)
    with pytest.raises(AdapterError, match=rf"belong to modules that instruct(.|\n)*\.7\.(.|\n)*{body}"):
        graft(**sides, instruct=instruct, output=tmp_path / "form", format="adapter")


def test_token_rows_of_a_tied_model_change_head_and_embedding(tied_pair, tmp_path):
    config = LoraConfig(**{**LORA, "target_modules": ["q_proj"], "trainable_token_indices": [3, 8]})
    _, before = adapter_on(tied_pair, tmp_path / "adapter", config)
    sides = {"base": tied_pair[0], "instruct": tied_pair[1], "tuned": tmp_path / "adapter", "progress": False}
    graft(**sides, output=tmp_path / "dense")
    instruct, found = load(tied_pair[1]), load(tmp_path / "dense")
    assert found.keys() == instruct.keys()
    name = "model.embed_tokens.weight"
    rows = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    stored = next(value for key, value in rows.items() if key.endswith("trainable_tokens_delta"))
    change = found[name].double() - instruct[name].double()
    assert torch.allclose(change[[3, 8]], stored.double() - before[name][[3, 8]], atol=1e-7)
    assert not change[[row for row in range(49) if row not in (3, 8)]].any()
    graft(**sides, output=tmp_path / "form", format="adapter")
    with torch.no_grad():
        loaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tied_pair[1]), tmp_path / "form")
        dense = AutoModelForCausalLM.from_pretrained(tmp_path / "dense")
        ids = torch.arange(2, 20)[None]
        torch.testing.assert_close(loaded(ids).logits, dense(ids).logits, rtol=1e-4, atol=1e-5)


# What has no exact form


def test_the_truncated_adapter_tells_its_error(tied_pair, tmp_path):
    model, before = adapter_on(tied_pair, tmp_path / "adapter", LoraConfig(**LORA, use_dora=True))
    sides = {"base": tied_pair[0], "instruct": tied_pair[1], "tuned": tmp_path / "adapter", "progress": False}
    merged = dict(model.double().merge_and_unload().named_parameters(remove_duplicate=False))
    delta = {name: merged[name].detach() - value for name, value in before.items()}
    lost = sum(float(torch.linalg.svdvals(value)[6:].square().sum()) for value in delta.values() if value.dim() == 2)
    wanted = (lost / sum(float(value.square().sum()) for value in delta.values())) ** 0.5
    report = graft(**sides, output=tmp_path / "form", rank=6)
    assert report.form == "adapter"
    (note,) = [warning for warning in report.warnings if "relative error" in warning]
    assert float(note.partition("relative error ")[2].split()[0].rstrip(".")) == pytest.approx(wanted, rel=1e-2)
    assert error(adapter_delta(tied_pair[1], tmp_path / "form"), delta) == pytest.approx(wanted, rel=1e-3)
    with pytest.raises(ConfigError, match="rank"):
        graft(**sides, output=tmp_path / "x", rank=6, format="model")


@pytest.mark.parametrize("kind", ["gpt_neox", "gpt2"])
def test_both_ranks_take_every_linear_module_whatever_its_name(kind, tmp_path):
    """`graft --rank` of an adapter and `delta --rank` of the same adapter merged by PEFT: the delta on every module."""
    common = {"vocab_size": 49, "bos_token_id": 1, "eos_token_id": 1, "tie_word_embeddings": False}
    if kind == "gpt_neox":
        sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
        config = GPTNeoXConfig(**common, **sizes)
        modules = ["query_key_value", "dense_h_to_4h", "lm_head"]
    else:
        # Square weights among those that are stored as (in, out), and nn.Linear beside them in one adapter.
        config = GPT2Config(**common, n_embd=16, n_layer=1, n_head=2)
        modules = ["attn.c_proj", "c_fc", "lm_head"]
    base, instruct = tmp_path / "base", tmp_path / "instruct"
    for seed, side in enumerate((base, instruct)):
        torch.manual_seed(seed)
        AutoModelForCausalLM.from_config(config).save_pretrained(side)
        make_tokenizer(template=side is instruct).save_pretrained(side)
    settings = {**LORA, "target_modules": modules}
    model, before = adapter_on((base, instruct), tmp_path / "dora", LoraConfig(**settings, use_dora=True))
    merged = model.double().merge_and_unload()
    delta = {name: value.detach() - before[name] for name, value in merged.named_parameters()}
    changed = {name for name, value in delta.items() if float(value.norm()) > 1e-5}
    assert len(changed) == len(modules)
    merged.float().save_pretrained(tmp_path / "merged")
    for rank in (16, 2):
        lost = sum(float(torch.linalg.svdvals(delta[name])[rank:].square().sum()) for name in changed)
        total = sum(float(delta[name].square().sum()) for name in changed)
        wanted, tolerance = (lost / total) ** 0.5, 2e-6
        report = graft(base=base, instruct=instruct, tuned=tmp_path / "dora", output=tmp_path / f"form{rank}",
                       rank=rank, progress=False)  # fmt: skip
        assert report.grafted == len(modules)
        told = next(text for text in report.warnings if "relative error" in text)
        assert float(told.partition("relative error ")[2].rstrip(".")) == pytest.approx(wanted, rel=1e-2, abs=tolerance)
        made = extract_delta(base=base, tuned=tmp_path / "merged", output=tmp_path / f"delta{rank}", rank=rank,
                             progress=False)  # fmt: skip
        assert {f"{name}.weight" for name, found in made.modules.items() if found["share"] > 1e-9} == changed
        assert made.kept == pytest.approx(1 - wanted**2, abs=tolerance)
        for side, adapter in ((instruct, f"form{rank}"), (base, f"delta{rank}")):
            found = adapter_delta(side, tmp_path / adapter)
            assert error(found, delta) == pytest.approx(wanted, rel=1e-3, abs=tolerance)
        # Our own reading of the adapter that was written, some modules stored as (in, out), is PEFT's.
        graft(base=base, instruct=instruct, tuned=tmp_path / f"delta{rank}", output=tmp_path / f"dense{rank}",
              progress=False)  # fmt: skip
        first = load(instruct)
        ours = {name.replace("embed_out", "lm_head"): value - first[name]
                for name, value in load(tmp_path / f"dense{rank}").items()}  # fmt: skip
        assert error(ours, delta) == pytest.approx(wanted, rel=1e-3, abs=1e-5)


def test_truncation_of_no_delta_or_of_some_modules_is_refused(sides, tmp_path):
    one = lora(tmp_path / "one")
    with pytest.raises(ConfigError, match=r"whole delta(.|\n)*Nothing was written"):
        graft(**sides, tuned=one, output=tmp_path / "out", rank=1, modules="linear")
    path = one / "adapter_model.safetensors"
    save_file({name: torch.zeros_like(value) for name, value in load_file(path).items()}, path)
    with pytest.raises(ConfigError, match=r"no linear module(.|\n)*Nothing was written"):
        graft(**sides, tuned=one, output=tmp_path / "out", rank=1)
    assert not (tmp_path / "out").exists()


def test_instruct_scale_needs_the_dense_form(tied_pair, tmp_path):
    model, before = adapter_on(tied_pair, tmp_path / "adapter", LoraConfig(**LORA, use_dora=True))
    sides = {"base": tied_pair[0], "instruct": tied_pair[1], "tuned": tmp_path / "adapter", "progress": False}
    with pytest.raises(ConfigError, match="instruct_scale"):
        graft(**sides, output=tmp_path / "out", format="adapter", instruct_scale=0.5)
    graft(**sides, output=tmp_path / "out", instruct_scale=0.5, scale=2.0)
    merged = dict(model.double().merge_and_unload().named_parameters(remove_duplicate=False))
    instruct = load(tied_pair[1])
    for name, value in load(tmp_path / "out").items():
        tuned = merged[name].detach()
        total = 2.0 * tuned + 0.5 * instruct[name].double() - 1.5 * before[name]
        assert float((value.double() - total).norm() / total.norm()) < 1e-6


def test_auto_says_why_it_is_dense(tied_pair, tmp_path, monkeypatch):
    adapter_on(tied_pair, tmp_path / "adapter", LoraConfig(**LORA, use_dora=True))
    monkeypatch.setattr("shadow_trl.checkpoints.hub._download", lambda name, revision, weights: tied_pair[1])
    report = graft(base=tied_pair[0], instruct="someone/model", tuned=tmp_path / "adapter", output=tmp_path / "out",
                   progress=False)  # fmt: skip
    assert report.form == "model"
    assert any("no exact adapter form" in warning and "use_dora = True" in warning for warning in report.warnings)
    assert read_manifest(tmp_path / "out")["dense_because"] == ["use_dora = True"]


def test_stored_values_at_a_scale(tied_pair, tmp_path):
    config = LoraConfig(**{**LORA, "target_modules": ["q_proj"], "modules_to_save": ["input_layernorm"]})
    adapter_on(tied_pair, tmp_path / "adapter", config)
    sides = {"base": tied_pair[0], "instruct": tied_pair[1], "tuned": tmp_path / "adapter", "progress": False}
    graft(**sides, output=tmp_path / "form", format="adapter", scale=0.5)
    base, instruct = load(tied_pair[0]), load(tied_pair[1])
    trained = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    name = "model.layers.1.input_layernorm.weight"
    key = f"base_model.model.{name}"
    wanted = instruct[name].double() + 0.5 * (trained[key].double() - base[name].double())
    assert torch.allclose(load_file(tmp_path / "form" / "adapter_model.safetensors")[key].double(), wanted, atol=1e-7)


@pytest.mark.parametrize(
    ("config", "reason"),
    [({"peft_type": "PROMPT_TUNING"}, "prompt"), ({"peft_type": "XLORA"}, "depends on the input"),
     ({"peft_type": "LORA", "layer_replication": [[0, 1]]}, "adds layers"),
     ({"peft_type": "LORA", "r": 2, "bias": "none", "alora_invocation_tokens": [1]},
      r"alora_invocation_tokens = \[1\]  \(the adapter acts after certain tokens")],
)  # fmt: skip
def test_adapters_without_a_delta_are_refused(config, reason):
    with pytest.raises(AdapterError, match=f"no weight delta(.|\n)*{reason}"):
        check_has_delta(config)


def test_an_unknown_type_has_no_adapter_form():
    kind = kind_of({"peft_type": "OF_TOMORROW"})
    assert kind.beyond
    assert "OF_TOMORROW" in kind.obstacles[0]


def test_a_weight_without_a_module_is_named(tied_pair, tmp_path):
    adapter_on(tied_pair, tmp_path / "adapter", LoraConfig(**LORA, use_dora=True))
    path = tmp_path / "adapter" / "adapter_model.safetensors"
    save_file({name.replace("layers.1", "layers.7"): value for name, value in load_file(path).items()}, path)
    with pytest.raises(AdapterError, match=r"21 of 42 weights(.|\n)*layers\.7(.|\n)*nearest: "):
        graft(base=tied_pair[0], instruct=tied_pair[1], tuned=tmp_path / "adapter", output=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_weights_that_the_config_names_and_the_file_lacks_are_named(tied_pair, tmp_path):
    adapter_on(tied_pair, tmp_path / "adapter", LoraConfig(**LORA, use_dora=True))
    path = tmp_path / "adapter" / "adapter_model.safetensors"
    save_file({name: value for name, value in load_file(path).items() if "layers.1.mlp" not in name}, path)
    with pytest.raises(AdapterError, match=r"lacks 9 weights(.|\n)*layers\.1\.mlp"):
        graft(base=tied_pair[0], instruct=tied_pair[1], tuned=tmp_path / "adapter", output=tmp_path / "out")
    assert not (tmp_path / "out").exists()


# Trainers


@pytest.mark.parametrize(
    "changes",
    [{"init_lora_weights": "pissa"}, {"init_lora_weights": "olora"}, {"use_dora": True},
     {"target_modules": ["q_proj"], "modules_to_save": ["input_layernorm"]},
     {"init_lora_weights": "pissa", "modules_to_save": ["input_layernorm"]},
     {"init_lora_weights": "olora", "use_dora": True}],
    ids=["pissa", "olora", "dora", "modules_to_save", "pissa modules_to_save", "olora dora"],
)  # fmt: skip
def test_trainers_graft_what_they_trained(tied_pair, tmp_path, changes):
    trainer = sft(tied_pair, tmp_path / "run", peft_config=LoraConfig(**{**LORA, **changes}))
    trainer.train()
    base, instruct = load(tied_pair[0]), load(tied_pair[1])
    merged = dict(trainer.model.double().merge_and_unload().named_parameters(remove_duplicate=False))
    wanted = {name: merged[name].detach().cpu() - value.double() for name, value in base.items()}
    found = load(tmp_path / "run" / "grafted")
    for name, value in wanted.items():
        total = instruct[name].double() + value
        assert float((found[name].double() - total).abs().max()) <= 1e-6 * float(total.abs().max()), name
    has_form = "use_dora" not in changes and not {"init_lora_weights", "modules_to_save"} <= changes.keys()
    start = tmp_path / "run" / "shadow" / "start" / "adapter_model.safetensors"
    assert start.exists() == ("init_lora_weights" in changes)
    if has_form:
        sides = {"base": tied_pair[0], "instruct": tied_pair[1], "tuned": tmp_path / "run", "progress": False}
        graft(**sides, output=tmp_path / "form", format="adapter")
        assert error(adapter_delta(tied_pair[1], tmp_path / "form"), wanted) < 1e-5


def test_token_rows_of_a_base_loaded_in_fewer_bits(tmp_path):
    pair = make_pair(tmp_path, gap=0.3, tied=False)
    config = LoraConfig(**{**LORA, "target_modules": ["q_proj"]}, trainable_token_indices=[2, 5])
    trainer = sft(pair, tmp_path / "run", peft_config=config, model_init_kwargs={"dtype": "bfloat16"})
    trainer.train()
    name = "model.embed_tokens.weight"
    rows = load_file(tmp_path / "run" / "adapter_model.safetensors")[
        "base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta"
    ]
    base, instruct = load(pair[0])[name], load(pair[1])[name]
    wanted = instruct.double()
    wanted[[2, 5]] += rows.double() - base[[2, 5]].bfloat16().double()
    torch.testing.assert_close(load(tmp_path / "run" / "grafted")[name].double(), wanted, rtol=0, atol=1e-8)


def test_a_start_that_cannot_be_worked_out_again_allows_nothing_else(tied_pair, tmp_path):
    config = LoraConfig(**{**LORA, "init_lora_weights": "pissa_niter_2", "modules_to_save": ["input_layernorm"]})
    with pytest.raises(AdapterError, match=r"more than a product\.\n  modules_to_save = (.|\n)*Nothing was written"):
        sft(tied_pair, tmp_path / "run", peft_config=config)
    assert not (tmp_path / "run").exists()


def test_the_adapter_loads_by_every_way(tied_pair, tmp_path):
    trained = train(case("LoRA, PiSSA"), tmp_path, kind="llama")
    sides = {"base": trained.base, "instruct": trained.instruct, "tuned": trained.adapter, "progress": False}
    report = graft(**sides, output=tmp_path / "form", format="adapter")
    assert any("loads only where that path" in warning for warning in report.warnings)
    assert not (tmp_path / "form" / "config.json").exists()
    config = json.loads((tmp_path / "form" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(trained.instruct)
    assert config["init_lora_weights"] is True
    assert (config["r"], config["lora_alpha"], config["bias"]) == (8, 8, "none")
    names = load_file(tmp_path / "form" / "adapter_model.safetensors")
    assert all(name.startswith("base_model.model.") and name.endswith(("lora_A.weight", "lora_B.weight"))
               for name in names)  # fmt: skip
    ids = torch.arange(2, 20)[None]
    with torch.no_grad():
        one = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(trained.instruct), tmp_path / "form")
        two = AutoModelForCausalLM.from_pretrained(tmp_path / "form")
        assert torch.equal(one(ids).logits, two(ids).logits)


def tiny_experts(folder, seed: int):
    torch.manual_seed(seed)
    config = Qwen3MoeConfig(
        vocab_size=49, hidden_size=16, intermediate_size=32, moe_intermediate_size=8, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1, head_dim=8, num_experts=4, num_experts_per_tok=2,
        tie_word_embeddings=False, pad_token_id=0, eos_token_id=1, bos_token_id=None,
    )  # fmt: skip
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder


def test_parameters_of_fused_experts_land_on_the_experts_of_the_file(tmp_path):
    pair = tiny_experts(tmp_path / "base", 0), tiny_experts(tmp_path / "instruct", 1)
    assert any(".experts.3.up_proj" in name for name in load(pair[0]))  # on disk each expert stands alone
    parameters = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    config = LoraConfig(**{**LORA, "target_modules": ["q_proj"], "target_parameters": parameters})
    model, _ = adapter_on(pair, tmp_path / "adapter", config)
    merged = model.merge_and_unload()
    merged.save_pretrained(tmp_path / "merged")  # PEFT and transformers: the same weights by another way
    sides = {"base": pair[0], "instruct": pair[1], "tuned": tmp_path / "adapter", "progress": False}
    report = graft(**sides, output=tmp_path / "dense")
    base, instruct, tuned = (load(folder) for folder in (*pair, tmp_path / "merged"))
    found = load(tmp_path / "dense")
    assert found.keys() == tuned.keys()
    moved = 0
    for name, value in found.items():
        delta = tuned[name].double() - base[name].double()
        moved += bool(delta.any())
        assert float((value.double() - instruct[name].double() - delta).abs().max()) < 3e-7, name
    assert report.grafted == moved == 2 * (1 + 3 * 4)
    report = graft(**sides, output=tmp_path / "form", format="adapter")
    assert report.form == "adapter"
    with torch.no_grad():
        loaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(pair[1]), tmp_path / "form")
        dense = AutoModelForCausalLM.from_pretrained(tmp_path / "dense")
        ids = torch.arange(2, 20)[None]
        torch.testing.assert_close(loaded(ids).logits, dense(ids).logits, rtol=1e-4, atol=1e-5)


# Continued adapters


@pytest.mark.parametrize("start", [True, "pissa"])
def test_one_adapter_through_sft_and_dpo_is_the_dense_graft_of_both(tied_pair, tmp_path, start):
    sft(tied_pair, tmp_path / "sft", peft_config=LoraConfig(**LORA, init_lora_weights=start)).train()
    trainer = ShadowDPOTrainer(
        model=str(tmp_path / "sft"),
        args=ShadowDPOConfig(**settings(tmp_path / "dpo")),
        train_dataset=preference_data(),
    )
    trainer.train()
    trainer.model.delete_adapter("ref")
    merged = dict(trainer.model.double().merge_and_unload().named_parameters(remove_duplicate=False))
    base, instruct, first = load(tied_pair[0]), load(tied_pair[1]), load(tmp_path / "sft" / "grafted")
    for name, value in load(tmp_path / "dpo" / "grafted").items():
        total = instruct[name].double() + (merged[name].detach() - base[name].double())
        assert float((value.double() - total).abs().max()) <= 2e-6 * float(total.abs().max()), name
    assert any(not torch.equal(value, first[name]) for name, value in load(tmp_path / "dpo" / "grafted").items())
    assert (tmp_path / "dpo" / "shadow" / "start").is_dir() == (start == "pissa")


def test_random_starts_do_not_go_on(tied_pair, tmp_path):
    sft(tied_pair, tmp_path / "sft", peft_config=LoraConfig(**LORA, init_lora_weights="pissa_niter_2")).train()
    with pytest.raises(AdapterError, match="cannot go on"):
        ShadowDPOTrainer(
            model=str(tmp_path / "sft"),
            args=ShadowDPOConfig(**settings(tmp_path / "dpo")),
            train_dataset=preference_data(),
        )
    assert not (tmp_path / "dpo").exists()


def test_4_bit_base_and_full_precision_instruct(tied_pair, tmp_path):
    pytest.importorskip("bitsandbytes")
    four_bits = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=FP32)
    trainer = ShadowSFTTrainer(
        model=str(tied_pair[0]),
        instruct_model=str(tied_pair[1]),
        args=ShadowSFTConfig(**settings(tmp_path / "out", model_init_kwargs={"device_map": "cpu"})),
        train_dataset=sft_data(),
        peft_config=LoraConfig(**LORA),
        quantization_config=four_bits,
    )
    trainer.train()
    assert type(trainer.model.base_model.model.model.layers[0].mlp.up_proj.base_layer).__name__ == "Linear4bit"
    assert any("quantised by bitsandbytes" in warning for warning in trainer.graft_report.warnings)
    assert read_manifest(tmp_path / "out")["quantised"] == "bitsandbytes"
    instruct, found = load(tied_pair[1]), load(tmp_path / "out" / "grafted")
    name = "model.layers.0.mlp.up_proj.weight"
    wanted = product(tmp_path / "out", name, 2.0)
    assert float((found[name].double() - instruct[name].double() - wanted).abs().max()) < 1e-7
    assert bool(wanted.any())


def test_the_reference_of_dpo_is_the_start_whatever_the_adapter_does_to_base(tied_pair, tmp_path):
    trainer = ShadowDPOTrainer(
        model=str(tied_pair[0]),
        instruct_model=str(tied_pair[1]),
        args=ShadowDPOConfig(**settings(tmp_path / "out", graft=False)),
        train_dataset=preference_data(),
        peft_config=LoraConfig(**LORA, init_lora_weights="pissa"),
    )
    trainer.train()
    assert trainer.state.log_history[0]["loss"] == pytest.approx(0.6931, abs=2e-4)


# An adapter over the full model of an earlier run


@pytest.mark.parametrize("base_dtype", ["tuned", "bfloat16", None])
@pytest.mark.parametrize("dora", [False, True])
def test_a_stage_that_loaded_base_in_fewer_bits_has_learnt_nothing_by_it(tmp_path, base_dtype, dora):
    pair = make_pair(tmp_path / "pair", gap=0.3, tied=False)
    base, instruct = ({name: value.double() for name, value in load(side).items()} for side in pair)
    first = AutoModelForCausalLM.from_pretrained(pair[0], dtype=torch.bfloat16)
    with torch.no_grad():
        first.model.layers[0].mlp.up_proj.weight.mul_(1.25)
    first.save_pretrained(tmp_path / "first")
    config = {**LORA, "target_modules": ["q_proj"], "modules_to_save": ["input_layernorm"], "use_dora": dora}
    model, start = adapter_on((tmp_path / "first", pair[1]), tmp_path / "run", LoraConfig(**config))
    roles = {"base": pair[0], "policy": tmp_path / "first"}
    write_manifest(tmp_path / "run", {"kind": "run", **{role: {"source": str(path)} for role, path in roles.items()}})
    sides = {"base": pair[0], "instruct": pair[1], "base_dtype": base_dtype, "progress": False}
    graft(**sides, tuned=tmp_path / "run", output=tmp_path / "out")
    graft(**sides, tuned=[(tmp_path / "run", 0.5)], output=tmp_path / "half")
    merged, half = merged_weights(model), load(tmp_path / "half")
    for name, value in load(tmp_path / "out").items():
        origin = base[name] if base_dtype is None else base[name].bfloat16().double()
        learnt = (start[name] - origin) + (merged[name] - start[name])
        assert float((value.double() - instruct[name] - learnt).abs().max()) < 2e-7, name
        assert float((half[name].double() - instruct[name] - 0.5 * learnt).abs().max()) < 2e-7, name


@pytest.mark.parametrize("target", ["q_proj", "lm_head"])
def test_a_cast_of_base_is_known_under_other_names_and_in_a_head_of_its_own(tmp_path, target):
    pair = make_pair(tmp_path / "pair", gap=0.3, tied=target == "lm_head")
    AutoModelForCausalLM.from_pretrained(pair[0], dtype=torch.bfloat16).save_pretrained(tmp_path / "first")
    if target == "q_proj":  # BASE as its bare model was saved
        bare = {name.removeprefix("model."): value for name, value in load(pair[0]).items()}
        save_file(bare, pair[0] / "model.safetensors", metadata={"format": "pt"})
    adapter_on((tmp_path / "first", pair[1]), tmp_path / "run", LoraConfig(**{**LORA, "target_modules": [target]}))
    roles = {"base": pair[0], "policy": tmp_path / "first"}
    write_manifest(tmp_path / "run", {"kind": "run", **{role: {"source": str(path)} for role, path in roles.items()}})
    graft(base=pair[0], instruct=pair[1], tuned=tmp_path / "run", output=tmp_path / "out", base_dtype="tuned",
          untie=target == "lm_head", progress=False)  # fmt: skip
    instruct, changed = load(pair[1]), 0
    for name, value in load(tmp_path / "out").items():
        learnt = product(tmp_path / "run", name, 2.0)
        changed += bool(learnt.any())
        receiver = instruct.get(name, instruct["model.embed_tokens.weight"])
        assert float((value.double() - receiver.double() - learnt).abs().max()) < 2e-7, name
    assert changed == (2 if target == "q_proj" else 1)


@pytest.mark.parametrize("first_dtype", ["float32", "bfloat16"])
def test_an_adapter_that_loaded_the_run_before_in_fewer_bits_has_learnt_nothing_by_it(tmp_path, first_dtype):
    pair = make_pair(tmp_path / "pair", gap=0.3, tied=False)
    sft(pair, tmp_path / "first", model_init_kwargs={"dtype": first_dtype}).train()
    config = LoraConfig(**{**LORA, "target_modules": ["q_proj"], "modules_to_save": ["input_layernorm"]})
    trainer = sft(pair, tmp_path / "run", model=str(tmp_path / "first"), peft_config=config,
                  model_init_kwargs={"dtype": "bfloat16"})  # fmt: skip
    trainer.train()
    stored = load_file(tmp_path / "run" / "adapter_model.safetensors")
    base, instruct, first = load(pair[0]), load(pair[1]), load(tmp_path / "first")
    assert {value.dtype for value in first.values()} == {getattr(torch, first_dtype)}
    for name, value in load(tmp_path / "run" / "grafted").items():
        learnt = first[name].double() - base[name].to(first[name].dtype).double()
        learnt = learnt + product(tmp_path / "run", name, 2.0)
        if f"base_model.model.{name}" in stored:
            learnt = learnt + stored[f"base_model.model.{name}"].double() - first[name].bfloat16().double()
        assert float((value.double() - instruct[name].double() - learnt).abs().max()) < 2e-7, name
