"""The README and the pages it links to: short, with links that resolve, and with the package's folders as they are."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from repository import ROOT

PAGES = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "SECURITY.md", "data/README.md")),
    *sorted((ROOT / "docs").glob("*.md")),
]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def heading_ids(page: Path) -> set[str]:
    """Return the anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_resolve(page: Path) -> None:
    for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
        if "://" in link:
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), link
        assert not anchor or anchor in heading_ids(target), link


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_files_that_a_page_names_exist(page: Path) -> None:
    """`docs/x.md`, `tests/x.py` and `recipes/configs/x.yaml` in the text, from the root of the repository."""
    named = re.findall(r"\b(?:docs|tests|recipes|data|benchmarks|shadow_trl)/[\w./-]+\.\w+\b", page.read_text("utf-8"))
    assert not [path for path in named if not (ROOT / path).exists()]


def test_every_page_of_docs_is_linked_from_the_readme() -> None:
    assert not [page.name for page in (ROOT / "docs").glob("*.md") if f"](docs/{page.name})" not in README]


def test_the_readme_is_short() -> None:
    assert len(README.split()) <= 1000


def test_the_tree_of_the_readme_is_that_of_the_package() -> None:
    tree = README[README.index("    shadow_trl/\n") :].partition("\n\n")[0]
    listed = [line.split()[0] for line in tree.splitlines()[1:]]
    package = ROOT / "shadow_trl"
    found = [f"{path.parent.name}/" for path in package.glob("*/__init__.py")] + [
        path.name for path in package.glob("*.py")
    ]
    assert sorted([*listed, "__init__.py"]) == sorted(found)
