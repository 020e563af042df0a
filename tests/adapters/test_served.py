"""What a server makes of an adapter: names of a multimodal INSTRUCT, and factors where it reads no patterns."""

from __future__ import annotations

import json

import pytest
import torch
import transformers
from architectures import TEXT, gemma3
from families import load, lora
from peft import LoHaConfig, LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file

from shadow_trl import graft, verify
from shadow_trl.checkpoints.manifest import read_manifest
from shadow_trl.errors import AdapterError

pytestmark = [
    pytest.mark.filterwarnings("ignore::UserWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning:transformers"),
]
QWEN_TEXT = {
    **TEXT, "head_dim": 8, "linear_num_key_heads": 2, "linear_num_value_heads": 2, "linear_key_head_dim": 8,
    "linear_value_head_dim": 8, "layer_types": ["full_attention"],
    "rope_parameters": {
        "rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 0, 0], "partial_rotary_factor": 0.25,
    },
}  # fmt: skip
QWEN_TOWER = {
    "depth": 1, "hidden_size": 16, "intermediate_size": 32, "num_heads": 2, "patch_size": 4, "out_hidden_size": 16,
    "num_position_embeddings": 16,
}  # fmt: skip


def qwen3_5() -> transformers.Qwen3_5Config:
    return transformers.Qwen3_5Config(text_config=QWEN_TEXT, vision_config=QWEN_TOWER)


def whole_pair(folder, config):
    """Save BASE and INSTRUCT with their towers."""
    transformers.utils.logging.disable_progress_bar()
    for number, role in enumerate(("base", "instruct")):
        torch.manual_seed(number)
        transformers.AutoModelForImageTextToText.from_config(config).save_pretrained(folder / role)
    return folder / "base", folder / "instruct"


def adapter_for(model, folder, base, kind="lora"):
    """Save an adapter of `model`, as training leaves it, for BASE."""
    make = {"lora": LoraConfig, "loha": LoHaConfig}[kind]
    config = make(r=2, target_modules=r".*layers\.0\.mlp\.(up|down)_proj", task_type="CAUSAL_LM")
    model.name_or_path = str(base)
    adapted = get_peft_model(model, config)
    for name, value in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(value, std=0.1)
    adapted.save_pretrained(folder)
    return folder


def called(report) -> torch.nn.Module:
    """Return what the printed call loads."""
    names: dict = {}
    exec(f"from peft import AutoPeftModelForCausalLM\nmodel = {report.load}", names)
    return names["model"]


def test_an_adapter_of_the_text_class_says_what_a_multimodal_server_makes_of_it(tmp_path):
    base, instruct = whole_pair(tmp_path, qwen3_5())
    text = transformers.AutoModelForCausalLM.from_pretrained(base)
    assert type(text).__name__ == "Qwen3_5ForCausalLM"
    tuned = adapter_for(text, tmp_path / "tuned", base)
    sides = {"base": base, "instruct": instruct, "tuned": tuned, "progress": False}
    report = graft(**sides, output=tmp_path / "out", format="adapter")
    (warning,) = [text for text in report.warnings if "vLLM" in text]
    assert "Qwen3_5ForCausalLM" in warning
    assert "--format model" in warning
    assert warning in (tmp_path / "out" / "README.md").read_text()
    assert read_manifest(tmp_path / "out")["text_class"] == "Qwen3_5ForCausalLM"
    # The printed call loads the class that has these names: the adapter acts there, and is the trained one.
    model = called(report).merge_and_unload()
    stored, lora = load(instruct), load_file(tuned / "adapter_model.safetensors")
    key = "layers.0.mlp.up_proj"
    left, right = (lora[f"base_model.model.model.{key}.lora_{side}.weight"].double() for side in "BA")
    wanted = stored[f"model.language_model.{key}.weight"].double() + 4 * left @ right
    torch.testing.assert_close(model.get_submodule(f"model.{key}").weight.double(), wanted, rtol=0, atol=1e-6)
    # With a folder as INSTRUCT the result is dense; what stands beside it is warned of.
    dense = graft(**sides, output=tmp_path / "dense")
    assert [text for text in dense.warnings if "vLLM" in text] == [f"of adapter/: {warning}"]
    assert verify(tmp_path / "dense" / "adapter", progress=False).same


def test_an_adapter_with_the_names_of_the_whole_model_needs_no_such_warning(tmp_path):
    base, instruct = whole_pair(tmp_path, gemma3())
    model = transformers.AutoModelForImageTextToText.from_pretrained(base)
    tuned = adapter_for(model, tmp_path / "tuned", base)
    report = graft(base=base, instruct=instruct, tuned=tuned, output=tmp_path / "out", format="adapter", progress=False)
    assert report.text_class is None
    assert not any("vLLM" in text for text in report.warnings)


@pytest.mark.parametrize("kind", ["lora", "loha"])
def test_a_text_class_that_instruct_does_not_load_as_is_refused(tmp_path, kind):
    """Gemma 3 loads whole everywhere: on it, an adapter of the text class on its own would match no module."""
    base, instruct = whole_pair(tmp_path, gemma3())
    own = transformers.AutoModelForCausalLM.from_config(transformers.Gemma3TextConfig(**TEXT, head_dim=8))
    tuned = adapter_for(own, tmp_path / "tuned", base, kind)
    sides = {"base": base, "instruct": instruct, "tuned": tuned, "progress": False}
    for form in ("adapter", "auto"):
        with pytest.raises(AdapterError, match=r"model\.layers\.0\.mlp(.|\n)*nearest: (.|\n)*Nothing was written"):
            graft(**sides, output=tmp_path / "out", format=form)


@pytest.mark.parametrize("scale", [1.0, 0.3])
@pytest.mark.parametrize("rslora", [False, True])
def test_rank_and_alpha_alone_give_the_delta_where_there_were_patterns(sides, tmp_path, rslora, scale):
    """As a loader computes it that reads `r`, `lora_alpha` and `use_rslora`, and no pattern."""
    patterns = {"rank_pattern": {"q_proj": 3}, "alpha_pattern": {"layers.1.mlp.down_proj": 5}}
    adapter = lora(tmp_path / "tuned", alpha=4, use_rslora=rslora, **patterns)
    found = load_file(adapter / "adapter_model.safetensors")
    for name in [name for name in found if "q_proj" in name]:  # of rank 3, as the pattern says
        long = 0 if "lora_A" in name else 1
        found[name] = torch.cat([found[name], found[name].narrow(long, 0, 1)], long).contiguous()
    save_file(found, adapter / "adapter_model.safetensors", metadata={"format": "pt"})
    report = graft(**sides, tuned=adapter, output=tmp_path / "out", format="adapter", scale=scale)
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    factor = config["lora_alpha"] / (config["r"] ** 0.5 if config["use_rslora"] else config["r"])
    written = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert written.keys() == found.keys()
    for name in (name for name in found if "lora_B" in name):
        rank, alpha = (3 if "q_proj" in name else 2), (5 if "layers.1.mlp.down_proj" in name else 4)
        wanted = alpha / (rank**0.5 if rslora else rank) * scale
        products = [
            weights[name].double() @ weights[name.replace("lora_B", "lora_A")].double() for weights in (written, found)
        ]
        torch.testing.assert_close(factor * products[0], wanted * products[1], rtol=1e-6, atol=1e-9)
    assert config["r"] == 3  # what a server has to reserve
    assert report.grafted == len(found) // 2
    assert verify(tmp_path / "out", progress=False).same
