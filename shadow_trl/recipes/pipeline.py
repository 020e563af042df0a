"""The pipeline: Shadow-SFT on BASE, then Shadow-DPO from its folder, and one graft that carries both deltas.

grafted = instruct + scale * (tuned after SFT and DPO - base)
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from accelerate import PartialState

from ..checkpoints.digests import weight_digests
from ..checkpoints.manifest import GRAFTED_FOLDER, read_manifest, write_manifest
from ..errors import InputError
from ..evaluation.report import TITLES, RunReport
from ..results.folder import Scratch
from ..runtime.processes import check_shared, run_on_main, say
from ..training.loading import Loading, load_adapter
from ..training.origins import Origins, require_instruct, resolve_origins
from .compare import make_report, score_arms, timed
from .data import load_data
from .help import is_asked
from .options import Options
from .pipeline_options import STAGES, Plan, read_plan
from .run import exit_code, find_models, main_remains, prepare, run_folder, train_stage

HELP = """\
usage: shadow-trl sft-dpo --config FILE.yaml [--stages sft,dpo] [--output_dir DIR] [--KEY VALUE ...]

Shadow-SFT on BASE, then Shadow-DPO from its folder: grafted = instruct + scale * (tuned - base).

  --config FILE.yaml    sections `sft:` and `dpo:` with the keys of the two recipes; keys of both at the top level
  --stages sft,dpo      which stages to run (default: both); a finished one is kept
  --output_dir DIR      the stages go into DIR/sft and DIR/dpo (default: a new folder below outputs/); the same command
                        again resumes with the unfinished stage
  --json                print report.json on stdout, and all else on stderr
  --KEY VALUE           overrides a key for both stages, --sft.KEY or --dpo.KEY for one of them
  --accelerate_config NAME|FILE, --num_processes N, ...
                        both stages in several processes: all options of accelerate launch (shadow-trl sft --help)

Keys: shadow-trl sft --help, shadow-trl dpo --help."""

MERGED_FOLDER = "merged"


def main_sft_dpo(argv: Sequence[str] | None = None, *, default_config: str | Path | None = None) -> int:
    """Run Shadow-SFT, then Shadow-DPO; return the exit code: 0, 2 for bad input, 1 for a failed graft."""
    words = sys.argv[1:] if argv is None else list(argv)
    if is_asked(words):
        print(HELP)
        return 0
    return exit_code(lambda given: run_pipeline(given, default_config), words)


def run_pipeline(argv: Sequence[str], default_config: str | Path | None = None) -> RunReport | None:
    """Run the stages that are not done, each in a folder of its own, `sft` and `dpo`, and report on the last graft.

    Args:
        argv: options as for `accelerate launch recipes/shadow_sft_dpo.py`, without the program's name.
        default_config: YAML file used when `argv` names neither `--config` nor `--model_name_or_path`.

    Returns:
        The report, on the main process; None on every other. It is also in `output_dir/report.json`.

    Raises:
        InputError: the options, data or models are not usable.
        GraftError: a graft failed after training; the tuned BASE of the stage is saved.
    """
    plan = read_plan(argv, default_config)
    for stage in plan.stages:
        rows = prepare(plan.options[stage])
    if STAGES[0] in plan.left:  # what starts from its folder names no other models
        find_models(plan.options[STAGES[0]])
    # All of it before the first stage starts: faults in the data of DPO must not show up hours later.
    data = {stage: load_data(plan.options[stage]) for stage in plan.left}
    state = PartialState()
    # No process may start to write before all of them have seen what is done.
    state.wait_for_everyone()
    seconds: dict[str, float] = {}
    with run_folder("shadow_sft_dpo", plan.output, state) as output:
        root = Path(output)
        if rows:
            check_shared(state, root, what="the models to score")
        for stage in plan.stages:
            if stage not in plan.left:
                say(f"{stage.upper()} is done: {root / stage / GRAFTED_FOLDER}. Remove {root / stage} to run it again.")
                continue
            try:
                with timed(seconds, stage.upper()):
                    _run_stage(plan, stage, root, data.pop(stage))
            except BaseException:
                if plan.output is None and stage != STAGES[0]:
                    say(f"SFT is done. To resume from there, add --output_dir {root} to the same command.")
                raise
        return _make_report(plan, root, rows, seconds, state)


def _run_stage(plan: Plan, stage: str, root: Path, data: dict[str, Any]) -> None:
    """Train and graft one stage; DPO starts from the folder of SFT."""
    options, checkpoint = plan.options[stage], plan.left[stage]
    options.training.output_dir = str(root / stage)
    options.training.resume_from_checkpoint = checkpoint
    options.training.push_to_hub &= stage == plan.stages[-1]  # one graft is published: the last
    if stage != STAGES[0]:
        start = root / STAGES[0]
        if options.recipe.merge_adapter:
            start = run_on_main(PartialState(), lambda: _merge(root, options), what="merging the adapter")
        options.model.model_name_or_path = str(start)
    say(f"Stage {stage.upper()} in {root / stage}" + (f", from {checkpoint}" if checkpoint else ""))
    train_stage(stage, options, data, record=plan.records[stage])


def _merge(root: Path, options: Options) -> Path:
    """Merge the adapter of the SFT stage into BASE, in the dtype that the DPO stage trains in; return the folder.

    The folder is a run in its own right with the origins of the SFT stage, so the graft after DPO carries both deltas.
    """
    merged, run, training = root / MERGED_FOLDER, root / STAGES[0], options.training
    if merged.is_dir():  # it was renamed once complete
        return merged
    origins = _origins(run, training)
    if origins.adapter is None or origins.policy is None:
        raise InputError(f"merge_adapter: {run} holds no adapter to merge. Leave merge_adapter out.")
    below = Loading(training).load(origins.policy)
    model = load_adapter(origins.adapter, below, trainable=False).merge_and_unload()
    with Scratch(merged) as scratch:
        unfinished = scratch.part / MERGED_FOLDER
        model.save_pretrained(unfinished)
        manifest = read_manifest(run) or {}
        write_manifest(unfinished, {**manifest, "adapter": None, "weights": weight_digests(unfinished)})
        unfinished.rename(merged)
    return merged


def _origins(run: Path, training: Any) -> Origins:
    """Return where the run comes from; what the options name wins over its manifest."""
    return resolve_origins(
        str(run),
        base=training.base_model,
        instruct=training.instruct_model,
        base_revision=training.base_revision,
        instruct_revision=training.instruct_revision,
    )


def _make_report(
    plan: Plan, root: Path, rows: list[dict[str, Any]] | None, seconds: dict[str, float], state: PartialState
) -> RunReport | None:
    """Compare INSTRUCT and the graft of each stage up to the last selected one; None on all but the main process."""
    last = plan.stages[-1]
    options, run = plan.options[last], root / last
    training = options.training
    origins = _origins(run, training)
    sft = {"sft": str(root / STAGES[0] / GRAFTED_FOLDER)} if last != STAGES[0] else {}
    instruct = require_instruct(origins).source
    models = {"instruct": instruct, **sft, "shadow": str(run / GRAFTED_FOLDER), "tuned": str(run)}
    titles = {**TITLES, "sft": "graft after SFT", "shadow": f"graft after {last.upper()}"}
    # The tuned BASE is what more training starts from: it is listed, not scored.
    arms = score_arms(options, origins, models, rows, seconds=seconds, titles=titles, unscored=("tuned",))
    if not main_remains(state):
        return None
    return make_report(options, origins, arms, seconds=seconds, output=str(root), titles=titles)
