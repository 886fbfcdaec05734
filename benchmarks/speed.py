"""Milliseconds a training step, seconds of compilation, and seconds to a converged fit, beside Pyro and NumPyro.

Every way of training takes the same steps: Adam, the same model, guide and number of particles, one thread. Pyro trains
the ring by Trace_ELBO, as it has no nested objective; "eager" is this package without a graph.

The first call of each way is timed in a process of its own, in an empty folder for what compilers keep (cold) and
again in the folder that it left (warm); imports of the libraries are not counted, compilers' processes are. The clock
of "converged" starts at the call too, and stops at the first of every 100 steps with an ELBO within 0.1 nat of the
family's best. Steps are timed for all ways in one process, in turns; ratios are medians over the turns. A way has paid
for itself at the step from which on it has used less CPU time than Pyro, first calls included.

NumPyro takes part where it is installed (pip install -c constraints.txt -e '.[bench]'). Rows that are not measured anew
are kept, so the table can be made one problem at a time:

    python -m benchmarks.speed --out speed.json --only schools logistic-100/numpyro logistic-100/max
"""

import argparse
import importlib.util
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from fnmatch import fnmatch
from functools import partial
from pathlib import Path
from time import perf_counter, process_time
from typing import Any

import pyro
import pyro.infer
import torch

from benchmarks.reporting import Table, command_line, rows_of, write
from benchmarks.speed_problems import NUMPYRO, PROBLEMS, Problem, numpyro_programs
from pplvi.compile import CompiledSVI
from pplvi.losses import ELBO

QUICK = "--only hierarchical/eager"

BLOCK = 100  # steps between two looks at the ELBO, and in one call where a way takes several
MAX_STEPS = 6000
TURN_SECONDS, TURNS = 0.2, 7
WAYS = ("pyro", "pyro jit", "eager", "trace", "compiled", "max", "numpyro", "bare torch")
KEPT = ("compiled", "max")  # ways with a warm start
TO_CONVERGENCE = ("schools", "schools-100", "logistic-100")

Advance = Callable[[int], Any]
Row = dict[str, Any]


# ---------------------------------------------------------------------- ways


def start(way: str, name: str, data: str | None) -> tuple[Advance, Callable[[], float]]:
    """A function that takes steps, and one that estimates the ELBO."""
    pyro.set_rng_seed(0)
    problem = PROBLEMS[name](data)
    if way == "numpyro":
        return numpyro_svi(name, problem)
    if way == "bare torch":
        return bare_torch(problem), lambda: many_particles(problem)
    optim = pyro.optim.Adam({"lr": problem.lr})
    if way in ("trace", "compiled", "max"):
        mode: Any = True if way == "compiled" else way
        svi = CompiledSVI(problem.model, problem.guide, optim, problem.loss, mode=mode, chunk=BLOCK)
        return lambda n: svi.run(n, *problem.args)[-1].item(), lambda: many_particles(problem)
    loss = problem.loss if way == "eager" else pyro_loss(way, name, problem.particles)
    slow = pyro.infer.SVI(problem.model, problem.guide, optim, loss)
    return lambda n: [slow.step(*problem.args) for _ in range(n)], lambda: many_particles(problem)


def pyro_loss(way: str, name: str, particles: int) -> Any:
    kind = "TraceEnum_ELBO" if name == "hmm" else "Trace_ELBO"
    nesting = {"hmm": 0, "ring": 0}.get(name, 1)
    options = {"num_particles": particles, "vectorize_particles": particles > 1, "max_plate_nesting": nesting}
    jit = {"ignore_jit_warnings": True} if way == "pyro jit" else {}
    return getattr(pyro.infer, f"Jit{kind}" if jit else kind)(**options, **jit)


def bare_torch(problem: Problem) -> Advance:
    networks = problem.model.__self__
    optimizer = torch.optim.Adam(networks.parameters(), lr=problem.lr)

    def steps(n: int) -> None:
        for _ in range(n):
            optimizer.zero_grad()
            loss = networks.bare_loss(*problem.args)
            loss.backward()
            optimizer.step()

    return steps


def numpyro_svi(name: str, problem: Problem) -> tuple[Advance, Callable[[], float]]:
    """NumPyro's SVI, a block of steps in one ``lax.scan``."""
    import jax
    import numpyro
    from numpyro.infer import SVI, Trace_ELBO

    model, guide = numpyro_programs(name)
    arrays = tuple(jax.numpy.asarray(x.numpy()) for x in problem.args)
    svi = SVI(model, guide, numpyro.optim.Adam(problem.lr), Trace_ELBO(num_particles=problem.particles))
    state = svi.init(jax.random.PRNGKey(0), *arrays)

    @partial(jax.jit, static_argnums=1)
    def block(state: Any, n: int) -> Any:
        return jax.lax.scan(lambda s, _: svi.update(s, *arrays), state, None, length=n)

    def steps(n: int) -> None:
        nonlocal state
        for taken in [BLOCK] * (n // BLOCK) or [n]:
            state, losses = block(state, taken)
        losses.block_until_ready()

    def elbo() -> float:
        loss = Trace_ELBO(num_particles=20_000)
        return -float(loss.loss(jax.random.PRNGKey(1), svi.get_params(state), model, guide, *arrays))

    return steps, elbo


def ways_of(name: str) -> list[str]:
    skipped = set() if name == "vae" else {"bare torch"}
    if name.split("-")[0] not in NUMPYRO or importlib.util.find_spec("numpyro") is None:
        skipped |= {"numpyro"}
    return [way for way in WAYS if way not in skipped]


# ---------------------------------------------------------------------- measuring


def cpu() -> float:
    """Seconds of this process and of the compilers that it has waited for."""
    return sum(os.times()[:4])


def many_particles(problem: Problem) -> float:
    """The ELBO from 20,000 draws: its error has to be well below the 0.1 nat that are asked about."""
    return statistics.mean(-ELBO(1000).loss(problem.model, problem.guide, *problem.args) for _ in range(20))


def best_elbo(name: str, data: str | None) -> float:
    """What the family reaches: a long run with a falling learning rate."""
    pyro.set_rng_seed(0)
    p = PROBLEMS[name](data)
    optim = pyro.optim.Adam({"lr": p.lr})
    CompiledSVI(p.model, p.guide, optim, ELBO(100), schedule=lambda t: 0.9995**t).run(10_000, *p.args)
    return many_particles(p)


def first_call(way: str, name: str, data: str | None, best: float | None) -> Row:
    """Seconds of the first call, and to convergence."""
    if way == "numpyro":
        import numpyro.infer.autoguide  # noqa: F401
    wall, busy = perf_counter(), cpu()
    advance, elbo = start(way, name, data)
    advance(BLOCK if way in ("max", "numpyro") else 1)
    row: Row = {"cpu": cpu() - busy, "wall": perf_counter() - wall}
    return row if best is None else row | converged(advance, elbo, best, row)


def converged(advance: Advance, elbo: Callable[[], float], best: float, spent: Row) -> Row:
    wall, busy = spent["wall"], spent["cpu"]
    for block in range(1, MAX_STEPS // BLOCK + 1):
        before = perf_counter(), cpu()
        advance(BLOCK)
        wall, busy = wall + perf_counter() - before[0], busy + cpu() - before[1]
        if elbo() > best - 0.1:
            return {"converged_cpu": busy, "converged_wall": wall, "converged_steps": block * BLOCK}
    return {"converged_cpu": None}


def in_turns(ways: Sequence[str], name: str, data: str | None) -> dict[str, Row]:
    """Milliseconds a step of all ways, in turns; the first one that works is what the others are compared to."""
    stores: dict[str, Any] = {}
    rows: dict[str, Row] = {}
    advances: dict[str, tuple[Advance, int]] = {}
    for way in ways:
        with pyro.get_param_store().scope() as stores[way]:
            try:
                advance, _ = start(way, name, data)
                advance(BLOCK)
                blocks = TURN_SECONDS / BLOCK / max(timed(advance, BLOCK)[0], 1e-6)
                advances[way] = advance, BLOCK * round(blocks) or max(1, round(BLOCK * blocks))
            except Exception as error:  # a way that cannot train this problem is part of the table
                rows[way] = {"failed": f"{type(error).__name__}: {error}".splitlines()[0][:160]}
    turns: list[dict[str, tuple[float, float]]] = []
    for _ in range(TURNS):
        turns.append({})
        for way, (advance, n) in advances.items():
            with pyro.get_param_store().scope(stores[way]):
                turns[-1][way] = timed(advance, n)
    base = next(iter(advances), "")
    for way in advances:
        cpus, walls = ([1e3 * turn[way][i] for turn in turns] for i in (0, 1))
        times = statistics.median(turn[base][0] / turn[way][0] for turn in turns)
        rows[way] = {"cpu_ms": statistics.median(cpus), "wall_ms": statistics.median(walls), "times": times}
    return rows


def timed(advance: Advance, n: int) -> tuple[float, float]:
    """CPU and wall seconds a step."""
    wall, used = perf_counter(), process_time()
    advance(n)
    return (process_time() - used) / n, (perf_counter() - wall) / n


def work(task: str, name: str, data: str | None, **options: Any) -> Any:
    """What a process of its own does."""
    torch.set_num_threads(1)
    if task == "first":
        return first_call(options["way"], name, data, options["best"])
    return best_elbo(name, data) if task == "best" else in_turns(options["ways"], name, data)


def in_process(folder: str, **order: Any) -> Any:
    flags = "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1"
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags, "TMPDIR": folder}
    environment["TORCHINDUCTOR_CACHE_DIR"] = str(Path(folder, "inductor"))
    command = [sys.executable, "-m", "benchmarks.speed", "--worker", json.dumps(order)]
    root = Path(__file__).parents[1]
    run = subprocess.run(command, cwd=root, capture_output=True, text=True, env=environment, check=False)
    if run.returncode:
        return {"failed": (run.stderr.strip().splitlines() or ["no message"])[-1][:160]}
    return json.loads(run.stdout.splitlines()[-1])


def measure(name: str, ways: Sequence[str], data: str | None) -> list[Row]:
    """The rows of one problem."""
    common = {"name": name, "data": data}
    rows: dict[str, Row] = {way: {"problem": name, "way": way} for way in ways}
    with tempfile.TemporaryDirectory() as other, tempfile.TemporaryDirectory() as last:
        best = in_process(other, task="best", **common) if name in TO_CONVERGENCE else None
        for way in ways:
            with tempfile.TemporaryDirectory() as folder:
                for state in ("cold", "warm") if way in KEPT else ("cold",):
                    rows[way][state] = in_process(folder, task="first", way=way, best=best, **common)
        for way, row in in_process(last, task="steps", ways=list(dict.fromkeys(["pyro", *ways])), **common).items():
            if way in rows:
                rows[way] |= row
    return list(rows.values())


# ---------------------------------------------------------------------- the table


def pays_from(row: Row, base: Row | None, state: str) -> str:
    """The step from which on a way has used less time than the one that it is compared to."""
    if base is None or state not in row or "cpu_ms" not in row or row is base:
        return "-"
    gain = base["cpu_ms"] - row["cpu_ms"]
    return f"{max(0.0, row[state]['cpu'] - base['cold']['cpu']) * 1e3 / gain:.0f}" if gain > 0 else "never"


def table(rows: Sequence[Row]) -> str:
    """Rows as text, times in CPU seconds."""
    titles = {"CPU ms": "9.4f", "wall ms": "9.4f", "x faster": "9.1f", "cold s": "7.1f", "warm s": "7.1f"}
    titles |= {"pays from": "9", "(warm)": "7", "converged s": "11.1f", "(warm) s": "7.1f"}
    lines: list[list[Any]] = []
    for row in rows:
        failure = row.get("failed") or row["cold"].get("failed")
        if failure or "cpu_ms" not in row:
            lines.append([row["problem"], row["way"], *[None] * len(titles), failure])
            continue
        base = next((r for r in rows if r["problem"] == row["problem"] and "cpu_ms" in r and "cpu" in r["cold"]), None)
        cold, warm = row.get("cold", {}), row.get("warm", {})
        numbers = [row["cpu_ms"], row["wall_ms"], row["times"], cold.get("cpu"), warm.get("cpu")]
        pays = [pays_from(row, base, "cold"), pays_from(row, base, "warm")]
        converged = [cold.get("converged_cpu"), warm.get("converged_cpu")]
        lines.append([row["problem"], row["way"], *numbers, *pays, *converged, ""])
    return Table({"problem": "<14", "way": "<10", **titles, "failed": "<"}).text(lines)


def merged(old: Sequence[Row], new: Sequence[Row]) -> list[Row]:
    """Old rows, with the new ones in their places, in the order of the table."""
    found = {(row["problem"], row["way"]): row for row in [*old, *new]}
    return [found[name, way] for name in PROBLEMS for way in WAYS if (name, way) in found]


def main(arguments: Sequence[str] | None = None) -> list[Row]:
    """Measure, print and write."""
    parser = command_line(__doc__)
    parser.set_defaults(out=Path("speed.json"))
    parser.add_argument("--data", help="an .npz file with a matrix and a vector of labels")
    parser.add_argument("--only", nargs="+", default=["*"], help="problem or problem/way, with wildcards")
    parser.add_argument("--worker", type=json.loads, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.worker:
        print(json.dumps(work(**options.worker)))
        return []
    rows: list[Row] = rows_of(options.out)
    for name in PROBLEMS:
        chosen = [w for w in ways_of(name) if any(fnmatch(f"{name}/{w}", p) or fnmatch(name, p) for p in options.only)]
        if chosen:
            rows = merged(rows, measure(name, chosen, options.data))
            titles = {name: make(options.data).title for name, make in PROBLEMS.items()}
            write(options, problems=titles, rows=rows)
            print(table([row for row in rows if row["problem"] == name]), flush=True)
    return rows


if __name__ == "__main__":
    main()
