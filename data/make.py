"""Make a nano pair and the data sets again, from what is committed or from nothing.

`python data/make.py` writes pair and sets into the new folder `data-remade` beside `data`, in four minutes on one core.
`--pair 2` and `--pair 3` make such a pair from other streams of rows. `--from-nothing` first makes what all pairs start
from, in 20 minutes more.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch
from make_sets import make_sets
from train_pair import pretrain, train_pair

HERE = Path(__file__).resolve().parent
PRETRAINED = "nano-pretrained"


def parse_arguments() -> argparse.Namespace:
    """Return the options of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    default = HERE.with_name(HERE.name + "-remade")
    parser.add_argument("--output", type=Path, default=default, help="folder to write into (default: %(default)s)")
    parser.add_argument("--pair", type=int, default=1, help="which pair to make (default: 1)")
    parser.add_argument("--from-nothing", action="store_true", help="make what the pairs start from, too")
    parser.add_argument("--sets-only", action="store_true", help="make only the JSONL files")
    return parser.parse_args()


def main() -> None:
    """Train the pair, then write the data sets."""
    options = parse_arguments()
    output, number = options.output, "" if options.pair == 1 else f"-{options.pair}"
    if output.exists():
        sys.exit(f"error: {output} is there already. Remove it, or pass --output FOLDER.")
    # More threads split the sums in another order: the weights would differ from the ones that ship.
    torch.set_num_threads(1)
    output.mkdir(parents=True)
    if not options.sets_only:
        pretrained = (output if options.from_nothing else HERE) / PRETRAINED
        if options.from_nothing:
            pretrain(pretrained)
        train_pair(pretrained, output / f"nano-base{number}", output / f"nano-instruct{number}", options.pair)
    make_sets(output)
    print(f"wrote {', '.join(sorted(path.name for path in output.iterdir()))} into {output}")


if __name__ == "__main__":
    main()
