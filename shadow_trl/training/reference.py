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

from ..adapters.lora import streams
from ..checkpoints.checkpoint import Checkpoint
from ..checkpoints.sources import with_revision
from ..errors import ConfigError
from ..grafting.options import GraftOptions
from ..operations.graft import graft
from ..runtime.processes import run_on_main
from .loading import adapter_settings, is_adapted, load_adapter, load_model
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
    if start is None and _merges_in_memory(origins, args, how.get("quantization_config")):
        return frozen(_merge_on_instruct(origins, how), args)
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


def _merges_in_memory(origins: Origins, args: Any, quantization_config: Any) -> bool:
    """Return whether the start is a plain LoRA on BASE, so that its graft needs INSTRUCT and the adapter alone."""
    settings = adapter_settings(None, "", origins.adapter)
    if settings is None or origins.policy != origins.base or quantization_config is not None:
        return False
    if args.instruct_scale != 1.0 or args.graft_vocab != "strict":
        return False
    instruct = Checkpoint.open(require_instruct(origins), origins.instruct_revision)
    return streams(Checkpoint.open(str(origins.adapter)), instruct)


def _merge_on_instruct(origins: Origins, how: Mapping[str, Any]) -> PreTrainedModel:
    """Load INSTRUCT and add the scaled delta of the start's LoRA to its weights, in fp32 and rounded once."""
    instruct = load_model(require_instruct(origins), revision=origins.instruct_revision, **how)
    adapted = load_adapter(str(origins.adapter), instruct, trainable=False)
    options = GraftOptions(**how["args"].graft_options())
    receives = options.selector()
    with torch.no_grad():
        for name, module in adapted.get_base_model().named_modules():
            if hasattr(module, "lora_A") and receives(f"{name}.weight"):
                weight = module.get_base_layer().weight
                weight.copy_(weight.float() + options.scale * module.get_delta_weight("default").float())
    return adapted.unload()


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
