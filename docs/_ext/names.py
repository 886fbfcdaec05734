"""The public names, room by room, and the text of their pages."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
import types
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

HOMES = ("fitting", "posterior", "losses", "guides", "samplers", "kernels", "objectives")


@dataclass(frozen=True)
class Entry:
    """A public name: where users find it, and its page."""

    room: str
    name: str

    @property
    def path(self) -> str:
        """As users import it: from ``pplvi`` where that has it."""
        top = importlib.import_module("pplvi")
        is_same = self.name in top.__all__ and getattr(top, self.name) is self.value
        return f"pplvi.{self.name}" if is_same else self.full

    @property
    def full(self) -> str:
        """From its room."""
        return f"pplvi.{self.room}.{self.name}"

    @property
    def value(self) -> Any:
        """The object."""
        return pkgutil.resolve_name(f"pplvi.{self.room}:{self.name}")

    @property
    def kind(self) -> str:
        """The directive of autodoc for it, without ``auto``."""
        if isinstance(self.value, types.ModuleType):
            return "module"
        if inspect.isclass(self.value):
            return "exception" if issubclass(self.value, BaseException) else "class"
        return "function" if inspect.isfunction(self.value) else "data"

    @property
    def page(self) -> str:
        """Its document: ``fit`` and ``Fit`` are two files on any system."""
        return f"api/names/{self.kind}-{self.room}-{self.name.lower()}"

    @property
    def role(self) -> str:
        """How text refers to it."""
        domain = {"function": "func", "module": "mod", "exception": "exc"}.get(self.kind, self.kind)
        return f":py:{domain}:`~{self.path}`"


def rooms() -> list[str]:
    """The rooms of the package, those that users meet first in front."""
    found = sorted(module.name for module in pkgutil.iter_modules(importlib.import_module("pplvi").__path__))
    rooms = [name for name in found if hasattr(importlib.import_module(f"pplvi.{name}"), "__all__")]
    return sorted(rooms, key=lambda name: (HOMES.index(name) if name in HOMES else len(HOMES), name))


def entries() -> list[Entry]:
    """Every name that a room exports."""
    return [Entry(room, name) for room in rooms() for name in importlib.import_module(f"pplvi.{room}").__all__]


def pages() -> Iterator[tuple[str, str]]:
    """Documents by name, each with its text."""
    for room in rooms():
        own = [entry for entry in entries() if entry.room == room]
        title, said = f"``pplvi.{room}``", (importlib.import_module(f"pplvi.{room}").__doc__ or "").strip()
        listed = "\n".join(f"* {entry.role}" for entry in own)
        tree = "\n".join(f"   /{entry.page}" for entry in own)
        yield f"api/{room}", f"{_titled(title)}{said}\n\n{listed}\n\n.. toctree::\n   :hidden:\n\n{tree}\n"
        yield from ((entry.page, _page(entry)) for entry in own)


def _titled(title: str) -> str:
    return f"{title}\n{'=' * len(title)}\n\n"


def _page(entry: Entry) -> str:
    if entry.kind == "data":
        shown = f"a dictionary of {', '.join(entry.value)}" if isinstance(entry.value, dict) else str(entry.value)
        return f"{_titled(entry.name)}.. py:data:: {entry.path}\n\n   ``{shown.replace('typing.', '')}``\n"
    first = next(each for each in entries() if each.name == entry.name and each.value is entry.value)
    if first != entry:
        return f"{_titled(entry.name)}``{entry.path}`` is {first.role}.\n"
    options = ["   :members:", "   :show-inheritance:"] if entry.kind in ("class", "exception") else []
    options += ["   :members:"] if entry.kind == "module" else []
    found = [f".. auto{entry.kind}:: {entry.path}", *options, ""]
    same = "" if entry.path == entry.full else f"Also ``{entry.full}``.\n"
    return _titled(entry.name) + "\n".join(found) + "\n" + same
