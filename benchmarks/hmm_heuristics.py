"""Heuristic factors for a hidden Markov model with unknown parameters.

Reproduces the set-up of Zimmermann et al. 2021, section 4.2. A hidden Markov model of four states emits normal data
whose means, precisions and transition rows ``eta`` are unknown; the intermediate targets are
``gamma[k] = p(x[1..k], z[1..k], eta) psi[k](x[k+1..K] | eta)``. Proposals are ``q(eta | x[1..K])``, a network, and
``q(z[k] | x[k], z[k-1], eta)``, the model's own conditional; everything is trained by the forward KL divergence of each
level (``FilteringELBO(objective=NestedForwardKL())``), on simulated instances. Without a heuristic factor the first
target is the prior, and the proposal of ``eta`` learns nothing of the data. Compared are no factor, a mixture that
ignores the dynamics, and a mixture whose weights are learned from the datum before.

Printed for each: the mean over held-out instances of log Z and of the effective sample size, without resampling and
with, and log Z with the states summed out exactly, by the forward algorithm at the same draws of ``eta``.

The paper has 200 time steps and 2,000 held-out instances with 1,000 samples; the defaults are smaller. Unlike there the
four means have different prior means, so that labels cannot be switched.

    python -m benchmarks.hmm_heuristics --out benchmarks/results/hmm_heuristics.json
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro.infer import SVI
from pyro.nn import PyroModule
from pyro.optim import Adam
from torch import Tensor
from torch.nn.functional import softplus

from benchmarks.reporting import Table, command_line, write
from pplvi import FilteringELBO
from pplvi.objectives import NestedForwardKL, log_normalizer_ratio
from pplvi.weights import effective_sample_size, logmeanexp

QUICK = "--time-steps 4 --test-instances 20 --samples 20 --particles 5 --iterations 2"

CENTRES = torch.tensor([-4.5, -1.5, 1.5, 4.5])
ROWS = 1.0 + 4.0 * torch.eye(4)
METHODS = ("none", "mixture", "learned")
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
        return torch.logsumexp(log_emission(rest, state) - 1.3862944, -1).sum(-1)

    def learned(self, state: dict[str, Any], rest: Tensor) -> Tensor:
        """Weights of the components from the shares that they have in the datum before, and the transition rows."""
        emission = log_emission(rest, state)  # (..., instances, times, 4)
        before = torch.softmax(emission[..., :-1, :], -1)
        shares = torch.cat([torch.full_like(emission[..., :1, :], 0.25), before], -2)
        log_weight = torch.log_softmax(self.weights(torch.cat([shares, shares @ state["rows"]], -1)), -1)
        return torch.logsumexp(emission + log_weight, -1).sum(-1)


def log_evidence_of(data: Tensor, state: dict[str, Any]) -> Tensor:
    """``log p(x | eta)`` by the forward algorithm, ``(particles, instances)``."""
    log_alpha = torch.full_like(state["mu"], -1.3862944) + log_emission(data[0], state)
    for x in data[1:]:
        log_alpha = torch.logsumexp(log_alpha.unsqueeze(-1) + state["rows"].log(), -2) + log_emission(x, state)
    return log_alpha.logsumexp(-1)


class Watched(HiddenMarkov):
    """The model, keeping the parameters that it was scored at."""

    def init(self, state: dict[str, Any], data: Tensor) -> None:
        super().init(state, data)
        self.eta = dict(state)


@dataclass(frozen=True)
class Row:
    """One line of the table."""

    method: str
    log_z: float
    ess: float
    log_z_resampled: float
    ess_resampled: float
    log_z_exact: float
    ess_exact: float
    seconds: float


@torch.no_grad()
def evaluate(proposal: Proposal, batches: Sequence[Tensor], particles: int) -> list[float]:
    """Means over instances: log Z and ESS without resampling, with it, and with the states summed out."""
    found = []
    for data in batches:
        model = Watched()
        columns = []
        for resample in (False, True):
            loss = FilteringELBO(particles, NestedForwardKL(), resample=resample)
            log_z, first = torch.zeros(data.shape[1]), None
            for step in loss.steps(model, proposal, data, data=data):
                log_z = log_z + log_normalizer_ratio(step)
                # log p(eta) / q(eta | x): the first weight, without the factor that looks ahead
                first = -proposal_terms(proposal, model, data, step) if first is None else first
            columns += [log_z, effective_sample_size(step.log_weight)]
        weight = first + log_evidence_of(data, model.eta)
        found.append(torch.stack([*columns, logmeanexp(weight), effective_sample_size(weight)]))
    return torch.cat(found, 1).mean(1).tolist()


def proposal_terms(proposal: Proposal, model: Watched, data: Tensor, step: Any) -> Tensor:
    """``log q(eta | x) - log p(eta)`` at the draws of the first step."""
    if proposal.look_ahead is None:
        return -step.log_increment
    return -(step.log_increment - proposal.look_ahead(model.eta, data))


def train(method: str, options: argparse.Namespace) -> Proposal:
    """Train a proposal, and its factor, on fresh instances at every step."""
    pyro.clear_param_store()
    pyro.set_rng_seed(options.seed)
    proposal = Proposal(method)
    loss = FilteringELBO(options.particles, NestedForwardKL(), resample=True)
    svi = SVI(HiddenMarkov(), proposal, Adam({"lr": options.lr}), loss)
    for _ in range(options.iterations):
        data = simulate(options.time_steps, options.instances)
        svi.step(data, data=data)
    return proposal


def main(arguments: Sequence[str] | None = None) -> list[Row]:
    """Print the table and write it."""
    parser = command_line(__doc__)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--time-steps", type=int, default=20)
    parser.add_argument("--iterations", type=int, default=200)
    parser.add_argument("--instances", type=int, default=20, help="simulated instances in a training step")
    parser.add_argument("--particles", type=int, default=20, help="particles in training")
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--test-instances", type=int, default=40)
    parser.add_argument("--samples", type=int, default=300)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    pyro.set_rng_seed(options.seed + 1)
    batches = list(simulate(options.time_steps, options.test_instances).split(20, 1))
    rows = []
    names = ("log Z", "ESS", "log Z (R)", "ESS (R)", "log Z (z out)", "ESS (z out)")
    table = Table({"factor": "<8", **dict.fromkeys(names, "13.2f")})
    for method in options.methods:
        start = time.process_time()
        with pyro.validation_enabled(False):
            proposal = train(method, options)
            seconds = time.process_time() - start
            row = Row(method, *evaluate(proposal, batches, options.samples), seconds)
        rows.append(row)
        table.show(method, *list(asdict(row).values())[1:-1])
    write(options, rows=rows)
    return rows


if __name__ == "__main__":
    main()
