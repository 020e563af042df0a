"""docs/results.md, the pages of its curves and docs/results.json.gz: every figure is computed from the stored cells."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

from stored import from_dict
from tables import TABLES, Experiment

from shadow_trl.evaluation.comparison_page import page

TEXT = Path(__file__).resolve().parent / "page.md"
DATA = "results.json.gz"


def report(output: Path | None, docs: Path) -> None:
    """Write the data, unless there is no `output` and they are read, the page, and a page of curves for each task."""
    docs.mkdir(exist_ok=True)
    if output is not None:
        from gather import gather

        text = json.dumps(gather(output), separators=(",", ":"))
        # Without the time, so that the same figures are the same file.
        (docs / DATA).write_bytes(gzip.compress(text.encode(), mtime=0))
    experiment = read(docs / DATA)
    (docs / "results.md").write_text(render(experiment), encoding="utf-8")
    for task in ("dpo", "sft"):
        html = page(experiment.core(task))
        (docs / f"results-{task}.html").write_text(html, encoding="utf-8")


def read(data: Path) -> Experiment:
    """Read the stored cells."""
    content: dict[str, Any] = json.loads(gzip.decompress(data.read_bytes()))
    for cell in content["cells"]:
        cell["models"] = [from_dict(model) for model in cell["models"]]
    return Experiment(content["cells"], content["known"])


def render(experiment: Experiment) -> str:
    """Return the page: its text with the tables in their places."""
    return TEXT.read_text(encoding="utf-8").format(**{name: table(experiment) for name, table in TABLES.items()})
