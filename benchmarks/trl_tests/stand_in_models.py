"""Small models of the architectures that TRL's tests take from the hub, and an INSTRUCT beside each, in a hub cache."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path
from typing import Any

import torch
import transformers
import trl
from hub_cache import into_cache
from stand_in_data import words
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

NAME = re.compile(r'"(trl-internal-testing/tiny-([A-Za-z0-9_]+)(?:-[\w.-]+)?|Qwen/Qwen3-4B)"')
TEMPLATES = {
    "Cohere2": "cohere2", "Cohere": "cohere", "DeepseekV3": "deepseekv3", "Glm4Moe": "glm4moe", "GptOss": "gptoss",
    "Lfm2": "lfm2", "Llama": "llama3", "NemotronH": "nemotron_3_nano", "Phi3": "phi3", "Qwen2": "qwen2_5",
    "Qwen3": "qwen3",
}  # fmt: skip
"""Beginning of an architecture -> the template of TRL's; of the others GPT-NeoX has none, and the rest Qwen's."""
BARE = ("GPTNeoX",)
SMALL: dict[str, Any] = {
    "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 4, "sliding_window": 64, "max_position_embeddings": 4096,
    "moe_intermediate_size": 16, "num_experts": 4, "num_local_experts": 4, "n_routed_experts": 4,
    "num_experts_per_tok": 2, "n_shared_experts": 1, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1,
    "q_lora_rank": 8, "kv_lora_rank": 8, "qk_nope_head_dim": 4, "qk_rope_head_dim": 4, "v_head_dim": 4,
    "state_size": 4, "ssm_state_size": 4, "mamba_num_heads": 4, "mamba_head_dim": 8, "n_groups": 1, "chunk_size": 8,
    "block_multiple_of": 8,
}  # fmt: skip
"""What a config gets of these, as far as it has such a key."""


def fill_cache(cache: Path, made: Path, tests: str) -> dict[str, str]:
    """Put a model for each name in the tests into the cache, and its INSTRUCT; return why there is none of some."""
    lacking = {}
    for name, architecture in sorted(set(NAME.findall(tests))):
        try:
            folders = make_pair(made / name, architecture or "Qwen3ForCausalLM")
        # Whatever transformers says of an architecture that needs more than these keys.
        except Exception as reason:
            lacking[name] = f"{type(reason).__name__}: {str(reason).splitlines()[0] if str(reason) else ''}"
            continue
        for title, folder in zip((name, f"{name}-instruct"), folders, strict=True):
            commit = hashlib.sha1(title.encode(), usedforsecurity=False).hexdigest()
            into_cache(cache, title, commit, folder, branch="main")
    return lacking


def make_pair(folder: Path, architecture: str) -> tuple[Path, Path]:
    """Save a random model in bfloat16 with its tokenizer, and beside it an INSTRUCT that is some noise away."""
    model_class = getattr(transformers, architecture)
    if not architecture.endswith("ForCausalLM"):
        raise ValueError("only models of text are made")
    tokenizer = make_tokenizer(architecture)
    config = model_class.config_class()
    chosen = {key: value for key, value in SMALL.items() if hasattr(config, key)}
    config = model_class.config_class(
        **chosen, vocab_size=len(tokenizer), pad_token_id=0, eos_token_id=tokenizer.eos_token_id, bos_token_id=None
    )
    torch.manual_seed(0)
    model = model_class(config).to(torch.bfloat16)
    folders = folder / "base", folder / "instruct"
    for place in folders:
        model.save_pretrained(place)
        tokenizer.save_pretrained(place)
        with torch.no_grad():
            for weight in model.parameters():
                weight.add_(0.02 * weight.abs().mean() * torch.randn_like(weight))
    return folders


def make_tokenizer(architecture: str) -> PreTrainedTokenizerFast:
    """Return a tokenizer trained on the data, with Qwen's special tokens and a template of the architecture."""
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=1024, special_tokens=special, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )  # fmt: skip
    inner.train_from_iterator([*words(), _template("Qwen2")], trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token=special[0], eos_token=special[2], additional_special_tokens=special[1:2]
    )
    if not architecture.startswith(BARE):
        known = [name for name in TEMPLATES if architecture.startswith(name)]
        tokenizer.chat_template = _template(max(known, key=len, default="Qwen2"))
    return tokenizer


def _template(name: str) -> str:
    return (Path(trl.__file__).parent / "chat_templates" / f"{TEMPLATES[name]}.jinja").read_text(encoding="utf-8")
