"""Do the tests notice a fault? One small change at a time goes into a copy of the package, and its tests run there.

    python benchmarks/mutants.py [--sample 300] [--seed 0] [--workers 2] [--only FOLDER] [--results mutants.jsonl]

`mutations.py` says what a mutant is. The sample is random, from each folder in proportion to the mutants it has, so
that the share killed estimates that of all. First the unmutated copy has to pass the same tests, slow ones left out. A
mutant is killed when they fail, crash or exceed the time limit. A second call with the same results file resumes;
results of other code or tests are not used.

One process imports torch, transformers and trl and forks a child for each mutant: the imports would cost each of them
seconds. cosmic-ray starts a process for each. mutmut 3 forks, but leaves out decorated functions (every property) and
code outside functions, draws no sample, and needs a run of the entire suite first.
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

from mutations import Mutant, is_valid, mutants

ROOT = Path(__file__).resolve().parents[1]

# Folder of the package -> its tests besides the doctests, the cheap ones first
TESTS = {
    "arithmetic": ("tests/arithmetic", "tests/operations/test_graft.py"),
    "checkpoints": ("tests/checkpoints", "tests/results", "tests/operations"),
    "adapters": ("tests/adapters",),
    "grafting": ("tests/operations", "tests/layouts", "tests/adapters"),
    "training": ("tests/training",),
}


def shares(sizes: list[int], sample: int) -> list[int]:
    """`sample` divided in proportion to the sizes, in whole numbers that add up to it."""
    ends = [round(sample * end / sum(sizes)) for end in (0, *itertools.accumulate(sizes))]
    return [end - start for start, end in itertools.pairwise(ends)]


def share_killed(killed: int, total: int) -> str:
    """The share with its 95 % interval (Wilson)."""
    from scipy.stats import binomtest

    low, high = binomtest(killed, total).proportion_ci(method="wilson")
    return f"{killed / total:6.1%} [{low:.1%}, {high:.1%}]"


class Job(NamedTuple):
    """A mutant of a module; without a mutant, the tests alone. Paths are below ROOT."""

    folder: str
    module: Path
    mutant: Mutant | None

    @property
    def tests(self) -> list[str]:
        """What pytest runs: the doctests, the test file named after the module, the other files of the table."""
        paths = [ROOT / name for name in TESTS[self.folder]]
        files = [file for path in paths for file in ([path] if path.is_file() else sorted(path.glob("test_*.py")))]
        files.sort(key=lambda file: file.stem != f"test_{self.module.stem}")
        doctests = self.module if self.mutant else self.module.parent
        return [str(doctests), *(str(file.relative_to(ROOT)) for file in files)]

    def is_valid(self) -> bool:
        """Whether the mutant compiles and differs."""
        return is_valid((ROOT / self.module).read_bytes(), self.mutant)

    def difference(self) -> dict[str, Any]:
        """Where the module changes: the line, and the lines as `diff` shows them."""
        old = (ROOT / self.module).read_bytes()
        both = [text.decode().splitlines() for text in (old, self.mutant.applied(old))]
        lines = [line for line in difflib.ndiff(*both) if line[0] in "-+"]
        return {"line": old[: self.mutant.start].count(b"\n") + 1, "kind": self.mutant.kind, "diff": lines}


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


def child(tree: Path, tests: list[str]) -> None:
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
    os._exit(sys.modules["pytest"].main(["-xq", "-p", "no:cacheprovider", f"--basetemp={tree}.tmp", *tests]))


def end(process: multiprocessing.process.BaseProcess) -> None:
    """End a child with all that it started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.join()


def run(jobs: Iterable[Job], trees: list[Path], limits: dict[str, float]) -> Iterator[tuple[Job, int | None, float]]:
    """Run the jobs, one at a time in each tree: yields job, exit code (None: past the limit of its folder), seconds."""
    waiting, free = iter(jobs), list(trees)
    running: dict[Any, tuple[Job, Path, Any, float]] = {}
    try:
        while True:
            for job in itertools.islice(waiting, len(free)):
                tree = free.pop()
                if job.mutant:
                    (tree / job.module).write_bytes(job.mutant.applied((ROOT / job.module).read_bytes()))
                process = multiprocessing.get_context("fork").Process(target=child, args=(tree, job.tests))
                process.start()
                running[process.sentinel] = (job, tree, process, time.monotonic())
            if not running:
                return
            wait(running, timeout=1)
            for sentinel, (job, tree, process, start) in list(running.items()):
                seconds = time.monotonic() - start
                if (ended := not process.is_alive()) or seconds > limits[job.folder]:
                    end(process)
                    shutil.copyfile(ROOT / job.module, tree / job.module)
                    free.append(tree)
                    del running[sentinel]
                    code = process.exitcode if ended else None
                    if code in (4, 5) or (code and not job.mutant):  # 4, 5: wrong usage, nothing collected
                        sys.exit(f"{job}: pytest ended with {code}.\n" + (tree / "pytest.log").read_text()[-3000:])
                    yield job, code, seconds
    finally:
        for _, _, process, _ in running.values():
            end(process)


def copies(folder: Path, number: int) -> list[Path]:
    """Copies of the working tree, without what git ignores."""
    names = subprocess.check_output(["git", "ls-files", "-z", "-co", "--exclude-standard"], cwd=ROOT, text=True)
    trees = [folder / str(worker) for worker in range(number)]
    for tree, name in itertools.product(trees, names.rstrip("\0").split("\0")):
        if (ROOT / name).is_file():
            (tree / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / name, tree / name)
    return trees


def keyed(jobs: list[Job]) -> dict[str, Job]:
    """The jobs by what decides about their result: the package, the tests, this script and the mutant."""
    files = sorted([*(ROOT / "shadow_trl").rglob("*.py"), *(ROOT / "tests").rglob("*.py"), Path(__file__)])
    code = b"\0".join(file.read_bytes() for file in files)
    return {hashlib.sha256(code + repr(job).encode()).hexdigest(): job for job in jobs}


def run_tests(jobs: dict[str, Job], workers: int, results: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Run the tests without a mutant, then on each mutant; yield key and result, and append them to the file."""
    runpy.run_path(str(ROOT / "tests" / "conftest.py"))  # the environment of the tests, before torch sees it
    for name in ("datasets", "peft", "pytest", "torch", "trl.trainer.dpo_trainer", "trl.trainer.sft_trainer"):
        importlib.import_module(name)
    keys = {job: key for key, job in jobs.items()}
    with tempfile.TemporaryDirectory() as temporary, results.open("a") as file:
        trees = copies(Path(temporary), workers)
        folders = dict.fromkeys(job.folder for job in jobs.values())
        limits = dict.fromkeys(folders, 1800.0)
        whole = [Job(folder, Path("shadow_trl", folder, "__init__.py"), None) for folder in folders]
        for job, code, seconds in run(whole, trees, limits):
            if code is None:
                sys.exit(f"{job.folder}: the tests without a mutant take more than {limits[job.folder]} s.")
            print(f"{job.folder}: its tests pass without a mutant in {seconds:.0f} s", flush=True)
            limits[job.folder] = 60 + 4 * seconds
        for count, (job, code, seconds) in enumerate(run(keys, trees, limits), 1):
            outcome = {0: "survived", None: "time limit"}.get(code, "killed")
            result = {"folder": job.folder, "module": str(job.module), **job.difference(), "outcome": outcome}
            file.write(json.dumps([keys[job], {**result, "seconds": round(seconds, 1)}]) + "\n")
            file.flush()
            print(f"{count}/{len(jobs)} {outcome:10} {seconds:4.0f} s  {job.module}:{result['line']}", flush=True)
            yield keys[job], result


def report(results: list[dict[str, Any]]) -> None:
    """Print killed and survived of each folder, and every survivor."""
    print(f"{'folder':12} killed (by time) survived  share killed [95 %]")
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
    parser.add_argument("--only", choices=TESTS, metavar="FOLDER")
    parser.add_argument("--results", type=Path, default=Path("mutants.jsonl"))
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("terminated"))  # as Ctrl-C: the children are ended first
    jobs = keyed(draw([options.only] if options.only else TESTS, options.sample, options.seed))
    lines = options.results.read_text().splitlines() if options.results.exists() else []
    results = {key: result for key, result in map(json.loads, lines) if key in jobs}
    if todo := {key: job for key, job in jobs.items() if key not in results}:
        results.update(run_tests(todo, options.workers, options.results))
    report([results[key] for key in jobs])


if __name__ == "__main__":
    main()
