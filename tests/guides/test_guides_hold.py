"""What every continuous guide has to hold: normalised densities on any support, calibration, clear refusals."""

import math
from functools import partial
from typing import ClassVar

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI
from pyro.infer.autoguide import AutoDiagonalNormal, AutoMultivariateNormal, AutoNormal
from torch.distributions import biject_to, constraints

from pplvi import ELBO, Posterior
from pplvi.guides import AutoBatchAndMatch, AutoDeterministicNormal, AutoFlow, AutoPathfinder, start_at_pathfinder

pytestmark = pytest.mark.usefixtures("float64")

FOUND = {"pathfinder": AutoPathfinder, "deterministic": AutoDeterministicNormal, "match": AutoBatchAndMatch}
TRAINED = {
    "normal": AutoNormal,
    "full rank": AutoMultivariateNormal,
    "nsf": partial(AutoFlow, flow="nsf", transforms=2, hidden_features=(16,)),
    "nice": partial(AutoFlow, flow="nice", transforms=2, hidden_features=(16,)),
    "quadratic": partial(AutoFlow, flow="quadratic", transforms=3),
    "copula": partial(AutoFlow, flow="copula"),
    "bnaf": partial(AutoFlow, flow="bnaf", hidden_features=(4,)),
}
EVERY = [*FOUND, *TRAINED]


def ordered() -> None:
    base = dist.Normal(torch.zeros(3), 1.0).to_event(1)
    pyro.sample("x", dist.TransformedDistribution(base, biject_to(dist.constraints.ordered_vector)))


def interval() -> None:
    x = pyro.sample("x", dist.Uniform(-1.0, 2.0))
    pyro.factor("bump", dist.Beta(5.0, 6.0).log_prob((x + 1) / 3))  # still normalised: the uniform density is 1 / 3


SUPPORTS = {
    "simplex": lambda: pyro.sample("x", dist.Dirichlet(torch.tensor([6.0, 8.0, 7.0]))),
    "ordered": ordered,
    "correlation": lambda: pyro.sample("x", dist.LKJCholesky(3, 4.0)),
    "positive": lambda: pyro.sample("x", dist.Gamma(6.0, 2.0)),
    "interval": interval,
}


def made(name: str, model) -> object:
    """A guide near the posterior: found, or started there and then bent a little."""
    if name in FOUND:
        return FOUND[name](model, seed=0).run()
    pyro.clear_param_store()
    torch.manual_seed(0)
    guide = TRAINED[name](model)
    start_at_pathfinder(guide, model, seed=0)
    with torch.no_grad():
        for parameter in guide.parameters():
            parameter.add_(0.03 * torch.randn_like(parameter))
    return guide


@pytest.mark.parametrize("support", SUPPORTS)
@pytest.mark.parametrize("name", EVERY)
@pytest.mark.table(2)
def test_the_density_integrates_to_one_with_the_jacobian_counted_once(name, support):
    """The model is normalised, so E_q[p / q] = 1 for a normalised q; a Jacobian left out or counted twice is seen."""
    model = SUPPORTS[support]
    value, error = Posterior(model, made(name, model), num_draws=6000, seed=1).log_evidence
    assert error < 0.05
    assert abs(value) < 4 * error + 1e-3


# --- simulation-based calibration (Talts et al. 2018) ---

X = torch.linspace(-1.0, 1.0, 15, dtype=torch.float64)
DESIGN = torch.stack([torch.ones_like(X), 1.0 + 0.25 * X], 1)  # nearly collinear: correlation -0.99
BINS, DRAWS, SIMULATIONS = 10, 99, 60


def regression(y=None):
    w = pyro.sample("w", dist.Normal(torch.zeros(2), 1.0).to_event(1))
    return pyro.sample("y", dist.Normal(w @ DESIGN.T, 0.5).to_event(1), obs=y)


class OneSearch(AutoPathfinder):
    """One search on each data for all the guides that start there."""

    found: ClassVar = {}

    def run(self, y):
        key = tuple(y.tolist())
        if key not in self.found:
            self.found[key] = super().run(y)
        return self.found[key]


def chi_square(name: str) -> float:
    """Pearson's statistic of the ranks of the true coefficients among draws of the guide, 9 degrees of freedom."""
    ranks = []
    for seed in range(SIMULATIONS):
        pyro.set_rng_seed(seed)
        pyro.clear_param_store()
        truth = torch.randn(2)
        y = truth @ DESIGN.T + 0.5 * torch.randn(len(X))
        guide = TRAINED[name](regression)
        start_at_pathfinder(guide, regression, (y,), search=OneSearch, num_paths=1, moment_matching=0)
        svi = SVI(regression, guide, pyro.optim.Adam({"lr": 1e-3}), ELBO(8))
        for _ in range(3):
            svi.step(y)
        with torch.no_grad(), pyro.plate("draws", DRAWS):
            w = guide(y)["w"]
        ranks.append(int((w[:, 0] < truth[0]).sum()))
    counts = torch.bincount(torch.tensor(ranks) * BINS // (DRAWS + 1), minlength=BINS).double()
    expected = SIMULATIONS / BINS
    return float(((counts - expected) ** 2 / expected).sum())


@pytest.mark.parametrize("name", ["full rank", "quadratic"])
def test_full_rank_guides_are_calibrated(name):
    assert chi_square(name) < 27.9  # the 0.999 quantile


def test_mean_field_is_not_calibrated_on_a_correlated_posterior():
    assert chi_square("normal") > 60.0


# --- refusals ---


def discrete() -> None:
    pyro.sample("x", dist.Normal(0.0, 1.0))
    pyro.sample("k", dist.Poisson(3.0))


@pytest.mark.parametrize("name", [*FOUND, "nsf", "quadratic"])
def test_a_discrete_site_is_refused_by_name(name):
    with pytest.raises(ValueError, match="discrete sample site 'k'"):
        {**FOUND, **TRAINED}[name](discrete)()


@pytest.mark.parametrize("name", FOUND)
def test_an_improper_posterior_does_not_run_away(name):
    def rising() -> None:
        x = pyro.sample("x", dist.ImproperUniform(constraints.real, (), ()))
        pyro.factor("rising", x)

    with pytest.raises(ValueError, match="improper"):
        FOUND[name](rising, seed=0)()


@pytest.mark.parametrize("name", FOUND)
def test_a_log_density_that_is_not_finite_is_told_with_its_site(name):
    def broken() -> None:
        x = pyro.sample("x", dist.Normal(0.0, 1.0))
        pyro.sample("first", dist.Normal(x, 1.0), obs=torch.tensor(1.0))
        pyro.sample("second", dist.Normal(x, 1.0), obs=torch.tensor(math.nan))

    with pytest.raises(ValueError, match="the first bad site is 'second'"):
        FOUND[name](broken, seed=0)()


@pytest.mark.parametrize("name", EVERY)
def test_a_plate_whose_size_changed_is_refused(name):
    def model(y):
        with pyro.plate("data", len(y)):
            x = pyro.sample("x", dist.Normal(0.0, 1.0))
            pyro.sample("y", dist.Normal(x, 1.0), obs=y)

    guide = {**FOUND, **TRAINED}[name](model)
    guide(torch.zeros(3))
    with pytest.raises(ValueError, match="plate 'data'"):
        Posterior(model, guide, (torch.zeros(5),), num_draws=10)
    with pytest.raises(ValueError, match="plate 'data'"):
        ELBO().loss(model, guide, torch.zeros(5))


# --- a guide that was set up on a minibatch ---

DATA = torch.linspace(-2.0, 2.0, 10, dtype=torch.float64)


def locals_of(index=None):
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    with pyro.plate("data", 10, subsample=index) as chosen:
        z = pyro.sample("z", dist.Normal(mu, 1.0))
        pyro.sample("y", dist.Normal(z, 1.0), obs=DATA[chosen])


def test_a_guide_with_parameters_of_a_minibatch_is_refused_with_the_full_data():
    guide = AutoDiagonalNormal(locals_of)
    guide(torch.arange(3))
    for use in (lambda: Posterior(locals_of, guide, num_draws=10), lambda: ELBO().loss(locals_of, guide)):
        with pytest.raises(ValueError, match="has parameters for 3 elements of plate 'data', which has 10"):
            use()


def test_a_guide_with_all_parameters_that_is_set_up_on_a_minibatch_has_a_posterior_over_all_data():
    guide = AutoNormal(locals_of)
    guide(torch.arange(3))
    posterior = Posterior(locals_of, guide, num_draws=10)
    assert posterior.draws.latents["z"].shape == (10, 10)
    assert posterior.has_weights
    with pytest.raises(ValueError, match=r"the guide has 3 of 10 elements of plate 'data'.*has all 10"):
        ELBO().loss(locals_of, guide)


def test_minibatches_on_both_sides_and_plates_of_the_guide_stay_allowed():
    guide = AutoNormal(locals_of)
    guide(torch.arange(3))
    assert math.isfinite(ELBO().loss(locals_of, guide, torch.arange(3, 6)))
    own = AutoNormal(locals_of, create_plates=lambda index=None: pyro.plate("data", 10, subsample=index))
    assert math.isfinite(ELBO().loss(locals_of, own, torch.arange(3)))
    assert Posterior(locals_of, own, num_draws=10).draws.latents["z"].shape == (10, 10)

    def drawn():
        with pyro.plate("data", 10, subsample_size=4) as chosen:
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("y", dist.Normal(z, 1.0), obs=DATA[chosen])

    assert math.isfinite(ELBO().loss(drawn, AutoNormal(drawn)))
