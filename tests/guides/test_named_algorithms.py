"""The documentation's table of sequential algorithms: each row is a choice of parts, estimates log Z, and trains."""

import math
from pathlib import Path
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from models import Proposal, Walk
from torch import Tensor

from pplvi.guides.annealed import AnnealedGuide
from pplvi.guides.filtered import FilteredGuide
from pplvi.kernels.flow import FlowKernel
from pplvi.kernels.gibbs import GibbsKernel
from pplvi.kernels.hamiltonian import HamiltonianKernel
from pplvi.kernels.langevin import ControlledLangevinKernel, LangevinKernel
from pplvi.kernels.residual import ResidualKernel
from pplvi.kernels.uncorrected import UncorrectedHamiltonianKernel
from pplvi.losses.elbo import ELBO
from pplvi.losses.filtering import FilteringELBO
from pplvi.losses.nested import NestedELBO
from pplvi.objectives.step import Routing
from pplvi.samplers.annealed import Annealed, Resampling
from pplvi.samplers.base import Request
from pplvi.samplers.paths import DataPath
from pplvi.samplers.state_space import StateSpace
from pplvi.weights.algebra import logmeanexp

pytestmark = pytest.mark.usefixtures("float64")

TABLE = (Path(__file__).parents[2] / "docs" / "sequential.md").read_text()
Y = torch.tensor([0.8, 1.6, -0.2], dtype=torch.float64)


def prior(y: Tensor) -> None:
    pyro.sample("z", dist.Normal(0.0, 1.5))


def model(y: Tensor) -> None:
    z = pyro.sample("z", dist.Normal(0.0, 1.5))
    pyro.sample("y", dist.Normal(z.unsqueeze(-1), 1.0).expand([*z.shape, len(y)]).to_event(1), obs=y)


def exact() -> float:
    covariance = 2.25 * torch.ones(3, 3) + torch.eye(3)
    return float(torch.distributions.MultivariateNormal(torch.zeros(3), covariance).log_prob(Y))


def guide(kernel: Any, **options: Any) -> Any:
    return AnnealedGuide(model, prior, 3, kernel, **options)


MOVES = HamiltonianKernel(0.5, 2)
ROWS: dict[str, tuple[Any, Any, Any]] = {
    "AIS": (lambda: guide(MOVES), False, None),
    "SMC sampler": (lambda: guide(MOVES), 0.5, None),
    "IBIS": (lambda: AnnealedGuide.along(DataPath(model, prior, 3), MOVES), 0.5, None),
    "DAIS": (lambda: guide(UncorrectedHamiltonianKernel(0.3, 2)), False, ELBO(5)),
    "UHA": (lambda: guide(UncorrectedHamiltonianKernel(0.3, 1, keep=0.5)), False, ELBO(5)),
    "MCVAE": (lambda: guide(LangevinKernel(0.05)), False, ELBO(5)),
    "MCD": (lambda: guide(ControlledLangevinKernel(0.05, control="reverse")), False, ELBO(5)),
    "CMCD": (lambda: guide(ControlledLangevinKernel(0.05)), False, ELBO(5)),
    "AFT": (lambda: guide((FlowKernel(hidden=4), MOVES)), 0.5, NestedELBO("reverse_kl", 20, resample=0.5)),
    "AVO": (lambda: guide(ResidualKernel(hidden=4, covariance=0.1)), False, NestedELBO("avo", 20)),
    "NVI": (
        lambda: guide(ResidualKernel(hidden=4, covariance=0.1), learn_path=True),
        True,
        NestedELBO("reverse_kl", 20, resample=True),
    ),
}


@pytest.mark.parametrize("name", ROWS)
def test_row_estimates_the_evidence_and_trains(name: str) -> None:
    make, resample, loss = ROWS[name]
    assert f"| {name}" in TABLE
    annealed = make()
    annealed.plan((Y,), {})
    request = Request(600, routing=Routing(detach=True, local=True))
    with torch.no_grad():
        walks = [list(Annealed(Resampling(resample))(model, annealed, (Y,), {}, request)) for _ in range(6)]
    ratios = (logmeanexp(torch.stack([steps[-1].log_weight for steps in walks]), 1) - exact()).exp()
    assert abs(float(ratios.mean()) - 1) < 4 * float(ratios.std()) / 6**0.5
    if loss is None:
        assert not list(annealed.parameters())
    else:
        loss.loss_and_grads(model, annealed, Y)
        moved = [parameter.grad.abs().sum() > 0 for parameter in annealed.parameters() if parameter.grad is not None]
        assert any(moved)


@pytest.mark.parametrize("name", ["FIVO", "NASMC", "VSMC"])
def test_row_over_time_estimates_the_evidence_and_trains(name: str) -> None:
    assert name in TABLE
    pair, loss = (
        ((StateSpace(Walk()), FilteredGuide(Walk(), Proposal(), 100)), ELBO())
        if name == "VSMC"
        else ((Walk(), Proposal()), FilteringELBO(100, "forward_kl" if name == "NASMC" else "bound", resample=True))
    )
    joint = torch.tensor([[2 + min(i, j) + (i == j) for j in range(3)] for i in range(3)], dtype=torch.float64)
    log_z = float(torch.distributions.MultivariateNormal(torch.zeros(3), joint).log_prob(Y))
    ratios = torch.tensor([math.exp(-loss.loss(*pair, Y) - log_z) for _ in range(30)])
    assert abs(float(ratios.mean()) - 1) < 4 * float(ratios.std()) / 30**0.5
    loss.loss_and_grads(*pair, Y)
    assert float(pyro.param("weight").unconstrained().grad) != 0


def test_discrete_sites_take_gibbs_moves() -> None:
    """Any row on a model with discrete sites: see test_gibbs.py and test_proper_weights.py."""
    assert "GibbsKernel" in TABLE
    assert GibbsKernel.partial
