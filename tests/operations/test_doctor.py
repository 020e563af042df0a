"""Doctor: the state of the machine, what of a pair would fail, and what training takes, by hand."""

from __future__ import annotations

import json

import pytest
from families import family, load
from oracle import relative_distance
from tiny import make_pair, save_model

from shadow_trl import cli
from shadow_trl.checkpoints.checkpoint import Checkpoint
from shadow_trl.operations.doctor import adapter_size, doctor, shape_of


def test_a_pair_that_fits(pair, capsys):
    base, instruct = pair
    assert cli.main(["doctor", "--base", str(base), "--instruct", str(instruct), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["fails"] == []
    assert found["sigma"] == pytest.approx(relative_distance(load(base), load(instruct)), rel=1e-6)
    assert {"python", "torch", "trl"} <= found["versions"].keys()
    assert found["devices"] == []
    assert found["processors"] >= 1
    # 49 rows of width 16, tied; in each of 2 layers q, k, v, o of 2 heads and 1 key head of width 8, an MLP of 32, two
    # norms of the layer and two of the heads; the last norm.
    block = 16 * (16 + 8 + 8 + 16) + 3 * 16 * 32 + 2 * 16 + 2 * 8
    weights = 49 * 16 + 2 * block + 16
    full, lora = found["needs"]["SFT, full"], found["needs"]["DPO, LoRA"]
    inside = 16 * 16 + 4 * (2 + 1) * 8 + 8 * 32
    activations = 1024 * (2 * 16 * 2 + inside)
    assert full["memory"] == 16 * weights + 2 * weights + activations
    assert full["host"] == 4 * weights
    assert full["gpus"] == 1
    assert full["disk"] == {"BASE": 2 * weights, "INSTRUCT": 2 * weights, "TUNED": 4 * weights,
                            "checkpoint": 12 * weights, "graft": 2 * weights}  # fmt: skip
    trained = 16 * 2 * (2 * (16 + 16) + 2 * (16 + 8) + 3 * (16 + 32))
    # Training, or the reference beside the policy: two models in bf16.
    assert lora["memory"] == max(2 * weights + 16 * trained, 2 * 2 * weights) + 2 * activations
    assert lora["disk"]["TUNED"] == 4 * trained


def test_the_weights_of_peft_are_counted(pair):
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(pair[0])
    every = sum(parameter.numel() for parameter in model.parameters())
    adapted = get_peft_model(model, LoraConfig(r=3, target_modules="all-linear", task_type="CAUSAL_LM"))
    trained = sum(parameter.numel() for parameter in adapted.parameters() if parameter.requires_grad)
    base = Checkpoint.open(pair[0])
    assert adapter_size(base, 3) == trained
    assert shape_of(base).weights == every


def test_what_would_fail_is_listed_and_is_the_exit_code(tmp_path, capsys):
    base, _ = make_pair(tmp_path / "one")
    other = save_model(tmp_path / "two" / "instruct", kind="llama", template=True)
    before = sorted(tmp_path.rglob("*"))
    assert cli.main(["doctor", "--base", str(base), "--instruct", str(other)]) == 1
    captured = capsys.readouterr()
    assert "would fail: " in captured.out
    assert "model_type" in captured.out
    assert "Traceback" not in captured.err
    assert sorted(tmp_path.rglob("*")) == before
    sides = family(tmp_path / "family")  # has no template, which conversations need
    found = doctor(sides["base"], sides["instruct"], progress=False)
    assert any("chat template" in text for text in found.fails)
    assert cli.main(["doctor", "--base", str(tmp_path / "gone"), "--instruct", str(base)]) == 2


def test_text_has_a_row_a_training(pair):
    lines = doctor(*pair, progress=False).text().splitlines()
    assert [line.split("  ")[0] for line in lines if line.startswith(("SFT", "DPO"))] == [
        "SFT, full", "SFT, LoRA", "DPO, full", "DPO, LoRA",
    ]  # fmt: skip
    assert "devices: CPU alone" in lines[1]
