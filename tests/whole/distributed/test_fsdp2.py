"""FSDP2 in two real processes: TUNED as plain TRL makes it, the values of one process, and the graft of that TUNED."""

from __future__ import annotations

import os
from pathlib import Path

import engines
import others_in_processes as others
import pytest
import torch
from accelerate.utils import merge_fsdp_weights
from architectures import make_family
from ranks import in_processes
from releases import needs
from runs import log_probability
from safetensors.torch import load_file
from tiny import make_pair, preference_data, sft_data
from transformers import AutoModelForCausalLM, AutoTokenizer

from shadow_trl import graft, verify

pytestmark = [pytest.mark.distributed, pytest.mark.slow]
BY_TOKENS = needs("trl", "1.16", "older ones do not count the tokens of all processes in an evaluation of SFT")
SHARDED = {"state_dict_type": "SHARDED_STATE_DICT"}


def run(pair, out: Path, kind: str, engine: str = "fsdp2", count: int = 2, **changes):
    """Run in two processes under FSDP2; return what the first one saw."""
    ends = in_processes(engines.run, engine, kind, tuple(map(str, pair)), str(out), count=count, **changes)
    assert [(end.kind, end.error) for end in ends] == [("", "")] * count
    return ends[0].value


def check_graft(pair, tuned: Path, grafted: Path, folder: Path) -> None:
    graft(base=str(pair[0]), instruct=str(pair[1]), tuned=str(tuned), output=str(folder))
    assert engines.weights(folder) == engines.weights(grafted)
    assert engines.weights(folder)


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("kind", ["sft", "dpo"])
def test_tuned_is_that_of_trl_and_the_graft_is_of_that_folder(pair, tmp_path, kind, lora):
    changes = {"precompute_ref_log_probs": True} if kind == "dpo" else {}
    saves = {"save_strategy": "steps", "save_steps": 2, "graft_every_save": True}
    seen = run(pair, tmp_path / "ours", kind, lora=lora, fsdp=SHARDED, **changes, **saves)
    whole = {"state_dict_type": "FULL_STATE_DICT"}
    if kind == "dpo":
        # TRL alone cannot compute the values of data in memory in several processes.
        preference_data().save_to_disk(tmp_path / "rows")
        changes["rows"] = str(tmp_path / "rows")
    plain = run(pair, tmp_path / "plain", kind, lora=lora, fsdp=whole, plain=True, **changes)
    assert engines.weights(tmp_path / "ours") == engines.weights(tmp_path / "plain")
    assert (seen["losses"], seen["references"]) == (plain["losses"], plain["references"])
    # All that the engine gathers lies on the disk meanwhile, of an adapter with the weights that it would not save.
    assert seen["on_disk"] >= sum(path.stat().st_size for path in (tmp_path / "ours").glob("*.safetensors")) - 10_000
    assert plain["on_disk"] == 0
    assert not list((tmp_path / "ours").glob(".*"))
    check_graft(pair, tmp_path / "ours", tmp_path / "ours/grafted", tmp_path / "again")
    # Of a checkpoint there are shards only, which are grafted without being gathered.
    (last,) = (tmp_path / "ours").glob("checkpoint-*")
    assert not list(last.glob("*.safetensors"))
    assert engines.weights(last / "shadow/grafted") == engines.weights(tmp_path / "ours/grafted")
    check_graft(pair, last / "pytorch_model_fsdp_0", last / "shadow/grafted", tmp_path / "by its shards")


def test_other_trainers_leave_what_trl_does_and_graft_the_sum(pair, tmp_path):
    others.check_as_trl("fsdp2", pair, tmp_path, full=("KTO", "CPO"), adapted=("GRPO",))


def test_references_of_other_trainers_by_hand(fp32_pair, lora_run, tmp_path):
    others.check_references("fsdp2", fp32_pair, lora_run, tmp_path)


def test_whole_weights_take_the_memory_of_a_few_and_not_of_all(tmp_path):
    layers, taken = 6, {}
    for on_disk in (False, True):
        out = tmp_path / str(on_disk)
        ends = in_processes(engines.save_whole, str(out), layers=layers, on_disk=on_disk)
        assert [end.error for end in ends] == ["", ""]
        taken[on_disk] = ends[0].value
    assert engines.weights(tmp_path / "True") == engines.weights(tmp_path / "False") != {}
    assert taken[False] > 0.9 * layers * 13 * 2**20
    assert taken[True] < 16 * 2**20  # gathered weights of 3 MiB, what gloo sends them by, and Python's own


@pytest.mark.parametrize("name", ["qwen3", "llama", "qwen3_moe", "gemma3"])
def test_shards_of_any_architecture_are_grafted_as_their_merged_folder(tmp_path, name):
    """Tied, untied, with fused experts, and a multimodal model: by their names in memory."""
    folder = make_family(tmp_path / "family", name)
    pair = {role: str(folder / role) for role in ("base", "instruct")}
    ends = in_processes(engines.save_shards, str(folder / "tuned"), str(tmp_path / "shards"), name)
    assert [end.error for end in ends] == ["", ""]
    assert len(list((tmp_path / "shards").glob("*.distcp"))) == 2
    merge_fsdp_weights(str(tmp_path / "shards"), str(tmp_path / "merged"))
    for source in ("shards", "merged"):
        graft(**pair, tuned=str(tmp_path / source), output=str(tmp_path / f"of {source}"))
    assert engines.weights(tmp_path / "of shards") == engines.weights(tmp_path / "of merged") != {}


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_the_reference_is_instruct_and_is_gone_after_its_values_are_known(pair, tmp_path, lora):
    seen = run(pair, tmp_path / "out", "dpo", "launched", lora=lora, ref_policy="instruct")
    tokenizer = AutoTokenizer.from_pretrained(pair[1])
    expected = {}
    for role, folder in zip(("base", "instruct"), pair, strict=True):
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)
        expected[role] = [log_probability(model, tokenizer, row, "chosen") for row in preference_data()]
    assert seen["references"] == pytest.approx(expected["instruct"], rel=1e-6)
    assert seen["references"] != pytest.approx(expected["base"], rel=1e-5)
    assert not seen["reference"]
    assert not seen["kept"]


@needs("accelerate", "1.13", "older ones are refused")
def test_a_resumed_run_and_every_save_give_the_bits_of_one_run(pair, tmp_path):
    saves = {"save_strategy": "steps", "save_steps": 1, "graft_every_save": True, "max_steps": 2, "fsdp": SHARDED}
    run(pair, tmp_path / "whole", "sft", **saves)
    first = tmp_path / "whole/checkpoint-1"
    check_graft(pair, first, first / "shadow/grafted", tmp_path / "again")
    run(pair, tmp_path / "resumed", "sft", resume=str(first), **saves)
    for place in ("", "grafted", "checkpoint-2/shadow/grafted"):
        assert engines.weights(tmp_path / "resumed" / place) == engines.weights(tmp_path / "whole" / place) != {}


def test_the_best_model_is_the_one_that_is_grafted(pair, tmp_path):
    """A learning rate that makes each step worse: the best checkpoint is the first."""
    run(pair, tmp_path / "out", "sft", fsdp=SHARDED, save_strategy="steps", save_steps=1, eval_strategy="steps",
        eval_steps=1, load_best_model_at_end=True, metric_for_best_model="grafted_loss", learning_rate=5.0,
        eval_grafted=True, graft_every_save=True, max_steps=2, lr_scheduler_type="constant")  # fmt: skip
    kept = {path.name: engines.weights(path / "shadow/grafted") for path in (tmp_path / "out").glob("checkpoint-*")}
    assert engines.weights(tmp_path / "out/grafted") == kept["checkpoint-1"] != kept["checkpoint-2"]


@pytest.mark.parametrize(
    ("kind", "lora", "count", "others"),
    [
        pytest.param("sft", False, 2, ["ddp"], marks=BY_TOKENS),
        pytest.param("sft", True, 2, [], marks=BY_TOKENS),
        ("dpo", False, 2, []),
        ("dpo", True, 3, ["ddp"]),
    ],
    ids=["sft-full", "sft-lora", "dpo-full", "dpo-lora-3"],
)
def test_the_graft_is_evaluated_as_in_one_process(pair, tmp_path, kind, lora, count, others):
    rows = preference_data(12) if kind == "dpo" else sft_data(12)  # the same number for each process and each step
    rows.save_to_disk(tmp_path / "rows")
    changes = {"lora": lora, "eval_grafted": True, "eval_strategy": "steps", "eval_steps": 1}
    changes |= {"per_device_eval_batch_size": 2, "rows": str(tmp_path / "rows")}
    alone = run(pair, tmp_path / "alone", kind, "single", 1, per_device_train_batch_size=2 * count, **changes)
    shared = run(pair, tmp_path / "shared", kind, count=count, fsdp=SHARDED, **changes)
    replicated = [run(pair, tmp_path / other, kind, other, count, **changes) for other in others]
    # While the graft is evaluated, the shards of the policy take no room on the accelerator.
    steps = 12 // (2 * count)
    assert [room > 0 for room in shared["room"]] == [*[True] * steps, *[False] * steps] * 2
    for seen in replicated:
        for got, wanted in zip(shared["evaluated"], seen["evaluated"], strict=True):
            assert got == pytest.approx(wanted, rel=1e-6, abs=1e-6)
    for seen in (shared, *replicated):
        assert seen["losses"] == pytest.approx(alone["losses"], rel=1e-6)
        for got, wanted in zip(seen["evaluated"], alone["evaluated"], strict=True):
            # TRL's other means depend on which rows share a batch.
            for name in ("eval_loss", "eval_grafted_loss"):
                assert got[name] == pytest.approx(wanted[name], rel=1e-6)
            assert got["eval_grafted_loss"] != pytest.approx(got["eval_loss"], rel=1e-6)


@pytest.mark.parametrize("policy", ["base", "grafted"])
def test_a_second_stage_has_the_reference_values_of_one_process(pair, tmp_path, policy):
    run(pair, tmp_path / "first", "sft", fsdp=SHARDED)
    second = (tmp_path / "first", pair[1])
    alone = run(second, tmp_path / "alone", "dpo", "single", 1, per_device_train_batch_size=4, ref_policy=policy)
    shared = run(second, tmp_path / "shared", "dpo", fsdp=SHARDED, ref_policy=policy)
    kept = run(second, tmp_path / "kept", "dpo", fsdp=SHARDED, ref_policy=policy, precompute_ref_log_probs=False)
    assert shared["references"] == pytest.approx(alone["references"], rel=1e-6)
    assert shared["losses"] == pytest.approx(alone["losses"], rel=1e-6)
    assert kept["losses"] == pytest.approx(alone["losses"], rel=1e-6)
    assert (kept["reference"], shared["reference"]) == (True, False)
    base, instruct, first = (load_file(folder / "model.safetensors") for folder in (*pair, second[0]))
    added = {name: instruct[name].double() + (first[name].double() - base[name].double()) for name in instruct}
    model = AutoModelForCausalLM.from_pretrained(pair[0], dtype=torch.float64)
    model.load_state_dict(base if policy == "base" else added, strict=False)
    tokenizer = AutoTokenizer.from_pretrained(pair[1])
    expected = [log_probability(model, tokenizer, row, "chosen") for row in preference_data()]
    assert shared["references"] == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize(
    "reference", [pytest.param("init", marks=needs("trl", "1.16", "older ones are refused")), "instruct"]
)
def test_weights_that_one_process_reads_for_all_give_the_same_bits(pair, tmp_path, reference):
    seen = {}
    for read in ("false", "true"):
        seen[read] = run(
            pair, tmp_path / read, "dpo", "launched", ref_policy=reference, precompute_ref_log_probs=True,
            environment={"FSDP_CPU_RAM_EFFICIENT_LOADING": read},
        )  # fmt: skip
        assert seen[read].pop("read_by_one") == (read == "true")
    assert seen["true"] == seen["false"]
    for place in ("", "grafted"):
        assert engines.weights(tmp_path / "true" / place) == engines.weights(tmp_path / "false" / place) != {}


@pytest.mark.parametrize("kind", ["sft", "dpo"])
def test_a_head_beside_an_adapter_has_the_gradient_of_all_processes(tmp_path, kind):
    """TRL never calls the head, whose shards were trained with the rows of their own process alone."""
    pair, head = make_pair(tmp_path / "pair", tied=False), {"modules_to_save": ["lm_head"]}
    run(pair, tmp_path / "alone", kind, "single", 1, per_device_train_batch_size=4, lora=head)
    run(pair, tmp_path / "shared", kind, lora=head)
    alone, shared, instruct = (
        load_file(folder / "model.safetensors")
        for folder in (tmp_path / "alone/grafted", tmp_path / "shared/grafted", pair[1])
    )
    assert (alone["lm_head.weight"] - instruct["lm_head.weight"]).abs().max() > 1e-2
    for name, weight in alone.items():
        torch.testing.assert_close(shared[name], weight, rtol=0, atol=1e-6)


def test_16_bits_that_are_lifted_to_fp32_have_no_delta_of_the_cast(tmp_path):
    pair = make_pair(tmp_path, dtype=torch.float32)
    run(pair, tmp_path / "out", "sft", fsdp=SHARDED, bf16=True, model_init_kwargs={"dtype": "bfloat16"},
        learning_rate=1e-12, graft_every_save=True, save_strategy="steps", save_steps=1)  # fmt: skip
    base, instruct = (load_file(folder / "model.safetensors") for folder in pair)
    tuned = load_file(tmp_path / "out/model.safetensors")
    assert max(float((tuned[name] - base[name]).abs().max()) for name in base) > 1e-5
    for place in ("grafted", "checkpoint-1/shadow/grafted"):
        grafted = load_file(tmp_path / "out" / place / "model.safetensors")
        assert max(float((grafted[name] - instruct[name]).abs().max()) for name in base) < 1e-10
    assert verify(tmp_path / "out/grafted").same


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a file system needs root")
def test_machines_need_a_shared_folder_for_reference_values_alone(pair, tmp_path):
    (tmp_path / "runs").mkdir()
    run(pair, tmp_path / "runs/out", "sft", "ddp", machines=True)
    check_graft(pair, tmp_path / "runs/out", tmp_path / "runs/out/grafted", tmp_path / "again")
    given = ("ddp", "dpo", tuple(map(str, pair)), str(tmp_path / "runs/dpo"))
    ends = in_processes(engines.run, *given, machines=True, ref_policy="instruct", save_steps=1)
    assert all("process 1 does not see the reference log probabilities" in end.error for end in ends)
    assert not list((tmp_path / "runs/dpo").rglob("*.safetensors"))
