"""Pairs that adapters are made on."""

from __future__ import annotations

import pytest
import torch
from families import family
from tiny import make_pair

FP32 = torch.float32


@pytest.fixture
def sides(tmp_path):
    found = family(tmp_path / "models", dtypes=(FP32,) * 3)
    return {"base": found["base"], "instruct": found["instruct"], "progress": False}


@pytest.fixture(scope="module")
def tied_pair(tmp_path_factory):
    return make_pair(tmp_path_factory.mktemp("tied"), gap=0.3)
