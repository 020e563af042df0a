"""Models to be measured: from a folder or the hub, or a graft in memory, loaded in one dtype."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..checkpoints.checkpoint import ADAPTER_CONFIG
from ..checkpoints.hub import Source, locate
from ..checkpoints.json_files import is_there, read_json
from ..checkpoints.manifest import adapter_base
from ..checkpoints.schemas import AdapterConfig
from ..errors import InputError
from ..operations.in_memory import MemoryGraft


def load(source: Source | MemoryGraft, *, dtype: str, device: Any = "cpu") -> Any:
    """Load a model for evaluation.

    A graft in memory goes through the same loader as its files would, so that names, layouts and ties are theirs.

    Args:
        source: folder (weights or adapter), hub id, or a graft in memory, whose weights may be taken over.
        dtype: in which it answers, `auto` for that of its weights.
        device: where it answers. Default: the CPU.

    Raises:
        InputError: there is no such model, or it has no head for text.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    try:
        if not isinstance(source, MemoryGraft):
            found = load_folder(locate(source).path, dtype=dtype)
        else:
            config = AutoConfig.from_pretrained(source.folder)
            with torch.device("meta"):
                kind = type(AutoModelForCausalLM.from_config(config))
            stated = config.dtype if dtype == "auto" else dtype
            found = kind.from_pretrained(None, config=config, state_dict=source.weights, dtype=stated)
    except (OSError, ValueError) as reason:
        raise InputError(f"cannot load {source}: {reason}") from reason
    return found.to(device).eval()


def load_folder(folder: Path, **options: Any) -> Any:
    """Load the model in `folder`; of an adapter the model it names, at the commit that it names, with it.

    `AutoModelForCausalLM` on an adapter's folder takes the model from the main branch of its repository.
    """
    from transformers import AutoModelForCausalLM

    adapter = read_json(folder / ADAPTER_CONFIG, AdapterConfig) if is_there(folder / ADAPTER_CONFIG) else {}
    if not adapter.get("base_model_name_or_path"):
        return AutoModelForCausalLM.from_pretrained(folder, **options)
    below = adapter_base(adapter, folder)
    assert below is not None
    model: Any = AutoModelForCausalLM.from_pretrained(below.source, revision=below.revision or "main", **options)
    model.load_adapter(str(folder))
    return model


def tokenizer_and_ends(instruct: Source) -> tuple[Any, list[int]]:
    """Return INSTRUCT's tokenizer and the tokens that end an answer.

    Raises:
        InputError: it has none, or no chat template.
    """
    from transformers import AutoTokenizer, GenerationConfig

    from .scoring import end_tokens

    folder = locate(instruct).path
    try:
        tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError) as reason:
        raise InputError(f"cannot load the tokenizer of {instruct}: {reason}") from reason
    if not tokenizer.chat_template:
        raise InputError(f"the tokenizer of {instruct} has no chat template; INSTRUCT's is needed.")
    try:
        generation = GenerationConfig.from_pretrained(folder)
    except OSError:  # no generation config: the tokenizer's end token alone
        generation = None
    return tokenizer, end_tokens(generation, tokenizer)
