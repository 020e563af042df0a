"""Reference policies: one is loaded as the policy was and released again; its values are kept between runs."""

from __future__ import annotations

import copy
import secrets
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate.logging import get_logger
from accelerate.utils import fsdp2_prepare_model
from accelerate.utils.memory import clear_device_cache
from torch.distributed.tensor import DTensor

from ..adapters.kinds import is_subtracted, start_setting
from ..adapters.lora import place_on, read_lora, streams
from ..arithmetic.grafter import graft_low_rank
from ..checkpoints.checkpoint import Checkpoint
from ..checkpoints.manifest import GRAFTED_FOLDER, Entry
from ..grafting.options import GraftOptions
from ..layouts.model_names import ModelNames
from ..operations.graft import graft
from ..results.folder import Scratch
from ..runtime.processes import check_shared, run_on_main
from .engines import forget, gathered, uses_deepspeed
from .loading import Loading, bare_model, dtypes_before, is_adapted
from .older import add_head
from .origins import Start

if TYPE_CHECKING:
    from accelerate import Accelerator, PartialState
    from transformers import PreTrainedModel

logger = get_logger(__name__)

_HALF = ("bfloat16", "float16")


@dataclass(frozen=True)
class Reference:
    """What a reference policy is loaded from.

    Args:
        source: folder or hub id; None for a copy of the object that training starts from.
        grafted: whether it is `source`, an INSTRUCT, with the delta that training starts from.
    """

    source: Entry | None
    grafted: bool = False

    @property
    def of_object(self) -> bool:
        """Whether it needs what training starts from, which of an object is known before training alone."""
        return self.grafted or self.source is None

    @classmethod
    def of(cls, start: Start, policy: str) -> Reference | None:
        """Return what the reference of a `ref_policy` is loaded from, None where it is the policy as it starts."""
        origins = start.origins
        if policy == "init" or (policy == "base" and start.is_raw_base):
            # TRL's reference is the model without its adapter: with PiSSA or OLoRA not what training starts from.
            subtracted = start.adapter is not None and is_subtracted(start_setting(start.adapter))
            if subtracted and origins.adapter is None and not is_adapted(start.model):
                return cls(None if start.in_memory and not start.is_compared else origins.policy)
            return None
        if policy == "base":
            return cls(start.base)
        # A graft of an untrained BASE adds nothing: it is INSTRUCT.
        grafted = policy == "grafted" and not start.is_raw_base
        return cls(start.instruct, grafted)


def load_reference(source: Entry | PreTrainedModel, *, loading: Loading) -> PreTrainedModel:
    """Load the model in `source` as a frozen reference policy, in the way the policy was loaded; of an object, copy it.

    Returns:
        the model in evaluation mode, without dropout where the policy trains without it, no parameter requiring a
        gradient.
    """
    from trl.trainer.utils import disable_dropout_in_model

    model = loading.load(source) if isinstance(source, Entry) else copy.deepcopy(source)
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
    model = _graft_in_memory(start)
    if model is not None:
        return model
    from accelerate import PartialState

    state = PartialState()
    with shared_scratch(state, start.loading.args.output_dir) as folder:
        what = "the graft of the start, as the reference policy"
        grafted = run_on_main(state, lambda: _write_graft_of_start(start, folder), what=what)
        return load_reference(Entry(grafted), loading=start.loading)


@contextmanager
def shared_scratch(state: Accelerator | PartialState, output_dir: str) -> Iterator[Path]:
    """Give all processes one folder beside the graft of the run, which the main process removes when all are done."""
    with ExitStack() as kept:

        def make() -> str:
            return str(kept.enter_context(Scratch(Path(output_dir, GRAFTED_FOLDER))).part)

        folder = Path(run_on_main(state, make, what="a folder for the time of the run"))
        check_shared(state, folder, what="the graft that all processes load")
        yield folder
        state.wait_for_everyone()  # not after an error, which the others may not have: they would not come


def _write_graft_of_start(start: Start, folder: Path) -> str:
    """Write the graft of the start to a new folder in `folder`; return its path."""
    dtype = str(start.loading.kwargs["dtype"]).removeprefix("torch.")
    options = {**start.loading.args.graft_options(), "format": "model", "dtype": dtype, "chat_template": "instruct"}
    if dtype == "float32":
        options["rounding"] = "nearest"  # nothing is rounded to 16 bits
    tuned, dtypes = start.origins.adapter or str(start.origins.policy), dtypes_before(start.stage)
    if start.in_memory:
        dtypes.append(dtype)
        tuned = str(folder / "start")
        start.model.save_pretrained(tuned)
    report = graft(
        base=str(start.base),
        instruct=str(start.instruct),
        tuned=tuned,
        output=folder / "grafted",
        base_dtype=[*dtypes, "tuned"],
        digest="none",
        stats=False,
        progress=False,
        **options,
    )
    return str(report.output)


def _graft_in_memory(start: Start) -> PreTrainedModel | None:
    """Load INSTRUCT with the product of the start added, where that is a plain LoRA on BASE; None where it is not."""
    args = start.loading.args
    if not (start.loads_adapter and start.adapter_on_base) or start.loading.quantization_config is not None:
        return None
    if args.instruct_scale != 1.0 or args.graft_vocab != "strict":
        return None
    dtype = str(start.loading.kwargs["dtype"]).removeprefix("torch.")  # of a config it is the name
    if args.graft_rounding == "auto" and dtype in _HALF:  # it is chosen from the files
        return None
    adapter, instruct = Checkpoint.open(str(start.origins.adapter)), Checkpoint.open(str(start.instruct))
    if not streams(adapter, instruct):
        return None
    placed, known = place_on(read_lora(adapter), adapter, instruct), ModelNames(instruct).memory
    if any(f"{lora.module}.weight" not in known for lora in placed.values()):
        return None
    model = load_reference(start.instruct, loading=start.loading)
    options = GraftOptions(**args.graft_options())
    receives = options.selector()
    for name, lora in placed.items():
        if receives(name):
            left, right = adapter.tensor(lora.left), adapter.tensor(lora.right)
            if lora.transposed:
                left, right = right.T, left.T
            weight = model.get_parameter(f"{lora.module}.weight")
            with gathered([weight], changed=True):
                weight.copy_(
                    graft_low_rank(
                        weight.cpu(), left, right, factor=lora.factor, scale=options.scale, rounding=options.rounding,
                        seed=options.seed, name=name,
                    )
                )  # fmt: skip
    return model


def prepare(model: PreTrainedModel, accelerator: Accelerator, args: Any, **head: Any) -> Any:
    """Give `model` to the accelerator for evaluation, with TRL's fused head.

    `args` are those of the trainer, `head` says what the head is to compute.
    """
    add_head(bare_model(model), args, **head)
    if getattr(accelerator.state, "fsdp_plugin", None) is not None:
        return shard_reference(model, accelerator)
    if uses_deepspeed(accelerator):
        from trl.models.utils import prepare_deepspeed

        return prepare_deepspeed(model, accelerator)
    return accelerator.prepare_model(model, evaluation_mode=True)


@contextmanager
def prepared(model: PreTrainedModel, accelerator: Accelerator, args: Any, **head: Any) -> Iterator[PreTrainedModel]:
    """Give `model` to the accelerator as `prepare` does; take it back and free it at the end."""
    ready = prepare(model, accelerator, args, **head)
    try:
        yield ready
    finally:
        if uses_deepspeed(accelerator):
            ready.destroy()
            forget(ready)
        release(ready, accelerator)
        del model, ready
        clear_device_cache(garbage_collection=True)


def shard_reference(model: PreTrainedModel, accelerator: Accelerator) -> PreTrainedModel:
    """Share a reference out over the processes of FSDP2 as accelerate does it with the policy, layer by layer.

    TRL's `prepare_fsdp` makes one block of it, which every pass gathers whole; and where only the first process has
    read the weights (`cpu_ram_efficient_loading`) it does not give them to the others.
    """
    return fsdp2_prepare_model(accelerator, model.requires_grad_(False)).eval()


def release(model: Any, accelerator: Accelerator) -> None:
    """Drop `model` from the accelerator's list of what it prepared: to drop one's own name alone would free nothing."""
    accelerator._models = [kept for kept in accelerator._models if kept is not model]


def decide_precompute(
    config: Any, given: Mapping[str, Any], *, preferred: bool, has_values: Callable[[Collection[str]], bool]
) -> None:
    """Decide `config.precompute_ref_log_probs` where the user left it open (None), and where the data has the values.

    Args:
        config: one with `PrecomputingArguments`; changed in place.
        given: arguments of the trainer.
        preferred: whether values computed before training are wanted, because the reference is another model than the
            policy as it starts, or is the policy but not what its name says.
        has_values: whether rows with the given columns come with the values.
    """
    from datasets import Dataset

    data, evaluated = given.get("train_dataset"), given.get("eval_dataset")
    columns = set(getattr(data, "column_names", None) or ())
    possible = isinstance(data, Dataset) and not columns & {"image", "images"}
    if possible and has_values(columns):
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


def weights_hash(model: Any) -> str:
    """Return a hash of the weights and stored buffers of `model`, whole; where they are shared out, all call it."""
    from datasets.fingerprint import Hasher

    found = []
    for name, tensor in sorted(model.state_dict(keep_vars=True).items()):
        with gathered([tensor]):
            found.append((name, tuple(tensor.shape), Hasher.hash(_bits(tensor))))
    return Hasher.hash(found)


def reference_key(model_hash: str, model: Any, args: Any, collator: Any, precision: str) -> str:
    """Return the part of the cache's key that does not come from the rows: the model, and how its values are summed.

    Args:
        model_hash: of the reference's weights, stored buffers and dtypes, all that TRL's own key has of it.
        model: the reference; its config turns weights into values, and so do buffers that are not stored, what its
            adapters are multiplied by, and the dtype that it was cast to since.
        args: of the run; `ld_alpha` of DPO weighs tokens, dropout and TF32 blur values.
        collator: makes batches of rows; it cuts and fills them. One that cannot be hashed is never the same again.
        precision: mixed precision of the accelerator, which need not come from `args`.
    """
    from datasets.fingerprint import Hasher

    adapters, bare = model.peft_config if is_adapted(model) else {}, bare_model(model)
    settings = {name: {**config.to_dict(), "base_model_name_or_path": None} for name, config in adapters.items()}
    stored = bare.state_dict().keys()
    buffers = {name: _bits(value) for name, value in bare.named_buffers() if name not in stored}
    how = (precision, getattr(args, "ld_alpha", None), args.disable_dropout, args.tf32)
    try:
        batches = Hasher.hash(collator)
    except Exception as error:  # of any kind: it is pickled
        logger.warning("The reference log probabilities are not kept for other runs: the data_collator has %s.", error)
        batches = secrets.token_hex()
    within = (type(bare).__name__, str(bare.dtype), _settings(bare.config), buffers, settings, _multipliers(model))
    return Hasher.hash((model_hash, *within, batches, *how))


def _bits(tensor: torch.Tensor) -> tuple[str, bytes]:
    whole = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor  # FSDP2 has shared it out
    return str(tensor.dtype), whole.detach().cpu().reshape(-1).view(torch.uint8).numpy().tobytes()


def _multipliers(model: Any) -> list[Any]:
    """Return what adapters are multiplied by, which may be another number than their settings make, and which act."""
    if not is_adapted(model):
        return []
    found = [(name, getattr(module, "scaling", None)) for name, module in model.named_modules()]
    return [model.active_adapters, *((name, scaling) for name, scaling in found if isinstance(scaling, dict))]


def _settings(config: Any) -> list[Any]:
    """Return what a config and those inside it say, with the kernels of attention, which `to_dict` leaves out."""
    inside = [getattr(config, name, None) for name in config.sub_configs]
    # The graft of a start is loaded from a folder that has another name in every run.
    own = {**config.to_dict(), **dict.fromkeys(["_name_or_path", *config.sub_configs])}
    return [own, config._attn_implementation, *(_settings(one) for one in inside if one is not None)]


def shared_on_disk(dataset: Any, accelerator: Accelerator) -> Any:
    """Return `dataset` from a file all processes can read; unchanged on one process, or where it is in a file already.

    TRL's cache of reference log probabilities is beside the data's file. Data in memory has one temporary folder a
    process, where the other processes find nothing.

    Raises:
        ConfigError: the processes are on machines that do not share the folder of that file.
    """
    import datasets

    if accelerator.num_processes == 1 or not isinstance(dataset, datasets.Dataset):
        return dataset
    folder = Path(datasets.config.HF_DATASETS_CACHE) / "shadow_trl" / dataset._fingerprint
    kept = Path(dataset.cache_files[0]["filename"]) if dataset.cache_files else folder
    check_shared(accelerator, kept.parent, what="the reference log probabilities")
    if dataset.cache_files:
        return dataset

    def save() -> str:
        if not folder.exists():
            # Renamed when it is whole: a run that is killed here must not leave half of the rows to the next.
            with Scratch(folder) as scratch:
                dataset.save_to_disk(str(scratch.part / "rows"))
                try:
                    (scratch.part / "rows").rename(folder)
                except OSError:
                    if not folder.exists():  # another run had the same rows
                        raise
        return str(folder)

    return datasets.load_from_disk(run_on_main(accelerator, save, what="saving the data"))
