"""Corrected leave-one-out against exact answers, NUTS and ArviZ."""

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from arviz_results import elpd, field, from_dict, pointwise
from models import Chains
from pyro.infer import SVI, Trace_ELBO
from pyro.infer.autoguide import AutoMultivariateNormal, AutoNormal
from pyro.optim import ClippedAdam
from torch import Tensor
from torch.distributions import Normal

from pplvi.examples import eight_schools
from pplvi.posterior import leave_one_out as loo_module
from pplvi.posterior.arviz.versions import is_legacy
from pplvi.posterior.draws import Draws
from pplvi.posterior.leave_one_out import loo
from pplvi.posterior.posterior import Posterior
from pplvi.posterior.weighted import WeightedDraws
from pplvi.programs.sites import Plate

pytestmark = pytest.mark.usefixtures("float64")

NUTS = -30.66
Y = torch.tensor([0.5, 1.2, -0.3, 2.0, 0.1], dtype=torch.float64)


def mean_model(loc: float, scale: float, num_draws: int = 20_000) -> WeightedDraws:
    """Draws of N(loc, scale) for a mean with prior N(0, 1) of five data with sd 1."""
    torch.manual_seed(0)
    guide = Normal(torch.tensor(loc), scale)
    z = guide.sample((num_draws,))
    likelihood = Normal(z[:, None], 1.0).log_prob(Y)
    log_p = Normal(0.0, 1.0).log_prob(z) + likelihood.sum(1)
    plates = {"z": (), "y": (Plate("data", -1, 5, 5),)}
    return WeightedDraws(
        Draws({"z": z}, {}, {"y": Y}, {"y": likelihood}, log_p, guide.log_prob(z), (), plates, frozenset())
    )


def exact_mean_loo() -> np.ndarray:
    """log N(y_i; sum of the others / 5, sd sqrt(6 / 5)): four others and the prior make a precision of 5."""
    return Normal((Y.sum() - Y) / 5, (6 / 5) ** 0.5).log_prob(Y).numpy()


def arviz_loo(draws: Draws, **log_likelihood: Tensor) -> Any:
    import arviz as az

    groups = {"posterior": draws.latents, "log_likelihood": log_likelihood or draws.log_likelihood}
    data = from_dict({g: {n: v[None].numpy() for n, v in values.items()} for g, values in groups.items()})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return az.loo(data, pointwise=True, reff=1.0)


@pytest.mark.parametrize(("loc", "scale"), [(0.5833, 0.4082), (0.3, 0.6), (0.9, 0.7)])
def test_leave_one_out_of_a_conjugate_mean_is_exact_for_good_and_poor_guides(loc: float, scale: float) -> None:
    result = loo(mean_model(loc, scale))
    np.testing.assert_allclose(pointwise(result), exact_mean_loo(), atol=0.03)
    assert elpd(result) == pytest.approx(exact_mean_loo().sum(), abs=0.05)
    assert result["se"] == pytest.approx(math.sqrt(5 * exact_mean_loo().var(ddof=0 if is_legacy() else 1)), abs=0.05)
    within = Normal(Y.sum() / 6, (7 / 6) ** 0.5).log_prob(Y).sum().item()
    assert field(result, "p_loo") == pytest.approx(within - exact_mean_loo().sum(), abs=0.05)
    assert (result.pareto_k.values < 0.7).all()


def test_plain_leave_one_out_is_wrong_where_the_corrected_is_right() -> None:
    posterior = mean_model(0.9, 0.7)
    assert abs(elpd(arviz_loo(posterior.draws)) - exact_mean_loo().sum()) > 0.3
    assert abs(elpd(loo(posterior)) - exact_mean_loo().sum()) < 0.05


def test_exact_guide_gives_what_arviz_gives() -> None:
    posterior = mean_model(Y.sum().item() / 6, 6**-0.5, 2500)
    ours, theirs = loo(posterior), arviz_loo(posterior.draws)
    np.testing.assert_allclose(pointwise(ours), pointwise(theirs), atol=1e-9)
    np.testing.assert_allclose(ours.pareto_k.values, theirs.pareto_k.values, atol=1e-6)
    for name in ("elpd_loo", "se", "p_loo", "n_samples", "n_data_points", "good_k"):
        assert field(ours, name) == pytest.approx(field(theirs, name), abs=1e-8), name
    assert type(ours) is type(theirs)
    assert not is_legacy() or list(ours.index) == list(theirs.index)


def test_arviz_corrects_for_a_guide_as_this_does() -> None:
    """ArviZ 1.x has leave-one-out of approximate posteriors too."""
    arviz = pytest.importorskip("arviz_stats", "1.0", exc_type=ImportError)
    posterior = mean_model(0.3, 0.6, 2500)
    draws = posterior.draws
    groups = {"posterior": draws.latents, "log_likelihood": draws.log_likelihood}
    data = from_dict({g: {n: v[None].numpy() for n, v in values.items()} for g, values in groups.items()})
    theirs = arviz.loo_approximate_posterior(data, draws.log_p.numpy(), draws.log_q.numpy(), pointwise=True)
    ours = loo(posterior)
    np.testing.assert_allclose(pointwise(ours), theirs.elpd_i.values, atol=1e-9)
    np.testing.assert_allclose(ours.pareto_k.values, theirs.pareto_k.values, atol=1e-6)


def test_result_has_the_plates_as_dimensions_and_prints() -> None:
    result = loo(mean_model(0.5, 0.5))
    assert field(result, "loo_i").dims == result.pareto_k.dims == ("data",)
    assert "Computed from 20000 posterior samples and 5 observations" in str(result)
    assert "Pareto k diagnostic values" in str(result)


def test_chunks_do_not_change_the_result(monkeypatch: pytest.MonkeyPatch) -> None:
    posterior = mean_model(0.5, 0.5, 500)
    whole = loo(posterior)
    monkeypatch.setattr(loo_module, "_CHUNK", 1000)  # two observations at a time
    np.testing.assert_allclose(pointwise(loo(posterior)), pointwise(whole), rtol=1e-13)
    np.testing.assert_allclose(loo(posterior).pareto_k.values, whole.pareto_k.values, rtol=1e-10)


def test_arviz_compares_the_results() -> None:
    import arviz as az

    good, poor = mean_model(0.5, 0.5, 2000), mean_model(0.5, 0.5, 2000)
    far = Draws(**{**poor.draws.__dict__, "log_likelihood": {"y": poor.draws.log_likelihood["y"] - 1}})
    table = az.compare({"good": loo(good), "poor": loo(WeightedDraws(far))})
    assert list(table.index) == ["good", "poor"]
    assert abs(table["elpd_diff"].iloc[1]) == pytest.approx(5.0, abs=0.2)


@dataclass(frozen=True)
class Amortised:
    """Data in a plate of four, each seen three times (``rep``), with a latent of its own: weights are per element."""

    y: Tensor
    posterior: WeightedDraws


@pytest.fixture
def amortised(float64: None) -> Amortised:
    torch.manual_seed(3)
    y = torch.randn(3, 4)
    data, rep = Plate("data", -1, 4, 4), Plate("rep", -2, 3, 3)
    guide = Normal(y.mean(0) * 0.5, 0.8)
    z = guide.sample((20_000,))
    likelihood = Normal(z[:, None], 1.0).log_prob(y)
    log_p = Normal(0.0, 1.0).log_prob(z) + likelihood.sum(1)
    plates = {"z": (data,), "y": (rep, data)}
    draws = Draws({"z": z}, {}, {"y": y}, {"y": likelihood}, log_p, guide.log_prob(z), (data,), plates, frozenset())
    return Amortised(y, WeightedDraws(draws))


def test_each_batch_element_is_left_out_under_its_own_weights(amortised: Amortised) -> None:
    y = amortised.y
    exact = Normal((y.sum(0) - y) / 3, (4 / 3) ** 0.5).log_prob(y)
    result = loo(amortised.posterior)
    assert result.pareto_k.dims == ("rep", "data")
    np.testing.assert_allclose(pointwise(result), exact.numpy(), atol=0.04)
    assert result["n_data_points"] == 12


def test_batch_equals_a_loop_over_its_elements(amortised: Amortised) -> None:
    whole, draws = loo(amortised.posterior), amortised.posterior.draws
    for i in range(4):
        plates = {"z": (), "y": (Plate("rep", -1, 3, 3),)}
        likelihood = {"y": draws.log_likelihood["y"][:, :, i]}
        one = Draws(
            {"z": draws.latents["z"][:, i]},
            {},
            {},
            likelihood,
            draws.log_p[:, i],
            draws.log_q[:, i],
            (),
            plates,
            frozenset(),
        )
        np.testing.assert_allclose(pointwise(loo(WeightedDraws(one))), pointwise(whole)[:, i], atol=1e-12)


def test_joint_weights_would_have_been_far_off(amortised: Amortised) -> None:
    """The weights of all data in one are much less even than those of each datum."""
    joint = amortised.posterior.log_weight.sum(1)
    assert (
        WeightedDraws(Draws({"z": joint}, {}, {}, {}, joint, 0 * joint, (), {"z": ()}, frozenset())).ess
        < 0.8 * amortised.posterior.ess.min()
    )


def replace(draws: Draws, **changes: Any) -> WeightedDraws:
    return WeightedDraws(Draws(**{**draws.__dict__, **changes}))


def test_masked_observations_do_not_count() -> None:
    posterior = mean_model(0.3, 0.6, 2000)
    likelihood = posterior.draws.log_likelihood["y"].clone()
    masked = likelihood.clone()
    masked[:, 2] = 0
    log_p = posterior.log_p - likelihood[:, 2]
    result = loo(replace(posterior.draws, log_likelihood={"y": masked}, log_p=log_p))
    rest = [0, 1, 3, 4]
    plates = {"z": (), "y": (Plate("data", -1, 4, 4),)}
    expected = loo(replace(posterior.draws, log_likelihood={"y": likelihood[:, rest]}, log_p=log_p, plates=plates))
    assert result["n_data_points"] == 4
    assert result.pareto_k.dims == ("observation",)
    assert result.pareto_k.coords["data"].values.tolist() == rest
    for name in ("elpd_loo", "se", "p_loo"):
        assert field(result, name) == pytest.approx(field(expected, name)), name


def test_leaving_out_needs_an_observation_that_counts() -> None:
    posterior = mean_model(0.3, 0.6, 200)
    with pytest.raises(ValueError, match="every observation of site 'y' is masked out"):
        loo(replace(posterior.draws, log_likelihood={"y": torch.zeros(200, 5)}))


def test_single_observation_without_a_plate() -> None:
    posterior = mean_model(0.3, 0.6, 2000)
    likelihood = {"y": posterior.draws.log_likelihood["y"][:, 0]}
    result = loo(replace(posterior.draws, log_likelihood=likelihood, plates={"z": (), "y": ()}))
    assert result["n_data_points"] == 1
    assert result.pareto_k.shape == ()


def test_several_observed_sites_must_be_told_apart() -> None:
    posterior = mean_model(0.3, 0.6, 200)
    likelihood = posterior.draws.log_likelihood["y"]
    two = replace(
        posterior.draws,
        log_likelihood={"height": likelihood, "weight": likelihood - 1},
        plates={name: (Plate("data", -1, 5, 5),) for name in ("height", "weight")},
    )
    with pytest.raises(ValueError, match=r"several observed sites \['height', 'weight'\].* pass var_name"):
        loo(two)
    with pytest.raises(ValueError, match="var_name='age' names no observed site"):
        loo(two, "age")
    with pytest.raises(ValueError, match=r"no observed site with a log likelihood for each datum.*pyro.factor"):
        loo(replace(posterior.draws, log_likelihood={}))
    assert elpd(loo(two, "height")) > elpd(loo(two, "weight"))


def test_an_observation_that_is_impossible_under_a_draw_is_refused() -> None:
    posterior = mean_model(0.3, 0.6, 200)
    likelihood, log_p = posterior.draws.log_likelihood["y"].clone(), posterior.log_p.clone()
    likelihood[7, 1] = log_p[7] = -math.inf
    with pytest.raises(ValueError, match="undefined for 1 of 5 observations"):
        loo(replace(posterior.draws, log_likelihood={"y": likelihood}, log_p=log_p))


def test_point_guides_have_no_leave_one_out() -> None:
    with pytest.raises(ValueError, match="at a point"):
        loo(WeightedDraws(mean_model(0.3, 0.6, 200).draws, frozenset({"z"})))


def test_poor_weights_warn_and_are_flagged() -> None:
    with pytest.warns(UserWarning, match="Pareto k is above 0.67 for 4 of 5 observations"):
        result = loo(mean_model(0.5833, 0.15, 1000))
    assert result["warning"]
    assert "There has been a warning" in str(result)


def centered(sigma: Tensor, y: Tensor) -> None:
    mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
    tau = pyro.sample("tau", dist.HalfCauchy(5.0))
    with pyro.plate("school", 8):
        theta = pyro.sample("theta", dist.Normal(mu, tau))
        pyro.sample("y", dist.Normal(theta, sigma), obs=y)


def conditional_guide(sigma: Tensor, y: Tensor) -> None:
    """A Student t for (mu, log tau), then the exact conditional of each effect: reaches the neck of the funnel."""
    loc = pyro.param("loc", lambda: torch.tensor([4.0, 1.0]))
    scale_tril = pyro.param(
        "scale_tril", lambda: torch.tensor([[3.0, 0.0], [0.0, 1.2]]), constraint=dist.constraints.lower_cholesky
    )
    heavy = dist.MultivariateStudentT(torch.tensor(5.0), loc, scale_tril)
    top = pyro.sample("top", heavy, infer={"is_auxiliary": True})
    mu = pyro.sample("mu", dist.Delta(top[..., 0]))
    tau = pyro.sample("tau", dist.Delta(top[..., 1].exp(), log_density=-top[..., 1]))
    with pyro.plate("school", 8):
        precision = tau**-2 + sigma**-2
        pyro.sample("theta", dist.Normal((mu * tau**-2 + y * sigma**-2) / precision, precision**-0.5))


def train(model: Any, guide: Any, num_steps: int = 600, num_particles: int = 8) -> Posterior:
    args = tuple(x.double() for x in eight_schools.load().args)
    loss = Trace_ELBO(num_particles, vectorize_particles=True, max_plate_nesting=1)
    svi = SVI(model, guide, ClippedAdam({"lr": 0.05, "lrd": 0.02 ** (1 / num_steps)}), loss)
    for _ in range(num_steps):
        svi.step(*args)
    return Posterior(model, guide, args, num_draws=4000, seed=1)


@pytest.mark.parametrize("guide", [AutoNormal, AutoMultivariateNormal])
@pytest.mark.filterwarnings("ignore:Pareto k is above")
def test_eight_schools_noncentered_agrees_with_nuts(guide: Any) -> None:
    posterior = train(eight_schools.model, guide(eight_schools.model))
    assert elpd(posterior.loo()) == pytest.approx(NUTS, abs=0.1)
    assert abs(elpd(arviz_loo(posterior.draws)) - NUTS) > 0.5


@pytest.mark.filterwarnings("ignore:Pareto k is above")
def test_eight_schools_centered_agrees_with_nuts_where_the_guide_follows_the_funnel() -> None:
    posterior = train(centered, conditional_guide)
    assert posterior.ess > 1500
    assert posterior.total_log_evidence.value == pytest.approx(-31.31135, abs=0.05)
    assert elpd(posterior.loo()) == pytest.approx(NUTS, abs=0.1)


def test_eight_schools_centered_is_flagged_where_the_guide_cannot() -> None:
    posterior = train(centered, AutoNormal(centered), 300)
    assert posterior.pareto_k > 0.7
    with pytest.warns(UserWarning, match="Pareto k is above"):
        assert posterior.loo()["warning"]


def mean_program(y: Tensor) -> None:
    z = pyro.sample("z", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Normal(z, 1.0), obs=y)


def test_mcmc_draws_are_left_to_arviz_with_their_chains() -> None:
    import arviz as az

    torch.manual_seed(4)
    z = Normal(Y.sum() / 6, 6**-0.5).sample((4, 500))
    result = Posterior.from_mcmc(Chains(z=z), mean_program, (Y,)).loo()  # type: ignore[arg-type]
    likelihood = Normal(z[..., None], 1.0).log_prob(Y)
    data = from_dict({"posterior": {"z": z.numpy()}, "log_likelihood": {"y": likelihood.numpy()}})
    expected = az.loo(data, pointwise=True)
    np.testing.assert_allclose(pointwise(result), pointwise(expected), atol=1e-10)
    np.testing.assert_allclose(result.pareto_k.values, expected.pareto_k.values, atol=1e-10)
    assert field(result, "p_loo") == pytest.approx(field(expected, "p_loo"))
    assert result.pareto_k.dims == ("data",)


# --- factors and groups ---------------------------------------------------------------------------------------------


def test_an_observation_that_is_certain_under_some_draws_counts() -> None:
    """A log likelihood of 0 says that an observation was masked only where every draw has it."""
    posterior = mean_model(0.3, 0.6, 500)
    likelihood = posterior.draws.log_likelihood["y"].clone()
    likelihood[:7, 2] = 0.0
    result = loo(replace(posterior.draws, log_likelihood={"y": likelihood}))
    assert field(result, "n_data_points") == 5


def counts(y: Tensor, censored: Tensor) -> None:
    """Data of a mean, some of which are only known to be above 1: their likelihood is a factor."""
    z = pyro.sample("z", dist.Normal(0.0, 1.0))
    pyro.factor("penalty", -0.5 * z**2)
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Normal(z, 1.0).mask(~censored), obs=y)
        above = Normal(0.0, 1.0).cdf(z - 1).log()
        pyro.factor("above", torch.where(censored, above, torch.zeros(())))


def wide_guide(*args: Any) -> None:
    pyro.sample("z", dist.Normal(0.5, 0.6))


CENSORED = torch.tensor([False, True, False, True, False])


@pytest.fixture(scope="module")
def censored() -> Posterior:
    return Posterior(counts, wide_guide, (Y, CENSORED), num_draws=10_000, seed=0)


def exact_leave_out(groups: list[list[int]]) -> list[float]:
    """On a grid: log p(y of a group given the others), of the model with the penalty and the factors."""
    z = torch.linspace(-5, 5, 4001, dtype=torch.float64)[:, None]
    each = torch.where(CENSORED, Normal(0.0, 1.0).cdf(z - 1).log(), Normal(z, 1.0).log_prob(Y))
    joint = -(z[:, 0] ** 2) + each.sum(1)
    return [(joint.logsumexp(0) - (joint - each[:, group].sum(1)).logsumexp(0)).item() for group in groups]


def test_a_factor_in_the_plate_belongs_to_its_data(censored: Posterior) -> None:
    found = censored.loo(["y", "above"])
    np.testing.assert_allclose(pointwise(found), exact_leave_out([[i] for i in range(5)]), atol=0.03)
    observed = censored.loo("y")
    assert observed["n_data_points"] == 3  # of the others the site is masked
    np.testing.assert_allclose(pointwise(observed), pointwise(found)[~CENSORED.numpy()], atol=1e-12)
    np.testing.assert_allclose(pointwise(censored.loo("above")), pointwise(found)[CENSORED.numpy()], atol=1e-12)


def test_factors_that_may_or_may_not_belong_to_the_data_are_told_apart(censored: Posterior) -> None:
    with pytest.raises(
        ValueError, match=r"factors \['above'\] are in plates of 'y'.*var_name=\['y', 'above'\] if they"
    ):
        censored.loo()
    with pytest.raises(ValueError, match="the factor 'penalty' is in no plate"):
        censored.loo(["y", "penalty"])
    with pytest.raises(ValueError, match=r"expected one of \['y', 'above', 'penalty'\]"):
        censored.loo("below")


def test_a_likelihood_that_is_all_factors_is_left_out_by_its_plate() -> None:
    def model(y: Tensor) -> None:
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(y)):
            pyro.factor("likelihood", Normal(z, 1.0).log_prob(y))

    found = Posterior(model, wide_guide, (Y,), num_draws=10_000, seed=0).loo()
    np.testing.assert_allclose(pointwise(found), exact_mean_loo(), atol=0.03)


def exact_groups(labels: Sequence[str]) -> list[float]:
    """log p(y of a group given the others) of :func:`mean_program`."""
    found = []
    for label in sorted(set(labels)):
        out = torch.tensor([each == label for each in labels])
        precision = 1.0 + (~out).sum()
        joint = torch.eye(int(out.sum()), dtype=torch.float64) + 1 / precision
        mean = (Y[~out].sum() / precision).expand(int(out.sum()))
        found.append(dist.MultivariateNormal(mean, joint).log_prob(Y[out]).item())
    return found


@pytest.mark.parametrize("mcmc", [False, True])
def test_groups_of_data_are_left_out_by_their_labels(mcmc: bool) -> None:
    labels = ["b", "a", "b", "a", "c"]
    torch.manual_seed(4)
    z = Normal(Y.sum() / 6, 6**-0.5).sample((4, 2500))
    source = (
        Posterior.from_mcmc(Chains(z=z), mean_program, (Y,))  # type: ignore[arg-type]
        if mcmc
        else Posterior(mean_program, wide_guide, (Y,), num_draws=10_000, seed=0)
    )
    found = source.loo(groups={"data": labels})
    assert found.pareto_k.coords["data"].values.tolist() == ["a", "b", "c"]
    assert found["n_data_points"] == 3
    np.testing.assert_allclose(pointwise(found), exact_groups(labels), atol=0.06)
    numbers = source.loo(groups={"data": torch.tensor([1, 0, 1, 0, 2])})
    np.testing.assert_allclose(pointwise(numbers), pointwise(found), rtol=1e-12)


def test_a_plate_is_left_out_element_by_element() -> None:
    def model(y: Tensor) -> None:
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        with pyro.plate("pupil", 5, dim=-1), pyro.plate("visit", 2, dim=-2):
            pyro.sample("y", dist.Normal(z, 2**0.5), obs=y)

    both = torch.stack([Y - 0.5, Y + 0.5])  # of two halves with a mean of Y, which is known to 1
    posterior = Posterior(model, wide_guide, (both,), num_draws=10_000, seed=0)
    found, constant = posterior.loo(groups="pupil"), Normal(0.0, 2**0.5).log_prob(torch.tensor([-0.5, 0.5])).sum()
    inner = pointwise(found) - constant.item() + Normal(0.0, 1.0).log_prob(torch.tensor(0.0)).item()
    assert found.pareto_k.dims == ("pupil",)
    np.testing.assert_allclose(inner, exact_mean_loo(), atol=0.03)
    with pytest.raises(ValueError, match=r"groups='school'; expected a plate of site 'y', one of \['visit', 'pupil'\]"):
        posterior.loo(groups="school")
    with pytest.raises(ValueError, match=r"groups\['pupil'\] has shape \(2,\); expected one label for each of the 5"):
        posterior.loo(groups={"pupil": [0, 1]})


def test_elements_with_weights_of_their_own_are_independent_in_a_group(amortised: Amortised) -> None:
    """Each of the four data has its own latent: what a pair of them predicts is the sum, and not of joint weights."""
    each = loo(amortised.posterior, groups="data")
    pairs = loo(amortised.posterior, groups={"data": ["u", "u", "v", "v"]})
    np.testing.assert_allclose(pointwise(pairs), pointwise(each).reshape(2, 2).sum(1), rtol=1e-12)
    np.testing.assert_allclose(pairs.pareto_k.values, each.pareto_k.values.reshape(2, 2).max(1))
    exact = dist.MultivariateNormal(torch.zeros(3), torch.eye(3) + 1).log_prob(amortised.y.T)
    np.testing.assert_allclose(pointwise(each), exact.numpy(), atol=0.08)
