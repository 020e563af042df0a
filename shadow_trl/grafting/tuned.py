"""TUNED as one checkpoint, whatever it was made of: adapters on a stage before, several adapters, a start to subtract.

What must be made for it lies in a folder beside the result and is gone with it. Changed weights only are written; the
others stay BASE's own, where they lie.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..adapters.kinds import kind_of
from ..adapters.lora import base_model_of, open_tuned, place_on, read_lora, streams
from ..checkpoints.checkpoint import Checkpoint
from ..checkpoints.delta import refuse_deltas
from ..checkpoints.header import read_header
from ..errors import AdapterError, ConfigError, list_names
from ..results.folder import make_parents, remove_empty
from .origins import stage_below
from .weighted import Source, weighted_sources

if TYPE_CHECKING:
    from torch import Tensor

Weighted = tuple[Any, float]
Stages = dict[str, Checkpoint]


@contextmanager
def one_tuned(
    base: Source | None, tuned: Any, target: Path, base_dtype: str | None = None
) -> Iterator[tuple[Source | None, Checkpoint, Stages]]:
    """Give BASE and TUNED of a graft as single checkpoints.

    An adapter trained on the full model of an earlier run is merged into that first: its delta is
    (start - base) + B @ A, the adapter alone would lose what the earlier stage learnt. Several sources are summed,
    plain LoRAs as one of higher rank, others as BASE + sum of weight * (tuned - base). A PiSSA or OLoRA whose start was
    kept becomes a plain LoRA.

    Yields:
        base, tuned, and the checkpoints that TUNED is made of, by role; empty where it is one as it lies.
    """
    sources = weighted_sources(tuned)
    for source, _ in sources:
        refuse_deltas(tuned=source)
    if len(sources) == 1 and sources[0][1] == 1.0 and not _needs_scratch(sources[0][0], base):
        yield base, open_tuned(sources[0][0]), {}
        return
    with _scratch_beside(target) as scratch:
        found = [
            _on_base(base, source, scratch / str(number), base_dtype) for number, (source, _) in enumerate(sources)
        ]
        origins = {str(origin or "not known, since a full checkpoint names none: give base") for origin, _, _ in found}
        if len(origins) > 1:
            raise ConfigError(
                f"the {len(found)} tuned models start from {len(origins)} bases.\n{list_names(sorted(origins))}\n"
                "Deltas from one base only can be added. Nothing was written."
            )
        stages: Stages = {}
        for number, (_, _, parts) in enumerate(found, start=1):
            for role, part in parts.items():
                stages[role if number == 1 else f"{role}_{number}"] = part
        origin, single, _ = found[0]
        if len(found) == 1 and sources[0][1] == 1.0:
            yield origin, single, stages
        else:
            sides = [(side, weight) for (_, side, _), (_, weight) in zip(found, sources, strict=True)]
            loaded = [subtracted_dtype(base_dtype, parts) for _, _, parts in found]
            yield origin, _summed(origin, sides, scratch / "sum", base_dtype, loaded), stages


def merged_checkpoint(
    base: Checkpoint, adapter: Checkpoint, folder: Path, *, base_dtype: str | None = None
) -> tuple[Checkpoint, list[str]]:
    """Return BASE with an adapter merged, in fp32 or wider, and the names of the weights that it changes.

    Args:
        base: what the adapter was trained on.
        adapter: of any type.
        folder: for the changed weights; removed by the caller.
        base_dtype: as in `peft_deltas.merge_into_base`.
    """
    if not streams(adapter, base):
        from ..adapters.peft_layers import merge_into_base

        return merge_into_base(base, adapter, folder, base_dtype=base_dtype)
    placed = place_on(read_lora(adapter), adapter, base)

    def merge(name: str) -> Tensor:
        lora = placed[name]
        product = lora.factor * adapter.tensor(lora.left).double() @ adapter.tensor(lora.right).double()
        return base.tensor(name).double() + (product.T if lora.transposed else product)

    return with_changes(base, ((name, merge(name)) for name in placed), folder, adapter), list(placed)


def with_changes(
    base: Checkpoint, changes: Iterable[tuple[str, Tensor]], folder: Path, source: Checkpoint
) -> Checkpoint:
    """Return `base` with some weights changed, called as `source` in messages.

    Args:
        base: whose other weights stay where they are.
        changes: name on disk and new value, one at a time; kept in fp32 where BASE has 16 bits, else in fp64, which is
            exact enough for one rounding later.
        folder: for the changed weights; made here.
        source: what changed them.
    """
    import torch
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    made = Checkpoint(source.source, source.revision, base.path, config=base.config, files=list(base.files))
    made.specs = dict(base.specs)
    for number, (name, value) in enumerate(changes):
        wide = base.specs[name].itemsize >= 4
        path = folder / f"{number:05d}.safetensors"
        save_file({name: value.to(torch.float64 if wide else torch.float32).contiguous()}, path)
        made.files.append(path)
        made.headers[path] = read_header(path)
        made.specs.update(made.headers[path].specs)
    return made


@contextmanager
def _scratch_beside(target: Path) -> Iterator[Path]:
    """Give a folder beside the result that is gone afterwards, with the folders that were made for it and are empty."""
    parent = target.absolute().parent
    made = make_parents(parent)
    try:
        with tempfile.TemporaryDirectory(prefix=".shadow-merged-", dir=parent) as name:
            yield Path(name)
    finally:
        remove_empty(made)


def _needs_scratch(source: Source, base: Source | None) -> bool:
    learnt = open_tuned(source)
    if not learnt.is_adapter:
        return False
    if kind_of(learnt.adapter_config).subtracted:
        from ..adapters.repoint import read_start

        if read_start(learnt) is not None:
            return True
    return stage_below(learnt.path, None if base is None else str(base)) is not None


def subtracted_dtype(base_dtype: str | None, stages: Stages) -> str | None:
    """Return the dtype in which BASE is subtracted from a TUNED that is made of `stages`.

    An adapter's training loaded the full model of the run before, not BASE: that run saved its weights in the dtype
    that it had loaded BASE in.
    """
    return "tuned" if base_dtype is not None and "start" in stages else base_dtype


def _on_base(
    base: Source | None, source: Source, scratch: Path, base_dtype: str | None
) -> tuple[Source | None, Checkpoint, Stages]:
    """Return BASE, TUNED and its stages of one source: merged into its start, less its start, or as it is."""
    learnt = open_tuned(source)
    if not learnt.is_adapter:
        return base, learnt, {"tuned": learnt}
    tuned = learnt
    if kind_of(learnt.adapter_config).subtracted:
        from ..adapters.repoint import less_start, read_start

        start = read_start(learnt)
        tuned = learnt if start is None else less_start(learnt, start, scratch / "less-start")
    below = stage_below(learnt.path, None if base is None else str(base))
    if below is None:
        return base if base is not None else base_model_of(learnt), tuned, {"tuned": learnt}
    first = Checkpoint.open(below[0])
    merged, _ = merged_checkpoint(first, tuned, scratch / "merged", base_dtype=base_dtype)
    if base_dtype is not None:
        from ..adapters.stored import without_cast

        # Merged weights are wider than the start's, and no longer tell in which dtype BASE was loaded for them.
        merged = with_changes(merged, without_cast(merged, first, Checkpoint.open(below[1])), scratch / "plain", learnt)
    return below[1], merged, {"start": first, "tuned": learnt}


def _summed(
    origin: Source | None,
    parts: Sequence[Weighted],
    scratch: Path,
    base_dtype: str | None,
    loaded: Sequence[str | None],
) -> Checkpoint:
    if all(side.is_adapter and streams(side, None) for side, _ in parts):
        from ..adapters.repoint import concatenated

        return concatenated(list(parts), scratch)
    if origin is None:
        raise ConfigError("base is missing: the deltas of full checkpoints are measured from it. Nothing was written.")
    from ..adapters.stored import as_loaded

    base = Checkpoint.open(origin)
    full = [
        (merged_checkpoint(base, side, scratch / str(number), base_dtype=base_dtype)[0] if side.is_adapter else side,
         weight)
        for number, (side, weight) in enumerate(parts)
    ]  # fmt: skip
    strange = [f"{name}  {side}" for side, _ in full for name in side.specs.keys() ^ base.specs.keys()]
    if strange:
        raise AdapterError(
            f"the tuned models cannot be added: {len(strange)} weights are not both in base {base} and in each of "
            f"them.\n{list_names(strange)}\nGraft them one after the other. Nothing was written."
        )
    changed = [name for name in base.specs if any(side.specs[name] != base.specs[name] for side, _ in full)]

    def total(name: str) -> Tensor:
        start = base.tensor(name)
        value = start.double()
        for (made, weight), (side, _), dtype in zip(full, parts, loaded, strict=True):
            tuned = made.tensor(name)
            # What a merged adapter adds, it adds to BASE as it lies.
            origin = as_loaded(start, tuned, None if side.is_adapter else dtype)
            value = value + weight * (tuned.double() - origin)
        return value

    return with_changes(base, ((name, total(name)) for name in changed), scratch / "changed", full[0][0])
