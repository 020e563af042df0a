"""README and docs: links resolve, what they name exists, their commands parse and their Python runs."""

from __future__ import annotations

import re
import shlex
import shutil
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml
from datasets import Dataset
from repository import ROOT

from shadow_trl.cli import _parser
from shadow_trl.recipes.launch import _own_options, _parsed, _read

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


def test_every_page_is_in_the_menu_of_the_site() -> None:
    sections = yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))["nav"]
    listed = [page for section in sections for pages in section.values() for page in pages]
    assert sorted(listed) == sorted(page.name for page in (ROOT / "docs").glob("*.md"))


def blocks(language: str) -> list[Any]:
    """Return the code blocks of a language on all pages, named by page and line."""
    found = []
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        for block in re.finditer(rf"^```{language}\n(.*?)^```", text, re.MULTILINE | re.DOTALL):
            name = f"{page.name}:{text[: block.start()].count(chr(10)) + 1}"
            found.append(pytest.param(block[1], id=name))
    return found


def commands() -> list[Any]:
    """Return the commands `shadow-trl ...` of all pages, as lists of words."""
    found = []
    for block in blocks("bash"):
        for line in block.values[0].replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            if words[:1] == ["shadow-trl"]:
                found.append(pytest.param(words[1:], id=f"{block.id} {words[1]}"))
    return found


@pytest.mark.parametrize("words", commands())
def test_commands_parse(words: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    if words[0] not in ("sft", "dpo", "sft-dpo"):
        _parser().parse_args(words)
        return
    for name in ("recipes", "data"):
        (tmp_path / name).symlink_to(ROOT / name)
    monkeypatch.chdir(tmp_path)
    for name, config in {"FILE.yaml": "qwen3-0.6b/sft_lora.yaml", "my.yaml": "pipelines/qwen3-0.6b.yaml"}.items():
        shutil.copy(ROOT / "recipes/configs" / config, tmp_path / name)
    if "--resume_from_checkpoint" in words:
        words = words[: words.index("--resume_from_checkpoint")]  # there is nothing to resume here
    launching, own = _read(["0" if word == "N" else word for word in words[1:]])
    _parsed(words[0], launching, own)
    _own_options(words[0], [*own, "--use_cpu", "true", "--bf16", "false"])


@pytest.mark.slow
@pytest.mark.parametrize("code", blocks("python"))
def test_python_runs(code: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """With the embedded pair in the place of models on the hub, on the CPU."""
    if "BitsAndBytesConfig" in code:
        pytest.importorskip("bitsandbytes")
    rows = [{"messages": [{"role": "user", "content": f"copy {word}"}, {"role": "assistant", "content": word}]}
            for word in ("abc", "bca", "cab", "bac")]  # fmt: skip
    Dataset.from_list(rows).to_json(tmp_path / "train.jsonl")
    pairs = [{"prompt": row["messages"][:1], "chosen": row["messages"][1:], "rejected": row["messages"][:1]}
             for row in rows]  # fmt: skip
    data = Dataset.from_list(pairs if "DPO" in code else rows)
    code = re.sub(r"Qwen/Qwen3-[\d.]+B-Base", str(ROOT / "data/nano-base"), code)
    code = re.sub(r"Qwen/Qwen3-[\d.]+B", str(ROOT / "data/nano-instruct"), code)
    code = re.sub(r'load_dataset\("trl-lib.*?\)', "dataset", code)
    precision = "" if "bf16=" in code else ", bf16=False"
    code = code.replace('output_dir="out"', f'output_dir="out", use_cpu=True, max_steps=1{precision}')
    monkeypatch.chdir(tmp_path)
    page = ModuleType("page")  # with a name, since the config of a run is pickled
    page.dataset = data
    monkeypatch.setitem(sys.modules, "page", page)
    exec(compile(code, "page", "exec", dont_inherit=True), vars(page))
    assert (tmp_path / "out" / "grafted" / "shadow.json").is_file()


def test_the_readme_is_short() -> None:
    assert len(README.split()) <= 1000


def test_the_map_is_that_of_the_package() -> None:
    page = (ROOT / "docs/folders.md").read_text(encoding="utf-8")
    tree = page[page.index("    shadow_trl/\n") :].partition("\n\n")[0]
    listed = [line.split()[0] for line in tree.splitlines()[1:]]
    package = ROOT / "shadow_trl"
    found = [f"{path.parent.name}/" for path in package.glob("*/__init__.py")] + [
        path.name for path in package.glob("*.py")
    ]
    assert sorted([*listed, "__init__.py"]) == sorted(found)
