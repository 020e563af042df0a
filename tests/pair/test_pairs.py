"""The whole check of a pair, its shapes, and its gap."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys

import pytest
import torch
from oracle import relative_distance
from pair_cases import EMBEDDING, edit_json, edit_weights, refusal
from repository import ROOT
from safetensors.torch import load_file, save_file
from tiny import make_tokenizer

from shadow_trl.errors import CheckpointError, ConfigError, InputError, PairMismatchError
from shadow_trl.pair.pairs import ModelPair

NANO = ROOT / "data" / "nano-base", ROOT / "data" / "nano-instruct"


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


# ---- the gap -------------------------------------------------------------------------------------------------------


def test_gap_is_the_relative_distance(sides):
    wanted = relative_distance(*(load_file(folder / "model.safetensors") for folder in sides))
    assert ModelPair.open(*sides).gap() == pytest.approx(wanted, rel=1e-6)


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


@pytest.mark.parametrize("dtype", [torch.complex64, torch.int16, torch.uint16], ids=str)
def test_matrices_of_other_numbers_are_compared_as_stored(sides, dtype):
    """They come first: what is behind one that differs is not looked at. As bf16 or fp16 these bits are no number."""
    table = torch.full((4, 4), 32767).to(dtype)
    for side in sides:
        edit_weights(side, lambda weights: {"a.table": table, **weights})
    assert ModelPair.open(*sides).check() == []
    shutil.copy(sides[0] / "model.safetensors", sides[1] / "model.safetensors")
    assert "look like the same weights" in ModelPair.open(*sides).check()[0]


def test_the_same_weights_in_another_dtype_are_a_warning(sides):
    edit_weights(sides[1], lambda w: {k: v.bfloat16() for k, v in load_file(sides[0] / "model.safetensors").items()})
    assert "look like the same weights" in ModelPair.open(*sides).check()[0]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused_by_name(sides, value):
    edit_weights(sides[1], lambda w: {**w, "model.norm.weight": torch.full((16,), value)})
    text = refusal(sides, level="weights", allow_wide_gap=True)
    assert "weights hold values that are not finite.\n  model.norm.weight\n" in text


def test_packed_weights_are_no_part_of_sigma(sides):
    edit_weights(sides[1], lambda w: {n: v.to(torch.float8_e4m3fn) if v.dim() > 1 else v for n, v in w.items()})
    pair = ModelPair.open(*sides)
    norms = [
        {n: v for n, v in load_file(folder / "model.safetensors").items() if v.dtype == torch.float32 and v.dim() == 1}
        for folder in sides
    ]
    assert pair.gap() == pytest.approx(relative_distance(*norms), rel=1e-6)
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
