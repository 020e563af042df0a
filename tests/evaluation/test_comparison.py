"""Which settings are chosen, what is compared with what, and what the files say: on values written by hand."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser

import numpy as np
import pytest

from shadow_trl.errors import ConfigError, GraftError, InputError
from shadow_trl.evaluation.charts import Axis
from shadow_trl.evaluation.comparison import Comparison, choose_target
from shadow_trl.evaluation.comparison_page import page
from shadow_trl.evaluation.comparison_report import markdown, summary, write_comparison
from shadow_trl.evaluation.exam import Exam, Metric, function_named
from shadow_trl.evaluation.measured import Measured, Settings
from shadow_trl.evaluation.trained import Trained, costs

METRICS = (Metric("target", ("target",)), Metric("kept", ("rule", "skill")), Metric("loss", ("loss",), False, False))


def values(target: int, rule: int, skill: int, loss: float = 1.0, rows: int = 400) -> dict[str, tuple[float, ...]]:
    """So many of each 100 rows are right."""

    def right(count: int) -> tuple[float, ...]:
        return tuple(float(at % 100 < count) for at in range(rows))

    losses = (loss, loss + 0.1) * (rows // 2)
    return {"target": right(target), "rule": right(rule), "skill": right(skill), "loss": losses}


def model(arm: str, validation, test=None, *, scale=None, pair="a", seed=None) -> Measured:
    settings = Settings(arm, scale=scale, modules="all" if scale else None)
    return Measured(settings, {"validation": validation, "test": test or validation}, pair, seed, {"score": 1.5})


def comparison(*models: Measured, **options) -> Comparison:
    return Comparison(models, METRICS, **{"target": "target", "keep": "kept", **options})


THREE = (
    model("instruct", values(20, 90, 96)),
    model("direct", values(60, 90, 95), scale=0.5),
    model("direct", values(95, 50, 60), scale=1.0),
    model("shadow", values(70, 90, 94), values(68, 90, 96), scale=0.5),  # kept: 93 - 92 = 1 point less, which may be
    model("shadow", values(90, 89, 94), scale=1.0),  # 1.5 points less
)


def test_the_highest_target_on_validation_that_keeps_what_it_must_is_chosen():
    found = comparison(*THREE)
    assert {arm: one.scale for arm, one in found.selected.items()} == {"instruct": None, "direct": 0.5, "shadow": 0.5}
    assert comparison(*THREE, within=1.5).selected["shadow"].scale == 1.0
    assert comparison(*THREE, keep=None).selected["direct"].scale == 1.0
    assert comparison(*THREE, target="loss", keep=None).selected["shadow"].scale == 0.5  # the first of equals
    strict = comparison(*THREE, within=0.0)
    assert strict.selected["shadow"] is None
    assert "no settings meet the condition" in markdown(strict)
    assert not [test for test in strict.tests if "shadow" in (test.a, test.b)]


def test_less_is_better_of_a_loss():
    models = (
        model("instruct", values(50, 90, 90, loss=2.0)),
        model("shadow", values(50, 90, 90, loss=1.5), scale=0.5),
        model("shadow", values(90, 90, 90, loss=1.8), scale=1.0),
        model("shadow", values(99, 90, 90, loss=3.2), scale=1.5),
    )
    found = comparison(*models, target="loss", keep=None)
    assert found.selected["shadow"].scale == 0.5
    (loss,) = [test for test in found.tests if test.metric.name == "loss"]
    assert loss.verdict.startswith("better by 0.500")
    assert comparison(*models, keep="loss", within=0.1).selected["shadow"].scale == 1.0


def test_a_small_difference_of_a_loss_is_not_shown_as_none():
    models = (model("instruct", values(50, 90, 90)), model("shadow", values(50, 90, 90, loss=0.9996), scale=1.0))
    found = comparison(*models, target="loss", keep=None)
    (loss,) = [test for test in found.tests if test.metric.name == "loss"]
    assert loss.verdict == "better by 0.00040 (0.00040 to 0.00040)"
    for shown in (markdown(found), page(found)):
        assert "-0.00040 to -0.00040" in shown


def test_every_two_selected_arms_are_compared_on_test_by_every_metric():
    tests = {(test.a, test.b, test.metric.name): test for test in comparison(*THREE).tests}
    assert set(tests) == {
        (a, b, name)
        for a, b in (("direct", "instruct"), ("shadow", "instruct"), ("shadow", "direct"))
        for name in ("target", "kept", "loss")
    }
    target = tests["shadow", "direct", "target"]
    assert target.found.value == pytest.approx(68 - 60)
    assert target.verdict.startswith("better by 8.0 points (")
    assert tests["shadow", "instruct", "kept"].verdict == "no difference above 2 points"
    assert target.p_adjusted == pytest.approx(min(1.0, 9 * min(test.found.p for test in tests.values())))


def spread(count: int, rows: int) -> tuple[float, ...]:
    """`count` of each 100 rows are right, and about that share of fewer rows."""
    return tuple(float(at * 37 % 100 < count) for at in range(rows))


@pytest.mark.parametrize(
    ("kept", "rows", "wanted"),
    [
        (85, 1000, "worse by 5.0 points ("),
        (85, 40, "too few rows to tell: about "),
        (90, 1000, "no difference above 2 points"),
        (90, 10, "too few rows to tell: about "),
    ],
)
def test_a_planted_damage_and_two_arms_that_are_one_are_told_with_enough_rows_only(kept, rows, wanted):
    metrics = (Metric("target", ("target",)), Metric("kept", ("rule",)))
    sound, other = ({"target": spread(60, rows), "rule": spread(share, rows)} for share in (90, kept))
    models = [model("instruct", sound), model("shadow", other, scale=1.0)]
    found = Comparison(models, metrics, "target", "kept", within=100.0)
    (test,) = [one for one in found.tests if one.metric.name == "kept"]
    assert (test.a, test.b) == ("shadow", "instruct")
    assert test.found.value == pytest.approx(kept - 90, abs=3.0)
    assert test.verdict.startswith(wanted)


def test_an_arm_has_one_name_in_every_file(tmp_path):
    """That of comparison.json: a title beside it would leave a reader to guess which is which."""
    found = comparison(*THREE, model("re-adapt", values(50, 90, 95), scale=1.0))
    write_comparison(found, tmp_path)
    content = json.loads((tmp_path / "comparison.json").read_text())
    arms = {arm["arm"] for arm in content["arms"]}
    text, html = ((tmp_path / f"comparison.{kind}").read_text() for kind in ("md", "html"))
    assert {cells[1].strip() for cells in (line.split("|") for line in text.splitlines()) if len(cells) > 1} >= arms
    rows = [re.sub(r"</t[dh]>", "|", row).split("|")[0] for row in re.findall("<tr>(.*?)</tr>", html)]
    assert {re.sub("<[^>]*>", "", row) for row in rows} >= arms | {"shadow against direct"}
    said = summary(found)
    for shown in (text, html, said):
        assert "INSTRUCT tuned directly" in shown  # said once, where the names are explained
        assert shown.count("INSTRUCT tuned directly") == 1
    assert all(f"{test.a} against {test.b}" in said for test in found.tests if test.metric.name == "target")


@pytest.mark.parametrize("chosen_on", ["the validation rows", "half of the prompts"])
def test_validation_is_said_of_validation_rows_alone(tmp_path, chosen_on):
    found = comparison(*THREE, chosen_on=chosen_on)
    write_comparison(found, tmp_path)
    for shown in (summary(found), *((tmp_path / f"comparison.{kind}").read_text() for kind in ("md", "html"))):
        assert f"highest target with kept at least INSTRUCT&#x27;s minus 1, on {chosen_on}" in shown.replace(
            "INSTRUCT's", "INSTRUCT&#x27;s"
        )
        assert ("validation" in shown) == ("validation" in chosen_on)


def test_the_page_has_what_training_cost_and_changed(tmp_path):
    sizes = {"sigma": 0.04, "delta": 0.004}
    moved = {"by_layer": {"model.layers.0": sizes, "model.norm": sizes}, "by_kind": {"q_proj": sizes, "norm": sizes}}
    made = {"pair": "a", "learning_rate": 1e-4, "rows": 600, "steps": 19}
    trainings = [
        Trained("base", **made, seed=1, seconds=5.0, curve=((10, 0.7), (19, 0.5)), **moved),
        Trained("base", **made, seed=2, seconds=7.0, curve=((10, 0.6), (19, 0.4)), **moved),
        Trained("instruct", **made, seed=1, seconds=9.0, curve=((10, 0.5), (19, 0.3))),
    ]
    found = comparison(*THREE, trainings=trainings, rows={"test": 1600, "validation": 1600})
    heads, rows = costs(found.selected, found.models, found.trainings)
    assert [dict(zip(heads, row, strict=True)) for row in rows] == [
        {"arm": arm, "models": models, "trainings": number, "rows trained on": rows, "optimiser steps": steps,
         "training, s": seconds, "making, s": "0.0", "scoring, s": scoring}
        for arm, models, number, rows, steps, seconds, scoring in (
            ("instruct", "1", "0", "", "", "", "1.5"), ("direct", "2", "1", "600", "19", "9.0", "3.0"),
            ("shadow", "2", "2", "1,200", "38", "12.0", "3.0"),
        )
    ]  # fmt: skip
    write_comparison(found, tmp_path)
    content = json.loads((tmp_path / "comparison.json").read_text())
    assert content["trainings"][0]["curve"] == [[10, 0.7], [19, 0.5]]
    assert content["trainings"][0]["by_kind"]["q_proj"] == sizes
    assert {arm["rows"] for arm in content["arms"]} == {1600}
    html = (tmp_path / "comparison.html").read_text()
    charts = re.findall(r"<figure>.*?</figure>", html, re.DOTALL)
    assert [re.search('aria-label="(.*?)"', one).group(1) for one in charts] == [
        "kept, % against target, %", "by layer", "by kind", "loss over steps"
    ]  # fmt: skip
    assert [len(re.findall("<polyline", re.sub("<ul.*?</ul>", "", one, flags=re.DOTALL))) for one in charts[1:]] == [
        2, 2, 3
    ]  # fmt: skip
    for unit in ("relative size, %", "step of the optimiser", ">loss<", ">layer<", "q_proj"):
        assert unit in html
    without = tmp_path / "without"
    without.mkdir()
    write_comparison(comparison(*THREE), without)
    assert html.count("<figure>") - (without / "comparison.html").read_text().count("<figure>") == 3


def test_the_axes_hold_their_values():
    for axis, some in (
        (Axis.linear([3.0, 97.0]), [3.0, 97.0]), (Axis.linear([5.0]), [5.0]), (Axis.linear([-0.2, 0.0]), [-0.2, 0.0]),
        (Axis.logarithmic([0.03, 4.0]), [0.03, 4.0]), (Axis.logarithmic([0.5]), [0.5]),
        (Axis.logarithmic([1e-7, 30.0]), [1e-7, 30.0]), (Axis.named(["a"]), [0.0]),
    ):  # fmt: skip
        assert all(0.0 < axis.share(value) < 1.0 for value in some)
        assert len(axis.labels) == len(axis.ticks)
    assert Axis.logarithmic([0.03, 4.0]).share(0.3) == pytest.approx(
        (Axis.logarithmic([0.03, 4.0]).share(0.03) + Axis.logarithmic([0.03, 4.0]).share(3.0)) / 2
    )


def test_trainings_are_compared_with_the_same_training_and_instruct_with_all_of_its_pair():
    models = [model("instruct", values(20, 90, 90), pair=pair) for pair in "ab"]
    for pair, seed, direct, shadow in (("a", 1, 50, 60), ("a", 2, 54, 60), ("b", 1, 70, 80), ("b", 9, 10, None)):
        models.append(model("direct", values(direct, 90, 90), scale=1.0, pair=pair, seed=seed))
        if shadow is not None:
            models.append(model("shadow", values(shadow, 90, 90), scale=1.0, pair=pair, seed=seed))
    tests = {(test.a, test.b): test.found for test in comparison(*models).tests if test.metric.name == "target"}
    assert tests["shadow", "direct"].value == pytest.approx((10 + 6 + 10) / 3)
    assert tests["shadow", "direct"].trainings == 3
    assert tests["direct", "instruct"].trainings == 4
    assert tests["shadow", "instruct"].value == pytest.approx((40 + 40 + 60) / 3)


def test_pairs_are_drawn_before_their_trainings():
    """Pairs that differ, whose trainings are alike, tell as much as one training each."""
    models = []
    for pair, gain in (("a", 30), ("b", 10)):
        models += [model("instruct", values(20, 90, 90), pair=pair)]
        models += [model("shadow", values(20 + gain, 90, 90), scale=1.0, pair=pair, seed=seed) for seed in range(8)]
    (several,) = [test.found for test in comparison(*models).tests if test.metric.name == "target"]
    (single,) = [
        test.found
        for test in comparison(*[one for one in models if one.seed in (None, 0)]).tests
        if test.metric.name == "target"
    ]
    assert several.trainings == 16
    assert several.error == pytest.approx(single.error, rel=0.1)
    uneven = comparison(*[one for one in models if one.training != ("b", 7)]).tests
    assert next(test.found for test in uneven if test.metric.name == "target").error < 0.7 * single.error


def test_the_files_say_the_same(tmp_path):
    found = comparison(*THREE, notes=["One <training>."], command="shadow-trl graft --scale 0.5")
    write_comparison(found, tmp_path)
    content = json.loads((tmp_path / "comparison.json").read_text())
    assert len(content["arms"]) == 2 * len(THREE)
    arm = next(one for one in content["arms"] if (one["arm"], one["scale"], one["split"]) == ("shadow", 0.5, "test"))
    assert arm["scores"] == {"target": pytest.approx(68), "kept": pytest.approx(93), "loss": pytest.approx(1.05)}
    assert {"learning_rate", "modules", "ref_policy", "pair", "seed", "rows"} <= set(arm)
    assert content["selected"]["direct"]["scale"] == 0.5
    low, high = content["intervals"]["direct"]["target"]
    assert low < content["tests"][0]["difference"] + 20 < high  # direct against INSTRUCT, which has 20
    assert f"60.0 ({low:.1f} to {high:.1f})" in (tmp_path / "comparison.html").read_text()
    assert {"a", "b", "metric", "difference", "interval", "p", "p_adjusted", "verdict"} == set(content["tests"][0])
    text, html = ((tmp_path / f"comparison.{kind}").read_text() for kind in ("md", "html"))
    for test in content["tests"]:
        assert test["verdict"] in text
        assert test["verdict"] in html
        if test["metric"] in ("target", "kept"):
            assert test["verdict"] in summary(found)
    assert "shadow-trl graft --scale 0.5" in text
    assert "shadow-trl graft --scale 0.5" in html
    assert "One &lt;training&gt;." in html


class _Tags(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.links: list[str] = []

    def handle_starttag(self, tag, attrs):
        self.links += [value for name, value in attrs if name in ("src", "href")]
        if tag not in ("meta",):
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.links += [value for name, value in attrs if name in ("src", "href")]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_the_page_stands_alone_and_its_marks_are_inside_the_chart(tmp_path):
    write_comparison(comparison(*THREE), tmp_path)
    html = (tmp_path / "comparison.html").read_text()
    tags = _Tags()
    tags.feed(html)
    assert (tags.open, tags.links) == ([], [])
    assert not re.search(r"https?:|<script|@import|url\(", html)
    marks = [tuple(map(float, at)) for at in re.findall(r"translate\(([\d.]+),([\d.]+)\)", html)]
    marks = [mark for mark in marks if mark != (0.0, 0.0)]  # those of the legend
    assert len(marks) == len(THREE)
    assert all(60 <= x <= 620 and 16 <= y <= 348 for x, y in marks)
    # direct at scale 1 has the highest target and the lowest kept: on the right, below all others.
    assert max(marks)[1] == max(y for _, y in marks)
    labels = [(float(x), float(y)) for x, y in re.findall(r'<text x="([\d.]+)" y="([\d.]+)">[\d.]+</text>', html)]
    assert len(labels) >= 3
    assert all(abs(a[0] - b[0]) > 7 or abs(a[1] - b[1]) > 14 for a in labels for b in labels if a is not b)


ROWS = [
    {"prompt": [{"role": "user", "content": f"{at}"}], "answer": "x", "kind": kind}
    for at in range(40)
    for kind in ("target", "style")
]


def test_no_prompt_is_in_both_halves_and_the_order_of_the_file_does_not_matter():
    def prompts(exam: Exam) -> dict[str, set[str]]:
        return {kind: {row["prompt"][0]["content"] for row in exam.rows if row["kind"] == kind} for kind in exam.kinds}

    halves, again = Exam(ROWS).halves(), Exam(ROWS[::-1]).halves()
    first, second = prompts(halves["validation"]), prompts(halves["test"])
    assert first["target"] == first["style"]
    assert not first["target"] & second["target"]
    assert len(first["target"] | second["target"]) == 40
    assert min(len(first["target"]), len(second["target"])) >= 10
    assert prompts(again["test"]) == second
    with pytest.raises(InputError, match="too few to choose settings"):
        Exam(ROWS[:4]).halves()


def test_metrics_follow_from_the_data():
    def length(model, tokenizer, rows):
        return [1.0] * (len(rows) - 1)

    length.higher_is_better = False
    exam = Exam(ROWS, functions={"length": length}, kept=("style",))
    assert [(metric.name, metric.higher) for metric in exam.metrics] == [
        ("target", True), ("style", True), ("kept", True), ("length", False)
    ]  # fmt: skip
    assert [metric.name for metric in Exam(ROWS).metrics] == ["target", "style", "mean"]
    talks = [{"messages": []}]
    assert [(one.name, one.share) for one in Exam(conversations=talks, pairs=talks).metrics] == [
        ("loss", False), ("token accuracy", True), ("preference accuracy", True), ("preference margin", False)
    ]  # fmt: skip
    assert choose_target(exam.metrics, None, None) == ("target", "kept")
    assert choose_target(exam.metrics, "length", "style") == ("length", "style")
    with pytest.raises(ConfigError, match="no metric of this comparison: target, style, kept, length"):
        choose_target(exam.metrics, None, "rule")
    with pytest.raises(ConfigError, match="1 kinds to be kept have no rows"):
        Exam(ROWS, kept=("rule",))
    with pytest.raises(ConfigError, match="nothing to compare by"):
        Exam()


@pytest.mark.parametrize("result", [lambda rows: [1.0] * (len(rows) - 1), lambda rows: [float("nan")] * len(rows)])
def test_a_function_that_returns_no_number_a_row_is_an_error(monkeypatch, result):
    from shadow_trl.evaluation import exam as module

    monkeypatch.setattr(module, "answered_right", lambda model, tokenizer, rows, **_: [True] * len(rows))
    exam = Exam(ROWS, functions={"odd": lambda model, tokenizer, rows: result(rows)})
    with pytest.raises(GraftError, match=r"numbers for 80 rows|not finite:\n *odd"):
        exam.take(None, None, [1])


def test_a_function_is_found_by_its_name():
    assert function_named("numpy:mean") is np.mean
    for text in ("numpy", "numpy:nothing", "no_such_module:f", ":f", "numpy:pi"):
        with pytest.raises(ConfigError, match="metric"):
            function_named(text)
