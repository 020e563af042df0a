"""Rows of the embedded pair as lm-eval reads them, and what counts as right."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from datasets import Dataset

DATA = Path(__file__).resolve().parents[2] / "data"


def rows(file: str, **_: Any) -> dict[str, Dataset]:
    """Return the rows of a file of `data/` with system rule ("" for none), question, right answers and kind."""
    found = []
    for line in (DATA / file).read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        said = {message["role"]: message["content"] for message in row["prompt"]}
        answers = row["answer"] if isinstance(row["answer"], list) else [row["answer"]]
        kind = row["kind"]
        found.append({"rule": said.get("system", ""), "question": said["user"], "answers": answers, "kind": kind})
    return {"test": Dataset.from_list(found)}


def right(doc: dict[str, Any], results: list[str]) -> dict[str, float]:
    """Return whether the answer is one of the right ones, as the metric of the row's kind."""
    return {doc["kind"]: float(results[0].strip() in doc["answers"])}
