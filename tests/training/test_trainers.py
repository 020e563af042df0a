"""The trainers: TUNED is plain TRL's byte for byte, the graft is the sum, and bad input stops before training."""

from __future__ import annotations

import json
import math
from types import SimpleNamespace

import pytest
import torch
import xxhash
from peft import LoraConfig, PeftModel, PrefixTuningConfig, get_peft_model
from runs import LORA, dpo, log_probability, lora, saved_files, settings, sft
from safetensors.torch import load_file
from tiny import make_tokenizer, preference_data, save_model, sft_data, tiny_config
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

from shadow_trl import ShadowDPOConfig, ShadowDPOTrainer, ShadowSFTConfig, ShadowSFTTrainer
from shadow_trl.checkpoints.manifest import read_manifest
from shadow_trl.errors import AdapterError, ConfigError, InputError, OutputExistsError
from shadow_trl.results.lock import RunLock

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning:transformers")


@pytest.mark.parametrize("with_lora", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize(
    "policy",
    # From a raw BASE the graft of the start is INSTRUCT.
    ["sft", "init", "instruct", pytest.param("grafted", marks=pytest.mark.slow), "instruct in memory"],
)
def test_tuned_is_byte_equal_to_plain_trl(pair, tmp_path, policy, with_lora):
    base, instruct = pair
    peft_config = lora() if with_lora else None
    tokenizer = AutoTokenizer.from_pretrained(instruct)
    if policy == "sft":
        plain = SFTTrainer(
            model=str(base),
            args=SFTConfig(**settings(tmp_path / "plain")),
            train_dataset=sft_data(),
            processing_class=tokenizer,
            peft_config=peft_config,
        )
        shadow = sft(pair, tmp_path / "shadow", peft_config=peft_config and lora())
    else:
        precompute = policy in ("instruct", "grafted")
        reference = None if policy == "init" else AutoModelForCausalLM.from_pretrained(instruct, dtype=torch.float32)
        plain = DPOTrainer(
            model=str(base),
            ref_model=reference,
            args=DPOConfig(**settings(tmp_path / "plain", precompute_ref_log_probs=precompute)),
            train_dataset=preference_data(),
            processing_class=tokenizer,
            peft_config=peft_config,
        )
        shadow = dpo(
            pair,
            tmp_path / "shadow",
            peft_config=peft_config and lora(),
            ref_policy=policy.partition(" ")[0],
            # None, the default, must decide for computing ahead where the reference is another model.
            precompute_ref_log_probs=None if precompute else False,
        )
    plain.train()
    plain.save_model()
    shadow.train()

    expected, found = saved_files(tmp_path / "plain"), saved_files(tmp_path / "shadow")
    assert set(expected) == ({"adapter_model.safetensors", "adapter_config.json"} if with_lora else expected.keys())
    assert found == expected
    assert (tmp_path / "shadow" / "grafted" / "model.safetensors").exists()


def exact_sum(instruct: torch.Tensor, delta: torch.Tensor) -> torch.Tensor:
    """INSTRUCT + delta, in float64."""
    return instruct.double() + delta.double()


def test_full_graft_is_instruct_plus_delta(pair, tmp_path):
    base, instruct = (load_file(folder / "model.safetensors") for folder in pair)
    trainer = sft(pair, tmp_path)
    trainer.train()
    tuned, grafted = (load_file(tmp_path / name) for name in ("model.safetensors", "grafted/model.safetensors"))
    assert grafted.keys() == instruct.keys()
    moved = 0.0
    for name, tensor in grafted.items():
        delta = tuned[name].double() - base[name].double()
        expected = exact_sum(instruct[name], delta)
        moved = max(moved, delta.abs().max().item())
        assert tensor.dtype == torch.bfloat16
        # One rounding to bfloat16 (8 bits of precision): an error of at most 2^-8 relative.
        assert ((tensor.double() - expected).abs() <= expected.abs() * 2**-8).all(), name
    assert moved > 1e-3
    assert trainer.graft_report.grafted == len(grafted)


def test_lora_graft_is_instruct_plus_scaled_product(pair, tmp_path):
    instruct = load_file(pair[1] / "model.safetensors")
    sft(pair, tmp_path, peft_config=lora(), graft_dtype="float32", graft_scale=0.5).train()
    adapter = load_file(tmp_path / "adapter_model.safetensors")
    grafted = load_file(tmp_path / "grafted" / "model.safetensors")
    name = "model.layers.0.mlp.up_proj"
    product = adapter[f"base_model.model.{name}.lora_B.weight"].double() @ (
        adapter[f"base_model.model.{name}.lora_A.weight"].double()
    )
    delta = 0.5 * LORA["lora_alpha"] / LORA["r"] * product
    assert delta.abs().max() > 1e-4
    torch.testing.assert_close(
        grafted[f"{name}.weight"].double(), exact_sum(instruct[f"{name}.weight"], delta), rtol=1e-6, atol=1e-9
    )
    assert torch.equal(grafted["model.norm.weight"], instruct["model.norm.weight"].float())


def test_a_delta_lost_to_rounding_is_told_after_training(pair, tmp_path, caplog):
    trainer = sft(pair, tmp_path, peft_config=lora(), graft_dtype="bfloat16", graft_scale=0.001)
    trainer.train()
    assert any("graft_dtype" in warning for warning in trainer.graft_report.warnings)
    assert all(warning in caplog.text for warning in trainer.graft_report.warnings)


@pytest.mark.parametrize("with_lora", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize(
    "precompute", [True, pytest.param(False, marks=pytest.mark.slow)], ids=["precomputed", "in memory"]
)
@pytest.mark.parametrize("policy", ["init", "base", "instruct", "grafted"])
def test_first_loss_and_margin_by_hand(pair, tmp_path, policy, precompute, with_lora):
    base, instruct = (AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32) for folder in pair)
    tokenizer = AutoTokenizer.from_pretrained(pair[1])
    rows, beta = preference_data(4), 2.0
    margins = []
    for row in rows:
        logps = {
            (name, answer): log_probability(model, tokenizer, row, answer)
            for name, model in (("base", base), ("instruct", instruct))
            for answer in ("chosen", "rejected")
        }
        reference = "base" if policy in ("init", "base") else "instruct"
        margins.append(
            beta * (logps["base", "chosen"] - logps[reference, "chosen"])
            - beta * (logps["base", "rejected"] - logps[reference, "rejected"])
        )
    loss = sum(math.log1p(math.exp(-margin)) for margin in margins) / len(margins)
    if policy in ("instruct", "grafted"):
        assert abs(loss - math.log(2)) > 1e-4  # the pair differs enough for a wrong reference to be seen

    trainer = dpo(
        pair, tmp_path, data=rows, ref_policy=policy, precompute_ref_log_probs=precompute, beta=beta, graft=False,
        max_steps=1, peft_config=lora() if with_lora else None,
    )  # fmt: skip
    trainer.train()
    log = trainer.state.log_history[0]
    assert log["loss"] == pytest.approx(loss, abs=2e-5)
    assert log["rewards/margins"] == pytest.approx(sum(margins) / len(margins), abs=2e-5)


def test_processing_class_is_instructs(pair, tmp_path):
    trainer = sft(pair, tmp_path)
    assert trainer.processing_class.chat_template == AutoTokenizer.from_pretrained(pair[1]).chat_template
    assert AutoTokenizer.from_pretrained(pair[0]).chat_template is None


def test_template_missing_in_the_given_processing_class(pair, tmp_path):
    with pytest.raises(ConfigError, match="template"):
        dpo(pair, tmp_path / "out", processing_class=make_tokenizer(template=False))
    assert not (tmp_path / "out").exists()


def test_the_manifest_lies_beside_the_weights_in_checkpoints_and_at_the_end(pair, tmp_path):
    class AtStart(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            found.append(read_manifest(tmp_path))

    found = []
    trainer = sft(pair, tmp_path, save_strategy="steps", save_steps=1)
    trainer.add_callback(AtStart())
    trainer.train()
    assert set(map(str, found)) == {"None"}
    for folder in (tmp_path, tmp_path / "checkpoint-1"):
        manifest = read_manifest(folder)
        assert manifest["kind"] == "run"
        assert manifest["base"]["source"] == str(pair[0])
        assert manifest["instruct"]["source"] == str(pair[1])
        assert manifest["policy"] == manifest["base"]
        assert (manifest["adapter"], manifest["ref_policy"], manifest["loaded_in"]) == (None, None, ["float32"])
        assert manifest["trainer"] == "ShadowSFTTrainer"
        assert manifest["options"] == trainer.args.graft_options()
        assert "quantised" not in manifest
        assert set(manifest["base"]["digests"]) == {"model.safetensors"}
        digest = xxhash.xxh3_128((folder / "model.safetensors").read_bytes()).hexdigest()
        assert manifest["weights"] == {"model.safetensors": f"xxh3:{digest}"}
    assert read_manifest(tmp_path / "grafted")["kind"] == "graft"


def test_graft_false_trains_as_trl_does_and_grafts_by_hand(pair, tmp_path):
    trainer = sft(pair, tmp_path, graft=False)
    trainer.train()
    assert not (tmp_path / "grafted").exists()
    assert not (tmp_path / "model.safetensors").exists()
    report = trainer.graft()
    assert report.output == tmp_path / "grafted"
    assert (tmp_path / "model.safetensors").exists()
    assert trainer.graft_report is report


def test_no_instruct_known(pair, tmp_path):
    with pytest.raises(ConfigError, match="no INSTRUCT is known"):
        ShadowSFTTrainer(str(pair[0]), args=ShadowSFTConfig(**settings(tmp_path)), train_dataset=sft_data())
    trainer = ShadowSFTTrainer(
        str(pair[0]),
        args=ShadowSFTConfig(**settings(tmp_path, graft=False)),
        train_dataset=sft_data(),
        processing_class=make_tokenizer(template=True),
    )
    trainer.train()
    with pytest.raises(ConfigError, match="no INSTRUCT is known"):
        trainer.graft()


def test_plain_trl_config_is_upgraded(pair, tmp_path):
    args = DPOConfig(**settings(tmp_path, hub_token="token-of-the-user"))
    trainer = ShadowDPOTrainer(str(pair[0]), None, args, instruct_model=str(pair[1]), train_dataset=preference_data())
    assert isinstance(trainer.args, ShadowDPOConfig)
    assert trainer.args.hub_token == "token-of-the-user"
    assert trainer.args.graft is True
    assert trainer.args.learning_rate == args.learning_rate


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"fsdp": True}, "FSDP"),
        ({"graft_scale": float("nan")}, "finite"),
        ({"graft_format": "gguf"}, "graft_format"),
        ({"pair_check": "thorough"}, "pair_check"),
        ({"graft_modules": []}, "graft_modules"),
    ],
)
def test_options_that_are_refused(pair, tmp_path, changes, message):
    with pytest.raises(ConfigError, match=message):
        sft(pair, tmp_path / "out", **changes)
    assert not (tmp_path / "out").exists()


def test_every_choice_is_accepted(tmp_path):
    for value in (None, "headers", "weights"):
        assert ShadowSFTConfig(**settings(tmp_path, pair_check=value)).pair_check == value
    for value in ("init", "base", "instruct", "grafted"):
        assert ShadowDPOConfig(**settings(tmp_path, ref_policy=value)).ref_policy == value


@pytest.mark.parametrize("name", ["DeepSpeed", "FSDP"])
def test_sharded_training_that_would_not_be_is_refused_by_name(pair, tmp_path, name, monkeypatch):
    args = ShadowSFTConfig(**settings(tmp_path / "out"))
    if name == "DeepSpeed":
        # The config's own set-up needs the package; the plugin arrives in this attribute.
        args.deepspeed_plugin = SimpleNamespace(deepspeed_config={"zero_optimization": {"stage": 2}})
    else:
        monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(ConfigError, match=name):
        ShadowSFTTrainer(str(pair[0]), instruct_model=str(pair[1]), args=args, train_dataset=sft_data())
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (lambda: PrefixTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM"), "PREFIX_TUNING  .it learns a prompt"),
        (lambda: LoraConfig(**LORA, alora_invocation_tokens=[1]), "alora_invocation_tokens"),
    ],
    ids=["prompt", "aLoRA"],
)
def test_adapter_without_a_weight_delta_is_refused_before_training(pair, tmp_path, config, message):
    with pytest.raises(AdapterError, match=f"no weight delta(.|\n)*{message}"):
        sft(pair, tmp_path / "out", peft_config=config())
    assert not (tmp_path / "out").exists()
    assert sft(pair, tmp_path / "out", peft_config=config(), graft=False)


def test_adapter_of_unknown_start_is_refused_before_training(pair, tmp_path):
    config = LoraConfig(**{**LORA, "init_lora_weights": "pissa"})
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(pair[0], dtype=torch.float32), config)
    with pytest.raises(AdapterError, match=r"init_lora_weights='pissa'(.|\n)*peft_config"):
        sft(pair, tmp_path / "out", model=model)
    assert not (tmp_path / "out").exists()


def test_adapter_form_that_does_not_exist_is_refused_before_training(pair, tmp_path):
    with pytest.raises(AdapterError, match=r"no exact adapter form(.|\n)*use_dora = True"):
        sft(pair, tmp_path / "out", peft_config=LoraConfig(**LORA, use_dora=True), graft_format="adapter")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("policy", ["base", "instruct", "grafted"])
def test_sync_ref_model_and_explicit_reference_are_refused_with_a_policy(pair, tmp_path, policy):
    with pytest.raises(ConfigError, match="sync_ref_model"):
        dpo(pair, tmp_path, ref_policy=policy, sync_ref_model=True)
    with pytest.raises(ConfigError, match="ref_model"):
        dpo(pair, tmp_path, ref_policy=policy, ref_model=AutoModelForCausalLM.from_pretrained(pair[1]))


@pytest.mark.parametrize(
    ("case", "message"),
    [
        ("another adapter", "r: 4 in .*, 8 in peft_config"),
        ("changed in memory", r"model\.norm\.weight"),
        ("no INSTRUCT", "no INSTRUCT is known"),
        ("sync_ref_model", "sync_ref_model"),
        ("a lost start", r"more than a product\.\n  modules_to_save"),
    ],
)
def test_what_the_arguments_show_is_refused_before_any_model_is_loaded(pair, tmp_path, monkeypatch, case, message):
    options = {"ref_policy": "instruct", "precompute_ref_log_probs": False}  # a reference that is loaded at once
    model, instruct, peft_config = str(pair[0]), str(pair[1]), None
    if case == "another adapter":
        sft(pair, tmp_path / "run", peft_config=lora()).train()
        model, peft_config = str(tmp_path / "run"), LoraConfig(**{**LORA, "r": 8})
    elif case == "changed in memory":
        model = AutoModelForCausalLM.from_pretrained(pair[0], dtype=torch.float32)
        model.model.norm.weight.data += 1
    elif case == "no INSTRUCT":
        instruct = None
    elif case == "a lost start":
        more = {"init_lora_weights": "pissa_niter_2", "modules_to_save": ["input_layernorm"]}
        peft_config = LoraConfig(**{**LORA, **more})
    else:
        options["sync_ref_model"] = True
    for place in ("utils", "dpo_trainer"):
        monkeypatch.setattr(f"trl.trainer.{place}.create_model_from_path", lambda *_, **__: pytest.fail("loaded"))
    with pytest.raises((ConfigError, InputError), match=message):
        ShadowDPOTrainer(
            model,
            instruct_model=instruct,
            args=ShadowDPOConfig(**settings(tmp_path / "out", **options)),
            train_dataset=preference_data(),
            peft_config=peft_config,
        )
    assert not (tmp_path / "out").exists()


def test_existing_graft_is_refused_before_training_and_replaced_when_asked(pair, tmp_path):
    sft(pair, tmp_path).train()
    before = (tmp_path / "grafted" / "model.safetensors").read_bytes()
    with pytest.raises(OutputExistsError, match="grafted"):
        sft(pair, tmp_path, learning_rate=5e-2)
    assert (tmp_path / "grafted" / "model.safetensors").read_bytes() == before
    sft(pair, tmp_path, learning_rate=5e-2, graft_overwrite=True).train()
    assert (tmp_path / "grafted" / "model.safetensors").read_bytes() != before


def test_an_error_ends_with_what_is_on_the_disk(pair, tmp_path):
    with pytest.raises(ConfigError) as before:
        sft(pair, tmp_path / "out", push_to_hub=True, hub_strategy="checkpoint")
    assert str(before.value).endswith("Nothing was written.")
    assert str(before.value).count("Nothing was written") == 1
    trainer = sft(pair, tmp_path / "out")
    (tmp_path / "taken").mkdir()
    with pytest.raises(OutputExistsError) as after:
        trainer.graft(tmp_path / "taken")
    assert str(after.value).endswith(f"TUNED is in {tmp_path / 'out'}.")
    assert (tmp_path / "out" / "model.safetensors").is_file()


class StopsAfterOne(TrainerCallback):
    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == 1:
            raise KeyboardInterrupt


def test_an_interrupted_run_says_what_it_left_and_a_second_one_waits_for_the_first(pair, tmp_path, monkeypatch):
    trainer = sft(pair, tmp_path / "out", save_strategy="steps", save_steps=1)
    trainer.add_callback(StopsAfterOne())
    other = RunLock(tmp_path / "out")
    other.acquire()
    with pytest.raises(
        OutputExistsError, match=r"another run \(process .* is writing to .*out\. .*Nothing was written"
    ):
        trainer.train()
    other.release()
    with pytest.raises(KeyboardInterrupt) as found:
        trainer.train()
    written = [str(tmp_path / "out" / name) for name in ("README.md", "checkpoint-1")]  # TRL's card comes with each
    assert found.value.ending == f"Written so far: {', '.join(written)}."
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    # What is refused when the model is loaded leaves no folder, which transformers makes before.
    monkeypatch.setattr(ShadowSFTTrainer, "_check_loaded", lambda *_: pytest.fail("refused"))
    with pytest.raises(pytest.fail.Exception):
        sft(pair, tmp_path / "new" / "run")
    assert not (tmp_path / "new").exists()


def test_output_that_is_an_input_is_refused(tmp_path):
    from tiny import make_pair

    base, instruct = make_pair(tmp_path)
    with pytest.raises(OutputExistsError, match="folder of"):
        sft((base, instruct), base)
    (tmp_path / "mixed").mkdir()
    (tmp_path / "mixed" / "model.safetensors").write_bytes(b"")
    with pytest.raises(OutputExistsError, match=r"model\.safetensors"):
        sft((base, instruct), tmp_path / "mixed", peft_config=lora())


def test_grafted_folder_as_model_is_refused(pair, tmp_path):
    sft(pair, tmp_path).train()
    with pytest.raises(InputError, match="folder of the run instead"):
        sft(pair, tmp_path / "second", model=str(tmp_path / "grafted"))


def test_model_changed_in_memory_is_refused(pair, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(pair[0], dtype=torch.float32)
    with torch.no_grad():
        model.model.norm.weight += 1
    with pytest.raises(InputError, match=r"model\.norm\.weight"):
        sft(pair, tmp_path / "out", model=model)
    model = AutoModelForCausalLM.from_pretrained(pair[0], dtype=torch.float32)
    model.v_head = torch.nn.Linear(16, 1)
    with pytest.raises(InputError, match=r"v_head\.weight: absent in .*, \(1, 16\) in memory"):
        sft(pair, tmp_path / "out", model=model)
    with pytest.raises(InputError, match="no name"):
        sft(pair, tmp_path / "out", model=AutoModelForCausalLM.from_config(tiny_config()))


def test_an_adapter_on_a_model_without_a_name_is_refused_before_training(pair, tmp_path):
    model = AutoModelForCausalLM.from_config(tiny_config())
    model.load_state_dict(AutoModelForCausalLM.from_pretrained(pair[0], dtype=torch.float32).state_dict())
    with pytest.raises(AdapterError, match=r"has no name.*pass model=folder"):
        sft(pair, tmp_path / "out", model=model, base_model=str(pair[0]), peft_config=lora())
    assert not (tmp_path / "out").exists()


def test_loaded_model_trains_as_the_name_does(pair, tmp_path):
    sft(pair, tmp_path / "name").train()
    sft(pair, tmp_path / "object", model=AutoModelForCausalLM.from_pretrained(pair[0], dtype=torch.float32)).train()
    assert saved_files(tmp_path / "object/grafted") == saved_files(tmp_path / "name/grafted")


def test_cast_on_loading_is_no_delta(tmp_path):
    from tiny import make_pair

    pair = make_pair(tmp_path)  # float32 on disk
    trainer = sft(pair, tmp_path / "out", learning_rate=0, model_init_kwargs={"dtype": "bfloat16"})
    trainer.train()
    assert load_file(tmp_path / "out/model.safetensors")["model.norm.weight"].dtype == torch.bfloat16
    instruct, grafted = (load_file(folder / "model.safetensors") for folder in (pair[1], tmp_path / "out/grafted"))
    assert all(torch.equal(grafted[name], instruct[name]) for name in instruct)


def test_frozen_reference_adapter_is_not_saved(pair, tmp_path):
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(pair[0], dtype=torch.float32), lora())
    trainer = dpo(pair, tmp_path, model=model)
    assert "ref" in trainer.model.peft_config
    trainer.train()
    assert "ref" in trainer.model.peft_config
    assert not (tmp_path / "ref").exists()
    assert not [name for name in load_file(tmp_path / "adapter_model.safetensors") if ".ref." in name]
    assert isinstance(PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(pair[0]), tmp_path), PeftModel)


def test_grafted_loads_alone_with_instructs_template(pair, tmp_path):
    sft(pair, tmp_path, graft_dtype="float16").train()
    folder = tmp_path / "grafted"
    model = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert model.dtype == torch.float16
    assert tokenizer.chat_template == AutoTokenizer.from_pretrained(pair[1]).chat_template
    assert model.generation_config.eos_token_id == 1
    assert json.loads((folder / "config.json").read_text())["dtype"] == "float16"
    assert not (folder / "training_args.bin").exists()


def test_pair_of_other_shapes_is_refused_before_training(pair, tmp_path):
    other = save_model(tmp_path / "other", template=True, rows=60)
    with pytest.raises(InputError, match="shape"):
        sft((pair[0], other), tmp_path / "out")
    assert not (tmp_path / "out").exists()
