"""Reference policies of DPO: load one as the policy was loaded, and let go of it again."""

from __future__ import annotations

import gc
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate.logging import get_logger

from ..adapters.lora import LoraModule, place_on, read_lora, streams
from ..arithmetic.grafter import graft_low_rank
from ..checkpoints.checkpoint import Checkpoint
from ..checkpoints.manifest import Entry
from ..grafting.options import GraftOptions
from ..layouts.model_names import ModelNames
from ..operations.graft import graft
from ..runtime.processes import run_on_main
from .loading import Loading
from .start import Start

if TYPE_CHECKING:
    from accelerate import Accelerator
    from transformers import PreTrainedModel

logger = get_logger(__name__)

REF_COLUMNS = frozenset({"ref_chosen_logps", "ref_rejected_logps"})


@dataclass(frozen=True)
class Reference:
    """What a reference policy is loaded from.

    Args:
        source: folder or hub id.
        grafted: whether it is `source`, an INSTRUCT, with the delta that training starts from.
    """

    source: Entry
    grafted: bool = False

    @classmethod
    def of(cls, start: Start, policy: str) -> Reference | None:
        """Return what the reference of a `ref_policy` is loaded from, None where it is the policy as it starts."""
        origins = start.origins
        if policy == "init" or (policy == "base" and start.is_raw_base):
            # TRL's reference is the model without its adapter: with PiSSA or OLoRA not what training starts from.
            if start.adapter_changes_base and origins.adapter is None and origins.policy is not None:
                return cls(origins.policy)
            return None
        if policy == "base":
            return cls(start.base)
        # A graft of an untrained BASE adds nothing: it is INSTRUCT.
        grafted = policy == "grafted" and not start.is_raw_base
        return cls(start.instruct, grafted)


def load_reference(source: Entry, *, loading: Loading) -> PreTrainedModel:
    """Load the model in `source` as a frozen reference policy, in the way the policy was loaded.

    Args:
        source: folder or hub id.
        loading: how the policy is loaded.

    Returns:
        the model in evaluation mode, without dropout where the policy trains without it, no parameter requiring a
        gradient.
    """
    from trl.trainer.utils import disable_dropout_in_model

    model = loading.load(source)
    if loading.args.disable_dropout:
        disable_dropout_in_model(model)
    return model.eval().requires_grad_(False)


def graft_of_start(start: Start) -> PreTrainedModel:
    """Load INSTRUCT with the delta that training starts from: what a graft now would ship, in the policy's dtype.

    A plain LoRA on BASE is merged into INSTRUCT in memory. Anything else is written by the main process to a folder
    beside the run's results that all processes load from, and that is gone when this returns.

    Args:
        start: of the run: a full model or an adapter of an earlier run, or a loaded model that was not trained yet. The
            options are those of the run's own graft.
    """
    modules = _modules_in_memory(start)
    if modules is not None:
        return _merge_on_instruct(start, modules)
    from accelerate import PartialState

    state = PartialState()
    folder = run_on_main(
        state, partial(_write_graft_of_start, start), what="the graft of the start, as the reference policy"
    )
    try:
        return load_reference(Entry(f"{folder}/grafted"), loading=start.loading)
    finally:
        state.wait_for_everyone()
        if state.is_main_process:
            shutil.rmtree(folder)


def _write_graft_of_start(start: Start) -> str:
    """Write the graft of the start to `grafted/` in a new folder beside the run's results; return that folder."""
    origins, args = start.origins, start.loading.args
    parent = Path(args.output_dir)
    parent.mkdir(parents=True, exist_ok=True)
    folder = tempfile.mkdtemp(prefix=".shadow-reference-", dir=parent)
    dtype = str(start.loading.kwargs["dtype"]).removeprefix("torch.")
    options = {**args.graft_options(), "format": "model", "dtype": dtype}
    if dtype == "float32":
        options["rounding"] = "nearest"  # nothing is rounded to 16 bits
    try:
        tuned = origins.adapter or str(origins.policy)
        if start.in_memory:
            tuned = f"{folder}/start"
            start.model.save_pretrained(tuned)
        graft(
            base=str(start.base),
            instruct=str(start.instruct),
            tuned=tuned,
            output=Path(folder) / "grafted",
            base_dtype="tuned",
            digest="none",
            stats=False,
            progress=False,
            **options,
        )
    except BaseException:
        shutil.rmtree(folder)
        raise
    return folder


def _modules_in_memory(start: Start) -> dict[str, LoraModule] | None:
    """Return name of INSTRUCT's weight -> module of the start, where it is a plain LoRA on BASE; else None."""
    origins, args = start.origins, start.loading.args
    if not (start.loads_adapter and start.adapter_on_base) or start.loading.quantization_config is not None:
        return None
    if args.instruct_scale != 1.0 or args.graft_vocab != "strict":
        return None
    adapter, instruct = Checkpoint.open(str(origins.adapter)), Checkpoint.open(str(start.instruct))
    if not streams(adapter, instruct):
        return None
    placed = place_on(read_lora(adapter), adapter, instruct)
    known = ModelNames(instruct).memory
    return placed if all(f"{lora.module}.weight" in known for lora in placed.values()) else None


def _merge_on_instruct(start: Start, modules: Mapping[str, LoraModule]) -> PreTrainedModel:
    """Load INSTRUCT and add the scaled delta of the start's LoRA to its weights, as the graft of it is written."""
    model = load_reference(start.instruct, loading=start.loading)
    adapter = Checkpoint.open(str(start.origins.adapter))
    options = GraftOptions(**start.loading.args.graft_options())
    receives = options.selector()
    for name, lora in modules.items():
        if receives(name):
            left, right = adapter.tensor(lora.left), adapter.tensor(lora.right)
            if lora.transposed:
                left, right = right.T, left.T
            weight = model.get_parameter(f"{lora.module}.weight")
            weight.copy_(
                graft_low_rank(
                    weight.cpu(), left, right, factor=lora.factor, scale=options.scale, rounding=options.rounding,
                    seed=options.seed, name=name,
                )
            )  # fmt: skip
    return model


@contextmanager
def prepared(model: PreTrainedModel, accelerator: Accelerator) -> Iterator[PreTrainedModel]:
    """Give `model` to the accelerator for evaluation with TRL's fused head; take it back and free it at the end."""
    from trl.trainer.utils import add_fused_lm_head

    add_fused_lm_head(model)
    ready = accelerator.prepare_model(model, evaluation_mode=True)
    try:
        yield ready
    finally:
        # The accelerator keeps a list of every model it prepared; dropping one's own name alone frees nothing.
        accelerator._models = [kept for kept in accelerator._models if kept is not ready]
        del model, ready
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def decide_precompute(config: Any, given: Mapping[str, Any], *, preferred: bool) -> None:
    """Decide `config.precompute_ref_log_probs` where the user left it open (None), and where the data has the values.

    Args:
        config: a `ShadowDPOConfig`; changed in place.
        given: arguments of the trainer.
        preferred: whether values computed before training are wanted, because the reference is another model than the
            policy as it starts, or is the policy but not what its name says.
    """
    from datasets import Dataset

    data, evaluated = given.get("train_dataset"), given.get("eval_dataset")
    columns = set(getattr(data, "column_names", None) or ())
    possible = isinstance(data, Dataset) and not columns & {"image", "images"}
    if possible and columns >= REF_COLUMNS:
        config.precompute_ref_log_probs = True
    if config.precompute_ref_log_probs is not None:
        return
    others = evaluated.values() if isinstance(evaluated, dict) else [evaluated]
    possible = possible and all(isinstance(one, Dataset) for one in others if one is not None)
    config.precompute_ref_log_probs = preferred and possible
    if preferred and not possible:
        logger.warning(
            "The reference policy stays in memory during training: its log probabilities can be computed before "
            "training for map-style text data only, and not all of the data is that."
        )
