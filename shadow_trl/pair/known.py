"""Which BASE an INSTRUCT was made from: by the table of known pairs, else by the cards of INSTRUCT and its parents."""

from __future__ import annotations

import csv
import difflib
import functools
import logging
import re
from dataclasses import asdict, dataclass
from importlib.resources import files
from typing import Any

from ..checkpoints.hub import Source, local_folder, locate
from ..errors import CheckpointError, ConfigError
from ..results.cards import front_of

logger = logging.getLogger(__name__)

NOT_CHECKED = "not checked"
_LONGEST = 8
"""Models of a chain of cards; a longer one is no post-training that anybody has published."""
_STAGE = re.compile(r"(?i)(?<![a-z])(?:sft|dpo|kto|orpo|ppo|rlhf|rlvr\d*|instruct|chat|it)(?![a-z])")
"""In the name of a model that post-training made."""
_QUANTISED = re.compile(r"(?i)(?<![a-z])(?:awq|gptq|gguf|exl2|mlx|bnb|fp8|nvfp4|int[48]|[48]bit|w\da\d+)(?![a-z])")
_OTHER_RELATIONS = ("quantized", "merge", "adapter")


@dataclass(frozen=True)
class KnownPair:
    """A public pair.

    Args:
        base, instruct: on the hub.
        licence: as the hub calls it; "" where it was not looked up.
        licence_by: where that was read: `hub` for a page of the pair there, else the repository of its makers; or "".
        listed_by: where both names stand, separated by spaces: tools whose tables have them, or `card` for the card of
            INSTRUCT; "" where the names were not checked.
    """

    base: str
    instruct: str
    licence: str
    licence_by: str
    listed_by: str

    def shown(self) -> dict[str, str]:
        """Return the fields, with what is not known as `not checked`."""
        return {name: value or NOT_CHECKED for name, value in asdict(self).items()}


@functools.cache
def known_pairs() -> tuple[KnownPair, ...]:
    """Return the pairs of the table, by the name of BASE."""
    table = (files(__package__) / "known_pairs.csv").read_text(encoding="utf-8")
    return tuple(KnownPair(**row) for row in csv.DictReader(table.splitlines()))


def matching(text: str) -> list[KnownPair]:
    """Return the pairs of which a name has `text` in it, whatever its case."""
    return [pair for pair in known_pairs() if text.lower() in f"{pair.base} {pair.instruct}".lower()]


def near(text: str) -> list[str]:
    """Return up to five INSTRUCTs of the table whose names are most like `text`, punctuation and case aside."""

    def plain(name: str) -> str:
        return re.sub(r"[^a-z0-9]", "", name.rpartition("/")[2].lower())

    wanted, names = plain(text), [pair.instruct for pair in known_pairs()]
    inside = [name for name in names if wanted and wanted in plain(name)]
    # A filter is the start of a name: it is compared with as much of each, and a letter that may be missing in it.
    begins = {name: plain(name)[: len(wanted) + 1] for name in names}
    alike = difflib.get_close_matches(wanted, dict.fromkeys(begins.values()), n=5)
    ordered = [name for begin in alike for name in names if begins[name] == begin]
    return (inside or ordered)[:5]


def of_instruct(name: str) -> KnownPair | None:
    """Return the pair whose INSTRUCT is called `name`, with or without `@revision`; None for a folder."""
    if local_folder(name) is not None:
        return None
    return next((pair for pair in known_pairs() if pair.instruct == name.partition("@")[0]), None)


def find_base(instruct: Source) -> tuple[str, str]:
    """Return the BASE that an INSTRUCT was made from, and how that is known.

    Args:
        instruct: hub id, with `@revision` if wished, or a folder with a card.

    Raises:
        ConfigError: the table has no such INSTRUCT, and its card leads to no BASE, or to more than one.
    """
    name = str(instruct)
    if (pair := of_instruct(name)) is not None:
        return pair.base, "by the table of known pairs"
    chain = [name]
    while (parent := _parent(chain)) is not None:
        chain.append(parent)
        if _is_base(parent):
            break
        if (pair := of_instruct(parent)) is not None:
            chain.append(pair.base)
            break
    shown = " from ".join(chain)
    if len(chain) == 1:
        raise ConfigError(f"BASE of {instruct} is not known: no known pair has it, and its card names no base_model.")
    if between := [one for one in chain[1:-1] if not _STAGE.search(one) and of_instruct(one) is None]:
        raise ConfigError(f"BASE of {instruct} is not clear: by the cards {shown}, and {between[0]} may be it as well.")
    if _STAGE.search(chain[-1]) and not _is_base(chain[-1]):
        raise ConfigError(
            f"BASE of {instruct} is not known: by the cards {shown}, where the chain ends at a post-trained model."
        )
    return chain[-1], f"by the cards: {shown}"


def taken_base(instruct: Source | None, *, confirmed: bool, missing: str) -> str:
    """Return BASE where none was given, for the user who has confirmed that it may be looked up.

    Args:
        instruct: as for `find_base`; None where it is not known either.
        confirmed: whether the user wants what is found.
        missing: what was not given, as the user knows it.

    Raises:
        ConfigError: not confirmed, or not found.
    """
    if instruct is None:
        raise ConfigError(f"{missing} is missing, and no INSTRUCT is named by which it could be found.")
    if confirmed:
        try:
            found, how = find_base(instruct)
        except ConfigError as reason:
            raise ConfigError(f"{missing} is missing. {reason} Name it.") from reason
        logger.warning("BASE is %s, %s.", found, how)
        return found
    pair = of_instruct(str(instruct))
    known = f"{instruct} was made from {pair.base}, by the table of known pairs. Name it" if pair else "Name it"
    raise ConfigError(
        f"{missing} is missing. {known}, or pass find_base=True (--find-base, in a recipe --find_base) to take what is "
        f"{'known' if pair else 'found by the card of INSTRUCT'}."
    )


def _parent(chain: list[str]) -> str | None:
    """Return the model that the last of `chain` was made from, by its card; None where the card names none."""
    name = chain[-1]
    front = _front(name)
    parents = front.get("base_model") or []
    parents = parents if isinstance(parents, list) else [parents]
    relation = front.get("base_model_relation")
    if not parents:
        return None
    what = relation if relation in _OTHER_RELATIONS else None
    if len(parents) > 1:
        what = f"merge of {', '.join(map(str, parents))}"
    elif front.get("library_name") == "peft":
        what = "adapter"
    elif _QUANTISED.search(name.rpartition("/")[2]):
        what = "quantized"
    parent = str(parents[0])
    if what is not None:
        raise ConfigError(f"BASE of {chain[0]} is not known: by its card, {name} is another kind of model ({what}).")
    if parent in chain or len(chain) >= _LONGEST:
        raise ConfigError(f"BASE of {chain[0]} is not known: its cards lead from {' to '.join([*chain, parent])}.")
    return parent


def _front(name: str) -> dict[str, Any]:
    try:
        return front_of(locate(name, card=True).path)
    except CheckpointError as reason:
        raise ConfigError(f"the card of {name} cannot be read: {reason}") from reason


def _is_base(name: str) -> bool:
    return any(pair.base == name for pair in known_pairs())
