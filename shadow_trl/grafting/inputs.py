"""The opened sides of a graft, what is checked on them, and their digests."""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path

from ..adapters.kinds import check_has_delta
from ..adapters.lora import base_model_of, read_lora, streams
from ..checkpoints.checkpoint import Checkpoint
from ..checkpoints.delta import DeltaCheckpoint, refuse_deltas
from ..checkpoints.digests import input_digest
from ..checkpoints.header import stamp
from ..checkpoints.hub import Source
from ..checkpoints.manifest import Entry, adapter_base, read_manifest
from ..checkpoints.open_files import changed
from ..checkpoints.weight_names import NAMED, is_of_tokens
from ..errors import AdapterError, CheckpointError, ConfigError, list_names
from ..pair.pairs import ModelPair
from ..pair.token_rows import row_count, vocabulary_of
from ..pair.trained_templates import TemplateChoice, choose_template
from ..runtime.patterns import check_patterns
from .form import adapter_warnings, form_of, no_adapter_form
from .options import GraftOptions, declared
from .trained import Delta, Full, PlainLora
from .tuned import SingleTuned


@dataclass(frozen=True)
class Inputs:
    """The opened sides of a graft and the form that its result takes.

    Args:
        instruct: receives the delta.
        tuned: what is added to it.
        form: `model` or `adapter`.
        warnings: what the user should know.
        reasons: why the result is dense, where an adapter was trained.
        template: whose chat template the result has.
        beside: whether the adapter form stands beside the dense one.
    """

    instruct: Checkpoint
    tuned: Full | PlainLora | Delta
    form: str
    warnings: list[str] = field(default_factory=list)
    reasons: list[str] = field(default_factory=list)
    template: TemplateChoice = field(default_factory=TemplateChoice)
    beside: bool = False

    @property
    def sides(self) -> dict[str, Checkpoint]:
        """The checkpoints that are read, by role."""
        return {**self.tuned.sides, "instruct": self.instruct}

    @property
    def folders(self) -> list[tuple[str, Path]]:
        """Role and folder of each side."""
        return [(role, side.path) for role, side in {**self.sides, "base": self.tuned.base}.items()]


def open_tuned_inputs(
    single: SingleTuned, instruct: Source, options: GraftOptions, *, check_pair: bool = True
) -> Inputs:
    """Open the sides of a graft of TUNED, check that they belong together, and choose the form of the result.

    Args:
        single: TUNED as one checkpoint, and its BASE.
        instruct: as in `graft`.
        options: as in `graft`.
        check_pair: whether BASE and INSTRUCT are checked against each other; needless where they are one.

    Raises:
        InputError: a side is missing, quantised or of the wrong kind, or the sides do not fit.
    """
    refuse_deltas(base=single.base, instruct=instruct)
    receiver = open_instruct(instruct)
    _check_modules(options, receiver)
    tuned = open_trained(single, receiver, options)
    receiver.check_not_quantised("instruct")
    for role, side in tuned.sides.items():
        if side.specs:  # BASE of a plain LoRA may be quantised, where its weights are not read
            side.check_not_quantised(role)
    warnings, pair = [], ModelPair(tuned.base, receiver if check_pair else tuned.base)
    if check_pair:
        warnings += pair.check(vocab=options.vocab, trains=False)
        warnings += _check_trained(tuned.base, receiver, tuned.checkpoint)
    for side in list(tuned.stages.values()) or [tuned.checkpoint]:
        found = pair.check_trained(side.config, vocabulary_of(side))
        warnings += [warning for warning in found if warning not in warnings]
    template = TemplateChoice()
    if check_pair:
        template = choose_template(tuned.trained_with, receiver.path, options.chat_template)
    form, reasons, beside = form_of(tuned, receiver, options)
    warnings += [*template.warnings, *adapter_warnings(tuned, receiver, reasons)]
    return Inputs(receiver, tuned, form, warnings, reasons, template, beside)


def open_delta(base: Source | None, instruct: Source, delta: Source, options: GraftOptions) -> Inputs:
    """Open INSTRUCT and a delta and check that they belong together.

    BASE is not needed: the delta's folder holds its config and tokenizer files, and the shapes of its weights. Where
    BASE is there all the same, its weights are checked too.

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
    _check_delta_options(options)
    learnt, receiver = DeltaCheckpoint.open(delta), open_instruct(instruct)
    receiver.check_not_quantised("instruct")
    _check_modules(options, receiver)
    facts = replace(learnt, source=f"{learnt} (what the delta keeps of base)", revision=None)
    origin = _named_base(learnt) if base is None else Checkpoint.open(base)
    warnings = []
    if base is not None and origin is not None:
        warnings += _check_base(origin, learnt, options)
    pair = ModelPair(facts if origin is None else origin, receiver)
    level = "configs" if origin is None else "headers"
    warnings += pair.check(level=level, vocab=options.vocab, trains=False)
    tuned = Delta(pair.base, learnt)
    template = choose_template(tuned.trained_with, receiver.path, options.chat_template)
    return Inputs(receiver, tuned, "model", [*warnings, *template.warnings], template=template)


def _check_modules(options: GraftOptions, receiver: Checkpoint) -> None:
    """Raise ConfigError if `modules`, which a manifest may state, takes too long on the names of the weights."""
    given = [options.modules] if isinstance(options.modules, str) else options.modules
    check_patterns("modules", (text for text in given if text not in NAMED), receiver.specs)


def open_trained(single: SingleTuned, receiver: Checkpoint, options: GraftOptions) -> Full:
    """Open BASE and say of which kind TUNED is."""
    learnt, stages, weights = single.checkpoint, single.stages, single.weights
    if learnt.is_adapter:
        check_has_delta(learnt.adapter_config)
    modules = read_lora(learnt) if learnt.is_adapter and streams(learnt, receiver) else {}
    rows = row_count(receiver)
    if options.vocab == "shared" and any(
        is_of_tokens(f"{name}.") and at.shape[0] != rows for name, at in modules.items()
    ):
        modules = {}  # merged into BASE, whose rows it has
    needed = not modules or options.instruct_scale != 1.0 or options.rank is not None
    base = _open_base(single, needed).loaded(single.loaded_in)
    return PlainLora(base, learnt, stages, weights, modules) if modules else Full(base, learnt, stages, weights)


def base_of(single: SingleTuned) -> Source:
    """Return the BASE that was given, else the one that an adapter's config names; ConfigError where neither is."""
    learnt = single.checkpoint
    found = single.base or (base_model_of(learnt) if learnt.is_adapter else None)
    if found is None:
        raise ConfigError("base is missing: only an adapter that names its own may leave it out.")
    return found


def _open_base(single: SingleTuned, weights: bool) -> Checkpoint:
    named = base_of(single)
    try:
        return _open_model("base", named, weights)
    except CheckpointError as error:
        if single.base is not None:
            raise
        raise CheckpointError(
            f"adapter {single.checkpoint} names {named} as the model that it was trained on, which cannot be used: "
            f"{error} Where that model is elsewhere, give it with base=... (--base B)."
        ) from error


def open_instruct(source: Source) -> Checkpoint:
    """Open INSTRUCT; CheckpointError where it has no configuration, without which nothing would load the result."""
    receiver = _open_model("instruct", source)
    if not receiver.config:
        raise CheckpointError(
            f"instruct {receiver} has no config.json, or an empty one. The result would have it from there, and could "
            "not be loaded without. Download or save INSTRUCT again."
        )
    return receiver


def _open_model(role: str, source: Source, weights: bool = True) -> Checkpoint:
    side = Checkpoint.open(source, weights=weights)
    if side.is_adapter:
        raise AdapterError(f"{role} {side} is an adapter, not a model. Merge it first.")
    return side


def _check_trained(base: Checkpoint, instruct: Checkpoint, tuned: Checkpoint) -> list[str]:
    """Refuse a graft of the same BASE as TUNED: INSTRUCT - BASE would be added once more, without a word.

    Returns:
        a warning where TUNED is INSTRUCT itself.
    """
    manifest = read_manifest(tuned.path) or {}
    entries = {role: Entry.read(manifest, role) for role in ("base", "instruct")}
    ours = [role for role, entry in entries.items() if entry is not None and entry.names(base, tuned.path)]
    if manifest.get("kind") == "graft" and ours == ["base"]:
        run = Entry.read(manifest, "tuned") or "what was trained"
        raise ConfigError(
            f"tuned {tuned} is a graft of this base, not what training made of it: instruct - base is in it already "
            f"and would be added twice. Give what was trained: {run}."
        )
    if base.path == instruct.path:
        return [f"base and instruct are one folder, {instruct}: the result is what was trained, no graft."]
    if tuned.path == instruct.path != base.path:
        return [f"tuned and instruct are one folder, {tuned}: what is added is all that instruct differs from base by."]
    return []


def other_base(tuned: Full | PlainLora | Delta, sides: Mapping[str, Entry]) -> list[str]:
    """Return a warning for each part of TUNED that says it was trained on something else than BASE.

    Args:
        tuned: what is grafted.
        sides: of the graft, by role; their digests decide where the run recorded its own, else the names do.
    """
    found = []
    for side in (side for role, side in tuned.sides.items() if role.startswith("tuned")):
        manifest = read_manifest(side.path) or {}
        named = Entry.read(manifest, "base") if manifest.get("kind") == "run" else None
        if named is None:
            named = adapter_base(side.adapter_config, side.path)
        if named is None:
            continue
        common = (named.digests or {}).keys() & (sides["base"].digests or {}).keys()
        compared = replace(named, digests={name: (named.digests or {})[name] for name in common})
        same = not compared.changed(tuned.base.path) if common else named.names(tuned.base, side.path)
        if not same:
            what = "with other weights" if common else "by its name"
            found.append(
                f"tuned {side} was trained on another base {what}: {named}, and not {tuned.base}. What these two "
                "differ by is in the delta, unless they are the same weights. Give the base that it was trained on."
            )
    return found


def _check_delta_options(options: GraftOptions) -> None:
    if options.format == "adapter" or options.rank is not None:
        raise no_adapter_form(["the delta is dense; `shadow-trl delta --rank R` makes an adapter of one"])
    given = {name: getattr(options, name) for name in ("instruct_scale", "base_dtype")}
    wrong = [f"{name}={value!r}" for name, value in given.items() if value != declared()[name].default]
    if wrong:
        raise ConfigError(
            f"{' and '.join(wrong)} needs the weights of BASE, which a delta does not have. Give base and tuned in the "
            "place of delta."
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
            f"({entry}), or leave base out."
        )
    return []


class Digests:
    """Digests of the inputs, worked out while the graft streams, and the check that they stay as they are."""

    def __init__(self, sides: Mapping[str, Checkpoint], small: Mapping[str, list[Path]], options: GraftOptions) -> None:
        """Begin with the files of `sides`, and those beside the weights that are read, `small`, by role."""
        self._sides = sides
        self._stamps = {path: stamp(path) for paths in small.values() for path in paths}
        for side in sides.values():
            self._stamps |= side.stamps
        self._found: dict[str, dict[str, Future[str]]] = {}
        self._pool = ThreadPoolExecutor(2, thread_name_prefix="digest")
        if options.digest == "none":
            return
        for role, side in sides.items():
            files = [*side.files, *small.get(role, [])]
            self._found[role] = {
                str(path.relative_to(side.path)): self._pool.submit(input_digest, path, options.digest)
                for path in files
            }

    def __enter__(self) -> Digests:
        return self

    def __exit__(self, *error: object) -> None:
        self._pool.shutdown(cancel_futures=True)

    def collect(self) -> dict[str, Entry]:
        """Return what the manifest says of each side, by role. To be called when everything was read.

        Raises:
            GraftError: a file was replaced or written to since it was first read.
        """
        try:
            digests = {
                role: {name: found.result() for name, found in files.items()} for role, files in self._found.items()
            }
        except OSError as error:
            raise CheckpointError(f"cannot read an input again for its digest: {error}.") from error
        others = [path for path, before in self._stamps.items() if stamp(path) != before]
        if others:
            raise changed(others)
        return {role: Entry.of(side, digests.get(role)) for role, side in self._sides.items()}
