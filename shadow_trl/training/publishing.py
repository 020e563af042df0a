"""What a Shadow trainer publishes on the hub: the graft, under the options that transformers has for it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import TYPE_CHECKING, Any

from accelerate.logging import get_logger
from transformers.trainer_utils import HubStrategy
from transformers.utils import PushInProgress

from ..errors import ConfigError
from ..grafting.reports import GraftReport
from ..results.upload import check_adapter_base, check_target, claim, upload
from ..runtime.processes import run_on_main, together
from .loading import is_adapted

if TYPE_CHECKING:
    from huggingface_hub import CommitInfo
    from transformers import Trainer as _Trainer

    from .origins import Start
else:
    _Trainer = object  # the mixin stands before a TRL trainer, whatever that one is

logger = get_logger(__name__)

_OF_BASE = (HubStrategy.CHECKPOINT, HubStrategy.ALL_CHECKPOINTS)
_NO_SCORES = ("_runtime", "_per_second")


def refuse_publishing(config: Any) -> None:
    """Refuse options of the hub by which a run would publish the tuned BASE, or fail after training.

    Raises:
        ConfigError: `hub_strategy` of checkpoints, `hub_revision` that is a commit, or an invalid `hub_model_id`.
    """
    if not config.push_to_hub:
        return
    if config.graft and config.hub_strategy in _OF_BASE:
        raise ConfigError(
            f"hub_strategy={config.hub_strategy.value!r} would publish checkpoints, which hold the tuned BASE and not "
            "the graft. Pass 'end' or 'every_save' (every graft that is written: graft_every_save), or graft=False."
        )
    check_target(config.hub_model_id, config.hub_revision)


def refuse_local_adapter(config: Any, start: Start) -> None:
    """Refuse to publish an adapter for an INSTRUCT that is a folder here (ConfigError)."""
    if config.push_to_hub and config.graft and config.graft_format == "adapter":
        check_adapter_base(start.instruct.source)


def described(trainer: Any) -> dict[str, Any]:
    """Return how the weights that a trainer has now were trained, for manifests and cards: no path, no user."""
    args, state = trainer.args, trainer.state
    best = args.load_best_model_at_end and not trainer.is_in_train and state.best_model_checkpoint is not None
    step = state.best_global_step if best else state.global_step
    training = {
        "learning_rate": args.learning_rate,
        "steps": step,
        "rows_per_step": trainer.get_total_train_batch_size(args),
        "seed": args.seed,
    }
    if is_adapted(trainer.model):
        settings = trainer.model.active_peft_config
        rank = getattr(settings, "r", None)
        training["adapter"] = f"{settings.peft_type.value}{f' of rank {rank}' if rank else ''}"
    scores = {
        name: value
        for entry in state.log_history
        if entry.get("step") == step
        for name, value in entry.items()
        if name.startswith("eval_grafted_") and not name.endswith(_NO_SCORES)
        if isinstance(value, (int, float)) and math.isfinite(value)
    }
    return {"training": training, "scores": scores, "datasets": [*trainer.dataset_ids]}


class Publishing(_Trainer):
    """Uploads the graft where transformers would upload what was trained; with `graft=False`, does as transformers.

    Attributes:
        dataset_ids: data sets of the hub that training uses, for the card. The recipes set it; `push_to_hub` takes one
            too. Default: none.
    """

    dataset_ids: Sequence[str] = ()
    graft_report: GraftReport | None
    args: Any
    hub_model_id: str | None  # type: ignore[assignment]
    push_in_progress: Any

    def init_hf_repo(self, token: str | None = None, private: bool | None = None) -> None:
        """As in `Trainer`; the branch `hub_revision` is made too.

        Raises:
            ConfigError: the repository cannot be written to.
        """
        if self.is_world_process_zero():
            self.push_in_progress = None
            self._claim(token or self.args.hub_token, private, self.args.hub_revision)

    def _claim(self, token: str | None, private: bool | None, revision: str | None) -> None:
        args = self.args
        name = args.hub_model_id or Path(args.output_dir).absolute().name
        private = args.hub_private_repo if private is None else private
        self.hub_model_id = claim(name, token=token, private=private, revision=revision)

    def push_to_hub(  # type: ignore[override]
        self,
        commit_message: str | None = "End of training",
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        private: bool | None = None,
        *,
        model_name: str | None = None,
        dataset_name: str | None = None,
        tags: str | Sequence[str] | None = None,
        **kwargs: Any,
    ) -> CommitInfo | Future[CommitInfo] | None:
        """Upload the graft that this trainer wrote last to `hub_model_id`. All processes call it.

        Args:
            commit_message: of the commit.
            blocking: whether to wait for the upload. Default True.
            token: of the hub. Default `hub_token`.
            revision: branch. Default `hub_revision`.
            private: whether a new repository is private. Default `hub_private_repo`.
            model_name: title of the card. Default: INSTRUCT's name.
            dataset_name: data set of the hub, for the card.
            tags: for the card.
            kwargs: none; with `graft=False`, those of `Trainer.push_to_hub`.

        Returns:
            The commit, or with `blocking=False` the future of it, on the main process; None on every other.

        Raises:
            ConfigError: there is no graft yet, or the repository cannot be written to.
            UploadError: the upload failed; the graft is on the disk, and the message has the command to repeat it.
        """
        if not self.args.graft:
            given = {"token": token, "revision": revision, "private": private, "model_name": model_name,
                     "dataset_name": dataset_name, "tags": tags, **kwargs}  # fmt: skip
            given = {name: value for name, value in given.items() if value is not None}
            return super().push_to_hub(commit_message, blocking, **given)
        if kwargs:
            raise TypeError(f"push_to_hub() got unexpected arguments: {', '.join(kwargs)}")
        if self.graft_report is None:
            raise ConfigError("there is no graft to publish yet. Call train(), which ends with it, or graft().")
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        with together(self.accelerator, what="the upload of the graft"):
            if not self.is_world_process_zero():
                return None
            token, revision = token or self.args.hub_token, revision or self.args.hub_revision
            self._claim(token, private, revision)
            self._finish_current_push()
            options: dict[str, Any] = {
                "token": token,
                "revision": revision,
                "message": commit_message,
                "title": model_name,
                "datasets": [dataset_name] if dataset_name is not None else [],
                "tags": [tags] if isinstance(tags, str) else tags or [],
            }
            if not blocking:
                return self._in_background(self.graft_report.output, **options)
            logger.info("Uploading %s to %s.", self.graft_report.output, self.hub_model_id)
            return upload(self.graft_report.output, str(self.hub_model_id), **options)

    def _in_background(self, folder: Path, **options: Any) -> Future[CommitInfo]:
        from huggingface_hub import HfApi

        job: Future[CommitInfo] = HfApi().run_as_future(upload, folder, str(self.hub_model_id), **options)
        job.add_done_callback(_tell_failure)
        self.push_in_progress = PushInProgress([job])  # type: ignore[arg-type]
        return job

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        if not self.args.graft:
            super()._push_from_checkpoint(checkpoint_folder)

    @property
    def _pushes_checkpoints(self) -> bool:
        every = self.args.graft_every_save and self.args.hub_strategy == HubStrategy.EVERY_SAVE
        return self.args.graft and self.args.push_to_hub and every

    def _push_checkpoint(self, grafted: Path) -> None:
        """Upload the graft of a checkpoint while training continues, which a failed upload does not stop."""
        if self._pushes_checkpoints and self.is_world_process_zero():
            token, revision = self.args.hub_token, self.args.hub_revision
            message = f"Training in progress, step {self.state.global_step}"
            self._in_background(grafted, token=token, revision=revision, message=message)

    def _await_push(self) -> None:
        """Wait for the upload of the checkpoint before, which may be removed when the next one is there."""
        if self._pushes_checkpoints:
            run_on_main(self.accelerator, self._finish_current_push, what="the upload of a checkpoint's graft")


def _tell_failure(job: Future[Any]) -> None:
    if (error := job.exception()) is not None:
        logger.warning("%s", error)
