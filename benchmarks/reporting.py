"""What all benchmarks share: their command line, their tables, and files of results with date, versions and machine."""

import argparse
import json
import os
import platform
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, is_dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy
import pyro
import torch

import pplvi

NOT_SETTINGS = {"out", "data", "machine", "tables", "worker"}  # files and folders, and what is said elsewhere


def command_line(doc: str | None) -> argparse.ArgumentParser:
    """A parser with the description of a benchmark, and with ``--out``."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="where to write the results as JSON")
    return parser


# ---------------------------------------------------------------------- tables


class Table:
    """A Markdown table whose rows can be printed as they come.

    :param columns: by title, the width and format of a number, such as ``"8.3f"``, or the width of a text, ``"<12"``.
    """

    def __init__(self, columns: Mapping[str, str]) -> None:
        self.columns = dict(columns)
        self.begun = False

    def head(self) -> str:
        """Titles and the line below them."""
        rules = ("-" * (len(cell) - 1) + ("-" if self._is_text(spec) else ":") for cell, spec in self._cells())
        return f"{self.line(self.columns)}\n| {' | '.join(rules)} |"

    def _cells(self) -> Iterable[tuple[str, str]]:
        return ((self._cell(title, title, spec), spec) for title, spec in self.columns.items())

    def line(self, cells: Iterable[Any]) -> str:
        """One row; what is not known is ``-``."""
        pairs = zip(cells, self.columns.items(), strict=True)
        return f"| {' | '.join(self._cell(value, *column) for value, column in pairs)} |"

    def text(self, rows: Iterable[Iterable[Any]]) -> str:
        """The whole table."""
        return "\n".join([self.head(), *map(self.line, rows)])

    def show(self, *cells: Any) -> None:
        """Print a row; before the first one, the titles."""
        if not self.begun:
            print(self.head())
        self.begun = True
        print(self.line(cells), flush=True)

    @staticmethod
    def _is_text(spec: str) -> bool:
        return spec.startswith("<")

    def _cell(self, value: Any, title: str, spec: str) -> str:
        width, kind = re.fullmatch(r"<?(\d*)(.*)", spec).groups()  # type: ignore[union-attr]
        plain = value is None or isinstance(value, str)
        text = ("-" if value is None else value) if plain else format(value, "" if self._is_text(spec) else kind)
        space = max(len(title), int(width or 0), 3)
        return text.ljust(space) if self._is_text(spec) else text.rjust(space)


def table_of(rows: Sequence[Mapping[str, Any]]) -> str:
    """A table of whatever the rows hold, under the names of the first one; lists are left out, and no rows no table."""
    known = [_single(row) for row in rows]
    return _fitting(known).text(map(_text, row.values()) for row in known) if known else ""


class Rows:
    """Prints rows as they come, whatever they hold, and begins a new table where the names change."""

    def __init__(self) -> None:
        self.table = Table({})

    def show(self, row: Mapping[str, Any]) -> None:
        """Print a row; lists are left out."""
        known = _single(row)
        if list(self.table.columns) != list(known):
            self.table = _fitting([known])
            print()
        self.table.show(*map(_text, known.values()))


def _single(row: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in row.items() if not isinstance(value, list)}


def _fitting(rows: Sequence[Mapping[str, Any]]) -> Table:
    """A table as wide as its cells."""
    columns = {}
    for title in rows[0]:
        width = max(len(_text(row[title])) for row in rows)
        numbers = all(isinstance(row[title], int | float) or row[title] is None for row in rows)
        columns[title] = f"{width}" if numbers else f"<{width}"
    return Table(columns)


def _text(value: Any) -> str:
    return "-" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)


# ---------------------------------------------------------------------- results


def provenance() -> dict[str, Any]:
    """When, with what and on what: date (UTC), versions, processor, cores and threads."""
    modules = {"torch": torch, "pyro": pyro, "pplvi": pplvi, "numpy": numpy}
    versions = {"python": platform.python_version(), **{name: m.__version__ for name, m in modules.items()}}
    machine = {"cpu": cpu_name(), "cores": os.cpu_count(), "threads": torch.get_num_threads()}
    return {"date": datetime.now(UTC).isoformat(timespec="seconds"), "versions": versions, "machine": machine}


def cpu_name() -> str:
    """The processor's name, as the system knows it."""
    info = Path("/proc/cpuinfo")
    found = re.search(r"model name\s*:\s*(.*)", info.read_text()) if info.exists() else None
    return found[1].strip() if found else platform.processor() or platform.machine()


def write(options: argparse.Namespace, **content: Any) -> None:
    """Write results to ``options.out``, if there is one, whole or not at all: several runs may share a file.

    :param content: what was found, such as ``rows=``; data classes are written as dictionaries.
    """
    if options.out is None:
        return
    settings = {name: value for name, value in vars(options).items() if name not in NOT_SETTINGS}
    found = {**provenance(), "settings": settings, **content}
    options.out.parent.mkdir(parents=True, exist_ok=True)
    part = options.out.with_suffix(".part")
    part.write_text(json.dumps(found, indent=1, default=_plain) + "\n")
    part.replace(options.out)


def _plain(value: Any) -> Any:
    return asdict(value) if is_dataclass(value) and not isinstance(value, type) else str(value)


def rows_of(path: Path) -> list[dict[str, Any]]:
    """The rows that a file of results holds; none if there is no file."""
    found = json.loads(path.read_text()) if path.exists() else []
    return list(found if isinstance(found, list) else found["rows"])


def write_table(options: argparse.Namespace, name: str, rows: Iterable[Mapping[str, Any]]) -> None:
    """One table with its settings, beside what the file ``options.out`` has of other tables."""
    if options.out is None:
        return
    found = json.loads(options.out.read_text()) if options.out.exists() else {}
    settings = {key: value for key, value in vars(options).items() if key not in NOT_SETTINGS}
    data = "digits" if options.data is None else "mnist"
    table = {**provenance(), "data": data, "settings": settings, "rows": list(rows)}
    write(options, tables={**found.get("tables", {}), name: table})
