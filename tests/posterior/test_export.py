"""Export to ArviZ: right with plain ArviZ, aligned draw by draw, and named as the model is."""

import functools
import math
import warnings

import arviz as az
import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from arviz_results import elpd, field
from pyro import poutine
from pyro.infer import MCMC, NUTS, Trace_ELBO, config_enumerate
from pyro.infer.autoguide import AutoDelta, AutoMultivariateNormal, AutoNormal
from pyro.nn import PyroModule, PyroSample

import pplvi
from pplvi.examples import load
from pplvi.posterior.arviz.export import to_arviz
from pplvi.posterior.arviz.versions import is_legacy, predictive_plot
from pplvi.posterior.posterior import Posterior

pytestmark = pytest.mark.usefixtures("float64")

Y = (1.0, 2.0, 0.5)
MEAN, SD = sum(Y) / 4, 0.5  # exact posterior of `normal_mean`


def normal_mean(y):
    z = pyro.sample("z", dist.Normal(0.0, 1.0))
    pyro.deterministic("twice", 2 * z)
    with pyro.plate("datum", len(y)):
        pyro.sample("y", dist.Normal(z, 1.0), obs=y)


def normal_guide(loc, scale):
    def guide(*args, **kwargs):
        pyro.sample("z", dist.Normal(loc, scale))

    return guide


def posterior_of_mean(loc=MEAN, scale=SD, num_draws=1000, seed=0):
    return Posterior(normal_mean, normal_guide(loc, scale), (torch.tensor(Y),), num_draws=num_draws, seed=seed)


def small(source, **options):
    """An export without the groups that need another run of the model, unless asked for."""
    return to_arviz(source, **{"num_prior": 0, "posterior_predictive": False, "seed": 0, **options})


def test_a_fit_exports_itself():
    result = pplvi.fit(normal_mean, AutoNormal, args=(torch.tensor(Y),), num_steps=2, progress=False)
    with pytest.raises(ValueError, match=r"Call fit.to_arviz\(\)"):
        to_arviz(result)


def test_masked_observations_stay_as_zeros_that_change_no_density():
    y = torch.tensor([*Y, 9.0])

    def masked(y):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        with pyro.plate("datum", 4), poutine.mask(mask=torch.tensor([True, True, True, False])):
            pyro.sample("y", dist.Normal(z, 1.0), obs=y)

    posterior = Posterior(masked, normal_guide(MEAN, SD), (y,), num_draws=4000, seed=0)
    exported, own = small(posterior), posterior.loo()
    assert (exported.log_likelihood.y[..., 3] == 0).all()
    assert own["n_data_points"] == 3
    if not is_legacy():
        with pytest.raises(ValueError, match="All tail values are the same"):
            az.loo(exported)
        return
    with pytest.warns(UserWarning, match="Pareto"):
        plain = az.loo(exported, pointwise=True)
    assert np.isinf(plain.pareto_k).values.tolist() == [False, False, False, True]
    assert elpd(plain) == pytest.approx(elpd(own), abs=0.05)
    assert field(plain, "p_loo") == pytest.approx(field(own, "p_loo"), abs=0.05)
    assert plain.n_data_points == 4


# --- plain ArviZ is right -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("shift", "ratio"), [(0.0, 2.0), (0.2, 1.5), (0.0, 0.8), (-0.1, 0.9)])
def test_summary_of_a_wrong_guide_is_right(shift, ratio):
    posterior = posterior_of_mean(MEAN + shift, ratio * SD, num_draws=20_000)
    summary = az.summary(small(posterior), var_names=["z", "twice"], round_to="none")
    error = 4 * SD / math.sqrt(posterior.ess.item())
    assert error < 0.05 * SD
    assert summary.loc["z", "mean"] == pytest.approx(MEAN, abs=error)
    assert summary.loc["z", "sd"] == pytest.approx(SD, abs=error)
    assert summary.loc["twice", "sd"] == pytest.approx(2 * SD, abs=2 * error)
    as_drawn = az.summary(small(posterior, draws="guide"), var_names=["z"], round_to="none").loc["z"]
    assert abs(as_drawn["mean"] - MEAN) > error or abs(as_drawn["sd"] - SD) > error


def test_standard_errors_of_arviz_allow_for_copies():
    """Over 100 seeds, mean minus truth over ArviZ's standard error has variance 1, with an error of 0.14."""
    posteriors = [posterior_of_mean(MEAN + 0.5, 1.5 * SD, num_draws=400, seed=seed) for seed in range(100)]
    chains = [z.expand_dims("chain") for z in small(posteriors).posterior.z]
    scores = [(float(z.mean()) - MEAN) / float(az.mcse(z.to_dataset(name="z")).z) for z in chains]
    assert np.mean(np.square(scores)) == pytest.approx(1.0, abs=0.3)  # 1.4 if copies were counted apart


def eight_schools_guide(sigma, y):
    """Near the posterior, but not on it: independent sites."""
    pyro.sample("mu", dist.Normal(4.4, 3.4))
    pyro.sample("tau", dist.LogNormal(0.9, 1.1))
    with pyro.plate("school", 8):
        pyro.sample("z", dist.Normal((y - 4.4) / 70, 1.0))


@pytest.mark.filterwarnings("ignore:Estimated shape parameter of Pareto distribution", "ignore::RuntimeWarning:arviz")
def test_plain_loo_on_eight_schools_is_that_of_nuts():
    example = load("eight_schools")
    posterior = Posterior(example.model, eight_schools_guide, example.args, num_draws=10_000, seed=0)
    plain = elpd(az.loo(small(posterior, coords=example.coords)))
    assert plain == pytest.approx(-30.66, abs=0.2)
    assert abs(elpd(az.loo(small(posterior, draws="guide"))) + 30.66) > 0.25


# --- alignment ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("draws", ["psis", "guide"])
def test_groups_are_aligned_draw_by_draw(draws):
    posterior = posterior_of_mean(MEAN + 0.2, 1.5 * SD)
    data = small(posterior, draws=draws)
    z = torch.from_numpy(data.posterior.z.values)
    likelihood = dist.Normal(z[..., None], 1.0).log_prob(torch.tensor(Y))
    log_p = dist.Normal(0.0, 1.0).log_prob(z) + likelihood.sum(-1)
    log_q = dist.Normal(MEAN + 0.2, 1.5 * SD).log_prob(z)
    np.testing.assert_allclose(data.log_likelihood.y, likelihood, rtol=1e-12)
    np.testing.assert_allclose(data.posterior.twice, 2 * z, rtol=1e-12)
    np.testing.assert_allclose(data.sample_stats.log_p, log_p, rtol=1e-12)
    np.testing.assert_allclose(data.sample_stats.log_q, log_q, rtol=1e-12)
    np.testing.assert_allclose(data.sample_stats.log_weight, log_p - log_q, rtol=1e-10)
    source = data.sample_stats.source_draw.values[0] if draws == "psis" else np.arange(1000)
    pool = posterior.pool if draws == "psis" else posterior
    np.testing.assert_array_equal(data.posterior.z[0], pool.draws.latents["z"][source])
    np.testing.assert_array_equal(data.sample_stats.psis_log_weight[0], pool.psis_log_weight[source])


def test_draws_are_taken_in_proportion_to_their_smoothed_weights():
    posterior = posterior_of_mean(MEAN, 0.65 * SD)
    source = small(posterior).sample_stats.source_draw.values[0]
    pool = posterior.pool
    counts = torch.bincount(torch.from_numpy(source), minlength=pool.num_draws)
    expected, raw = (1000 * torch.softmax(each, 0) for each in (pool.psis_log_weight, pool.log_weight))
    assert (counts - expected).abs().max() < 1 < (counts - raw).abs().max()


def test_predictions_belong_to_the_draws_beside_them():
    def model(y):
        z = pyro.sample("z", dist.Normal(0.0, 100.0))
        with pyro.plate("datum", 2):
            pyro.sample("y", dist.Normal(z, 1e-6), obs=y)

    posterior = Posterior(model, normal_guide(0.0, 10.0), (torch.zeros(2),), num_draws=100, seed=0)
    data = to_arviz(posterior, draws="guide", num_prior=50, seed=0)
    assert abs(data.posterior_predictive.y - data.posterior.z).max() < 1e-4
    assert abs(data.prior_predictive.y - data.prior.z).max() < 1e-4
    assert data.prior.z.shape == (1, 50)
    assert 50 < float(data.prior.z.std()) < 150


# --- weights per datum ----------------------------------------------------------------------------------------------

LOCAL_Y = (-2.0, -1.0, 0.0, 1.0, 2.0)
NOISE = 2.0  # the exact posterior of each latent is N(y / 5, variance 4 / 5)


def local_model(y):
    with pyro.plate("datum", len(y)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.deterministic("square", z**2)
        pyro.sample("y", dist.Normal(z, NOISE), obs=y)
    pyro.deterministic("total", z.sum(-1))


def local_guide(y):
    with pyro.plate("datum", len(y)):
        pyro.sample("z", dist.Normal(0.3 * y, 1.0))


@pytest.fixture
def local():
    return Posterior(local_model, local_guide, (torch.tensor(LOCAL_Y),), num_draws=10_000, seed=0)


def test_weights_per_datum_are_resampled_per_datum(local):
    data = small(local, coords={"datum": list("abcde")})
    assert data.sample_stats.log_weight.dims == ("chain", "draw", "datum")
    assert data.sample_stats.pareto_k.dims == ("chain", "datum")
    np.testing.assert_allclose(data.sample_stats.pareto_k[0], local.pareto_k)
    summary = az.summary(data, var_names=["z"], round_to="none")
    error = 4 * math.sqrt(0.8 / local.ess.min().item())
    np.testing.assert_allclose(summary["mean"], np.array(LOCAL_Y) / 5, atol=error)
    np.testing.assert_allclose(summary["sd"], math.sqrt(0.8), atol=error)
    sources = data.sample_stats.source_draw.values[0]
    assert not np.array_equal(sources[:, 0], sources[:, 1])


def test_weights_per_datum_stay_aligned(local):
    data = small(local)
    z = torch.from_numpy(data.posterior.z.values)
    y = torch.tensor(LOCAL_Y)
    np.testing.assert_allclose(data.log_likelihood.y, dist.Normal(z, NOISE).log_prob(y), rtol=1e-12)
    log_p = dist.Normal(0.0, 1.0).log_prob(z) + dist.Normal(z, NOISE).log_prob(y)
    np.testing.assert_allclose(data.sample_stats.log_p, log_p, rtol=1e-12)
    np.testing.assert_allclose(data.posterior.square, z**2, rtol=1e-12)
    np.testing.assert_allclose(data.posterior.total, z.sum(-1), rtol=1e-9)  # over data that were picked apart
    assert data.posterior.total.dims == ("chain", "draw")


def test_plain_loo_is_right_with_weights_per_datum(local):
    # Leaving a datum out leaves its latent with the prior, so each density is that of N(0, 1 + 4).
    exact = dist.Normal(0.0, math.sqrt(1 + NOISE**2)).log_prob(torch.tensor(LOCAL_Y)).sum().item()
    assert elpd(az.loo(small(local))) == pytest.approx(exact, abs=0.1)


# --- names and shapes -----------------------------------------------------------------------------------------------


def nested(x, y):
    with pyro.plate("group", 2, dim=-3), pyro.plate("item", 3, dim=-1):
        b = pyro.sample("b", dist.Normal(torch.zeros(4), 1.0).to_event(1))
        with pyro.plate("trial", 5, dim=-2):
            pyro.sample("y", dist.Normal(b.sum(-1) + x, 1.0), obs=y)
    with pyro.plate("lone", 1):
        pyro.sample("c", dist.Normal(0.0, 1.0))


@pytest.fixture
def nested_posterior():
    args = (torch.arange(30.0).reshape(2, 5, 3), torch.zeros(2, 5, 3))
    guide = AutoMultivariateNormal(nested, init_scale=0.3)
    guide(*args)
    return Posterior(nested, guide, args, num_draws=50, seed=0)


def test_plates_are_dimensions_without_padding(nested_posterior):
    data = to_arviz(nested_posterior, num_prior=7, seed=0)
    assert data.posterior.b.dims == ("chain", "draw", "group", "item", "b_dim_0")
    assert data.posterior.b.shape == (1, 50, 2, 3, 4)
    assert data.posterior.c.dims == ("chain", "draw", "lone")
    for group in (data.log_likelihood, data.posterior_predictive):
        assert group.y.dims == ("chain", "draw", "group", "trial", "item")
        assert group.y.shape == (1, 50, 2, 5, 3)
    assert data.prior.b.shape == (1, 7, 2, 3, 4)
    assert data.observed_data.y.dims == data.constant_data.x.dims == ("group", "trial", "item")


def test_coords_label_dimensions(nested_posterior):
    coords = {"group": ["left", "right"], "b_dim_0": list("abcd")}
    data = small(nested_posterior, coords=coords)
    assert list(data.posterior.group.values) == ["left", "right"]
    assert list(data.posterior.trial.values if "trial" in data.posterior.dims else range(5)) == list(range(5))
    assert data.posterior.b.sel(group="right", b_dim_0="d").shape == (1, 50, 3)
    assert data.log_likelihood.y.sel(group="left").shape == (1, 50, 5, 3)


@pytest.mark.parametrize("names", [["feature"], ["team", "thing", "feature"]])
def test_dims_name_what_plates_do_not(nested_posterior, names):
    data = small(nested_posterior, dims={"b": names}, coords={"feature": list("abcd")})
    assert data.posterior.b.dims[2:] == ("group", "item", "feature") if len(names) == 1 else tuple(names)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"coords": {"group": ["one"]}}, r"coords\['group'\] has 1 labels; dimension 'group' has size 2"),
        ({"coords": {"grp": ["a", "b"]}}, r"coords names the dimension 'grp'; expected one of .*'group'"),
        ({"coords": {"draw": range(50)}}, r"coords names the dimension 'draw'"),
        ({"dims": {"b": ["p", "q"]}}, r"dims\['b'\] has 2 names.*give 3 names, or 1"),
        ({"dims": {"nothing": ["p"]}}, r"dims names the variables \['nothing'\]"),
        ({"dims": {"b": ["item", "group", "f"]}}, r"dimension 'group' of group 'posterior' has the sizes"),
        ({"draws": "weighted"}, "draws='weighted': expected 'psis' or 'guide'"),
        ({"restarts": "some"}, "restarts='some': expected 'all' or 'best'"),
        ({"restarts": 1}, r"restarts=1; expected one of the 1 restarts"),
        ({"losses": torch.zeros(2, 10)}, r"losses has shape \(2, 10\); expected 1 restarts"),
    ],
)
def test_wrong_options_are_refused(nested_posterior, options, message):
    if options.get("dims", {}).get("b") == ["item", "group", "f"]:
        options = {"dims": {"b": ["item", "group", "f"], "c": ["group"]}}
    with pytest.raises(ValueError, match=message):
        small(nested_posterior, **options)


def test_a_plate_named_like_a_dimension_of_arviz_is_refused():
    def model():
        with pyro.plate("chain", 3):
            pyro.sample("z", dist.Normal(0.0, 1.0))

    with pytest.raises(ValueError, match=r"'z' of group 'posterior' has the dimensions \['chain', 'draw', 'chain'\]"):
        small(Posterior(model, model, num_draws=10))


def test_a_site_named_like_a_dimension_is_refused():
    def model():
        pyro.sample("draw", dist.Normal(0.0, 1.0))

    posterior = Posterior(model, model, num_draws=10)
    with pytest.raises(ValueError, match="'draw' is both a variable and a dimension of group 'posterior'"):
        small(posterior)


@pytest.mark.parametrize("source", [[], "posterior", [1]])
def test_sources_that_are_no_posterior_are_refused(source):
    with pytest.raises(ValueError, match="expected a Posterior, a list of them or a finished"):
        to_arviz(source)


def test_arguments_of_a_run_are_refused_with_a_posterior():
    with pytest.raises(ValueError, match="args are those of an MCMC run"):
        to_arviz(posterior_of_mean(), args=(torch.tensor(Y),))


# --- data -----------------------------------------------------------------------------------------------------------


def regression(x, y=None, *rest, options=None, datum=None, **more):
    z = pyro.sample("z", dist.Normal(0.0, 1.0))
    with pyro.plate("datum", len(x)):
        pyro.sample("y", dist.Normal(z * x[:, 0], 1.0), obs=y)


class Regression(PyroModule):
    def __init__(self):
        super().__init__()
        self.z = PyroSample(dist.Normal(0.0, 1.0))

    def forward(self, x, y=None):
        z = self.z
        with pyro.plate("datum", len(x)):
            pyro.sample("y", dist.Normal(z * x[:, 0], 1.0), obs=y)


X = torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]], dtype=torch.float64)


def test_constant_data_are_the_arguments_that_are_not_observed():
    y = torch.tensor(Y)
    kwargs = {
        "options": {"w": torch.zeros(2), "n": 3},
        "datum": torch.ones(4),
        "extra": np.arange(5),
        "copy": y.clone(),
    }
    posterior = Posterior(regression, normal_guide(0.0, 1.0), (X, y, torch.zeros(6)), kwargs, num_draws=10)
    group = small(posterior).constant_data
    assert {name: group[name].dims for name in group.data_vars} == {
        "x": ("datum", "x_dim_0"),
        "rest_0": ("rest_0_dim_0",),
        "options_w": ("options_w_dim_0",),
        "datum_data": ("datum_dim_0",),
        "extra": ("extra_dim_0",),
    }
    np.testing.assert_array_equal(group.x, X)


@pytest.mark.parametrize(
    ("model", "args", "names"),
    [
        (Regression(), (X, torch.tensor(Y, dtype=torch.float64)), ["x"]),
        (poutine.scale(regression, 1.0), (X, torch.tensor(Y, dtype=torch.float64)), ["x"]),
        (poutine.condition(regression, data={"y": torch.tensor(Y, dtype=torch.float64)}), (X,), ["x"]),
        (functools.partial(regression, X), (torch.tensor(Y, dtype=torch.float64),), []),
    ],
    ids=["module", "handler", "conditioned", "partial"],
)
def test_names_of_constants_come_from_the_signature(model, args, names):
    data = small(Posterior(model, normal_guide(0.0, 1.0), args, num_draws=10))
    assert list(getattr(data, "constant_data", {})) == names
    np.testing.assert_array_equal(data.observed_data.y, Y)


def test_factors_and_missing_groups_are_left_out():
    def model():
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.factor("penalty", -(z**2))

    data = to_arviz(Posterior(model, normal_guide(0.0, 0.5), num_draws=100, seed=0), num_prior=10)
    assert set(data) == {"posterior", "log_prior", "sample_stats", "prior"}


def test_enumerated_sites_are_drawn_in_the_prior_only():
    @config_enumerate
    def model(y):
        loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
        with pyro.plate("datum", len(y)):
            k = pyro.sample("k", dist.Bernoulli(0.5))
            pyro.sample("y", dist.Normal(torch.where(k > 0, loc, -loc), 1.0), obs=y)

    def guide(y):
        pyro.sample("loc", dist.Normal(1.0, 0.6))

    data = to_arviz(Posterior(model, guide, (torch.tensor(Y),), num_draws=200, seed=0), num_prior=20)
    assert set(data.posterior.data_vars) == {"loc"}
    assert set(data.prior.data_vars) == {"loc", "k"}
    assert data.log_likelihood.y.shape == (1, 200, 3)


def test_prior_without_a_distribution_to_draw_from():
    def model(y):
        z = pyro.sample("z", dist.ImproperUniform(dist.constraints.real, (), ()))
        pyro.sample("y", dist.Normal(z, 1.0), obs=y)

    posterior = Posterior(poutine.condition(normal_mean, data={}), normal_guide(0.0, 1.0), (torch.tensor(Y),))
    posterior.model = model
    with pytest.raises(ValueError, match=r"(?s)the prior cannot be drawn from.*num_prior=0"):
        to_arviz(posterior, posterior_predictive=False)


# --- minibatches ----------------------------------------------------------------------------------------------------


def scaled(y, size=6, batch=None):
    z = pyro.sample("z", dist.Normal(0.0, 1.0))
    with pyro.plate("datum", size, subsample_size=batch or len(y)):
        pyro.sample("y", dist.Normal(z, 1.0), obs=y)


def test_subsampled_plates_are_refused_and_full_data_exported():
    guide = normal_guide(0.0, 0.5)
    minibatch = Posterior(scaled, guide, (torch.zeros(2),), num_draws=100)
    for draws in ("psis", "guide"):
        with pytest.raises(ValueError, match=r"the plates \['datum'\] are subsampled.*full data"):
            to_arviz(minibatch, draws=draws)
    data = to_arviz(
        Posterior(scaled, guide, (torch.zeros(6),), num_draws=100, seed=0), coords={"datum": list("abcdef")}
    )
    assert data.log_likelihood.y.shape == data.posterior_predictive.y.shape == (1, 100, 6)


# --- restarts, point estimates, MCMC --------------------------------------------------------------------------------


def test_restarts_are_chains_and_r_hat_measures_their_agreement():
    agreeing = [posterior_of_mean(seed=seed) for seed in range(3)]
    losses = torch.arange(30.0).reshape(3, 10)
    data = small(agreeing, losses=losses)
    assert data.posterior.z.shape == (3, 1000)
    assert float(az.rhat(data).z) < 1.01
    assert data.optimization.loss.dims == ("chain", "step")
    np.testing.assert_array_equal(data.optimization.loss, losses)
    # Narrow guides in different places, which no weight can bring together:
    apart = [posterior_of_mean(loc, 0.01) for loc in (0.0, 1.0)]
    assert float(az.rhat(small(apart)).z) > 1.5


def test_a_fit_with_restarts_is_exported_under_the_parameters_of_each():
    def learned(y):
        offset = pyro.param("offset", lambda: 5 * torch.rand(()))  # differs between restarts
        z = pyro.sample("z", dist.Normal(offset, 1.0))
        pyro.deterministic("offset_of_model", offset + 0 * z)
        with pyro.plate("datum", len(y)):
            pyro.sample("y", dist.Normal(z, 1.0), obs=y)

    fit = pplvi.fit(
        learned, AutoNormal, args=(torch.tensor(Y),), num_steps=5, restarts=2, seed=0, progress=False, optim=None
    )
    data = fit.to_arviz(coords={"datum": list("abc")}, num_prior=400)
    offsets = [params["offset"].item() for params in fit.params]
    assert abs(offsets[0] - offsets[1]) > 0.1
    np.testing.assert_allclose(data.posterior.offset_of_model[:, 0], offsets)
    z = torch.from_numpy(data.posterior.z.values)
    np.testing.assert_allclose(data.log_likelihood.y, dist.Normal(z[..., None], 1.0).log_prob(torch.tensor(Y)))
    assert float(data.prior.z.mean()) == pytest.approx(offsets[fit.best], abs=0.25)
    np.testing.assert_array_equal(data.optimization.loss, fit.losses)
    assert data.attrs["steps"] == 5
    plot = getattr(az, predictive_plot().removeprefix("az."))
    plot(data, **{"num_pp_samples" if is_legacy() else "num_samples": 5})
    assert list(az.summary(data, var_names=["z"]).index) == ["z"]


def test_best_restart_alone():
    posteriors = [posterior_of_mean(MEAN + 1), posterior_of_mean(), posterior_of_mean(MEAN - 1)]
    losses = torch.arange(30.0).reshape(3, 10)
    by_elbo = small(posteriors, draws="guide", restarts="best", losses=losses)
    np.testing.assert_array_equal(by_elbo.posterior.z[0], posteriors[1].draws.latents["z"])
    np.testing.assert_array_equal(by_elbo.optimization.loss, losses[1:2])
    named = small(posteriors, draws="guide", restarts=2)
    np.testing.assert_array_equal(named.posterior.z[0], posteriors[2].draws.latents["z"])


@pytest.mark.parametrize("other", [{"num_draws": 500}, {"data": (1.0, 2.0, 3.0)}])
def test_restarts_of_different_data_or_length_are_refused(other):
    args = (torch.tensor(other.get("data", Y)),)
    second = Posterior(normal_mean, normal_guide(0.0, 1.0), args, num_draws=other.get("num_draws", 1000))
    with pytest.raises(ValueError, match=r"restart 1 has draws of shapes .*expected equal shapes and data"):
        small([posterior_of_mean(), second])


def test_point_estimates_have_draws_but_no_weights():
    guide = AutoDelta(normal_mean)
    guide(torch.tensor(Y))
    posterior = Posterior(normal_mean, guide, (torch.tensor(Y),), num_draws=20)
    with pytest.raises(ValueError, match=r"holds \['z'\] at a point.*draws='guide'"):
        to_arviz(posterior)
    data = to_arviz(posterior, draws="guide", num_prior=10)
    assert "sample_stats" not in data
    assert data.posterior.z.shape == (1, 20)
    assert data.posterior_predictive.y.shape == (1, 20, 3)
    assert "pareto_k" not in data.attrs


@pytest.fixture(scope="module")
def mcmc():
    torch.set_default_dtype(torch.float64)
    pyro.set_rng_seed(0)
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        patch.setattr("torch.multiprocessing.cpu_count", lambda: 1)  # one chain after another, in this process
        run = MCMC(NUTS(normal_mean), num_samples=100, warmup_steps=50, num_chains=2, disable_progbar=True)
        run.run(torch.tensor(Y))
    torch.set_default_dtype(torch.float32)
    return run


def test_mcmc_has_the_same_groups(mcmc):
    data = to_arviz(mcmc, args=(torch.tensor(Y),), num_prior=10, seed=0)
    samples = mcmc.get_samples(group_by_chain=True)["z"]
    np.testing.assert_array_equal(data.posterior.z, samples)
    np.testing.assert_array_equal(data.posterior.twice, 2 * samples)
    likelihood = dist.Normal(samples[..., None], 1.0).log_prob(torch.tensor(Y))
    np.testing.assert_allclose(data.log_likelihood.y, likelihood, rtol=1e-12)
    assert set(data.sample_stats.data_vars) == {"log_p", "diverging"}
    assert data.sample_stats.diverging.dtype == bool
    assert set(data) == set(to_arviz(posterior_of_mean(), num_prior=10))
    assert data.attrs["draws"] == "mcmc"


def test_divergences_are_marked(mcmc, monkeypatch):
    monkeypatch.setattr(mcmc, "diagnostics", lambda: {"divergences": {"chain 0": [3], "chain 1": [0, 99]}})
    diverging = small(mcmc, args=(torch.tensor(Y),)).sample_stats.diverging
    assert [tuple(pair) for pair in np.argwhere(diverging.values)] == [(0, 3), (1, 0), (1, 99)]


# --- the data set ---------------------------------------------------------------------------------------------------


def test_seed_reproduces_and_leaves_the_random_state_alone():
    posterior = posterior_of_mean(MEAN, 2 * SD)
    before = torch.get_rng_state()
    first, second = (to_arviz(posterior, num_prior=20, seed=3) for _ in range(2))
    assert torch.equal(before, torch.get_rng_state())
    for group in first:
        assert first[group].equals(second[group])
    assert not to_arviz(posterior, num_prior=20, seed=4).prior.equals(first.prior)


def test_attributes_say_what_was_done():
    posteriors = [posterior_of_mean(seed=seed) for seed in range(2)]
    attrs = {"objective": Trace_ELBO, "seed": 0, "converged": True, "nothing": None, "seconds": torch.tensor(1.5)}
    data = small(posteriors, attrs=attrs)
    for found in (data.attrs, data.posterior.attrs):
        assert found["inference_library"] == "pplvi"
        assert found["pyro_version"] == pyro.__version__
        assert found["arviz_version"] == az.__version__
        assert found["guide"] == "guide"
        assert found["draws"] == "psis"
        assert (found["seed"], found["converged"], found["seconds"]) == (0, 1, 1.5)
        assert "Trace_ELBO" in found["objective"]
        assert "nothing" not in found
        np.testing.assert_allclose(found["pareto_k"], [p.pareto_k.item() for p in posteriors])
        np.testing.assert_allclose(found["ess"], [p.ess.item() for p in posteriors])
        # The guide is exact, so that every weight is the evidence.
        np.testing.assert_allclose(found["log_evidence"], [found["elbo"][0]] * 2, rtol=1e-9)


def test_netcdf_keeps_everything(tmp_path, nested_posterior):
    losses = torch.rand(1, 5)
    data = to_arviz(
        nested_posterior, num_prior=5, coords={"group": ["l", "r"]}, losses=losses, attrs={"objective": "ELBO"}, seed=0
    )
    data.to_netcdf(str(tmp_path / "fit.nc"), engine="h5netcdf")
    again = az.from_netcdf(str(tmp_path / "fit.nc"), engine="h5netcdf")
    assert set(again) == set(data) == {
        "posterior", "posterior_predictive", "log_likelihood", "log_prior", "sample_stats", "prior", "prior_predictive",
        "observed_data", "constant_data", "optimization",
    }  # fmt: skip
    for group in data:
        assert again[group].load().equals(data[group])
    assert again.attrs["objective"] == "ELBO"
    assert again.attrs["pareto_k"] == pytest.approx(data.attrs["pareto_k"])
    assert again.attrs["verdict"] in ("reliable", "usable for means, not for tails", "not reliable")
    assert "k-hat" in again.attrs["verdict_reasons"]
    for group in again:
        again[group].close()
