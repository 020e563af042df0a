"""From checkpoints and options to what has to be written: one job for each weight of the result."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ..adapters.lora import LoraModule, place_on
from ..checkpoints.checkpoint import Checkpoint, Place
from ..checkpoints.delta import DeltaCheckpoint, Zeros
from ..checkpoints.header import CODES
from ..errors import ConfigError, list_names
from ..layouts.plan import WeightPlan, resolve
from .options import GraftOptions
from .pieces import LowRank, WeightJob


@dataclass
class Jobs:
    """The plan of a dense result.

    Args:
        weights: what to write, in the order of INSTRUCT's files.
        layout: the checkpoint whose files give the order, shards and headers: INSTRUCT, or its converted copy.
        config_edits: dotted key -> value to change in config.json.
        warnings: what the user should know.
        grafted: number of weights that receive a delta.
        left_out: names of BASE and TUNED that land nowhere.
    """

    weights: list[WeightJob]
    layout: Checkpoint
    config_edits: dict[str, Any] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)
    grafted: int = 0
    left_out: list[str] = field(default_factory=list)


def full_jobs(
    base: Checkpoint, instruct: Checkpoint, tuned: Checkpoint, options: GraftOptions, scratch: Path | None
) -> Jobs:
    """Plan the graft of a full checkpoint, or of a delta: zeros then stand where BASE's weights would.

    BASE is subtracted as training loaded it. Layouts that must be converted are converted in the folder `scratch`; with
    None only the checks are made for them, and the plan has no weights.

    Raises:
        InputError: a weight that cannot be grafted, or nothing that is selected.
    """
    rows = None
    if options.vocab == "shared":
        from ..pair.pairs import shared_rows

        rows = shared_rows(base, instruct).ids
    wanted = selector(options)
    is_delta = isinstance(tuned, DeltaCheckpoint)
    layout, sides = resolve(
        None if is_delta else base, instruct, tuned, scratch=scratch, vocab=options.vocab, rows=rows,
        untie=options.untie, wanted=wanted,
    )  # fmt: skip
    home = sides["instruct"]
    origin = Zeros.like(sides["tuned"]) if is_delta else sides["base"]
    names = [plan.name for plan in layout.weights]
    _check_selection(options, [plan.name for plan in layout.weights if not plan.copied], names)
    if layout.converts and scratch is None:
        return Jobs([], home, layout.config_edits, layout.warnings, left_out=layout.left_out)
    weights = []
    for plan in layout.weights:
        spec = home.specs[plan.instruct]
        job = WeightJob(plan.name, _code(spec.code, options), spec.shape, Place(home, plan.instruct))
        if plan.tuned is not None:
            end = Place(sides["tuned"], plan.tuned)
            start = Place(origin, plan.base or plan.tuned, base.cast(end.spec))
            job = replace(job, base=start, tuned=end, runs=_runs(plan, spec.shape))
        weights.append(job)
    grafted = [job for job in weights if job.grafted]
    edits, warnings = dict(layout.config_edits), list(layout.warnings)
    warnings += _narrower(grafted)
    if options.untie and not edits:
        warnings.append("untie changes nothing: no head has a delta of its own on a tied embedding.")
    return Jobs(_without_scale(weights, options), home, edits, warnings, len(grafted), layout.left_out)


def low_rank_jobs(
    base: Checkpoint | None,
    instruct: Checkpoint,
    adapter: Checkpoint,
    modules: dict[str, LoraModule],
    options: GraftOptions,
    *,
    scratch: Path,
) -> Jobs:
    """Plan the dense graft of a plain LoRA; BASE is needed at another instruct scale only.

    Raises:
        InputError: a module that does not land on INSTRUCT, or nothing that is selected.
    """
    placed = place_on(modules, adapter, instruct)
    wanted = selector(options)
    chosen = {name: lora for name, lora in placed.items() if wanted(name)}
    _check_selection(options, list(chosen), list(placed))
    shifted = {}
    if options.instruct_scale != 1.0 and base is not None:
        # Every weight moves then, not only those under the adapter: BASE without a delta is TUNED.
        jobs = full_jobs(base, instruct, base, options, scratch)
        if jobs.layout is not instruct:
            raise ConfigError(
                f"instruct {instruct} must be converted for another instruct scale, and an adapter cannot follow it "
                "there. "
                "Merge the adapter into base and graft that. Nothing was written."
            )
        shifted = {job.name: job for job in jobs.weights}
    weights = []
    for name, spec in instruct.specs.items():
        lora = chosen.get(name)
        low_rank = None
        if lora is not None:
            factors = [Place(adapter, lora.left), Place(adapter, lora.right)]
            left, right = factors[::-1] if lora.transposed else factors
            low_rank = LowRank(left, right, lora.factor, spec.shape[1], lora.transposed)
        job = shifted.get(name)
        if low_rank is not None:
            place = job.base if job is not None else None
            job = WeightJob(
                name, _code(spec.code, options), spec.shape, Place(instruct, name), place, low_rank=low_rank
            )
        elif job is None:
            job = WeightJob(name, _code(spec.code, options), spec.shape, Place(instruct, name))
        weights.append(job)
    return Jobs(_without_scale(weights, options), instruct, grafted=len(chosen))


def without_unchanged(jobs: Jobs, options: GraftOptions) -> Jobs:
    """Copy the weights whose TUNED is BASE's own bytes, where nothing else moves them."""
    if options.instruct_scale != 1.0:
        return jobs
    weights = []
    for job in jobs.weights:
        same = (
            job.base is not None
            and job.tuned is not None
            and (job.base.checkpoint.specs[job.base.name] == job.tuned.checkpoint.specs[job.tuned.name])
        )
        weights.append(WeightJob(job.name, job.code, job.shape, job.instruct) if same else job)
    return replace(jobs, weights=weights, grafted=sum(job.grafted for job in weights))


def check_rounding(jobs: Jobs, options: GraftOptions) -> None:
    """Raise ConfigError if stochastic rounding was asked for and nothing is rounded to 16 bits."""
    if options.rounding == "stochastic" and not any(job.code in ("BF16", "F16") for job in jobs.weights):
        raise ConfigError(
            "rounding='stochastic' has no meaning here: the result is fp32, which is not rounded to 16 bits. Use "
            "rounding='nearest', or a 16-bit dtype. Nothing was written."
        )


def selector(options: GraftOptions) -> Callable[[str], bool]:
    """Return the test whether a weight's name is selected by `modules`."""
    patterns = options.patterns()
    if patterns is None:
        return lambda name: True
    return lambda name: any(pattern.search(name) for pattern in patterns)


def _code(stored: str, options: GraftOptions) -> str:
    """Return the code of the output dtype: only floating weights change theirs."""
    return (
        stored
        if options.dtype == "auto" or not stored.startswith(("F", "B")) or stored == "BOOL"
        else CODES[options.dtype]
    )


def _runs(plan: WeightPlan, shape: tuple[int, ...]) -> tuple[tuple[int, int], ...] | None:
    """Return the ranges of elements of the rows that receive the delta."""
    if plan.rows is None:
        return None
    width = 1
    for size in shape[1:]:
        width *= size
    runs: list[list[int]] = []
    for row in plan.rows:
        if runs and runs[-1][1] == row * width:
            runs[-1][1] += width
        else:
            runs.append([row * width, (row + 1) * width])
    return tuple((start, stop) for start, stop in runs)


def _without_scale(weights: list[WeightJob], options: GraftOptions) -> list[WeightJob]:
    """At scale 0 the result is INSTRUCT, bit by bit: nothing is added."""
    if options.scale != 0.0 or options.instruct_scale != 1.0:
        return weights
    return [WeightJob(job.name, job.code, job.shape, job.instruct) for job in weights]


def _check_selection(options: GraftOptions, grafted: list[str], known: list[str]) -> None:
    patterns = options.patterns() or []
    idle = [pattern.pattern for pattern in patterns if not any(pattern.search(name) for name in grafted)]
    if not idle and grafted:
        return
    what = f"{len(idle)} of {len(patterns)} expressions of modules match" if idle else "the selection matches"
    raise ConfigError(
        f"{what} no weight that can be grafted.\n{list_names(idle)}\nNames of weights look like\n"
        f"{list_names(known, limit=3)}\nPass 'all', 'linear' or regular expressions that are searched in these names. "
        "Nothing was written."
    )


def _narrower(grafted: list[WeightJob]) -> list[str]:
    """Warn when TUNED holds fewer digits than BASE as stored: the cast is then part of the delta."""
    digits = {"F64": 53, "F32": 24, "F16": 11, "BF16": 8}
    names = []
    for job in grafted:
        if job.base is None or job.tuned is None or job.base.cast is not None:
            continue
        ours, theirs = job.base.spec.code, job.tuned.spec.code
        if digits[theirs] < digits[ours]:
            names.append(f"{job.name}  base {ours}, tuned {theirs}")
    if not names:
        return []
    return [
        f"{len(names)} weights of tuned are narrower than base's: what the cast changed counts as learnt.\n"
        f"{list_names(names)}\nIf training loaded base in tuned's dtype, pass base_dtype='tuned'."
    ]
