"""A checkpoint with changed weights beside it: only these are written, the others stay where they are."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from ..runtime.machine import check_space
from .checkpoint import Checkpoint
from .header import TensorSpec, read_header, stamp

if TYPE_CHECKING:
    from torch import Tensor


class Overlay(Checkpoint):
    """BASE with some weights changed, called in messages as what changed them.

    A changed weight is kept in fp32 where BASE has 16 bits, else in fp64: exact enough for one rounding later. `narrow`
    lists the weights whose change may hold what a cast of BASE took.
    """

    folder: Path
    before: dict[str, TensorSpec]
    narrow: list[str]

    @classmethod
    def over(cls, base: Checkpoint, source: Checkpoint, folder: Path, changes: Iterable[str] = ()) -> Overlay:
        """Return `base` without a change yet; `folder`, for what `source` changes, is made here and not removed.

        Raises:
            GraftError: the disk has no room for the weights that will change, as far as `changes` names them.
        """
        made = cls(source.source, source.revision, base.path, config=base.config, files=list(base.files))
        made.specs, made.before, made.folder, made.narrow = dict(base.specs), dict(base.specs), folder, []
        made.stamps = dict(base.stamps)
        check_space(folder, sum(base.specs[name].numel * (8 if made._is_wide(name) else 4) for name in changes))
        folder.mkdir(parents=True, exist_ok=True)
        return made

    def put(self, tensors: Mapping[str, Tensor]) -> None:
        """Change weights, by their names on disk."""
        import torch
        from safetensors.torch import save_file

        path = self.folder / f"{len(self.headers):05d}.safetensors"
        wide = {True: torch.float64, False: torch.float32}
        save_file({name: value.to(wide[self._is_wide(name)]).contiguous() for name, value in tensors.items()}, path)
        self.files.append(path)
        self.stamps[path] = stamp(path)
        self.headers[path] = read_header(path)
        self.specs.update(self.headers[path].specs)

    def _is_wide(self, name: str) -> bool:
        return name not in self.before or self.before[name].itemsize >= 4

    def detach(self, alias: str, name: str) -> None:
        """Make `alias`, which BASE stores under `name` only, a weight of its own that is as BASE has it."""
        if alias not in self.before:
            self.specs[alias] = self.before[alias] = self.before[name]
