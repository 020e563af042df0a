"""Many grafts in one process, many files, many tensors, long names, and files larger than memory should be."""

from __future__ import annotations

import json
import os
import shutil
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from family import CONFIG, Family, Weights, dyadic, plus, read_model, same, write_model
from processes import Ended, Tally, judge_message, litter, run, workplace

MIB = 2**20
COMMAND = "import sys\nfrom shadow_trl.cli import main\nassert main(sys.argv[1:]) == 0"


def many(root: Path, count: int) -> Iterator[Tally]:
    """Graft `count` times in this process: memory, files and threads must stay what they were after a tenth of them."""
    from shadow_trl import graft

    family, tally = Family(root / "family"), Tally("grafts in one process")
    sides = {role: family.root / role for role in ("base", "instruct", "tuned")}
    first = (0, 0, 0)
    for number in range(count):
        graft(**sides, output=root / "out", progress=False)
        if number in (0, count - 1) and not same(read_model(root / "out"), family.grafted):
            tally.fault("lost", f"graft {number} is not right")
        shutil.rmtree(root / "out")
        tally.runs += 1
        if number == count // 10:
            first = _held()
    last = _held()
    for what, before, after, room in zip(("MiB", "open files", "threads"), first, last, (16, 0, 0), strict=True):
        tally.facts[f"{what} after a tenth"], tally.facts[f"{what} at the end"] = before, after
        if after > before + room:
            tally.fault("left", f"{before} {what} after a tenth, {after} at the end")
    if left := [path.name for path in root.iterdir() if path.name != "family"]:
        tally.fault("left", f"{left}")
    yield tally


def large(root: Path, count: int) -> Iterator[Tally]:
    """Graft what has many files, `count` tensors or names of 4 KB, and measure sparse models.

    A fiftieth of `count` is the number of files; the sparse models have 400 KB for each of `count`, 20 GB for 50,000;
    the graft takes that much on the disk.
    """
    yield _grafted(root, f"{count // 50:,} files", _tensors(count // 25), count // 50)[0]
    fifth, seconds = _grafted(root, f"{count // 5:,} tensors", _tensors(count // 5), 4)
    yield fifth
    whole, longer = _grafted(root, f"{count:,} tensors", _tensors(count), 4)
    if longer > 2 * 5 * seconds:
        whole.fault("hangs", f"{seconds:.1f} s for a fifth of the tensors and {longer:.1f} s for all")
    yield whole
    yield _grafted(root, "names of 4 KB", _tensors(200, "x" * 4096), 2)[0]
    yield _sparse(root, count * 400_000, "gap")
    yield _sparse(root, count * 400_000, "graft")


def _tensors(count: int, name: str = "weight") -> dict[str, tuple[int, ...]]:
    return {f"model.layers.{number}.{name}": (4, 4) for number in range(count)}


def _grafted(root: Path, name: str, sizes: dict[str, tuple[int, ...]], files: int) -> tuple[Tally, float]:
    """Graft models of these weights; return the tally and the processor seconds."""
    tally = Tally(name)
    with workplace(root) as work:
        base, change = dyadic(0, sizes), dyadic(2, sizes, 8)
        sides: dict[str, Weights] = {
            "base": base,
            "instruct": plus(base, dyadic(1, sizes, 8)),
            "tuned": plus(base, change),
        }
        words = ["graft", "--output", "out"]
        for role, weights in sides.items():
            words += [f"--{role}", str(write_model(work / role, weights, files=files))]
        ended = run(words, work)
        _judge(tally, ended, name)
        if ended.code == 0 and not same(read_model(work / "out"), plus(sides["instruct"], change)):
            tally.fault("lost", "the result is not right")
        if litter(work):
            tally.fault("left", f"{litter(work)}")
    tally.facts["milliseconds of the processor"] = round(1000 * ended.seconds)
    return tally, ended.seconds


def _sparse(root: Path, size: int, command: str) -> Tally:
    """Run a command on models of zeros that take no room on the disk, and look at its peak memory."""
    name = f"{command} of sparse models of {size // 10**6:,} MB"
    tally = Tally(name)
    with workplace(root) as work:
        roles = ("base", "instruct", "tuned") if command == "graft" else ("base", "instruct")
        words = [word for role in roles for word in (f"--{role}", str(_zeros(work / role, size)))]
        words += ["--output", "out"] if command == "graft" else []
        # An interpreter of its own: a fork would begin with the memory of this one.
        ended, peak = _peak([command, *words], work)
        _judge(tally, ended, name)
        tally.facts["MiB at most"] = peak
        if peak > 512:
            tally.fault("left", f"{peak} MiB of memory")
        if command == "graft" and ended.code == 0:
            written = sum(path.stat().st_size for path in (work / "out").glob("*.safetensors"))
            if written < size * 0.99 or any(
                np.fromfile(next((work / "out").glob("*.safetensors")), np.uint8, MIB, offset=size // 2)
            ):
                tally.fault("lost", f"{written} bytes written")
    return tally


def _peak(argv: list[str], work: Path) -> tuple[Ended, int]:
    """Run a command in an interpreter that prints the most memory it had; return that in MiB."""
    import subprocess
    import time

    program = (
        COMMAND + "\nprint(next(line.split()[1] for line in open('/proc/self/status') if line.startswith('VmHWM')))"
    )
    begun = time.monotonic()
    done = subprocess.run([sys.executable, "-c", program, *argv], cwd=work, capture_output=True, text=True, check=False)
    ended = Ended(done.returncode, done.stdout, done.stderr, time.monotonic() - begun)
    return ended, int(done.stdout.split()[-1]) // 1024 if done.returncode == 0 else 0


def _zeros(folder: Path, size: int) -> Path:
    """Write a model of eight bf16 tensors of zeros, `size` bytes in all, as a file with a hole."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(CONFIG))
    each = size // 8 // 2 * 2
    header = {
        f"model.layers.{number}.weight": {
            "dtype": "BF16",
            "shape": [each // 2],
            "data_offsets": [number * each, (number + 1) * each],
        }
        for number in range(8)
    }
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with (folder / "model.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + 8 * each)
    return folder


def _judge(tally: Tally, ended: Ended, label: str) -> None:
    tally.runs += 1
    judge_message(tally, label, ended)
    if ended.code:
        tally.fault("lost", f"{label}: exit {ended.code}: {ended.err.strip()[-300:]}")


def _held() -> tuple[int, int, int]:
    """Return the MiB, open files and threads of this process."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") // MIB, len(os.listdir("/proc/self/fd")), _threads()


def _threads() -> int:
    return max(len(os.listdir("/proc/self/task")), threading.active_count())
