"""Which words and keys are for the launcher: the options of `accelerate launch`, and TRL's `accelerate_config`."""

from __future__ import annotations

import argparse
import functools
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from accelerate.commands.launch import launch_command_parser

from ..errors import ConfigError

LAUNCHED = "SHADOW_TRL_LAUNCHED"
"""Variable in the environment of the processes that `shadow-trl` has launched."""

LAUNCHING = (
    "shadow-trl also takes the options of accelerate launch, such as --num_processes, and --accelerate_config FILE, or "
    "the name of a config that TRL ships: fsdp2, zero1, zero2, zero3, multi_gpu, single_gpu."
)
"""What the help of a recipe says about launching."""

_NOT_TAKEN = ("help", "module", "no_python", "main_training_function", "debug", "gradient_accumulation_steps")
"""Options of `accelerate launch` that say what to run, which is the recipe, and those that the recipes have as well."""

Switches = Mapping[str, bool]


def launch_parser() -> argparse.ArgumentParser:
    """Return the parser of `accelerate launch`; what it cannot read is a ConfigError."""
    parser: argparse.ArgumentParser = launch_command_parser()

    def refuse(message: str) -> NoReturn:
        raise ConfigError(f"accelerate launch does not take this: {message}.")

    parser.error = refuse  # type: ignore[method-assign]
    return parser


@functools.cache
def _switches() -> Switches:
    """Return the options of the launcher by name, without dashes, and whether they are switches without a value."""
    actions = [action for action in launch_parser()._actions if action.dest not in _NOT_TAKEN]
    names = {name: action.nargs == 0 for action in actions for name in action.option_strings if name.startswith("--")}
    switches = {name.removeprefix("--").replace("-", "_"): switch for name, switch in names.items()}
    return {"accelerate_config": False, **switches}


def split_words(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """Return the words of a command line that are for the launcher, and those of the recipe.

    Raises:
        ConfigError: an option of the launcher has no value.
    """
    launch: list[str] = []
    own: list[str] = []
    waiting = list(words)
    while waiting:
        word = waiting.pop(0)
        given, equals, value = word.removeprefix("--").partition("=")
        name = given.replace("-", "_")
        if not word.startswith("--") or name not in _switches():
            own.append(word)
            continue
        launch.append(f"--{name}")
        if equals:
            launch.append(value)
        elif not _switches()[name]:
            if not waiting or waiting[0].startswith("--"):
                raise ConfigError(f"--{name} needs a value.")
            launch.append(waiting.pop(0))
    return launch, own


def split_keys(content: Mapping[str, Any], config: Path) -> tuple[dict[str, list[str]], dict[str, Any]]:
    """Return what a YAML file has for the launcher, as the words of each key, and the keys of the recipe.

    Raises:
        ConfigError: a value that the option cannot have.
    """
    launch, switches = {key: value for key, value in content.items() if key in _switches()}, _switches()
    wrong = [
        f"{key}: {value!r}"
        for key, value in launch.items()
        if not isinstance(value, bool if switches[key] else (bool, int, float, str))
    ]
    if wrong:
        raise ConfigError(f"{config} has values that accelerate launch does not take: {', '.join(wrong)}.")
    words = {
        key: ([f"--{key}"] if value else []) if switches[key] else [f"--{key}", str(value)]
        for key, value in launch.items()
    }
    return words, {key: value for key, value in content.items() if key not in launch}


def without_launch_keys(content: Mapping[str, Any], config: Path) -> dict[str, Any]:
    """Return the keys of a YAML file that are the recipe's own.

    Raises:
        ConfigError: it has keys for the launcher, and another one than `shadow-trl` started this process.
    """
    launch, own = split_keys(content, config)
    if launch and LAUNCHED not in os.environ:
        raise ConfigError(
            f"{config} says how to launch ({', '.join(launch)}), which only `shadow-trl` does. Start it with "
            "shadow-trl sft, dpo or sft-dpo; or take these keys out, and give them to accelerate launch."
        )
    return own
