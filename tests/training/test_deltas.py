"""The delta that is grafted is the delta that was learnt: stage after stage, in every dtype, full and with adapters.

The oracle knows nothing of the code: it reads the model in memory before training and after it, and INSTRUCT's file.
"""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, OFTConfig, PeftModel, get_peft_model
from releases import has, needs
from runs import settings
from safetensors.torch import load_file
from tiny import make_pair, make_tokenizer, preference_data, sft_data
from transformers import AutoModelForCausalLM, AutoTokenizer, GptOssConfig
from trl import SFTConfig, SFTTrainer

from shadow_trl import ShadowDPOConfig, ShadowDPOTrainer, ShadowSFTConfig, ShadowSFTTrainer, graft

pytestmark = [pytest.mark.filterwarnings("ignore::UserWarning"), pytest.mark.filterwarnings("ignore::FutureWarning")]

LORA = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "up_proj"], "task_type": "CAUSAL_LM"}
VALUES = {"modules_to_save": ["input_layernorm", "lm_head"], "trainable_token_indices": [3, 7]}
VALUES |= {"bias": "lora_only" if has("peft", "0.21") else "all"}
KINDS = {
    "full": None,
    "lora": LoraConfig(**LORA),
    "values": LoraConfig(**{**LORA, **VALUES, "target_modules": ["q_proj"]}),
    "dora": LoraConfig(**LORA, use_dora=True),
    "pissa": LoraConfig(**LORA, init_lora_weights="pissa"),
    "olora": LoraConfig(**LORA, init_lora_weights="olora"),
    "oft": OFTConfig(oft_block_size=4, target_modules=["q_proj", "up_proj"], task_type="CAUSAL_LM"),
}
FP32, BF16, FP16 = "float32", "bfloat16", "float16"


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """An untied pair in fp32, with biases, no value of which is one of 16 bits."""
    folder = tmp_path_factory.mktemp("pair")
    base, instruct = make_pair(folder, tied=False, attention_bias=True)
    for seed, side in enumerate((base, instruct)):
        model = AutoModelForCausalLM.from_pretrained(side)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for value in model.parameters():
                value.add_(0.01 * torch.randn(value.shape, generator=generator))
        model.save_pretrained(side)
    return base, instruct


def trainer_of(pair, folder: Path, model, kind: str, dtype: str, *, dpo: bool = False, **options):
    """A trainer that starts from `model`; the same kind of adapter is trained further where it is an adapter."""
    further = isinstance(model, Path) and (model / "adapter_config.json").exists()
    base = options.pop("base_model", None)
    arguments = settings(folder, graft_dtype="float32", **options)
    if isinstance(model, Path):
        arguments["model_init_kwargs"] = {"dtype": dtype}
    config, trainer = (ShadowDPOConfig, ShadowDPOTrainer) if dpo else (ShadowSFTConfig, ShadowSFTTrainer)
    return trainer(
        model=str(model) if isinstance(model, Path) else model,
        instruct_model=str(pair[1]),
        base_model=base,
        args=config(**arguments),
        train_dataset=preference_data() if dpo else sft_data(),
        eval_dataset=sft_data() if "eval_strategy" in options else None,
        peft_config=None if further else copy.deepcopy(KINDS[kind]),
    )


def effect(model) -> dict[str, torch.Tensor]:
    """The weights that a model acts with, float64: an adapter is merged by PEFT in that dtype."""
    model = copy.deepcopy(model)
    if isinstance(model, PeftModel):
        if "ref" in model.peft_config:
            model.delete_adapter("ref")
        model = model.double().merge_and_unload()
    return {name: value.detach().double().clone() for name, value in model.named_parameters(remove_duplicate=False)}


def learn(trainer, total: dict[str, torch.Tensor] | None = None) -> dict[str, torch.Tensor]:
    """Train, and return what was learnt by that and by the stages before."""
    before = effect(trainer.model)
    trainer.train()
    after = effect(trainer.model)
    return {name: value - before[name] + (0 if total is None else total[name]) for name, value in after.items()}


def check(pair, folder: Path, learnt: dict[str, torch.Tensor]) -> None:
    """The graft is INSTRUCT and what was learnt: that of the trainer, and that of the command's function."""
    instruct, base, found = (load_file(path / "model.safetensors") for path in (pair[1], pair[0], folder / "grafted"))
    assert any(value.any() for value in learnt.values())
    for name, value in found.items():
        wanted = instruct[name].double() + learnt[name]
        sizes = (wanted, instruct[name], base[name], base[name] + learnt[name])
        largest = max(float(side.abs().max()) for side in sizes)
        assert float((value.double() - wanted).abs().max()) <= 2.0**-22 * largest, name
    again(pair, folder, found)


def again(pair, folder: Path, found: dict[str, torch.Tensor]) -> None:
    """`graft` of the folders alone gives the bits of the trainer's graft."""
    graft(base=pair[0], instruct=pair[1], tuned=folder, output=folder / "again", dtype=FP32, progress=False)
    for name, value in load_file(folder / "again" / "model.safetensors").items():
        assert torch.equal(value, found[name]), name


FIRST: dict[tuple, tuple[Path, dict[str, torch.Tensor]]] = {}


def first_stage(pair, home: Path, kind: str, dtype: str) -> tuple[Path, dict[str, torch.Tensor]]:
    """The folder of a first stage and what it learnt, made once."""
    if (pair, kind, dtype) not in FIRST:
        folder = home / f"{kind}-{dtype}"
        FIRST[pair, kind, dtype] = folder, learn(trainer_of(pair, folder, pair[0], kind, dtype))
    return FIRST[pair, kind, dtype]


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    return tmp_path_factory.mktemp("first")


# (Of stage one, of stage two.) Where two stages differ, the second is the wider: what the first learnt is not rounded
# then, and the sum over the stages is what was learnt.
DTYPES = [(FP32, FP32), (BF16, BF16), (BF16, FP32)]
QUICK = {
    ("sft", "full", None, BF16, BF16), ("dpo", "values", None, BF16, BF16), ("sft", "full", "full", BF16, FP32),
    ("dpo", "values", "full", BF16, FP32), ("sft", "lora", "lora", BF16, FP32),
    ("sft", "dora", None, BF16, BF16),
}  # fmt: skip
MATRIX = [
    pytest.param(trainer, kind, before, *dtypes,
                 marks=() if (trainer, kind, before, *dtypes) in QUICK else pytest.mark.slow)
    for trainer in ("sft", "dpo")
    for kind in ("full", "lora", "values", "dora")
    for before in (None, "full", "lora")
    for dtypes in DTYPES
    if (before is not None or dtypes != (BF16, FP32)) and (kind, before) != ("dora", "lora")
]  # fmt: skip


@pytest.mark.parametrize(("trainer", "kind", "before", "one", "two"), MATRIX)
def test_the_graft_is_instruct_and_what_was_learnt(pair, home, tmp_path, trainer, kind, before, one, two):
    model, total, base = pair[0], None, None
    if before is not None:
        model, total = first_stage(pair, home, before, one)
    if before == "lora" and kind != "lora":  # merged by PEFT in the dtype of its training, as its user would
        below = AutoModelForCausalLM.from_pretrained(pair[0], dtype=getattr(torch, one))
        merged = PeftModel.from_pretrained(below, model).merge_and_unload()
        model, base = tmp_path / "merged", str(pair[0])
        merged.save_pretrained(model)
        loaded = effect(AutoModelForCausalLM.from_pretrained(pair[0], dtype=getattr(torch, one)))
        total = {name: value - loaded[name] for name, value in effect(merged).items()}
    run = trainer_of(pair, tmp_path / "run", model, kind, two, dpo=trainer == "dpo", base_model=base)
    check(pair, tmp_path / "run", learn(run, total))


STILL = [((kind, dtype),) for kind in KINDS for dtype in (FP32, BF16, FP16)]
STILL += [(("full", one), ("full", two)) for one in (FP32, BF16, FP16) for two in (FP32, BF16, FP16)]
STILL += [
    ((before, one), (kind, two))
    for kind in KINDS
    for before in ("full", kind)
    for one, two in ((BF16, FP32), (FP32, BF16), (FP16, BF16))
    if kind != "full"
]
QUICK_STILL = {(("full", BF16), ("full", FP32)), (("full", FP16), ("full", BF16)), (("values", BF16), ("values", FP32)),
               (("full", BF16), ("dora", FP32))}  # fmt: skip
UNTRAINED: dict[tuple, Path] = {}


def untrained(pair, home: Path, stages: tuple) -> Path:
    """The folder of stages that learnt nothing, each made once."""
    if not stages:
        return pair[0]
    if (pair, stages) not in UNTRAINED:
        (kind, dtype), folder = stages[-1], home / "still" / "-".join("-".join(stage) for stage in stages)
        trainer_of(
            pair, folder, untrained(pair, home, stages[:-1]), kind, dtype, learning_rate=0.0, max_steps=1
        ).train()
        UNTRAINED[pair, stages] = folder
    return UNTRAINED[pair, stages]


@pytest.mark.parametrize(
    "stages",
    [
        pytest.param(
            stages, id=", ".join(map(" ".join, stages)), marks=() if stages in QUICK_STILL else pytest.mark.slow
        )
        for stages in STILL
    ],
)
def test_without_a_learning_rate_the_graft_is_instruct(pair, home, stages):
    folder = untrained(pair, home, stages)
    instruct, base, found = (load_file(path / "model.safetensors") for path in (pair[1], pair[0], folder / "grafted"))
    exact = stages[-1][0] not in ("pissa", "olora")
    for name, value in found.items():
        size = float(torch.maximum(instruct[name].abs(), base[name].abs()).max()) * (0.0 if exact else 2.0**-22)
        assert float((value.double() - instruct[name].double()).abs().max()) <= size, name
        assert not exact or torch.equal(value.view(torch.int32), instruct[name].view(torch.int32)), name
    again(pair, folder, found)


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_eval_grafted_knows_what_the_stage_before_loaded(pair, home, tmp_path, kind):
    start = untrained(pair, home, (("full", BF16),))
    options = {"eval_strategy": "steps", "eval_steps": 1, "max_steps": 1, "learning_rate": 0.0}
    trainer = trainer_of(pair, tmp_path / "run", start, kind, FP32, eval_grafted=True, graft=False, **options)
    trainer.train()
    plain = SFTTrainer(
        model=str(pair[1]),
        args=SFTConfig(**settings(tmp_path / "plain", **options)),
        train_dataset=sft_data(),
        eval_dataset=sft_data(),
        processing_class=AutoTokenizer.from_pretrained(pair[1]),
    )
    wanted = plain.evaluate()["eval_loss"]
    found = next(line for line in trainer.state.log_history if "eval_loss" in line)
    assert found["eval_grafted_loss"] == pytest.approx(wanted, abs=1e-6)


@needs("peft", "0.21", "older ones cannot load it with these transformers")
@pytest.mark.parametrize("loaded", [False, True])
def test_two_parameters_of_one_module(tmp_path, loaded):
    """PEFT puts one wrapper into the other there. The oracle is its own merge on BASE."""
    config = GptOssConfig(
        vocab_size=49, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, head_dim=8, num_local_experts=3, num_experts_per_tok=2, pad_token_id=0, eos_token_id=1,
        bos_token_id=None,
    )  # fmt: skip
    sides = tmp_path / "base", tmp_path / "instruct"
    for seed, side in enumerate(sides):
        torch.manual_seed(seed)
        AutoModelForCausalLM.from_config(config).save_pretrained(side)
        make_tokenizer(template=True).save_pretrained(side)
    adapter = LoraConfig(
        r=4, target_modules=["q_proj"], target_parameters=["experts.down_proj", "experts.gate_up_proj"]
    )
    model = AutoModelForCausalLM.from_pretrained(sides[0])
    trainer = ShadowSFTTrainer(
        model=get_peft_model(model, adapter) if loaded else str(sides[0]),
        instruct_model=str(sides[1]),
        args=ShadowSFTConfig(**settings(tmp_path / "run", graft_dtype="float32", allow_wide_gap=True)),
        train_dataset=sft_data(),
        peft_config=None if loaded else adapter,
    )
    trainer.train()
    merged = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(sides[0]), tmp_path / "run")
    tuned = merged.merge_and_unload().state_dict()
    base, instruct, found = (
        AutoModelForCausalLM.from_pretrained(folder).state_dict() for folder in (*sides, tmp_path / "run/grafted")
    )
    moved = {name for name, value in tuned.items() if not torch.equal(value, base[name])}
    assert moved == {f"model.layers.0.{name}" for name in (
        "self_attn.q_proj.weight", "mlp.experts.down_proj", "mlp.experts.gate_up_proj"
    )}  # fmt: skip
    for name, value in found.items():
        learnt = tuned[name].double() - base[name].double()
        assert float((value.double() - instruct[name].double() - learnt).abs().max()) < 3e-7, name
