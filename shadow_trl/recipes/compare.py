"""From the models that a run made to its report: load each, score it, and gather the figures."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import Any

from ..checkpoints.manifest import read_manifest
from ..errors import ShadowError
from ..evaluation.report import TITLES, RunReport
from ..evaluation.scoring import Scores, end_tokens, score
from ..grafting.reports import GraftReport
from ..operations.gap import gap
from ..runtime.processes import say
from ..training.origins import Origins, require_base, require_instruct
from ..training.preflight import GRAFTED_FOLDER
from .options import Options


@contextmanager
def timed(seconds: dict[str, float], name: str) -> Iterator[None]:
    """Put the seconds that the block takes into `seconds[name]`, if it ends well."""
    started = time.perf_counter()
    yield
    seconds[name] = round(time.perf_counter() - started, 1)


def make_report(
    options: Options,
    origins: Origins,
    models: Mapping[str, str],
    rows: list[dict[str, Any]] | None,
    *,
    seconds: dict[str, float],
    output: str,
    titles: Mapping[str, str] = TITLES,
    unscored: tuple[str, ...] = (),
) -> RunReport:
    """Score the models of a run on `rows`, gather all figures and write `report.json`. For the main process.

    Args:
        options: of the recipe, or of the last stage of the pipeline.
        origins: where BASE and INSTRUCT come from.
        models: name of each model, in the order of the table -> folder or hub id. "tuned" is the folder of the run,
            "grafted", where there is a graft, the folder of its result.
        rows: as `scoring.read_rows` returns them; None scores nothing.
        seconds: wall-clock seconds of each step; those of scoring are added.
        output: folder of the recipe or the pipeline, for `report.json`.
        titles: what the table calls each model. Default `TITLES`.
        unscored: names of models that are listed without scores.
    """
    scores = {}
    if rows:
        say(f"Scoring the models on {len(rows)} rows of {options.recipe.score_rows}")
        with timed(seconds, "score"):
            for name in (name for name in models if name not in unscored):
                scores[name] = _score_model(options, origins, models[name], rows, title=titles[name])
    graft = _graft_figures(Path(models["tuned"]), origins, scored=bool(rows)) if "grafted" in models else None
    report = RunReport(
        models=models,
        output=output,
        scores=scores,
        graft=graft,
        rows=options.recipe.score_rows,
        seconds=seconds,
        titles=titles,
    )
    report.write(output)
    return report


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


def _score_model(options: Options, origins: Origins, source: str, rows: list[dict[str, Any]], *, title: str) -> Scores:
    """Score one model, a folder (weights or adapter) or hub id, with INSTRUCT's tokenizer and end tokens."""
    from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

    recipe, instruct = options.recipe, require_instruct(origins).source
    revision = require_instruct(origins).revision or "main"
    tokenizer = AutoTokenizer.from_pretrained(instruct, revision=revision)
    try:
        generation = GenerationConfig.from_pretrained(instruct, revision=revision)
    except OSError:  # INSTRUCT has no generation config: the tokenizer's end token alone
        generation = None
    model = AutoModelForCausalLM.from_pretrained(
        source, dtype=recipe.score_dtype, revision=revision if source == instruct else "main"
    ).to(options.training.device)
    return score(
        model,
        tokenizer,
        rows,
        batch_size=recipe.score_batch_size,
        max_new_tokens=recipe.score_max_new_tokens,
        progress=None if options.training.disable_tqdm else f"Scoring {title}",
        eos_token_ids=end_tokens(generation, tokenizer),
    )
