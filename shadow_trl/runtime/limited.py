"""A process of its own for what a file of somebody else asks to be done, with limits of time and memory."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

SECONDS = 2
"""Of a processor; what is asked for takes a tenth."""
_BYTES = 2**30
_WAIT = 60  # seconds on the clock, where processor time has no limit, as on Windows
_CHILD = """
import json, runpy, sys
try:
    import resource
    for name, most in ((resource.RLIMIT_CPU, int(sys.argv[2])), (resource.RLIMIT_AS, int(sys.argv[3]))):
        hard = resource.getrlimit(name)[1]
        resource.setrlimit(name, (most if hard == resource.RLIM_INFINITY else min(most, hard), hard))
except (ImportError, ValueError, OSError):
    pass
sys.stdout.write(json.dumps(runpy.run_path(sys.argv[1])["answer"](json.load(sys.stdin))))
"""


def answer_of(script: Path, asked: Any) -> Any:
    """Return what `answer(asked)` in the Python file `script` returns; None where it took too much or failed.

    Args:
        script: a file that imports nothing of this package.
        asked: of types that JSON knows, like the answer.
    """
    command = [sys.executable, "-P", "-c", _CHILD, str(script), str(SECONDS), str(_BYTES)]
    try:
        done = subprocess.run(
            command, input=json.dumps(asked).encode(), stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
            timeout=_WAIT, check=False,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        return None
    return json.loads(done.stdout) if done.returncode == 0 else None
