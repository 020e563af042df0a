"""One rank of a two-process run; started by test_ddp.py through torchrun, as users start theirs."""

from __future__ import annotations

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "support"))

import ddp

if __name__ == "__main__":
    ddp.run(int(os.environ["RANK"]), *sys.argv[1:])
    print("done", flush=True)
