"""Heuristic factors for a hidden Markov model with unknown parameters.

Reproduces the set-up of Zimmermann et al. 2021, section 4.2. A hidden Markov model of four states emits normal data
whose means, precisions and transition rows ``eta`` are unknown; the intermediate targets are
``gamma[k] = p(x[1..k], z[1..k], eta) psi[k](x[k+1..K] | eta)``. Proposals are ``q(eta | x[1..K])``, a network, and
``q(z[k] | x[k], z[k-1], eta)``, the model's own conditional; everything is trained by the forward KL divergence of each
level (``FilteringELBO(objective=NestedForwardKL())``), on simulated instances. Without a heuristic factor the first
target is the prior, and the proposal of ``eta`` learns nothing of the data. Compared are no factor, a mixture that
ignores the dynamics, and a mixture whose weights are learned from the datum before.

Printed for each: the mean over held-out instances of log Z and of the effective sample size, with the states summed out
exactly, by the forward algorithm at draws of ``eta``; and, for the first of these instances, of the filter itself,
without resampling and with. Below, each factor against the mixture on the same instances: mean difference and its 95 %
interval.

The paper has 200 time steps and 2,000 held-out instances with 1,000 samples (``--published``); the defaults are less.
Unlike there the four means have different prior means, so that labels cannot be switched. Levels are local, so that a
training step may stop after some of them (``--train-levels``): what it leaves out is more of the same.

    python -m benchmarks.hmm_heuristics --out benchmarks/results/hmm_heuristics.json
    python -m benchmarks.hmm_heuristics --published --out benchmarks/results/hmm_heuristics_published.json
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from itertools import islice
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro.nn import PyroModule
from pyro.optim import Adam
from torch import Tensor
from torch.nn.functional import softplus

from benchmarks.reporting import Table, command_line, table_of, write
from pplvi import CompiledSVI, FilteringELBO
from pplvi.objectives import NestedForwardKL, Step, log_normalizer_ratio
from pplvi.programs import execute
from pplvi.weights import effective_sample_size, logmeanexp

QUICK = "--time-steps 4 --test-instances 40 --filtered 20 --samples 20 --particles 5 --iterations 2 --mode eager"

CENTRES = torch.tensor([-4.5, -1.5, 1.5, 4.5])
ROWS = 1.0 + 4.0 * torch.eye(4)
METHODS = ("none", "mixture", "learned")
PUBLISHED = {"time_steps": 200, "test_instances": 2000, "samples": 1000, "filtered": 40, "train_levels": 10}
LINEAR = PyroModule[torch.nn.Linear]


class HiddenMarkov:
    """Parameters in ``init``, a state and its datum in ``step``; instances in a plate."""

    def init(self, state: dict[str, Any], data: Tensor) -> None:
        with pyro.plate("instances", data.shape[1]):
            state["mu"] = pyro.sample("mu", dist.Normal(CENTRES, 1.0).to_event(1))
            state["tau"] = pyro.sample("tau", dist.Gamma(torch.full((4,), 6.0), 2.0).to_event(1))
            state["rows"] = pyro.sample("rows", dist.Dirichlet(ROWS).to_event(1))
        state["next"] = torch.full_like(state["mu"], 0.25)

    def step(self, state: dict[str, Any], x: Tensor) -> None:
        with pyro.plate("instances", len(x)):
            z = pyro.sample("z", dist.Categorical(state["next"])).unsqueeze(-1)
            mu, tau = (state[name].gather(-1, z).squeeze(-1) for name in ("mu", "tau"))
            pyro.sample("x", dist.Normal(mu, tau.rsqrt()), obs=x)
        index = z.unsqueeze(-1).expand(*z.shape, 4)
        state["next"] = state["rows"].gather(-2, index).squeeze(-2)


def simulate(num_steps: int, instances: int) -> Tensor:
    """Data, ``(num_steps, instances)``."""
    mu = CENTRES + torch.randn(instances, 4)
    tau = torch.distributions.Gamma(6.0, 2.0).sample((instances, 4))
    rows = torch.distributions.Dirichlet(ROWS).sample((instances,))
    z, data = torch.randint(4, (instances,)), []
    for _ in range(num_steps):
        mean, precision = (p.gather(1, z[:, None])[:, 0] for p in (mu, tau))
        data.append(mean + torch.randn(instances) * precision.rsqrt())
        z = torch.distributions.Categorical(rows[torch.arange(instances), z]).sample()
    return torch.stack(data)


def log_emission(x: Tensor, state: dict[str, Any]) -> Tensor:
    """``log N(x; mu[m], 1 / tau[m])``, ``(..., instances, 4)``; with times on a dimension before the last."""
    mu, tau = state["mu"], state["tau"]
    if x.dim() > 1:  # (times, instances)
        x, mu, tau = x.T, mu.unsqueeze(-2), tau.unsqueeze(-2)
    return 0.5 * (tau.log() - tau * (x.unsqueeze(-1) - mu) ** 2) - 0.9189385


def summary(data: Tensor) -> Tensor:
    """What the network reads of the data, ``(instances, features)``: quantiles, and moments around each centre."""
    quantiles = torch.quantile(data, torch.linspace(0.02, 0.98, 16), 0).T / 4
    share = torch.softmax(-0.5 * (data.T.unsqueeze(-1) - CENTRES) ** 2, -1)  # (instances, times, 4)
    total = share.sum(1) + 0.5
    offset = (share * (data.T.unsqueeze(-1) - CENTRES)).sum(1) / total
    spread = (share * (data.T.unsqueeze(-1) - CENTRES - offset.unsqueeze(1)) ** 2).sum(1) / total
    pairs = share[:, :-1].transpose(1, 2) @ share[:, 1:]
    return torch.cat(
        [quantiles, total.log(), offset, spread, (pairs / (pairs.sum(-1, keepdim=True) + 1)).flatten(1)], 1
    )


class Proposal(PyroModule):
    """``q(eta | x)`` by a network, ``q(z[k] | x[k], z[k-1], eta)`` as the model has it, and a heuristic factor."""

    def __init__(self, method: str) -> None:
        super().__init__(f"proposal_{method}")
        self.net = PyroModule[torch.nn.Sequential](
            LINEAR(44, 64), torch.nn.ReLU(), LINEAR(64, 64), torch.nn.ReLU(), LINEAR(64, 32)
        )
        torch.nn.init.zeros_(self.net[-1].weight)
        torch.nn.init.zeros_(self.net[-1].bias)
        self.look_ahead: Any = {"none": None, "mixture": self.mixture, "learned": self.learned}[method]
        if method == "learned":
            self.weights = PyroModule[torch.nn.Sequential](LINEAR(8, 16), torch.nn.Tanh(), LINEAR(16, 4))
            torch.nn.init.zeros_(self.weights[-1].weight)
            torch.nn.init.zeros_(self.weights[-1].bias)

    def init(self, state: dict[str, Any], data: Tensor) -> None:
        raw = self.net(summary(data))
        offset, scale, shape, rate, rows = raw.split([4, 4, 4, 4, 16], -1)
        with pyro.plate("instances", data.shape[1]):
            pyro.sample("mu", dist.Normal(CENTRES + offset, softplus(scale + 0.54)).to_event(1))
            gamma = dist.Gamma(softplus(shape + 6.0), softplus(rate + 1.85))
            pyro.sample("tau", gamma.to_event(1))
            concentration = softplus(rows.reshape(-1, 4, 4) + ROWS + (-torch.expm1(-ROWS)).log())
            pyro.sample("rows", dist.Dirichlet(concentration).to_event(1))

    def step(self, state: dict[str, Any], x: Tensor) -> None:
        with pyro.plate("instances", len(x)):
            pyro.sample("z", dist.Categorical(logits=state["next"].log() + log_emission(x, state)))

    def mixture(self, state: dict[str, Any], rest: Tensor) -> Tensor:
        """Every datum to come by itself, each component as likely as another."""

        def terms(emission: Tensor) -> tuple[Tensor, Tensor]:
            each = torch.logsumexp(emission - 1.3862944, -1)
            return each, each

        return sum_ahead(state, rest, terms)

    def learned(self, state: dict[str, Any], rest: Tensor) -> Tensor:
        """Weights of the components from the shares that they have in the datum before, and the transition rows."""

        def terms(emission: Tensor) -> tuple[Tensor, Tensor]:
            before = torch.softmax(emission[..., :-1, :], -1)
            nothing = torch.full_like(emission[..., :1, :], 0.25)
            shares = torch.cat([nothing, before], -2)
            log_weight = torch.log_softmax(self.weights(torch.cat([shares, shares @ state["rows"]], -1)), -1)
            first = self.weights(torch.cat([nothing, nothing @ state["rows"]], -1))
            return tuple(torch.logsumexp(emission + w, -1) for w in (torch.log_softmax(first, -1), log_weight))

        return sum_ahead(state, rest, terms)


def sum_ahead(state: dict[str, Any], rest: Tensor, terms: Any) -> Tensor:
    """Sum of the data's terms, found for all of them at once before the first step and kept with the particles.

    :param terms: of emissions, ``(..., instances, times, 4)``: terms of each datum as the first of the rest and later.
    """
    if "ahead" not in state:
        first, later = terms(log_emission(rest, state))
        total = later.flip(-1).cumsum(-1).flip(-1)
        state["ahead"] = total - later + first
    return state["ahead"][..., -len(rest)]


def log_evidence_of(data: Tensor, state: dict[str, Any]) -> Tensor:
    """``log p(x | eta)`` by the forward algorithm, ``(particles, instances)``."""
    alpha, total = torch.full_like(state["mu"], 0.25), torch.zeros(())
    for number, x in enumerate(data):
        log_emitted = log_emission(x, state)
        most = log_emitted.max(-1, keepdim=True).values
        before = alpha if number == 0 else (alpha.unsqueeze(-2) @ state["rows"]).squeeze(-2)
        alpha = before * (log_emitted - most).exp()
        mass = alpha.sum(-1, keepdim=True)
        alpha, total = alpha / mass, total + (mass.log() + most).squeeze(-1)
    return total


@dataclass(frozen=True)
class Row:
    """One line of the table."""

    method: str
    log_z_exact: float
    ess_exact: float
    log_z: float
    ess: float
    log_z_resampled: float
    ess_resampled: float
    iterations: int
    seconds: float


MEASURES = ("log_z_exact", "ess_exact", "log_z", "ess", "log_z_resampled", "ess_resampled")


@dataclass(frozen=True)
class Difference:
    """What a factor gains over the mixture on the same instances: mean and the ends of its 95 % interval."""

    method: str
    measure: str
    instances: int
    mean: float
    low: float
    high: float


def begin(program: Any, data: Tensor) -> None:
    """The first step of a model or proposal."""
    program.init({}, data)


@torch.no_grad()
def without_states(proposal: Proposal, data: Tensor, particles: int) -> tuple[Tensor, Tensor]:
    """Log Z and effective sample size of draws of ``eta`` whose states are summed out, each ``(instances,)``."""
    run = execute(partial(begin, HiddenMarkov()), partial(begin, proposal), (data,), {}, num_particles=particles)
    eta = {name: run.guide.nodes[name]["value"] for name in ("mu", "tau", "rows")}
    weight = run.log_target() - run.log_forward() + log_evidence_of(data, eta)
    return logmeanexp(weight), effective_sample_size(weight)


@torch.no_grad()
def filtered(proposal: Proposal, data: Tensor, particles: int, *, resample: bool) -> tuple[Tensor, Tensor]:
    """The same by the filter: the effective sample size is that of the last step."""
    loss = FilteringELBO(particles, NestedForwardKL(), resample=resample)
    log_z, ess = torch.zeros(data.shape[1]), torch.zeros(data.shape[1])
    for step in loss.steps(HiddenMarkov(), proposal, data, data=data):
        log_z, ess = log_z + log_normalizer_ratio(step), effective_sample_size(step.log_weight)
    return log_z, ess


def evaluate(proposal: Proposal, held: Tensor, options: argparse.Namespace) -> dict[str, Tensor]:
    """Every measure on held-out instances, those of the filter on the first of them."""
    found: dict[str, list[Tensor]] = {name: [] for name in MEASURES}

    def keep(names: tuple[str, str], values: tuple[Tensor, Tensor]) -> None:
        for name, value in zip(names, values, strict=True):
            found[name].append(value)

    pyro.set_rng_seed(options.seed + 2)
    for data in held.split(20, 1):
        keep(("log_z_exact", "ess_exact"), without_states(proposal, data, options.samples))
    for data in held[:, : options.filtered].split(20, 1) if options.filtered else ():
        keep(("log_z", "ess"), filtered(proposal, data, options.samples, resample=False))
        keep(("log_z_resampled", "ess_resampled"), filtered(proposal, data, options.samples, resample=True))
    return {name: torch.cat([torch.zeros(0), *parts]) for name, parts in found.items()}


def differences(found: dict[str, dict[str, Tensor]]) -> list[Difference]:
    """Each factor against the mixture, instance by instance."""
    rows = []
    for method in found.keys() - {"mixture"} if "mixture" in found else ():
        for measure in MEASURES:
            gain = (found[method][measure] - found["mixture"][measure]).double()
            if not len(gain):  # none passed the filter
                continue
            mean, error = gain.mean().item(), (gain.std() / len(gain) ** 0.5).item()
            rows.append(Difference(method, measure, len(gain), mean, mean - 1.96 * error, mean + 1.96 * error))
    return sorted(rows, key=lambda row: METHODS.index(row.method))


class FirstLevels(FilteringELBO):
    """The objectives of some levels, the first of the path."""

    def __init__(self, count: int, num_levels: int) -> None:
        super().__init__(count, NestedForwardKL(), resample=True)
        self.num_levels = num_levels

    def steps(self, *args: Any, **kwargs: Any) -> Iterator[Step]:
        """Their steps."""
        yield from islice(super().steps(*args, **kwargs), self.num_levels)


def train(method: str, options: argparse.Namespace) -> tuple[Proposal, int, float]:
    """Train a proposal, and its factor, on fresh instances at every step: with its steps and CPU seconds."""
    pyro.clear_param_store()
    pyro.set_rng_seed(options.seed)
    proposal = Proposal(method)
    loss = FirstLevels(options.particles, options.train_levels or options.time_steps + 1)
    svi = CompiledSVI(HiddenMarkov(), proposal, Adam({"lr": options.lr}), loss, mode=options.mode)
    start, steps = time.process_time(), 0
    while steps < options.iterations and time.process_time() - start < options.seconds:
        data = simulate(options.time_steps, options.instances)
        svi.step(data, data=data)
        steps += 1
    return proposal, steps, time.process_time() - start


def main(arguments: Sequence[str] | None = None) -> list[Row]:
    """Print the tables and write them."""
    parser = command_line(__doc__)
    parser.add_argument("--published", action="store_true", help=f"the article's size: {PUBLISHED}")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--time-steps", type=int, default=20)
    parser.add_argument("--iterations", type=int, default=200)
    parser.add_argument("--seconds", type=float, default=float("inf"), help="CPU seconds of training, at most")
    parser.add_argument("--train-levels", type=int, default=0, help="levels of a training step; 0: all")
    parser.add_argument("--instances", type=int, default=20, help="simulated instances in a training step")
    parser.add_argument("--particles", type=int, default=20, help="particles in training")
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--test-instances", type=int, default=40)
    parser.add_argument("--filtered", type=int, default=40, help="how many of them pass the filter")
    parser.add_argument("--samples", type=int, default=300)
    parser.add_argument("--mode", default="trace", choices=["trace", "eager"], help="steps recorded, or not")
    parser.add_argument("--seed", type=int, default=0)
    if parser.parse_args(arguments).published:
        parser.set_defaults(**PUBLISHED)
    options = parser.parse_args(arguments)
    options.mode = options.mode if options.mode == "trace" else False
    pyro.set_rng_seed(options.seed + 1)
    held = simulate(options.time_steps, options.test_instances)
    rows, found = [], {}
    names = ("log Z (z out)", "ESS (z out)", "log Z", "ESS", "log Z (R)", "ESS (R)")
    table = Table({"factor": "<8", **dict.fromkeys(names, "13.2f")})
    for method in options.methods:
        with pyro.validation_enabled(False):
            proposal, steps, seconds = train(method, options)
            found[method] = evaluate(proposal, held, options)
        row = Row(method, *(found[method][name].mean().item() for name in MEASURES), steps, seconds)
        rows.append(row)
        table.show(method, *list(asdict(row).values())[1:-2])
    gained = differences(found)
    print(table_of([asdict(row) for row in gained]))
    write(options, rows=rows, differences=gained)
    return rows


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
