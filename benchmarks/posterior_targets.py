"""The targets of benchmarks/posteriors.py with a known log evidence: Pyro programs, and what their posteriors are.

Every program is a closure without arguments over data in float64. ``coordinates`` maps draws of its latent sites to the
columns of ``reference``.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

Draws = Mapping[str, Tensor]


@dataclass(frozen=True)
class Target:
    """A posterior and what is known of it.

    :ivar log_z: log evidence in nats, or ``None``.
    :ivar reference: draws of the posterior, ``(R, columns)``, or ``None``.
    :ivar coordinates: draws of the sites, each ``(S, ...)``, to ``(S, columns)``.
    :ivar multimodal: whether a guide had better start wide than at one mode.
    :ivar plate: a plate that holds the whole posterior, whose elements are independent.
    """

    name: str
    model: Callable[[], None]
    coordinates: Callable[[Draws], Tensor]
    log_z: float | None = None
    reference: Tensor | None = None
    multimodal: bool = False
    plate: str = ""


def columns(*names: str, log: tuple[str, ...] = ()) -> Callable[[Draws], Tensor]:
    """The sites side by side, those in ``log`` by their logarithm."""

    def gather(draws: Draws) -> Tensor:
        parts = [draws[name].log() if name in log else draws[name] for name in names]
        return torch.cat([part.reshape(len(part), -1) for part in parts], 1)

    return gather


def _read(folder: Path, name: str) -> dict[str, Tensor]:
    with np.load(folder / "targets" / f"{name}.npz") as file:
        return {key: torch.as_tensor(file[key]).double() for key in file}


def eight_schools(folder: Path, centered: bool = False) -> Target:
    """Rubin 1981 with the half-Cauchy prior of Gelman 2006, its effects standardised or centered."""
    data = _read(folder, "eight_schools")
    y, sigma = data["y"], data["sigma"]

    def model() -> None:
        mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
        tau = pyro.sample("tau", dist.HalfCauchy(5.0))
        with pyro.plate("schools", 8):
            if centered:
                effect = pyro.sample("theta", dist.Normal(mu, tau))
            else:
                effect = mu + tau * pyro.sample("theta", dist.Normal(0.0, 1.0))
            pyro.sample("y", dist.Normal(effect, sigma), obs=y)

    def coordinates(draws: Draws) -> Tensor:
        mu, tau, theta = draws["mu"][:, None], draws["tau"][:, None], draws["theta"]
        return torch.cat([mu, tau.log(), (theta - mu) / tau if centered else theta], 1)

    name = "eight schools, centered" if centered else "eight schools"
    return Target(name, model, coordinates, -31.31135, data["reference_draws"])


def funnel(folder: Path) -> Target:
    """Neal 2003 in ten dimensions."""

    def model() -> None:
        v = pyro.sample("v", dist.Normal(0.0, 3.0))
        with pyro.plate("nine", 9):
            pyro.sample("x", dist.Normal(0.0, (0.5 * v).exp()))

    generator = torch.Generator().manual_seed(0)
    v = 3 * torch.randn(10_000, 1, generator=generator, dtype=torch.float64)
    x = (0.5 * v).exp() * torch.randn(10_000, 9, generator=generator, dtype=torch.float64)
    return Target("funnel", model, columns("v", "x"), 0.0, torch.cat([v, x], 1))


def brownian(folder: Path, centered: bool = True) -> Target:
    """Brownian motion with unknown innovation and observation noise, observed at both ends."""
    data = _read(folder, "brownian")
    seen = ~data["observed"].isnan()
    y = data["observed"][seen]
    steps = torch.ones(30, 30, dtype=torch.float64).tril()

    def model() -> None:
        noise = pyro.sample("q", dist.LogNormal(0.0, 2.0))
        scale = pyro.sample("s", dist.LogNormal(0.0, 2.0))
        z = pyro.sample("z", dist.Normal(0.0, 1.0).expand([30]).to_event(1)) if not centered else None
        if z is None:
            tril = scale[..., None, None] * steps
            x = pyro.sample("x", dist.MultivariateNormal(torch.zeros(30), scale_tril=tril))
        else:
            x = scale[..., None] * z.cumsum(-1)
        pyro.sample("y", dist.Normal(x[..., seen], noise[..., None]).to_event(1), obs=y)

    def coordinates(draws: Draws) -> Tensor:
        q, s = draws["q"][:, None], draws["s"][:, None]
        return torch.cat([q.log(), s.log(), draws["x"] if centered else s * draws["z"].cumsum(-1)], 1)

    name = "brownian" if centered else "brownian, increments"
    return Target(name, model, coordinates, 1.18775, data["reference_draws"])


def seeds(folder: Path) -> Target:
    """Crowder 1978: germination of 21 plates of seeds, with a random effect each."""
    d = _read(folder, "seeds")

    def model() -> None:
        tau = pyro.sample("tau", dist.Gamma(0.01, 0.01))
        a = pyro.sample("a", dist.Normal(torch.zeros(4), 10.0).to_event(1))
        fixed = a[..., 0] + a[..., 1] * d["x1"] + a[..., 2] * d["x2"] + a[..., 3] * d["x1"] * d["x2"]
        with pyro.plate("plates", 21):
            b = pyro.sample("b", dist.Normal(0.0, tau.rsqrt()))
            pyro.sample("r", dist.Binomial(d["n"], logits=fixed + b), obs=d["r"])

    return Target("seeds", model, columns("a", "b", "tau", log=("tau",)), -73.406, d["reference_draws"])


def _logistic(folder: Path, name: str, prior_sd: float, log_z: float) -> Target:
    d = _read(folder, name)
    signed, dim = (2 * d["y"] - 1)[:, None] * d["X"], d["X"].shape[1]

    def model() -> None:
        w = pyro.sample("w", dist.Normal(torch.zeros(dim), prior_sd).to_event(1))
        pyro.factor("y", torch.nn.functional.logsigmoid(w @ signed.T).sum(-1))

    return Target(name, model, columns("w"), log_z, d["reference_draws"])


def ionosphere(folder: Path) -> Target:
    """Logistic regression, 351 x 35."""
    return _logistic(folder, "ionosphere", 1.0, -111.623)


def sonar(folder: Path) -> Target:
    """Logistic regression, 208 x 61."""
    return _logistic(folder, "sonar", 1.0, -108.403)


def credit(folder: Path) -> Target:
    """Logistic regression, 1000 x 25."""
    return _logistic(folder, "credit", 10.0, -585.101)


def many_well(folder: Path) -> Target:
    """Sixteen independent pairs of a double well and a normal: 65,536 modes."""

    def model() -> None:
        with pyro.plate("pairs", 16):
            x = pyro.sample("x", dist.Normal(0.0, 1.0).mask(False))
            y = pyro.sample("y", dist.Normal(0.0, 1.0).mask(False))
            pyro.factor("wells", -(x**4) + 6 * x**2 + x / 2 - y**2 / 2)

    grid = torch.linspace(-4, 4, 20_001, dtype=torch.float64)
    density = (-(grid**4) + 6 * grid**2 + grid / 2).exp()
    generator = torch.Generator().manual_seed(0)
    chosen = torch.multinomial(density, 160_000, replacement=True, generator=generator)
    y = torch.randn(10_000, 16, generator=generator, dtype=torch.float64)
    reference = torch.cat([grid[chosen].reshape(-1, 16), y], 1)
    return Target("many-well", model, columns("x", "y"), 164.696, reference, multimodal=True, plate="pairs")


def cox_process(folder: Path, side: int = 40) -> Target:
    """Log-Gaussian Cox process of the Finnish pines on a grid (Moller et al. 1998), standardised by its prior."""
    points = np.loadtxt(folder / "targets" / "pines.csv", delimiter=",", skiprows=1, usecols=(1, 2))
    counts, _, _ = np.histogram2d(points[:, 0], points[:, 1], bins=side, range=((0, 1), (0, 1)))
    y, variance = torch.as_tensor(counts).double().reshape(-1), 1.91
    place = torch.cartesian_prod(*[torch.arange(side, dtype=torch.float64)] * 2)
    covariance = variance * (-torch.cdist(place, place) / (side / 33)).exp()
    tril, mean = torch.linalg.cholesky(covariance), math.log(126) - variance / 2

    def model() -> None:
        z = pyro.sample("z", dist.Normal(torch.zeros(side**2), 1.0).to_event(1))
        f = mean + z @ tril.T
        pyro.factor("y", (f * y - f.exp() / side**2).sum(-1))

    return Target("cox process", model, columns("z"), 501.8 if side == 40 else None)


TARGETS: dict[str, Callable[[Path], Target]] = {
    "eight_schools": eight_schools,
    "eight_schools_centered": lambda folder: eight_schools(folder, centered=True),
    "funnel": funnel,
    "brownian": brownian,
    "brownian_increments": lambda folder: brownian(folder, centered=False),
    "seeds": seeds,
    "ionosphere": ionosphere,
    "sonar": sonar,
    "credit": credit,
    "many_well": many_well,
    "cox_process": cox_process,
}
