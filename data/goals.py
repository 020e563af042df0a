"""Check a run on the embedded pair against its two goals, and print the figures.

Example: `python data/goals.py outputs/shadow_sft-20260102-030405`, the folder of a run with `report.json`

1. The graft is at least as good as INSTRUCT on the target.
2. It loses less under rules (kinds `rule` and `t_rule`, with equal weight) than INSTRUCT tuned directly.

Exit code: 0 when every goal that was measured is reached, 1 when one is not, 2 when none was measured.
"""

from __future__ import annotations

import argparse
import json
import math
import operator
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Goal:
    """What the graft was to achieve, and what came out.

    Args:
        text: the goal in plain words.
        graft: share of right answers of the graft, 0 to 1.
        other: share of the model it is measured against, 0 to 1.
        points: the difference of the two.
        error: standard error of that difference over the same rows.
        reached: whether the figures reach the goal.

    """

    text: str
    graft: float
    other: float
    points: float
    error: float
    reached: bool

    def line(self) -> str:
        """Return the goal with its figures as one line."""
        verdict = "reached" if self.reached else "NOT reached"
        # Below two standard errors other rows may say otherwise.
        doubt = "; within the sampling error" if abs(self.points) < 2 * self.error else ""
        return (
            f"{verdict}: {self.text}: {100 * self.graft:.1f} against {100 * self.other:.1f} %, "
            f"{100 * self.points:+.1f} points (standard error {100 * self.error:.1f}{doubt})"
        )


def goals(report: Mapping[str, Any]) -> list[Goal]:
    """Return the goals that the figures of a `report.json` can answer."""
    found = []
    for text, other, wanted, reached in (
        ("the graft is at least as good as INSTRUCT on the target", "instruct", ("target",), operator.ge),
        ("it loses less under rules than direct tuning", "direct", ("rule", "t_rule"), operator.gt),
    ):
        measured = report["differences"].get(other, {}).get("kinds", {})
        kinds = [kind for kind in wanted if kind in measured]
        if kinds:
            count = len(kinds)
            points = sum(measured[kind]["difference"] for kind in kinds) / count
            error = math.sqrt(sum(measured[kind]["error"] ** 2 for kind in kinds)) / count
            graft, rival = (
                sum(report["arms"][arm]["scores"]["kinds"][kind]["share"] for kind in kinds) / count
                for arm in ("grafted", other)
            )
            found.append(Goal(text, graft, rival, points, error, reached(points, 0)))
    return found


def main(argv: list[str] | None = None) -> int:
    """Print each goal with its figures and return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="folder of a run of recipes/shadow_sft.py or recipes/shadow_dpo.py")
    found = goals(json.loads((parser.parse_args(argv).run / "report.json").read_text(encoding="utf-8")))
    for goal in found:
        print(goal.line())
    if not found:
        print("no goal was measured: that takes score_rows, and compare_direct for the second one.")
        return 2
    return int(not all(goal.reached for goal in found))


if __name__ == "__main__":
    raise SystemExit(main())
