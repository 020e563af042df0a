"""eval_grafted: the figures of INSTRUCT + delta, and a training run that does not notice."""

from __future__ import annotations

import json
import math
import re
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from peft import LoraConfig, PeftModel
from runs import LORA, log_probability, lora, settings
from stages import tuned_weights, weights
from tiny import make_pair, make_tokenizer, preference_data, save_model, sft_data
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    Gemma4TextConfig,
    Qwen3MoeConfig,
    TrainerCallback,
)
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer
from vision import make_processor

from shadow_trl import ShadowDPOConfig, ShadowDPOTrainer, ShadowSFTConfig, ShadowSFTTrainer
from shadow_trl.checkpoints.checkpoint import read_json
from shadow_trl.errors import ConfigError, GraftError
from shadow_trl.training.evaluation import KeptReferences

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning:transformers")


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return make_pair(tmp_path_factory.mktemp("fp32"), gap=0.2)


class Events(TrainerCallback):
    def __init__(self) -> None:
        self.evaluations: list[dict] = []

    def on_evaluate(self, args, state, control, metrics=None, **kwargs):
        self.evaluations.append(metrics)


def dpo(pair, folder: Path, *, peft_config=None, callbacks=None, **changes) -> ShadowDPOTrainer:
    return ShadowDPOTrainer(
        model=str(pair[0]),
        instruct_model=str(pair[1]),
        args=ShadowDPOConfig(
            **settings(
                folder, **{"eval_strategy": "steps", "eval_steps": 1, "beta": 1.0, "eval_grafted": True, **changes}
            )
        ),
        train_dataset=preference_data(8),
        eval_dataset=preference_data(5),
        peft_config=peft_config,
        callbacks=callbacks,
    )


def margin_by_hand(pair, state: dict[str, torch.Tensor], reference: Path, beta: float) -> tuple[float, float]:
    """Mean margin and mean DPO loss of the model with `state` over the evaluation rows, in float64."""
    tokenizer = AutoTokenizer.from_pretrained(pair[1])
    models = [AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64) for folder in (pair[0], reference)]
    models[0].load_state_dict(state, strict=False)
    models[0].tie_weights()
    margins = []
    for row in preference_data(5):
        chosen, rejected = (
            log_probability(models[0], tokenizer, row, answer) - log_probability(models[1], tokenizer, row, answer)
            for answer in ("chosen", "rejected")
        )
        margins.append(beta * (chosen - rejected))
    losses = [math.log1p(math.exp(-margin)) for margin in margins]
    return sum(margins) / len(margins), sum(losses) / len(losses)


# With an adapter, full, and with values from before training.
QUICK_BY_HAND = {(True, "init", None), (False, "instruct", None)}


@pytest.mark.parametrize(
    ("with_lora", "policy", "precompute"),
    [
        pytest.param(
            with_lora, policy, precompute,
            marks=() if (with_lora, policy, precompute) in QUICK_BY_HAND else pytest.mark.slow,
        )
        for with_lora in (False, True) for policy in ("init", "instruct") for precompute in (None, False)
    ],
)  # fmt: skip
def test_figures_are_those_of_the_grafted_model(pair, tmp_path, with_lora, policy, precompute):
    events = Events()
    trainer = dpo(
        pair, tmp_path, peft_config=lora() if with_lora else None, ref_policy=policy, callbacks=[events],
        graft_scale=0.5, per_device_eval_batch_size=5, precompute_ref_log_probs=precompute,
    )  # fmt: skip
    trainer.train()
    base, instruct = weights(pair[0]), weights(pair[1])
    tuned = tuned_weights(pair[0], tmp_path) if with_lora else weights(tmp_path)
    grafted = {name: instruct[name] + 0.5 * (tuned[name] - base[name]) for name in tuned}
    reference = pair[0] if policy == "init" else pair[1]
    last = events.evaluations[-1]
    for prefix, state in (("eval", tuned), ("eval_grafted", grafted)):
        margin, loss = margin_by_hand(pair, state, reference, 1.0)
        assert last[f"{prefix}_loss"] == pytest.approx(loss, abs=2e-5)
        assert last[f"{prefix}_rewards/margins"] == pytest.approx(margin, abs=5e-5)
        assert f"{prefix}_rewards/accuracies" in last
    assert last["eval_grafted_loss"] != pytest.approx(last["eval_loss"], abs=1e-4)
    # One event an evaluation, and one line of log with both.
    assert len(events.evaluations) == 2
    logged = [line for line in trainer.state.log_history if "eval_loss" in line]
    assert len(logged) == 2
    assert all("eval_grafted_loss" in line for line in logged)


def test_adapter_on_the_full_model_of_an_earlier_stage(pair, tmp_path):
    """The graft carries the delta below the adapter too: INSTRUCT + scale * (model with adapter - BASE)."""
    ShadowSFTTrainer(
        model=str(pair[0]),
        instruct_model=str(pair[1]),
        args=ShadowSFTConfig(**settings(tmp_path / "sft")),
        train_dataset=sft_data(),
    ).train()
    trainer = dpo(
        (tmp_path / "sft", pair[1]), tmp_path / "dpo", peft_config=lora(), graft_scale=0.5, per_device_eval_batch_size=5
    )
    trainer.train()
    base, instruct, tuned = weights(pair[0]), weights(pair[1]), tuned_weights(tmp_path / "sft", tmp_path / "dpo")
    grafted = {name: instruct[name] + 0.5 * (tuned[name] - base[name]) for name in tuned}
    margin, loss = margin_by_hand(pair, grafted, tmp_path / "sft", 1.0)
    last = [line for line in trainer.state.log_history if "eval_loss" in line][-1]
    assert last["eval_grafted_loss"] == pytest.approx(loss, abs=2e-5)
    assert last["eval_grafted_rewards/margins"] == pytest.approx(margin, abs=5e-5)


@pytest.mark.filterwarnings("ignore:`return_outputs=True`")  # TRL's own, of what it does for compute_metrics
def test_several_data_sets_and_compute_metrics(pair, tmp_path):
    """With an untrained LoRA the graft is INSTRUCT: plain TRL on INSTRUCT gives the same metric."""

    def mean_logit(prediction) -> dict[str, float]:
        return {"mean_logit": float(prediction.predictions.mean())}

    rows = {"one": preference_data(3), "two": preference_data(5)}
    trainer = ShadowDPOTrainer(
        model=str(pair[0]),
        instruct_model=str(pair[1]),
        args=ShadowDPOConfig(**settings(tmp_path, eval_grafted=True, graft=False, per_device_eval_batch_size=5)),
        train_dataset=preference_data(8),
        eval_dataset=rows,
        peft_config=lora(),
        compute_metrics=mean_logit,
    )
    found = trainer.evaluate()
    for index, model in (("eval", pair[0]), ("eval_grafted", pair[1])):
        plain = DPOTrainer(
            model=str(model),
            args=DPOConfig(**settings(tmp_path / index, per_device_eval_batch_size=5)),
            train_dataset=preference_data(8),
            eval_dataset=rows,
            processing_class=AutoTokenizer.from_pretrained(pair[1]),
            compute_metrics=mean_logit,
        ).evaluate()
        for name in rows:
            key = f"eval_{name}" + ("_grafted" if index == "eval_grafted" else "")
            assert found[f"{key}_mean_logit"] == pytest.approx(plain[f"eval_{name}_mean_logit"], rel=1e-5)
    assert found["eval_one_mean_logit"] != pytest.approx(found["eval_one_grafted_mean_logit"], rel=1e-3)


@pytest.mark.parametrize("name", ["is_quantized", "is_loaded_in_4bit"])
def test_quantised_base_is_refused(pair, tmp_path, name):
    # Quantisation itself needs an accelerator here; transformers marks such a model with these attributes.
    model = AutoModelForCausalLM.from_pretrained(pair[0])
    setattr(model, name, True)
    model.hf_quantizer = SimpleNamespace(is_trainable=True, is_qat_trainable=False)
    args = ShadowDPOConfig(**settings(tmp_path / "out", eval_grafted=True))
    with pytest.raises(ConfigError, match="BASE is quantised"):
        ShadowDPOTrainer(
            model, None, args, instruct_model=str(pair[1]), train_dataset=preference_data(4), peft_config=lora()
        )
    assert not list(tmp_path.glob("out/*"))


def plain_figures(folder: Path, kind: str, reference: Path, args: dict, dtype: str) -> dict[str, float]:
    """The figures of the grafted folder in plain TRL, which knows nothing of BASE, TUNED and their sums."""
    model: Any = str(folder)
    if (folder / "adapter_config.json").exists():
        instruct = read_json(folder / "adapter_config.json")["base_model_name_or_path"]
        model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(instruct, dtype=dtype), folder)
    else:
        args = {**args, "model_init_kwargs": {"dtype": dtype}}
    with_tokenizer = {"processing_class": AutoTokenizer.from_pretrained(folder)}
    if kind == "sft":
        plain = SFTTrainer(
            model, SFTConfig(**args), train_dataset=sft_data(5), eval_dataset=sft_data(5), **with_tokenizer
        )
    else:
        ref_model = AutoModelForCausalLM.from_pretrained(reference, dtype=dtype)
        plain = DPOTrainer(
            model, ref_model, DPOConfig(**args), train_dataset=preference_data(5), eval_dataset=preference_data(5),
            **with_tokenizer,
        )  # fmt: skip
        # As in training: alone, transformers leaves a model out of mixed precision where a reference is prepared.
        plain.model = plain.accelerator.prepare_model(plain.model, evaluation_mode=True)
    return plain.evaluate()


def assert_figures(sides, output: Path, *, kind: str = "sft", peft=None, move=None, **changes) -> ShadowSFTTrainer:
    """`eval_grafted_*` of weights that moved at random are what plain TRL finds on the folder of their graft."""
    common = {"per_device_eval_batch_size": 5, "bf16": changes.pop("bf16", False)}
    loading = changes.pop("model_init_kwargs", {})
    (trainer_class, config_class), data = {
        "sft": ((ShadowSFTTrainer, ShadowSFTConfig), sft_data(5)),
        "dpo": ((ShadowDPOTrainer, ShadowDPOConfig), preference_data(5)),
    }[kind]
    options = {"eval_grafted": True, "graft_format": "model", "allow_wide_gap": True, **changes}
    trainer = trainer_class(
        model=str(sides[0]),
        instruct_model=str(sides[1]),
        args=config_class(**settings(output, model_init_kwargs=loading, **common, **options)),
        train_dataset=data,
        eval_dataset=data,
        peft_config=None if peft is None else LoraConfig(**peft),
    )
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in trainer.model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
        if move is not None:
            move(trainer.model)
    found = trainer.evaluate()
    trainer.graft()
    assert not list(output.glob(".*"))
    args = settings(output / "plain", **common)
    plain = plain_figures(output / "grafted", kind, sides[0], args, loading.get("dtype", "float32"))
    # Of the run, not of a model.
    names = [
        name.removeprefix("eval_")
        for name in plain
        if name.startswith("eval_") and not re.search("runtime|per_second|num_tokens|preparation", name)
    ]
    assert {"loss", "mean_token_accuracy"} <= {*names}
    for name in names:
        assert found[f"eval_grafted_{name}"] == pytest.approx(plain[f"eval_{name}"], rel=1e-6, abs=1e-7), name
    moved = "logps/chosen" if kind == "dpo" else "loss"  # in 16 bits the loss of DPO may well be the same
    assert found[f"eval_grafted_{moved}"] != pytest.approx(found[f"eval_{moved}"], rel=1e-5)
    return trainer


ADAPTERS: dict[str, dict | None] = {
    "full": None,
    "lora": LORA,
    "dora": {**LORA, "use_dora": True},
    "pissa": {**LORA, "init_lora_weights": "pissa"},
    "stored": {**LORA, "target_modules": ["q_proj"], "modules_to_save": ["down_proj"]},
}
OPTIONS: dict[str, dict] = {
    "plain": {},
    "bf16 output": {"graft_dtype": "bfloat16"},
    # Its bits depend on the arithmetic, the seed and the place of each element.
    "stochastic": {
        **{"graft_dtype": "bfloat16", "graft_rounding": "stochastic", "graft_seed": 5, "graft_scale": 0.7},
        "instruct_scale": 0.9,
    },
    "loaded in bf16": {"model_init_kwargs": {"dtype": "bfloat16"}},
    "autocast": {"bf16": True},
    "modules": {"graft_modules": ["mlp"], "graft_scale": 0.5},
    "instruct_scale": {"instruct_scale": 0.7},
    "adapter form": {"graft_format": "adapter", "graft_scale": 0.5},
}
# The default suite: each way of training, each loss, each form, and roundings that a sum in memory would not have.
QUICK = {("sft", "full", "stochastic"), ("sft", "dora", "plain"), ("dpo", "lora", "adapter form")}
MATRIX = [
    *(("sft", adapter, option) for adapter in ("full", "lora") for option in OPTIONS),
    *(("sft", adapter, option) for adapter in ("dora", "pissa", "stored") for option in ("plain", "modules")),
    *(("sft", adapter, "adapter form") for adapter in ("pissa", "stored")),
    *(("dpo", adapter, option) for adapter in ("full", "lora") for option in ("plain", "loaded in bf16", "autocast")),
    ("dpo", "lora", "adapter form"),
]


@pytest.mark.parametrize(
    ("kind", "adapter", "option"),
    [
        pytest.param(*cell, id="-".join(cell), marks=() if cell in QUICK else pytest.mark.slow)
        for cell in MATRIX
        if cell[1:] != ("full", "adapter form")
    ],
)
def test_figures_are_those_of_the_folder_in_plain_trl(pair, tmp_path, kind, adapter, option):
    assert_figures(pair, tmp_path, kind=kind, peft=ADAPTERS[adapter], **OPTIONS[option])


def settings_of(folder: Path, **changes) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**read_json(path), **changes}))


@pytest.mark.parametrize("adapter", ["full", pytest.param("lora", marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    "difference",
    ["config", "policy", "base_tied", pytest.param("instruct_tied", marks=pytest.mark.slow), "rows", "more_rows"],
)
def test_figures_have_the_config_ties_and_rows_of_instruct(pair, tmp_path, difference, adapter):
    sides = [shutil.copytree(folder, tmp_path / folder.name) for folder in pair]
    changes = {}
    if difference == "config":
        settings_of(sides[1], rms_norm_eps=0.1, rope_parameters={"rope_type": "default", "rope_theta": 100.0})
    elif difference == "policy":
        changes["model_init_kwargs"] = {"rms_norm_eps": 0.1}
    elif difference == "base_tied":
        sides[1] = save_model(tmp_path / "untied", seed=4, template=True, tied=False)
    elif difference == "instruct_tied":
        sides[0] = save_model(tmp_path / "untied", seed=4, tied=False)
        changes["graft_modules"] = ["layers"]
    elif difference == "rows":
        for name in ("tokenizer.json", "tokenizer_config.json"):
            path = sides[0] / name
            path.write_text(path.read_text().replace("<|user|>", "<|reserved|>"))
        changes["graft_vocab"] = "shared"
    else:
        sides[1] = save_model(tmp_path / "more", template=True, rows=53)
        changes["graft_vocab"] = "shared"
    peft = None if adapter == "full" else {**LORA, "target_modules": ["q_proj", "up_proj"]}
    assert_figures(sides, tmp_path / "out", peft=peft, **changes)


# Sizes are small; all else is as in the config.json of the pairs on the hub, with ids of the tiny tokenizer.
SMALL = {
    "vocab_size": 49, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "torch_dtype": "bfloat16",
}  # fmt: skip
QWEN = {"hidden_act": "silu", "initializer_range": 0.02, "rms_norm_eps": 1e-6, "use_sliding_window": False}
LLAMA_ROPE = {
    "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64,
    "rope_type": "llama3",
}  # fmt: skip
GEMMA = {
    "head_dim": 8, "hidden_activation": "gelu_pytorch_tanh", "query_pre_attn_scalar": 8, "rms_norm_eps": 1e-6,
    "rope_local_base_freq": 10000, "rope_theta": 1000000, "sliding_window": 8, "sliding_window_pattern": 2,
    "max_position_embeddings": 32768, "attn_logit_softcapping": None, "final_logit_softcapping": None,
}  # fmt: skip
REAL: dict[str, tuple[dict, dict, dict]] = {  # what both say, BASE, INSTRUCT
    "qwen2.5-1.5b": (
        {
            **{"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", **SMALL, **QWEN},
            **{"tie_word_embeddings": True, "rope_theta": 1000000.0, "bos_token_id": 0},
        },
        {"max_position_embeddings": 131072, "sliding_window": 131072, "max_window_layers": 2, "eos_token_id": 0,
         "use_mrope": False},
        {"max_position_embeddings": 32768, "sliding_window": 32768, "max_window_layers": 1, "eos_token_id": 1},
    ),
    "qwen2.5-math": (
        {
            **{"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", **SMALL, **QWEN},
            **{"tie_word_embeddings": False, "bos_token_id": 0},
        },
        {"max_position_embeddings": 4096, "rope_theta": 10000, "eos_token_id": 0},
        {"max_position_embeddings": 32768, "rope_theta": 1000000.0, "eos_token_id": 1},
    ),
    "qwen3-0.6b": (
        {
            **{"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", **SMALL, **QWEN, "head_dim": 8},
            **{"tie_word_embeddings": True, "rope_theta": 1000000, "bos_token_id": 0, "attention_bias": False},
            **{"sliding_window": None, "max_window_layers": 2, "rope_scaling": None},
        },
        {"max_position_embeddings": 32768, "eos_token_id": 0},
        {"max_position_embeddings": 40960, "eos_token_id": 1},
    ),
    "llama-3.1-8b": (
        {
            **{"architectures": ["LlamaForCausalLM"], "model_type": "llama", **SMALL, "hidden_act": "silu"},
            **{"rms_norm_eps": 1e-5, "rope_theta": 500000.0, "rope_scaling": LLAMA_ROPE, "bos_token_id": 0},
            **{"max_position_embeddings": 131072, "tie_word_embeddings": False, "mlp_bias": False},
        },
        {"eos_token_id": 0},
        {"eos_token_id": [0, 1, 3]},
    ),
    "gemma-3-1b": (
        {"architectures": ["Gemma3ForCausalLM"], "model_type": "gemma3_text", **SMALL, **GEMMA, "pad_token_id": 0,
         "bos_token_id": 2, "cache_implementation": "hybrid"},
        {"eos_token_id": 1},
        {"eos_token_id": [1, 3]},
    ),
    "gemma-3-4b": (
        {
            **{"architectures": ["Gemma3ForConditionalGeneration"], "model_type": "gemma3", "mm_tokens_per_image": 4},
            **{"boi_token_index": 5, "image_token_index": 6, "eoi_token_index": 7, "torch_dtype": "bfloat16"},
            "vision_config": {
                **{"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2},
                **{"image_size": 28, "patch_size": 7, "model_type": "siglip_vision_model"},
            },
        },
        {"text_config": {**SMALL, **GEMMA, "model_type": "gemma3_text", "vocab_size": 53}, "eos_token_id": 1},
        {"text_config": {**SMALL, **GEMMA, "model_type": "gemma3_text", "vocab_size": 53}, "eos_token_id": [1, 3]},
    ),
}  # fmt: skip


def real_pair(folder: Path, name: str) -> list[Path]:
    both, *own = REAL[name]
    torch.manual_seed(5)
    state: dict[str, torch.Tensor] = {}
    for role, config in zip(("base", "instruct"), own, strict=True):
        (folder / role).mkdir()
        (folder / role / "config.json").write_text(json.dumps({**both, **config}))
        loaded = AutoConfig.from_pretrained(folder / role)
        model = getattr(transformers, loaded.architectures[0])(loaded).bfloat16()
        with torch.no_grad():
            for weight, value in model.state_dict().items():
                value.copy_(state.get(weight, value) + (0.01 * torch.randn_like(value) if state else 0))
        state = {weight: value.clone() for weight, value in model.state_dict().items()}
        model.save_pretrained(folder / role)
        (folder / role / "config.json").write_text(json.dumps({**both, **config}))  # as published, not as saved
        tokens = make_processor() if "vision_config" in both else make_tokenizer(template=role == "instruct")
        tokens.save_pretrained(folder / role)
    return [folder / "base", folder / "instruct"]


@pytest.mark.parametrize(
    ("name", "kind", "adapter"),
    [
        ("qwen2.5-math", "dpo", "full"),
        *(
            pytest.param(name, kind, adapter, marks=pytest.mark.slow)
            for name, kind, adapter in [
                *(("qwen2.5-1.5b", "sft", "full"), ("qwen3-0.6b", "dpo", "lora"), ("llama-3.1-8b", "sft", "lora")),
                *(("gemma-3-1b", "dpo", "full"), ("gemma-3-4b", "sft", "full"), ("gemma-3-4b", "dpo", "lora")),
            ]
        ),
    ],
)
def test_figures_of_pairs_with_the_configs_that_are_published(tmp_path, name, kind, adapter):
    sides = real_pair(tmp_path, name)
    changes = {"model_init_kwargs": {"dtype": "bfloat16"}} if adapter == "full" else {}
    peft = None if adapter == "full" else {**LORA, "target_modules": ".*(q_proj|down_proj)"}
    assert_figures(sides, tmp_path / "out", kind=kind, peft=peft, **changes)


def test_figures_have_the_buffers_that_act_as_weights(tmp_path):
    """Gemma 4 multiplies the output of each layer by a stored buffer."""
    config = Gemma4TextConfig(
        **{**SMALL, "torch_dtype": None, "head_dim": 8, "vocab_size_per_layer_input": 49, "pad_token_id": 0},
        **{"hidden_size_per_layer_input": 0, "num_kv_shared_layers": 0, "eos_token_id": 1, "global_head_dim": 8},
        **{"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 8},
    )
    torch.manual_seed(6)
    model = AutoModelForCausalLM.from_config(config)
    for role, value in (("base", 0.9), ("instruct", 1.3)):
        for layer in model.model.layers:
            layer.layer_scalar.fill_(value)
        model.save_pretrained(tmp_path / role)
        make_tokenizer(template=role == "instruct").save_pretrained(tmp_path / role)

    def move(trained: Any) -> None:
        for layer in trained.model.layers:
            layer.layer_scalar += 0.4

    assert_figures((tmp_path / "base", tmp_path / "instruct"), tmp_path / "out", move=move)
    shipped = AutoModelForCausalLM.from_pretrained(tmp_path / "out/grafted")
    assert [float(layer.layer_scalar) for layer in shipped.model.layers] == pytest.approx([1.7, 1.7])


@pytest.mark.parametrize("kind", ["sft", "dpo"])
@pytest.mark.parametrize("with_lora", [pytest.param(False, marks=pytest.mark.slow), True], ids=["full", "lora"])
def test_training_does_not_notice(pair, tmp_path, kind, with_lora):
    """Same weights and same plain figures with and without the second pass, dropout (random state) included."""
    results = {}
    for grafted in (False, True):
        folder = tmp_path / str(grafted)
        peft_config = LoraConfig(**LORA, lora_dropout=0.2) if with_lora else None
        shared = {"eval_strategy": "steps", "eval_steps": 1, "eval_grafted": grafted, "max_steps": 3}
        if kind == "dpo":
            trainer = dpo(pair, folder, peft_config=peft_config, disable_dropout=False, ref_policy="init", **shared)
        else:
            trainer = ShadowSFTTrainer(
                model=str(pair[0]),
                instruct_model=str(pair[1]),
                args=ShadowSFTConfig(**settings(folder, **shared)),
                train_dataset=sft_data(),
                eval_dataset=sft_data(5),
                peft_config=peft_config,
            )
        trainer.train()
        name = "adapter_model.safetensors" if with_lora else "model.safetensors"
        timing = ("runtime", "per_second", "grafted")
        history = [
            {key: value for key, value in line.items() if not any(part in key for part in timing)}
            for line in trainer.state.log_history
        ]
        results[grafted] = ((folder / name).read_bytes(), history)
    assert results[True] == results[False]


@pytest.mark.parametrize("with_lora", [False, True], ids=["full", "lora"])
def test_weights_and_scaling_come_back_bit_equal_after_an_error(pair, tmp_path, with_lora, monkeypatch):
    killed = tmp_path / f".grafted.shadow-part-{2**22 + 1}-0"  # what a run left that was killed while it evaluated
    (killed / "tuned").mkdir(parents=True)
    trainer = dpo(pair, tmp_path, peft_config=lora() if with_lora else None, graft_scale=0.3, graft=with_lora)
    before = {name: tensor.clone() for name, tensor in trainer.model.state_dict().items()}
    scalings = [
        dict(module.scaling) for module in trainer.model.modules() if isinstance(getattr(module, "scaling", None), dict)
    ]
    calls, trained = [], trainer.model

    def broken(*args, **kwargs):
        calls.append(1)
        if len(calls) == 2:  # in the second pass: each has one batch
            assert trainer.model is not trained
            raise RuntimeError("in the middle")
        return original(*args, **kwargs)

    original = trainer.prediction_step
    monkeypatch.setattr(trainer, "prediction_step", broken)
    with pytest.raises(RuntimeError, match="in the middle"):
        trainer.evaluate()
    assert trainer.model is trained
    assert not list(tmp_path.iterdir())
    assert all(torch.equal(tensor, before[name]) for name, tensor in trainer.model.state_dict().items())
    assert scalings == [
        dict(module.scaling) for module in trainer.model.modules() if isinstance(getattr(module, "scaling", None), dict)
    ]


def test_best_checkpoint_is_the_best_graft(pair, tmp_path):
    """By the losses that plain TRL finds on the graft of every checkpoint; the best BASE is another one."""
    options = {"per_device_eval_batch_size": 5, "max_steps": 3, "learning_rate": 0.02}
    trainer = ShadowSFTTrainer(
        model=str(pair[0]),
        instruct_model=str(pair[1]),
        args=ShadowSFTConfig(
            **{**settings(tmp_path, **options), "save_strategy": "steps"}, save_steps=1, eval_strategy="steps",
            eval_steps=1, graft_scale=60.0, graft_every_save=True, eval_grafted=True, load_best_model_at_end=True,
            metric_for_best_model="eval_grafted_loss", greater_is_better=False,
        ),
        train_dataset=sft_data(5),
        eval_dataset=sft_data(5),
    )  # fmt: skip
    trainer.train()
    figures = {line["step"]: line for line in trainer.state.log_history if "eval_loss" in line}
    args = settings(tmp_path / "plain", per_device_eval_batch_size=5)
    losses = {}
    for step, line in figures.items():
        folder = tmp_path / f"checkpoint-{step}/shadow/grafted"
        losses[step] = plain_figures(folder, "sft", pair[0], args, "float32")["eval_loss"]
        assert line["eval_grafted_loss"] == pytest.approx(losses[step], rel=1e-6)
    best = min(losses, key=losses.__getitem__)
    assert best != min(figures, key=lambda step: figures[step]["eval_loss"])
    assert trainer.state.best_model_checkpoint.endswith(f"checkpoint-{best}")
    for shipped, kept in (
        ("model.safetensors",) * 2,
        ("grafted/model.safetensors", "shadow/grafted/model.safetensors"),
    ):
        assert (tmp_path / shipped).read_bytes() == (tmp_path / f"checkpoint-{best}" / kept).read_bytes()


@pytest.fixture(scope="module")
def mixture(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A pair whose experts are single weights on disk and one weight in memory."""
    root = tmp_path_factory.mktemp("mixture")
    config = Qwen3MoeConfig(
        **{"vocab_size": len(make_tokenizer(template=True)), "hidden_size": 16, "intermediate_size": 32},
        **{"moe_intermediate_size": 8, "num_experts": 4, "num_experts_per_tok": 2, "num_hidden_layers": 1},
        **{"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8, "pad_token_id": 0, "eos_token_id": 1},
    )
    torch.manual_seed(3)
    model = AutoModelForCausalLM.from_config(config)
    for role in ("base", "instruct"):
        model.save_pretrained(root / role)
        make_tokenizer(template=role == "instruct").save_pretrained(root / role)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.01 * torch.randn_like(parameter))
    return root / "base", root / "instruct"


@pytest.mark.parametrize(
    "modules",
    [
        pytest.param([r"experts\.\d+\.(gate|up)_proj"], id="whole", marks=pytest.mark.slow),
        pytest.param([r"experts\.0\."], id="part of a weight in memory"),
    ],
)
def test_modules_are_searched_in_the_names_on_disk(mixture, tmp_path, modules):
    """As `graft` does: `experts.N.gate_proj` is a name on disk only, `experts.gate_up_proj` one in memory only."""
    assert_figures(mixture, tmp_path, graft_modules=modules)


def test_reference_values_of_the_first_pass_are_for_the_same_batches_in_the_second():
    batches = [{"input_ids": torch.tensor(ids)} for ids in ([[1, 2], [3, 4]], [[5, 6], [7, 8]], [[1, 2, 3, 4]])]
    kept = KeptReferences()
    assert [kept.of(batch, lambda at=at: at) for at, batch in enumerate(batches)] == [0, 1, 2]
    kept.again = True
    assert kept.of(batches[0], lambda: pytest.fail("computed again")) == 0
    for other in (batches[0], batches[2], {"input_ids": torch.tensor([[5, 6, 7, 8]])}):
        with pytest.raises(GraftError, match="another order"):  # rows of another number or shape
            kept.of(other, lambda: pytest.fail("computed again"))
    assert [kept.of(batch, lambda: pytest.fail("computed again")) for batch in batches[1:]] == [1, 2]
    with pytest.raises(GraftError, match="another order"):  # one more than in the first pass
        kept.of(batches[2], lambda: pytest.fail("computed again"))
