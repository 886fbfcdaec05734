"""``fit(model, "auto")``: the cheapest guide that can be trusted, what was tried, and the budget."""

import math
from functools import partial

import pyro
import pyro.distributions as dist
import pytest
import torch

import pplvi
from pplvi import AutoFlow
from pplvi.selection import flow_recipe, select

pytestmark = pytest.mark.usefixtures("float64")

fit = partial(pplvi.fit, progress=False)


def regression(x, y):
    w = pyro.sample("w", dist.Normal(torch.zeros(2), 1.0).to_event(1))
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Normal(w[..., 0] + w[..., 1] * x, 1.0), obs=y)


def crooked():
    """A funnel: no Gaussian is near it."""
    v = pyro.sample("v", dist.Normal(0.0, 3.0))
    with pyro.plate("many", 20):
        pyro.sample("x", dist.Normal(0.0, (0.5 * v).exp()))


def test_pathfinder_is_taken_where_it_is_good_enough():
    x = torch.linspace(-1, 1, 20)
    result = fit(regression, "auto", args=(x, 2 * x), seed=0)
    assert result.guide_name == "AutoPathfinder"
    assert float(result.posterior(4000).pareto_k) < 0.7
    text = result.summary()
    assert "tried             AutoPathfinder: k-hat" in text
    assert "taken             AutoPathfinder, as its k-hat is below 0.7" in text
    assert result.to_arviz().posterior.sizes["chain"] == 1


def test_richer_families_are_tried_one_after_another_until_one_is_good(monkeypatch):
    ks = iter([0.9, 0.8, 1.2, 0.4])
    names = []

    class Fitted:
        def __init__(self, guide):
            self.guide_name = getattr(guide, "__name__", "flow")
            self.runs, self.best = [None], 0

        def posterior(self, num_draws):
            return type("P", (), {"pareto_k": torch.tensor(next(ks))})

    monkeypatch.setattr("pplvi.selection.publish", lambda run: None)

    def fake(guide, **options):
        names.append((getattr(guide, "__name__", "flow"), options.get("num_steps")))
        return Fitted(guide)

    best = select(fake, budget=30.0)
    assert [name for name, _ in names[:3]] == ["AutoPathfinder", "AutoBatchAndMatch", "AutoDeterministicNormal"]
    assert names[-1] == ("flow", 2000)
    assert best.guide_name == "flow"
    assert best.notes["taken"] == "AutoFlow('quadratic'), as its k-hat is below 0.7"
    assert best.notes["tried"].count("k-hat") == 4


def test_the_budget_ends_the_search_with_the_best_so_far():
    result = fit(crooked, "auto", seed=0, budget=0.5)
    assert "time" in result.notes["taken"]
    assert "least k-hat" in result.notes["taken"]
    assert math.isfinite(result.runs[0].score)


def test_a_family_that_fails_is_passed_over_and_all_failing_is_an_error():
    calls = []

    def fake(guide, **options):
        calls.append(guide)
        raise ValueError(f"no {len(calls)}: expected another")

    with pytest.raises(ValueError, match="no 1"):
        select(fake, budget=5.0)
    assert len(calls) >= 3
    with pytest.raises(ValueError, match="discrete sample site 'k'"):
        fit(lambda: pyro.sample("k", dist.Poisson(3.0)), "auto", seed=0)


def test_the_recipe_trains_a_flow():
    def banana():
        x = pyro.sample("x", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(0.5 * x**2, 0.5))

    guide = partial(AutoFlow, flow="quadratic")
    start = fit(banana, guide, seed=0, **flow_recipe(1)).posterior(4000)
    end = fit(banana, guide, seed=0, **flow_recipe(400)).posterior(4000)
    assert end.gap[0] < 0.05
    assert end.gap[0] < 0.2 * start.gap[0]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"budget": 0.0}, "positive number of seconds"),
        ({"budget": True}, "positive number of seconds"),
        ({"num_steps": 10}, "guide='auto' has no use for"),
        ({"data": [torch.zeros(3)]}, "guide='auto' has no use for"),
    ],
)
def test_what_auto_has_no_use_for_is_refused(options, words):
    with pytest.raises(ValueError, match=words):
        fit(crooked, "auto", **options)


def test_a_budget_is_for_auto_only():
    with pytest.raises(ValueError, match="budget=3"):
        fit(crooked, pplvi.AutoPathfinder, budget=3)
