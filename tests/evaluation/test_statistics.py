"""Comparisons against cases whose answer is known: by hand, by scipy's own tests, by planted differences."""

from __future__ import annotations

import re

import numpy as np
import pytest
from scipy import stats

from shadow_trl.evaluation.statistics import Difference, compare, holm, interval_of, rows_that_tell, verdict


def hits(rows: int, share: float, *, seed: int, trainings: int = 1) -> np.ndarray:
    return (np.random.default_rng(seed).random((trainings, rows)) < share).astype(float)


def judged(a, b, margin: float = 0.02) -> str:
    found = compare(a, b, bound=1.0)
    return verdict(found, found.p, margin=margin, unit="", digits=3)


def test_p_is_that_of_mcnemars_exact_test():
    """7 rows right by a alone, 1 by b alone: sign flips of eight rows are the binomial test of 7 in 8."""
    a, b = np.zeros((1, 50)), np.zeros((1, 50))
    a[0, :7] = 1.0
    b[0, 7] = 1.0
    found = compare({"all": a}, {"all": b}, bound=1.0)
    assert found.value == pytest.approx(6 / 50)
    assert found.p == pytest.approx(stats.binomtest(7, 8).pvalue)


@pytest.mark.parametrize("seed", range(3))
def test_the_interval_of_one_training_is_that_of_bonett_and_price(seed):
    """By their formula: (n12 - n21) / (n + 2) and the Wald error with one more row in each discordant cell."""
    rows = 400
    a, b = hits(rows, 0.8, seed=seed), hits(rows, 0.7, seed=seed + 100)
    found = compare({"all": a}, {"all": b}, bound=1.0)
    up, down = float(((a > b).sum() + 1) / (rows + 2)), float(((a < b).sum() + 1) / (rows + 2))
    half = 1.96 * ((up + down - (up - down) ** 2) / (rows + 2)) ** 0.5
    assert found.interval == pytest.approx((up - down - half, up - down + half), abs=0.006)
    assert found.value == pytest.approx(a.mean() - b.mean())


def test_the_interval_of_a_loss_is_that_of_the_t_test():
    rng = np.random.default_rng(4)
    a, noise = rng.gamma(2.0, 1.0, (1, 500)), rng.normal(0.05, 0.3, (1, 500))
    found = compare({"loss": a + noise}, {"loss": a})
    wanted = stats.ttest_rel((a + noise)[0], a[0])
    assert found.interval == pytest.approx(tuple(wanted.confidence_interval(0.95)), abs=0.004)
    assert found.p == pytest.approx(wanted.pvalue, abs=0.002)


def test_the_error_of_several_trainings_is_that_of_both_draws():
    """Trainings differ by a known amount and rows too: the variance is the sum of both, the trainings' by hand."""
    rng = np.random.default_rng(1)
    of_training, of_row = rng.normal(0, 0.05, (8, 1)), rng.normal(0, 0.4, (1, 300))
    a = of_training + of_row
    found = compare({"all": a}, {"all": np.zeros((1, 300))})
    error = (np.var(of_training) / 8 + np.var(of_row) / 300) ** 0.5
    assert found.interval == pytest.approx((a.mean() - 1.96 * error, a.mean() + 1.96 * error), abs=0.006)
    assert found.error == pytest.approx(error, rel=0.06)
    assert found.row_error == pytest.approx((np.var(of_row) / 300) ** 0.5, rel=0.06)
    assert (found.trainings, found.rows) == (8, 300)


def test_trainings_of_a_pair_that_are_alike_do_not_make_the_interval_shorter():
    """Two steps by hand: the variance of the mean is that of the pairs, of their trainings, and of the rows."""
    rng = np.random.default_rng(2)
    of_pair, of_training = rng.normal(0, 0.1, (6, 1)), rng.normal(0, 0.05, (6, 5))
    trainings = (of_pair + of_training - of_training.mean(1, keepdims=True)).reshape(30, 1)
    a = trainings + rng.normal(0, 0.4, (1, 400))
    zeros = np.zeros((1, 400))
    found = compare({"all": a}, {"all": zeros}, pairs=6)
    within = np.var(of_training, axis=1).mean()
    error = (np.var(of_pair) / 6 + within / 30 + np.var(a.mean(0)) / 400) ** 0.5
    assert found.error == pytest.approx(error, rel=0.05)
    assert found.value == pytest.approx(a.mean())
    assert (found.trainings, found.rows) == (30, 400)
    flat = compare({"all": a}, {"all": zeros})
    assert found.error > 1.5 * flat.error
    low, high = interval_of({"all": a}, pairs=6)
    assert (high - low) / (2 * 1.96) == pytest.approx(error, rel=0.08)
    # One training a pair: the pairs are what is drawn.
    assert compare({"all": a[::5]}, {"all": zeros}, pairs=6) == compare({"all": a[::5]}, {"all": zeros})


@pytest.mark.parametrize("right", [360, 400])
def test_the_interval_of_one_model_is_that_of_wilson(right):
    """Of shares, by scipy; of other values that of the t test."""
    found = interval_of({"all": np.array([[1.0] * right + [0.0] * (400 - right)])}, bound=1.0)
    wanted = stats.binomtest(right, 400).proportion_ci(0.95, method="wilson")
    assert found == pytest.approx(tuple(wanted), abs=0.006)
    losses = np.random.default_rng(3).gamma(2.0, 1.0, (1, 500))
    error = losses.std(ddof=1) / 500**0.5
    wanted = stats.t.interval(0.95, 499, losses.mean(), error)
    assert interval_of({"loss": losses}) == pytest.approx(wanted, abs=0.02)


def test_kinds_count_alike_however_many_rows_they_have():
    a = {"few": np.ones((1, 10)), "many": np.zeros((1, 990))}
    b = {"few": np.zeros((1, 10)), "many": np.zeros((1, 990))}
    assert compare(a, b, bound=1.0).value == pytest.approx(0.5)


@pytest.mark.parametrize("kinds", [["all"], ["target", "rule"]])
def test_identical_arms_are_the_same_with_enough_rows_and_not_with_ten(kinds):
    many, few = ({kind: hits(rows, 0.9, seed=0) for kind in kinds} for rows in (1000, 10))
    assert judged(many, many) == "no difference above 0.02"
    assert re.match("too few rows to tell: about [0-9,]+ are needed, ", judged(few, few))


def test_equal_values_without_a_margin_are_no_difference():
    """Neither more rows nor more trainings would tell anything else."""
    losses = np.random.default_rng(3).gamma(2.0, 1.0, (2, 50))
    found = compare({"loss": losses}, {"loss": losses})
    assert verdict(found, found.p, margin=None, unit="") == "no difference on any row"
    other = compare({"loss": losses + np.array([[0.1], [-0.1]])}, {"loss": losses})
    assert verdict(other, other.p, margin=None, unit="").startswith("too few rows to tell")


def test_arms_of_equal_skill_are_the_same_with_enough_rows():
    base = hits(4000, 0.9, seed=1)
    other = np.where(hits(4000, 0.02, seed=2) > 0, hits(4000, 0.9, seed=3), base)
    assert judged({"all": base}, {"all": other}) == "no difference above 0.02"


def test_a_planted_damage_of_five_points_is_found_with_enough_rows_only():
    for rows, wanted in ((2000, "worse by 0.0"), (30, "too few rows to tell")):
        sound = hits(rows, 0.9, seed=5)
        damaged = sound * (1.0 - hits(rows, 0.05 / 0.9, seed=6))
        assert judged({"all": damaged}, {"all": sound}).startswith(wanted)
        if rows == 2000:
            assert judged({"all": sound}, {"all": damaged}).startswith("better by 0.0")


@pytest.mark.parametrize("damage", [0.05, 0.0])
def test_the_number_of_rows_that_would_tell_does_tell(damage):
    """New rows in that number tell in about `POWER` of the draws."""

    def drawn(rows: int, seed: int):
        sound = hits(rows, 0.85, seed=seed)
        moved = hits(rows, 0.1, seed=seed + 2) * (hits(rows, 0.5, seed=seed + 3) * 2 - 1)
        return np.clip(sound - (hits(rows, damage / 0.85, seed=seed + 1) > 0) + moved, 0, 1), sound

    a, b = drawn(2000, 50)
    found = compare({"all": a}, {"all": b}, bound=1.0)
    small = Difference(
        found.value, tuple(found.value + (end - found.value) * 5 for end in found.interval), 0.5, 80, 1,
        found.error * 5,
        found.row_error * 5,
    )  # fmt: skip
    wanted = rows_that_tell(small, margin=0.02)
    told = [
        not judged({"all": a}, {"all": b}).startswith("too few") for a, b in (drawn(wanted, 10 * s) for s in range(8))
    ]
    assert sum(told) >= 5


def test_no_number_of_rows_tells_where_trainings_differ_more_than_the_margin():
    a = np.array([[1.0], [0.0], [1.0], [0.0]]) * np.ones((1, 200))
    found = compare({"all": a}, {"all": np.full((1, 200), 0.49)}, bound=1.0)
    assert rows_that_tell(found, margin=0.02) is None
    assert "more trainings" in verdict(found, found.p, margin=0.02, unit="points")


def test_holm_is_as_its_paper_says():
    """Ordered 0.005, 0.01, 0.03, 0.04 times 4, 3, 2, 1, and never below the one before."""
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.9, 0.8]) == [1.0, 1.0]
    assert holm([]) == []


def test_a_difference_that_many_comparisons_explain_is_not_called_one():
    found = Difference(3.0, (0.5, 5.5), 0.02, 500, 1, 1.27, 1.27)
    assert verdict(found, 0.02, margin=2.0, unit="points") == "better by 3.0 points (0.5 to 5.5)"
    assert verdict(found, 0.2, margin=2.0, unit="points").startswith("too few rows to tell")
    lower = Difference(-3.0, (-5.5, -0.5), 0.02, 500, 1, 1.27, 1.27)
    assert verdict(lower, 0.02, margin=2.0, unit="points") == "worse by 3.0 points (0.5 to 5.5)"
