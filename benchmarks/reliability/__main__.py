"""The figures of docs/reliability.md: kills, full disks, changed inputs, bad input, fuzzing, many and large things.

    python benchmarks/reliability                     # everything, as in docs/reliability.md; an hour or more
    python benchmarks/reliability kills --kills 50    # one kind
    python benchmarks/reliability fuzz --seconds 1200

Prints a Markdown table: of each kind of trial how many there were, and how often something was lost, was left lying
about after the next run, showed a traceback or died without a word, hung, or was told falsely. Each fault has a line on
stderr. What is right is known independently of the package: the models are written and read by numpy, with weights of
which every sum is exact. The full disks need root, for a small tmpfs. Exit code 1 if there was a fault.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

os.environ.update(
    HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1", OMP_NUM_THREADS="1", TOKENIZERS_PARALLELISM="false", TQDM_DISABLE="1"
)
HERE = Path(__file__).resolve().parent
sys.path.append(str(HERE.parent.parent / "tests" / "support"))

from changes import change_inputs  # noqa: E402
from corpus import bad_input  # noqa: E402
from disks import fill_disks  # noqa: E402
from fuzz import fuzz  # noqa: E402
from killed_commands import kill_commands  # noqa: E402
from killed_trainings import kill_trainings  # noqa: E402
from processes import FAULTS, Tally  # noqa: E402
from sizes import large, many  # noqa: E402

Trials = Callable[[Path, argparse.Namespace], Iterator[Tally]]


def _kills(root: Path, options: argparse.Namespace) -> Iterator[Tally]:
    for fresh, count in ((False, options.kills), (True, options.fresh_kills)):
        if count:
            yield kill_commands(root / str(fresh), count, seed=options.seed, fresh=fresh, only=options.only)


KINDS: dict[str, Trials] = {
    "kills": _kills,
    "trainings": lambda root, options: kill_trainings(root, options.trainings, seed=options.seed),
    "disks": lambda root, options: fill_disks(root, options.disks),
    "changes": lambda root, options: change_inputs(root, options.changes, seed=options.seed),
    "input": lambda root, options: bad_input(root),
    "fuzz": lambda root, options: fuzz(root, options.seconds, seed=options.seed),
    "many": lambda root, options: many(root, options.grafts),
    "large": lambda root, options: large(root, options.tensors),
}


def main() -> int:
    """Run the trials that are asked for and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kinds", nargs="*", choices=[*KINDS, []], metavar="KIND", help=f"of {', '.join(KINDS)}")
    parser.add_argument("--kills", type=int, default=300, help="of commands at work (default 300)")
    parser.add_argument(
        "--fresh-kills", type=int, default=300, help="of commands from their first import on (default 300)"
    )
    parser.add_argument("--only", metavar="COMMAND", help='one of those that are killed, as "graft --overwrite"')
    parser.add_argument("--trainings", type=int, default=60, help="killed trainings (default 60)")
    parser.add_argument("--changes", type=int, default=200, help="inputs changed while they are read (default 200)")
    parser.add_argument("--seconds", type=float, default=1200, help="of fuzzing (default 1200)")
    parser.add_argument("--grafts", type=int, default=200, help="in one process (default 200)")
    parser.add_argument("--disks", type=int, default=12, help="sizes of the disk, for each command (default 12)")
    parser.add_argument("--tensors", type=int, default=50_000, help="of the large models (default 50000)")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    _import_package()
    found: list[Tally] = []
    with tempfile.TemporaryDirectory(prefix="reliability-") as scratch:
        for kind in options.kinds or KINDS:
            for tally in KINDS[kind](Path(scratch) / kind, options):
                found.append(tally)
                print(tally.row(), file=sys.stderr, flush=True)
    print("| trials | runs | lost | left | tracebacks | hangs | false | seen |\n|---|---|---|---|---|---|---|---|")
    for tally in found:
        print(tally.row())
    return int(any(tally.faults[kind] for tally in found for kind in FAULTS))


def _import_package() -> None:
    """Import what the forked commands use, so that a fork begins at its work."""
    import torch
    import transformers.models.llama.modeling_llama  # noqa: F401

    import shadow_trl.cli
    import shadow_trl.operations.delta
    import shadow_trl.operations.gap
    import shadow_trl.operations.graft
    import shadow_trl.operations.verify  # noqa: F401

    torch.set_num_threads(1)


if __name__ == "__main__":
    sys.exit(main())
