"""Token rows of BASE and INSTRUCT: how many there are, and which both share."""

from __future__ import annotations

from dataclasses import dataclass

from ..checkpoints.checkpoint import Checkpoint
from ..checkpoints.weight_names import EMBEDDING_NAMES
from ..errors import PairMismatchError
from .vocabularies import Vocabulary
from .vocabulary_checks import compare_vocabularies, runs_of, vocabulary_difference

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


@dataclass(frozen=True)
class SharedRows:
    """Token rows that mean the same in BASE and INSTRUCT, and what the others are."""

    ids: tuple[int, ...]
    """Ids below both row counts with the same token on both sides; ids without a token on either side count as same."""
    base_rows: int
    instruct_rows: int
    base_only: tuple[str, ...]
    """Tokens that only BASE has."""
    instruct_only: tuple[str, ...]
    """Tokens that only INSTRUCT has."""
    padding: int
    """How many of the further rows on the longer side belong to no token."""

    @property
    def runs(self) -> list[range]:
        """`ids` as ranges of neighbours, for copying blocks of rows."""
        return runs_of(self.ids)

    def explanation(self) -> str:
        """Say which side has more rows and what they are: tokens, or padding that belongs to no token."""
        extra = self.instruct_rows - self.base_rows
        lines = []
        if extra:
            count = "1 more token row" if abs(extra) == 1 else f"{abs(extra)} more token rows"
            kind = {0: "all of them tokens", abs(extra): "padding that belongs to no token"}
            lines.append(
                f"The {'instruct' if extra > 0 else 'base'} model has {count} "
                f"({kind.get(self.padding, f'{self.padding} of them padding')})."
            )
        for side, tokens in (("instruct", self.instruct_only), ("base", self.base_only)):
            if tokens:
                shown = ", ".join(repr(token) for token in tokens[:10])
                more = f", ... and {len(tokens) - 10} more" if len(tokens) > 10 else ""
                lines.append(f"Only in {side}: {shown}{more}.")
        return " ".join(lines)


def shared_rows(base: Checkpoint, instruct: Checkpoint) -> SharedRows:
    """Find the token rows that BASE and INSTRUCT share, for `--vocab shared`.

    Raises:
        PairMismatchError: a side has no tokenizer or no embedding, or the same ids mean other ordinary tokens.

    """
    ours, theirs = vocabulary_of(base), vocabulary_of(instruct)
    counts = row_count(base), row_count(instruct)
    for side, count in ((ours, counts[0]), (theirs, counts[1])):
        if not side.exists or count is None:
            lacks = "tokenizer" if not side.exists else "embedding"
            raise PairMismatchError(
                f"cannot tell which token rows base and instruct share: {side.label} has no {lacks}.\n"
                "Put both models' tokenizer files beside their weights. Nothing was written."
            )
    findings = compare_vocabularies(ours, theirs, shared=True)
    if findings.errors:
        raise PairMismatchError("\n".join(findings.errors) + " Nothing was written.")
    base_rows, instruct_rows = int(counts[0] or 0), int(counts[1] or 0)
    difference = vocabulary_difference(ours, theirs)
    other = {one.id for one in difference.renamed}
    other |= {one.id for one in (*difference.base_only, *difference.instruct_only)}
    longer = theirs if instruct_rows > base_rows else ours
    low, high = sorted((base_rows, instruct_rows))
    with_token = sum(low <= index < high for index in longer.ids.values()) if high > low else 0
    return SharedRows(
        ids=tuple(index for index in range(low) if index not in other),
        base_rows=base_rows,
        instruct_rows=instruct_rows,
        base_only=(*(one.base_token for one in difference.renamed), *(one.token for one in difference.base_only)),
        instruct_only=(
            *(one.instruct_token for one in difference.renamed),
            *(one.token for one in difference.instruct_only),
        ),
        padding=high - low - with_token,
    )
