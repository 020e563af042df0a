"""The last look at a result before it takes its place: is everything there that its loader reads?"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from ..checkpoints.checkpoint import Checkpoint
from ..checkpoints.json_files import read_json
from ..errors import CheckpointError, GraftError, list_names


def check_result(
    folder: Path, target: Path, small: Iterable[Path], instruct: Path, *, reader: type[Checkpoint] = Checkpoint
) -> None:
    """Read a finished result as transformers or PEFT will: its configuration, its index and the header of every file.

    Args:
        folder: where the result is, not yet renamed into place.
        target: where it will be, for the message.
        small: the files of INSTRUCT that were copied.
        instruct: their folder.
        reader: what opens the result. Default: a model or an adapter.

    Raises:
        GraftError: a file that is named is missing, a tensor is not where the index says, a size does not add up, or a
            configuration is no JSON.
    """
    try:
        written = reader.open(folder)
        wrong = [*_index_faults(written), *_config_faults(written)]
    except CheckpointError as error:
        wrong = [str(error)]
    names = [path.relative_to(instruct) for path in small]
    wrong += [f"{name}  missing" for name in names if not (folder / name).is_file()]
    if wrong:
        listed = list_names(wrong).replace(str(folder), str(target))
        raise GraftError(f"the result would not load.\n{listed}\nRepair the checkpoint of INSTRUCT, or check the disk.")


def _index_faults(written: Checkpoint) -> list[str]:
    if written.index is None:
        return []
    index = read_json(written.path / written.index)
    found = [f"{name}  not in {written.index}" for name in written.specs if name not in index["weight_map"]]
    metadata = index.get("metadata")  # transformers writes into it, and stops where there is none
    stated = metadata.get("total_size") if isinstance(metadata, dict) else None
    total = sum(spec.nbytes for spec in written.specs.values())
    if stated != total:
        found.append(f"metadata.total_size of {written.index}  {stated} instead of {total}")
    return found


def _config_faults(written: Checkpoint) -> list[str]:
    """Return what a config names and the folder lacks: code, or weights under a name of the config's own."""
    found = []
    path, config = written.path, written.config
    if not (written.is_adapter or config or type(written) is not Checkpoint):
        found.append("config.json  missing or empty")
    code = config.get("auto_map") or {}
    classes = [name for value in code.values() for name in (value if isinstance(value, list) else [value]) if name]
    modules = {f"{name.rpartition('.')[0]}.py" for name in classes if "--" not in name}  # the others are on the hub
    found += [f"{module}  missing; auto_map of config.json names it" for module in sorted(modules) if
              not (path / module).is_file()]  # fmt: skip
    weights = config.get("transformers_weights")
    if weights not in (None, written.index or (written.files[0].name if written.files else None)):
        found.append(f"transformers_weights of config.json  {weights}, which the result lacks")
    return found
