"""Pipelines on tiny models: their configuration and data, and what runs one in each of several processes."""

from __future__ import annotations

import contextlib
import gc
import io
import os
import sys
from pathlib import Path
from typing import Any

import torch
import yaml
from rows import SETTINGS, write_rows
from tiny import preference_data, sft_data

LORA = {"use_peft": True, "lora_r": 4, "lora_alpha": 8, "lora_target_modules": ["q_proj", "v_proj"]}
SHARED = {"model_name_or_path": "base", "instruct_model": "instruct", **SETTINGS, "max_steps": 2}


def write_config(**changes: object) -> None:
    """Write `pipeline.yaml`; a change of the name of a stage is added to its section."""
    sections = {stage: {"dataset_name": f"{stage}.jsonl", **changes.pop(stage, {})} for stage in ("sft", "dpo")}
    Path("pipeline.yaml").write_text(yaml.safe_dump({**SHARED, **sections, **changes}))


def fill(folder: Path, pair: tuple[Path, Path]) -> None:
    """Make `folder`, the current one, hold links to the pair, data, rows to score and a configuration."""
    for name, model in zip(("base", "instruct"), pair, strict=True):
        (folder / name).symlink_to(model)
    write_rows(folder / "sft.jsonl", list(sft_data()))
    write_rows(folder / "dpo.jsonl", list(preference_data()))
    row = {"prompt": [{"role": "user", "content": "1"}], "answer": "1", "kind": "target"}
    write_rows(folder / "rows.jsonl", [row, row])
    write_config()


def run(rank: int, engine: str, folder: str, *words: str) -> dict[str, Any]:
    """Run the pipeline in `folder` under `engine` (ddp, fsdp2, zero3, or alone: none).

    Returns what each trainer ran with, the bytes of tensors before it was made, the answers of the rows that each model
    was asked here, the exit code and what was said.
    """
    import datasets
    import engines

    from shadow_trl.recipes import compare
    from shadow_trl.recipes import run as recipes
    from shadow_trl.recipes.pipeline import main_sft_dpo

    os.chdir(folder)
    datasets.config.HF_DATASETS_CACHE = Path(folder, "cache")
    if engine in ("fsdp2", "zero3"):
        engines.on_the_cpu()
        if engine == "zero3":
            engines.deepspeed_on_the_cpu()
        os.environ.update(engines.LAUNCHED if engine == "fsdp2" else engines.LAUNCHED_ZERO3)
        words = (*words, "--use_cpu", "false")
    seen: dict[str, Any] = {"stages": [], "before": [], "answered": []}
    answered_right = compare.answered_right

    def answered(model: Any, tokenizer: Any, rows: Any, **more: Any) -> list[bool]:
        seen["answered"].append([row["answer"] for row in rows])
        return answered_right(model, tokenizer, rows, **more)

    compare.answered_right = answered
    made = recipes._trainer

    def trainer(*given: Any) -> Any:
        seen["before"].append(bytes_of_tensors())
        found = made(*given)
        state = found.accelerator
        kind = str(state.distributed_type).removeprefix("DistributedType.")
        seen["stages"].append((kind, state.num_processes, state.mixed_precision, found.args.train_batch_size))
        return found

    recipes._trainer = trainer
    with contextlib.redirect_stderr(io.StringIO()) as told:
        seen["code"] = main_sft_dpo(["--config", "pipeline.yaml", *words])
    seen["told"] = told.getvalue()
    print(seen["told"], file=sys.stderr)
    return seen


def bytes_of_tensors() -> int:
    """Return the bytes that all tensors in this process hold, without a collection of garbage before."""
    held = [thing for thing in gc.get_objects() if issubclass(type(thing), torch.Tensor)]
    storages = {}
    for tensor in held:
        storage = getattr(tensor, "_local_tensor", tensor).untyped_storage()
        storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())
