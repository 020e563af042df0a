"""What the tests of recipes write: settings of short runs, and rows."""

from __future__ import annotations

import json
from pathlib import Path

from repository import ROOT

SETTINGS = {
    "max_steps": 3,
    "per_device_train_batch_size": 4,
    "learning_rate": 1e-3,
    "bf16": False,
    "activation_checkpointing": False,
    "dataloader_pin_memory": False,
    "report_to": "none",
    "save_strategy": "no",
    "seed": 3,
    "use_cpu": True,
}


def write_rows(path: Path, rows: list[dict]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def short(folder: Path, kind: str) -> list[str]:
    """Return the words that make a run on the embedded pair short: two steps, and some rows of each kind to score."""
    rows = (ROOT / f"data/{kind}-test.jsonl").read_text().splitlines(keepends=True)
    (folder / "rows.jsonl").write_text("".join(rows[::150]))
    return ["--max_steps", "2", "--score_rows", str(folder / "rows.jsonl")]
