"""Which weight of BASE and TUNED belongs to which weight of INSTRUCT, whatever each file calls it.

Three tiers, the first that fits: equal names; names that transformers renames on load (prefixes of vision-language
models, legacy spellings); layouts that transformers converts (single experts against fused ones). Only the last two
import transformers.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..checkpoints.checkpoint import Checkpoint
from ..errors import ConfigError, PairMismatchError
from ..results.folder import check_space
from .matching import Problems, Side, Sides, embedding_ties, mismatches
from .plans import Choices, Layout, Wanted, WeightPlan, build_layout

if TYPE_CHECKING:
    from .model_names import ModelNames

__all__ = ["Layout", "WeightPlan", "disk_names", "plan", "resolve"]


def plan(
    base: Checkpoint | None,
    instruct: Checkpoint,
    tuned: Checkpoint,
    *,
    vocab: str = "strict",
    rows: Sequence[int] | None = None,
    untie: bool = False,
    wanted: Wanted = lambda name: True,
) -> Layout:
    """Find for every weight of INSTRUCT the weights of BASE and TUNED that make its delta.

    Reads headers and configs; values only where they decide: stored copies of tied embeddings, weights that INSTRUCT
    lacks, and whole numbers.

    Args:
        base: BASE, or None when `tuned` holds the delta itself.
        instruct: INSTRUCT; its names and order are those of the result.
        tuned: BASE after training.
        vocab: "strict" refuses another number of token rows; "shared" grafts `rows` and copies the others.
        rows: token ids that mean the same on both sides; needed for "shared".
        untie: give a tied INSTRUCT a head of its own when training gave the head a delta of its own; where the layout's
            `config_edits` stay empty there was no need.
        wanted: says of an on-disk name whether the weight is to be grafted; others are copied and never an error.

    Returns:
        Layout: its `converts` is empty when it can be carried out as it is; see `resolve`.

    Raises:
        PairMismatchError: a weight that cannot be grafted (all of them are named), token rows that differ, or a head
            with a delta of its own on a tied INSTRUCT.
        ConfigError: an option has a value that it cannot have.
    """
    if vocab not in ("strict", "shared"):
        raise ConfigError(f"vocab must be 'strict' or 'shared', not {vocab!r}.")
    if vocab == "shared" and rows is None:
        raise ConfigError("vocab 'shared' needs the ids of the rows that both sides have.")
    choices = Choices(vocab, None if rows is None else sorted(set(rows)), untie, wanted)
    checkpoints = {"instruct": instruct, "tuned": tuned} | ({} if base is None else {"base": base})
    sides = _equal(checkpoints)
    problems = mismatches(sides, wanted)
    if not problems:
        return build_layout("equal", sides, choices)
    return _plan_by_transformers(checkpoints, choices, problems)


def resolve(
    base: Checkpoint | None, instruct: Checkpoint, tuned: Checkpoint, *, scratch: Path | None, **options: Any
) -> tuple[Layout, dict[str, Checkpoint]]:
    """Plan, and rewrite in `scratch` what must be converted first.

    Args:
        base: as for `plan`, and so are the next two.
        instruct: receives the delta.
        tuned: BASE after training.
        scratch: folder for converted copies; created only if one is needed, the caller removes it. None converts
            nothing: `converts` of the layout says what would have to be, and its names are those after converting.
        options: as for `plan`.

    Returns:
        The layout, and role -> checkpoint that its names are to be read from. Tokenizer, config and the other small
        files of INSTRUCT stay in the checkpoint given.

    Raises:
        PairMismatchError, ConfigError: as `plan` does.
        GraftError: the disk has no room for the converted copies.
    """
    checkpoints = {"instruct": instruct, "tuned": tuned} | ({} if base is None else {"base": base})
    layout = plan(base, instruct, tuned, **options)
    if not layout.converts or scratch is None:
        return layout, checkpoints
    from .model_names import ModelNames, normalise

    check_space(scratch, sum(spec.nbytes for role in layout.converts for spec in checkpoints[role].specs.values()))
    names = ModelNames(instruct)
    like = None if "instruct" in layout.converts else list(instruct.specs)
    copies: dict[int, Checkpoint] = {}  # BASE may stand in for TUNED: one copy is enough
    for role in layout.converts:
        one = checkpoints[role]
        if id(one) not in copies:
            copies[id(one)] = normalise(one, scratch / role, names=names, like=like)
        checkpoints[role] = copies[id(one)]
    again = plan(checkpoints.get("base"), checkpoints["instruct"], checkpoints["tuned"], **options)
    if again.converts:
        raise PairMismatchError(f"converting {', '.join(layout.converts)} did not make the layouts equal.")
    warnings = list(dict.fromkeys([*layout.warnings, *again.warnings]))
    return replace(again, tier="converted", converts=layout.converts, warnings=warnings), checkpoints


def disk_names(checkpoint: Checkpoint, names: Iterable[str]) -> dict[str, str]:
    """Return name -> on-disk name in `checkpoint` of the weights that transformers knows by `names` (imported here).

    Args:
        checkpoint: whose names are wanted.
        names: in-memory names, as adapters have them, or names in an older spelling.

    Returns:
        an entry for each name that is a weight on disk, renamed at most; others are left out.

    Raises:
        PairMismatchError: transformers has no class for the checkpoint's config.
    """
    from .model_names import ModelNames

    known = ModelNames(checkpoint)
    on_disk, wanted = known.keys(checkpoint.specs), known.keys(names)
    return {name: on_disk[key] for key, name in wanted.items() if key in on_disk}


def _equal(checkpoints: dict[str, Checkpoint]) -> Sides:
    """Take the names as they are."""
    made = {role: Side(role, c, {name: name for name in c.specs}, c.specs) for role, c in checkpoints.items()}
    ties = embedding_ties(name for checkpoint in checkpoints.values() for name in checkpoint.specs)
    return Sides(made["instruct"], made["tuned"], made.get("base"), ties)


def _plan_by_transformers(checkpoints: dict[str, Checkpoint], choices: Choices, problems: Problems) -> Layout:
    """Plan with the names and layouts of transformers, `problems` being what the plain names left open."""
    from .model_names import ModelNames

    try:
        names = ModelNames(checkpoints["instruct"])
    except PairMismatchError as error:
        raise problems.error(str(error)) from error
    sides = _renamed(names, checkpoints, {})
    problems = mismatches(sides, choices.wanted)
    if not problems:
        return build_layout("renamed", sides, choices)
    failures = []
    for like in (list(checkpoints["instruct"].specs), None):
        try:
            converted = _conversions(names, checkpoints, like)
            sides = _renamed(names, checkpoints, converted)
        except PairMismatchError as error:
            failures.append(str(error))
            continue
        if converted and not mismatches(sides, choices.wanted):
            layout = build_layout("converted", sides, choices)
            notices = [_notice_of(role, checkpoints[role], like) for role in sorted(converted)]
            return replace(layout, converts=tuple(sorted(converted)), warnings=[*layout.warnings, *notices])
    raise problems.error("\n".join(dict.fromkeys(failures)))


def _notice_of(role: str, checkpoint: Checkpoint, like: list[str] | None) -> str:
    size = sum(spec.nbytes for spec in checkpoint.specs.values()) / 1e9
    where = "instruct's layout" if like is not None else "the layout that transformers has in memory"
    return f"{role} {checkpoint} has another layout of weights: a copy of {size:.1f} GB in {where} is made first."


def _conversions(names: ModelNames, checkpoints: dict[str, Checkpoint], like: list[str] | None) -> dict[str, Any]:
    """Return role -> predicted specs of the checkpoints that are not in the layout of `like` yet."""
    from .model_names import predicted

    converted = {}
    for role, checkpoint in checkpoints.items():
        if like is not None and checkpoint.specs.keys() == set(like):
            continue
        specs = predicted(names, checkpoint, like)
        here = {name: spec.shape for name, spec in checkpoint.specs.items()}
        if here != {name: spec.shape for name, spec in specs.items()}:
            converted[role] = specs
    return converted


def _renamed(names: ModelNames, checkpoints: dict[str, Checkpoint], converted: dict[str, Any]) -> Sides:
    """Take the names as transformers reads them, of predicted weights where a checkpoint is to be converted."""
    made = {}
    for role, checkpoint in checkpoints.items():
        specs = converted.get(role, checkpoint.specs)
        of_name = {name: key for key, name in names.keys(specs).items()}
        keys = {of_name[name]: name for name in specs}
        made[role] = Side(role, checkpoint, keys, {k: specs[n] for k, n in keys.items()}, role not in converted)
    return Sides(made["instruct"], made["tuned"], made.get("base"), names.ties, names.ignores)
