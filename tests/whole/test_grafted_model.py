"""The grafted folder of the embedded pair stands alone: plain transformers loads it and it answers as the sum does."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from repository import ROOT
from runs import settings
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from shadow_trl import ShadowSFTConfig, ShadowSFTTrainer

BASE, INSTRUCT = ROOT / "data" / "nano-base", ROOT / "data" / "nano-instruct"
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning:transformers")

# Run by itself: nothing of shadow_trl is imported.
LOAD_ALONE = """
import json, sys
from transformers import AutoModelForCausalLM, AutoTokenizer
model, tokenizer = (kind.from_pretrained(sys.argv[1]) for kind in (AutoModelForCausalLM, AutoTokenizer))
answers = []
for prompt in json.loads(sys.argv[2]):
    ids = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    answers.append(model.generate(**ids, max_new_tokens=16, do_sample=False)[0].tolist())
assert "shadow_trl" not in sys.modules
eos = tokenizer.eos_token
print(json.dumps({"answers": answers, "dtype": str(model.dtype), "eos": eos, "template": tokenizer.chat_template}))
"""


@pytest.mark.slow
def test_it_loads_without_our_code_and_answers_as_the_sum_in_memory(tmp_path):
    ShadowSFTTrainer(
        model=str(BASE),
        instruct_model=str(INSTRUCT),
        args=ShadowSFTConfig(**settings(tmp_path, max_steps=3, learning_rate=1e-3, per_device_train_batch_size=16)),
        train_dataset=Dataset.from_json(str(ROOT / "data" / "sft.jsonl"), cache_dir=str(tmp_path / "cache")),
    ).train()
    with open(ROOT / "data" / "sft-test.jsonl", encoding="utf-8") as file:
        prompts = [json.loads(line)["prompt"] for line in list(file)[::65][:20]]
    assert len(prompts) == 20

    base, tuned = (load_file(Path(folder) / "model.safetensors") for folder in (BASE, tmp_path))
    model = AutoModelForCausalLM.from_pretrained(INSTRUCT)
    tokenizer = AutoTokenizer.from_pretrained(INSTRUCT)
    changed = 0
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            total = parameter.double() + (tuned[name].double() - base[name].double())
            changed += int((total.float().to(parameter.dtype) != parameter).sum())
            parameter.copy_(total.float())
    assert changed > 10_000
    expected = []
    for prompt in prompts:
        ids = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_tensors="pt", return_dict=True)
        expected.append(model.generate(**ids, max_new_tokens=16, do_sample=False)[0].tolist())

    command = [sys.executable, "-W", "ignore", "-c", LOAD_ALONE, str(tmp_path / "grafted"), json.dumps(prompts)]
    found = json.loads(subprocess.run(command, check=True, capture_output=True, text=True, cwd=tmp_path).stdout)
    assert found["answers"] == expected
    assert found["dtype"] == "torch.bfloat16"
    assert (found["eos"], found["template"]) == (tokenizer.eos_token, tokenizer.chat_template)
