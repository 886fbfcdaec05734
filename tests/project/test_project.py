"""What the project promises as a whole: a light import, floors, small modules, documented names."""

import ast
import inspect
import json
import re
import statistics
import subprocess
import sys
import types
from collections.abc import Iterator
from pathlib import Path

import pytest

import pplvi

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "pplvi"
MODULES = sorted(PACKAGE.rglob("*.py"))
MAX_LINES = 400
MAX_MEDIAN_FUNCTION = 8

# A room imports only rooms on floors below its own.
FLOORS = {
    1: {"types", "weights"},
    2: {"objectives", "programs"},
    3: {"kernels", "posterior"},
    4: {"samplers"},
    5: {"losses", "guides"},
    6: {"compile", "models"},
    7: {"training"},
    8: {"fitting"},
    9: {"energies", "examples", "demo"},
}
FLOOR = {room: floor for floor, rooms in FLOORS.items() for room in rooms}
POUTINE_ROOMS = {"programs", "guides", "energies", "models", "examples"}

IMPORT_PROBE = """
import json, random, sys
import numpy, pyro, torch

def state():
    return {
        "dtype": str(torch.get_default_dtype()),
        "device": str(torch.get_default_device()),
        "threads": torch.get_num_threads(),
        "grad": torch.is_grad_enabled(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "torch rng": torch.get_rng_state().tolist(),
        "numpy rng": repr(numpy.random.get_state()),
        "python rng": repr(random.getstate()),
        "torch validation": torch.distributions.Distribution._validate_args,
        "pyro validation": pyro.infer.util.is_validation_enabled(),
        "parameters": sorted(pyro.get_param_store().keys()),
    }

import pyro.infer
before = state()
import pplvi
after = state()
changed = [name for name in before if before[name] != after[name]]
heavy = [name for name in ("arviz", "matplotlib", "zuko", "sklearn") if name in sys.modules]
print(json.dumps({"changed": changed, "heavy": heavy}))
"""


def room(module: Path) -> str:
    """The entry of the floor table that a file belongs to: its top-level module or folder."""
    first = module.relative_to(PACKAGE).parts[0]
    return first.removesuffix(".py")


def dotted(module: Path) -> str:
    """pplvi/guides/flow.py -> pplvi.guides.flows.flow"""
    return ".".join(module.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def resolve(node: ast.ImportFrom, module: Path) -> str:
    """The absolute name of the module that a (possibly relative) `from` statement reads."""
    if not node.level:
        return node.module or ""
    package = module.relative_to(ROOT).parent.parts
    base = package[: len(package) - node.level + 1]
    return ".".join([*base, *([node.module] if node.module else [])])


def imported(module: Path) -> Iterator[str]:
    """Absolute dotted names of everything that a file imports, lazily or not."""
    for node in ast.walk(ast.parse(module.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            source = resolve(node, module)
            yield from (f"{source}.{alias.name}" for alias in node.names)


def own_imports(module: Path) -> set[str]:
    """The modules of this package that a file imports."""
    known = {dotted(path) for path in MODULES}
    names = (name for name in imported(module) if name.split(".")[0] == "pplvi")
    prefixes = ({".".join(name.split(".")[:i]) for i in range(1, name.count(".") + 2)} & known for name in names)
    return {max(found, key=len) for found in prefixes} - {dotted(module)}


def test_import_is_light_and_changes_no_global_state() -> None:
    run = subprocess.run([sys.executable, "-c", IMPORT_PROBE], capture_output=True, text=True, cwd=ROOT, check=False)
    assert run.returncode == 0, run.stderr
    assert json.loads(run.stdout) == {"changed": [], "heavy": []}


def test_names_are_not_hidden_by_modules_of_the_same_name() -> None:
    """Importing pplvi/fit.py binds the module as pplvi.fit: the function of that name must win."""
    probe = "import pplvi; names = {n for n in pplvi.__all__ if n[0] != '_'}; [getattr(pplvi, n) for n in names];"
    probe += "print([n for n in sorted(names) if not callable(getattr(pplvi, n))])"
    run = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, cwd=ROOT, check=False)
    assert run.stdout.strip() == "[]", run.stdout + run.stderr


@pytest.mark.parametrize("module", MODULES, ids=dotted)
def test_module_is_short(module: Path) -> None:
    assert len(module.read_text().splitlines()) <= MAX_LINES


def test_functions_are_short() -> None:
    lengths = []
    for module in MODULES:
        for node in ast.walk(ast.parse(module.read_text())):
            if isinstance(node, ast.FunctionDef):
                body = node.body[1:] if ast.get_docstring(node) else node.body
                lengths.append(sum(statement.end_lineno - statement.lineno + 1 for statement in body))
    assert statistics.median(lengths) <= MAX_MEDIAN_FUNCTION


@pytest.mark.parametrize("module", [path for path in MODULES if room(path) != "__init__"], ids=dotted)
def test_imports_go_down(module: Path) -> None:
    assert room(module) in FLOOR, f"{room(module)} has no floor: give it one in this file"
    here = FLOOR[room(module)]
    for name in own_imports(module) - {"pplvi"}:
        target = name.split(".")[1]
        below = target == room(module) or FLOOR[target] < here or module == PACKAGE / "demo.py"
        assert below, f"{dotted(module)} (floor {here}) imports {name} (floor {FLOOR[target]})"


def test_the_root_holds_rooms() -> None:
    files = {path.name for path in PACKAGE.iterdir() if path.is_file()}
    assert files == {"__init__.py", "types.py", "demo.py", "py.typed"}


def test_imports_have_no_circle() -> None:
    graph = {dotted(module): own_imports(module) for module in MODULES}
    while leaves := {name for name, targets in graph.items() if not targets & graph.keys()}:
        graph = {name: targets for name, targets in graph.items() if name not in leaves}
    assert not graph, f"modules in or above a circle of imports: {sorted(graph)}"


@pytest.mark.parametrize("module", [path for path in MODULES if room(path) not in POUTINE_ROOMS], ids=dotted)
def test_only_programs_and_guides_touch_poutine(module: Path) -> None:
    tree = ast.parse(module.read_text())
    attributes = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    names = {part for name in imported(module) for part in name.split(".")}
    assert "poutine" not in attributes | names


def public_objects() -> list[str]:
    return [name for name in pplvi.__all__ if not name.startswith("__")]


@pytest.mark.parametrize("name", public_objects())
def test_public_name_is_documented(name: str) -> None:
    value = getattr(pplvi, name)
    doc = inspect.getdoc(value)
    assert doc, f"{name} has no docstring"
    if not isinstance(value, types.ModuleType):
        assert ">>>" in doc, f"{name} has no doctest example"
    for file in ("README.md", "CHANGELOG.md"):
        assert re.search(rf"\b{name}\b", (ROOT / file).read_text()), f"{name} is missing from {file}"
