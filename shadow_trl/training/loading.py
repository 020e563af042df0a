"""Models loaded as TRL's trainers load the policy, with the adapter of an earlier run, and checkpoints loaded back."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, cast

import torch
from accelerate.logging import get_logger
from accelerate.utils import is_peft_model

from ..checkpoints.checkpoint import Checkpoint
from ..checkpoints.manifest import Entry
from ..grafting.tuned import loaded_in, loaded_like
from .engines import is_shared_out

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

logger = get_logger(__name__)


@dataclass(frozen=True)
class Loading:
    """How the policy is loaded, and so any model beside it.

    Args:
        args: a TRL config; its `model_init_kwargs` load the policy.
        quantization_config: as given for the policy.
        kwargs: keyword arguments that win over `model_init_kwargs`, `dtype` of the policy above all.
        loads_as: dtype where none is given.
    """

    args: Any
    quantization_config: Any = None
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    loads_as: str = "float32"

    def load(self, source: Entry) -> PreTrainedModel:
        """Load the model in `source`, whose revision replaces the policy's (None: the main branch).

        The state of the random generators is as before: loading must not change what is trained.
        """
        from trl.trainer.utils import create_model_from_path

        # The config's own parsing has made a dictionary of what was a string on the command line.
        given = cast("dict[str, Any]", self.args.model_init_kwargs or {})
        kwargs = {"dtype": self.loads_as, **given, **self.kwargs, "revision": source.revision}
        kwargs.setdefault("trust_remote_code", self.args.trust_remote_code)
        if self.quantization_config is not None:
            kwargs["quantization_config"] = self.quantization_config
        if self.args.distributed_state.distributed_type in ("MULTI_GPU", "DEEPSPEED"):
            kwargs["device_map"] = None  # as TRL: `auto` would spread one rank's model over every device
        with torch.random.fork_rng():
            return create_model_from_path(source.source, **kwargs)

    def like(self, model: Any) -> Loading:
        """Return this with the dtype in which `model`, an `Entry` or a loaded model, is loaded, and its attention."""
        if not isinstance(model, Entry):
            bare = bare_model(model)
            return replace(self, kwargs={"dtype": bare.dtype, "attn_implementation": bare.config._attn_implementation})
        dtype = (self.args.model_init_kwargs or {}).get("dtype", self.loads_as)
        if dtype in ("auto", None):
            from transformers import AutoConfig

            # INSTRUCT's own dtype may be another one than BASE's.
            how = {"revision": model.revision, "trust_remote_code": self.args.trust_remote_code}
            dtype = AutoConfig.from_pretrained(model.source, **how).dtype or "float32"
        return replace(self, kwargs={"dtype": dtype})

    def of_graft(self, source: Entry) -> Loading:
        """Return this for the model in `source` as it ships: not quantised, with the settings of its own config alone.

        What `model_init_kwargs` set in the config of the policy is no part of it.
        """
        from transformers import AutoConfig

        how = {"revision": source.revision or "main", "trust_remote_code": self.args.trust_remote_code}
        config = AutoConfig.from_pretrained(source.source, **how)
        given, args = self.args.model_init_kwargs or {}, copy.copy(self.args)
        settings = {name for one in (config, config.get_text_config()) for name in given if hasattr(one, name)}
        args.model_init_kwargs = {name: value for name, value in given.items() if name not in settings}
        return Loading(args, kwargs={**self.kwargs, "device_map": None})


def dtypes_before(source: str | None) -> list[str]:
    """Return the dtypes in which the stages of training that made `source` loaded their models; [] where it is None."""
    if source is None:
        return []
    checkpoint = Checkpoint.open(source)
    return [name for name in loaded_like(checkpoint, loaded_in(checkpoint) or ("tuned",)) if name != "tuned"]


def load_adapter(adapter: str, model: PreTrainedModel, *, trainable: bool) -> PeftModel:
    """Put the PEFT adapter in the folder `adapter` on `model`; return the wrapped model.

    It is in fp32, as PEFT trains it; on weights that ZeRO-3 has shared out in theirs, as TRL makes a new one there.
    """
    from peft import PeftModel

    wide = not any(map(is_shared_out, model.parameters()))
    with torch.random.fork_rng():
        return PeftModel.from_pretrained(model, adapter, is_trainable=trainable, autocast_adapter_dtype=wide)


def is_adapted(model: Any) -> bool:
    """Return whether `model` is a loaded model with a PEFT adapter; a name, or None, is not."""
    return model is not None and not isinstance(model, str) and is_peft_model(model)


def bare_model(model: Any) -> Any:
    """Return the model below the adapter, or `model` where it has none."""
    return model.get_base_model() if is_adapted(model) else model


def reload_converted(model: Any, folder: str) -> None:
    """Load the weights of a checkpoint into `model` again where its names on disk are not those in memory.

    transformers 5 gives some models (mixture of experts, vision-language) other names in memory than on disk, and
    resumes by the names on disk: weights whose names differ stay silently as they were (transformers issue 48805).
    """
    if is_adapted(model):
        return  # the names of an adapter on disk are those in memory
    state = model.state_dict()
    unknown = [name for name in Checkpoint.open(folder).specs if name not in state]
    if not unknown:
        return
    logger.warning(
        "%d weights of %s have other names on disk than in memory (%s, ...); they are loaded through from_pretrained.",
        len(unknown),
        folder,
        unknown[0],
    )
    fresh = type(model).from_pretrained(folder, dtype=model.dtype)
    model.load_state_dict(fresh.state_dict())
