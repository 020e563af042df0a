"""Which tests execute which line: recorded by coverage.py while pytest runs, and asked for one line."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import coverage
import pytest

SECONDS = 40.0
"""Time of the tests that one mutant is tried on, as they took without it; more would find more."""


class Recorder:
    """Plugin of pytest: which tests and which fixtures execute which line, and how long each test takes.

    What a fixture of several tests executes counts for all of them, and not for the first alone.
    """

    def __init__(self, tree: Path) -> None:
        self.tree = tree
        self.coverage = coverage.Coverage(str(tree / ".coverage"), config_file=False, source=[str(tree / "shadow_trl")])
        self.contexts: list[str] = []
        self.tests: dict[str, dict[str, Any]] = {}

    @contextlib.contextmanager
    def context(self, name: str) -> Iterator[None]:
        """Whatever runs inside counts for `name`."""
        self.contexts.append(name)
        self.coverage.switch_context(name)
        try:
            yield
        finally:
            self.contexts.pop()
            self.coverage.switch_context(self.contexts[-1] if self.contexts else "")

    def pytest_sessionstart(self) -> None:
        """Start before the modules are imported."""
        self.coverage.start()

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Iterator[None]:
        """What runs now counts for this test."""
        fixtures = getattr(getattr(item, "_fixtureinfo", None), "name2fixturedefs", {})
        shared = [one.argname for found in fixtures.values() for one in found if one.scope != "function"]
        self.tests[item.nodeid] = {"seconds": 0.0, "shared": [f"fixture {name}" for name in shared]}
        with self.context(item.nodeid):
            return (yield)

    @pytest.hookimpl(wrapper=True)
    def pytest_fixture_setup(self, fixturedef: Any) -> Iterator[None]:
        """What a fixture of several tests runs counts for the fixture."""
        shared = fixturedef.scope != "function"
        with self.context(f"fixture {fixturedef.argname}") if shared else contextlib.nullcontext():
            return (yield)

    def pytest_runtest_logreport(self, report: Any) -> None:
        """Add up the seconds of set-up, call and tear-down."""
        self.tests[report.nodeid]["seconds"] += report.duration

    def pytest_sessionfinish(self) -> None:
        """Write what was recorded into the tree."""
        self.coverage.stop()
        self.coverage.save()
        (self.tree / "tests.json").write_text(json.dumps(self.tests))


class Only:
    """Plugin of pytest: of the tests that are collected, only some are run."""

    def __init__(self, names: Iterable[str]) -> None:
        self.names = set(names)

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        """Leave the others out."""
        items[:] = [item for item in items if item.nodeid in self.names]


class LineTests:
    """The tests by the lines that they execute, of the runs that were recorded in `trees`."""

    def __init__(self, trees: list[Path]) -> None:
        self.seconds: dict[str, float] = {}
        self.lines: dict[Path, dict[int, set[str]]] = {}
        for tree in trees:
            tests = json.loads((tree / "tests.json").read_text())
            users: dict[str, set[str]] = {}
            for name, known in tests.items():
                self.seconds[name] = known["seconds"]
                for context in (name, *known["shared"]):
                    users.setdefault(context, set()).add(name)
            data = coverage.CoverageData(str(tree / ".coverage"))
            data.read()
            for file in data.measured_files():
                lines = self.lines.setdefault(Path(file).relative_to(tree), {})
                for number, contexts in data.contexts_by_lineno(file).items():
                    found = lines.setdefault(number, set())
                    found.update(*(users.get(context, ()) for context in contexts))

    def of(self, module: Path, line: int) -> list[str]:
        """The tests that execute the line, or the one where its statement begins; of a line that runs on import, all
        of the module, and those of its own file, which may only read a constant. The tests of the module's own file
        come first, then those of its folder, the cheap ones first.
        """

        def is_own(name: str) -> bool:
            file = Path(name.partition("::")[0])
            return file == module or file.stem == f"test_{module.stem}"

        lines = self.lines.get(module, {})
        above = [known for known in lines if known <= line]
        found = lines[max(above)] if above else set()
        found = found or set().union(*lines.values(), filter(is_own, self.seconds))

        def rank(name: str) -> tuple[bool, bool, float]:
            file = Path(name.partition("::")[0])
            return not is_own(name), module.parent.name not in file.parts, self.seconds[name]

        spent, chosen = 0.0, []
        for name in sorted(found, key=rank):
            spent += self.seconds[name]
            if chosen and spent > SECONDS:
                break
            chosen.append(name)
        return chosen
