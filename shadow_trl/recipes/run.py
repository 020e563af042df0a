"""The mains of the recipes: train BASE, graft onto INSTRUCT, and show what was gained and what was kept."""

from __future__ import annotations

import copy
import gc
import json
import re
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.state import AcceleratorState
from jinja2 import TemplateError
from trl import DPOTrainer, SFTTrainer, get_peft_config, get_quantization_config

from ..checkpoints.hub import locate
from ..checkpoints.manifest import GRAFTED_FOLDER
from ..errors import ConfigError, InputError, OutputExistsError, ShadowError, ends_with
from ..evaluation.report import RunReport
from ..results.parents import remove_empty
from ..results.written import tells_what_is_written
from ..runtime import endings
from ..runtime.command_line import stdout_is_kept
from ..runtime.machine import lack
from ..runtime.patterns import check_patterns
from ..runtime.processes import check_known, check_shared, run_on_main, say
from ..training.engines import forget, load_for
from ..training.gathering import whole_weights
from ..training.guidance import GuidedSFTTrainer, GuidedShadowSFTTrainer
from ..training.origins import Origins, require_instruct
from ..training.preflight import refuse_unsupported
from ..training.resuming import checkpoint_of
from ..training.settings import check_settings
from ..training.trainers import ShadowDPOTrainer, ShadowSFTTrainer
from .compare import make_report, score_arms, timed
from .data import hub_ids, load_data, load_scored
from .options import Options, parse, take_flag
from .record import write_record

TRAINERS: dict[str, tuple[Any, Any]] = {"sft": (ShadowSFTTrainer, SFTTrainer), "dpo": (ShadowDPOTrainer, DPOTrainer)}
"""For each kind of recipe the Shadow trainer and TRL's own, which tunes INSTRUCT directly."""

GUIDED: dict[Any, Any] = {ShadowSFTTrainer: GuidedShadowSFTTrainer, SFTTrainer: GuidedSFTTrainer}
"""Their counterparts with `sft_guidance`."""

DIRECT_FOLDER = "direct"
_UNMARKED = (
    "That is what assistant_only_loss needs: mark the answers in a copy of the template and pass it as "
    "--chat_template_path, or pass --assistant_only_loss false for a loss on whole conversations."
)
"""The way out where TRL cannot tell by the template which tokens are the assistant's."""


def main_sft(argv: Sequence[str] | None = None, *, default_config: str | Path | None = None) -> int:
    """Run Shadow-SFT; return the exit code: 0, 2 for bad input (nothing is written), 1 for a failed graft."""
    return exit_code(lambda words: run("sft", words, default_config), argv)


def main_dpo(argv: Sequence[str] | None = None, *, default_config: str | Path | None = None) -> int:
    """Run Shadow-DPO; return the exit code: 0, 2 for bad input (nothing is written), 1 for a failed graft."""
    return exit_code(lambda words: run("dpo", words, default_config), argv)


def exit_code(work: Callable[[Sequence[str]], RunReport | None], argv: Sequence[str] | None) -> int:
    """Print what `work` reports of `argv` (None: the process's) and return 0; or print our error, return its code.

    With `--json` stdout has the content of `report.json` and nothing else.
    """

    def done() -> int:
        as_json, words = take_flag("json", sys.argv[1:] if argv is None else argv)
        with stdout_is_kept(as_json):
            report = work(words)
        if report is not None:
            print(json.dumps(report.to_dict(), indent=2) if as_json else f"\n{report.text()}", flush=True)
        return 0

    return endings.exit_code(done)


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
    rows = prepare(options)
    find_models(options)
    data = load_data(options)
    state = PartialState()
    with run_folder(f"shadow_{kind}", options.output, state) as output:
        options.training.output_dir = output
        if rows:
            check_shared(state, Path(output), what="the models to score")
        origins, models, seconds = train_stage(kind, options, data)
        arms = score_arms(options, origins, models, rows, seconds=seconds)
        return make_report(options, origins, arms, seconds=seconds, output=output) if main_remains(state) else None


@ends_with("Nothing was written.")
def prepare(options: Options) -> list[dict[str, Any]] | None:
    """Check the options of the training, set the threads of PyTorch, and return the rows to score, if there are any."""
    recipe, training = options.recipe, options.training
    check_known(PartialState())
    _check_precision(training)
    try:
        of_model = get_quantization_config(options.model), get_peft_config(options.model)
    except (ValueError, TypeError, ImportError) as reason:
        raise ConfigError(f"the options of the model are not valid: {reason}") from reason
    refuse_unsupported(training)
    check_settings(training, *of_model)
    training.resume_from_checkpoint = checkpoint_of(training.resume_from_checkpoint, training.output_dir)
    if recipe.torch_threads is not None:
        torch.set_num_threads(recipe.torch_threads)
    return load_scored(recipe) if recipe.score_rows else None


@ends_with("Nothing was written.")
def find_models(options: Options) -> None:
    """Check that the models which the options name are there, before data are loaded for them."""
    training = options.training
    for name, revision in (
        (options.model.model_name_or_path, None),
        (training.instruct_model, training.instruct_revision),
        (training.base_model, training.base_revision),
    ):
        if name is not None:
            locate(name, revision, weights=False)


def _check_precision(training: Any) -> None:
    """Refuse a mixed precision of the launcher that the options switch off: transformers would take the launcher's."""
    asked = "fp16" if training.fp16 else "bf16" if training.bf16 else "no"
    if training.mixed_precision != asked:
        # On a CPU it would only be slower.
        way_out = "Give" if training.use_cpu else f"Pass --{training.mixed_precision} true, or give"
        raise ConfigError(
            f"the launcher's mixed precision is {training.mixed_precision}, and the options of the training have bf16 "
            f"and fp16 off. {way_out} the launcher --mixed_precision no."
        )


def train_stage(
    kind: str, options: Options, data: dict[str, Any], *, record: Mapping[str, Any] | None = None
) -> tuple[Origins, dict[str, str], dict[str, float]]:
    """Train BASE and graft; then tune INSTRUCT directly if asked to.

    Args:
        kind: "sft" or "dpo".
        options: of the recipe, with the folder of the run in `training.output_dir`.
        data: keyword arguments of the trainer, as `load_data` returns them.
        record: options that are written beside the results once training begins. Default: none.

    Returns:
        Where BASE and INSTRUCT come from, name of each model -> folder or hub id, in the order of the table, and the
        wall-clock seconds of each step.
    """
    training, compare = options.training, options.recipe.compare_direct
    _set_model_options(options)
    # Copied before the first trainer, so that its changes to the arguments do not leak into the second run.
    direct_args = copy.copy(training)
    direct_args.output_dir, direct_args.push_to_hub = str(Path(training.output_dir) / DIRECT_FOLDER), False
    seconds: dict[str, float] = {}
    with _engine_of_its_own(training):
        trainer = _shadow_trainer(kind, options, Path(direct_args.output_dir), data)
        origins: Origins = trainer.origins
        say(f"Tuning BASE {origins.base}" + (f", then grafting onto {origins.instruct}" if training.graft else ""))
        if record is not None:
            folder = Path(training.output_dir)
            run_on_main(trainer.accelerator, lambda: write_record(folder, record), what="recording the options")
        with timed(seconds, "train and graft"):
            trainer.train(resume_from_checkpoint=training.resume_from_checkpoint)
        trainer.save_state()  # its log: steps and losses
        if not training.graft:
            _save(trainer)
        precomputed = bool(getattr(trainer.args, "precompute_ref_log_probs", False))
        _free(trainer)
    if compare:
        if kind == "dpo":
            # Its reference is its start, TRL's default, precomputed if that of the Shadow run is.
            direct_args.precompute_ref_log_probs = precomputed
        say(f"Tuning INSTRUCT {origins.instruct} directly, with the same data and settings")
        with timed(seconds, "tune INSTRUCT directly"):
            _train_direct(kind, options, origins, direct_args, data)
    models = {
        "instruct": origins.instruct and origins.instruct.source,
        "direct": direct_args.output_dir if compare else None,
        "tuned": training.output_dir,
        "shadow": str(Path(training.output_dir) / GRAFTED_FOLDER) if training.graft else None,
    }
    return origins, {name: source for name, source in models.items() if source is not None}, seconds


def _shadow_trainer(kind: str, options: Options, direct: Path, data: dict[str, Any]) -> Any:
    """Build the trainer of BASE, which runs every check that is possible before training."""
    recipe, training = options.recipe, options.training
    if recipe.compare_direct and direct.exists() and not training.graft_overwrite:
        raise OutputExistsError(
            f"{direct} already holds a result. Choose another output_dir, or pass graft_overwrite to replace it."
        )
    try:
        trainer = _trainer(TRAINERS[kind][0], options.model.model_name_or_path, training, options, data)
    except ShadowError:
        raise
    # What TRL, transformers and chat templates raise for options, data and models that do not fit together.
    except (
        ValueError, TypeError, LookupError, AttributeError, ImportError, RuntimeError, OSError, TemplateError
    ) as reason:  # fmt: skip
        if lack(reason) is not None:
            raise
        unmarked = getattr(training, "assistant_only_loss", False) and "generation" in str(reason)
        way_out = f" {_UNMARKED}" if unmarked else ""
        raise ConfigError(f"the trainer rejected this run: {type(reason).__name__}: {reason}{way_out}") from reason
    trainer.dataset_ids = hub_ids(options)
    if trainer.origins.instruct is None and (recipe.compare_direct or recipe.score_rows):
        raise ConfigError("compare_direct and score_rows need an instruct_model.")
    return trainer


def _train_direct(kind: str, options: Options, origins: Origins, args: Any, data: dict[str, Any]) -> None:
    """Tune INSTRUCT itself with TRL's own trainer and save it; its revision takes the place of BASE's."""
    instruct = require_instruct(origins)
    args.model_init_kwargs = {**(args.model_init_kwargs or {}), "revision": instruct.revision or "main"}
    with _engine_of_its_own(args):
        trainer = _trainer(TRAINERS[kind][1], instruct.source, args, options, data)
        trainer.train()
        trainer.save_state()
        _save(trainer)
        _free(trainer)


def _set_model_options(options: Options) -> None:
    """Put TRL's model arguments into `model_init_kwargs`; values that are TRL's defaults are left to the trainer."""
    model, training = options.model, options.training
    chosen = {
        "revision": model.model_revision if model.model_revision != "main" else None,
        "attn_implementation": model.attn_implementation,
        "dtype": model.dtype if model.dtype != "float32" else None,
    }
    kwargs = {name: value for name, value in chosen.items() if value is not None}
    training.model_init_kwargs = {**kwargs, **(training.model_init_kwargs or {})} or None


@contextmanager
def run_folder(name: str, given: str | None, state: PartialState) -> Iterator[str]:
    """Yield the `given` folder of a run, or a new one below `outputs/`, removed if the run fails before it writes.

    What leaves the block ends with what is in the folder then.
    """
    with tells_what_is_written(Path("outputs") if given is None else Path(given), instead=True):
        if given is not None:
            yield given
            return
        folder = run_on_main(state, lambda: _claim_folder(name), what="making the run's folder")
        try:
            yield folder
        finally:
            remove_empty([Path(folder)])


def _claim_folder(name: str) -> str:
    """Make a new folder `outputs/<name>-<date>-<time>` in the current folder and return its path."""
    stem = f"{name}-{time.strftime('%Y%m%d-%H%M%S')}"
    folder, number = Path("outputs") / stem, 1
    while True:
        try:
            folder.mkdir(parents=True)
            return str(folder)
        except FileExistsError:  # another run started in the same second
            number += 1
            folder = folder.with_name(f"{stem}-{number}")
        except OSError as reason:
            raise InputError(f"cannot make the run's folder {folder}: {reason}. Pass --output_dir.") from reason


def _trainer(trainer_class: Any, model: str | None, args: Any, options: Options, data: dict[str, Any]) -> Any:
    """Build a trainer of the run, Shadow's or TRL's own."""
    if options.recipe.sft_guidance is not None:
        trainer_class = partial(GUIDED[trainer_class], guidance_power=options.recipe.guidance_power)
    trainer = trainer_class(
        model=model,
        args=args,
        quantization_config=get_quantization_config(options.model),
        peft_config=get_peft_config(options.model),
        **data,
    )
    _freeze(trainer.model, options.recipe.freeze or ())
    if options.script.ignore_bias_buffers:
        # DDP broadcasts no boolean buffers.
        trainer.model._ddp_params_and_buffers_to_ignore = [
            name for name, buffer in trainer.model.named_buffers() if buffer.dtype == torch.bool
        ]
    return trainer


def _freeze(model: torch.nn.Module, expressions: Sequence[str]) -> None:
    """Leave the weights that the expressions find out of the training."""
    weights = dict(model.named_parameters())
    check_patterns("freeze", expressions, weights)
    for expression in expressions:
        found = [name for name in weights if re.search(expression, name)]
        if not found:
            raise ConfigError(f"freeze: no weight of the model has {expression!r} in its name.")
        for name in found:
            weights[name].requires_grad_(False)
    if not any(weight.requires_grad for weight in weights.values()):
        raise ConfigError("freeze leaves no weight to train.")


@contextmanager
def _engine_of_its_own(training: Any) -> Iterator[None]:
    """Let the trainer in the block set precision and engine, which accelerate and transformers have once for a process.

    The arguments of both stages are made before the first begins, and those made last would be the engine's of both.
    """
    load_for(training)
    state = PartialState()
    before = state.distributed_type
    try:
        yield
    finally:
        load_for(None)
        AcceleratorState._reset_state()
        state.distributed_type = before


def _save(trainer: Any) -> None:
    """Save the model whole, whatever the engine keeps for itself: it is loaded again to be scored."""
    with whole_weights(trainer.accelerator, wanted=True, folder=Path(trainer.args.output_dir)):
        trainer.save_model()


def _free(trainer: Any) -> None:
    """Release what a trainer and its accelerator hold: models, optimizer states, buffers."""
    engine = trainer.deepspeed
    trainer.accelerator.free_memory()
    if engine is not None:
        forget(engine)
    # All of it: the model is also in the handler of the callbacks, the optimizer in the scheduler.
    vars(trainer).clear()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def main_remains(state: PartialState) -> bool:
    """Destroy the process group, if there is one, and return whether this is the main process.

    Nothing after the scores needs the other processes.
    """
    is_main = state.is_main_process
    state.wait_for_everyone()
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        state.destroy_process_group()
    return is_main
