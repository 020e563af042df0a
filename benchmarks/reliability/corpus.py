"""The corpus of bad input of the tests, each case in a process of its own."""

from __future__ import annotations

import resource
from collections.abc import Iterator
from pathlib import Path

from hostile import Case, Sound, cases, ends_well
from processes import Ended, Tally, judge_message, listing, run, workplace

MEMORY = 8 * 2**30
"""Bytes of address space that a command may ask for: a bomb ends as an error here, not as a full machine."""


def bad_input(root: Path) -> Iterator[Tally]:
    """Run every case: exit code 2, one error with the expected words, and nothing written."""
    tally = Tally("bad input")
    root.mkdir(parents=True, exist_ok=True)
    for case in cases(Sound(root / "sound")):
        with workplace(root) as work:
            argv = case.make(work)
            before = listing(work)
            ended = run(argv, work, limit=bounded)
            tally.runs += 1
            tally.facts["refused"] += ended.code == 2
            judge_refusal(tally, case.name, argv, ended, changed=listing(work) != before)
            _judge_words(tally, case, ended)
    yield tally


def bounded() -> None:
    """Bound the memory of this process."""
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))


def judge_refusal(tally: Tally, label: str, argv: list[str], ended: Ended, changed: bool) -> None:
    """Count what is wrong with the refusal of a command: its message, or what it left."""
    judge_message(tally, label, ended, changed)
    if ended.code == 2 and not (ended.err.count("Error: ") == 1 and ends_well(argv, ended.err)):
        tally.fault("false", f"{label}: {ended.err.strip()[-200:]!r}")
    if ended.code == 2 and changed:
        tally.fault("left", f"{label}: a refusal that wrote")


def _judge_words(tally: Tally, case: Case, ended: Ended) -> None:
    if ended.code not in (2, None):
        tally.fault("false", f"{case.name}: exit {ended.code} and not 2: {ended.err.strip()[-160:]}")
    elif case.expected not in ended.err:
        tally.fault("false", f"{case.name}: does not say {case.expected!r}: {ended.err.strip()[-160:]}")
