"""Weights that an adapter stores beside its factors or that only PEFT can merge, heads, token rows and trainers."""

from __future__ import annotations

import json

import pytest
import torch
from adapter_cases import adapter_delta, adapter_on, error, merged_weights, product
from families import load
from peft import LoraConfig, PeftModel, get_peft_model
from releases import needs
from runs import LORA, settings, sft
from safetensors.torch import load_file, save_file
from tiny import config_of, make_pair, make_tokenizer, sft_data
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, GPT2Config, Qwen3MoeConfig

from shadow_trl import ShadowSFTConfig, ShadowSFTTrainer, extract_delta, graft
from shadow_trl.adapters.peft_layers import merge_into_base
from shadow_trl.checkpoints.checkpoint import Checkpoint
from shadow_trl.checkpoints.manifest import read_manifest
from shadow_trl.errors import AdapterError, PairMismatchError

FP32 = torch.float32

pytestmark = [
    pytest.mark.filterwarnings("ignore::UserWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning:transformers"),
]


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
    assert start.exists() == bool({"init_lora_weights", "use_dora"} & changes.keys())
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


def tiny_experts(folder, seed: int):
    torch.manual_seed(seed)
    config = Qwen3MoeConfig(
        vocab_size=49, hidden_size=16, intermediate_size=32, moe_intermediate_size=8, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1, head_dim=8, num_experts=4, num_experts_per_tok=2,
        tie_word_embeddings=False, pad_token_id=0, eos_token_id=1, bos_token_id=None,
    )  # fmt: skip
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder


@needs("peft", "0.21", "older ones cannot load it with these transformers")
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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_peft_merges_in_more_digits_than_base_has(tmp_path, dtype):
    pair = make_pair(tmp_path / "pair", tied=False, dtype=dtype)
    model, _ = adapter_on(pair, tmp_path / "run", LoraConfig(**LORA, use_dora=True))
    base, adapter = Checkpoint.open(pair[0]), Checkpoint.open(tmp_path / "run")
    found, wanted = merge_into_base(base, adapter, tmp_path / "merged"), merged_weights(model)
    changed = [name for name, value in load(pair[0]).items() if not torch.equal(found.tensor(name), value)]
    assert len(changed) == 14
    for name in changed:
        value = found.tensor(name)
        assert value.dtype == (torch.float64 if dtype == torch.float32 else torch.float32)
        assert float((value.double() - wanted[name]).abs().max()) <= (1e-14 if dtype == torch.float32 else 1e-6), name
