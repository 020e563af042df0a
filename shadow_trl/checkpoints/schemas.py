"""What each JSON file of a checkpoint must be, as far as this package reads it; other keys are not looked at.

Keys may be missing or have other values than PEFT's or transformers' own classes accept: those check what they read.
"""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal, Required, TypedDict

from .json_files import Rule, is_file_name

_MAX = 2**63

Count = Annotated[int, Rule("a whole number from 0 on", lambda value: 0 <= value < _MAX)]
Positive = Annotated[int, Rule("a whole number above 0", lambda value: 0 < value < _MAX)]
Id = Annotated[int, Rule("a whole number", lambda value: -_MAX <= value < _MAX)]
Names = str | list[str] | None
Dtype = Literal["tuned", "float64", "float32", "bfloat16", "float16"]
"""In which BASE was loaded for training; `tuned`: that of TUNED."""
Path = Annotated[str, Rule("the path of a file or folder", lambda name: bool(name) and "\0" not in name)]
Digests = Annotated[
    dict[str, str],
    Rule("names of files in the folder, each with its digest", lambda found: all(map(is_file_name, found))),
]

TokensById = Annotated[
    dict[str, str | dict[str, Any]],
    Rule("tokens by their ids", lambda found: all(re.fullmatch(r"[0-9]{1,18}", text) for text in found)),
]


class Index(TypedDict, total=False):
    """`model.safetensors.index.json` and the like."""

    metadata: dict[str, Any] | None
    weight_map: Required[dict[str, str]]


class ModelConfig(TypedDict, total=False):
    """`config.json`, and the parts of it that have settings of their own; generation_config.json has the ids alone."""

    model_type: str | None
    architectures: list[str] | None
    vocab_size: Count | None
    tie_word_embeddings: bool | None
    text_config: ModelConfig | None
    rope_parameters: dict[str, Any] | None
    rope_scaling: dict[str, Any] | None
    quantization_config: dict[str, Any] | str | None
    bos_token_id: Id | list[Id] | None
    eos_token_id: Id | list[Id] | None
    pad_token_id: Id | list[Id] | None
    decoder_start_token_id: Id | list[Id] | None


class AdapterConfig(TypedDict, total=False):
    """`adapter_config.json` of PEFT."""

    peft_type: Required[str]
    base_model_name_or_path: Path | Literal[""] | None
    revision: str | None
    r: Count | None
    lora_alpha: float | None
    rank_pattern: dict[str, Positive | list[bool]] | None  # of AdaLoRA: which ranks are left
    alpha_pattern: dict[str, float] | None
    use_rslora: bool | None
    use_dora: bool | None
    fan_in_fan_out: bool | None
    ensure_weight_tying: bool | None
    bias: str | None
    init_lora_weights: bool | str | None
    target_modules: Names
    exclude_modules: Names
    modules_to_save: Names
    target_parameters: Names
    layers_pattern: Names
    layers_to_transform: Count | list[Count] | None
    token_indices: list[Count] | None
    trainable_token_indices: list[Count] | dict[str, list[Count]] | None


class Side(TypedDict, total=False):
    """What a manifest says of one side."""

    source: Required[Path]
    revision: str | None
    digests: Digests | None
    folder: bool | None
    asked: str | None


class Manifest(TypedDict, total=False):
    """`shadow.json` of any kind, less its sides: those are `Side`, by role."""

    kind: Required[Literal["run", "graft", "delta"]]
    format: Count


class Trained(TypedDict, total=False):
    """How a run was trained."""

    trainer: str
    ref_policy: str | None
    training: dict[str, Any]
    datasets: list[str]
    scores: dict[str, float]


class Run(Manifest, Trained, total=False):
    """The manifest of a run or of one of its checkpoints."""

    options: dict[str, Any]
    weights: Digests | None
    loaded_in: list[Dtype]
    lifted: bool
    quantised: str | None


class Graft(Manifest, total=False):
    """The manifest of a graft."""

    form: Required[Literal["model", "adapter"]]
    options: Required[dict[str, Any]]
    tuned_weights: list[float] | None
    trained: Trained
    loaded_in: list[Dtype] | None
    files: list[str]
    card: str
    warnings: list[str]
    by_kind: dict[str, Any]
    delta_norm: float | None


class Delta(Manifest, total=False):
    """The manifest of a delta."""

    form: Required[Literal["delta", "adapter"]]
    base: Required[Side]
    tuned: Required[Side]
    without_delta: list[str]
    files: list[str]


class TokenizerConfig(TypedDict, total=False):
    """`tokenizer_config.json`; special_tokens_map.json has the special tokens alone."""

    added_tokens_decoder: TokensById
    chat_template: str | list[dict[str, Any]] | dict[str, Any] | None
    bos_token: str | dict[str, Any] | None
    eos_token: str | dict[str, Any] | None
    unk_token: str | dict[str, Any] | None
    sep_token: str | dict[str, Any] | None
    pad_token: str | dict[str, Any] | None
    cls_token: str | dict[str, Any] | None
    mask_token: str | dict[str, Any] | None
    extra_special_tokens: list[str | dict[str, Any]] | dict[str, Any] | None
    additional_special_tokens: list[str | dict[str, Any]] | None


class StoredToken(TypedDict, total=False):
    """One of the `added_tokens` of tokenizer.json."""

    content: Required[str]
    id: Required[Count]


Piece = Annotated[
    list[Any], Rule("a token with its score", lambda piece: len(piece) == 2 and isinstance(piece[0], str))
]
"""One of the `vocab` of tokenizer.json, where that is a list."""

AddedTokens = dict[str, Count]
"""`added_tokens.json`."""
