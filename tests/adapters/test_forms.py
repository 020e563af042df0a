"""The form of a graft: when there is an adapter form, how it loads, and what `--rank` and dense weights are for."""

from __future__ import annotations

import json
import subprocess
import sys

import huggingface_hub
import pytest
import torch
from adapter_cases import adapter_delta, adapter_on, case, error, train
from families import load, lora
from hub_cache import into_cache
from peft import LoraConfig, PeftModel
from runs import LORA
from safetensors.torch import load_file, save_file
from tiny import make_tokenizer
from transformers import AutoModelForCausalLM, GPT2Config, GPTNeoXConfig

from shadow_trl import extract_delta, graft
from shadow_trl.adapters.kinds import check_has_delta, kind_of
from shadow_trl.checkpoints.manifest import read_manifest
from shadow_trl.errors import AdapterError, ConfigError

FP32 = torch.float32

pytestmark = [
    pytest.mark.filterwarnings("ignore::UserWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning:transformers"),
]


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
        head = "lm_head" if hasattr(AutoModelForCausalLM.from_config(config), "lm_head") else "embed_out"
        modules = ["query_key_value", "dense_h_to_4h", head]
    else:
        # Square weights among those that are stored as (in, out), and nn.Linear beside them in one adapter.
        config = GPT2Config(**common, n_embd=16, n_layer=1, n_head=2)
        head = "lm_head"
        modules = ["attn.c_proj", "c_fc", head]
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
        ours = {name.replace("embed_out", head): value - first[name]
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
    into_cache(tmp_path / "cache", "someone/model", "1" * 40, tied_pair[1], branch="main")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    report = graft(base=tied_pair[0], instruct="someone/model", tuned=tmp_path / "adapter", output=tmp_path / "out",
                   progress=False)  # fmt: skip
    assert report.form == "model"
    assert any("no exact adapter form" in warning and "use_dora = True" in warning for warning in report.warnings)
    assert read_manifest(tmp_path / "out")["dense_because"] == ["use_dora = True"]


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
