"""Configs and processors: sizes that differ are errors, other behaviour is a warning, other spellings are nothing."""

from __future__ import annotations

import json

import pytest
from transformers import (
    Gemma3TextConfig,
    LlamaConfig,
    Qwen2_5_VLConfig,
    Qwen2Config,
    Qwen3Config,
)

from shadow_trl.pair.architectures import compare_architectures, compare_processors
from shadow_trl.pair.pairs import ModelPair

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
