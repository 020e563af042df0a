"""The end-of-run report: cells, differences, their errors and the verdict by hand, and the same figures as JSON."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from shadow_trl.evaluation.report import Arm, RunReport
from shadow_trl.evaluation.scoring import Scores


def scores(target: int, t_rule: int, rule: int) -> Scores:
    """So many right answers of 20 rows a kind; the right ones come first."""
    counts = {"target": target, "t_rule": t_rule, "rule": rule}
    return Scores({kind: tuple(row < right for row in range(20)) for kind, right in counts.items()})


GRAFT = {"sigma": 0.025, "delta_norm": 2.0, "delta_to_gap": 0.25, "realised": 0.99, "noise": 0.05, "dtype": "bfloat16"}
INSTRUCT = Arm("instruct", "data/nano-instruct", None, scores(16, 15, 18))
DIRECT = Arm("direct", "out/direct", 1.0, scores(19, 4, 14))
TUNED = Arm("tuned", "out", 1.0, scores(19, 2, 3))
SHADOW = Arm("shadow", "out/grafted", 1.0, scores(18, 14, 18))


def report(*arms: Arm, kept: tuple[str, ...] = ()) -> RunReport:
    return RunReport(arms, "out", graft=GRAFT, rows="test.jsonl", kept=kept, seconds={"score": 1.5})


def test_the_whole_text_of_a_run() -> None:
    half = Arm("direct", "out/direct", 0.5, scores(18, 10, 16))
    text = report(INSTRUCT, half, DIRECT, TUNED, SHADOW, kept=("t_rule", "rule")).text()
    assert text == "\n".join(
        [
            "exact match, %           scale  target  t_rule  rule  kept",
            "rows                                20      20    20",
            "----------------------------------------------------------",
            "INSTRUCT untouched                80.0    75.0  90.0  82.5",
            "INSTRUCT tuned directly    0.5    90.0    50.0  80.0  65.0",
            "INSTRUCT tuned directly      1    95.0    20.0  70.0  45.0",
            "tuned BASE                   1    95.0    10.0  15.0  12.5",
            "grafted INSTRUCT             1    90.0    70.0  90.0  80.0",
            "----------------------------------------------------------",
            "standard error, at most            8.9    11.2  10.2   7.2",
            "",
            # Against INSTRUCT two of 20 rows won: sqrt((0.1 - 0.01) / 20) = 6.7 points; one lost: 4.9 points.
            "grafted INSTRUCT minus   scale       target        t_rule         rule         kept",
            "-----------------------------------------------------------------------------------",
            "INSTRUCT untouched           1  +10.0 ± 6.7    -5.0 ± 4.9   +0.0 ± 0.0   -2.5 ± 2.4",
            "INSTRUCT tuned directly      1   -5.0 ± 4.9  +50.0 ± 11.2  +20.0 ± 8.9  +35.0 ± 7.2",
            "tuned BASE                   1   -5.0 ± 4.9  +60.0 ± 11.0  +75.0 ± 9.7  +67.5 ± 7.3",
            "(percentage points ± standard error over the same rows)",
            "",
            "What this run shows: at the same scale the graft is ahead of direct tuning on `kept` (35.0 points at",
            "  scale 1).",
            "What it does not show: it is a tie on `target` (-5.0 points at scale 1).",
            "",
            "pair   sigma 2.50%: sum|BASE - INSTRUCT| / (sum|BASE| + sum|INSTRUCT|)",
            "delta  norm 2; sum|delta| is 0.25 times sum|BASE - INSTRUCT|",
            "       99.0% of it realised in bfloat16, with rounding noise of 5.0% of its norm",
            "",
            "result out/grafted  (grafted INSTRUCT)",
            "tuned  out  (tuned BASE)",
            "direct out/direct  (INSTRUCT tuned directly)",
            "",
            "Chat with the graft:  shadow-trl chat out/grafted",
            "Your own pair:        --config with one of recipes/configs, or --model_name_or_path and --instruct_model",
        ]
    )


def test_the_errors_of_the_differences_are_the_paired_ones() -> None:
    found = {other.name: figures for _, other, figures in report(INSTRUCT, DIRECT, TUNED, SHADOW).differences()}
    assert list(found) == ["instruct", "direct", "tuned"]
    # One of 20 rows lost, ten won, four won: the mean of d, and (mean of d^2 - its square) / 20.
    assert found["direct"]["target"] == pytest.approx((-0.05, math.sqrt((0.05 - 0.0025) / 20)))
    assert found["direct"]["t_rule"] == pytest.approx((0.5, math.sqrt((0.5 - 0.25) / 20)))
    assert found["direct"]["rule"] == pytest.approx((0.2, math.sqrt((0.2 - 0.04) / 20)))
    assert found["direct"]["mean"] == pytest.approx((0.65 / 3, math.sqrt((0.0475 + 0.25 + 0.16) / 20) / 3))


def test_arms_are_compared_at_the_same_scale() -> None:
    halves = [Arm(arm.name, arm.source, 0.5, arm.scores) for arm in (DIRECT, SHADOW)]
    compared = report(INSTRUCT, halves[0], DIRECT, halves[1], SHADOW).differences()
    assert [(graft.scale, other.name, other.scale) for graft, other, _ in compared] == [
        (0.5, "instruct", None), (0.5, "direct", 0.5), (1.0, "instruct", None), (1.0, "direct", 1.0),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("shadow", "direct", "words"),
    [
        (
            (20, 14, 18),
            (10, 14, 18),
            ["tuning on `target` (50.0", "a tie on `t_rule` (+0.0 points at scale 1) and `rule`"],
        ),
        ((10, 14, 18), (20, 14, 18), ["nothing in favour of the graft", "direct tuning is ahead on `target` (50.0"]),
        # 3 of 20 more: 15 points with an error of 8: less than two errors.
        ((13, 14, 18), (10, 14, 18), ["nothing in favour of the graft", "a tie on `target` (+15.0"]),
        ((16, 14, 18), (10, 14, 18), ["tuning on `target` (30.0"]),
    ],
)
def test_what_a_run_shows(shadow: tuple[int, ...], direct: tuple[int, ...], words: list[str]) -> None:
    arms = [Arm(name, name, 1.0, scores(*found)) for name, found in (("direct", direct), ("shadow", shadow))]
    text = " ".join(report(*arms).text().split())
    assert all(word in text for word in words), text


def test_without_direct_tuning_the_graft_is_set_against_instruct() -> None:
    gained = Arm("shadow", "out/grafted", 1.0, scores(20, 8, 18))
    text = " ".join(report(INSTRUCT, gained, kept=("t_rule",)).text().split())
    # rule is neither the target nor counted as kept.
    assert "What this run shows: the graft is ahead of INSTRUCT on `target` (20.0 points at scale 1)." in text
    assert "What it does not show: INSTRUCT is ahead on `kept` (35.0 points at scale 1); it is a tie on `rule`" in text


def test_a_graft_of_another_scale_is_not_compared_with_direct_tuning() -> None:
    half = Arm("shadow", "out/grafted", 0.5, SHADOW.scores)
    text = report(INSTRUCT, DIRECT, half).text()
    assert "What this run shows" not in text
    assert "Direct tuning was not scored at the graft's scale: add --score_scales 0.5 to do so." in text


def test_only_what_was_measured_is_compared() -> None:
    assert "direct" not in report(INSTRUCT, SHADOW).text()
    without_graft = report(INSTRUCT, DIRECT)
    assert without_graft.to_dict()["differences"] == []
    assert "minus" not in without_graft.text()


def test_a_run_without_scores_or_graft_still_says_where_the_result_is() -> None:
    text = RunReport([Arm("tuned", "out")], output="out").text()
    assert text == "tuned  out  (tuned BASE)"
    adapter = {"sigma": None, "delta_norm": None, "realised": None, "noise": None, "dtype": "bfloat16"}
    text = RunReport([Arm("tuned", "out"), Arm("shadow", "out/a b")], output="out", graft=adapter).text()
    assert text.startswith("result out/a b  (grafted INSTRUCT)\ntuned  out  (tuned BASE)\n\n")
    assert "shadow-trl chat 'out/a b'" in text


def test_json_has_the_same_figures(tmp_path: Path) -> None:
    path = report(INSTRUCT, DIRECT, Arm("tuned", "out"), SHADOW, kept=("t_rule", "rule")).write(tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == ["report.json"]
    figures = json.loads(path.read_text())
    assert figures["arms"][0] == {
        "arm": "instruct", "scale": None, "source": "data/nano-instruct", "rows": 60,
        "scores": {"target": 80.0, "t_rule": 75.0, "rule": 90.0, "kept": 82.5},
    }  # fmt: skip
    assert figures["arms"][2] == {"arm": "tuned", "scale": 1.0, "source": "out", "scores": None, "rows": 0}
    kept = {"a": "shadow", "b": "direct", "scale": 1.0, "metric": "kept"}
    (found,) = [row for row in figures["differences"] if kept.items() <= row.items()]
    assert found["difference"] == pytest.approx(35.0)
    assert found["error"] == pytest.approx(100 * math.sqrt((0.25 + 0.16) / 20) / 2)
    assert figures["graft"]["sigma"] == 0.025
    assert (figures["kept"], figures["seconds"], figures["rows"]) == (["t_rule", "rule"], {"score": 1.5}, "test.jsonl")
