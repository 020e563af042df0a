"""The end-of-run report: cells, differences and their errors by hand, and the same figures as JSON."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from shadow_trl.evaluation.report import RunReport
from shadow_trl.evaluation.scoring import Scores


def scores(target: int, t_rule: int, rule: int) -> Scores:
    """So many right answers of 20 rows a kind; the right ones come first."""
    counts = {"target": target, "t_rule": t_rule, "rule": rule}
    return Scores({kind: tuple(row < right for row in range(20)) for kind, right in counts.items()})


GRAFT = {"sigma": 0.025, "delta_norm": 2.0, "delta_to_gap": 0.25, "realised": 0.99, "noise": 0.05, "dtype": "bfloat16"}


def report(grafted: Scores, direct: Scores | None = None) -> RunReport:
    models = {"instruct": "data/nano-instruct", "direct": "out/direct", "tuned": "out", "grafted": "out/grafted"}
    found = {"instruct": scores(16, 15, 18), "direct": direct, "tuned": scores(19, 2, 3), "grafted": grafted}
    if direct is None:
        del models["direct"], found["direct"]
    return RunReport(models, "out", found, graft=GRAFT, rows="test.jsonl", seconds={"score": 1.5})


def test_the_whole_text_of_a_run() -> None:
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
            # Against INSTRUCT two of 20 rows won: sqrt((0.1 - 0.01) / 20) = 6.7 points; one lost: 4.9 points.
            "grafted INSTRUCT minus        target        t_rule         rule         mean",
            "----------------------------------------------------------------------------",
            "INSTRUCT untouched       +10.0 ± 6.7    -5.0 ± 4.9   +0.0 ± 0.0   +1.7 ± 2.8",
            "INSTRUCT tuned directly   -5.0 ± 4.9  +50.0 ± 11.2  +20.0 ± 8.9  +21.7 ± 5.0",
            "tuned BASE                -5.0 ± 4.9  +60.0 ± 11.0  +75.0 ± 9.7  +43.3 ± 5.1",
            "(percentage points ± standard error over the same rows)",
            "",
            "pair   sigma 2.50 %: sum|BASE - INSTRUCT| / (sum|BASE| + sum|INSTRUCT|)",
            "delta  norm 2; sum|delta| is 0.25 times sum|BASE - INSTRUCT|",
            "       99.0 % of it realised in bfloat16, with rounding noise of 5.0 % of its norm",
            "",
            "result out/grafted  (grafted INSTRUCT)",
            "tuned  out  (tuned BASE)",
            "direct out/direct  (INSTRUCT tuned directly)",
        ]
    )


def test_the_errors_of_the_differences_are_the_paired_ones() -> None:
    made = report(scores(18, 14, 18), direct=scores(19, 4, 14))
    (target, t_rule, rule, mean) = made.differences()["direct"]
    # One of 20 rows lost, ten won, four won: the mean of d, and (mean of d^2 - its square) / 20.
    assert target == pytest.approx((-0.05, math.sqrt((0.05 - 0.0025) / 20)))
    assert t_rule == pytest.approx((0.5, math.sqrt((0.5 - 0.25) / 20)))
    assert rule == pytest.approx((0.2, math.sqrt((0.2 - 0.04) / 20)))
    assert mean == pytest.approx((0.65 / 3, math.sqrt((0.0475 + 0.25 + 0.16) / 20) / 3))
    assert made.to_dict()["differences"]["direct"]["kinds"]["t_rule"] == {"difference": t_rule[0], "error": t_rule[1]}
    assert list(made.differences()) == ["instruct", "direct", "tuned"]


def test_only_what_was_measured_is_compared() -> None:
    assert "direct" not in report(scores(18, 14, 18)).text()
    without_graft = RunReport({"instruct": "i"}, "out", {"instruct": scores(16, 15, 18)})
    assert without_graft.differences() == without_graft.to_dict()["differences"] == {}
    assert "minus" not in without_graft.text()


def test_a_run_without_scores_or_graft_still_says_where_the_result_is() -> None:
    text = RunReport({"tuned": "out"}, output="out").text()
    assert text == "tuned  out  (tuned BASE)"
    adapter = {"sigma": None, "delta_norm": None, "realised": None, "noise": None, "dtype": "bfloat16"}
    text = RunReport({"tuned": "out", "grafted": "out/grafted"}, output="out", graft=adapter).text()
    assert text == "result out/grafted  (grafted INSTRUCT)\ntuned  out  (tuned BASE)"


def test_json_has_the_same_figures(tmp_path: Path) -> None:
    made = report(scores(18, 14, 18), direct=scores(19, 4, 14))
    path = made.write(tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == ["report.json"]
    figures = json.loads(path.read_text())
    assert figures["arms"]["grafted"]["scores"]["kinds"]["t_rule"]["share"] == 0.7
    assert figures["arms"]["direct"]["source"] == "out/direct"
    assert figures["graft"]["sigma"] == 0.025
    assert figures["differences"]["instruct"]["mean"]["difference"] == pytest.approx((2 - 1 + 0) / 60)
    assert figures["seconds"] == {"score": 1.5}
    assert figures["rows"] == "test.jsonl"
