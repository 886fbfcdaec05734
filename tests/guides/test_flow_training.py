"""The recipe for flows: scale-free after a start at a Gaussian; and the five-point search of the step size."""

from functools import partial

import pyro
import pyro.distributions as dist
import pytest
import torch

import pplvi
from pplvi import AutoFlow, flow_recipe, search_learning_rate, start_at_pathfinder

pytestmark = pytest.mark.usefixtures("float64")

QUADRATIC = partial(AutoFlow, flow="quadratic", transforms=2)


def skewed(unit: float = 1.0) -> None:
    """A log-gamma and a normal that depends on it, in other units."""
    x = pyro.sample("x", dist.Normal(0.0, 3.0 * unit).mask(False)) / unit
    pyro.factor("log gamma", 2.0 * x - 2.0 * x.exp())
    pyro.sample("y", dist.Normal(100.0 * unit * x, 50.0 * unit))


def train(rate: float, steps: int = 40, **options) -> pplvi.Fit:
    recipe = flow_recipe(steps, rate, num_particles=32)
    return pplvi.fit(skewed, QUADRATIC, seed=0, progress=False, **{**recipe, **options})


def test_the_best_of_five_step_sizes_is_kept():
    tried = {}

    def remembered(rate):
        tried[rate] = train(rate)
        return tried[rate]

    rates = (1e-6, 1e-2)
    best = search_learning_rate(remembered, rates)
    assert list(tried) == list(rates)
    elbos = {rate: float(fit.posterior(10_000, seed=0).elbo[0]) for rate, fit in tried.items()}
    assert elbos[1e-2] > elbos[1e-6] + 0.01
    assert best is tried[1e-2]
    assert best.notes["learning rate"].startswith("0.01, by its ELBO; 1e-06: ")
    assert "learning rate" in best.summary()
    stored = pyro.get_param_store()["AutoFlow.flow.weight"]
    assert torch.equal(stored, best.guide.flow.weight)


def test_rates_that_fail_are_passed_over():
    def fails(rate):
        if rate > 0.1:
            raise ValueError("the loss stays non-finite")
        return train(rate, 2)

    assert search_learning_rate(fails, (1.0, 1e-3)).notes["learning rate"].startswith("0.001, by its ELBO; 1: failed")
    with pytest.raises(ValueError, match="stays non-finite"):
        search_learning_rate(fails, (1.0, 2.0))


@pytest.mark.parametrize("rates", [(), (0.0, 1.0), (1e-3, 1e-3), (True,), (float("inf"),)])
def test_wrong_rates_are_refused(rates):
    with pytest.raises(ValueError, match=r"expected (different positive|a sequence, each a positive finite) number"):
        search_learning_rate(train, rates)


def test_units_do_not_matter_after_a_start_at_a_gaussian():
    gaps = []
    for unit in (1.0, 1e-3):
        model = partial(skewed, unit)
        found = pplvi.fit(model, QUADRATIC, seed=0, progress=False, **flow_recipe(150, num_particles=64))
        gaps.append(float(found.posterior(10_000, seed=1).gap[0]))
    start = train(5e-3, 1).posterior(10_000, seed=1).gap[0]
    assert gaps[0] < 0.4 * start
    assert gaps[1] == pytest.approx(gaps[0], abs=0.01)


@pytest.mark.parametrize("affine", ["full", "diagonal"])
@pytest.mark.parametrize("flow", ["nsf", "quadratic", "copula"])
def test_a_guide_that_starts_at_a_gaussian_is_it(flow, affine):
    guide = AutoFlow(skewed, flow, affine=affine)
    with pytest.raises(ValueError, match="call guide"):
        guide.start_at(torch.zeros(2), torch.ones(2))
    guide()
    loc, tril = torch.tensor([0.1, 5.0]), torch.tensor([[0.5, 0.0], [30.0, 20.0]])
    root = tril if affine == "full" else tril.diagonal()
    guide.start_at(loc, root)
    normal = dist.MultivariateNormal(loc, scale_tril=tril if affine == "full" else root.diag())
    z = normal.sample((6,))
    assert torch.allclose(guide.get_posterior().log_prob(z), normal.log_prob(z), atol=1e-8)
    twin = AutoFlow(skewed, flow, affine=affine)
    with pyro.get_param_store().scope():
        twin()
        twin.load_state_dict(guide.state_dict())
        assert torch.allclose(twin.get_posterior().log_prob(z), normal.log_prob(z), atol=1e-8)


def test_start_at_pathfinder_gives_a_flow_its_units():
    guide = AutoFlow(partial(skewed, 1e-3), "nice")
    start_at_pathfinder(guide, partial(skewed, 1e-3), seed=0)
    assert torch.equal(guide.loc, torch.zeros(2))
    assert torch.allclose(guide.scale, torch.ones(2))
    assert guide.root.diagonal().max() < 0.1
