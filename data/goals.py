"""Check a run of `recipes/shadow_dpo.py` on the embedded pair against the goals of that pair, and print the figures.

Example: `python data/goals.py outputs/shadow_dpo-20260102-030405`, the folder of a run with `report.json`

1. At scale 1 the graft's target is at least 60 points above INSTRUCT's.
2. At scale 1 its `kept` is at least 4 points above that of direct tuning.
3. At every scale its `in style` is above that of direct tuning.

Exit code: 0 when all are reached, 1 when one is not, 2 when one was not measured.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

GAIN = 60.0
KEPT = 4.0


def goals(report: Mapping[str, Any]) -> Iterator[tuple[bool, str]]:
    """Yield for each goal whether it was reached, and its text with the figures, in percent.

    Raises:
        KeyError: an arm or a metric is not in the report.
    """
    found = {(arm["arm"], arm["scale"]): arm["scores"] for arm in report["arms"] if arm["scores"]}

    def line(name: str, scale: float, metric: str, least: float, other: tuple[str, float | None]) -> tuple[bool, str]:
        graft, rival = found[name, scale][metric], found[other][metric]
        figures = (
            f"{metric} at scale {scale:g}: {graft:.1f}, {graft - rival:+.1f} points beside {other[0]}'s {rival:.1f}"
        )
        return (graft - rival > 0 if least == 0 else graft - rival >= least), f"{figures} (wanted: {least:+g})"

    yield line("shadow", 1.0, "target", GAIN, ("instruct", None))
    yield line("shadow", 1.0, "kept", KEPT, ("direct", 1.0))
    for name, scale in list(found):
        if name == "shadow":
            yield line(name, scale, "in style", 0, ("direct", scale))


def main(argv: list[str] | None = None) -> int:
    """Print each goal with its figures and return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="folder of a run of recipes/shadow_dpo.py")
    report = json.loads((parser.parse_args(argv).run / "report.json").read_text(encoding="utf-8"))
    try:
        found = list(goals(report))
    except KeyError as missing:
        print(f"not measured: {missing}. The goals are those of the default run of recipes/shadow_dpo.py.")
        return 2
    for reached, text in found:
        print(f"{'reached' if reached else 'NOT reached'}: {text}")
    return int(not all(reached for reached, _ in found))


if __name__ == "__main__":
    raise SystemExit(main())
