"""The end-of-run table: cells, goals and their errors by hand, and the same figures as JSON."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from shadow_trl.evaluation.report import Arm, RunReport, goals
from shadow_trl.evaluation.scoring import Scores


def scores(target: int, t_rule: int, rule: int) -> Scores:
    """So many right answers of 20 rows a kind; the right ones come first."""
    counts = {"target": target, "t_rule": t_rule, "rule": rule}
    return Scores({kind: tuple(row < right for row in range(20)) for kind, right in counts.items()})


GRAFT = {"sigma": 0.025, "delta_norm": 2.0, "delta_to_gap": 0.25, "realised": 0.99, "noise": 0.05, "dtype": "bfloat16"}


def report(grafted: Scores, direct: Scores | None = None) -> RunReport:
    arms = [
        Arm("instruct", "data/nano-instruct", scores(16, 15, 18)),
        *([Arm("direct", "out/direct", direct)] if direct else []),
        Arm("tuned", "out", scores(19, 2, 3)),
        Arm("grafted", "out/grafted", grafted),
    ]
    return RunReport(arms, output="out", graft=GRAFT, rows="test.jsonl", seconds={"score": 1.5})


def test_the_whole_text_of_a_run_that_reached_its_goals() -> None:
    text = report(scores(18, 14, 18), direct=scores(19, 4, 14)).text()
    assert text == "\n".join(
        [
            "exact match, %           target  t_rule  rule  mean",
            "rows                         20      20    20",
            "---------------------------------------------------",
            "INSTRUCT untouched         80.0    75.0  90.0  81.7",
            "INSTRUCT tuned directly    95.0    20.0  70.0  61.7",
            "tuned BASE                 95.0    10.0  15.0  40.0",
            "grafted INSTRUCT           90.0    70.0  90.0  83.3",
            "---------------------------------------------------",
            "standard error, at most     8.9    10.2  10.2   4.9",
            "",
            "pair   sigma 2.50 %: sum|BASE - INSTRUCT| / (sum|BASE| + sum|INSTRUCT|)",
            "delta  norm 2; sum|delta| is 0.25 times sum|BASE - INSTRUCT|",
            "       99.0 % of it realised in bfloat16, with rounding noise of 5.0 % of its norm",
            "",
            "result out/grafted  (grafted INSTRUCT)",
            "tuned  out  (tuned BASE)",
            "direct out/direct  (INSTRUCT tuned directly)",
            "",
            "The goal of this run was reached.",
            # Two of 20 rows won, none lost: sqrt((0.1 - 0.01) / 20) = 6.7 points.
            "  reached: the graft is at least as good as INSTRUCT on the target: 90.0 against 80.0 %, +10.0 points "
            "(standard error 6.7; within the sampling error)",
            # t_rule 10 of 20 won: variance 0.25 / 20; rule 4 of 20: 0.16 / 20; sqrt(sum) / 2 = 7.2 points.
            "  reached: it loses less under rules than direct tuning: 80.0 against 45.0 %, +35.0 points "
            "(standard error 7.2)",
        ]
    )


def test_goals_that_were_missed_are_said_to_be() -> None:
    missed = report(scores(12, 3, 10), direct=scores(19, 4, 14))
    text = missed.text()
    assert "The goal of this run was not reached: 2 of 2 parts failed." in text
    assert "NOT reached: the graft is at least as good as INSTRUCT on the target: 60.0 against 80.0 %, -20.0" in text
    assert "NOT reached: it loses less under rules than direct tuning: 32.5 against 45.0 %, -12.5" in text


def test_equal_is_enough_on_the_target_but_not_under_rules() -> None:
    same = scores(16, 15, 18)
    target, rules = goals({"instruct": same, "grafted": same, "direct": same})
    assert (target.reached, target.error) == (True, 0.0)
    assert (rules.reached, rules.error) == (False, 0.0)
    assert not target.within_error


def test_error_of_the_goal_under_rules_is_the_paired_one() -> None:
    (_, rules) = goals({"instruct": scores(0, 0, 0), "grafted": scores(0, 14, 18), "direct": scores(0, 4, 14)})
    assert rules.error == pytest.approx(math.sqrt((0.5 - 0.25) / 20 + (0.2 - 0.04) / 20) / 2)


def test_only_what_was_measured_is_judged() -> None:
    without_direct = report(scores(18, 14, 18)).text()
    assert "The part that was measured was reached." in without_direct
    assert "direct" not in without_direct
    other_kinds = Scores({"all": (True, False)})
    assert goals({"instruct": other_kinds, "grafted": other_kinds, "direct": other_kinds}) == []


def test_a_run_without_scores_or_graft_still_says_where_the_result_lies() -> None:
    text = RunReport([Arm("tuned", "out")], output="out").text()
    assert text == "tuned  out  (tuned BASE)"
    adapter = {"sigma": None, "delta_norm": None, "realised": None, "noise": None, "dtype": "bfloat16"}
    text = RunReport([Arm("tuned", "out"), Arm("grafted", "out/grafted")], output="out", graft=adapter).text()
    assert text == "result out/grafted  (grafted INSTRUCT)\ntuned  out  (tuned BASE)"


def test_json_has_the_same_figures(tmp_path: Path) -> None:
    made = report(scores(18, 14, 18), direct=scores(19, 4, 14))
    path = made.write(tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == ["report.json"]
    figures = json.loads(path.read_text())
    assert figures["arms"]["grafted"]["scores"]["kinds"]["t_rule"]["share"] == 0.7
    assert figures["arms"]["direct"]["source"] == "out/direct"
    assert figures["graft"]["sigma"] == 0.025
    assert [goal["reached"] for goal in figures["goals"]] == [True, True]
    assert figures["seconds"] == {"score": 1.5}
    assert figures["rows"] == "test.jsonl"
