"""Posteriors of programs: construction, refusals, resampling, prediction, seeds."""

import itertools
import math
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from arviz_results import pointwise
from models import Chains
from pyro.infer import MCMC, NUTS, SVI, Trace_ELBO, config_enumerate
from pyro.infer.autoguide import (
    AutoDelta,
    AutoDiagonalNormal,
    AutoGuideList,
    AutoLaplaceApproximation,
    AutoMultivariateNormal,
    AutoNormal,
)
from pyro.optim import Adam
from torch import Tensor

from pplvi.posterior.posterior import Posterior
from pplvi.programs.deadline import ending

pytestmark = pytest.mark.usefixtures("float64")

Y = torch.tensor([0.5, 1.2, -0.3, 2.0, 0.1], dtype=torch.float64)


def mean_model(y: Tensor, num_new: int | None = None) -> None:
    """A mean with prior N(0, 1) of data with sd 1."""
    z = pyro.sample("z", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(y) if num_new is None else num_new):
        pyro.sample("y", dist.Normal(z, 1.0), obs=y if num_new is None else None)


def mean_guide(y: Tensor, num_new: int | None = None) -> None:
    """The exact posterior of the mean."""
    pyro.sample("z", dist.Normal(y.sum() / (len(y) + 1), (len(y) + 1) ** -0.5))


def wide_guide(y: Tensor) -> None:
    pyro.sample("z", dist.Normal(0.0, 1.0))


def log_evidence(y: Tensor) -> float:
    covariance = torch.eye(len(y)) + 1.0
    return dist.MultivariateNormal(torch.zeros(len(y)), covariance).log_prob(y).item()


def local_model(y: Tensor) -> None:
    """A latent of its own for each datum."""
    with pyro.plate("data", len(y)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(z, 1.0), obs=y)


def local_guide(y: Tensor) -> None:
    with pyro.plate("data", len(y)):
        pyro.sample("z", dist.Normal(y / 2, 0.8))


def two_level_model(y: Tensor, num_groups: int = 3) -> None:
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    with pyro.plate("group", num_groups, dim=-2):
        theta = pyro.sample("theta", dist.Normal(mu, 1.0))
        pyro.deterministic("twice", 2 * theta)
        with pyro.plate("rep", y.shape[-1], dim=-1):
            pyro.sample("y", dist.Normal(theta, 1.0), obs=y if num_groups == len(y) else None)


# --- what it is -----------------------------------------------------------------------------------------------------


def test_exact_guide_gives_the_evidence() -> None:
    posterior = Posterior(mean_model, mean_guide, (Y,), num_draws=200, seed=0)
    assert posterior.total_log_evidence == (pytest.approx(log_evidence(Y), abs=1e-9), pytest.approx(0, abs=1e-6))
    assert posterior.num_draws == 200
    assert posterior.pareto_k.item() == 0


def test_wide_guide_is_corrected_by_its_weights() -> None:
    posterior = Posterior(mean_model, wide_guide, (Y,), num_draws=20_000, seed=0)
    value, error = posterior.total_log_evidence
    assert abs(value - log_evidence(Y)) < 3 * error < 0.05
    z = posterior.resample(seed=1)["z"]
    assert z.mean().item() == pytest.approx(Y.sum().item() / 6, abs=0.02)
    assert z.std().item() == pytest.approx(6**-0.5, abs=0.02)


def test_weights_are_per_datum_where_the_model_allows_it() -> None:
    torch.manual_seed(0)
    y = 2 * torch.randn(200)
    posterior = Posterior(local_model, local_guide, (y,), num_draws=1000, seed=0)
    assert posterior.log_weight.shape == (1000, 200)
    assert posterior.ess.median() > 500
    assert posterior.ess.shape == posterior.pareto_k.shape == (200,)
    exact = dist.Normal(0.0, 2**0.5).log_prob(y)
    value, error = posterior.log_evidence
    assert ((value - exact) / error).abs().median() < 1.2
    assert abs(posterior.total_log_evidence.value - exact.sum().item()) < 3 * posterior.total_log_evidence.error


def test_autoguide_after_a_loop_written_by_hand() -> None:
    guide = AutoNormal(mean_model)
    svi = SVI(mean_model, guide, Adam({"lr": 0.05}), Trace_ELBO())
    for _ in range(300):
        svi.step(Y)
    posterior = Posterior(mean_model, guide, (Y,), num_draws=2000, seed=0)
    assert abs(posterior.total_log_evidence.value - log_evidence(Y)) < 0.05
    assert posterior.pareto_k < 0.7
    assert not posterior.log_weight.requires_grad


def test_keyword_arguments_reach_model_and_guide() -> None:
    posterior = Posterior(mean_model, mean_guide, kwargs={"y": Y}, num_draws=50, seed=0)
    assert posterior.total_log_evidence.value == pytest.approx(log_evidence(Y))


def test_draws_one_at_a_time_for_programs_that_branch() -> None:
    def model(y: Tensor) -> None:
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(z if z > 0 else -z, 1.0), obs=y)

    def guide(y: Tensor) -> None:
        pyro.sample("z", dist.Normal(0.0, 1.0))

    posterior = Posterior(model, guide, (torch.tensor(0.5),), num_draws=300, vectorize=False, seed=0)
    z = posterior.draws.latents["z"]
    expected = dist.Normal(z.abs(), 1.0).log_prob(torch.tensor(0.5))
    torch.testing.assert_close(posterior.log_weight, expected)
    assert posterior.predict(num_samples=4).observed["y"].shape == (4,)


def test_hidden_layers_count_in_how_many_draws_one_call_has(monkeypatch: pytest.MonkeyPatch) -> None:
    """A guide whose network holds a hundred numbers for each that it draws: their memory is bounded too."""
    monkeypatch.setattr("pplvi.posterior.looking._SMALL", 0)
    width = 100

    def guide(y):
        hidden = torch.ones(len(y), width)
        shift = pyro.sample("shift", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(y)):
            pyro.sample("z", dist.Normal((hidden * shift[..., None]).mean(-1), 1.0))

    def model(y):
        shift = pyro.sample("shift", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(y)):
            pyro.sample("y", dist.Normal(pyro.sample("z", dist.Normal(shift, 1.0)), 1.0), obs=y)

    y = torch.zeros(500)
    posterior = Posterior(model, guide, (y,), num_draws=1000, seed=0)
    assert posterior._source.chunk * 4 * 4 * width * len(y) <= 100 * 2**20 < 1000 * 4 * 4 * width * len(y)


def test_chunks_bound_the_memory_and_keep_everything() -> None:
    sizes = []

    def guide(y: Tensor) -> None:
        sizes.append(pyro.sample("z", dist.Normal(0.3, 0.5)).numel())

    posterior = Posterior(mean_model, guide, (Y,), num_draws=250, chunk_size=100, seed=0)
    assert max(sizes) == 100
    assert posterior.log_weight.shape == posterior.draws.latents["z"].shape == (250,)
    assert posterior.draws.log_likelihood["y"].shape == (250, 5)
    expected = dist.Normal(posterior.draws.latents["z"][:, None], 1.0).log_prob(Y)
    torch.testing.assert_close(posterior.draws.log_likelihood["y"], expected)
    assert posterior.draws.latents["z"].unique().numel() == 250


# --- refusals -------------------------------------------------------------------------------------------------------


def laplace(*args: Any) -> Any:
    """A trained AutoLaplaceApproximation, which is a point until it is expanded."""
    guide = AutoLaplaceApproximation(mean_model)
    svi = SVI(mean_model, guide, Adam({"lr": 0.05}), Trace_ELBO())
    for _ in range(200):
        svi.step(Y)
    return guide


@pytest.mark.parametrize("guide", [AutoDelta, laplace])
@pytest.mark.parametrize("num_draws", [1, 100])
def test_point_guides_have_no_weights(guide: Any, num_draws: int) -> None:
    posterior = Posterior(mean_model, guide(mean_model), (Y,), num_draws=num_draws, seed=0)
    assert posterior.is_dirac
    for name in ("pareto_k", "log_evidence", "elbo", "ess", "psis_log_weight"):
        with pytest.raises(ValueError, match=r"holds \['z'\] at a point"):
            getattr(posterior, name)
    with pytest.raises(ValueError, match="at a point"):
        posterior.loo()
    assert posterior.resample(5)["z"].shape == (5,)
    assert posterior.predict(num_samples=5).observed["y"].shape == (5, 5)


def test_laplace_approximation_once_expanded_has_weights() -> None:
    posterior = Posterior(mean_model, laplace().laplace_approximation(Y), (Y,), num_draws=1000, seed=0)
    assert not posterior.is_dirac
    assert posterior.total_log_evidence.value == pytest.approx(log_evidence(Y), abs=0.01)


def test_a_point_is_run_once_for_all_draws() -> None:
    sizes = []

    def model(y: Any) -> None:
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        sizes.append(z.numel())
        pyro.sample("y", dist.Normal(z, 1.0), obs=y)

    posterior = Posterior(model, AutoDelta(model), (torch.tensor(0.5),), num_draws=1000, seed=0)
    assert posterior.draws.latents["z"].shape == (1000,)
    assert max(sizes) < 10  # a few to see what a draw takes


def test_guide_that_holds_only_some_sites_at_a_point_is_refused_too() -> None:
    def model() -> None:
        a = pyro.sample("a", dist.Normal(0.0, 1.0))
        pyro.sample("b", dist.LogNormal(a, 1.0))

    guide = AutoGuideList(model)
    guide.append(AutoDelta(pyro.poutine.block(model, expose=["a"])))
    guide.append(AutoNormal(pyro.poutine.block(model, expose=["b"])))
    posterior = Posterior(model, guide, num_draws=20, seed=0)
    assert posterior.point_sites == {"a"}
    with pytest.raises(ValueError, match=r"holds \['a'\]"):
        _ = posterior.pareto_k


@pytest.mark.parametrize("guide", [AutoNormal, AutoDiagonalNormal, AutoMultivariateNormal])
def test_autoguides_with_delta_sites_are_no_point_guides(guide: Any) -> None:
    assert not Posterior(mean_model, guide(mean_model), (Y,), num_draws=3, seed=0).is_dirac
    assert not Posterior(mean_model, guide(mean_model), (Y,), num_draws=1, seed=0).is_dirac


def test_discrete_draws_that_happen_to_be_equal_are_no_point() -> None:
    def model() -> None:
        pyro.sample("k", dist.Bernoulli(0.999999))

    posterior = Posterior(model, model, num_draws=50, seed=0)
    assert posterior.draws.latents["k"].eq(1).all()
    assert not posterior.is_dirac
    assert posterior.total_log_evidence.value == pytest.approx(0)


def test_model_without_latent_sites_has_no_posterior() -> None:
    def model() -> None:
        pyro.sample("y", dist.Normal(0.0, 1.0), obs=torch.tensor(0.5))

    with pytest.raises(ValueError, match="no latent sites"):
        Posterior(model, lambda: None)


def test_draws_leave_off_when_the_time_is_over_but_not_before_there_are_five_hundred() -> None:
    whole = Posterior(mean_model, mean_guide, (Y,), num_draws=1000, chunk_size=100, seed=0)
    for asked, number in ((1, 500), (3, 700), (9, 1000)):
        looks = itertools.count(1)
        with ending(lambda looks=looks, asked=asked: "budget" if next(looks) >= asked else ""):
            cut = Posterior(mean_model, mean_guide, (Y,), num_draws=1000, chunk_size=100, seed=0)
        assert cut.num_draws == len(cut.draws.log_likelihood["y"]) == number
        assert torch.equal(cut.draws.latents["z"], whole.draws.latents["z"][:number])
        assert torch.equal(cut.log_weight, whole.log_weight[:number])


@pytest.mark.parametrize(("num_draws", "chunk_size"), [(0, None), (-1, None), (10, 0)])
def test_numbers_of_draws_below_one_are_refused(num_draws: int, chunk_size: int | None) -> None:
    with pytest.raises(ValueError, match=r"(num_draws|chunk_size)=(0|-1): expected a whole number"):
        Posterior(mean_model, mean_guide, (Y,), num_draws=num_draws, chunk_size=chunk_size)


@pytest.mark.parametrize(
    ("call", "message"),
    [((Y,), r"args=tensor\(.*: expected a tuple, such as"), ((Y, Y), "args="), (((Y,), Y), "kwargs=")],
)
def test_arguments_that_are_no_tuple_are_refused(call: tuple[Any, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Posterior(mean_model, mean_guide, *call)


def test_posteriors_and_draws_print_shapes_alone() -> None:
    posterior = Posterior(mean_model, mean_guide, (Y,), num_draws=5, seed=0)
    draws = "Draws(latents={'z': (5,)}, observed={'y': (5,)})"
    assert repr(posterior.draws) == draws
    assert repr(posterior) == f"Posterior(mean_model, mean_guide, {draws})"
    mcmc = MCMC(NUTS(mean_model), num_samples=3, warmup_steps=1, disable_progbar=True)
    mcmc.run(Y)
    assert repr(Posterior.from_mcmc(mcmc, mean_model, (Y,))).startswith("Posterior(mean_model, MCMC, chains=1, Draws(")


def test_guide_of_another_model_is_refused() -> None:
    def guide(y: Tensor) -> None:
        pyro.sample("w", dist.Normal(0.0, 1.0))

    with pytest.raises(ValueError, match="w"):
        Posterior(mean_model, guide, (Y,))


def test_nan_in_the_guide_is_refused_where_weights_are_asked_for() -> None:
    def guide(y: Tensor) -> None:
        pyro.sample("z", dist.Normal(pyro.param("loc", torch.tensor(0.0)), 1.0, validate_args=False))

    Posterior(mean_model, guide, (Y,), num_draws=5)
    with torch.no_grad():
        pyro.param("loc").fill_(math.nan)
    with pytest.raises(ValueError, match=r"(?i)nan"):
        _ = Posterior(mean_model, guide, (Y,), num_draws=5).pareto_k


def subsampled_model(y: Tensor) -> None:
    z = pyro.sample("z", dist.Normal(0.0, 1.0))
    with pyro.plate("data", 5, subsample_size=len(y)):
        pyro.sample("y", dist.Normal(z, 1.0), obs=y)


def test_global_latents_over_a_subsampled_plate_have_no_weights() -> None:
    posterior = Posterior(subsampled_model, wide_guide, (Y[:2],), num_draws=20, seed=0)
    assert not posterior.has_weights
    assert math.isfinite(posterior.elbo.value)
    with pytest.raises(ValueError, match=r"plates \['data'\] are subsampled"):
        _ = posterior.pareto_k


def local_minibatch_model(y: Tensor) -> None:
    with pyro.plate("data", 5, subsample_size=len(y)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(z, 1.0), obs=y)


def local_minibatch_guide(y: Tensor) -> None:
    with pyro.plate("data", 5, subsample_size=len(y)):
        pyro.sample("z", dist.Normal(y / 2, 0.5**0.5))


def test_minibatch_of_local_latents_has_scaled_estimates_and_no_predictions() -> None:
    posterior = Posterior(local_minibatch_model, local_minibatch_guide, (Y[:2],), num_draws=30, seed=0)
    assert posterior.pareto_k.shape == (2,)
    value, _ = posterior.log_evidence
    assert posterior.total_log_evidence.value == pytest.approx(2.5 * value.sum().item())
    with pytest.raises(ValueError, match=r"subsampled plates \['data'\] belong to one minibatch"):
        posterior.predict()
    assert posterior.predict(new_sites=["z"]).observed["y"].shape == (30, 2)


def test_draws_of_several_minibatches_are_refused() -> None:
    with pytest.raises(ValueError, match=r"plates \['data'\] are subsampled anew in every run"):
        Posterior(local_minibatch_model, local_minibatch_guide, (Y[:2],), num_draws=30, seed=0, chunk_size=10)


def test_looped_draws_share_one_minibatch() -> None:
    loop = Posterior(local_minibatch_model, local_minibatch_guide, (Y[:2],), num_draws=30, seed=0, vectorize="loop")
    assert loop.pareto_k.shape == (2,)
    whole = Posterior(local_minibatch_model, local_minibatch_guide, (Y[:2],), num_draws=30, seed=0)
    exact, _ = whole.log_evidence  # the guide is the posterior of each element
    torch.testing.assert_close(loop.log_evidence[0], exact)


def test_guides_that_enumerate_are_drawn_from() -> None:
    """Their density is an average over the enumerated values: as a weight it gave -1.409 where -1.328 is right."""

    def model() -> None:
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        k = pyro.sample("k", dist.Bernoulli(0.3))
        pyro.sample("y", dist.Normal(z + k, 1.0), obs=torch.tensor(0.5))

    def guide() -> None:
        pyro.sample("z", dist.Normal(0.2, 0.8))
        pyro.sample("k", dist.Bernoulli(0.4))

    density = torch.tensor([0.7, 0.3]) @ dist.Normal(torch.tensor([0.0, 1.0]), 2**0.5).log_prob(torch.tensor(0.5)).exp()
    for program in (guide, config_enumerate(guide)):
        value, error = Posterior(model, program, num_draws=20_000, seed=0).total_log_evidence
        assert abs(value - density.log().item()) < 3 * error < 0.05


def left_counting_model(x: Tensor, y: Tensor) -> None:
    w = pyro.sample("w", dist.Normal(torch.zeros(3), 1.0).to_event(1))
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Normal((x * w.unsqueeze(-2)).sum(-1), 1.0), obs=y)


def test_programs_that_count_from_the_left_are_carried() -> None:
    def guide(x: Tensor, y: Tensor) -> None:
        pyro.sample("w", dist.Normal(torch.zeros(3), 1.0).to_event(1))

    args = (torch.randn(6, 3), torch.randn(6))
    with pytest.raises(ValueError, match=r"vectorize='broadcast'"):
        Posterior(left_counting_model, guide, args, num_draws=10, vectorize="broadcast")
    x, y = args
    for vectorize in (None, "vmap", False):
        posterior = Posterior(left_counting_model, guide, args, num_draws=10, vectorize=vectorize)
        mean = posterior.draws.latents["w"] @ x.T
        assert torch.allclose(posterior.log_weight, dist.Normal(mean, 1.0).log_prob(y).sum(-1), atol=1e-5)


def test_enumerated_sites_are_summed_out_of_the_weights() -> None:
    y = torch.tensor([-2.0, 1.9, 2.2, -1.5])

    @config_enumerate
    def model() -> None:
        p = pyro.sample("p", dist.Beta(2.0, 2.0))
        with pyro.plate("data", len(y)):
            k = pyro.sample("k", dist.Bernoulli(p))
            pyro.sample("y", dist.Normal(4 * k - 2, 1.0), obs=y)

    posterior = Posterior(model, lambda: pyro.sample("p", dist.Beta(3.0, 3.0)), num_draws=20_000, seed=0)
    p = (torch.arange(10_000) + 0.5)[:, None] / 10_000
    likelihood = p * dist.Normal(2.0, 1.0).log_prob(y).exp() + (1 - p) * dist.Normal(-2.0, 1.0).log_prob(y).exp()
    prior = dist.Beta(2.0, 2.0).log_prob(p[:, 0])
    value, error = posterior.total_log_evidence
    assert abs(value - (prior.exp() * likelihood.prod(1)).mean().log().item()) < 3 * error < 0.02
    without = prior.exp()[:, None] * likelihood.prod(1, keepdim=True) / likelihood
    exact = (without * likelihood).mean(0).log() - without.mean(0).log()
    torch.testing.assert_close(torch.as_tensor(pointwise(posterior.loo())), exact, atol=0.015, rtol=0)


# --- seeds ----------------------------------------------------------------------------------------------------------


def test_seed_repeats_and_leaves_the_global_state_alone() -> None:
    state, numbers = torch.get_rng_state(), np.random.get_state()[1].copy()  # type: ignore[index]
    first, second = (Posterior(mean_model, wide_guide, (Y,), num_draws=20, seed=7) for _ in range(2))
    assert torch.equal(first.log_weight, second.log_weight)
    predictions = [first.predict(seed=3).observed["y"] for _ in range(2)]
    assert torch.equal(*predictions)
    assert torch.equal(state, torch.get_rng_state())
    assert (numbers == np.random.get_state()[1]).all()  # type: ignore[index]
    assert not torch.equal(first.log_weight, Posterior(mean_model, wide_guide, (Y,), num_draws=20, seed=8).log_weight)


def test_state_comes_back_after_an_error() -> None:
    state = torch.get_rng_state()
    with pytest.raises(KeyError):
        Posterior(mean_model, lambda y: {}["loc"], (Y,), seed=0)
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize("seed", [-1, 2**32])
def test_seeds_out_of_range_are_refused(seed: int) -> None:
    with pytest.raises(ValueError, match=f"seed={seed}: expected a whole number from 0"):
        Posterior(mean_model, wide_guide, (Y,), seed=seed)


def test_without_a_seed_draws_follow_the_global_state() -> None:
    torch.manual_seed(5)
    first = Posterior(mean_model, wide_guide, (Y,), num_draws=20)
    torch.manual_seed(5)
    assert torch.equal(first.log_weight, Posterior(mean_model, wide_guide, (Y,), num_draws=20).log_weight)


# --- prediction -----------------------------------------------------------------------------------------------------


def test_predictions_have_the_exact_predictive_distribution() -> None:
    posterior = Posterior(mean_model, wide_guide, (Y,), num_draws=20_000, seed=0)
    y = posterior.predict(seed=1).observed["y"]
    assert y.shape == (20_000, 5)
    assert y.mean().item() == pytest.approx(Y.sum().item() / 6, abs=0.02)
    assert y.std().item() == pytest.approx((7 / 6) ** 0.5, abs=0.02)


def test_predictions_for_new_arguments() -> None:
    posterior = Posterior(mean_model, mean_guide, (Y,), num_draws=50, seed=0)
    assert posterior.predict(Y, 9, seed=1).observed["y"].shape == (50, 9)
    assert posterior.predict(Y, num_new=3, num_samples=7).observed["y"].shape == (7, 3)


def guide_of_two_levels(y: Tensor, num_groups: int = 3) -> None:
    pyro.sample("mu", dist.Normal(0.5, 0.5))
    with pyro.plate("group", num_groups, dim=-2):
        pyro.sample("theta", dist.Normal(y.mean(-1, keepdim=True), 0.5))


def test_deterministic_sites_go_with_the_predictions() -> None:
    y = torch.randn(3, 4)
    found = Posterior(two_level_model, guide_of_two_levels, (y,), num_draws=20, seed=0).predict(seed=1)
    assert found.latents["theta"].shape[:2] == (20, 3)
    assert found.observed["y"].shape == (20, 3, 4)
    torch.testing.assert_close(found.deterministics["twice"].flatten(), 2 * found.latents["theta"].flatten())


def test_predictions_for_other_groups_need_their_sites_drawn_anew() -> None:
    y = torch.randn(3, 4)
    posterior = Posterior(two_level_model, guide_of_two_levels, (y,), num_draws=2000, seed=0)
    with pytest.raises(ValueError, match=r"(?s)theta.*new_sites=.*Posterior\(model, guide, \(x_new,\)\)"):
        posterior.predict(y, 6)
    found = posterior.predict(y, 6, new_sites=["theta"], seed=1)
    assert found.observed["y"].shape == (2000, 6, 4)
    assert found.latents["theta"].var().item() == pytest.approx(found.latents["mu"].var().item() + 1, abs=0.1)


def test_other_errors_of_predictions_are_passed_on() -> None:
    def model(y: Tensor) -> None:
        mean_model(y)
        if len(y) == 2:
            raise ValueError("two are too few")

    with pytest.raises(ValueError, match=r"^two are too few$"):
        Posterior(model, mean_guide, (Y,), num_draws=5, seed=0).predict(Y[:2])


def test_unknown_new_sites_are_refused() -> None:
    posterior = Posterior(mean_model, mean_guide, (Y,), num_draws=5, seed=0)
    with pytest.raises(ValueError, match=r"new_sites names \['w'\]; the latent sites are \['z'\]"):
        posterior.predict(new_sites=["w"])


# --- MCMC -----------------------------------------------------------------------------------------------------------


def test_mcmc_draws_are_scored_and_have_no_weights() -> None:
    mcmc = MCMC(NUTS(mean_model), num_samples=60, warmup_steps=60, disable_progbar=True)
    mcmc.run(Y)
    posterior = Posterior.from_mcmc(mcmc, mean_model, (Y,))
    z = mcmc.get_samples()["z"]
    expected = dist.Normal(0.0, 1.0).log_prob(z) + dist.Normal(z[:, None], 1.0).log_prob(Y).sum(1)
    torch.testing.assert_close(posterior.log_p, expected)
    assert posterior.is_mcmc
    for name in ("pareto_k", "log_evidence", "log_weight", "log_q"):
        with pytest.raises(ValueError, match="MCMC draws have no guide density"):
            getattr(posterior, name)
    assert posterior.predict(num_samples=3).observed["y"].shape == (3, 5)


@pytest.mark.parametrize("chunk_size", [None, 7])
def test_chains_lie_one_after_another(chunk_size: int | None) -> None:
    y = torch.randn(3, 4)
    mu, theta = torch.randn(2, 10), torch.randn(2, 10, 3, 1)
    run: Any = Chains(mu=mu, theta=theta)
    posterior = Posterior.from_mcmc(run, two_level_model, (y,), chunk_size=chunk_size)
    assert (posterior.num_chains, posterior.num_draws) == (2, 20)
    expected = dist.Normal(theta, 1.0).log_prob(y).flatten(0, 1)
    torch.testing.assert_close(posterior.draws.log_likelihood["y"], expected)
    torch.testing.assert_close(posterior.draws.latents["mu"], mu.flatten())
    joint = dist.Normal(0.0, 1.0).log_prob(mu) + dist.Normal(mu[..., None, None], 1.0).log_prob(theta).sum((2, 3))
    torch.testing.assert_close(posterior.log_p, joint.flatten() + expected.sum((1, 2)))


def test_mcmc_without_draws_is_refused() -> None:
    with pytest.raises(ValueError, match="no draws"):
        Posterior.from_mcmc(Chains(), mean_model, (Y,))  # type: ignore[arg-type]


def test_import_needs_no_arviz() -> None:
    import subprocess
    import sys

    heavy = {"arviz", "xarray", "matplotlib", "zuko"}
    code = f"import sys, pplvi.posterior.posterior, pplvi.posterior.report; assert not {heavy} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
