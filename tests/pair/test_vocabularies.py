from __future__ import annotations

import json
import types
from pathlib import Path

import pytest
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
from transformers import AutoTokenizer

from shadow_trl.errors import CheckpointError, ConfigError
from shadow_trl.pair.templates import check_processing_class, read_templates, template_tokens
from shadow_trl.pair.vocabularies import Vocabulary
from shadow_trl.pair.vocabulary_checks import compare_vocabularies, vocabulary_difference

WORDS = ["<unk>", "the", "quick", "brown", "fox", "jumps", "over", "lazy", "dog"]
SPECIAL = ["<|user|>", "<|end|>"]


def save_tokenizer(folder: Path, words: list[str] = WORDS, special: list[str] = SPECIAL, **config: object) -> Path:
    """Save a word tokenizer: ids 0.. are `words`, then `special` as added tokens; `config` is tokenizer_config.json."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.normalizer = normalizers.Lowercase() if config.pop("lowercase", False) else None
    tokenizer.add_special_tokens(special)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", **config}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


def vocabulary(folder: Path, *args: object, **config: object) -> Vocabulary:
    return Vocabulary(save_tokenizer(folder, *args, **config), str(folder))


# ---- reading -------------------------------------------------------------------------------------------------------


def test_ids_are_those_that_transformers_loads_when_the_config_names_more_tokens(tmp_path):
    decoder = {"11": {"content": "<|late|>", "special": True}, "9": {"content": "<|user|>", "special": True}}
    side = vocabulary(
        tmp_path,
        added_tokens_decoder=decoder,
        unk_token="<unk>",
        eos_token={"content": "<|end|>", "__type": "AddedToken"},
        pad_token="<|pad|>",
        image_token="<|image|>",
        extra_special_tokens=["<|extra|>"],
    )
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert side.ids == loaded.get_vocab()
    assert {side.id_of(token) for token in ("<|late|>", "<|pad|>", "<|image|>", "<|extra|>")} == {11, 12, 13, 14}
    assert side.added == {token: loaded.get_vocab()[token] for token in loaded.added_tokens_encoder}
    assert side.named == {"eos_token": "<|end|>", "pad_token": "<|pad|>", "unk_token": "<unk>"}


def test_old_special_tokens_map_and_added_tokens_files_count(tmp_path):
    side = vocabulary(tmp_path)
    (tmp_path / "special_tokens_map.json").write_text(json.dumps({"eos_token": {"content": "<|eos|>"}}))
    (tmp_path / "added_tokens.json").write_text(json.dumps({"<|old|>": 11}))
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert side.named["eos_token"] == "<|eos|>"
    assert side.ids == loaded.get_vocab()
    assert side.id_of("<|old|>") == 11


def test_added_tokens_are_read_without_the_vocabulary(tmp_path):
    special = ["]", '"added_tokens": [', "\\", "é漢", *(f"<|reserved_{i}|>" for i in range(3000))]
    side = vocabulary(tmp_path, [*WORDS, "added_tokens"], special)
    expected = {token: 10 + index for index, token in enumerate(special)}
    assert side.added == expected
    assert side.ids["added_tokens"] == 9
    assert "tokenizer" not in side.__dict__


@pytest.mark.parametrize(
    "model",
    [
        models.BPE({"a": 0, "b": 1, "ab": 2, '"vocab": {': 3, "é漢": 4}, [("a", "b")]),
        models.WordPiece({"[UNK]": 0, "a": 1, "##b": 2}, unk_token="[UNK]"),
        models.WordLevel({"vocab": 1, "<unk>": 0, "}": 2}, unk_token="<unk>"),
        models.Unigram([("<unk>", 0.0), ("a", -1.5), ("]", -2.0)], 0, False),
    ],
    ids=["BPE", "WordPiece", "WordLevel", "Unigram"],
)
def test_ids_of_every_kind_of_model_are_read_without_loading_it(tmp_path, model):
    tokenizer = Tokenizer(model)
    tokenizer.add_special_tokens(["a", "<|end|>"])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    side = Vocabulary(tmp_path, "x")
    assert side.ids == tokenizer.get_vocab(with_added_tokens=True)
    assert "tokenizer" not in side.__dict__


def test_a_tokenizer_without_tokenizer_json_is_converted(tmp_path):
    (tmp_path / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "fox", "dog", "##s"]))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "BertTokenizer"}))
    side = Vocabulary(tmp_path, "old")
    assert side.exists
    assert side.ids["##s"] == 7
    assert side.encode(["dogs fox", ""]) == [[6, 7, 5], []]


def test_padding_and_truncation_of_the_file_do_not_reach_the_encodings(tmp_path):
    save_tokenizer(tmp_path)
    tokenizer = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    tokenizer.enable_truncation(2)
    tokenizer.enable_padding(length=5)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    assert Vocabulary(tmp_path, "x").encode(["the quick brown fox"]) == [[1, 2, 3, 4]]


def test_a_damaged_tokenizer_is_an_error_that_names_the_model(tmp_path):
    (tmp_path / "tokenizer.json").write_text('{"added_tokens": [')
    with pytest.raises(CheckpointError, match="cannot read the tokenizer of my-model"):
        _ = Vocabulary(tmp_path, "my-model").ids


# ---- comparing -----------------------------------------------------------------------------------------------------


def test_equal_tokenizers_are_found_equal_without_loading_them(tmp_path):
    base, instruct = vocabulary(tmp_path / "b"), vocabulary(tmp_path / "i", eos_token="<|end|>", chat_template="x")
    findings = compare_vocabularies(base, instruct)
    assert not findings.errors
    assert not findings.warnings
    assert "tokenizer" not in base.__dict__


def test_equal_files_with_another_token_in_the_config_are_not_equal(tmp_path):
    base, instruct = vocabulary(tmp_path / "b"), vocabulary(tmp_path / "i", pad_token="<|pad|>")
    assert vocabulary_difference(base, instruct).instruct_only == {"<|pad|>": 11}


def test_difference_sorts_tokens_into_moved_renamed_and_one_sided(tmp_path):
    base = vocabulary(tmp_path / "b", ["<unk>", "the", "quick", "brown"], ["<|r0|>", "<|r1|>", "<|r2|>"])
    instruct = vocabulary(tmp_path / "i", ["<unk>", "quick", "the", "brown"], ["<|r0|>", "<|user|>", "<|r2|>", "<|x|>"])
    found = vocabulary_difference(base, instruct)
    assert list(found.moved.items()) == [("the", (1, 2)), ("quick", (2, 1))]
    assert found.renamed == {5: ("<|r1|>", "<|user|>")}
    assert found.instruct_only == {"<|x|>": 7}
    assert found.base_only == {}
    assert len(found) == 4
    assert vocabulary_difference(instruct, base).base_only == {"<|x|>": 7}


def test_another_token_is_refused_with_both_sides_and_the_advice(tmp_path):
    base, instruct = vocabulary(tmp_path / "b"), vocabulary(tmp_path / "i", WORDS, [*SPECIAL, "<|tool|>"])
    (error,) = compare_vocabularies(base, instruct).errors
    assert error.startswith("1 token differs between the vocabularies of base and instruct.")
    assert "token '<|tool|>'\n    base      no such token\n    instruct  id 11" in error
    assert "--vocab shared" in error


def test_shared_turns_added_and_renamed_reserved_tokens_into_a_warning(tmp_path):
    base = vocabulary(tmp_path / "b", WORDS, ["<|r0|>"])
    instruct = vocabulary(tmp_path / "i", WORDS, ["<|user|>", "<|tool|>"])
    findings = compare_vocabularies(base, instruct, shared=True)
    assert not findings.errors
    assert "'<|user|>'" in findings.warnings[0]
    assert "'<|tool|>'" in findings.warnings[0]


@pytest.mark.parametrize("words", [["<unk>", "quick", "the"], ["<unk>", "the", "slow"]])
def test_other_ordinary_tokens_are_refused_also_with_shared(tmp_path, words):
    base, instruct = vocabulary(tmp_path / "b", ["<unk>", "the", "quick"]), vocabulary(tmp_path / "i", words)
    (error,) = compare_vocabularies(base, instruct, shared=True).errors
    assert "instruct was not made from this base" in error


def test_other_encodings_of_equal_vocabularies_are_refused(tmp_path):
    base, instruct = vocabulary(tmp_path / "b"), vocabulary(tmp_path / "i", lowercase=True)
    (error,) = compare_vocabularies(base, instruct).errors
    # of the probe texts only the first has a word of the vocabulary that begins with a capital
    assert error.startswith("1 of 5 probe texts become")
    assert "[0, 2, 3, 4" in error
    assert "[1, 2, 3, 4" in error


def test_a_missing_tokenizer_is_a_warning_that_names_the_side(tmp_path):
    (tmp_path / "b").mkdir()
    findings = compare_vocabularies(Vocabulary(tmp_path / "b", "my-base"), vocabulary(tmp_path / "i"))
    assert not findings.errors
    assert "no tokenizer in my-base" in findings.warnings[0]


# ---- chat templates ------------------------------------------------------------------------------------------------


def test_templates_are_found_in_every_place_in_the_order_of_transformers(tmp_path):
    assert read_templates(tmp_path) == {}
    (tmp_path / "chat_template.json").write_text(json.dumps({"chat_template": "old processor"}))
    assert read_templates(tmp_path) == {"default": "old processor"}
    named = [{"name": "default", "template": "one"}, {"name": "tool_use", "template": "two"}]
    save_tokenizer(tmp_path, chat_template=named)
    assert read_templates(tmp_path) == {"default": "one", "tool_use": "two"}
    save_tokenizer(tmp_path, chat_template="single")
    assert read_templates(tmp_path) == {"default": "single"}
    (tmp_path / "additional_chat_templates").mkdir()
    (tmp_path / "additional_chat_templates" / "rag.jinja").write_text("rag")
    assert read_templates(tmp_path) == {"rag": "rag"}
    (tmp_path / "chat_template.jinja").write_text("file")
    assert read_templates(tmp_path) == {"default": "file", "rag": "rag"}
    (tmp_path / "chat_template.jinja").write_text("  \n")
    assert read_templates(tmp_path) == {"rag": "rag"}


def test_tokens_built_from_the_role_are_found_by_rendering():
    template = (
        "{% for m in messages %}{{ '<|' + m['role'] + '|>' }}{% generation %}{{ m['content'] + eos_token }}"
        "{% endgeneration %}{% endfor %}{% if tools %}<tool>{% endif %}"
    )
    added = ["<|user|>", "<|assistant|>", "<|system|>", "<|end|>", "<tool>", "<|never|>", "<|"]
    assert template_tokens({"default": template}, added, {"eos_token": "<|end|>"}) == {
        "<|user|>": True,
        "<|assistant|>": True,
        "<|system|>": True,
        "<|end|>": True,
        "<tool>": False,
    }


def test_a_token_inside_another_token_is_not_counted():
    assert template_tokens({"default": "{{ '<<sys>>' }}"}, ["<sys>", "<<sys>>"], {}) == {"<<sys>>": True}


def test_a_template_that_refuses_system_messages_or_strings_is_rendered_otherwise():
    no_system = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no') }}{% endif %}{{ '<a' + 'bc>' }}"
    parts_only = "{{ '<' ~ messages[1]['content'][0]['type'] ~ '>' }}"
    assert template_tokens({"default": no_system}, ["<abc>"], {}) == {"<abc>": True}
    assert template_tokens({"default": parts_only}, ["<text>"], {}) == {"<text>": True}


def test_a_template_that_cannot_be_rendered_counts_by_its_text():
    assert template_tokens({"default": "{% broken %}<|user|>"}, ["<|user|>", "<|end|>"], {}) == {"<|user|>": True}


def test_a_template_cannot_reach_into_python():
    assert template_tokens({"default": "{{ '<' ~ ''.__class__.__name__ ~ '>' }}"}, ["<str>"], {}) == {}


@pytest.mark.parametrize("bomb", ["{{ 'a' * 10**10 }}", "{{ 'a'.center(2 * 10**6) }}", "{{ '%1999999999d' % 1 }}"])
def test_a_template_that_asks_for_too_much_memory_is_refused(bomb):
    with pytest.raises(CheckpointError, match=r"rendering the chat template .* too much memory"):
        template_tokens({"default": bomb}, ["<a>"], {})


@pytest.mark.parametrize("holder", ["itself", "inner tokenizer"])
def test_a_processing_class_with_a_template_passes(holder):
    tokenizer = types.SimpleNamespace(chat_template="x")
    check_processing_class(tokenizer if holder == "itself" else types.SimpleNamespace(tokenizer=tokenizer), True)


def test_conversations_need_a_processing_class_with_a_template(tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(save_tokenizer(tmp_path))
    check_processing_class(tokenizer, False)
    with pytest.raises(ConfigError, match="no chat template") as caught:
        check_processing_class(tokenizer, True, instruct="Qwen/Qwen3-0.6B")
    assert "Leave processing_class out" in str(caught.value)
    assert "AutoTokenizer.from_pretrained('Qwen/Qwen3-0.6B')" in str(caught.value)
