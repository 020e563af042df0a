"""Options of the recipes: a YAML file with overrides from the command line, read strictly.

What TRL's parser lets through is an error here: unknown and repeated keys, abbreviations, wrong types in YAML.
"""

from __future__ import annotations

import copy
import difflib
import math
import os
import re
import reprlib
import types
import typing
from argparse import ArgumentError
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from itertools import takewhile
from pathlib import Path
from typing import Any

from trl import DatasetMixtureConfig, ModelConfig, ScriptArguments, SFTConfig, TrlParser
from trl.scripts.utils import DatasetConfig

from ..checkpoints.manifest import Entry, read_manifest
from ..errors import ConfigError, ShadowError, ends_with, list_names, one_of
from ..grafting.options import DTYPES, declared
from ..pair.known import taken_base
from ..training.config import ShadowDPOConfig, ShadowSFTConfig
from ..training.engines import load_for
from .data import check_data_options
from .help import help_of, is_asked
from .launch_options import LAUNCHING, without_launch_keys
from .yaml_files import read_yaml

CONFIGS: dict[str, type[ShadowSFTConfig] | type[ShadowDPOConfig]] = {"sft": ShadowSFTConfig, "dpo": ShadowDPOConfig}

GUIDES = ("instruct",)
"""Values of `sft_guidance`."""

PATH_KEYS = ("model_name_or_path", "instruct_model", "base_model", "dataset_name", "datasets", "score_rows")
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
        mixture: TRL's arguments of data that are mixed from several sources.
        output_given: whether `output_dir` was given; else the recipe makes a folder for the run.
        config: the YAML file, if there was one.
        from_config: its keys that the command line left as they are.
    """

    script: ScriptArguments
    training: Any
    model: ModelConfig
    recipe: RecipeArguments
    mixture: DatasetMixtureConfig
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

    @property
    def streams(self) -> bool:
        """Whether the rows come one after the other, and nobody knows how many."""
        return bool(self.mixture.streaming if self.mixture.datasets else self.script.dataset_streaming)


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
    dataclass_types: Any = (ScriptArguments, CONFIGS[kind], ModelConfig, DatasetMixtureConfig, RecipeArguments)
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
        # A copy: the mixture makes its own objects of the mappings in its list, and the pipeline reads a file twice.
        script, training, model, mixture, recipe = parser.parse_dict(copy.deepcopy(vars(namespace)))
    except ShadowError:
        raise
    # The dataclasses of TRL and transformers open files and look for libraries.
    except (ArgumentError, ValueError, TypeError, ImportError, OSError, LookupError, AttributeError) as reason:
        raise ConfigError(f"the configuration is not valid: {reason}") from reason
    load_for(None)  # a trainer's models are for its engine, what is merged or scored beside it is not
    kept = frozenset(key for key, value in values.items() if getattr(namespace, key, None) == value)
    given = namespace.output_dir is not None
    options = Options(script, training, model, recipe, mixture, given, config, kept)
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


def take_flag(name: str, argv: Sequence[str]) -> tuple[bool, list[str]]:
    """Return whether `--name` is given, which has no value, and the other words."""
    return f"--{name}" in argv, [word for word in argv if word != f"--{name}"]


def _check_together(options: Options) -> None:
    """Refuse what is missing or cannot be combined, as far as the options alone show it."""
    recipe, training = options.recipe, options.training
    check_data_options(options)
    if not options.model.model_name_or_path:
        instruct = training.instruct_model and str(Entry(training.instruct_model, training.instruct_revision))
        options.model.model_name_or_path = taken_base(
            instruct, confirmed=training.find_base, missing="model_name_or_path (BASE)"
        )
    _check_instruct(options)
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


def _check_instruct(options: Options) -> None:
    """Refuse another INSTRUCT of the YAML file than that of the run which the command line names as the model."""
    given, keys = options.training.instruct_model, options.from_config
    if given is None or "instruct_model" not in keys or "model_name_or_path" in keys:
        return
    run = Path(str(options.model.model_name_or_path))
    known = Entry.read(read_manifest(run), "instruct")
    if known is not None and Path(known.source).name != Path(given).name:
        raise ConfigError(
            f"instruct_model is {given}{options.origin('instruct_model')}, and the run in {run} was grafted onto "
            f"{known.source}. Pass --instruct_model to say which is meant."
        )


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
    _check_sources(values.get("datasets") or [], config)


def _check_sources(sources: list[Any], config: Path) -> None:
    """Refuse data sets of a mixture that are no mappings of known keys."""
    known, faults = {item.name for item in fields(DatasetConfig)}, []
    for place, source in enumerate(sources, start=1):
        if not isinstance(source, dict):
            faults.append(f"{place}: {reprlib.repr(source)} is no mapping with the key path")
            continue
        faults += [f"{place}: {_with_guess(str(key), known)}" for key in source if key not in known]
        if not isinstance(source.get("path"), str):
            faults.append(f"{place}: path is missing" if "path" not in source else f"{place}: path is no text")
    if faults:
        listed = list_names(faults)
        raise ConfigError(
            f"`datasets` of {config} has {len(faults)} faults, each after the data set's place:\n{listed}"
        )


def _resolve_paths(values: Mapping[str, Any], config: Path) -> dict[str, Any]:
    """Return `values` with the paths of a shipped config made independent of the current folder.

    A config below a folder `recipes` names models and data relative to the folder that holds `recipes`; a value that
    exists there becomes the path to it from the current folder. Every other value stays: a path from the current
    folder, as on the command line, or a hub id.
    """
    home = next((parent.parent for parent in config.resolve().parents if parent.name == "recipes"), None)
    if home is None:
        return dict(values)
    return {key: _resolved(value, home) if key in PATH_KEYS else value for key, value in values.items()}


def _resolved(value: Any, home: Path) -> Any:
    if isinstance(value, list):
        return [_resolved(one, home) for one in value]
    if isinstance(value, dict):  # one of `datasets`, or its files by split
        return {key: one if key in ("name", "split", "columns") else _resolved(one, home) for key, one in value.items()}
    if isinstance(value, str) and value and not os.path.isabs(value) and os.path.exists(home / value):
        return os.path.relpath(home / value)
    return value


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
