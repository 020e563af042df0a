"""FSDP2 in two real processes: TUNED as plain TRL makes it, the values of one process, and the graft of that TUNED."""

from __future__ import annotations

from pathlib import Path

import engines
import pytest
import torch
from accelerate.utils import merge_fsdp_weights
from architectures import make_family
from ranks import in_processes
from runs import log_probability
from tiny import preference_data
from transformers import AutoModelForCausalLM, AutoTokenizer

from shadow_trl import graft

pytestmark = [pytest.mark.distributed, pytest.mark.slow]
SHARDED = {"state_dict_type": "SHARDED_STATE_DICT"}


def run(pair, out: Path, kind: str, engine: str = "fsdp2", **changes):
    """Run in two processes under FSDP2; return what the first one saw."""
    ends = in_processes(engines.run, engine, kind, tuple(map(str, pair)), str(out), **changes)
    assert [end.error for end in ends] == ["", ""]
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
    check_graft(pair, tmp_path / "ours", tmp_path / "ours/grafted", tmp_path / "again")
    # Of a checkpoint there are shards only, which are grafted without being gathered.
    (last,) = (tmp_path / "ours").glob("checkpoint-*")
    assert not list(last.glob("*.safetensors"))
    assert engines.weights(last / "shadow/grafted") == engines.weights(tmp_path / "ours/grafted")
    check_graft(pair, last / "pytorch_model_fsdp_0", last / "shadow/grafted", tmp_path / "by its shards")


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
        eval_steps=1, load_best_model_at_end=True, metric_for_best_model="loss", learning_rate=5.0,
        graft_every_save=True, max_steps=2, lr_scheduler_type="constant")  # fmt: skip
    kept = {path.name: engines.weights(path / "shadow/grafted") for path in (tmp_path / "out").glob("checkpoint-*")}
    assert engines.weights(tmp_path / "out/grafted") == kept["checkpoint-1"] != kept["checkpoint-2"]
