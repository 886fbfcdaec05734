"""Annealing under subsampled plates: one minibatch for all levels, unbiased bounds, surrogates of the likelihood."""

from itertools import combinations

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.distributions import constraints
from pyro.infer import SVI
from pyro.optim import Adam
from torch import Tensor

from pplvi.guides.annealed import AnnealedGuide
from pplvi.kernels.langevin import ControlledLangevinKernel, LangevinKernel
from pplvi.kernels.uncorrected import UncorrectedHamiltonianKernel
from pplvi.losses.elbo import ELBO
from pplvi.losses.nested import NestedELBO
from pplvi.programs.joint import execute

pytestmark = pytest.mark.usefixtures("float64")

KERNELS = {
    "langevin": LangevinKernel(0.1),
    "controlled": ControlledLangevinKernel(0.1, 3),
    "hamiltonian": UncorrectedHamiltonianKernel(0.3, 2, keep=0.5),
}


# ---------------------------------------------------------------- latents inside the plate

Y = torch.tensor([-2.0, 0.5, 1.0, 4.0], dtype=torch.float64)
WHOLE = torch.arange(4)


def local(y: Tensor, index: Tensor) -> None:
    with pyro.plate("data", 4, subsample=index):
        rate = pyro.sample("rate", dist.Gamma(2.0, 1.0))  # positive: its Jacobian belongs to the element too
        pyro.sample("y", dist.Normal(rate, 0.7), obs=y[index])


def local_base(y: Tensor, index: Tensor) -> None:
    loc = pyro.param("loc", torch.zeros(4))
    with pyro.plate("data", 4, subsample=index):
        pyro.sample("rate", dist.LogNormal(loc[index], 1.0))


@pytest.mark.parametrize("name", KERNELS)
def test_mean_over_all_minibatches_is_the_bound_of_all_data_and_its_gradient(name: str) -> None:
    guide = AnnealedGuide(local, local_base, 2, KERNELS[name])
    guide(Y, torch.tensor([0, 2]))
    with torch.no_grad():
        for n, parameter in guide.named_parameters():
            if "outputs" in n:
                parameter.normal_(0.0, 0.3)
    nodes = execute(local, guide, (Y, WHOLE), {}).guide.nodes
    sites = [n for n, s in nodes.items() if s["type"] == "sample" and not s["is_observed"] and n != "data"]
    parameters = [*guide.parameters(), pyro.param("loc").unconstrained()]

    def bound(index: Tensor) -> Tensor:
        values = {n: nodes[n]["value"].detach()[index] for n in sites if "_end_" not in n}
        run = execute(local, guide, (Y, index), {}, values=values)
        return (run.scale * (run.log_target() - run.log_forward())).sum()

    batches = [torch.tensor(pair) for pair in combinations(range(4), 2)]
    found, exact = torch.stack([bound(index) for index in batches]).mean(), bound(WHOLE)
    torch.testing.assert_close(found, exact)
    for one, other in zip(
        torch.autograd.grad(found, parameters, allow_unused=True),
        torch.autograd.grad(exact, parameters, allow_unused=True),
        strict=True,
    ):
        torch.testing.assert_close(one, other)


def test_kernels_follow_the_minibatch_that_the_draws_belong_to() -> None:
    seen: list[Tensor] = []

    def model(y: Tensor) -> None:
        with pyro.plate("data", 40, subsample_size=10) as index:
            seen.append(index)
            pyro.sample("y", dist.Normal(pyro.sample("z", dist.Normal(0.0, 1.0)), 1.0), obs=y[index])

    def base(y: Tensor) -> None:
        with pyro.plate("data", 40, subsample_size=10):
            pyro.sample("z", dist.Normal(0.0, 1.5))

    guide = AnnealedGuide(model, base, 3, LangevinKernel(0.05))
    for loss in (ELBO(5), NestedELBO("reverse_kl", 5)):
        loss.loss(model, guide, torch.linspace(-1.0, 1.0, 40))
        seen.clear()
        loss.loss(model, guide, torch.linspace(-1.0, 1.0, 40))
        assert len(seen) > 6
        assert all(torch.equal(index, seen[0]) for index in seen)


# ---------------------------------------------------------------- latents outside it: a surrogate

torch.manual_seed(0)
X = torch.randn(60, 1, dtype=torch.float64) + 0.3 * torch.randn(60, 2, dtype=torch.float64)  # correlated weights
T = X @ torch.tensor([0.5, -0.3], dtype=torch.float64) + torch.randn(60, dtype=torch.float64)
ALL = torch.arange(60)


def regression(index: Tensor) -> None:
    w = pyro.sample("w", dist.Normal(torch.zeros(2), 2.0).to_event(1))
    with pyro.plate("data", 60, subsample=index):
        pyro.sample("t", dist.Normal((X[index] * w).sum(-1), 1.0), obs=T[index])


def base(index: Tensor) -> None:
    loc = pyro.param("base.loc", torch.zeros(2))
    scale = pyro.param("base.scale", torch.full((2,), 0.1), constraint=constraints.softplus_positive)
    pyro.sample("w", dist.Normal(loc, scale).to_event(1))


def surrogate(index: Tensor) -> None:
    """The likelihood of six data, whose weights are learned."""
    w = pyro.sample("w", dist.Normal(torch.zeros(2), 2.0).to_event(1))
    weight = pyro.param("weight", torch.full((6,), 10.0), constraint=constraints.softplus_positive)
    with pyro.plate("few", 6), pyro.poutine.scale(scale=weight):
        pyro.sample("t", dist.Normal((X[:6] * w).sum(-1), 1.0), obs=T[:6])


@pytest.mark.parametrize("name", KERNELS)
def test_a_minibatch_does_not_move_draws_outside_its_plate(name: str) -> None:
    guide = AnnealedGuide(regression, base, 2, KERNELS[name])
    with pytest.raises(ValueError, match=r"plates \['data'\] are subsampled.*surrogate of the model.*AutoSemiDAIS"):
        guide(ALL[:10])
    AnnealedGuide(regression, base, 2, KERNELS[name], name="whole")(ALL)


def log_evidence() -> float:
    covariance = 4.0 * X @ X.T + torch.eye(60)
    return float(torch.distributions.MultivariateNormal(torch.zeros(60), covariance).log_prob(T))


def test_a_surrogate_is_unbiased_under_subsampling() -> None:
    guide, loss = AnnealedGuide(surrogate, base, 2, KERNELS["hamiltonian"]), ELBO(3)
    loss.loss(regression, guide, ALL)
    values, gradients = [], []
    parameters = [*guide.parameters(), *(pyro.param(n).unconstrained() for n in ("weight", "base.loc", "base.scale"))]
    for index in (ALL, *ALL.split(12)):
        for parameter in parameters:
            parameter.grad = None
        pyro.set_rng_seed(1)
        values.append(loss.loss_and_grads(regression, guide, index))
        gradients.append(torch.cat([p.grad.reshape(-1) for p in parameters if p.grad is not None]))
    assert values[0] == pytest.approx(sum(values[1:]) / 5, rel=1e-12, abs=1e-8)
    torch.testing.assert_close(gradients[0], torch.stack(gradients[1:]).mean(0))
    assert gradients[0].abs().min() > 0  # the surrogate's weights learn too


def test_annealing_on_a_surrogate_beats_its_base_on_minibatches() -> None:
    guides = {"base": base, "annealed": AnnealedGuide(surrogate, base, 4, UncorrectedHamiltonianKernel(0.1, 2, 0.5))}
    found = {}
    for name, guide in guides.items():
        pyro.clear_param_store()
        pyro.set_rng_seed(0)
        svi, order = SVI(regression, guide, Adam({"lr": 0.05}), ELBO(8)), torch.randperm(60)
        for step in range(150):
            svi.step(order.roll(12 * step)[:12])
        with torch.no_grad():
            found[name] = -ELBO(2000).loss(regression, guide, ALL)
    assert found["base"] + 0.2 < found["annealed"] < log_evidence() + 0.02, (found, log_evidence())
