"""Tiny models of many architectures, as transformers loads them, and the sum of three of them."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
import transformers

SCALE = 0.75


ROLES = ("base", "instruct", "tuned")


TEXT = {
    "vocab_size": 40, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2,
    "num_key_value_heads": 1, "max_position_embeddings": 64, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip


VISION = {
    "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 16,
    "patch_size": 8,
}  # fmt: skip


QWEN_VISION = {
    "depth": 1, "hidden_size": 16, "intermediate_size": 24, "num_heads": 2, "out_hidden_size": 16, "patch_size": 4,
    "fullatt_block_indexes": [0],
}  # fmt: skip


TWO_LAYERS = {**TEXT, "num_hidden_layers": 2}


MROPE = {"rope_scaling": {"type": "default", "rope_type": "default", "mrope_section": [1, 1, 2]}}


def gemma3() -> Any:
    return transformers.Gemma3Config(text_config={**TEXT, "head_dim": 8}, vision_config=VISION, mm_tokens_per_image=1)


CONFIGS: dict[str, Callable[[], Any]] = {
    "llama": lambda: transformers.LlamaConfig(**TEXT),
    "qwen2": lambda: transformers.Qwen2Config(**TEXT, tie_word_embeddings=True),
    "qwen3": lambda: transformers.Qwen3Config(**TEXT, head_dim=8, tie_word_embeddings=True),
    "qwen3_moe": lambda: transformers.Qwen3MoeConfig(
        **TWO_LAYERS, head_dim=8, num_experts=3, num_experts_per_tok=2, moe_intermediate_size=8
    ),
    "mixtral": lambda: transformers.MixtralConfig(**TWO_LAYERS, num_local_experts=3, num_experts_per_tok=2),
    "gemma3_text": lambda: transformers.Gemma3TextConfig(**TEXT, head_dim=8),
    "gemma3": gemma3,
    "qwen2_5_vl": lambda: transformers.Qwen2_5_VLConfig(text_config={**TWO_LAYERS, **MROPE}, vision_config=QWEN_VISION),
    "gpt_oss": lambda: transformers.GptOssConfig(**TEXT, head_dim=8, num_local_experts=3, num_experts_per_tok=2),
    "glm4v_moe": lambda: transformers.Glm4vMoeConfig(
        text_config={
            **TWO_LAYERS, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]},
            "n_routed_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 8, "n_group": 1, "topk_group": 1,
            "first_k_dense_replace": 1,
        },
        vision_config={key: value for key, value in QWEN_VISION.items() if key != "fullatt_block_indexes"},
    ),
}  # fmt: skip


VLMS = ("gemma3", "qwen2_5_vl", "glm4v_moe")


def model_class(name: str) -> Any:
    return transformers.AutoModelForImageTextToText if name in VLMS else transformers.AutoModelForCausalLM


@functools.cache
def in_memory(name: str, folder: Path) -> Mapping[str, torch.Tensor]:
    """Load with plain transformers, once for all tests; nothing may be missing or left over."""
    model, info = model_class(name).from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs")), info
    return MappingProxyType(dict(model.state_dict()))


def assert_sum(name: str, base: Path, instruct: Path, tuned: Path, result: Path) -> None:
    """Every weight of the loaded result equals the sum of the loaded models, to the bit."""
    b, i, t, r = (in_memory(name, folder) for folder in (base, instruct, tuned, result))
    assert r.keys() == i.keys()
    for key, value in r.items():
        expected = (i[key].double() + SCALE * (t[key].double() - b[key].double())).float()
        assert torch.equal(value, expected), key


def make_family(folder: Path, name: str) -> Path:
    """Save base, instruct and tuned of an architecture, all weights random, in both of its layouts; once."""
    transformers.utils.logging.disable_progress_bar()
    for number, role in enumerate(ROLES):
        if (folder / role).is_dir():
            continue
        generator = torch.Generator().manual_seed(number)
        model = model_class(name).from_config(CONFIGS[name](), dtype=torch.bfloat16)
        with torch.no_grad():
            for weight in model.parameters():
                weight.copy_(torch.randn(weight.shape, generator=generator) / 8)
        model.save_pretrained(folder / role)
        model.save_pretrained(folder / f"{role}-memory", save_original_format=False)
    return folder
