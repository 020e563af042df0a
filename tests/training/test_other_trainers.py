"""Shadow forms of KTO, GRPO, RLOO, CPO and ORPO, and of a user's own trainer: TUNED is TRL's, the graft is the sum."""

from __future__ import annotations

import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from interrupts import InterruptAfter, Interrupted, files_of
from other_trainers import (
    KINDS,
    OPTIONS,
    WITHOUT_REFERENCE,
    build,
    check_sum,
    classes,
    data_of,
    generated_log_probabilities,
    kto_by_hand,
    kto_data,
)
from releases import needs
from runs import lora, saved_files, settings
from safetensors.torch import load_file
from stages import tuned_weights, weights
from tiny import preference_data, sft_data
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer, Trainer
from trl import RewardConfig, RewardTrainer, SFTConfig, SFTTrainer

from shadow_trl import ShadowArguments, ShadowMixin
from shadow_trl.errors import ConfigError, OutputExistsError

pytestmark = pytest.mark.filterwarnings("ignore")

SLOW = pytest.mark.slow
# In the default run one that takes a reference and one that makes its own; the others are marked slow.
EACH = [kind if kind in ("KTO", "GRPO") else pytest.param(kind, marks=SLOW) for kind in KINDS]
WITH_REFERENCE = [kind for kind in KINDS if kind not in WITHOUT_REFERENCE]


@pytest.mark.parametrize("kind", EACH)
@pytest.mark.parametrize("with_lora", [False, pytest.param(True, marks=SLOW)], ids=["full", "lora"])
def test_tuned_is_byte_equal_to_plain_trl_and_the_graft_is_the_sum(pair, tmp_path, kind, with_lora):
    plain = build(kind, pair, tmp_path / "plain", plain=True, peft_config=lora() if with_lora else None)
    plain.train()
    plain.save_model()
    shadow = build(
        kind, pair, tmp_path / "shadow", peft_config=lora() if with_lora else None, graft_scale=0.5,
        graft_dtype="float32", graft_format="model",
    )  # fmt: skip
    shadow.train()
    assert saved_files(tmp_path / "shadow") == saved_files(tmp_path / "plain") != {}
    check_sum(pair, tmp_path / "shadow", 0.5)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("with_lora", [False, True], ids=["full", "lora"])
def test_resumed_run_gives_the_same_graft_and_so_does_its_last_checkpoint(pair, tmp_path, kind, with_lora):
    def start(name: str, **changes):
        config = lora() if with_lora else None
        changes = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, **changes}
        return build(kind, pair, tmp_path / name, peft_config=config, graft_every_save=True, **changes)

    start("whole").train()
    with pytest.raises(Interrupted):
        start("cut", callbacks=[InterruptAfter(2)]).train()
    start("cut").train(resume_from_checkpoint=True)
    written = files_of(tmp_path / "whole/grafted")
    assert files_of(tmp_path / "cut/grafted") == files_of(tmp_path / "cut/checkpoint-4/shadow/grafted") == written != {}
    assert files_of(tmp_path / "whole/checkpoint-2/shadow/grafted") != written


# The reference policies


def model_of(pair: tuple[Path, Path], policy: str) -> AutoModelForCausalLM:
    """INSTRUCT for the policies that are it where nothing was trained yet, else BASE."""
    folder = pair[1] if policy in ("instruct", "grafted") else pair[0]
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def kto_of_base(pair, rows, policy: str) -> tuple[float, float]:
    models = (model_of(pair, "base"), model_of(pair, policy))
    return kto_by_hand(models, AutoTokenizer.from_pretrained(pair[1]), rows, 2.0)


@pytest.mark.parametrize("with_lora", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("policy", ["init", pytest.param("base", marks=SLOW), "instruct", "grafted"])
def test_reference_of_kto_by_hand(pair, tmp_path, policy, with_lora):
    rows = kto_data(4)
    loss, kl = kto_of_base(pair, rows, policy)
    if policy in ("instruct", "grafted"):
        assert abs(loss - 0.5) > 1e-4  # the pair differs enough for a wrong reference to be seen
    trainer = build(
        "KTO", pair, tmp_path, train_dataset=rows, ref_policy=policy, beta=2.0, graft=False, max_steps=1,
        precompute_ref_log_probs=False if with_lora else None, peft_config=lora() if with_lora else None,
    )  # fmt: skip
    assert trainer.args.precompute_ref_log_probs is (policy in ("instruct", "grafted") and not with_lora)
    assert (trainer.ref_model is not None) is (with_lora == (policy in ("instruct", "grafted")))
    trainer.train()
    log = trainer.state.log_history[0]
    assert log["loss"] == pytest.approx(loss, abs=2e-5)
    assert log["kl"] == pytest.approx(kl, abs=2e-4)


def test_kto_has_reference_values_of_new_rows_and_of_its_own_again(pair, tmp_path):
    rows = kto_data(4)
    trainer = build(
        "KTO", pair, tmp_path, train_dataset=rows, eval_dataset=rows, ref_policy="instruct", beta=2.0, graft=False,
        max_steps=1, learning_rate=0, per_device_eval_batch_size=4,
    )  # fmt: skip
    trainer.train()
    loss, _ = kto_of_base(pair, rows, "instruct")
    for given in (None, rows, trainer.eval_dataset):
        assert trainer.evaluate(given)["eval_loss"] == pytest.approx(loss, abs=2e-5)
    assert trainer.ref_model is None


@pytest.mark.parametrize(
    ("kind", "policy", "with_lora"),
    [
        ("GRPO", "instruct", False),
        ("RLOO", "grafted", True),
        *(
            pytest.param(kind, policy, with_lora, marks=SLOW)
            for kind in OPTIONS
            for policy in ("init", "base", "instruct", "grafted")
            for with_lora in (False, True)
            if (kind, policy, with_lora) not in (("GRPO", "instruct", False), ("RLOO", "grafted", True))
        ),
    ],
)
def test_reference_of_a_generating_trainer_by_hand(pair, tmp_path, kind, policy, with_lora, monkeypatch):
    trainer = build(
        kind, pair, tmp_path, ref_policy=policy, temperature=0.7, beta=0.5, max_steps=1, graft=False, num_iterations=1,
        peft_config=lora() if with_lora else None,
    )  # fmt: skip
    assert (trainer.beta, trainer.args.beta) == (0.5, 0.5)
    batches, generate = [], trainer._generate_and_score_completions
    monkeypatch.setattr(
        trainer, "_generate_and_score_completions", lambda inputs: batches.append(generate(inputs)) or batches[-1]
    )
    trainer.train()
    models = (model_of(pair, "base"), model_of(pair, policy))
    base, reference = (generated_log_probabilities(model, batches[0], 0.7) for model in models)
    mask, gap = batches[0]["completion_mask"], reference - base
    terms = gap.exp() - gap - 1 if kind == "GRPO" else -gap
    expected = ((terms * mask).sum() / mask.sum()).item()
    found = trainer.state.log_history[0]["kl"]
    assert found == pytest.approx(expected, abs=2e-6 if kind == "GRPO" else 2e-5)
    if policy in ("instruct", "grafted"):
        assert abs(expected) > 1e-5  # or a wrong reference would not be seen
    if kind == "GRPO":
        torch.testing.assert_close(
            batches[0]["ref_per_token_logps"].double() * mask, reference * mask, rtol=0, atol=2e-5
        )


@pytest.mark.parametrize("kind", ["GRPO", pytest.param("RLOO", marks=SLOW)])
def test_reference_of_a_second_stage_that_generates(fp32_pair, lora_run, tmp_path, kind):
    """`grafted` is INSTRUCT with the delta of the first stage; `init` the adapter as it was, which is not saved."""
    trainer = build(kind, fp32_pair, tmp_path / "grafted", model=str(lora_run), ref_policy="grafted", graft=False)
    base, instruct, tuned = weights(fp32_pair[0]), weights(fp32_pair[1]), tuned_weights(fp32_pair[0], lora_run)
    found = trainer.ref_model.state_dict()
    for name, value in instruct.items():
        torch.testing.assert_close(found[name].double(), value + tuned[name] - base[name], rtol=0, atol=1e-6)
    assert list(trainer.model.peft_config) == ["default"]
    start = build(kind, fp32_pair, tmp_path / "init", model=str(lora_run))
    assert start.ref_model is None
    assert list(start.model.peft_config) == ["default", "ref"]
    start.train()
    assert start.state.log_history[0]["kl"] == pytest.approx(0, abs=1e-6)
    assert not [name for name in load_file(tmp_path / "init/adapter_model.safetensors") if ".ref." in name]


def test_a_start_changed_in_memory_is_the_reference_of_a_generating_trainer(fp32_pair, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(fp32_pair[0])
    with torch.no_grad():
        model.model.norm.weight *= 1.5
    trainer = build("GRPO", fp32_pair, tmp_path, model=model, graft=False, max_steps=1)
    assert torch.equal(trainer.ref_model.model.norm.weight, model.model.norm.weight)
    trainer.train()
    assert trainer.state.log_history[0]["kl"] == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("kind", OPTIONS)
def test_without_beta_there_is_no_reference(pair, tmp_path, kind):
    with pytest.raises(ConfigError, match=r"ref_policy='instruct' has no effect with beta=0"):
        build(kind, pair, tmp_path / "out", ref_policy="instruct", beta=0.0)
    assert not (tmp_path / "out").exists()


# Every option acts or is refused


@pytest.mark.parametrize(
    ("kind", "changes", "message"),
    [
        ("GRPO", {"eval_grafted": True}, "eval_grafted=True is not possible with ShadowGRPOTrainer"),
        ("RLOO", {"eval_grafted": True}, "eval_grafted=True is not possible with ShadowRLOOTrainer"),
        ("GRPO", {"ref_policy": "base", "sync_ref_model": True}, "sync_ref_model=True moves"),
        ("KTO", {"ref_policy": "instruct", "sync_ref_model": True}, "sync_ref_model=True moves"),
        ("GRPO", {"ref_policy": "instruct", "cast_lm_head_to_fp32": True}, "cast_lm_head_to_fp32=True acts on"),
        ("KTO", {"ref_policy": "mine"}, "ref_policy must be one of init, base"),
        ("RLOO", {"ref_policy": "mine"}, "ref_policy must be one of init, base"),
        ("KTO", {"loss_type": "hinge"}, "loss_type is 'hinge'; it must be one of: kto, apo_zero_unpaired"),
        ("CPO", {"loss_type": "kto_pair"}, "loss_type is 'kto_pair'; it must be one of: sigmoid, hinge"),
        ("CPO", {"loss_type": "simpo", "beta": 0.0}, "loss_type='simpo' divides"),
        ("GRPO", {"loss_type": "ppo"}, "loss_type must be one of grpo"),
        ("GRPO", {"importance_sampling_level": "word"}, "importance_sampling_level must be one of"),
        ("ORPO", {"beta": -1.0}, "beta is -1.0; it must be at least 0"),
        ("KTO", {"train_dataset": sft_data()}, "completion and label and prompt"),
        ("KTO", {"train_dataset": sft_data().add_column("label", ["yes"] * 16)}, "label  'yes'"),
        ("KTO", {"train_dataset": kto_data().add_column("ref_logps", [0.0] * 16)}, "the data has ref_logps"),
        ("KTO", {"eval_dataset": {"a": kto_data(4).add_column("ref_KL_logps", [0.0] * 4)}}, "has ref_KL_logps"),
        ("GRPO", {"train_dataset": sft_data().select_columns("completion")}, "columns completion"),
        ("ORPO", {"train_dataset": sft_data()}, "chosen and rejected"),
        *((kind, {"push_to_hub": True, "hub_strategy": "checkpoint"}, "hold the tuned BASE") for kind in KINDS),
        *((kind, {"graft_vocab": "some"}, "graft_vocab") for kind in KINDS),
        *((kind, {"instruct_scale": float("nan")}, "finite") for kind in KINDS),
    ],
)  # fmt: skip
def test_what_is_refused_is_refused_by_name(pair, tmp_path, kind, changes, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        build(kind, pair, tmp_path / "out", **changes)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("kind", KINDS)
def test_an_existing_graft_is_refused_before_a_model_is_loaded(pair, tmp_path, kind):
    (tmp_path / "out/grafted").mkdir(parents=True)
    (tmp_path / "out/grafted/config.json").write_text("{}")
    with pytest.raises(OutputExistsError, match="grafted"):
        build(kind, pair, tmp_path / "out")


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"model": None, "model_init": lambda: None}, r"the trainer takes model=\.\.\."),
        ({"model": None}, r"model \(BASE\) is missing"),
    ],
)
def test_a_trainer_without_a_model_is_refused(tmp_path, changes, said):
    trainer, config = classes("CPO")
    with pytest.raises(ConfigError, match=said):
        trainer(args=config(**settings(tmp_path)), train_dataset=preference_data(), **changes)


@needs("trl", "1.16", "older ones know fewer")
def test_every_loss_of_grpo_is_one_that_trl_knows():
    from trl.trainer import grpo_trainer

    from shadow_trl.training.online import GRPO_LOSSES

    text = Path(grpo_trainer.__file__).read_text()
    named = re.findall(r"self\.loss_type (?:==|in) (\[[^\]]*\]|\"\w+\")", text)
    assert set(GRPO_LOSSES) == {loss for one in named for loss in re.findall(r'"(\w+)"', one)}


@pytest.mark.parametrize(
    ("kind", "with_lora", "policy"),
    [
        ("KTO", True, "init"),
        *(pytest.param(*case, marks=SLOW) for case in (("KTO", False, "instruct"), ("CPO", False, None))),
        *(pytest.param(*case, marks=SLOW) for case in (("CPO", True, None), ("ORPO", True, None))),
    ],
)
def test_figures_of_the_graft_are_those_of_plain_trl_on_its_folder(pair, tmp_path, kind, with_lora, policy):
    """In the second pass over the rows; those of the first stay TRL's."""
    changes = {"ref_policy": policy} if policy else {}
    # In fp32: on the disk BASE is in bf16, in which CPO and ORPO would train it and evaluate the graft.
    shared = {
        "eval_dataset": data_of(kind, 4), "per_device_eval_batch_size": 4, "model_init_kwargs": {"dtype": "float32"},
    }  # fmt: skip
    options = {"graft_scale": 20.0, "graft_format": "model", "graft_dtype": "float32"}
    found = {}
    for grafted in (True, False):
        trainer = build(
            kind, pair, tmp_path / str(grafted), eval_grafted=grafted, peft_config=lora() if with_lora else None,
            **shared, **options, **changes,
        )  # fmt: skip
        trainer.train()
        found[grafted] = trainer.evaluate()
        logged = trainer.state.log_history[-1]
        assert all(key in logged for key in found[grafted])
    assert {key for key in found[True] if "grafted" not in key} == found[False].keys()
    reference = pair[1] if policy == "instruct" else pair[0]
    given = {"ref_model": AutoModelForCausalLM.from_pretrained(reference, dtype=torch.float32)} if policy else {}
    plain = build(kind, pair, tmp_path / "plain", plain=True, model=str(tmp_path / "True/grafted"), **shared, **given)
    expected = plain.evaluate()
    for name in ("loss", "rewards/margins", "logps/chosen"):
        assert found[True][f"eval_grafted_{name}"] == pytest.approx(expected[f"eval_{name}"], rel=1e-5, abs=1e-6), name
        assert found[True][f"eval_{name}"] == pytest.approx(found[False][f"eval_{name}"], rel=1e-6)
    assert found[True]["eval_grafted_loss"] != pytest.approx(found[True]["eval_loss"], rel=1e-4)


def test_a_tokenizer_without_a_padding_token_pads_with_its_end(pair, tmp_path):
    """TRL asks an experimental trainer's tokenizer for the number of its padding token before it has one."""
    tokenizer = AutoTokenizer.from_pretrained(pair[1])
    tokenizer.pad_token = None
    trainer, config = classes("ORPO")
    made = trainer(
        str(pair[0]), config(**settings(tmp_path)), train_dataset=preference_data(), processing_class=tokenizer,
        instruct_model=str(pair[1]),
    )  # fmt: skip
    assert made.data_collator.pad_token_id == 1
    made.train()


# A user's own, and one that cannot be


def test_a_reward_trainer_is_refused_where_it_is_defined():
    with pytest.raises(ConfigError, match=r"Rewards trains a reward model(.|\n)*INSTRUCT has none"):

        class Rewards(ShadowMixin, RewardTrainer):
            pass


class Scorer(Trainer):
    """A trainer of somebody's that makes another head than BASE has."""

    _name = "Scorer"

    def __init__(self, model, args=None, train_dataset=None, processing_class=None) -> None:
        model = AutoModelForSequenceClassification.from_pretrained(model, num_labels=1)
        super().__init__(model=model, args=args, train_dataset=train_dataset)


@dataclass
class ScorerConfig(ShadowArguments, RewardConfig):
    pass


def test_a_trainer_that_makes_another_head_is_refused_before_training(pair, tmp_path):
    scorer = type("ShadowScorer", (ShadowMixin, Scorer), {"config_class": ScorerConfig})
    with pytest.raises(ConfigError, match="Qwen3ForSequenceClassification, which predicts no tokens"):
        scorer(str(pair[0]), ScorerConfig(**settings(tmp_path / "out")), sft_data(), instruct_model=str(pair[1]))
    assert not (tmp_path / "out").exists()


def test_a_trainer_without_a_config_is_told_how_to_have_one(pair):
    with pytest.raises(ConfigError, match=r"Write `config_class = NoConfigConfig`"):
        type("NoConfig", (ShadowMixin, SFTTrainer), {})(str(pair[0]))


class MyTrainer(SFTTrainer):
    """Somebody's trainer, with a loss of its own."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        found = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        return (3 * found[0], found[1]) if return_outputs else 3 * found


@dataclass
class ShadowMyConfig(ShadowArguments, SFTConfig):
    pass


class ShadowMyTrainer(ShadowMixin, MyTrainer):
    config_class = ShadowMyConfig


def test_the_trainer_of_a_user(pair, tmp_path):
    """As in docs/training.md, whose code is run by tests/whole/test_docs.py."""
    plain = MyTrainer(
        str(pair[0]), args=SFTConfig(**settings(tmp_path / "plain")), train_dataset=sft_data(),
        processing_class=AutoTokenizer.from_pretrained(pair[1]),
    )  # fmt: skip
    plain.train()
    plain.save_model()
    shadow = {"model": str(pair[0]), "instruct_model": str(pair[1]), "train_dataset": sft_data()}
    made = ShadowMyTrainer(args=ShadowMyConfig(**settings(tmp_path / "run", graft_dtype="float32")), **shadow)
    made.train()
    assert saved_files(tmp_path / "run") == saved_files(tmp_path / "plain") != {}
    check_sum(pair, tmp_path / "run", 1.0)
    with pytest.raises(ConfigError, match="eval_grafted=True is not possible with ShadowMyTrainer"):
        ShadowMyTrainer(args=ShadowMyConfig(**settings(tmp_path / "out", eval_grafted=True)), **shadow)


@pytest.mark.slow
def test_other_trainers_are_loaded_when_they_are_asked_for_and_trl_warns_once():
    code = """
import os, sys, warnings
os.environ.pop("TRL_EXPERIMENTAL_SILENCE", None)
from shadow_trl import ShadowDPOTrainer, ShadowSFTTrainer
others = ["trl.experimental.cpo", "trl.trainer.kto_trainer", "trl.trainer.grpo_trainer", "trl.trainer.rloo_trainer"]
assert not [name for name in others if name in sys.modules]
with warnings.catch_warnings(record=True) as seen:
    warnings.simplefilter("always")
    from shadow_trl import ShadowCPOConfig, ShadowCPOTrainer, ShadowORPOConfig, ShadowORPOTrainer
assert [one.category.__name__ for one in seen].count("TRLExperimentalWarning") == 1, seen
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
