"""Chat templates of a model folder, and the special tokens that they put into a conversation."""

from __future__ import annotations

import re
from collections.abc import Iterable
from functools import lru_cache
from pathlib import Path
from typing import Any

from ..checkpoints.json_files import is_there, read_json, read_text
from ..checkpoints.schemas import TokenizerConfig
from ..errors import CheckpointError, ConfigError
from ..runtime.limited import SECONDS, answer_of

TEMPLATE_CONFIGS = ("tokenizer_config.json", "chat_template.json", "processor_config.json")
"""Older places of chat templates, under the key `chat_template`."""
_GENERATION_TAG = re.compile(r"\{%-?\s*(?:end)?generation\s*-?%\}")


def template_files(folder: Path) -> list[Path]:
    """Return the files of a model folder that its chat templates are read from; others may hold older ones."""
    single = folder / "chat_template.jinja"
    files = [single] if is_there(single) else []
    files += sorted((folder / "additional_chat_templates").glob("*.jinja"))
    return files or [folder / name for name in TEMPLATE_CONFIGS if is_there(folder / name)]


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

    Raises:
        CheckpointError: rendering takes too much time or memory.

    """
    plain = templates.get("default") or next(iter(templates.values()), "")
    rendered = _render(plain, tuple(named.items()))
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


@lru_cache(maxsize=32)
def _render(template: str, named: tuple[tuple[str, str], ...]) -> str:
    """Return short conversations as `template` writes them, joined by NUL; "" when it cannot be rendered."""
    found = answer_of(Path(__file__).with_name("rendering.py"), [_GENERATION_TAG.sub("", template), dict(named)])
    if found is None:
        raise CheckpointError(
            f"rendering the chat template of instruct takes more than {SECONDS} seconds, or too much memory, for a "
            "conversation of four letters. Give the model with the template that it was published with."
        )
    return found


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
