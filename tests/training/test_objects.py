"""Models given as objects: what they hold is what is trained, subtracted and referred to, or the run is refused."""

from __future__ import annotations

import math

import pytest
import torch
from adapter_cases import product
from families import load
from peft import LoraConfig, PeftModel, get_peft_model
from runs import LORA, dpo, lora, sft
from tiny import make_pair, preference_data
from transformers import AutoModelForCausalLM

from shadow_trl.errors import AdapterError, InputError

pytestmark = pytest.mark.filterwarnings("ignore")


def loaded(pair, dtype=torch.float32):
    return AutoModelForCausalLM.from_pretrained(pair[0], dtype=dtype)


def changed(pair):
    """BASE with an adapter merged in memory: it still has BASE's name."""
    torch.manual_seed(3)
    model = get_peft_model(loaded(pair), LoraConfig(**LORA, init_lora_weights=False))
    return model.merge_and_unload().requires_grad_(True)


@pytest.mark.parametrize("named", [False, True])
@pytest.mark.parametrize("options", [{}, {"init_lora_weights": "pissa"}])
def test_an_adapter_on_a_model_changed_in_memory_is_refused(pair, tmp_path, options, named):
    # The adapter alone is saved: neither BASE nor what was merged before is found under its name.
    base = {"base_model": str(pair[0])} if named else {}
    with pytest.raises(InputError, match=r"14 of 25 weights differ(.|\n)*pass model=folder, with base_model="):
        sft(pair, tmp_path / "run", model=changed(pair), peft_config=LoraConfig(**LORA, **options), **base)
    assert not (tmp_path / "run").exists()


def test_an_adapter_put_on_a_model_changed_in_memory_is_refused(pair, tmp_path):
    model = get_peft_model(changed(pair), LoraConfig(**{**LORA, "modules_to_save": ["input_layernorm"]}))
    with pytest.raises(InputError, match="14 of 25 weights differ"):
        sft(pair, tmp_path / "run", model=model)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("dtype", [torch.float32, pytest.param(torch.bfloat16, marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    "options", [{"bias": "all"}, {"modules_to_save": ["input_layernorm"], "trainable_token_indices": [3]}]
)
def test_an_adapter_on_the_model_that_was_loaded_is_no_change(tmp_path, dtype, options):
    pair = make_pair(tmp_path / "pair", tied=False)
    model = get_peft_model(loaded(pair, dtype), LoraConfig(**{**LORA, "target_modules": ["q_proj"], **options}))
    trainer = sft(pair, tmp_path / "run", model=model)
    trainer.train()
    assert trainer.graft_report.delta_norm > 0


def test_the_merged_model_saved_is_a_stage(pair, tmp_path):
    changed(pair).save_pretrained(tmp_path / "merged")
    base, instruct, merged = load(pair[0]), load(pair[1]), load(tmp_path / "merged")
    trainer = sft(pair, tmp_path / "run", model=str(tmp_path / "merged"), base_model=str(pair[0]), peft_config=lora(),
                  graft_dtype="float32")  # fmt: skip
    trainer.train()
    for name, value in load(tmp_path / "run" / "grafted").items():
        learnt = merged[name].double() - base[name].double() + product(tmp_path / "run", name, 2.0)
        assert float((value.double() - instruct[name].double() - learnt).abs().max()) < 2e-7, name


@pytest.mark.parametrize(
    "case",
    [
        {"peft_config": LoraConfig(**{**LORA, "init_lora_weights": "pissa"}), "graft": False},
        {"peft_config": LoraConfig(**{**LORA, "init_lora_weights": "olora"}), "graft": False},
        {"base": True, "precompute_ref_log_probs": False},
        {"base": True, "stream": True},
        {"graft": False, "precompute_ref_log_probs": False},
    ],
    ids=", ".join,
)
def test_the_reference_of_an_object_is_the_object(pair, tmp_path, case):
    case = dict(case)
    data = preference_data().to_iterable_dataset() if case.pop("stream", False) else preference_data()
    base = {"base_model": str(pair[0])} if case.pop("base", False) else {}
    trainer = dpo(pair, tmp_path / "out", model=changed(pair), data=data, max_steps=1, **case, **base)
    trainer.train()
    first = trainer.state.log_history[0]
    assert first["loss"] == pytest.approx(math.log(2), abs=2e-6)
    assert first["rewards/margins"] == pytest.approx(0.0, abs=1e-5)


def two_adapters(pair, active):
    model = get_peft_model(loaded(pair), lora())
    model.add_adapter("second", lora())
    model.base_model.set_adapter(active)
    return model


@pytest.mark.parametrize(
    ("make", "names"),
    [
        (lambda pair: get_peft_model(loaded(pair), lora(), adapter_name="mine"), r"mine \(of mine\)"),
        (lambda pair: two_adapters(pair, "second"), r"second \(of default, second\)"),
        (lambda pair: two_adapters(pair, ["default", "second"]), r"default, second \(of default, second\)"),
    ],
    ids=["of another name", "default is idle", "two active"],
)
@pytest.mark.parametrize("build", [sft, pytest.param(dpo, marks=pytest.mark.slow)])
def test_an_adapter_that_would_not_be_grafted_is_refused_before_training(pair, tmp_path, make, names, build):
    with pytest.raises(AdapterError, match=rf"has other active adapters: {names}"):
        build(pair, tmp_path / "run", model=make(pair))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("use_rslora", [False, True])
def test_a_scaling_that_is_not_saved_is_refused_before_training(pair, tmp_path, use_rslora):
    model = get_peft_model(loaded(pair), LoraConfig(**LORA, use_rslora=use_rslora))
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    made = LORA["lora_alpha"] / LORA["r"] ** (0.5 if use_rslora else 1)
    layer.set_scale("default", 3)
    row = f"layers.0.self_attn.q_proj\n    memory    {3 * made}\n    settings  {made}"
    with pytest.raises(AdapterError, match=rf"in 1 modules(.|\n)*{row}"):
        sft(pair, tmp_path / "run", model=model)
    assert not (tmp_path / "run").exists()
    layer.set_scale("default", 1)  # the way out
    sft(pair, tmp_path / "run", model=model)


def test_the_way_out_for_an_adapter_of_another_name(pair, tmp_path):
    model = get_peft_model(loaded(pair), lora(), adapter_name="mine")
    model.save_pretrained(tmp_path / "kept", selected_adapters=["mine"])
    again = PeftModel.from_pretrained(loaded(pair), tmp_path / "kept" / "mine", is_trainable=True)
    sft(pair, tmp_path / "run", model=again, graft_dtype="float32").train()
    assert_grafted(pair, tmp_path / "run")


def test_an_idle_adapter_beside_the_one_that_is_trained(pair, tmp_path):
    sft(pair, tmp_path / "run", model=two_adapters(pair, "default"), graft_dtype="float32").train()
    assert_grafted(pair, tmp_path / "run")


def assert_grafted(pair, run) -> None:
    instruct, learnt = load(pair[1]), 0.0
    for name, value in load(run / "grafted").items():
        delta = product(run, name, 2.0)
        learnt += float(delta.abs().sum())
        assert float((value.double() - instruct[name].double() - delta).abs().max()) < 1e-7, name
    assert learnt > 0


def test_an_adapter_that_transformers_put_on_a_model_is_refused(pair, tmp_path):
    model = loaded(pair)
    model.add_adapter(lora())
    with pytest.raises(AdapterError, match="added by transformers"):
        sft(pair, tmp_path / "run", model=model)
    assert not (tmp_path / "run").exists()


def test_the_reference_that_is_given_stays_beside_an_object(pair, tmp_path):
    reference, options = loaded(pair[::-1]), {"base_model": str(pair[0]), "precompute_ref_log_probs": False}
    trainer = dpo(pair, tmp_path / "out", model=changed(pair), ref_model=reference, **options)
    found, instruct = trainer.accelerator.unwrap_model(trainer.ref_model).state_dict(), load(pair[1])
    assert all(torch.equal(found[name], value.float()) for name, value in instruct.items())
