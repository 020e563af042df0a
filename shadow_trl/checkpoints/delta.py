"""The folder of a delta on its own, `tuned - base`: read as one, and refused as a model.

No loader looks for its files' names, except the tokenizer's, which the checks of vocabularies need.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import CheckpointError, ConfigError
from . import hub
from .checkpoint import Checkpoint
from .header import TensorSpec
from .hub import Source, local_folder
from .json_files import read_json
from .manifest import kind_found, read_manifest
from .schemas import ModelConfig

if TYPE_CHECKING:
    import numpy

BASE_CONFIG = "base_config.json"
WEIGHTS = "delta.safetensors"
INDEX = "delta.safetensors.index.json"
TRAINED_WITH = "trained_with"
"""Folder with the chat templates of TUNED, in which nothing looks for BASE's."""


class DeltaCheckpoint(Checkpoint):
    """A delta folder whose headers were read; `config` is BASE's, `manifest` says what was subtracted from what."""

    manifest: dict[str, Any]

    @property
    def absent(self) -> frozenset[str]:
        """Names of BASE's weights that what was trained does not have: buffers, parts of a multimodal model."""
        return frozenset(self.manifest.get("without_delta", ()))

    @classmethod
    def open(cls, source: Source, revision: str | None = None, *, weights: bool = True) -> DeltaCheckpoint:
        """Read the headers of `source`, a folder or hub id that `shadow-trl delta` wrote.

        Raises:
            CheckpointError: no such folder or repository, or it holds no delta.
        """
        name, commit, path, asked = hub.locate(source, revision, weights=weights)
        manifest = read_manifest(path)
        if manifest is None or manifest["kind"] != "delta":
            raise CheckpointError(
                f"{name} is not a delta: {kind_found(manifest)}. Make one with `shadow-trl delta`, or give a model or "
                "adapter as tuned."
            )
        if manifest["form"] == "adapter":
            raise CheckpointError(f"{name} is a LoRA adapter made from a delta. Give it as tuned, not as delta.")
        delta = cls(name, commit, path, config=read_json(path / BASE_CONFIG, ModelConfig), asked=asked)
        delta.manifest = manifest
        if weights:
            delta._read_headers()
        return delta

    def _weight_names(self) -> tuple[str, ...]:
        return WEIGHTS, INDEX


class Zeros(Checkpoint):
    """Zeros under the names and shapes of another checkpoint, which take no room.

    As INSTRUCT they make a graft the delta, `0 + (tuned - base)`; as BASE, with the delta as TUNED, `instruct + delta`.
    """

    @classmethod
    def like(cls, checkpoint: Checkpoint) -> Zeros:
        """Return zeros in fp32 for every weight of `checkpoint`."""
        zeros = cls("zeros", None, Path())
        zeros.specs = {
            name: TensorSpec("F32", spec.shape, Path(), None, 4 * spec.numel) for name, spec in checkpoint.specs.items()
        }
        return zeros

    def content(self, name: str, start: int, stop: int, into: numpy.ndarray | None = None) -> numpy.ndarray:
        """Return the bytes of `stop - start` zeros, fp32."""
        import numpy

        size = 4 * (stop - start)
        known = getattr(self, "_zeros", None)
        if known is None or known.size < size:
            known = self._zeros = numpy.zeros(size, numpy.uint8)
        return known[:size]


def refuse_deltas(**sides: Source | None) -> None:
    """Raise ConfigError if one of the sides, by role, is the local folder of a delta; a LoRA made from one is not."""
    for role, source in sides.items():
        folder = None if source is None else local_folder(source)
        manifest = None if folder is None else read_manifest(folder)
        if manifest is not None and manifest["kind"] == "delta" and manifest.get("form") != "adapter":
            raise ConfigError(
                f"{role} {source} is a delta, not a model: it holds tuned - base. Add it to an instruct model with "
                f"`shadow-trl graft --delta {source} --instruct INSTRUCT --output OUTPUT`."
            )
