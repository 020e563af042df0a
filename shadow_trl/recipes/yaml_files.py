"""YAML files of the recipes, read strictly."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import yaml

from ..errors import ConfigError, InputError


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
