from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from repository import ROOT
from safetensors.torch import load_file, save_file
from tiny import SPECIAL, make_pair, make_tokenizer
from transformers import (
    Gemma3TextConfig,
    LlamaConfig,
    Qwen2_5_VLConfig,
    Qwen2Config,
    Qwen3Config,
)

from shadow_trl.errors import CheckpointError, ConfigError, InputError, PairMismatchError
from shadow_trl.pair.architectures import compare_architectures, compare_processors
from shadow_trl.pair.pairs import ModelPair
from shadow_trl.pair.special_tokens import special_ids
from shadow_trl.pair.token_rows import shared_rows, vocabulary_of

EMBEDDING = "model.embed_tokens.weight"
NANO = ROOT / "data" / "nano-base", ROOT / "data" / "nano-instruct"


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A tied pair in fp32 whose template tokens have ordinary rows; copied by `sides`."""
    return make_pair(tmp_path_factory.mktemp("made"))


@pytest.fixture
def sides(made, tmp_path):
    """Folders of BASE and INSTRUCT of the tiny pair, to be changed by a test."""
    for name, folder in zip(("base", "instruct"), made, strict=True):
        shutil.copytree(folder, tmp_path / name)
    return tmp_path / "base", tmp_path / "instruct"


def edit_json(file: Path, **changes: object) -> None:
    content = json.loads(file.read_text()) if file.is_file() else {}
    file.write_text(json.dumps({**content, **changes}))


def edit_weights(folder: Path, change) -> None:
    """Replace the weights in `folder` by `change(weights)`."""
    weights = load_file(folder / "model.safetensors")
    save_file({name: tensor.contiguous() for name, tensor in change(weights).items()}, folder / "model.safetensors")


def set_rows(folder: Path, rows: dict[int, torch.Tensor]) -> None:
    def change(weights):
        for index, row in rows.items():
            weights[EMBEDDING][index] = row
        return weights

    edit_weights(folder, change)


def add_rows(folder: Path, count: int) -> None:
    """Append `count` rows of small random numbers to the embedding of `folder`."""
    edit_weights(folder, lambda w: {**w, EMBEDDING: torch.cat([w[EMBEDDING], 0.02 * torch.randn(count, 16)])})


def add_tokens(folder: Path, *tokens: str, template: bool = True) -> None:
    tokenizer = make_tokenizer(template=template)
    tokenizer.add_special_tokens({"additional_special_tokens": [*SPECIAL[2:], *tokens]})
    tokenizer.save_pretrained(folder)


def refusal(sides: tuple[Path, Path], **options: object) -> str:
    with pytest.raises(PairMismatchError) as caught:
        ModelPair.open(*sides).check(**options)
    text = str(caught.value)
    assert text.endswith("Nothing was trained and nothing was written.")
    assert str(sides[0]) in text
    assert str(sides[1]) in text
    return text


# ---- the whole check -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("level", ["headers", "weights"])
def test_a_good_pair_passes_without_a_word(sides, level):
    pair = ModelPair.open(*sides)
    assert pair.check(level=level, need_template=True) == []


@pytest.mark.parametrize("level", ["headers", "weights"])
def test_the_embedded_pair_passes(level):
    if not all((folder / "model.safetensors").is_file() for folder in NANO):
        pytest.skip("data/nano-base and data/nano-instruct were not made yet")
    pair = ModelPair.open(*NANO)
    assert pair.check(level=level, need_template=True) == []
    assert 0 < pair.gap() < 0.05


def test_everything_that_is_wrong_is_in_one_error(sides):
    edit_json(sides[1] / "config.json", hidden_size=32)
    edit_weights(sides[1], lambda w: {**w, "model.norm.weight": torch.ones(32)})
    edit_json(sides[1] / "generation_config.json", eos_token_id=[1, 500])
    make_tokenizer(template=False).save_pretrained(sides[1])
    (sides[1] / "chat_template.jinja").unlink(missing_ok=True)
    text = refusal(sides, need_template=True)
    assert text.startswith("this pair cannot be used: 4 things are wrong with it.")
    for number, part in enumerate(("hidden_size", "model.norm.weight", "no chat template", "id 500"), 1):
        assert f"\n{number}. " in text
        assert part in text


def test_bad_options_are_refused(sides):
    pair = ModelPair.open(*sides)
    with pytest.raises(ConfigError, match="level must be one of configs, headers, weights; got 'all'"):
        pair.check(level="all")
    with pytest.raises(ConfigError, match="vocab must be one of strict, shared; got 'some'"):
        pair.check(vocab="some")


def test_an_adapter_is_no_side_of_a_pair(sides, tmp_path):
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA"}))
    save_file({"a.lora_A.weight": torch.zeros(1, 1)}, adapter / "adapter_model.safetensors")
    assert f"{adapter} is an adapter" in refusal((adapter, sides[1]))


def test_a_missing_side_is_bad_input(sides, tmp_path):
    with pytest.raises(CheckpointError):
        ModelPair.open(tmp_path / "nowhere", sides[1])
    assert issubclass(PairMismatchError, InputError)


def test_fast_tokenizers_need_no_transformers(sides):
    code = (
        "import sys\nfrom shadow_trl.pair.pairs import ModelPair\n"
        f"pair = ModelPair.open({str(sides[0])!r}, {str(sides[1])!r})\n"
        "assert pair.check(level='weights', need_template=True) == []\n"
        "sys.exit('transformers' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


# ---- architecture --------------------------------------------------------------------------------------------------

TINY = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "vocab_size": 49,
}
CONFIGS = {"llama": LlamaConfig, "qwen2": Qwen2Config, "qwen3": Qwen3Config, "gemma3_text": Gemma3TextConfig}


def config_dict(kind: str, **changes: object) -> dict:
    return json.loads(CONFIGS[kind](**{**TINY, **changes}).to_json_string(use_diff=False))


@pytest.mark.parametrize("kind", CONFIGS)
def test_equal_configs_give_no_finding(kind):
    findings = compare_architectures(config_dict(kind), config_dict(kind, eos_token_id=7, max_position_embeddings=64))
    assert findings.errors == []
    assert findings.warnings == []


@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.parametrize("key", ["hidden_size", "num_hidden_layers", "num_key_value_heads", "intermediate_size"])
def test_another_size_is_an_error_with_both_values(kind, key):
    (error,) = compare_architectures(config_dict(kind), config_dict(kind, **{key: TINY[key] * 2})).errors
    assert f"{key}\n    base      {TINY[key]}\n    instruct  {TINY[key] * 2}" in error


def test_another_architecture_is_an_error():
    llama = {**config_dict("llama"), "architectures": ["LlamaForCausalLM"]}
    qwen = {**config_dict("qwen2"), "architectures": ["Qwen2ForCausalLM"]}
    (error,) = compare_architectures(llama, qwen).errors
    assert "LlamaForCausalLM" in error
    assert "Qwen2ForCausalLM" in error
    assert "model_type" in error


@pytest.mark.parametrize(
    ("base", "instruct", "row"),
    [
        ({"rope_theta": 1e4}, {"rope_theta": 1e6}, "rope_theta\n    base      10000.0\n    instruct  1000000.0"),
        ({"rope_theta": 1e4}, {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}, "rope_theta"),
        ({"rope_theta": 1e4}, {"rope_theta": 1e4, "rope_scaling": {"type": "yarn", "factor": 4.0}}, "factor"),
        (
            {"rope_parameters": {"full_attention": {"rope_theta": 1e6}, "sliding_attention": {"rope_theta": 1e4}}},
            {"rope_theta": 1e6, "rope_local_base_freq": 2e4},
            "sliding_attention.rope_theta",
        ),
        ({"rms_norm_eps": 1e-6}, {"rms_norm_eps": 1e-5}, "rms_norm_eps"),
        ({"tie_word_embeddings": True}, {"tie_word_embeddings": False}, "tie_word_embeddings"),
        ({"sliding_window": 512}, {"sliding_window": 1024}, "sliding_window"),
    ],
)
def test_what_changes_the_computation_is_a_warning(base, instruct, row):
    findings = compare_architectures(base, instruct)
    assert findings.errors == []
    assert row in findings.warnings[0]
    assert findings.warnings[0].startswith("1 setting differs") or row == "factor"


@pytest.mark.parametrize(
    ("base", "instruct"),
    [
        ({"rope_theta": 1e4, "rope_scaling": None}, {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}),
        (
            {"rope_theta": 1e6, "rope_scaling": {"type": "mrope", "mrope_section": [2, 1, 1]}},
            {
                "text_config": {
                    "rope_parameters": {"rope_theta": 1e6, "mrope_section": [2, 1, 1], "rope_type": "default"}
                }
            },
        ),
        (
            {"rope_scaling": {"type": "yarn", "factor": 2.0}},
            {"rope_theta": 1e4, "rope_scaling": {"rope_type": "yarn", "factor": 2.0}},
        ),
        ({}, {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}),
        (
            {"use_sliding_window": False, "sliding_window": 4096, "max_window_layers": 21},
            {"use_sliding_window": False, "sliding_window": 32768, "max_window_layers": 28},
        ),
        ({"torch_dtype": "bfloat16", "_name_or_path": "a"}, {"dtype": "float32", "_name_or_path": "b"}),
    ],
)
def test_two_ways_of_writing_the_same_give_no_finding(base, instruct):
    findings = compare_architectures(base, instruct)
    assert (findings.errors, findings.warnings) == ([], [])


def vl_config(**vision: int) -> dict:
    vision = {"depth": 2, "hidden_size": 16, "out_hidden_size": 16, "num_heads": 2, "intermediate_size": 32, **vision}
    return json.loads(Qwen2_5_VLConfig(text_config=TINY, vision_config=vision).to_json_string(use_diff=False))


def test_sub_configs_of_multimodal_models_are_compared():
    findings = compare_architectures(vl_config(), vl_config(depth=4))
    assert "vision_config.depth\n    base      2\n    instruct  4" in findings.errors[0]
    assert compare_architectures(vl_config(), vl_config()).errors == []


def test_old_flat_and_new_nested_text_configs_are_compared():
    nested = vl_config()
    flat = {
        **{k: v for k, v in nested.items() if k != "text_config"},
        **nested["text_config"],
        "model_type": "qwen2_5_vl",
    }
    flat["architectures"] = nested["architectures"]
    assert compare_architectures(flat, nested).errors == []
    assert "hidden_size" in compare_architectures({**flat, "hidden_size": 64}, nested).errors[0]


def test_processors_that_differ_are_a_warning(tmp_path):
    for name, mean in (("b", [0.5, 0.5]), ("i", [0.4, 0.5])):
        (tmp_path / name).mkdir()
        content = {"image_mean": mean, "size": {"height": 28}, "image_processor_type": name}
        (tmp_path / name / "preprocessor_config.json").write_text(json.dumps(content))
    (warning,) = compare_processors(tmp_path / "b", tmp_path / "i").warnings
    assert warning.startswith("1 setting differs of the processors")
    assert "preprocessor_config.json: image_mean\n    base      [0.5, 0.5]\n    instruct  [0.4, 0.5]" in warning


def test_processors_are_part_of_the_check(sides):
    for folder, size in zip(sides, (14, 16), strict=True):
        (folder / "preprocessor_config.json").write_text(json.dumps({"patch_size": size}))
    (warning,) = ModelPair.open(*sides).check()
    assert "patch_size" in warning


# ---- names and shapes ----------------------------------------------------------------------------------------------


def test_another_shape_is_refused_with_both_shapes(sides):
    edit_weights(sides[1], lambda w: {**w, "model.layers.0.mlp.up_proj.weight": torch.zeros(48, 16)})
    text = refusal(sides)
    count = len(load_file(sides[0] / "model.safetensors"))
    assert f"1 of {count} weights differs in shape between base and instruct." in text
    assert "model.layers.0.mlp.up_proj.weight\n    base      (32, 16)\n    instruct  (48, 16)" in text
    assert "--vocab" not in text


def test_other_names_are_another_layout_and_no_error(sides):
    edit_weights(sides[1], lambda w: {f"language_model.{name}": tensor for name, tensor in w.items()})
    pair = ModelPair.open(*sides)
    assert pair.gap() is None
    assert any("sigma was not measured" in warning for warning in pair.check(level="weights"))


def test_a_stored_copy_of_a_tied_head_is_no_difference(sides):
    edit_weights(sides[1], lambda w: {**w, "lm_head.weight": w[EMBEDDING].clone()})
    assert ModelPair.open(*sides).check(level="weights", need_template=True) == []


# ---- token rows ----------------------------------------------------------------------------------------------------


def test_more_token_rows_are_refused_with_their_number_and_the_advice(sides):
    add_rows(sides[1], 3)
    add_tokens(sides[1], "<|tool|>", "<|call|>")
    text = refusal(sides)
    assert f"{EMBEDDING}\n    base      (49, 16)\n    instruct  (52, 16)" in text
    assert (
        "The instruct model has 3 more token rows (1 of them padding). Only in instruct: '<|tool|>', '<|call|>'."
        in text
    )
    assert "pass --vocab shared" in text


def test_padding_rows_are_called_padding(sides):
    add_rows(sides[0], 2)
    text = refusal(sides)
    assert "The base model has 2 more token rows (padding that belongs to no token). To keep" in text


def test_shared_accepts_more_rows_and_names_the_tokens(sides):
    add_rows(sides[1], 3)
    add_tokens(sides[1], "<|tool|>")
    (warning,) = ModelPair.open(*sides).check(vocab="shared", level="weights")
    assert "'<|tool|>'" in warning
    pair = ModelPair.open(*sides)
    rows = shared_rows(pair.base, pair.instruct)
    assert rows.ids == tuple(range(49))
    assert (rows.base_rows, rows.instruct_rows, rows.padding) == (49, 52, 2)
    assert rows.instruct_only == ("<|tool|>",)


def test_shared_rows_leave_out_renamed_tokens_and_keep_common_padding(sides):
    for folder, tokens in zip(sides, (("<|r0|>", "<|r1|>"), ("<|r0|>", "<|think|>")), strict=True):
        add_rows(folder, 4)
        add_tokens(folder, *tokens, template=folder == sides[1])
    pair = ModelPair.open(*sides)
    rows = shared_rows(pair.base, pair.instruct)
    # 49 characters, <|r0|> at 49, the renamed token at 50, padding of both sides at 51 and 52
    assert rows.ids == (*range(50), 51, 52)
    assert rows.runs == [range(50), range(51, 53)]
    assert (rows.base_only, rows.instruct_only) == (("<|r1|>",), ("<|think|>",))
    assert rows.explanation() == "Only in instruct: '<|think|>'. Only in base: '<|r1|>'."


def test_shared_rows_need_both_tokenizers(sides):
    (sides[0] / "tokenizer.json").unlink()
    pair = ModelPair.open(*sides)
    with pytest.raises(PairMismatchError, match=f"{sides[0]} has no tokenizer"):
        shared_rows(pair.base, pair.instruct)


def test_another_vocabulary_is_refused(sides):
    file = sides[1] / "tokenizer.json"
    content = json.loads(file.read_text())
    words = content["model"]["vocab"]
    words["a"], words["b"] = words["b"], words["a"]
    file.write_text(json.dumps(content))
    text = refusal(sides)
    assert "2 tokens differ between the vocabularies" in text
    assert "token 'a'\n    base      id 5\n    instruct  id 6" in text


# ---- template and special tokens -----------------------------------------------------------------------------------


def drop_template(folder: Path) -> None:
    (folder / "chat_template.jinja").unlink()


def test_a_missing_template_is_an_error_only_when_it_is_needed(sides):
    drop_template(sides[1])
    assert ModelPair.open(*sides).check() == []
    assert "instruct has no chat template, but the training data are conversations" in refusal(
        sides, need_template=True
    )


def test_a_swapped_pair_is_refused(sides):
    assert "The two look swapped" in refusal((sides[1], sides[0]))


def test_other_templates_and_eos_are_fine(sides):
    (sides[0] / "chat_template.jinja").write_text("{{ messages[0]['content'] }}")
    edit_json(sides[0] / "generation_config.json", eos_token_id=3)
    edit_json(sides[0] / "tokenizer_config.json", eos_token="<|pad|>")
    assert ModelPair.open(*sides).check(need_template=True) == []


@pytest.mark.parametrize("file", ["generation_config.json", "config.json"])
def test_special_ids_beyond_the_rows_of_base_are_refused(sides, file):
    edit_json(sides[1] / file, eos_token_id=[1, 49])
    text = refusal(sides)
    assert "1 special id of instruct has no row in base's embedding of 49 rows" in text
    assert f"id 49  eos_token_id (49) of {file}" in text


def test_special_tokens_of_the_tokenizer_beyond_the_rows_of_base_are_refused(sides):
    for folder in sides:  # the same on both sides, so that the vocabularies agree
        edit_json(folder / "tokenizer_config.json", pad_token="<|padding|>")
    assert "id 49  pad_token '<|padding|>' of the tokenizer" in refusal(sides)


def test_template_tokens_beyond_the_rows_of_base_are_refused(sides):
    for folder in sides:
        add_tokens(folder, "<|think|>", "<|unused|>", template=folder == sides[1])
    template = (sides[1] / "chat_template.jinja").read_text()
    (sides[1] / "chat_template.jinja").write_text(template + "{% if tools %}<|think|>{% endif %}")
    text = refusal(sides)
    assert "id 49  '<|think|>' of the chat template" in text
    assert "<|unused|>" not in text  # nothing uses it: Gemma's text models have such tokens


def test_ids_of_minus_one_and_of_images_are_left_alone(sides):
    edit_json(sides[1] / "config.json", pad_token_id=-1, image_token_id=49)
    pair = ModelPair.open(*sides)
    assert pair.check() == []
    assert set(special_ids(pair.instruct, vocabulary_of(pair.instruct)).values()) == {0, 1, 2, 3, 4}


USER, ASSISTANT = 3, 4


@pytest.mark.parametrize(
    ("row", "reason"),
    [(torch.zeros(16), "norm 0, ordinary rows have"), (torch.full((16,), 1e-4), "norm 0.0004, ordinary rows have")],
)
def test_template_tokens_with_tiny_rows_are_named(sides, row, reason):
    set_rows(sides[0], {USER: row})
    (warning,) = ModelPair.open(*sides).check()
    assert warning.startswith("1 of the 4 special tokens of instruct's chat template look untrained in base")
    assert f"'<|user|>' (id 3): {reason}" in warning


def test_template_tokens_with_the_same_row_are_named(sides):
    row = load_file(sides[0] / "model.safetensors")[EMBEDDING][USER].clone()
    set_rows(sides[0], {ASSISTANT: row})
    (warning,) = ModelPair.open(*sides).check()
    assert "'<|user|>' (id 3): same row as '<|assistant|>'" in warning
    assert "'<|assistant|>' (id 4): same row as '<|user|>'" in warning


def test_template_tokens_like_the_mean_row_are_named(sides):
    rows = load_file(sides[0] / "model.safetensors")[EMBEDDING][5:]
    offset = torch.full((16,), 0.05)  # rows of real models have a mean that is no zero
    edit_weights(sides[0], lambda w: {**w, EMBEDDING: w[EMBEDDING] + offset})
    set_rows(sides[0], {USER: rows.mean(dim=0) + offset})
    (warning,) = ModelPair.open(*sides).check()
    assert "'<|user|>' (id 3): distance" in warning
    assert "from the mean row" in warning


def test_template_tokens_like_the_unused_rows_are_named(sides):
    torch.manual_seed(3)
    drift = 0.05 * torch.randn(16)
    unused = drift + 0.005 * torch.randn(8, 16)
    for folder in sides:
        add_rows(folder, 8)
    set_rows(sides[0], {49 + index: row for index, row in enumerate(unused)})
    set_rows(sides[0], {USER: drift + 0.001 * torch.randn(16)})
    (warning,) = ModelPair.open(*sides).check()
    assert "1 of the 4 special tokens" in warning
    assert "'<|user|>' (id 3): direction of the 8 unused rows behind the vocabulary" in warning


def test_a_token_of_another_branch_of_the_template_is_marked(sides):
    (sides[1] / "chat_template.jinja").write_text("{{ messages[0]['content'] }}{% if tools %}<|user|>{% endif %}")
    set_rows(sides[0], {USER: torch.zeros(16)})
    (warning,) = ModelPair.open(*sides).check()
    assert "'<|user|>' (id 3) (not in a plain conversation): norm 0" in warning


# ---- the gap -------------------------------------------------------------------------------------------------------


def test_gap_is_the_relative_distance(sides):
    base, instruct = (load_file(folder / "model.safetensors") for folder in sides)
    apart = sum(float((base[name].double() - instruct[name].double()).abs().sum()) for name in base)
    size = sum(float(base[name].double().abs().sum() + instruct[name].double().abs().sum()) for name in base)
    assert ModelPair.open(*sides).gap() == pytest.approx(apart / size, rel=1e-6)


def test_the_same_weights_are_a_warning_at_both_levels(sides):
    shutil.copy(sides[0] / "model.safetensors", sides[1] / "model.safetensors")
    for level, how in (("headers", "compared: the first values of"), ("weights", "sigma is 0")):
        (warning,) = ModelPair.open(*sides).check(level=level)
        assert "look like the same weights" in warning
        assert how in warning


def test_equal_norms_alone_are_not_the_same_weights(sides):
    norms = [name for name in load_file(sides[0] / "model.safetensors") if "norm" in name]
    weights = load_file(sides[0] / "model.safetensors")
    edit_weights(sides[1], lambda w: {**w, **{name: weights[name] for name in norms}})
    assert ModelPair.open(*sides).check() == []


def test_the_same_weights_in_another_dtype_are_a_warning(sides):
    edit_weights(sides[1], lambda w: {k: v.bfloat16() for k, v in load_file(sides[0] / "model.safetensors").items()})
    assert "look like the same weights" in ModelPair.open(*sides).check()[0]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused_by_name(sides, value):
    edit_weights(sides[1], lambda w: {**w, "model.norm.weight": torch.full((16,), value)})
    text = refusal(sides, level="weights", allow_wide_gap=True)
    assert "weights hold values that are not finite.\n  model.norm.weight\n" in text


def test_packed_weights_have_no_sigma(sides):
    edit_weights(sides[1], lambda w: {n: v.to(torch.float8_e4m3fn) if v.dim() > 1 else v for n, v in w.items()})
    pair = ModelPair.open(*sides)
    assert pair.gap() < 0.05
    pair.check(level="weights")  # that they are packed is what grafting refuses


# instruct = f * base gives sigma = (f - 1) / (f + 1): 1.5 -> 0.2, 4 -> 0.6
def scale_instruct(sides, factor: float) -> None:
    edit_weights(sides[1], lambda w: {k: factor * v for k, v in load_file(sides[0] / "model.safetensors").items()})


def test_a_wide_gap_is_a_warning(sides):
    scale_instruct(sides, 1.5)
    assert ModelPair.open(*sides).check() == []
    (warning,) = ModelPair.open(*sides).check(level="weights")
    assert "sigma is 0.2" in warning


def test_a_huge_gap_is_an_error_unless_allowed(sides):
    scale_instruct(sides, 4.0)
    text = refusal(sides, level="weights")
    assert "sigma is 0.6" in text
    assert "allow_wide_gap" in text
    (warning,) = ModelPair.open(*sides).check(level="weights", allow_wide_gap=True)
    assert "sigma is 0.6" in warning
