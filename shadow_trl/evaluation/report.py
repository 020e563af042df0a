"""The report at the end of a run: what each model scores, what the graft gained and kept, and where the models are."""

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

    def differences(self) -> dict[str, list[tuple[float, float]]]:
        """Return by how much the graft scores better than each other scored arm.

        Returns:
            Name of the other arm -> the difference of the shares, -1 to 1, and its standard error (see
            `scoring.difference`), for each kind in its order and at the end for the mean over the kinds. Empty when the
            graft was not scored.

        """
        others = self.scores
        graft = others.pop("grafted", None)
        if graft is None:
            return {}
        columns = [*([kind] for kind in graft.kinds), graft.kinds]
        return {name: [difference(graft, other, kinds) for kinds in columns] for name, other in others.items()}

    def to_dict(self) -> dict[str, Any]:
        """Return every figure as plain values for JSON."""
        differences = {}
        for name, columns in self.differences().items():
            *kinds, mean = [{"difference": points, "error": error} for points, error in columns]
            differences[name] = {"kinds": dict(zip(self.scores[name].kinds, kinds, strict=True)), "mean": mean}
        return {
            "output": self.output,
            "rows": self.rows,
            "arms": {
                arm.name: {"source": arm.source, "scores": arm.scores.to_dict() if arm.scores else None}
                for arm in self.arms
            },
            "differences": differences,
            "graft": dict(self.graft) if self.graft else None,
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
        """Return the report as plain text: scores, differences, the size of the graft, where the models are."""
        blocks = [self._table(), self._difference_lines(), self._graft_lines(), self._places()]
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
        return _aligned(cells, rules=(2, -1))

    def _difference_lines(self) -> list[str]:
        """Return the differences in percentage points, one row an arm, one column a kind."""
        found = self.differences()
        if not found:
            return []
        cells = [[f"{self.titles['grafted']} minus", *self.scores["grafted"].kinds, "mean"]]
        for name, columns in found.items():
            points = [f"{100 * points:+.1f} ± {100 * error:.1f}" for points, error in columns]
            cells.append([self.titles[name], *points])
        return [*_aligned(cells, rules=(1,)), "(percentage points ± standard error over the same rows)"]

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
                size += f"; sum|delta| is {graft['delta_to_gap']:.2g} times sum|BASE - INSTRUCT|"
            lines.append(size)
        if graft.get("realised") is not None:
            noise = f", with rounding noise of {100 * graft['noise']:.1f} % of its norm" if graft.get("noise") else ""
            lines.append(f"       {100 * graft['realised']:.1f} % of it realised in {graft['dtype']}{noise}")
        lines += [f"warning: {text}" for text in graft.get("warnings") or ()]
        return lines

    def _places(self) -> list[str]:
        """Return the folder of each model that this run made; the result first."""
        names = {"grafted": "result", "tuned": "tuned", "direct": "direct", "sft": "sft"}
        sources = {arm.name: arm.source for arm in self.arms}
        return [
            f"{word.ljust(6)} {sources[name]}  ({self.titles[name]})" for name, word in names.items() if name in sources
        ]


def _aligned(cells: Sequence[Sequence[str]], *, rules: Sequence[int]) -> list[str]:
    """Return the rows of a table as lines of equal columns, with a rule before each of the rows at `rules`."""
    widths = [max(len(row[column]) for row in cells) for column in range(len(cells[0]))]
    lines = [
        "  ".join(
            [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))]
        )
        for row in cells
    ]
    for at in rules:
        lines.insert(at, "-" * len(lines[0]))
    return [line.rstrip() for line in lines]
