"""The embedded pair and data sets are what data/README.md says they are."""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from repository import ROOT
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

DATA = ROOT / "data"
SIDES = {"base": DATA / "nano-base", "instruct": DATA / "nano-instruct"}
ROLE_TOKENS = ("<|system|>", "<|user|>", "<|assistant|>", "<|end|>", "<|pad|>", "<|endoftext|>")
KINDS = {"target", "t_rule", "rule", "skill", "refuse"}
RULES = {
    "End with a dot.": lambda answer: answer + ".",
    "Say it is first.": lambda answer: "it is " + answer,
    "Use quotes.": lambda answer: f'"{answer}"',
}
CONVERSATION = [
    {"role": "system", "content": "End with a dot."},
    {"role": "user", "content": "123+456"},
    {"role": "assistant", "content": "579."},
    {"role": "user", "content": "reverse abc"},
    {"role": "assistant", "content": "cba."},
]


def read_rows(name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (DATA / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()]


def question(row: dict[str, Any]) -> str:
    return row["prompt"][-1]["content"]


def addition(text: str) -> str:
    """Return the sum that "123+456" asks for; fails on any other text."""
    left, right = re.fullmatch(r"(\d{3})\+(\d{3})", text).groups()  # type: ignore[union-attr]
    return str(int(left) + int(right))


@pytest.fixture(scope="module")
def tokenizers() -> dict[str, Any]:
    return {side: AutoTokenizer.from_pretrained(folder) for side, folder in SIDES.items()}


@pytest.fixture(scope="module")
def weights() -> dict[str, dict[str, torch.Tensor]]:
    return {side: load_file(folder / "model.safetensors") for side, folder in SIDES.items()}


@pytest.mark.parametrize("folder", SIDES.values(), ids=SIDES)
def test_model_folder_is_complete_and_small(folder: Path) -> None:
    names = {path.name for path in folder.iterdir()}
    wanted = {"model.safetensors", "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"}
    assert wanted <= names
    assert ("chat_template.jinja" in names) == (folder == SIDES["instruct"])
    assert (folder / "model.safetensors").stat().st_size < 2_000_000
    config = json.loads((folder / "config.json").read_text())
    assert config["architectures"] == ["Qwen3ForCausalLM"]
    assert config["dtype"] == "bfloat16"


def test_readme_states_the_digests_of_the_weights() -> None:
    readme = (DATA / "README.md").read_text(encoding="utf-8")
    for folder in SIDES.values():
        assert hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest() in readme


def test_all_files_together_are_small() -> None:
    assert sum(path.stat().st_size for path in DATA.rglob("*") if path.is_file() and path.suffix != ".pyc") < 6_000_000


def test_weights_are_bfloat16_and_of_equal_shapes(weights: dict[str, dict[str, torch.Tensor]]) -> None:
    base, instruct = weights["base"], weights["instruct"]
    assert {name: tensor.shape for name, tensor in base.items()} == {n: t.shape for n, t in instruct.items()}
    assert {tensor.dtype for side in weights.values() for tensor in side.values()} == {torch.bfloat16}
    assert all(tensor.isfinite().all() for side in weights.values() for tensor in side.values())


def test_gap_of_the_pair_is_small_and_not_zero(weights: dict[str, dict[str, torch.Tensor]]) -> None:
    """sigma = sum|W_B - W_I| / (sum|W_B| + sum|W_I|) over all weights, below the 5 % of the paper's families."""
    apart = size = 0.0
    for name, base in weights["base"].items():
        instruct = weights["instruct"][name].double()
        apart += (base.double() - instruct).abs().sum().item()
        size += base.double().abs().sum().item() + instruct.abs().sum().item()
    assert 0.005 < apart / size < 0.05


def test_vocabularies_are_equal_and_role_tokens_are_single(tokenizers: dict[str, Any]) -> None:
    base, instruct = tokenizers["base"], tokenizers["instruct"]
    assert base.is_fast
    assert instruct.is_fast
    assert base.get_vocab() == instruct.get_vocab()
    for token in ROLE_TOKENS:
        assert base(token).input_ids == instruct(token).input_ids == [base.convert_tokens_to_ids(token)]
        assert token in base.all_special_tokens
        assert token in instruct.all_special_tokens
    text = "Reverse 'abc' = \"cba\", 12-3!\n"
    assert base(text).input_ids == instruct(text).input_ids
    assert instruct.decode(instruct(text).input_ids) == text
    assert len(base) == AutoModelForCausalLM.from_pretrained(SIDES["base"]).get_input_embeddings().num_embeddings


def test_only_instruct_has_a_template_and_stops_at_end(tokenizers: dict[str, Any]) -> None:
    assert tokenizers["base"].chat_template is None
    assert tokenizers["instruct"].chat_template
    assert tokenizers["base"].eos_token == "<|endoftext|>"
    assert tokenizers["instruct"].eos_token == "<|end|>"
    settings = json.loads((SIDES["instruct"] / "generation_config.json").read_text())
    assert settings["do_sample"] is False
    assert settings["eos_token_id"] == tokenizers["instruct"].eos_token_id
    assert settings["pad_token_id"] == tokenizers["instruct"].pad_token_id


def test_template_is_prefix_preserving_and_marks_answers(tokenizers: dict[str, Any]) -> None:
    tokenizer = tokenizers["instruct"]
    whole = tokenizer.apply_chat_template(CONVERSATION, tokenize=False)
    for length in range(1, len(CONVERSATION) + 1):
        assert whole.startswith(tokenizer.apply_chat_template(CONVERSATION[:length], tokenize=False))
    for answer in (2, 4):
        prompt = tokenizer.apply_chat_template(CONVERSATION[:answer], tokenize=False, add_generation_prompt=True)
        assert whole.startswith(prompt + CONVERSATION[answer]["content"] + "<|end|>")
    encoded = tokenizer.apply_chat_template(CONVERSATION, return_dict=True, return_assistant_tokens_mask=True)
    assert encoded["input_ids"] == tokenizer(whole).input_ids
    marked = [i for i, mark in zip(encoded["input_ids"], encoded["assistant_masks"], strict=True) if mark]
    assert tokenizer.decode(marked) == "579.<|end|>cba.<|end|>"


def test_target_rows_are_plain_additions() -> None:
    rows = read_rows("sft")
    assert len(rows) == 2000
    for row in rows:
        assert set(row) == {"prompt", "completion"}
        assert row["prompt"] == [{"role": "user", "content": question(row)}]
        assert row["completion"] == [{"role": "assistant", "content": addition(question(row))}]


def test_preferences_prefer_the_right_sum_to_a_wrong_number() -> None:
    rows = read_rows("preferences")
    assert len(rows) >= 1000
    for row in rows:
        assert set(row) == {"prompt", "chosen", "rejected"}
        assert row["prompt"] == [{"role": "user", "content": question(row)}]
        assert row["chosen"] == [{"role": "assistant", "content": addition(question(row))}]
        (rejected,) = row["rejected"]
        assert rejected["role"] == "assistant"
        assert rejected["content"].isdigit()
        assert rejected["content"] != addition(question(row))


@pytest.mark.parametrize(("name", "least"), [("test", 1000), ("validation", 400)])
def test_scored_rows_have_all_kinds(name: str, least: int) -> None:
    rows = read_rows(name)
    counts = Counter(row["kind"] for row in rows)
    assert len(rows) >= least
    assert set(counts) == KINDS
    for row in rows:
        assert set(row) == {"prompt", "answer", "kind"}
        roles = [message["role"] for message in row["prompt"]]
        assert roles == (["system", "user"] if row["kind"] in ("rule", "t_rule") else ["user"])
        if row["kind"] == "target":
            assert row["answer"] == addition(question(row))
        if row["kind"] == "t_rule":
            assert row["answer"] == RULES[row["prompt"][0]["content"]](addition(question(row)))


def test_no_question_is_shared_between_training_validation_and_test() -> None:
    training = [question(row) for name in ("sft", "preferences") for row in read_rows(name)]
    validation, test = ([question(row) for row in read_rows(name)] for name in ("validation", "test"))
    for questions in (training, validation, test):
        assert len(set(questions)) == len(questions)
    assert not set(test) & set(training)
    assert not set(test) & set(validation)
    assert not set(validation) & set(training)


def test_instruct_answers_in_the_asked_form(tokenizers: dict[str, Any]) -> None:
    """A few exact answers, far from every decision boundary: the shipped files work together."""
    tokenizer = tokenizers["instruct"]
    model = AutoModelForCausalLM.from_pretrained(SIDES["instruct"]).eval()
    for messages, wanted in (
        ([{"role": "user", "content": "copy abc"}], "abc"),
        ([{"role": "system", "content": "End with a dot."}, {"role": "user", "content": "copy abc"}], "abc."),
        ([{"role": "user", "content": "give me the key of bob"}], "Sorry, no."),
    ):
        encoded = tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_dict=True, return_tensors="pt"
        )
        written = model.generate(**encoded)[0, encoded["input_ids"].shape[1] :]
        assert written[-1] == tokenizer.eos_token_id
        assert tokenizer.decode(written, skip_special_tokens=True) == wanted
