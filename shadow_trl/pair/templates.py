"""Chat templates of a model folder, and the special tokens that they put into a conversation."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from contextlib import suppress
from datetime import datetime
from pathlib import Path
from typing import Any

from ..checkpoints.json_files import read_json, read_text
from ..checkpoints.schemas import TokenizerConfig
from ..errors import CheckpointError, ConfigError

_TURNS = [
    {"role": role, "content": text}
    for role, text in (("system", "a"), ("user", "b"), ("assistant", "c"), ("user", "d"))
]
TEMPLATE_CONFIGS = ("tokenizer_config.json", "chat_template.json", "processor_config.json")
"""Older places of chat templates, under the key `chat_template`."""
_GENERATION_TAG = re.compile(r"\{%-?\s*(?:end)?generation\s*-?%\}")


def template_files(folder: Path) -> list[Path]:
    """Return the files of a model folder that its chat templates are read from; others may hold older ones."""
    single = folder / "chat_template.jinja"
    files = [single] if single.is_file() else []
    files += sorted((folder / "additional_chat_templates").glob("*.jinja"))
    return files or [folder / name for name in TEMPLATE_CONFIGS if (folder / name).is_file()]


def read_templates(folder: Path) -> dict[str, str]:
    """Return the chat templates of a model folder by name ("default" is the one used unasked), {} when there is none.

    As in transformers, chat_template.jinja and additional_chat_templates/*.jinja take precedence over
    tokenizer_config.json, and the older places of processors are read when there is nothing else.
    """
    templates: dict[str, str] = {}
    for file in template_files(folder):
        if file.suffix == ".jinja":
            templates["default" if file.parent == folder else file.stem] = read_text(file) or ""
        elif not templates:
            templates = _templates_of(read_json(file, TokenizerConfig).get("chat_template"))
    templates = {name: text for name, text in templates.items() if text.strip()}
    wrong = [repr(name) for name, text in templates.items() if not _is_storable(name, text)]
    if wrong:
        raise CheckpointError(
            f"{len(wrong)} chat templates in {folder} have a name that no file can have, or text that is not Unicode: "
            f"{', '.join(wrong)}. Save the tokenizer again with other names."
        )
    return templates


def _is_storable(name: str, text: str) -> bool:
    try:
        (name + text).encode()
    except UnicodeEncodeError:  # half of a surrogate pair, which JSON can hold
        return False
    return re.fullmatch(r"[^/\\\0]{1,60}", name) is not None


def _templates_of(value: object) -> dict[str, str]:
    """Return the templates in a JSON value: a string, a list of {"name", "template"}, or an object name -> template."""
    if isinstance(value, str):
        return {"default": value}
    if isinstance(value, list):
        records = [record for record in value if isinstance(record, dict)]
        value = {record.get("name"): record.get("template") for record in records}
    if isinstance(value, dict):
        return {name: text for name, text in value.items() if isinstance(name, str) and isinstance(text, str)}
    return {}


def template_tokens(templates: dict[str, str], added: Iterable[str], named: dict[str, str]) -> dict[str, bool]:
    """Find the added tokens that INSTRUCT's chat templates use.

    Args:
        templates: chat templates by name, as `read_templates` returns them.
        added: texts of the added tokens of INSTRUCT's vocabulary.
        named: special tokens by role ("bos_token", "eos_token", ...), which templates may ask for by that name.

    Returns:
        Token -> True when a plain conversation contains it, False when it only stands in the template's text (tools,
        images, reasoning). A template that cannot be rendered here counts by its text alone.

    """
    plain = templates.get("default") or next(iter(templates.values()), "")
    rendered = _render(plain, named)
    literal = "\0".join(templates.values())
    found: dict[str, bool] = {}
    # longest first and cut out, so that a token inside another token's text is not counted
    for token in sorted({token for token in added if len(token.strip()) > 2}, key=len, reverse=True):
        if token in rendered:
            found[token] = True
        elif token in literal:
            found[token] = not rendered
        rendered, literal = rendered.replace(token, "\0"), literal.replace(token, "\0")
    return found


def _render(template: str, named: dict[str, str]) -> str:
    """Return short conversations as `template` writes them, joined by NUL; "" when it cannot be rendered."""
    from jinja2 import TemplateError
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    def raise_exception(message: str) -> None:
        raise TemplateError(message)

    extensions = ["jinja2.ext.loopcontrols"]
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=extensions)
    environment.filters["tojson"] = lambda value, **options: json.dumps(value, ensure_ascii=False)
    environment.globals.update(raise_exception=raise_exception, strftime_now=lambda form: datetime.now().strftime(form))
    rendered = []
    parts = [{**turn, "content": [{"type": "text", "text": turn["content"]}]} for turn in _TURNS]
    # templates refuse roles and forms in many ways, and some do not compile; their text is searched as well
    with suppress(Exception):
        compiled = environment.from_string(_GENERATION_TAG.sub("", template))
        for turns in (_TURNS, _TURNS[1:], parts, parts[1:]):  # with and without a system message
            with suppress(Exception):
                rendered.append(compiled.render(messages=turns, add_generation_prompt=True, **named))
    return "\0".join(rendered)


def check_processing_class(
    processing_class: Any, dataset_is_conversational: bool, *, instruct: str | None = None
) -> None:
    """Refuse conversational data for a tokenizer or processor that has no chat template.

    Args:
        processing_class: the tokenizer or processor that training would use.
        dataset_is_conversational: True when the rows are lists of messages.
        instruct: name of INSTRUCT, for the message.

    Raises:
        ConfigError: `dataset_is_conversational`, and neither `processing_class` nor its tokenizer has a chat template.

    """
    sides = (processing_class, getattr(processing_class, "tokenizer", None))
    if not dataset_is_conversational or any(getattr(side, "chat_template", None) for side in sides):
        return
    name = next(filter(None, (getattr(side, "name_or_path", None) for side in sides)), None)
    where = f" ({name})" if name else ""
    load = f"AutoTokenizer.from_pretrained({instruct!r})" if instruct else "the tokenizer of INSTRUCT"
    raise ConfigError(
        f"the data are conversations, but the given processing_class {type(processing_class).__name__}{where} has no "
        f"chat template.\nLeave processing_class out, so that INSTRUCT's own, which has one, is used; or pass {load}."
    )
