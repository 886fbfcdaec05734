"""What the project promises as a whole: a light import, rooms on floors, small modules, one name for one thing."""

import ast
import importlib
import inspect
import json
import pkgutil
import re
import statistics
import subprocess
import sys
import tomllib
import types
from collections import defaultdict
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest

import pplvi

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "pplvi"
MODULES = sorted(PACKAGE.rglob("*.py"))
PAGES = sorted(str(path.relative_to(ROOT)) for path in (ROOT / "docs").rglob("*.md") if "_build" not in path.parts)
DOCUMENTS = ["ARCHITECTURE.md", "CONTRIBUTING.md", "README.md", *PAGES]  # a changelog speaks of what was
MAX_LINES = 400
MAX_MEDIAN_FUNCTION = 6
MAX_PARAMETERS = 12

# A room imports only rooms on floors below its own.
FLOORS = {
    1: {"kinds", "types"},
    2: {"weights", "programs"},
    3: {"objectives", "kernels", "posterior"},
    4: {"samplers"},
    5: {"losses", "guides"},
    6: {"compile", "models"},
    7: {"training"},
    8: {"fitting", "evaluation"},
    9: {"energies", "examples", "demo"},
}
FLOOR = {room: floor for floor, rooms in FLOORS.items() for room in rooms}
ROOMS = sorted(path.parent.name for path in PACKAGE.glob("*/__init__.py"))
DATA_SETS = {PACKAGE / "examples" / f"{name}.py" for name in ("bioassay", "diabetes", "eight_schools", "grunfeld")}
POUTINE_ROOMS = {"programs", "guides", "energies", "examples"}

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

def heavy():
    return [name for name in ("arviz", "matplotlib", "zuko", "sklearn") if name in sys.modules]

found = {"changed": changed, "heavy": heavy()}
pplvi.fit
found["heavy with fit"] = heavy()
names = {name for name in pplvi.__all__ if name[0] != "_"}
[getattr(pplvi, name) for name in names]
found["hidden"] = [name for name in sorted(names) if not callable(getattr(pplvi, name))]
print(json.dumps(found))
"""


@cache
def text(module: Path) -> str:
    return module.read_text()


@cache
def tree(module: Path) -> ast.Module:
    return ast.parse(text(module))


@cache
def nodes(module: Path) -> tuple[ast.AST, ...]:
    return tuple(ast.walk(tree(module)))


def functions(module: Path) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    return (node for node in nodes(module) if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)))


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
    for node in nodes(module):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            source = resolve(node, module)
            yield from (f"{source}.{alias.name}" for alias in node.names)


@cache
def own_imports(module: Path) -> frozenset[str]:
    """The modules of this package that a file imports."""
    known = {dotted(path) for path in MODULES}
    names = (name for name in imported(module) if name.split(".")[0] == "pplvi")
    prefixes = ({".".join(name.split(".")[:i]) for i in range(1, name.count(".") + 2)} & known for name in names)
    return frozenset(max(found, key=len) for found in prefixes) - {dotted(module)}


def rooms_imported(name: str) -> set[str]:
    """The other rooms that a room imports."""
    targets = {target for module in MODULES if room(module) == name for target in own_imports(module) - {"pplvi"}}
    return {target.split(".")[1] for target in targets} - {name}


def public_definitions(module: Path) -> Iterator[str]:
    """Public classes, functions and type aliases of a file; a type variable is none."""
    for node in tree(module).body:
        if isinstance(node, (ast.ClassDef, ast.FunctionDef)):
            names = [node.name]
        elif isinstance(node, (ast.Assign, ast.AnnAssign)) and "TypeVar" not in ast.unparse(node.value or node):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            names = [
                target.id for target in targets if isinstance(target, ast.Name) and re.match("[A-Z][a-z]", target.id)
            ]
        else:
            names = []
        yield from (name for name in names if not name.startswith("_"))


def docstrings(module: Path) -> Iterator[str]:
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    return (found for node in nodes(module) if isinstance(node, kinds) and (found := ast.get_docstring(node)))


def parameters(node: ast.FunctionDef | ast.AsyncFunctionDef) -> list[str]:
    """Names in a call's signature."""
    given = node.args.posonlyargs + node.args.args + node.args.kwonlyargs
    return [argument.arg for argument in given if argument.arg not in {"self", "cls"}]


def of_other_modules(module: Path) -> Iterator[tuple[str, str]]:
    """What a file imports from others of this package: the name it has here, and where it comes from."""
    for node in nodes(module):
        if isinstance(node, ast.ImportFrom) and (source := resolve(node, module)).startswith("pplvi"):
            for alias in node.names:
                yield alias.asname or alias.name, f"{source}.{alias.name}"


def test_import_is_light_and_changes_no_global_state() -> None:
    """Loading ``fit`` is light too; and a name is not hidden by a module: pplvi/fit.py would be bound as pplvi.fit."""
    run = subprocess.run([sys.executable, "-c", IMPORT_PROBE], capture_output=True, text=True, cwd=ROOT, check=False)
    assert run.returncode == 0, run.stderr
    assert json.loads(run.stdout) == {"changed": [], "heavy": [], "heavy with fit": [], "hidden": []}


@pytest.mark.parametrize("module", MODULES, ids=dotted)
def test_module_is_short(module: Path) -> None:
    assert len(text(module).splitlines()) <= MAX_LINES


def test_functions_are_short() -> None:
    lengths = []
    for node in (node for module in MODULES for node in functions(module)):
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
    attributes = {node.attr for node in nodes(module) if isinstance(node, ast.Attribute)}
    names = {part for name in imported(module) for part in name.split(".")}
    assert "poutine" not in attributes | names


# ---------------------------------------------------------------------- the rooms and what they say of themselves


def test_the_floors_are_those_of_the_rooms() -> None:
    assert set(FLOOR) == {room(module) for module in MODULES} - {"__init__"}


@pytest.mark.parametrize("name", ROOMS)
def test_a_room_says_what_it_holds_and_imports(name: str) -> None:
    """The first line of its ``__init__``: rooms that it names stand below, and what it imports is named or lower."""
    line = importlib.import_module(f"pplvi.{name}").__doc__.splitlines()[0]
    assert re.fullmatch(r".+\. Imports .+\.", line), f"pplvi/{name}/__init__.py says {line!r}"
    named = set(re.findall(r"``(\w+)``", line.split(" Imports ")[1]))
    assert all(FLOOR[other] < FLOOR[name] for other in named)
    highest = max((FLOOR[other] for other in named), default=0)
    lower = {other for other in FLOOR if FLOOR[other] < highest} if "what stands below" in line else set()
    assert rooms_imported(name) <= named | lower | {"types", "kinds"}


@pytest.mark.parametrize("name", ROOMS)
def test_what_a_room_exports_is_there(name: str) -> None:
    module = importlib.import_module(f"pplvi.{name}")
    assert sorted(set(module.__all__)) == sorted(module.__all__)
    assert all(hasattr(module, exported) for exported in module.__all__)


def test_architecture_has_every_room_on_its_floor() -> None:
    rows = re.findall(r"^\| (\d+) \| `(\w+)(?:/|\.py)` \| .+ \|$", (ROOT / "ARCHITECTURE.md").read_text(), re.MULTILINE)
    assert {name: int(floor) for floor, name in rows} == FLOOR
    assert [int(floor) for floor, _ in rows] == sorted((int(floor) for floor, _ in rows), reverse=True)


@pytest.mark.parametrize("document", DOCUMENTS)
def test_paths_in_documents_exist(document: str) -> None:
    words = re.findall(r"`((?:\w+/)+[\w.]*)`", (ROOT / document).read_text())
    places = [ROOT, PACKAGE, *(PACKAGE / name for name in ROOMS)]
    missing = {word for word in words if not any((place / word).exists() for place in places)}
    assert not missing - {"out/", "docs/_build/html", "docs/_build/notebooks"}


def project() -> dict[str, Any]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())


def test_documents_are_in_the_source_distribution() -> None:
    included = set(
        tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["hatch"]["build"]["targets"]["sdist"]["include"]
    )
    assert {f"/{path.name}" for path in ROOT.glob("*.md")} - {"/README.md"} <= included  # hatch takes the readme itself
    assert all((ROOT / path.removeprefix("/")).exists() for path in included)


def test_hooks_are_of_the_projects_own_environment() -> None:
    entries = re.findall(r"entry: (\S+)", (ROOT / ".pre-commit-config.yaml").read_text())
    development = project()["project"]["optional-dependencies"]["dev"]
    assert {entry.removeprefix(".venv/bin/") for entry in entries} == {"ruff", "mypy"} <= set(development)


def resolves(word: str) -> bool:
    try:
        return pkgutil.resolve_name(word) is not None
    except (ImportError, AttributeError):
        return False


@pytest.mark.parametrize("document", DOCUMENTS)
def test_modules_in_documents_exist(document: str) -> None:
    """A dotted name in a document is a module, or a name that one has."""
    words = set(re.findall(r"`(pplvi(?:\.\w+)+)[`(]", (ROOT / document).read_text()))
    assert not [word for word in words if not resolves(word)]


# ---------------------------------------------------------------------- lint for the house


def test_a_name_stands_for_one_thing() -> None:
    """No two public classes, functions or type aliases of one name; the data sets have one face."""
    homes = defaultdict(set)
    for module in MODULES:
        for name in public_definitions(module):
            if not (room(module) == "examples" and name in {"model", "load"}):
                homes[name].add(dotted(module))
    assert not {name: places for name, places in homes.items() if len(places) > 1}


def test_data_sets_have_one_face() -> None:
    assert {module.stem for module in DATA_SETS} == set(importlib.import_module("pplvi.examples").LOADERS)
    assert all({"model", "load"} <= set(public_definitions(module)) for module in DATA_SETS)


@pytest.mark.parametrize("module", MODULES, ids=dotted)
def test_no_alias_hides_a_type(module: Path) -> None:
    for node in (node for node in nodes(module) if isinstance(node, (ast.Assign, ast.AnnAssign))):
        assert not (isinstance(node.value, ast.Name) and node.value.id == "Any"), f"line {node.lineno}: say the type"


@pytest.mark.parametrize("module", MODULES, ids=dotted)
def test_nothing_private_crosses_modules(module: Path) -> None:
    foreign = dict(of_other_modules(module))
    private = [path for path in foreign.values() if path.split(".")[-1].startswith("_")]
    for node in (node for node in nodes(module) if isinstance(node, ast.Attribute)):
        if isinstance(node.value, ast.Name) and node.value.id in foreign and re.match("_(?!_|fields$)", node.attr):
            private.append(f"{foreign[node.value.id]}.{node.attr}")
    assert not private


def test_signatures_are_short() -> None:
    long = {f"{dotted(module)}.{node.name}": len(parameters(node)) for module in MODULES for node in functions(module)}
    assert {name for name, count in long.items() if count > MAX_PARAMETERS} <= {"pplvi.fitting.entry.fit"}


def test_no_assertion_is_the_only_check_of_a_type() -> None:
    """Assertions are for what cannot be, and are switched off by -O: a wrong type is a ValueError."""
    for node in (node for module in MODULES for node in nodes(module) if isinstance(node, ast.Assert)):
        assert "isinstance" not in ast.unparse(node.test), ast.unparse(node)


@pytest.mark.parametrize("module", MODULES, ids=dotted)
def test_docstrings_have_one_dialect(module: Path) -> None:
    """Fields as ``:param name:``; no headings of other dialects, and no field under another name."""
    headings = (
        r"^\s*(Args|Arguments|Parameters|Returns|Raises|Yields|Attributes|Examples?|References?|Notes?|Warns):?\s*$"
    )
    fields = r"^\s*:(?!(?:param \w+|ivar \w+|cvar \w+|raises \w+|returns):)(?:\w+)(?: [^:`]+)?:(?:\s|$)"
    for found in docstrings(module):
        assert not re.search(f"{headings}|{fields}", found, re.MULTILINE), found


def documented(module: Path) -> Iterator[tuple[str, set[str], set[str]]]:
    """Functions and classes with the parameters that they document, and those that they have."""
    classes = {node.name: node for node in nodes(module) if isinstance(node, ast.ClassDef)}
    for node in functions(module):
        extra = {more.arg for more in (node.args.vararg, node.args.kwarg) if more}
        yield node.name, set(re.findall(r":param (\w+):", ast.get_docstring(node) or "")), {*parameters(node), *extra}
    for name in classes:
        value = getattr(importlib.import_module(dotted(module)), name, None)
        if value is not None and not issubclass(value, (BaseException, dict)):  # a TypedDict has keys
            told = set(re.findall(r":param (\w+):", ast.get_docstring(classes[name]) or ""))
            yield name, told, set(inspect.signature(value).parameters)


@pytest.mark.parametrize("module", MODULES, ids=dotted)
def test_documented_parameters_are_there(module: Path) -> None:
    wrong = {name: told - given for name, told, given in documented(module) if told - given}
    assert not wrong


# ---------------------------------------------------------------------- public names


def public_objects() -> list[str]:
    return [name for name in pplvi.__all__ if not name.startswith("__")]


@pytest.mark.parametrize("name", public_objects())
def test_public_name_is_documented(name: str) -> None:
    value = getattr(pplvi, name)
    doc = inspect.getdoc(value)
    assert doc, f"{name} has no docstring"
    if not isinstance(value, types.ModuleType):
        assert ">>>" in doc, f"{name} has no doctest example"
    for file in ("docs/methods.md", "CHANGELOG.md"):
        assert re.search(rf"\b{name}\b", (ROOT / file).read_text()), f"{name} is missing from {file}"


def test_type_checkers_see_what_is_imported_lazily() -> None:
    """The imports under TYPE_CHECKING are the lazy table, name by name and room by room."""
    (block,) = [node for node in tree(PACKAGE / "__init__.py").body if ast.unparse(node).startswith("if TYPE_CHECKING")]
    seen = {alias.asname: node.module for node in block.body for alias in node.names if alias.asname == alias.name}
    assert seen == {name: f"pplvi.{home}" for name, home in pplvi._HOMES.items()}
    assert sorted(pplvi.__all__) == sorted([*pplvi._HOMES, "__version__"])


@pytest.mark.parametrize("name", public_objects())
def test_public_name_is_exported_by_its_room(name: str) -> None:
    home = importlib.import_module(f"pplvi.{pplvi._HOMES[name]}")
    assert name in home.__all__
    assert getattr(home, name) is getattr(pplvi, name)
    assert getattr(pplvi, name).__module__.startswith(home.__name__)
