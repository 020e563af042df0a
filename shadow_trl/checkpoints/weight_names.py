"""What a weight is by its name: head, embedding, projection, the kind of its module, the layer it sits in."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

HEAD_NAMES = ("lm_head.weight", "embed_out.weight")
EMBEDDING_NAMES = tuple(f"{name}.weight" for name in ("embed_tokens", "wte", "embed_in", "word_embeddings"))
TOKEN_NAMES = (*HEAD_NAMES, *EMBEDDING_NAMES, "embed_tokens_per_layer.weight", "lm_head.bias", "embed_out.bias")
"""Weights with one row for each token id."""
_TOKEN_MODULES = tuple(f".{name.rpartition('.')[0]}." for name in TOKEN_NAMES)
COMPUTED_ON_LOAD = re.compile(r"rotary_emb\.inv_freq$|(^|\.)position_ids$")
"""Buffers that old checkpoints store and transformers computes anew."""
NAMED = {
    # The official code adapts these seven projections; it takes their biases too, by accident of a substring match.
    "linear": r"(?:^|[._])(?:q|k|v|o|gate|up|down)_proj\.weight$",
    "attention": r"(?:^|\.)(?:self_attn|attn|self_attention|attention)\.",
    "mlp": r"(?:^|\.)(?:mlp|feed_forward|block_sparse_moe)\.",
}
"""Expressions of weights that have a name of their own."""

_LAYER = re.compile(r"(?:^|.*\.)(?:layers|layer|h|blocks|block)\.\d+(?=\.)")
_NORM = re.compile(r"norm|(?:^|_)ln(?:_|$)|layernorm", re.IGNORECASE)


def is_tied(config: Mapping[str, Any]) -> bool | None:
    """Whether a config.json says that head and embedding are one weight; None where it says nothing.

    >>> is_tied({"text_config": {"tie_word_embeddings": True}}), is_tied({"tie_word_embeddings": False}), is_tied({})
    (True, False, None)
    """
    parts = [config, *(value for value in config.values() if isinstance(value, dict))]
    if any(part.get("tie_word_embeddings") is True for part in parts):
        return True
    return False if config.get("tie_word_embeddings") is False else None


def is_of_tokens(name: str) -> bool:
    """Whether a weight, or a tensor of an adapter, belongs to a module with one row for each token id.

    >>> is_of_tokens("lm_head.weight"), is_of_tokens("base_model.model.model.embed_tokens.lora_embedding_A")
    (True, True)
    >>> is_of_tokens("model.layers.3.mlp.up_proj.weight"), is_of_tokens("my_lm_head.weight")
    (False, False)
    """
    return any(module in f".{name}" for module in _TOKEN_MODULES)


def kind_of(name: str) -> str:
    """Return the kind of a weight: `q_proj`, `embed_tokens`, `norm`, `bias`, ...

    >>> kind_of("model.layers.3.self_attn.q_proj.weight"), kind_of("model.layers.3.input_layernorm.weight")
    ('q_proj', 'norm')
    >>> kind_of("model.layers.3.self_attn.q_proj.bias"), kind_of("model.layers.0.mlp.experts.gate_up_proj")
    ('bias', 'gate_up_proj')
    >>> kind_of("model.projector.2.weight"), kind_of("2.weight")  # modules that have a number for a name
    ('projector', '2')
    """
    *path, last = name.split(".")
    if last == "bias":
        return "bias"
    leaf = path[-1] if last == "weight" and path else last
    if leaf.isdigit() and len(path) > 1:
        leaf = path[-2]
    return "norm" if _NORM.search(leaf) else leaf


def layer_of(name: str) -> str:
    """Return the layer of a weight with its path, or what it is outside of the layers.

    >>> layer_of("model.layers.3.self_attn.q_proj.weight"), layer_of("model.embed_tokens.weight")
    ('model.layers.3', 'model.embed_tokens')
    """
    match = _LAYER.match(name)
    return match.group(0) if match else name.rpartition(".")[0] or name


def layer_key(layer: str) -> tuple[int | str, ...]:
    """Return a key that sorts layers by number, not by spelling."""
    return tuple(int(part) if part.isdigit() else part for part in layer.split("."))
