"""What each folder of the package may import, and what each command loads."""

from __future__ import annotations

import ast
import json
import shutil
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest
from families import family

import shadow_trl

ROOT = Path(shadow_trl.__file__).parent
FLOORS = [
    "errors",
    "arithmetic",
    "runtime",
    "checkpoints",
    "results",
    "pair",
    "layouts",
    "adapters",
    "grafting",
    "operations",
    "training",
    "evaluation",
    "recipes",
    "cli",
]
"""Ground floor first. A module imports only from its own folder and the folders before it, inside functions too."""
MAY_IMPORT = {"trl": {"training", "recipes"}, "peft": {"adapters", "training"}}
"""Library -> the folders that may import it, inside functions too."""
TORCH_FREE = [
    "errors",
    "cli",
    "grafting.options",
    "checkpoints.checkpoint",
    "checkpoints.header",
    "checkpoints.hub",
    "checkpoints.manifest",
    "checkpoints.weight_names",
    "runtime.startup",
    "checkpoints.json_files",
    "checkpoints.schemas",
    "adapters.kinds",
    "pair.pairs",
    "operations.graft",
    "operations.gap",
    "operations.delta",
    "operations.verify",
]
"""Modules that must not import a library of arithmetic before one of their functions is called."""


def modules() -> dict[str, Path]:
    """Return dotted name -> file of every module; a folder's `__init__` goes by the folder's name."""
    found = {}
    for path in ROOT.rglob("*.py"):
        parts = path.relative_to(ROOT).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


MODULES = modules()


def imported(name: str, *, inside_functions: bool = True) -> set[str]:
    """Return the dotted names that a module imports, the package's own with a dot in front; not for type checking."""
    found: set[str] = set()
    path = MODULES[name]
    parts = name.split(".") if name else []
    home = parts if path.stem == "__init__" else parts[:-1]

    def visit(node: ast.AST) -> None:
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            return
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) and not inside_functions:
            return
        if isinstance(node, ast.Import):
            found.update(alias.name.replace("shadow_trl", "", 1) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            if node.level:
                start = home[: len(home) - node.level + 1]
                base = [*start, *(node.module.split(".") if node.module else [])]
            elif str(node.module).partition(".")[0] == "shadow_trl":
                base = str(node.module).split(".")[1:]
            else:
                found.add(str(node.module))
                base = None
            for alias in node.names if base is not None else ():
                whole = ".".join([*base, alias.name])
                found.add("." + (whole if whole in MODULES else ".".join(base)))
        for child in ast.iter_child_nodes(node):
            visit(child)

    visit(ast.parse(path.read_text()))
    return found - {"."}


GRAPH = {name: imported(name) for name in MODULES if name}


def floor_of(name: str) -> str:
    return name.removeprefix(".").split(".")[0]


@pytest.mark.parametrize("name", sorted(GRAPH))
def test_a_module_imports_only_from_floors_below(name):
    floor = floor_of(name)
    reached = {floor_of(other) for other in GRAPH[name] if other.startswith(".")}
    wrong = {other for other in reached - {floor} if FLOORS.index(other) > FLOORS.index(floor)}
    assert not wrong, f"{name} imports {sorted(wrong)}"
    libraries = {other.split(".")[0] for other in GRAPH[name] if not other.startswith(".")}
    assert not {library for library, may in MAY_IMPORT.items() if library in libraries and floor not in may}


def test_every_folder_is_on_a_floor():
    assert {floor_of(name) for name in GRAPH} == set(FLOORS)


def test_modules_do_not_import_each_other_in_circles():
    graph = {name: {other[1:] for other in others if other.startswith(".")} for name, others in GRAPH.items()}
    assert set(GRAPH) <= set(TopologicalSorter(graph).static_order())


def test_a_folder_exports_nothing():
    """Importing `shadow_trl.grafting.options` must not load the modules beside it; those with trainers need TRL's."""
    check = ["from ..runtime.versions import check_releases", "check_releases()"]
    for path in ROOT.glob("*/__init__.py"):
        docstring, *others = ast.parse(path.read_text()).body
        assert isinstance(docstring, ast.Expr)
        assert [ast.unparse(one) for one in others] == (check if path.parent.name in MAY_IMPORT["trl"] else [])


def test_the_law_sees_every_way_to_import(tmp_path, monkeypatch):
    """A law that misses a form of import would be kept by using that form."""
    path = tmp_path / "module.py"
    path.write_text(
        "import trl.trainer\nimport shadow_trl.recipes.run\nfrom shadow_trl.training import mixin\n"
        "from .. import cli\nfrom ..results.folder import sync\ndef f():\n    from peft import LoraConfig\n"
        "class C:\n    from ..evaluation import scoring\n"
    )
    monkeypatch.setitem(MODULES, "grafting.module", path)
    found = {floor_of(other) for other in imported("grafting.module")}
    assert found == {"trl", "recipes", "training", "cli", "results", "peft", "evaluation"}


@pytest.mark.parametrize("name", TORCH_FREE)
def test_modules_without_arithmetic_do_not_import_torch(name):
    libraries = {other.split(".")[0] for other in imported(name, inside_functions=False)}
    assert not libraries & {"torch", "transformers", "trl", "peft", "numpy"}


def test_no_module_has_the_name_of_a_public_function():
    assert not {name for name in GRAPH if "." not in name} & set(shadow_trl.__all__)


def loaded(program: str, *arguments: str) -> set[str]:
    """Run a program in a process of its own and return the top-level modules it loaded."""
    tail = "\nimport json, sys\nprint('\\n' + json.dumps(sorted({name.partition('.')[0] for name in sys.modules})))"
    done = subprocess.run(
        [sys.executable, "-c", program + tail, *arguments], capture_output=True, text=True, check=True
    )
    return set(json.loads(done.stdout.splitlines()[-1]))


def test_import_and_help_load_no_torch():
    for program in (
        "import shadow_trl",
        "from shadow_trl.cli import main\n"
        "for argv in (['--help'], *([name, '--help'] for name in ('graft', 'gap', 'delta', 'verify', 'compare'))):\n"
        "    try:\n        main(argv)\n    except SystemExit as error:\n        assert error.code == 0",
    ):
        assert not loaded(program) & {"torch", "transformers", "trl", "peft", "numpy", "safetensors"}


def test_weights_of_equal_layouts_need_neither_torch_nor_a_model_library(tmp_path):
    """Importing torch takes longer than adding up the files of a small model."""
    sides = {role: str(folder) for role, folder in family(tmp_path).items()}
    program = (
        "import sys\nfrom shadow_trl.cli import main\nb, i, t, o = sys.argv[1:]\n"
        "assert main(['graft', '--base', b, '--instruct', i, '--tuned', t, '--output', o]) == 0\n"
        "assert main(['gap', '--base', b, '--instruct', i, '--tuned', t]) == 0\n"
        "assert main(['verify', o]) == 0\n"
        "assert main(['delta', '--base', b, '--tuned', t, '--output', o + '-d']) == 0\n"
        "assert main(['graft', '--delta', o + '-d', '--instruct', i, '--output', o + '-2']) == 0"
    )
    found = loaded(program, *sides.values(), str(tmp_path / "out"))
    assert not found & {"torch", "transformers", "trl", "peft", "accelerate", "datasets", "huggingface_hub"}


def test_what_paths_headers_and_configs_show_is_refused_without_torch(tmp_path):
    """Importing torch takes two seconds, for an error that needs none of it."""
    sides = {role: str(folder) for role, folder in family(tmp_path, shadow_DOT_json='{"kind": "soup"}').items()}
    cut, settings = tmp_path / "cut", tmp_path / "settings"
    for folder in (cut, settings):
        shutil.copytree(sides["base"], folder)
    (cut / "model.safetensors").write_bytes(b"\x08" + bytes(9))
    (settings / "config.json").write_text('{"model_type": "llama", "vocab_size": "20"}')
    program = (
        "import sys\nfrom shadow_trl.cli import main\nb, i, t, *bad = sys.argv[1:]\n"
        "for wrong in bad:\n"
        "    for argv in (['graft', '--base', wrong, '--instruct', b, '--tuned', t, '--output', 'out'],\n"
        "                 ['graft', '--base', b, '--instruct', wrong, '--tuned', t, '--output', 'out'],\n"
        "                 ['graft', '--delta', wrong, '--instruct', b, '--output', 'out'],\n"
        "                 ['gap', '--base', wrong, '--instruct', t], ['verify', wrong],\n"
        "                 ['delta', '--base', b, '--tuned', wrong, '--output', 'out']):\n"
        "        assert main(argv) == 2, argv"
    )
    bad = ("/nowhere", str(cut), str(settings), sides["instruct"])
    assert not loaded(program, *sides.values(), *bad) & {"torch", "numpy", "transformers", "peft", "huggingface_hub"}


def test_the_public_names_exist_whatever_was_imported_before():
    program = (
        "import shadow_trl.operations.graft, shadow_trl.operations.gap\nfrom shadow_trl import gap, graft\n"
        "import shadow_trl\n"
        "assert callable(shadow_trl.graft) and callable(gap) and set(shadow_trl.__all__) <= set(dir(shadow_trl))\n"
        "try:\n    shadow_trl.nothing\nexcept AttributeError:\n    pass"
    )
    loaded(program)


@pytest.mark.parametrize("number", [0, 15])
def test_signals_and_the_collector_wait_for_the_import_of_torch(number):
    program = (
        "import gc, os, sys\nfrom shadow_trl.runtime.startup import import_undisturbed\n"
        "from shadow_trl.runtime.endings import exit_code\nreached = []\n"
        "class Spy:\n    def find_spec(self, name, *given):\n        if name in ('torch._C', 'torch.version'):\n"
        f"            assert not gc.isenabled()\n            os.kill(os.getpid(), {number})\n"
        "            reached.append(name)\n"
        "def work():\n    import torch\n    reached.append('end')\n    return 0\n"
        "sys.meta_path.insert(0, Spy())\nimport_undisturbed()\n"
        "import importlib.util\nassert importlib.util.find_spec('torch') and 'torch' not in sys.modules\n"
        f"assert exit_code(work) == ({number} and 128 + {number})\n"
        f"assert sorted(reached) == ['end', 'torch._C', 'torch.version'][{number} > 0:]\n"
        "assert gc.isenabled() and (reached[-1] != 'end' or gc.get_freeze_count() > 10_000)"
    )
    loaded(program)
