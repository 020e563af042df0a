"""A random pair and rows, on the disk."""

from __future__ import annotations

import random
from dataclasses import dataclass
from pathlib import Path

CHARACTERS = "0123456789abcdefghijklmnopqrstuvwxyz +-=.,"


@dataclass(frozen=True)
class Inputs:
    """Folders of a pair and of rows for each trainer.

    Attributes:
        bytes: of the weights of one model, in float32.
    """

    base: Path
    instruct: Path
    rows: dict[str, Path]
    bytes: int

    @property
    def pair(self) -> tuple[str, str]:
        """BASE and INSTRUCT."""
        return str(self.base), str(self.instruct)


def make(folder: Path, *, hidden: int, layers: int, rows: int, answers: range) -> Inputs:
    """Write a pair of `layers` layers of width `hidden` and `rows` rows, with answers of lengths in `answers`."""
    from datasets import Dataset
    from training import make_inputs

    make_inputs(folder, hidden=hidden, layers=layers, rows=0)
    source, asked = random.Random(0), []
    for _ in range(rows):
        counts = (8, source.choice(answers), source.choice(answers))
        texts = ["".join(source.choices(CHARACTERS, k=count)) for count in counts]
        roles = zip(("user", "assistant", "assistant"), texts, strict=True)
        asked.append([[{"role": role, "content": text}] for role, text in roles])
    found = {
        "dpo": [{"prompt": prompt, "chosen": chosen, "rejected": other} for prompt, chosen, other in asked],
        "sft": [{"prompt": prompt, "completion": chosen} for prompt, chosen, _ in asked],
    }
    for kind, data in found.items():
        Dataset.from_list(data).save_to_disk(folder / kind)
    weights = sum(path.stat().st_size for path in (folder / "base").glob("*.safetensors"))
    return Inputs(folder / "base", folder / "instruct", {kind: folder / kind for kind in found}, weights)
