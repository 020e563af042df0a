"""Do the tests notice a fault? One small change at a time goes into a copy of the package, and its tests run there.

    python benchmarks/mutants.py [--sample 300] [--seed 0] [--workers 2] [--only FOLDER] [--results mutants.jsonl]

`mutations.py` says what a mutant is. The sample is random, from each folder in proportion to the mutants it has, so
that the share killed estimates that of all. First the unmutated copy has to pass the tests, slow ones left out, while
coverage.py records which test executes which line. A mutant is tried on the tests that execute its line, those of its
own module first, as many as `line_tests.SECONDS` allows; it is killed when they fail, crash or exceed the time limit.
A second call with the same results file resumes; results of other code or tests are not used.

One process imports torch, transformers and trl and forks a child for each mutant: the imports would cost each of them
seconds. cosmic-ray starts a process for each. mutmut 3 forks, but leaves out decorated functions (every property) and
code outside functions, and draws no sample.
"""

from __future__ import annotations

import argparse
import contextlib
import difflib
import hashlib
import importlib.util
import itertools
import json
import multiprocessing
import os
import random
import runpy
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from line_tests import LineTests, Only, Recorder
from mutations import Mutant, is_valid, mutants

ROOT = Path(__file__).resolve().parents[1]

FOLDERS = ("arithmetic", "checkpoints", "adapters", "grafting", "training")
SUITE = ("shadow_trl", *(f"tests/{name}" for name in (*FOLDERS, "layouts", "operations", "pair", "results")))


def shares(sizes: list[int], sample: int) -> list[int]:
    """`sample` divided in proportion to the sizes, in whole numbers that add up to it."""
    ends = [round(sample * end / sum(sizes)) for end in (0, *itertools.accumulate(sizes))]
    return [end - start for start, end in itertools.pairwise(ends)]


def share_killed(killed: int, total: int) -> str:
    """The share with its 95% interval (Wilson)."""
    from scipy.stats import binomtest

    low, high = binomtest(killed, total).proportion_ci(method="wilson")
    return f"{killed / total:6.1%} [{low:.1%}, {high:.1%}]"


class Job(NamedTuple):
    """A mutant of a module. Paths are below ROOT."""

    folder: str
    module: Path
    mutant: Mutant

    @property
    def line(self) -> int:
        """The line in which the module changes, from 1."""
        return (ROOT / self.module).read_bytes()[: self.mutant.start].count(b"\n") + 1

    def is_valid(self) -> bool:
        """Whether the mutant compiles and differs."""
        return is_valid((ROOT / self.module).read_bytes(), self.mutant)

    def difference(self) -> dict[str, Any]:
        """Where the module changes: the line, and the lines as `diff` shows them."""
        old = (ROOT / self.module).read_bytes()
        both = [text.decode().splitlines() for text in (old, self.mutant.applied(old))]
        lines = [line for line in difflib.ndiff(*both) if line[0] in "-+"]
        return {"line": self.line, "kind": self.mutant.kind, "diff": lines}


def draw(folders: Iterable[str], sample: int, seed: int) -> list[Job]:
    """A random sample of valid mutants, in random order; the same seed draws the same from the same code."""
    found: list[list[Job]] = []
    for folder in folders:
        paths = sorted((ROOT / "shadow_trl" / folder).glob("*.py"))
        found.append([Job(folder, path.relative_to(ROOT), new) for path in paths for new in mutants(path.read_bytes())])
    drawn: list[Job] = []
    randomly = random.Random(seed)
    for jobs, share in zip(found, shares([len(jobs) for jobs in found], sample), strict=True):
        randomly.shuffle(jobs)
        drawn.extend(itertools.islice(filter(Job.is_valid, jobs), share))
    randomly.shuffle(drawn)
    return drawn


def child(tree: Path, files: list[str], plugin: object) -> None:
    """Run pytest in a fork, on the package and the tests of `tree`, and end with its exit code."""
    os.setsid()  # a group of its own, to be ended with all that it starts
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    os.chdir(tree)
    sys.path.insert(0, str(tree))
    # A .pyc would pass for that of a mutant of the same size in the same second.
    sys.dont_write_bytecode = True
    os.environ.update(PYTHONPATH=str(tree), PYTHONDONTWRITEBYTECODE="1")
    assert Path(importlib.util.find_spec("shadow_trl").origin).is_relative_to(tree)
    log = os.open(tree / "pytest.log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(log, 1)
    os.dup2(log, 2)
    options = ["-xq", "-p", "no:cacheprovider", f"--basetemp={tree}.tmp", f"--rootdir={tree}"]
    os._exit(pytest.main([*options, *files], plugins=[plugin]))


def start(tree: Path, files: list[str], plugin: object) -> Any:
    """Start `child` in a fork."""
    process = multiprocessing.get_context("fork").Process(target=child, args=(tree, files, plugin))
    process.start()
    return process


def end(process: multiprocessing.process.BaseProcess) -> None:
    """End a child with all that it started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.join()


def record(trees: list[Path]) -> LineTests:
    """Run the tests without a mutant, a share of them in each tree; exit if they fail."""
    files = [file for name in SUITE for file in sorted((ROOT / name).rglob("*.py"))]
    names = [
        str(file.relative_to(ROOT)) for file in files if file.name.startswith("test_") or "shadow_trl" in file.parts
    ]
    running = [start(tree, names[at :: len(trees)], Recorder(tree)) for at, tree in enumerate(trees)]
    for tree, process in zip(trees, running, strict=True):
        process.join()
        if process.exitcode:
            sys.exit(
                f"the tests fail without a mutant ({process.exitcode}).\n{(tree / 'pytest.log').read_text()[-3000:]}"
            )
    return LineTests(trees)


def run(jobs: Iterable[Job], trees: list[Path], tests: LineTests) -> Iterator[tuple[Job, str, int, float]]:
    """Run the jobs, one at a time in each tree: yields job, outcome, number of tests, seconds."""
    waiting, free = iter(jobs), list(trees)
    running: dict[Any, tuple[Job, Path, Any, list[str], float]] = {}
    try:
        while True:
            for job in itertools.islice(waiting, len(free)):
                tree, names = free.pop(), tests.of(job.module, job.line)
                (tree / job.module).write_bytes(job.mutant.applied((ROOT / job.module).read_bytes()))
                process = start(tree, list(dict.fromkeys(name.partition("::")[0] for name in names)), Only(names))
                running[process.sentinel] = (job, tree, process, names, time.monotonic())
            if not running:
                return
            wait(running, timeout=1)
            for sentinel, (job, tree, process, names, began) in list(running.items()):
                seconds = time.monotonic() - began
                limit = 60 + 4 * sum(tests.seconds[name] for name in names)
                if (ended := not process.is_alive()) or seconds > limit:
                    end(process)
                    shutil.copyfile(ROOT / job.module, tree / job.module)
                    free.append(tree)
                    del running[sentinel]
                    if process.exitcode == 4 and ended:
                        sys.exit(f"{job}: pytest ended with 4.\n" + (tree / "pytest.log").read_text()[-3000:])
                    outcome = "time limit" if not ended else "killed" if process.exitcode else "survived"
                    yield job, outcome if names else "survived", len(names), seconds
    finally:
        for _, _, process, _, _ in running.values():
            end(process)


def copies(folder: Path, number: int) -> list[Path]:
    """Copies of the working tree, without what git ignores."""
    names = subprocess.check_output(["git", "ls-files", "-z", "-co", "--exclude-standard"], cwd=ROOT)
    trees = [folder / str(worker) for worker in range(number)]
    for tree, name in itertools.product(trees, os.fsdecode(names).rstrip("\0").split("\0")):
        if (ROOT / name).is_file():
            (tree / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / name, tree / name)
    return trees


def keyed(jobs: list[Job]) -> dict[str, Job]:
    """The jobs by what decides about their result: the package, the tests, this script and the mutant."""
    files = sorted(
        [*(ROOT / "shadow_trl").rglob("*.py"), *(ROOT / "tests").rglob("*.py"), *Path(__file__).parent.glob("*.py")]
    )
    code = b"\0".join(file.read_bytes() for file in files)
    return {hashlib.sha256(code + repr(job).encode()).hexdigest(): job for job in jobs}


def run_tests(jobs: dict[str, Job], workers: int, results: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Run the tests without a mutant, then on each mutant; yield key and result, and append them to the file."""
    runpy.run_path(str(ROOT / "tests" / "conftest.py"))  # the environment of the tests, before torch sees it
    for name in ("datasets", "peft", "torch", "trl.trainer.dpo_trainer", "trl.trainer.sft_trainer"):
        importlib.import_module(name)
    keys = {job: key for key, job in jobs.items()}
    with tempfile.TemporaryDirectory() as temporary, results.open("a") as file:
        trees = copies(Path(temporary).resolve(), workers)
        began = time.monotonic()
        tests = record(trees)
        print(f"{len(tests.seconds)} tests pass without a mutant, in {time.monotonic() - began:.0f} s", flush=True)
        for count, (job, outcome, number, seconds) in enumerate(run(keys, trees, tests), 1):
            result = {"folder": job.folder, "module": str(job.module), **job.difference(), "outcome": outcome}
            file.write(json.dumps([keys[job], {**result, "tests": number, "seconds": round(seconds, 1)}]) + "\n")
            file.flush()
            print(f"{count}/{len(jobs)} {outcome:10} {seconds:4.0f} s  {job.module}:{job.line}", flush=True)
            yield keys[job], result


def report(results: list[dict[str, Any]]) -> None:
    """Print killed and survived of each folder, and every survivor."""
    print(f"{'folder':12} killed (by time) survived  share killed [95%]")
    for folder in [*dict.fromkeys(result["folder"] for result in results), "all"]:
        outcomes = Counter(result["outcome"] for result in results if folder in ("all", result["folder"]))
        killed = outcomes.total() - outcomes["survived"]
        share = share_killed(killed, outcomes.total())
        print(f"{folder:12} {killed:6} {outcomes['time limit']:9} {outcomes['survived']:8}  {share}")
    for result in results:
        if result["outcome"] == "survived":
            print(f"\n{result['module']}:{result['line']}: {result['kind']}", *result["diff"], sep="\n")


def main() -> None:
    """Draw, run what has no result yet, and report."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sample", type=int, default=300)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--only", choices=FOLDERS, metavar="FOLDER")
    parser.add_argument("--results", type=Path, default=Path("mutants.jsonl"))
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("terminated"))  # as Ctrl-C: the children are ended first
    jobs = keyed(draw([options.only] if options.only else FOLDERS, options.sample, options.seed))
    lines = options.results.read_text().splitlines() if options.results.exists() else []
    results = {key: result for key, result in map(json.loads, lines) if key in jobs}
    if todo := {key: job for key, job in jobs.items() if key not in results}:
        results.update(run_tests(todo, options.workers, options.results))
    report([results[key] for key in jobs])


if __name__ == "__main__":
    main()
