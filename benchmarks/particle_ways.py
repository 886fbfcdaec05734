"""Ways of running particles: carried by vmap against a loop, and against broadcasting.

Table 1 has programs that people write for one draw. Their densities at ``--draws`` draws of the guide are computed in a
loop and under vmap; "floor" is the same arithmetic in batched torch, without a program, where a program spends its time
in arithmetic and not in Python. Table 2 has the problems of benchmarks/speed.py: a training step with the same
particles, broadcast and carried. CPU milliseconds of one thread, medians of ``--rounds`` rounds in which the ways take
turns; ratios are medians over the rounds.

    python -m benchmarks.particle_ways --out benchmarks/results/particle_ways.json
"""

import argparse
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from time import process_time
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.infer import SVI
from pyro.infer.autoguide import AutoNormal
from pyro.nn import PyroModule, PyroSample
from torch import Tensor, nn

from benchmarks.reporting import Table, command_line, write
from benchmarks.speed_problems import PROBLEMS
from pplvi.losses import ELBO
from pplvi.programs import execute

QUICK = "--draws 8 --particles 2 --rounds 1 --seconds 0 --problems schools"

Row = dict[str, Any]
Turns = Mapping[str, Callable[[], Any]]
N = 60


def data() -> tuple[Tensor, Tensor, Tensor]:
    """Inputs ``(N, 3)``, groups ``(N,)`` and outputs ``(N,)``."""
    g = torch.Generator().manual_seed(0)
    x = torch.randn(N, 3, generator=g)
    return x, torch.randint(6, (N,), generator=g), x[:, 0] - x[:, 1] + 0.5 * torch.randn(N, generator=g)


def product(x: Tensor, group: Tensor, y: Tensor) -> None:
    b = pyro.sample("b", dist.Normal(torch.zeros(3), 1.0).to_event(1))
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Normal(x @ b, 0.5), obs=y)


def index(x: Tensor, group: Tensor, y: Tensor) -> None:
    with pyro.plate("groups", 6):
        a = pyro.sample("a", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Normal(a[group], 0.5), obs=y)


def stacked(x: Tensor, group: Tensor, y: Tensor) -> None:
    parts = [pyro.sample(f"b{i}", dist.Normal(0.0, 1.0)) for i in range(3)]
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Normal(x @ torch.stack(parts), 0.5), obs=y)


def walk(x: Tensor, group: Tensor, y: Tensor) -> None:
    at = torch.zeros(1)
    for t in range(10):
        at = torch.cat([at, (at[-1] + pyro.sample(f"z{t}", dist.Normal(0.0, 0.5)))[None]])
        pyro.sample(f"y{t}", dist.Normal(at[-1], 0.5), obs=y[t])


def slopes(x: Tensor, group: Tensor, y: Tensor) -> None:
    factor = pyro.sample("factor", dist.LKJCholesky(2, 2.0))
    sd = pyro.sample("sd", dist.HalfNormal(torch.ones(2)).to_event(1))
    with pyro.plate("groups", 6):
        ab = pyro.sample("ab", dist.MultivariateNormal(torch.zeros(2), scale_tril=torch.diag(sd) @ factor))
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Normal(ab[group, 0] + ab[group, 1] * x[:, 0], 0.5), obs=y)


def mixture(x: Tensor, group: Tensor, y: Tensor) -> None:
    w = pyro.sample("w", dist.Dirichlet(torch.ones(2)))
    with pyro.plate("components", 2):
        mu = pyro.sample("mu", dist.Normal(torch.tensor([-2.0, 2.0]), 1.0))
    with pyro.plate("data", len(y)):
        z = pyro.sample("z", dist.Categorical(w), infer={"enumerate": "parallel"})
        pyro.sample("y", dist.Normal(mu[z], 1.0), obs=y)


class Network(PyroModule):
    """Two layers with a prior on each weight."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = PyroModule[nn.Linear](3, 4), PyroModule[nn.Linear](4, 1)
        for layer, (wide, high) in ((self.first, (3, 4)), (self.last, (4, 1))):
            layer.weight = PyroSample(dist.Normal(0.0, 1.0).expand([high, wide]).to_event(2))
            layer.bias = PyroSample(dist.Normal(0.0, 1.0).expand([high]).to_event(1))

    def forward(self, x: Tensor, group: Tensor, y: Tensor) -> None:
        mean = self.last(torch.tanh(self.first(x))).squeeze(-1)
        with pyro.plate("data", len(y)):
            pyro.sample("y", dist.Normal(mean, 0.5), obs=y)


def process(x: Tensor, group: Tensor, y: Tensor) -> None:
    length = pyro.sample("length", dist.LogNormal(0.0, 0.5))
    gram = torch.exp(-0.5 * torch.cdist(x, x).square() / length**2) + 0.25 * torch.eye(len(x))
    pyro.sample("y", dist.MultivariateNormal(torch.zeros(len(x)), gram), obs=y)


def process_floor(x: Tensor, y: Tensor, values: Mapping[str, Tensor]) -> Tensor:
    """The densities of the Gaussian process at all length scales: Gram matrices, their factors, a solve."""
    length = values["length"].reshape(-1, 1, 1)
    gram = torch.exp(-0.5 * torch.cdist(x, x).square() / length**2) + 0.25 * torch.eye(len(x))
    factor = torch.linalg.cholesky(gram)
    solved = torch.linalg.solve_triangular(factor, y.unsqueeze(-1).expand(len(length), -1, 1), upper=False)
    return -0.5 * solved.square().sum((-2, -1)) - factor.diagonal(dim1=-2, dim2=-1).log().sum(-1)


@dataclass(frozen=True)
class Written:
    """A program of table 1: its latents that a guide draws, and what its arithmetic takes without a program."""

    make: Callable[[], Any]
    floor: Callable[[Tensor, Tensor, Mapping[str, Tensor]], Tensor] | None = None
    summed: Sequence[str] = ()


PROGRAMS = {
    "X @ b": Written(lambda: product),
    "a[group]": Written(lambda: index),
    "torch.stack": Written(lambda: stacked),
    "loop over time": Written(lambda: walk),
    "LKJ slopes": Written(lambda: slopes),
    "enumerated mixture": Written(lambda: mixture, summed=("z",)),
    "nn.Linear": Written(Network),
    "Gaussian process": Written(lambda: process, process_floor),
}

# ---------------------------------------------------------------------- measuring


def in_turns(steps: Turns, rounds: int, seconds: float) -> tuple[dict[str, float], dict[str, float]]:
    """Median CPU milliseconds of each step, and the median of the first one's time over each one's."""
    counts = {name: max(1, round(seconds / max(timed(step, 1), 1e-6))) for name, step in steps.items()}
    turns = [{name: timed(step, counts[name]) for name, step in steps.items()} for _ in range(rounds)]
    first = next(iter(steps))
    ratios = {name: statistics.median(turn[first] / max(turn[name], 1e-9) for turn in turns) for name in steps}
    return {name: 1e3 * statistics.median(turn[name] for turn in turns) for name in steps}, ratios


def timed(step: Callable[[], Any], count: int) -> float:
    """CPU seconds of one of several steps."""
    began = process_time()
    for _ in range(count):
        step()
    return (process_time() - began) / count


def written_row(name: str, options: argparse.Namespace) -> Row:
    """A program in a loop, carried, and its arithmetic alone."""
    pyro.set_rng_seed(0)
    pyro.clear_param_store()
    x, group, y = data()
    model = PROGRAMS[name].make()
    guide = AutoNormal(poutine.block(model, hide=list(PROGRAMS[name].summed)))

    def run(vectorize: Any) -> Tensor:
        return execute(model, guide, (x, group, y), {}, num_particles=options.draws, vectorize=vectorize).log_target()

    with torch.no_grad():
        run("vmap")  # the way is found
        steps: dict[str, Callable[[], Any]] = {"loop": lambda: run("loop"), "vmap": lambda: run("vmap")}
        if (floor := PROGRAMS[name].floor) is not None:
            found = execute(model, guide, (x, group, y), {}, num_particles=options.draws)
            values = {site: found.guide.nodes[site]["value"] for site in ("length",)}
            steps["floor"] = lambda: floor(x, y, values)
        ms, gain = in_turns(steps, options.rounds, 0.0)
    row = {"program": name, **{f"{way} ms": ms.get(way) for way in ("loop", "vmap", "floor")}}
    return row | {"vmap gains": gain["vmap"], "floor gains": gain.get("floor")}


def problem_row(name: str, options: argparse.Namespace) -> Row:
    """A training step of a problem of the speed table, broadcast and carried."""
    pyro.clear_param_store()
    problem = PROBLEMS[name](None)
    particles = problem.particles if problem.particles > 1 else options.particles
    row: Row = {"problem": problem.title, "particles": particles}
    steps: dict[str, Callable[[], Any]] = {}
    failures = []
    for way in ("broadcast", "vmap"):
        optim = pyro.optim.Adam({"lr": 0.0})  # both go on working at the same parameters
        loss: Any = ELBO(particles, vectorize_particles=way)  # type: ignore[arg-type]
        step = SVI(problem.model, problem.guide, optim, loss).step
        try:
            step(*problem.args)
        except ValueError as error:
            failures.append(f"{way}: {error}".splitlines()[0][:120])
            continue
        steps[way] = lambda step=step: step(*problem.args)
    ms, gain = in_turns(steps, options.rounds, options.seconds) if steps else ({}, {})
    row |= {f"{way} ms": ms.get(way) for way in ("broadcast", "vmap")}
    both = {"broadcast", "vmap"} <= steps.keys()
    return row | {"vmap / broadcast": 1 / gain["vmap"] if both else None, "failed": "; ".join(failures)}


def main(arguments: Sequence[str] | None = None) -> dict[str, list[Row]]:
    """Measure, print and write."""
    parser = command_line(__doc__)
    parser.add_argument("--draws", type=int, default=1000, help="of the first table")
    parser.add_argument("--particles", type=int, default=10, help="of the second, where a problem has one")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--seconds", type=float, default=0.2, help="of each turn of the second table")
    parser.add_argument("--programs", nargs="*", choices=[*PROGRAMS], default=[*PROGRAMS])
    parser.add_argument("--problems", nargs="*", choices=[*PROBLEMS], default=[n for n in PROBLEMS if n != "ring"])
    options = parser.parse_args(arguments)
    numbers = dict.fromkeys(("loop ms", "vmap ms", "floor ms"), "9.2f")
    written = Table({"program": "<20", **numbers, "vmap gains": "8.1f", "floor gains": "8.1f"})
    found: dict[str, list[Row]] = {"loop": [], "broadcast": []}
    for name in options.programs:
        found["loop"].append(written_row(name, options))
        written.show(*found["loop"][-1].values())
    print()
    numbers = dict.fromkeys(("broadcast ms", "vmap ms"), "9.2f")
    problems = Table({"problem": "<55", "particles": "d", **numbers, "vmap / broadcast": "8.2f", "failed": "<"})
    for name in options.problems:
        found["broadcast"].append(problem_row(name, options))
        problems.show(*found["broadcast"][-1].values())
    write(options, **found)
    return found


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
