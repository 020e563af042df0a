"""data/goals.py: the goals of the embedded pair, judged from the report of a run."""

from __future__ import annotations

import importlib.util
import math
import sys
from pathlib import Path
from types import ModuleType

import pytest
from repository import ROOT

from shadow_trl.evaluation.report import RunReport
from shadow_trl.evaluation.scoring import Scores


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("goals", ROOT / "data/goals.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "goals", module)
        spec.loader.exec_module(module)
    return module


def scores(target: int, t_rule: int, rule: int) -> Scores:
    """So many right answers of 20 rows a kind; the right ones come first."""
    counts = {"target": target, "t_rule": t_rule, "rule": rule}
    return Scores({kind: tuple(row < right for row in range(20)) for kind, right in counts.items()})


def report(**arms: Scores) -> RunReport:
    return RunReport({name: name for name in arms}, output="out", scores=arms)


def test_goals_that_were_reached(script: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report(instruct=scores(16, 15, 18), direct=scores(19, 4, 14), grafted=scores(18, 14, 18)).write(tmp_path)
    assert script.main([str(tmp_path)]) == 0
    assert capsys.readouterr().out.splitlines() == [
        # Two of 20 rows won, none lost: sqrt((0.1 - 0.01) / 20) = 6.7 points.
        "reached: the graft is at least as good as INSTRUCT on the target: 90.0 against 80.0 %, +10.0 points "
        "(standard error 6.7; within the sampling error)",
        # t_rule 10 of 20 won: variance 0.25 / 20; rule 4 of 20: 0.16 / 20; sqrt(sum) / 2 = 7.2 points.
        "reached: it loses less under rules than direct tuning: 80.0 against 45.0 %, +35.0 points (standard error 7.2)",
    ]


def test_goals_that_were_missed_are_said_to_be(
    script: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    report(instruct=scores(16, 15, 18), direct=scores(19, 4, 14), grafted=scores(12, 3, 10)).write(tmp_path)
    assert script.main([str(tmp_path)]) == 1
    text = capsys.readouterr().out
    assert "NOT reached: the graft is at least as good as INSTRUCT on the target: 60.0 against 80.0 %, -20.0" in text
    assert "NOT reached: it loses less under rules than direct tuning: 32.5 against 45.0 %, -12.5" in text


def test_equal_is_enough_on_the_target_but_not_under_rules(script: ModuleType) -> None:
    same = scores(16, 15, 18)
    target, rules = script.goals(report(instruct=same, grafted=same, direct=same).to_dict())
    assert (target.reached, target.error) == (True, 0.0)
    assert (rules.reached, rules.error) == (False, 0.0)
    assert "within" not in target.line()


def test_error_of_the_goal_under_rules_is_the_paired_one(script: ModuleType) -> None:
    arms = {"instruct": scores(0, 0, 0), "grafted": scores(0, 14, 18), "direct": scores(0, 4, 14)}
    (_, rules) = script.goals(report(**arms).to_dict())
    assert rules.error == pytest.approx(math.sqrt((0.5 - 0.25) / 20 + (0.2 - 0.04) / 20) / 2)


def test_only_what_was_measured_is_judged(
    script: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    report(instruct=scores(16, 15, 18), grafted=scores(18, 14, 18)).write(tmp_path)
    assert script.main([str(tmp_path)]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 1
    other_kinds = Scores({"all": (True, False)})
    report(instruct=other_kinds, grafted=other_kinds, direct=other_kinds).write(tmp_path)
    assert script.main([str(tmp_path)]) == 2
    assert "no goal was measured" in capsys.readouterr().out
