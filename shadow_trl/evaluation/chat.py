"""A conversation with a model in the terminal."""

from __future__ import annotations

import json
import sys
from typing import Any, TextIO

from ..checkpoints.hub import Source, locate
from ..errors import ConfigError, InputError
from .models import load_folder


def chat(
    model: Source,
    *,
    system: str | None = None,
    max_new_tokens: int = 512,
    lines: TextIO | None = None,
    as_json: bool = False,
) -> None:
    """Answer each line of `lines` in one conversation, until they end; print the answers as they are written.

    Args:
        model: folder (weights or adapter) or hub id, optionally with `@revision`; its tokenizer has a chat template.
        system: system message. Default: none.
        max_new_tokens: longest answer in tokens. Default 512.
        lines: what the user says. Default: the terminal.
        as_json: whether each answer is printed as a line of JSON, `{"prompt", "answer"}`, once it is complete, and
            nothing else. Default False.

    Raises:
        ConfigError: `max_new_tokens` is below 1.
        InputError: the model cannot be found or loaded, or has no chat template.
    """
    if max_new_tokens < 1:
        raise ConfigError(f"max_new_tokens must be at least 1, not {max_new_tokens}.")
    folder = locate(model).path
    from transformers import AutoTokenizer, TextStreamer
    from transformers.utils import logging

    logging.disable_progress_bar()
    try:
        tokenizer: Any = AutoTokenizer.from_pretrained(folder)
        network: Any = load_folder(folder, dtype="auto", device_map="auto")
    except (OSError, ValueError) as reason:
        raise InputError(f"cannot load {model}: {reason}") from reason
    if not tokenizer.chat_template:
        raise InputError(f"{model} has no chat template: it is not a model to chat with.")
    streamer = None if as_json else TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    talk = [] if system is None else [{"role": "system", "content": system}]
    while True:
        if not as_json:
            print("> ", end="", flush=True)
        said = (lines or sys.stdin).readline()
        if not said:
            if not as_json:
                print()
            return
        if not said.strip():
            continue
        talk.append({"role": "user", "content": said.strip()})
        asked = tokenizer.apply_chat_template(talk, add_generation_prompt=True, return_tensors="pt", return_dict=True)
        written = network.generate(**asked.to(network.device), max_new_tokens=max_new_tokens, streamer=streamer)
        answer = tokenizer.decode(written[0, asked["input_ids"].shape[1] :], skip_special_tokens=True)
        talk.append({"role": "assistant", "content": answer})
        if as_json:
            print(json.dumps({"prompt": said.strip(), "answer": answer}), flush=True)
