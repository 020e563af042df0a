"""Initialisations of LoRA in the trainers and in `graft`: what is learnt is grafted, what cannot be known refused."""

from __future__ import annotations

import importlib.util
import json

import adapter_starts as starts
import pytest
from adapter_cases import CASES, LINEAR, adapter_delta, error, merged_weights, train
from families import load
from peft import AdaLoraConfig, LoftQConfig, LoraConfig, LoraGAConfig
from releases import needs
from runs import LORA, settings, sft
from tiny import make_pair, preference_data
from transformers import AutoModelForCausalLM

from shadow_trl import ShadowDPOConfig, ShadowDPOTrainer, graft
from shadow_trl.adapters.kinds import kind_of, lost_start, start_setting
from shadow_trl.errors import AdapterError

pytestmark = [
    pytest.mark.filterwarnings("ignore::UserWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning:transformers"),
]
NEEDS = {"loftq": "scipy", "corda": "attr"}
GA = LoraGAConfig(scale="weight_svd")


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    return make_pair(tmp_path_factory.mktemp("pair"), gap=0.3)


def config_of(start, **options) -> LoraConfig:
    if start in NEEDS and importlib.util.find_spec(NEEDS[start]) is None:
        pytest.skip(f"PEFT needs {NEEDS[start]} for {start}")
    options |= {"lora_ga_config": GA} if start == "lora_ga" else {}
    options |= {"loftq_config": LoftQConfig(loftq_bits=4)} if start == "loftq" else {}
    return LoraConfig(**{**LORA, "target_modules": LINEAR, **options}, init_lora_weights=start)


def trainer_of(pair, folder, start, monkeypatch, **options):
    """Return a trainer whose adapter starts as PEFT's documentation has it made."""
    config = config_of(start, **options)
    model = AutoModelForCausalLM.from_pretrained(pair[0])
    prepare = {"corda": starts.prepare_corda, "lora_ga": starts.prepare_lora_ga}.get(start)
    if prepare is not None:
        prepare(model, config)
    if start == "eva":
        return sft(pair, folder, model=starts.eva(model, config))
    if start == "loftq":
        monkeypatch.setattr(starts.lora_layer, "loftq_init", starts.rounded)
    return sft(pair, folder, model=model, peft_config=config)


@pytest.mark.parametrize(
    "start", ["eva", pytest.param("mica", marks=needs("peft", "0.20")), "corda", "lora_ga", "loftq"]
)
def test_trainers_graft_what_they_trained(pair, tmp_path, monkeypatch, start):
    trainer = trainer_of(pair, tmp_path / "run", start, monkeypatch)
    before = {name: value.double() for name, value in load(pair[0]).items()}
    if start == "loftq":  # training starts from rounded weights and what the product gives back of them
        parts = {name: value.detach().double() for name, value in trainer.model.get_base_model().named_parameters()}
        for name in before:
            module = name.removesuffix(".weight")
            if f"{module}.base_layer.weight" in parts:
                left, right = (parts[f"{module}.lora_{side}.default.weight"] for side in "BA")
                before[name] = parts[f"{module}.base_layer.weight"] + 2.0 * left @ right
    trainer.train()
    merged = merged_weights(trainer.model)
    wanted = {name: merged[name] - value for name, value in before.items()}
    instruct, found = load(pair[1]), load(tmp_path / "run" / "grafted")
    for name, value in wanted.items():
        total = instruct[name].double() + value
        assert float((found[name].double() - total).abs().max()) <= 1e-6 * float(total.abs().max()), name
    kept = (tmp_path / "run" / "shadow" / "start" / "adapter_model.safetensors").exists()
    assert kept == (start in ("corda", "lora_ga", "loftq"))
    sides = {"base": pair[0], "instruct": pair[1], "tuned": tmp_path / "run", "progress": False}
    graft(**sides, output=tmp_path / "form", format="adapter")
    assert error(adapter_delta(pair[1], tmp_path / "form"), wanted) < 1e-5


def test_the_start_of_a_run_before_in_the_same_folder_is_not_taken(pair, tmp_path):
    folder = tmp_path / "run"
    sft(pair, folder, peft_config=config_of("pissa_niter_4")).train()
    assert (folder / "shadow" / "start").is_dir()
    trainer = sft(pair, folder, peft_config=config_of("pissa_niter_4"), graft=False, seed=1)
    trainer.train()
    trainer.save_model()
    with pytest.raises(AdapterError, match="its start was not kept"):
        graft(base=pair[0], instruct=pair[1], tuned=folder, output=tmp_path / "out", progress=False)


def test_a_run_that_goes_on_without_a_graft_keeps_its_start(pair, tmp_path):
    folder, kept = tmp_path / "run", tmp_path / "run" / "shadow" / "start" / "adapter_model.safetensors"
    saving = {"save_strategy": "steps", "save_steps": 1}
    sft(pair, folder, peft_config=config_of("pissa_niter_4"), **saving).train()
    before = kept.read_bytes()
    trainer = sft(pair, folder, peft_config=config_of("pissa_niter_4"), graft=False, seed=1, **saving)
    trainer.train(resume_from_checkpoint=str(min(folder.glob("checkpoint-*"))))
    assert kept.read_bytes() == before


@pytest.mark.parametrize(
    ("name", "why"),
    [("LoRA, CorDA", "inputs of the layers"), ("LoRA, LoRA-GA", "without the gradients"),
     ("LoRA, LoftQ", "quantises"), ("LoRA, PiSSA niter", "at random")],
)  # fmt: skip
def test_a_start_that_was_not_kept_is_not_guessed(tmp_path, name, why):
    case = next(case for case in CASES if case.name == name)
    case.require()
    trained = train(case, tmp_path)
    (trained.adapter / "shadow" / "start" / "adapter_config.json").unlink()
    sides = {"base": trained.base, "instruct": trained.instruct, "tuned": trained.adapter, "progress": False}
    with pytest.raises(AdapterError, match=rf"its start was not kept(.|\n)*{why}(.|\n)*shadow/start\. Nothing was"):
        graft(**sides, output=tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("do_graft", [True, False])
def test_an_adapter_that_does_not_load_as_it_was_does_not_go_on(pair, tmp_path, monkeypatch, do_graft):
    trainer_of(pair, tmp_path / "sft", "lora_ga", monkeypatch).train()
    with pytest.raises(AdapterError, match=r"lora_ga(.|\n)*cannot be trained further(.|\n)*without the gradients"):
        ShadowDPOTrainer(
            model=str(tmp_path / "sft"),
            args=ShadowDPOConfig(**settings(tmp_path / "dpo", graft=do_graft)),
            train_dataset=preference_data(),
        )
    assert not (tmp_path / "dpo").exists()


@pytest.mark.parametrize("options", [{"modules_to_save": ["input_layernorm"]}, {"use_dora": True}])
def test_a_lost_start_allows_nothing_but_a_product(pair, tmp_path, monkeypatch, options):
    with pytest.raises(AdapterError, match=r"more than a product\.\n  (modules_to_save|use_dora) = (.|\n)*Nothing was"):
        trainer_of(pair, tmp_path / "run", "lora_ga", monkeypatch, **options)
    assert not (tmp_path / "run").exists()


def test_the_reference_of_dpo_is_base_under_lora_ga(pair, tmp_path):
    config = config_of("lora_ga")
    model = AutoModelForCausalLM.from_pretrained(pair[0])
    starts.prepare_lora_ga(model, config)
    trainer = ShadowDPOTrainer(
        model=model,
        instruct_model=str(pair[1]),
        args=ShadowDPOConfig(**settings(tmp_path / "out", graft=False)),
        train_dataset=preference_data(),
        peft_config=config,
    )
    trainer.train()
    assert trainer.state.log_history[0]["loss"] == pytest.approx(0.6931, abs=2e-4)


def test_an_unknown_start_is_refused(pair, tmp_path):
    trained = train(next(case for case in CASES if case.name == "LoRA"), tmp_path)
    path = trained.adapter / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "init_lora_weights": "of_tomorrow"}))
    sides = {"base": trained.base, "instruct": trained.instruct, "tuned": trained.adapter, "progress": False}
    with pytest.raises(AdapterError, match=r"of_tomorrow(.|\n)*does not know(.|\n)*Nothing was written"):
        graft(**sides, output=tmp_path / "out")
    assert not (tmp_path / "out").exists()
    with pytest.raises(AdapterError, match=r"of_tomorrow(.|\n)*does not know(.|\n)*Nothing was written"):
        sft(pair, tmp_path / "run", peft_config=LoraConfig(**LORA, init_lora_weights="of_tomorrow"))


def test_starts_are_named_as_peft_compares_them():
    assert start_setting({"peft_type": "LORA", "init_lora_weights": "OLoRA"}) == "olora"
    assert kind_of({"peft_type": "LORA", "init_lora_weights": "OLoRA"}).subtracted
    assert not kind_of({"peft_type": "LORA", "init_lora_weights": "Gaussian"}).beyond
    assert [lost_start(start) for start in (True, False, "eva", "mica", "pissa", "olora")] == [None] * 6
    assert all(lost_start(start) for start in ("corda", "lora_ga", "loftq", "pissa_niter_4", "of_tomorrow"))


def test_adalora_starts_from_zero_whatever_its_setting_says(pair, tmp_path):
    config = AdaLoraConfig(**{**LORA, "r": 8}, init_r=4, target_r=2, total_step=20, tinit=2, tfinal=2,
                           init_lora_weights="pissa")  # fmt: skip
    trainer = sft(pair, tmp_path / "run", peft_config=config)
    trainer.train()
    assert not (tmp_path / "run" / "shadow" / "start").exists()
    merged, base, instruct = merged_weights(trainer.model), load(pair[0]), load(pair[1])
    for name, value in load(tmp_path / "run" / "grafted").items():
        total = instruct[name].double() + merged[name] - base[name].double()
        assert float((value.double() - total).abs().max()) <= 1e-6 * float(total.abs().max()), name


def test_an_embedding_beside_a_lost_start_is_refused_before_training(pair, tmp_path, monkeypatch):
    with pytest.raises(
        AdapterError, match=r"lora_ga(.|\n)*more than a product(.|\n)*embed_tokens(.|\n)*Nothing was written"
    ):
        trainer_of(pair, tmp_path / "run", "lora_ga", monkeypatch, target_modules=["embed_tokens", "q_proj"])
    assert not any((tmp_path / "run").glob("*"))  # the folder itself is the Trainer's


@pytest.mark.parametrize("start", ["pissa", "olora"])
def test_an_embedding_beside_layers_that_start_in_their_weights(tmp_path, start):
    pair = make_pair(tmp_path, gap=0.3, tied=False)
    trainer = sft(pair, tmp_path / "run", peft_config=config_of(start, target_modules=["embed_tokens", "q_proj"]))
    trainer.train()
    merged, base, instruct = merged_weights(trainer.model), load(pair[0]), load(pair[1])
    for name, value in load(tmp_path / "run" / "grafted").items():
        total = instruct[name].double() + merged[name] - base[name].double()
        assert float((value.double() - total).abs().max()) <= 1e-6 * float(total.abs().max()), name
