"""A hundred small faults, put into the code one after another: the tests of the room have to notice each.

``make mutants`` makes a copy of the tree for each fault, and runs the tests of its module there to the first failure.
Faults are drawn with a seed from all that the operators below can do to arithmetic, comparisons and choices; what only
words an error is left out, and so are the few that change nothing (:data:`SAME`).
"""

from __future__ import annotations

import argparse
import ast
import os
import random
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
_PROGRAMS = ["tests/programs/test_handlers.py", "tests/programs/test_programs.py", "tests/programs/test_errors.py"]
# The tests of a module are those of the longest path that it is in; the cheap ones first.
TESTS = {
    "weights": ["tests/weights"],
    "objectives": ["tests/objectives", "tests/losses/test_elbo.py", "tests/losses/test_known_answers.py"],
    "objectives/nested.py": [
        "tests/objectives",
        "tests/samplers/test_annealing.py",
        "tests/samplers/test_divergences.py",
    ],
    "samplers": [
        "tests/samplers/test_particles.py",
        "tests/samplers/test_samplers.py",
        "tests/samplers/test_rejected_moves.py",
        "tests/samplers/test_annealing.py",
    ],
    "samplers/filtering.py": [
        "tests/losses/test_filtering.py",
        "tests/guides/test_filtered.py",
        "tests/samplers/test_ways_of_walks.py",
    ],
    "samplers/state_space.py": ["tests/losses/test_filtering.py"],
    "samplers/score_terms.py": ["tests/losses/test_score_terms.py", "tests/losses/test_elbo.py"],
    "samplers/tempered.py": ["tests/samplers/test_tempered.py"],
    "samplers/metric.py": ["tests/samplers/test_tempered.py"],
    "samplers/mixture.py": ["tests/losses/test_wake_sleep.py"],
    "samplers/annealed_at_once.py": ["tests/samplers/test_annealing.py", "tests/samplers/test_proper_weights.py"],
    "programs": _PROGRAMS,
    "programs/carrying.py": ["tests/programs/test_ways.py", *_PROGRAMS],
    "programs/dreams.py": ["tests/losses/test_wake_sleep.py", *_PROGRAMS],
    "programs/handlers.py": [*_PROGRAMS, "tests/programs/test_ways.py"],
    "programs/ranks.py": ["tests/training/test_parallel.py"],
    "programs/stacked.py": ["tests/programs/test_ways.py", *_PROGRAMS],
    "programs/summing.py": ["tests/guides/test_enumerated.py", *_PROGRAMS],
    "programs/enumeration.py": ["tests/programs/test_enumeration.py"],
    "programs/randomness.py": ["tests/programs/test_randomness.py", "tests/programs/test_ways.py"],
    "programs/inputs.py": ["tests/programs/test_inputs.py"],
    "programs/memo.py": ["tests/programs/test_memo.py", "tests/programs/test_programs.py"],
    "programs/reparam.py": ["tests/guides/test_reparametrization.py"],
    "programs/density.py": [
        "tests/programs/test_density.py",
        "tests/guides/test_enumerated.py",
        "tests/guides/test_pathfinder.py",
    ],
    "programs/single.py": ["tests/samplers/test_annealing.py", "tests/samplers/test_proper_weights.py"],
    "posterior": ["tests/posterior"],
    "posterior/leave_one_out.py": ["tests/posterior/test_loo.py"],
    "posterior/verdict.py": ["tests/posterior/test_verdict.py"],
    "energies/machines": ["tests/energies/test_energies.py", "tests/energies/test_deep_boltzmann.py", "tests/energies"],
    "energies/learning": ["tests/energies/test_boltzmann_elbo.py", "tests/energies/test_deep_training.py"],
    "energies/posteriors": ["tests/energies/test_deep_boltzmann.py", "tests/energies/test_boltzmann_guides.py"],
    "energies/evaluation": ["tests/energies/test_partition.py", "tests/energies/test_monitors.py"],
}
ROOMS = ["weights", "objectives", "samplers", "programs", "posterior", "energies"]
# Faults that change nothing: by file, what is there and what would be.
SAME: set[tuple[str, str, str]] = set()
_SWAPS: dict[type, str] = {ast.Add: "-", ast.Sub: "+", ast.Mult: "/", ast.Div: "*"}
_OPPOSITE: dict[type, str] = {ast.Lt: ">=", ast.LtE: ">", ast.Gt: "<=", ast.GtE: "<", ast.Eq: "!=", ast.NotEq: "=="}
_NAMES = {"max": "min", "min": "max", "any": "all", "all": "any", "argmax": "argmin", "argmin": "argmax"}
_PASSED_OVER = (ast.Raise, ast.JoinedStr, ast.Assert, ast.AnnAssign, ast.ImportFrom, ast.Import)


@dataclass(frozen=True)
class Mutant:
    """A fault: where in which file, and what is there instead."""

    path: str
    start: int
    end: int
    new: str
    line: int

    def described(self, text: str) -> str:
        """The line, what was there and what is."""
        return f"{self.path}:{self.line}: {text[self.start : self.end]!r} -> {self.new!r}"


def mutants(path: Path) -> Iterator[Mutant]:
    """All faults of a file."""
    text = path.read_text()
    starts = [0]
    for line in text.splitlines(keepends=True):
        starts.append(starts[-1] + len(line))

    def place(node: ast.AST, at_end: bool = False) -> int:
        line, column = (node.end_lineno, node.end_col_offset) if at_end else (node.lineno, node.col_offset)
        begin = starts[line - 1]
        return begin + len(text[begin:].encode()[:column].decode())

    for node in _nodes(ast.parse(text)):
        for start, end, new in _faults(node, text, place):
            if (str(path.relative_to(ROOT)), text[start:end], new) not in SAME:
                yield Mutant(str(path.relative_to(ROOT)), start, end, new, node.lineno)


def _nodes(node: ast.AST) -> Iterator[ast.AST]:
    for child in ast.iter_child_nodes(node):
        named = isinstance(child, (ast.FunctionDef, ast.ClassDef)) and child.name in ("__repr__", "__str__")
        words = isinstance(child, ast.Call) and getattr(child.func, "id", "") in ("warn", "ValueError")
        if not (isinstance(child, _PASSED_OVER) or named or words):
            yield child
            yield from _nodes(child)


def _faults(node: ast.AST, text: str, place: Callable[..., int]) -> Iterator[tuple[int, int, str]]:
    if isinstance(node, ast.BinOp) and (new := _SWAPS.get(type(node.op))) is not None:
        between = place(node.left, True), place(node.right)
        old = next((c for c in text[slice(*between)] if c in "+-*/"), None)
        if old is not None and not isinstance(node.left, (ast.Constant, ast.List)):
            at = between[0] + text[slice(*between)].index(old)
            yield at, at + 1, new
    elif isinstance(node, ast.Compare) and len(node.ops) == 1 and (new := _OPPOSITE.get(type(node.ops[0]))):
        start, between = place(node.left, True), text[place(node.left, True) : place(node.comparators[0])]
        old = between.strip("() \n")
        yield start + between.index(old), start + between.index(old) + len(old), new
    elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub) and not isinstance(node.operand, ast.Constant):
        yield place(node), place(node) + 1, ""
    elif isinstance(node, ast.Call):
        name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
        if name in _NAMES and text[place(node.func, True) - len(name) : place(node.func, True)] == name:
            yield place(node.func, True) - len(name), place(node.func, True), _NAMES[name]
    elif isinstance(node, ast.IfExp):
        yield place(node.test), place(node.test, True), f"not ({text[place(node.test) : place(node.test, True)]})"


def chosen(count: int, seed: int) -> list[Mutant]:
    """So many faults, as many in each room."""
    rng, found = random.Random(seed), []
    for index, room in enumerate(ROOMS):
        share = count * (index + 1) // len(ROOMS) - count * index // len(ROOMS)
        every = [mutant for path in sorted((ROOT / "pplvi" / room).rglob("*.py")) for mutant in mutants(path)]
        found += rng.sample(every, min(share, len(every)))
    return found


def tests_of(path: str) -> list[str]:
    """The tests that have to notice: the module's own examples first."""
    inside = path.removeprefix("pplvi/")
    return [path, *TESTS[max((prefix for prefix in TESTS if inside.startswith(prefix)), key=len)]]


def fate(mutant: Mutant, seconds: float) -> str:
    """Whether a test fails, or a run of them does not end in so many seconds."""
    with tempfile.TemporaryDirectory() as folder:
        for name in ("pplvi", "tests"):
            shutil.copytree(ROOT / name, Path(folder) / name, ignore=shutil.ignore_patterns("__pycache__"))
        for name in ("conftest.py", "pyproject.toml"):
            shutil.copy(ROOT / name, folder)
        file = Path(folder) / mutant.path
        text = file.read_text()
        file.write_text(text[: mutant.start] + mutant.new + text[mutant.end :])
        command = [sys.executable, "-m", "pytest", "-q", "-x", "-n0", "-p", "no:cacheprovider", *tests_of(mutant.path)]
        try:
            run = subprocess.run(
                command,
                cwd=folder,
                env={**os.environ, "PYTHONPATH": folder},
                capture_output=True,
                timeout=seconds,
                check=False,
            )
        except subprocess.TimeoutExpired:
            return "hung"
    return "killed" if run.returncode else "SURVIVED"


def main() -> int:
    """Run a number of mutants; the exit status says whether enough were killed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=os.cpu_count())
    parser.add_argument(
        "--seconds", type=float, default=600, help="after which a run of tests hangs; more on a busy machine"
    )
    parser.add_argument("--part", default="0/1", help="the k-th of n parts, k/n")
    options = parser.parse_args()
    part, parts = map(int, options.part.split("/"))
    faults = chosen(options.count, options.seed)[part::parts]
    with ThreadPoolExecutor(options.jobs) as pool:
        survived = 0
        for mutant, end in zip(faults, pool.map(lambda each: fate(each, options.seconds), faults), strict=True):
            survived += end == "SURVIVED"
            print(f"{end:<8}", mutant.described((ROOT / mutant.path).read_text()), flush=True)
    print(f"{len(faults) - survived} of {len(faults)} killed or hung")
    return survived > len(faults) // 20


if __name__ == "__main__":
    sys.exit(main())
