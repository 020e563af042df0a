"""The form of a graft's result: dense weights, or an adapter where an exact one exists."""

from __future__ import annotations

from contextlib import suppress

from ..adapters.kinds import SCALABLE, START_FOLDER, kind_of, peft_type
from ..adapters.lora import no_factors, other_adapters, place_on
from ..checkpoints.checkpoint import Checkpoint
from ..checkpoints.hub import is_hub_id, local_folder
from ..checkpoints.manifest import read_manifest
from ..errors import AdapterError, PairMismatchError, list_names
from ..pair.token_rows import row_count
from .jobs import check_selection, rows_to_graft
from .options import GraftOptions
from .trained import Full, PlainLora


def form_of(tuned: Full, instruct: Checkpoint, options: GraftOptions) -> tuple[str, list[str], bool]:
    """Return the form of the result, `adapter` or `model`, and why an adapter becomes dense weights.

    The last value says whether the adapter form stands beside the dense one.

    Raises:
        AdapterError: an adapter is asked for and there is no exact one.
    """
    if options.format == "model" or not tuned.checkpoint.is_adapter:
        if options.format == "adapter" or options.rank is not None:
            what = "a sum, which has an adapter form for plain LoRAs only" if tuned.stages else "a full checkpoint"
            raise no_adapter_form([f"tuned is {what}  (`shadow-trl delta --rank R` makes a LoRA for base)"], rank=False)
        return "model", [], False
    left = left_out(tuned, instruct, options)
    if left and (options.rank is not None or options.format == "adapter"):
        raise no_adapter_form(left, rank=False)
    if options.rank is not None:
        return "adapter", [], False
    chosen = [f"{name} is set" for name in options.dense_only()]
    inexact = [*left, *adapter_obstacles(tuned.checkpoint, options.scale)]
    reasons = [*chosen, *inexact]
    if reasons and options.format == "adapter":
        raise no_adapter_form(reasons)
    if options.format == "adapter" or not (reasons or is_local(instruct)):
        return "adapter", [], False
    if is_local(instruct):
        reasons = reasons or [f"instruct {instruct} is a local folder, which an adapter would have to name"]
    # With `shared`, the stored rows of an adapter may be other ones than INSTRUCT's.
    exact = not inexact and options.vocab == "strict" and options.for_adapter() is not None
    return "model", reasons, is_local(instruct) and exact


def left_out(tuned: Full, instruct: Checkpoint, options: GraftOptions) -> list[str]:
    """Return the parts of an adapter that `modules` and `vocab` leave out, which only the dense form can."""
    found = _rows_left_out(tuned, instruct, options)
    if options.patterns() is not None and not _all_selected(tuned, instruct, options):
        found.append("modules leaves out a part of the adapter")
    return found


def _all_selected(tuned: Full, instruct: Checkpoint, options: GraftOptions) -> bool:
    """Whether `modules` selects the whole adapter; only of a plain LoRA is it known which weights it changes."""
    if not isinstance(tuned, PlainLora):
        return False
    names = list(place_on(tuned.modules, tuned.checkpoint, instruct))
    chosen = list(filter(options.selector(), names))
    check_selection(options, chosen, names)
    return chosen == names


def _rows_left_out(tuned: Full, instruct: Checkpoint, options: GraftOptions) -> list[str]:
    """Return the parts of an adapter that change token rows which `vocab` leaves as they are in INSTRUCT."""
    from ..adapters.stored import token_rows

    changed = token_rows(tuned.checkpoint) if options.vocab == "shared" else {}
    if not changed:
        return []
    rows, every = set(rows_to_graft(tuned.base, instruct, options) or ()), range(row_count(instruct) or 0)
    left = [key for key, ids in changed.items() if not rows.issuperset(every if ids is ... else ids)]
    return [f"{key}  (it changes token rows that vocab='shared' leaves as they are)" for key in left]


def adapter_obstacles(tuned: Checkpoint, scale: float) -> list[str]:
    """Return why an adapter has no exact form on INSTRUCT; empty where it has one."""
    kind = kind_of(tuned.adapter_config)
    reasons = list(kind.obstacles)
    if kind.subtracted:
        others = no_factors(tuned.specs)
        reasons.append(
            f"init_lora_weights = {tuned.adapter_config['init_lora_weights']}  "
            + (f"(with {others[0]})" if others else f"(the adapter as it was before training is not in {START_FOLDER})")
        )
    if scale != 1.0 and peft_type(tuned.adapter_config) not in SCALABLE:
        reasons.append(f"scale = {scale}  (not known how to multiply a {peft_type(tuned.adapter_config)} adapter)")
    return reasons


def text_class(adapter: Checkpoint, instruct: Checkpoint) -> str | None:
    """Return the text-only class of a multimodal INSTRUCT if it is that class's modules that an adapter names."""
    if "text_config" not in instruct.config:
        return None
    from ..adapters.stored import may_change
    from ..layouts.model_names import ModelNames

    with suppress(PairMismatchError):  # a class that transformers does not know: nothing can be said of it
        names = ModelNames.under(instruct, may_change(adapter))
        return type(names.model).__name__ if names.text else None
    return None


def no_adapter_form(reasons: list[str], *, rank: bool = True) -> AdapterError:
    """Return the error for a result that cannot be an exact adapter; `rank` says whether an inexact one can be made."""
    nearest = "; or rank=R (--rank R): the nearest LoRA of that rank, with its error in the report" if rank else ""
    return AdapterError(
        f"there is no exact adapter form of this graft.\n{list_names(reasons)}\nUse format='model', which is "
        f"exact{nearest}."
    )


def is_local(side: Checkpoint) -> bool:
    """Whether a side was given as a folder and not as a hub id."""
    return local_folder(side.source) is not None or not is_hub_id(side.source)


def adapter_warnings(tuned: Full, instruct: Checkpoint, reasons: list[str]) -> list[str]:
    """Return what the user should know of an adapter whose result is dense for `reasons`; [] for a full checkpoint."""
    if not tuned.checkpoint.is_adapter:
        return []
    found = []
    if reasons and (not is_local(instruct) or adapter_obstacles(tuned.checkpoint, 1.0)):
        found.append(f"the result is dense weights, there is no exact adapter form.\n{list_names(reasons)}")
    source = tuned.sides["tuned"]
    others = other_adapters(source)
    if others:
        found.append(f"{source} holds further adapters, which are not grafted: {', '.join(others)}.")
    method = tuned.base.quantisation or ((read_manifest(source.path) or {}).get("quantised"))
    if method:
        how = (
            "is the exact product of its factors"
            if isinstance(tuned, PlainLora)
            else "is worked out on the BASE that is given"
        )
        found.append(
            f"the adapter was trained on a BASE quantised by {method}. Its delta {how}, and a part of it answers to "
            "the quantisation error, which the full-precision INSTRUCT does not have (docs/adapters.md)."
        )
    return found
