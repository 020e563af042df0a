"""Disks that fill up while a result is written: a small tmpfs of every size, and every command that writes."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from killed_commands import Command, prepare
from processes import Tally, judge_message, listing, litter, run


def fill_disks(root: Path, steps: int) -> Iterator[Tally]:
    """Run each command on disks with almost none of what it needs, and more in `steps`; the mounts need root."""
    tally = Tally("full disks")
    if os.geteuid() != 0:
        tally.facts["not run: mounting a tmpfs needs root"] += 1
        yield tally
        return
    every = prepare(root)
    for command in every:
        whole = _needed(command, root)
        for step in range(steps):
            # What a command begins with is there in any case; then less than it needs, in even steps.
            with _disk(root / "disk", whole[0] + (whole[1] - whole[0]) * step // steps) as disk:
                _one(tally, command, disk, f"{command.name} on a disk with {step} of {steps} parts of what it needs")
    yield tally


def _one(tally: Tally, command: Command, work: Path, label: str) -> None:
    (work / "tmp").mkdir()
    command.before(work)
    before, first = listing(work), command.state(work)
    ended = run(command.argv, work)
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


def _needed(command: Command, root: Path) -> tuple[int, int]:
    """Return the bytes in use before the command, and with a whole result beside them; each with some room."""
    with _disk(root / "disk", 2**30) as disk:
        (disk / "tmp").mkdir()
        command.before(disk)
        found = os.statvfs(disk)
        used = (found.f_blocks - found.f_bfree) * found.f_frsize
        assert run(command.argv, disk).code == 0
        return used + 2**15, used + 2**16 + sum(size for size, _ in listing(disk).values())


@contextmanager
def _disk(at: Path, size: int) -> Iterator[Path]:
    """Yield the folder of a tmpfs of `size` bytes, rounded up to pages."""
    at.mkdir(parents=True, exist_ok=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "none", str(at)], check=True)
    try:
        yield at
    finally:
        subprocess.run(["umount", str(at)], check=True)
