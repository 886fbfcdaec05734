"""Which flow AutoFlow takes unless told otherwise: families of flows, by the recipe for flows and without one.

    python -m benchmarks.flows --data ../shared/data/race
    python -m benchmarks.flows --show benchmarks/results/flows.json

Three ways of training: "recipe" is ``fit(model, AutoFlow, **flow_recipe())``, which starts at a Gaussian; "plain" is
2,000 steps of ``ELBO(16)`` by Adam at a rate of .01 from the guide's own start, and "fast" the same at .05. The ELBO
(nats), k-hat and effective draws are those of 10,000 draws after training; errors are those of benchmarks/race.py. Each
run is a process of its own with one thread and an empty folder for what compilers keep. It compares the families of
zuko (autoregressive and coupling splines, inverse autoregressive, affine coupling) and the quadratic couplings of
pplvi.
"""

import argparse
import json
import resource
import statistics
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

import pplvi
from benchmarks.race import Row, apart, cpu_seconds, done_already, errors
from benchmarks.race_problems import NAMES, load
from benchmarks.reporting import Table, command_line, write

QUICK = "--problems kidiq --flows iaf --ways plain --seeds 0"

RESULTS = Path(__file__).parent / "results" / "flows.json"
KEY = ("problem", "way", "flow", "seed")
FLOWS: dict[str, dict[str, Any]] = {
    "nsf": {"flow": "nsf"},
    "nsf, autoregressive": {"flow": "nsf", "passes": None},
    "iaf": {"flow": "iaf"},
    "nice": {"flow": "nice"},
    "quadratic": {"flow": "quadratic"},
}
_DRAWS = 10_000


def _adam(rate: float) -> dict[str, Any]:
    return {
        "objective": pplvi.ELBO(16),
        "optim": partial(torch.optim.Adam, lr=rate),
        "num_steps": 2000,
        "stop": None,
    }


WAYS = {"recipe": pplvi.flow_recipe(), "plain": _adam(0.01), "fast": _adam(0.05)}
COLUMNS = {
    "problem": "<12",
    "way": "<6",
    "flow": "<19",
    "seed": "4",
    "ELBO": "10.3f",
    "k-hat": "6.2f",
    "effective": "9.3f",
    "mean error": "10.3f",
    "sd error": "8.3f",
    "CPU s": "7.1f",
    "MB": "6.0f",
    "failure": "<20",
}


def work(problem: str, way: str, flow: str, seed: int, data: str) -> Row:
    """One run, in this process."""
    torch.set_num_threads(1)
    given = load(Path(data), problem)
    torch.set_default_dtype(given.dtype)
    row: Row = {"problem": problem, "way": way, "flow": flow, "seed": seed}
    guide = partial(pplvi.AutoFlow, **FLOWS[flow])
    start = cpu_seconds()
    try:
        fit = pplvi.fit(given.model, guide, args=given.args, seed=seed, progress=False, **WAYS[way])
        posterior = fit.posterior(_DRAWS)
        spent = cpu_seconds() - start
        mean, sd = errors(given, posterior.resample(seed=seed, deterministics=True))
    except ValueError as error:
        return {**row, "failure": str(error).splitlines()[0], "cpu_seconds": cpu_seconds() - start}
    return {
        **row,
        "elbo": posterior.elbo.value,
        "pareto_k": float(posterior.pareto_k.max()),
        "efficiency": float(posterior.ess.min()) / posterior.num_draws,
        "mean_error": mean,
        "sd_error": sd,
        "cpu_seconds": spent,
        "memory_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
    }


def cells(row: Row) -> list[Any]:
    """A row of the table."""
    shown = ("elbo", "pareto_k", "efficiency", "mean_error", "sd_error", "cpu_seconds", "memory_mb", "failure")
    return [row.get(key) for key in (*KEY, *shown)]


def medians(rows: Sequence[Row]) -> str:
    """ELBO and, in brackets, CPU seconds of each family, medians over seeds."""
    names = [flow for flow in FLOWS if any(row["flow"] == flow for row in rows)]
    lines = []
    for problem, way in dict.fromkeys((row["problem"], row["way"]) for row in rows):
        line = [problem, way]
        for flow in names:
            found = [row for row in rows if (row["problem"], row["way"], row["flow"]) == (problem, way, flow)]
            done = [row for row in found if "elbo" in row]
            seconds = statistics.median(row["cpu_seconds"] for row in done) if done else None
            bound = statistics.median(row["elbo"] for row in done) if done else None
            missing = f", {len(done)} of {len(found)}" if len(done) < len(found) else ""
            line.append(f"{bound:.2f} ({seconds:.0f} s{missing})" if done else "failed" if found else "-")
        lines.append(line)
    return Table({"problem": "<12", "way": "<6", **dict.fromkeys(names, "<20")}).text(lines)


def main(arguments: Sequence[str] | None = None) -> list[Row]:
    """Run the comparison, or a part of it."""
    parser = command_line(__doc__)
    parser.add_argument("--data", type=Path, default=Path("../shared/data/race"))
    problems = ["kidiq", "mixture", "schools", "schools_centered", "hs10", "ionosphere", "pois"]
    parser.add_argument("--problems", nargs="+", default=problems, choices=NAMES)
    parser.add_argument("--ways", nargs="+", default=list(WAYS), choices=list(WAYS))
    parser.add_argument("--flows", nargs="+", default=list(FLOWS), choices=list(FLOWS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--limit", type=float, default=240.0, help="CPU seconds after which a run is killed")
    parser.add_argument("--show", nargs="+", type=Path, help="files of results: print their medians, and run nothing")
    parser.add_argument("--worker", type=json.loads, help=argparse.SUPPRESS)
    parser.set_defaults(out=RESULTS)
    options = parser.parse_args(arguments)
    if (done := done_already(options, medians, work)) is not None:
        return done
    table, rows = Table(COLUMNS), list[Row]()
    for seed in options.seeds:
        for problem in options.problems:
            for way in options.ways:
                for flow in options.flows:
                    order = {"problem": problem, "way": way, "flow": flow, "seed": seed}
                    order["data"] = str(options.data.resolve())
                    row = apart(order, options.limit, "benchmarks.flows")
                    rows.append(row)
                    table.show(*cells(row))
                    write(options, rows=rows)
    print("\n" + medians(rows))
    return rows


if __name__ == "__main__":
    main()
