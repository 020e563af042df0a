"""Plain LoRA adapters as deltas: their factors, and the weights of INSTRUCT that they change.

The product does not depend on the weight that it is added to: it is the delta on INSTRUCT too. The files say all that
is needed, peft is not imported. In this folder "base model" is PEFT's word: the model under an adapter.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from ..checkpoints.checkpoint import ADAPTER_CONFIG, Checkpoint
from ..checkpoints.hub import local_folder
from ..checkpoints.json_files import is_there, read_json
from ..checkpoints.manifest import adapter_base
from ..checkpoints.weight_names import HEAD_NAMES, is_tied
from ..errors import AdapterError, PairMismatchError, list_names
from ..runtime.patterns import check_patterns
from .kinds import kind_of

PREFIX = "base_model.model."
WEIGHTS = "adapter_model.safetensors"
_KEY = re.compile(r"(?P<module>.+)\.lora_(?P<side>[AB])\.weight")


@dataclass(frozen=True)
class LoraModule:
    """The low-rank delta of one module: `factor * lora_B @ lora_A`.

    Args:
        module: name of the module in the model under the adapter.
        left: name of lora_B, (out, r), in the adapter's file.
        right: name of lora_A, (r, in).
        factor: alpha / r, alpha / sqrt(r) for rsLoRA.
        shape: (out, in).
        transposed: whether the model stores the weight as (in, out).
    """

    module: str
    left: str
    right: str
    factor: float
    shape: tuple[int, int]
    transposed: bool

    @property
    def stored_shape(self) -> tuple[int, int]:
        """Shape of the weight on disk."""
        return (self.shape[1], self.shape[0]) if self.transposed else self.shape


def open_tuned(source: Any) -> Checkpoint:
    """Open TUNED, a model or an adapter; of a folder that holds several adapters one must be named.

    Raises:
        AdapterError: the folder holds adapters in sub-folders only.
        ConfigError: an expression in the config of an adapter is none, or takes too long.
    """
    if isinstance(source, Checkpoint):
        return source
    folder = local_folder(source)
    if folder is not None and not any(is_there(folder / name) for name in (ADAPTER_CONFIG, "config.json")):
        found = sorted(path.parent.name for path in folder.glob(f"*/{ADAPTER_CONFIG}"))
        if found:
            raise AdapterError(
                f"{source} holds {len(found)} adapter{'s' if len(found) > 1 else ''} in sub-folders and none itself.\n"
                f"{list_names(found)}\nName one of them: {Path(source) / found[0]}."
            )
    tuned = Checkpoint.open(source)
    if tuned.is_adapter:
        paths = (name.removeprefix(PREFIX).split(".") for name in tuned.specs)
        check_config_patterns(tuned, {".".join(path[:-end]) for path in paths for end in (1, 2)})
    return tuned


def other_adapters(adapter: Checkpoint) -> list[str]:
    """Return the names of the adapters that were saved with this one, in sub-folders of its folder.

    They are on the same model: a graft or another run below the folder is not. Nor do checkpoints of the run count.
    """
    base = adapter.adapter_config.get("base_model_name_or_path")
    found = [
        path for path in adapter.path.glob(f"*/{ADAPTER_CONFIG}") if not path.parent.name.startswith("checkpoint-")
    ]
    return sorted(path.parent.name for path in found if read_json(path).get("base_model_name_or_path") == base)


def base_model_of(adapter: Checkpoint) -> str | None:
    """Return the name of the model under the adapter with its revision, None where the adapter does not say."""
    found = adapter_base(adapter.adapter_config, adapter.path)
    return None if found is None else str(found)


def streams(adapter: Checkpoint, receiver: Checkpoint | None) -> bool:
    """Whether an adapter is a plain LoRA: its product is added as it is, and BASE's weights are not needed.

    Args:
        adapter: of any kind.
        receiver: the model that the product is added to. Its head is left alone where it has none of its own or the
            config ties it: that weight is the embedding too. None: a sum of products, which is added to no model yet.

    Raises:
        AdapterError: the adapter has no weight delta.
    """
    if kind_of(adapter.adapter_config).beyond or no_factors(adapter.specs):
        return False
    head = any(f"{name.rpartition('.lora_')[0]}.weight".endswith(HEAD_NAMES) for name in adapter.specs)
    if receiver is None or not head:
        return True
    return not is_tied(receiver.config) and any(name.endswith(HEAD_NAMES) for name in receiver.specs)


def no_factors(names: Iterable[str]) -> list[str]:
    """Return the names in an adapter's file that are no factor of a linear layer's product: an embedding's, say."""
    return [name for name in names if _KEY.fullmatch(name) is None]


def read_lora(adapter: Checkpoint) -> dict[str, LoraModule]:
    """Return the modules of a plain LoRA (rsLoRA and rank and alpha patterns included) by name.

    Raises:
        AdapterError: another kind of adapter, a feature that is more than a product of two factors, or factors that do
            not fit each other.
    """
    config = adapter.adapter_config
    features = list(kind_of(config).beyond)
    keys: dict[str, dict[str, str]] = {}
    for name in adapter.specs:
        match = _KEY.fullmatch(name)
        if match is None:
            features.append(f"weight {name}")
        else:
            keys.setdefault(match["module"].removeprefix(PREFIX), {})[match["side"]] = name
    if features:
        raise AdapterError(
            f"adapter {adapter} is more than a plain LoRA, the only kind possible here.\n{list_names(features)}\n"
            "Merge it into the model that it was trained on (merge_and_unload of PEFT) and graft the merged model."
        )
    lonely = [module for module, sides in keys.items() if len(sides) != 2]
    if lonely or not keys:
        raise AdapterError(
            f"adapter {adapter} has {len(lonely) or 'no'} modules with {'one factor only' if lonely else 'weights'}.\n"
            f"{list_names(lonely)}\nSave it again."
        )
    return {module: _module(adapter, module, sides) for module, sides in keys.items()}


def needs_patterns(adapter: Checkpoint) -> bool:
    """Whether `r` and `lora_alpha` alone, all that some loaders read, would give modules of a plain LoRA other factors.

    Such loaders, vLLM's among them, ignore `rank_pattern` and `alpha_pattern` without a word.
    """
    config = adapter.adapter_config
    if not (config.get("rank_pattern") or config.get("alpha_pattern")):
        return False
    alpha, rank = config.get("lora_alpha", 8), config["r"]
    common = alpha / math.sqrt(rank) if config.get("use_rslora") else alpha / rank
    return any(lora.factor != common for lora in read_lora(adapter).values())


def check_config_patterns(adapter: Checkpoint, names: Iterable[str]) -> None:
    """Raise ConfigError if an expression in the config of an adapter takes too long on one of these names."""
    found: list[tuple[str, str]] = []
    for setting, value in adapter.adapter_config.items():
        if setting.endswith(("_pattern", "_modules")) or setting == "modules_to_save":
            listed = [value] if isinstance(value, str) else value or []
            found += [(pattern, setting) for pattern in listed if isinstance(pattern, str)]
    settings = ", ".join(dict.fromkeys(setting for _, setting in found))
    check_patterns(f"{settings} of {ADAPTER_CONFIG} of {adapter}", (pattern for pattern, _ in found), names)


def place_on(modules: Mapping[str, LoraModule], adapter: Checkpoint, instruct: Checkpoint) -> dict[str, LoraModule]:
    """Return name of INSTRUCT's weight -> module; every module must land.

    Raises:
        AdapterError: modules without a weight on INSTRUCT (all are named, with the nearest names) or of another shape.
    """
    placed = {f"{module}.weight": lora for module, lora in modules.items()}
    # PEFT saves the orientation of the last module only; on loading, the class of each decides.
    by_class = _has_conv1d(instruct) or any(lora.transposed for lora in placed.values())
    if by_class or not placed.keys() <= instruct.specs.keys():
        placed = _as_stored(placed, instruct, by_class)
    unmatched = [name.removesuffix(".weight") for name in placed if name not in instruct.specs]
    if unmatched:
        raise AdapterError(
            f"{len(unmatched)} of {len(placed)} modules of adapter {adapter} have no weight in instruct {instruct}.\n"
            f"{list_names(nearest_names(unmatched, instruct.specs))}\nThe adapter belongs to another architecture."
        )
    wrong = [
        f"{name}\n    adapter   {lora.stored_shape}\n    instruct  {instruct.specs[name].shape}"
        for name, lora in placed.items()
        if instruct.specs[name].shape != lora.stored_shape
    ]
    if wrong:
        raise AdapterError(
            f"{len(wrong)} of {len(placed)} modules of adapter {adapter} have another shape on instruct {instruct}.\n"
            f"{list_names(wrong)}\nGive the instruct that belongs to the adapter's base."
        )
    return placed


def nearest_names(unmatched: Iterable[str], known: Iterable[str]) -> list[str]:
    """Return a row for each unmatched name with the known name most like it, the latter for the first few only."""
    names, lines = list(known), []
    for number, name in enumerate(unmatched):
        # A search among thousands of names takes a while, and `list_names` cuts the rest.
        near = get_close_matches(name, names, n=1) if number < 10 else []
        lines.append(f"{name}  {f'nearest: {near[0]}' if near else 'nothing like it'}")
    return lines


def _has_conv1d(instruct: Checkpoint) -> bool:
    """Whether weights are stored as (in, out): a bias, which every Conv1D has, is as long as its weight has columns."""
    biases = {name.removesuffix("bias"): spec.shape for name, spec in instruct.specs.items() if name.endswith(".bias")}
    weights = ((instruct.specs.get(f"{name}weight"), shape) for name, shape in biases.items())
    return any(
        spec is not None and len(spec.shape) == 2 and spec.shape[0] != spec.shape[1] and spec.shape[1:] == shape
        for spec, shape in weights
    )


def _as_stored(placed: dict[str, LoraModule], instruct: Checkpoint, by_class: bool) -> dict[str, LoraModule]:
    """Give modules, which an adapter names as in memory, the names and orientations that their weights have on disk."""
    from ..layouts.model_names import ModelNames

    try:
        names = ModelNames.under(instruct, placed)
        if not placed.keys() <= instruct.specs.keys():
            on_disk = names.keys(instruct.specs)
            keys = {name: key for key, name in names.keys(placed).items()}
            placed = {on_disk.get(keys[name], name): lora for name, lora in placed.items()}
        linear = names.linear(instruct.specs) if by_class else {}
    except PairMismatchError:
        return placed
    return {
        name: replace(lora, transposed=linear[name].transposed) if name in linear else lora
        for name, lora in placed.items()
    }


def _module(adapter: Checkpoint, module: str, sides: Mapping[str, str]) -> LoraModule:
    config = adapter.adapter_config
    right, left = adapter.specs[sides["A"]], adapter.specs[sides["B"]]
    if len(right.shape) != 2 or len(left.shape) != 2 or right.shape[0] != left.shape[1] or not right.shape[0]:
        raise AdapterError(
            f"adapter {adapter}: {module} is not a product of two matrices, lora_A {right.shape}, lora_B {left.shape}. "
            "Merge the adapter into its own model and graft that."
        )
    rank = right.shape[0]
    stated = _by_pattern(config.get("rank_pattern"), module, config.get("r"))
    if stated is not None and stated != rank:
        raise AdapterError(
            f"adapter {adapter}: {module} has rank {rank} in the weights and {stated} in {ADAPTER_CONFIG}. "
            "Save it again."
        )
    alpha = _by_pattern(config.get("alpha_pattern"), module, config.get("lora_alpha", 8))
    if alpha is None:
        raise AdapterError(f"adapter {adapter}: lora_alpha of {ADAPTER_CONFIG} is null. Save it again.")
    factor = alpha / math.sqrt(rank) if config.get("use_rslora") else alpha / rank
    shape = (left.shape[0], right.shape[1])
    return LoraModule(module, sides["B"], sides["A"], factor, shape, bool(config.get("fan_in_fan_out")))


def _by_pattern(patterns: Mapping[str, Any] | None, module: str, default: Any) -> Any:
    # PEFT: the first key that is the name, or the end of the name after a dot, as a regular expression.
    for pattern, value in (patterns or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            return value
    return default
