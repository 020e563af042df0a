"""Checkpoints with other names and heads, and grafts of them: by what a plan says, and by `graft`."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from architectures import (
    SCALE,
    assert_sum,
)
from safetensors.torch import load_file, save_file

from shadow_trl.checkpoints.checkpoint import Checkpoint
from shadow_trl.layouts.plan import Layout, resolve
from shadow_trl.operations.graft import graft


def rewrite(source: Path, target: Path, change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> Path:
    """Copy a checkpoint with other weights."""
    shutil.copytree(source, target)
    save_file(change(load_file(source / "model.safetensors")), target / "model.safetensors", metadata={"format": "pt"})
    return target


def rename(source: Path, target: Path, *pairs: tuple[str, str]) -> Path:
    """Copy a checkpoint with prefixes of names replaced."""

    def change(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        renamed = {}
        for name, tensor in weights.items():
            old, new = next(((old, new) for old, new in pairs if name.startswith(old)), ("", ""))
            renamed[new + name.removeprefix(old)] = tensor
        return renamed

    return rewrite(source, target, change)


def edit_config(folder: Path, **values: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **values}))


def open_all(*folders: Path) -> list[Checkpoint]:
    return [Checkpoint.open(str(folder)) for folder in folders]


def carry_out(layout: Layout, sources: dict[str, Checkpoint], output: Path) -> Path:
    """Do what a layout says, in float64, and write a float32 checkpoint with INSTRUCT's config."""
    result = {}
    for weight in layout.weights:
        start = sources["instruct"].tensor(weight.instruct).double()
        grafted = start.clone()
        if not weight.copied:
            assert weight.base is not None
            base, tuned = sources["base"].tensor(weight.base), sources["tuned"].tensor(weight.tuned)
            rows = slice(None) if weight.rows is None else list(weight.rows)
            grafted[rows] = start[rows] + SCALE * (tuned.double()[rows] - base.double()[rows])
        result[weight.name] = grafted.float()
    output.mkdir()
    save_file(result, output / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((sources["instruct"].path / "config.json").read_text())
    for key, value in layout.config_edits.items():
        *parents, last = key.split(".")
        part = config
        for parent in parents:
            part = part[parent]
        part[last] = value
    (output / "config.json").write_text(json.dumps(config))
    return output


def graft_by_layout(tmp_path: Path, name: str, folders: tuple[Path, Path, Path], **options: Any) -> Layout:
    base, instruct, tuned = open_all(*folders)
    layout = resolve(base, instruct, tuned, scratch=tmp_path / "scratch", **options)
    assert_sum(name, *folders, carry_out(layout, layout.sides, tmp_path / "grafted"))
    return layout


def with_head(source: Path, target: Path, head: str | None, *, tied: bool | None = None) -> Path:
    """Copy a tied checkpoint: no head on disk, a "copy" of the embedding, or an "own" one."""

    def change(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        embedding = weights["model.embed_tokens.weight"]
        if head == "copy":
            weights["lm_head.weight"] = embedding.clone()
        elif head == "own":
            weights["lm_head.weight"] = embedding.flip(0).contiguous()
        return weights

    folder = rewrite(source, target, change)
    if tied is not None:
        edit_config(folder, tie_word_embeddings=tied)
    return folder


def run_graft(folders: tuple[Path, Path, Path], output: Path, **options: Any) -> Any:
    base, instruct, tuned = folders
    return graft(
        base=base, instruct=instruct, tuned=tuned, output=output, scale=SCALE, dtype="float32", digest="none",
        progress=False, **options,
    )  # fmt: skip
