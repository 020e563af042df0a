"""Tests that need a newer release of a library than the oldest one that is supported."""

from __future__ import annotations

from importlib.metadata import version

import pytest
from packaging.version import Version


def has_peft(release: str) -> bool:
    return Version(version("peft")) >= Version(release)


def needs_peft(release: str, reason: str = "it came with that release") -> pytest.MarkDecorator:
    """Return the mark that skips a test with PEFT older than `release`."""
    return pytest.mark.skipif(not has_peft(release), reason=f"PEFT {release}: {reason}")
