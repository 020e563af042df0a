"""The report at the end of a run: what each model scores, what that shows, and where the models are."""

from __future__ import annotations

import json
import shlex
import textwrap
from collections.abc import Iterator, Mapping, Sequence
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
    "shadow": "grafted INSTRUCT",
}
"""What is compared, in the order of the table."""

RIVALS = {"direct": "direct tuning", "instruct": "INSTRUCT"}
"""What the graft is measured against in words: direct tuning, or INSTRUCT where nothing was tuned directly."""

TIE = 2.0
"""Standard errors below which a difference is called a tie."""


@dataclass(frozen=True)
class Arm:
    """One compared model.

    Args:
        name: `instruct`, `direct`, `tuned` or `shadow`; after a pipeline `sft` too, the graft of its first stage.
        source: folder or hub id of what was trained, or of INSTRUCT.
        scale: multiplier of what training changed; None where nothing was trained.
        scores: which rows it answered right; None where it was not scored.
    """

    name: str
    source: str
    scale: float | None = 1.0
    scores: Scores | None = None


@dataclass(frozen=True)
class RunReport:
    """Figures of one run of a recipe.

    Args:
        arms: what is compared, in the order of the table.
        output: folder of the run, which holds the tuned BASE.
        graft: the graft's own report as plain values (`GraftReport.to_dict()`), with `delta_to_gap` where that was
            measured; None for a run without a graft.
        rows: file of the scored rows, or None.
        kept: kinds of rows that training should leave as they are: their mean is the metric `kept`. Default: none, and
            the mean over all kinds is shown.
        seconds: wall-clock seconds of each stage.
        titles: what the table calls each arm. Default `TITLES`.

    """

    arms: Sequence[Arm]
    output: str
    graft: Mapping[str, Any] | None = None
    rows: str | None = None
    kept: Sequence[str] = ()
    seconds: Mapping[str, float] = field(default_factory=dict)
    titles: Mapping[str, str] = field(default_factory=lambda: TITLES)

    @property
    def scored(self) -> list[tuple[Arm, Scores]]:
        """The arms that have scores, with them."""
        return [(arm, arm.scores) for arm in self.arms if arm.scores is not None]

    @property
    def metrics(self) -> dict[str, Sequence[str]]:
        """Name of each metric -> the kinds of rows whose shares of right answers it is the mean of."""
        kinds = self.scored[0][1].kinds if self.scored else ()
        mean = {"kept": tuple(self.kept)} if self.kept else {"mean": kinds}
        return {**{kind: (kind,) for kind in kinds}, **mean} if kinds else {}

    def differences(self) -> Iterator[tuple[Arm, Arm, dict[str, tuple[float, float]]]]:
        """Yield by how much each graft scores better than INSTRUCT, and than the others at the same scale.

        Yields:
            the graft, the other arm, and for each metric the difference of the shares, -1 to 1, with its standard error
            over the same rows (see `scoring.difference`).
        """
        for graft, left in (pair for pair in self.scored if pair[0].name == "shadow"):
            for other, right in self.scored:
                if other.name != "shadow" and other.scale in (None, graft.scale):
                    yield graft, other, {name: difference(left, right, of) for name, of in self.metrics.items()}

    def to_dict(self) -> dict[str, Any]:
        """Return every figure as plain values for JSON; scores, differences and errors are percentages."""
        arms = []
        for arm in self.arms:
            found, rows = None, 0
            if arm.scores is not None:
                found = {name: 100 * arm.scores.mean(kinds) for name, kinds in self.metrics.items()}
                rows = sum(map(len, arm.scores.hits.values()))
            arms.append({"arm": arm.name, "scale": arm.scale, "source": arm.source, "scores": found, "rows": rows})
        differences = [
            {"a": graft.name, "b": other.name, "scale": graft.scale, "metric": name, "difference": 100 * points,
             "error": 100 * error}
            for graft, other, found in self.differences() for name, (points, error) in found.items()
        ]  # fmt: skip
        return {
            "output": self.output,
            "rows": self.rows,
            "kept": list(self.kept),
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
        """Return the report as plain text: scores, differences, what they show, the size of the graft, the folders."""
        blocks = [
            self._table(),
            self._difference_lines(),
            self._verdict(),
            self._graft_lines(),
            self._places(),
            self._next(),
        ]
        return "\n\n".join("\n".join(block) for block in blocks if block)

    def _table(self) -> list[str]:
        """Return the scores in percent, one row an arm, one column a metric."""
        if not self.scored:
            return []
        first = self.scored[0][1]
        cells = [["exact match, %", "scale", *self.metrics]]
        cells.append(["rows", "", *(str(len(hits)) for hits in first.hits.values()), ""])
        for arm, scores in self.scored:
            shares = map(scores.mean, self.metrics.values())
            scale = "" if arm.scale is None else f"{arm.scale:g}"
            cells.append([self.titles[arm.name], scale, *(f"{100 * share:.1f}" for share in shares)])
        errors = [map(scores.mean_error, self.metrics.values()) for _, scores in self.scored]
        largest = [max(column) for column in zip(*errors, strict=True)]
        cells.append(["standard error, at most", "", *(f"{100 * error:.1f}" for error in largest)])
        return _aligned(cells, rules=(2, -1))

    def _difference_lines(self) -> list[str]:
        """Return the differences in percentage points, one row a pair of arms, one column a metric."""
        cells = [[f"{self.titles['shadow']} minus", "scale", *self.metrics]]
        for graft, other, found in self.differences():
            points = [f"{100 * points:+.1f} ± {100 * error:.1f}" for points, error in found.values()]
            cells.append([self.titles[other.name], f"{graft.scale:g}", *points])
        if len(cells) == 1:
            return []
        return [*_aligned(cells, rules=(1,)), "(percentage points ± standard error over the same rows)"]

    def _verdict(self) -> list[str]:
        """Return where the graft is ahead of direct tuning, without that of INSTRUCT, and where it is not."""
        rival = "direct" if any(arm.name == "direct" for arm, _ in self.scored) else "instruct"
        said = self._standings(rival)
        if not any(said.values()):
            return self._other_scales()
        who = RIVALS[rival]
        same = "at the same scale " if rival == "direct" else ""
        shown = (
            f"{same}the graft is ahead of {who} on {said['ahead']}."
            if said["ahead"]
            else f"nothing in favour of the graft, which is ahead of {who} on no metric."
        )
        parts = [f"{who} is ahead on {said['behind']}"] if said["behind"] else []
        parts += [f"it is a tie on {said['tie']}"] if said["tie"] else []
        lines = [f"What this run shows: {shown}"]
        lines += [f"What it does not show: {'; '.join(parts)}."] if parts else []
        return [textwrap.fill(line, 100, subsequent_indent="  ", break_on_hyphens=False) for line in lines]

    def _standings(self, rival: str) -> dict[str, str]:
        """Return the metrics on which the graft is `ahead` of an arm, `behind` it, or in a `tie`, with the figures."""
        groups: dict[str, dict[str, list[str]]] = {"ahead": {}, "behind": {}, "tie": {}}
        for graft, other, found in self.differences():
            for name, (points, error) in found.items() if other.name == rival else ():
                if name in self.kept:  # part of a mean that is shown
                    continue
                group = "tie" if abs(points) <= TIE * error else "ahead" if points > 0 else "behind"
                figure = f"{100 * points:+.1f}" if group == "tie" else f"{100 * abs(points):.1f}"
                groups[group].setdefault(name, []).append(f"{figure} points at scale {graft.scale:g}")
        return {
            group: " and ".join(f"`{name}` ({', '.join(figures)})" for name, figures in names.items())
            for group, names in groups.items()
        }

    def _other_scales(self) -> list[str]:
        """Return how to compare the graft with direct tuning where that was scored at other scales alone."""
        scales = [f"{arm.scale:g}" for arm, _ in self.scored if arm.name == "shadow"]
        if not scales or not any(arm.name == "direct" for arm, _ in self.scored):
            return []
        return [f"Direct tuning was not scored at the graft's scale: add --score_scales {' '.join(scales)} to do so."]

    def _next(self) -> list[str]:
        """Return the commands that a user may want next."""
        made = {arm.name: arm.source for arm in self.arms}
        if "shadow" not in made:
            return []
        return [
            f"Chat with the graft:  shadow-trl chat {shlex.quote(made['shadow'])}",
            "Your own pair:        --config with one of recipes/configs, or --model_name_or_path and --instruct_model",
        ]

    def _graft_lines(self) -> list[str]:
        """Return sigma of the pair, the size of the delta, and what the output dtype keeps of it."""
        graft, lines = self.graft or {}, []
        if graft.get("sigma") is not None:
            sigma = 100 * graft["sigma"]
            lines.append(f"pair   sigma {sigma:.2f}%: sum|BASE - INSTRUCT| / (sum|BASE| + sum|INSTRUCT|)")
        if graft.get("delta_norm") is not None:
            size = f"delta  norm {graft['delta_norm']:.4g}"
            if graft.get("delta_to_gap") is not None:
                size += f"; sum|delta| is {graft['delta_to_gap']:.2g} times sum|BASE - INSTRUCT|"
            lines.append(size)
        if graft.get("realised") is not None:
            noise = f", with rounding noise of {100 * graft['noise']:.1f}% of its norm" if graft.get("noise") else ""
            lines.append(f"       {100 * graft['realised']:.1f}% of it realised in {graft['dtype']}{noise}")
        # The graft's own warnings were told when it was written.
        return lines + [f"warning: {text}" for text in graft.get("notes") or ()]

    def _places(self) -> list[str]:
        """Return the folder of each model that this run made, the result first."""
        made = {arm.name: arm.source for arm in self.arms}
        words = {"shadow": "result", "tuned": "tuned", "direct": "direct", "sft": "sft"}
        return [f"{word:<6} {made[name]}  ({self.titles[name]})" for name, word in words.items() if name in made]


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
