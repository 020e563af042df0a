"""Releases of the libraries: what pip is told, what is pinned, what the trainers refuse, and what needs none of it."""

from __future__ import annotations

import importlib.metadata
import subprocess
import sys
import tomllib
import warnings
from pathlib import Path

import pytest
from families import family
from packaging.requirements import Requirement
from packaging.version import Version
from repository import ROOT

from shadow_trl.errors import VersionError
from shadow_trl.runtime.versions import RELEASES, check_releases

NEWER = {name: f"{Version(tested).major}.{Version(tested).minor + 1}.0" for name, (_, tested) in RELEASES.items()}


def pinned(file: str) -> dict[str, str]:
    lines = [line for line in (ROOT / file).read_text().splitlines() if "==" in line]
    return {name.lower().replace("-", "_"): version for name, version in (line.split("==") for line in lines)}


@pytest.fixture
def have(monkeypatch):
    """Return a function that pretends which versions are installed beside the oldest ones."""
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.setenv("SHADOW_TRL_NEWER_LIBRARIES", "")
    monkeypatch.delenv("SHADOW_TRL_NEWER_LIBRARIES")  # which is as before when the test is over
    found = pinned("constraints-oldest.txt")

    def version(name: str) -> str:
        if name not in found:
            raise importlib.metadata.PackageNotFoundError(name)
        return found[name]

    monkeypatch.setattr(importlib.metadata, "version", version)
    return found


def test_pip_is_told_what_the_trainers_check_and_both_ends_are_pinned():
    dependencies = map(Requirement, tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"])
    told = {one.name: one.specifier for one in dependencies}
    oldest, newest = pinned("constraints-oldest.txt"), pinned("constraints.txt")
    for name, (works, tested) in RELEASES.items():
        limits = str(told[name]).split(",")
        assert sorted(one for one in limits if not one.startswith("<")) == sorted(works.split(","))
        lowest = next(one.removeprefix(">=") for one in limits if one.startswith(">="))
        assert Version(oldest[name]).release[:2] == Version(lowest).release
        assert Version(newest[name]).release[:2] == Version(tested).release
    for name, limits in told.items():
        pin = Version(oldest[name.lower()])
        lowest = next(Version(one.version) for one in limits if one.operator == ">=")
        assert pin.release[: len(lowest.release)] == lowest.release, f"{name}: the oldest is {lowest}, {pin} is tested"


@pytest.mark.parametrize(
    "wrong",
    [
        {"trl": "1.9.2"},
        {"trl": "1.15.0"},
        {"transformers": "5.11.0", "peft": "0.18.1"},
        {"torch": "2.12.1+cpu", "accelerate": "1.9.0"},
        {"datasets": "4.7.0", "huggingface_hub": "1.30.0"},
        {"trl": None},
    ],
    ids=str,
)
def test_releases_that_cannot_be_worked_with_are_named(have, wrong):
    have.update(wrong)
    for name in [name for name, version in wrong.items() if version is None]:
        del have[name]
    with pytest.raises(VersionError) as refused:
        check_releases()
    text = str(refused.value)
    assert text.startswith(f"{len(wrong)} of ")
    for name, version in wrong.items():
        assert f"{name:<15} {version or 'not installed'}, needed: {RELEASES[name][0]}" in text
        assert f'"{name}{RELEASES[name][0]}"' in text.rpartition("pip install -U")[2]
    assert not [name for name in RELEASES.keys() - wrong.keys() if name in text]


def test_both_ends_and_a_build_from_the_sources_are_no_warning(have):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_releases()
        have.update(pinned("constraints.txt"), torch="2.13.1+cu130", trl="1.16.9.dev0")
        check_releases()


def test_newer_releases_are_one_warning_in_one_process(have, monkeypatch):
    have.update({"trl": NEWER["trl"], "torch": NEWER["torch"]})
    monkeypatch.setenv("RANK", "1")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_releases()
    monkeypatch.setenv("RANK", "0")
    text = f"torch {NEWER['torch']} .tested up to {RELEASES['torch'][1]}., trl {NEWER['trl']} .tested up to"
    with pytest.warns(UserWarning, match=text):
        check_releases()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_releases()


HIDDEN = """
import importlib.metadata, sys
sys.modules["trl"] = None  # so that importing it fails
found = importlib.metadata.version
def version(name):
    if name == "trl":
        raise importlib.metadata.PackageNotFoundError(name)
    return {"transformers": "4.56.0"}.get(name) or found(name)
importlib.metadata.version = version
from shadow_trl.cli import main
"""


def run(program: str, *words: Path | str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", HIDDEN + program, *map(str, words)], capture_output=True, text=True, check=False
    )


def test_what_needs_no_trainer_needs_neither_trl_nor_its_releases(tmp_path):
    program = (
        "b, i, t, o = sys.argv[1:]\n"
        "assert main(['graft', '--base', b, '--instruct', i, '--tuned', t, '--output', o, '--quiet']) == 0\n"
        "assert main(['verify', o, '--quiet']) == 0\n"
        "assert main(['gap', '--base', b, '--instruct', i, '--quiet']) == 0\n"
        "assert main(['delta', '--base', b, '--tuned', t, '--output', o + '-d', '--quiet']) == 0\n"
    )
    done = run(program, *family(tmp_path).values(), tmp_path / "out")
    assert done.returncode == 0, done.stderr
    assert not {"needed", "tested"} & set(done.stderr.split())
    assert (tmp_path / "out" / "shadow.json").exists()
    assert (tmp_path / "out-d" / "shadow.json").exists()


def test_a_trainer_is_refused_when_it_is_imported():
    program = (
        "import shadow_trl\n"
        "for door in ('ShadowDPOTrainer', 'ShadowSFTConfig'):\n"
        "    try:\n        getattr(shadow_trl, door)\n    except ImportError as error:\n        print(error)\n"
        "sys.exit(main(['sft', '--model', 'b']))"
    )
    done = run(program)
    for text in (*done.stdout.split("2 of ")[1:], done.stderr):
        assert "transformers    4.56.0, needed: >=5.12" in text
        assert "trl             not installed, needed: >=1.10,!=1.15.*" in text
    assert done.stdout.count("2 of ") == 2
    assert done.stderr.endswith("Nothing was written.\n")
    assert done.returncode == 2
