"""Block neural autoregressive flows: exact slopes, an inverse by bisection, the identity at the start."""

import copy
import math
import pickle

import pyro
import pyro.distributions as dist
import pytest
import torch
from models import banana

from pplvi import ELBO, AutoFlow, CompiledSVI, fit
from pplvi.guides.flows.bnaf import BlockNeuralFlow

pytestmark = pytest.mark.usefixtures("float64")


def bent(features: int, transforms: int = 2, widths: tuple[int, ...] = (4, 6), size: float = 0.3) -> BlockNeuralFlow:
    torch.manual_seed(0)
    flow = BlockNeuralFlow(features, transforms, widths)
    with torch.no_grad():
        for parameter in flow.parameters():
            parameter.copy_(size * torch.randn_like(parameter))
    return flow


@pytest.mark.parametrize("widths", [(2,), (8, 8), (4, 6, 2)])
@pytest.mark.parametrize("transforms", [1, 2])
def test_zero_parameters_are_the_identity(widths, transforms):
    x = 5 * torch.randn(7, 3)
    y, ladj = BlockNeuralFlow(3, transforms, widths)().call_and_ladj(x)
    assert torch.allclose(x, y, atol=1e-12)
    assert torch.allclose(ladj, torch.zeros(7), atol=1e-12)


@pytest.mark.parametrize("features", [1, 3])
def test_log_determinant_and_order_of_the_coordinates(features):
    for transforms in (1, 2):
        push = bent(features, transforms)().call_and_ladj
        x = torch.randn(4, features)
        jacobians = torch.func.vmap(torch.func.jacrev(lambda v, push=push: push(v[None])[0][0]))(x)
        assert torch.allclose(torch.linalg.slogdet(jacobians)[1], push(x)[1], atol=1e-9)
        assert (jacobians.diagonal(dim1=1, dim2=2) > 0).all()
        assert transforms == 2 or torch.equal(jacobians, jacobians.tril())


def test_the_inverse_and_its_gradients():
    flow = bent(3)
    x = 3 * torch.randn(2, 1, 3)
    y, ladj = flow().call_and_ladj(x)
    back, ladj_back = flow().inv.call_and_ladj(y.detach())
    assert torch.allclose(back, x, atol=1e-8)
    assert torch.allclose(ladj_back, -ladj, atol=1e-8)
    leaf = y[0].detach().requires_grad_()
    assert torch.autograd.gradcheck(lambda v: flow().inv.call_and_ladj(v), (leaf,))
    # at a fixed y, x + dx solves f(x + dx; phi + dphi) = y: the gradient of f(f^-1(y)) in phi vanishes
    through, _ = flow().call_and_ladj(flow().inv.call_and_ladj(y.detach())[0])
    gradients = torch.autograd.grad(through.sum(), list(flow.parameters()))
    assert all(g.abs().max() < 1e-8 for g in gradients)


def test_its_tails_are_lines_and_reach_every_value():
    transform = bent(2)()
    y, ladj = transform.call_and_ladj(torch.tensor([[1e5, -1e5], [-1e5, 1e5]]))
    assert y.isfinite().all()
    assert ladj.isfinite().all()
    x, _ = transform.inv.call_and_ladj(torch.tensor([[1e4, -1e4]]))
    assert torch.allclose(transform.call_and_ladj(x)[0], torch.tensor([[1e4, -1e4]]))


def correlated() -> None:
    tril = torch.tensor([[1.0, 0.0], [0.9, math.sqrt(1 - 0.81)]])
    pyro.sample("x", dist.MultivariateNormal(torch.tensor([1.0, -2.0]), scale_tril=tril))


def shaken(model) -> AutoFlow:
    torch.manual_seed(1)
    guide = AutoFlow(model, "bnaf", hidden_features=(4,), init_scale=0.8)
    guide()
    with torch.no_grad():
        for parameter in guide.parameters():
            parameter.add_(0.15 * torch.randn_like(parameter))
    return guide


def test_the_density_of_points_from_elsewhere_integrates_to_one():
    posterior = shaken(banana).get_posterior()
    side = torch.linspace(-7, 7, 71)
    with torch.no_grad():
        mass = posterior.log_prob(torch.cartesian_prod(side, side)).exp().sum() * (side[1] - side[0]) ** 2
    assert mass.item() == pytest.approx(1.0, abs=2e-3)


def test_a_draw_carries_the_density_that_bisection_finds():
    posterior = shaken(banana).get_posterior()
    z = posterior.rsample((20,))
    assert torch.allclose(posterior.log_prob(z), posterior.log_prob(z.clone()), atol=1e-8)


@pytest.mark.parametrize(("model", "gap"), [(correlated, 0.02), (banana, 0.06)])
def test_it_recovers_a_gaussian_and_bends_to_a_banana(model, gap):
    optim = lambda p: torch.optim.Adam(p, lr=0.02)  # noqa: E731
    found = fit(
        model,
        lambda model: AutoFlow(model, "bnaf", hidden_features=(4,), init_scale=0.5),
        objective=ELBO(64),
        optim=optim,
        num_steps=400,
        seed=0,
        progress=False,
    )
    posterior = found.posterior(4000, seed=1)
    assert posterior.gap[0] < gap  # log Z is 0; a Gaussian is 0.83 and 0.56 away at best without correlations
    assert abs(posterior.log_evidence[0]) < 0.02


def test_steps_can_be_traced():
    guide = AutoFlow(banana, "bnaf", hidden_features=(4,), init_scale=0.5)
    svi = CompiledSVI(banana, guide, lambda p: torch.optim.Adam(p, lr=0.02), ELBO(32), mode="trace")
    losses = [float(svi.step()) for _ in range(30)]
    assert sum(losses[-10:]) < sum(losses[:10])


def test_copies_and_state():
    guide, other = shaken(banana), AutoFlow(banana, "bnaf", hidden_features=(4,), init_scale=0.8)
    z = torch.randn(5, 2)
    expected = guide.get_posterior().log_prob(z)
    for twin in (copy.deepcopy(guide), pickle.loads(pickle.dumps(guide))):
        assert torch.allclose(twin.get_posterior().log_prob(z), expected)
    pyro.clear_param_store()
    other()
    assert not torch.allclose(other.get_posterior().log_prob(z), expected)
    other.load_state_dict(guide.state_dict())
    assert torch.allclose(other.get_posterior().log_prob(z), expected)


def test_an_odd_number_of_units_is_refused():
    with pytest.raises(ValueError, match=r"hidden_features is \(5,\); expected even numbers"):
        AutoFlow(banana, "bnaf", hidden_features=(5,))()
