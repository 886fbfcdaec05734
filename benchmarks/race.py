"""CPU seconds to a usable posterior, on fourteen problems: the methods of this package, and NUTS where it is installed.

    python -m benchmarks.race --data ../shared/data/race --methods auto smc
    python -m benchmarks.race --methods numpyro nutpie --out benchmarks/results/race_peers.json
    python -m benchmarks.race --show benchmarks/results/race.json benchmarks/results/race_peers.json

A posterior is usable where means are off by at most .1 sd and sds by at most 15 %, the worst of all scalars, on the
draws that are handed over and against long reference runs. Each run is a process of its own with one thread and an
empty folder for what compilers keep; CPU seconds are those of the process and its children, from the call of the method
to draws by name, imports apart.

Methods: "auto", "smc", "nuts" or a guide of pplvi by its name, such as AutoPathfinder, whose draws are resampled;
"numpyro", "nutpie" and "blackjax", whose draws are those of 4 chains of 500 after 500 steps, take part where they are
installed (pip install -c constraints.txt -e '.[bench]').
"""

import argparse
import json
import math
import os
import resource
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import pplvi
from benchmarks.race_peers import PEERS, Peer
from benchmarks.race_problems import NAMES, Draws, Problem, load
from benchmarks.reporting import Table, command_line, rows_of, write

QUICK = "--problems schools --methods AutoPathfinder --seeds 0"

RESULTS = Path(__file__).parent / "results" / "race.json"
OURS = ("pplvi.fitting", "torch.fx.experimental.symbolic_shapes", "torch._dynamo", "arviz")
ONE_THREAD = {
    "OMP_NUM_THREADS": "1",
    "TORCHINDUCTOR_COMPILE_THREADS": "1",
    "NUMBA_NUM_THREADS": "1",
    "RAYON_NUM_THREADS": "1",
    "XLA_FLAGS": "--xla_cpu_multi_thread_eigen=false",
}
MEAN, SD = 0.1, 0.15  # what is usable
DRAWS = 4_000
COLUMNS = {
    "problem": "<16",
    "method": "<16",
    "seed": "4",
    "usable": "<6",
    "mean error": "10.3f",
    "sd error": "8.3f",
    "CPU s": "7.1f",
    "MB": "6.0f",
    "verdict": "<30",
}
KEY = ("problem", "method", "seed")
Row = dict[str, Any]


def cpu_seconds() -> float:
    """Of this process and its children."""
    return sum(os.times()[:4])


def ours(problem: Problem, method: str, seed: int, budget: float | None) -> tuple[Draws, str]:
    """Draws by a method of this package, of equal weight, and its verdict."""
    guide = method if method in ("auto", "smc", "nuts") else getattr(pplvi, method)
    options: dict[str, Any] = {"budget": budget} if method in ("auto", "smc") and budget is not None else {}
    if method == "nuts":
        options = {"num_steps": 500, "num_warmup": 500, "restarts": 4}
    fit = pplvi.fit(problem.model, guide, args=problem.args, seed=seed, progress=False, **options)
    posterior = fit.posterior(DRAWS)
    if posterior.is_mcmc:
        return {**posterior.draws.latents, **posterior.draws.deterministics}, posterior.verdict.word
    return posterior.resample(seed=seed, deterministics=True), posterior.verdict.word


def theirs(peer: Peer, problem: Problem, seed: int) -> tuple[Draws, str]:
    """Draws by another package, and what it says of them."""
    draws, divergences = peer.run(problem, seed)
    return draws, f"{divergences} divergences"


def errors(problem: Problem, draws: Draws) -> tuple[float, float]:
    """The largest error of a mean, in sds, and of an sd, relative."""
    scalars: Tensor = problem.scalars(draws)
    found = scalars.double().numpy()
    mean = np.abs(found.mean(0) - problem.mean) / problem.sd
    return float(mean.max()), float(np.abs(found.std(0) / problem.sd - 1).max())


def work(problem: str, method: str, seed: int, data: str, budget: float | None) -> Row:
    """One run, in this process."""
    torch.set_num_threads(1)
    given = load(Path(data), problem)
    torch.set_default_dtype(given.dtype)
    peer = PEERS.get(method)
    row: Row = {"problem": problem, "method": method, "seed": seed}
    for module in peer.modules if peer else OURS:  # imports apart: torch and pplvi have some at first use
        import_module(module)
    start, wall = cpu_seconds(), time.perf_counter()
    try:
        draws, verdict = theirs(peer, given, seed) if peer else ours(given, method, seed, budget)
    except ValueError as error:
        return {**row, "failure": str(error), "cpu_seconds": cpu_seconds() - start}
    spent = cpu_seconds() - start
    mean, sd = errors(given, draws)
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return {
        **row,
        "mean_error": mean,
        "sd_error": sd,
        "usable": mean <= MEAN and sd <= SD,
        "cpu_seconds": spent,
        "wall_seconds": time.perf_counter() - wall,
        "memory_mb": memory,
        "load": os.getloadavg()[0],
        "verdict": verdict,
    }


def apart(order: dict[str, Any], limit: float, module: str = "benchmarks.race") -> Row:
    """One run of a benchmark, in a process of its own; killed after so many CPU seconds."""
    root = Path(__file__).parents[1]
    command = [sys.executable, "-m", module, "--worker", json.dumps(order)]
    with tempfile.TemporaryDirectory() as folder:
        environment = {**os.environ, **ONE_THREAD, "JAX_PLATFORMS": "cpu"}
        environment |= {"TORCHINDUCTOR_CACHE_DIR": folder, "NUMBA_CACHE_DIR": folder}
        environment |= {"PYTENSOR_FLAGS": f"base_compiledir={folder}"}
        limited = partial(resource.setrlimit, resource.RLIMIT_CPU, (math.ceil(limit), math.ceil(limit) + 1))
        run = subprocess.run(
            command, cwd=root, capture_output=True, text=True, env=environment, check=False, preexec_fn=limited
        )
    row = {key: value for key, value in order.items() if key not in ("data", "budget")}
    if run.returncode == -signal.SIGXCPU:
        return {**row, "failure": f"not done after {limit:.0f} CPU s"}
    if run.returncode:
        return {**row, "failure": run.stderr.strip().splitlines()[-1]}
    found: Row = json.loads(run.stdout.strip().splitlines()[-1])
    return found


def merged(options: argparse.Namespace, row: Row) -> None:
    """Write a row into the file of results, in the place of an older one."""
    kept = [r for r in rows_of(options.out) if [r[k] for k in KEY] != [row[k] for k in KEY]] if options.out else []
    write(options, rows=sorted([*kept, row], key=lambda r: (NAMES.index(r["problem"]), r["method"], r["seed"])))


def cells(row: Row) -> list[Any]:
    """A row of the table."""
    first = [row[k] for k in KEY]
    if "failure" in row:
        return [*first, "failed", None, None, row.get("cpu_seconds"), None, row["failure"]]
    shown = [row[k] for k in ("mean_error", "sd_error", "cpu_seconds", "memory_mb", "verdict")]
    return [*first, "yes" if row["usable"] else "no", *shown]


def medians(rows: Sequence[Row]) -> str:
    """CPU seconds of each method on each problem, medians over seeds; in brackets where not all were usable."""
    methods = list(dict.fromkeys(row["method"] for row in rows))
    lines = []
    for problem in [name for name in NAMES if any(row["problem"] == name for row in rows)]:
        line: list[str] = [problem]
        for method in methods:
            found = [row for row in rows if (row["problem"], row["method"]) == (problem, method)]
            seconds = [row["cpu_seconds"] for row in found if "cpu_seconds" in row]
            good = sum(row.get("usable", False) for row in found)
            text = f"{statistics.median(seconds):.1f}" if seconds else "-"
            line.append(text if good == len(found) else f"({text}: {good} of {len(found)})")
        lines.append(line)
    return Table({"problem": "<16", **dict.fromkeys(methods, "<20")}).text(lines)


def done_already(
    options: argparse.Namespace, medians: Callable[[Sequence[Row]], str], work: Callable[..., Row]
) -> list[Row] | None:
    """What a command returns that was asked to show results, or to be a worker; ``None`` if all is to be run."""
    if options.show:
        rows = [row for path in options.show for row in rows_of(path)]
        print(medians(rows))
        return rows
    if options.worker:
        print(json.dumps(work(**options.worker)))
        return []
    return None


def main(arguments: Sequence[str] | None = None) -> list[Row]:
    """Run the race, or a part of it."""
    parser = command_line(__doc__)
    parser.add_argument("--data", type=Path, default=Path("../shared/data/race"))
    parser.add_argument("--problems", nargs="+", default=list(NAMES), choices=NAMES)
    parser.add_argument("--methods", nargs="+", default=["auto", "smc", "numpyro"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--budget", type=float, help="CPU seconds of auto and smc")
    parser.add_argument(
        "--limit", type=float, default=600.0, help="CPU seconds after which a run is killed, imports included"
    )
    parser.add_argument("--show", nargs="+", type=Path, help="files of results: print their medians, and run nothing")
    parser.add_argument("--worker", type=json.loads, help=argparse.SUPPRESS)
    parser.set_defaults(out=RESULTS)
    options = parser.parse_args(arguments)
    if (done := done_already(options, medians, work)) is not None:
        return done
    table, rows = Table(COLUMNS), list[Row]()
    for problem in options.problems:
        for method in options.methods:
            if method in PEERS and not PEERS[method].installed:
                continue
            for seed in options.seeds:
                order = {"problem": problem, "method": method, "seed": seed}
                order |= {"data": str(options.data.resolve()), "budget": options.budget}
                row = apart(order, options.limit)
                rows.append(row)
                table.show(*cells(row))
                merged(options, row)
    print("\n" + medians(rows))
    return rows


if __name__ == "__main__":
    main()
