"""Proper weighting: E[w f(z)] = Z E_pi[f] for every path, kernel and way to resample, on three kinds of targets.

Each walk runs 100 copies of the model side by side in a plate. They are independent, weighted and resampled on their
own, so that one walk gives standard errors that resampling does not spoil.
"""

from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor

from pplvi.guides.annealed import AnnealedGuide, NestedGuide
from pplvi.kernels.flow import FlowKernel
from pplvi.kernels.gibbs import GibbsKernel
from pplvi.kernels.hamiltonian import HamiltonianKernel
from pplvi.kernels.langevin import ControlledLangevinKernel, LangevinKernel
from pplvi.kernels.residual import ResidualKernel
from pplvi.kernels.uncorrected import UncorrectedHamiltonianKernel
from pplvi.objectives.step import Routing
from pplvi.samplers.annealed import Annealed, Resampling
from pplvi.samplers.base import Request
from pplvi.samplers.paths import DataPath

pytestmark = pytest.mark.usefixtures("float64")

COPIES, PARTICLES = 100, 60
DATA = {
    "gaussian": torch.tensor([0.5, 1.5, 0.2], dtype=torch.float64),
    "bimodal": torch.tensor([1.5, 2.5, 1.0], dtype=torch.float64),
    "discrete": torch.tensor([2.5, 1.0, 2.0], dtype=torch.float64),
}
PRIORS = {
    "gaussian": dist.Normal(torch.tensor(0.0, dtype=torch.float64), 1.5),
    "bimodal": dist.Normal(torch.tensor(0.0, dtype=torch.float64), 2.0),
    "discrete": dist.Categorical(torch.tensor([0.1, 0.4, 0.2, 0.3], dtype=torch.float64)),
}


def mean_of(target: str, z: Tensor) -> Tensor:
    return z**2 / 2 if target == "bimodal" else z.double()


class Model:
    """A latent for each copy and the data, the same for all."""

    def __init__(self, target: str) -> None:
        self.target, self.seen = target, list[Tensor]()

    def prior(self, y: Tensor) -> None:
        with pyro.plate("copies", COPIES, dim=-1):
            pyro.sample("z", PRIORS[self.target])

    def wide(self, y: Tensor) -> None:
        """An unnormalised target on the way."""
        with pyro.plate("copies", COPIES, dim=-1):
            z = pyro.sample("z", PRIORS[self.target])
            pyro.factor("flattened", 0.4 * dist.Normal(mean_of(self.target, z), 1.2).log_prob(y[0]) + 1.0)

    def __call__(self, y: Tensor) -> None:
        with pyro.plate("copies", COPIES, dim=-1):
            z = pyro.sample("z", PRIORS[self.target])
            self.seen.append(z.detach())
            with pyro.plate("data", len(y), dim=-2):
                pyro.sample("y", dist.Normal(mean_of(self.target, z), 1.2), obs=y[:, None].expand(len(y), COPIES))


def exact(target: str) -> Tensor:
    """Z, Z E[z], Z E[z^2] on a grid, or by enumeration."""
    grid = torch.arange(4.0) if target == "discrete" else torch.linspace(-12.0, 12.0, 24_001)
    width = 1.0 if target == "discrete" else 0.001
    likelihood = dist.Normal(mean_of(target, grid).unsqueeze(-1), 1.2).log_prob(DATA[target]).sum(-1)
    mass = (PRIORS[target].log_prob(grid) + likelihood).exp() * width
    return torch.stack([(mass * grid**power).sum() for power in range(3)])


def hop(previous: dict[str, Tensor], y: Tensor) -> None:
    """A kernel for discrete values: stay, or go anywhere."""
    stay = torch.nn.functional.one_hot(previous["z"].long(), 4).double()
    with pyro.plate("copies", COPIES, dim=-1):
        pyro.sample("z", dist.Categorical(0.6 * stay + 0.1))


def shift(previous: dict[str, Tensor], y: Tensor) -> None:
    with pyro.plate("copies", COPIES, dim=-1):
        pyro.sample("z", dist.Normal(0.9 * previous["z"], 0.6))


def geometric(model: Model, kernel: Any) -> Any:
    return AnnealedGuide(model, model.prior, 3, kernel)


def learned(model: Model, kernel: Any) -> Any:
    return AnnealedGuide(model, model.prior, 3, kernel, learn_path=True, betas=(0.15, 0.5))


def data(model: Model, kernel: Any) -> Any:
    return AnnealedGuide.along(DataPath(model, model.prior, 3), kernel)


def programs(model: Model, kernel: Any) -> Any:
    return NestedGuide(model.prior, [(model.wide, kernel, kernel), (model, kernel, kernel)])


PATHS: dict[str, Callable[[Model, Any], Any]] = {"geometric": geometric, "learned": learned, "data": data}
CONTINUOUS = {
    "residual": ResidualKernel(hidden=4, covariance=0.05),  # larger steps have weights whose errors are not normal
    "langevin": LangevinKernel(step_size=0.1),
    "adjusted Langevin": HamiltonianKernel(0.5),
    "hamiltonian": HamiltonianKernel(0.3, 3),
    "uncorrected": UncorrectedHamiltonianKernel(0.3, 2),
    "kept momenta": UncorrectedHamiltonianKernel(0.3, 2, keep=0.6),
    "controlled": ControlledLangevinKernel(0.1, 3),
    "flow": FlowKernel(hidden=3),
    "flow, then moves": (FlowKernel(hidden=3), HamiltonianKernel(0.5)),
}
CASES = [(t, p, k) for t in ("gaussian", "bimodal") for p in PATHS for k in CONTINUOUS]
CASES += [("discrete", p, "gibbs") for p in PATHS] + [("discrete", "programs", "hop")]
CASES += [("gaussian", "programs", "shift"), ("bimodal", "programs", "shift")]
KERNELS: dict[str, Any] = {**CONTINUOUS, "gibbs": GibbsKernel(), "hop": hop, "shift": shift}


@pytest.mark.table(4)
@pytest.mark.parametrize("resample", [False, True, 0.7])
@pytest.mark.parametrize(("target", "path", "kernel"), CASES)
def test_weights_are_proper(target: str, path: str, kernel: str, resample: bool | float) -> None:
    model = Model(target)
    guide = {**PATHS, "programs": programs}[path](model, KERNELS[kernel])
    with torch.no_grad():
        guide.plan((DATA[target],), {})
        for name, parameter in guide.named_parameters():
            if "second" in name or (kernel == "controlled" and "outputs" in name):  # flow or control would do nothing
                parameter.normal_(0.0, 0.05)
        request = Request(PARTICLES, routing=Routing(detach=True, local=True))
        steps = list(Annealed(Resampling(resample))(model, guide, (DATA[target],), {}, request))
        z = model.seen[-1].reshape(PARTICLES, COPIES)
    weight = steps[-1].log_weight.exp()
    assert weight.shape == (PARTICLES, COPIES)
    found = torch.stack([(weight * z**power).mean(0) for power in range(3)], -1)  # independent over copies
    mean, error = found.mean(0), found.std(0) / COPIES**0.5
    assert ((mean - exact(target)).abs() < 4 * error).all(), (mean, exact(target), error)
    assert error[0] < 0.15 * exact(target)[0]


def test_increments_along_the_data_are_predictive_densities() -> None:
    """Iterated batch importance sampling: log Z of every prefix of the data."""
    model, y = Model("gaussian"), DATA["gaussian"]
    guide = AnnealedGuide.along(DataPath(model, model.prior, 3), HamiltonianKernel(0.6, 3))
    request = Request(400, routing=Routing(detach=True, local=True))
    with torch.no_grad():
        steps = list(Annealed(Resampling(0.5))(model, guide, (y,), {}, request))
    for n, step in enumerate(steps, 1):
        covariance = 2.25 * torch.ones(n, n) + 1.44 * torch.eye(n)
        wanted = torch.distributions.MultivariateNormal(torch.zeros(n), covariance).log_prob(y[:n]).exp()
        found = step.log_weight.exp().mean(0)
        assert (found.mean() - wanted).abs() < 4 * found.std() / COPIES**0.5


def test_data_that_are_fewer_than_batches_are_refused() -> None:
    model = Model("gaussian")
    with pytest.raises(ValueError, match="3 data in 4 batches"):
        AnnealedGuide.along(DataPath(model, model.prior, 4), LangevinKernel())(DATA["gaussian"])
    for bad in ({"num_steps": 0}, {"num_steps": 2, "arguments": ()}):
        with pytest.raises(ValueError, match=r"num_steps=0|at least one argument"):
            DataPath(model, model.prior, **bad)


def test_data_may_be_named() -> None:
    def prior(x: Tensor, *, y: Tensor) -> None:
        pyro.sample("slope", dist.Normal(0.0, 1.0))

    sizes = []

    def model(x: Tensor, *, y: Tensor) -> None:
        sizes.append((len(x), len(y)))
        slope = pyro.sample("slope", dist.Normal(0.0, 1.0)).unsqueeze(-1)
        pyro.sample("y", dist.Normal(slope * x, 1.0).to_event(1), obs=y)

    guide = AnnealedGuide.along(DataPath(model, prior, 3, arguments=(0, "y")), ResidualKernel(hidden=3))
    x = torch.linspace(-1.0, 1.0, 7)
    request = Request(5, routing=Routing(detach=True, local=True))
    guide.plan((x,), {"y": 0.5 * x})
    for _ in range(2):  # the first time the programs are tried too
        sizes.clear()
        list(Annealed()(model, guide, (x,), {"y": 0.5 * x}, request))
    assert sizes == [(3, 3), (5, 5), (7, 7)]
