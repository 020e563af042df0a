"""Tests that need a newer release of a library than the oldest one that is supported."""

from __future__ import annotations

from importlib.metadata import version

import pytest
from packaging.version import Version


def has(library: str, release: str) -> bool:
    return Version(version(library)) >= Version(release)


def needs(library: str, release: str, reason: str = "it came with that release") -> pytest.MarkDecorator:
    """Return the mark that skips a test with a library older than `release`."""
    return pytest.mark.skipif(not has(library, release), reason=f"{library} {release}: {reason}")
