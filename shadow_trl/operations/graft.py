"""From a pair and a tuned BASE to a grafted folder: `grafted = instruct + scale * (tuned - base)`.

Works on what any tool trained: a full checkpoint in any layout, or a PEFT adapter. Everything that can be found wrong
without the weights is found before anything is written.
"""

from __future__ import annotations

import shlex
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..adapters.lora import place_on
from ..checkpoints.digests import file_digest
from ..checkpoints.header import TORCH_NAMES
from ..checkpoints.hub import Source, output_folder
from ..checkpoints.manifest import Entry, write_manifest
from ..errors import ConfigError, GraftError, ends_with, list_names
from ..grafting.files import main_dtype, plan_files, write_index
from ..grafting.form import is_local, text_class
from ..grafting.inputs import Digests, Inputs, open_delta, open_tuned_inputs, other_base
from ..grafting.jobs import check_rounding, narrow_warning
from ..grafting.options import GraftOptions, declared
from ..grafting.reports import GraftReport, graft_figures, graft_warnings, realised_in_bf16
from ..grafting.trained import Full, PlainLora
from ..grafting.tuned import names_base, one_tuned, recorded_sides
from ..pair.known import taken_base
from ..results.cards import write_model_card
from ..results.check import check_result
from ..results.copied import copied_files, copy_files, write_config, write_templates
from ..results.folder import OutputFolder, check_free, check_place, files_in, recover
from ..results.shard_writer import HollowWriter
from ..results.usage import loading_call, text_class_caution
from ..results.written import tells_what_is_written
from ..runtime.machine import check_space
from ..runtime.progress import Progress

if TYPE_CHECKING:
    from ..checkpoints.checkpoint import Checkpoint
    from ..grafting.stream import Outcome, Seen

BESIDE = "adapter"
"""Folder in a dense result with the same graft as an adapter."""


@ends_with("Nothing was written.")
def graft(
    *,
    base: Source | None = None,
    instruct: Source | None = None,
    tuned: Source | Sequence[Any] | None = None,
    delta: Source | None = None,
    output: Source,
    scale: float = 1.0,
    instruct_scale: float = 1.0,
    modules: str | Sequence[str] = "all",
    format: str = "auto",
    dtype: Any = "auto",
    rounding: str = "auto",
    seed: int = 0,
    vocab: str = "strict",
    chat_template: str = "instruct",
    max_shard_size: int | str | None = None,
    overwrite: bool = False,
    untie: bool = False,
    digest: str = "xxh3",
    stats: bool = True,
    processes: int = 1,
    base_dtype: Any = None,
    rank: int | None = None,
    find_base: bool = False,
    progress: bool = True,
) -> GraftReport:
    """Add to INSTRUCT what training added to BASE and write the result to a folder that stands alone.

    `grafted = instruct + scale * (tuned - base)`; with another `instruct_scale` b,
    `grafted = scale * tuned + b * instruct + (1 - scale - b) * base`. Each sum is rounded once.

    Args:
        base: folder or hub id of BASE, either with `@revision` if wished. May be left out for an adapter that names it,
            and for a delta, against whose digests it is then only checked. Default: the one that TUNED's run recorded,
            which must be unchanged.
        instruct: the same for INSTRUCT. Default: the one that TUNED's run recorded, which must be unchanged.
        tuned: BASE after training: a full checkpoint, or a PEFT adapter of any type that changes weights. Several are
            summed: a list of these, each with its weight as `source:0.5` or `(source, 0.5)`.
        delta: in the place of `tuned`: a delta of this BASE as `extract_delta` writes it. In fp32 and exact, as it is
            for 16-bit checkpoints, it gives the bits that `tuned` gives (exponents within 2^16, as everywhere).
        output: folder of the result; must not exist.
        scale: multiplier of the delta. Default 1.
        instruct_scale: the multiplier b of INSTRUCT. Default 1.
        modules: weights that receive the delta: `all` (default), `linear` (the weights of the q, k, v, o, gate, up and
            down projections), a regular expression searched in the names of INSTRUCT's weights, or a list of these.
        format: `model` (dense weights), `adapter` (a PEFT adapter for INSTRUCT), or `auto` (default): the adapter
            where an exact one exists and INSTRUCT is a hub id. With a local INSTRUCT the result is dense, and an exact
            adapter form stands in its folder `adapter`.
        dtype: `auto` (default, the dtype of each INSTRUCT weight), `float32`, `bfloat16` or `float16`.
        rounding: `nearest`, `stochastic`, or `auto` (default): nearest, unless a sample of all weights shows that this
            would keep less than 0.9 of the delta. Then stochastic; or, where its noise would be above five times the
            delta's norm, float32 if `dtype` is `auto`.
        seed: of stochastic rounding. Default 0.
        vocab: `strict` (default) refuses sides with different token rows; `shared` grafts the rows that all have.
        chat_template: `instruct` (default) or `trained`: the templates in TUNED's folder, which it was trained with; of
            a delta those that TUNED had.
        max_shard_size: bytes of a file of the result, such as `5GB`. Default: INSTRUCT's own files.
        overwrite: whether an existing graft at `output` may be replaced. Default False.
        untie: whether a tied INSTRUCT may receive a head of its own. Default False.
        digest: of the input files, for the manifest: `xxh3` (default), `sha256` (slow, shows forgery too) or `none`.
        stats: whether to measure sigma, realised and noise. Default True.
        processes: on this machine, which share out the files of a dense result; the same bytes and figures come out.
            Faster where several read and write faster than one, as on a parallel file system. Default 1.
        base_dtype: dtype in which training loaded BASE, which is rounded to it before subtracting; `tuned` for the
            dtype of each weight of TUNED; several, if one stage of training followed another, in their order (none: as
            on disk). Default: what TUNED's run recorded, else as on disk. Of an adapter on the full model of an earlier
            run: dtype in which its training loaded that model, whose own record, or weights, tell of BASE.
        rank: write the nearest LoRA of this rank for an adapter that has no exact form; the report has its error.
        find_base: whether to take BASE from the table of known pairs, or from INSTRUCT's card, where neither `base` nor
            `tuned` names it. Default False: an error says what was found.
        progress: whether to show a bar on a terminal. Default True.

    Returns:
        counts, figures and warnings; see `GraftReport`.

    Raises:
        InputError: bad input, found before anything was written.
        GraftError: the graft failed (values that are not finite, full disk); nothing is left at `output`.

    Source: Shadow-FT (arXiv 2505.12716), equation 2; RE-Adapt (arXiv 2405.15007) for `instruct_scale`.

    """
    settings = GraftOptions(
        scale=scale, instruct_scale=instruct_scale, modules=modules, format=format, dtype=dtype, rounding=rounding,
        seed=seed, vocab=vocab, chat_template=chat_template, max_shard_size=max_shard_size, overwrite=overwrite,
        untie=untie, digest=digest, stats=stats, processes=processes,
        base_dtype=base_dtype, rank=rank,
    )  # fmt: skip
    sides = {"base": base, "instruct": instruct, "tuned": tuned, "delta": delta}
    return write_graft(sides, output, settings, find_base=find_base, progress=progress)


def write_graft(
    sides: Mapping[str, Any],
    output: Source,
    options: GraftOptions,
    *,
    find_base: bool = False,
    progress: bool = True,
    seen: Seen | None = None,
) -> GraftReport:
    """Write the graft of `sides`, by role, to `output`; see `graft`.

    With `seen`, which is called with every block of a dense result (`stream_to`), its weights are not written: their
    files have headers alone, and hardly any size on the disk.
    """
    target = output_folder(output)
    recover(target)
    check_free(target, options.overwrite)
    with _opened(sides, target, options, find_base) as inputs, tells_what_is_written(target):
        check_place(target, inputs.folders)
        with OutputFolder(target, options.overwrite) as place:
            if inputs.form == "adapter":
                report = _write_adapter_form(inputs, place.part, target, options, progress)
            else:
                way_out = _way_out(options, target, find_base, sides)
                report = _write_dense_form(inputs, place.part, target, options, progress, way_out, seen)
            place.commit()
    return report


def _way_out(options: GraftOptions, target: Path, find_base: bool, sides: Mapping[str, Any]) -> str:
    """Return the sentence and the command that follow a warning that rounding lost a part of the delta."""
    exact = replace(options, dtype="float32", rounding="auto")
    words = ["shadow-trl", "graft", *(["--find-base"] if find_base else [])]
    for role, source in sides.items():
        given = source if isinstance(source, (list, tuple)) else [source]
        parts = [":".join(map(str, part)) if isinstance(part, tuple) else str(part) for part in given]
        words += [word for part in parts if source is not None for word in (f"--{role}", part)]
    for name, option in declared().items():
        value = getattr(exact, name)
        if value != option.default and name not in ("overwrite", "digest", "stats"):
            listed = value if isinstance(value, list) else [] if value is True else [value]
            words += [f"--{name.replace('_', '-')}", *map(str, listed)]
    return f" Without a loss:\n  {shlex.join([*words, '--output', f'{target}-float32'])}"


@contextmanager
def _opened(sides: Mapping[str, Any], target: Path, options: GraftOptions, find_base: bool) -> Iterator[Inputs]:
    """Open the sides of a graft of TUNED or of a delta."""
    base, tuned, delta = (sides.get(role) for role in ("base", "tuned", "delta"))
    if (tuned is None) == (delta is None):
        raise ConfigError("give either tuned or delta: what BASE learnt is one of them.")
    known = recorded_sides(tuned, base=base, instruct=sides.get("instruct"))
    if delta is not None:
        yield open_delta(base, known["instruct"], delta, options)
        return
    start = known.get("base")
    if start is None and not names_base(tuned):
        start = taken_base(known["instruct"], confirmed=find_base, missing="base")
    with one_tuned(start, tuned, target, options.base_dtype) as single:
        yield open_tuned_inputs(single, known["instruct"], options)


def _write_dense_form(
    inputs: Inputs, part: Path, target: Path, options: GraftOptions, progress: bool, way_out: str, seen: Seen | None
) -> GraftReport:
    from ..grafting.precision import choose_precision
    from ..grafting.stream import stream_in_processes, stream_to

    scratch = part / ".converted"
    jobs = inputs.tuned.jobs(inputs.instruct, options, scratch)
    check_rounding(jobs, options)
    precision = choose_precision(jobs, options)
    jobs, options = precision.jobs, precision.options
    files = plan_files(jobs.weights, jobs.layout, options.max_shard_size)  # type: ignore[arg-type]
    small = copied_files(inputs.instruct, templates=not inputs.template.source)
    room = 0 if seen else sum(file.size for file in files)
    check_space(target, room + sum(path.stat().st_size for path in small))
    read = {"instruct": small, **inputs.template.files}
    with Digests(inputs.sides, read, options) as digests, Progress(sum(f.size for f in files), progress) as bar:
        if seen is None:
            outcome = stream_in_processes(files, part, options, bar.add)
        else:
            hollow = [HollowWriter(part / file.name, file.size, file.header) for file in files]
            outcome = stream_to(files, hollow, options, bar.add, seen)
        check_finite(outcome)
        write_index(files, jobs.layout, part)
        shutil.rmtree(scratch, ignore_errors=True)
        copy_files(small, inputs.instruct, part)
        write_templates(inputs.template.templates, part)
        dtype = main_dtype(jobs.weights)
        write_config(part, dtype, jobs.config_edits)
        figures = graft_figures(outcome.sums, options.stats, sigma="base" in inputs.sides)
        notes = [*inputs.warnings, *jobs.warnings]
        notes += graft_warnings(figures, dtype or "", options.rounding, way_out)
        if options.untie and not jobs.config_edits:
            notes.append("untie changes nothing: no head has a delta of its own on a tied embedding.")
        report = GraftReport(
            target, "model", jobs.grafted, len(jobs.weights) - jobs.grafted, dtype or "", options.scale,
            options.instruct_scale, **figures, warnings=notes, dense_because=inputs.reasons,
            realised_in_bf16=realised_in_bf16(outcome.sums, options.stats),
            rounding=options.rounding, rounded_because=precision.because, beside=BESIDE if inputs.beside else None,
            load=loading_call(part, inputs.instruct, str(target)),
        )  # fmt: skip
        sides = digests.collect()
        if inputs.beside:
            beside = _write_beside(inputs, part / BESIDE, target / BESIDE, options, sides)
            if beside.text_class is not None:
                report.warnings.append(f"of {BESIDE}/: {text_class_caution(beside.text_class)}")
        _write_provenance(part, inputs, report, options, sides=sides, left_out=jobs.left_out)
    check_result(part, target, small, inputs.instruct.path)
    return report


def _write_adapter_form(inputs: Inputs, part: Path, target: Path, options: GraftOptions, progress: bool) -> GraftReport:
    scratch, notes = part / ".truncated", list(inputs.warnings)
    base, adapter = inputs.tuned.base, inputs.tuned.checkpoint
    if options.rank is not None:
        from .truncate import truncated

        jobs = Full(base, adapter).jobs(base, GraftOptions(untie=True), scratch)
        found = truncated(jobs, base, options.rank, target, progress=progress)
        adapter = found.write(scratch / "lora", base)
        notes.append(f"the adapter is the rank-{options.rank} part of the delta: relative error {found.error:.3g}.")
        notes += [*jobs.warnings, *found.warnings]
    elif isinstance(inputs.tuned, PlainLora):
        place_on(inputs.tuned.modules, adapter, inputs.instruct)
    small = copied_files(inputs.instruct, adapter=True, templates=not inputs.template.source)
    check_space(target, 2 * sum(path.stat().st_size for path in (*small, *adapter.files)))
    read = {"instruct": small, **inputs.template.files}
    with Digests(inputs.sides, read, options) as digests:
        report = _write_adapter(inputs, adapter, part, target, options, small)
        report.warnings[:0] = notes
        shutil.rmtree(scratch, ignore_errors=True)
        _write_provenance(part, inputs, report, options, sides=digests.collect(), left_out=[])
    check_result(part, target, small, inputs.instruct.path)
    return report


def _write_beside(
    inputs: Inputs, part: Path, target: Path, options: GraftOptions, sides: Mapping[str, Entry]
) -> GraftReport:
    """Write the same graft as an adapter, whole, below the dense one, whose `sides` were digested."""
    exact = options.for_adapter()
    assert exact is not None  # else there would be none beside
    small = copied_files(inputs.instruct, adapter=True, templates=not inputs.template.source)
    part.mkdir()
    report = _write_adapter(inputs, inputs.tuned.checkpoint, part, target, exact, small)
    _write_provenance(part, inputs, report, exact, sides=sides, left_out=[])
    check_result(part, target, small, inputs.instruct.path)
    return report


def _write_adapter(
    inputs: Inputs, adapter: Checkpoint, part: Path, target: Path, options: GraftOptions, small: list[Path]
) -> GraftReport:
    """Write `adapter`, made one for INSTRUCT, and the files beside it."""
    from ..adapters.repoint import write_adapter

    modules, narrow = write_adapter(adapter, inputs.tuned.base, inputs.instruct, options.scale, part)
    notes = narrow_warning(narrow)
    copy_files(small, inputs.instruct, part)
    write_templates(inputs.template.templates, part)
    if is_local(inputs.instruct):
        notes.append(
            f"the adapter names the local folder {inputs.instruct.source} as its model: it loads only where that "
            "path leads there."
        )
    text = text_class(adapter, inputs.instruct)
    if text is not None:
        notes.append(text_class_caution(text))
    code = next(iter(adapter.specs.values())).code
    return GraftReport(
        target, "adapter", modules, 0, TORCH_NAMES[code], options.scale, warnings=notes, text_class=text,
        load=loading_call(part, inputs.instruct, str(target), text_class=text),
    )  # fmt: skip


def _write_provenance(
    part: Path,
    inputs: Inputs,
    report: GraftReport,
    options: GraftOptions,
    *,
    sides: Mapping[str, Entry],
    left_out: list[str],
) -> None:
    report.warnings.extend(other_base(inputs.tuned, sides))
    found = report.to_dict()
    for name in ("output", "scale", "instruct_scale", "rounding", "load"):  # places of today, and what `options` has
        del found[name]
    named = {role: vars(entry) for role, entry in sides.items()}
    facts = {"options": options.to_dict(), "left_out": left_out, **found}
    if inputs.template.whose is not None:
        facts["chat_template"] = inputs.template.whose
    content = {"kind": "graft", **inputs.tuned.recorded, **named, **facts}
    card = write_model_card(part, content, adapter=report.form == "adapter", instruct=inputs.instruct)
    write_manifest(part, {**content, "card": file_digest(card), "files": files_in(part)})


def check_finite(outcome: Outcome) -> None:
    """Raise GraftError if a weight has values that are not finite."""
    if not outcome.bad:
        return
    places = {name: ", ".join(bad.sides) or f"result in {bad.dtype}" for name, bad in outcome.bad.items()}
    lines = [f"{name}  not finite in {place}" for name, place in places.items()]
    hint = " A sum beyond the largest number of the output dtype: write --dtype float32 or bfloat16."
    overflow = any(not bad.sides for bad in outcome.bad.values())
    raise GraftError(
        f"{len(lines)} weight{'s have' if len(lines) > 1 else ' has'} values that are infinite or not a number.\n"
        f"{list_names(lines)}\n"
        f"Repair or replace the checkpoint.{hint if overflow else ''}"
    )
