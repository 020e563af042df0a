"""How much of a LoRA's delta answers to the quantisation error of a 4-bit BASE.

    python benchmarks/qlora.py        # needs bitsandbytes; about a minute on the CPU

Trains the same LoRA (rank 16, all linear, 60 steps, the embedded pair and its SFT rows) on BASE in fp32 and on BASE in
4 bits (NF4), with the same seeds, and compares the two deltas; a run in fp32 with another seed is the yardstick.
"""

from __future__ import annotations

import logging
import sys
import tempfile
import warnings
from pathlib import Path

import torch
from datasets import load_dataset
from peft import LoraConfig
from safetensors.torch import load_file
from transformers import BitsAndBytesConfig

from shadow_trl import ShadowSFTConfig, ShadowSFTTrainer

DATA = Path(__file__).resolve().parent.parent / "data"


def main() -> None:
    """Train three times and print the comparison."""
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    four_bits = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)
    plain = _train(seed=1)
    print("| compared with fp32, seed 1 | relative difference of the delta | projection on it |\n|---|---|---|")
    for name, other in (("4 bits, seed 1", _train(seed=1, bits=four_bits)), ("fp32, seed 2", _train(seed=2))):
        apart = (other - plain).norm() / plain.norm()
        print(f"| {name} | {apart:.3f} | {torch.dot(other, plain) / torch.dot(plain, plain):.3f} |")


def _train(seed: int, bits: BitsAndBytesConfig | None = None) -> torch.Tensor:
    """Return the delta of a run, all modules in one vector, float64. The seed is of data order and initialisation."""
    with tempfile.TemporaryDirectory() as folder:
        trainer = ShadowSFTTrainer(
            model=str(DATA / "nano-base"),
            instruct_model=str(DATA / "nano-instruct"),
            args=ShadowSFTConfig(
                output_dir=folder, max_steps=60, per_device_train_batch_size=8, learning_rate=1e-3, seed=seed,
                use_cpu=True, bf16=False, report_to="none", save_strategy="no", disable_tqdm=True, graft=False,
                model_init_kwargs={"device_map": "cpu"}, gradient_checkpointing=False, logging_strategy="no",
            ),
            train_dataset=load_dataset("json", data_files=str(DATA / "sft.jsonl"), split="train"),
            peft_config=LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM"),
            quantization_config=bits,
        )  # fmt: skip
        trainer.train()
        trainer.save_model()
        found = load_file(Path(folder) / "adapter_model.safetensors")
    rights = sorted(name for name in found if name.endswith("lora_A.weight"))
    pairs = [(found[name.replace("lora_A", "lora_B")], found[name]) for name in rights]
    return torch.cat([(2.0 * left.double() @ right.double()).flatten() for left, right in pairs])


if __name__ == "__main__":
    sys.exit(main())
