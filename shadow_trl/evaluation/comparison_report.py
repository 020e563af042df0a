"""A comparison on the disk: comparison.json for programs, comparison.md and comparison.html for people."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from ..results.folder import whole_file
from .comparison import Comparison
from .comparison_page import page
from .measured import ARMS, Settings
from .trained import costs


def write_comparison(comparison: Comparison, folder: Path) -> None:
    """Write the three files into `folder`."""
    texts = {
        "json": json.dumps(comparison.to_dict(), indent=2, allow_nan=False) + "\n",
        "md": markdown(comparison),
        "html": page(comparison),
    }
    for kind, text in texts.items():
        with whole_file(folder / f"comparison.{kind}") as new:
            new.write_text(text, encoding="utf-8")


def markdown(comparison: Comparison) -> str:
    """Return the comparison as Markdown: what was chosen, what the test shows of it, every score, what it cost."""
    blocks = [
        ["# Comparison"],
        [f"Chosen: {comparison.condition}."],
        [f"- `{arm}`: {ARMS[arm]}" for arm in comparison.selected],
        [f"- {note}" for note in comparison.notes],
        ["## Selected settings, on the test rows, with intervals (95%)", "", *_selected(comparison, interval=True)],
        ["## What the test rows show", "", *_tests(comparison)],
    ]
    for split, rows in (("test", "the test rows"), ("validation", comparison.chosen_on)):
        blocks.append([f"## All settings, on {rows}", "", *_scores(comparison, split)])
    blocks.append(["## Cost", "", *_table(*costs(comparison.selected, comparison.models, comparison.trainings))])
    blocks.append(["A training that several arms share counts for each of them."])
    if comparison.command is not None:
        blocks.append(["## The chosen graft", "", "```bash", comparison.command, "```"])
    return "\n\n".join("\n".join(block) for block in blocks if block) + "\n"


def summary(comparison: Comparison) -> str:
    """Return what a terminal shows: the selected settings, the verdicts by target and condition, the command."""
    by = [name for name in (comparison.target, comparison.keep) if name is not None]
    lines = [f"{arm}: {ARMS[arm]}" for arm in comparison.selected]
    lines += ["", f"Chosen: {comparison.condition}.", *_selected(comparison), ""]
    lines += [
        f"{test.a} against {test.b}, {test.metric.name}: {test.verdict}"
        for test in comparison.tests
        if test.metric.name in by
    ]
    lines += ["", *comparison.notes]
    if comparison.command is not None:
        lines += ["", "Write the chosen graft:", f"  {comparison.command}"]
    return "\n".join(lines)


def missing(comparison: Comparison, arm: str) -> str:
    """Say that no settings of an arm meet the condition."""
    return f"{arm}: no settings meet the condition ({comparison.condition})"


def _selected(comparison: Comparison, *, interval: bool = False) -> list[str]:
    rows, absent = [], []
    for arm, settings in comparison.selected.items():
        if settings is None:
            absent.append(missing(comparison, arm) + ".")
        else:
            rows.append(_line(comparison, settings, "test", interval=interval))
    return [*_table(["arm", "settings", *comparison.by_name], rows), *([""] if absent else []), *absent]


def _line(comparison: Comparison, settings: Settings, split: str, *, interval: bool = False) -> list[str]:
    scores = (comparison.shown(settings, name, split, interval=interval) for name in comparison.by_name)
    return [settings.arm, settings.words(), *scores]


def _tests(comparison: Comparison) -> list[str]:
    rows = []
    for test in comparison.tests:
        digits = test.digits
        low, high = test.found.interval
        rows.append([
            test.a, test.b, test.metric.name, f"{test.found.value:+.{digits}f}",
            f"{low:+.{digits}f} to {high:+.{digits}f}", f"{test.p_adjusted:.2g}", test.verdict,
        ])  # fmt: skip
    if not rows:
        return ["There are no two arms to compare."]
    return _table(["a", "b", "metric", "a - b", "95% interval", "p, adjusted", "verdict for a"], rows)


def _scores(comparison: Comparison, split: str) -> list[str]:
    rows = [_line(comparison, settings, split) for settings in comparison.groups]
    return _table(["arm", "settings", *comparison.by_name], rows)


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Return a Markdown table."""
    cells = [[text.replace("|", "\\|") for text in row] for row in (head, *rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = [
        "| " + " | ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)) + " |" for row in cells
    ]
    return [lines[0], "|" + "|".join("-" * (width + 2) for width in widths) + "|", *lines[1:]]
