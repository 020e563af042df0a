"""What two stages of training leave, in float64 from the files alone."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import load_file


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor.double() for name, tensor in load_file(folder / "model.safetensors").items()}


def tuned_weights(base: Path, folder: Path) -> dict[str, torch.Tensor]:
    """TUNED in float64: its own file, or BASE with the adapter's factors times alpha / r, from the files alone."""
    if (folder / "model.safetensors").is_file():
        return weights(folder)
    settings = json.loads((folder / "adapter_config.json").read_text())
    state, factors = weights(base), load_file(folder / "adapter_model.safetensors")
    for name in [name for name in factors if name.endswith("lora_A.weight")]:
        target = name.removeprefix("base_model.model.").replace("lora_A.weight", "weight")
        left, right = factors[name.replace("lora_A", "lora_B")].double(), factors[name].double()
        state[target] += settings["lora_alpha"] / settings["r"] * (left @ right)
    return state
