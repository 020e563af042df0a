"""A delta as the nearest LoRA adapter: each linear module's delta cut to a low rank, and what that loses."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..adapters.repoint import write_factors
from ..arithmetic.grafter import BLOCK
from ..arithmetic.low_rank import truncate
from ..checkpoints.checkpoint import Checkpoint
from ..errors import ConfigError, GraftError, list_names
from ..grafting.jobs import Jobs, WeightJob
from ..layouts.model_names import LinearModule, ModelNames
from ..runtime.machine import check_space
from ..runtime.progress import Progress


@dataclass
class Truncated:
    """A delta cut to a low rank.

    Args:
        rank: of every module.
        factors: module -> (left (out, rank), right (rank, in)).
        energies: module -> share of its own squared norm that is kept.
        squares: module or weight without a low-rank form -> squared norm of its delta.
    """

    rank: int
    factors: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)
    energies: dict[str, float] = field(default_factory=dict)
    squares: dict[str, float] = field(default_factory=dict)

    @property
    def total(self) -> float:
        """Squared norm of the whole delta."""
        return math.fsum(self.squares.values())

    @property
    def modules(self) -> dict[str, dict[str, float]]:
        """Module -> `energy`, and `share`, its share of the whole delta's squared norm."""
        total = self.total
        return {name: {"energy": energy, "share": self.squares[name] / total} for name, energy in self.energies.items()}

    @property
    def lost(self) -> dict[str, float]:
        """Weight without a low-rank form -> its share of the whole delta's squared norm."""
        total = self.total
        rest = self.squares.keys() - self.energies.keys()
        return {name: square / total for name, square in self.squares.items() if name in rest and square > 0.0}

    @property
    def kept(self) -> float:
        """Share of the whole delta's squared norm that the factors hold."""
        return math.fsum(found["energy"] * found["share"] for found in self.modules.values())

    @property
    def error(self) -> float:
        """Norm of what is lost, relative to the norm of the whole delta."""
        cut = math.fsum((1.0 - found["energy"]) * found["share"] for found in self.modules.values())
        return math.sqrt(cut + math.fsum(self.lost.values()))

    @property
    def warnings(self) -> list[str]:
        """A line on the weights without a low-rank form, where there are any."""
        lost = self.lost
        lines = [f"{name}  {share:.3g}" for name, share in sorted(lost.items(), key=lambda item: -item[1])]
        return (
            [
                f"{len(lost)} weights have no low-rank form; their share of the delta's squared norm, "
                f"{sum(lost.values()):.3g} in all, is lost.\n{list_names(lines)}"
            ]
            if lost
            else []
        )

    def write(self, folder: Path, base: Checkpoint) -> Checkpoint:
        """Write the factors as an adapter of `base` into `folder`, and return it."""
        causal = str((base.config.get("architectures") or [""])[0]).endswith("ForCausalLM")
        settings: dict[str, Any] = {
            "peft_type": "LORA", "task_type": "CAUSAL_LM" if causal else None, "inference_mode": True,
            "base_model_name_or_path": base.source, "revision": base.revision, "lora_dropout": 0.0, "bias": "none",
            "fan_in_fan_out": False, "target_modules": sorted(self.factors),
        }  # fmt: skip
        return write_factors(self.factors, settings, folder)


def truncated(
    jobs: Jobs,
    base: Checkpoint,
    rank: int,
    target: Path,
    *,
    dtype: torch.dtype = torch.float32,
    progress: bool = False,
) -> Truncated:
    """Cut `tuned - base` to a rank, and say what that keeps.

    Memory holds one weight at a time, the decomposition's own, and the factors.

    Args:
        jobs: plan of a graft of the delta onto BASE itself.
        base: BASE, whose modules these are.
        rank: of every module; factors of a smaller one are filled up with zeros.
        target: where the result will be, for messages.
        dtype: of the factors.
        progress: whether to show a bar.

    Raises:
        ConfigError: no linear module has a delta.
        GraftError: values that are not finite, or a full disk.
    """
    modules = _linear_modules(jobs.layout, base)
    weights = [job for job in jobs.weights if job.grafted]
    check_space(target, sum(rank * sum(job.shape) * dtype.itemsize for job in weights if job.name in modules))
    found, bad = Truncated(rank), []
    # One buffer for all: fresh ones of this size, with the factors kept in between, leave holes that add up.
    buffer = torch.empty(max((math.prod(job.shape) for job in weights if job.name in modules), default=0))
    with Progress(sum(math.prod(job.shape) for job in weights), progress) as bar:
        for job in weights:
            module = modules.get(job.name)
            delta = buffer[: math.prod(job.shape)] if module is not None else None
            square = found.squares[module.name if module is not None else job.name] = _measure(job, delta)
            bar.add(math.prod(job.shape))
            if not math.isfinite(square):
                bad.append(job.name)
            elif delta is not None and module is not None and square > 0.0:
                matrix = delta.view(job.shape)
                left, right, found.energies[module.name] = truncate(matrix.T if module.transposed else matrix, rank)
                factors = _padded(left, rank, 1).to(dtype), _padded(right, rank, 0).to(dtype)
                found.factors[module.name] = factors
                if not all(part.isfinite().all() for part in factors):
                    bad.append(f"{job.name}  in {str(dtype).removeprefix('torch.')}")
    if bad:
        raise GraftError(
            f"{len(bad)} weights of the delta have values that are infinite or not a number.\n{list_names(bad)}\n"
            f"Repair or replace the checkpoint, or write --dtype float32."
        )
    if not found.factors:
        raise ConfigError(
            "\n".join(
                [
                    f"no linear module of {base} has a delta, so there is no LoRA near it.",
                    *([list_names(found.lost)] if found.lost else []),
                    "Write the dense form, without rank.",
                ]
            )
        )
    return found


def _measure(job: WeightJob, out: Tensor | None) -> float:
    """Return the sum of squares of a weight's delta; write the delta, fp32, flattened, into `out` where it is given."""
    assert job.base is not None
    assert job.tuned is not None
    total = 0.0
    for start in range(0, math.prod(job.shape), BLOCK):
        stop = min(start + BLOCK, math.prod(job.shape))
        base, tuned = job.base.block(start, stop), job.tuned.block(start, stop)
        delta = tuned.double() - base.double()
        total += float(torch.dot(delta, delta))
        if out is not None:
            out[start:stop] = delta
    return total


def _linear_modules(layout: Checkpoint, base: Checkpoint) -> dict[str, LinearModule]:
    """Return name of a weight on disk -> its linear module.

    A head that shares the embedding's weight has no delta of its own that an adapter could hold.
    """
    names = ModelNames(base)
    config = names.model.config
    tied = any(getattr(part, "tie_word_embeddings", False) for part in (config, config.get_text_config()))
    heads = set(names.ties) if tied else set()
    found = names.linear(name for name, spec in layout.specs.items() if len(spec.shape) == 2)
    return {name: module for name, module in found.items() if f"{module.name}.weight" not in heads}


def _padded(factor: Tensor, rank: int, axis: int) -> Tensor:
    """Fill up with zeros to the adapter's one rank, where a module has fewer rows or columns than that."""
    if factor.shape[axis] == rank:
        return factor
    shape = list(factor.shape)
    shape[axis] = rank - shape[axis]
    return torch.cat([factor, torch.zeros(shape)], axis).contiguous()
