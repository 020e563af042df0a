"""Options of the recipes: a YAML file with overrides from the command line, read strictly.

TRL's parser does the work. What it lets through is an error here: unknown and repeated keys, abbreviated options, and
values of the wrong type in YAML, which argparse never sees. Paths in a shipped config work from any current folder.
"""

from __future__ import annotations

import difflib
import os
import types
import typing
from argparse import Namespace
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

import yaml
from trl import ModelConfig, ScriptArguments, TrlParser

from ..errors import ConfigError, InputError, ShadowError, list_names, one_of
from ..grafting.options import DTYPES
from ..training.config import ShadowDPOConfig, ShadowSFTConfig

CONFIGS: dict[str, type[ShadowSFTConfig] | type[ShadowDPOConfig]] = {"sft": ShadowSFTConfig, "dpo": ShadowDPOConfig}

PATH_KEYS = ("model_name_or_path", "instruct_model", "base_model", "dataset_name", "score_rows")
"""Keys whose value may be a path inside the repository of a shipped config."""


class UnknownKeysError(ConfigError):
    """Keys of the YAML file or words of the command line that the recipe does not have."""


@dataclass
class RecipeArguments:
    """Arguments of a recipe besides those of the trainer, the model and the data.

    Args:
        compare_direct: also tune INSTRUCT directly, with TRL's own trainer on the same data with the same settings,
            into `direct/` in the run's folder. Default False.
        score_rows: JSONL file of held-out rows `{"prompt": messages, "answer": str, "kind": str}`; each model of the
            run answers them greedily and is scored by exact match. Default: no scores.
        score_batch_size: rows answered at once. Default 64.
        score_max_new_tokens: longest answer in tokens. Default 64.
        score_dtype: dtype in which all models answer, so that the comparison is fair: `float32`, `bfloat16`,
            `float16`, or `auto` (that of their files). Default `float32`.
        train_rows: train on this many rows, drawn with the run's seed. Default: all.
        merge_adapter: in the DPO stage of the pipeline: merge the adapter of the SFT stage into BASE, and train the
            result in full, or with a new adapter. Default False: the same adapter is trained further.
        torch_threads: threads of PyTorch on the CPU. Default: PyTorch's own choice, one per core; models of a few
            million parameters are faster with one.

    """

    compare_direct: bool = field(
        default=False, metadata={"help": "Also tune INSTRUCT directly with the same data and settings, to compare."}
    )
    score_rows: str | None = field(
        default=None, metadata={"help": "JSONL file of held-out rows {prompt, answer, kind} to score the models on."}
    )
    score_batch_size: int = field(default=64, metadata={"help": "Rows answered at once."})
    score_max_new_tokens: int = field(default=64, metadata={"help": "Longest answer in tokens."})
    score_dtype: str = field(
        default="float32",
        metadata={"help": "Dtype in which all models answer; auto: that of their files.", "choices": DTYPES},
    )
    train_rows: int | None = field(default=None, metadata={"help": "Train on this many rows, drawn with the seed."})
    merge_adapter: bool = field(
        default=False,
        metadata={"help": "Pipeline, DPO stage: merge the adapter of the SFT stage instead of training it further."},
    )
    torch_threads: int | None = field(default=None, metadata={"help": "Threads of PyTorch on the CPU."})

    def __post_init__(self) -> None:
        for name in ("score_batch_size", "score_max_new_tokens", "train_rows", "torch_threads"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"{name} must be at least 1, not {value}.")
        one_of("score_dtype", self.score_dtype, DTYPES)


@dataclass(frozen=True)
class Options:
    """Everything a recipe was given.

    Args:
        script: TRL's arguments of the data.
        training: the trainer's config.
        model: TRL's arguments of the model: `model_name_or_path` is BASE.
        recipe: the recipe's own arguments.
        output_given: whether `output_dir` was given; else the recipe makes a folder for the run.

    """

    script: ScriptArguments
    training: Any
    model: ModelConfig
    recipe: RecipeArguments
    output_given: bool


def parse(
    kind: str,
    argv: Sequence[str],
    default_config: str | Path | None = None,
    prog: str | None = None,
    select: Callable[[dict[str, Any]], dict[str, Any]] | None = None,
) -> Options:
    """Read the options of a recipe: the config file, then overrides from the command line.

    Args:
        kind: "sft" or "dpo".
        argv: the command line without the program's name.
        default_config: YAML file for a command line that names neither `--config` nor `--model_name_or_path`.
        prog: name of the program in the help.
        select: takes the content of the YAML file and returns the keys meant for this recipe. Default: all.

    Returns:
        The checked options.

    Raises:
        ConfigError: an unknown, abbreviated, repeated or wrong key or value.

    """
    words = [word for given in argv for word in (given.split("=", 1) if given.startswith("--config=") else [given])]
    wants_help = "-h" in words or "--help" in words
    if "--config" not in words and not names_model(words) and not wants_help:
        if default_config is None or not Path(default_config).is_file():
            raise ConfigError(
                "no configuration: pass --config FILE.yaml, or at least --model_name_or_path, --instruct_model and "
                "--dataset_name. Ready configurations are in recipes/configs of the repository."
            )
        words = ["--config", str(default_config), *words]
    dataclass_types: Any = (ScriptArguments, CONFIGS[kind], ModelConfig, RecipeArguments)
    parser = RecipeParser(dataclass_types, prog=prog, allow_abbrev=False)
    parser.select = select
    script, training, model, recipe = parser.read(words)
    options = Options(script, training, model, recipe, parser.output_given)
    _check_together(options)
    return options


def names_model(words: Sequence[str]) -> bool:
    """Whether the command line names BASE, so that no default configuration is looked for."""
    return any(word.partition("=")[0] in ("--model_name_or_path", "--model-name-or-path") for word in words)


def _check_together(options: Options) -> None:
    """Refuse what is missing or cannot be combined, as far as the options alone show it."""
    for name, value in (
        ("model_name_or_path (BASE)", options.model.model_name_or_path),
        ("dataset_name", options.script.dataset_name),
    ):
        if not value:
            raise ConfigError(f"{name} is missing; give it in the YAML file or on the command line.")
    recipe, training = options.recipe, options.training
    if recipe.compare_direct and training.resume_from_checkpoint:
        raise ConfigError(
            "compare_direct cannot resume from a checkpoint: resume_from_checkpoint is one of BASE. Resume without "
            "compare_direct."
        )
    if recipe.train_rows is not None and options.script.dataset_streaming:
        raise ConfigError("train_rows draws rows at random, which streamed data do not allow; leave one of them out.")


class RecipeParser(TrlParser):
    """TRL's parser that raises `ConfigError` for whatever is wrong, before any dataclass is built."""

    config_path: Path | None = None
    output_given = False
    select: Callable[[dict[str, Any]], dict[str, Any]] | None = None

    def read(self, words: list[str]) -> tuple[Any, ...]:
        """Parse `words`, of which `--config FILE` names a YAML file, into the dataclasses."""
        if words.count("--config") > 1:
            raise ConfigError("--config was given more than once.")
        if "--config" in words:
            at = words.index("--config") + 1
            if at == len(words):
                raise ConfigError("--config needs the name of a YAML file.")
            self.config_path = Path(words[at])
            read_yaml(self.config_path)
        try:
            return self.parse_args_and_config(args=words)
        except ShadowError:
            raise
        except (ValueError, TypeError) as reason:
            raise ConfigError(f"the configuration is not valid: {reason}") from reason

    def set_defaults_with_config(self, **values: Any) -> list[str]:
        """Take the YAML file's values as defaults; unknown keys and values of the wrong type are errors."""
        values = self.select(values) if self.select is not None else values
        known = {action.dest for action in self._actions}
        unknown = [_with_guess(key, known) for key in values if key not in known]
        if unknown:
            raise UnknownKeysError(f"{self.config_path} has {len(unknown)} unknown keys:\n{list_names(unknown)}")
        hints = {name: hint for kind in self.dataclass_types for name, hint in typing.get_type_hints(kind).items()}
        wrong = [fault for key, value in values.items() if (fault := _type_fault(key, value, hints[key]))]
        if wrong:
            raise ConfigError(f"{self.config_path} has {len(wrong)} values of the wrong type:\n{list_names(wrong)}")
        assert self.config_path is not None
        return super().set_defaults_with_config(**resolve_paths(values, self.config_path))

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> tuple[Namespace, list[str]]:  # type: ignore[override]
        """Parse as argparse does; anything left over is an error."""
        namespace, rest = super().parse_known_args(args, namespace)
        if rest:
            known = {option for action in self._actions for option in action.option_strings}
            listed = [_with_guess(word, known) for word in rest]
            raise UnknownKeysError(
                f"{len(rest)} unknown arguments (abbreviated options are not accepted):\n{list_names(listed)}"
            )
        self.output_given = getattr(namespace, "output_dir", None) is not None
        return namespace, rest

    def error(self, message: str) -> NoReturn:
        """Raise instead of printing the usage, which is some hundred lines long."""
        raise ConfigError(message)


def resolve_paths(values: Mapping[str, Any], config_path: Path) -> dict[str, Any]:
    """Return `values` with the paths of a shipped config made independent of the current folder.

    A config below a folder `recipes` names models and data relative to the folder that holds `recipes`; a value that
    exists there becomes the path to it from the current folder. Every other value stays: a path from the current
    folder, as on the command line, or a hub id.
    """
    home = next((parent.parent for parent in config_path.resolve().parents if parent.name == "recipes"), None)
    resolved = dict(values)
    for key in PATH_KEYS:
        value = resolved.get(key)
        if (
            home is not None
            and isinstance(value, str)
            and value
            and not os.path.isabs(value)
            and (home / value).exists()
        ):
            resolved[key] = os.path.relpath(home / value)
    return resolved


class _UniqueKeyLoader(yaml.SafeLoader):
    """YAML's safe loader, but a repeated key is an error: YAML would silently keep the last one."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        repeated = sorted({str(key) for key in keys if keys.count(key) > 1})
        if repeated:
            raise yaml.YAMLError(f"repeated keys: {', '.join(repeated)}")
        return super().construct_mapping(node, deep)


def read_yaml(path: Path) -> dict[str, Any]:
    """Return the content of a YAML file; raise InputError if it is not a mapping in which every key occurs once."""
    try:
        content = yaml.load(path.read_text(encoding="utf-8"), Loader=_UniqueKeyLoader)
    except (OSError, UnicodeDecodeError) as reason:
        raise InputError(f"cannot read the configuration {path}: {reason}.") from reason
    except yaml.YAMLError as reason:
        raise ConfigError(f"the configuration {path} is not valid YAML: {' '.join(str(reason).split())}.") from reason
    if not isinstance(content, dict):
        raise ConfigError(f"the configuration {path} is a {type(content).__name__}, not a mapping of keys to values.")
    return content


def _with_guess(word: str, known: set[str]) -> str:
    """Return `word` with the known name that is most like it, if there is one."""
    name = word.partition("=")[0]
    longer = sorted(one for one in known if one.startswith(name) and len(name) > 3)
    close = longer or difflib.get_close_matches(name, known, n=1)
    return f"{word} (did you mean {close[0]}?)" if close else word


def _type_fault(key: str, value: Any, hint: Any) -> str | None:
    """Return what is wrong with the YAML value of `key`, or None. Strings are left to argparse, which converts them."""
    union = typing.get_origin(hint) in (typing.Union, types.UnionType)
    members = typing.get_args(hint) if union else (hint,)
    if value is None or isinstance(value, str) or (key == "resume_from_checkpoint" and isinstance(value, bool)):
        return None
    if any(_is_of(value, typing.get_origin(member) or member) for member in members):
        return None
    wanted = " or ".join(getattr(member, "__name__", str(member)) for member in members if member is not type(None))
    advice = "; quote it" if str in members else ""
    return f"{key}: {value!r} has type {type(value).__name__}, expected {wanted}{advice}"


def _is_of(value: Any, kind: Any) -> bool:
    """Whether a YAML value may stand for the type; a bool is not a number; a whole number is a float too."""
    if isinstance(value, bool):
        return kind is bool
    if kind is float:
        return isinstance(value, (int, float))
    # Types that YAML cannot express, such as enumerations, are checked by the dataclass itself.
    return isinstance(value, kind) if kind in (int, str, list, dict) else kind not in (bool, type(None))
