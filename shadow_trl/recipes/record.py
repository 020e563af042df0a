"""The options that a run was started with, beside its results, and whether a later call has the same."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ..checkpoints.digests import file_digest
from ..checkpoints.json_files import read_json
from ..errors import OutputExistsError, list_names
from ..results.folder import whole_file
from .options import Options

RECORD_NAME = "options.json"

_NO_MATTER = re.compile(
    r"output_dir|resume_from_checkpoint|run_name|report_to|project|disable_tqdm|log_.*|logging_.*|hub_.*|push_to_hub.*|"
    r"save_.*|dataloader_(num_workers|pin_memory|persistent_workers|prefetch_factor)|trackio_.*|"
    r"graft_overwrite|find_base|torch_threads|score_.*|compare_direct|(model_name_or_path|instruct_model|base_model)"
)
"""Options that do not change the weights that a run writes; and models, which its manifest knows by their weights."""


def record_of(options: Options) -> dict[str, Any]:
    """Return the options of a run that its weights depend on, as plain values for JSON.

    Passwords of the hub are not among them. Data in a file or folder here is recorded by its digests.
    """
    groups = (options.script, options.model, options.recipe, options.mixture)
    values = {name: value for group in groups for name, value in asdict(group).items()} | options.training.to_dict()
    found = {name: value for name, value in values.items() if not _NO_MATTER.fullmatch(name)}
    # `to_dict` masks every name that ends like a password's: the tokens of the text are meant here.
    found.update({name: getattr(options.training, name) for name in found if name in ("eos_token", "pad_token")})
    found["dataset_name"] = _content(found["dataset_name"])
    for source in found["datasets"]:
        source.update({name: _content(source[name]) for name in ("path", "data_dir", "data_files")})
    plain: dict[str, Any] = json.loads(json.dumps(found, default=str))
    return plain


def _content(data: Any) -> Any:
    """Return what stands for data: digests of files here, wherever they are and whatever they held then; else names."""
    if isinstance(data, dict):
        return {name: _content(one) for name, one in data.items()}
    if isinstance(data, list):
        return [_content(one) for one in data]
    if isinstance(data, str) and os.path.isfile(data):
        return file_digest(Path(data))
    if isinstance(data, str) and os.path.isdir(data):
        files = sorted(path for path in Path(data).rglob("*") if path.is_file())
        return {str(path.relative_to(data)): file_digest(path, "xxh3") for path in files}
    return data


def write_record(folder: Path, record: Mapping[str, Any]) -> None:
    """Write the record into the folder of the run."""
    folder.mkdir(parents=True, exist_ok=True)
    with whole_file(folder / RECORD_NAME) as new:
        new.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


def check_record(folder: Path, record: Mapping[str, Any]) -> None:
    """Check that the run in `folder`, finished or not, was started with these options.

    Options that only one of the two knows are not compared: the folder may be of another version.

    Raises:
        CheckpointError: the record cannot be read.
        OutputExistsError: some differ; each is named with both values.
    """
    before = read_json(folder / RECORD_NAME)  # empty where the run is older than such records
    changed = [f"{name}: {before[name]!r} there, {value!r} now" for name, value in record.items()
               if name in before and before[name] != value]  # fmt: skip
    if changed:
        raise OutputExistsError(
            f"{folder} holds a run with other options: {len(changed)} of {len(record)} differ.\n{list_names(changed)}\n"
            f"Give the options it was started with, choose another output_dir, or remove {folder} to run it again."
        )
