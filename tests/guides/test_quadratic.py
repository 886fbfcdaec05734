"""Quadratic couplings: an exact inverse and log-determinant, the identity at the start, and what they are for."""

import copy
import pickle

import pyro
import pyro.distributions as dist
import pytest
import torch

from pplvi import ELBO, Posterior, fit, flow_recipe
from pplvi.guides import AutoFlow
from pplvi.guides.flows.quadratic import QuadraticFlow

pytestmark = pytest.mark.usefixtures("float64")


def bent(features: int, transforms: int = 3, **options: bool) -> QuadraticFlow:
    torch.manual_seed(0)
    flow = QuadraticFlow(features, transforms, **options)
    with torch.no_grad():
        for parameter in flow.parameters():
            parameter.copy_(0.2 * torch.randn_like(parameter))
    return flow


@pytest.mark.parametrize("features", [1, 2, 5])
@pytest.mark.parametrize("rotate", [True, False])
def test_inverse_and_log_determinant(features, rotate):
    transform = bent(features, rotate=rotate)()
    x = torch.randn(6, features)
    y, ladj = transform.call_and_ladj(x)
    back, ladj_back = transform.inv.call_and_ladj(y)
    assert torch.allclose(back, x, atol=1e-10)
    assert torch.allclose(ladj_back, -ladj, atol=1e-10)
    for row in range(6):
        jacobian = torch.autograd.functional.jacobian(lambda v: transform.call_and_ladj(v[None])[0][0], x[row])
        assert torch.allclose(torch.linalg.slogdet(jacobian)[1], ladj[row], atol=1e-9)


def test_zero_parameters_are_the_identity():
    x = torch.randn(7, 4)
    y, ladj = QuadraticFlow(4)().call_and_ladj(x)
    assert torch.allclose(x, y, atol=1e-12)
    assert torch.allclose(ladj, torch.zeros(7), atol=1e-12)


def test_far_away_it_stays_finite():
    y, ladj = bent(3)().call_and_ladj(torch.full((1, 3), 1e6))
    assert y.isfinite().all()
    assert ladj.isfinite().all()


def test_far_away_couplings_shift_and_stretch_by_a_bounded_amount():
    """A stack of them grows in proportion there, whatever the parameters; polynomials of degree 256 did not."""
    flow = QuadraticFlow(6, transforms=8)
    with torch.no_grad():
        flow.weight.copy_(0.1 * torch.randn_like(flow.weight))
    directions = torch.nn.functional.normalize(torch.randn(50, 6), dim=-1)
    near, far = (flow().call_and_ladj(r * directions)[0].norm(dim=-1) for r in (1e5, 1e6))
    assert (far / near - 10.0).abs().max() < 0.5
    assert (flow().call_and_ladj(1e6 * directions)[1].abs() <= 8 * 3 * 2.0).all()  # couplings, coordinates, log scale


def skewed() -> None:
    """Independent log-gamma coordinates, mixed: near a Gaussian, with third derivatives everywhere."""
    w = pyro.sample("w", dist.Normal(torch.zeros(4), 3.0).to_event(1))
    mix = torch.tensor([[1.0, 0.5, 0.0, 0.2], [0.0, 1.0, -0.5, 0.0], [0.3, 0.0, 1.0, 0.5], [0.0, -0.2, 0.0, 1.0]])
    u = w @ mix
    pyro.factor("log gamma", (3.0 * u - 3.0 * u.exp()).sum(-1))


def test_it_removes_most_of_a_gaussians_gap_in_few_steps():
    start = Posterior(skewed, fitted(1).guide, num_draws=5000, seed=0)
    end = Posterior(skewed, fitted(300).guide, num_draws=5000, seed=0)
    assert start.gap[0] > 0.06
    assert end.gap[0] < 0.3 * start.gap[0]


def fitted(steps: int):
    def guide(model):
        return AutoFlow(model, "quadratic")

    return fit(skewed, guide, seed=0, progress=False, **flow_recipe(steps, learning_rate=3e-3))


def test_copies_and_state_keep_the_rotations():
    guide, other = AutoFlow(skewed, "quadratic", transforms=2), AutoFlow(skewed, "quadratic", transforms=2)
    guide(), other()
    with torch.no_grad():
        for parameter in guide.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    z = torch.randn(5, 4)
    expected = guide.get_posterior().log_prob(z)
    for twin in (copy.deepcopy(guide), pickle.loads(pickle.dumps(guide))):
        assert torch.allclose(twin.get_posterior().log_prob(z), expected)
    assert not torch.allclose(other.get_posterior().log_prob(z), expected)
    other.load_state_dict(guide.state_dict())
    assert torch.allclose(other.get_posterior().log_prob(z), expected)


def test_sticking_the_landing_rescoring_is_that_of_the_draw():
    guide = AutoFlow(skewed, "quadratic")
    guide()
    torch.manual_seed(1)
    plain = ELBO(64).loss(skewed, guide)
    torch.manual_seed(1)
    assert ELBO(64, estimator="stl").loss(skewed, guide) == pytest.approx(plain, abs=1e-8)


def test_options_it_does_not_know_are_refused():
    with pytest.raises(ValueError, match="did not take"):
        AutoFlow(skewed, "quadratic", bins=3)()
