"""Pictures that ArviZ draws: predictions of prior and posterior, comparisons; whichever version is installed."""

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from matplotlib import pyplot as plt

import pplvi
from pplvi.posterior.arviz.versions import is_legacy

Y = torch.tensor([0.3, 0.6, -0.2, 1.4, 0.9, 0.1, 0.7, 1.1])


def model(y=None):
    z = pyro.sample("z", dist.Normal(0.0, 1.0))
    with pyro.plate("datum", 8):
        pyro.sample("y", dist.Normal(z, 1.0), obs=y)


def guide_of(scale):
    return lambda y: pyro.sample("z", dist.Normal(0.5, scale))


@pytest.fixture(autouse=True)
def closed():
    yield
    plt.close("all")


@pytest.fixture(scope="module")
def posterior():
    return pplvi.Posterior(model, guide_of(0.33), (Y,), num_draws=200, seed=0)


def curves(axes):
    return [line for ax in np.ravel(axes) for line in ax.lines if len(line.get_xdata()) > 10]


@pytest.mark.parametrize("prior", [False, True])
@pytest.mark.parametrize("exported", [False, True])
def test_predictions_are_drawn_with_the_data(posterior, prior, exported):
    source = pplvi.to_arviz(posterior, num_prior=30) if exported else posterior
    axes = pplvi.plot_predictive(source, prior=prior, num_draws=30)
    assert axes.shape == (1,)
    assert len(curves(axes)) >= 30
    widths = [np.ptp(line.get_xdata()) for line in curves(axes)]
    assert max(widths) < 40


def test_what_is_not_there_is_refused(posterior):
    data = pplvi.to_arviz(posterior, num_prior=0)
    with pytest.raises(ValueError, match="there is no group prior_predictive"):
        pplvi.plot_predictive(data, prior=True)


@pytest.mark.filterwarnings("ignore:Pareto k is above", "ignore:Estimated shape")
def test_a_comparison_is_drawn_without_what_is_not_reliable(posterior):
    fits = {"near": posterior, "wide": pplvi.Posterior(model, guide_of(0.5), (Y,), num_draws=200, seed=0)}
    fits["far"] = pplvi.Posterior(model, guide_of(0.02), (Y,), num_draws=200, seed=0)
    table = pplvi.compare(fits)
    axes = pplvi.plot_compare(table)
    labels = " ".join(label.get_text() for label in axes.get_yticklabels())
    assert "near" in labels
    assert "far" not in labels
    with pytest.raises(ValueError, match="can be compared"):
        pplvi.plot_compare(table.loc[["far"]])


@pytest.mark.skipif(is_legacy(), reason="ArviZ 1.x draws it")
def test_ranks_are_drawn_by_arviz():
    import arviz as az

    ranks = {"z": np.random.default_rng(0).integers(0, 100, size=50)}
    found = pplvi.Calibration(ranks, 99, "AutoNormal", 0.95, np.full(50, 0.1))
    drawn = az.plot_ecdf_pit(found.to_arviz(), backend="matplotlib")
    assert len(drawn.viz["plot"]) == 1
