"""Commands in processes of their own, disturbed or not, and what can be said of how they ended."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

LIMIT, PATIENCE = 60.0, 900.0
"""Processor seconds, and seconds by the clock, after which a process counts as hanging."""
FAULTS = ("lost", "left", "tracebacks", "hangs", "false")


@dataclass
class Tally:
    """What was counted in one kind of trial.

    Attributes:
        name: as in the table.
        runs: trials.
        faults: how many trials each kind of fault was seen in; a fault has a line in `details`.
        facts: what else was counted, for the notes under the table.
    """

    name: str
    runs: int = 0
    faults: Counter[str] = field(default_factory=Counter)
    facts: Counter[str] = field(default_factory=Counter)
    details: list[str] = field(default_factory=list)

    def fault(self, kind: str, detail: str) -> None:
        """Count a fault and print it at once."""
        self.faults[kind] += 1
        self.details.append(f"{kind}: {detail}")
        print(f"  {self.name}: {kind}: {detail}", file=sys.stderr, flush=True)

    def row(self) -> str:
        """Return the row of the table."""
        facts = "; ".join(f"{count} {fact}" for fact, count in self.facts.items())
        return f"| {self.name} | {self.runs} | {' | '.join(str(self.faults[kind]) for kind in FAULTS)} | {facts} |"


@dataclass
class Ended:
    """How a process ended.

    Attributes:
        code: exit code, minus a signal's number, or None where it hung.
        out, err: what it printed.
        seconds: of the processor, in its main thread.
    """

    code: int | None
    out: str
    err: str
    seconds: float


class Running:
    """A command of `shadow-trl` in a process of its own.

    It is forked from this process, which has imported the package: a signal at a random moment then meets the command
    at work rather than Python at its imports. With `fresh` an interpreter of its own is started instead. `folder` is
    the command's current folder; what it prints goes to `logs`, by default beside it.
    """

    def __init__(
        self,
        argv: list[str],
        folder: Path,
        *,
        fresh: bool = False,
        limit: Callable[[], object] | None = None,
        logs: Path | None = None,
    ) -> None:
        self._log = logs or folder.with_name(f"{folder.name}-log")
        self._log.mkdir(exist_ok=True)
        self.process: subprocess.Popen | None = None
        if fresh:
            command = [sys.executable, "-c", "import sys; from shadow_trl.cli import main; sys.exit(main())", *argv]
            with (self._log / "out").open("wb") as out, (self._log / "err").open("wb") as err:
                environment = {**os.environ, **_places(folder)}
                self.process = subprocess.Popen(command, stdout=out, stderr=err, cwd=folder, env=environment)
            self.pid = self.process.pid
            return
        sys.stdout.flush()
        sys.stderr.flush()
        self.pid = os.fork()
        if self.pid == 0:
            _become(argv, folder, self._log, limit)

    def at(self, moment: float, act: Callable[[], object]) -> None:
        """Call `act` once the process has worked for `moment` seconds of the processor, unless it ends before."""
        while (used := _worked(self.pid)) is not None and used < moment:
            time.sleep(0.001)
        act()

    def send(self, number: int) -> None:
        """Send a signal; one that has ended takes no notice, as it has not been waited for."""
        os.kill(self.pid, number)

    def wait(self) -> Ended:
        """Wait for the end; kill the process if it hangs."""
        code: int | None = None
        used, deadline = 0.0, time.monotonic() + PATIENCE
        while True:
            used = _worked(self.pid) or used
            done, status = os.waitpid(self.pid, os.WNOHANG)
            if done:
                code = os.waitstatus_to_exitcode(status)
                break
            if time.monotonic() > deadline or used > LIMIT:
                os.kill(self.pid, signal.SIGKILL)
                os.waitpid(self.pid, 0)
                break
            time.sleep(0.005)
        if self.process is not None:
            self.process.returncode = -signal.SIGKILL if code is None else code
        said = [(self._log / name).read_text(errors="replace") for name in ("out", "err")]
        return Ended(code, *said, used)


def _worked(pid: int) -> float | None:
    """Return the processor seconds of a process, or None if it has ended."""
    try:
        if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z":
            return None
        return int(Path(f"/proc/{pid}/schedstat").read_text().split()[0]) / 1e9
    except (OSError, IndexError):
        return None


def run(argv: list[str], folder: Path, **options: object) -> Ended:
    """Run a command to its end."""
    return Running(argv, folder, **options).wait()  # type: ignore[arg-type]


def _become(argv: list[str], folder: Path, log: Path, limit: Callable[[], object] | None) -> None:
    """Be the command from here on, in a forked process."""
    code = 1
    try:
        for number, name in ((1, "out"), (2, "err")):
            os.dup2(os.open(log / name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
        sys.stdout, sys.stderr = os.fdopen(1, "w", closefd=False), os.fdopen(2, "w", closefd=False)
        os.chdir(folder)
        os.environ.update(_places(folder))
        tempfile.tempdir = os.environ["TMPDIR"]
        if limit is not None:
            limit()
        from shadow_trl.cli import main

        sys.argv = ["shadow-trl", *argv]
        code = main()
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 1
    except BaseException:
        sys.excepthook(*sys.exc_info())
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _places(folder: Path) -> dict[str, str]:
    """Return where a command finds its temporary files; torch's own cache is kept apart from them."""
    return {"TMPDIR": str(folder / "tmp"), "TORCHINDUCTOR_CACHE_DIR": str(folder.parent / "inductor")}


@contextmanager
def workplace(root: Path) -> Iterator[Path]:
    """Yield an empty folder with a `tmp` in it, which is removed afterwards."""
    folder = root / "work"
    shutil.rmtree(folder, ignore_errors=True)
    (folder / "tmp").mkdir(parents=True)
    yield folder
    shutil.rmtree(folder)


def listing(folder: Path) -> dict[str, tuple[int, int]]:
    """Return path -> (bytes, time of the last change) of everything below a folder."""
    found = {}
    for path in sorted(folder.rglob("*")):
        stat = path.lstat()
        found[str(path.relative_to(folder))] = (0, 0) if path.is_dir() else (stat.st_size, stat.st_mtime_ns)
    return found


def litter(folder: Path) -> list[str]:
    """Return what lies in a workplace that is neither an input nor a result: hidden files and temporary ones."""
    return [
        str(path.relative_to(folder))
        for path in sorted(folder.rglob("*"))
        if (path.relative_to(folder).parts[0] == "tmp" and path != folder / "tmp") or path.name.startswith(".")
    ]


def judge_message(tally: Tally, label: str, ended: Ended, changed: bool | None = None) -> None:
    """Count a traceback, a hang, a death without a word, and a message that the disk contradicts.

    Args:
        tally: where it counts.
        label: of the trial.
        ended: how the process ended.
        changed: whether the folder differs from what it was before. None: not looked at.
    """
    if ended.code is None:
        tally.fault("hangs", f"{label}: more than {LIMIT:.0f} processor seconds or {PATIENCE:.0f} s")
        return
    if "Traceback (most recent call last)" in ended.err:
        tally.fault("tracebacks", f"{label}: {ended.err.strip()[-3000:]}")
    elif ended.code < 0 and -ended.code not in (signal.SIGKILL,):
        tally.fault("tracebacks", f"{label}: died of signal {-ended.code} without a word")
    elif ended.code > 0 and not (ended.err + ended.out).strip():
        tally.fault("false", f"{label}: exit {ended.code} without a word")
    elif ended.code > 0 and changed and "Nothing was written" in ended.err:
        tally.fault("false", f"{label}: says nothing was written: {ended.err.strip()[-160:]}")
