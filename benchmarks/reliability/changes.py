"""Inputs that change while they are read: cut short, rewritten in place, or replaced by another file."""

from __future__ import annotations

import os
import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

from family import Family, Weights, dyadic, plus, read_file, read_model, same, shapes, write_file
from processes import Running, Tally, judge_message, listing, litter, run, workplace

SIDES = ("base", "instruct", "tuned")
COMMANDS = ("graft", "delta", "gap", "delta --rank")


def change_inputs(root: Path, count: int, *, seed: int = 0) -> Iterator[Tally]:
    """Change a weight file of a side at a random moment, `count` times, in every way and with every command."""
    family, source = Family(root / "family"), random.Random(seed)
    tallies = {name: Tally(f"inputs {name} while they are read") for name in CHANGES}
    seconds = {command: _undisturbed(family, command, root) for command in COMMANDS}
    for number in range(count):
        command, way = COMMANDS[number % len(COMMANDS)], list(CHANGES)[number // len(COMMANDS) % len(CHANGES)]
        side = source.choice(SIDES if command in ("graft", "gap") else ("base", "tuned"))
        moment = source.uniform(0, 1.0) * seconds[command]
        label = f"{command}, {side} {way} after {moment:.3f} of {seconds[command]:.3f} s"
        with workplace(root) as work:
            _one(tallies[way], family, work, (command, side, way, moment), label)
    yield from tallies.values()


def _one(tally: Tally, family: Family, work: Path, what: tuple[str, str, str, float], label: str) -> None:
    command, side, way, moment = what
    copies = work / "in"
    for name in SIDES:
        shutil.copytree(family.root / name, copies / name)
    path = sorted((copies / side).glob("*.safetensors"))[-1]
    running = Running(_argv(command, copies), work)
    running.at(moment, lambda: CHANGES[way](path))
    after = listing(copies)
    ended = running.wait()
    tally.runs += 1
    tally.facts["refused or failed" if ended.code else "ended well"] += 1
    judge_message(tally, label, ended)
    if ended.code == 0:
        _judge_result(tally, family, work, command, label)
    elif ended.code is not None and ended.code > 0:
        if path.name not in ended.err and str(path.parent) not in ended.err and side not in ended.err:
            tally.fault("false", f"{label}: the file is not named: {ended.err.strip()[-200:]}")
        if "Nothing was written" in ended.err and (work / "out").exists():
            tally.fault("false", f"{label}: something was written")
        if (work / "out").exists():
            tally.fault("left", f"{label}: a result of a failed command")
    if litter(work):
        tally.fault("left", f"{label}: {litter(work)}")
    # The command itself must not touch an input.
    changed = [name for name, was in after.items() if listing(copies).get(name) != was]
    if changed:
        tally.fault("lost", f"{label}: {changed} changed")


def _judge_result(tally: Tally, family: Family, work: Path, command: str, label: str) -> None:
    """A command that ended well used the old values or the new ones of each file, never a mixture inside one."""
    if command not in ("graft", "delta"):
        return
    found = read_model(work / "out")
    for number, values in enumerate((_plain(family, command), *_changed(family, command))):
        if same(found, values):
            tally.facts["with the old values" if number == 0 else "with the new values"] += 1
            return
    tally.fault("lost", f"{label}: exit 0 with values of both")


def _plain(family: Family, command: str) -> Weights:
    return family.grafted if command == "graft" else family.whole_delta


def _changed(family: Family, command: str) -> Iterator[Weights]:
    """Yield what is right where one file of a side has the weights of `_other`."""
    tuned = plus(family.base, family.delta)
    sides = {"base": family.base, "instruct": family.instruct, "tuned": tuned}
    for side in SIDES:
        names = list(sides[side])
        for part in (names, names[2::3]):
            new = {**sides, side: {**sides[side], **{name: _other()[name] for name in part}}}
            delta = {name: new["tuned"][name] - value for name, value in new["base"].items()}
            yield plus(new["instruct"], delta) if command == "graft" else delta


def _other() -> Weights:
    return dyadic(9, shapes(), 64)


def _argv(command: str, copies: Path) -> list[str]:
    sides = {name: [f"--{name}", str(copies / name)] for name in SIDES}
    pair, tuned = [*sides["base"], *sides["instruct"]], sides["tuned"]
    return {
        "graft": ["graft", *pair, *tuned, "--output", "out"],
        "delta": ["delta", *sides["base"], *tuned, "--output", "out"],
        "gap": ["gap", *pair, *tuned],
        "delta --rank": ["delta", *sides["base"], *tuned, "--rank", "2", "--output", "out"],
    }[command]


def _undisturbed(family: Family, command: str, root: Path) -> float:
    with workplace(root) as work:
        ended = run(_argv(command, family.root), work)
        assert ended.code == 0, ended.err
        return ended.seconds


def _cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def _renewed(path: Path, target: Path) -> None:
    names = read_file(path)
    write_file(target, {name: value for name, value in _other().items() if name in names})


def _rewrite(path: Path) -> None:
    """Write other values over the file, in place, and give it back its time of change, as `rsync --inplace -t` may."""
    stat, beside = path.stat(), path.with_name("beside")
    _renewed(path, beside)
    with path.open("r+b") as file:
        file.write(beside.read_bytes())
    beside.unlink()
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))


def _replace(path: Path) -> None:
    beside = path.with_name("beside")
    _renewed(path, beside)
    os.replace(beside, path)


CHANGES: dict[str, Callable[[Path], None]] = {"cut short": _cut, "rewritten": _rewrite, "replaced": _replace}
