"""Options of a graft, checked where they are made: every wrong value is an error before anything is read."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from ..checkpoints.weight_names import LINEAR
from ..errors import ConfigError

FORMATS = ("auto", "model", "adapter")
DTYPES = ("auto", "float32", "bfloat16", "float16")
ROUNDINGS = ("nearest", "stochastic")
VOCABS = ("strict", "shared")
DIGESTS = ("sha256", "none")
BASE_DTYPES = ("tuned", "float64", *DTYPES[1:])

_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


@dataclass(frozen=True)
class GraftOptions:
    """Everything `graft` can be told beside the models; see `graft` for what each option does.

    Raises:
        ConfigError: a value that the option cannot have, or options that contradict each other.

    """

    scale: float = 1.0
    instruct_scale: float = 1.0
    modules: str | Sequence[str] = "all"
    format: str = "auto"
    dtype: str = "auto"
    rounding: str = "nearest"
    seed: int = 0
    vocab: str = "strict"
    max_shard_size: int | str | None = None
    overwrite: bool = False
    untie: bool = False
    digest: str = "sha256"
    stats: bool = True
    base_dtype: str | None = None
    rank: int | None = None

    def __post_init__(self) -> None:
        for name in ("scale", "instruct_scale"):
            object.__setattr__(self, name, _finite(name, getattr(self, name)))
        for name, allowed in (("format", FORMATS), ("rounding", ROUNDINGS), ("vocab", VOCABS), ("digest", DIGESTS)):
            _one_of(name, getattr(self, name), allowed)
        object.__setattr__(self, "dtype", _dtype_name("dtype", self.dtype, DTYPES))
        if self.base_dtype is not None:
            object.__setattr__(self, "base_dtype", _dtype_name("base_dtype", self.base_dtype, BASE_DTYPES))
        object.__setattr__(self, "max_shard_size", parse_size(self.max_shard_size))
        if isinstance(self.seed, bool) or not isinstance(self.seed, int):
            raise ConfigError(f"seed must be an integer, got {self.seed!r}. Nothing was written.")
        if self.rounding == "stochastic" and self.dtype == "float32":
            raise ConfigError(
                "rounding='stochastic' has no meaning with dtype='float32': fp32 output is not rounded to 16 bits. "
                "Use rounding='nearest', or a 16-bit dtype. Nothing was written."
            )
        if self.rank is not None and (isinstance(self.rank, bool) or not isinstance(self.rank, int) or self.rank < 1):
            raise ConfigError(f"rank must be a whole number of at least 1, got {self.rank!r}. Nothing was written.")
        if self.rank is not None and self.format == "model":
            raise ConfigError("rank is of an adapter; format='model' writes dense weights. Nothing was written.")
        if self.rank is not None and self.patterns() is not None:
            raise ConfigError(
                "rank takes the whole delta of an adapter; modules would leave a part of it out. Leave one of them "
                "out. Nothing was written."
            )
        if self.format == "adapter" or self.rank is not None:
            self._check_adapter_form()
        self.patterns()

    def _check_adapter_form(self) -> None:
        wrong = [f"{name}={getattr(self, name)!r}" for name in self.dense_only()]
        if wrong:
            raise ConfigError(
                f"format='adapter' has no room for {', '.join(wrong)}: the adapter's own values are stored, not summed "
                "weights. Use format='model', or leave the option out. Nothing was written."
            )

    def dense_only(self) -> list[str]:
        """Return the names of the options set to values that only the dense form can honour."""
        plain = {"dtype": "auto", "rounding": "nearest", "instruct_scale": 1.0, "max_shard_size": None, "untie": False}
        return [name for name, value in plain.items() if getattr(self, name) != value]

    def patterns(self) -> list[re.Pattern[str]] | None:
        """Return the compiled expressions of `modules`, None for `all`."""
        given = [self.modules] if isinstance(self.modules, str) else list(self.modules)
        if given == ["all"]:
            return None
        if not given:
            raise ConfigError("modules is an empty list: nothing would be grafted. Pass 'all'. Nothing was written.")
        compiled = []
        for expression in given:
            try:
                compiled.append(re.compile(LINEAR if expression == "linear" else expression))
            except (re.error, TypeError) as error:
                raise ConfigError(
                    f"modules: {expression!r} is no regular expression ({error}). Pass 'all', 'linear' or regular "
                    "expressions that are searched in the names of weights. Nothing was written."
                ) from error
        return compiled

    def selector(self) -> Callable[[str], bool]:
        """Return the test whether a weight's name is selected by `modules`."""
        patterns = self.patterns()
        if patterns is None:
            return lambda name: True
        return lambda name: any(pattern.search(name) for pattern in patterns)

    def to_dict(self) -> dict[str, Any]:
        """Return what changes the numbers, for the manifest."""
        names = ("scale", "instruct_scale", "dtype", "rounding", "seed", "vocab", "untie", "base_dtype")
        modules = self.modules if isinstance(self.modules, str) else list(self.modules)
        rank = {} if self.rank is None else {"rank": self.rank}
        return {**{name: getattr(self, name) for name in names}, "modules": modules, **rank}


def parse_size(value: int | str | None) -> int | None:
    """Return a number of bytes from `5GB`, `500MiB` or a number; None stays None (keep the layout).

    >>> parse_size("1.5GB"), parse_size("2MiB"), parse_size(10)
    (1500000000, 2097152, 10)
    """
    if value is None:
        return None
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?i?B?)\s*", str(value), re.IGNORECASE)
    unit = match.group(2).upper() if match else None
    if match is None or unit not in _UNITS or float(match.group(1)) * _UNITS[unit] < 1:
        raise ConfigError(f"max_shard_size: {value!r} is no size. Write for example 5GB or 500MB. Nothing was written.")
    return int(float(match.group(1)) * _UNITS[unit])


def _finite(name: str, value: Any) -> float:
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = math.nan
    if isinstance(value, bool) or not math.isfinite(number):
        raise ConfigError(f"{name} must be a finite number, got {value!r}. Nothing was written.")
    return number


def _one_of(name: str, value: Any, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ConfigError(f"{name} must be one of {', '.join(allowed)}; got {value!r}. Nothing was written.")


def _dtype_name(name: str, value: Any, allowed: tuple[str, ...]) -> str:
    # A torch dtype prints as torch.bfloat16; this room does not import torch.
    text = str(value).removeprefix("torch.")
    _one_of(name, text, allowed)
    return text
