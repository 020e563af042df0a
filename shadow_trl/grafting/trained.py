"""TUNED in the three kinds that a graft is made of: full weights, a plain LoRA, a delta on its own.

Each plans the weights of a dense result itself, and says which checkpoints are read for it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar

from ..adapters.lora import LoraModule, place_on
from ..checkpoints.checkpoint import Checkpoint, Place
from ..checkpoints.delta import TRAINED_WITH, DeltaCheckpoint
from ..checkpoints.manifest import TRAINED, read_manifest
from ..checkpoints.overlay import Overlay
from ..checkpoints.weight_names import is_of_tokens
from ..errors import ConfigError
from ..layouts.plan import notice_of_rows
from ..pair.token_rows import vocabulary_of
from ..pair.vocabularies import Vocabulary
from .jobs import (
    Jobs,
    LowRank,
    WeightJob,
    check_selection,
    full_jobs,
    narrow_warning,
    output_code,
    rows_to_graft,
    runs_of,
)
from .options import GraftOptions
from .tuned import merged_checkpoint


@dataclass(frozen=True)
class Full:
    """TUNED as weights: a full checkpoint, or BASE with what adapters or a sum of deltas change.

    Args:
        base: BASE as training loaded it.
        checkpoint: TUNED; an adapter is merged into BASE first.
        stages: what TUNED was made of, by role (`start`, `tuned`, `tuned_2`); empty where it is one checkpoint as
            stored.
        weights: weight of each delta that TUNED is the sum of.
    """

    base: Checkpoint
    checkpoint: Checkpoint
    stages: Mapping[str, Checkpoint] = field(default_factory=dict)
    weights: tuple[float, ...] = (1.0,)

    @property
    def sides(self) -> dict[str, Checkpoint]:
        """The checkpoints that are read beside INSTRUCT, by role."""
        return {"base": self.base, "tuned": self.checkpoint, **self.stages}

    @property
    def trained_with(self) -> dict[str, Vocabulary]:
        """The tokenizer of each thing that was trained, by role."""
        return {role: vocabulary_of(side) for role, side in self.sides.items() if role != "base"}

    @property
    def recorded(self) -> dict[str, Any]:
        """What the manifest of a graft says of TUNED beside its sides."""
        recorded = {"loaded_in": list(self.base.loaded_in)}
        if self.weights != (1.0,):
            return {**recorded, "tuned_weights": list(self.weights)}
        run = read_manifest(self.sides["tuned"].path) or {}
        trained = {name: run[name] for name in TRAINED if run.get(name)} if run.get("kind") == "run" else {}
        return {**recorded, **({"trained": trained} if trained else {})}

    def jobs(self, instruct: Checkpoint, options: GraftOptions, scratch: Path) -> Jobs:
        """Plan the weights of a dense result; merged weights and copies in another layout go to `scratch`.

        Raises:
            InputError: a weight that cannot be grafted, or nothing that is selected.
        """
        if self.weights == (1.0,) and not self.checkpoint.is_adapter:
            return full_jobs(self.base, instruct, self.checkpoint, options, scratch)
        learnt = self.checkpoint
        if learnt.is_adapter:
            learnt = merged_checkpoint(self.base, learnt, scratch / "merged")
        jobs = full_jobs(self.base.loaded(()), instruct, learnt, options, scratch)
        if isinstance(learnt, Overlay):
            jobs.warnings.extend(narrow_warning(learnt.narrow))
        return jobs if options.instruct_scale != 1.0 else _without_unchanged(jobs)


@dataclass(frozen=True)
class PlainLora(Full):
    """TUNED as a low-rank product: it is added to INSTRUCT without BASE's weights, unless these are moved too.

    Args:
        modules: the factors of the adapter `checkpoint`.
    """

    modules: Mapping[str, LoraModule] = field(default_factory=dict)

    def jobs(self, instruct: Checkpoint, options: GraftOptions, scratch: Path) -> Jobs:
        """Plan the weights of a dense result, of which those under the adapter get a product of two factors.

        Raises:
            InputError: a module that has no weight on INSTRUCT, or nothing that is selected.
        """
        placed = place_on(self.modules, self.checkpoint, instruct)
        wanted = options.selector()
        chosen = {name: lora for name, lora in placed.items() if wanted(name)}
        check_selection(options, list(chosen), list(placed))
        of_tokens = [name for name in chosen if is_of_tokens(name)]
        shared = rows_to_graft(self.base, instruct, options) if of_tokens else None
        rows = {} if shared is None else {n: shared for n in of_tokens if len(shared) < instruct.specs[n].shape[0]}
        shifted = {} if options.instruct_scale == 1.0 else self._shifted(instruct, options, scratch)
        weights = []
        for name, spec in instruct.specs.items():
            plain = WeightJob(name, output_code(spec.code, options), spec.shape, Place(instruct, name))
            job = shifted.get(name, plain)
            if name in chosen:
                runs = runs_of(rows.get(name), spec.shape)
                job = replace(plain, base=job.base, low_rank=self._product(chosen[name], spec.shape[1]), runs=runs)
            weights.append(job)
        return Jobs.of(weights, instruct, options, warnings=notice_of_rows(rows), grafted=len(chosen))

    def _shifted(self, instruct: Checkpoint, options: GraftOptions, scratch: Path) -> dict[str, WeightJob]:
        """Plan another instruct scale: every weight moves then, and BASE without a delta is TUNED."""
        base = self.base.loaded(())
        jobs = full_jobs(base, instruct, base, options, scratch)
        if jobs.layout is not instruct:
            raise ConfigError(
                f"instruct {instruct} must be converted for another instruct scale, and an adapter cannot follow it "
                "there. Merge the adapter into base and graft that."
            )
        return {job.name: job for job in jobs.weights}

    def _product(self, lora: LoraModule, columns: int) -> LowRank:
        factors = [Place(self.checkpoint, name) for name in (lora.left, lora.right)]
        left, right = factors[::-1] if lora.transposed else factors
        return LowRank(left, right, lora.factor, columns, lora.transposed)


@dataclass(frozen=True)
class Delta:
    """What training added, in a folder of its own.

    Args:
        base: BASE where it is there, else what the delta's folder keeps of it; its weights are not read.
        checkpoint: the delta.
    """

    base: Checkpoint
    checkpoint: DeltaCheckpoint
    stages: ClassVar[Mapping[str, Checkpoint]] = {}

    @property
    def sides(self) -> dict[str, Checkpoint]:
        """The checkpoints that are read beside INSTRUCT, by role."""
        return {"delta": self.checkpoint}

    @property
    def trained_with(self) -> dict[str, Vocabulary]:
        """What is known of the tokenizer that TUNED was trained with: its chat templates."""
        return {"delta": Vocabulary(self.checkpoint.path / TRAINED_WITH, str(self.checkpoint))}

    @property
    def recorded(self) -> dict[str, Any]:
        """What the manifest of a graft says of TUNED beside its sides: BASE and TUNED, as the delta's names them."""
        return {role: self.checkpoint.manifest[role] for role in ("base", "tuned")}

    def jobs(self, instruct: Checkpoint, options: GraftOptions, scratch: Path) -> Jobs:
        """Plan the weights of a dense result; copies in another layout go to `scratch`.

        Raises:
            InputError: a weight that cannot be grafted, or nothing that is selected.
        """
        return full_jobs(self.base, instruct, self.checkpoint, options, scratch, is_delta=True)


def _without_unchanged(jobs: Jobs) -> Jobs:
    """Copy the weights whose TUNED is BASE's own bytes."""
    weights = [
        job.copied() if job.base is not None and job.tuned is not None and job.base.spec == job.tuned.spec else job
        for job in jobs.weights
    ]
    return replace(jobs, weights=weights, grafted=sum(job.grafted for job in weights))
