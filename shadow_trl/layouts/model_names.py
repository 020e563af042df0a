"""Names and layouts of weights as transformers knows them; imported only where checkpoints differ in layout.

transformers 5 renames and reshapes weights on load, and saving undoes it: TUNED has its BASE's layout, not INSTRUCT's.
Its own rules, on a model without memory (meta device), say what a weight becomes in memory and back on disk.
"""

from __future__ import annotations

import json
import logging
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from copy import deepcopy
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..checkpoints.checkpoint import Checkpoint
from ..checkpoints.header import CODES, TensorSpec
from ..errors import PairMismatchError, list_names

logger = logging.getLogger(__name__)

LAYER = re.compile(r"(.*?\.\d+)\.")
"""The layer that a weight is in; few conversions reach over layers."""
SHARD_BYTES = 2 * 2**30
"""Size of the files of a normalised checkpoint; with one block of the model, the memory that normalising needs."""


class LinearModule(NamedTuple):
    """A linear module by its name in memory, and whether its weight is stored as (in, out), as in Conv1D."""

    name: str
    transposed: bool


class _Placed(NamedTuple):
    """A weight on disk, its key, its name in memory, and the pattern of its converter where it is reshaped as well."""

    name: str
    key: str
    place: str
    pattern: str | None


class ModelNames:
    """The names and layouts that transformers gives to the weights of one architecture.

    Args:
        checkpoint: its config.json says which model class; no weight is read and no code of the checkpoint is run.
        text: whether the text-only class of a multimodal model is meant. Default False.

    Raises:
        PairMismatchError: transformers has no class for this config.
    """

    def __init__(self, checkpoint: Checkpoint, *, text: bool = False) -> None:
        self.text = text
        self.model, self._auto = _empty_model(checkpoint, text)
        self.memory = {name: tuple(tensor.shape) for name, tensor in self.model.state_dict().items()}

    @classmethod
    def under(cls, checkpoint: Checkpoint, adapted: Iterable[str]) -> ModelNames:
        """Return the names of the class that an adapter was trained on: the text-only one where it has more of them.

        Args:
            checkpoint: the model under the adapter, or INSTRUCT.
            adapted: names in memory of weights that the adapter may be on.
        """
        whole, wanted = cls(checkpoint), set(adapted)
        if "text_config" not in checkpoint.config or wanted <= whole.memory.keys():
            return whole
        with suppress(PairMismatchError):
            text = cls(checkpoint, text=True)
            # Other text classes load nothing from a whole model: no adapter on them was trained on this one.
            if type(text.model) is text._auto and len(wanted & text.memory.keys()) > len(wanted & whole.memory.keys()):
                return text
        return whole

    @property
    def ties(self) -> dict[str, str]:
        """In-memory name -> in-memory name whose weight it may share (lm_head -> embeddings), tied or not by config."""
        patterns = self.model._tied_weights_keys
        patterns = patterns if isinstance(patterns, dict) else {}
        return {alias: source for alias, source in patterns.items() if {alias, source} <= self.memory.keys()}

    def ignores(self, key: str) -> bool:
        """Whether transformers drops `key` on load by a rule of this architecture (extra layers for drafts, ...)."""
        patterns = getattr(self.model, "_keys_to_ignore_on_load_unexpected", None) or ()
        return key not in self.memory and any(re.search(pattern, key) for pattern in patterns)

    def unknown(self, names: Iterable[str]) -> frozenset[str]:
        """Return the keys of those on-disk names that are no weight of the model: it neither loads nor saves them."""
        return frozenset(at.key for at in self._placed(names)[0] if at.place not in self.memory)

    def keys(self, names: Iterable[str]) -> dict[str, str]:
        """Return key -> on-disk name: names with prefixes and legacy spellings brought to those in memory.

        Weights that loading would reshape as well (single experts) keep a key of their own, so two checkpoints that
        both store them singly still match one by one.

        Raises:
            PairMismatchError: two names on disk are the same weight in memory.
        """
        keys: dict[str, str] = {}
        for at in self._placed(names)[0]:
            if at.key in keys:
                raise PairMismatchError(
                    f"cannot graft: two weights of one checkpoint are the same weight in memory, {at.key}.\n"
                    f"{list_names([keys[at.key], at.name])}\nRemove one of them from the checkpoint."
                )
            keys[at.key] = at.name
        return keys

    def to_memory(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return on-disk `tensors` under the names and in the shapes of memory; meta tensors work too."""
        placed, rules = self._placed(tensors)
        converters = {p: rule for rule in rules if hasattr(rule, "operations") for p in rule.source_patterns}
        memory = {at.place: tensors[at.name] for at in placed if at.pattern is None}
        steps: dict[str, Any] = {}
        for at in placed:
            if at.pattern is not None:
                if at.place not in steps:
                    steps[at.place] = deepcopy(converters[at.pattern])
                steps[at.place].add_tensor(at.place, at.name, at.pattern, tensors[at.name])
        for place, step in steps.items():
            made = step.convert(place, model=self.model, config=self.model.config)
            memory.update({key: value[0] if isinstance(value, list) else value for key, value in made.items()})
        return memory

    def to_disk(self, memory: Mapping[str, Tensor], rules: list[Any]) -> dict[str, Tensor]:
        """Return in-memory tensors as transformers saves a model that it loaded by `rules` (see `rules_of`)."""
        from transformers.core_model_loading import revert_weight_conversion

        self.model._weight_conversions = rules
        return dict(revert_weight_conversion(self.model, dict(memory)))

    def rules_of(self, names: Iterable[str] | None) -> list[Any]:
        """Return the rules that loading a checkpoint with these on-disk names uses; none for None (as in memory)."""
        return [] if names is None else [rule for rule in self._placed(names)[1] if rule.was_used()]

    def linear(self, names: Iterable[str]) -> dict[str, LinearModule]:
        """Return on-disk name -> module of the weights that belong to a linear one, as PEFT tells by its class.

        The router of a mixture and its fused experts look like one on disk.
        """
        from transformers.pytorch_utils import Conv1D

        found = {
            f"{name}.weight": LinearModule(name, isinstance(module, Conv1D))
            for name, module in self.model.named_modules()
            if isinstance(module, (torch.nn.Linear, Conv1D))
        }
        return {name: found[key] for key, name in self.keys(names).items() if key in found}

    def groups(self, names: Iterable[str]) -> dict[str, list[str]]:
        """Return in-memory name -> on-disk names of the weights that loading makes it of."""
        groups: dict[str, list[str]] = {}
        for at in self._placed(names)[0]:
            groups.setdefault(at.place, []).append(at.name)
        return groups

    def _placed(self, names: Iterable[str]) -> tuple[list[_Placed], list[Any]]:
        """Return where each name goes, and the rules that were used.

        This follows the first steps of transformers' `convert_and_load_state_dict_in_model`.
        """
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter, dot_natural_key, rename_source_key

        rules = get_model_conversion_mapping(self.model)  # fresh: rules remember what they have seen
        renamings: list[Any] = [rule for rule in rules if not isinstance(rule, WeightConverter)]
        converters = [rule for rule in rules if isinstance(rule, WeightConverter)]
        prefix = self.model.base_model_prefix
        placed = []
        for name in sorted(names, key=dot_natural_key):
            place, pattern = rename_source_key(name, renamings, converters, prefix, self.memory)
            if place not in self.memory and name in self.memory:
                place, pattern = rename_source_key(name, [], [], prefix, self.memory)
            key = place
            if pattern is not None:
                key = rename_source_key(name, renamings, [])[0]
                key = f"{prefix}.{key}" if place.startswith(f"{prefix}.") and not key.startswith(f"{prefix}.") else key
            placed.append(_Placed(name, key, place, pattern))
        return placed, rules


def _empty_model(checkpoint: Checkpoint, text: bool) -> tuple[Any, type | None]:
    """Build the model of a checkpoint's config, or of its text config, without memory for its weights.

    Returns:
        the model, and the class that `AutoModelForCausalLM` gives for the whole config; None where it knows none.
    """
    import transformers
    from transformers.initialization import meta_device_safe_creation_ops, no_tie_weights

    try:
        config = transformers.AutoConfig.from_pretrained(checkpoint.path, trust_remote_code=False)
        mapping = transformers.AutoModelForCausalLM._model_mapping
        auto: Any = mapping.get(type(config), None)
        model_class: Any = getattr(transformers, (config.architectures or [""])[0], None)
        if text:
            config, model_class = config.get_text_config(), None
        if model_class is None:
            model_class = mapping[type(config)]
        with torch.device("meta"), meta_device_safe_creation_ops(), no_tie_weights():
            return model_class(config), auto
    except (KeyError, ValueError, OSError, ImportError, TypeError, AttributeError) as error:
        raise PairMismatchError(
            f"transformers cannot tell how the names differ: it has no class for the config of {checkpoint} ({error})."
        ) from error


def predicted(names: ModelNames, checkpoint: Checkpoint, like: Iterable[str] | None) -> dict[str, TensorSpec]:
    """Return what `normalise` would write, name -> shape and dtype, without reading a weight.

    Raises:
        PairMismatchError: transformers' rules do not fit these weights (some of a group are missing, other shapes).
    """
    try:
        made = names.to_disk(names.to_memory(_meta(checkpoint)), names.rules_of(like))
    except Exception as error:  # whatever an operation raises on shapes that it was not made for
        raise PairMismatchError(
            f"transformers cannot convert the layout of {checkpoint}: {type(error).__name__}: {error}"
        ) from error
    codes = {name: CODES[str(tensor.dtype).removeprefix("torch.")] for name, tensor in made.items()}
    return {name: TensorSpec(codes[name], tuple(t.shape), Path(), None, t.nbytes) for name, t in made.items()}


def _meta(checkpoint: Checkpoint) -> dict[str, Tensor]:
    specs = checkpoint.specs.items()
    return {name: torch.empty(spec.shape, dtype=spec.dtype, device="meta") for name, spec in specs}


def normalise(checkpoint: Checkpoint, folder: Path, *, names: ModelNames, like: Iterable[str] | None) -> Checkpoint:
    """Write `checkpoint` into `folder` in the layout of another of its architecture, with values and dtypes as stored.

    Weights go through memory block by block, so that the whole model is held only where a conversion needs it.

    Args:
        checkpoint: what to convert.
        folder: new or empty; it takes as much space as the checkpoint.
        names: names of the architecture.
        like: on-disk names in the layout that is wanted; None for the layout in memory, which transformers loads too.

    Raises:
        PairMismatchError: what came out is not what transformers' rules announced.
    """
    rules, wanted = names.rules_of(like), predicted(names, checkpoint, like)
    blocks = _blocks(names, checkpoint, rules, wanted)
    sizes = [sum(checkpoint.specs[name].nbytes for name in block) for block in blocks]
    logger.warning(
        "%s has another layout of weights: writing a converted copy of %.1f GB to %s, with up to %.1f GB in memory.",
        checkpoint, sum(sizes) / 1e9, folder, min(2 * sum(sizes), SHARD_BYTES + 2 * max(sizes)) / 1e9,
    )  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True)
    # From memory, not from the file: a delta has no config.json of its own.
    (folder / "config.json").write_text(json.dumps(checkpoint.config), encoding="utf-8")
    _write_shards(_converted(names, checkpoint, rules, blocks), folder)
    result = Checkpoint.open(str(folder))
    result.before = checkpoint.before
    announced, written = ({(name, spec.shape) for name, spec in found.items()} for found in (wanted, result.specs))
    other = sorted({name for name, _ in announced ^ written})
    if other:
        raise PairMismatchError(
            f"cannot convert the layout of {checkpoint}: {len(other)} weights came out otherwise than announced.\n"
            f"{list_names(other)}"
        )
    return result


def _converted(
    names: ModelNames, checkpoint: Checkpoint, rules: list[Any], blocks: list[list[str]]
) -> Iterator[tuple[str, Tensor]]:
    for block in blocks:
        tensors = {name: checkpoint.tensor(name) for name in block}
        yield from names.to_disk(names.to_memory(tensors), rules).items()


def _blocks(
    names: ModelNames, checkpoint: Checkpoint, rules: list[Any], wanted: Mapping[str, TensorSpec]
) -> list[list[str]]:
    """Group names by the layer that they are in, or all together where a conversion reaches over layers."""
    blocks: dict[str, list[str]] = defaultdict(list)
    for name in checkpoint.specs:
        layer = LAYER.match(name)
        blocks[layer.group(1) if layer else ""].append(name)
    meta = _meta(checkpoint)
    apart: dict[str, Tensor] = {}
    try:
        for block in blocks.values():
            apart |= names.to_disk(names.to_memory({name: meta[name] for name in block}), rules)
    except Exception:  # an operation met a part of its group only
        return [list(checkpoint.specs)]
    same = {n: spec.shape for n, spec in wanted.items()} == {n: tuple(t.shape) for n, t in apart.items()}
    return list(blocks.values()) if same else [list(checkpoint.specs)]


def _write_shards(tensors: Iterable[tuple[str, Tensor]], folder: Path) -> None:
    from safetensors.torch import save_file

    weight_map: dict[str, str] = {}
    shard: dict[str, Tensor] = {}
    total = 0

    def write() -> None:
        file = f"model-{len(set(weight_map.values())) + 1:05d}.safetensors"
        save_file(shard, folder / file, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(shard, file))
        shard.clear()

    for name, tensor in tensors:
        own = tensor.contiguous()
        if shard and sum(value.nbytes for value in shard.values()) + own.nbytes > SHARD_BYTES:
            write()
        shard[name] = own
        total += own.nbytes
    write()
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2), encoding="utf-8")
