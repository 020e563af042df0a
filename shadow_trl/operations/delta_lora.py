"""A delta as a LoRA adapter of BASE: each linear module's delta cut to a low rank, and what that loses."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..adapters.lora import PREFIX
from ..adapters.lora import WEIGHTS as ADAPTER_WEIGHTS
from ..arithmetic.grafter import BLOCK, is_finite
from ..arithmetic.low_rank import truncate
from ..checkpoints.checkpoint import ADAPTER_CONFIG, Checkpoint
from ..checkpoints.weight_names import is_tied
from ..errors import ConfigError, GraftError, list_names
from ..grafting.jobs import Jobs, WeightJob
from ..grafting.options import GraftOptions
from ..grafting.reports import DeltaReport
from ..results.folder import check_space
from ..runtime.progress import Progress


def write_low_rank(
    jobs: Jobs, base: Checkpoint, part: Path, target: Path, options: GraftOptions, rank: int, progress: bool
) -> DeltaReport:
    """Write the adapter's weights and config into `part`; return what is kept and what is lost.

    Memory holds one weight at a time, the decomposition's own, and the adapter.

    Args:
        jobs: plan of a graft of the delta onto BASE itself.
        base: BASE, as the adapter's config is to name it.
        part: folder to write into.
        target: where the result will be, for messages.
        options: has the dtype.
        rank: of every module.
        progress: whether to show a bar.

    Raises:
        ConfigError: no linear module has a delta.
        GraftError: values that are not finite.
    """
    modules = _linear_modules(jobs.layout, base)
    weights = [job for job in jobs.weights if job.grafted]
    squares: dict[str, float] = {}
    factors: dict[str, Tensor] = {}
    energies: dict[str, float] = {}
    dtype = getattr(torch, options.dtype)
    check_space(target, sum(rank * sum(job.shape) * dtype.itemsize for job in weights if job.name in modules))
    bad: list[str] = []
    # One buffer for all: fresh ones of this size, with the factors kept in between, leave holes that add up.
    buffer = torch.empty(max((math.prod(job.shape) for job in weights if job.name in modules), default=0))
    with Progress(sum(math.prod(job.shape) for job in weights), progress) as bar:
        for job in weights:
            module = modules.get(job.name)
            delta = buffer[: math.prod(job.shape)] if module else None
            squares[job.name] = _measure(job, delta)
            bar.add(math.prod(job.shape))
            if not math.isfinite(squares[job.name]):
                bad.append(job.name)
            elif delta is not None and module and squares[job.name] > 0.0:
                left, right, energies[module] = truncate(delta.view(job.shape), rank)
                factors[f"{PREFIX}{module}.lora_A.weight"] = _padded(right, rank, 0).to(dtype)
                factors[f"{PREFIX}{module}.lora_B.weight"] = _padded(left, rank, 1).to(dtype)
    bad += [name for name, factor in factors.items() if not bad and not is_finite(factor)]
    if bad:
        raise GraftError(
            f"{len(bad)} weights of the delta have values that are infinite or not a number.\n{list_names(bad)}\n"
            f"Repair or replace the checkpoint, or write --dtype float32. Nothing was written to {target}."
        )
    if not energies:
        raise ConfigError(
            f"no linear module of {base} has a delta, so there is nothing to make an adapter of. Nothing was written."
        )
    from safetensors.torch import save_file

    save_file(factors, part / ADAPTER_WEIGHTS, metadata={"format": "pt"})
    config = _config(base, sorted(energies), rank)
    (part / ADAPTER_CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    return _report(target, options, rank, modules, squares, energies)


def _report(
    target: Path,
    options: GraftOptions,
    rank: int,
    modules: dict[str, str],
    squares: dict[str, float],
    energies: dict[str, float],
) -> DeltaReport:
    total = math.fsum(squares.values())
    table, lost = {}, {}
    for name, square in squares.items():
        module = modules.get(name)
        if module in energies:
            table[module] = {"energy": energies[module], "share": square / total}
        elif square > 0.0:
            lost[name] = square / total
    kept = math.fsum(found["energy"] * found["share"] for found in table.values())
    warnings = []
    if lost:
        lines = [f"{name}  {share:.3g}" for name, share in sorted(lost.items(), key=lambda item: -item[1])]
        warnings.append(
            f"{len(lost)} weights have no low-rank form; their share of the delta's squared norm, "
            f"{sum(lost.values()):.3g} in all, is lost.\n{list_names(lines)}"
        )
    return DeltaReport(
        target, "adapter", len(table), options.dtype, delta_norm=math.sqrt(total), rank=rank, kept=kept, modules=table,
        lost=lost, warnings=warnings,
    )  # fmt: skip


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
        for place in (job.base, job.tuned):
            place.release(start, stop)
    return total


def _linear_modules(layout: Checkpoint, base: Checkpoint) -> dict[str, str]:
    """Return name of a weight on disk -> name of its linear module in memory, as PEFT finds it.

    Only transformers knows which weights belong to a linear module: the router of a mixture and its fused experts look
    like one on disk. A head that shares the embedding's weight has no delta of its own that an adapter could hold.
    """
    from ..layouts.model_names import ModelNames

    names = ModelNames(base)
    tied = set(names.ties) if is_tied(base.config) else set()
    linear = {
        f"{name}.weight": name
        for name, module in names.model.named_modules()
        if isinstance(module, torch.nn.Linear) and f"{name}.weight" not in tied
    }
    keys = {key: name for key, name in names.keys(layout.specs).items() if len(layout.specs[name].shape) == 2}
    return {name: linear[key] for key, name in keys.items() if key in linear}


def _padded(factor: Tensor, rank: int, axis: int) -> Tensor:
    """Fill up with zeros to the adapter's one rank, where a module has fewer rows or columns than that."""
    if factor.shape[axis] == rank:
        return factor
    shape = list(factor.shape)
    shape[axis] = rank - shape[axis]
    return torch.cat([factor, torch.zeros(shape)], axis).contiguous()


def _config(base: Checkpoint, modules: list[str], rank: int) -> dict[str, Any]:
    causal = str((base.config.get("architectures") or [""])[0]).endswith("ForCausalLM")
    return {
        "peft_type": "LORA", "task_type": "CAUSAL_LM" if causal else None, "base_model_name_or_path": base.source,
        "revision": base.revision, "r": rank, "lora_alpha": rank, "lora_dropout": 0.0, "bias": "none",
        "fan_in_fan_out": False, "use_rslora": False, "init_lora_weights": True, "inference_mode": True,
        "target_modules": modules,
    }  # fmt: skip
