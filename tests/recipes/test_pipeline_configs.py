"""The shipped pipelines: each parses, says what it reproduces, and runs on a tiny model with rows of its data sets."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from repository import ROOT
from stages import tuned_weights, weights
from tiny import make_tokenizer
from transformers import AutoConfig, AutoModelForCausalLM
from trl import get_peft_config

from shadow_trl.recipes.pipeline import run_pipeline
from shadow_trl.recipes.pipeline_options import read_plan

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning:transformers")

FOLDER = ROOT / "recipes/configs/pipelines"
KINDS = {"zephyr-7b": "mistral", "smollm2-1.7b": "llama", "tulu-3-8b": "llama", "qwen3-0.6b": "qwen3"}
DRY = [
    "--max_steps",
    "2",
    "--per_device_train_batch_size",
    "2",
    "--gradient_accumulation_steps",
    "1",
    "--bf16",
    "false",
]
DRY += ["--use_cpu", "--dtype", "float32", "--activation_checkpointing", "false", "--dataloader_pin_memory", "false"]
DRY += ["--save_strategy", "no", "--learning_rate", "1e-2", "--warmup_steps", "0", "--max_length", "96"]


def turns(number: int, answer: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": f"say {number}"}, {"role": "assistant", "content": answer}]


def ultrachat(number: int) -> dict:
    more = [*turns(number, f"it is {number}."), *turns(number + 1, "no.")]
    return {"prompt": f"say {number}", "prompt_id": f"id{number}", "messages": more}


def ultrafeedback(number: int) -> dict:
    chosen, rejected = turns(number, f"it is {number}."), turns(number, "i do not know, sorry.")
    scores = {"score_chosen": 8.0, "score_rejected": 3.5}
    return {"prompt": f"say {number}", "prompt_id": f"id{number}", "chosen": chosen, "rejected": rejected,
            "messages": chosen, **scores}  # fmt: skip


def smoltalk(number: int) -> dict:
    return {"messages": turns(number, f"it is {number}."), "source": "smol-magpie-ultra"}


def tulu_sft(number: int) -> dict:
    return {"id": f"id{number}", "messages": turns(number, f"it is {number}."), "source": "ai2-adapt-dev/flan"}


def tulu_preferences(number: int) -> dict:
    row = ultrafeedback(number)
    del row["prompt_id"], row["messages"], row["score_chosen"], row["score_rejected"]
    models = {"chosen_model": "m", "chosen_rating": 4.0, "rejected_model": "n", "rejected_rating": 2.0}
    return {"id": f"id{number}", "source": "s", **row, **models}


def capybara(number: int) -> dict:
    return {"source": "Airoboros", "messages": turns(number, f"it is {number}."), "num_turns": 1}


def trl_ultrafeedback(number: int) -> dict:
    row = ultrafeedback(number)
    return {name: row[name] for name in ("chosen", "rejected", "score_chosen", "score_rejected")}


ROWS = {
    "zephyr-7b": (ultrachat, ultrafeedback),
    "smollm2-1.7b": (smoltalk, ultrafeedback),
    "tulu-3-8b": (tulu_sft, tulu_preferences),
    "qwen3-0.6b": (capybara, trl_ultrafeedback),
}


def make_models(folder: Path, kind: str) -> tuple[Path, Path]:
    """Save a random BASE and an INSTRUCT near it, of the architecture that the pipeline trains."""
    config = AutoConfig.for_model(
        kind, vocab_size=49, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=8, max_position_embeddings=128, tie_word_embeddings=kind == "qwen3",
        pad_token_id=0, eos_token_id=1, bos_token_id=None,
    )  # fmt: skip
    torch.manual_seed(5)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    for name in ("base", "instruct"):
        model.save_pretrained(folder / name)
        make_tokenizer(template=name == "instruct").save_pretrained(folder / name)
        with torch.no_grad():
            for weight in model.parameters():
                weight.add_(0.02 * weight.abs().mean() * torch.randn_like(weight))
    return folder / "base", folder / "instruct"


GPUS = {"zephyr-7b": 8, "smollm2-1.7b": 1, "tulu-3-8b": 8, "qwen3-0.6b": 1}
"""On how many GPUs the command of a configuration runs."""


def test_the_shipped_pipelines_are_these() -> None:
    assert {path.stem for path in FOLDER.iterdir()} == set(KINDS)


@pytest.mark.parametrize("name", KINDS)
def test_a_pipeline_opens_with_its_command_and_its_source(name: str) -> None:
    head = (FOLDER / f"{name}.yaml").read_text().splitlines()[:20]
    engine = f"shadow-trl sft-dpo --accelerate_config fsdp2 --num_processes {GPUS[name]}"
    command = engine if GPUS[name] > 1 else "accelerate launch recipes/shadow_sft_dpo.py"
    assert any(f"{command} --config recipes/configs/pipelines/{name}.yaml" in line for line in head)
    assert any(line.startswith("# Numbers: ") for line in head)
    assert any("What differs" in line for line in head)


PUBLISHED = {
    # learning rate, rows a step, epochs or steps, longest row; and beta with its loss for DPO
    "zephyr-7b": ((2e-5, 128, 1, 2048), (5e-7, 128, 1, 1024, 0.01, "sigmoid")),
    "smollm2-1.7b": ((3e-4, 128, 2, 8192), (1e-6, 128, 3, 1024, 0.5, "sigmoid")),
    "tulu-3-8b": ((5e-6, 128, 2, 4096), (5e-7, 128, 1, 2048, 5.0, "sigmoid_norm")),
    "qwen3-0.6b": ((2e-4, 16, 1, 1024), (5e-6, 16, 1000, 1024, 0.1, "sigmoid")),
}


@pytest.mark.parametrize("name", KINDS)
def test_the_published_numbers(name: str) -> None:
    plan = read_plan(["--config", str(FOLDER / f"{name}.yaml"), "--use_cpu"])
    for stage, expected in zip(("sft", "dpo"), PUBLISHED[name], strict=True):
        training = plan.options[stage].training
        rows = GPUS[name] * training.per_device_train_batch_size * training.gradient_accumulation_steps
        length = training.max_steps if training.max_steps > 0 else training.num_train_epochs
        found = (training.learning_rate, rows, length, training.max_length)
        assert found == expected[:4]
        if stage == "dpo":
            assert (training.beta, *training.loss_type) == expected[4:]
            assert training.instruct_model is None  # from the manifest of the SFT stage
        assert (get_peft_config(plan.options[stage].model) is not None) == (name == "qwen3-0.6b")


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if "qwen3" in name else pytest.mark.slow) for name in KINDS]
)
def test_dry_run(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two steps of each stage; the graft is INSTRUCT + (TUNED after DPO - BASE), from the files in float64."""
    monkeypatch.chdir(tmp_path)
    base, instruct = make_models(Path(), KINDS[name])
    words = ["--config", str(FOLDER / f"{name}.yaml"), "--output_dir", "out", *DRY]
    words += ["--model_name_or_path", str(base), "--instruct_model", str(instruct), "--graft_format", "model"]
    plan = read_plan(words)
    for stage, row in zip(("sft", "dpo"), ROWS[name], strict=True):
        # A local file has the split `train` alone; the file's name says which one the configuration asks the hub for.
        split = plan.options[stage].script.dataset_train_split
        Path(f"{stage}-{split}.jsonl").write_text("".join(json.dumps(row(number)) + "\n" for number in range(8)))
        words += [f"--{stage}.dataset_name", f"{stage}-{split}.jsonl", f"--{stage}.dataset_train_split", "train"]
        words += [f"--{stage}.dataset_config", "none"] if plan.options[stage].script.dataset_config else []
    report = run_pipeline(words)
    assert report is not None
    first, second = tuned_weights(base, Path("out/sft")), tuned_weights(base, Path("out/dpo"))
    before, after, grafted = weights(base), weights(instruct), weights(Path("out/dpo/grafted"))
    for state, start in ((first, before), (second, first)):
        assert max((state[key] - start[key]).abs().max().item() for key in start) > 1e-3
    for key, tensor in grafted.items():
        expected = after[key] + (second[key] - before[key])
        torch.testing.assert_close(tensor, expected, rtol=1e-6, atol=1e-8, msg=lambda text, key=key: f"{key}: {text}")
