"""The folder of a delta on its own, `tuned - base`: how it is told from a model, read, and refused as one.

Nothing may load a delta as a model by accident, so its files have no name that a loader looks for: the weights are
`delta*.safetensors` and BASE's config is `base_config.json`, with which the architecture is still checked. BASE's
tokenizer files lie beside them under their own names, for the checks of vocabularies; a tokenizer alone is no model.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import CheckpointError, ConfigError
from . import hub
from .checkpoint import Checkpoint, read_json
from .header import TensorSpec
from .manifest import MANIFEST_NAME, read_manifest

if TYPE_CHECKING:
    import torch

BASE_CONFIG = "base_config.json"
WEIGHTS = "delta.safetensors"
INDEX = "delta.safetensors.index.json"


class DeltaCheckpoint(Checkpoint):
    """A delta folder whose headers were read; `config` is BASE's, `manifest` says what was subtracted from what."""

    manifest: dict[str, Any]

    @classmethod
    def open(
        cls, source: str | os.PathLike[str], revision: str | None = None, *, weights: bool = True
    ) -> DeltaCheckpoint:
        """Read the headers of `source`, a folder or hub id that `shadow-trl delta` wrote.

        Raises:
            CheckpointError: no such folder or repository, or it holds no delta.
        """
        name, revision, path = hub.locate(source, revision, weights=weights)
        manifest = read_manifest(path)
        if manifest is None or manifest["kind"] != "delta":
            found = f"its {MANIFEST_NAME} is of kind {manifest['kind']}" if manifest else f"it has no {MANIFEST_NAME}"
            raise CheckpointError(
                f"{name} is no delta: {found}. Make one with `shadow-trl delta`, or give a model or adapter as tuned. "
                "Nothing was written."
            )
        if manifest["form"] == "adapter":
            raise CheckpointError(
                f"{name} is a LoRA adapter made from a delta. Give it as tuned, not as delta. Nothing was written."
            )
        delta = cls(name, revision, path)
        delta.config = read_json(path / BASE_CONFIG)
        delta.manifest = manifest
        if weights:
            delta._read_headers()
        return delta

    def _weight_files(self) -> tuple[list[Path], str | None]:
        if (self.path / WEIGHTS).is_file():
            return [hub.inside(self.path, WEIGHTS)], None
        weight_map = read_json(self.path / INDEX).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise CheckpointError(f"{self} has no weights: neither {WEIGHTS} nor {INDEX}. Fetch or make it again.")
        return [hub.inside(self.path, str(file)) for file in dict.fromkeys(weight_map.values())], INDEX


class Zeros(Checkpoint):
    """Zeros under the names and shapes of another checkpoint: they take no room.

    With zeros as INSTRUCT the engine of a graft writes `0 + (tuned - base)`, the delta; with zeros as BASE and the
    delta as TUNED it writes `instruct + (delta - 0)`, the graft.
    """

    @classmethod
    def like(cls, checkpoint: Checkpoint) -> Zeros:
        """Return zeros in fp32 for every weight of `checkpoint`."""
        zeros = cls("zeros", None, Path())
        zeros.specs = {
            name: TensorSpec("F32", spec.shape, Path(), None, 4 * spec.numel) for name, spec in checkpoint.specs.items()
        }
        return zeros

    def block(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Return `stop - start` zeros, fp32."""
        import torch

        found = self._views.get("")
        if found is None or found.numel() < stop - start:
            found = self._views[""] = torch.zeros(stop - start)
        return found[: stop - start]

    def release(self, name: str, start: int, stop: int) -> None:
        """Do nothing: no page of a file is held."""


def is_delta(source: str | os.PathLike[str] | None) -> bool:
    """Whether `source` is a local folder that holds a delta on its own (a LoRA made from one is an adapter)."""
    manifest = read_manifest(source) if source is not None and Path(source).is_dir() else None
    return manifest is not None and manifest["kind"] == "delta" and manifest.get("form") != "adapter"


def refuse_deltas(**sides: str | os.PathLike[str] | None) -> None:
    """Raise ConfigError if one of the sides, by role, is the folder of a delta."""
    for role, source in sides.items():
        if is_delta(source):
            raise ConfigError(
                f"{role} {source} is a delta, not a model: it holds tuned - base. Add it to an instruct model with "
                f"`shadow-trl graft --delta {source} --instruct INSTRUCT --output OUTPUT`. Nothing was written."
            )
