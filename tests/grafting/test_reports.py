"""Reports: the figures in the places of their words, and each warning from its threshold on."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from shadow_trl.arithmetic.sums import POOR_REALISED, Sums
from shadow_trl.grafting.reports import (
    POOR_NOISE,
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
    how = {"realised_in_bf16": 0.125, "rounding": "stochastic", "rounded_because": "of that"}
    more = GraftReport(Path("out"), "model", 3, 4, "bfloat16", **figures, **how, beside="adapter", load="load(out)")
    assert more.text().splitlines()[1:] == [
        "rounded stochastically because of that",
        "sigma 0.5  delta_norm 2  realised 0.25  noise 0.125",
        "25.0% of the delta arrives in bfloat16. Serve in bfloat16.",
        "The same as an adapter for instruct: out/adapter",
        "Load it with  load(out)",
    ]
    assert graft.to_dict()["output"] == "out"
    assert GraftReport(Path("out"), "adapter", 3, 0, "float32").text().splitlines() == [
        "adapter in out: 3 modules grafted, 0 copied, float32",
        "Nothing of the adapter is lost to rounding. Serve it unmerged, as merging rounds it.",
    ]


@pytest.mark.parametrize(
    ("dtype", "loaded", "words"),
    [
        ("float32", 0.02, "99.0% of the delta arrives in float32, 2.0% after a load in bfloat16. Serve in float32."),
        ("float32", 0.95, "95.0% after a load in bfloat16. Serve in float32 or bfloat16."),
        ("float16", 0.5, "99.0% of the delta arrives in float16, 50.0% after a load in bfloat16. Serve in float16."),
    ],
)
def test_the_dtype_to_serve_with(dtype, loaded, words):
    report = GraftReport(Path("out"), "model", 1, 0, dtype, realised=0.99, realised_in_bf16=loaded)
    assert words in report.text()


def test_a_delta_as_lines():
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
        ({"realised": 1 - POOR_REALISED + 1e-6, "noise": 0.5}, None),
        (
            {"realised": 1 - POOR_REALISED - 1e-6, "noise": 0.5},
            "bfloat16 rounded to nearest keeps 0.9 of the delta with",
        ),
        (
            {"realised": 1 + POOR_REALISED + 1e-6, "noise": 0.5},
            "bfloat16 rounded to nearest keeps 1.1 of the delta with",
        ),
        ({"realised": 1.0, "noise": 2 * POOR_NOISE}, None),  # realised says it all
    ],
)
def test_a_warning_begins_at_its_threshold(figures, words):
    found = graft_warnings(figures, "bfloat16", "nearest", " Way out.")
    assert len(found) == (words is not None)
    assert words is None or words in found[0]
    lost = "realised" in figures
    assert words is None or found[0].endswith(" Way out.") == lost


def test_stochastic_rounding_is_warned_of_only_where_its_noise_hides_the_delta():
    def found(noise, realised=1.0):
        return graft_warnings({"realised": realised, "noise": noise}, "bfloat16", "stochastic", " Way out.")

    assert found(POOR_NOISE) == []
    text = "bfloat16 rounded stochastically keeps {} of the delta with noise of {} times its norm. Way out."
    assert found(POOR_NOISE + 1.0) == [text.format(1, 6)]
    assert found(1.0, 0.5) == [text.format(0.5, 1)]  # of a few weights, too few went up
