"""Models whose graft is known beforehand: written by numpy and read by numpy, without the package under test.

Weights are whole multiples of 2^-10, small enough that every sum of them is exact in float32. So what a graft, a delta
or a sum must hold is known bit by bit.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np

Weights = dict[str, np.ndarray]
CONFIG = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 64, "intermediate_size": 192,
    "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "vocab_size": 320,
    "tie_word_embeddings": True, "dtype": "float32",
}  # fmt: skip
LINEAR = {
    "self_attn.q_proj": (64, 64), "self_attn.k_proj": (32, 64), "self_attn.v_proj": (32, 64),
    "self_attn.o_proj": (64, 64), "mlp.gate_proj": (192, 64), "mlp.up_proj": (192, 64), "mlp.down_proj": (64, 192),
}  # fmt: skip
_KINDS = {"F32": np.float32, "F16": np.float16, "U8": np.uint8, "I64": np.int64}


def shapes() -> dict[str, tuple[int, ...]]:
    """Return name -> shape of every weight of a small Llama."""
    found: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (320, 64), "model.norm.weight": (64,)}
    for layer in range(CONFIG["num_hidden_layers"]):  # type: ignore[call-overload]
        start = f"model.layers.{layer}."
        found |= {f"{start}{name}.weight": shape for name, shape in LINEAR.items()}
        found |= {f"{start}{name}.weight": (64,) for name in ("input_layernorm", "post_attention_layernorm")}
    return found


def dyadic(seed: int, sizes: dict[str, tuple[int, ...]], largest: int = 512) -> Weights:
    """Return random multiples of 2^-10 up to `largest` of them, float32."""
    source = np.random.default_rng(seed)
    return {
        name: (source.integers(-largest, largest, shape) / 1024).astype(np.float32) for name, shape in sizes.items()
    }


def low_rank(seed: int) -> Weights:
    """Return a delta of rank 2 on the linear layers alone, in multiples of 2^-10, float32."""
    source = np.random.default_rng(seed)
    linear = {name: shape for name, shape in shapes().items() if name.split(".")[-2].endswith("proj")}
    factors = {
        name: (source.integers(-2, 3, (rows, 2)), source.integers(-2, 3, (2, columns)))
        for name, (rows, columns) in linear.items()
    }
    return {name: (one @ other / 1024).astype(np.float32) for name, (one, other) in factors.items()}


def plus(one: Weights, other: Weights, scale: float = 1.0) -> Weights:
    """Return one + scale * other, weight by weight; a weight that `other` lacks stays."""
    return {name: value + np.float32(scale) * other.get(name, np.float32(0)) for name, value in one.items()}


def write_file(path: Path, weights: Weights, metadata: dict[str, str] | None = None) -> None:
    """Write a safetensors file by its specification."""
    header: dict[str, Any] = {"__metadata__": metadata or {"format": "pt"}}
    at = 0
    for name, value in weights.items():
        header[name] = {"dtype": "F32", "shape": list(value.shape), "data_offsets": [at, at + value.nbytes]}
        at += value.nbytes
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for value in weights.values():
            file.write(np.ascontiguousarray(value).tobytes())


def write_model(folder: Path, weights: Weights, *, files: int = 1, config: dict[str, Any] = CONFIG) -> Path:
    """Write a checkpoint of one file, or of several with an index."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    if files == 1:
        write_file(folder / "model.safetensors", weights)
        return folder
    names, weight_map = list(weights), {}
    for number in range(files):
        file = f"model-{number + 1:05d}-of-{files:05d}.safetensors"
        write_file(folder / file, {name: weights[name] for name in names[number::files]})
        weight_map |= dict.fromkeys(names[number::files], file)
    total = sum(value.nbytes for value in weights.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def read_file(path: Path) -> Weights:
    """Read a safetensors file by its specification; ValueError where it is not whole."""
    data = path.read_bytes()
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    header.pop("__metadata__", None)
    found, body = {}, memoryview(data)[8 + size :]
    for name, entry in header.items():
        start, end = entry["data_offsets"]
        kind = np.dtype(_KINDS[entry["dtype"]])
        if end > len(body) or end - start != kind.itemsize * math.prod(entry["shape"]):
            raise ValueError(f"{path.name}: {name} is not whole")
        found[name] = np.frombuffer(body[start:end], kind).reshape(entry["shape"])
    return found


def read_model(folder: Path) -> Weights:
    """Read every weight file of a folder."""
    found: Weights = {}
    for path in sorted(folder.glob("*.safetensors")):
        found |= read_file(path)
    return found


def same(one: Weights, other: Weights) -> bool:
    """Whether two sets of weights are equal, name by name and bit by bit."""
    return one.keys() == other.keys() and all(
        value.dtype == other[name].dtype and value.tobytes() == other[name].tobytes() for name, value in one.items()
    )


def product(folder: Path) -> Weights:
    """Return lora_alpha / r * B @ A of every module of a LoRA, in float64, by the names of the weights."""
    config = json.loads((folder / "adapter_config.json").read_text())
    factors = read_file(folder / "adapter_model.safetensors")
    found = {}
    for name in factors:
        if ".lora_A." in name:
            module = name.partition(".lora_A.")[0].removeprefix("base_model.model.")
            rank = config.get("rank_pattern", {}).get(module, config["r"])
            alpha = config.get("alpha_pattern", {}).get(module, config["lora_alpha"])
            second = factors[name.replace("lora_A", "lora_B")].astype(np.float64)
            found[f"{module}.weight"] = alpha / rank * second @ factors[name].astype(np.float64)
    return found


class Family:
    """BASE, INSTRUCT and two trained models below `root`, and what must come of them.

    Attributes:
        delta: TUNED - BASE, of rank 2 on the linear layers.
        grafted, summed: the graft of TUNED, and of half of both.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        base = dyadic(0, shapes())
        instruct, self.delta, other = plus(base, dyadic(1, shapes(), 8)), low_rank(2), low_rank(3)
        self.whole_delta = {name: self.delta.get(name, np.zeros_like(value)) for name, value in base.items()}
        self.grafted = plus(instruct, self.delta)
        self.summed = plus(plus(instruct, self.delta, 0.5), other, 0.5)
        self.base, self.instruct = base, instruct
        sides = {"base": base, "instruct": instruct, "tuned": plus(base, self.delta), "other": plus(base, other)}
        for name, weights in sides.items():
            write_model(root / name, weights, files=3 if name == "tuned" else 1)

    def words(self, *roles: str) -> list[str]:
        """Return the options that name the models of these roles."""
        return [word for role in roles for word in (f"--{role}", str(self.root / role))]
