"""The experiment of docs/results.md: what grafting and direct tuning gain and lose on the embedded pairs.

    python benchmarks/experiment estimate --output FOLDER    # what is left to do, and how long it takes here
    python benchmarks/experiment run --output FOLDER         # trains and scores; the same command again resumes
    python benchmarks/experiment report --output FOLDER      # writes docs/results.*
    python benchmarks/experiment report                      # the same from docs/results.json.gz

Each file in designs/ is a comparison of `shadow-trl compare --config`. The core is {graft, direct} x {DPO, SFT} x two
learning rates x five seeds x three pairs; each other design changes one factor on one pair with three seeds. A cell is
one training of BASE, and of INSTRUCT directly, with all that is scored of it. With `--real FOLDER`, real data are tried
too: see real.py. From the root of the repository; offline, on CPUs.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

os.environ.update(
    HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1", OMP_NUM_THREADS="1", TOKENIZERS_PARALLELISM="false", TQDM_DISABLE="1"
)
sys.path.insert(0, str(Path(__file__).resolve().parent))

DOCS = Path("docs")


def main(argv: list[str] | None = None) -> int:
    """Do what is asked for; exit code 1 where a cell failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    kinds = parser.add_subparsers(dest="kind", required=True)
    for kind in ("estimate", "run", "report"):
        command = kinds.add_parser(kind)
        command.add_argument("--output", type=Path, required=kind != "report", help="folder of the experiment")
        if kind == "report":
            command.add_argument("--docs", type=Path, default=DOCS, help="folder of results.* (default: docs)")
            continue
        command.add_argument("--real", type=Path, help="folder of real data, see real.py; default: none")
        command.add_argument("--only", nargs="+", help="names of designs; default: all")
        command.add_argument("--workers", type=int, default=2, help="cells made at once (default 2)")
    options = parser.parse_args(argv)
    if options.kind == "report":
        from report import report

        report(options.output, options.docs)
        return 0
    from designs import cells
    from work import estimate, run

    todo = cells(options.output, options.real, options.only)
    if options.kind == "estimate":
        print(estimate(todo, options.output, options.workers))
        return 0
    return run(todo, options.output, options.workers)


if __name__ == "__main__":
    sys.exit(main())
