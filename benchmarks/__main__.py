"""Run the benchmarks, one after another, each in a process of its own.

    python -m benchmarks --list
    python -m benchmarks --only gradients levels --out results
    python -m benchmarks --quick
    python -m benchmarks --only speed -- --only hmm

What stands behind ``--`` is handed to each of them; ``python -m benchmarks.speed --help`` lists what one takes.
``--quick`` runs them in small, to see that they work: the numbers mean nothing. Each writes a file of results with the
date, versions of Python and the libraries, and the machine.
"""

import argparse
import ast
import os
import subprocess
import sys
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from time import perf_counter

from benchmarks.reporting import Table

FOLDER = Path(__file__).parent
NAMES = (
    "annealed_kernels",
    "annealing_ring",
    "bars_and_stripes",
    "boltzmann",
    "conjugate",
    "deep_boltzmann",
    "deep_boltzmann_large",
    "directed",
    "distributed",
    "flows",
    "gradients",
    "hmm_heuristics",
    "levels",
    "mixture_vae",
    "nested_gradients",
    "particle_ways",
    "posteriors",
    "race",
    "pyro_examples",
    "restricted_boltzmann",
    "scale",
    "sparse_coding",
    "speed",
    "undirected",
    "wake_sleep",
)


def title(name: str) -> str:
    """What a benchmark measures: the first line of its module."""
    return (ast.get_docstring(ast.parse((FOLDER / f"{name}.py").read_text())) or "").splitlines()[0]


def command(name: str, out: Path, quick: bool, options: Sequence[str] = ()) -> list[str]:
    """The command that runs one benchmark."""
    small = import_module(f"benchmarks.{name}").QUICK.split() if quick else []
    return [sys.executable, "-m", f"benchmarks.{name}", *small, *options, "--out", str(out / f"{name}.json")]


def run(names: Sequence[str], out: Path, quick: bool, options: Sequence[str] = ()) -> int:
    """Run benchmarks, say how long each took, and return how many failed."""
    out = out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    environment = {"OMP_NUM_THREADS": "1", **os.environ}
    rows = []
    for name in names:
        print(f"\n{name}: {title(name)}\n", flush=True)
        start = perf_counter()
        code = subprocess.run(command(name, out, quick, options), cwd=FOLDER.parent, env=environment).returncode
        rows.append((name, perf_counter() - start, f"failed ({code})" if code else "done"))
    print("\n" + Table({"benchmark": "<22", "seconds": "8.1f", "": "<10"}).text(rows))
    return sum(outcome != "done" for *_, outcome in rows)


def main(arguments: Sequence[str] | None = None) -> int:
    """List the benchmarks or run them; the number of those that failed."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    end = given.index("--") if "--" in given else len(given)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--list", action="store_true", help="say what there is, and run nothing")
    parser.add_argument("--only", nargs="+", metavar="NAME", choices=NAMES, default=NAMES)
    parser.add_argument("--quick", action="store_true", help="in small, to see that they run")
    parser.add_argument("--out", type=Path, default=Path("out/benchmarks"), help="folder for the results")
    chosen = parser.parse_args(given[:end])
    if chosen.list:
        print(Table({"benchmark": "<22", "what it measures": "<10"}).text((name, title(name)) for name in chosen.only))
        return 0
    return run(chosen.only, chosen.out, chosen.quick, given[end + 1 :])


if __name__ == "__main__":
    sys.exit(main())
