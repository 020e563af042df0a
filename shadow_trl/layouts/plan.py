"""Which weight of BASE and TUNED belongs to which weight of INSTRUCT, whatever each file calls it.

The first that fits: equal names; names that transformers renames on load (legacy spellings); layouts that it converts
(single experts against fused ones). Only the last two import transformers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from ..checkpoints.checkpoint import Checkpoint
from ..checkpoints.delta import DeltaCheckpoint
from ..errors import PairMismatchError, list_names
from ..pair.architectures import is_text_class
from ..runtime.machine import check_space
from .matching import Side, Sides, embedding_ties, found_specs, left_out, mismatch_error, mismatches, side_rows
from .ties import Tie, config_edits, decide

if TYPE_CHECKING:
    from .model_names import ModelNames

Wanted = Callable[[str], bool]


@dataclass(frozen=True)
class WeightPlan:
    """Where one weight of the result comes from; names are on-disk names of each side.

    Args:
        name: name in the result.
        instruct: name of the weight of INSTRUCT that receives the delta. It differs from `name` only for the head of a
            tied model. Random rounding must draw by this name, so that two copies of one weight stay equal.
        base: name in BASE. None together with `tuned`: the weight is copied. None alone: TUNED holds a delta itself.
        tuned: name in TUNED.
        rows: None for the whole tensor; else the rows (sorted token ids) that receive the delta, the others are copied.
    """

    name: str
    instruct: str
    base: str | None
    tuned: str | None
    rows: tuple[int, ...] | None = None

    @property
    def copied(self) -> bool:
        """Whether the weight stays as it is in INSTRUCT."""
        return self.tuned is None


@dataclass(frozen=True)
class Layout:
    """What to do for every weight of the result.

    Args:
        tier: "equal", "renamed" or "converted".
        weights: plans in the order of INSTRUCT's files; a new weight (an untied head) comes last.
        left_out: "role: name" of weights of BASE and TUNED without a matching weight; none of them has a delta.
        config_edits: key (dotted for a sub-config) -> value to set in INSTRUCT's config.json.
        converts: roles ("base", "instruct", "tuned") whose checkpoint must be rewritten before this plan holds; see
            `resolve`. With "instruct" among them the result has the layout in memory, else INSTRUCT's on disk.
        warnings: what the user should know.
        sides: role -> checkpoint from which the names are to be read, in the layout that `resolve` returns.
    """

    tier: str
    weights: list[WeightPlan]
    left_out: list[str] = field(default_factory=list)
    config_edits: dict[str, Any] = field(default_factory=dict)
    converts: tuple[str, ...] = ()
    warnings: list[str] = field(default_factory=list)
    sides: Mapping[str, Checkpoint] = field(default_factory=dict)


class Choices(NamedTuple):
    """The user's choices, see `resolve`."""

    rows: list[int] | None
    untie: bool
    wanted: Wanted


def resolve(
    base: Checkpoint | None,
    instruct: Checkpoint,
    tuned: Checkpoint,
    *,
    scratch: Path | None = None,
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
        scratch: folder for copies in another layout; made only if one is needed, removed by the caller. Default: none
            are made, the layout's `converts` says which would be, and its names are those after converting.
        rows: token ids that mean the same on both sides: these rows are grafted, the others copied. Default: another
            number of token rows is refused.
        untie: give a tied INSTRUCT a head of its own when training gave the head a delta of its own; where the layout's
            `config_edits` stay empty there was no need.
        wanted: whether the weight of an on-disk name is to be grafted; others are copied and never an error.

    Raises:
        PairMismatchError: a weight that cannot be grafted (all of them are named), token rows that differ, or a head
            with a delta of its own on a tied INSTRUCT.
        GraftError: the disk has no room for the converted copies.
    """
    choices = Choices(None if rows is None else sorted(set(rows)), untie, wanted)
    checkpoints = {"instruct": instruct, "tuned": tuned} | ({} if base is None else {"base": base})
    layout = _plan(checkpoints, choices)
    if not layout.converts or scratch is None:
        return replace(layout, sides=checkpoints)
    from .model_names import ModelNames, normalise

    check_space(scratch, sum(spec.nbytes for role in layout.converts for spec in checkpoints[role].specs.values()))
    names = ModelNames(_named_by(checkpoints))
    like = None if "instruct" in layout.converts else list(instruct.specs)
    copies: dict[int, Checkpoint] = {}  # BASE may stand in for TUNED: one copy is enough
    for role in layout.converts:
        one = checkpoints[role]
        if id(one) not in copies:
            copies[id(one)] = normalise(one, scratch / role, names=names, like=like)
        checkpoints[role] = copies[id(one)]
    again = _plan(checkpoints, choices)
    if again.converts:
        raise PairMismatchError(f"converting {', '.join(layout.converts)} did not make the layouts equal.")
    warnings = list(dict.fromkeys([*layout.warnings, *again.warnings]))
    return replace(again, tier="converted", converts=layout.converts, warnings=warnings, sides=checkpoints)


def _plan(checkpoints: dict[str, Checkpoint], choices: Choices) -> Layout:
    """Plan with the names as they are or, where these do not match, with the names and layouts of transformers."""
    ties = embedding_ties(name for checkpoint in checkpoints.values() for name in checkpoint.specs)
    made = {role: Side(role, c, {name: name for name in c.specs}, c.specs) for role, c in checkpoints.items()}
    sides = Sides(made["instruct"], made["tuned"], made.get("base"), ties, unknown=_absent(checkpoints["tuned"]))
    problems = mismatches(sides, choices.wanted)
    if not problems:
        return _build("equal", sides, choices)
    from .model_names import ModelNames

    try:
        names = ModelNames(_named_by(checkpoints))
    except PairMismatchError as error:
        raise mismatch_error(problems, str(error)) from error
    sides = _renamed(names, checkpoints, {})
    problems = mismatches(sides, choices.wanted)
    if not problems:
        return _build("renamed", sides, choices)
    failures = []
    whole = _named_by(checkpoints) is checkpoints["instruct"]
    for like in (list(checkpoints["instruct"].specs), None) if whole else (list(checkpoints["instruct"].specs),):
        try:
            converted = _conversions(names, checkpoints, like)
            sides = _renamed(names, checkpoints, converted)
        except PairMismatchError as error:
            failures.append(str(error))
            continue
        if converted and not mismatches(sides, choices.wanted):
            layout = _build("converted", sides, choices)
            notices = [_notice_of(role, checkpoints[role], like) for role in sorted(converted)]
            return replace(layout, converts=tuple(sorted(converted)), warnings=[*layout.warnings, *notices])
    raise mismatch_error(problems, "\n".join(dict.fromkeys(failures)))


def _named_by(checkpoints: dict[str, Checkpoint]) -> Checkpoint:
    """Return the checkpoint whose class names the weights: INSTRUCT, or TUNED where it is the text-only class of it."""
    tuned, instruct = checkpoints["tuned"], checkpoints["instruct"]
    return tuned if is_text_class(tuned.config, instruct.config) else instruct


def _absent(tuned: Checkpoint) -> frozenset[str]:
    return tuned.absent if isinstance(tuned, DeltaCheckpoint) else frozenset()


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
    if "base" in made:
        unknown = names.unknown(made["base"].names.values())
    else:
        unknown = frozenset(names.keys(_absent(checkpoints["tuned"])))
    return Sides(made["instruct"], made["tuned"], made.get("base"), names.ties, names.ignores, unknown)


def _build(tier: str, sides: Sides, choices: Choices) -> Layout:
    """Put matched sides into a plan."""
    if choices.rows is None:
        _check_rows(sides, choices.wanted)
    ties = {
        pair: decide(sides, *pair, untie=choices.untie)
        for pair in sides.ties.items()
        if any(choices.wanted(sides.instruct.names.get(key, key)) for key in pair)
    }
    plans = {key: _plan_weight(sides, key, choices) for key in sides.instruct.names}
    edits: dict[str, Any] = {}
    for (alias, source), tie in ties.items():
        stored = [key for key in (alias, source) if key in plans]
        if tie is Tie.ONE and len(stored) == 2:
            plans[alias] = replace(plans[source], name=sides.instruct.names[alias])
        elif tie is Tie.UNTIED:
            edits.update(config_edits(sides))
            if len(stored) == 1:
                new = alias if stored == [source] else source
                receiver = sides.instruct.names[stored[0]]
                plans[new] = replace(_plan_weight(sides, new, choices), name=new, instruct=receiver)
    warnings = _notices(sides, plans.values(), choices)
    lost = [f"{side.role}: {side.names[key]}" for side in sides.trained for key in left_out(sides, side)]
    return Layout(tier, list(plans.values()), lost, edits, (), warnings)


def _plan_weight(sides: Sides, key: str, choices: Choices) -> WeightPlan:
    name = sides.instruct.names.get(key, key)
    disk = {}
    for side in sides.trained if choices.wanted(name) else ():
        found = sides.find(side, key)
        if found is not None and side.specs[found].is_float:
            disk[side.role] = side.names[found]
    if len(disk) < len(sides.trained):
        return WeightPlan(name, name, None, None)
    return WeightPlan(name, name, disk.get("base"), disk["tuned"], _rows(sides, key, choices))


def _rows(sides: Sides, key: str, choices: Choices) -> tuple[int, ...] | None:
    """Return the token rows to graft, None for all."""
    if choices.rows is None or not sides.counts_rows(key):
        return None
    counts = [spec.shape[0] for spec in found_specs(sides, key).values()]
    ids = tuple(row for row in choices.rows if row < min(counts))
    return None if len(ids) == min(counts) == max(counts) else ids


def _check_rows(sides: Sides, wanted: Wanted) -> None:
    """Refuse sides with different numbers of token rows."""
    keys = [
        key for key, name in sides.instruct.names.items()
        if sides.counts_rows(key) and wanted(name)
        and len({spec.shape for spec in found_specs(sides, key).values()}) > 1
    ]  # fmt: skip
    if not keys:
        return
    rows = {role: spec.shape[0] for role, spec in found_specs(sides, keys[0]).items()}
    extra = rows["instruct"] - rows["tuned"]
    count = f"{abs(extra)} {'more' if extra > 0 else 'fewer'} token row{'s' if abs(extra) != 1 else ''} than tuned"
    what = f"The instruct model has {count}." if extra else "Base has another number of token rows."
    raise PairMismatchError(
        f"cannot graft: {len(keys)} of {len(sides.instruct.names)} weights differ in shape between the sides.\n"
        f"{list_names(side_rows(sides, key, 'shape') for key in keys)}\n{what} To keep the rows that only one side has "
        "as they are in instruct and graft the shared rows, pass --vocab shared."
    )


def _notices(sides: Sides, plans: Iterable[WeightPlan], choices: Choices) -> list[str]:
    """Return what a plan does that nobody asked for in so many words."""
    plans = list(plans)
    notices = []
    unmatched = [plan.name for plan in plans if plan.copied and choices.wanted(plan.name)]
    if unmatched:
        notices.append(
            f"{len(unmatched)} weights of instruct are copied: they are whole numbers, or buffers and parts that the "
            f"model that was trained does not have.\n{list_names(unmatched)}"
        )
    return [*notices, *notice_of_rows({plan.name: plan.rows for plan in plans})]


def notice_of_rows(rows: Mapping[str, Sequence[int] | None]) -> list[str]:
    """Return what to say of weights of which some token rows are grafted; None of a weight stands for all rows."""
    lines = [f"{name}  {len(ids)} rows grafted" for name, ids in rows.items() if ids is not None]
    return [f"only the token rows that both sides share are grafted.\n{list_names(lines)}"] if lines else []
