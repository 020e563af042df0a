"""The wheel holds every folder of the package, and works where the repository is not."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest
from repository import ROOT

pytestmark = pytest.mark.slow


def run(*words: str | Path, cwd: Path) -> str:
    clean = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    done = subprocess.run(
        [str(word) for word in words], cwd=cwd, env=clean, check=False, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build the wheel from a clean copy of the sources: leftovers of another build would end up in it."""
    source, built = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    shutil.copytree(ROOT / "shadow_trl", source / "shadow_trl", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copyfile(ROOT / name, source / name)
    run(sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", built, source, cwd=built)
    return next(built.glob("*.whl"))


def test_every_module_is_in_the_wheel(wheel):
    modules = {path.relative_to(ROOT).as_posix() for path in (ROOT / "shadow_trl").rglob("*.py")}
    packed = set(zipfile.ZipFile(wheel).namelist())
    assert modules | {"shadow_trl/py.typed"} <= packed
    assert {name.partition("/")[0] for name in packed if name.endswith(".py")} == {"shadow_trl"}


def test_an_installed_wheel_works_from_elsewhere(wheel, tmp_path):
    venv.create(tmp_path / "environment", with_pip=True)
    bin_folder = tmp_path / "environment" / "bin"
    python = bin_folder / "python"
    run(python, "-m", "pip", "install", "-q", "--no-deps", "--no-index", wheel, cwd=tmp_path)
    # The dependencies are those of this environment; a path file adds them without its editable installs.
    (site,) = (tmp_path / "environment").glob("lib/python*/site-packages")
    (site / "dependencies.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")
    where = run(python, "-c", "import shadow_trl; print(shadow_trl.__file__, shadow_trl.graft)", cwd=tmp_path)
    assert where.startswith(str(site))
    assert "graft" in run(bin_folder / "shadow-trl", "--help", cwd=tmp_path)
    data = ROOT / "data"
    sides = ("--base", data / "nano-base", "--instruct", data / "nano-instruct")
    found = run(bin_folder / "shadow-trl", "gap", *sides, cwd=tmp_path)
    assert "overall" in found
