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
from accelerate.utils import is_peft_model

from ..adapters.lora import LoraModule, is_plain, place_on, read_lora
from ..arithmetic.grafter import graft_low_rank
from ..checkpoints.checkpoint import Checkpoint
from ..checkpoints.sources import with_revision
from ..errors import ConfigError
from ..grafting.jobs import selector
from ..grafting.options import GraftOptions
from ..layouts.model_names import ModelNames
from ..operations.graft import graft
from ..runtime.processes import run_on_main
from .loading import is_adapted, load_model
from .origins import Origins, require_base, require_instruct

if TYPE_CHECKING:
    from accelerate import Accelerator
    from transformers import PreTrainedModel
    from trl import DPOConfig

logger = get_logger(__name__)

REF_COLUMNS = frozenset({"ref_chosen_logps", "ref_rejected_logps"})


@dataclass(frozen=True)
class Reference:
    """What a reference policy is loaded from.

    Args:
        source: folder or hub id.
        revision: of `source` on the hub.
        grafted: whether it is `source`, an INSTRUCT, with the delta that training starts from.
    """

    source: str
    revision: str | None = None
    grafted: bool = False


def load_reference(source: str, **how: Any) -> PreTrainedModel:
    """Load the model in `source` as a frozen reference policy, in the way the policy was loaded.

    Args:
        source: folder or hub id.
        how: keyword arguments of `load_model`.

    Returns:
        the model in evaluation mode, without dropout where the policy trains without it, no parameter requiring a
        gradient.
    """
    return frozen(load_model(source, **how), how["args"])


def graft_of_start(
    origins: Origins, *, args: Any, policy: Mapping[str, Any], start: Any = None, **how: Any
) -> PreTrainedModel:
    """Load INSTRUCT with the delta that training starts from: what a graft now would ship, in the policy's dtype.

    A plain LoRA on BASE is merged into INSTRUCT in memory. Anything else is written by the main process to a folder
    beside the run's results that all processes load from, and that is gone when this returns.

    Args:
        origins: of the run; its start is a full model or an adapter of an earlier run.
        args: a `ShadowDPOConfig`; its graft options are those of the run's own graft.
        policy: as in `load_model`; has the `dtype` of the policy.
        start: the model training starts from, where it was given as an object; default what `origins` names.
        how: further keyword arguments of `load_model`.
    """
    how = {"args": args, "policy": policy, **how}
    modules = _modules_in_memory(origins, args, how.get("quantization_config")) if start is None else None
    if modules is not None:
        return frozen(_merge_on_instruct(origins, modules, how), args)
    from accelerate import PartialState

    state = PartialState()
    work = partial(_write_graft_of_start, origins, args, policy, start)
    folder = run_on_main(state, work, what="the graft of the start, as the reference policy")
    try:
        return load_reference(str(Path(folder) / "grafted"), **how)
    finally:
        state.wait_for_everyone()
        if state.is_main_process:
            shutil.rmtree(folder)


def _write_graft_of_start(origins: Origins, args: Any, policy: Mapping[str, Any], start: Any) -> str:
    """Write the graft of the start to `grafted/` in a new folder beside the run's results; return that folder."""
    parent = Path(args.output_dir)
    parent.mkdir(parents=True, exist_ok=True)
    folder = tempfile.mkdtemp(prefix=".shadow-reference-", dir=parent)
    options = {**args.graft_options(), "format": "model", "dtype": str(policy["dtype"]).removeprefix("torch.")}
    if options["dtype"] == "float32":
        options["rounding"] = "nearest"  # nothing is rounded to 16 bits
    try:
        tuned = origins.adapter or with_revision(origins.policy or "", origins.policy_revision)
        if start is not None:
            tuned = f"{folder}/start"
            # TRL's frozen copy of the adapter may be there already.
            start.save_pretrained(tuned, **({"selected_adapters": ["default"]} if is_adapted(start) else {}))
        graft(
            base=with_revision(require_base(origins), origins.base_revision),
            instruct=with_revision(require_instruct(origins), origins.instruct_revision),
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


def _modules_in_memory(origins: Origins, args: Any, quantization_config: Any) -> dict[str, LoraModule] | None:
    """Return name of INSTRUCT's weight -> module of the start, where it is a plain LoRA on BASE; else None."""
    if origins.adapter is None or origins.policy != origins.base or quantization_config is not None:
        return None
    if args.instruct_scale != 1.0 or args.graft_vocab != "strict":
        return None
    adapter = Checkpoint.open(origins.adapter)
    if not is_plain(adapter):
        return None
    instruct = Checkpoint.open(require_instruct(origins), origins.instruct_revision)
    placed = place_on(read_lora(adapter), adapter, instruct)
    known = ModelNames(instruct).memory
    return placed if all(f"{lora.module}.weight" in known for lora in placed.values()) else None


def _merge_on_instruct(origins: Origins, modules: Mapping[str, LoraModule], how: Mapping[str, Any]) -> PreTrainedModel:
    """Load INSTRUCT and add the scaled delta of the start's LoRA to its weights, as the graft of it is written."""
    model = load_model(require_instruct(origins), revision=origins.instruct_revision, **how)
    adapter = Checkpoint.open(str(origins.adapter))
    options = GraftOptions(**how["args"].graft_options())
    receives = selector(options)
    for name, lora in modules.items():
        if receives(name):
            left, right = adapter.tensor(lora.left), adapter.tensor(lora.right)
            if lora.transposed:
                left, right = right.T, left.T
            weight = model.get_parameter(f"{lora.module}.weight").data
            weight.copy_(
                graft_low_rank(
                    weight.cpu(), left, right, factor=lora.factor, scale=options.scale, rounding=options.rounding,
                    seed=options.seed, name=name,
                )
            )  # fmt: skip
    return model


def frozen(model: PreTrainedModel, args: DPOConfig) -> PreTrainedModel:
    """Return `model` in evaluation mode with no parameter requiring a gradient, dropout as TRL sets it."""
    from trl.trainer.utils import disable_dropout_in_model

    if args.disable_dropout:
        disable_dropout_in_model(model)
    return model.eval().requires_grad_(False)


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


def check_reference_options(args: Any, *, ref_model: Any) -> None:
    """Refuse options that contradict the chosen reference policy.

    Raises:
        ConfigError: an explicit `ref_model` with a `ref_policy`, or `sync_ref_model` with INSTRUCT or a graft.
    """
    if args.ref_policy == "init":
        return
    if ref_model is not None:
        raise ConfigError(
            f"both ref_model=... and ref_policy={args.ref_policy!r} name a reference policy. Pass one of them. "
            "Nothing was written."
        )
    if args.sync_ref_model:
        raise ConfigError(
            f"sync_ref_model=True moves the reference towards the policy, which is a BASE; with ref_policy="
            f"{args.ref_policy!r} the reference is another model and the mixture is neither. Use ref_policy='init', or "
            "sync_ref_model=False. Nothing was written."
        )


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


@contextmanager
def without_reference_adapter(model: Any) -> Iterator[None]:
    """Keep TRL's frozen copy of the adapter (`ref`) out of what is saved: it is no part of TUNED."""
    names = list(model.peft_config) if is_peft_model(model) else []
    if "ref" not in names or len(names) == 1:
        yield
        return
    # `Trainer` calls `save_pretrained` without PEFT's argument for it. Taking the name out of `peft_config` would not
    # do: PEFT then takes the frozen weights for the other adapter's.
    model.save_pretrained = partial(model.save_pretrained, selected_adapters=[name for name in names if name != "ref"])
    try:
        yield
    finally:
        del model.save_pretrained


def drop_reference_adapter(model: Any) -> None:
    """Remove TRL's frozen copy of the adapter (`ref`), where another model is the reference."""
    if is_peft_model(model) and "ref" in model.peft_config and len(model.peft_config) > 1:
        model.delete_adapter("ref")
