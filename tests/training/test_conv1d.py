"""GPT-2: Conv1D weights, stored as (in, out), beside nn.Linear; the class of each module decides, as in PEFT."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel
from runs import LORA, settings, sft
from stages import weights
from tiny import make_pair, make_tokenizer, preference_data, sft_data
from transformers import AutoModelForCausalLM, GPT2Config
from trl import SFTConfig, SFTTrainer

from shadow_trl import ShadowDPOConfig, ShadowDPOTrainer, graft

pytestmark = pytest.mark.filterwarnings("ignore")
# A square weight, a wide and a tall one.
MODULES = {"conv1d": ["attn.c_proj", "c_fc", "mlp.c_proj"], "both": ["attn.c_proj", "c_fc", "lm_head"]}


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory) -> tuple[Path, Path]:
    root = tmp_path_factory.mktemp("gpt2")
    sizes = {"vocab_size": 49, "n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 64}
    tokens = {"bos_token_id": 1, "eos_token_id": 1, "pad_token_id": 0}
    config = GPT2Config(**sizes, **tokens, tie_word_embeddings=False, attn_pdrop=0.0, embd_pdrop=0.0, resid_pdrop=0.0)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    for role in ("base", "instruct"):
        model.save_pretrained(root / role)
        make_tokenizer(template=role == "instruct").save_pretrained(root / role)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.02 * parameter.abs().mean() * torch.randn_like(parameter))
    return root / "base", root / "instruct"


def merged_by_peft(base: Path, adapter: Path) -> dict[str, torch.Tensor]:
    """What the adapter adds to BASE, by name on the disk, in float64."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float64)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    merged = PeftModel.from_pretrained(model, adapter, autocast_adapter_dtype=False).merge_and_unload().state_dict()
    return {name: merged[name] - value for name, value in before.items()}


def state(stored: bool, folder: Path) -> None:
    settings = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**settings, "fan_in_fan_out": stored}))


def assert_sum(found: dict[str, torch.Tensor], instruct: Path, delta: dict[str, torch.Tensor], modules: int) -> None:
    changed = 0
    for name, value in weights(instruct).items():
        learnt = delta[name]
        assert float((found[name].double() - value - learnt).abs().max()) < 2e-7, name
        changed += float(learnt.norm()) > 1e-3
    assert changed == modules


def adapter_on(base: Path, folder: Path, modules: list[str]) -> Path:
    from peft import get_peft_model

    torch.manual_seed(5)
    config = LoraConfig(**{**LORA, "target_modules": modules}, init_lora_weights=False)
    get_peft_model(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), config).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("stored", [True, False])
@pytest.mark.parametrize("modules", MODULES)
def test_the_orientation_in_the_file_is_no_matter(gpt2, tmp_path, modules, stored):
    adapter = adapter_on(gpt2[0], tmp_path / "adapter", MODULES[modules])
    state(stored, adapter)
    graft(base=gpt2[0], instruct=gpt2[1], tuned=adapter, output=tmp_path / "out", format="model", progress=False)
    assert_sum(weights(tmp_path / "out"), gpt2[1], merged_by_peft(gpt2[0], adapter), len(MODULES[modules]))


@pytest.mark.parametrize("stored", [True, False])
def test_linear_modules_are_never_turned(tmp_path, stored):
    """PEFT sets `fan_in_fan_out` back for nn.Linear."""
    base, instruct = make_pair(tmp_path)
    adapter = adapter_on(base, tmp_path / "adapter", ["o_proj", "up_proj"])
    state(stored, adapter)
    graft(base=base, instruct=instruct, tuned=adapter, output=tmp_path / "out", format="model", progress=False)
    assert_sum(weights(tmp_path / "out"), instruct, merged_by_peft(base, adapter), 4)


@pytest.fixture(scope="module")
def run(gpt2, tmp_path_factory) -> tuple[Path, dict[str, float]]:
    """A run with a LoRA and the figures of its last evaluation."""
    folder = tmp_path_factory.mktemp("run") / "out"
    config = LoraConfig(**{**LORA, "target_modules": MODULES["conv1d"]})
    trainer = sft(gpt2, folder, peft_config=config, eval_grafted=True, graft_format="model")
    trainer.train()
    return folder, trainer.evaluate(trainer.train_dataset)


def test_the_evaluated_graft_is_the_adapter_on_instruct(gpt2, run, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(gpt2[1], dtype=torch.float64)
    state_dict, delta = model.state_dict(), merged_by_peft(gpt2[0], run[0])
    model.load_state_dict({name: value + delta[name] for name, value in state_dict.items()})
    plain = SFTTrainer(
        model=model.float(),
        args=SFTConfig(**settings(tmp_path)),
        train_dataset=sft_data(),
        processing_class=make_tokenizer(template=True),
    )
    expected = plain.evaluate(plain.train_dataset)["eval_loss"]
    assert run[1]["eval_grafted_loss"] == pytest.approx(expected, abs=1e-5)
    assert abs(run[1]["eval_loss"] - expected) > 1e-4
    assert_sum(weights(run[0] / "grafted"), gpt2[1], delta, 3)


@pytest.mark.parametrize("stored", [True, False])
def test_the_reference_in_memory_is_the_adapter_on_instruct(gpt2, run, tmp_path, stored):
    folder = shutil.copytree(run[0], tmp_path / "run")
    state(stored, folder)
    trainer = ShadowDPOTrainer(
        model=str(folder),
        args=ShadowDPOConfig(
            **settings(tmp_path / "out", ref_policy="grafted", precompute_ref_log_probs=False, graft=False)
        ),
        train_dataset=preference_data(4),
    )
    assert_sum(trainer.ref_model.state_dict(), gpt2[1], merged_by_peft(gpt2[0], folder), 3)
