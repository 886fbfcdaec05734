"""Fifteen posteriors of stan-dev/posteriordb as Pyro programs, for benchmarks/posteriors.py.

Each has the priors of the Stan model of that name; flat priors are masked ones, whose draws only start a guide. The
coordinates are Stan's parameters on the constrained scale, in the order of the file of reference draws.
"""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from pyro.distributions import constraints
from torch import Tensor
from torch.distributions import biject_to

from benchmarks.posterior_targets import Draws, Target, columns, eight_schools

Program = Callable[[], None]
Coordinates = Callable[[Draws], Tensor]


def _tensor(value: Any) -> Tensor:
    return torch.as_tensor(value, dtype=torch.float64)


class Flat(dist.ImproperUniform):
    """A flat density on a constrained space that can be drawn from, which is where a guide may start."""

    def __init__(self, constraint: Any, size: tuple[int, ...]) -> None:
        super().__init__(constraint, torch.Size(), torch.Size(size))

    def sample(self, sample_shape: torch.Size = torch.Size()) -> Tensor:  # noqa: B008
        """Standard normal draws on the unconstrained scale."""
        transform = biject_to(self.support)
        return transform(torch.randn(sample_shape + self.batch_shape + transform.inverse_shape(self.event_shape)))

    def expand(self, batch_shape: Any, _instance: Any = None) -> "Flat":
        """Independent copies."""
        new: Flat = super().expand(batch_shape, self._get_checked_instance(Flat, _instance))
        return new


def _flat(name: str, constraint: Any, *size: int) -> Tensor:
    return pyro.sample(name, Flat(constraint, size))


def _regression(design: Tensor, y: Tensor, beta: Callable[[], Tensor], sigma: Callable[[], Tensor]) -> Program:
    """``y ~ normal(design beta, sigma)``, by the sufficient statistics: the rows enter as a sum of squares."""
    gram, cross, square, rows = design.T @ design, design.T @ y, y @ y, len(y)

    def model() -> None:
        b, s = beta(), sigma()
        residual = square - 2 * (b * cross).sum(-1) + ((b @ gram) * b).sum(-1)
        pyro.factor("y", -rows * (s.log() + 0.5 * math.log(2 * math.pi)) - 0.5 * residual / s**2)

    return model


def _linear(design: Tensor, y: Tensor, sigma: Callable[[], Tensor]) -> tuple[Program, Coordinates]:
    """A regression with a flat prior on its coefficients."""
    beta = lambda: _flat("beta", constraints.real_vector, design.shape[1])  # noqa: E731
    return _regression(design, y, beta, sigma), columns("beta", "sigma")


def _half_cauchy() -> Tensor:
    return pyro.sample("sigma", dist.HalfCauchy(2.5))


def _any_sigma() -> Tensor:
    return _flat("sigma", constraints.positive)


def ark(d: dict[str, Tensor]) -> tuple[Program, Coordinates]:
    """An autoregression of order five."""
    order, y = int(d["K"]), d["y"]
    past = torch.stack([torch.ones(len(y) - order), *(y[order - k : len(y) - k] for k in range(1, order + 1))], 1)
    beta = lambda: pyro.sample("beta", dist.Normal(torch.zeros(order + 1), 10.0).to_event(1))  # noqa: E731
    return _regression(past, y[order:], beta, _half_cauchy), columns("beta", "sigma")


def arma(d: dict[str, Tensor]) -> tuple[Program, Coordinates]:
    """ARMA(1, 1)."""
    y = d["y"]

    def model() -> None:
        mu = pyro.sample("mu", dist.Normal(0.0, 10.0))
        phi = pyro.sample("phi", dist.Normal(0.0, 2.0))
        theta = pyro.sample("theta", dist.Normal(0.0, 2.0))
        sigma = _half_cauchy()
        before = torch.cat([mu[..., None], y[:-1].expand(*mu.shape, -1)], -1)
        error, square = 0.0, 0.0
        for rest in (y - mu[..., None] - phi[..., None] * before).unbind(-1):
            error = rest - theta * error
            square = square + error**2
        pyro.factor("y", -len(y) * (sigma.log() + 0.5 * math.log(2 * math.pi)) - 0.5 * square / sigma**2)

    return model, columns("mu", "phi", "theta", "sigma")


def blr(d: dict[str, Tensor]) -> tuple[Program, Coordinates]:
    """A regression with normal priors."""
    beta = lambda: pyro.sample("beta", dist.Normal(torch.zeros(5), 10.0).to_event(1))  # noqa: E731
    sigma = lambda: pyro.sample("sigma", dist.HalfNormal(10.0))  # noqa: E731
    return _regression(d["X"], d["y"], beta, sigma), columns("beta", "sigma")


def diamonds(d: dict[str, Tensor]) -> tuple[Program, Coordinates]:
    """Prices of diamonds: 24 nearly collinear predictors."""
    x = d["X"][:, 1:] - d["X"][:, 1:].mean(0)
    design = torch.cat([x, torch.ones(len(x), 1)], 1)

    def beta() -> Tensor:
        b = pyro.sample("b", dist.Normal(torch.zeros(24), 1.0).to_event(1))
        intercept = pyro.sample("intercept", dist.StudentT(3.0, 8.0, 10.0))
        return torch.cat([b, intercept[..., None]], -1)

    def sigma() -> Tensor:
        s = _any_sigma()
        pyro.factor("half_t", dist.StudentT(3.0, 0.0, 10.0).log_prob(s) + math.log(2))
        return s

    return _regression(design, d["Y"], beta, sigma), columns("b", "intercept", "sigma")


def earnings(d: dict[str, Tensor]) -> tuple[Program, Coordinates]:
    """Log earnings on height, sex and their interaction."""
    design = torch.stack([torch.ones(len(d["male"])), d["height"], d["male"], d["height"] * d["male"]], 1)
    return _linear(design, d["earn"].log(), _any_sigma)


def kidscore(d: dict[str, Tensor]) -> tuple[Program, Coordinates]:
    """Test scores of children on the mother's IQ and schooling."""
    hs, iq = d["mom_hs"], d["mom_iq"]
    return _linear(torch.stack([torch.ones(len(hs)), hs, iq, hs * iq], 1), d["kid_score"], _half_cauchy)


def kilpisjarvi(d: dict[str, Tensor]) -> tuple[Program, Coordinates]:
    """Summer temperatures on the year, not centred."""
    loc, scale = torch.stack([d["pmualpha"], d["pmubeta"]]), torch.stack([d["psalpha"], d["psbeta"]])
    design = torch.stack([torch.ones(len(d["x"])), d["x"]], 1)
    beta = lambda: pyro.sample("beta", dist.Normal(loc, scale).to_event(1))  # noqa: E731
    return _regression(design, d["y"], beta, _any_sigma), columns("beta", "sigma")


def mesquite(d: dict[str, Tensor]) -> tuple[Program, Coordinates]:
    """Weights of mesquite bushes."""
    area = (d["diam1"] * d["diam2"]).log()
    shape, height = (d["diam1"] / d["diam2"]).log(), d["canopy_height"].log()
    rest = [d["total_height"].log(), d["density"].log(), d["group"]]
    design = torch.stack([torch.ones(len(area)), area + height, area, shape, *rest], 1)
    return _linear(design, d["weight"].log(), _any_sigma)


def nes(d: dict[str, Tensor]) -> tuple[Program, Coordinates]:
    """Party identification in the year 2000."""
    ages = [(d["age_discrete"] == k).double() for k in (2, 3, 4)]
    rest = [d["educ1"], d["gender"], d["income"]]
    design = torch.stack([torch.ones(len(d["gender"])), d["real_ideo"], d["race_adj"], *ages, *rest], 1)
    return _linear(design, d["partyid7"], _any_sigma)


def gauss_mix(d: dict[str, Tensor]) -> tuple[Program, Coordinates]:
    """A mixture of two normals with ordered means."""

    def model() -> None:
        mu = _flat("mu", constraints.ordered_vector, 2)
        sigma = pyro.sample("sigma", dist.HalfNormal(2.0 * torch.ones(2)).to_event(1))
        theta = pyro.sample("theta", dist.Beta(5.0, 5.0))
        pyro.factor("means", dist.Normal(0.0, 2.0).log_prob(mu).sum(-1))
        each = dist.Normal(mu[..., None, :], sigma[..., None, :]).log_prob(d["y"][:, None])
        weight = torch.stack([theta, 1 - theta], -1).log()[..., None, :]
        pyro.factor("y", (weight + each).logsumexp(-1).sum(-1))

    return model, columns("mu", "sigma", "theta")


def forward_algorithm(emission: Tensor, transition: Tensor) -> Tensor:
    """Log likelihood ``(S,)`` of a chain from log densities ``(S, time, states)`` and log ``(S, states, states)``; the
    first state has the unnormalised prior one, as in Stan's models. Products of matrices, in halves."""
    steps = transition[..., None, :, :] + emission[..., 1:, None, :]
    while steps.shape[-3] > 1:
        odd = steps[..., steps.shape[-3] // 2 * 2 :, :, :]
        left, right = steps[..., :-1:2, :, :], steps[..., 1::2, :, :]
        left = left[..., : right.shape[-3], :, :]
        steps = torch.cat([(left[..., :, :, None] + right[..., None, :, :]).logsumexp(-2), odd], -3)
    return (emission[..., 0, :, None] + steps[..., 0, :, :]).logsumexp((-1, -2))


def _transitions(concentration: Tensor) -> Tensor:
    rows = [pyro.sample(f"theta{k + 1}", dist.Dirichlet(concentration[k])) for k in range(2)]
    return torch.stack(rows, -2).log()


def hmm(d: dict[str, Tensor]) -> tuple[Program, Coordinates]:
    """A hidden Markov model with two normal states."""

    def model() -> None:
        transition = _transitions(torch.ones(2, 2))
        mu = _flat("mu", constraints.positive_ordered_vector, 2)
        pyro.factor("means", dist.Normal(torch.tensor([3.0, 10.0]), 1.0).log_prob(mu).sum(-1))
        emission = dist.Normal(mu[..., None, :], 1.0).log_prob(d["y"][:, None])
        pyro.factor("y", forward_algorithm(emission, transition))

    return model, columns("theta1", "theta2", "mu")


def hmm_drive(d: dict[str, Tensor]) -> tuple[Program, Coordinates]:
    """A hidden Markov model of a basketball drive: speed and distance to the hoop, exponential."""

    def model() -> None:
        transition = _transitions(d["alpha"])
        emission = 0.0
        for name, data in (("phi", d["u"]), ("lambda", d["v"])):
            rate = _flat(name, constraints.positive_ordered_vector, 2)
            pyro.factor(f"prior of {name}", dist.Normal(torch.tensor([0.0, 3.0]), 1.0).log_prob(rate).sum(-1))
            emission = emission + dist.Exponential(rate[..., None, :]).log_prob(data[:, None])
        pyro.factor("y", forward_algorithm(emission, transition))

    return model, columns("theta1", "theta2", "phi", "lambda")


def runge_kutta(slope: Callable[[float, Tensor], Tensor], start: Tensor, times: list[float], step: float) -> Tensor:
    """Solution ``(*start.shape, len(times))`` from time 0 by the classical method of order four."""
    t, z, found = 0.0, start, []
    for end in times:
        count = max(1, math.ceil((end - t) / step - 1e-9))
        h = (end - t) / count
        for i in range(count):
            at = t + i * h
            a = slope(at, z)
            b = slope(at + h / 2, z + h / 2 * a)
            c = slope(at + h / 2, z + h / 2 * b)
            z = z + h / 6 * (a + 2 * b + 2 * c + slope(at + h, z + h * c))
        t = end
        found.append(z)
    return torch.stack(found, -1)


def lotka_volterra(d: dict[str, Tensor]) -> tuple[Program, Coordinates]:
    """Lynx and hare; the logarithms of both populations are integrated."""
    y = torch.cat([d["y_init"][None], d["y"]]).log()
    prior = torch.tensor([[1.0, 0.05, 1.0, 0.05], [0.5, 0.05, 0.5, 0.05]])

    def model() -> None:
        theta = _flat("theta", constraints.independent(constraints.positive, 1), 4)
        pyro.factor("prior", dist.Normal(prior[0], prior[1]).log_prob(theta).sum(-1))
        start = pyro.sample("z_init", dist.LogNormal(torch.full((2,), math.log(10.0)), 1.0).to_event(1))
        sigma = pyro.sample("sigma", dist.LogNormal(torch.full((2,), -1.0), 1.0).to_event(1))
        alpha, beta, gamma, delta = theta.unbind(-1)

        def slope(t: float, z: Tensor) -> Tensor:
            u, v = z.exp().unbind(-1)
            return torch.stack([alpha - beta * v, delta * u - gamma], -1)

        path = runge_kutta(slope, start.log(), d["ts"].tolist(), 0.25).mT
        mean = torch.cat([start.log()[..., None, :], path], -2)
        density = dist.Normal(mean, sigma[..., None, :]).log_prob(y) - y
        pyro.factor("y", density.sum((-1, -2)))

    return model, columns("theta", "z_init", "sigma")


def one_compartment(d: dict[str, Tensor]) -> tuple[Program, Coordinates]:
    """Absorption of a dose at first order, Michaelis-Menten elimination."""
    dose, volume, y = float(d["D"]), float(d["V"]), d["C_hat"]

    def model() -> None:
        k_a, k_m, v_m, sigma = (pyro.sample(n, dist.HalfCauchy(1.0)) for n in ("k_a", "K_m", "V_m", "sigma"))

        def slope(t: float, c: Tensor) -> Tensor:
            return (-k_a * t).exp() * dose * k_a / volume - v_m / volume * c / (k_m + c)

        mean = runge_kutta(slope, torch.zeros_like(k_a), d["times"].tolist(), 0.125).clamp(min=1e-12)
        density = dist.LogNormal(mean.log(), sigma[..., None]).log_prob(y)
        pyro.factor("y", density.sum(-1))

    return model, columns("k_a", "K_m", "V_m", "sigma")


MODELS = {
    "arK-arK": ark,
    "arma-arma11": arma,
    "sblrc-blr": blr,
    "kidiq-kidscore_interaction": kidscore,
    "earnings-logearn_interaction": earnings,
    "nes2000-nes": nes,
    "diamonds-diamonds": diamonds,
    "mesquite-logmesquite_logvas": mesquite,
    "kilpisjarvi_mod-kilpisjarvi": kilpisjarvi,
    "low_dim_gauss_mix-low_dim_gauss_mix": gauss_mix,
    "hmm_example-hmm_example": hmm,
    "bball_drive_event_0-hmm_drive_0": hmm_drive,
    "hudson_lynx_hare-lotka_volterra": lotka_volterra,
    "one_comp_mm_elim_abs-one_comp_mm_elim_abs": one_compartment,
}


def posteriordb(folder: Path, name: str) -> Target:
    """A posterior by its name in posteriordb."""
    content = json.loads((folder / "posteriordb" / f"{name}.data.json").read_text())
    with np.load(folder / "posteriordb" / f"{name}.draws.npz") as file:
        reference = torch.stack([_tensor(file[key]).reshape(-1) for key in file], 1)
    if name.startswith("eight_schools"):
        ours = eight_schools(folder)

        def effects(draws: Draws) -> Tensor:
            mu, tau = draws["mu"][:, None], draws["tau"][:, None]
            return torch.cat([mu + tau * draws["theta"], mu, tau], 1)

        return Target(name, ours.model, effects, ours.log_z, reference)
    model, coordinates = MODELS[name]({key: _tensor(value) for key, value in content.items()})
    return Target(name, model, coordinates, None, reference)
