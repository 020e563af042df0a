"""`shadow-trl chat`: a conversation from lines of text, and what is no model to chat with."""

from __future__ import annotations

import io
import json

import pytest
from repository import ROOT

from shadow_trl.cli import main
from shadow_trl.errors import ConfigError
from shadow_trl.evaluation.chat import chat

INSTRUCT = ROOT / "data" / "nano-instruct"


def test_every_line_is_answered_in_one_conversation(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("copy abc\n\nreverse abc"))
    assert main(["chat", str(INSTRUCT)]) == 0
    # Nothing is said to an empty line.
    assert capsys.readouterr().out == "> abc.\n> > cba.\n> \n"


def test_each_answer_is_a_line_of_json(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("copy abc\n\nreverse abc"))
    assert main(["chat", str(INSTRUCT), "--json"]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert lines == [{"prompt": "copy abc", "answer": "abc."}, {"prompt": "reverse abc", "answer": "cba."}]


def test_a_system_message_and_the_longest_answer(capsys: pytest.CaptureFixture[str]) -> None:
    chat(INSTRUCT, system="Use quotes.", lines=io.StringIO("copy abc\n"))
    assert '"abc"' in capsys.readouterr().out
    chat(INSTRUCT, max_new_tokens=2, lines=io.StringIO("copy abc\n"))
    assert capsys.readouterr().out.splitlines()[0] == "> ab"
    with pytest.raises(ConfigError, match="max_new_tokens must be at least 1, not 0"):
        chat(INSTRUCT, max_new_tokens=0)


@pytest.mark.parametrize(
    ("model", "words"),
    [("./nothing", "there is no folder ./nothing"), (str(ROOT / "data/nano-base"), "has no chat template")],
)
def test_what_is_no_model_to_chat_with(model: str, words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["chat", model]) == 2
    assert words in capsys.readouterr().err
