"""The files of a result that are INSTRUCT's own: which are copied, and what its config.json says of the dtype."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from ..checkpoints.checkpoint import Checkpoint

# What a model needs beside its weights: tokenizer, template, processor, configs, code named by them, and its licence.
_COPIED = re.compile(
    r".*\.(?:json|txt|model|jinja|tiktoken|spm|bpe|vocab)|(?:LICEN[CS]E|NOTICE|USE_POLICY|COPYING).*",
    re.IGNORECASE | re.DOTALL,
)
# Weights of other formats, what training left, and what we write ourselves.
_NOT_COPIED = re.compile(
    r".*\.index\.json|shadow\.json|adapter_config\.json|trainer_state\.json|training_args.*|.*_results\.json|"
    r"quantiz\w*_config\.json|quant_config\.json|requirements.*\.txt|merge.*_config\.json|\..*",
    re.IGNORECASE,
)
_MODEL_ONLY = ("config.json", "generation_config.json")
_TEMPLATES = ("chat_template.jinja", "chat_template.json")
_NAMED_TEMPLATES = "additional_chat_templates"


def copied_files(instruct: Checkpoint, *, adapter: bool = False, templates: bool = True) -> list[Path]:
    """Return INSTRUCT's files that go into the result.

    Args:
        instruct: their folder.
        adapter: whether the result is an adapter, and gets none that would make it look like a model.
        templates: whether the result has INSTRUCT's chat templates.
    """
    code = "auto_map" in json.dumps(instruct.config)
    chosen = []
    for path in sorted(instruct.path.iterdir()):
        if not path.is_file() or _NOT_COPIED.fullmatch(path.name) or (adapter and path.name in _MODEL_ONLY):
            continue
        if not templates and path.name in _TEMPLATES:
            continue
        if _COPIED.fullmatch(path.name) or (code and path.suffix == ".py" and not adapter):
            chosen.append(path)
    named = (instruct.path / _NAMED_TEMPLATES).glob("*.jinja") if templates else ()
    return [*chosen, *sorted(named)]


def copy_files(paths: Iterable[Path], instruct: Checkpoint, folder: Path) -> None:
    """Copy the bytes of `paths` of INSTRUCT into `folder`; links become files."""
    for path in paths:
        target = folder / path.relative_to(instruct.path)
        target.parent.mkdir(exist_ok=True)
        shutil.copyfile(path, target)


def write_templates(templates: Mapping[str, str], folder: Path) -> None:
    """Write chat templates by name into `folder`, whose copied configs lose those of INSTRUCT; {} changes nothing."""
    if not templates:
        return
    for name in ("tokenizer_config.json", "processor_config.json"):
        path = folder / name
        config = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        if config.pop("chat_template", None) is not None:
            path.write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    for name, text in templates.items():
        path = folder / "chat_template.jinja" if name == "default" else folder / _NAMED_TEMPLATES / f"{name}.jinja"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")


def write_config(folder: Path, dtype: str | None, edits: Mapping[str, Any]) -> None:
    """Set `dtype`, in sub-configs too, and `edits` in the copied config.json; without a change its bytes stay.

    Args:
        folder: where the copy is.
        dtype: torch name of the dtype that was written, for a loader obeys the config and not the file. None keeps it.
        edits: dotted key -> value.
    """
    path = folder / "config.json"
    if not path.is_file():
        return
    config = json.loads(path.read_text(encoding="utf-8"))
    before = json.dumps(config)
    if dtype is not None:
        _set_dtype(config, dtype)
    for dotted, value in edits.items():
        section = config
        *parents, key = dotted.split(".")
        for parent in parents:
            section = section[parent]
        section[key] = value
    if json.dumps(config) != before:
        path.write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _set_dtype(config: dict[str, Any], dtype: str) -> None:
    stated = [key for key in ("dtype", "torch_dtype") if key in config]
    for key in stated or ["dtype"]:
        config[key] = dtype
    for value in config.values():
        if isinstance(value, dict) and ("dtype" in value or "torch_dtype" in value):
            _set_dtype(value, dtype)
