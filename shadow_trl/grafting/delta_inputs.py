"""The sides of a graft whose delta is a folder of its own, checked as those of a graft of TUNED are.

BASE is not needed: the delta's folder holds its config and tokenizer files, and the shapes of its weights. Where BASE
is there all the same, its weights are checked too.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from ..checkpoints.checkpoint import Checkpoint
from ..checkpoints.delta import DeltaCheckpoint, refuse_deltas
from ..checkpoints.manifest import Entry
from ..errors import AdapterError, CheckpointError, ConfigError, list_names
from ..pair.pairs import ModelPair
from .inputs import Inputs, Source, no_adapter_form
from .options import GraftOptions


def open_delta(base: Source | None, instruct: Source, delta: Source, options: GraftOptions) -> Inputs:
    """Open INSTRUCT and a delta and check that they belong together.

    Args:
        base: BASE, to check the delta and INSTRUCT against; None takes the folder that the delta's manifest names where
            it is still there, else what the delta's folder keeps of BASE.
        instruct: receives the delta.
        delta: the delta's folder or hub id.
        options: those of `graft`.

    Raises:
        InputError: a side is missing or of the wrong kind, the sides do not fit, `base` is not what the delta was taken
            from, or an option needs TUNED.
    """
    refuse_deltas(base=base, instruct=instruct)
    _check_options(options)
    learnt, receiver = DeltaCheckpoint.open(delta), Checkpoint.open(instruct)
    if receiver.is_adapter:
        raise AdapterError(f"instruct {receiver} is an adapter, not a model. Merge it first. Nothing was written.")
    receiver.check_not_quantised("instruct")
    facts = Checkpoint(f"{learnt} (what the delta keeps of base)", None, learnt.path, config=learnt.config)
    facts.specs, facts.files = learnt.specs, learnt.files
    origin = _named_base(learnt) if base is None else Checkpoint.open(base)
    warnings = []
    if base is not None and origin is not None:
        warnings += _check_base(origin, learnt, options)
    level: Literal["configs", "headers"] = "configs" if origin is None else "headers"
    pair = ModelPair(facts if origin is None else origin, receiver)
    warnings += pair.check(level=level, vocab=options.vocab)  # type: ignore[arg-type]
    recorded = {role: learnt.manifest[role] for role in ("base", "tuned")}
    return Inputs(pair.base, receiver, learnt, "model", warnings=warnings, recorded=recorded)


def _check_options(options: GraftOptions) -> None:
    if options.format == "adapter" or options.rank is not None:
        raise no_adapter_form(["the delta is dense; `shadow-trl delta --rank R` makes an adapter of one"])
    wrong = [
        f"{name}={getattr(options, name)!r}"
        for name, plain in (("instruct_scale", 1.0), ("base_dtype", None))
        if getattr(options, name) != plain
    ]
    if wrong:
        raise ConfigError(
            f"{' and '.join(wrong)} needs the weights of BASE, which a delta does not have. Give base and tuned in the "
            "place of delta. Nothing was written."
        )


def _named_base(delta: DeltaCheckpoint) -> Checkpoint | None:
    """Return BASE where the delta's manifest names a local folder that is still there, with the same shapes."""
    entry = Entry.read(delta.manifest, "base")
    try:
        source = entry.find(delta.path, "base").source if entry is not None else ""
        found = Checkpoint.open(source) if Path(source).is_dir() else None
    except CheckpointError:  # no longer what it was; it is not needed
        return None
    shapes = {name: spec.shape for name, spec in found.specs.items()} if found is not None else {}
    same = all(shapes.get(name, spec.shape) == spec.shape for name, spec in delta.specs.items())
    return found if same else None


def _check_base(base: Checkpoint, delta: DeltaCheckpoint, options: GraftOptions) -> list[str]:
    """Check a BASE that was given against the digests in the delta's manifest."""
    entry = Entry.read(delta.manifest, "base")
    if entry is None or not entry.digests or options.digest == "none":
        return [f"it was not checked that {base} is the base of delta {delta}: there are no digests to compare."]
    wrong = entry.changed(base.path)
    if wrong:
        raise ConfigError(
            f"base {base} is not what delta {delta} was taken from: {len(wrong)} of {len(entry.digests)} files are "
            f"missing or differ from the digests in its manifest.\n{list_names(wrong)}\nGive the base named there "
            f"({entry}), or leave base out. Nothing was written."
        )
    return []
