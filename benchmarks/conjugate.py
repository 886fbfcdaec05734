"""Coordinate ascent on programs as they are written: bound, largest fall and CPU milliseconds of a sweep, and peers.

Each problem is fitted by :class:`pplvi.AutoConjugate` for a fixed number of sweeps: a mixture of normals on iris,
topics of 1,200 words, a hidden Markov model of 60 steps, probabilistic PCA with relevance on 500 digits of 50 pixels, a
local level of 200 steps with latent precisions, logistic regression with a latent precision on breast cancer (natural
gradients, Laplace). Reading is what running the program once with symbols costs, in CPU seconds. The stochastic fit is
a mixture of 20,000 data in batches of 200: what is left to the bound of the full fit after five passes, in nats. Tails
are those of the weights of the logistic regression, over ten times 4,000 draws, with the precision from the mean field
and from its exact conditional distribution. With ``--peers`` BayesPy and hmmlearn (``pip install bayespy hmmlearn``)
run from the same start until the bound stands still.

    python -m benchmarks.conjugate --out benchmarks/results/conjugate.json
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from time import process_time
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro.infer.autoguide import init_to_sample, init_to_value
from sklearn.datasets import load_breast_cancer, load_digits, load_iris
from torch import Tensor

from benchmarks.conjugate_peers import PEERS
from benchmarks.reporting import Table, command_line, table_of, write
from pplvi.compile.iterating import RecordedMap
from pplvi.compile.svi import CompileMode
from pplvi.guides import AutoConjugate, RobbinsMonro
from pplvi.guides.conjugate.ascent import ascend_bound, started
from pplvi.guides.conjugate.keeping import named_values
from pplvi.guides.conjugate.program import read_program
from pplvi.guides.conjugate.reading import Reading
from pplvi.posterior import Posterior

QUICK = "--sweeps 2 --data 400 --passes 1 --problems mixture --posteriors 1"


@dataclass(frozen=True)
class Problem:
    """A model, its data and what the guide is told.

    :ivar init: the first values of sites.
    """

    model: Callable[..., Any]
    args: tuple[Tensor, ...]
    init: Any = init_to_sample
    fallback: str | None = None


@dataclass(frozen=True)
class Row:
    """What a fit gave.

    :ivar fall: the largest relative fall of the bound from one sweep to the next; negative if it always rose.
    :ivar reading: CPU seconds to read the program.
    :ivar sweep: CPU milliseconds, without reading.
    :ivar traced: of a sweep that is recorded, ``compile="trace"``; ``None`` for fallbacks, which are not.
    :ivar compiled: of one that is compiled, ``compile=True``.
    """

    problem: str
    bound: float
    fall: float
    reading: float
    sweep: float
    traced: float | None
    compiled: float | None


def iris() -> Problem:
    """A mixture of five normals with diagonal precisions."""
    x, k = torch.tensor(load_iris().data), 5
    mean, variance = x.mean(0), x.var(0, unbiased=False)

    def model(x: Tensor) -> None:
        weights = pyro.sample("weights", dist.Dirichlet(torch.full((k,), 1.0 / k)))
        tau = pyro.sample("tau", dist.Gamma(torch.full((k, 4), 2.0), 2.0 * variance).to_event(2))
        mu = pyro.sample("mu", dist.Normal(mean, tau.rsqrt()).to_event(2))
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Categorical(weights))
            pyro.sample("x", dist.Normal(mu[z], tau[z].rsqrt()).to_event(1), obs=x)

    pyro.set_rng_seed(1)
    return Problem(model, (x,), init_to_value(values={"mu": x[torch.randperm(len(x))[:k]]}))


def topics() -> Problem:
    """Four topics of 50 words in 40 documents of 30."""
    words = torch.randint(50, (40, 30), generator=torch.Generator().manual_seed(0))

    def model(words: Tensor) -> None:
        with pyro.plate("topics", 4):
            phi = pyro.sample("phi", dist.Dirichlet(torch.full((50,), 0.1)))
        with pyro.plate("documents", 40, dim=-2):
            theta = pyro.sample("theta", dist.Dirichlet(torch.full((4,), 0.5)))
            with pyro.plate("words", 30, dim=-1):
                z = pyro.sample("z", dist.Categorical(theta))
                pyro.sample("w", dist.Categorical(phi[z]), obs=words)

    return Problem(model, (words,))


def markov() -> Problem:
    """A hidden Markov model of three states and six symbols, 60 steps."""
    x = torch.randint(6, (60,), generator=torch.Generator().manual_seed(0))

    def model(x: Tensor) -> None:
        start = pyro.sample("start", dist.Dirichlet(torch.full((3,), 1 / 3)))
        moves = pyro.sample("moves", dist.Dirichlet(torch.full((3, 3), 1 / 3)).to_event(1))
        emissions = pyro.sample("emissions", dist.Dirichlet(torch.full((3, 6), 1 / 6)).to_event(1))
        z: Any = None
        for t in pyro.markov(range(len(x))):
            z = pyro.sample(f"z_{t}", dist.Categorical(start if t == 0 else moves[z]))
            pyro.sample(f"x_{t}", dist.Categorical(emissions[z]), obs=x[t])

    return Problem(model, (x,))


def components() -> Problem:
    """Probabilistic PCA with automatic relevance, five components of 500 digits and 50 pixels."""
    x = torch.tensor(load_digits().data[:500])
    x = (x - x.mean(0))[:, x.std(0) > 0.5][:, :50]

    def model(x: Tensor) -> None:
        alpha = pyro.sample("alpha", dist.Gamma(1e-2, 1e-2).expand([5]).to_event(1))
        tau = pyro.sample("tau", dist.Gamma(1e-2, 1e-2))
        with pyro.plate("pixels", x.shape[1]):
            w = pyro.sample("w", dist.Normal(0.0, alpha.rsqrt()).to_event(1))
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(5), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z @ w.T, tau.rsqrt()).to_event(1), obs=x)

    pyro.set_rng_seed(0)
    ones = {"alpha": torch.ones(5), "tau": torch.tensor(1.0)}
    values = {"w": torch.randn(x.shape[1], 5), "z": torch.randn(len(x), 5), **ones}
    return Problem(model, (x,), init_to_value(values=values))


def level() -> Problem:
    """A local level of 200 steps, its two precisions latent."""
    y = torch.randn(200, generator=torch.Generator().manual_seed(0), dtype=torch.float64).cumsum(0)

    def model(y: Tensor) -> None:
        q = pyro.sample("q", dist.Gamma(2.0, 1.0))
        r = pyro.sample("r", dist.Gamma(2.0, 1.0))
        x = pyro.sample("x_0", dist.Normal(0.0, 1.0))
        for t in range(len(y)):
            if t > 0:
                x = pyro.sample(f"x_{t}", dist.Normal(x, q.rsqrt()))
            pyro.sample(f"y_{t}", dist.Normal(x, r.rsqrt()), obs=y[t])

    return Problem(model, (y,))


def logistic(fallback: str) -> Problem:
    """Logistic regression of breast cancer, the precision of its weights latent."""
    x, y = (torch.tensor(part, dtype=torch.float64) for part in load_breast_cancer(return_X_y=True))
    x = torch.cat([(x - x.mean(0)) / x.std(0, unbiased=False), torch.ones(len(x), 1)], 1)

    def model(x: Tensor, y: Tensor) -> None:
        alpha = pyro.sample("alpha", dist.Gamma(1.0, 1.0))
        w = pyro.sample("w", dist.Normal(torch.zeros(31), alpha.rsqrt()).to_event(1))
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Bernoulli(logits=x @ w), obs=y)

    return Problem(model, (x, y), fallback=fallback)


def million() -> Problem:
    """A regression on a million data far from zero, its two precisions latent."""
    generator = torch.Generator().manual_seed(0)
    x = 100 + torch.randn(1_000_000, generator=generator, dtype=torch.float64)
    y = 3 * x + torch.randn(len(x), generator=generator, dtype=torch.float64)

    def model(x: Tensor, y: Tensor) -> None:
        tau = pyro.sample("tau", dist.Gamma(2.0, 2.0))
        alpha = pyro.sample("alpha", dist.Gamma(2.0, 2.0))
        b = pyro.sample("b", dist.Normal(torch.zeros(2), alpha.rsqrt()).to_event(1))
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(b[0] + b[1] * x, tau.rsqrt()), obs=y)

    return Problem(model, (x, y))


PROBLEMS: dict[str, Callable[[], Problem]] = {
    "mixture": iris,
    "topics": topics,
    "Markov chain": markov,
    "PCA": components,
    "local level": level,
    "a million data": million,
    "logistic, cvi": partial(logistic, "cvi"),
    "logistic, laplace": partial(logistic, "laplace"),
}


def fit(name: str, sweeps: int) -> Row:
    """Fit a problem for a number of sweeps."""
    problem = PROBLEMS[name]()
    read(problem)  # the first one warms up
    start = process_time()
    read(problem)
    reading = process_time() - start
    modes: tuple[CompileMode, ...] = (False,) if problem.fallback else (False, "trace", True)
    timed = [swept(problem, sweeps, mode) for mode in modes]
    bounds = torch.tensor(timed[0][0])
    fall = float((-bounds.diff() / bounds[1:].abs()).max())
    speeds: list[float | None] = [1e3 * s / (len(found) - 1) for found, s in timed]
    return Row(name, float(bounds[-1]), fall, reading, *[*speeds, None, None][:3])  # type: ignore[arg-type]


def read(problem: Problem) -> Reading:
    """The program, from the same first values each time."""
    pyro.set_rng_seed(0)
    fallback = {} if problem.fallback is None else {"w": problem.fallback}
    return read_program(problem.model, problem.args, {}, init=problem.init, fallback=fallback)


def swept(problem: Problem, sweeps: int, mode: CompileMode) -> tuple[list[float], float]:
    """Bounds, and CPU seconds of the sweeps alone, without those of reading, recording and compiling."""
    field, spent = started(read(problem), named_values(problem.init)), []

    def record(*args: Any) -> RecordedMap:
        start = process_time()
        made = RecordedMap(*args, mode=mode)
        spent.append(process_time() - start)
        return made

    start = process_time()
    bounds = ascend_bound(field, most=sweeps, tolerance=0.0, recorder=None if mode is False else record)
    return bounds, process_time() - start - sum(spent)


def against(name: str) -> dict[str, Any]:
    """A peer's bound and ours, where they stand still or after 1,000 sweeps, and CPU milliseconds of its sweeps."""
    problem, (who, run) = PROBLEMS[name](), PEERS[name]
    options: dict[str, Any] = {"init_loc_fn": problem.init, "seed": 0}
    first = AutoConjugate(problem.model, max_sweeps=1, **options).run(*problem.args).state_dict()
    values = dict(getattr(problem.init, "keywords", {}).get("values", {}))
    values |= {k.split(":")[1]: v for k, v in first.items() if k.endswith(":concentration")}
    found, milliseconds = run(problem.args, values, 1000)
    own = AutoConjugate(problem.model, tolerance=1e-15, **options).run(*problem.args).bounds[-1]
    return {"problem": name, "peer": who, "its bound": found, "bound": own, "its sweep": milliseconds}


def clusters(n: int) -> tuple[Callable[[Tensor], None], Tensor]:
    """A mixture of six normals in four dimensions, and data of it."""
    generator = torch.Generator().manual_seed(0)
    centers = 4 * torch.randn(6, 4, generator=generator)
    x = centers[torch.randint(6, (n,), generator=generator)] + torch.randn(n, 4, generator=generator)

    def model(x: Tensor) -> None:
        weights = pyro.sample("weights", dist.Dirichlet(torch.ones(6)))
        tau = pyro.sample("tau", dist.Gamma(torch.full((6, 4), 2.0), 2.0).to_event(2))
        mu = pyro.sample("mu", dist.Normal(torch.zeros(6, 4), 4 * tau.rsqrt()).to_event(2))
        with pyro.plate("data", n, subsample_size=len(x)):
            z = pyro.sample("z", dist.Categorical(weights))
            pyro.sample("x", dist.Normal(mu[z], tau[z].rsqrt()).to_event(1), obs=x)

    return model, x


def stochastic(n: int, passes: int, exponent: float, seed: int) -> tuple[float, float]:
    """Nats between the full fit and a stochastic one, and CPU milliseconds of its steps."""
    model, x = clusters(n)
    pyro.set_rng_seed(3)
    init = init_to_value(values={"mu": x[torch.randperm(n)[:6]]})
    full = AutoConjugate(model, init_loc_fn=init, max_sweeps=200, tolerance=1e-12, seed=0).run(x)
    guide = AutoConjugate(model, init_loc_fn=init, rate=RobbinsMonro(10, exponent), seed=0)
    generator = torch.Generator().manual_seed(seed)
    start = process_time()
    for _ in range(passes):
        for rows in torch.randperm(n, generator=generator).split(200):
            guide.step(x[rows])
    milliseconds = 1e3 * (process_time() - start) / len(guide.bounds)
    return full.bounds[-1] - sum(guide.terms(x).values()), milliseconds


def tails(conditional: tuple[str, ...], seeds: int) -> dict[str, Any]:
    """k-hat of the logistic regression over several posteriors of 4,000 draws, and the guide's evidence bound."""
    problem = logistic("cvi")
    guide = AutoConjugate(problem.model, fallback={"w": "cvi"}, conditional=conditional, seed=0).run(*problem.args)
    found = [Posterior(problem.model, guide, problem.args, num_draws=4000, seed=seed) for seed in range(seeds)]
    k = torch.stack([torch.as_tensor(posterior.pareto_k) for posterior in found])
    elbo = sum(float(posterior.elbo.value) for posterior in found) / seeds
    spread = {"smallest": float(k.min()), "largest": float(k.max())}
    return {"conditional": ", ".join(conditional) or "-", "ELBO": elbo, "k-hat": float(k.mean()), **spread}


def main(arguments: Sequence[str] | None = None) -> list[Row]:
    """Print the tables and write them."""
    parser = command_line(__doc__)
    parser.add_argument("--problems", nargs="+", choices=PROBLEMS, default=list(PROBLEMS))
    parser.add_argument("--sweeps", type=int, default=100)
    parser.add_argument("--data", type=int, default=20_000, help="of the stochastic fit")
    parser.add_argument("--passes", type=int, default=5)
    parser.add_argument("--exponents", type=float, nargs="+", default=[0.7, 0.8])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--posteriors", type=int, default=10, help="whose tails are looked at")
    parser.add_argument("--peers", action="store_true", help="also BayesPy and hmmlearn, which must be installed")
    options = parser.parse_args(arguments)
    torch.set_default_dtype(torch.float64)
    columns = {"problem": "<18", "bound": "16.6f", "fall": "9.1e", "reading": "8.2f"}
    table = Table({**columns, "sweep": "8.2f", "traced": "8.2f", "compiled": "8.3f"})
    rows = []
    for name in options.problems:
        rows.append(fit(name, options.sweeps))
        table.show(*asdict(rows[-1]).values())
    print()
    steps, gaps = Table({"exponent": "8.1f", "seed": "4", "gap": "8.3f", "step": "8.1f"}), []
    for exponent in options.exponents:
        for seed in options.seeds:
            gap, milliseconds = stochastic(options.data, options.passes, exponent, seed)
            gaps.append({"exponent": exponent, "seed": seed, "gap": gap, "step": milliseconds})
            steps.show(exponent, seed, gap, milliseconds)
    ends = [tails(conditional, options.posteriors) for conditional in ((), ("alpha",))]
    print(f"\n{table_of(ends)}")
    peers = [against(name) for name in PEERS] if options.peers else []
    print(f"\n{table_of(peers)}")
    torch.set_default_dtype(torch.float32)
    write(options, rows=rows, stochastic=gaps, tails=ends, peers=peers)
    return rows


if __name__ == "__main__":
    main()
