"""Do the config.json files of BASE and INSTRUCT describe the same network?"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ..checkpoints.checkpoint import read_json
from ..errors import Findings, both_sides, list_names

SIZES = frozenset(
    {
        "hidden_size", "n_embd", "d_model", "embed_dim", "hidden_dim", "num_hidden_layers", "n_layer", "num_layers",
        "depth", "layer_types", "num_attention_heads", "n_head", "num_heads", "num_key_value_heads", "head_dim",
        "attention_bias", "mlp_bias", "intermediate_size", "n_inner", "ffn_dim", "d_ff",
        "shared_expert_intermediate_size", "moe_intermediate_size", "num_experts", "num_local_experts",
        "n_routed_experts", "n_shared_experts", "num_experts_per_tok", "first_k_dense_replace", "kv_lora_rank",
        "q_lora_rank", "qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim", "state_size", "conv_kernel",
        "patch_size", "temporal_patch_size", "spatial_merge_size", "num_channels", "in_channels", "in_chans",
        "out_hidden_size",
    }
)  # fmt: skip
"""Settings that give weights their shapes or meaning: another value is another network."""

BEHAVIOUR = frozenset(
    {
        "hidden_act", "hidden_activation", "rms_norm_eps", "layer_norm_eps", "layer_norm_epsilon",
        "partial_rotary_factor", "sliding_window", "max_window_layers", "no_rope_layers", "attn_logit_softcapping",
        "final_logit_softcapping", "query_pre_attn_scalar", "attention_multiplier", "residual_multiplier",
        "embedding_multiplier", "logits_scaling", "norm_topk_prob", "routed_scaling_factor", "image_size",
        "window_size", "fullatt_block_indexes",
    }
)  # fmt: skip
"""Settings that change what the same weights compute; post-training sometimes changes them on purpose."""

PROCESSOR_FILES = ("preprocessor_config.json", "video_preprocessor_config.json", "processor_config.json")
_PROCESSOR_NAMES = ("_type", "_class", "_version", "auto_map")


def compare_architectures(base: dict[str, Any], instruct: dict[str, Any]) -> Findings:
    """Compare two config.json objects, sub-configs (vision, audio) included.

    Another architecture or size is an error. Another rotary embedding, activation, norm epsilon, attention window or
    tied head is a warning. Settings that only one side states are not compared: the weights' shapes tell the rest.
    """
    sizes = _differing(base, instruct, ("architectures", "model_type"))
    behaviour: list[str] = []
    base_parts, instruct_parts = _parts(base), _parts(instruct)
    for part in base_parts.keys() & instruct_parts.keys():
        ours, theirs = base_parts[part], instruct_parts[part]
        prefix = f"{part}." if part else ""
        sizes += _differing(ours, theirs, sorted(SIZES), prefix)
        behaviour += _differing(ours, theirs, sorted(BEHAVIOUR), prefix)
        behaviour += _rope_rows(ours, theirs, prefix)
        behaviour += _differing(ours, theirs, ("tie_word_embeddings",), prefix)
    findings = Findings()
    if sizes:
        findings.errors.append(
            f"{_settings(len(sizes))} of config.json: base and instruct are different networks.\n{list_names(sizes)}\n"
            "Give the base that instruct was made from."
        )
    if behaviour:
        findings.warnings.append(
            f"{_settings(len(behaviour))} of config.json, so the same weights compute something else in base than in "
            f"instruct; training uses base's, the grafted model instruct's.\n{list_names(behaviour)}"
        )
    return findings


def compare_processors(base: Path, instruct: Path) -> Findings:
    """Warn about settings of the image and video processors that differ; training uses INSTRUCT's."""
    rows: list[str] = []
    for name in PROCESSOR_FILES:
        ours, theirs = _flat(read_json(base / name)), _flat(read_json(instruct / name))
        keys = [key for key in sorted(ours) if not key.endswith(_PROCESSOR_NAMES)]
        rows += _differing(ours, theirs, keys, f"{name}: ")
    if not rows:
        return Findings()
    headline = f"{_settings(len(rows))} of the processors; training and the grafted model use instruct's."
    return Findings(warnings=[f"{headline}\n{list_names(rows)}"])


def _settings(count: int) -> str:
    return "1 setting differs" if count == 1 else f"{count} settings differ"


def _differing(base: dict[str, Any], instruct: dict[str, Any], keys: Iterable[str], prefix: str = "") -> list[str]:
    """Return a row for each of `keys` that both sides state with different values."""
    values = [(prefix + key, base.get(key), instruct.get(key)) for key in keys]
    return [both_sides(*row) for row in values if None not in row and row[1] != row[2]]


def _parts(config: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Split a config into its text part (name ""), at the top level or in `text_config`, and its other sub-configs."""
    subs = {key: value for key, value in config.items() if key.endswith("_config") and isinstance(value, dict)}
    top = {key: value for key, value in config.items() if key not in subs}
    text = {**top, **subs.pop("text_config", {})}
    if text.get("use_sliding_window") is False:
        text = {key: value for key, value in text.items() if key not in ("sliding_window", "max_window_layers")}
    subs.pop("quantization_config", None)
    return {"": text, **subs}


def _rope_rows(base: dict[str, Any], instruct: dict[str, Any], prefix: str) -> list[str]:
    """Return the rows of rotary parameters that differ, in whichever of the two ways each side writes them."""
    ours, theirs = _rope(base), _rope(instruct)
    if not ours or not theirs:
        return []
    keys = [key for key in sorted(ours.keys() | theirs.keys()) if ours.get(key) != theirs.get(key)]
    # a base frequency that one side leaves to its class's default cannot be compared
    keys = [key for key in keys if not key.endswith("rope_theta") or (key in ours and key in theirs)]
    return [both_sides(prefix + key, ours.get(key), theirs.get(key)) for key in keys]


def _rope(config: dict[str, Any]) -> dict[str, Any]:
    """Return rotary parameters as one flat dict, from `rope_parameters` or from `rope_theta` and `rope_scaling`."""
    new = config.get("rope_parameters")
    if isinstance(new, dict) and new:
        per_layer_type = {key: value for key, value in new.items() if isinstance(value, dict)}
        flat = {key: value for key, value in new.items() if key not in per_layer_type}
        flat.update(per_layer_type.pop("full_attention", {}))
        for kind, values in per_layer_type.items():
            flat.update({f"{kind}.{key}": value for key, value in values.items()})
    elif config.get("rope_theta") is not None or config.get("rope_scaling"):
        flat = {"rope_theta": config.get("rope_theta"), **(config.get("rope_scaling") or {})}
        if "type" in flat:
            flat.setdefault("rope_type", flat.pop("type"))
        if config.get("rope_local_base_freq") is not None:
            flat["sliding_attention.rope_theta"] = config["rope_local_base_freq"]
    else:
        return {}
    # "default" and "mrope" with sections are how files say that nothing is scaled
    plain = {key for key, value in flat.items() if key.endswith("rope_type") and value in ("default", "mrope")}
    return {key: value for key, value in flat.items() if value is not None and key not in plain and key != "type"}


def _flat(config: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return nested settings under dotted names."""
    rows: dict[str, Any] = {}
    for key, value in config.items():
        rows.update(_flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value})
    return rows
