"""The start of a command: importing torch and numba without a signal or the garbage collector in the way."""

from __future__ import annotations

import gc
import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType

from .endings import undisturbed

_LARGE = {"torch", "numba"}


def import_undisturbed() -> None:
    """Let signals and the garbage collector wait while torch or numba is imported, whenever that is in this process.

    An exception that rises in torch's own start is lost in its C++ or aborts the process before it can clean up. The
    collector would walk again and again over modules that live as long as the process, at the import and once more at
    the exit: about a third of what `import torch` costs a short command.
    """
    sys.meta_path.insert(0, _Finder(_LARGE - sys.modules.keys()))


class _Finder(MetaPathFinder):
    def __init__(self, names: set[str]) -> None:
        self.names = names

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        spec = PathFinder.find_spec(name, path, target) if name in self.names else None
        if spec is not None and spec.loader is not None:
            spec.loader = _Undisturbed(spec.loader, self.names)
        return spec


class _Undisturbed(Loader):
    def __init__(self, loader: Loader, names: set[str]) -> None:
        self._loader = loader
        self._names = names

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self._names.discard(module.__name__)
        assert module.__spec__ is not None
        module.__loader__ = module.__spec__.loader = self._loader
        enabled = gc.isenabled()
        gc.disable()
        try:
            with undisturbed():
                self._loader.exec_module(module)
            if enabled:
                gc.freeze()  # what was imported is left out of later collections
        finally:
            if enabled:
                gc.enable()
