"""Evaluation of the graft while BASE is in training: the figures of the model that would be shipped now.

The graft is written as at the end of a run and loaded from its folder, so its arithmetic, rounding, config, buffers and
ties are those of what ships. While it is evaluated, the weights in training wait in host memory.
"""

from __future__ import annotations

import random
from collections import defaultdict, deque
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy
import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from ..checkpoints.manifest import Entry
from ..errors import ConfigError, GraftError, ends_with
from ..grafting.reports import GraftReport
from .gathering import whole_weights
from .loading import load_adapter
from .origins import Start
from .reference import prepared, shared_scratch

if TYPE_CHECKING:
    from transformers import Trainer as _Trainer
else:
    _Trainer = object  # the mixin stands before a TRL trainer, whatever that one is


_HOST = ("cpu", "meta")  # devices whose tensors take no room on an accelerator
# All that the fused heads of TRL's trainers compute for their metrics.
_OUTPUTS = ("log_probs", "entropy", "mean_logits", "is_top1", "log_sum_sq_probs")


class KeptReferences:
    """Reference log probabilities of one evaluation, kept for a second pass over the same batches.

    Under LoRA the reference `init` is the policy with its adapter off, which would be INSTRUCT in the second pass.
    """

    def __init__(self) -> None:
        self.again = False  # whether this is the second pass
        self._values: deque[tuple[tuple[int, ...], Any]] = deque()

    def of(self, inputs: dict[str, torch.Tensor], compute: Callable[[], Any]) -> Any:
        """Return `compute()` of a batch; in the second pass, GraftError for a batch that was not next in the first."""
        ids = inputs["input_ids"]
        batch = (*ids.shape, int(ids.sum()))
        if not self.again:
            self._values.append((batch, compute()))
            return self._values[-1][1]
        if not self._values or self._values[0][0] != batch:
            raise GraftError(
                "the evaluation data came in another order the second time, so the reference log probabilities cannot "
                "be used again. Use a data set with a fixed order, or eval_grafted=False."
            )
        return self._values.popleft()[1]


class GraftedEvaluation(_Trainer):
    """Adds `eval_grafted_*` to every evaluation when `eval_grafted` is set: INSTRUCT + the current delta.

    Only `evaluation_loop` changes: a second pass over the data with the graft in the place of the model. One log and
    one `on_evaluate` come out of both, and the plain figures are those of TRL.
    """

    args: Any
    _start: Start
    # The attribute in which TRL's trainer collects what it logs of an evaluation; None: `eval_grafted` is refused.
    _figures: ClassVar[str | None] = None
    _references: KeptReferences | None = None  # while both passes last
    _write_graft: Callable[..., GraftReport]

    def _check_can_evaluate(self, config: Any) -> None:
        """Refuse `eval_grafted` with ConfigError where the evaluation cannot be repeated on a graft."""
        if config.eval_grafted and self._figures is None:
            raise ConfigError(
                f"eval_grafted=True is not possible with {type(self).__name__}, of whose evaluation it is not known "
                "that it can be repeated on the graft. Pass eval_grafted=False and score the grafted folder after "
                "training."
            )

    def evaluation_loop(
        self,
        dataloader: Any,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> Any:
        """As in `Trainer`; with `eval_grafted`, a second pass on the graft adds its figures to those of the first."""
        run = super().evaluation_loop
        if not self.args.eval_grafted or description != "Evaluation":
            return run(dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix)
        assert self._figures is not None  # or the option was refused
        figures = getattr(self, self._figures)
        self._references = KeptReferences()
        try:
            output = run(dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix)
            self._references.again = True
            # TRL's `log` adds what is in here to the figures of the evaluation; the graft's must not be among them.
            plain, figures["eval"] = figures["eval"], defaultdict(list)
            prefix = f"{metric_key_prefix}_grafted"
            try:
                with self._shipped():
                    second = run(dataloader, description, prediction_loss_only, ignore_keys, prefix)
                means = {  # some trainers have `eval_` in the names already
                    f"{prefix}_{key.removeprefix('eval_')}": sum(values) / len(values)
                    for key, values in figures["eval"].items()
                }
            finally:
                figures["eval"] = plain
        finally:
            self._references = None
        return output._replace(metrics={**(output.metrics or {}), **(second.metrics or {}), **means})

    @contextmanager
    def _shipped(self) -> Iterator[None]:
        """Let the graft of the weights as they are now stand in for the model; model and random state come back."""
        trained: Any = self.model
        with ExitStack() as way_back:
            way_back.enter_context(torch.random.fork_rng())
            way_back.callback(random.setstate, random.getstate())
            way_back.callback(numpy.random.set_state, numpy.random.get_state())
            folder = way_back.enter_context(self._grafted_for_evaluation())
            way_back.enter_context(in_host_memory(trained))
            # No name here for what is loaded: the device needs its room before the weights in training come back.
            # TRL asks the model whether it is in training, which an engine of DeepSpeed round it does not know.
            self.model = self.accelerator.unwrap_model(
                way_back.enter_context(
                    prepared(self._load_shipped(folder, trained), self.accelerator, self.args, outputs=_OUTPUTS)
                )
            )
            way_back.callback(setattr, self, "model", trained)
            yield

    @contextmanager
    def _grafted_for_evaluation(self) -> Iterator[Path]:
        """Write TUNED and its graft beside the results, with the options of the run; both are removed at the end."""
        with (
            ends_with("The graft was to be evaluated; nothing of it was kept.", instead=True),
            shared_scratch(self.accelerator, self.args.output_dir) as folder,
        ):
            with whole_weights(self.accelerator, wanted=True, folder=folder):
                super().save_model(str(folder / "tuned"), _internal_call=True)
            self._write_graft(str(folder / "tuned"), folder / "grafted", digest="none", stats=False)
            yield folder / "grafted"

    def _load_shipped(self, folder: Path, trained: Any) -> Any:
        is_adapter = (folder / "adapter_config.json").exists()
        source = self._start.instruct if is_adapter else Entry(str(folder))
        model = self._start.loading.like(trained).of_graft(source).load(source)
        return load_adapter(str(folder), model, trainable=False) if is_adapter else model


@contextmanager
def in_host_memory(model: nn.Module) -> Iterator[None]:
    """Move the weights and buffers of `model` off the accelerator while the context lasts.

    Every tensor stays the same object, with its ties: only its storage is emptied, and filled again bit for bit. One of
    a fixed size stays where it is.
    """
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()  # of some layers the whole weights are kept after a pass
    storages = {
        tensor.untyped_storage().data_ptr(): tensor.untyped_storage()
        for tensor in map(_of_this_process, (*model.parameters(), *model.buffers()))
        if tensor.device.type not in _HOST and tensor.untyped_storage().resizable()
    }
    kept = [(storage, torch.UntypedStorage(storage.nbytes()).copy_(storage)) for storage in storages.values()]
    for storage, _ in kept:
        storage.resize_(0)
    try:
        yield
    finally:
        for storage, values in kept:
            storage.resize_(values.nbytes())
            storage.copy_(values)


def _of_this_process(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
