"""TUNED against BASE and INSTRUCT: another network is refused, settings and tokens that the result lacks are named."""

from __future__ import annotations

import copy
import json
import shutil
from functools import partial
from pathlib import Path

import pytest
from pair_cases import add_tokens, edit_json, edit_weights
from transformers import AutoConfig, LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from shadow_trl import extract_delta, graft
from shadow_trl.errors import PairMismatchError
from shadow_trl.pair.architectures import compare_trained

OLD = {
    "llama3": {
        "rope_theta": 5e5,
        "rope_scaling": {
            "rope_type": "llama3",
            **{"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
            "original_max_position_embeddings": 64,
        },
    },
    "yarn": {
        "rope_theta": 1e6,
        "rope_scaling": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64},
    },
    "linear": {"rope_theta": 1e4, "rope_scaling": {"type": "linear", "factor": 2.0}},
    "plain": {"rope_theta": 1e4, "rope_scaling": None},
    "dynamic": {"rope_theta": 1e4, "rope_scaling": {"type": "dynamic", "factor": 2.0}},
    "yarn without a length": {"rope_theta": 1e4, "rope_scaling": {"rope_type": "yarn", "factor": 2.0}},
    "longrope": {
        "rope_theta": 1e4,
        "rope_scaling": {"rope_type": "longrope", "short_factor": [1.0] * 32, "long_factor": [2.0] * 32},
        "original_max_position_embeddings": 64,
    },
}


@pytest.fixture
def trained(sides, tmp_path) -> Path:
    """Return a folder of TUNED: BASE's files with other weights."""
    shutil.copytree(sides[0], tmp_path / "tuned")
    edit_weights(tmp_path / "tuned", lambda w: {name: tensor + 0.01 for name, tensor in w.items()})
    return tmp_path / "tuned"


def run(sides, tuned: Path, **options):
    output = tuned.parent / "out"
    return graft(base=sides[0], instruct=sides[1], tuned=tuned, output=output, progress=False, **options)


def swap(folder: Path) -> None:
    content = json.loads((folder / "tokenizer.json").read_text())
    ids = content["model"]["vocab"]
    ids["a"], ids["b"] = ids["b"], ids["a"]
    (folder / "tokenizer.json").write_text(json.dumps(content))


@pytest.mark.parametrize(
    ("change", "row"),
    [
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 5e6}}, "rope_theta\n    tuned     5000000.0"),
        ({"hidden_act": "gelu"}, "hidden_act\n    tuned     gelu\n    instruct  silu"),
        ({"rms_norm_eps": 1e-3}, "rms_norm_eps\n    tuned     0.001"),
    ],
)
def test_settings_that_the_result_has_not_are_named(sides, trained, change, row):
    edit_json(trained / "config.json", **change)
    (warning,) = run(sides, trained).warnings
    assert "tuned was trained with other settings than instruct has" in warning
    assert row in warning


def test_a_setting_of_instruct_is_no_news_and_one_of_base_is_told_once(sides, trained):
    edit_json(sides[1] / "config.json", rms_norm_eps=1e-3)
    (warning,) = run(sides, trained).warnings  # TUNED has BASE's
    assert "in base than in instruct" in warning
    edit_json(trained / "config.json", rms_norm_eps=1e-3)
    (again,) = run(sides, trained, overwrite=True).warnings  # TUNED has INSTRUCT's
    assert again == warning


@pytest.mark.parametrize(
    ("change", "row"),
    [
        ({"architectures": ["LlamaForCausalLM"], "model_type": "llama"}, "model_type\n    base      qwen3\n    tuned"),
        ({"num_attention_heads": 1, "head_dim": 16}, "num_attention_heads\n    base      2\n    tuned     1"),
    ],
)
@pytest.mark.parametrize("delta", [False, True])
def test_another_network_is_refused(sides, trained, change, row, delta):
    edit_json(trained / "config.json", **change)
    sides_of = {"base": sides[0], "tuned": trained, "output": trained.parent / "out", "progress": False}
    take = partial(extract_delta, **sides_of) if delta else partial(graft, instruct=sides[1], **sides_of)
    with pytest.raises(PairMismatchError, match="tuned is another network than base") as caught:
        take()
    assert row in str(caught.value)
    assert not (trained.parent / "out").exists()


def test_moved_ids_are_refused_and_further_tokens_are_named(sides, trained):
    add_tokens(trained, "<|new|>")
    (warning,) = run(sides, trained).warnings
    assert "token '<|new|>'\n    tuned     id 49\n    instruct  no such token" in warning
    swap(trained)
    with pytest.raises(PairMismatchError, match=r"token 'b'\n    tuned     id 5\n    instruct  id 6"):
        run(sides, trained, overwrite=True)


def test_a_tuned_of_weights_alone_is_grafted(sides, trained):
    for path in trained.iterdir():
        if path.suffix != ".safetensors":
            path.unlink()
    assert run(sides, trained).warnings == []


@pytest.mark.parametrize("kind", OLD)
def test_what_transformers_makes_of_an_old_config_gives_no_finding(kind, tmp_path):
    old = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "max_position_embeddings": 256, **OLD[kind]}
    (tmp_path / "config.json").write_text(json.dumps(old))
    new = json.loads(AutoConfig.from_pretrained(tmp_path).to_json_string())
    findings = compare_trained(old, old, new)
    assert (findings.errors, findings.warnings) == ([], [])


@pytest.mark.parametrize("kind", OLD)
def test_another_length_is_named_where_transformers_turns_by_it(kind):
    """What it makes of two configs that differ in it says whether the same weights compute the same."""
    sizes = {"hidden_size": 128, "num_attention_heads": 2, "head_dim": 64, "model_type": "llama"}
    one, two = ({**sizes, **OLD[kind], "max_position_embeddings": length} for length in (256, 512))
    made = []
    for config in (one, two):
        read = LlamaConfig.from_dict(copy.deepcopy(config))
        name = read.rope_parameters["rope_type"]
        turn = LlamaRotaryEmbedding.compute_default_rope_parameters if name == "default" else ROPE_INIT_FUNCTIONS[name]
        frequencies, factor = turn(read, device="cpu", seq_len=1024)
        made.append([factor, *frequencies.tolist()])
    findings = compare_trained(one, one, two)
    assert [("max_position_embeddings" in text) for text in findings.warnings] == [True] * (made[0] != made[1])


def test_the_text_class_is_compared_with_the_text_config():
    text = {"model_type": "x_text", "hidden_size": 8, "hidden_act": "silu"}
    whole = {"model_type": "x", "architectures": ["XForConditionalGeneration"], "text_config": text}
    tuned = {**text, "architectures": ["XForCausalLM"]}
    assert compare_trained(whole, whole, tuned).errors == []
    assert "hidden_size" in compare_trained(whole, whole, {**tuned, "hidden_size": 16}).errors[0]
    assert "hidden_act" in compare_trained(whole, whole, {**tuned, "hidden_act": "gelu"}).warnings[0]


@pytest.mark.parametrize("stated", [[1, 2], 2, None])
def test_an_end_of_text_at_which_the_result_does_not_stop_is_named(sides, trained, stated):
    """Training ended its texts with id 3; where generation_config.json says nothing, config.json's id 1 counts."""
    edit_json(sides[1] / "generation_config.json", eos_token_id=stated)
    edit_json(trained / "tokenizer_config.json", eos_token="<|user|>")
    (warning,) = run(sides, trained).warnings
    assert "is '<|user|>' (id 3), at which the grafted model does not stop" in warning
    assert f"eos_token_id is {', '.join(map(str, stated)) if isinstance(stated, list) else stated or 1}." in warning
    edit_json(sides[1] / "generation_config.json", eos_token_id=[1, 3])
    assert run(sides, trained, overwrite=True).warnings == []
