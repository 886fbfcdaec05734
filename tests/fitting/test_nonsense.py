"""What makes no sense to ``fit`` or a guide is refused, and what it touches stays as it was."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer.autoguide import AutoNormal

import pplvi
from pplvi.fitting import Compile
from pplvi.training import AdaptiveClip, Plateau, loop
from pplvi.weights import Resampling, resample


def regression(x, y=None):
    slope = pyro.sample("slope", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Normal(slope * x, 1.0), obs=y)


@pytest.mark.parametrize(
    "make",
    [
        lambda x: pplvi.RenyiELBO(alpha=x),
        lambda x: pplvi.ThermodynamicELBO(betas=(0.0, x)),
        lambda x: pplvi.GeometricPath(regression, regression, 2, betas=[x]),
        lambda x: pplvi.TemperedSMC(threshold=x),
        lambda x: Resampling(x),
        lambda x: pplvi.FilteringELBO(resample=x),
        lambda x: Plateau(threshold=x),
        lambda x: AdaptiveClip(x),
        lambda x: pplvi.AutoFlow(regression, init_scale=x),
        lambda x: pplvi.RestrictedBoltzmannMachine(3, 2, init_scale=x),
        lambda x: pplvi.AutoMixture(regression, init_spread=x),
        lambda x: pplvi.BoltzmannELBO(offset_rate=x),
        lambda x: pplvi.UpDown(offset_rate=x),
        lambda x: pplvi.ResidualKernel(covariance=x),
        lambda x: pplvi.RobbinsMonro(delay=x),
        lambda x: pplvi.fit(regression, AutoNormal, args=(torch.zeros(2),), budget=x),
        lambda x: pplvi.fit(regression, AutoNormal, args=(torch.zeros(2),) * 2, clip=x, num_steps=1),
    ],
)
def test_nan_is_no_number(make):
    with pytest.raises(ValueError, match="nan"):
        make(math.nan)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: pplvi.BoltzmannELBO(estimator="reinforced"), "estimator='reinforced': expected 'reparam'"),
        (lambda: pplvi.ELBO(estimator="reinforced"), "estimator='reinforced'"),
        (lambda: resample(torch.zeros(3), scheme="best"), "scheme='best': expected"),
        (lambda: Resampling(True, "best"), "scheme='best'"),
        (lambda: pplvi.FilteringELBO(scheme="best"), "scheme='best'"),
        (lambda: pplvi.NestedELBO(scheme="best"), "scheme='best'"),
        (lambda: pplvi.UpDown(offset_rate=2.0), "offset_rate=2.0"),
        (
            lambda: pplvi.to_arviz(pplvi.Posterior(regression, AutoNormal(regression), (torch.zeros(2),)), losses="no"),
            "losses=",
        ),
        (lambda: pplvi.ELBO(vectorize_particles="fast"), "vectorize_particles='fast'"),
        (lambda: Compile(chunk=True), "chunk=True"),
    ],
)
def test_unknown_choices_are_refused(make, words):
    with pytest.raises(ValueError, match=words):
        make()


def test_sites_that_are_not_there_are_not_reparametrised():
    model = pplvi.noncentered(regression, sites=["Slope"])
    with pytest.raises(ValueError, match=r"sites=\['Slope'\]: the model has no such sites.*'slope', 'y'"):
        model(torch.zeros(2))


@pytest.mark.parametrize("options", [{}, {"compile": "trace"}, {"data": [0]}])
def test_data_get_no_gradient(options):
    """They are data, even where a tensor comes from a computation that could be differentiated."""
    x = torch.linspace(-1.0, 1.0, 5).requires_grad_()
    y = (2.0 * x).exp()
    options = {"args": (x, y), **options}
    if "data" in options:
        options["data"] = [(x, y)]
    fit = pplvi.fit(regression, AutoNormal, num_steps=3, seed=0, progress=False, **options)
    assert x.grad is None
    assert len(fit.losses[0]) == 3


@pytest.mark.parametrize("mode", [False, "trace"])
def test_a_bad_minibatch_is_found_where_it_is(mode, monkeypatch):
    """A recorded run reads its losses late, when the parameters are NaN already: the data are at fault, not they."""
    monkeypatch.setattr(loop, "MAX_ROLLBACKS", 1)
    x, good = torch.ones(2), torch.zeros(2)
    batches = [(x, good)] * 5 + [(x, torch.tensor([0.0, math.nan]))]
    with (
        pytest.warns(UserWarning, match="halved the learning rate"),
        pytest.raises(ValueError, match="the first site at fault is 'y'"),
    ):
        pplvi.fit(regression, AutoNormal, data=batches, num_steps=200, seed=0, compile=mode, stop=None, progress=False)
