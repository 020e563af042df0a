"""What turns a TRL trainer into a Shadow trainer, whichever it is.

`ShadowMixin` changes three things of a TRL trainer: where the tokenizer comes from (INSTRUCT), what is checked before
training, and what `train()` does at its end. The loss, the data and the loop are TRL's.
"""

from __future__ import annotations

import copy
import inspect
import os
from collections.abc import Sized
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from accelerate.logging import get_logger
from transformers.trainer_pt_utils import AcceleratorConfig
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from trl.trainer.utils import get_config_model_id

from ..adapters.kinds import START_FOLDER
from ..checkpoints.digests import weight_digests
from ..checkpoints.manifest import GRAFTED_FOLDER, Entry, write_manifest
from ..errors import ConfigError, ends_with
from ..grafting.options import BASE_DTYPES
from ..grafting.reports import GraftReport
from ..operations.checks import check_left_out
from ..operations.graft import graft
from ..pair.known import taken_base
from ..pair.templates import check_processing_class
from ..results.cards import without_local_models
from ..results.folder import check_free
from ..results.lock import RunLock
from ..results.parents import missing_parents
from ..results.written import tells_what_is_written
from ..runtime.processes import count_here, run_on_main, together
from .adapter import (
    announced,
    check_same_start,
    start_of,
    trained_by_adapter,
    without_reference_adapter,
    without_second_start,
    write_configs,
    write_start,
)
from .config import ShadowArguments
from .engines import (
    dtype_at_start,
    gather_trained_head,
    gathered,
    in_shards,
    lifts_weights,
    load_for,
    refuse_engines,
    refuse_offloaded,
    refuse_trained_tokens,
    refuses_data_parallel,
)
from .evaluation import GraftedEvaluation
from .gathering import no_word_of_shards, whole_weights
from .loading import bare_model, dtypes_before, load_adapter, reload_converted, slow_precision
from .older import refuse_lost_biases, refuse_lost_optimizer
from .origins import Start
from .preflight import (
    check_before_loading,
    check_head,
    check_head_is_plain,
    is_conversational,
    refuse_rewards,
    refuse_unsupported,
)
from .publishing import Publishing, described
from .resuming import checkpoint_of, of_another_run
from .saved import check_as_saved
from .settings import Forms, bound, check_columns, check_first_row, check_settings, removed_if_refused, signature_of

if TYPE_CHECKING:
    from transformers.trainer_utils import TrainOutput

logger = get_logger(__name__)


class ShadowMixin(GraftedEvaluation, Publishing):
    """Makes a TRL trainer tune BASE and graft the delta onto INSTRUCT: `grafted = instruct + scale * (tuned - base)`.

    Put before a TRL trainer in the list of bases, with `config_class` set to its config behind `ShadowArguments`. Every
    argument is that trainer's own, and two more.

    Args:
        model: BASE (folder, hub id or loaded model), or the folder of an earlier shadow run (model or adapter). With
            `find_base` in the config it may be left out: what INSTRUCT was made from is taken.
        instruct_model: folder or hub id of INSTRUCT. Left out when `model` came from a shadow run or the config names
            it.
        base_model: folder or hub id of the origin of the delta. Default: `model`, or what the earlier run started from.
        processing_class: default INSTRUCT's tokenizer or processor, not BASE's.

    Raises:
        ConfigError: options that contradict each other, no INSTRUCT, or an engine that cannot end in a graft
            (FSDP1).
        PairMismatchError: BASE and INSTRUCT do not belong together.
        OutputExistsError: `output_dir` already holds a graft, or is an input of the run.
    """

    __signature__: ClassVar[inspect.Signature]
    config_class: ClassVar[type[ShadowArguments]]
    _name: ClassVar[str]
    _loads_as: ClassVar[str] = "float32"  # the dtype in which TRL's trainer loads a model where it is told none
    args: Any

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Refuse what could not be grafted, whatever it is given; show TRL's arguments and ours."""
        super().__init_subclass__(**kwargs)
        refuse_rewards(cls)
        cls.__signature__ = signature_of(cls, ours=ShadowMixin)  # for `help` and editors

    @ends_with("Nothing was written.")
    def __init__(
        self, *args: Any, instruct_model: str | None = None, base_model: str | None = None, **kwargs: Any
    ) -> None:
        call = bound(super().__init__, args, kwargs if args else {"model": None, **kwargs})
        given = call.arguments
        if given.get("model_init") is not None:
            raise ConfigError("the trainer takes model=..., the name of BASE or the loaded BASE, and no model_init.")
        if isinstance(given["model"], os.PathLike):
            given["model"] = os.fspath(given["model"])
        if given["model"] is None:
            given["model"] = self._found_base(given.get("args"), instruct_model)
        config = self._read_config(given)
        # transformers makes the folder before we know all
        with (
            tells_what_is_written(Path(config.output_dir)),
            together(config.distributed_state, what="the start of the run"),
        ):
            self._set_up(call, config, base_model=base_model, instruct_model=instruct_model)

    def _found_base(self, args: Any, instruct_model: str | None) -> str:
        """Return the BASE that INSTRUCT was made from, where the config says that it may be looked up."""
        named, revision = (getattr(args, name, None) for name in ("instruct_model", "instruct_revision"))
        named = instruct_model or named
        instruct = str(Entry(os.fspath(named), revision)) if isinstance(named, (str, os.PathLike)) else None
        return taken_base(instruct, confirmed=getattr(args, "find_base", False), missing="model (BASE)")

    def _set_up(
        self, call: inspect.BoundArguments, config: Any, *, base_model: str | None, instruct_model: str | None
    ) -> None:
        """Check everything that can be checked before training, and let TRL make its trainer."""
        given = call.arguments
        refuse_unsupported(config)
        self._check_can_evaluate(config)
        check_settings(config, given.get("quantization_config"), given.get("peft_config"))
        refuse_engines(config, given["model"])
        load_for(config)
        if given.get("formatting_func") is None:
            for name in ("train_dataset", "eval_dataset"):
                check_columns(name, given.get(name), self._data_forms(config))
                check_first_row(name, given.get(name), self._data_forms(config))
        self._start = start = Start.of(
            given, config, base_model=base_model, instruct_model=instruct_model, loads_as=self._loads_as
        )
        self.origins = start.origins
        refuse_trained_tokens(config, start.adapter)
        self.graft_report: GraftReport | None = None
        self._told: list[str] = []
        start.take_over(config)
        self._tell(check_before_loading(start, config, given))
        self._choose_processing_class(config, given)
        self._made = missing_parents(Path(config.output_dir))
        with removed_if_refused(self._made, config):
            self._choose_reference(config, given)
            if start.loads_adapter:
                self._load_adapter(given)
            elif not start.in_memory:
                self._pin_model(given)
            with without_second_start(given["model"]), refuses_data_parallel(config):
                super().__init__(*call.args, **call.kwargs)
            self._tell(slow_precision(self.accelerator, self.model))
            gather_trained_head(self.accelerator, self.model)
            with gathered(trained_by_adapter(self.model)):  # ZeRO-3 has shared it out where a reference was computed
                self._check_loaded(config)
                # The adapter as it is before training: the delta of some is what it becomes less this.
                self._adapter_start = start_of(self.model) if config.graft or config.eval_grafted else None

    def _check_loaded(self, config: Any) -> None:
        """Find in the model and the data that will be used what would keep the run from ending in a graft."""
        start = self._start
        if isinstance(self.train_dataset, Sized) and not len(self.train_dataset):
            raise ConfigError(
                "train_dataset has no row left: TRL drops those without a token to learn from, such as those whose "
                "prompt alone is as long as max_length. Raise max_length, or look at the rows."
            )
        check_head_is_plain(self.model)
        grafts = config.graft or config.eval_grafted
        if grafts:
            refuse_lost_biases(self.model)
            check_head(type(bare_model(self.model)))
            refuse_offloaded(self.model)
            lifts_weights(self.accelerator, self.model)
            self._tell(check_as_saved(start, self.model, self.processing_class, config.graft_options()))
        if grafts and start.adapter_on_base:
            check_left_out(
                base=str(start.base), instruct=str(start.instruct), adapter=announced(self.model),
                **config.graft_options(),
            )  # fmt: skip

    def train(self, *args: Any, **kwargs: Any) -> TrainOutput:
        """Train BASE as TRL does; then save TUNED to `output_dir` and the graft to `output_dir/grafted`.

        Arguments and return value are those of `transformers.Trainer.train`. With `graft=False`, and within a
        hyperparameter search, nothing is saved or grafted at the end. The report of the graft is in `graft_report`.
        """
        with together(self.accelerator, what="training"):
            return self._train(*args, **kwargs)

    def _train(self, *args: Any, **kwargs: Any) -> TrainOutput:
        call = inspect.signature(super().train).bind(*args, **kwargs)
        lock, given = RunLock(Path(self.args.output_dir)), call.arguments
        with tells_what_is_written(Path(self.args.output_dir)):
            try:
                in_search, resume = given.get("trial") is not None, given.get("resume_from_checkpoint")
                with removed_if_refused(self._made, self.args):
                    given["resume_from_checkpoint"] = checkpoint = checkpoint_of(resume, self.args.output_dir)
                    if checkpoint is not None:
                        refuse_lost_optimizer(checkpoint)
                        check_same_start(checkpoint, None if self.origins.adapter else self._adapter_start)
                    if self.args.graft and not in_search:
                        check_free(self._grafted_folder, self.args.graft_overwrite)
                if in_search:
                    return super().train(*call.args, **call.kwargs)
                run_on_main(self.accelerator, lambda: self._begin(lock), what="preparing the output folder")
                output = super().train(*call.args, **call.kwargs)
                if self.args.graft:
                    self.graft()
                    if self.args.push_to_hub:
                        self.push_to_hub()
                return output
            finally:
                lock.release()

    def graft(self, output: str | os.PathLike[str] | None = None) -> GraftReport:
        """Save TUNED to `output_dir` and write INSTRUCT + scale * (TUNED - BASE) to `output`. All processes call it.

        Args:
            output: folder of the result. Default `output_dir/grafted`.

        Returns:
            the report of the graft, the same on every process.

        Raises:
            InputError: the pair, the options or the output folder do not allow the graft.
            GraftError: the graft failed; nothing half-done is left, TUNED is saved.
        """
        with together(self.accelerator, what="saving TUNED for the graft"):
            self.save_model()
        self.graft_report = self._write_graft(self.args.output_dir, Path(output or self._grafted_folder))
        self._tell(self.graft_report.warnings)
        if self.accelerator.is_main_process:
            where = f"BASE as it was trained is in {self.args.output_dir}. Its graft:"
            print(f"\n{where}\n{self.graft_report.text()}", flush=True)
        return self.graft_report

    def _tell(self, warnings: list[str]) -> None:
        """Log each warning once in the life of the trainer."""
        for warning in warnings:
            if warning not in self._told:
                self._told.append(warning)
                logger.warning(warning)

    def _write_graft(self, tuned: str, output: Path, **changes: Any) -> GraftReport:
        instruct, base = str(self._start.instruct), str(self._start.base)

        @ends_with(f"TUNED is in {tuned}.", instead=True)
        def write() -> GraftReport:
            return graft(
                base=base,
                instruct=instruct,
                tuned=tuned,
                output=output,
                processes=count_here(),  # those of the run wait: their cores are free
                progress=not self.args.disable_tqdm,
                **{**self.args.graft_options(), **changes},
            )

        return run_on_main(self.accelerator, write, what="the graft")

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """As in `Trainer`, but nothing is pushed where a graft is to be published.

        Whole weights are saved where a graft will read them and the engine would leave none, nor shards.
        """
        shards = in_shards(self.accelerator) and not self.args.save_only_model
        read = not _internal_call or (self.args.graft_every_save and not shards)
        folder = Path(output_dir or self.args.output_dir)
        with whole_weights(self.accelerator, wanted=self.args.graft and read, folder=folder):
            super().save_model(output_dir, _internal_call or self.args.graft)  # which it takes for: do not push

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)
        folder = Path(output_dir)
        if in_shards(self.accelerator):  # which are written with the state of the optimiser, and alone
            run_on_main(self.accelerator, lambda: self._describe_shards(folder), what="describing a checkpoint")

    def _describe_shards(self, folder: Path) -> None:
        write_configs(folder, self.model)
        self._describe(folder)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        self._await_push()  # of the checkpoint before, which may be removed now
        super()._save_checkpoint(model, trial)
        if self.args.graft and self.args.graft_every_save:
            folder = Path(self._get_output_dir(trial=trial)) / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
            # Two deep: a folder with an adapter right inside a checkpoint is taken for one of its adapters on resume.
            report = self._write_graft(str(folder), folder / "shadow" / GRAFTED_FOLDER, overwrite=True)
            self._push_checkpoint(report.output)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        with of_another_run(resume_from_checkpoint):
            super()._load_from_checkpoint(resume_from_checkpoint, model)
        self._reload_converted(resume_from_checkpoint)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        with of_another_run(checkpoint):
            super()._load_optimizer_and_scheduler(checkpoint)
            if checkpoint is None or self.is_deepspeed_enabled:  # which has states of its own
                return
            # torch takes the settings of another optimizer as they are, and stops at the first step.
            optimizer: Any = self.optimizer
            lacking = {name for group in optimizer.param_groups for name in optimizer.defaults.keys() - group}
            if lacking:
                raise LookupError(f"the optimizer in it has no {', '.join(sorted(lacking))}")

    def _load_best_model(self) -> None:
        super()._load_best_model()
        self._reload_converted(str(self.state.best_model_checkpoint))

    def _reload_converted(self, folder: str) -> None:
        # The engines have files of their own, by the names in memory.
        if not (self.is_fsdp_enabled or self.is_deepspeed_enabled):
            reload_converted(self.model, folder)

    # What belongs together passes through here, at the end and in every checkpoint: a run that dies leaves the files of
    # the run before as they were.
    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        with without_reference_adapter(self.model), no_word_of_shards():
            super()._save(output_dir, state_dict)
            if self.args.should_save and state_dict != {}:  # which ZeRO-3 gives where it saves its shards alone
                self._describe(Path(output_dir or self.args.output_dir))

    def _describe(self, folder: Path) -> None:
        """Write what tells a graft of the weights in `folder` where their delta starts."""
        write_start(folder, self.model, self._adapter_start, self.origins.adapter)
        without_local_models(folder)
        weights = weight_digests(folder, START_FOLDER)
        write_manifest(folder, {**self._manifest, **described(self), "weights": weights})

    @property
    def _grafted_folder(self) -> Path:
        return Path(self.args.output_dir) / GRAFTED_FOLDER

    def _read_config(self, given: dict[str, Any]) -> Any:
        if not hasattr(self, "config_class"):
            name = type(self).__name__
            raise ConfigError(
                f"{name} does not say which config it takes. Write `config_class = {name}Config` into it, where "
                f"{name}Config is a dataclass with the bases ShadowArguments and TRL's config, in this order."
            )
        args = given.get("args")
        if args is None:
            name = given["model"] if isinstance(given["model"], str) else get_config_model_id(given["model"].config)
            args = self.config_class(f"{Path(name).name}-Shadow-{self._name}")
        # A copy: what is decided here must not reach a config that the user may use again.
        given["args"] = config = copy.copy(self.config_class.upgrade(args))
        for name, value in vars(config).items():
            if isinstance(value, (dict, list, AcceleratorConfig)):  # transformers and TRL write into these as well
                setattr(config, name, copy.copy(value))
        return config

    def _data_forms(self, config: Any) -> Forms:
        """Return the forms of data that the trainer takes, each by the columns that it needs; none: not checked."""
        return ()

    def _choose_processing_class(self, config: Any, given: dict[str, Any]) -> None:
        instruct = self.origins.instruct
        if given.get("processing_class") is None and instruct is not None:
            from transformers import AutoProcessor

            given["processing_class"] = AutoProcessor.from_pretrained(
                instruct.source, revision=instruct.revision, trust_remote_code=config.trust_remote_code
            )
        if given.get("processing_class") is not None and not getattr(config, "chat_template_path", None):
            conversational = is_conversational(given.get("train_dataset"))
            check_processing_class(
                given["processing_class"], conversational, instruct=instruct.source if instruct else None
            )

    def _choose_reference(self, config: Any, given: dict[str, Any]) -> None:
        """Set what the reference policy is; only preference trainers have one."""

    def _pin_model(self, given: dict[str, Any]) -> None:
        """Let TRL load the commit that the delta will be measured from."""
        policy, args = self._start.origins.policy, given["args"]
        if policy is not None and policy.revision is not None:
            given["model"] = policy.source
            args.model_init_kwargs = {**(args.model_init_kwargs or {}), "revision": policy.revision}

    def _load_adapter(self, given: dict[str, Any]) -> None:
        """Make the adapter of the earlier run, on the model it was trained on, the model of this one."""
        origins = self._start.origins
        assert origins.policy is not None
        below = replace(self._start.loading, kwargs={}).load(origins.policy)
        given["model"] = load_adapter(str(origins.adapter), below, trainable=True)
        # Used up: TRL would refuse them beside a loaded model, or say that it ignores them.
        given.pop("peft_config", None)
        given.pop("quantization_config", None)
        given["args"].model_init_kwargs = None

    def _begin(self, lock: RunLock) -> None:
        """Make the output folder and keep other runs out of it; take the digests of what training starts from."""
        os.makedirs(self.args.output_dir, exist_ok=True)
        if os.access(Path(self.args.output_dir).absolute().parent, os.W_OK):
            lock.acquire()
        _ = self._manifest

    @cached_property
    def _manifest(self) -> dict[str, Any]:
        # Digests of whole models are worked out once a run.
        start, origins = self._start, self.origins
        base = origins.base and origins.base.recorded()
        method = getattr(bare_model(self.model), "quantization_method", None)
        dtypes = [*dtypes_before(start.stage), dtype_at_start(self.accelerator, bare_model(self.model))]
        return {
            "kind": "run",
            "trainer": type(self).__name__,
            "base": base,
            "instruct": origins.instruct and origins.instruct.recorded(),
            "policy": base if origins.policy == origins.base else origins.policy and origins.policy.recorded(),
            "adapter": {"source": origins.adapter} if origins.adapter else None,
            "ref_policy": getattr(self.args, "ref_policy", None),
            "loaded_in": [dtype for dtype in dtypes if dtype in BASE_DTYPES],  # not that of a quantised model
            "options": self.args.graft_options(),
            **({"lifted": True} if lifts_weights(self.accelerator, self.model) else {}),
            **({"quantised": str(getattr(method, "value", method))} if method is not None else {}),
        }
