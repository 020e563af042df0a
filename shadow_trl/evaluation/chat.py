"""A conversation with a model in the terminal."""

from __future__ import annotations

import sys
from typing import TextIO

from ..checkpoints.hub import Source
from ..errors import InputError


def chat(model: Source, *, system: str | None = None, max_new_tokens: int = 512, lines: TextIO = sys.stdin) -> None:
    """Answer each line of `lines` in one conversation, until it ends; print the answers as they are written.

    Args:
        model: folder (weights or adapter) or hub id with a chat template.
        system: system message. Default: none.
        max_new_tokens: longest answer in tokens. Default 512.
        lines: what the user says. Default: the terminal.

    Raises:
        InputError: the model cannot be loaded, or has no chat template.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer, TextStreamer
    from transformers.utils import logging

    logging.disable_progress_bar()
    try:
        tokenizer = AutoTokenizer.from_pretrained(model)
        network = AutoModelForCausalLM.from_pretrained(model, dtype="auto", device_map=None)
    except (OSError, ValueError) as reason:
        raise InputError(f"cannot load {model}: {reason}") from reason
    if not tokenizer.chat_template:
        raise InputError(f"{model} has no chat template: it is not a model to chat with.")
    streamer = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    talk = [] if system is None else [{"role": "system", "content": system}]
    while True:
        print("> ", end="", flush=True)
        said = lines.readline()
        if not said:
            print()
            return
        if not said.strip():
            continue
        talk.append({"role": "user", "content": said.strip()})
        asked = tokenizer.apply_chat_template(talk, add_generation_prompt=True, return_tensors="pt", return_dict=True)
        written = network.generate(**asked, max_new_tokens=max_new_tokens, streamer=streamer)
        answer = tokenizer.decode(written[0, asked["input_ids"].shape[1] :], skip_special_tokens=True)
        talk.append({"role": "assistant", "content": answer})
