"""data/goals.py: the goals of the embedded pair, judged from the report of a run."""

from __future__ import annotations

import json
import runpy
from pathlib import Path
from typing import Any

import pytest
from repository import ROOT

MAIN = runpy.run_path(str(ROOT / "data/goals.py"), run_name="goals")["main"]


def write(folder: Path, **changes: dict[str, float]) -> Path:
    """Write a report in which every goal is just reached, but for `changes` of `arm_scale`."""
    scores: dict[str, dict[str, float]] = {
        "instruct": {"target": 20.0, "in style": 20.0, "kept": 96.0},
        "direct_0.5": {"target": 90.0, "in style": 30.0, "kept": 95.0},
        "direct_1.0": {"target": 95.0, "in style": 1.0, "kept": 80.0},
        "shadow_0.5": {"target": 70.0, "in style": 30.5, "kept": 96.0},
        "shadow_1.0": {"target": 80.0, "in style": 1.5, "kept": 84.0},
    }
    arms: list[dict[str, Any]] = []
    for name, found in scores.items():
        arm, _, scale = name.partition("_")
        arms.append(
            {"arm": arm, "scale": float(scale) if scale else None, "scores": {**found, **changes.get(name, {})}}
        )
    arms.append({"arm": "tuned", "scale": 1.0, "scores": None})
    (folder / "report.json").write_text(json.dumps({"arms": arms}))
    return folder


def test_goals_that_were_reached(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert MAIN([str(write(tmp_path))]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "reached: target at scale 1: 80.0, +60.0 points beside instruct's 20.0 (wanted: +60)",
        "reached: kept at scale 1: 84.0, +4.0 points beside direct's 80.0 (wanted: +4)",
        "reached: in style at scale 0.5: 30.5, +0.5 points beside direct's 30.0 (wanted: +0)",
        "reached: in style at scale 1: 1.5, +0.5 points beside direct's 1.0 (wanted: +0)",
    ]


@pytest.mark.parametrize(
    ("arm", "metric", "value"),
    [("shadow_1.0", "target", 79.9), ("shadow_1.0", "kept", 83.9), ("shadow_0.5", "in style", 30.0)],
)
def test_a_goal_that_was_missed(
    arm: str, metric: str, value: float, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert MAIN([str(write(tmp_path, **{arm: {metric: value}}))]) == 1
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("NOT reached")]
    assert f"{metric} at scale {float(arm.partition('_')[2]):g}: {value:.1f}" in line


def test_a_run_without_direct_tuning_is_not_judged(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(tmp_path)
    report = json.loads((tmp_path / "report.json").read_text())
    report["arms"] = [arm for arm in report["arms"] if arm["arm"] != "direct"]
    (tmp_path / "report.json").write_text(json.dumps(report))
    assert MAIN([str(tmp_path)]) == 2
    assert "not measured" in capsys.readouterr().out
