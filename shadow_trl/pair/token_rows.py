"""Token rows of BASE and INSTRUCT: how many there are, and which both share."""

from __future__ import annotations

from ..checkpoints.checkpoint import Checkpoint
from ..checkpoints.weight_names import EMBEDDING_NAMES
from ..errors import PairMismatchError
from .vocabularies import Vocabulary
from .vocabulary_checks import VocabularyDifference, compare_vocabularies, vocabulary_difference

_NOT_TEXT = ("visual", "vision", "audio", "per_layer")


def embedding_name(checkpoint: Checkpoint) -> str | None:
    """Return the name of the text embedding on disk, None when no weight looks like one."""
    names = [name for name in checkpoint.specs if name.endswith(EMBEDDING_NAMES)]
    names = [name for name in names if not any(word in name for word in _NOT_TEXT)]
    return min((name for name in names if len(checkpoint.specs[name].shape) == 2), key=len, default=None)


def row_count(checkpoint: Checkpoint) -> int | None:
    """Return the number of token rows: of the embedding on disk, else `vocab_size` of the config, else None."""
    name = embedding_name(checkpoint)
    if name is not None:
        return int(checkpoint.specs[name].shape[0])
    config = {**checkpoint.config, **(checkpoint.config.get("text_config") or {})}
    size = config.get("vocab_size")
    return size if isinstance(size, int) else None


def vocabulary_of(checkpoint: Checkpoint) -> Vocabulary:
    """Return the tokenizer in the folder of `checkpoint`."""
    return Vocabulary(checkpoint.path, str(checkpoint))


def shared_rows(base: Checkpoint, instruct: Checkpoint) -> tuple[int, ...]:
    """Find the token rows that BASE and INSTRUCT share, for `--vocab shared`.

    Returns:
        Ids below both row counts with the same token, or without one, on both sides; in order.

    Raises:
        PairMismatchError: a side has no tokenizer or no embedding, or the same ids mean other ordinary tokens.

    """
    difference, counts = _compared(base, instruct)
    other = {*difference.renamed, *difference.base_only.values(), *difference.instruct_only.values()}
    return tuple(index for index in range(min(counts)) if index not in other)


def explain_rows(base: Checkpoint, instruct: Checkpoint) -> str:
    """Say which side has more token rows and what they are: tokens, or padding that belongs to no token.

    Raises:
        PairMismatchError: as `shared_rows`.

    """
    difference, (base_rows, instruct_rows) = _compared(base, instruct)
    longer, model = (instruct, "instruct") if instruct_rows > base_rows else (base, "base")
    extra, lines = range(*sorted((base_rows, instruct_rows))), []
    if extra:
        padding = len(extra) - sum(index in extra for index in vocabulary_of(longer).ids.values())
        kind = {0: "all of them tokens", len(extra): "padding that belongs to no token"}
        count = "1 more token row" if len(extra) == 1 else f"{len(extra)} more token rows"
        lines.append(f"The {model} model has {count} ({kind.get(padding, f'{padding} of them padding')}).")
    renamed = list(difference.renamed.values())
    for side, tokens in (
        ("instruct", [*(token for _, token in renamed), *difference.instruct_only]),
        ("base", [*(token for token, _ in renamed), *difference.base_only]),
    ):
        if tokens:
            more = f", ... and {len(tokens) - 10} more" if len(tokens) > 10 else ""
            lines.append(f"Only in {side}: {', '.join(map(repr, tokens[:10]))}{more}.")
    return " ".join(lines)


def _compared(base: Checkpoint, instruct: Checkpoint) -> tuple[VocabularyDifference, list[int]]:
    """Return how the vocabularies differ, and the numbers of token rows of BASE and INSTRUCT."""
    vocabularies, counts = (vocabulary_of(base), vocabulary_of(instruct)), []
    for side, count in zip(vocabularies, (row_count(base), row_count(instruct)), strict=True):
        if count is None or not side.exists:
            raise PairMismatchError(
                "cannot tell which token rows base and instruct share: "
                f"{side.label} has no {'embedding' if side.exists else 'tokenizer'}.\n"
                "Put both models' tokenizer files beside their weights."
            )
        counts.append(count)
    errors = compare_vocabularies(*vocabularies, shared=True).errors
    if errors:
        raise PairMismatchError("\n".join(errors))
    return vocabulary_difference(*vocabularies), counts
