"""A tiny pair whose folders a test may change."""

from __future__ import annotations

import shutil

import pytest
from tiny import make_pair


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A tied pair in fp32 whose template tokens have ordinary rows; copied by `sides`."""
    return make_pair(tmp_path_factory.mktemp("made"))


@pytest.fixture
def sides(made, tmp_path):
    """Folders of BASE and INSTRUCT of the tiny pair, to be changed by a test."""
    for name, folder in zip(("base", "instruct"), made, strict=True):
        shutil.copytree(folder, tmp_path / name)
    return tmp_path / "base", tmp_path / "instruct"
