"""Changes to the folders of a pair, and the text of its refusal."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import SPECIAL, make_tokenizer

from shadow_trl.errors import PairMismatchError
from shadow_trl.pair.pairs import ModelPair

EMBEDDING = "model.embed_tokens.weight"


def edit_json(file: Path, **changes: object) -> None:
    content = json.loads(file.read_text()) if file.is_file() else {}
    file.write_text(json.dumps({**content, **changes}))


def edit_weights(folder: Path, change) -> None:
    """Replace the weights in `folder` by `change(weights)`."""
    weights = load_file(folder / "model.safetensors")
    save_file({name: tensor.contiguous() for name, tensor in change(weights).items()}, folder / "model.safetensors")


def set_rows(folder: Path, rows: dict[int, torch.Tensor]) -> None:
    def change(weights):
        for index, row in rows.items():
            weights[EMBEDDING][index] = row
        return weights

    edit_weights(folder, change)


def add_rows(folder: Path, count: int) -> None:
    """Append `count` rows of small random numbers to the embedding of `folder`."""
    edit_weights(folder, lambda w: {**w, EMBEDDING: torch.cat([w[EMBEDDING], 0.02 * torch.randn(count, 16)])})


def add_tokens(folder: Path, *tokens: str, template: bool = True) -> None:
    tokenizer = make_tokenizer(template=template)
    tokenizer.add_special_tokens({"additional_special_tokens": [*SPECIAL[2:], *tokens]})
    tokenizer.save_pretrained(folder)


def refusal(sides: tuple[Path, Path], **options: object) -> str:
    with pytest.raises(PairMismatchError) as caught:
        ModelPair.open(*sides).check(**options)
    text = str(caught.value)
    assert text.endswith(f"\n  base      {sides[0]}\n  instruct  {sides[1]}")
    return text
