"""What a file of somebody else asks for is done in a process of its own, with limits."""

from __future__ import annotations

import os

import pytest

from shadow_trl.errors import ConfigError
from shadow_trl.runtime import limited, patterns
from shadow_trl.runtime.patterns import check_patterns

NAMES = ("model.layers.0.self_attn.q_proj", "model.layers.0.mlp.down_proj")


def test_names_and_escaped_dots_need_no_process(monkeypatch):
    monkeypatch.setattr(patterns, "answer_of", None)
    check_patterns("modules", ["q_proj", r"layers\.0\.mlp", "down-proj", ""], NAMES)


@pytest.mark.parametrize("pattern", ["(", "[a", "*", "(?P<a>x)(?P<a>y)", "(" * 5000])
def test_an_expression_that_is_none_is_refused_as_re_does(pattern):
    with pytest.raises(ConfigError, match=r"modules: .* is not a regular expression"):
        check_patterns("modules", ["q_proj", pattern], NAMES)


def test_an_expression_without_end_is_refused(monkeypatch):
    monkeypatch.setattr(limited, "SECONDS", 1)
    before = os.times()
    with pytest.raises(ConfigError, match=r"rank_pattern: matching .* takes more than"):
        check_patterns("rank_pattern", ["(.+)+x"], NAMES)
    assert os.times().children_user - before.children_user < 5


def test_the_answer_of_a_script_is_returned_and_its_failure_is_none(tmp_path):
    script = tmp_path / "script.py"
    script.write_text("def answer(asked):\n    return [asked, 1 / asked]\n")
    assert limited.answer_of(script, 4) == [4, 0.25]
    assert limited.answer_of(script, 0) is None
    script.write_text("def answer(asked):\n    return len(bytearray(asked))\n")
    assert limited.answer_of(script, 10) == 10
    assert limited.answer_of(script, 2 * 2**30) is None
