"""The table at the end of a run: what the graft gained, what it kept, and whether the goal was reached."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .scoring import Scores, difference

REPORT_NAME = "report.json"

TITLES = {
    "instruct": "INSTRUCT untouched",
    "direct": "INSTRUCT tuned directly",
    "tuned": "tuned BASE",
    "grafted": "grafted INSTRUCT",
}
"""Arms of a run in the order of the table."""


@dataclass(frozen=True)
class Arm:
    """One of the models that a run compares.

    Args:
        name: a key of `TITLES`.
        source: folder or hub id of the model.
        scores: its exact-match scores, or None where no rows were scored.

    """

    name: str
    source: str
    scores: Scores | None = None


@dataclass(frozen=True)
class Goal:
    """What the graft was to achieve on the rows, and what came out.

    Args:
        text: the goal in plain words.
        graft: share of the graft, 0 to 1.
        other: share of the model that it is measured against, 0 to 1.
        error: standard error of `graft - other`, from the rows both models answered.
        reached: whether the figures reach the goal.

    """

    text: str
    graft: float
    other: float
    error: float
    reached: bool

    @property
    def within_error(self) -> bool:
        """Whether the difference is below two standard errors, so that other rows may say otherwise."""
        return abs(self.graft - self.other) < 2 * self.error

    def line(self) -> str:
        """Return the goal with its figures as one line."""
        verdict = "reached" if self.reached else "NOT reached"
        doubt = "; within the sampling error" if self.within_error else ""
        return (
            f"{verdict}: {self.text}: {100 * self.graft:.1f} against {100 * self.other:.1f} %, "
            f"{100 * (self.graft - self.other):+.1f} points (standard error {100 * self.error:.1f}{doubt})"
        )


def goals(scores: Mapping[str, Scores]) -> list[Goal]:
    """Return the goals that the scores can answer.

    The graft is at least as good as INSTRUCT on the rows of the kind "target", and it loses less than direct tuning on
    the rows under rules (kinds "rule" and "t_rule", with equal weight).

    Args:
        scores: for the names in `TITLES` that were scored.

    """
    found = []
    graft, instruct, direct = (scores.get(name) for name in ("grafted", "instruct", "direct"))
    if graft and instruct and "target" in graft.kinds:
        points, error = difference(graft, instruct, ["target"])
        shares = graft.share("target"), instruct.share("target")
        found.append(Goal("the graft is at least as good as INSTRUCT on the target", *shares, error, points >= 0))
    rules = [kind for kind in (graft.kinds if graft else ()) if kind in ("rule", "t_rule")]
    if graft and direct and rules:
        points, error = difference(graft, direct, rules)
        ours, theirs = (sum(arm.share(kind) for kind in rules) / len(rules) for arm in (graft, direct))
        found.append(Goal("it loses less under rules than direct tuning", ours, theirs, error, points > 0))
    return found


@dataclass(frozen=True)
class RunReport:
    """Figures of one run of a recipe.

    Args:
        arms: the compared models, in the order of the table.
        output: folder of the run, which holds the tuned BASE.
        graft: the graft's own report as plain values (`GraftReport.to_dict()`), with `delta_to_gap` where that was
            measured; None for a run without a graft.
        rows: file of the scored rows, or None.
        seconds: wall-clock seconds of each stage.
        titles: what the table calls each arm. Default `TITLES`.

    """

    arms: Sequence[Arm]
    output: str
    graft: Mapping[str, Any] | None = None
    rows: str | None = None
    seconds: Mapping[str, float] = field(default_factory=dict)
    titles: Mapping[str, str] = field(default_factory=lambda: TITLES)

    @property
    def scores(self) -> dict[str, Scores]:
        """Scores of the arms that were scored, by name."""
        return {arm.name: arm.scores for arm in self.arms if arm.scores is not None}

    def to_dict(self) -> dict[str, Any]:
        """Return every figure as plain values for JSON."""
        reached = [
            {"goal": goal.text, "graft": goal.graft, "other": goal.other, "error": goal.error, "reached": goal.reached}
            for goal in goals(self.scores)
        ]
        return {
            "output": self.output,
            "rows": self.rows,
            "arms": {
                arm.name: {"source": arm.source, "scores": arm.scores.to_dict() if arm.scores else None}
                for arm in self.arms
            },
            "graft": dict(self.graft) if self.graft else None,
            "goals": reached,
            "seconds": dict(self.seconds),
        }

    def write(self, folder: str | Path) -> Path:
        """Write `report.json` into `folder`, complete or not at all, and return its path."""
        path = Path(folder) / REPORT_NAME
        part = path.with_name(f".{REPORT_NAME}.{os.getpid()}")
        part.write_text(json.dumps(self.to_dict(), indent=2) + "\n", encoding="utf-8")
        os.replace(part, path)
        return path

    def text(self) -> str:
        """Return the report as plain text: the table, the size of the graft, where the result lies, the goals."""
        blocks = [self._table(), self._graft_lines(), self._places(), self._goal_lines()]
        return "\n\n".join("\n".join(block) for block in blocks if block)

    def _table(self) -> list[str]:
        """Return the scores in percent, one row an arm, one column a kind."""
        scored = self.scores
        if not scored:
            return []
        first = next(iter(scored.values()))
        kinds = first.kinds
        cells = [["exact match, %", *kinds, "mean"], ["rows", *(str(len(first.hits[kind])) for kind in kinds), ""]]
        for name, scores in scored.items():
            shares = [*(scores.share(kind) for kind in kinds), scores.mean]
            cells.append([self.titles[name], *(f"{100 * share:.1f}" for share in shares)])
        largest = [max(scores.error(kind) for scores in scored.values()) for kind in kinds]
        largest.append(max(scores.mean_error for scores in scored.values()))
        cells.append(["standard error, at most", *(f"{100 * error:.1f}" for error in largest)])
        widths = [max(len(row[column]) for row in cells) for column in range(len(cells[0]))]
        lines = [
            "  ".join(
                [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))]
            )
            for row in cells
        ]
        lines.insert(2, "-" * len(lines[0]))
        lines.insert(-1, "-" * len(lines[0]))
        return [line.rstrip() for line in lines]

    def _graft_lines(self) -> list[str]:
        """Return sigma of the pair, the size of the delta, and what the output dtype keeps of it."""
        graft = self.graft
        if not graft:
            return []
        lines = []
        if graft.get("sigma") is not None:
            lines.append(
                f"pair   sigma {100 * graft['sigma']:.2f} %: sum|BASE - INSTRUCT| / (sum|BASE| + sum|INSTRUCT|)"
            )
        if graft.get("delta_norm") is not None:
            size = f"delta  norm {graft['delta_norm']:.4g}"
            if graft.get("delta_to_gap") is not None:
                size += f"; sum|delta| is {graft['delta_to_gap']:.2f} times sum|BASE - INSTRUCT|"
            lines.append(size)
        if graft.get("realised") is not None:
            noise = f", with rounding noise of {100 * graft['noise']:.1f} % of its norm" if graft.get("noise") else ""
            lines.append(f"       {100 * graft['realised']:.1f} % of it realised in {graft['dtype']}{noise}")
        lines += [f"warning: {text}" for text in graft.get("warnings") or ()]
        return lines

    def _places(self) -> list[str]:
        """Return where each model that this run made lies; the result first."""
        names = {"grafted": "result", "tuned": "tuned", "direct": "direct", "sft": "sft"}
        sources = {arm.name: arm.source for arm in self.arms}
        return [
            f"{word.ljust(6)} {sources[name]}  ({self.titles[name]})" for name, word in names.items() if name in sources
        ]

    def _goal_lines(self) -> list[str]:
        """Return whether the goals were reached, in plain words."""
        answered = goals(self.scores)
        if not answered:
            return []
        missed = sum(not goal.reached for goal in answered)
        if missed:
            head = f"The goal of this run was not reached: {missed} of {len(answered)} parts failed."
        else:
            head = (
                "The goal of this run was reached." if len(answered) > 1 else "The part that was measured was reached."
            )
        return [head, *(f"  {goal.line()}" for goal in answered)]
