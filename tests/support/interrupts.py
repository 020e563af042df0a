"""A training run that dies, and what it leaves."""

from __future__ import annotations

from pathlib import Path

from transformers import TrainerCallback


class Interrupted(Exception):
    """Stands for a killed process."""


class InterruptAfter(TrainerCallback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step > self.step:
            raise Interrupted


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.glob("*.safetensors")}
