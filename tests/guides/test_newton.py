"""Newton's method at the end of paths: ill-conditioned minima, refusals, and the guides that stand on it."""

import pyro
import pyro.distributions as dist
import pytest
import torch

from pplvi import Posterior
from pplvi.guides import AutoDeterministicNormal, AutoPathfinder
from pplvi.guides.search.lbfgs import Point
from pplvi.guides.search.newton import newton

pytestmark = pytest.mark.usefixtures("float64")


def with_gradient(value):
    def function(x):
        leaf = x.detach().requires_grad_()
        values = value(leaf)
        return values.detach(), torch.autograd.grad(values.sum(), leaf)[0]

    return function


def path(value, start):
    function = with_gradient(value)
    at = torch.tensor([start])
    values, gradients = function(at)
    exact = lambda x: torch.autograd.functional.hessian(lambda u: value(u[None]).sum(), x)  # noqa: E731
    return newton(function, exact, Point(at[0], float(values[0]), gradients[0]))


def test_rosenbrock_from_where_it_curves_the_wrong_way():
    found = path(lambda x: 100 * (x[:, 1] - x[:, 0] ** 2) ** 2 + (1 - x[:, 0]) ** 2, [0.0, 1.0])
    assert torch.allclose(found[-1].position, torch.ones(2), atol=1e-5)
    values = [point.value for point in found]
    assert values == sorted(values, reverse=True)


def test_an_ill_conditioned_bowl_takes_one_step():
    bowl = 10.0 ** torch.arange(-4.0, 6.0, 2.0)
    found = path(lambda x: 0.5 * (bowl * x.square()).sum(1), [1.0] * 5)
    assert len(found) == 1
    assert torch.allclose(found[0].position, torch.zeros(5), atol=1e-9)


@pytest.mark.parametrize("value", [lambda x: x.sum(1), lambda x: -x.square().sum(1), lambda x: (-x).exp().sum(1)])
def test_without_a_minimum_there_is_no_path(value):
    assert path(value, [0.3, 0.4]) == []


def test_at_a_minimum_it_stays():
    assert path(lambda x: x.square().sum(1), [0.0, 0.0])[-1].position.tolist() == [0.0, 0.0]


def collinear() -> None:
    """Eight nearly collinear predictors: sds differ by hundreds, and mean field sees the smallest."""
    generator = torch.Generator().manual_seed(0)
    common = 10 * torch.randn(400, 1, generator=generator)
    x = common + 0.1 * torch.randn(400, 8, generator=generator)
    b = pyro.sample("b", dist.Normal(torch.zeros(8), 100.0).to_event(1))
    sigma = pyro.sample("sigma", dist.HalfCauchy(2.5))
    y = x.sum(1) + torch.randn(400, generator=generator)
    pyro.factor("y", dist.Normal(b @ x.T, sigma[..., None]).log_prob(y).sum(-1))


@pytest.mark.parametrize(("kind", "most"), [(AutoPathfinder, 2_000), (AutoDeterministicNormal, 12_000)])
def test_ill_conditioned_posteriors_are_found_in_few_gradients(kind, most):
    guide = kind(collinear, seed=0).run()
    posterior = Posterior(collinear, guide, num_draws=4000, seed=0)
    assert guide.num_gradients < most
    assert posterior.ess / 4000 > 0.8
    assert posterior.pareto_k < 0.7


def test_a_mean_field_that_is_far_narrower_than_its_posterior_is_no_sign_of_an_improper_one():
    guide = AutoDeterministicNormal(collinear, seed=0, linear_response=False).run()
    wide = AutoDeterministicNormal(collinear, seed=0).run()
    assert bool((guide.get_posterior().variance[:8] < 1e-2 * wide.get_posterior().variance[:8]).all())


def test_the_paper_has_no_newton_steps():
    scale = torch.logspace(0, 1.5, 60)
    model = lambda: pyro.sample("x", dist.Normal(torch.zeros(60), scale).to_event(1))  # noqa: E731
    long, short = (AutoPathfinder(model, seed=0, exact_hessian=e, moment_matching=0).run() for e in (False, True))
    assert min(len(p.elbos) for p in long.paths) > 1.2 * max(len(p.elbos) for p in short.paths)


def test_a_start_where_the_density_explodes_finds_its_way():
    """The gradient at the start is of the order of 1e30: a thousandth of it leads out of the world."""
    model = lambda: pyro.factor("f", -((10 * pyro.sample("x", dist.Normal(0.0, 1.0))) ** 20))  # noqa: E731
    guide = AutoPathfinder(model, seed=0, init_loc_fn=lambda site: torch.tensor(3.0)).run()
    assert guide.best_values()["x"].abs() < 0.1
