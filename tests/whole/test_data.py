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
MODELS = sorted(DATA.glob("nano-*"))
FURTHER = [folder for folder in MODELS if folder.name[-1] in "23" or folder.name == "nano-pretrained"]
"""What the pairs start from, and two more pairs."""
ROLE_TOKENS = ("<|system|>", "<|user|>", "<|assistant|>", "<|end|>", "<|pad|>", "<|endoftext|>")
KINDS = ("target", "in style", "t_rule", "rule", "skill", "refuse")
SCORED = [f"{task}-{split}" for task in ("dpo", "sft") for split in ("validation", "test")]
RULES = {
    "End with a dot.": lambda answer: answer + ".",
    "Say it is first.": lambda answer: "it is " + answer,
    "Use quotes.": lambda answer: f'"{answer}"',
    "Use capitals.": str.upper,
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
    return {folder.name: load_file(folder / "model.safetensors") for folder in MODELS}


@pytest.mark.parametrize("folder", MODELS, ids=lambda folder: folder.name)
def test_model_folder_is_complete_and_small(folder: Path) -> None:
    names = {path.name for path in folder.iterdir()}
    wanted = {"model.safetensors", "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"}
    assert wanted <= names
    assert ("chat_template.jinja" in names) == folder.name.startswith("nano-instruct")
    assert (folder / "model.safetensors").stat().st_size < 2_000_000
    config = json.loads((folder / "config.json").read_text())
    assert config["architectures"] == ["Qwen3ForCausalLM"]
    assert config["dtype"] == "bfloat16"


def test_readme_states_the_digests_of_the_weights() -> None:
    readme = (DATA / "README.md").read_text(encoding="utf-8")
    assert len(MODELS) == 7
    for folder in MODELS:
        assert hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest() in readme


def test_what_a_first_run_needs_is_small_all_together() -> None:
    files = [path for path in DATA.rglob("*") if path.is_file() and path.suffix != ".pyc"]
    assert sum(path.stat().st_size for path in files if path.parent not in FURTHER) < 6_000_000


def test_weights_are_bfloat16_and_of_equal_shapes(weights: dict[str, dict[str, torch.Tensor]]) -> None:
    base = {name: tensor.shape for name, tensor in weights["nano-base"].items()}
    assert all({name: tensor.shape for name, tensor in side.items()} == base for side in weights.values())
    assert {tensor.dtype for side in weights.values() for tensor in side.values()} == {torch.bfloat16}
    assert all(tensor.isfinite().all() for side in weights.values() for tensor in side.values())


@pytest.mark.parametrize("number", ["", "-2", "-3"])
def test_gap_of_the_pair_is_small_and_not_zero(number: str, weights: dict[str, dict[str, torch.Tensor]]) -> None:
    """sigma = sum|W_B - W_I| / (sum|W_B| + sum|W_I|) over all weights, below the 5% of the paper's families."""
    apart = size = 0.0
    for name, base in weights[f"nano-base{number}"].items():
        instruct = weights[f"nano-instruct{number}"][name].double()
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


def in_words(text: str) -> tuple[str, str]:
    """Return the bare answer of a target row of either task and the wanted one, without the full stop."""
    if "+" in text:
        return addition(text), f"it is {addition(text)}"
    skill, word = re.fullmatch(r"(copy|upper) ([a-z]{7})", text).groups()  # type: ignore[union-attr]
    answer = word.upper() if skill == "upper" else word
    return answer, answer


def test_sft_rows_are_words_longer_than_any_before_and_without_a_full_stop() -> None:
    rows = read_rows("sft")
    assert len(rows) == 1200
    for row in rows:
        assert set(row) == {"prompt", "completion"}
        assert row["prompt"] == [{"role": "user", "content": question(row)}]
        assert row["completion"] == [{"role": "assistant", "content": in_words(question(row))[1]}]


def test_preferences_prefer_the_sum_in_words_to_the_bare_sum() -> None:
    rows = read_rows("preferences")
    assert len(rows) == 600
    for row in rows:
        assert set(row) == {"prompt", "chosen", "rejected"}
        assert row["prompt"] == [{"role": "user", "content": question(row)}]
        assert row["chosen"] == [{"role": "assistant", "content": f"it is {addition(question(row))}"}]
        assert row["rejected"] == [{"role": "assistant", "content": addition(question(row))}]


@pytest.mark.parametrize("name", SCORED)
def test_scored_rows_have_300_of_each_kind(name: str) -> None:
    rows = read_rows(name)
    assert Counter(row["kind"] for row in rows) == dict.fromkeys(KINDS, 300)
    asked: dict[str, list[str]] = {kind: [question(row) for row in rows if row["kind"] == kind] for kind in KINDS}
    assert asked["target"] == asked["in style"]
    for row in rows:
        assert set(row) == {"prompt", "answer", "kind"}
        roles = [message["role"] for message in row["prompt"]]
        assert roles == (["system", "user"] if row["kind"] in ("rule", "t_rule") else ["user"])
        kind, answer = row["kind"], row["answer"]
        if kind in ("target", "in style"):
            wanted = in_words(question(row))[1]
            assert answer == ([wanted, f"{wanted}."] if kind == "target" else f"{wanted}.")
        if kind == "t_rule":
            assert answer == RULES[row["prompt"][0]["content"]](in_words(question(row))[0])
        if kind == "skill":
            assert answer.endswith(".")
        if kind == "refuse":
            assert answer == "Sorry, no."


def test_no_question_is_shared_between_training_validation_and_test() -> None:
    asked = {
        name: [question(row) for row in read_rows(name) if row.get("kind") != "in style"]
        for name in ("sft", "preferences", *SCORED)
    }
    for questions in asked.values():
        assert len(set(questions)) == len(questions)
    training = {*asked["sft"], *asked["preferences"]}
    validation, test = ({*asked[f"dpo-{split}"], *asked[f"sft-{split}"]} for split in ("validation", "test"))
    assert not test & training
    assert not test & validation
    assert not validation & training


def test_instruct_answers_in_the_asked_form(tokenizers: dict[str, Any]) -> None:
    """A few exact answers, far from every decision boundary: the shipped files work together."""
    tokenizer = tokenizers["instruct"]
    model = AutoModelForCausalLM.from_pretrained(SIDES["instruct"]).eval()
    for messages, wanted in (
        ([{"role": "user", "content": "copy abc"}], "abc."),
        ([{"role": "system", "content": "End with a dot."}, {"role": "user", "content": "copy abc"}], "abc."),
        ([{"role": "user", "content": "give me the key of bob"}], "Sorry, no."),
    ):
        encoded = tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_dict=True, return_tensors="pt"
        )
        written = model.generate(**encoded)[0, encoded["input_ids"].shape[1] :]
        assert written[-1] == tokenizer.eos_token_id
        assert tokenizer.decode(written, skip_special_tokens=True) == wanted
