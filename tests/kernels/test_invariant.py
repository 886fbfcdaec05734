"""Kernels that leave their target invariant: ranks, proper weights, independent elements."""

from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor

from pplvi.guides.annealed import AnnealedGuide
from pplvi.kernels.coordinates import coordinates_of
from pplvi.kernels.hamiltonian import HamiltonianKernel
from pplvi.kernels.invariant import Frame
from pplvi.losses.elbo import ELBO
from pplvi.losses.nested import NestedELBO
from pplvi.objectives.step import Routing, Step
from pplvi.samplers.annealed import Annealed, Resampling
from pplvi.samplers.base import Request
from pplvi.weights.algebra import logmeanexp

pytestmark = pytest.mark.usefixtures("float64")

LOCAL = Routing(detach=True, local=True)
KERNELS = [HamiltonianKernel(0.8), HamiltonianKernel(0.3, 4), HamiltonianKernel(0.5, 2, 3)]


def walk(model: Any, guide: Any, *args: Any, count: int, resample: bool | float = False) -> list[Step]:
    return list(Annealed(Resampling(resample))(model, guide, args, {}, Request(count, routing=LOCAL)))


def gamma_model() -> None:
    pyro.sample("z", dist.Gamma(3.0, 2.0))


@pytest.mark.parametrize("kernel", KERNELS, ids=str)
def test_exact_draws_stay_exact(kernel: HamiltonianKernel) -> None:
    """Ranks: a draw and what becomes of it in ten transitions are exchangeable draws of the target."""
    target = torch.distributions.Gamma(3.0, 2.0)
    (site,) = coordinates_of(gamma_model, (), {})
    move, _ = kernel.build([site], lambda *_: torch.zeros(()))
    frame = Frame(
        lambda v: target.log_prob(v["z"]), lambda x, events: x.sum(-1) if events else x, lambda x, _: x[:, None]
    )
    start = {"z": target.sample((4000,))}
    end = start
    for _ in range(10):
        end = move.move(end, frame)
    assert float((end["z"] != start["z"]).double().mean()) > 0.9
    uniform = torch.special.gammainc(torch.tensor(3.0), 2.0 * end["z"]).sort().values
    distance = float((uniform - (torch.arange(4000) + 0.5) / 4000).abs().max())  # Kolmogorov-Smirnov
    assert distance < 1.95 / 4000**0.5  # one in a thousand


def bimodal() -> None:
    """Z = 1/2, second moment 4.49."""
    z = pyro.sample("z", dist.Normal(0.0, 1.0).mask(False))
    modes = dist.Normal(torch.tensor([2.0, -2.0]), 0.7)
    pyro.factor("density", torch.logsumexp(modes.log_prob(z.unsqueeze(-1)), -1) - torch.tensor(4.0).log())


def base() -> None:
    pyro.sample("z", dist.Normal(0.0, 2.5))


@pytest.mark.parametrize("resample", [False, True, 0.7])
@pytest.mark.parametrize("kernel", KERNELS, ids=str)
@pytest.mark.table(2)
def test_weights_are_proper(kernel: HamiltonianKernel, resample: bool | float) -> None:
    guide, squares = AnnealedGuide(bimodal, base, 4, kernel), []

    found = []
    for _ in range(20):
        log_weight = walk(recording(squares), guide, count=300, resample=resample)[-1].log_weight
        weight = log_weight.exp()
        found.append(torch.stack([weight.mean(), (weight * squares[-1]).mean()]))
    estimates = torch.stack(found)
    error = estimates.std(0) / len(estimates) ** 0.5
    exact = 0.5 * torch.tensor([1.0, 4.49])
    assert ((estimates.mean(0) - exact).abs() < 4 * error).all(), (estimates.mean(0), error)
    assert (error < 0.1 * exact).all()


def recording(squares: list[Tensor]) -> Any:
    """The bimodal target, keeping the values that it was scored at."""

    def model() -> None:
        tracer = pyro.poutine.trace(bimodal)
        tracer()
        squares.append(tracer.trace.nodes["z"]["value"].detach() ** 2)

    return model


def test_elements_of_a_plate_have_weights_of_their_own() -> None:
    y = torch.tensor([0.5, -1.0, 2.0])

    def model(y: Tensor) -> None:
        with pyro.plate("data", 3):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            scale = pyro.sample("scale", dist.LogNormal(0.0, 0.3))
            pyro.sample("y", dist.Normal(z.sum(-1), scale), obs=y)

    def start(y: Tensor) -> None:
        with pyro.plate("data", 3):
            pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("scale", dist.LogNormal(0.0, 0.3))

    guide = AnnealedGuide(model, start, 5, HamiltonianKernel(0.3, 3))
    log_weight = walk(model, guide, y, count=3000, resample=0.5)[-1].log_weight
    assert log_weight.shape == (3000, 3)
    scale = torch.distributions.LogNormal(0.0, 0.3).sample((400_000, 1))
    exact = torch.distributions.Normal(0.0, (2 + scale**2).sqrt()).log_prob(y).exp().mean(0)
    assert (logmeanexp(log_weight).exp() / exact - 1).abs().max() < 0.05


def test_a_path_is_learned_through_moves_that_have_no_gradient() -> None:
    guide = AnnealedGuide(bimodal, base, 4, HamiltonianKernel(0.5, 2), learn_path=True)
    for divergence in ("reverse_kl", "forward_kl"):
        NestedELBO(divergence, 50, resample=True).loss_and_grads(bimodal, guide)
    assert guide.path.logits_unconstrained.grad.abs().sum() > 0


def test_it_has_no_density_on_the_extended_space() -> None:
    guide = AnnealedGuide(bimodal, base, 2, HamiltonianKernel(0.5))
    with pytest.raises(ValueError, match="has no density"):
        ELBO().loss(bimodal, guide)
    with pytest.raises(ValueError, match="num_leapfrog=0: expected"):
        HamiltonianKernel(0.1, 0)
