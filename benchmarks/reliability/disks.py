"""Disks that fill up while a result is written: a small tmpfs of every size, and every command that writes."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from killed_commands import Command, prepare
from processes import Running, Tally, judge_message, listing, litter


def fill_disks(root: Path, steps: int) -> Iterator[Tally]:
    """Run each command on disks with almost none of what it needs, and more in `steps`; the mounts need root."""
    tally = Tally("full disks")
    if os.geteuid() != 0:
        tally.facts["not run: mounting a tmpfs needs root"] += 1
        yield tally
        return
    for command in prepare(root):
        used, whole, seconds = _needed(command, root)
        for step in range(steps):
            # What a command begins with is there in any case; then less than it needs, in even steps.
            with _disk(root / "disk", used + (whole - used) * step // steps) as disk:
                _one(tally, command, disk, f"{command.name} on a disk with {step} of {steps} parts of what it needs")
            # A disk with room when it is looked at, which somebody else fills during the work.
            with _disk(root / "disk", 2 * whole) as disk:
                moment = seconds * (step + 0.5) / steps
                _one(tally, command, disk, f"{command.name} on a disk that is filled after {moment:.3f} s", moment)
    yield tally


def _one(tally: Tally, command: Command, disk: Path, label: str, moment: float | None = None) -> None:
    work = disk / "work"
    (work / "tmp").mkdir(parents=True)
    command.before(work)
    before, first = listing(work), command.state(work)
    running = Running(command.argv, work, logs=disk.with_name("logs"))
    if moment is not None:
        running.at(moment, lambda: _fill(disk))
    ended = running.wait()
    tally.runs += 1
    tally.facts["had room" if ended.code == 0 else "were full"] += 1
    judge_message(tally, label, ended, changed=listing(work) != before)
    state = command.state(work)
    if ended.code == 0 and state != "new":
        tally.fault("lost", f"{label}: exit 0 and {state}")
    elif ended.code and state not in (first, "new"):
        tally.fault("lost", f"{label}: {first} before and {state} after")
    elif ended.code and not any(word in ended.err for word in ("full", "free", "space", "room")):
        tally.fault("false", f"{label}: no word of the disk: {ended.err.strip()[-200:]}")
    if litter(work):
        tally.fault("left", f"{label}: {litter(work)}")


def _fill(disk: Path) -> None:
    """Take all that is free."""
    with suppress(OSError), (disk / "filler").open("wb", buffering=0) as file:
        while True:
            file.write(bytes(2**16))


def _needed(command: Command, root: Path) -> tuple[int, int, float]:
    """Return the bytes in use before the command, those with a whole result beside them, and the seconds it takes."""
    with _disk(root / "disk", 2**30) as disk:
        work = disk / "work"
        (work / "tmp").mkdir(parents=True)
        command.before(work)
        found = os.statvfs(disk)
        used = (found.f_blocks - found.f_bfree) * found.f_frsize
        ended = Running(command.argv, work, logs=disk.with_name("logs")).wait()
        assert ended.code == 0, ended.err
        return used + 2**15, used + 2**16 + sum(size for size, _ in listing(work).values()), ended.seconds


@contextmanager
def _disk(at: Path, size: int) -> Iterator[Path]:
    """Yield the folder of a tmpfs of `size` bytes, rounded up to pages."""
    at.mkdir(parents=True, exist_ok=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "none", str(at)], check=True)
    try:
        yield at
    finally:
        subprocess.run(["umount", str(at)], check=True)
