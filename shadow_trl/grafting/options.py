"""Options of a graft, each declared once: the command line, the trainers' configs and the manifest follow from it."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import partial
from typing import Any

from ..checkpoints.weight_names import NAMED
from ..errors import ConfigError, one_of

DTYPES = ("auto", "float32", "bfloat16", "float16")
BASE_DTYPES = ("tuned", "float64", *DTYPES[1:])

_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


@dataclass(frozen=True)
class Option:
    """What is known about an option of the graft beside its name and type.

    Args:
        default: its value where none is given.
        help: one line for `--help`.
        choices: the only values that it can have; dtypes of torch are taken by their names. Default: any value.
        check: takes the name under which the user knows the option and a value; returns the value as it is kept, or
            raises ConfigError. Default: every value is kept as it is.
        flags: further arguments for `argparse.ArgumentParser.add_argument`.
        argument: its name in the configs of the trainers. Default None: they do not have it.
        recorded: whether the manifest has it, as what the weights and their files depend on. Default False.
        dense_only: whether dense weights alone can honour another value than the default. Default False.
        of_any_form: values beside the default that an adapter honours too, of a `dense_only` option. Default: none.

    """

    default: Any
    help: str
    choices: tuple[str, ...] | None = None
    check: Callable[[str, Any], Any] | None = None
    flags: Mapping[str, Any] = field(default_factory=dict)
    argument: str | None = None
    recorded: bool = False
    dense_only: bool = False
    of_any_form: tuple[Any, ...] = ()

    def checked(self, name: str, value: Any) -> Any:
        """Return `value` as it is kept; raise ConfigError, with `name`, for one that the option cannot have."""
        if value is None and self.default is None:
            return None
        if self.choices is not None:
            # A torch dtype prints as torch.bfloat16; torch is not imported here.
            return one_of(name, str(value).removeprefix("torch."), self.choices)
        if isinstance(self.default, bool) and not isinstance(value, bool):
            raise ConfigError(f"{name} must be true or false, got {value!r}.")
        return value if self.check is None else self.check(name, value)


def parse_size(name: str, value: int | str) -> int:
    """Return a number of bytes from `5GB`, `500MiB` or a number; `name` is that of the option, for the error.

    >>> parse_size("", "1.5GB"), parse_size("", "2MiB"), parse_size("", 10)
    (1500000000, 2097152, 10)
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?i?B?)\s*", str(value), re.IGNORECASE)
    unit = match.group(2).upper() if match else None
    if match is None or unit not in _UNITS or float(match.group(1)) * _UNITS[unit] < 1:
        raise ConfigError(f"{name}: {value!r} is not a valid size. Write it like 5GB or 500MB.")
    return int(float(match.group(1)) * _UNITS[unit])


def _finite(name: str, value: Any) -> float:
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if isinstance(value, bool) or not math.isfinite(number):
        raise ConfigError(f"{name} must be a finite number, got {value!r}.")
    return number


def _integer(name: str, value: Any, least: float = -math.inf) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        wanted = "an integer" if least == -math.inf else f"a whole number of at least {least}"
        raise ConfigError(f"{name} must be {wanted}, got {value!r}.")
    return value


def _modules(name: str, value: str | Sequence[str]) -> str | list[str]:
    """Check every expression; a list of one is kept as that one."""
    if not value:
        raise ConfigError(f"{name} is an empty list or text: it selects nothing. Pass 'all'.")
    given: list[Any] = list(value) if isinstance(value, (list, tuple)) else [value]
    for expression in given:
        try:
            re.compile(expression)
        except (re.error, TypeError, RecursionError, OverflowError) as error:
            raise ConfigError(
                f"{name}: {expression!r} is not a regular expression ({error}). Pass 'all', "
                f"{', '.join(map(repr, NAMED))}, or regular expressions that are searched in the names of weights."
            ) from error
    return given if len(given) > 1 else given[0]


def _dtypes(name: str, value: Any) -> str | list[str]:
    """Check one dtype, or several that followed each other; a list of them stays one."""
    names = [one_of(name, str(item).removeprefix("torch."), BASE_DTYPES)
             for item in (value if isinstance(value, (list, tuple)) else [value])]  # fmt: skip
    return names if isinstance(value, (list, tuple)) else names[0]


def _option(default: Any, text: str, **known: Any) -> Any:
    return field(default=default, metadata={"option": Option(default, text, **known)})


@dataclass(frozen=True)
class GraftOptions:
    """Everything `graft` accepts beside the models; see `graft` for what each option does.

    Raises:
        ConfigError: a value that the option cannot have, or options that contradict each other.

    """

    scale: float = _option(
        1.0, "multiplier of the delta",
        check=_finite, flags={"type": float, "metavar": "A"}, argument="graft_scale", recorded=True,
    )  # fmt: skip
    instruct_scale: float = _option(
        1.0, "multiplier b of INSTRUCT in a*T + b*I + (1-a-b)*B", check=_finite,
        flags={"type": float, "metavar": "B"}, argument="instruct_scale", recorded=True, dense_only=True,
    )  # fmt: skip
    modules: str | Sequence[str] = _option(
        "all", f"weights that receive the delta: all, {', '.join(NAMED)}, or expressions searched in their names",
        check=_modules, flags={"nargs": "+", "metavar": "M"}, argument="graft_modules", recorded=True,
    )  # fmt: skip
    format: str = _option(
        "auto", "form of the result: dense weights or an adapter",
        choices=("auto", "model", "adapter"), argument="graft_format",
    )  # fmt: skip
    dtype: str = _option(
        "auto", "dtype of the result; auto: that of each INSTRUCT weight, or what `rounding` chooses",
        choices=DTYPES, argument="graft_dtype", recorded=True, dense_only=True,
    )  # fmt: skip
    rounding: str = _option(
        "auto", "how sums are rounded; auto: to nearest, unless that loses a small delta: then stochastic, or float32",
        choices=("auto", "nearest", "stochastic"), argument="graft_rounding", recorded=True, dense_only=True,
        of_any_form=("nearest",),
    )  # fmt: skip
    seed: int = _option(
        0, "seed of stochastic rounding", check=_integer, flags={"type": int}, argument="graft_seed", recorded=True
    )
    vocab: str = _option(
        "strict", "if only one side has some token rows: refuse, or graft the rows that both share",
        choices=("strict", "shared"), argument="graft_vocab", recorded=True,
    )  # fmt: skip
    chat_template: str = _option(
        "instruct", "chat template of the result: INSTRUCT's, or the one TUNED was trained with (in its folder)",
        choices=("instruct", "trained"), argument="graft_chat_template", recorded=True,
    )  # fmt: skip
    max_shard_size: int | str | None = _option(
        None, "size of the largest file, such as 5GB; default: the files of INSTRUCT",
        check=parse_size, flags={"metavar": "SIZE"}, recorded=True, dense_only=True,
    )  # fmt: skip
    overwrite: bool = _option(False, "replace an existing graft", argument="graft_overwrite")
    untie: bool = _option(False, "allow a tied INSTRUCT to get a head of its own", recorded=True, dense_only=True)
    digest: str = _option("xxh3", "digest of the inputs, recorded in shadow.json", choices=("xxh3", "sha256", "none"))
    stats: bool = _option(True, "measure sigma, realised, noise")
    processes: int = _option(
        1, "processes on this machine that write the result; faster only on a parallel file system",
        check=partial(_integer, least=1), flags={"type": int, "metavar": "N"},
    )  # fmt: skip
    base_dtype: str | Sequence[str] | None = _option(
        None, "dtype in which training loaded BASE; default: what TUNED's run recorded, else that of BASE's files",
        check=_dtypes, flags={"metavar": "|".join(BASE_DTYPES)}, recorded=True,
    )  # fmt: skip
    rank: int | None = _option(
        None, "write the closest LoRA of this rank, for an adapter that has no exact form on INSTRUCT",
        check=partial(_integer, least=1), flags={"type": int, "metavar": "R"}, recorded=True,
    )  # fmt: skip

    def __post_init__(self) -> None:
        for name, option in declared().items():
            object.__setattr__(self, name, option.checked(name, getattr(self, name)))
        if self.rounding == "stochastic" and self.dtype == "float32":
            raise ConfigError(
                "rounding='stochastic' has no meaning with dtype='float32': fp32 output is not rounded to 16 bits. "
                "Use rounding='nearest', or a 16-bit dtype."
            )
        if self.rank is not None and self.format == "model":
            raise ConfigError("rank is of an adapter; format='model' writes dense weights.")
        if self.rank is not None and self.patterns() is not None:
            raise ConfigError(
                "rank takes the whole delta of an adapter; modules would leave a part of it out. Leave one of them out."
            )
        wrong = [f"{name}={getattr(self, name)!r}" for name in self.dense_only()]
        if wrong and (self.format == "adapter" or self.rank is not None):
            raise ConfigError(
                f"format='adapter' has no room for {', '.join(wrong)}: the adapter's own values are stored, not summed "
                "weights. Use format='model', or leave the option out."
            )

    def dense_only(self) -> list[str]:
        """Return the names of the options set to values that only the dense form can honour."""
        return [
            name
            for name, item in declared().items()
            if item.dense_only and getattr(self, name) not in (item.default, *item.of_any_form)
        ]

    def for_adapter(self) -> GraftOptions | None:
        """Return the options of the same graft as an adapter; None where dense weights alone can be that graft."""
        if not {"dtype", "rounding", "max_shard_size"}.issuperset(self.dense_only()):
            return None
        defaults = {name: declared()[name].default for name in self.dense_only()}
        return replace(self, format="adapter", **defaults)

    def patterns(self) -> list[re.Pattern[str]] | None:
        """Return the compiled expressions of `modules`, None for `all`."""
        given = [self.modules] if isinstance(self.modules, str) else self.modules
        return None if given == ["all"] else [re.compile(NAMED.get(text, text)) for text in given]

    def selector(self) -> Callable[[str], bool]:
        """Return the test whether `modules` selects a weight by its name."""
        patterns = self.patterns()
        return lambda name: patterns is None or any(pattern.search(name) for pattern in patterns)

    def to_dict(self) -> dict[str, Any]:
        """Return what the result depends on, for the manifest; a rank only where there is one."""
        known = {name: getattr(self, name) for name, option in declared().items() if option.recorded}
        return {name: value for name, value in known.items() if name != "rank" or value is not None}


def declared() -> dict[str, Option]:
    """Return the options of a graft by name, in their order."""
    return {item.name: item.metadata["option"] for item in fields(GraftOptions)}
