"""Reference policies: where they are made, that they go again, and whose values are used for which rows."""

from __future__ import annotations

import copy
import gc
import json
import shutil
import weakref
from pathlib import Path
from types import SimpleNamespace

import datasets
import pytest
import torch
from accelerate.state import AcceleratorState
from datasets import Dataset, IterableDataset
from peft import PeftModel, get_peft_model
from runs import dpo, log_probability, lora, settings, sft
from safetensors.torch import load_file
from stages import tuned_weights, weights
from tiny import preference_data, save_model
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import DPOConfig, DPOTrainer
from trl.trainer import dpo_trainer
from trl.trainer.dpo_trainer import DataCollatorForPreference
from trl.trainer.utils import hash_module

from shadow_trl import ShadowDPOConfig, ShadowDPOTrainer, graft
from shadow_trl.errors import ConfigError
from shadow_trl.training import reference
from shadow_trl.training.reference import reference_key

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning:transformers")


def second_stage(model, folder: Path, *, instruct=None, data=None, **changes) -> ShadowDPOTrainer:
    return ShadowDPOTrainer(
        model=model,
        instruct_model=instruct,
        args=ShadowDPOConfig(**settings(folder, graft=False, **changes)),
        train_dataset=preference_data(4) if data is None else data,
    )


def values(trainer) -> torch.Tensor:
    return torch.tensor([trainer.train_dataset[name][:] for name in ("ref_chosen_logps", "ref_rejected_logps")])


def gains(pair, rows, name: str) -> dict[str, float]:
    """Sums over the rows of the log probabilities of both answers, under BASE or INSTRUCT."""
    model = AutoModelForCausalLM.from_pretrained(pair[("base", "instruct").index(name)], dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(pair[1])
    return {
        answer: sum(log_probability(model, tokenizer, row, answer) for row in rows) for answer in ("chosen", "rejected")
    }


def test_graft_of_a_lora_start_is_made_in_memory(lora_run, tmp_path, monkeypatch):
    options = {"ref_policy": "grafted", "graft_scale": 0.5, "graft_modules": ["q_proj", "mlp"]}
    # `shared` has the same rows here, and is for the graft on the disk alone.
    written = values(second_stage(str(lora_run), tmp_path / "one", graft_vocab="shared", **options))
    monkeypatch.setattr(reference, "graft", lambda **_: pytest.fail("wrote a graft"))
    found = values(second_stage(str(lora_run), tmp_path / "two", **options))
    assert not (tmp_path / "two").exists() or not list((tmp_path / "two").iterdir())
    torch.testing.assert_close(found, written, rtol=0, atol=2e-5)
    everything = values(second_stage(str(lora_run), tmp_path / "three", ref_policy="grafted"))
    assert (everything - found).abs().max() > 1e-3  # or the selection of weights would not be seen


def reference_in_memory(run: Path, folder: Path, **changes) -> dict[str, torch.Tensor]:
    """Weights of the reference `grafted` of a second stage that keeps it in memory."""
    trainer = second_stage(str(run), folder, ref_policy="grafted", precompute_ref_log_probs=False, **changes)
    return trainer.ref_model.state_dict()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_graft_of_a_lora_start_is_the_sum_in_float64(fp32_pair, lora_run, tmp_path, dtype):
    # With another rounding the graft of the start is written, and its own is chosen from the files.
    changes = {"model_init_kwargs": {"dtype": dtype}, "graft_scale": 0.5, "graft_modules": ["q_proj", "mlp"]}
    changes["graft_rounding"] = "nearest"
    found = reference_in_memory(lora_run, tmp_path, **changes)
    base, tuned, instruct = weights(fp32_pair[0]), tuned_weights(fp32_pair[0], lora_run), weights(fp32_pair[1])
    moved = 0
    for name, tensor in instruct.items():
        chosen = "q_proj" in name or "mlp" in name
        # INSTRUCT is loaded in the policy's dtype before anything is added to it.
        expected = tensor.to(getattr(torch, dtype)).double() + chosen * 0.5 * (tuned[name] - base[name])
        bound = expected.abs() * (2**-8 if dtype == "bfloat16" else 2**-23) + 2**-23 * tensor.abs() + 1e-9
        assert found[name].dtype == getattr(torch, dtype)
        assert ((found[name].double() - expected).abs() <= bound).all(), name
        moved += int((found[name].double() != tensor.to(getattr(torch, dtype)).double()).sum())
    assert moved > 1000


def test_graft_of_a_start_in_memory_is_rounded_as_it_is_written(pair, tmp_path):
    """INSTRUCT in bf16, at random: the bits depend on seed, name and index, and so does what would be shipped."""
    sft(pair, tmp_path / "run", peft_config=lora()).train()
    changes = {"model_init_kwargs": {"dtype": "bfloat16"}, "graft_rounding": "stochastic", "graft_seed": 7}
    found = reference_in_memory(tmp_path / "run", tmp_path / "one", **changes)
    graft(
        base=pair[0], instruct=pair[1], tuned=tmp_path / "run", output=tmp_path / "two", format="model",
        rounding="stochastic", seed=7,
    )  # fmt: skip
    shipped = load_file(tmp_path / "two" / "model.safetensors")
    nearest = reference_in_memory(tmp_path / "run", tmp_path / "three", **{**changes, "graft_rounding": "nearest"})
    assert all(torch.equal(found[name], tensor) for name, tensor in shipped.items())
    assert any(not torch.equal(found[name], nearest[name]) for name in shipped)
    # Where the rounding is left open, and nearest would lose the delta: by name, as from a config or a recipe.
    small = {"model_init_kwargs": {"dtype": "bfloat16"}, "graft_scale": 1e-3}
    found = reference_in_memory(tmp_path / "run", tmp_path / "four", **small)
    report = graft(
        base=pair[0], instruct=pair[1], tuned=tmp_path / "run", output=tmp_path / "five", format="model",
        dtype="bfloat16", scale=1e-3,
    )  # fmt: skip
    assert report.rounding == "stochastic"
    shipped = load_file(tmp_path / "five" / "model.safetensors")
    assert all(torch.equal(found[name], tensor) for name, tensor in shipped.items())


def test_stochastic_rounding_of_the_graft_asks_nothing_of_a_reference_in_fp32(full_run, tmp_path):
    options = {"ref_policy": "grafted", "graft_dtype": "bfloat16"}
    plain = values(second_stage(str(full_run), tmp_path / "one", **options))
    found = values(second_stage(str(full_run), tmp_path / "two", graft_rounding="stochastic", **options))
    assert torch.equal(found, plain)


def test_graft_of_a_full_start_lies_beside_the_results_while_it_is_loaded(full_run, tmp_path, monkeypatch):
    seen = []

    def load(source, **how):
        seen.append(Path(source.source))
        assert (seen[-1] / "model.safetensors").is_file()
        return original(source, **how)

    original = reference.load_reference
    monkeypatch.setattr(reference, "load_reference", load)
    second_stage(str(full_run), tmp_path, ref_policy="grafted")
    assert [path.parent.parent for path in seen] == [tmp_path]
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("policy", [pytest.param("base", marks=pytest.mark.slow), "grafted"])
def test_loaded_adapter_is_no_raw_base(fp32_pair, lora_run, tmp_path, policy):
    below = AutoModelForCausalLM.from_pretrained(fp32_pair[0])
    loaded = PeftModel.from_pretrained(below, lora_run, is_trainable=True)
    trainer = second_stage(loaded, tmp_path / "object", instruct=str(fp32_pair[1]), ref_policy=policy)
    named = second_stage(str(lora_run), tmp_path / "name", ref_policy=policy)
    torch.testing.assert_close(values(trainer), values(named), rtol=0, atol=2e-5)
    assert not list(tmp_path.glob("*/*"))
    if policy == "grafted":
        trainer.train()
        with pytest.raises(ConfigError, match="no longer known"):
            trainer.evaluate(preference_data(3))


def test_start_changed_in_memory_is_the_reference(fp32_pair, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(fp32_pair[0])
    with torch.no_grad():
        model.model.norm.weight *= 1.5
    trainer = ShadowDPOTrainer(
        model=model,
        instruct_model=str(fp32_pair[1]),
        base_model=str(fp32_pair[0]),
        args=ShadowDPOConfig(**settings(tmp_path, max_steps=1, graft=False)),
        train_dataset=preference_data(4),
    )
    trainer.train()
    # Against itself the margin of the first step is 0 and the loss log 2; against BASE on the disk they are not.
    assert trainer.state.log_history[0]["rewards/margins"] == pytest.approx(0, abs=1e-5)
    assert trainer.state.log_history[0]["loss"] == pytest.approx(0.693147, abs=1e-5)


@pytest.mark.parametrize("precompute", [True, False], ids=["precomputed", "in memory"])
def test_graft_of_an_object_that_gets_a_new_adapter(fp32_pair, tmp_path, precompute):
    """PEFT puts its layers into the object itself: its graft is made before."""
    model = AutoModelForCausalLM.from_pretrained(fp32_pair[0], dtype=torch.float32)
    torch.manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    base, instruct, start = weights(fp32_pair[0]), weights(fp32_pair[1]), model.state_dict()
    by_hand = AutoModelForCausalLM.from_pretrained(fp32_pair[1], dtype=torch.float64)
    grafted = {name: instruct[name] + (start[name].double() - base[name]) for name in base}
    by_hand.load_state_dict(grafted, strict=False)
    by_hand.tie_weights()
    policy, tokenizer, rows = (
        copy.deepcopy(model).double(),
        AutoTokenizer.from_pretrained(fp32_pair[1]),
        preference_data(4),
    )
    margins = [
        sign * (log_probability(policy, tokenizer, row, answer) - log_probability(by_hand, tokenizer, row, answer))
        for row in rows
        for answer, sign in (("chosen", 1), ("rejected", -1))
    ]
    trainer = ShadowDPOTrainer(
        model=model,
        base_model=str(fp32_pair[0]),
        instruct_model=str(fp32_pair[1]),
        args=ShadowDPOConfig(
            **settings(
                tmp_path, ref_policy="grafted", precompute_ref_log_probs=precompute, graft=False, max_steps=1, beta=1.0
            )
        ),
        train_dataset=rows,
        peft_config=lora(),
    )
    trainer.train()
    assert abs(sum(margins)) > 1e-3
    assert trainer.state.log_history[0]["rewards/margins"] == pytest.approx(sum(margins) / 4, abs=1e-4)


@pytest.mark.parametrize("with_lora", [False, True], ids=["full", "lora"])
def test_reference_is_released_and_comes_back_for_new_data(pair, tmp_path, with_lora, monkeypatch):
    loaded = []

    def load(*args, **how):
        model = original(*args, **how)
        loaded.append(weakref.ref(model))
        return model

    original = reference.load_reference
    monkeypatch.setattr("shadow_trl.training.policies.load_reference", load)
    trainer = dpo(
        pair, tmp_path, ref_policy="instruct", graft=False, peft_config=lora() if with_lora else None, max_steps=1,
        learning_rate=0,
    )  # fmt: skip
    gc.collect()
    assert [model() for model in loaded] == [None]
    trainer.train()
    rows = preference_data(3)
    metrics = trainer.evaluate(rows)
    # Untrained, the policy is BASE; against BASE the margin would be exactly 0.
    base, instruct = (gains(pair, rows, name) for name in ("base", "instruct"))
    difference = {answer: base[answer] - instruct[answer] for answer in base}
    margin = trainer.beta * (difference["chosen"] - difference["rejected"]) / 3
    assert abs(margin) > 1e-5
    assert metrics["eval_rewards/margins"] == pytest.approx(margin, abs=1e-5)
    gc.collect()
    assert [model() for model in loaded] == [None, None]
    assert trainer.ref_model is None


def with_columns(rows: Dataset) -> Dataset:
    count = len(rows)
    return rows.add_column("ref_chosen_logps", [-1.0] * count).add_column("ref_rejected_logps", [-2.0] * count)


def test_reference_columns_of_the_evaluation_rows_are_used(pair, tmp_path):
    rows = preference_data(4)
    trainer = dpo(
        pair, tmp_path, eval_dataset=with_columns(rows), precompute_ref_log_probs=False, graft=False, beta=1.0
    )
    base = gains(pair, rows, "base")
    margin = (base["chosen"] / 4 + 1.0) - (base["rejected"] / 4 + 2.0)
    assert trainer.evaluate()["eval_loss"] is not None
    assert trainer.state.log_history[-1]["eval_rewards/margins"] == pytest.approx(margin, abs=1e-4)


@pytest.mark.parametrize("policy", ["init", pytest.param("instruct", marks=pytest.mark.slow)])
def test_reference_columns_of_new_rows_are_used_after_the_release(pair, tmp_path, policy):
    """No model is read for them: nothing is left on the disk that could be."""
    rows = preference_data(4)
    copies = tuple(shutil.copytree(folder, tmp_path / folder.name) for folder in pair)
    trainer = dpo(
        copies, tmp_path / "run", ref_policy=policy, precompute_ref_log_probs=True, graft=False, beta=1.0,
        learning_rate=0, max_steps=1,
    )  # fmt: skip
    trainer.train()
    for folder in copies:
        (folder / "model.safetensors").unlink()
    base = gains(pair, rows, "base")
    margin = (base["chosen"] / 4 + 1.0) - (base["rejected"] / 4 + 2.0)
    assert trainer.evaluate(with_columns(rows))["eval_loss"] > 0
    assert trainer.state.log_history[-1]["eval_rewards/margins"] == pytest.approx(margin, abs=1e-4)
    assert trainer.ref_model is None


@pytest.mark.slow
def test_full_fine_tuning_has_no_values_of_its_start_for_new_rows_after_training(pair, tmp_path):
    trainer = dpo(pair, tmp_path, precompute_ref_log_probs=True, graft=False, max_steps=1)
    trainer.train()
    with pytest.raises(ValueError, match="Cannot compute reference log-probs"):
        trainer.evaluate(preference_data(3))


@pytest.mark.slow
def test_reference_columns_of_a_stream_are_used(pair, tmp_path):
    rows = preference_data(4)

    def stream():
        yield from with_columns(rows)

    trainer = dpo(pair, tmp_path, data=IterableDataset.from_generator(stream), graft=False, beta=1.0, max_steps=1)
    trainer.train()
    base = gains(pair, rows, "base")
    margin = (base["chosen"] / 4 + 1.0) - (base["rejected"] / 4 + 2.0)
    assert trainer.state.log_history[0]["rewards/margins"] == pytest.approx(margin, abs=1e-4)


@pytest.mark.slow
def test_evaluation_on_a_stream_keeps_the_reference(pair, tmp_path, caplog):
    def stream():
        yield from preference_data(4)

    trainer = dpo(
        pair, tmp_path, ref_policy="instruct", graft=False, max_steps=1, eval_strategy="steps", eval_steps=1,
        eval_dataset=IterableDataset.from_generator(stream),
    )  # fmt: skip
    assert trainer.ref_model is not None
    assert "stays in memory" in caplog.text
    trainer.train()
    assert any("eval_rewards/margins" in line for line in trainer.state.log_history)


def cached(pair, tmp_path: Path, output: str, **changes) -> list[float]:
    """Reference log-probabilities of rows in a file, as a new run finds or computes them."""
    file = tmp_path / "rows.jsonl"
    if not file.exists():
        preference_data(4).to_json(file)
    data = Dataset.from_json(str(file), cache_dir=str(tmp_path / "cache"))
    trainer = dpo(pair, tmp_path / output, data=data, graft=False, **changes)
    return trainer.train_dataset["ref_rejected_logps"][:]


def test_other_weights_and_another_template_are_no_hit(pair, tmp_path):
    """All else is as it was, folders and options too: with another of these the data are others, and no hit anyway."""
    sides = pair[0], shutil.copytree(pair[1], tmp_path / "instruct")
    options = {"ref_policy": "instruct", "allow_wide_gap": True}
    first = cached(sides, tmp_path, "one", **options)
    tokenizer = AutoTokenizer.from_pretrained(sides[1])
    tokenizer.chat_template = tokenizer.chat_template.replace("'<|end|>'", "'.<|end|>'")
    assert cached(sides, tmp_path, "one", processing_class=tokenizer, **options) != first
    save_model(tmp_path / "other", seed=5, template=True, dtype=torch.bfloat16)
    shutil.copy(tmp_path / "other" / "model.safetensors", sides[1])
    assert cached(sides, tmp_path, "one", **options) != first


def test_a_new_lora_in_the_same_run_again_is_no_miss(pair, tmp_path, monkeypatch):
    options = {"precompute_ref_log_probs": True, "max_length": 64}
    first = cached(pair, tmp_path, "one", peft_config=lora(), seed=1, **options)
    monkeypatch.setattr(DPOTrainer, "compute_ref_log_probs", lambda *_: pytest.fail("computed again"))
    assert cached(pair, tmp_path, "one", peft_config=lora(), seed=1, **options) == first


def test_another_config_beside_the_same_weights_is_no_hit(pair, tmp_path):
    instruct = shutil.copytree(pair[1], tmp_path / "instruct")
    first = cached((pair[0], instruct), tmp_path, "one", ref_policy="instruct")
    config = json.loads((instruct / "config.json").read_text())
    (instruct / "config.json").write_text(json.dumps({**config, "rms_norm_eps": 0.1}))
    second = cached((pair[0], instruct), tmp_path, "one", ref_policy="instruct")
    model = AutoModelForCausalLM.from_pretrained(instruct, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(instruct)
    expected = [log_probability(model, tokenizer, row, "rejected") for row in preference_data(4)]
    assert second == pytest.approx(expected, abs=1e-4)
    assert max(abs(one - other) for one, other in zip(first, second, strict=True)) > 1e-3


def test_another_alpha_beside_the_same_factors_is_no_hit(fp32_pair, lora_run, tmp_path):
    """The scale of an adapter that goes on is in its config alone."""
    run = shutil.copytree(lora_run, tmp_path / "run")
    options = {"precompute_ref_log_probs": True, "model": str(run)}
    first = cached(fp32_pair, tmp_path, "one", **options)
    config = json.loads((run / "adapter_config.json").read_text())
    (run / "adapter_config.json").write_text(json.dumps({**config, "lora_alpha": 4 * config["lora_alpha"]}))
    second = cached(fp32_pair, tmp_path, "one", **options)
    assert max(abs(one - other) for one, other in zip(first, second, strict=True)) > 1e-3


def key(model, folder: Path, *, collator=None, precision="no", **changes) -> str:
    args = ShadowDPOConfig(**settings(folder, **changes))
    collator = collator or DataCollatorForPreference(pad_token_id=0, max_length=args.max_length)
    return reference_key(hash_module(model), model, args, collator, precision)


def with_adapters(folder: Path) -> PeftModel:
    torch.manual_seed(0)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32), lora())
    model.add_adapter("other", lora())
    return model


def rescale(model) -> None:
    model.base_model.model.model.layers[0].self_attn.q_proj.scaling["default"] *= 3


def move(buffer: torch.Tensor) -> None:
    buffer.mul_(1.5)


CHANGES = {
    "a weight": lambda model: move(model.model.norm.weight.data),
    "a stored buffer": lambda model: move(model.kept),
    "a buffer that is not stored": lambda model: move(model.model.rotary_emb.inv_freq),
    "rope": lambda model: model.config.rope_parameters.update(rope_theta=5e5),
    "epsilon": lambda model: setattr(model.config, "rms_norm_eps", 0.1),
    "dtype": lambda model: model.bfloat16(),
    "kernels of attention": lambda model: model.set_attn_implementation("eager"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_the_values_depend_on_in_a_model_is_in_the_key(pair, tmp_path, change):
    model = AutoModelForCausalLM.from_pretrained(pair[0], dtype=torch.float32)
    model.register_buffer("kept", torch.ones(2))
    ids = torch.arange(5, 25)[None]
    before = key(model, tmp_path), model(ids).logits
    assert key(model, tmp_path / "moved") == before[0]
    CHANGES[change](model)
    assert key(model, tmp_path) != before[0]
    if change in ("a weight", "a buffer that is not stored", "dtype"):  # what acts on a model that was made
        assert (model(ids).logits - before[1]).abs().max() > 1e-5


@pytest.mark.parametrize("change", [rescale, lambda model: model.set_adapter("other")], ids=["scaling", "active"])
def test_what_adapters_do_is_in_the_key(pair, tmp_path, change):
    model = with_adapters(pair[0])
    before = key(model, tmp_path)
    assert key(with_adapters(pair[0]), tmp_path) == before
    change(model)
    assert key(model, tmp_path) != before


def collate_in_another_way(rows):
    return rows


@pytest.mark.parametrize(
    "changes",
    [
        {"precision": "bf16"},
        {"precision": "fp16"},
        {"ld_alpha": 0.5},
        {"max_length": 9},
        {"disable_dropout": False},
        {"collator": DataCollatorForPreference(pad_token_id=0, max_length=1024, truncation_mode="keep_end")},
        {"collator": DataCollatorForPreference(pad_token_id=0, max_length=1024, pad_to_multiple_of=8)},
        {"collator": collate_in_another_way},
    ],
    ids=lambda changes: "-".join(f"{name}={getattr(value, '__name__', value)}" for name, value in changes.items()),
)
def test_how_the_values_are_computed_is_in_the_key(pair, tmp_path, changes):
    model = AutoModelForCausalLM.from_pretrained(pair[0])
    assert key(model, tmp_path, **changes) != key(model, tmp_path)
    assert key(model, tmp_path, **changes) == key(model, tmp_path, **changes)


def test_what_the_values_do_not_depend_on_is_not_in_the_key(pair, tmp_path):
    """Not the loss, nor the names of folders."""
    moved = shutil.copytree(pair[0], tmp_path / "moved")
    one, two = (AutoModelForCausalLM.from_pretrained(folder) for folder in (pair[0], moved))
    others = {"label_smoothing": 0.1, "beta": 0.5, "loss_type": "ipo", "learning_rate": 1.0, "seed": 9}
    assert key(one, tmp_path / "a") == key(two, tmp_path / "b", per_device_train_batch_size=1, **others)


def test_a_collator_that_cannot_be_hashed_is_never_the_same(pair, tmp_path, caplog):
    model, generator = AutoModelForCausalLM.from_pretrained(pair[0]), (number for number in range(3))

    def collate(rows):
        return generator and rows

    assert key(model, tmp_path, collator=collate) != key(model, tmp_path, collator=collate)
    assert "are not kept for other runs" in caplog.text


@pytest.fixture
def bf16_by_the_launcher(monkeypatch):
    """`accelerate launch --mixed_precision bf16`, of which the config knows nothing."""

    def launch():
        monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
        AcceleratorState._reset_state(reset_partial_state=True)

    yield launch
    monkeypatch.undo()
    AcceleratorState._reset_state(reset_partial_state=True)


def test_mixed_precision_of_the_launcher_is_no_hit(pair, tmp_path, bf16_by_the_launcher):
    # With a length, TRL's filter closes over the whole config, in which the launcher's word is.
    changes = {"precompute_ref_log_probs": True, "max_length": None}
    first = cached(pair, tmp_path, "one", **changes)
    bf16_by_the_launcher()
    second = cached(pair, tmp_path, "one", **changes)
    plain = DPOTrainer(
        model=str(pair[0]),
        args=DPOConfig(**settings(tmp_path / "plain", **changes)),
        train_dataset=preference_data(4),
        processing_class=AutoTokenizer.from_pretrained(pair[1]),
    )
    assert plain.accelerator.mixed_precision == "bf16"
    assert second == plain.train_dataset["ref_rejected_logps"][:]
    if hasattr(dpo_trainer, "add_fused_lm_head"):  # older releases take full precision here
        assert second != first


def test_a_buffer_changed_in_memory_is_no_hit(pair, tmp_path):
    changes = {"precompute_ref_log_probs": True, "max_length": 64}
    models = [AutoModelForCausalLM.from_pretrained(pair[0], dtype=torch.float32) for _ in range(2)]
    move(models[1].model.rotary_emb.inv_freq)
    first, second = (cached(pair, tmp_path, "one", model=model, **changes) for model in models)
    tokenizer = AutoTokenizer.from_pretrained(pair[1])
    expected = [log_probability(models[1], tokenizer, row, "rejected") for row in preference_data(4)]
    assert second == pytest.approx(expected, abs=1e-4)
    assert max(abs(one - other) for one, other in zip(first, second, strict=True)) > 1e-3


@pytest.mark.slow
def test_an_adapter_that_goes_on_is_part_of_the_key(fp32_pair, lora_run, tmp_path):
    options = {"precompute_ref_log_probs": True, "max_length": 64}
    first = cached(fp32_pair, tmp_path, "one", peft_config=lora(), **options)
    second = cached(fp32_pair, tmp_path, "two", model=str(lora_run), **options)
    assert max(abs(one - other) for one, other in zip(first, second, strict=True)) > 1e-3


def test_reference_columns_in_the_data_are_used_and_nothing_is_loaded(pair, tmp_path, monkeypatch):
    monkeypatch.setattr(
        "shadow_trl.training.policies.load_reference", lambda *_, **__: pytest.fail("loaded a reference")
    )
    rows = preference_data(4)
    rows = rows.add_column("ref_chosen_logps", [-1.0] * 4).add_column("ref_rejected_logps", [-2.0] * 4)
    trainer = dpo(pair, tmp_path, data=rows, ref_policy="instruct", precompute_ref_log_probs=False, graft=False)
    assert trainer.train_dataset["ref_chosen_logps"][:] == [-1.0] * 4
    trainer.train()


def cached_logps(pair, tmp_path: Path, output: str, **changes) -> list[float]:
    return cached(pair, tmp_path, output, **{"ref_policy": "instruct", "max_length": None, **changes})


@pytest.mark.parametrize(
    "changes",
    [
        {"ld_alpha": 0.0},
        {"max_length": 9},
        {"ref_policy": "init", "precompute_ref_log_probs": True},
        {"model_init_kwargs": {"dtype": "bfloat16"}},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_no_stale_value_from_the_cache(pair, tmp_path, changes):
    assert cached_logps(pair, tmp_path, "out") != cached_logps(pair, tmp_path, "out", **changes)


def test_no_needless_miss_of_the_cache(pair, tmp_path, monkeypatch):
    # With a length, TRL's filter closes over the whole config, the output folder included.
    first = cached_logps(pair, tmp_path, "one", max_length=64)
    without = cached_logps(pair, tmp_path, "one")
    monkeypatch.setattr(DPOTrainer, "compute_ref_log_probs", lambda *_: pytest.fail("computed again"))
    assert cached_logps(pair, tmp_path, "one", max_length=64) == first
    assert cached_logps(pair, tmp_path, "another", learning_rate=1.0, seed=9) == without


def test_data_in_memory_goes_to_a_file_once_where_several_processes_read_it(tmp_path, monkeypatch):
    """Real processes do it in tests/whole/distributed; here the main one is alone."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path)
    monkeypatch.setattr(reference, "check_shared", lambda *_, **__: None)
    monkeypatch.setattr(reference, "run_on_main", lambda _, work, *, what: work())
    one, two = (SimpleNamespace(num_processes=number, is_main_process=True) for number in (1, 2))
    rows, stream = preference_data(3), preference_data(3).to_iterable_dataset()
    assert reference.shared_on_disk(rows, one) is rows
    assert reference.shared_on_disk(stream, two) is stream
    assert not list(tmp_path.iterdir())
    for _ in range(2):
        found = reference.shared_on_disk(rows, two)
        assert found[:] == rows[:]
        assert all(Path(file["filename"]).is_relative_to(tmp_path) for file in found.cache_files)
        assert found.cache_files
        assert reference.shared_on_disk(found, two) is found
    assert len(list((tmp_path / "shadow_trl").iterdir())) == 1


def test_where_the_reference_is_the_start_nothing_is_computed_before_training(pair, tmp_path):
    """As in TRL; with another reference it is, and the model is gone."""
    assert dpo(pair, tmp_path / "init").args.precompute_ref_log_probs is False
    other = dpo(pair, tmp_path / "instruct", ref_policy="instruct")
    assert other.args.precompute_ref_log_probs is True
    assert other.ref_model is None
