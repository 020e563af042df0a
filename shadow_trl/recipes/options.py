"""Options of the recipes: a YAML file with overrides from the command line, read strictly.

What TRL's parser lets through is an error here: unknown and repeated keys, abbreviations, wrong types in YAML.
"""

from __future__ import annotations

import difflib
import math
import os
import re
import reprlib
import types
import typing
from argparse import ArgumentError
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import takewhile
from pathlib import Path
from typing import Any

import yaml
from trl import ModelConfig, ScriptArguments, SFTConfig, TrlParser

from ..checkpoints.manifest import Entry
from ..errors import ConfigError, InputError, ShadowError, ends_with, list_names, one_of
from ..grafting.options import DTYPES, declared
from ..pair.known import taken_base
from ..training.config import ShadowDPOConfig, ShadowSFTConfig
from ..training.engines import load_for
from .help import help_of, is_asked
from .launch_options import LAUNCHING, without_launch_keys

CONFIGS: dict[str, type[ShadowSFTConfig] | type[ShadowDPOConfig]] = {"sft": ShadowSFTConfig, "dpo": ShadowDPOConfig}

GUIDES = ("instruct",)
"""Values of `sft_guidance`."""

PATH_KEYS = ("model_name_or_path", "instruct_model", "base_model", "dataset_name", "score_rows")
"""Keys whose value may be a path inside the repository of a shipped config."""

NEEDS = (
    "pass --config FILE.yaml, or at least --model_name_or_path, --instruct_model and --dataset_name. Ready "
    "configurations are in recipes/configs"
)


def _option(default: Any, text: str, **more: Any) -> Any:
    return field(default=default, metadata={"help": text, **more})


@dataclass
class RecipeArguments:
    """Arguments of a recipe besides those of the trainer, the model and the data; each says its meaning itself."""

    compare_direct: bool = _option(
        False,
        "Also tune INSTRUCT directly, with TRL's own trainer on the same data with the same settings, into direct/ in "
        "the run's folder.",
    )
    score_rows: str | None = _option(
        None,
        'JSONL file of held-out rows {"prompt": messages, "answer": str or list of them, "kind": str}; each model of '
        "the run answers them greedily and is scored by exact match. Without it nothing is scored.",
    )
    score_kept: list[str] | None = field(
        default=None,
        metadata={
            "help": "Kinds of rows that training should not change: their mean is shown as `kept`.",
            "nargs": "+",
        },
    )
    score_scales: list[float] | None = field(
        default=None,
        metadata={
            "help": "Multiples of the change by training at which each tuned model is scored, without more training. "
            "The graft that is kept has graft_scale. Default: graft_scale for the graft, 1 for the others.",
            "nargs": "+",
        },
    )
    score_batch_size: int = _option(64, "Rows answered at once.")
    score_max_new_tokens: int = _option(64, "Longest answer in tokens.")
    score_dtype: str = _option(
        "float32", "Dtype in which all models answer, for a fair comparison; auto: that of their files.", choices=DTYPES
    )
    train_rows: int | None = _option(None, "Train on this many rows, drawn with the run's seed, instead of all.")
    sft_guidance: str | None = _option(
        None,
        "SFT: weigh the loss of each answer token by the probability that INSTRUCT gives it, to guidance_power. An "
        "experiment, see docs/results.md. Default: no weights.",
        choices=GUIDES,
    )
    guidance_power: float = _option(0.5, "Power of the probabilities of sft_guidance.")
    freeze: list[str] | None = field(
        default=None,
        metadata={
            "help": "Expressions searched in the names of weights, such as vision_tower: what matches is not trained. "
            "For full fine-tuning; adapters have lora_target_modules.",
            "nargs": "+",
        },
    )
    merge_adapter: bool = _option(
        False,
        "In the DPO stage of the pipeline: merge the adapter of the SFT stage into BASE and train the result in full, "
        "or with a new adapter, instead of training the same adapter further.",
    )
    torch_threads: int | None = _option(
        None,
        "Threads of PyTorch on the CPU instead of one per core; models of some million parameters are faster with one.",
    )

    def __post_init__(self) -> None:
        for name in ("score_batch_size", "score_max_new_tokens", "train_rows", "torch_threads"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"{name} must be at least 1, not {value}.")
        one_of("score_dtype", self.score_dtype, DTYPES)
        if self.sft_guidance is not None:
            one_of("sft_guidance", self.sft_guidance, GUIDES)
        if not 0.0 <= self.guidance_power < math.inf:
            raise ConfigError(f"guidance_power must be a number from 0, not {self.guidance_power}.")
        if self.score_scales:
            checked = (declared()["scale"].checked("each of score_scales", scale) for scale in self.score_scales)
            self.score_scales = list(dict.fromkeys(checked))


@dataclass(frozen=True)
class Options:
    """Everything a recipe was given.

    Args:
        script: TRL's arguments of the data.
        training: the trainer's config.
        model: TRL's arguments of the model: `model_name_or_path` is BASE.
        recipe: the recipe's own arguments.
        output_given: whether `output_dir` was given; else the recipe makes a folder for the run.
        config: the YAML file, if there was one.
        from_config: its keys that the command line left as they are.
    """

    script: ScriptArguments
    training: Any
    model: ModelConfig
    recipe: RecipeArguments
    output_given: bool
    config: Path | None = None
    from_config: frozenset[str] = frozenset()

    def origin(self, key: str) -> str:
        """Return ` (in FILE)` for a key that the YAML file set, "" for one of the command line."""
        return f" (in {self.config})" if key in self.from_config else ""

    @property
    def output(self) -> str | None:
        """The given `output_dir`, or None."""
        return self.training.output_dir if self.output_given else None


@ends_with("Nothing was written.")
def parse(kind: str, argv: Sequence[str], default_config: str | Path | None = None) -> Options:
    """Read the options of a recipe: the config file, then overrides from the command line.

    Args:
        kind: "sft" or "dpo".
        argv: the command line without the program's name.
        default_config: YAML file for a command line that names neither `--config` nor `--model_name_or_path`.

    Raises:
        ConfigError: an unknown, abbreviated, repeated or wrong key or value.
    """
    config, words = find_config(argv, default_config)
    values = without_launch_keys(read_yaml(config), config) if config else {}
    options = parse_values(kind, words, values, config)
    if options.recipe.merge_adapter:
        raise ConfigError(
            "merge_adapter belongs to the DPO stage of recipes/shadow_sft_dpo.py. Here, merge the adapter yourself "
            "(PeftModel.merge_and_unload, then save_pretrained) and name BASE with base_model."
        )
    return options


def parse_values(
    kind: str, words: Sequence[str], values: Mapping[str, Any], config: Path | None, *, unknown: str = ""
) -> Options:
    """Read the options of a recipe from the content of the file `config` and overrides, as `parse` does.

    `unknown` ends the error about keys that the recipe does not have.
    """
    dataclass_types: Any = (ScriptArguments, CONFIGS[kind], ModelConfig, RecipeArguments)
    parser = TrlParser(dataclass_types, allow_abbrev=False, exit_on_error=False, epilog=LAUNCHING)
    parser.prog = f"shadow-trl {kind}"
    if is_asked(words):
        print(help_of(kind, parser, RecipeArguments, words), end="")
        raise SystemExit(0)
    if config is not None:
        _check_values(parser, values, config, unknown)
        parser.set_defaults_with_config(**_resolve_paths(values, config))
    try:
        namespace, rest = parser.parse_known_args(list(words))
        if rest:
            known = {option for action in parser._actions for option in action.option_strings}
            wrong = _with_values(rest)
            listed = list_names(_with_guess(words, known) for words in wrong)
            count = f"{len(wrong)} unknown argument{'s' if len(wrong) > 1 else ''}"
            raise ConfigError(f"{count} (abbreviated options are not accepted):\n{listed}{unknown}")
        script, training, model, recipe = parser.parse_dict(vars(namespace))
    except ShadowError:
        raise
    # The dataclasses of TRL and transformers open files and look for libraries.
    except (ArgumentError, ValueError, TypeError, ImportError, OSError, LookupError, AttributeError) as reason:
        raise ConfigError(f"the configuration is not valid: {reason}") from reason
    load_for(None)  # a trainer's models are for its engine, what is merged or scored beside it is not
    kept = frozenset(key for key, value in values.items() if getattr(namespace, key, None) == value)
    given = namespace.output_dir is not None
    options = Options(script, training, model, recipe, output_given=given, config=config, from_config=kept)
    _check_together(options)
    return options


def find_config(
    argv: Sequence[str], default_config: str | Path | None, *, needs: str = NEEDS
) -> tuple[Path | None, list[str]]:
    """Return the YAML file, None for a command line that names BASE or asks for help, and the other words.

    Args:
        argv: the command line.
        default_config: the file for a command line with neither.
        needs: the way out of the error where there is none.
    """
    config, words = take_option("config", argv)
    needs_none = re.compile(r"(--(sft\.)?(model[-_]name[-_]or[-_]path|find[-_]base)|-h|--help|--help-all)(=|$)")
    if config is not None or any(needs_none.match(word) for word in words):
        return (Path(config) if config is not None else None), words
    if default_config is None or not Path(default_config).is_file():
        raise ConfigError(f"no configuration: {needs} of the repository.")
    return Path(default_config), words


def take_option(name: str, argv: Sequence[str]) -> tuple[str | None, list[str]]:
    """Return the value of `--name VALUE` or `--name=VALUE`, None where it is not given, and the other words."""
    option = f"--{name}"
    words = [part for word in argv for part in (word.split("=", 1) if word.startswith(f"{option}=") else [word])]
    if option not in words:
        return None, words
    at = words.index(option)
    values = list(takewhile(lambda word: not word.startswith("--"), words[at + 1 :]))
    rest = words[:at] + words[at + 1 + len(values) :]
    if option in rest:
        raise ConfigError(f"{option} was given more than once.")
    if len(values) != 1:
        raise ConfigError(f"{option} needs one value, but has {' '.join(values) or 'none'}.")
    return values[0], rest


def _check_together(options: Options) -> None:
    """Refuse what is missing or cannot be combined, as far as the options alone show it."""
    recipe, training = options.recipe, options.training
    if not options.script.dataset_name:
        raise ConfigError("dataset_name is missing; give it in the YAML file or on the command line.")
    if not options.model.model_name_or_path:
        instruct = training.instruct_model and str(Entry(training.instruct_model, training.instruct_revision))
        options.model.model_name_or_path = taken_base(
            instruct, confirmed=training.find_base, missing="model_name_or_path (BASE)"
        )
    unused = [name for name in ("score_kept", "score_scales") if getattr(recipe, name) and not recipe.score_rows]
    if unused:
        raise ConfigError(f"{' and '.join(unused)} without score_rows: nothing would be scored. Give score_rows too.")
    if recipe.compare_direct and training.resume_from_checkpoint:
        raise ConfigError(
            "compare_direct cannot resume from a checkpoint: resume_from_checkpoint is one of BASE. Resume without "
            "compare_direct."
        )
    if recipe.sft_guidance and not isinstance(training, SFTConfig):
        raise ConfigError("sft_guidance is for SFT: the loss of DPO has a reference.")
    if recipe.freeze and options.model.use_peft:
        raise ConfigError("freeze is for full fine-tuning; with an adapter, lora_target_modules says what is trained.")
    if recipe.train_rows is not None and options.script.dataset_streaming:
        raise ConfigError("train_rows draws rows at random, which streamed data do not allow; leave one of them out.")


def _check_values(parser: TrlParser, values: Mapping[str, Any], config: Path, advice: str) -> None:
    """Refuse unknown keys of the YAML file and values of the wrong type, which argparse never sees."""
    hints = {name: hint for kind in parser.dataclass_types for name, hint in typing.get_type_hints(kind).items()}
    known = {action.dest for action in parser._actions} & hints.keys()
    unknown = [_with_guess(str(key), known) for key in values if key not in known]
    if unknown:
        raise ConfigError(f"{config} has {len(unknown)} unknown keys:\n{list_names(unknown)}{advice}")
    wrong = [fault for key, value in values.items() if (fault := _type_fault(key, value, hints[key]))]
    if wrong:
        raise ConfigError(f"{config} has {len(wrong)} values of the wrong type:\n{list_names(wrong)}")


def _resolve_paths(values: Mapping[str, Any], config: Path) -> dict[str, Any]:
    """Return `values` with the paths of a shipped config made independent of the current folder.

    A config below a folder `recipes` names models and data relative to the folder that holds `recipes`; a value that
    exists there becomes the path to it from the current folder. Every other value stays: a path from the current
    folder, as on the command line, or a hub id.
    """
    home = next((parent.parent for parent in config.resolve().parents if parent.name == "recipes"), None)
    resolved = dict(values)
    if home is None:
        return resolved
    for key in PATH_KEYS:
        value = resolved.get(key)
        if isinstance(value, str) and value and not os.path.isabs(value) and os.path.exists(home / value):
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
    """Return the content of a YAML file; as with TRL, its key `env` sets environment variables and is left out.

    Raises:
        InputError: the file cannot be read, or is not a mapping in which every key occurs once.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")  # some editors begin a file with a byte order mark
    except (OSError, ValueError) as reason:
        raise InputError(f"cannot read the configuration {path}: {reason}.") from reason
    try:
        content = yaml.load(text, Loader=_UniqueKeyLoader)  # nosec B506
    except RecursionError as reason:
        raise ConfigError(f"the configuration {path} is nested too deeply.") from reason
    # A date or number that YAML recognises and Python cannot hold is a plain ValueError.
    except (yaml.YAMLError, ValueError) as reason:
        raise ConfigError(f"the configuration {path} is not valid YAML: {' '.join(str(reason).split())}.") from reason
    variables = content.pop("env", {}) if isinstance(content, dict) else {}
    for name, found in ((f"the configuration {path}", content), (f"`env` of {path}", variables)):
        if not isinstance(found, dict):
            kind = "empty" if found is None else f"a {type(found).__name__}"
            raise ConfigError(f"{name} is {kind}, not a mapping of keys to values.")
    try:
        os.environ.update({str(name): str(value) for name, value in variables.items()})
    except (OSError, ValueError) as reason:
        raise ConfigError(f"`env` of {path} cannot be set: {reason}.") from reason
    return content


def _with_values(words: Sequence[str]) -> list[str]:
    """Return the options among words that no option took, each with the values after it, and other words alone."""
    found: list[str] = []
    for word in words:
        if found and found[-1].startswith("--") and not word.startswith("--"):
            found[-1] += f" {word}"
        else:
            found.append(word)
    return found


def _with_guess(word: str, known: set[str]) -> str:
    """Return `word` with the known name that is most like it, if there is one."""
    name = re.split("[= ]", word, maxsplit=1)[0]
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
    return f"{key}: {reprlib.repr(value)} has type {type(value).__name__}, expected {wanted}{advice}"


def _is_of(value: Any, kind: Any) -> bool:
    """Whether a YAML value may stand for the type; a bool is not a number; a whole number is a float too."""
    if isinstance(value, bool):
        return kind is bool
    if kind is float:
        return isinstance(value, (int, float))
    # Types that YAML cannot express, such as enumerations, are checked by the dataclass itself.
    return isinstance(value, kind) if kind in (int, str, list, dict) else kind not in (bool, type(None))
