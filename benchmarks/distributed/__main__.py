"""Training in several processes, in figures: memory and time beside TRL, and what is equal to one process.

    python benchmarks/distributed memory     # a model of 1 GB, minutes an engine
    python benchmarks/distributed table      # a tiny model, all trainers and references

Prints Markdown tables, those of docs/distributed.md. Real processes on the CPU, over gloo; engines: ddp, fsdp2 (the
CPU in the place of an accelerator), zero2 and zero3 (where DeepSpeed is installed). Exit code 1 if a run failed.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import sys
import tempfile
from pathlib import Path

os.environ.update(
    DS_ACCELERATOR="cpu",
    HF_HUB_OFFLINE="1",
    HF_DATASETS_OFFLINE="1",
    OMP_NUM_THREADS="1",
    TOKENIZERS_PARALLELISM="false",
    TQDM_DISABLE="1",
)
# What is freed is given back at once: else large tensors of many sizes leave holes, which count as resident.
os.environ.update(MALLOC_MMAP_THRESHOLD_=str(2**20), MALLOC_TRIM_THRESHOLD_=str(2**20))
HERE = Path(__file__).resolve().parent
sys.path += [str(HERE), str(HERE.parent), str(HERE.parent.parent / "tests" / "support")]

from memory import measure  # noqa: E402
from table import compare  # noqa: E402

# Imported once, before the processes are forked.
PRELOADED = ("trl.trainer.dpo_trainer", "trl.trainer.sft_trainer", "shadow_trl.training.trainers")
multiprocessing.set_forkserver_preload(["transformers.models.qwen3.modeling_qwen3", *PRELOADED])

ENGINES = ("ddp", "fsdp2", "zero2", "zero3")


def main() -> int:
    """Run what is asked for and print its tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    kinds = parser.add_subparsers(dest="kind", required=True)
    memory = kinds.add_parser("memory")
    memory.set_defaults(work=measure)
    table = kinds.add_parser("table")
    table.set_defaults(work=compare)
    for kind, hidden, layers, rows, length in ((memory, 1024, 15, 6, 128), (table, 256, 4, 20, 16)):
        kind.add_argument("--engines", nargs="+", choices=ENGINES, help=f"default: {' '.join(_available())}")
        kind.add_argument("--processes", type=int, default=2)
        kind.add_argument("--limit", type=float, default=3600, help="seconds that a run may take (default 3600)")
        kind.add_argument("--hidden", type=int, default=hidden, help=f"width of the model (default {hidden})")
        kind.add_argument("--layers", type=int, default=layers, help=f"default {layers}")
        kind.add_argument("--rows", type=int, default=rows, help=f"rows of one pass over the data (default {rows})")
        kind.add_argument("--length", type=int, default=length, help=f"tokens of a row, about (default {length})")
    memory.add_argument("--rounds", type=int, default=1, help="runs of each arm, in turns (default 1)")
    table.add_argument("--only", nargs="+", default=[], help='rows to make, as "SFT, full" or "DPO, LoRA, instruct"')
    options = parser.parse_args()
    options.engines = options.engines or _available()
    with tempfile.TemporaryDirectory(prefix="distributed-") as folder:
        lines = []
        for line in options.work(Path(folder), options):
            lines.append(line)
            print(line, flush=True)
    return int(any("failed" in line for line in lines))


def _available() -> list[str]:
    from importlib.util import find_spec

    return [name for name in ENGINES if not name.startswith("zero") or find_spec("deepspeed")]


if __name__ == "__main__":
    sys.exit(main())
