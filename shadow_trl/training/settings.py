"""What a trainer refuses of TRL's own arguments and of the data before anything is loaded: it would fail later."""

from __future__ import annotations

import dataclasses
import difflib
import inspect
import math
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..errors import ConfigError
from ..results.parents import remove_empty

_LEAST = {
    "per_device_train_batch_size": 1,
    "per_device_eval_batch_size": 1,
    "gradient_accumulation_steps": 1,
    "max_length": 1,
    "num_train_epochs": 0,
    "neftune_noise_alpha": 0,
    "beta": 0,
    "weight_decay": 0,
    "label_smoothing": 0,
}
"""Smallest value of options that no library checks before the first step."""

_NEED_THE_MODEL = ("galore", "apollo", "lomo")
"""Optimizers that cannot be made without the model."""

Forms = Sequence[Set[str]]


def check_settings(config: Any, quantization_config: Any = None) -> None:
    """Refuse options of a TRL config that would fail, or spoil the weights, once training has begun.

    Args:
        config: of the run.
        quantization_config: as given to the trainer.

    Raises:
        ConfigError: numbers that are not finite or too small, an optimizer, tracker or quantiser that cannot be had, an
            `output_dir` that cannot be one. All of them are named.
    """
    config_kwargs = config.model_init_kwargs or {}
    quantised = quantization_config or config_kwargs.get("quantization_config")
    faults = [*_numbers(config), *_optimizer(config), *_trackers(config), *_quantiser(quantised), *_place(config)]
    if faults:
        raise ConfigError("\n".join(faults))


def _numbers(config: Any) -> Iterator[str]:
    for field in dataclasses.fields(config):
        name, value = field.name, getattr(config, field.name)
        if not isinstance(value, (int, float)) or isinstance(value, bool):
            continue
        # An infinite norm is how clipping is switched off.
        if not math.isfinite(value) and not (name == "max_grad_norm" and value > 0):
            yield f"{name} is {value}, not a finite number."
        elif value < _LEAST.get(name, -math.inf):
            yield f"{name} is {value}; it must be at least {_LEAST[name]}."


def _optimizer(config: Any) -> Iterator[str]:
    """Make the optimizer for one number: its class checks the rates, and says what is not installed."""
    import torch
    from transformers import Trainer

    if any(name in str(config.optim) for name in _NEED_THE_MODEL):
        return
    try:
        optimizer, kwargs = Trainer.get_optimizer_cls_and_kwargs(config)
        optimizer([torch.nn.Parameter(torch.zeros(1))], **kwargs)
    except (ImportError, ValueError) as reason:
        if all(math.isfinite(kwarg) for kwarg in (config.learning_rate, config.weight_decay)):  # said already
            yield f"optim={str(getattr(config.optim, 'value', config.optim))!r} with these options: {reason}"


def _trackers(config: Any) -> Iterator[str]:
    from transformers.integrations import integration_utils as known

    there = known.get_available_reporting_integrations()
    for name in [config.report_to] if isinstance(config.report_to, str) else config.report_to or []:
        if name in known.INTEGRATION_TO_CALLBACK and name not in (*there, "flyte"):
            yield f"report_to names {name}, which is not installed. Install it, or pass report_to='none'."


def _quantiser(quantised: Any) -> Iterator[str]:
    from transformers.utils import is_bitsandbytes_available

    if type(quantised).__name__ == "BitsAndBytesConfig" and not is_bitsandbytes_available():
        yield "load_in_4bit and load_in_8bit need bitsandbytes, which is not installed: pip install bitsandbytes."


def _place(config: Any) -> Iterator[str]:
    if not config.output_dir:
        yield "output_dir is empty. Name a folder."
        return
    folder = Path(config.output_dir).expanduser().absolute()
    above = next(path for path in (folder, *folder.parents) if path.exists())
    if not above.is_dir():
        yield f"output_dir={config.output_dir!r} cannot be a folder: {above} is a file."
    elif not os.access(above, os.W_OK | os.X_OK):
        yield f"output_dir={config.output_dir!r} cannot be written: no permission for {above}."


def check_columns(name: str, data: Any, forms: Forms) -> None:
    """Refuse data that has the columns of none of the forms that the trainer takes.

    Args:
        name: what the data is for.
        data: a data set, or several by name; one that does not know its columns, such as a stream, is not checked.
        forms: for each form the columns that it needs; others may be there too.

    Raises:
        ConfigError: columns that are there, and the forms that are wanted.
    """
    if isinstance(data, Mapping):
        for key, one in data.items():
            check_columns(f"{name} {key!r}", one, forms)
        return
    columns = getattr(data, "column_names", None)
    if not forms or not columns or any(form <= set(columns) for form in forms):
        return
    wanted = "\n".join(f"  {' and '.join(sorted(form))}" for form in forms)
    raise ConfigError(
        f"{name} has the columns {', '.join(columns)}. The trainer takes one of these forms:\n{wanted}\n"
        "Make these columns first, with `dataset.map` or `dataset.rename_columns`."
    )


def bound(function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> inspect.BoundArguments:
    """Bind the arguments of TRL's trainer; TypeError, with the nearest name, for one that neither it nor we have."""
    signature = inspect.signature(function)
    for name in kwargs.keys() - signature.parameters.keys():
        near = difflib.get_close_matches(name, ["instruct_model", "base_model", *signature.parameters], n=1, cutoff=0.5)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise TypeError(f"the trainer has no argument {name!r}.{hint}")
    return signature.bind(*args, **kwargs)


@contextmanager
def removed_if_refused(folders: list[Path], config: Any) -> Iterator[None]:
    """Remove the `folders`, outermost first, that a run left empty when it was refused: TRL makes them early.

    Raises:
        ConfigError: in place of a TypeError about one of the `model_init_kwargs` of `config`.
    """
    try:
        yield
    except BaseException as reason:
        remove_empty(folders)
        unknown = re.search(r"unexpected keyword argument '(\w+)'", str(reason))
        if isinstance(reason, TypeError) and unknown and unknown[1] in (config.model_init_kwargs or {}):
            raise ConfigError(f"model_init_kwargs has {unknown[1]!r}, which this model does not know.") from reason
        raise
