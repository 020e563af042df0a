"""What a weight is by its name: the kind of its module and the layer it sits in, for figures by group."""

from __future__ import annotations

import re

_LAYER = re.compile(r"(?:^|.*\.)(?:layers|layer|h|blocks|block)\.\d+(?=\.)")
_NORM = re.compile(r"norm|(?:^|_)ln(?:_|$)|layernorm", re.IGNORECASE)


def kind_of(name: str) -> str:
    """Return the kind of a weight: `q_proj`, `embed_tokens`, `norm`, `bias`, ...

    >>> kind_of("model.layers.3.self_attn.q_proj.weight"), kind_of("model.layers.3.input_layernorm.weight")
    ('q_proj', 'norm')
    >>> kind_of("model.layers.3.self_attn.q_proj.bias"), kind_of("model.layers.0.mlp.experts.gate_up_proj")
    ('bias', 'gate_up_proj')
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
