"""The relative error of an adapter on INSTRUCT against the delta that training made, for every PEFT type.

    python benchmarks/adapter_types.py                # the table of docs/adapters.md, some minutes
    python benchmarks/adapter_types.py --only DoRA    # some rows

Each type is trained for six steps on a tiny Llama and a tiny Qwen3, tied and untied, in fp32 (seed 3, INSTRUCT at a
distance of 0.3 from BASE). The true delta is the trained model, merged by PEFT in float64, less BASE; of LoftQ, less
the model that training started from, whose weights are rounded. The table has the largest error over the four models:
of the adapter loaded on INSTRUCT as it is, of the adapter form of the graft, and of its dense form.
"""

from __future__ import annotations

import argparse
import logging
import sys
import tempfile
import warnings
from pathlib import Path

HERE = Path(__file__).resolve()
sys.path.insert(0, str(HERE.parent.parent / "tests" / "support"))

from adapter_cases import CASES, Case, Trained, adapter_delta, dense_delta, error, train  # noqa: E402

from shadow_trl import graft  # noqa: E402


def main() -> None:
    """Measure the rows and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", help="parts of the names of the rows to measure")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    print("| adapter | as it is | adapter form | dense form |\n|---|---|---|---|")
    for case in CASES:
        if options.only and not any(part in case.name for part in options.only):
            continue
        try:
            found = [row for kind, tied in case.models() for row in _row(case, kind, tied)]
        except ImportError as missing:
            print(f"| {case.name} | not measured: {missing} | | |", flush=True)
            continue
        columns = {name: [value for key, value in found if key == name] for name in ("naive", "adapter", "dense")}
        cells = [_cell(values) for values in columns.values()]
        cells[0] = cells[0] if case.loads else "does not load"
        print(f"| {case.name} | {' | '.join(cells)} |", flush=True)


def _row(case: Case, kind: str, tied: bool) -> list[tuple[str, float]]:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        trained: Trained = train(case, folder, kind=kind, tied=tied)
        sides = {"base": trained.base, "instruct": trained.instruct, "tuned": trained.adapter, "progress": False}
        graft(**sides, output=folder / "dense", format="model")
        found = [("dense", error(*dense_delta(folder / "dense", trained)))]
        if case.loads:
            found.append(("naive", error(adapter_delta(trained.instruct, trained.adapter), trained.delta)))
        if case.form:
            graft(**sides, output=folder / "form", format="adapter")
            found.append(("adapter", error(adapter_delta(trained.instruct, folder / "form"), trained.delta)))
        return found


def _cell(values: list[float]) -> str:
    if not values:
        return "none"
    worst = max(values)
    return f"{worst:.2f}" if worst >= 0.01 else f"{worst:.0e}" if worst else "0"


if __name__ == "__main__":
    main()
