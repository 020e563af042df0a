"""Tiny real models, tokenizers and data for the tests; everything is made here, nothing is downloaded."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast, Qwen3Config

TEMPLATE = (
    "{% for message in messages %}{{ '<|' + message['role'] + '|>' }}"
    "{% if message['role'] == 'assistant' %}{% generation %}{{ message['content'] + '<|end|>' }}{% endgeneration %}"
    "{% else %}{{ message['content'] + '<|end|>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
SPECIAL = ["<|pad|>", "<|end|>", "<|system|>", "<|user|>", "<|assistant|>"]
CHARACTERS = "abcdefghijklmnopqrstuvwxyz0123456789 +-=.,?!"


def make_tokenizer(*, template: bool) -> PreTrainedTokenizerFast:
    """Return a character tokenizer of 49 tokens, five of them special, with or without a chat template."""
    vocabulary = {token: row for row, token in enumerate([*SPECIAL, *CHARACTERS])}
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token="<|pad|>"))
    inner.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner,
        pad_token="<|pad|>",
        eos_token="<|end|>",
        additional_special_tokens=SPECIAL[2:],
    )
    if template:
        tokenizer.chat_template = TEMPLATE
    return tokenizer


def tiny_config(
    kind: str = "qwen3", *, tied: bool = True, rows: int = 49, **options: bool
) -> LlamaConfig | Qwen3Config:
    """Return the config of a model of two layers of width 16."""
    config_class = {"qwen3": Qwen3Config, "llama": LlamaConfig}[kind]
    return config_class(
        vocab_size=rows,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        max_position_embeddings=128,
        tie_word_embeddings=tied,
        pad_token_id=0,
        eos_token_id=1,
        bos_token_id=None,
        **options,
    )


def save_model(
    folder: Path, state: dict[str, torch.Tensor] | None = None, *, seed: int = 0, template: bool = False, **config
) -> Path:
    """Save a tiny model with its tokenizer to `folder`: random weights of `seed`, or those of `state`."""
    dtype = config.pop("dtype", torch.float32)
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(tiny_config(**config))
    if state is not None:
        model.load_state_dict(state, strict=False)
    model.generation_config.eos_token_id = 1
    model.to(dtype).save_pretrained(folder)
    make_tokenizer(template=template).save_pretrained(folder)
    return folder


def make_pair(folder: Path, *, gap: float = 0.02, dtype: torch.dtype = torch.float32, **config) -> tuple[Path, Path]:
    """Save BASE (no template) and INSTRUCT (BASE plus noise of relative size `gap`, template) below `folder`."""
    torch.manual_seed(1)
    base = AutoModelForCausalLM.from_config(tiny_config(**config))
    state = {name: tensor.detach().clone() for name, tensor in base.state_dict().items()}
    moved = {name: tensor + gap * tensor.abs().mean() * torch.randn_like(tensor) for name, tensor in state.items()}
    if config.get("tied", True):
        moved["lm_head.weight"] = moved["model.embed_tokens.weight"]
    return (
        save_model(folder / "base", state, dtype=dtype, **config),
        save_model(folder / "instruct", moved, dtype=dtype, template=True, **config),
    )


def sft_data(rows: int = 16) -> Dataset:
    """Return conversational prompt-completion rows in memory."""
    return Dataset.from_list(
        [
            {
                "prompt": [{"role": "user", "content": f"{row}+1"}],
                "completion": [{"role": "assistant", "content": str(row + 1)}],
            }
            for row in range(rows)
        ]
    )


def preference_data(rows: int = 16) -> Dataset:
    """Return conversational preference rows in memory."""
    return Dataset.from_list(
        [
            {
                "prompt": [{"role": "user", "content": f"{row}+1"}],
                "chosen": [{"role": "assistant", "content": str(row + 1)}],
                "rejected": [{"role": "assistant", "content": f"no {row}"}],
            }
            for row in range(rows)
        ]
    )


def config_of(folder: Path) -> dict:
    """Return the parsed config.json of a folder."""
    return json.loads((Path(folder) / "config.json").read_text())
