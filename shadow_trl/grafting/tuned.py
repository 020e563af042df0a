"""TUNED as one checkpoint, whatever it was made of: adapters on a stage before, several adapters, a start to subtract.

What must be made for it lies in a folder beside the result and is gone with it. Changed weights only are written; the
others stay BASE's own, where they lie.
"""

from __future__ import annotations

import math
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..adapters.kinds import kind_of
from ..adapters.lora import base_model_of, no_factors, open_tuned, place_on, read_lora, streams
from ..checkpoints.checkpoint import Checkpoint, Place
from ..checkpoints.delta import refuse_deltas
from ..checkpoints.header import TORCH_NAMES, narrower
from ..checkpoints.hub import Source, local_folder
from ..checkpoints.manifest import (
    MANIFEST_NAME,
    as_trained,
    check_weights,
    from_manifest,
    read_manifest,
    stage_below,
)
from ..checkpoints.overlay import Overlay
from ..errors import AdapterError, ConfigError, list_names
from ..results.folder import Scratch
from .options import GraftOptions

Stages = dict[str, Checkpoint]
Dtypes = str | Sequence[str] | None


@dataclass(frozen=True)
class SingleTuned:
    """TUNED as one checkpoint, and what its delta is measured from.

    Args:
        base: BASE; None where it was not given and only an adapter's config can name it.
        checkpoint: TUNED.
        stages: what it was made of, by role (`start`, `tuned`, `tuned_2`); empty where it is one as stored.
        weights: weight of each delta that it is the sum of.
        loaded_in: dtypes that BASE went through in training, see `Checkpoint.loaded_in`.
    """

    base: Source | None
    checkpoint: Checkpoint
    stages: Stages = field(default_factory=dict)
    weights: tuple[float, ...] = (1.0,)
    loaded_in: tuple[str, ...] = ()


@contextmanager
def one_tuned(base: Source | None, tuned: Any, target: Path, base_dtype: Dtypes = None) -> Iterator[SingleTuned]:
    """Give TUNED of a graft as a single checkpoint.

    An adapter trained on the full model of an earlier run is merged into that first: its delta is
    (start - base) + B @ A, the adapter alone would lose what the earlier stage learnt. Several sources are summed,
    plain LoRAs as one of higher rank, others as BASE + sum of weight * (tuned - base). A PiSSA or OLoRA whose start was
    kept becomes a plain LoRA.
    """
    sources = weighted_sources(tuned)
    for source, _ in sources:
        refuse_deltas(tuned=source)
    if len(sources) == 1 and sources[0][1] == 1.0 and not _needs_scratch(sources[0][0], base):
        learnt = _open(sources[0][0])
        yield SingleTuned(as_trained(base, learnt.path), learnt, loaded_in=loaded_in(learnt, base_dtype))
        return
    with Scratch(target) as scratch:
        found = [
            _on_base(base, source, weight, scratch.part / str(number), base_dtype)
            for number, (source, weight) in enumerate(sources)
        ]
        unknown = "not known, since a full checkpoint names none: give base"
        origins = {str(part.base or unknown) for part in found}
        if len(origins) > 1:
            raise ConfigError(
                f"the {len(found)} tuned models start from {len(origins)} bases.\n{list_names(sorted(origins))}\n"
                "Deltas from one base only can be added."
            )
        if len(found) == 1 and found[0].weights == (1.0,):
            yield found[0]
        else:
            yield _summed(found, scratch.part / "sum")


def names_base(tuned: Any) -> bool:
    """Whether what was trained, or one of several, says itself what it was trained on: an adapter may."""
    sources = [source for source, _ in weighted_sources(tuned)]
    for source in sources:
        refuse_deltas(tuned=source)
    return any(open_tuned(source).is_adapter for source in sources)


def loaded_in(tuned: Checkpoint, given: Dtypes = None) -> tuple[str, ...]:
    """Return the dtypes that BASE went through to become `tuned`: those `given`, else those that its run recorded.

    Runs of version 0.1.0 recorded none: they loaded BASE in the dtype of each weight of TUNED. That dtype tells which
    weights were loaded in another one than the rest, unless the run lifted all of them to fp32. Of an adapter the
    stages that trained it are meant, not those of the full model under it.
    """
    if given is not None:
        return (given,) if isinstance(given, str) else tuple(given)
    manifest = read_manifest(tuned.path)
    if manifest is None or manifest["kind"] != "run":
        return ()
    recorded = GraftOptions(base_dtype=manifest.get("loaded_in", [])).base_dtype
    return (*(recorded or ()), *(() if manifest.get("lifted") else ("tuned",)))


def loaded_like(tuned: Checkpoint, dtypes: tuple[str, ...]) -> tuple[str, ...]:
    """Return `dtypes`; before `tuned` alone, with the dtype that most of the full values in `tuned` have."""
    sizes: Counter[str] = Counter()
    for name in no_factors(tuned.specs) if dtypes == ("tuned",) else ():
        sizes[TORCH_NAMES[tuned.specs[name].code]] += tuned.specs[name].numel
    return (*(dtype for dtype, _ in sizes.most_common(1)), *dtypes)


def merged_checkpoint(base: Checkpoint, adapter: Checkpoint, folder: Path) -> Overlay:
    """Return BASE with an adapter merged, what it changes in fp32 or wider.

    Args:
        base: what the adapter was trained on, as in `merge_into_base`.
        adapter: of any type.
        folder: for the changed weights; removed by the caller.
    """
    if not streams(adapter, base):
        from ..adapters.peft_layers import merge_into_base

        return merge_into_base(base, adapter, folder)
    placed = place_on(read_lora(adapter), adapter, base)
    merged = Overlay.over(base, adapter, folder, placed)
    for name, lora in placed.items():
        product = lora.factor * adapter.tensor(lora.left).double() @ adapter.tensor(lora.right).double()
        merged.put({name: base.tensor(name).double() + (product.T if lora.transposed else product)})
    return merged


def _open(source: Source) -> Checkpoint:
    learnt = open_tuned(source)
    check_weights(learnt.path)
    return learnt


def _needs_scratch(source: Source, base: Source | None) -> bool:
    learnt = open_tuned(source)
    if not learnt.is_adapter:
        return False
    if _is_less_start(learnt):
        from ..adapters.repoint import read_start

        if read_start(learnt) is not None:
            return True
    return stage_below(learnt.path, None if base is None else str(base)) is not None


def _is_less_start(adapter: Checkpoint) -> bool:
    """Whether the delta is the adapter's product less that of its start."""
    return kind_of(adapter.adapter_config).subtracted and not no_factors(adapter.specs)


def _on_base(base: Source | None, source: Source, weight: float, scratch: Path, base_dtype: Dtypes) -> SingleTuned:
    """Return one source: merged into its start, less its start, or as it is."""
    learnt = _open(source)
    base = as_trained(base, learnt.path)
    dtypes, weights = loaded_in(learnt, base_dtype), (weight,)
    if not learnt.is_adapter:
        return SingleTuned(base, learnt, {"tuned": learnt}, weights, dtypes)
    tuned = learnt
    if _is_less_start(learnt):
        from ..adapters.repoint import less_start, read_start

        start = read_start(learnt)
        tuned = learnt if start is None else less_start(learnt, start, scratch / "less-start")
    below = stage_below(learnt.path, None if base is None else str(base))
    if below is None:
        home = base if base is not None else base_model_of(learnt)
        return SingleTuned(home, tuned, {"tuned": learnt}, weights, dtypes)
    first = Checkpoint.open(below[0])
    merged = merged_checkpoint(first.loaded(dtypes), tuned, scratch / "merged")
    # The run before has recorded in which dtype it loaded BASE; else its weights tell.
    before = (loaded_in(first) or ("tuned",)) if dtypes else ()
    return SingleTuned(below[1], merged, {"start": first, "tuned": learnt}, weights, loaded_like(first, before))


def _summed(parts: Sequence[SingleTuned], scratch: Path) -> SingleTuned:
    """Return the weighted sum of several: plain LoRAs as one of higher rank, others as BASE with changed weights."""
    origin = parts[0].base
    stages = {
        role if number == 1 else f"{role}_{number}": side
        for number, part in enumerate(parts, start=1)
        for role, side in part.stages.items()
    }
    if all(part.checkpoint.is_adapter and streams(part.checkpoint, None) for part in parts):
        from ..adapters.repoint import concatenated

        total = concatenated([(part.checkpoint, part.weights[0]) for part in parts], scratch)
    elif origin is None:
        raise ConfigError("base is missing: the deltas of full checkpoints are measured from it.")
    else:
        total = _summed_on(Checkpoint.open(origin), parts, scratch)
    return SingleTuned(origin, total, stages, tuple(part.weights[0] for part in parts))


def _summed_on(base: Checkpoint, parts: Sequence[SingleTuned], scratch: Path) -> Checkpoint:
    """Return `base + sum of weight * (tuned - base)`; each delta is to BASE as that part's training loaded it."""
    full, narrow = [], []
    for number, part in enumerate(parts):
        side, start = part.checkpoint, base.loaded(part.loaded_in)
        if side.is_adapter:  # what a merged adapter adds, it adds to BASE as stored
            side, start = merged_checkpoint(start, side, scratch / str(number)), base
        full.append((side, start, part.weights[0]))
        narrow += side.narrow if isinstance(side, Overlay) else []
    strange = [f"{name}  {side}" for side, _, _ in full for name in side.specs.keys() ^ base.specs.keys()]
    if strange:
        raise AdapterError(
            f"the tuned models cannot be added: {len(strange)} weights are not both in base {base} and in each of "
            f"them.\n{list_names(strange)}\nGraft them one after the other."
        )
    changed = [name for name in base.specs if any(side.specs[name] != base.specs[name] for side, _, _ in full)]

    total = Overlay.over(base, full[0][0], scratch / "changed", changed)
    for name in changed:
        value = base.tensor(name).double()
        for side, start, weight in full:
            origin = Place(start, name, start.casts(side.spec_before(name)))
            narrow += [] if origin.casts else narrower([(name, origin.spec, side.specs[name])])
            value = value + weight * (side.tensor(name).double() - origin.tensor().double())
        total.put({name: value})
    total.narrow = list(dict.fromkeys(narrow))
    return total


def weighted_sources(tuned: Any) -> list[tuple[Source, float]]:
    """Return (source, weight) of what is grafted: one source, or several each with a weight.

    Args:
        tuned: a folder or hub id, optionally with `:weight` at its end (a folder of that name wins); a pair of source
            and weight; or a list of these.

    Raises:
        ConfigError: an empty list, or what is no source or no weight.

    >>> weighted_sources("out"), weighted_sources(["a:0.5", ("b", 2)])
    ([('out', 1.0)], [('a', 0.5), ('b', 2.0)])
    """
    items = list(tuned) if isinstance(tuned, (list, tuple)) and not _is_weighted(tuned) else [tuned]
    if not items:
        raise ConfigError("tuned is an empty list: there is nothing to graft.")
    found: list[tuple[Source, float]] = []
    for item in items:
        source, weight = item if _is_weighted(item) else _split(item)
        if not isinstance(source, (str, os.PathLike)):
            raise ConfigError(f"tuned: {source!r} is no folder or hub id.")
        try:
            found.append((source, float(weight)))
        except (TypeError, ValueError):
            found.append((source, math.nan))
        if not math.isfinite(found[-1][1]):
            raise ConfigError(f"tuned: {weight!r} is no weight of {source}.")
    return found


def recorded_sides(tuned: Any, **given: Source | None) -> dict[str, Source]:
    """Return the other sides of `tuned` by role: those given, else those that the run which trained it recorded.

    An adapter names its BASE itself, which is left out here.

    Args:
        tuned: one or several, as in `weighted_sources`; None where nothing was trained.
        given: `base`, `instruct` or both, None where the user did not name it.

    Raises:
        ConfigError: several runs recorded different ones, or no INSTRUCT is known.
        InputError: the manifest names a folder that is not to be found or has changed.
    """
    missing = [role for role, source in given.items() if source is None]
    found: dict[str, list[str]] = {role: [] for role in missing}
    for source, _ in weighted_sources(tuned) if missing and tuned is not None else ():
        learnt = Checkpoint.open(source, weights=False)
        manifest = read_manifest(learnt.path) or {}
        for role in missing if manifest.get("kind") == "run" else ():
            entry = None if role == "base" and learnt.is_adapter else from_manifest(role, manifest, learnt.path)
            found[role] += [str(entry)] if entry is not None else []
    for role, names in found.items():
        if len(others := sorted(set(names))) > 1:
            raise ConfigError(
                f"the runs of the tuned models had {len(others)} different {role} models.\n{list_names(others)}\nName "
                f"one: --{role}."
            )
    if "instruct" in missing and not found["instruct"]:
        raise ConfigError(
            "instruct is missing: the model that receives the delta. Name it (--instruct), or give the folder of a run "
            f"as tuned, whose {MANIFEST_NAME} does."
        )
    named = {role: source for role, source in given.items() if source is not None}
    return {**named, **{role: names[0] for role, names in found.items() if names}}


def _is_weighted(item: Any) -> bool:
    return isinstance(item, tuple) and len(item) == 2 and isinstance(item[1], (int, float))


def _split(item: Any) -> tuple[Any, float]:
    if not isinstance(item, (str, os.PathLike)):
        return item, 1.0
    head, colon, tail = os.fspath(item).rpartition(":")
    if not colon or local_folder(item) is not None:
        return item, 1.0
    try:
        return head, float(tail)
    except ValueError:
        return item, 1.0
