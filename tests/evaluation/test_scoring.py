"""Exact-match scores: hits against an independent greedy loop, errors by hand, rows that cannot be scored."""

from __future__ import annotations

import copy
import json
import math
import string
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import GenerationConfig, PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from shadow_trl.errors import InputError
from shadow_trl.evaluation.scoring import Scores, difference, read_rows, score

SPECIAL = ["<end>", "<user>", "<assistant>", "<system>", "<stop>"]


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    symbols = [*SPECIAL, *string.ascii_lowercase, *string.digits, " ", "?"]
    backend = Tokenizer(models.WordLevel({symbol: at for at, symbol in enumerate(symbols)}, unk_token="?"))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), behavior="isolated")
    backend.decoder = decoders.Fuse()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="<end>", unk_token="?", additional_special_tokens=SPECIAL
    )
    fast.chat_template = (
        "{% for m in messages %}{{ '<' + m.role + '>' + m.content + '<end>' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<assistant>' }}{% endif %}"
    )
    return fast


@pytest.fixture(scope="module")
def model(tokenizer: PreTrainedTokenizerFast) -> Qwen3ForCausalLM:
    torch.manual_seed(3)
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        initializer_range=0.4,
    )
    return Qwen3ForCausalLM(config)


def ask(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


def greedy(model: Any, ids: list[int], steps: int, ends: set[int]) -> list[int]:
    """One row, no cache, no padding: the argmax of the last position, again and again."""
    answer: list[int] = []
    for _ in range(steps):
        with torch.no_grad():
            token = int(model(torch.tensor([ids + answer])).logits[0, -1].argmax())
        if token in ends:
            break
        answer.append(token)
    return answer


def test_hits_are_those_of_greedy_decoding_row_by_row(model: Any, tokenizer: Any) -> None:
    """Prompts of many lengths share padded batches; every second answer is spoilt and must miss."""
    questions = ["a", "why is it so", "7", "count 1 2 3 4 5 6 7", "zebra", "ok", "what now", "b2"]
    rows = []
    for at, question in enumerate(questions):
        ids = tokenizer.apply_chat_template(ask(question), add_generation_prompt=True, return_dict=False)
        answer = tokenizer.decode(greedy(model, ids, 6, {0}), skip_special_tokens=True).strip()
        rows.append({"prompt": ask(question), "answer": answer + "x" * (at % 2), "kind": "even" if at < 4 else "odd"})
    for batch_size in (1, 3, 100):
        scores = score(model, tokenizer, rows, batch_size=batch_size, max_new_tokens=6)
        assert scores.hits == {"even": (True, False, True, False), "odd": (True, False, True, False)}


def test_ties_are_decided_as_for_a_row_alone(model: Any, tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every letter ties with another one; in a batch, rounding prefers the second, whatever the end of the others."""
    tied = copy.deepcopy(model)
    first, second = (tokenizer.convert_tokens_to_ids(letter) for letter in "an")
    with torch.no_grad():
        tied.lm_head.weight[second : second + 13] = tied.lm_head.weight[first : first + 13]
    forward = tied.forward

    def rounded(*args: Any, **named: Any) -> Any:
        found = forward(*args, **named)
        if found.logits.shape[0] > 1:
            found.logits[..., second : second + 13] += 1e-6
        return found

    monkeypatch.setattr(tied, "forward", rounded)
    rows = []
    for question in ("a", "why is it so", "7", "count 1 2 3 4 5 6 7", "zebra", "ok", "what now", "b2"):
        ids = tokenizer.apply_chat_template(ask(question), add_generation_prompt=True, return_dict=False)
        answer = tokenizer.decode(greedy(tied, ids, 6, {0}), skip_special_tokens=True).strip()
        rows.append({"prompt": ask(question), "answer": answer})
    assert any(letter in row["answer"] for row in rows for letter in "abcdefghijklm")
    for batch_size in (2, 3, 100):
        assert score(tied, tokenizer, rows, batch_size=batch_size, max_new_tokens=6).share("all") == 1.0


def test_sampling_settings_of_the_model_are_ignored_and_kept(model: Any, tokenizer: Any) -> None:
    rows = [{"prompt": ask("hello there"), "answer": "", "kind": "any"}]
    ids = tokenizer.apply_chat_template(rows[0]["prompt"], add_generation_prompt=True, return_dict=False)
    rows[0]["answer"] = tokenizer.decode(greedy(model, ids, 5, {0}), skip_special_tokens=True).strip()
    kept = model.generation_config
    model.generation_config = GenerationConfig(
        do_sample=True, temperature=5.0, repetition_penalty=9.0, max_length=2, eos_token_id=0
    )
    mine = model.generation_config
    model.train()
    try:
        assert score(model, tokenizer, rows, max_new_tokens=5).share("any") == 1.0
        assert model.generation_config is mine
        assert model.training
    finally:
        model.generation_config = kept
        model.eval()


class Scripted:
    """A model that says what it was told to: token ids after each prompt."""

    device = torch.device("cpu")
    dtype = torch.float32
    training = False

    def __init__(self, answers: list[list[int]], eos: Any = None) -> None:
        self.answers = answers
        self.generation_config = GenerationConfig(eos_token_id=eos)

    def eval(self) -> None: ...

    def train(self, mode: bool) -> None: ...

    def generate(self, input_ids: torch.Tensor, attention_mask: torch.Tensor, **_: Any) -> torch.Tensor:
        width = max(map(len, self.answers))
        said = [answer + [0] * (width - len(answer)) for answer in self.answers[: len(input_ids)]]
        del self.answers[: len(input_ids)]
        return torch.cat([input_ids, torch.tensor(said)], dim=1)


def test_answers_end_at_the_first_end_token_and_lose_special_tokens(tokenizer: Any) -> None:
    a, b, stop, space = (tokenizer.convert_tokens_to_ids(t) for t in ("a", "b", "<stop>", " "))
    system = tokenizer.convert_tokens_to_ids("<system>")
    rows = [{"prompt": ask(letter), "answer": "ab"} for letter in "abcd"]
    said = [[a, b, 0, b], [system, a, b, stop], [space, a, b, space], [a, b, b, 0]]
    # With the tokenizer's end alone, <stop> is a special token and is stripped; with it as an end, what follows is cut.
    assert score(Scripted(list(said)), tokenizer, rows).hits == {"all": (True, True, True, False)}
    said[1] = [a, b, stop, b]
    assert score(Scripted(list(said)), tokenizer, rows).hits["all"][1] is False
    assert score(Scripted(list(said), eos=[stop]), tokenizer, rows).hits["all"][1] is True
    assert score(Scripted(list(said)), tokenizer, rows, eos_token_ids=[stop, 0]).hits["all"][1] is True


def test_a_question_is_answered_once_and_may_have_several_right_answers(tokenizer: Any) -> None:
    a, b = (tokenizer.convert_tokens_to_ids(t) for t in ("a", "b"))
    answers = {"loose": ["a", "ab"], "exact": "a", "other": ["b", "c"]}
    rows = [{"prompt": ask("a"), "answer": answer, "kind": kind} for kind, answer in answers.items()]
    # The model has one answer to give; a second question would find none.
    assert score(Scripted([[a, b]]), tokenizer, rows).hits == {"loose": (True,), "exact": (False,), "other": (False,)}


def test_the_mean_of_equal_shares_is_that_share_on_every_python() -> None:
    """Added up one after another, as `sum` does before Python 3.12, ten times 0.1 is less than 1."""
    scores = Scores({kind: (True, *[False] * 9) for kind in "abcdefghij"})
    assert scores.mean(scores.kinds) == 0.1
    assert difference(scores, Scores(dict.fromkeys("abcdefghij", (False,) * 10)), scores.kinds)[0] == 0.1


def test_shares_and_errors_by_hand() -> None:
    scores = Scores({"target": (True,) * 8 + (False,) * 2, "rule": (True, False, False, False)})
    assert scores.share("target") == 0.8
    assert scores.error("target") == pytest.approx(math.sqrt(0.8 * 0.2 / 10))
    assert scores.mean(scores.kinds) == pytest.approx((0.8 + 0.25) / 2)
    assert scores.mean_error(scores.kinds) == pytest.approx(math.sqrt(0.016 + 0.25 * 0.75 / 4) / 2)
    assert scores.mean(["rule"]) == 0.25


def test_difference_counts_only_rows_that_differ() -> None:
    """Ten rows, two won and one lost: mean 0.1, mean square 0.3, variance (0.3 - 0.01) / 10."""
    left = Scores({"rule": (True,) * 7 + (True, True, False), "skill": (True, True)})
    right = Scores({"rule": (True,) * 7 + (False, False, True), "skill": (True, True)})
    assert difference(left, right, ["rule"]) == pytest.approx((0.1, math.sqrt(0.029)))
    assert difference(left, right, ["rule", "skill"]) == pytest.approx((0.05, math.sqrt(0.029) / 2))
    assert difference(left, left, ["rule"]) == (0.0, 0.0)


def test_rows_are_read_with_their_kind(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"prompt": ask("1"), "answer": "2"}) + "\n\n")
    assert read_rows(path) == [{"prompt": ask("1"), "answer": "2", "kind": "all"}]


def test_bad_rows_are_listed_by_line(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    good = json.dumps({"prompt": ask("1"), "answer": "2", "kind": "x"})
    bad = [
        '{"prompt": "1", "answer": "2"}',
        '{"prompt": [{"role": "user"}], "answer": "2"}',
        json.dumps({"prompt": ask("1"), "answer": 2}),
        json.dumps({"prompt": ask("1"), "answer": "2", "kind": 1}),
        "[]",
        "{",
    ]
    path.write_text("\n".join([good, *bad]))
    with pytest.raises(InputError, match="6 of 7 rows") as caught:
        read_rows(path)
    for number, words in enumerate(("not a list", "lacks", "`answer`", "`kind`", "a list, not", "not JSON"), start=2):
        assert any(f"line {number}:" in line and words in line for line in str(caught.value).splitlines())


@pytest.mark.parametrize("content", [None, "", "\n"])
def test_no_rows_is_an_error(tmp_path: Path, content: str | None) -> None:
    path = tmp_path / "rows.jsonl"
    if content is not None:
        path.write_text(content)
    with pytest.raises(InputError):
        read_rows(path)


def test_scoring_needs_rows_a_template_and_an_end(tokenizer: Any) -> None:
    rows = [{"prompt": ask("q"), "answer": "a"}]
    with pytest.raises(InputError, match="no rows"):
        score(Scripted([]), tokenizer, [])
    with pytest.raises(InputError, match="end token"):
        score(Scripted([]), tokenizer, rows, eos_token_ids=[])
    template, tokenizer.chat_template = tokenizer.chat_template, None
    try:
        with pytest.raises(InputError, match="chat template"):
            score(Scripted([]), tokenizer, rows)
    finally:
        tokenizer.chat_template = template
