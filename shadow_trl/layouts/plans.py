"""From weights that are matched on every side to a plan for each weight of the result."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from ..errors import PairMismatchError, list_names
from .matching import Sides, found_specs, left_out, side_rows
from .ties import Tie, config_edits, decide

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
        left_out: "role: name" of weights of BASE and TUNED that land nowhere; none of them has a delta.
        config_edits: key (dotted for a sub-config) -> value to set in INSTRUCT's config.json.
        converts: roles ("base", "instruct", "tuned") whose checkpoint must be rewritten before this plan holds; see
            `resolve`. With "instruct" among them the result has the layout in memory, else INSTRUCT's on disk.
        warnings: what the user should know.
    """

    tier: str
    weights: list[WeightPlan]
    left_out: list[str] = field(default_factory=list)
    config_edits: dict[str, Any] = field(default_factory=dict)
    converts: tuple[str, ...] = ()
    warnings: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Choices:
    """The user's choices: see `layouts.plan`."""

    vocab: str
    rows: Sequence[int] | None
    untie: bool
    wanted: Wanted


def build_layout(tier: str, sides: Sides, choices: Choices) -> Layout:
    """Put matched sides into a plan."""
    if choices.vocab == "strict":
        _check_rows(sides, choices.wanted)
    ties = {pair: _decide(sides, *pair, choices) for pair in sides.ties.items()}
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


def _decide(sides: Sides, alias: str, source: str, choices: Choices) -> Tie | None:
    names = [sides.instruct.names.get(key, key) for key in (alias, source)]
    return decide(sides, alias, source, untie=choices.untie) if any(map(choices.wanted, names)) else None


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
    if choices.rows is None or choices.vocab == "strict" or not sides.counts_rows(key):
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
        "as they are in instruct and graft the shared rows, pass --vocab shared. Nothing was written."
    )


def _notices(sides: Sides, plans: Iterable[WeightPlan], choices: Choices) -> list[str]:
    """Return what a plan does that nobody asked for in so many words."""
    plans = list(plans)
    notices = []
    unmatched = [plan.name for plan in plans if plan.copied and choices.wanted(plan.name)]
    if unmatched:
        notices.append(
            f"{len(unmatched)} weights of instruct are copied: they are whole numbers, or buffers and extra parts that "
            f"transformers does not load.\n{list_names(unmatched)}"
        )
    partial = [plan for plan in plans if plan.rows is not None]
    if partial:
        lines = [f"{plan.name}  {len(plan.rows or ())} rows grafted" for plan in partial]
        notices.append(f"only the token rows that both sides share are grafted.\n{list_names(lines)}")
    return notices
