"""The opened sides of a graft, what is checked on them, and their digests."""

from __future__ import annotations

import os
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..adapters.kinds import SCALABLE, START_FOLDER, check_has_delta, kind_of, peft_type
from ..adapters.lora import LoraModule, base_model_of, no_factors, open_tuned, other_adapters, read_lora, streams
from ..checkpoints.checkpoint import Checkpoint
from ..checkpoints.delta import refuse_deltas
from ..checkpoints.hub import is_hub_id
from ..checkpoints.manifest import file_digest, read_manifest
from ..errors import AdapterError, CheckpointError, ConfigError, list_names
from ..pair.pairs import ModelPair
from .jobs import selector
from .options import GraftOptions

Source = str | os.PathLike[str]


@dataclass
class Inputs:
    """The opened sides of a graft and the form that its result takes."""

    base: Checkpoint
    instruct: Checkpoint
    tuned: Checkpoint
    form: str
    modules: dict[str, LoraModule] = field(default_factory=dict)
    """The factors of a plain LoRA, which is added without BASE's weights; empty for every other TUNED."""
    warnings: list[str] = field(default_factory=list)
    reasons: list[str] = field(default_factory=list)
    """Why the result is dense, where an adapter was trained."""
    stages: dict[str, Checkpoint] = field(default_factory=dict)
    """What TUNED was made of, by role (`start`, `tuned`, `tuned_2`); empty where it is one checkpoint as it lies."""
    weights: list[float] = field(default_factory=list)
    """Weight of each delta that TUNED is the sum of."""
    made: bool = False
    """Whether TUNED is made here, BASE as it lies plus deltas: `base_dtype` went into these."""
    recorded: dict[str, Any] = field(default_factory=dict)
    """Manifest entries of sides that are not read: BASE and TUNED of a delta, as its own manifest names them."""

    @classmethod
    def open(
        cls,
        base: Source | None,
        instruct: Source,
        tuned: Source | Checkpoint,
        options: GraftOptions,
        stages: dict[str, Checkpoint] | None = None,
        *,
        check_pair: bool = True,
    ) -> Inputs:
        """Open the sides, check that they belong together, and choose the form of the result.

        Args:
            base: as in `graft`.
            instruct: as in `graft`.
            tuned: as in `graft`, or one checkpoint made of it.
            options: as in `graft`.
            stages: what it was made of, by role.
            check_pair: whether BASE and INSTRUCT are checked against each other; needless where they are one.

        Raises:
            InputError: a side is missing, quantised or of the wrong kind, or the sides do not fit.

        """
        refuse_deltas(base=base, instruct=instruct, tuned=None if isinstance(tuned, Checkpoint) else tuned)
        learnt, receiver = open_tuned(tuned), Checkpoint.open(instruct)
        if receiver.is_adapter:
            raise AdapterError(f"instruct {receiver} is an adapter, not a model. Merge it first. Nothing was written.")
        if learnt.is_adapter:
            check_has_delta(learnt.adapter_config)
        modules = read_lora(learnt) if learnt.is_adapter and streams(learnt, receiver) else {}
        named = base is not None
        if base is None:
            base = base_model_of(learnt) if learnt.is_adapter else None
        if base is None:
            raise ConfigError(
                "base is missing: only an adapter that names its own may leave it out. Nothing was written."
            )
        weights = not modules or options.instruct_scale != 1.0 or options.rank is not None
        origin = Checkpoint.open(base, weights=weights) if named else _open_named(learnt, base, weights)
        if origin.is_adapter:
            raise AdapterError(f"base {origin} is an adapter, not a model. Merge it first. Nothing was written.")
        if origin.specs:
            origin.check_not_quantised("base")
        receiver.check_not_quantised("instruct")
        for role, side in (stages or {"tuned": learnt}).items():
            side.check_not_quantised(role)
        warnings = ModelPair(origin, receiver).check(vocab=options.vocab) if check_pair else []  # type: ignore[arg-type]
        warnings += _check_trained(origin, receiver, learnt) if check_pair else []
        form, reasons = form_of(learnt, receiver, modules, options, made=bool(stages))
        inputs = cls(origin, receiver, learnt, form, modules, warnings, reasons, stages or {}, made=learnt.is_adapter)
        inputs.warnings += _adapter_warnings(inputs)
        return inputs

    @property
    def sides(self) -> dict[str, Checkpoint]:
        """The sides that there are, by role."""
        if self.recorded:  # a delta: BASE and TUNED are names in its manifest
            return {"instruct": self.instruct, "delta": self.tuned}
        return {"base": self.base, "instruct": self.instruct, "tuned": self.tuned, **self.stages}

    @property
    def folders(self) -> list[tuple[str, Path]]:
        """Role and folder of each side."""
        return [(role, side.path) for role, side in {**self.sides, "base": self.base}.items()]


def _open_named(adapter: Checkpoint, base: Source, weights: bool) -> Checkpoint:
    """Open the BASE that an adapter's config names."""
    try:
        return Checkpoint.open(base, weights=weights)
    except CheckpointError as error:
        raise CheckpointError(
            f"adapter {adapter} names {base} as the model that it was trained on, which cannot be used: {error} Where "
            "that model lies elsewhere, give it with base=... (--base B)."
        ) from error


def _check_trained(base: Checkpoint, instruct: Checkpoint, tuned: Checkpoint) -> list[str]:
    """Refuse a graft of the same BASE as TUNED: INSTRUCT - BASE would be added once more, without a word.

    Returns:
        a warning where TUNED is INSTRUCT itself.
    """
    manifest = read_manifest(tuned.path) or {}
    if manifest.get("kind") == "graft" and _is(base, manifest, "base") and not _is(base, manifest, "instruct"):
        run = (manifest.get("tuned") or {}).get("source", "what was trained")
        raise ConfigError(
            f"tuned {tuned} is a graft of this base, not what training made of it: instruct - base is in it already "
            f"and would be added twice. Give what was trained: {run}. Nothing was written."
        )
    if base.path == instruct.path:
        return [f"base and instruct are one folder, {instruct}: the result is what was trained, no graft."]
    if tuned.path == instruct.path != base.path:
        return [f"tuned and instruct are one folder, {tuned}: what is added is all that instruct differs from base by."]
    return []


def _is(side: Checkpoint, manifest: Mapping[str, Any], role: str) -> bool:
    """Whether a manifest names `side` in a role."""
    return _is_called(side, str((manifest.get(role) or {}).get("source")))


def _is_called(side: Checkpoint, name: str) -> bool:
    """Whether `name` is `side`, by the same word or as another path of the same folder."""
    folder = Path(name).expanduser()
    return name in (side.source, str(side)) or (folder.is_dir() and side.path.is_dir() and folder.samefile(side.path))


def other_base(inputs: Inputs, digests: Mapping[str, Mapping[str, str]]) -> list[str]:
    """Return a warning for each TUNED that says it was trained on something else than BASE.

    Args:
        inputs: of the graft.
        digests: role -> file -> digest; they decide where the run recorded its own, else the names do.
    """
    found = []
    learnt = {role: side for role, side in inputs.stages.items() if role.startswith("tuned")} or {"": inputs.tuned}
    for tuned in learnt.values():
        manifest = read_manifest(tuned.path) or {}
        entry = (manifest.get("base") or {}) if manifest.get("kind") == "run" else {}
        named = entry.get("source") or (base_model_of(tuned) if tuned.is_adapter else None)
        recorded, ours = entry.get("digests") or {}, digests.get("base", {})
        common = recorded.keys() & ours.keys()
        same = all(recorded[name] == ours[name] for name in common) if common else _is_called(inputs.base, str(named))
        if named is not None and not same:
            what = "with other weights" if common else "by its name"
            found.append(
                f"tuned {tuned} was trained on another base {what}: {named}, and not {inputs.base}. What these two "
                "differ by is in the delta, unless they are the same weights. Give the base that it was trained on."
            )
    return found


def form_of(
    tuned: Checkpoint, instruct: Checkpoint, modules: dict[str, LoraModule], options: GraftOptions, made: bool = False
) -> tuple[str, list[str]]:
    """Return `adapter` or `model`, whichever the result takes, and why an adapter becomes dense weights.

    `made` says that TUNED was made here, of several.

    Raises:
        AdapterError: an adapter is asked for and there is no exact one.
    """
    if options.format == "model" or not tuned.is_adapter:
        if options.format == "adapter" or options.rank is not None:
            what = "a sum, which has an adapter form for plain LoRAs only" if made else "a full checkpoint"
            raise no_adapter_form([f"tuned is {what}  (`shadow-trl delta --rank R` makes a LoRA for base)"], rank=False)
        return "model", []
    if options.rank is not None:
        return "adapter", []
    reasons = [f"{name} is set" for name in options.dense_only()]
    reasons += adapter_obstacles(tuned, options.scale)
    wanted = selector(options)
    if not all(wanted(f"{module}.weight") for module in modules) or (not modules and options.patterns() is not None):
        reasons.append("modules leaves out a part of the adapter")
    if reasons and options.format == "adapter":
        raise no_adapter_form(reasons)
    if reasons or options.format == "adapter":
        return ("model" if reasons else "adapter"), reasons
    if is_local(instruct):
        return "model", [f"instruct {instruct} is a local folder, which an adapter would have to name"]
    return "adapter", []


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


def no_adapter_form(reasons: list[str], *, rank: bool = True) -> AdapterError:
    """Return the error for a result that cannot be an exact adapter; `rank` says whether an inexact one can be made."""
    nearest = "; or rank=R (--rank R): the nearest LoRA of that rank, with its error in the report" if rank else ""
    return AdapterError(
        f"there is no exact adapter form of this graft.\n{list_names(reasons)}\nUse format='model', which is "
        f"exact{nearest}. Nothing was written."
    )


def is_local(side: Checkpoint) -> bool:
    """Whether a side was given as a folder and not as a hub id."""
    return Path(side.source).expanduser().is_dir() or not is_hub_id(side.source)


def _adapter_warnings(inputs: Inputs) -> list[str]:
    if not inputs.tuned.is_adapter:
        return []
    found = []
    if inputs.reasons and (not is_local(inputs.instruct) or len(adapter_obstacles(inputs.tuned, 1.0))):
        found.append(f"the result is dense weights, there is no exact adapter form.\n{list_names(inputs.reasons)}")
    source = inputs.stages.get("tuned", inputs.tuned)
    others = other_adapters(source)
    if others:
        found.append(f"{source} holds further adapters, which are not grafted: {', '.join(others)}.")
    method = inputs.base.quantisation or ((read_manifest(source.path) or {}).get("quantised"))
    if method:
        how = "is the exact product of its factors" if inputs.modules else "is worked out on the BASE that is given"
        found.append(
            f"the adapter was trained on a BASE quantised by {method}. Its delta {how}, and a part of it answers to "
            "the quantisation error, which the full-precision INSTRUCT does not have (docs/adapters.md)."
        )
    return found


class Digests:
    """SHA-256 of the inputs, worked out while the graft streams."""

    def __init__(self, inputs: Inputs, small: list[Path], options: GraftOptions) -> None:
        self._found: dict[str, dict[str, Future[str]]] = {}
        self._pool = ThreadPoolExecutor(2, thread_name_prefix="digest")
        if options.digest == "none":
            return
        for role, side in inputs.sides.items():
            files = [*side.files, *(small if role == "instruct" else [])]
            self._found[role] = {
                str(path.relative_to(side.path)): self._pool.submit(file_digest, path) for path in files
            }

    def __enter__(self) -> Digests:
        return self

    def __exit__(self, *error: object) -> None:
        self._pool.shutdown(cancel_futures=True)

    def collect(self) -> dict[str, dict[str, str]]:
        """Return role -> file name -> digest."""
        try:
            return {
                role: {name: found.result() for name, found in files.items()} for role, files in self._found.items()
            }
        except OSError as error:
            raise CheckpointError(
                f"cannot read an input again for its digest: {error}. Nothing was written."
            ) from error
