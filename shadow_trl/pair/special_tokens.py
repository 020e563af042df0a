"""Special tokens of INSTRUCT in BASE: which ids are they, and are there rows for them? No weight is read."""

from __future__ import annotations

from ..checkpoints.checkpoint import Checkpoint
from ..checkpoints.json_files import read_json
from ..checkpoints.schemas import ModelConfig
from ..errors import Findings, list_names
from .templates import read_templates, template_tokens
from .token_rows import row_count, vocabulary_of
from .vocabularies import NAMED_TOKENS, Vocabulary

_ROLES = (*(f"{role}_id" for role in NAMED_TOKENS), "decoder_start_token_id")


def special_ids(checkpoint: Checkpoint, vocabulary: Vocabulary) -> dict[str, int]:
    """Return the ids that using INSTRUCT needs, by where they come from.

    These are the ids of the special roles (bos, eos, pad, ...) in generation_config.json, config.json and
    tokenizer_config.json, and of the tokens in the chat templates. Ids of images or sounds are left out: models replace
    them before they look anything up.
    """
    found: dict[str, int | None] = {}
    generation = read_json(checkpoint.path / "generation_config.json", ModelConfig)
    for file, config in (("generation_config.json", generation), ("config.json", checkpoint.config)):
        for role in _ROLES:
            values = config.get(role) if isinstance(config.get(role), list) else [config.get(role)]
            # files write -1 for "none"
            ids = [value for value in values or [] if isinstance(value, int) and value >= 0]
            found.update({f"{role}{f' ({value})' if len(ids) > 1 else ''} of {file}": value for value in ids})
    if vocabulary.exists:
        for role, token in vocabulary.named.items():
            found[f"{role} {token!r} of the tokenizer"] = vocabulary.id_of(token)
        for token in template_tokens(read_templates(checkpoint.path), vocabulary.added, vocabulary.named):
            found[f"{token!r} of the chat template"] = vocabulary.added[token]
    return {name: index for name, index in found.items() if index is not None}


def check_special_ids(base: Checkpoint, instruct: Checkpoint) -> Findings:
    """Refuse a pair in which INSTRUCT uses token ids for which BASE has no embedding row."""
    rows = row_count(base)
    ids = special_ids(instruct, vocabulary_of(instruct))
    outside = [f"id {index}  {name}" for name, index in ids.items() if rows is not None and index >= rows]
    if not outside:
        return Findings()
    verb = "special id of instruct has" if len(outside) == 1 else "special ids of instruct have"
    way_out = "Give the base that instruct was made from, or one whose embedding was resized to instruct's vocabulary."
    headline = f"{len(outside)} {verb} no row in base's embedding of {rows} rows."
    return Findings(errors=[f"{headline}\n{list_names(outside)}\n{way_out}"])
