"""From checkpoints and options to what has to be written: one job for each weight of the result."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ..checkpoints.checkpoint import Checkpoint, Place
from ..checkpoints.delta import Zeros
from ..checkpoints.header import CODES, narrower
from ..checkpoints.weight_names import NAMED
from ..errors import ConfigError, list_names
from ..layouts.plan import resolve
from .options import GraftOptions


@dataclass(frozen=True)
class LowRank:
    """A delta `factor * left @ right` of rank r.

    Args:
        left: lora_B, (rows, r) on disk; lora_A, (r, rows), when `transposed`.
        right: lora_A, (r, columns) on disk; lora_B, (columns, r), when `transposed`.
        factor: what the product is multiplied with.
        columns: columns of the weight.
        transposed: whether the weight is stored as (in, out), as GPT-2 does.
    """

    left: Place
    right: Place
    factor: float
    columns: int
    transposed: bool = False


@dataclass(frozen=True)
class WeightJob:
    """What to write for one tensor of the result.

    Args:
        name: name in the result.
        code: dtype in the result, in the words of safetensors.
        shape: its shape.
        instruct: where INSTRUCT's weight is.
        base, tuned: where the delta comes from; None where there is none.
        low_rank: the delta as a product, in the place of `tuned`.
        runs: ranges of elements that receive the delta, the others are copied; None for all.
    """

    name: str
    code: str
    shape: tuple[int, ...]
    instruct: Place
    base: Place | None = None
    tuned: Place | None = None
    low_rank: LowRank | None = None
    runs: tuple[tuple[int, int], ...] | None = None

    @property
    def grafted(self) -> bool:
        """Whether the weight receives a delta."""
        return self.tuned is not None or self.low_rank is not None

    def copied(self) -> WeightJob:
        """Return the job that writes INSTRUCT's weight as it is."""
        return WeightJob(self.name, self.code, self.shape, self.instruct)


@dataclass
class Jobs:
    """The plan of a dense result.

    Args:
        weights: what to write, in the order of INSTRUCT's files.
        layout: the checkpoint whose files give the order, shards and headers: INSTRUCT, or its converted copy.
        config_edits: dotted key -> value to change in config.json.
        warnings: what the user should know.
        grafted: number of weights that receive a delta.
        left_out: names of BASE and TUNED without a matching weight.
    """

    weights: list[WeightJob]
    layout: Checkpoint
    config_edits: dict[str, Any] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)
    grafted: int = 0
    left_out: list[str] = field(default_factory=list)

    @classmethod
    def of(cls, weights: list[WeightJob], layout: Checkpoint, options: GraftOptions, **facts: Any) -> Jobs:
        """Return the plan of `weights`; at scale 0 the result is INSTRUCT bit by bit, so nothing is added."""
        still = options.scale == 0.0 and options.instruct_scale == 1.0
        return cls([job.copied() for job in weights] if still else weights, layout, **facts)

    def in_dtype(self, options: GraftOptions) -> Jobs:
        """Return the same plan for another output dtype."""
        weights = [replace(job, code=output_code(job.instruct.spec.code, options)) for job in self.weights]
        return replace(self, weights=weights)


def full_jobs(
    base: Checkpoint,
    instruct: Checkpoint,
    tuned: Checkpoint,
    options: GraftOptions,
    scratch: Path | None,
    *,
    is_delta: bool = False,
) -> Jobs:
    """Plan the graft of full weights. BASE is subtracted as training loaded it.

    From a delta (`is_delta`) zeros are subtracted; `base` then only tells which token rows both sides share. Layouts
    that must be converted are converted in the folder `scratch`; with None only the checks are made for them, and the
    plan has no weights.

    Raises:
        InputError: a weight that cannot be grafted, or nothing that is selected.
    """
    layout = resolve(
        None if is_delta else base, instruct, tuned, scratch=scratch, untie=options.untie, wanted=options.selector(),
        rows=rows_to_graft(base, instruct, options),
    )  # fmt: skip
    home, learnt = layout.sides["instruct"], layout.sides["tuned"]
    origin = Zeros.like(learnt) if is_delta else layout.sides["base"]
    names = [plan.name for plan in layout.weights]
    check_selection(options, [plan.name for plan in layout.weights if not plan.copied], names)
    if layout.converts and scratch is None:
        return Jobs([], home, layout.config_edits, layout.warnings, left_out=layout.left_out)
    weights = []
    for plan in layout.weights:
        spec = home.specs[plan.instruct]
        job = WeightJob(plan.name, output_code(spec.code, options), spec.shape, Place(home, plan.instruct))
        if plan.tuned is not None:
            casts = base.casts(learnt.spec_before(plan.tuned))
            start, end = Place(origin, plan.base or plan.tuned, casts), Place(learnt, plan.tuned)
            job = replace(job, base=start, tuned=end, runs=runs_of(plan.rows, spec.shape))
        weights.append(job)
    grafted = [job for job in weights if job.grafted]
    warnings = layout.warnings if is_delta else [*layout.warnings, *_narrower(grafted)]
    return Jobs.of(
        weights, home, options, config_edits=layout.config_edits, warnings=warnings, grafted=len(grafted),
        left_out=layout.left_out,
    )  # fmt: skip


def check_rounding(jobs: Jobs, options: GraftOptions) -> None:
    """Raise ConfigError if stochastic rounding was asked for and nothing is rounded to 16 bits."""
    if options.rounding == "stochastic" and not any(job.code in ("BF16", "F16") for job in jobs.weights):
        raise ConfigError(
            "rounding='stochastic' has no meaning here: the result is fp32, which is not rounded to 16 bits. Use "
            "rounding='nearest', or a 16-bit dtype."
        )


def output_code(stored: str, options: GraftOptions) -> str:
    """Return the code of the output dtype: only floating weights change theirs."""
    return (
        stored
        if options.dtype == "auto" or not stored.startswith(("F", "B")) or stored == "BOOL"
        else CODES[options.dtype]
    )


def rows_to_graft(base: Checkpoint, instruct: Checkpoint, options: GraftOptions) -> tuple[int, ...] | None:
    """Return the token rows that `vocab` lets receive the delta, None for all of them; errors as of `shared_rows`."""
    if options.vocab != "shared":
        return None
    from ..pair.token_rows import shared_rows

    return shared_rows(base, instruct)


def runs_of(rows: Sequence[int] | None, shape: tuple[int, ...]) -> tuple[tuple[int, int], ...] | None:
    """Return the ranges of elements of some rows; None for None, which is all of them."""
    if rows is None:
        return None
    width = 1
    for size in shape[1:]:
        width *= size
    runs: list[list[int]] = []
    for row in rows:
        if runs and runs[-1][1] == row * width:
            runs[-1][1] += width
        else:
            runs.append([row * width, (row + 1) * width])
    return tuple((start, stop) for start, stop in runs)


def check_selection(options: GraftOptions, grafted: list[str], known: list[str]) -> None:
    """Raise ConfigError if an expression of `modules` matches none of the names `grafted`; `known` are examples."""
    patterns = options.patterns() or []
    idle = [pattern.pattern for pattern in patterns if not any(pattern.search(name) for name in grafted)]
    if not idle and grafted:
        return
    what = f"{len(idle)} of {len(patterns)} expressions of modules match" if idle else "the selection matches"
    raise ConfigError(
        f"{what} no weight that can be grafted.\n{list_names(idle)}\nNames of weights look like\n"
        f"{list_names(known, limit=3)}\nPass 'all', {', '.join(map(repr, NAMED))}, or regular expressions that are "
        "searched in these names."
    )


def _narrower(grafted: list[WeightJob]) -> list[str]:
    """Warn when TUNED holds fewer digits than BASE as stored: the cast is then part of the delta."""
    return narrow_warning(
        narrower(
            (job.name, job.base.spec, job.tuned.spec)
            for job in grafted
            if job.base is not None and job.tuned is not None and not job.base.casts
        )
    )


def narrow_warning(names: list[str]) -> list[str]:
    """Return the warning on weights of TUNED that are narrower than BASE's, where there are any."""
    return (
        [
            f"{len(names)} weights of tuned are narrower than base's: what the cast changed counts as learnt.\n"
            f"{list_names(names)}\nIf training loaded base in tuned's dtype, pass base_dtype='tuned'."
        ]
        if names
        else []
    )
