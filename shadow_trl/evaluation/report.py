"""The report at the end of a run: what each model scores, what the graft gained and kept, and where the models are."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..results.folder import whole_file
from .scoring import Scores, difference

REPORT_NAME = "report.json"

TITLES = {
    "instruct": "INSTRUCT untouched",
    "direct": "INSTRUCT tuned directly",
    "tuned": "tuned BASE",
    "grafted": "grafted INSTRUCT",
}
"""Models of a run in the order of the table."""


@dataclass(frozen=True)
class RunReport:
    """Figures of one run of a recipe.

    Args:
        models: name of each compared model -> its folder or hub id, in the order of the table.
        output: folder of the run, which holds the tuned BASE.
        scores: exact-match scores of the models that were scored, in the same order. Default: none.
        graft: the graft's own report as plain values (`GraftReport.to_dict()`), with `delta_to_gap` where that was
            measured; None for a run without a graft.
        rows: file of the scored rows, or None.
        seconds: wall-clock seconds of each stage.
        titles: what the table calls each model. Default `TITLES`.

    """

    models: Mapping[str, str]
    output: str
    scores: Mapping[str, Scores] = field(default_factory=dict)
    graft: Mapping[str, Any] | None = None
    rows: str | None = None
    seconds: Mapping[str, float] = field(default_factory=dict)
    titles: Mapping[str, str] = field(default_factory=lambda: TITLES)

    def differences(self) -> dict[str, list[tuple[float, float]]]:
        """Return by how much the graft scores better than each other scored model.

        Returns:
            Name of the other model -> the difference of the shares, -1 to 1, and its standard error (see
            `scoring.difference`), for each kind in its order and at the end for the mean over the kinds. Empty when the
            graft was not scored.

        """
        graft = self.scores.get("grafted")
        if graft is None:
            return {}
        columns = [*([kind] for kind in graft.kinds), graft.kinds]
        others = {name: scores for name, scores in self.scores.items() if name != "grafted"}
        return {name: [difference(graft, other, kinds) for kinds in columns] for name, other in others.items()}

    def to_dict(self) -> dict[str, Any]:
        """Return every figure as plain values for JSON."""
        arms: dict[str, Any] = {name: {"source": source, "scores": None} for name, source in self.models.items()}
        for name, scores in self.scores.items():
            arms[name]["scores"] = scores.to_dict()
        differences = {}
        for name, columns in self.differences().items():
            *kinds, mean = [{"difference": points, "error": error} for points, error in columns]
            differences[name] = {"kinds": dict(zip(self.scores[name].kinds, kinds, strict=True)), "mean": mean}
        return {
            "output": self.output,
            "rows": self.rows,
            "arms": arms,
            "differences": differences,
            "graft": dict(self.graft) if self.graft else None,
            "seconds": dict(self.seconds),
        }

    def write(self, folder: str | Path) -> Path:
        """Write `report.json` into `folder`, complete or not at all, and return its path."""
        path = Path(folder) / REPORT_NAME
        with whole_file(path) as new:
            new.write_text(json.dumps(self.to_dict(), indent=2) + "\n", encoding="utf-8")
        return path

    def text(self) -> str:
        """Return the report as plain text: scores, differences, the size of the graft, where the models are."""
        blocks = [self._table(), self._difference_lines(), self._graft_lines(), self._places()]
        return "\n\n".join("\n".join(block) for block in blocks if block)

    def _table(self) -> list[str]:
        """Return the scores in percent, one row a model, one column a kind."""
        if not self.scores:
            return []
        first = next(iter(self.scores.values()))
        cells = [["exact match, %", *first.kinds, "mean"]]
        cells.append(["rows", *(str(len(hits)) for hits in first.hits.values()), ""])
        for name, scores in self.scores.items():
            shares = [*map(scores.share, first.kinds), scores.mean]
            cells.append([self.titles[name], *(f"{100 * share:.1f}" for share in shares)])
        errors = [[*map(scores.error, first.kinds), scores.mean_error] for scores in self.scores.values()]
        largest = [max(column) for column in zip(*errors, strict=True)]
        cells.append(["standard error, at most", *(f"{100 * error:.1f}" for error in largest)])
        return _aligned(cells, rules=(2, -1))

    def _difference_lines(self) -> list[str]:
        """Return the differences in percentage points, one row a model, one column a kind."""
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
        graft, lines = self.graft or {}, []
        if graft.get("sigma") is not None:
            sigma = 100 * graft["sigma"]
            lines.append(f"pair   sigma {sigma:.2f} %: sum|BASE - INSTRUCT| / (sum|BASE| + sum|INSTRUCT|)")
        if graft.get("delta_norm") is not None:
            size = f"delta  norm {graft['delta_norm']:.4g}"
            if graft.get("delta_to_gap") is not None:
                size += f"; sum|delta| is {graft['delta_to_gap']:.2g} times sum|BASE - INSTRUCT|"
            lines.append(size)
        if graft.get("realised") is not None:
            noise = f", with rounding noise of {100 * graft['noise']:.1f} % of its norm" if graft.get("noise") else ""
            lines.append(f"       {100 * graft['realised']:.1f} % of it realised in {graft['dtype']}{noise}")
        return lines + [f"warning: {text}" for text in graft.get("warnings") or ()]

    def _places(self) -> list[str]:
        """Return the folder of each model that this run made; the result first."""
        words = {"grafted": "result", "tuned": "tuned", "direct": "direct", "sft": "sft"}
        made = {name: word for name, word in words.items() if name in self.models}
        return [f"{word:<6} {self.models[name]}  ({self.titles[name]})" for name, word in made.items()]


def _aligned(cells: Sequence[Sequence[str]], *, rules: Sequence[int]) -> list[str]:
    """Return the rows of a table as lines of equal columns, with a rule before each of the rows at `rules`."""
    first, *others = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = []
    for title, *values in cells:
        columns = [value.rjust(width) for value, width in zip(values, others, strict=True)]
        lines.append("  ".join([title.ljust(first), *columns]))
    for at in rules:
        lines.insert(at, "-" * len(lines[0]))
    return [line.rstrip() for line in lines]
