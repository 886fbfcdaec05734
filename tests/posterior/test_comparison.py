"""The table over fits: right numbers, right order, and honest about what does not exist."""

import math
import types

import arviz as az
import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from matplotlib import pyplot
from pyro.infer import MCMC, NUTS
from pyro.infer.autoguide import AutoDelta, AutoNormal

import pplvi
from pplvi import AutoBatchAndMatch, AutoPathfinder
from pplvi.posterior.arviz.versions import is_legacy
from pplvi.posterior.comparison import compare
from pplvi.posterior.posterior import Posterior

pytestmark = pytest.mark.usefixtures("float64")

Y = (0.3, 1.1, -0.4, 0.9, 0.2)
N = len(Y)
MEAN, SD = sum(Y) / (N + 1), (N + 1) ** -0.5
COLUMNS = ["rank", "elpd_loo", "p_loo", "elpd_diff", "weight", "se", "dse", "warning"]
NUMBERS = ["pareto_k", "ess", "elbo", "log_evidence", "log_evidence_error", "seconds"]


def normal_mean(y, noise=1.0):
    z = pyro.sample("z", dist.Normal(0.0, 1.0))
    with pyro.plate("datum", len(y)):
        pyro.sample("y", dist.Normal(z, noise), obs=y)


def far_off(data):
    z = pyro.sample("z", dist.Normal(0.0, 1.0))
    with pyro.plate("datum", len(data)):
        pyro.sample("obs", dist.Normal(z + 3.0, 1.0), obs=data)


def posterior(model=normal_mean, loc=MEAN, scale=SD, data=Y, num_draws=4000):
    def guide(*args):
        pyro.sample("z", dist.Normal(loc, scale))

    return Posterior(model, guide, (torch.tensor(data),), num_draws=num_draws, seed=0)


def point():
    guide = AutoDelta(normal_mean)
    guide(torch.tensor(Y))
    return Posterior(normal_mean, guide, (torch.tensor(Y),), num_draws=20)


def mcmc():
    run = MCMC(NUTS(normal_mean), num_samples=500, warmup_steps=100, disable_progbar=True)
    run.run(torch.tensor(Y))
    return Posterior.from_mcmc(run, normal_mean, (torch.tensor(Y),))


def exact_loo():
    """Each datum is predicted by the conjugate posterior of all others."""
    y = torch.tensor(Y)
    loc = (y.sum() - y) / N
    return dist.Normal(loc, math.sqrt(1 + 1 / N)).log_prob(y)


def exact_evidence():
    covariance = torch.eye(N) + torch.ones(N, N)
    return dist.MultivariateNormal(torch.zeros(N), covariance).log_prob(torch.tensor(Y)).item()


def test_numbers_are_those_of_the_conjugate_model():
    table = compare({"exact": posterior(), "wide": posterior(scale=1.5 * SD)})
    kl = math.log(1 / 1.5) + (1.5**2 - 1) / 2
    np.testing.assert_allclose(table["elpd_loo"], exact_loo().sum(), atol=0.05)
    np.testing.assert_allclose(table["log_evidence"], exact_evidence(), atol=0.05)
    assert table.loc["exact", "elbo"] == pytest.approx(exact_evidence(), abs=1e-9)
    assert table.loc["wide", "elbo"] == pytest.approx(exact_evidence() - kl, abs=0.06)
    assert table.loc["exact", "ess"] == pytest.approx(4000)
    assert table.loc["wide", "ess"] < 3500
    assert table.loc["wide", "pareto_k"] < 0.5
    assert table.loc["wide", "log_evidence_error"] == pytest.approx(0.009, abs=0.003)


def test_better_models_come_first():
    table = compare({"far off": posterior(far_off, MEAN - 2.5), "right": posterior()})
    assert list(table.index) == ["right", "far off"]
    assert list(table["rank"]) == [0, 1]
    assert table.loc["right", "elpd_diff"] == 0
    difference = table.loc["right", "elpd_loo"] - table.loc["far off", "elpd_loo"]
    assert table.loc["far off", "elpd_diff"] == pytest.approx(-difference)
    assert difference > 0.3
    assert list(table.columns) == ["verdict", *COLUMNS, *NUMBERS, "guide", "objective"]


def test_a_guide_that_is_not_reliable_is_marked_and_not_ranked_first():
    """A guide that is far too narrow predicts by what is nearly one value: its leave-one-out is too large."""
    narrow = posterior(loc=MEAN, scale=0.1 * SD)
    table = compare({"narrow": narrow, "wide": posterior(scale=1.5 * SD)})
    assert table.loc["narrow", "elpd_loo"] > table.loc["wide", "elpd_loo"] + 0.3
    assert list(table.index) == ["wide", "narrow"]
    assert list(table["rank"]) == [0, 1]
    assert list(table["verdict"]) == ["reliable", "not reliable"]
    assert table.loc["narrow", "warning"]
    assert table.loc["narrow", ["elpd_diff", "weight"]].isna().all()
    assert list(compare({"narrow": narrow}).index) == ["narrow"]


def test_numbers_are_those_of_arviz():
    posteriors = {"a": posterior(), "b": posterior(far_off, MEAN - 2.5)}
    scores = {name: each.loo() for name, each in posteriors.items()}
    expected = az.compare(scores) if is_legacy() else az.compare(scores, round_to="none")
    table = compare(posteriors)
    for column in ("rank", "weight", "se", "dse"):
        assert list(table[column]) == list(expected[column])
    assert list(table["elpd_diff"].abs()) == list(expected["elpd_diff"].abs())
    assert list(table["elpd_loo"]) == list(expected["elpd_loo" if is_legacy() else "elpd"])
    assert not table["warning"].any()


def test_arviz_plots_the_table():
    table = compare({"a": posterior(), "b": posterior(far_off, MEAN - 2.5)})
    az.plot_compare(table.assign(scale="log") if is_legacy() else table)
    pyplot.close("all")


def test_what_does_not_exist_is_missing_and_last():
    table = compare({"point": point(), "nuts": mcmc(), "guide": posterior()})
    assert table.index[-1] == "point"
    assert table.loc["point", [*COLUMNS, *NUMBERS]].isna().all()
    assert table.loc["point", "guide"] == "AutoDelta"
    nuts = table.loc["nuts"]
    assert nuts[["pareto_k", "elbo", "log_evidence", "log_evidence_error"]].isna().all()
    assert nuts["guide"] == "MCMC"
    assert 50 < nuts["ess"] <= 1000
    assert nuts["elpd_loo"] == pytest.approx(table.loc["guide", "elpd_loo"], abs=0.1)


def test_effective_draws_of_chains_are_those_of_the_slowest_latent():
    """One latent is new at every draw, the other at every tenth: some 100 of 1,000 draws are effective."""

    def two(y):
        shift = pyro.sample("shift", dist.Normal(0.0, 1.0))
        with pyro.plate("datum", len(y)):
            pyro.sample("y", dist.Normal(shift + pyro.sample("z", dist.Normal(0.0, 1.0)), 1.0), obs=y)

    torch.manual_seed(0)
    slow = torch.randn(2, 50).repeat_interleave(10, 1)
    chains = {"shift": slow, "z": torch.randn(2, 500, N)}
    found = Posterior.of_chains(chains, two, (torch.tensor(Y),), None, None, None)
    ess = compare({"chains": found, "guide": posterior()}).loc["chains", "ess"]
    assert 50 < ess < 200


def test_single_fits_and_point_estimates_alone_have_a_table():
    assert compare({"one": posterior()}).loc["one", "elpd_loo"] == pytest.approx(exact_loo().sum().item(), abs=0.05)
    assert compare({"point": point()})["elpd_loo"].isna().all()


def test_facts_of_a_fit_go_into_its_row():
    posteriors = [posterior(loc=MEAN + 1.0), posterior()]
    fit = types.SimpleNamespace(posteriors=posteriors, best=1, seconds=1.5, objective="ELBO()", guide_name="AutoNormal")
    row = compare({"fit": fit}).loc["fit"]
    assert (row["seconds"], row["objective"], row["guide"]) == (1.5, "ELBO()", "AutoNormal")
    assert row["ess"] == pytest.approx(4000)


def test_weights_per_datum_give_the_worst_of_the_batch_and_the_sum_of_evidence():
    def model(y):
        with pyro.plate("datum", len(y)):
            pyro.sample("y", dist.Normal(pyro.sample("z", dist.Normal(0.0, 1.0)), 2.0), obs=y)

    def guide(y):
        with pyro.plate("datum", len(y)):
            pyro.sample("z", dist.Normal(0.2 * y, torch.linspace(0.9, 1.3, len(y))))

    local = Posterior(model, guide, (torch.tensor(Y),), num_draws=4000, seed=0)
    row = compare({"local": local}).loc["local"]
    exact = dist.Normal(0.0, math.sqrt(5.0)).log_prob(torch.tensor(Y)).sum().item()
    assert row["log_evidence"] == pytest.approx(exact, abs=5 * row["log_evidence_error"])
    assert row["ess"] == pytest.approx(local.ess.min().item())
    assert row["pareto_k"] == pytest.approx(local.pareto_k.max().item())


@pytest.mark.parametrize("data", [(0.3, 1.1, -0.4, 0.9, 0.0), (0.3, 1.1)])
def test_different_data_are_refused(data):
    with pytest.raises(ValueError, match=r"'b' has other data than 'a'.*expected the same data"):
        compare({"a": posterior(), "b": posterior(data=data)})


@pytest.mark.parametrize(
    ("fits", "message"),
    [
        ({}, "fits={}: expected a dictionary of fits"),
        ({"a": 3}, "'a' is int; expected what pplvi.fit returns"),
        ([3], "fits=.*: expected a dictionary of fits"),
        (3, "fits=3: expected a dictionary of fits"),
    ],
)
def test_things_that_are_no_fits_are_refused(fits, message):
    with pytest.raises(ValueError, match=message):
        compare(fits)


def test_ambiguous_sites_are_refused_with_the_name_of_the_fit():
    def two(y):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        with pyro.plate("datum", len(y)):
            pyro.sample("y", dist.Normal(z, 1.0), obs=y)
            pyro.sample("again", dist.Normal(z, 1.0), obs=y + 1)

    both = posterior(two)
    with pytest.raises(ValueError, match=r"leave-one-out of 'two'.*var_name"):
        compare({"two": both})
    assert math.isfinite(compare({"two": both}, var_name="again").loc["two", "elpd_loo"])


def test_a_guide_that_was_found_was_trained_by_no_objective():
    options = {"args": (torch.tensor(Y),), "seed": 0, "progress": False}
    table = compare(
        {
            "found": pplvi.fit(normal_mean, AutoPathfinder, **options),
            "matched": pplvi.fit(normal_mean, AutoBatchAndMatch, **options),
            "trained": pplvi.fit(normal_mean, AutoNormal, num_steps=5, **options),
        }
    )
    assert dict(table["objective"]) == {"found": "-", "matched": "-", "trained": "ELBO(num_particles=1)"}
