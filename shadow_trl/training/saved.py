"""TUNED before it exists: the model in memory as the run will save it. No weight is copied."""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from ..checkpoints.header import CODES, TensorSpec
from ..checkpoints.json_files import read_json
from ..errors import list_names
from ..layouts.matching import Announced
from ..operations.checks import check_trained
from ..pair.templates import read_templates
from ..pair.trained_templates import template_rows
from ..results.folder import Scratch
from .loading import bare_model
from .origins import Start

_WRAPPED = re.compile(r"\.(?:base_layer|original_module|token_adapter)(?=\.)")


@contextmanager
def as_saved(model: Any, processing_class: Any) -> Iterator[Announced]:
    """Give the checkpoint that `model` will become, its adapter merged, with the tokenizer that trains it.

    Config and tokenizer lie in a folder that is gone afterwards; names and shapes are those that saving gives.
    """
    bare = bare_model(model)
    with Scratch(Path(tempfile.gettempdir(), "shadow-trl-tuned")) as scratch:
        folder = scratch.part
        config = {**json.loads(bare.config.to_json_string()), "architectures": [type(bare).__name__]}
        (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
        if processing_class is not None:
            processing_class.save_pretrained(folder)
        specs, trained = _weights(bare)
        label = "the model in training"
        yield Announced(label, None, folder, config=read_json(folder / "config.json"), specs=specs, trained=trained)


def check_as_saved(start: Start, model: Any, processing_class: Any, options: Mapping[str, Any]) -> list[str]:
    """Find before the first step what would be found wrong with the model after the last.

    Args:
        start: of the run.
        model: what will be trained, with its adapter.
        processing_class: that of the trainer.
        options: of the graft.

    Returns:
        what the user should know.

    Raises:
        InputError: what was trained could not be grafted.
    """
    warnings = []
    with as_saved(model, processing_class) as tuned:
        if start.stage is not None:
            before = template_rows(read_templates(Path(start.stage)), read_templates(tuned.path), ("before", "now"))
            if before:
                warnings.append(
                    f"{start.stage} was trained with another chat template than this run:\n{list_names(before)}\nTo "
                    "train with that one, pass its tokenizer as processing_class."
                )
        warnings += check_trained(
            base=str(start.base),
            instruct=str(start.instruct),
            tuned=tuned,
            adapter=start.adapter is not None,
            has_weights=not start.is_quantised,
            **options,
        )
    return warnings


def _weights(bare: Any) -> tuple[dict[str, TensorSpec], frozenset[str]]:
    """Return the weights on disk, and the names of those that training changes."""
    from transformers.core_model_loading import revert_weight_conversion

    found = _in_memory(bare)
    moving = revert_weight_conversion(bare, {name: tensor for name, (tensor, trained) in found.items() if trained})
    saved = revert_weight_conversion(bare, {name: tensor for name, (tensor, _) in found.items()})
    specs = {
        name: TensorSpec(
            CODES[str(tensor.dtype).removeprefix("torch.")], tuple(tensor.shape), Path(), None, tensor.nbytes
        )
        for name, tensor in saved.items()
    }
    return specs, frozenset(moving)


def _in_memory(bare: Any) -> dict[str, tuple[torch.Tensor, bool]]:
    """Return the weights below an adapter, on the meta device, and whether training changes each.

    Of a tied weight one name is left, as in a file, unless an adapter changes it under one name only.
    """
    # PEFT's layers and wrappers keep the weight that they change as `base_layer` or `original_module`.
    wrapped = {
        name: module
        for name, module in bare.named_modules()
        if hasattr(module, "base_layer") or hasattr(module, "original_module")
    }
    added = {
        path: [p for key, p in module.named_parameters() if _is_of_adapter(f"{path}.{key}", wrapped)]
        for path, module in wrapped.items()
    }
    found: dict[str, tuple[torch.Tensor, bool]] = {}
    seen: set[tuple[int, ...]] = set()
    for name, tensor in bare.state_dict(keep_vars=True).items():
        if _is_of_adapter(name, wrapped):
            continue
        outermost = next(iter(_above(name, wrapped)), None)
        beside = [] if outermost is None else added[outermost]
        one = (id(tensor), *map(id, beside))
        ignored = name in (getattr(bare, "_keys_to_ignore_on_save", None) or ())
        if one in seen or ignored:
            continue
        seen.add(one)
        shape = getattr(tensor, "ds_shape", tensor.shape)  # of a weight that ZeRO-3 has shared out
        plain = torch.empty(shape, dtype=tensor.dtype, device="meta")
        found[_WRAPPED.sub("", name)] = (plain, bool(beside) or tensor.requires_grad)
    return found


def _above(name: str, wrapped: Mapping[str, Any]) -> Iterator[str]:
    """Yield the wrappers that a tensor is in, the outermost first: with two parameters of one module there are two."""
    parts = name.split(".")
    yield from (path for end in range(1, len(parts)) if (path := ".".join(parts[:end])) in wrapped)


def _is_of_adapter(name: str, wrapped: Mapping[str, Any]) -> bool:
    """Whether a tensor belongs to an adapter itself, and not to what it changes, through all wrappers around it."""
    return any(not _WRAPPED.match(name, len(path)) for path in _above(name, wrapped))
