"""Match the weights of BASE and TUNED to those of INSTRUCT under keys that already mean the same on every side."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Set
from dataclasses import dataclass

from ..checkpoints.checkpoint import Checkpoint, Place
from ..checkpoints.header import TensorSpec
from ..checkpoints.weight_names import COMPUTED_ON_LOAD, EMBEDDING_NAMES, HEAD_NAMES, TOKEN_NAMES
from ..errors import PairMismatchError, list_names

BLOCK = 2**22
"""Elements that are compared at a time."""


@dataclass
class Announced(Checkpoint):
    """A checkpoint that does not exist yet: names and shapes are known, the values are BASE's where nothing is trained.

    Args:
        trained: names of the weights that training will change.
    """

    trained: frozenset[str] = frozenset()


@dataclass(frozen=True, eq=False)
class Side:
    """One checkpoint under keys that mean the same weight on every side.

    Args:
        role: "base", "instruct" or "tuned".
        checkpoint: where the values are.
        names: key -> name on disk, in the order of the files.
        specs: key -> shape and dtype.
        readable: False where names and shapes are only predicted and no values can be compared yet.
    """

    role: str
    checkpoint: Checkpoint
    names: Mapping[str, str]
    specs: Mapping[str, TensorSpec]
    readable: bool = True


@dataclass
class Sides:
    """The checkpoints of a graft and which keys are two names of one weight.

    Args:
        instruct: receives the delta.
        tuned: BASE after training, or a delta when there is no base.
        base: BASE before training, or None.
        ties: key of a head -> key of the embedding whose weight it may share.
        ignores: says of a key that transformers drops it on load by a rule of the architecture.
        unknown: keys of BASE that the model that was trained has no weight for.
    """

    instruct: Side
    tuned: Side
    base: Side | None
    ties: Mapping[str, str]
    ignores: Callable[[str], bool] = lambda key: False
    unknown: Set[str] = frozenset()

    def __post_init__(self) -> None:
        self._partners: dict[str, list[str]] = {}
        for alias, source in self.ties.items():
            self._partners.setdefault(alias, []).append(source)
            self._partners.setdefault(source, []).append(alias)

    @property
    def trained(self) -> list[Side]:
        """The sides that make the delta."""
        return [self.tuned] if self.base is None else [self.base, self.tuned]

    def find(self, side: Side, key: str) -> str | None:
        """Return the key under which `side` stores the weight `key`: itself, else one that it is tied to, else None."""
        if key in side.names:
            return key
        return next((name for name in self._partners.get(key, ()) if name in side.names), None)

    def dropped(self, key: str) -> bool:
        """Whether loading drops `key`, so that a trained checkpoint need not have it.

        What the class of TUNED does not know may be missing in TUNED; that TUNED or INSTRUCT alone has it is no such
        case, for there somebody added a weight.
        """
        if COMPUTED_ON_LOAD.search(key) or self.ignores(key):
            return True
        there = self.base is None or key in self.base.names
        return key in self.unknown and there and key not in self.tuned.names

    def counts_rows(self, key: str) -> bool:
        """Whether the weight has one row for each token id."""
        return key in self._partners or key.endswith(TOKEN_NAMES)


def mismatch_error(problems: Mapping[str, list[str]], also: str = "") -> PairMismatchError:
    """Return the error that lists every name that `mismatches` found; `also` is one more line of explanation."""
    lines = [f"{len(rows)} weight{'s' if len(rows) > 1 else ''} {what}.\n{list_names(rows)}"
             for what, rows in problems.items()]  # fmt: skip
    way_out = (
        "Give base, instruct and tuned of one architecture, or leave these weights as they are in instruct with "
        "--modules."
    )
    return PairMismatchError("cannot graft: " + "\n".join([*lines, *([also] if also else []), way_out]))


def embedding_ties(names: Iterable[str]) -> dict[str, str]:
    """Return {head: input embedding} as their usual names tell, {} when there is not exactly one of each."""
    names = list(dict.fromkeys(names))
    heads = [name for name in names if name.endswith(HEAD_NAMES)]
    inputs = [name for name in names if name.endswith(EMBEDDING_NAMES)]
    return {heads[0]: inputs[0]} if len(heads) == 1 and len(inputs) == 1 else {}


def mismatches(sides: Sides, wanted: Callable[[str], bool]) -> dict[str, list[str]]:
    """Return what does not match -> a row for each weight of which that is true; empty where the sides fit together.

    Values are read only of whole numbers, and of a weight that INSTRUCT lacks, to see whether it has a delta.
    """
    missing: list[str] = []
    shapes: list[str] = []
    numbers: list[str] = []
    for key, name in sides.instruct.names.items():
        if not wanted(name):
            continue
        specs = found_specs(sides, key)
        lacking = [side.role for side in sides.trained if side.role not in specs]
        if lacking:
            if not sides.dropped(key):
                missing.append(f"{name}\n    instruct only, not in {' and '.join(lacking)}")
        elif not _shapes_fit(specs, sides.counts_rows(key)):
            shapes.append(side_rows(sides, key, "shape"))
        elif not (all(spec.is_float for spec in specs.values()) or _untouched(sides, key)):
            numbers.append(side_rows(sides, key, "code"))
    found = {
        "without a counterpart on another side": missing,
        "of different shapes": shapes,
        "of whole numbers that training changed": numbers,
    }
    if not any(found.values()):
        found["of base or tuned without a matching weight on instruct"] = _unplaced(sides, wanted)
    return {what: rows for what, rows in found.items() if rows}


def _unplaced(sides: Sides, wanted: Callable[[str], bool]) -> list[str]:
    """Return a row for each weight of BASE or TUNED that has a delta and no match on INSTRUCT."""
    found = []
    for side in sides.trained:
        other = sides.base if side is sides.tuned else sides.tuned
        for key in left_out(sides, side):
            if other is not None and key in other.names:
                harmless = same_values(side, key, other, key)
            else:
                harmless = sides.dropped(key)
            if not harmless and wanted(side.names[key]):
                found.append(f"{side.names[key]}\n    {side.role} only")
    return found


def left_out(sides: Sides, side: Side) -> list[str]:
    """Return the keys of BASE or TUNED that INSTRUCT lacks under any name."""
    return [key for key in side.names if sides.find(sides.instruct, key) is None]


def found_specs(sides: Sides, key: str) -> dict[str, TensorSpec]:
    """Return role -> spec of the weight `key` on every side that has it."""
    found = [(side, sides.find(side, key)) for side in [*sides.trained, sides.instruct]]
    return {side.role: side.specs[name] for side, name in found if name is not None}


def _untouched(sides: Sides, key: str) -> bool:
    """Whether BASE and TUNED hold the same values of a weight that both have; of a delta it is taken for granted."""
    if sides.base is None:
        return True
    base, tuned = sides.find(sides.base, key), sides.find(sides.tuned, key)
    return base is not None and tuned is not None and same_values(sides.base, base, sides.tuned, tuned)


def side_rows(sides: Sides, key: str, what: str) -> str:
    """Return a row for `list_names`: the name, under it each side's shape or dtype."""
    values = [f"    {role:<9} {getattr(spec, what)}" for role, spec in found_specs(sides, key).items()]
    return "\n".join([sides.instruct.names[key], *values])


def _shapes_fit(specs: Mapping[str, TensorSpec], counts_rows: bool) -> bool:
    shapes = {spec.shape for spec in specs.values()}
    return len(shapes) == 1 or (counts_rows and len({(len(shape), shape[1:]) for shape in shapes}) == 1)


def same_values(side: Side, key: str, other: Side, other_key: str) -> bool:
    """Whether two weights hold equal numbers, whatever their dtypes; True where values cannot be read yet.

    A weight that is going to be trained is equal to no other.
    """
    ahead = [(at.checkpoint, at.names[k]) for at, k in ((side, key), (other, other_key))
             if isinstance(at.checkpoint, Announced)]  # fmt: skip
    if ahead:
        return not any(name in checkpoint.trained for checkpoint, name in ahead)
    if not (side.readable and other.readable):
        return True
    if side.specs[key].shape != other.specs[other_key].shape:
        return False
    one, two = Place(side.checkpoint, side.names[key]), Place(other.checkpoint, other.names[other_key])
    size = side.specs[key].numel
    return all(_same_block(one, two, at, min(at + BLOCK, size)) for at in range(0, size, BLOCK))


def _same_block(one: Place, two: Place, start: int, stop: int) -> bool:
    import torch

    first, second = one.block(start, stop), two.block(start, stop)
    dtype = torch.promote_types(first.dtype, second.dtype)
    return torch.equal(first.to(dtype), second.to(dtype))
