"""Names of weights: those that transformers' own models give to what has a row for each token."""

from __future__ import annotations

import pytest
import torch
import transformers

from shadow_trl.checkpoints.weight_names import EMBEDDING_NAMES, HEAD_NAMES, TOKEN_NAMES, is_of_tokens

SMALL = {"vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
CONFIGS = {
    "llama": lambda: transformers.LlamaConfig(**SMALL, intermediate_size=16),
    "gpt2": lambda: transformers.GPT2Config(vocab_size=40, n_embd=16, n_layer=1, n_head=2),
    "gpt_neox": lambda: transformers.GPTNeoXConfig(**SMALL, intermediate_size=16),
    "bloom": lambda: transformers.BloomConfig(vocab_size=40, hidden_size=16, n_layer=1, n_head=2),
    "phi": lambda: transformers.PhiConfig(**SMALL, intermediate_size=16),
    "gemma3n": lambda: transformers.Gemma3nTextConfig(
        **SMALL, intermediate_size=16, num_key_value_heads=1, head_dim=8, vocab_size_per_layer_input=40,
        hidden_size_per_layer_input=8, num_kv_shared_layers=0, laurel_rank=2, layer_types=["full_attention"],
        activation_sparsity_pattern=[0.0],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CONFIGS)
def test_weights_with_a_row_for_each_token_are_known(name):
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(CONFIGS[name]())
    names = {id(value): key for key, value in model.named_parameters(remove_duplicate=False)}
    of = {id(module): path for path, module in model.named_modules(remove_duplicate=False)}
    embedding, head = (of[id(module)] for module in (model.get_input_embeddings(), model.get_output_embeddings()))
    assert f"{embedding.rpartition('.')[2]}.weight" in EMBEDDING_NAMES
    assert f"{head}.weight" in HEAD_NAMES
    rows = {key for key, value in model.named_parameters(remove_duplicate=False) if value.shape[:1] == (40,)}
    assert len(names) >= len(rows) >= 2
    for key in rows:
        assert is_of_tokens(key)
        assert key.endswith(TOKEN_NAMES)
    assert not any(is_of_tokens(key) for key in dict(model.named_parameters()).keys() - rows)
