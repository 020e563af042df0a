"""Adapters over an earlier stage: one adapter that goes on, or a new one over the model of the run before."""

from __future__ import annotations

import pytest
import torch
from adapter_cases import adapter_on, merged_weights, product
from families import LINEAR, load, lora
from peft import LoraConfig
from runs import LORA, settings, sft
from safetensors.torch import load_file, save_file
from tiny import make_pair, preference_data
from transformers import AutoModelForCausalLM

from shadow_trl import ShadowDPOConfig, ShadowDPOTrainer, graft
from shadow_trl.checkpoints.manifest import write_manifest
from shadow_trl.errors import AdapterError

FP32 = torch.float32

pytestmark = [
    pytest.mark.filterwarnings("ignore::UserWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning:transformers"),
]


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


def test_a_start_that_cannot_be_worked_out_again_allows_nothing_else(tied_pair, tmp_path):
    config = LoraConfig(**{**LORA, "init_lora_weights": "pissa_niter_2", "modules_to_save": ["input_layernorm"]})
    with pytest.raises(AdapterError, match=r"more than a product\.\n  modules_to_save = (.|\n)*Nothing was written"):
        sft(tied_pair, tmp_path / "run", peft_config=config)
    assert not (tmp_path / "run").exists()


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
    with pytest.raises(AdapterError, match="cannot be trained further"):
        ShadowDPOTrainer(
            model=str(tmp_path / "sft"),
            args=ShadowDPOConfig(**settings(tmp_path / "dpo")),
            train_dataset=preference_data(),
        )
    assert not (tmp_path / "dpo").exists()


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


@pytest.mark.parametrize("base_dtype", ["tuned", "bfloat16", None, ()])
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
        origin = base[name] if base_dtype == () else base[name].bfloat16().double()
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
