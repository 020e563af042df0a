"""What `benchmarks/mutants.py` draws from and what it reports, on sources and numbers made by hand."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from repository import ROOT


@pytest.fixture(autouse=True)
def _benchmarks(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")


def changed(line: str) -> set[str]:
    """What a line becomes in its mutants."""
    from mutations import is_valid, mutants

    source = line.encode()
    return {found.applied(source).decode() for found in mutants(source) if is_valid(source, found)}


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("x = a < b", {"x = (a <= b)", "x = (a >= b)"}),
        ("x = a < b == c", {"x = (a <= b == c)", "x = (a >= b == c)", "x = (a < b != c)"}),
        ("x = a in b", {"x = (a not in b)"}),
        ("x = a is None", {"x = (a is not None)"}),
        ("x = a and b", {"x = (a or b)"}),
        ("x = not a", {"x = (a)"}),
        ("x = not (a or b) and c", {"x = (not (a or b) or c)", "x = (a or b) and c", "x = not ((a and b)) and c"}),
        ("x = a - b", {"x = (a + b)", "x = (b - a)"}),
        ("x = a * b", {"x = (a / b)"}),
        ("x = 1", {"x = (2)"}),
        ("x = 0.5", {"x = (1.5)"}),
        ("x = True", {"x = (False)"}),
        ("x = 'key'", {"x = ('key_')"}),
        ("x = 'a sentence'", set()),
        ("x = f'{a < b}'", set()),
        ("x = '%s' % a", set()),
        ("f(a, b, c)", {"pass", "(f(b, a, c))"}),
        ("x = isinstance(a, b)", set()),
        ("x += a", {"pass", "x -= a"}),
        ("x.y = a", {"pass"}),
        ("def f(a: int = 1, *, b: str = 'c') -> bool: ...", {
            "def f(a: int = (2), *, b: str = 'c') -> bool: ...",
            "def f(a: int = 1, *, b: str = ('c_')) -> bool: ...",
        }),
        ("x = [a for a in b if a]", {"x = [a for a in b if (not (a))]"}),
        ("if a: raise E('text', 1)", {"if (not (a)): raise E('text', 1)", "if a: pass"}),
        ("logger.warning('key', 1)", {"pass"}),
        ("if TYPE_CHECKING: x = 1", set()),
        ("def __repr__(self): return 'key'", set()),
        ("'docstring'", set()),
        ("@cache(1)\ndef f(): ...", set()),
        ("__all__ = ['key']", set()),
        ("x: Final[Literal['key']]", set()),
    ],
)  # fmt: skip
def test_a_line_becomes(line, expected):
    assert changed(line) == expected


def test_the_rest_of_the_file_stays_as_it_is():
    """Positions are bytes, not characters; comments and line breaks around the change survive."""
    assert changed("x = 'ä ö'; y = (a <  # why\n  b)\r\n# end") == {
        "x = 'ä ö'; y = ((a <= b))\r\n# end",
        "x = 'ä ö'; y = ((a >= b))\r\n# end",
    }


def test_what_does_not_compile_or_is_the_same_is_not_valid():
    from mutations import Mutant, is_valid

    assert not is_valid(b"x = 1", Mutant("", 4, 5, "(1)"))
    assert not is_valid(b"x = 1", Mutant("", 4, 5, "("))
    assert is_valid(b"x = 1", Mutant("", 4, 5, "2"))


def test_shares_add_up_and_follow_the_sizes():
    from mutants import shares

    assert shares([1, 1, 2], 8) == [2, 2, 4]
    assert shares([1, 1, 1], 10) == [3, 4, 3]
    assert shares([5, 0, 5], 4) == [2, 0, 2]


def test_the_interval_is_wilson_s():
    """45 of 50: (0.9 + z²/100) / (1 + z²/50) ± z √(0.9 · 0.1 / 50 + z²/10000) / (1 + z²/50) = 0.8715 ± 0.0851."""
    from mutants import share_killed

    assert share_killed(45, 50) == " 90.0% [78.6%, 95.7%]"
    assert share_killed(20, 20) == "100.0% [83.9%, 100.0%]"  # the lower end is 1 / (1 + z²/20)


def test_the_sample_follows_the_seed():
    from mutants import FOLDERS, draw

    drawn = draw(FOLDERS, 20, 7)
    assert len(set(drawn)) == 20
    assert drawn == draw(FOLDERS, 20, 7)
    assert drawn != draw(FOLDERS, 20, 8)
    assert {job.folder for job in drawn} == set(FOLDERS)
    assert all((ROOT / job.module).is_file() for job in drawn)


MODULE = """\
LIMIT = 3


def small(x):
    return (
        x < LIMIT
    )


def large(x):
    return x > LIMIT
"""
TESTS = """\
import pytest
from shadow_trl.part.sizes import large, small


@pytest.fixture(scope="module")
def found():
    return small(2)


def test_one(found):
    assert found


def test_two(found):
    assert found


def test_three():
    assert not large(1)


def test_four():
    pass
"""


@pytest.mark.slow
def test_a_line_has_the_tests_that_execute_it(tmp_path):
    """Those of a shared fixture too; a line that runs on import has all of the file; a continued line its own."""
    for name, text in {"shadow_trl/part/sizes.py": MODULE, "tests/part/test_sizes.py": TESTS}.items():
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / name).write_text(text)
    code = "import sys, pytest; from pathlib import Path; from line_tests import Recorder; tree = Path(sys.argv[1])\n"
    code += (
        "sys.path.insert(0, str(tree)); raise SystemExit(pytest.main([str(tree / 'tests')], plugins=[Recorder(tree)]))"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "benchmarks")}
    subprocess.run([sys.executable, "-c", code, tmp_path], cwd=tmp_path, env=environment, check=True)
    from line_tests import LineTests

    tests = LineTests([tmp_path])
    tests.seconds = dict(zip(sorted(tests.seconds), (4, 1, 3, 2), strict=True))  # four, one, three, two
    of = {
        line: [name.rpartition("_")[2] for name in tests.of(Path("shadow_trl/part/sizes.py"), line)]
        for line in (1, 6, 11)
    }
    assert of == {1: ["one", "two", "three", "four"], 6: ["one", "two"], 11: ["three"]}
