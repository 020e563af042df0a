"""From the models that a run made to its report: load each, score it, and gather the figures."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import Any

from accelerate import PartialState

from ..checkpoints.manifest import GRAFTED_FOLDER, read_manifest
from ..errors import ShadowError
from ..evaluation.models import load, tokenizer_and_ends
from ..evaluation.report import TITLES, Arm, RunReport
from ..evaluation.scoring import Scores, answered_right, scores_of
from ..evaluation.steps import as_written
from ..grafting.options import GraftOptions
from ..grafting.reports import GraftReport
from ..operations.gap import gap
from ..operations.in_memory import MemoryGraft, open_grafts
from ..runtime.processes import say, share_out, together
from ..training.origins import Origins, require_base, require_instruct
from .options import Options


@contextmanager
def timed(seconds: dict[str, float], name: str) -> Iterator[None]:
    """Put the seconds that the block takes into `seconds[name]`, if it ends well."""
    started = time.perf_counter()
    yield
    seconds[name] = round(time.perf_counter() - started, 1)


def score_arms(
    options: Options,
    origins: Origins,
    models: Mapping[str, str],
    rows: list[dict[str, Any]] | None,
    *,
    seconds: dict[str, float],
    titles: Mapping[str, str] = TITLES,
    unscored: tuple[str, ...] = (),
) -> list[Arm]:
    """Score the models of a run on `rows`. For all processes, which answer different rows and return the same.

    Args:
        options: of the recipe, or of the last stage of the pipeline.
        origins: where BASE and INSTRUCT come from.
        models: name of each arm, in the order of the table -> folder or hub id. "tuned" is the folder of the run,
            "shadow", where there is a graft, the folder of its result.
        rows: as `scoring.read_rows` returns them; None scores nothing.
        seconds: wall-clock seconds of each step; those of scoring are added.
        titles: what the table calls each arm. Default `TITLES`.
        unscored: names of arms that are listed without scores.
    """
    arms = []
    if rows:
        say(f"Scoring the models on {len(rows)} rows of {options.recipe.score_rows}")
    with timed(seconds, "score"), together(PartialState(), what="scoring the models"):
        for name, source in models.items():
            if rows and name not in unscored:
                arms += _scored(options, origins, name, models, rows, title=titles[name])
            else:
                arms.append(Arm(name, source, _scale_of(options, name)))
    return arms


def make_report(
    options: Options,
    origins: Origins,
    arms: list[Arm],
    *,
    seconds: dict[str, float],
    output: str,
    titles: Mapping[str, str] = TITLES,
) -> RunReport:
    """Gather all figures of a run and write `report.json` to `output`. For the main process; arguments as above."""
    recipe, sources = options.recipe, {arm.name: arm.source for arm in arms}
    figures = None
    if "shadow" in sources:
        figures = _graft_figures(Path(sources["tuned"]), origins, scored=bool(recipe.score_rows))
    report = RunReport(
        arms=arms,
        output=output,
        graft=figures,
        rows=recipe.score_rows,
        kept=recipe.score_kept or (),
        seconds=seconds,
        titles=titles,
    )
    report.write(output)
    return report


def _scale_of(options: Options, name: str) -> float | None:
    """Return the scale of the model that an arm has on the disk."""
    if name == "instruct":
        return None
    return float(options.training.graft_scale) if name in ("shadow", "sft") else 1.0


def _scored(
    options: Options, origins: Origins, name: str, models: Mapping[str, str], rows: list[dict[str, Any]], *, title: str
) -> list[Arm]:
    """Score an arm at each scale; what is not on the disk at that scale is grafted in memory."""
    own, source = _scale_of(options, name), models[name]
    scales = [own] if own is None or name == "sft" else options.recipe.score_scales or [own]
    instruct = str(require_instruct(origins))
    start = str(require_base(origins)) if name in ("shadow", "tuned") else instruct
    tuned = models["tuned" if name == "shadow" else name]
    # Beside the run: what is merged on the way is gone afterwards.
    beside = Path(models["tuned"], "scaled")
    arms = []
    with ExitStack() as opened:
        grafts = None
        for scale in scales:
            at = title if scale is None else f"{title} at scale {scale:g}"
            model: str | MemoryGraft = instruct if name == "instruct" else source
            if scale != own:
                assert scale is not None
                receiver = instruct if name != "tuned" else start
                grafts = grafts or opened.enter_context(
                    open_grafts(base=start, instruct=receiver, tuned=tuned, beside=beside)
                )
                kept: dict[str, Any] = {"dtype": "float32"}
                if name == "shadow":
                    kept = {**options.training.graft_options(), **as_written(tuned, grafts)}
                model = grafts.graft(GraftOptions(**{**kept, "scale": scale, "format": "model"}))
            arms.append(Arm(name, source, scale, _score_model(options, origins, model, rows, title=at)))
    return arms


def _graft_figures(run: Path, origins: Origins, *, scored: bool) -> dict[str, Any]:
    """Return the report of the graft from its manifest, with sigma and `delta_to_gap` where they cost no download.

    An adapter was grafted without BASE's weights, and has no weights of its own to set against the gap. With `scored`
    all models are on the disk anyway.
    """
    manifest = read_manifest(run / GRAFTED_FOLDER)
    assert manifest is not None  # there is a graft
    found = {**manifest["options"], **manifest, "output": str(run / GRAFTED_FOLDER)}
    figures = {field.name: found[field.name] for field in fields(GraftReport)}
    full = (run / "config.json").is_file()
    if not full and not scored:
        return figures
    base, instruct = str(require_base(origins)), str(require_instruct(origins))
    try:
        measured = gap(base, instruct, str(run) if full else None, progress=False)
    except ShadowError as reason:  # the result is on the disk; its report must not fail for a figure
        return {**figures, "warnings": [*figures["warnings"], f"the gap was not measured: {reason}"]}
    sigma, share = figures["sigma"], measured.delta_to_gap
    figures["sigma"] = measured.sigma if sigma is None else sigma
    return {**figures, "delta_to_gap": share * abs(figures["scale"]) if share is not None else None}


def _score_model(
    options: Options, origins: Origins, source: str | MemoryGraft, rows: list[dict[str, Any]], *, title: str
) -> Scores:
    """Score one model, a folder (weights or adapter), hub id or graft, with INSTRUCT's tokenizer and end tokens."""
    recipe = options.recipe
    tokenizer, ends = tokenizer_and_ends(str(require_instruct(origins)))
    answer = partial(
        answered_right,
        load(source, dtype=recipe.score_dtype, device=options.training.device),
        tokenizer,
        batch_size=recipe.score_batch_size,
        max_new_tokens=recipe.score_max_new_tokens,
        progress=None if options.training.disable_tqdm else f"Scoring {title}",
        eos_token_ids=ends,
    )
    return scores_of(rows, share_out(rows, answer, what="answering the rows"))
