"""What each room may import, and what each command loads."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest
from families import family

import shadow_trl

ROOMS = Path(shadow_trl.__file__).parent
NAMES = sorted(path.stem for path in ROOMS.glob("*.py") if path.stem != "__init__")


def imports(room: str, *, inside_functions: bool) -> set[str]:
    """Return the top names that a room imports, `.room` for rooms; those under TYPE_CHECKING do not count."""
    tree = ast.parse((ROOMS / f"{room}.py").read_text())
    found = set()

    def visit(node: ast.AST) -> None:
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            return
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) and not inside_functions:
            return
        if isinstance(node, ast.Import):
            found.update(alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            if node.level == 0:
                found.add(str(node.module).partition(".")[0])
            elif node.module:
                found.add(f".{node.module.partition('.')[0]}")
            else:
                found.update(f".{alias.name}" for alias in node.names if alias.name in NAMES)
        for child in ast.iter_child_nodes(node):
            visit(child)

    visit(tree)
    return found


def loaded(program: str, *arguments: str) -> set[str]:
    """Run a program in a process of its own and return the top-level modules it loaded."""
    tail = "\nimport json, sys\nprint('\\n' + json.dumps(sorted({name.partition('.')[0] for name in sys.modules})))"
    done = subprocess.run(
        [sys.executable, "-c", program + tail, *arguments], capture_output=True, text=True, check=True
    )
    return set(json.loads(done.stdout.splitlines()[-1]))


def test_rooms_do_not_import_each_other_in_circles():
    graph = {
        room: {name[1:] for name in imports(room, inside_functions=True) if name.startswith(".")} for room in NAMES
    }
    order = list(TopologicalSorter(graph).static_order())
    assert set(NAMES) <= set(order)


ORDER = [
    "errors",
    "deltas",
    "checkpoint",
    "manifest",
    "pairs",
    "adapter_kinds",
    "adapter",
    "stored_values",
    "adapter_forms",
    "peft_configs",
    "peft_deltas",
    "merging",
    "grafting",
    "extracting",
    "verifying",
    "reference",
    "config",
    "trainers",
    "cli",
]


@pytest.mark.parametrize("room", ORDER)
def test_a_room_imports_only_rooms_above_it(room):
    graph = {name: {x[1:] for x in imports(name, inside_functions=False) if x.startswith(".")} for name in NAMES}
    reached, waiting = set(), [room]
    while waiting:
        for name in graph.get(waiting.pop(), ()):
            if name not in reached:
                reached.add(name)
                waiting.append(name)
    assert not reached & set(ORDER[ORDER.index(room) + 1 :])


@pytest.mark.parametrize(
    "room",
    [
        "errors",
        "graft_options",
        "checkpoint",
        "safetensors_header",
        "hub",
        "manifest",
        "kinds",
        "startup",
        "cli",
        "adapter_kinds",
    ],
)
def test_rooms_without_arithmetic_do_not_import_torch(room):
    assert not imports(room, inside_functions=False) & {"torch", "transformers", "trl", "peft", "numpy"}


def test_only_the_top_rooms_import_trl():
    wrong = {name for name in ("deltas", "checkpoint", "pairs", "adapter", "adapter_kinds", "adapter_forms", "merging",
                               "grafting", "layouts", "streaming", "output", "extracting", "extracted_adapter",
                               "verifying")
             if imports(name, inside_functions=True) & {"trl", "peft"}}  # fmt: skip
    assert wrong == set()


def test_no_room_has_the_name_of_a_public_function():
    assert not set(NAMES) & set(shadow_trl.__all__)


def test_import_and_help_load_no_torch():
    for program in (
        "import shadow_trl",
        "from shadow_trl.cli import main\n"
        "for argv in (['--help'], *([name, '--help'] for name in ('graft', 'gap', 'delta', 'verify'))):\n"
        "    try:\n        main(argv)\n    except SystemExit as error:\n        assert error.code == 0",
    ):
        assert not loaded(program) & {"torch", "transformers", "trl", "peft", "numpy", "safetensors"}


def test_graft_and_gap_of_equal_layouts_load_no_model_library(tmp_path):
    sides = {role: str(folder) for role, folder in family(tmp_path).items()}
    program = (
        "import sys\nfrom shadow_trl.cli import main\nb, i, t, o = sys.argv[1:]\n"
        "assert main(['graft', '--base', b, '--instruct', i, '--tuned', t, '--output', o]) == 0\n"
        "assert main(['gap', '--base', b, '--instruct', i]) == 0\n"
        "assert main(['verify', o]) == 0\n"
        "assert main(['delta', '--base', b, '--tuned', t, '--output', o + '-d']) == 0\n"
        "assert main(['graft', '--delta', o + '-d', '--instruct', i, '--output', o + '-2']) == 0"
    )
    found = loaded(program, *sides.values(), str(tmp_path / "out"))
    assert "torch" in found
    assert not found & {"transformers", "trl", "peft", "accelerate", "datasets", "huggingface_hub"}


def test_gap_of_equal_layouts_loads_no_torch(tmp_path):
    """Importing it would take longer than the sums of a small model."""
    sides = family(tmp_path)
    program = "import sys\nfrom shadow_trl.cli import main\nassert main(['gap', '--base', *sys.argv[1:]]) == 0"
    arguments = (str(sides["base"]), "--instruct", str(sides["instruct"]), "--tuned", str(sides["tuned"]))
    assert not loaded(program, *arguments) & {"torch", "transformers", "safetensors", "huggingface_hub"}


def test_the_public_names_exist_whatever_was_imported_before():
    program = (
        "import shadow_trl.grafting, shadow_trl.measuring\nfrom shadow_trl import gap, graft\nimport shadow_trl\n"
        "assert callable(shadow_trl.graft) and callable(gap) and set(shadow_trl.__all__) <= set(dir(shadow_trl))\n"
        "try:\n    shadow_trl.nothing\nexcept AttributeError:\n    pass"
    )
    loaded(program)


def test_the_collector_is_paused_for_the_import_alone():
    program = (
        "import gc, sys\nfrom shadow_trl.startup import collector_paused\n"
        "with collector_paused():\n    assert not gc.isenabled()\n    import torch\n"
        "assert gc.isenabled()\nfrozen = gc.get_freeze_count()\nassert frozen > 10_000\n"
        "with collector_paused():\n    assert gc.isenabled()\n"
        "assert gc.get_freeze_count() == frozen"
    )
    assert "torch" in loaded(program)
