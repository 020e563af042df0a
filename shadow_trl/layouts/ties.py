"""Embeddings that serve as output head too. A head that is not on disk, or is an equal copy, is the embedding's weight.

A head with other numbers is a weight of its own, whatever the config says: that is how transformers loads it.
"""

from __future__ import annotations

from enum import Enum

from ..checkpoints.weight_names import is_tied
from ..errors import PairMismatchError
from .matching import Side, Sides, same_values


class Tie(Enum):
    """What the head of the result is."""

    APART = "INSTRUCT has a head of its own"
    ONE = "head and embedding stay one weight"
    UNTIED = "the head leaves the embedding"


def decide(sides: Sides, alias: str, source: str, *, untie: bool) -> Tie | None:
    """Return what becomes of the head `alias` of the embedding `source` (keys); None where no side stores both.

    Raises:
        PairMismatchError: the head has a delta of its own, INSTRUCT is tied and `untie` is off; or a side that claims
            not to be tied lacks one of the two weights.
    """
    everyone = [sides.instruct, *sides.trained]
    both = {side.role for side in everyone if alias in side.names and source in side.names}
    if not both:
        return None
    for side in everyone:
        present = alias in side.names or source in side.names
        if present and side.role not in both and is_tied(side.checkpoint.config) is False:
            lacking = source if alias in side.names else alias
            raise PairMismatchError(
                f"cannot graft: the config of {side.role} ({side.checkpoint}) says tie_word_embeddings false, but the "
                f"checkpoint has no {lacking}. Save it again with all of its weights."
            )
    if "instruct" in both:
        instruct = sides.instruct
        if is_tied(instruct.checkpoint.config) is False or not same_values(instruct, alias, instruct, source):
            return Tie.APART
    if _same_delta(sides, alias, source, both):
        return Tie.ONE
    if untie:
        return Tie.UNTIED
    raise PairMismatchError(
        f"cannot graft: the output head has a delta of its own, but the embedding of INSTRUCT is its head too.\n"
        f"  {alias}\n" + "\n".join(f"    {side.role:<9} {_state(side, alias, source)}" for side in everyone) + "\n"
        "To give the result a head of its own, pass --untie (tie_word_embeddings becomes false in its config); a "
        "trainer with graft=False leaves the graft to `shadow-trl graft`."
    )


def _same_delta(sides: Sides, alias: str, source: str, both: set[str]) -> bool:
    """Whether training moved head and embedding by the same delta, without computing one."""
    if all(same_values(side, alias, side, source) for side in sides.trained if side.role in both):
        return True
    base = sides.base
    if base is None or not both >= {"base", "tuned"}:
        return False
    return all(same_values(base, key, sides.tuned, key) for key in (alias, source))  # neither was trained


def _state(side: Side, alias: str, source: str) -> str:
    if alias in side.names and source in side.names:
        same = same_values(side, alias, side, source)
        return f"stored, {'equal to' if same else 'other than'} {side.names[source]}"
    return f"not stored apart from {side.names.get(source) or side.names.get(alias)}"


def config_edits(sides: Sides) -> dict[str, bool]:
    """Return the keys (dotted for a sub-config) of INSTRUCT's config.json that must become false for an untied head."""
    config = sides.instruct.checkpoint.config
    nested = [
        key
        for key, value in config.items()
        if isinstance(value, dict) and (key == "text_config" or value.get("tie_word_embeddings") is True)
    ]
    return dict.fromkeys(["tie_word_embeddings", *(f"{key}.tie_word_embeddings" for key in nested)], False)
