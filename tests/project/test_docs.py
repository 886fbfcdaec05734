"""The sources of the site: every public name has a page, every page is reached, links lead somewhere, names exist."""

import ast
import importlib.util
import re
import sys
from pathlib import Path
from types import ModuleType

import pytest

import pplvi

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
PAGES = sorted(path for path in DOCS.rglob("*.md") if "_build" not in path.parts)
TUTORIALS = {f"tutorials/{path.stem}" for path in (ROOT / "tutorials").glob("*.py")}
OF_PYRO = {"AutoDelta", "AutoLaplaceApproximation", "AutoMultivariateNormal", "AutoNormal", "SVI", "TraceGraph_ELBO"}
OTHERS = {"DataLoader", "DistributedSampler", "RankLostError", "None", "False", "True", "K"}


def extension(name: str) -> ModuleType:
    """A part of the build that needs no Sphinx."""
    spec = importlib.util.spec_from_file_location(f"docs_{name}", DOCS / "_ext" / f"{name}.py")
    sys.modules[f"docs_{name}"] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def names() -> ModuleType:
    """What knows the pages."""
    return extension("names")


def document(path: Path) -> str:
    return str(path.relative_to(DOCS).with_suffix(""))


def identify(path: Path) -> str:
    return document(path)


def test_every_public_name_has_a_page(names: ModuleType) -> None:
    found = {entry.path: entry.page for entry in names.entries()}
    assert {f"pplvi.{name}" for name in pplvi.__all__ if name != "__version__"} <= set(found)
    for room in names.rooms():
        exported = set(importlib.import_module(f"pplvi.{room}").__all__)
        assert {entry.name for entry in names.entries() if entry.room == room} == exported
    assert len({page.lower() for page in found.values()}) == len(found)  # where files are named alike in both cases
    texts = dict(names.pages())
    assert all(path in texts[page] for path, page in found.items())
    assert all(f"api/{room}" in texts for room in names.rooms())


def toctrees() -> set[str]:
    reached = set()
    for path in PAGES:
        for tree in re.findall(r"```\{toctree\}\n(.*?)```", path.read_text(), re.DOTALL):
            entries = [line for line in tree.split("\n") if line and not line.startswith(":")]
            folder = path.parent.relative_to(DOCS)
            reached |= {str(folder / entry) for entry in entries}
    return reached


def test_every_page_is_in_a_table_of_contents() -> None:
    reached = toctrees()
    assert {document(path) for path in PAGES} - reached == {"index"}
    assert {entry for entry in reached if "*" not in entry} <= {document(path) for path in PAGES}


@pytest.mark.parametrize("page", PAGES, ids=identify)
def test_links_lead_somewhere(page: Path) -> None:
    text = page.read_text()
    for target in re.findall(r"\]\(([^)#\s]+)", text):
        if not target.startswith("http"):
            found = (page.parent / target).resolve()
            assert found.exists() or str(found.relative_to(DOCS).with_suffix("")) in TUTORIALS, target
    for target, options in re.findall(r"```\{include\} (\S+)\n(.*?)```", text, re.DOTALL):
        included = (page.parent / target).read_text()
        for marker in re.findall(r':(?:start-after|end-before): "(.*)"', options):
            assert marker.replace("\\n", "\n") in included


@pytest.mark.parametrize("page", PAGES, ids=identify)
def test_names_on_pages_exist(page: Path, names: ModuleType) -> None:
    """What looks like a class in the words of a page is public here, or one of Pyro's that are meant."""
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
    classes = set(re.findall(r"`([A-Z][A-Za-z]+[a-z]\w*|[A-Z]+)(?:\(.*?)?`", text))
    public = {entry.name for entry in names.entries()}
    assert classes <= public | OF_PYRO | OTHERS


@pytest.mark.parametrize("page", [path for path in PAGES if "code-cell" in path.read_text()], ids=identify)
def test_cells_are_python(page: Path) -> None:
    for cell in re.findall(r"```(?:\{code-cell\} )?python\n(.*?)```", page.read_text(), re.DOTALL):
        ast.parse(cell)


def test_theory_names_a_class_on_every_page(names: ModuleType) -> None:
    public = {entry.name for entry in names.entries()}
    for page in (path for path in PAGES if path.parent.name == "theory" and path.stem != "index"):
        words = set(re.findall(r"`(\w+)", page.read_text()))
        assert "$$" in page.read_text(), page
        assert len(words & public) >= 3, page


@pytest.mark.parametrize(
    ("annotation", "words"),
    [
        ("Annotated[int, Condition(words=a whole number, holds=~pplvi.kinds.<lambda>)]", "int: a whole number"),
        ("Sequence[Annotated[float, Condition(words=in [0, 1), holds=f)]] | None", "Sequence[float: in [0, 1)] | None"),
        ("Annotated[Callable[[...], Any], 'a Pyro program']", "Callable[[...], Any]: a Pyro program"),
    ],
    ids=["number", "inside", "program"],
)
def test_kinds_of_argument_are_said_in_words(annotation: str, words: str) -> None:
    """Not by the code of their conditions."""
    assert extension("kinds_in_words").in_words(annotation) == words
