"""One process of a run, as tests/support/engines.py makes it, with its memory and the time of its steps."""

from __future__ import annotations

import ctypes
import gc
import os
import time
from pathlib import Path
from typing import Any

import engines


def run(rank: int, *given: Any, **named: Any) -> dict[str, Any]:
    """Call `engines.run(rank, ...)`; return what it saw, with peaks in MiB and seconds.

    Returns:
        what `engines.run` returns; `peaks`, the most memory above that of the process before it had a model, in MiB:
        `loading` until the reference values are computed or training begins, `reference` while they are computed,
        `training` from the first step to the last; `steps`, (processor seconds, seconds) of each step.
    """
    os.dup2(2, 1)  # the trainers print every log; standard output is for the tables
    from transformers import TrainerCallback
    from trl import DPOTrainer, SFTTrainer  # noqa: F401

    import shadow_trl.training.trainers  # noqa: F401

    _warm_up()
    gc.freeze()  # to look through all that was imported takes longer than the runs, and copies its pages
    meter = Meter()
    steps: list[tuple[float, float]] = []

    class Watch(TrainerCallback):
        def on_train_begin(self, *_: Any, **__: Any) -> None:
            meter.read("loading")

        def on_step_begin(self, *_: Any, **__: Any) -> None:
            steps.append(_now())

        def on_step_end(self, *_: Any, **__: Any) -> None:
            steps[-1] = tuple(now - then for now, then in zip(_now(), steps[-1], strict=True))  # type: ignore[assignment]

        def on_train_end(self, *_: Any, **__: Any) -> None:
            meter.read("training")

    compute = DPOTrainer._precompute_ref_logps

    def metered(self: Any, *args: Any, **kwargs: Any) -> Any:
        meter.read("loading")
        try:
            return compute(self, *args, **kwargs)
        finally:
            meter.read("reference")

    DPOTrainer._precompute_ref_logps = metered  # type: ignore[method-assign]
    seen = engines.run(rank, *given, callbacks=[Watch()], **named)
    return {**seen, "peaks": meter.peaks, "steps": steps}


def _warm_up() -> None:
    """Train a very small model for a step, so that the pages of the libraries are in memory before the start."""
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM

    size = {"vocab_size": 8, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1}
    model = Qwen3ForCausalLM(Qwen3Config(**size, num_attention_heads=1, num_key_value_heads=1, head_dim=8))
    rows = torch.ones(1, 4, dtype=torch.long)
    model(rows, labels=rows).loss.backward()
    torch.optim.AdamW(model.parameters()).step()


class Meter:
    """The peak of the resident set between two readings, above what was resident at the start; Linux only.

    Attributes:
        peaks: by name of the part, the largest of its readings, in MiB.
    """

    def __init__(self) -> None:
        _reset()
        self._start = _status("VmRSS")
        self.peaks: dict[str, float] = {}

    def read(self, part: str) -> None:
        """Note the peak since the last reading as that of `part`, and begin anew."""
        self.peaks[part] = max(self.peaks.get(part, 0.0), _status("VmHWM") - self._start)
        _reset()


def _reset() -> None:
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # what was freed and kept by the allocator is not in use
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")


def _status(name: str) -> float:
    for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) / 1024
    raise OSError(f"/proc/self/status has no {name}; this benchmark needs Linux")


def _now() -> tuple[float, float]:
    return time.process_time(), time.perf_counter()
