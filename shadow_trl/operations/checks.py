"""What a trainer checks before the first step: all that would keep the graft from succeeding after the last."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from ..adapters.kinds import kind_of
from ..checkpoints.checkpoint import Checkpoint
from ..checkpoints.delta import refuse_deltas
from ..checkpoints.hub import Source, output_folder
from ..errors import ConfigError
from ..grafting.form import left_out, no_adapter_form
from ..grafting.inputs import open_instruct, open_trained
from ..grafting.jobs import full_jobs
from ..grafting.options import GraftOptions
from ..grafting.tuned import SingleTuned
from ..layouts.matching import Announced
from ..pair.pairs import ModelPair
from ..pair.token_rows import vocabulary_of
from ..pair.trained_templates import choose_template
from ..results.folder import check_free, check_place, recover
from ..runtime.machine import check_space


def check_graft(
    *,
    base: Source | None = None,
    instruct: Source,
    output: Source,
    adapter: bool,
    adapter_config: Mapping[str, Any] | None = None,
    **options: Any,
) -> None:
    """Check before training all that would keep `graft` from succeeding after it.

    Args:
        base: as for `graft`.
        instruct: as for `graft`.
        output: as for `graft`.
        adapter: whether TUNED will be an adapter.
        adapter_config: its settings, as PEFT stores them. Default: those of a plain LoRA.
        **options: as for `graft`.

    Raises:
        InputError: an option, the pair, the output folder or the form does not allow the graft.
        GraftError: the disk has no room for the result.

    """
    settings = _options(options)
    target = output_folder(output)
    recover(target)
    check_free(target, settings.overwrite)
    refuse_deltas(base=base, instruct=instruct)
    receiver = open_instruct(instruct)
    receiver.check_not_quantised("instruct")
    folders = [("instruct", receiver.path)]
    if base is not None:
        kind = kind_of(adapter_config or {"peft_type": "LORA"})
        origin = Checkpoint.open(base, weights=not adapter or kind.needs_base)
        folders.append(("base", origin.path))
        if not adapter:
            origin.check_not_quantised("base")
            # BASE stands in for TUNED, which will have its names and shapes.
            full_jobs(origin, receiver, origin, settings, None)
    check_place(target, folders)
    if settings.format == "adapter" and not adapter:
        raise no_adapter_form(["tuned will be a full checkpoint"], rank=False)
    if settings.format == "adapter" and adapter_config is not None and kind_of(adapter_config).obstacles:
        raise no_adapter_form(list(kind_of(adapter_config).obstacles), rank=False)
    if settings.format == "model" or not adapter:
        check_space(target, _size(receiver, settings))


def check_trained(
    *, base: Source, instruct: Source, tuned: Announced, adapter: bool, has_weights: bool = True, **options: Any
) -> list[str]:
    """Check before the first step that the model in memory, as it will be saved, can be grafted.

    Args:
        base: as for `graft`.
        instruct: as for `graft`.
        tuned: the model in memory.
        adapter: whether it is saved as an adapter.
        has_weights: whether its weights are numbers; those of a quantised model are not compared.
        **options: as for `graft`.

    Returns:
        warnings, one text each.

    Raises:
        InputError: what would be found wrong with TUNED after training.

    """
    origin, receiver = Checkpoint.open(base), Checkpoint.open(instruct)
    warnings = ModelPair(origin, receiver).check_trained(tuned.config, vocabulary_of(tuned))
    trained_with = {"tuned": vocabulary_of(tuned)}
    warnings += choose_template(trained_with, receiver.path, _options(options).chat_template).warnings
    if not has_weights:
        return warnings
    if adapter:  # what it does not train is not saved
        known = tuned.trained | origin.specs.keys() | receiver.specs.keys()
        tuned = replace(tuned, specs={name: spec for name, spec in tuned.specs.items() if name in known})
    full_jobs(origin, receiver, tuned, _options(options), None)
    return warnings


def check_left_out(*, base: Source, instruct: Source, adapter: Checkpoint, **options: Any) -> None:
    """Refuse, before its training, an adapter of which the adapter form cannot leave out what the options leave out.

    Args:
        base: as for `graft`.
        instruct: as for `graft`.
        adapter: names, shapes and settings of the adapter as it will be saved, its start subtracted.
        **options: as for `graft`.

    Raises:
        AdapterError: `format` is `adapter`, and `modules` or `vocab` leaves out a part.

    """
    settings = _options(options)
    if settings.format != "adapter":
        return
    receiver = Checkpoint.open(instruct)
    left = left_out(open_trained(SingleTuned(base, adapter), receiver, settings), receiver, settings)
    if left:
        raise no_adapter_form(left, rank=False)


def _options(options: dict[str, Any]) -> GraftOptions:
    try:
        return GraftOptions(**options)
    except TypeError as error:
        raise ConfigError(f"{error}.") from error


def _size(instruct: Checkpoint, options: GraftOptions) -> int:
    widths = {"float32": 4, "bfloat16": 2, "float16": 2}
    # With all left open, a delta that is too small for 16 bits is written in float32.
    width = 4 if options.dtype == options.rounding == "auto" else widths.get(options.dtype)
    return sum(spec.numel * width if width and spec.is_float else spec.nbytes for spec in instruct.specs.values())
