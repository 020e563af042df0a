"""The mains of the recipes: train BASE, graft onto INSTRUCT, and show what was gained and what was kept.

A run goes through these steps: read the options, load the data, give the run its folder, train and graft
(`ShadowSFTTrainer`, `ShadowDPOTrainer`), tune INSTRUCT directly for comparison, free the process group, score all
models on the main process, print and write the report.
"""

from __future__ import annotations

import copy
import gc
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from trl import DPOTrainer, SFTTrainer, get_peft_config, get_quantization_config

from ..errors import ConfigError, InputError, OutputExistsError, ShadowError
from ..evaluation.report import RunReport
from ..evaluation.scoring import read_rows
from ..runtime.processes import run_on_main, say
from ..training.origins import Origins, require_instruct
from ..training.preflight import GRAFTED_FOLDER
from ..training.trainers import ShadowDPOTrainer, ShadowSFTTrainer
from .compare import Outcome, make_report
from .data import load_data
from .options import Options, parse

TRAINERS: dict[str, tuple[Any, Any]] = {"sft": (ShadowSFTTrainer, SFTTrainer), "dpo": (ShadowDPOTrainer, DPOTrainer)}
"""For each kind of recipe the Shadow trainer and TRL's own, which tunes INSTRUCT directly."""

OUTPUTS_FOLDER = "outputs"
DIRECT_FOLDER = "direct"


def main_sft(argv: Sequence[str] | None = None, *, default_config: str | Path | None = None) -> int:
    """Run Shadow-SFT; return the exit code: 0, 2 for bad input (nothing is written), 1 for a failed graft."""
    return _main("sft", argv, default_config)


def main_dpo(argv: Sequence[str] | None = None, *, default_config: str | Path | None = None) -> int:
    """Run Shadow-DPO; return the exit code: 0, 2 for bad input (nothing is written), 1 for a failed graft."""
    return _main("dpo", argv, default_config)


def _main(kind: str, argv: Sequence[str] | None, default_config: str | Path | None) -> int:
    return exit_code(lambda: run(kind, sys.argv[1:] if argv is None else argv, default_config))


def exit_code(work: Callable[[], RunReport | None]) -> int:
    """Print the report that `work` returns and return 0; print an error of ours and return its exit code."""
    rank = int(os.environ.get("RANK", "0"))
    try:
        report = work()
    except ShadowError as error:
        # Every process reports its error: the launcher shows one of them, and not necessarily the first.
        print(f"{f'[process {rank}] ' if rank else ''}{type(error).__name__}: {error}", file=sys.stderr, flush=True)
        return error.exit_code
    if report is not None:
        print(f"\n{report.text()}", flush=True)
    return 0


def run(kind: str, argv: Sequence[str], default_config: str | Path | None = None) -> RunReport | None:
    """Run a recipe from its command line.

    Args:
        kind: "sft" or "dpo".
        argv: options as for `accelerate launch recipes/shadow_dpo.py`, without the program's name.
        default_config: YAML file used when `argv` names neither `--config` nor `--model_name_or_path`.

    Returns:
        The report, on the main process; None on every other.

    Raises:
        InputError: the options, data or models are not usable; nothing was written.
        GraftError: the graft failed after training; the tuned BASE is saved.

    """
    options = parse(kind, argv, default_config)
    recipe = options.recipe
    if recipe.merge_adapter:
        raise ConfigError(
            "merge_adapter belongs to the DPO stage of recipes/shadow_sft_dpo.py. Here, merge the adapter yourself "
            "(PeftModel.merge_and_unload, then save_pretrained) and name BASE with base_model. Nothing was written."
        )
    if recipe.torch_threads is not None:
        torch.set_num_threads(recipe.torch_threads)
    rows = read_rows(recipe.score_rows) if recipe.score_rows else None
    data = load_data(options)
    set_model_options(options)
    state = PartialState()
    with _run_folder(kind, options, state):
        outcome = train_stage(kind, options, data)
    return make_report(options, outcome, rows, output=options.training.output_dir) if main_remains(state) else None


def train_stage(kind: str, options: Options, data: dict[str, Any]) -> Outcome:
    """Train BASE and graft; then tune INSTRUCT directly if asked to.

    Args:
        kind: "sft" or "dpo".
        options: of the recipe, with the folder of the run in `training.output_dir`.
        data: keyword arguments of the trainer, as `load_data` returns them.
    """
    training, compare = options.training, options.recipe.compare_direct
    # Copied before the first trainer, so that its changes to the arguments do not leak into the second run.
    direct_args = _direct_args(training)
    trainer = _shadow_trainer(kind, options, data)
    origins = trainer.origins
    if origins.instruct is None and (compare or options.recipe.score_rows):
        raise ConfigError("compare_direct and score_rows need an instruct_model. Nothing was written.")
    say(f"Tuning BASE {origins.base}" + (f", then grafting onto {origins.instruct}" if training.graft else ""))
    seconds = {"train and graft": _timed(lambda: trainer.train(_resume_point(training)))}
    if not training.graft:
        trainer.save_model()
    _free(trainer)
    if compare:
        if kind == "dpo":
            # The direct run precomputes the reference if the Shadow run does.
            direct_args.precompute_ref_log_probs = bool(trainer.args.precompute_ref_log_probs)
        _set_revision(direct_args, require_instruct(origins).revision)
        say(f"Tuning INSTRUCT {origins.instruct} directly, with the same data and settings")
        seconds["tune INSTRUCT directly"] = _timed(lambda: _train_direct(kind, options, origins, direct_args, data))
    models = {
        "instruct": origins.instruct and origins.instruct.source,
        "direct": direct_args.output_dir if compare else None,
        "tuned": training.output_dir,
        "grafted": str(Path(training.output_dir) / GRAFTED_FOLDER) if training.graft else None,
    }
    return Outcome(origins, {name: source for name, source in models.items() if source is not None}, seconds)


def _resume_point(training: Any) -> str | bool | None:
    """Return the checkpoint to resume from: a folder, True for the last one in `output_dir`, or None."""
    given = training.resume_from_checkpoint
    return str(given).lower() == "true" or (given or None)


def set_model_options(options: Options) -> None:
    """Put TRL's model arguments into `model_init_kwargs`; values that are TRL's defaults are left to the trainer."""
    model, training = options.model, options.training
    revision = model.model_revision if model.model_revision != "main" else None
    if revision is None and training.base_model is None:
        revision = training.base_revision
    chosen = {
        "revision": revision,
        "attn_implementation": model.attn_implementation,
        "dtype": model.dtype if model.dtype != "float32" else None,
    }
    kwargs = {name: value for name, value in chosen.items() if value is not None}
    kwargs.update(training.model_init_kwargs or {})
    training.model_init_kwargs = kwargs or None


@contextmanager
def _run_folder(kind: str, options: Options, state: PartialState) -> Iterator[None]:
    """Give the run its own folder unless `output_dir` was given; remove it again if the input was bad."""
    training = options.training
    if options.output_given:
        direct = Path(training.output_dir) / DIRECT_FOLDER
        if options.recipe.compare_direct and direct.exists() and not training.graft_overwrite:
            raise OutputExistsError(
                f"{direct} already holds a result. Choose another output_dir, or pass graft_overwrite to replace it. "
                "Nothing was written."
            )
        yield
        return
    with own_folder(f"shadow_{kind}", state) as training.output_dir:
        yield


@contextmanager
def own_folder(name: str, state: PartialState) -> Iterator[str]:
    """Make a new folder for a run below `outputs/`; remove it again if the run fails before writing anything."""
    folder = Path(run_on_main(state, lambda: _claim_folder(name), what="making the run's folder"))
    try:
        yield str(folder)
    except BaseException:
        if state.is_main_process:
            with suppress(OSError):  # a folder that is not empty stays
                folder.rmdir()
                folder.parent.rmdir()
        raise


def _claim_folder(name: str) -> str:
    """Make a new folder `outputs/<name>-<date>-<time>` in the current folder and return its path."""
    stem = f"{name}-{time.strftime('%Y%m%d-%H%M%S')}"
    number = 1
    while True:
        folder = Path(OUTPUTS_FOLDER) / (stem if number == 1 else f"{stem}-{number}")
        try:
            folder.mkdir(parents=True)
        except FileExistsError:
            number += 1  # another run started in the same second
        except OSError as reason:
            raise InputError(f"cannot make the run's folder {folder}: {reason}. Pass --output_dir.") from reason
        else:
            return str(folder)


def _shadow_trainer(kind: str, options: Options, data: dict[str, Any]) -> Any:
    """Build the Shadow trainer, which runs every check that is possible before training."""
    try:
        trainer = TRAINERS[kind][0](
            model=options.model.model_name_or_path,
            args=options.training,
            quantization_config=get_quantization_config(options.model),
            peft_config=get_peft_config(options.model),
            **data,
        )
    except ShadowError:
        raise
    except ValueError as reason:  # what TRL raises for options and data that do not fit together
        raise ConfigError(f"the trainer rejected this run: {reason} Nothing was written.") from reason
    return _ignore_bias_buffers(trainer, options)


def _direct_args(training: Any) -> Any:
    """Return the settings of the direct run: those of the Shadow run in another folder."""
    args = copy.copy(training)
    args.output_dir = str(Path(training.output_dir) / DIRECT_FOLDER)
    return args


def _set_revision(args: Any, revision: str | None) -> None:
    """Put INSTRUCT's revision into `model_init_kwargs` in place of BASE's."""
    kwargs = {name: value for name, value in (args.model_init_kwargs or {}).items() if name != "revision"}
    args.model_init_kwargs = {**kwargs, "revision": revision} if revision is not None else kwargs or None


def _train_direct(kind: str, options: Options, origins: Origins, args: Any, data: dict[str, Any]) -> None:
    """Tune INSTRUCT itself with TRL's own trainer and save it; the reference of DPO is the start, TRL's default."""
    trainer = TRAINERS[kind][1](
        model=require_instruct(origins).source,
        args=args,
        quantization_config=get_quantization_config(options.model),
        peft_config=get_peft_config(options.model),
        **data,
    )
    _ignore_bias_buffers(trainer, options).train()
    trainer.save_model()
    _free(trainer)


def _ignore_bias_buffers(trainer: Any, options: Options) -> Any:
    """Keep boolean buffers out of DDP's broadcasts if TRL's option `ignore_bias_buffers` asks for it."""
    if options.script.ignore_bias_buffers:
        trainer.model._ddp_params_and_buffers_to_ignore = [
            name for name, buffer in trainer.model.named_buffers() if buffer.dtype == torch.bool
        ]
    return trainer


def _free(trainer: Any) -> None:
    """Release the models and optimizer states that a trainer and its accelerator hold."""
    trainer.accelerator.free_memory()
    trainer.model = trainer.model_wrapped = trainer.optimizer = trainer.lr_scheduler = None
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def main_remains(state: PartialState) -> bool:
    """Destroy the process group, if there is one, and return whether this is the main process.

    Nothing after training needs the other processes: they end, so no barrier can time out while the main one scores.
    """
    is_main = state.is_main_process
    state.wait_for_everyone()
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        state.destroy_process_group()
    return is_main


def _timed(work: Any) -> float:
    """Return the seconds that `work` takes."""
    started = time.perf_counter()
    work()
    return time.perf_counter() - started
