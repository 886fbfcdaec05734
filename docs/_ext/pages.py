"""What the build writes: pages of public names, the tutorials as notebooks, and links from names to their pages."""

from __future__ import annotations

import importlib
import pkgutil
import re
import shutil
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from docutils import nodes
from names import Entry, entries, pages
from sphinx import addnodes
from sphinx.util import logging

DOCS = Path(__file__).parents[1]
TUTORIALS = DOCS.parent / "tutorials"


def write(folder: Path, written: Iterator[tuple[str, str]]) -> None:
    """Write documents that are new or changed, so that others are not built again."""
    for name, text in written:
        path = folder / f"{name}.rst"
        path.parent.mkdir(parents=True, exist_ok=True)
        if not path.exists() or path.read_text() != text:
            path.write_text(text)


def notebooks(folder: Path) -> None:
    """The tutorials as notebooks: as they are under ``_build/notebooks``, and for the site with short loops."""
    import jupytext

    for where in (folder / "tutorials", folder / "_build" / "notebooks"):
        where.mkdir(parents=True, exist_ok=True)
    for script in sorted(TUTORIALS.glob("*.py")):
        notebook = jupytext.read(script, fmt="py:percent")
        notebook.metadata["kernelspec"] = {"name": "python3", "display_name": "Python 3", "language": "python"}
        jupytext.write(notebook, folder / "_build" / "notebooks" / f"{script.stem}.ipynb")
        short = jupytext.reads("# %% tags=['remove-cell']\nimport os\nos.environ['PPLVI_SMOKE'] = '1'\n", "py:percent")
        note = jupytext.reads(
            "# %% [markdown]\n# *Pictures and numbers of this page are those of short loops; run the script for the"
            " real ones.*\n",
            "py:percent",
        )
        notebook.cells[:1] = [*short.cells, notebook.cells[0], *note.cells]
        for number, cell in enumerate(notebook.cells):
            cell["id"] = f"cell-{number}"  # else a random one, and every build would read all of them again
        target, text = folder / "tutorials" / f"{script.stem}.ipynb", jupytext.writes(notebook, "ipynb")
        if not target.exists() or target.read_text() != text:
            target.write_text(text)


class References:
    """References by the place of definition lead to the page of the name; others of this package have to exist."""

    def __init__(self) -> None:
        self.pages = {}
        for entry in entries():
            value = entry.value
            if entry.kind in ("class", "function", "exception"):
                self.pages[f"{value.__module__}.{value.__qualname__}"] = entry
            self.pages[entry.full] = entry

    def __call__(self, app: Any, env: Any, node: Any, content: Any) -> Any:
        """What a reference that Sphinx does not find leads to."""
        target = node.get("reftarget", "")
        if node.get("refdomain") != "py" or not target.startswith("pplvi"):
            return None
        name, attribute = self._entry(target)
        if name is not None and (name.path != target or attribute):
            uri = app.builder.get_relative_uri(env.docname, name.page)
            anchor = f"#{name.path}{attribute}"
            return nodes.reference("", "", content, internal=True, refuri=f"{uri}{anchor}")
        try:
            pkgutil.resolve_name(target)
        except (ImportError, AttributeError, ValueError):
            logging.getLogger(__name__).warning("there is no %s", target, location=node)
        return content

    def _entry(self, target: str) -> tuple[Entry | None, str]:
        if target in self.pages:
            return self.pages[target], ""
        owner, _, attribute = target.rpartition(".")
        return self.pages.get(owner), f".{attribute}"


class Names:
    """Code in text that begins with the name of something public leads to its page."""

    pattern = re.compile(r"(?:pplvi\.(?:\w+\.)?)?(\w+)(?=$|\()")

    def __init__(self) -> None:
        top = importlib.import_module("pplvi").__all__
        others = Counter(entry.name for entry in entries())
        self.pages = {e.name: e for e in entries() if e.path == f"pplvi.{e.name}" or others[e.name] == 1}
        self.pages = {name: entry for name, entry in self.pages.items() if name in top or name[0].isupper()}

    def __call__(self, app: Any, doctree: Any, docname: str) -> None:
        """Wrap the literals of a page in references."""
        for literal in list(doctree.findall(nodes.literal)):
            found = self.pattern.match(literal.astext())
            entry = self.pages.get(found[1]) if found else None
            if entry is None or entry.page == docname or _is_linked(literal):
                continue
            uri = app.builder.get_relative_uri(docname, entry.page)
            reference = nodes.reference("", "", internal=True, refuri=f"{uri}#{entry.path}")
            literal.replace_self(reference)
            reference += literal


def _is_linked(node: Any) -> bool:
    above = node.parent
    while above is not None:
        if isinstance(above, (nodes.reference, nodes.title, addnodes.pending_xref, addnodes.desc_signature)):
            return True
        above = above.parent
    return False


def generate(app: Any) -> None:
    """Write all pages before anything is read."""
    generated = DOCS / "api" / "names"
    kept = {entry.page.split("/")[-1] for entry in entries()}
    if generated.exists() and {path.stem for path in generated.glob("*.rst")} - kept:
        shutil.rmtree(generated)
    write(DOCS, pages())
    notebooks(DOCS)


def spread(app: Any, env: Any, names: list[str]) -> None:
    """Pages with cells come at equal distances: parts of the list are read side by side, and cells take the time."""
    paths = {name: Path(env.doc2path(name)) for name in names}
    run = [name for name in names if paths[name].suffix == ".ipynb" or "{code-cell}" in paths[name].read_text()]
    others = [name for name in names if name not in set(run)]
    place = {name: number / len(part) for part in (run, others) for number, name in enumerate(part)}
    names.sort(key=place.__getitem__)


def setup(app: Any) -> dict[str, Any]:
    """Connect what Sphinx calls."""
    app.connect("builder-inited", generate)
    app.connect("env-before-read-docs", spread)
    app.connect("missing-reference", References())
    app.connect("doctree-resolved", Names())
    return {"parallel_read_safe": True}
