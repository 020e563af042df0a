"""Run pytest again and again in forks of one process that has imported the libraries, which takes seconds.

Each line of the input is a JSON list: a folder with a package, its tests and a pyproject.toml, then the tests to run.
The exit code is printed, and what pytest prints is in `pytest.log` in the folder.
"""

from __future__ import annotations

import importlib
import json
import os
import sys


def main() -> None:
    for library in ("datasets", "hypothesis", "pytest", "torch", "transformers"):
        importlib.import_module(library)
    for line in sys.stdin:
        folder, *tests = json.loads(line)
        process = os.fork()
        if not process:
            run(folder, tests)
        print(os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]), flush=True)


def run(folder: str, tests: list[str]) -> None:
    """Run the tests and end the process with pytest's exit code."""
    os.chdir(folder)
    sys.path.insert(0, folder)
    sys.dont_write_bytecode = True  # a .pyc would pass for that of another fault of the same size and second
    os.environ.update(PYTHONPATH=folder, PYTHONDONTWRITEBYTECODE="1")
    log = os.open("pytest.log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os._exit(sys.modules["pytest"].main(["-qx", "-p", "no:cacheprovider", *tests]))


if __name__ == "__main__":
    main()
