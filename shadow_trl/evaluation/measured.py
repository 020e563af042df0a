"""The arms of a comparison: what each model was made with, and the values of its rows."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from .exam import Values

ARMS = {
    "instruct": "INSTRUCT untouched",
    "direct": "INSTRUCT tuned directly",
    "shadow": "the graft: INSTRUCT + scale * (TUNED - BASE)",
    "re-adapt": "the graft on INSTRUCT times its instruct scale: scale * TUNED + b * INSTRUCT + (1 - scale - b) * BASE",
    "chat-vector": "TUNED + scale * (INSTRUCT - BASE)",
}
"""The arms by the names that they have everywhere, and what each is."""


@dataclass(frozen=True)
class Settings:
    """What an arm was made with; None where that does not apply.

    Args:
        arm: `instruct`, `direct`, `shadow`, `re-adapt` or `chat-vector`.
        learning_rate: of the training.
        scale: multiplier of what training changed.
        modules: weights that receive the delta.
        ref_policy: of DPO.
        instruct_scale: multiplier of INSTRUCT, where it is not 1.
        guidance_power: of SFT that INSTRUCT guided.
    """

    arm: str
    learning_rate: float | None = None
    scale: float | None = None
    modules: str | None = None
    ref_policy: str | None = None
    instruct_scale: float | None = None
    guidance_power: float | None = None

    def words(self) -> str:
        """Return the settings beside the arm, as a table shows them."""
        said = [f"rate {self.learning_rate:g}"] if self.learning_rate is not None else []
        said += [f"scale {self.scale:g}"] if self.scale is not None else []
        said += [self.modules] if self.modules is not None and self.modules != "all" else []
        said += [f"instruct scale {self.instruct_scale:g}"] if self.instruct_scale is not None else []
        said += [f"reference {self.ref_policy}"] if self.ref_policy is not None else []
        said += [f"guidance {self.guidance_power:g}"] if self.guidance_power is not None else []
        return ", ".join(said)


@dataclass(frozen=True)
class Measured:
    """One model with the values of its rows.

    Args:
        settings: what it was made with.
        values: split -> values of the rows.
        pair: name of the pair.
        seed: of the training; None where nothing was trained, or it is not known.
        seconds: what the model cost by kind of work: `make` and `score`.
        dtype: torch name of that of most of its weights; None for INSTRUCT as stored.
        rounding: how they were rounded to it.
    """

    settings: Settings
    values: Mapping[str, Values]
    pair: str
    seed: int | None = None
    seconds: Mapping[str, float] = field(default_factory=dict)
    dtype: str | None = None
    rounding: str | None = None

    @property
    def precision(self) -> str | None:
        """The dtype, and the rounding where it is not to nearest."""
        return self.dtype if self.rounding in (None, "nearest") else f"{self.dtype} ({self.rounding} rounding)"

    @property
    def training(self) -> tuple[str, int | None]:
        """Which training it is of."""
        return self.pair, self.seed
