"""The delta on its own: `delta = tuned - base`, streamed into a folder that `graft(delta=...)` applies.

The engine of a graft does the work, with zeros where INSTRUCT would be.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..checkpoints.checkpoint import Checkpoint, Place
from ..checkpoints.delta import BASE_CONFIG, INDEX, TRAINED_WITH, WEIGHTS, DeltaCheckpoint, Zeros, refuse_deltas
from ..checkpoints.header import CODES, FLOATS, dtype_of, nbytes_of
from ..checkpoints.hub import Source, output_folder
from ..checkpoints.manifest import Entry, write_manifest
from ..errors import AdapterError, ConfigError, ends_with
from ..grafting.files import OutputFile, main_dtype, plan_files
from ..grafting.inputs import Digests, Inputs, base_of, open_tuned_inputs, other_base
from ..grafting.jobs import Jobs, WeightJob
from ..grafting.options import DTYPES, GraftOptions, declared
from ..grafting.reports import DeltaReport, graft_figures
from ..grafting.tuned import one_tuned, recorded_sides
from ..pair.templates import read_templates
from ..results.cards import write_delta_card
from ..results.check import check_result
from ..results.copied import copied_files, copy_files, write_templates
from ..results.folder import OutputFolder, check_free, check_place, files_in, recover
from ..results.written import tells_what_is_written
from ..runtime.machine import check_space
from ..runtime.progress import Progress
from .graft import check_finite


@ends_with("Nothing was written.")
def extract_delta(
    *,
    base: Source | None = None,
    tuned: Source,
    output: Source,
    rank: int | None = None,
    dtype: Any = "float32",
    base_dtype: Any = None,
    max_shard_size: int | str | None = None,
    overwrite: bool = False,
    digest: str = "xxh3",
    stats: bool = True,
    progress: bool = True,
) -> DeltaReport:
    """Write what training added to BASE, `delta = tuned - base`, to a folder of its own.

    `graft(delta=...)` adds it to any INSTRUCT of that BASE. The folder is not a model and does not load as one.

    Args:
        base: folder or hub id of BASE, either with `@revision` if wished. May be left out for an adapter that names it.
            Default: the one that TUNED's run recorded, which must be unchanged.
        tuned: BASE after training: a full checkpoint, or an adapter, whose dense delta is written then.
        output: folder of the result; must not exist.
        rank: writes a LoRA adapter for BASE with this rank in the place of the dense delta, by truncated singular value
            decomposition of each linear module; needs a full TUNED. Default none.
        dtype: `float32` (default), in which deltas of 16-bit checkpoints are exact, `bfloat16` or `float16`; each value
            is rounded once, to the nearest.
        base_dtype: as for `graft`.
        max_shard_size: as for `graft`. Default: as BASE's files.
        overwrite: whether an existing delta at `output` may be replaced. Default False.
        digest: of the input files, for the manifest: `xxh3` (default), `sha256` (slow, shows forgery too) or `none`.
        stats: whether to measure the delta's norm and what storing it lost. Default True.
        progress: whether to show a bar on a terminal. Default True.

    Returns:
        counts, figures and warnings; see `DeltaReport`.

    Raises:
        InputError: bad input, found before anything was written.
        GraftError: values that are not finite, or a full disk; nothing is left at `output`.

    """
    settings = _options(dtype, rank, base_dtype=base_dtype, max_shard_size=max_shard_size, overwrite=overwrite,
                        digest=digest, stats=stats)  # fmt: skip
    target = output_folder(output)
    recover(target)
    check_free(target, overwrite, "delta")
    with _opened(base, tuned, target, settings) as inputs, tells_what_is_written(target):
        check_place(target, inputs.folders)
        if rank is not None and inputs.tuned.checkpoint.is_adapter:
            raise AdapterError(
                f"tuned {inputs.tuned.checkpoint} is an adapter already: rank is for full checkpoints. Leave rank out "
                "for its dense delta."
            )
        with OutputFolder(target, overwrite, "delta") as place:
            if rank is None:
                report = _write_dense(inputs, place.part, target, settings, progress)
            else:
                report = _write_adapter(inputs, place.part, target, settings, rank, progress)
            place.commit()
    return report


def _options(dtype: Any, rank: int | None, **options: Any) -> GraftOptions:
    if str(dtype) == "auto":
        raise ConfigError(f"dtype of a delta must be one of {', '.join(DTYPES[1:])}.")
    declared()["rank"].checked("rank", rank)
    # A head that only TUNED has of its own is part of the delta; whether INSTRUCT can take it is asked at the graft.
    return GraftOptions(format="model", dtype=dtype, rounding="nearest", untie=True, **options)


@contextmanager
def _opened(base: Source | None, tuned: Source, target: Path, options: GraftOptions) -> Iterator[Inputs]:
    """Open BASE and TUNED; BASE is the receiver as well, so that the plan is one of BASE's own weights."""
    refuse_deltas(base=base, tuned=tuned)
    base = recorded_sides([(tuned, 1.0)], base=base).get("base")
    with one_tuned(base, [(tuned, 1.0)], target, options.base_dtype) as single:
        home = base_of(single)
        yield open_tuned_inputs(replace(single, base=home), home, options, check_pair=False)


def _write_dense(inputs: Inputs, part: Path, target: Path, options: GraftOptions, progress: bool) -> DeltaReport:
    from ..grafting.stream import stream

    scratch = part / ".converted"
    jobs = inputs.tuned.jobs(inputs.instruct, options, scratch)
    weights = _from_zeros(jobs, adapter=inputs.tuned.checkpoint.is_adapter)
    files = [file for file in plan_files(weights, jobs.layout, options.max_shard_size) if file.jobs]  # type: ignore[arg-type]
    for file in files:
        file.name = WEIGHTS if len(files) == 1 else file.name.replace("model", "delta", 1)
    small = copied_files(inputs.instruct, adapter=True)
    check_space(target, sum(file.size for file in files) + sum(path.stat().st_size for path in small))
    with Digests(inputs.tuned.sides, {}, options) as digests, Progress(sum(f.size for f in files), progress) as bar:
        outcome = stream(files, part, options, bar.add)
        check_finite(outcome)
        shutil.rmtree(scratch, ignore_errors=True)
        figures = graft_figures(outcome.sums, options.stats, sigma=False)
        figures.pop("sigma", None)
        known = options.stats and not inputs.tuned.checkpoint.is_adapter
        exact = all(found.ee == 0.0 for found in outcome.sums.values()) if known else None
        warnings = list(jobs.warnings)
        if figures.get("delta_norm") == 0.0:
            warnings.append("the delta is zero: tuned and base hold the same weights.")
        report = DeltaReport(
            target, "delta", len(weights), main_dtype(weights) or "", exact=exact, warnings=warnings, **figures
        )
        _write_index(files, part)
        there = {job.name for job in weights}
        without = [job.name for job in jobs.weights if job.name not in there]
        facts = {"left_out": jobs.left_out, "without_delta": without}
        _finish(part, inputs, report, options, sides=digests.collect(), small=small, facts=facts)
    return report


def _from_zeros(jobs: Jobs, *, adapter: bool) -> list[WeightJob]:
    """Put zeros in INSTRUCT's place. What an adapter leaves alone has a delta of zero; buffers have none."""
    zeros = Zeros.like(jobs.layout)
    chosen = [job for job in jobs.weights if job.grafted or (adapter and job.code in FLOATS)]
    return [replace(job, instruct=Place(zeros, job.instruct.name)) for job in chosen]


def _write_index(files: list[OutputFile], part: Path) -> None:
    if len(files) == 1:
        return
    weight_map = {job.name: file.name for file in files for job in file.jobs}
    total = sum(nbytes_of(job.code, job.shape) for file in files for job in file.jobs)
    content = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (part / INDEX).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _write_adapter(
    inputs: Inputs, part: Path, target: Path, options: GraftOptions, rank: int, progress: bool
) -> DeltaReport:
    from .truncate import truncated

    scratch = part / ".converted"
    jobs = inputs.tuned.jobs(inputs.instruct, options, scratch)
    small = copied_files(inputs.instruct, adapter=True)
    with Digests(inputs.tuned.sides, {}, options) as digests:
        dtype = dtype_of(CODES[options.dtype])
        found = truncated(jobs, inputs.instruct, rank, target, dtype=dtype, progress=progress)
        found.write(part, inputs.instruct)
        report = DeltaReport(
            target, "adapter", len(found.factors), options.dtype, delta_norm=math.sqrt(found.total), rank=rank,
            kept=found.kept, modules=found.modules, lost=found.lost, warnings=[*jobs.warnings, *found.warnings],
        )  # fmt: skip
        shutil.rmtree(scratch, ignore_errors=True)
        facts = {"left_out": jobs.left_out}
        _finish(part, inputs, report, options, sides=digests.collect(), small=small, facts=facts)
    return report


def _finish(
    part: Path,
    inputs: Inputs,
    report: DeltaReport,
    options: GraftOptions,
    *,
    sides: Mapping[str, Entry],
    small: list[Path],
    facts: dict[str, list[str]],
) -> None:
    """Write what lies beside the weights: BASE's config and tokenizer, manifest and card."""
    copy_files(small, inputs.instruct, part)
    trained_with = read_templates(inputs.tuned.trained_with["tuned"].folder)
    write_templates(trained_with, part / TRAINED_WITH if report.form == "delta" else part)
    if report.form == "delta":
        config = inputs.instruct.path / "config.json"
        if config.is_file():
            shutil.copyfile(config, part / BASE_CONFIG)
    report.warnings.extend(other_base(inputs.tuned, sides))
    found = report.to_dict()
    del found["output"]
    chosen = {"dtype": options.dtype, "base_dtype": options.base_dtype, "rank": report.rank}
    named = {role: vars(entry) for role, entry in sides.items()}
    content = {"kind": "delta", **named, "options": chosen, **facts, **found}
    write_delta_card(part, content)
    write_manifest(part, {**content, "files": files_in(part)})
    reader = DeltaCheckpoint if report.form == "delta" else Checkpoint
    check_result(part, report.output, small, inputs.instruct.path, reader=reader)
