"""What a trainer refuses of TRL's own arguments and of the data before anything is loaded: it would fail later."""

from __future__ import annotations

import dataclasses
import difflib
import inspect
import math
import os
import re
import reprlib
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..adapters.kinds import peft_type
from ..checkpoints.hub import output_folder
from ..errors import ConfigError, list_names
from ..results.parents import remove_empty
from .older import has_own_liger_loss

_WANTED: dict[str, tuple[str, Callable[[float], bool]]] = {
    **dict.fromkeys(
        (
            "per_device_train_batch_size",
            "per_device_eval_batch_size",
            "precompute_ref_batch_size",
            "gradient_accumulation_steps",
            "max_length",
        ),
        ("at least 1", lambda value: value >= 1),
    ),
    **dict.fromkeys(
        ("num_train_epochs", "neftune_noise_alpha", "beta", "weight_decay", "dataloader_num_workers"),
        ("at least 0", lambda value: value >= 0),
    ),
    "label_smoothing": ("at least 0 and below 0.5", lambda value: 0 <= value < 0.5),
    **dict.fromkeys(("ld_alpha", "label_smoothing_factor"), ("from 0 to 1", lambda value: 0 <= value <= 1)),
    "discopop_tau": ("above 0", lambda value: value > 0),
    "seed": ("from 0 to 2^32 - 1", lambda value: 0 <= value < 2**32),
}
"""What options must be that no library checks before the data are loaded, or before the first step."""

_NEED_THE_MODEL = ("galore", "apollo", "lomo")
"""Optimizers that cannot be made without the model."""

Forms = Sequence[Set[str]]


def check_settings(config: Any, quantization_config: Any = None, peft_config: Any = None) -> None:
    """Refuse options of a TRL config that would fail, or spoil the weights, once training has begun.

    Args:
        config: of the run.
        quantization_config: as given to the trainer.
        peft_config: the same.

    Raises:
        ConfigError: numbers that are not finite or out of range, an optimizer, schedule, tracker, kernel, quantiser or
            adapter that cannot be had, an `output_dir` that cannot be one. All of them are named.
    """
    faults = [*_kwargs(config), *_numbers(config), *_choices(config)]
    if not faults:  # what the others use
        faults = [*_optimizer(config), *_schedule(config), *_installed(config), *_adapter(peft_config)]
        faults += _quantiser(quantization_config or (config.model_init_kwargs or {}).get("quantization_config"))
    faults += _place(config)
    if faults:
        raise ConfigError("\n".join(faults))


def _kwargs(config: Any) -> Iterator[str]:
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if field.name.endswith("_kwargs") and value is not None and not isinstance(value, Mapping):
            yield f"{field.name} is {value!r}, not a mapping of names to values."


def _numbers(config: Any) -> Iterator[str]:
    for field in dataclasses.fields(config):
        name, value = field.name, getattr(config, field.name)
        for number in _numbers_in(value):
            # An infinite norm is how clipping is switched off.
            if not math.isfinite(number) and not (name == "max_grad_norm" and number > 0):
                yield f"{name} is {value}, not a finite number."
            elif name in _WANTED and not _WANTED[name][1](number):
                yield f"{name} is {value}; it must be {_WANTED[name][0]}."


def _numbers_in(value: Any) -> Iterator[float]:
    """Yield the number that an option is, or those in its list or mapping."""
    if isinstance(value, (list, tuple, dict)):
        for inner in value.values() if isinstance(value, dict) else value:
            yield from _numbers_in(inner)
    elif isinstance(value, (int, float)) and not isinstance(value, bool):
        yield value


def _choices(config: Any) -> Iterator[str]:
    """Check what a command line alone is held to."""
    for field in dataclasses.fields(config):
        value, choices = getattr(config, field.name), field.metadata.get("choices")
        if choices and value is not None and value not in choices:
            yield f"{field.name} is {value!r}; it must be one of: {', '.join(map(str, choices))}."


def _optimizer(config: Any) -> Iterator[str]:
    """Make the optimizer for one number: its class checks the rates, and says what is not installed."""
    import torch
    from transformers import Trainer

    if any(name in str(config.optim) for name in _NEED_THE_MODEL):
        return
    try:
        optimizer, kwargs = Trainer.get_optimizer_cls_and_kwargs(config)
        optimizer([torch.nn.Parameter(torch.zeros(1))], **kwargs)
    except (ImportError, ValueError, TypeError) as reason:
        yield f"optim={str(getattr(config.optim, 'value', config.optim))!r} with these options: {reason}"


def _schedule(config: Any) -> Iterator[str]:
    """Make the schedule for one number, which checks its settings."""
    import torch
    from transformers import get_scheduler

    kind, settings = config.lr_scheduler_type, config.lr_scheduler_kwargs
    try:
        optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=max(config.learning_rate, 0))
        get_scheduler(kind, optimizer, num_warmup_steps=1, num_training_steps=1000, scheduler_specific_kwargs=settings)
    except (ImportError, ValueError, TypeError, ArithmeticError) as reason:
        yield f"lr_scheduler_type={str(getattr(kind, 'value', kind))!r} with lr_scheduler_kwargs={settings}: {reason}"


def _installed(config: Any) -> Iterator[str]:
    from transformers.integrations import integration_utils as known
    from transformers.utils import is_liger_kernel_available

    there = known.get_available_reporting_integrations()
    for name in [config.report_to] if isinstance(config.report_to, str) else config.report_to or []:
        if name not in known.INTEGRATION_TO_CALLBACK:
            yield f"report_to names {name!r}, which transformers does not know. Correct it, or pass report_to='none'."
        elif name not in (*there, "flyte"):
            yield f"report_to names {name}, which is not installed. Install it, or pass report_to='none'."
    if config.use_liger_kernel and not is_liger_kernel_available():
        yield "use_liger_kernel needs liger-kernel, which is not installed: pip install liger-kernel."
    if config.use_liger_kernel and has_own_liger_loss(config):
        yield "use_liger_kernel in DPO needs TRL 1.14 or newer: in older releases its loss takes the reference of TRL."


def _adapter(peft_config: Any) -> Iterator[str]:
    if peft_config is None:
        return
    rank, dropout = getattr(peft_config, "r", 1), getattr(peft_config, "lora_dropout", 0)
    if peft_type({"peft_type": getattr(peft_config, "peft_type", None)}) == "LORA" and rank < 1:
        yield f"r (lora_r) of the adapter is {rank}; it must be at least 1."
    if not 0 <= dropout <= 1:
        yield f"lora_dropout of the adapter is {dropout}; it must be from 0 to 1."
    for name in ("target_modules", "exclude_modules"):
        expression = getattr(peft_config, name, None)
        try:
            re.compile(expression if isinstance(expression, str) else "")
        except (re.error, RecursionError, OverflowError) as reason:
            yield f"{name} of the adapter is not a regular expression: {expression!r} ({reason})."


def _quantiser(quantised: Any) -> Iterator[str]:
    from transformers.utils import is_bitsandbytes_available

    if type(quantised).__name__ == "BitsAndBytesConfig" and not is_bitsandbytes_available():
        yield "load_in_4bit and load_in_8bit need bitsandbytes, which is not installed: pip install bitsandbytes."


def _place(config: Any) -> Iterator[str]:
    if not config.output_dir:
        yield "output_dir is empty. Name a folder."
        return
    if config.output_dir.startswith("~"):  # transformers has put in the home of a user who is known
        yield f"output_dir={config.output_dir!r}: there is no such user. Write ./~ for a folder of that name."
    folder = Path(config.output_dir).absolute()
    above = next(path for path in (folder, *folder.parents) if os.path.exists(path))
    if not above.is_dir():
        yield f"output_dir={config.output_dir!r} cannot be a folder: {above} is a file."
    elif not os.access(above, os.W_OK | os.X_OK):
        yield f"output_dir={config.output_dir!r} cannot be written: no permission for {above}."
    else:
        try:
            output_folder(config.output_dir)
        except ConfigError as reason:
            yield f"output_dir: {reason}"


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


def check_first_row(name: str, data: Any, forms: Forms) -> None:
    """Refuse data whose first row has other values in the columns of its form than TRL works with.

    Args:
        name: what the data is for.
        data: a data set, or several by name; a stream is not checked.
        forms: as for `check_columns`, which has found one of them.

    Raises:
        ConfigError: there is no row, or its values are neither texts nor messages; each is shown.
    """
    if isinstance(data, Mapping):
        for key, one in data.items():
            check_first_row(f"{name} {key!r}", one, forms)
        return
    columns = getattr(data, "column_names", None)
    if not forms or columns is None or not hasattr(data, "__len__"):
        return
    if not len(data):
        raise ConfigError(f"{name} has no rows.")
    row = data[0]
    wrong = [_wrong_values({column: row[column] for column in form}) for form in forms if form <= set(columns)]
    if wrong and all(wrong):
        raise ConfigError(
            f"the first row of {name} is of no form that the trainer takes.\n{list_names(wrong[0])}\n"
            'Give texts, or messages like [{"role": "user", "content": "a text"}], the same kind in both columns.'
        )


def _wrong_values(row: Mapping[str, Any]) -> list[str]:
    """Return the values that are neither text nor messages; or all, where one is text and the other is not."""
    found = {name: _kind_of(name, value) for name, value in row.items()}
    said = {kind for name, kind in found.items() if name != "label"}
    wrong = [name for name, kind in found.items() if not kind] or (list(found) if len(said) > 1 else [])
    return [f"{name}  {reprlib.repr(row[name])}" for name in wrong]


def _kind_of(name: str, value: Any) -> str:
    """Return what a value is: `text`, `messages`, `tokens` or `label`; "" for anything else."""
    if name == "label":
        return "label" if value in (True, False) else ""
    if name == "input_ids":
        return "" if value is None or isinstance(value, str) else "tokens"
    if isinstance(value, str):
        return "" if name in ("messages", "conversations") else "text"
    return "messages" if isinstance(value, list) and value and all(map(_is_turn, value)) else ""


def _is_turn(turn: Any) -> bool:
    if not isinstance(turn, Mapping):
        return False
    known = {key: value for key, value in turn.items() if value is not None}
    speaker, text = ("from", "value") if "from" in known else ("role", "content")
    # A call of a tool has no text.
    said = isinstance(known[text], (str, list)) if text in known else len(known) > 1
    return isinstance(known.get(speaker), str) and said


def signature_of(trainer: type, *, ours: type) -> inspect.Signature:
    """Return the arguments of `trainer`: those of the trainer below it, which `ours` passes on, and its own.

    Args:
        trainer: a subclass of `ours` and of a TRL trainer.
        ours: whose constructor adds arguments by keyword to any others.
    """
    chain = [one for one in trainer.__mro__ if "__init__" in vars(one)]
    passing = [one for one in chain if one.__module__.partition(".")[0] == __name__.partition(".")[0]]
    shown = next(one for one in chain if one not in passing) if chain[0] in passing else chain[0]
    found = inspect.signature(vars(shown)["__init__"])
    parameters = list(found.parameters.values())[1:]
    if shown is not chain[0]:
        own = inspect.signature(vars(ours)["__init__"]).parameters.values()
        parameters += [one for one in own if one.kind is inspect.Parameter.KEYWORD_ONLY]
    ordered = sorted(parameters, key=lambda one: one.kind)  # what takes all other keywords comes last
    return found.replace(parameters=ordered, return_annotation=inspect.Signature.empty)


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
