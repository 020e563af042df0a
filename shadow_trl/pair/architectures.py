"""Do the config.json files of BASE and INSTRUCT describe the same network?"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from ..checkpoints.json_files import read_json
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
CLASS = ("architectures", "model_type")
_TRAINED_LENGTH = "original_max_position_embeddings"
_ROPE_DEFAULTS = ("rope_theta", "partial_rotary_factor")
_PROCESSOR_NAMES = ("_type", "_class", "_version", "auto_map")


Values = dict[str, tuple[Any, Any]]


def compare_architectures(base: dict[str, Any], instruct: dict[str, Any]) -> Findings:
    """Compare two config.json objects, sub-configs (vision, audio) included.

    Another architecture or size is an error. Another rotary embedding, activation, norm epsilon, attention window or
    tied head is a warning. Settings that only one side states are not compared: the weights' shapes tell the rest.
    """
    findings = Findings()
    if sizes := {**_differing(base, instruct, CLASS), **_sizes(base, instruct)}:
        findings.errors.append(
            f"{_settings(sizes)} of config.json: base and instruct are different networks.\n{_listed(sizes)}\n"
            "Give the base that instruct was made from."
        )
    if behaviour := _behaviour(base, instruct):
        findings.warnings.append(
            f"{_settings(behaviour)} of config.json, so the same weights compute something else in base than in "
            f"instruct; training uses base's, the grafted model instruct's.\n{_listed(behaviour)}"
        )
    return findings


def compare_trained(
    base: dict[str, Any], instruct: dict[str, Any], tuned: dict[str, Any], role: str = "instruct"
) -> Findings:
    """Compare the config of TUNED with BASE's, of which it must be the same network, and with that of the result.

    The text class of a multimodal BASE is the same network: its config is compared with BASE's text config. A setting
    that TUNED has from BASE is left to `compare_architectures`.

    Args:
        base: config.json of BASE.
        instruct: config.json of INSTRUCT, which the result has too; BASE's again where there is no INSTRUCT yet.
        tuned: config.json of TUNED, or the config of the model in memory; {} compares nothing.
        role: of `instruct`, for the messages.
    """
    findings = Findings()
    other_class = {} if is_text_class(tuned, base) else _differing(base, tuned, CLASS)
    if sizes := {**other_class, **_sizes(base, tuned)}:
        findings.errors.append(
            f"{_settings(sizes)} of config.json: tuned is another network than base.\n"
            f"{_listed(sizes, ('base', 'tuned'))}\nGive the base that tuned was trained from."
        )
    known = {key: values[0] for key, values in _behaviour(base, instruct).items()}
    found = _behaviour(tuned, instruct)
    if behaviour := {key: values for key, values in found.items() if key not in known or known[key] != values[0]}:
        findings.warnings.append(
            f"{_settings(behaviour)} of config.json: tuned was trained with other settings than {role} has, "
            f"so that the grafted model computes something else.\n{_listed(behaviour, ('tuned', role))}"
        )
    return findings


def is_text_class(config: dict[str, Any], whole: dict[str, Any]) -> bool:
    """Whether `config` is that of the text-only class of the multimodal model whose config is `whole`."""
    text = whole.get("text_config")
    own = config.get("model_type")
    return isinstance(text, dict) and own not in (None, whole.get("model_type")) and own == text.get("model_type")


def compare_processors(base: Path, instruct: Path) -> Findings:
    """Warn about settings of the image and video processors that differ; training uses INSTRUCT's."""
    rows: Values = {}
    for name in PROCESSOR_FILES:
        ours, theirs = _flat(read_json(base / name)), _flat(read_json(instruct / name))
        keys = [key for key in sorted(ours) if not key.endswith(_PROCESSOR_NAMES)]
        rows |= _differing(ours, theirs, keys, f"{name}: ")
    if not rows:
        return Findings()
    headline = f"{_settings(rows)} of the processors; training and the grafted model use instruct's."
    return Findings(warnings=[f"{headline}\n{_listed(rows)}"])


def _settings(rows: Values) -> str:
    return "1 setting differs" if len(rows) == 1 else f"{len(rows)} settings differ"


def _listed(rows: Values, roles: tuple[str, str] = ("base", "instruct")) -> str:
    return list_names(both_sides(key, *values, roles) for key, values in rows.items())


def _differing(ours: dict[str, Any], theirs: dict[str, Any], keys: Iterable[str], prefix: str = "") -> Values:
    """Return the values of those of `keys` that both sides state and differ in."""
    values = {prefix + key: (ours.get(key), theirs.get(key)) for key in keys}
    return {key: pair for key, pair in values.items() if None not in pair and pair[0] != pair[1]}


def _sizes(ours: dict[str, Any], theirs: dict[str, Any]) -> Values:
    """Return the settings that make two networks different ones."""
    found: Values = {}
    for prefix, one, two in _both_parts(ours, theirs):
        found |= _differing(one, two, sorted(SIZES), prefix)
    return found


def _behaviour(ours: dict[str, Any], theirs: dict[str, Any]) -> Values:
    """Return the settings with which the same weights compute something else."""
    found: Values = {}
    for prefix, one, two in _both_parts(ours, theirs):
        found |= _differing(one, two, sorted(BEHAVIOUR), prefix) | _rope_rows(one, two, prefix)
        found |= _differing(one, two, ("tie_word_embeddings",), prefix)
    return found


def _both_parts(ours: dict[str, Any], theirs: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any], dict[str, Any]]]:
    one, two = _parts(ours), _parts(theirs)
    yield from ((f"{part}." if part else "", one[part], two[part]) for part in one.keys() & two.keys())


def _parts(config: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Split a config into its text part (name ""), at the top level or in `text_config`, and its other sub-configs."""
    subs = {key: value for key, value in config.items() if key.endswith("_config") and isinstance(value, dict)}
    top = {key: value for key, value in config.items() if key not in subs}
    text = {**top, **subs.pop("text_config", {})}
    if text.get("use_sliding_window") is False:
        text = {key: value for key, value in text.items() if key not in ("sliding_window", "max_window_layers")}
    subs.pop("quantization_config", None)
    return {"": text, **subs}


def _rope_rows(one: dict[str, Any], two: dict[str, Any], prefix: str) -> Values:
    """Return the rotary parameters that differ, in whichever of the two ways each side writes them."""
    ours, theirs = _rope(one), _rope(two)
    if not ours or not theirs:
        return {}
    keys = [key for key in sorted(ours.keys() | theirs.keys()) if ours.get(key) != theirs.get(key)]
    # what one side leaves to its class's default cannot be compared
    keys = [key for key in keys if not key.endswith(_ROPE_DEFAULTS) or (key in ours and key in theirs)]
    return {prefix + key: (ours.get(key), theirs.get(key)) for key in keys}


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
        flat = {"rope_theta": config.get("rope_theta"), **_object(config.get("rope_scaling"))}
        if "type" in flat:
            flat.setdefault("rope_type", flat.pop("type"))
        if config.get("rope_local_base_freq") is not None:
            flat["sliding_attention.rope_theta"] = config["rope_local_base_freq"]
    else:
        return {}
    flat.setdefault("partial_rotary_factor", config.get("partial_rotary_factor"))
    _add_lengths(flat, config)
    # "default" and "mrope" with sections are how files say that nothing is scaled
    plain = {key for key, value in flat.items() if key.endswith("rope_type") and value in ("default", "mrope")}
    return {key: value for key, value in flat.items() if value is not None and key not in plain and key != "type"}


def _object(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _add_lengths(flat: dict[str, Any], config: dict[str, Any]) -> None:
    """Add the lengths that a scaled rotary embedding takes from elsewhere in the config, as transformers reads them."""
    kind, longest = flat.get("rope_type"), config.get("max_position_embeddings")
    if kind in ("llama3", "yarn", "longrope"):
        stated = (config.get(_TRAINED_LENGTH), flat.get(_TRAINED_LENGTH), longest)
        flat[_TRAINED_LENGTH] = next((length for length in stated if length is not None), None)
    if kind == "dynamic" or (kind in ("yarn", "longrope") and flat.get("factor") is None):
        flat["max_position_embeddings"] = longest


def _flat(config: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return nested settings under dotted names."""
    rows: dict[str, Any] = {}
    for key, value in config.items():
        rows.update(_flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value})
    return rows
