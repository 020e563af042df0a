"""From the models that a recipe made to its report: load each, score it, put the figures together."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..checkpoints.sources import with_revision
from ..errors import ShadowError
from ..evaluation.report import TITLES, Arm, RunReport
from ..evaluation.scoring import Scores, score
from ..grafting.reports import GraftReport
from ..operations.gap import gap
from ..training.origins import Origins
from .options import Options

DIRECT_FOLDER = "direct"


@dataclass
class Outcome:
    """What the training part of a recipe leaves for its report.

    Args:
        origins: where BASE and INSTRUCT come from.
        graft: report of the graft, None for a run without one.
        seconds: wall-clock seconds of each stage.
    """

    origins: Origins
    graft: GraftReport | None
    seconds: dict[str, float] = field(default_factory=dict)


def make_report(options: Options, outcome: Outcome, rows: list[dict[str, Any]] | None) -> RunReport:
    """Score every model of the run on `rows`, if there are any, and return all figures together.

    Args:
        options: of the recipe.
        outcome: of the training.
        rows: as `scoring.read_rows` returns them; None scores nothing.
    """
    run, graft = options.training.output_dir, outcome.graft
    sources = {
        "instruct": outcome.origins.instruct,
        "direct": str(Path(run) / DIRECT_FOLDER) if options.recipe.compare_direct else None,
        "tuned": run,
        "grafted": str(graft.output) if graft is not None else None,
    }
    present = {name: source for name in TITLES if (source := sources[name]) is not None}
    started = time.perf_counter()
    scores = {
        name: score_model(options, outcome.origins, source, rows, title=TITLES[name])
        for name, source in (present.items() if rows else ())
    }
    if rows:
        outcome.seconds["score"] = time.perf_counter() - started
    return RunReport(
        arms=[Arm(name, source, scores.get(name)) for name, source in present.items()],
        output=run,
        graft=graft_figures(run, outcome.origins, graft.to_dict(), scored=bool(rows)) if graft is not None else None,
        rows=options.recipe.score_rows,
        seconds={name: round(value, 1) for name, value in outcome.seconds.items()},
    )


def graft_figures(run: str, origins: Origins, graft: Mapping[str, Any], *, scored: bool) -> dict[str, Any]:
    """Return the graft's report, with sigma and the size of the delta against the gap where that costs no download.

    An adapter was grafted without BASE's weights, and has no weights of its own to set against the gap.

    Args:
        run: folder of the run, with the tuned BASE.
        origins: where BASE and INSTRUCT come from.
        graft: `GraftReport.to_dict()`.
        scored: whether all models are on the disk anyway, because they were scored.
    """
    figures = dict(graft)
    full = Path(run, "config.json").is_file()
    if not full and not scored:
        return figures
    # There is a graft, so there are both.
    assert origins.base is not None
    assert origins.instruct is not None
    base = with_revision(origins.base, origins.base_revision)
    instruct = with_revision(origins.instruct, origins.instruct_revision)
    try:
        found = gap(base, instruct, run if full else None, progress=False)
    except ShadowError as reason:  # the result is on the disk; its report must not fail for a figure
        return {**figures, "warnings": [*figures["warnings"], f"the gap was not measured: {reason}"]}
    if figures["sigma"] is None:
        figures["sigma"] = found.sigma
    share = found.delta_to_gap
    return {**figures, "delta_to_gap": share * abs(graft["scale"]) if share is not None else None}


def score_model(
    options: Options, origins: Origins, source: str, rows: list[dict[str, Any]] | None, *, title: str
) -> Scores:
    """Score one model, a folder (weights or adapter) or hub id, with INSTRUCT's tokenizer and end tokens."""
    from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

    recipe, instruct = options.recipe, origins.instruct
    assert instruct is not None
    revision = origins.instruct_revision or "main"
    tokenizer = AutoTokenizer.from_pretrained(instruct, revision=revision)
    try:
        ends = GenerationConfig.from_pretrained(instruct, revision=revision).eos_token_id
    except OSError:  # INSTRUCT has no generation config: the tokenizer's end token alone
        ends = None
    model = AutoModelForCausalLM.from_pretrained(
        source, dtype=recipe.score_dtype, revision=revision if source == instruct else "main"
    ).to(options.training.device)
    listed = ends if isinstance(ends, list) else [ends]
    return score(
        model,
        tokenizer,
        rows or [],
        batch_size=recipe.score_batch_size,
        max_new_tokens=recipe.score_max_new_tokens,
        progress=None if options.training.disable_tqdm else f"Scoring {title}",
        eos_token_ids=[token for token in (*listed, tokenizer.eos_token_id) if token is not None],
    )
