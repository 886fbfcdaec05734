"""Guides that find themselves under ``fit``, and guides that start at Pathfinder's Gaussian."""

import math
from functools import cache, partial

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer.autoguide import (
    AutoDiagonalNormal,
    AutoGuideList,
    AutoIAFNormal,
    AutoLowRankMultivariateNormal,
    AutoMultivariateNormal,
    AutoNormal,
)
from torch.utils.data import DataLoader

import pplvi
from pplvi.guides import AutoDeterministicNormal, AutoFlow, AutoPathfinder, start_at_pathfinder

pytestmark = pytest.mark.usefixtures("float64")

Y = torch.tensor([1.0, 2.0, -1.0, 0.5, 3.0, -2.0, 1.5, 0.0], dtype=torch.float64)
fit = partial(pplvi.fit, progress=False)


def model(y, scale=None):
    loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
    spread = pyro.sample("spread", dist.LogNormal(0.0, 1.0))
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Normal(loc, spread), obs=y)


COVARIANCE = torch.tensor([[4.0, 1.5, 0.0], [1.5, 1.0, 0.2], [0.0, 0.2, 0.25]], dtype=torch.float64)


def gaussian():
    a = pyro.sample("a", dist.MultivariateNormal(torch.tensor([5.0, -5.0]), COVARIANCE[:2, :2]))
    rest = COVARIANCE[2, :2] @ torch.linalg.inv(COVARIANCE[:2, :2])
    sd = (COVARIANCE[2, 2] - rest @ COVARIANCE[:2, 2]).sqrt()
    with pyro.plate("one", 1):
        pyro.sample("b", dist.Normal(7.0 + ((a - torch.tensor([5.0, -5.0])) * rest).sum(-1), sd))


# --- guides that find themselves ---


@pytest.mark.parametrize("kind", [AutoPathfinder, AutoDeterministicNormal])
def test_fit_of_a_guide_that_finds_itself(kind):
    result = fit(model, kind, args=(Y,), seed=0, restarts=3)
    assert result.losses.shape == (3, 0)
    assert result.reasons == ["found"] * 3
    assert result.seconds > 0
    locs = [guide.loc for guide in result.guides]
    assert not torch.equal(locs[0], locs[1])  # seeds of their own
    scores = [run.score for run in result.runs]
    assert scores[result.best] == min(scores)
    posterior = result.posterior(4000)
    assert posterior.ess > 0.2 * 4000
    assert abs(-result.runs[result.best].score - posterior.elbo[0]) < 0.05
    data = result.to_arviz()
    assert data.posterior.sizes["chain"] == 3
    text = result.summary()
    assert "nothing to train: the guide was found by a search" in text
    assert "\nobjective" not in text
    assert "restarts" in text


def test_the_same_seed_finds_the_same_and_the_random_state_stays():
    before = torch.get_rng_state()
    one, two = (fit(model, AutoPathfinder, args=(Y,), seed=4) for _ in range(2))
    assert torch.equal(before, torch.get_rng_state())
    assert torch.equal(one.guide.loc, two.guide.loc)
    assert one.runs[0].score == two.runs[0].score


def test_an_instance_searches_anew_for_these_data():
    guide = AutoPathfinder(model, seed=0).run(Y + 100.0)
    result = fit(model, guide, args=(Y,), seed=0)
    assert result.guide is guide
    assert abs(guide.median()["loc"]) < 1.0


def test_a_model_with_parameters_is_trained_around_the_guide():
    def shifted():
        shift = pyro.param("shift", torch.tensor(0.0))
        x = pyro.sample("x", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(x + shift, 1.0), obs=torch.tensor(2.0))

    result = fit(shifted, AutoPathfinder, seed=0, num_steps=300)
    assert result.losses.shape[1] > 0
    assert pyro.param("shift").item() == pytest.approx(1.0, abs=0.2)  # y - E[x], with x ~ N(1, 1/2) at shift = 0


def test_a_found_guide_is_read_back_without_another_search(tmp_path, monkeypatch):
    path = tmp_path / "found.pt"
    first = fit(model, AutoPathfinder, args=(Y,), seed=0, restarts=2, checkpoint=path)
    more = fit(model, AutoPathfinder, args=(Y,), seed=0, restarts=3, checkpoint=path, resume=path)
    for old, new in zip(first.guides, more.guides, strict=False):
        assert torch.equal(old.loc, new.loc)
    assert [run.score for run in more.runs[:2]] == [run.score for run in first.runs]
    whole = fit(model, AutoPathfinder, args=(Y,), seed=0, restarts=3)
    assert torch.equal(whole.guides[2].loc, more.guides[2].loc)
    monkeypatch.setattr(AutoPathfinder, "_find", None)  # a search would raise
    again = fit(model, AutoPathfinder, args=(Y,), seed=0, restarts=3, resume=path)
    assert again.reasons == ["found"] * 3
    assert again.posterior(100).log_evidence[0] == whole.posterior(100).log_evidence[0]
    with pytest.raises(ValueError, match="of another model or run"):
        fit(model, AutoPathfinder, args=(Y + 1,), seed=0, restarts=3, resume=path)


@pytest.mark.parametrize("options", [{"guide": AutoPathfinder}, {"guide": AutoNormal, "init": "pathfinder"}])
def test_minibatches_are_refused(options):
    with pytest.raises(ValueError, match="all data at once"):
        fit(model, **options, data=DataLoader(Y, batch_size=4))


# --- guides that start at Pathfinder's Gaussian ---


def test_full_rank_guides_start_exactly_at_a_gaussian_posterior():
    for kind in (AutoMultivariateNormal, AutoFlow):
        pyro.clear_param_store()
        guide = kind(gaussian)
        start_at_pathfinder(guide, gaussian, seed=0)
        posterior = pplvi.Posterior(gaussian, guide, num_draws=500, seed=0)
        assert posterior.gap[0] < 0.01, kind
        assert abs(posterior.log_evidence[0]) < 0.01, kind


@pytest.mark.parametrize("kind", [AutoNormal, AutoDiagonalNormal, AutoLowRankMultivariateNormal])
def test_mean_field_guides_start_at_the_nearest_mean_field(kind):
    pyro.clear_param_store()
    guide = kind(gaussian)
    start_at_pathfinder(guide, gaussian, seed=0)
    precision = torch.linalg.inv(COVARIANCE)
    best = 0.5 * float(COVARIANCE.logdet() + precision.diagonal().log().sum())
    posterior = pplvi.Posterior(gaussian, guide, num_draws=20_000, seed=0)
    gap = -posterior.elbo[0]  # log Z = 0
    if kind is AutoLowRankMultivariateNormal:  # which keeps the marginal spreads
        median = guide.quantiles([0.5, 0.8413447])
        assert (median["b"][1] - median["b"][0]).item() == pytest.approx(0.5, rel=0.05)
    else:
        assert gap == pytest.approx(best, abs=4 * posterior.elbo[1] + 0.01)


def test_parts_of_a_guide_list_start_with_their_own_sites():
    guide = AutoGuideList(gaussian)
    guide.append(AutoNormal(pyro.poutine.block(gaussian, expose=["b"])))
    guide.append(AutoMultivariateNormal(pyro.poutine.block(gaussian, expose=["a"])))
    start_at_pathfinder(guide, gaussian, seed=0)
    medians = guide.median()
    assert torch.allclose(medians["a"], torch.tensor([5.0, -5.0]), atol=0.05)
    assert torch.allclose(medians["b"], torch.tensor([7.0]), atol=0.05)
    assert torch.allclose(guide[1].scale[0], torch.tensor(2.0), rtol=0.05)


@cache
def far_losses():
    """First losses of two guides that start anywhere, and the score of the best search."""
    objective = pplvi.ELBO(200)
    far = fit(model, AutoMultivariateNormal, args=(Y,), seed=0, num_steps=1, restarts=2, objective=objective)
    return far.losses[:, 0], fit(model, AutoPathfinder, args=(Y,), seed=0).runs[0].score


@pytest.mark.parametrize(("init", "compile"), [("pathfinder", False), ("pathfinder", "trace"), ("match", False)])
def test_fit_starts_there(init, compile):
    options = {"args": (Y,), "seed": 0, "num_steps": 3, "restarts": 2, "compile": compile}
    near = fit(model, AutoMultivariateNormal, init=init, objective=pplvi.ELBO(200), **options)
    far, best = far_losses()
    assert (near.losses[:, 0] < far - 1).all()
    assert abs(near.losses[:, 0] - best).max() < 0.3


def test_a_run_that_started_there_is_resumed_to_the_bit(tmp_path):
    options = {"args": (Y,), "seed": 0, "init": "pathfinder", "schedule": None}
    whole = fit(model, AutoNormal, num_steps=20, **options)
    path = tmp_path / "run.pt"
    fit(model, AutoNormal, num_steps=10, checkpoint=path, **options)
    rest = fit(model, AutoNormal, num_steps=20, checkpoint=path, resume=path, **options)
    assert rest.losses.tolist() == whole.losses.tolist()
    with pytest.raises(ValueError, match="init: pathfinder in the file, none here"):
        fit(model, AutoNormal, num_steps=30, resume=path, **{**options, "init": None})


def test_what_cannot_start_there_is_refused():
    with pytest.raises(ValueError, match="init='laplace'"):
        fit(model, AutoNormal, args=(Y,), init="laplace")
    with pytest.raises(ValueError, match="AutoIAFNormal cannot start"):
        fit(model, AutoIAFNormal, args=(Y,), init="pathfinder")
    with pytest.raises(ValueError, match="expected an AutoGuide"):
        fit(model, lambda y: None, args=(Y,), init="pathfinder")
    with pytest.raises(ValueError, match="MCMC has no use for"):
        fit(model, "nuts", args=(Y,), init="pathfinder")


def test_float32():
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    try:
        for kind in (AutoPathfinder, AutoDeterministicNormal):
            assert math.isfinite(fit(model, kind, args=(Y.float(),), seed=0).runs[0].score)
    finally:
        torch.set_default_dtype(default)
