"""The rule of imports: every room of the package imports lower rooms only, and no two modules import each other.

Imports count wherever they stand: at the top of a file, in a function, for type checkers only.
"""

import ast
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = "pplug_hf"

# From the bottom to the top. Rooms of one level do not import each other.
LEVELS = [
    ("errors", "version"),
    ("optional",),
    ("storage",),
    ("configuration",),
    ("tasks",),
    ("modeling",),
    ("chats",),
    ("processing",),
    ("data",),
    ("methods",),
    ("evaluation",),
    ("hub",),
    ("training", "pipeline"),
    ("serving",),
    ("apps",),
    ("commands",),
    ("cli", "metrics"),
    ("auto", "demo"),
    ("__init__",),
    ("__main__",),
]
LEVEL = {room: level for level, rooms in enumerate(LEVELS) for room in rooms}

# Sharing is a step of its own: commands import it, and these two modules when a push is asked for.
IMPORTS_HUB_WHEN_CALLED = {"pplug_hf.modeling.saving", "pplug_hf.training"}

# What is still wrong. A line goes with the arrow.
EXPECTED_ARROWS: set[str] = set()
EXPECTED_CYCLES: set[tuple[str, ...]] = set()


class Arrow(NamedTuple):
    importer: str
    imported: str
    is_lazy: bool  # within a function

    def __str__(self) -> str:
        return f"{self.importer} -> {self.imported}{' (in a function)' if self.is_lazy else ''}"


def module_name(path: Path, root: Path) -> str:
    return ".".join(path.relative_to(root).with_suffix("").parts).removesuffix(".__init__")


def arrows_of(root: Path, package: str = PACKAGE) -> set[Arrow]:
    """Every import of one module of the package by another."""
    paths = {module_name(path, root): path for path in (root / package).rglob("*.py")}
    found = set()
    for name, path in paths.items():
        tree = ast.parse(path.read_text(encoding="utf-8"))
        functions = [n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)]
        lazy = {id(node) for function in functions for node in ast.walk(function)}
        parents = name.split(".") if path.name == "__init__.py" else name.split(".")[:-1]
        for node in ast.walk(tree):
            names = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                base = parents[: len(parents) - node.level + 1] if node.level else []
                base = ".".join([*base, *([node.module] if node.module else [])])
                names = [f"{base}.{alias.name}" for alias in node.names]
                names = [each if each in paths else base for each in names]
            found |= {Arrow(name, each, id(node) in lazy) for each in names if each in paths and each != name}
    return found


def room(module: str) -> str:
    return [*module.split("."), "__init__"][1]


def points_back(arrow: Arrow) -> bool:
    one, other = room(arrow.importer), room(arrow.imported)
    if other == "hub" and one != "hub" and LEVEL[one] < LEVEL["commands"]:
        return not (arrow.is_lazy and arrow.importer in IMPORTS_HUB_WHEN_CALLED)
    return one != other and LEVEL[one] <= LEVEL[other]


def cycles_of(arrows: set[Arrow]) -> set[tuple[str, ...]]:
    """Groups of modules that import each other, however far round."""
    imported: dict[str, set[str]] = {}
    for arrow in arrows:
        imported.setdefault(arrow.importer, set()).add(arrow.imported)

    def reachable(module: str) -> set[str]:
        seen, todo = set(), [module]
        while todo:
            new = imported.get(todo.pop(), set()) - seen
            seen |= new
            todo += new
        return seen

    reached = {module: reachable(module) for module in imported}
    circular = [module for module in reached if module in reached[module]]
    return {
        tuple(sorted(other for other in circular if other in reached[m] and m in reached[other])) for m in circular
    }


def test_every_room_has_its_level():
    rooms = {path.stem for path in (ROOT / PACKAGE).iterdir() if path.suffix == ".py"}
    rooms |= {path.name for path in (ROOT / PACKAGE).iterdir() if (path / "__init__.py").is_file()}
    assert rooms == set(LEVEL)


def test_no_arrow_points_back():
    assert {str(arrow) for arrow in arrows_of(ROOT) if points_back(arrow)} == EXPECTED_ARROWS


def test_no_modules_import_each_other():
    pushes = {arrow for arrow in arrows_of(ROOT) if arrow.is_lazy and room(arrow.imported) == "hub"}
    assert cycles_of(arrows_of(ROOT) - pushes) == EXPECTED_CYCLES


@pytest.mark.parametrize(
    "file, line, arrow",
    [
        ("storage/files.py", "from ..modeling import plug", "pplug_hf.storage.files -> pplug_hf.modeling.plug"),
        ("storage/files.py", "import pplug_hf.modeling.plug", "pplug_hf.storage.files -> pplug_hf.modeling.plug"),
        (
            "storage/files.py",
            "from pplug_hf.modeling.plug import X",
            "pplug_hf.storage.files -> pplug_hf.modeling.plug",
        ),
        (
            "tasks/__init__.py",
            "def f():\n    from ..modeling.plug import X",
            "pplug_hf.tasks -> pplug_hf.modeling.plug (in a function)",
        ),
        (
            "tasks/__init__.py",
            "if TYPE_CHECKING:\n    from ..modeling.plug import X",
            "pplug_hf.tasks -> pplug_hf.modeling.plug",
        ),
        ("errors.py", "from .modeling import plug", "pplug_hf.errors -> pplug_hf.modeling.plug"),
        ("errors.py", "from . import version", "pplug_hf.errors -> pplug_hf.version"),  # of one level
        ("training.py", "from .hub.push import push", "pplug_hf.training -> pplug_hf.hub.push"),
        ("data/rows.py", "def f(): from ..hub import push", "pplug_hf.data.rows -> pplug_hf.hub.push (in a function)"),
    ],
)
def test_an_arrow_back_is_found_however_it_is_written(tmp_path, file, line, arrow):
    for name in ("modeling/plug.py", "hub/push.py", "version.py", file):
        path = tmp_path / PACKAGE / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    (tmp_path / PACKAGE / file).write_text(line)
    assert [str(arrow) for arrow in arrows_of(tmp_path) if points_back(arrow)] == [arrow]


def test_a_cycle_is_found_however_far_round(tmp_path):
    (tmp_path / PACKAGE).mkdir()
    for name, other in ("ab", "bc", "ca", "da"):
        (tmp_path / PACKAGE / f"{name}.py").write_text(f"from . import {other}")
    assert cycles_of(arrows_of(tmp_path)) == {("pplug_hf.a", "pplug_hf.b", "pplug_hf.c")}


@pytest.mark.parametrize("module", ["storage.location", "storage.replace", "tasks.task", "tasks.metrics"])
def test_lower_rooms_load_no_model_library(module):
    code = f"import sys, pplug_hf.{module}; print([m for m in ('torch', 'transformers') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout == "[]\n"
