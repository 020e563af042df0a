"""Commands that are killed at a random moment: what is lost, what lies about, and does the next run put it right?"""

from __future__ import annotations

import itertools
import json
import random
import shutil
import signal
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from family import Family, product, read_model, same
from processes import Ended, Running, Tally, judge_message, listing, litter, run, workplace

SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT)


@dataclass
class Command:
    """A command, and how its result is known to be right.

    Args:
        name: of the command.
        argv: its words; paths are below the workplace or absolute.
        state: what a workplace holds: "nothing", "old" (what was there before), "new" (the right result) or "broken".
        before: fills the workplace.
    """

    name: str
    argv: list[str]
    state: Callable[[Path], str]
    before: Callable[[Path], object] = lambda work: None


def commands(family: Family, ready: Path) -> list[Command]:
    """Return the commands that are killed; `ready` holds results that some of them begin with."""
    three = family.words("base", "instruct", "tuned")
    sums = [
        *family.words("base", "instruct"),
        "--tuned",
        f"{family.root}/tuned:0.5",
        "--tuned",
        f"{family.root}/other:0.5",
    ]

    def model(right: dict[str, np.ndarray], old: dict[str, np.ndarray] | None = None) -> Callable[[Path], str]:
        def state(work: Path) -> str:
            return _state(work / "out", lambda found: _which(read_model(found), right, old))

        return state

    def low(work: Path) -> str:
        return _state(work / "out", lambda found: "new" if _near(product(found), family.delta) else "broken")

    def figures(work: Path) -> str:
        return _state(work / "gap.json", lambda found: "new" if _right_gap(found, family) else "broken")

    def verified(work: Path) -> str:
        return "new" if same(read_model(work / "graft"), family.grafted) else "broken"

    return [
        Command("graft", ["graft", *three, "--output", "out"], model(family.grafted)),
        Command(
            "graft --overwrite", ["graft", *three, "--output", "out", "--overwrite"],
            model(family.grafted, family.summed), lambda work: shutil.copytree(ready / "summed", work / "out"),
        ),
        Command("graft of a sum", ["graft", *sums, "--output", "out"], model(family.summed)),
        Command("delta", ["delta", *family.words("base", "tuned"), "--output", "out"], model(family.whole_delta)),
        Command("delta --rank", ["delta", *family.words("base", "tuned"), "--rank", "2", "--output", "out"], low),
        Command("verify", ["verify", "graft"], verified, lambda work: shutil.copytree(ready / "graft", work / "graft")),
        Command("gap", ["gap", *family.words("base", "instruct"), "--json", "gap.json"], figures),
    ]  # fmt: skip


def prepare(root: Path) -> list[Command]:
    """Make the models and the results that some commands begin with; return the commands."""
    family, ready = Family(root / "family"), root / "ready"
    (ready / "tmp").mkdir(parents=True)
    every = commands(family, ready)
    for name, number in (("graft", 0), ("summed", 2)):
        ended = run([*every[number].argv[:-1], name], ready)
        assert ended.code == 0, ended.err
    return every


def kill_commands(root: Path, count: int, *, seed: int = 0, fresh: bool = False, only: str | None = None) -> Tally:
    """Kill `count` commands at work, each kind (or `only` one) and each signal in turn, and run each again."""
    name = "kills of " + (f"`{only}`" if only else "a command") + (", fresh interpreters" if fresh else "")
    tally, source = Tally(name), random.Random(seed)
    every = [command for command in prepare(root) if only in (None, command.name)]
    inputs = listing(root / "family")
    seconds = {command.name: _undisturbed(command, root, fresh) for command in every}
    for number in itertools.count():
        if tally.runs == count:
            return tally
        command, sign = every[number % len(every)], SIGNALS[number // len(every) % len(SIGNALS)]
        moment = source.uniform(0, 1.05) * seconds[command.name]
        label = f"{command.name}, {sign.name} after {moment:.3f} of {seconds[command.name]:.3f} s"
        with workplace(root) as work:
            _one(tally, command, work, sign, moment, label, fresh)
        if listing(root / "family") != inputs:
            tally.fault("lost", f"{label}: an input has changed")
            inputs = listing(root / "family")


def _undisturbed(command: Command, root: Path, fresh: bool) -> float:
    """Return the seconds of the command, and see that its result is right when nothing disturbs it."""
    times = []
    for _ in range(3):
        with workplace(root) as work:
            command.before(work)
            ended = run(command.argv, work, fresh=fresh)
            assert ended.code == 0, ended.err
            assert command.state(work) == "new", (command.name, command.state(work))
            assert not litter(work), litter(work)
            times.append(ended.seconds)
    return sorted(times)[1]


def _one(
    tally: Tally, command: Command, work: Path, number: signal.Signals, moment: float, label: str, fresh: bool
) -> None:
    command.before(work)
    before, first = listing(work), command.state(work)
    running = Running(command.argv, work, fresh=fresh)
    running.at(moment, lambda: running.send(number))
    ended = running.wait()
    tally.runs += ended.code != 0
    state, left = command.state(work), litter(work)
    tally.facts["more had ended before"] += ended.code == 0
    changed = listing(work) != before
    if not changed and _unanswered(ended, number):
        tally.facts["of them before the command could answer, with nothing on the disk"] += 1
    else:
        judge_message(tally, label, ended, changed)
    _judge_state(tally, label, ended, (first, state, left))
    if number != signal.SIGKILL and left:
        tally.fault("left", f"{label}: {left}")
    again = run(command.argv, work)
    wanted = 2 if state == "new" and command.name not in ("graft --overwrite", "verify", "gap") else 0
    if again.code != wanted:
        tally.fault(
            "lost", f"{label}: the next run ended with {again.code} and not {wanted}: {again.err.strip()[-200:]}"
        )
    elif command.state(work) != "new":
        tally.fault("lost", f"{label}: {command.state(work)} after the next run")
    if litter(work):
        tally.fault("left", f"{label}: after the next run {litter(work)}")


def _unanswered(ended: Ended, sign: signal.Signals) -> bool:
    """Whether Python itself answered the signal, before its handlers were set or while the command was imported."""
    if sign == signal.SIGINT:
        return "KeyboardInterrupt" in ended.err and "in exit_code" not in ended.err
    return sign == signal.SIGTERM and ended.code == -sign


def _judge_state(tally: Tally, label: str, ended: Ended, seen: tuple[str, str, list[str]]) -> None:
    first, state, left = seen
    if state == "broken":
        tally.fault("lost", f"{label}: the result is broken")
    elif ended.code == 0 and state != "new":
        tally.fault("lost", f"{label}: exit 0 and {state}")
    elif first == "old" and state == "nothing" and not any("shadow-old" in path for path in left):
        tally.fault("lost", f"{label}: the old result is gone")


def _state(path: Path, look: Callable[[Path], str]) -> str:
    if not path.exists():
        return "nothing"
    try:
        return look(path)
    except (ValueError, KeyError, OSError):
        return "broken"


def _which(found: dict[str, np.ndarray], right: dict[str, np.ndarray], old: dict[str, np.ndarray] | None) -> str:
    return "new" if same(found, right) else "old" if old is not None and same(found, old) else "broken"


def _near(found: dict[str, np.ndarray], wanted: dict[str, np.ndarray]) -> bool:
    return found.keys() == wanted.keys() and all(
        float(np.abs(found[name] - value).max()) < 1e-6 for name, value in wanted.items()
    )


def _right_gap(path: Path, family: Family) -> bool:
    sides = [family.base, family.instruct]
    apart = sum(float(np.abs(family.base[name].astype(float) - family.instruct[name]).sum()) for name in family.base)
    sigma = apart / sum(float(np.abs(value.astype(float)).sum()) for side in sides for value in side.values())
    return abs(json.loads(path.read_text())["sigma"] - sigma) < 1e-9 * sigma
