"""What stands beside the adapter in training: its start, and TRL's frozen copy of it.

The delta of PiSSA, CorDA and others is what the adapter became less what it was: with the start beside it, the graft
needs no weight of BASE and has an exact adapter form. DoRA starts near BASE: its start is subtracted too.
"""

from __future__ import annotations

import copy
import json
import math
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from ..adapters.kinds import START_FOLDER, is_subtracted, kind_of, lost_start, more_than_a_product, start_setting
from ..adapters.lora import no_factors
from ..checkpoints.checkpoint import Checkpoint
from ..checkpoints.header import CODES, TensorSpec
from ..errors import AdapterError, both_sides
from .loading import is_adapted


def start_of(model: Any) -> dict[str, Tensor] | None:
    """Return a copy of the adapter of `model`, which was not trained yet; None where its start is not needed.

    Raises:
        AdapterError: the delta would be more than the product less its start, and could not be found in another way.
    """
    if not is_adapted(model):
        return None
    name = model.active_adapters[0]
    config = model.peft_config[name].to_dict()
    start = start_setting(config)
    # The magnitudes of a DoRA are rounded; of one that was trained before, its start is no longer known.
    dora = config.get("use_dora") and not any(
        bool(value.any()) for key, value in model.named_parameters() if f".lora_B.{name}." in key
    )
    if not (is_subtracted(start) or dora):
        return None
    from peft import get_peft_model_state_dict

    tensors = get_peft_model_state_dict(model, adapter_name=name, save_embedding_layers=False)
    others = no_factors(tensors)
    if others and lost_start(start) is not None:
        raise more_than_a_product(start, others)
    return {key: value.detach().to("cpu", copy=True) for key, value in tensors.items()}


def trained_by_adapter(model: Any) -> list[Tensor]:
    """Return the parameters that the adapter of `model` trains; [] where it has none."""
    return [parameter for parameter in model.parameters() if parameter.requires_grad] if is_adapted(model) else []


def rescaled_modules(model: Any) -> list[str]:
    """Return a row for each LoRA module whose scaling was changed since it was made, with both numbers."""
    from peft.tuners.lora import LoraLayer

    rows, name = [], model.active_adapters[0]
    for path, module in model.named_modules():
        if isinstance(module, LoraLayer) and name in module.scaling:
            rank = module.r[name]
            made = module.lora_alpha[name] / (math.sqrt(rank) if module.use_rslora[name] else rank)
            if not math.isclose(module.scaling[name], made, rel_tol=1e-6):
                rows.append(both_sides(path, module.scaling[name], made, ("memory", "settings")))
    return rows


def announced(model: Any) -> Checkpoint:
    """Return names, shapes and settings of the adapter of `model` as saving gives them, its start subtracted."""
    from peft import get_peft_model_state_dict

    name = model.active_adapters[0]
    tensors = get_peft_model_state_dict(model, adapter_name=name, save_embedding_layers=False)
    specs = {
        key: TensorSpec(CODES[str(value.dtype).removeprefix("torch.")], tuple(value.shape), Path(), None, value.nbytes)
        for key, value in tensors.items()
    }
    config = json.loads(json.dumps(model.peft_config[name].to_dict(), default=list))
    if kind_of(config).subtracted:
        config["init_lora_weights"] = True
    return Checkpoint("the adapter in training", None, Path(), is_adapter=True, adapter_config=config, specs=specs)


@contextmanager
def without_second_start(model: Any) -> Iterator[None]:
    """Keep a trainer from changing the weights under a loaded adapter again when it adds a copy of it (TRL's `ref`).

    PEFT takes the start of a PiSSA adapter out of the weights for each adapter that is added with its config.
    """
    config = model.peft_config[model.active_adapters[0]] if is_adapted(model) else None
    start = getattr(config, "init_lora_weights", None)
    if config is None or not is_subtracted(start):
        yield
        return
    config.init_lora_weights = True
    try:
        yield
    finally:
        config.init_lora_weights = start


def write_configs(folder: Path, model: Any) -> None:
    """Write what must stand beside the shards of a model, which have no names of their own: its configuration."""
    if not is_adapted(model):
        model.config.save_pretrained(folder)
        return
    config = copy.deepcopy(model.peft_config[model.active_adapters[0]])
    config.inference_mode = True  # as PEFT saves it
    config.save_pretrained(str(folder))


def write_start(folder: Path, model: Any, start: dict[str, Tensor] | None, earlier: str | None) -> None:
    """Write `start`, where there is one, below the folder of a run, in the place of that of a run before.

    The start of the `earlier` adapter, which this run trains further, is this one's too.
    """
    target = folder / START_FOLDER
    shutil.rmtree(target, ignore_errors=True)
    if earlier is not None and (Path(earlier) / START_FOLDER).is_dir():
        shutil.copytree(Path(earlier) / START_FOLDER, target)
    if start is None or earlier is not None:
        return
    from safetensors.torch import save_file

    target.mkdir(parents=True)
    model.peft_config[model.active_adapters[0]].save_pretrained(str(target))
    save_file({key: value.contiguous() for key, value in start.items()}, target / "adapter_model.safetensors")


def check_same_start(checkpoint: str, start: dict[str, Tensor] | None) -> None:
    """Check that a resumed adapter starts where that of the checkpoint did: under it lies BASE less that start.

    Raises:
        AdapterError: it does not: another BASE, or a start that another seed draws, as of `pissa_niter_4`.
    """
    folder = Path(checkpoint) / START_FOLDER
    if start is None or not folder.is_dir():
        return
    before = Checkpoint.open(str(folder))
    for name in (name for name in start if ".lora_A." in name):
        other = name.replace(".lora_A.", ".lora_B.")
        here, there = start[other] @ start[name], before.tensor(other) @ before.tensor(name)
        if (here - there).norm() > 1e-3 * there.norm():
            raise AdapterError(
                f"{checkpoint} cannot be resumed: its adapter has another start than a new one ({name} among others), "
                "so the weights under it are not those that it was trained on. Resume with BASE and seed of that "
                "run; older releases of TRL draw the start before they set the seed, so call transformers.set_seed() "
                "with it before the trainer is made."
            )


@contextmanager
def without_reference_adapter(model: Any) -> Iterator[None]:
    """Keep TRL's frozen copy of the adapter (`ref`) out of what is saved: it is no part of TUNED."""
    names = list(model.peft_config) if _has_reference(model) else []
    if not names:
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
    if _has_reference(model):
        model.delete_adapter("ref")


def _has_reference(model: Any) -> bool:
    # An adapter that the user called `ref` is the one that is trained.
    return is_adapted(model) and "ref" in model.peft_config and len(model.peft_config) > 1
