"""DeepSpeed's ZeRO in two real processes: TUNED as plain TRL makes it, the values of one process, and its graft."""

from __future__ import annotations

import importlib.util
import json
import shutil
from pathlib import Path

import engines
import others_in_processes as others
import pipelines
import pytest
import ranks
import torch
from peft import PeftModel
from runs import dpo, lora, sft
from runs import log_probability as log_probability_of
from safetensors.torch import load_file
from tiny import make_pair, preference_data
from transformers import AutoModelForCausalLM, AutoTokenizer

from shadow_trl import graft

pytestmark = [
    pytest.mark.distributed,
    pytest.mark.zero,
    pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="DeepSpeed is not installed"),
]
EVERY_STEP = {"save_strategy": "steps", "save_steps": 1, "max_steps": 2}


@pytest.fixture(scope="module", autouse=True)
def _deepspeed(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DS_ACCELERATOR", "cpu")
        ranks.preload("deepspeed")
        yield


def run(pair, out: Path, engine: str, kind: str, **changes):
    """Run in two processes under `engine`; return what the first one saw."""
    ends = ranks.in_processes(engines.run, engine, kind, tuple(map(str, pair)), str(out), **changes)
    assert [end.error for end in ends] == ["", ""]
    return ends[0].value


def check_graft(pair, tuned: Path, grafted: Path, folder: Path) -> None:
    graft(base=str(pair[0]), instruct=str(pair[1]), tuned=str(tuned), output=str(folder))
    assert engines.weights(folder) == engines.weights(grafted) != {}


def losses_of(trainer) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def expected_references(pair, model) -> list[float]:
    tokenizer = AutoTokenizer.from_pretrained(pair[1])
    return [log_probability_of(model, tokenizer, row, "chosen") for row in preference_data()]


@pytest.mark.parametrize(
    ("engine", "kind", "adapter"),
    [("zero3", "sft", False), ("zero2", "dpo", False), ("zero3", "dpo", True), ("zero1", "sft", True)],
)
def test_tuned_is_that_of_trl_with_the_losses_of_one_process(pair, tmp_path, engine, kind, adapter):
    preference_data().save_to_disk(tmp_path / "rows")  # TRL alone takes no rows in memory on several processes
    changes = {"lora": adapter, "max_steps": 5}
    if kind == "dpo":
        changes |= {"rows": str(tmp_path / "rows"), "precompute_ref_log_probs": True}
    seen = run(pair, tmp_path / "ours", engine, kind, **changes)
    gathers = {"stage3_gather_16bit_weights_on_model_save": True}
    plain = run(pair, tmp_path / "plain", engine, kind, plain=True, zero=gathers, **changes)
    assert engines.weights(tmp_path / "ours") == engines.weights(tmp_path / "plain")
    assert (seen["losses"], seen["references"]) == (plain["losses"], plain["references"])
    if engine == "zero3":  # all that it gathers lies on the disk meanwhile
        saved = sum(path.stat().st_size for path in (tmp_path / "ours").glob("*.safetensors"))
        assert seen["on_disk"] >= saved - 10_000
    check_graft(pair, tmp_path / "ours", tmp_path / "ours/grafted", tmp_path / "again")
    alone = {"sft": sft, "dpo": dpo}[kind](
        pair, tmp_path / "one", max_steps=5, graft=False, peft_config=lora() if adapter else None
    )
    alone.train()
    assert seen["losses"] == pytest.approx(losses_of(alone), rel=1e-6)
    assert len(seen["losses"]) == 5


def test_other_trainers_leave_what_trl_does_and_graft_the_sum(pair, tmp_path):
    others.check_as_trl("zero3", pair, tmp_path, full=("GRPO",), adapted=("KTO", "CPO"))


def test_references_of_other_trainers_by_hand(fp32_pair, lora_run, tmp_path):
    others.check_references("zero3", fp32_pair, lora_run, tmp_path)


def test_two_models_with_one_cache_have_reference_values_of_their_own(pair, tmp_path):
    """TRL's key is of the weights, and ZeRO-3 leaves empty tensors in their place: all models would have one key."""
    preference_data().save_to_disk(tmp_path / "rows")
    rows = {"rows": str(tmp_path / "rows"), "precompute_ref_log_probs": True}
    seen = {
        "instruct": run(pair, tmp_path / "a", "launched_zero3", "dpo", ref_policy="instruct", **rows),
        "base": run(pair, tmp_path / "b", "zero3", "dpo", **rows),
    }
    values = {}
    for role, folder in zip(("base", "instruct"), pair, strict=True):
        values[role] = expected_references(pair, AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64))
        assert seen[role]["references"] == pytest.approx(values[role], rel=1e-6)
        assert (seen[role]["reference"], seen[role]["kept"]) == (False, 0)
    assert values["base"] != pytest.approx(values["instruct"], rel=1e-5)


@pytest.mark.parametrize("engine", ["zero2", "zero3"])
def test_what_deepspeed_rounds_on_loading_is_no_delta(tmp_path, engine):
    """BASE in fp32, mixed precision in bf16, a learning rate that changes nothing."""
    pair = make_pair(tmp_path / "pair", dtype=torch.float32)
    run(pair, tmp_path / "out", engine, "sft", bf16=True, learning_rate=1e-12)
    base, instruct = (load_file(folder / "model.safetensors") for folder in pair)
    tuned, grafted = (load_file(tmp_path / place / "model.safetensors") for place in ("out", "out/grafted"))
    rounding = max((tuned[name].float() - base[name]).abs().max().item() for name in base)
    assert rounding > 1e-4
    assert max((grafted[name] - instruct[name]).abs().max().item() for name in instruct) < 1e-10
    assert json.loads((tmp_path / "out/shadow.json").read_text())["loaded_in"] == ["bfloat16"]


def test_whole_weights_are_gathered_for_a_graft_only_and_a_resumed_run_has_the_bits_of_one_run(pair, tmp_path):
    run(pair, tmp_path / "whole", "zero3", "sft", graft_every_save=True, **EVERY_STEP)
    first = tmp_path / "whole/checkpoint-1"
    check_graft(pair, first, first / "shadow/grafted", tmp_path / "again")
    run(pair, tmp_path / "resumed", "zero3", "sft", resume=str(first), **EVERY_STEP)
    for place in ("", "grafted"):
        assert engines.weights(tmp_path / "resumed" / place) == engines.weights(tmp_path / "whole" / place) != {}
    sharded = tmp_path / "resumed/checkpoint-2"
    assert (sharded / "global_step2").is_dir()
    assert not [*sharded.glob("*.safetensors"), *sharded.glob("shadow*")]


def test_the_best_model_is_the_one_that_is_grafted(pair, tmp_path):
    """A learning rate that makes each step worse: the best checkpoint is the first."""
    run(pair, tmp_path / "out", "zero3", "sft", eval_strategy="steps", eval_steps=1, load_best_model_at_end=True,
        metric_for_best_model="loss", learning_rate=5.0, graft_every_save=True, lr_scheduler_type="constant",
        **EVERY_STEP)  # fmt: skip
    kept = {path.name: engines.weights(path / "shadow/grafted") for path in (tmp_path / "out").glob("checkpoint-*")}
    assert engines.weights(tmp_path / "out/grafted") == kept["checkpoint-1"] != kept["checkpoint-2"]


def test_the_graft_is_evaluated_as_on_one_process(pair, tmp_path):
    evaluated = {"eval_strategy": "steps", "eval_steps": 2, "eval_grafted": True, "ref_policy": "instruct",
                 "precompute_ref_log_probs": False}  # fmt: skip
    seen = run(pair, tmp_path / "out", "zero2", "dpo", per_device_eval_batch_size=2, **evaluated)
    # TRL averages over the batches of all processes together.
    alone = dpo(pair, tmp_path / "one", eval_dataset=preference_data(), per_device_eval_batch_size=4, **evaluated)
    alone.train()
    figures = alone.state.log_history[-2]
    assert figures["eval_grafted_loss"] != figures["eval_loss"]
    grafted = {name: value for name, value in figures.items() if "grafted" in name and "num_tokens" not in name}
    assert len(grafted) > 8
    assert {name: seen["evaluated"][-1][name] for name in grafted} == pytest.approx(grafted, rel=1e-6, abs=1e-6)


def test_a_second_stage_has_the_graft_of_the_first_as_its_reference(pair, tmp_path):
    sft(pair, tmp_path / "sft", peft_config=lora()).train()
    seen = run((tmp_path / "sft", pair[1]), tmp_path / "out", "zero3", "dpo", ref_policy="grafted")
    instruct = AutoModelForCausalLM.from_pretrained(pair[1], dtype=torch.float64)
    model = PeftModel.from_pretrained(instruct, str(tmp_path / "sft"), autocast_adapter_dtype=False)
    assert seen["references"] == pytest.approx(expected_references(pair, model), rel=1e-6)
    check_graft(pair, tmp_path / "out", tmp_path / "out/grafted", tmp_path / "again")


def test_the_start_of_an_adapter_is_whole(pair, tmp_path):
    """The delta of PiSSA is measured from its start, which is read when the weights are shared out already."""
    pissa = {"init_lora_weights": "pissa"}
    run(pair, tmp_path / "out", "zero3", "dpo", lora=pissa, graft_format="adapter")
    trainer = dpo(pair, tmp_path / "one", peft_config=lora(**pissa), graft_format="adapter")
    trainer.train()
    there, here = (load_file(tmp_path / place / "grafted/adapter_model.safetensors") for place in ("out", "one"))
    assert there.keys() == here.keys()
    for name, factor in here.items():
        assert there[name].shape == factor.shape
    for name in (name for name in here if ".lora_A." in name):
        other = name.replace(".lora_A.", ".lora_B.")
        torch.testing.assert_close(there[other] @ there[name], here[other] @ here[name], rtol=1e-4, atol=1e-6)


def test_both_stages_in_one_launch_are_those_of_two(pair, tmp_path, monkeypatch):
    """Each stage loads its models by its own settings, in the memory that the one before has left."""
    monkeypatch.chdir(tmp_path)
    pipelines.fill(tmp_path, pair)
    words = ["--sft.per_device_train_batch_size", "2", "--dpo.per_device_train_batch_size", "1", "--dpo.bf16", "true"]

    def launch(output: str, *more: str) -> list[dict]:
        ends = ranks.in_processes(pipelines.run, "zero3", str(tmp_path), "--output_dir", output, *words, *more)
        assert [(end.error, end.value and end.value["code"]) for end in ends] == [("", 0), ("", 0)]
        return [end.value for end in ends]

    for seen in launch("one"):
        assert seen["stages"] == [("DEEPSPEED", 2, "no", 2), ("DEEPSPEED", 2, "bf16", 1)]
        start_of_sft, start_of_dpo = seen["before"]
        assert start_of_dpo <= start_of_sft + 1024
    shutil.copytree("one/sft", "two/sft")
    launch("two", "--stages", "dpo")
    for place in ("dpo", "dpo/grafted"):
        assert engines.weights(tmp_path / "one" / place) == engines.weights(tmp_path / "two" / place) != {}
