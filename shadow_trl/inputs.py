"""The opened sides of a graft, what is checked on them, and their digests."""

from __future__ import annotations

import os
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .adapter import LoraModule, base_model_of, read_lora
from .checkpoint import Checkpoint
from .delta_folder import refuse_deltas
from .errors import AdapterError, CheckpointError, ConfigError
from .graft_options import GraftOptions
from .hub import is_hub_id
from .jobs import selector
from .manifest import file_digest
from .pairs import ModelPair

Source = str | os.PathLike[str]


@dataclass
class Inputs:
    """The opened sides of a graft and the form that its result takes."""

    base: Checkpoint | None
    instruct: Checkpoint
    tuned: Checkpoint
    form: str
    modules: dict[str, LoraModule] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)
    stages: dict[str, Checkpoint] = field(default_factory=dict)
    """What TUNED was merged from, by role (`start`, `tuned`); empty where it is one checkpoint."""
    recorded: dict[str, Any] = field(default_factory=dict)
    """Manifest entries of sides that are not read: BASE and TUNED of a delta, as its own manifest names them."""

    @classmethod
    def open(
        cls, base: Source | None, instruct: Source, tuned: Source, options: GraftOptions, *, check_pair: bool = True
    ) -> Inputs:
        """Open the sides, check that they belong together, and choose the form of the result.

        Args:
            base: as in `graft`.
            instruct: as in `graft`.
            tuned: as in `graft`.
            options: as in `graft`.
            check_pair: whether BASE and INSTRUCT are checked against each other; needless where they are one.

        Raises:
            InputError: a side is missing, quantised or of the wrong kind, or the sides do not fit.

        """
        refuse_deltas(base=base, instruct=instruct, tuned=tuned)
        learnt, receiver = Checkpoint.open(tuned), Checkpoint.open(instruct)
        if receiver.is_adapter:
            raise AdapterError(f"instruct {receiver} is an adapter, not a model. Merge it first. Nothing was written.")
        modules = read_lora(learnt) if learnt.is_adapter else {}
        if base is None:
            base = base_model_of(learnt) if learnt.is_adapter else None
        if base is None:
            raise ConfigError(
                "base is missing: only an adapter that names its own may leave it out. Nothing was written."
            )
        origin = Checkpoint.open(base, weights=not learnt.is_adapter or options.instruct_scale != 1.0)
        if origin.is_adapter:
            raise AdapterError(f"base {origin} is an adapter, not a model. Merge it first. Nothing was written.")
        for role, side in (("base", origin), ("instruct", receiver), ("tuned", learnt)):
            side.check_not_quantised(role)
        warnings = ModelPair(origin, receiver).check(vocab=options.vocab) if check_pair else []  # type: ignore[arg-type]
        form = form_of(learnt, receiver, modules, options)
        return cls(origin, receiver, learnt, form, modules, warnings)

    @property
    def sides(self) -> dict[str, Checkpoint]:
        """The sides that there are, by role."""
        if self.recorded:  # a delta: BASE and TUNED are names in its manifest
            return {"instruct": self.instruct, "delta": self.tuned}
        sides = {"base": self.base, "instruct": self.instruct, "tuned": self.tuned, **self.stages}
        return {role: side for role, side in sides.items() if side is not None}

    @property
    def folders(self) -> list[tuple[str, Path]]:
        """Role and folder of each side."""
        sides = self.sides if self.base is None else {**self.sides, "base": self.base}
        return [(role, side.path) for role, side in sides.items()]


def form_of(tuned: Checkpoint, instruct: Checkpoint, modules: dict[str, LoraModule], options: GraftOptions) -> str:
    """Return `adapter` or `model`, whichever the result takes."""
    if options.format == "model":
        return "model"
    wanted = selector(options)
    reasons = [f"{name} is set" for name in options.dense_only()]
    if not tuned.is_adapter:
        reasons.append("tuned is a full checkpoint")
    if not all(wanted(f"{module}.weight") for module in modules):
        reasons.append("modules leaves out a part of the adapter")
    if options.format == "adapter":
        if reasons:
            raise no_adapter_form(reasons[0])
        return "adapter"
    local = Path(instruct.source).expanduser().is_dir() or not is_hub_id(instruct.source)
    return "model" if reasons or local else "adapter"


def no_adapter_form(reason: str) -> AdapterError:
    """Return the error for a result that cannot be an adapter."""
    return AdapterError(f"there is no adapter form of this graft: {reason}. Use format='model'. Nothing was written.")


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
