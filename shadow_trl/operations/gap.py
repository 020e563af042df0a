"""How far INSTRUCT lies from BASE: sigma, streamed over the weights that both have."""

from __future__ import annotations

import tempfile
from dataclasses import replace
from pathlib import Path

from ..checkpoints.checkpoint import Checkpoint, Place
from ..checkpoints.delta import refuse_deltas
from ..checkpoints.hub import Source
from ..errors import AdapterError, ConfigError, GraftError, PairMismatchError, list_names
from ..grafting.reports import GapReport, gap_report
from ..layouts.plan import resolve
from ..pair.architectures import compare_architectures
from ..results.folder import Scratch
from ..runtime.progress import Progress


def gap(
    base: Source | None = None, instruct: Source | None = None, tuned: Source | None = None, *, progress: bool = True
) -> GapReport:
    """Measure how far INSTRUCT lies from BASE: `sigma = sum|B - I| / (sum|B| + sum|I|)`.

    Args:
        base: folder or hub id of BASE, either with `@revision` if wished. Default: the one that TUNED's run recorded.
        instruct: the same for INSTRUCT.
        tuned: BASE after training, a full checkpoint; the size and direction of its delta, from BASE as its run loaded
            it, are then set against the gap. Default none.
        progress: whether to show a bar on a terminal. Default True.

    Returns:
        sigma overall, by kind of weight and by layer; see `GapReport`. About 0.7 for unrelated models.

    Raises:
        InputError: bad input.
        GraftError: weights that are not finite.

    Source: Shadow-FT (arXiv 2505.12716), equation 1.

    """
    refuse_deltas(base=base, instruct=instruct, tuned=tuned)
    learnt = None if tuned is None else _open("tuned", tuned)
    named = {"base": base, "instruct": instruct}
    if None in named.values():
        from ..grafting.tuned import recorded_sides

        named.update(recorded_sides(None if tuned is None else [(tuned, 1.0)], **named))
    if (base := named["base"]) is None:
        raise ConfigError("base is missing: name it (--base), or give the folder of a run as tuned.")
    sides = {role: _open(role, source) for role, source in named.items() if source is not None}
    if learnt is not None:
        from ..grafting.tuned import loaded_in

        sides["tuned"] = learnt
        sides["base"] = sides["base"].loaded(loaded_in(learnt))
    for role, side in sides.items():
        side.check_not_quantised(role)
    findings = compare_architectures(sides["base"].config, sides["instruct"].config)
    if findings.errors:
        raise PairMismatchError("\n".join(findings.errors))
    return measure(sides["base"], sides["instruct"], sides.get("tuned"), progress)


def _open(role: str, source: Source) -> Checkpoint:
    side = Checkpoint.open(source)
    if side.is_adapter:
        raise AdapterError(
            f"{role} {side} is an adapter; gap compares full checkpoints. Merge it first "
            "(PeftModel.merge_and_unload, then save_pretrained)."
        )
    return side


def measure(base: Checkpoint, instruct: Checkpoint, tuned: Checkpoint | None, progress: bool = False) -> GapReport:
    """Measure every weight of INSTRUCT against BASE and, with TUNED, TUNED against BASE under the same names.

    TUNED is set against BASE as training loaded it (`base.loaded_in`): the rounding of that is no part of its delta.
    """
    from ..checkpoints.distance import Sides, measure_gap

    with Scratch(Path(tempfile.gettempdir(), "shadow-trl-gap")) as scratch:
        # A head that only one side has of its own is measured as one. Without TUNED, BASE takes its place in the plan.
        origin, learnt = (base, tuned) if tuned is not None else (None, base)
        layout = resolve(origin, instruct, learnt, scratch=scratch.part, untie=True)
        gaps: list[Sides] = []
        deltas: list[Sides] = []
        for weight in layout.weights:
            if weight.tuned is None:
                continue
            end = Place(layout.sides["tuned"], weight.tuned)
            start = end if weight.base is None else Place(layout.sides["base"], weight.base)
            other = Place(layout.sides["instruct"], weight.instruct)
            gaps.append((weight.name, start, other))
            casts = base.casts(layout.sides["tuned"].spec_before(weight.tuned))
            deltas.append((weight.name, replace(start, casts=casts), end, other))
        measured = [gaps, deltas] if tuned is not None else [gaps]
        size = sum(place.spec.nbytes for part in measured for _, *places in part for place in places)
        with Progress(size, progress) as bar:
            sums = [measure_gap(part, bar.add) for part in measured]
    bad = sorted({name for part in sums for name, found in part.items() if not found.finite})
    if bad:
        named = " or ".join(str(side) for side in (base, instruct, tuned) if side is not None)
        raise GraftError(f"{len(bad)} weights of {named} have values that are not finite.\n{list_names(bad)}")
    return gap_report(sums[0], sums[1] if tuned is not None else None, layout.warnings)
