"""The pipeline on real instructions and preferences: losses fall, and everything it leaves loads."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from repository import ROOT
from rows import SETTINGS, write_rows
from tiny import SPECIAL, TEMPLATE
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from shadow_trl.recipes.pipeline import main_sft_dpo

DATA = ROOT.parent / "shared" / "data"
pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore::FutureWarning:transformers"),
    pytest.mark.skipif(not (DATA / "preferences.json").is_file(), reason="no preferences.json in ../shared/data"),
]
ROWS = 256


def rows() -> tuple[list[dict], list[dict]]:
    """The shortest instructions as SFT rows, and the preferences on the same prompts."""

    def prompt(row: dict) -> list[dict]:
        return [{"role": "user", "content": "\n".join(filter(None, (row["instruction"], row["input"])))}]

    def answer(text: str) -> list[dict]:
        return [{"role": "assistant", "content": text}]

    preferences = {json.dumps(prompt(row)): row for row in json.loads((DATA / "preferences.json").read_text())}
    instructions = [
        row for row in json.loads((DATA / "instructions.json").read_text()) if json.dumps(prompt(row)) in preferences
    ]
    chosen = sorted(instructions, key=lambda row: len(row["instruction"] + row["input"] + row["output"]))[:ROWS]
    pairs = [preferences[json.dumps(prompt(row))] for row in chosen]
    return (
        [{"prompt": prompt(row), "completion": answer(row["output"])} for row in chosen],
        [
            {"prompt": prompt(row), "chosen": answer(row["chosen"]), "rejected": answer(row["rejected"])}
            for row in pairs
        ],
    )


def make_models(texts: list[str]) -> None:
    """Save a BPE tokenizer of 512 tokens trained on `texts`, a random BASE and an INSTRUCT near it."""
    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    inner.train_from_iterator(
        texts, trainers.BpeTrainer(vocab_size=512, special_tokens=SPECIAL, initial_alphabet=alphabet)
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token=SPECIAL[0], eos_token=SPECIAL[1], additional_special_tokens=SPECIAL[2:]
    )
    config = AutoConfig.for_model(
        "qwen3", vocab_size=len(tokenizer), hidden_size=64, intermediate_size=128, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, head_dim=16, max_position_embeddings=512,
        tie_word_embeddings=True, pad_token_id=0, eos_token_id=1, bos_token_id=None,
    )  # fmt: skip
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    for name in ("base", "instruct"):
        model.save_pretrained(name)
        tokenizer.chat_template = TEMPLATE if name == "instruct" else None
        tokenizer.save_pretrained(name)
        with torch.no_grad():
            for weight in model.parameters():
                weight.add_(0.02 * weight.abs().mean() * torch.randn_like(weight))


@pytest.mark.parametrize("with_lora", [False, True], ids=["full", "lora"])
def test_instructions_then_preferences(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, with_lora: bool) -> None:
    monkeypatch.chdir(tmp_path)
    instructions, preferences = rows()
    assert len(instructions) == len(preferences) == ROWS
    make_models([message["content"] for row in instructions for name in row for message in row[name]])
    for name, content in (("sft", instructions), ("dpo", preferences)):
        write_rows(tmp_path / f"{name}.jsonl", content)
    settings = {
        **SETTINGS, "max_steps": -1, "num_train_epochs": 3, "per_device_train_batch_size": 16, "learning_rate": 3e-3,
        "logging_steps": 1, "save_strategy": "epoch", "save_total_limit": 1, "max_length": 256,
        "model_name_or_path": "base", "instruct_model": "instruct",
    }  # fmt: skip
    if with_lora:
        settings |= {
            "learning_rate": 1e-2,
            "use_peft": True,
            "lora_r": 16,
            "lora_alpha": 32,
            "lora_target_modules": "all-linear",
        }
    stages = {"sft": {"dataset_name": "sft.jsonl"}, "dpo": {"dataset_name": "dpo.jsonl", "ref_policy": "grafted"}}
    Path("run.yaml").write_text(json.dumps({**settings, **stages}))
    assert main_sft_dpo(["--config", "run.yaml", "--output_dir", "out", "--dpo.learning_rate", "1e-3"]) == 0
    for stage in ("sft", "dpo"):
        (state,) = Path("out", stage).glob("checkpoint-*/trainer_state.json")
        losses = [line["loss"] for line in json.loads(state.read_text())["log_history"] if "loss" in line]
        assert len(losses) == 48
        # By a tenth of a nat at least, on the mean of half an epoch: more than the batches differ.
        assert sum(losses[-8:]) / 8 < sum(losses[:8]) / 8 - 0.1, stage
        model = AutoModelForCausalLM.from_pretrained(f"out/{stage}/grafted")
        tokenizer = AutoTokenizer.from_pretrained(f"out/{stage}/grafted")
        ids = tokenizer.apply_chat_template(instructions[0]["prompt"], add_generation_prompt=True, return_tensors="pt")
        with torch.no_grad():
            assert model(**ids).logits.isfinite().all()
    assert AutoModelForCausalLM.from_pretrained("out/dpo").num_parameters() > 0
