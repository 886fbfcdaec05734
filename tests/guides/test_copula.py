"""A Gaussian copula with spline marginals: the identity at first, a density, and non-Gaussian marginals."""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI
from pyro.infer.autoguide import AutoDiagonalNormal, init_to_feasible
from pyro.optim import Adam

from pplvi import AutoFlow
from pplvi.guides.flows.copula import gaussian_copula
from pplvi.losses.elbo import ELBO

pytestmark = pytest.mark.usefixtures("float64")


def model() -> None:
    x = pyro.sample("x", dist.Gamma(1.0, 1.0))
    pyro.sample("y", dist.Normal(2 * x.log(), 0.5))


def test_it_starts_as_mean_field() -> None:
    guide, normal = (
        AutoFlow(model, "copula", init_scale=0.3, init_loc_fn=init_to_feasible),
        AutoDiagonalNormal(model, init_scale=0.3, init_loc_fn=init_to_feasible),
    )
    z = torch.randn(5, 2)
    guide()
    normal()
    assert torch.allclose(guide.get_posterior().log_prob(z), normal.get_posterior().log_prob(z), atol=1e-6)


def test_the_jacobian_is_the_exact_one() -> None:
    flow = gaussian_copula(3)
    with torch.no_grad():
        for parameter in flow.transform.parameters():
            parameter.copy_(torch.randn_like(parameter))
    to_data = flow.transform()
    x = torch.randn(4, 3)
    y, ladj = to_data.call_and_ladj(x)
    exact = torch.stack([torch.func.jacrev(to_data)(row).det().abs().log() for row in x])
    assert torch.allclose(ladj, exact, atol=1e-8)
    assert torch.allclose(to_data.inv(y), x, atol=1e-6)


def test_it_bends_marginals_that_a_gaussian_cannot() -> None:
    found = {}
    for name, make in {"copula": lambda m: AutoFlow(m, "copula"), "normal": AutoDiagonalNormal}.items():
        pyro.clear_param_store()
        pyro.set_rng_seed(1)
        guide = make(model)
        svi = SVI(model, guide, Adam({"lr": 0.02}), ELBO(num_particles=16, estimator="stl"))
        for _ in range(200):
            svi.step()
        found[name] = ELBO(num_particles=2000).loss(model, guide)
    assert found["copula"] < 0.4
    assert found["copula"] < found["normal"] - 0.3


def test_options_of_other_flows_are_refused() -> None:
    with pytest.raises(ValueError, match="factory did not take"):
        AutoFlow(model, "copula", hidden_features=(8,))()
