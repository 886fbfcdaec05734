"""CPU seconds and peak memory as rows, groups, dimensions, sites, particles and data grow, with fitted exponents.

Each cell is a process of its own with one thread and at most four gigabytes of data (``RLIMIT_DATA``): one that wants
more has failed, which is a row too. Seconds are CPU seconds without imports and data; of steps, those of one after the
first ones. An exponent is the slope of log seconds over log size between the two largest sizes: below
one while fixed costs show, one where work is proportional. NumPyro takes the same steps where it is installed. Cells
that ``--out`` has already are not measured again, so that the table can be made in several sittings; ``load`` is the
load of the machine when a cell began, to tell those that shared its cores.
"""

import argparse
import importlib.util
import json
import math
import os
import resource
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from time import process_time
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro.infer.autoguide import AutoNormal

import pplvi
from benchmarks.reporting import Table, command_line, rows_of, write

QUICK = "--only particles --most 100"

LIMIT = 4 * 2**30  # bytes
COLUMNS = 20
Cell = Callable[[int], float]  # from the size to CPU seconds


def regression(rows: int) -> tuple[Any, tuple[Any, ...]]:
    """A logistic regression."""
    X = torch.randn(rows, COLUMNS)
    y = torch.bernoulli(torch.sigmoid(X @ torch.linspace(-1.0, 1.0, COLUMNS)))

    def model(X: Any, y: Any) -> None:
        b = pyro.sample("b", dist.Normal(torch.zeros(COLUMNS), 1.0).to_event(1))
        with pyro.plate("data", len(y)):
            pyro.sample("y", dist.Bernoulli(logits=(X @ b.unsqueeze(-1)).squeeze(-1)), obs=y)

    return model, (X, y)


def hierarchy(groups: int) -> tuple[Any, tuple[Any, ...]]:
    """Effects of groups with an observation each."""

    def model(y: Any) -> None:
        scale = pyro.sample("scale", dist.LogNormal(0.0, 1.0))
        with pyro.plate("group", len(y)):
            effect = pyro.sample("effect", dist.Normal(0.0, scale))
            pyro.sample("y", dist.Normal(effect, 1.0), obs=y)

    return model, (torch.randn(groups),)


def independent(dim: int) -> tuple[Any, tuple[Any, ...]]:
    """One vector of latents, each with an observation."""

    def model(y: Any) -> None:
        z = pyro.sample("z", dist.Normal(torch.zeros(dim), 1.0).to_event(1))
        pyro.sample("y", dist.Normal(z, 1.0).to_event(1), obs=y)

    return model, (torch.randn(dim),)


def chain(sites: int) -> tuple[Any, tuple[Any, ...]]:
    """A walk with a site a step."""

    def model(y: Any) -> None:
        z = torch.zeros(())
        for t in range(sites):
            z = pyro.sample(f"z{t}", dist.Normal(z, 1.0))
        pyro.sample("y", dist.Normal(z, 1.0), obs=y)

    return model, (torch.tensor(1.0),)


def step(problem: tuple[Any, tuple[Any, ...]], guide: Any = AutoNormal, particles: int = 1, **options: Any) -> float:
    """CPU seconds of a step of ``fit``."""
    model, args = problem
    looked: list[float] = []
    options = {"objective": pplvi.ELBO(particles), "num_steps": 8, "stop": None, "progress": False, **options}
    pplvi.fit(model, guide, args=args, seed=0, callbacks=[lambda run: looked.append(process_time())], **options)
    return (looked[-1] - looked[2]) / (len(looked) - 3)


def after(problem: tuple[Any, tuple[Any, ...]], guide: Any, use: Callable[[Any], Any], **options: Any) -> float:
    """CPU seconds of what is done with a fit."""
    model, args = problem
    fit = pplvi.fit(model, guide, args=args, num_steps=3, seed=0, stop=None, progress=False, **options)
    start = process_time()
    use(fit)
    return process_time() - start


def search(problem: tuple[Any, tuple[Any, ...]], guide: Any) -> float:
    """CPU seconds of a guide that finds itself."""
    model, args = problem
    start = process_time()
    pplvi.fit(model, guide, args=args, seed=0, progress=False)
    return process_time() - start


def leave_one_out(data: int) -> float:
    """CPU seconds of Pareto-smoothed leave-one-out from 4,000 draws of one latent."""
    y = torch.randn(data)

    def model(y: Any) -> None:
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(y)):
            pyro.sample("y", dist.Normal(z, 1.0), obs=y)

    def guide(y: Any) -> None:
        spread = (1.0 + len(y)) ** -0.5
        pyro.sample("z", dist.Normal(y.mean(), spread))

    importlib.import_module("arviz")
    start = process_time()
    pplvi.Posterior(model, guide, (y,), num_draws=4000, seed=0).loo()
    return process_time() - start


def hierarchical(model: Any) -> Any:
    """The guide that follows the plate."""
    return pplvi.AutoHierarchical(model, "group")


def draws(fit: Any) -> Any:
    """A thousand draws and what they weigh."""
    return fit.posterior(num_draws=1000).elbo


CELLS: dict[str, tuple[Cell, Sequence[int]]] = {
    "rows": (lambda n: step(regression(n)), (10**3, 10**4, 10**5, 10**6)),
    "rows, compiled": (lambda n: step(regression(n), compile=True), (10**3, 10**4, 10**5, 10**6)),
    "groups": (lambda n: step(hierarchy(n)), (10**3, 10**4, 10**5)),
    "groups, compiled": (lambda n: step(hierarchy(n), compile=True), (10**3, 10**4, 10**5)),
    "groups, 1,000 draws": (lambda n: after(hierarchy(n), AutoNormal, draws), (10**3, 10**4, 10**5)),
    "groups, AutoHierarchical": (lambda n: step(hierarchy(n), hierarchical), (10**3, 10**4, 10**5)),
    "groups, AutoHierarchical, 1,000 draws": (
        lambda n: after(hierarchy(n), hierarchical, draws),
        (10**3, 10**4, 10**5),
    ),
    "groups, AutoPathfinder": (lambda n: search(hierarchy(n), pplvi.AutoPathfinder), (10**2, 10**3, 10**4)),
    "dimensions": (lambda n: step(independent(n)), (10**2, 10**3, 10**4)),
    "dimensions, AutoPathfinder": (lambda n: search(independent(n), pplvi.AutoPathfinder), (10**2, 10**3, 10**4)),
    "dimensions, AutoBatchAndMatch": (
        lambda n: search(independent(n), pplvi.AutoBatchAndMatch),
        (10**2, 10**3, 10**4),
    ),
    "sites": (lambda n: step(chain(n)), (10, 100, 500)),
    "sites, recorded": (lambda n: step(chain(n), compile="trace"), (10, 100, 500)),
    "particles": (lambda n: step(hierarchy(8), particles=n), (10, 100, 1000, 10**4)),
    "particles, compiled": (
        lambda n: step(hierarchy(8), particles=n, compile=True),
        (10, 100, 1000, 10**4),
    ),
    "leave-one-out": (leave_one_out, (10**3, 10**4, 10**5)),
}
NUMPYRO = ("rows", "groups", "dimensions", "sites", "particles")


def numpyro_step(cell: str, size: int) -> float:
    """CPU seconds of a step of NumPyro."""
    import jax
    import jax.numpy as jnp
    import numpyro
    import numpyro.distributions as ndist
    from numpyro.infer import SVI, Trace_ELBO
    from numpyro.infer.autoguide import AutoNormal as TheirNormal

    def rows(X: Any, y: Any) -> None:
        b = numpyro.sample("b", ndist.Normal(jnp.zeros(COLUMNS), 1.0).to_event(1))
        with numpyro.plate("data", len(y)):
            numpyro.sample("y", ndist.Bernoulli(logits=X @ b), obs=y)

    def groups(y: Any) -> None:
        scale = numpyro.sample("scale", ndist.LogNormal(0.0, 1.0))
        with numpyro.plate("group", len(y)):
            effect = numpyro.sample("effect", ndist.Normal(0.0, scale))
            numpyro.sample("y", ndist.Normal(effect, 1.0), obs=y)

    def dimensions(y: Any) -> None:
        z = numpyro.sample("z", ndist.Normal(jnp.zeros(len(y)), 1.0).to_event(1))
        numpyro.sample("y", ndist.Normal(z, 1.0).to_event(1), obs=y)

    def sites(y: Any) -> None:
        z = 0.0
        for t in range(size):
            z = numpyro.sample(f"z{t}", ndist.Normal(z, 1.0))
        numpyro.sample("y", ndist.Normal(z, 1.0), obs=y)

    makers = {
        "rows": (rows, regression),
        "groups": (groups, hierarchy),
        "dimensions": (dimensions, independent),
        "sites": (sites, chain),
    }
    model, problem = makers.get(cell, (groups, hierarchy))
    particles = size if cell == "particles" else 1
    args = [jnp.asarray(x.numpy()) for x in problem(8 if cell == "particles" else size)[1]]
    svi = SVI(model, TheirNormal(model), numpyro.optim.Adam(0.01), Trace_ELBO(particles))
    state = svi.init(jax.random.PRNGKey(0), *args)
    update = jax.jit(svi.update)
    for _ in range(3):
        state, _ = update(state, *args)
    jax.block_until_ready(state)
    start = process_time()
    for _ in range(20):
        state, _ = update(state, *args)
    jax.block_until_ready(state)
    return (process_time() - start) / 20


def work(cell: str, size: int) -> dict[str, float]:
    """One cell, in this process."""
    torch.set_num_threads(1)
    resource.setrlimit(resource.RLIMIT_DATA, (LIMIT, LIMIT))
    pyro.set_rng_seed(0)
    theirs = cell.removesuffix(", NumPyro")
    seconds = CELLS[cell][0](size) if theirs == cell else numpyro_step(theirs, size)
    return {"seconds": seconds, "peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024}


def measured(cell: str, size: int, timeout: float) -> dict[str, Any]:
    """A row of the table; without seconds, the reason."""
    command = [sys.executable, "-m", "benchmarks.scale", "--worker", cell, str(size)]
    row: dict[str, Any] = {"cell": cell, "size": size, "load": os.getloadavg()[0]}
    try:
        found = subprocess.run(command, capture_output=True, text=True, timeout=timeout, check=True).stdout
    except subprocess.TimeoutExpired:
        return {**row, "failed": f"over {timeout:.0f} s"}
    except subprocess.CalledProcessError as error:
        return {**row, "failed": (error.stderr.strip().splitlines() or ["killed"])[-1][:100]}
    return {**row, **json.loads(found.splitlines()[-1])}


def asked(names: Sequence[str], most: int) -> list[tuple[str, int]]:
    """Cells and sizes, of NumPyro where it is installed, up to a size."""
    theirs = importlib.util.find_spec("numpyro") is not None
    found = []
    for name in names:
        for cell in (name, f"{name}, NumPyro") if theirs and name in NUMPYRO else (name,):
            found += [(cell, size) for size in CELLS[name][1] if size <= most]
    return found


def ordered(known: Mapping[tuple[str, int], dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows in the order of the cells, and of sizes in each."""
    places = {name: place for place, name in enumerate(CELLS)}
    return [known[key] for key in sorted(known, key=lambda key: (places[key[0].removesuffix(", NumPyro")], key))]


def exponents(rows: Sequence[dict[str, Any]]) -> dict[str, float]:
    """The slope of log seconds between the two largest sizes of each cell that were done."""
    found = {}
    for cell in dict.fromkeys(row["cell"] for row in rows):
        own = (row for row in rows if row["cell"] == cell and "seconds" in row)
        done = [(math.log(row["size"]), math.log(row["seconds"])) for row in own]
        if len(done) > 1:
            (x, a), (y, b) = done[-2:]
            found[cell] = (b - a) / (y - x)
    return found


def main(arguments: Sequence[str] | None = None) -> list[dict[str, Any]]:
    """Measure, print and write."""
    parser = command_line(__doc__)
    parser.add_argument("--only", nargs="+", choices=CELLS, default=list(CELLS))
    parser.add_argument("--most", type=int, default=10**9, help="leave out larger sizes")
    parser.add_argument("--timeout", type=float, default=600.0, help="wall seconds of a cell")
    parser.add_argument("--worker", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.worker:
        print(json.dumps(work(options.worker[0], int(options.worker[1]))))
        return []
    table = Table({"cell": "<38", "size": "8d", "seconds": "10.4f", "peak MB": "8.0f", "load": "5.1f", "failed": "<"})
    known = {(row["cell"], row["size"]): row for row in (rows_of(options.out) if options.out else [])}
    for cell, size in asked(options.only, options.most):
        if "seconds" not in known.get((cell, size), {}):
            known[cell, size] = measured(cell, size, options.timeout)
            write(options, rows=ordered(known), exponents=exponents(ordered(known)))
        row = known[cell, size]
        peak = row["peak"] / 1e6 if "peak" in row else None
        table.show(cell, size, row.get("seconds"), peak, row.get("load"), row.get("failed"))
    write(options, rows=ordered(known), exponents=exponents(ordered(known)))
    print()
    shown = Table({"cell": "<38", "exponent": "8.2f"})
    for item in exponents(ordered(known)).items():
        shown.show(*item)
    return ordered(known)


if __name__ == "__main__":
    if not Path("benchmarks").is_dir():
        raise SystemExit("run it from the root of the project, as python -m benchmarks.scale")
    main()
