"""shadow_trl: train BASE with TRL, graft what it learnt onto INSTRUCT: `grafted = instruct + scale * (tuned - base)`.

The public names are loaded when they are first used, so that `import shadow_trl` and `shadow-trl --help` load neither
torch nor transformers.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.2.0.dev0"

# No room may have the name of a public function: importing a submodule sets an attribute of its name on the package,
# and `__getattr__` below would never be asked again.
_ROOM_OF = {
    "ShadowArguments": "training.config",
    "ShadowCPOConfig": "training.experimental",
    "ShadowCPOTrainer": "training.experimental",
    "ShadowDPOConfig": "training.config",
    "ShadowDPOTrainer": "training.trainers",
    "ShadowGRPOConfig": "training.online",
    "ShadowGRPOTrainer": "training.online",
    "ShadowKTOConfig": "training.kto",
    "ShadowKTOTrainer": "training.kto",
    "ShadowMixin": "training.mixin",
    "ShadowORPOConfig": "training.experimental",
    "ShadowORPOTrainer": "training.experimental",
    "ShadowRLOOConfig": "training.online",
    "ShadowRLOOTrainer": "training.online",
    "ShadowSFTConfig": "training.config",
    "ShadowSFTTrainer": "training.trainers",
    "extract_delta": "operations.delta",
    "gap": "operations.gap",
    "graft": "operations.graft",
    "verify": "operations.verify",
}

__all__ = [
    "ShadowArguments",
    "ShadowCPOConfig",
    "ShadowCPOTrainer",
    "ShadowDPOConfig",
    "ShadowDPOTrainer",
    "ShadowGRPOConfig",
    "ShadowGRPOTrainer",
    "ShadowKTOConfig",
    "ShadowKTOTrainer",
    "ShadowMixin",
    "ShadowORPOConfig",
    "ShadowORPOTrainer",
    "ShadowRLOOConfig",
    "ShadowRLOOTrainer",
    "ShadowSFTConfig",
    "ShadowSFTTrainer",
    "extract_delta",
    "gap",
    "graft",
    "verify",
]

if TYPE_CHECKING:
    from .operations.delta import extract_delta
    from .operations.gap import gap
    from .operations.graft import graft
    from .operations.verify import verify
    from .training.config import ShadowArguments, ShadowDPOConfig, ShadowSFTConfig
    from .training.experimental import ShadowCPOConfig, ShadowCPOTrainer, ShadowORPOConfig, ShadowORPOTrainer
    from .training.kto import ShadowKTOConfig, ShadowKTOTrainer
    from .training.mixin import ShadowMixin
    from .training.online import ShadowGRPOConfig, ShadowGRPOTrainer, ShadowRLOOConfig, ShadowRLOOTrainer
    from .training.trainers import ShadowDPOTrainer, ShadowSFTTrainer


def __getattr__(name: str) -> Any:
    if name not in _ROOM_OF:
        raise AttributeError(f"module 'shadow_trl' has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_ROOM_OF[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
