"""Which releases of the libraries the trainers work with. Only metadata is read: none of them is imported for it."""

from __future__ import annotations

import importlib.metadata
import os
import warnings
from contextlib import suppress

from ..errors import VersionError, list_names

RELEASES = {
    "accelerate": (">=1.10", "1.15"),
    "datasets": (">=4.8", "5.2"),
    "huggingface_hub": (">=1.31", "2.4"),
    "peft": (">=0.19", "0.21"),
    "torch": (">=2.13", "2.13"),
    "transformers": (">=5.12", "5.23"),
    "trl": (">=1.10,!=1.15.*", "1.16"),  # 1.15 needs Triton, which CPUs lack
}
"""Library -> the releases that work, and the newest series that was tested.

The two ends are those of `constraints-oldest.txt` and `constraints.txt`; `pyproject.toml` says the first to pip.
"""

_SAID = "SHADOW_TRL_NEWER_LIBRARIES"


def check_releases() -> None:
    """Hold the installed libraries of the trainers against `RELEASES`; newer ones are one warning.

    Raises:
        VersionError: some are missing, too old, or known to be bad; all of them are named.
    """
    from packaging.version import Version

    wrong, newer = {}, []
    for name, (works, tested) in RELEASES.items():
        found = installed(name)
        if found is None or not _satisfies(found, works):
            wrong[f'"{name}{works}"'] = f"{name:<15} {found or 'not installed'}, needed: {works}"
        elif Version(found).release[:2] > Version(tested).release:
            newer.append(f"{name} {found} (tested up to {tested})")
    if wrong:
        raise VersionError(
            f"{len(wrong)} of the libraries that the trainers need cannot be used.\n"
            f"{list_names(wrong.values())}\nInstall others: pip install -U {' '.join(wrong)}"
        )
    if newer and os.environ.get("RANK", "0") == "0" and _SAID not in os.environ:
        os.environ[_SAID] = "1"  # nor does a process that this one starts say it again
        warnings.warn(f"newer than what shadow_trl was tested with: {', '.join(newer)}.", stacklevel=2)


def installed(package: str) -> str | None:
    """Return the version of a package; None where it is not installed."""
    with suppress(importlib.metadata.PackageNotFoundError):
        return importlib.metadata.version(package)
    return None


def _satisfies(found: str, works: str) -> bool:
    from packaging.specifiers import SpecifierSet

    # A build from the sources, such as 1.17.0.dev0, is as good as a release.
    return SpecifierSet(works).contains(found, prereleases=True)
