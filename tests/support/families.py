"""Families of tiny checkpoints with Llama's names, written tensor by tensor: no model is built."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 8,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "vocab_size": 20,
    "tie_word_embeddings": True,
}
PROJECTIONS = {
    "self_attn.q_proj": (8, 8), "self_attn.k_proj": (4, 8), "self_attn.v_proj": (4, 8), "self_attn.o_proj": (8, 8),
    "mlp.gate_proj": (24, 8), "mlp.up_proj": (24, 8), "mlp.down_proj": (8, 24),
}  # fmt: skip
LINEAR = [f"model.layers.{layer}.{name}.weight" for layer in (0, 1) for name in PROJECTIONS]


def shapes() -> dict[str, tuple[int, ...]]:
    """Return name -> shape of every weight of the family."""
    found: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (20, 8)}
    for layer in (0, 1):
        found |= {f"model.layers.{layer}.{name}.weight": shape for name, shape in PROJECTIONS.items()}
        found |= {
            f"model.layers.{layer}.self_attn.q_proj.bias": (8,),
            f"model.layers.{layer}.input_layernorm.weight": (8,),
        }
    return {**found, "model.norm.weight": (8,)}


def tensors(seed: int, dtype: torch.dtype = torch.bfloat16, std: float = 0.02) -> dict[str, torch.Tensor]:
    """Return random weights."""
    generator = torch.Generator().manual_seed(seed)
    return {name: (torch.randn(shape, generator=generator) * std).to(dtype) for name, shape in shapes().items()}


def moved(weights: Mapping[str, torch.Tensor], seed: int, std: float, dtype: torch.dtype | None = None):
    """Return the weights plus noise."""
    noise = tensors(seed, torch.float32, std)
    return {name: (value.float() + noise[name]).to(dtype or value.dtype) for name, value in weights.items()}


def write(folder: Path, weights: Mapping[str, torch.Tensor], *, shards: int = 1, config=CONFIG, **extra: str) -> Path:
    """Write a checkpoint of one file, or of several with an index; `extra` are further files (`_DOT_` for a dot)."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({**config, "dtype": str(next(iter(weights.values())).dtype)[6:]}))
    names = list(weights)
    if shards == 1:
        save_file(dict(weights), folder / "model.safetensors", metadata={"format": "pt"})
    else:
        weight_map = {}
        for number in range(shards):
            file = f"model-{number + 1:05d}-of-{shards:05d}.safetensors"
            chosen = names[number::shards]
            save_file({name: weights[name] for name in chosen}, folder / file, metadata={"format": "pt", "note": "x"})
            weight_map |= dict.fromkeys(chosen, file)
        index = {"metadata": {"total_size": sum(value.nbytes for value in weights.values())}, "weight_map": weight_map}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    for name, text in extra.items():
        (folder / name.replace("_DOT_", ".")).write_text(text)
    return folder


def family(
    root: Path, *, dtypes=(torch.bfloat16,) * 3, delta: float = 1e-2, shards=(1, 1, 1), **extra: str
) -> dict[str, Path]:
    """Write BASE, INSTRUCT and TUNED; return their folders."""
    base = tensors(0, dtypes[0])
    sides = {
        "base": base,
        "instruct": moved(base, 1, 1e-3, dtypes[1]),
        "tuned": moved(base, 2, delta, dtypes[2]),
    }
    return {
        role: write(root / role, weights, shards=count, **(extra if role == "instruct" else {}))
        for (role, weights), count in zip(sides.items(), shards, strict=True)
    }


def lora(
    root: Path, *, rank: int = 2, alpha: int = 4, seed: int = 5, modules=("q_proj", "down_proj"), **config
) -> Path:
    """Write a LoRA adapter of the family."""
    generator = torch.Generator().manual_seed(seed)
    found = {}
    for name in LINEAR:
        if name.split(".")[-2] in modules:
            rows, columns = shapes()[name]
            module = f"base_model.model.{name.removesuffix('.weight')}"
            found[f"{module}.lora_A.weight"] = torch.randn(rank, columns, generator=generator)
            found[f"{module}.lora_B.weight"] = torch.randn(rows, rank, generator=generator) * 1e-2
    root.mkdir(parents=True)
    save_file(found, root / "adapter_model.safetensors", metadata={"format": "pt"})
    settings = {
        "peft_type": "LORA", "r": rank, "lora_alpha": alpha, "target_modules": list(modules), "bias": "none",
        "base_model_name_or_path": "base", "revision": None, "fan_in_fan_out": False, "use_rslora": False, **config,
    }  # fmt: skip
    (root / "adapter_config.json").write_text(json.dumps(settings))
    return root


def load(folder: Path) -> dict[str, torch.Tensor]:
    """Return the weights of a folder, whatever files they are in."""
    found = {}
    for path in sorted(Path(folder).glob("*.safetensors")):
        found |= load_file(path)
    return found
