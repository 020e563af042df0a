"""Before a training: is the machine ready, does the pair fit, how far apart is it, and what will training take?"""

from __future__ import annotations

import os
import platform
import shutil
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from ..checkpoints.checkpoint import Checkpoint
from ..checkpoints.hub import Source
from ..checkpoints.manifest import versions
from ..checkpoints.weight_names import is_of_tokens, is_tied, layer_of
from ..errors import ShadowError
from ..pair.pairs import ModelPair
from ..runtime.needs import GPU, USED, Needs, Shape, gigabytes
from .checks import check_graft
from .gap import gap

_PLACE = ".shadow-doctor"


@dataclass(frozen=True)
class Doctor:
    """What `doctor` found.

    Args:
        versions: of Python and the packages.
        devices: accelerators by `name`, each with its bytes of `memory` where they are known; empty on a CPU.
        processors: how many this process may use.
        free_disk: bytes free where the current folder is.
        fails: what would keep a training or its graft from succeeding; empty where nothing is known to.
        warnings: what the user should know.
        sigma: see `gap`; None where it could not be measured.
        gpu_memory: bytes of a GPU that `needs` reckons with.
        needs: training -> bytes of memory of one GPU (`memory`), how many GPUs are enough (`gpus`; None: no number of
            them), of the host (`host`), and of the disk (`disk`).
    """

    versions: dict[str, str]
    devices: list[dict[str, Any]]
    processors: int
    free_disk: int
    fails: list[str]
    warnings: list[str]
    sigma: float | None
    gpu_memory: float
    needs: dict[str, dict[str, Any]] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Return everything in types that JSON knows."""
        return asdict(self)

    def text(self) -> str:
        """Return the report as lines for a terminal."""
        names = [
            f"{one['name']} ({gigabytes(one['memory'])} GB)" if one["memory"] else one["name"] for one in self.devices
        ]
        lines = [
            "  ".join(f"{name} {version}" for name, version in self.versions.items()),
            f"devices: {', '.join(names) or 'CPU alone'}; {self.processors} processors; "
            f"{gigabytes(self.free_disk)} GB free on the disk here",
        ]
        lines += [f"would fail: {text}" for text in self.fails] or ["pair: nothing is known that would fail"]
        if self.sigma is not None:
            lines.append(f"sigma {self.sigma:.4g} (pairs of one family lie below 0.05)")
        head = f"{'':12}{'GPU memory':>12}{'GPUs':>6}{'host':>8}{'TUNED':>8}{'checkpoint':>12}{'graft':>8}{'disk':>8}"
        rows = [
            f"{name:12}{gigabytes(one['memory']):>12}{one['gpus'] or '-':>6}{gigabytes(one['host']):>8}"
            + "".join(f"{gigabytes(one['disk'][part]):>{width}}" for part, width in _WIDTHS.items())
            + f"{gigabytes(sum(one['disk'].values())):>8}"
            for name, one in self.needs.items()
        ]
        told = (
            f"GB, worked out (docs/scale.md); memory of one GPU for one row; GPUs of {gigabytes(self.gpu_memory)} GB, "
            f"{USED:.0%} used"
        )
        return "\n".join([*lines, "", head, *rows, told] if rows else lines)


_WIDTHS = {"TUNED": 8, "checkpoint": 12, "graft": 8}


def doctor(base: Source, instruct: Source, *, max_length: int = 1024, rank: int = 16, progress: bool = True) -> Doctor:
    """Look at the machine and the pair before a training, which reads both models once.

    Args:
        base: folder or hub id of BASE, either with `@revision` if wished.
        instruct: the same for INSTRUCT.
        max_length: tokens of a sequence, for the memory. Default 1024.
        rank: of the LoRA, on all linear layers. Default 16.
        progress: whether to show a bar on a terminal. Default True.

    Raises:
        InputError: a side is missing or cannot be read. What is wrong with the pair is reported, not raised.
    """
    pair = ModelPair(Checkpoint.open(base), Checkpoint.open(instruct))
    fails, warnings = _findings(pair)
    found = {"python": platform.python_version(), **versions()}
    devices, sigma = _devices(), None
    memory = min((one["memory"] for one in devices if one["memory"]), default=GPU)
    try:
        sigma = gap(base, instruct, progress=progress).sigma
    except ShadowError as error:
        fails += [] if fails else [_text(error)]
    return Doctor(
        found, devices, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
        shutil.disk_usage(Path.cwd()).free, list(dict.fromkeys(fails)), list(dict.fromkeys(warnings)), sigma, memory,
        _needs(pair.base, max_length, rank, memory),
    )  # fmt: skip


def _findings(pair: ModelPair) -> tuple[list[str], list[str]]:
    """Return what would fail of a pair, and the warnings."""
    fails: list[str] = []
    warnings: list[str] = []

    def tried(check: Callable[[], list[str] | None]) -> None:
        try:
            warnings.extend(check() or [])
        except ShadowError as error:
            fails.append(_text(error))

    tried(lambda: pair.check(level="headers", need_template=True))
    if not fails:
        base, instruct = str(pair.base), str(pair.instruct)
        for adapter in (False, True):
            tried(partial(check_graft, base=base, instruct=instruct, output=Path(_PLACE), adapter=adapter))
    return fails, warnings


def _text(error: ShadowError) -> str:
    return str(error.args[0]) if error.args else str(error)


def _devices() -> list[dict[str, Any]]:
    import torch

    if not torch.accelerator.is_available():
        return []
    if not torch.cuda.is_available():  # others do not say what they have
        kind = str(torch.accelerator.current_accelerator())
        return [{"name": kind, "memory": None}] * torch.accelerator.device_count()
    found = map(torch.cuda.get_device_properties, range(torch.cuda.device_count()))
    return [{"name": one.name, "memory": one.total_memory} for one in found]


def _needs(base: Checkpoint, max_length: int, rank: int, memory: float) -> dict[str, dict[str, Any]]:
    """Return what each training of BASE takes; {} where its config does not say how wide it is."""
    shape = shape_of(base)
    if shape is None:
        return {}
    found = {}
    for trainer, rows in (("SFT", 1), ("DPO", 2)):
        for form, trained in (("full", shape.weights), ("LoRA", adapter_size(base, rank))):
            is_full = form == "full"
            # TRL loads weights that are trained in fp32, and the recipes those under an adapter in bf16.
            needs = Needs(shape, trained, is_full, 4 if is_full else 2, rows * max_length, trainer == "DPO")
            found[f"{trainer}, {form}"] = {
                "memory": needs.memory(1),
                "gpus": needs.gpus_of(memory),
                "host": needs.host,
                "disk": needs.disk(),
            }
    return found


def shape_of(model: Checkpoint) -> Shape | None:
    """Return the sizes of a model, by its headers and its config; None where the config lacks a width."""
    config = {**model.config, **(model.config.get("text_config") or {})}
    sizes = {name: spec.numel for name, spec in _stored(model)}
    hidden, inner = config.get("hidden_size"), config.get("moe_intermediate_size") or config.get("intermediate_size")
    heads = config.get("num_attention_heads")
    layers: dict[str, int] = {}
    for name, size in sizes.items():
        if (layer := layer_of(name)).rpartition(".")[2].isdigit():
            layers[layer] = layers.get(layer, 0) + size
    if not (hidden and inner and heads and layers):
        return None
    width = config.get("head_dim") or hidden // heads
    queries_and_keys = (heads + (config.get("num_key_value_heads") or heads)) * width
    number = config.get("num_hidden_layers") or len(layers)
    block = max(layers.values())
    weights = sum(sizes.values())
    inner *= config.get("num_experts_per_tok") or 1
    return Shape(weights, min(block, weights // number), number, hidden, inner, queries_and_keys)


def adapter_size(model: Checkpoint, rank: int) -> int:
    """Return the weights of a LoRA of `rank` on the matrices of the layers, those of each expert too."""
    matrices = [spec.shape for name, spec in _stored(model) if not is_of_tokens(name) and 1 < len(spec.shape) < 4]
    return sum(rank * (shape[-1] + shape[-2]) * (shape[0] if len(shape) == 3 else 1) for shape in matrices)


def _stored(model: Checkpoint) -> Iterator[tuple[str, Any]]:
    """Yield name and place of each weight; a head that is tied to the embedding is no weight of its own."""
    tied = is_tied(model.config)
    for name, spec in model.specs.items():
        if spec.is_float and not (tied and name.endswith("lm_head.weight")):
            yield name, spec
