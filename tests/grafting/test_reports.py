"""Reports: the figures in the places of their words, and each warning from its threshold on."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from shadow_trl.arithmetic.sums import Sums
from shadow_trl.grafting.reports import (
    POOR_NOISE,
    POOR_REALISED,
    WIDE_GAP,
    DeltaReport,
    GapReport,
    GraftReport,
    gap_report,
    graft_figures,
    graft_warnings,
)

Q, K = "model.layers.2.self_attn.q_proj.weight", "model.layers.10.self_attn.k_proj.weight"


def test_a_gap_as_a_table():
    gaps = {Q: Sums(elements=1000, gap=1.0, size=8.0), K: Sums(elements=500, gap=0.0, size=4.0)}
    deltas = {
        Q: Sums(elements=1000, gap=3.0, size=16.0, dd=4.0, dg=-1.0, gg=1.0), K: Sums(elements=500, gap=1.0, size=4.0)
    }  # fmt: skip
    report = gap_report(gaps, deltas, ["told"])
    lines = [line.split() for line in report.text().splitlines()]
    assert lines[:-3] == [
        ["sigma", "delta", "delta/gap", "cosine", "elements"],
        ["overall", "0.08333", "0.20000", "4.00000", "-0.50000", "1,500"],
        [], ["by", "kind"],
        ["q_proj", "0.12500", "0.18750", "3.00000", "-0.50000", "1,000"],
        ["k_proj", "0.00000", "0.25000", "-", "-", "500"],
        [], ["by", "layer"],
        ["model.layers.2", "0.12500", "0.18750", "3.00000", "-0.50000", "1,000"],
        ["model.layers.10", "0.00000", "0.25000", "-", "-", "500"],
    ]  # fmt: skip
    assert "They do not tell whether a graft gains" in report.text()
    assert (report.weights, report.elements, report.warnings) == (2, 1500, ["told"])
    alone = gap_report(gaps, None, [])
    assert [line.split() for line in alone.text().splitlines()][:2] == [
        ["sigma", "elements"], ["overall", "0.08333", "1,500"],
    ]  # fmt: skip
    assert (alone.delta, alone.delta_to_gap, alone.cosine) == (None, None, None)
    assert "gains" not in alone.text()
    assert GapReport(None, {}, {}, 0, 0).text().splitlines()[1].split() == ["overall", "-", "0"]


def test_a_graft_and_a_delta_as_lines():
    figures = {"sigma": 0.5, "delta_norm": 2.0, "realised": 0.25, "noise": 0.125}
    graft = GraftReport(Path("out"), "model", 3, 4, "bfloat16", **figures, dense_because=["one", "two"])
    assert graft.text().splitlines() == [
        "model in out: 3 weights grafted, 4 copied, bfloat16",
        "dense because one; two",
        "sigma 0.5  delta_norm 2  realised 0.25  noise 0.125",
    ]
    assert graft.to_dict()["output"] == "out"
    assert GraftReport(Path("out"), "adapter", 3, 0, "float32").text() == (
        "adapter in out: 3 modules grafted, 0 copied, float32"
    )
    for exact, word in ((True, ", exact"), (False, ", rounded"), (None, "")):
        assert (
            DeltaReport(Path("d"), "delta", 2, "float32", exact=exact).text() == f"delta in d: 2 weights, float32{word}"
        )
    modules = {f"m{number}": {"energy": number / 10, "share": 0.1} for number in range(9, 2, -1)}
    lost = {f"w{number}": number / 100 for number in range(1, 8)}
    adapter = DeltaReport(Path("d"), "adapter", 7, "float32", rank=4, kept=0.5, modules=modules, lost=lost)
    assert adapter.text().splitlines() == [
        "adapter in d: 7 modules, rank 4, float32",
        "keeps 50.00% of the delta's squared norm; of a module's own at least",
        "  30.00%  m3", "  40.00%  m4", "  50.00%  m5", "  60.00%  m6", "  70.00%  m7",
        "loses 28.00% with 7 weights that have no low-rank form",
        "  7.00%  w7", "  6.00%  w6", "  5.00%  w5", "  4.00%  w4", "  3.00%  w3",
    ]  # fmt: skip


def test_figures_of_sums():
    sums = {Q: Sums(elements=4, gap=1.0, size=4.0, dd=9.0, ed=-4.5, ee=2.25), K: Sums(elements=2, dd=7.0)}
    found = graft_figures(sums, True)
    assert found["sigma"] == 0.25
    assert found["delta_norm"] == 4.0
    assert found["realised"] == 1 - 4.5 / 16
    assert found["noise"] == math.sqrt(2.25 / 16)
    assert found["by_kind"]["q_proj"] == {
        "sigma": 0.25, "delta_norm": 3.0, "realised": 0.5, "noise": 0.5, "weights": 1, "elements": 4,
    }  # fmt: skip
    assert (found["by_kind"]["k_proj"]["sigma"], found["by_kind"]["k_proj"]["noise"]) == (None, 0.0)
    assert graft_figures(sums, True, sigma=False)["sigma"] is None
    assert graft_figures(sums, False) == graft_figures({}, True) == {}


@pytest.mark.parametrize(
    ("figures", "words"),
    [
        ({}, None),
        ({"delta_norm": 1.0, "sigma": WIDE_GAP, "realised": 1.0, "noise": POOR_NOISE}, None),
        ({"delta_norm": 0.0}, "the delta is zero"),
        ({"sigma": WIDE_GAP + 1e-6}, "far apart: sigma is 0.1"),
        ({"realised": 1 - POOR_REALISED + 1e-6}, None),
        ({"realised": 1 - POOR_REALISED - 1e-6}, "realised is 0.9 instead of 1"),
        ({"realised": 1 + POOR_REALISED + 1e-6}, "realised is 1.1 instead of 1"),
        ({"noise": POOR_NOISE + 1e-6}, "noise of 0.5 times"),
    ],
)
def test_a_warning_begins_at_its_threshold(figures, words):
    found = graft_warnings(figures, "bfloat16", "nearest")
    assert len(found) == (words is not None)
    assert words is None or words in found[0]


def test_stochastic_rounding_is_no_way_out_of_itself():
    for rounding in ("nearest", "stochastic"):
        (found,) = graft_warnings({"realised": 0.0}, "bfloat16", rounding)
        assert ("--rounding stochastic" in found) == (rounding == "nearest")
