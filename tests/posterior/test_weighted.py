"""Diagnostics of weighted draws against a conjugate model, where every number is known."""

import math

import pytest
import torch
from torch import Tensor
from torch.distributions import Normal

from pplvi.posterior.draws import Draws
from pplvi.posterior.gather import align
from pplvi.posterior.weighted import Estimate, WeightedDraws
from pplvi.programs.sites import Plate
from pplvi.weights.algebra import effective_sample_size, log_evidence
from pplvi.weights.pareto import pareto_smooth

pytestmark = pytest.mark.usefixtures("float64")

Y = 0.5
LOG_Z = -1.3280121  # log N(0.5; 0, sd sqrt 2)


def conjugate(loc: float, scale: float, num_draws: int = 40_000, batch: int = 0) -> WeightedDraws:
    """Draws of the guide N(loc, scale) for a prior N(0, 1) and the datum 0.5 of sd 1; perhaps a plate of such."""
    torch.manual_seed(1)
    plates = (Plate("data", -1, batch, batch),) if batch else ()
    guide = Normal(torch.tensor(loc), scale)
    z = guide.sample((num_draws, *([batch] if batch else [])))
    likelihood = Normal(z, 1.0).log_prob(torch.tensor(Y))
    log_p = Normal(0.0, 1.0).log_prob(z) + likelihood
    y = torch.full(z.shape[1:], Y)
    named = {"z": plates, "y": plates}
    return WeightedDraws(
        Draws({"z": z}, {}, {"y": y}, {"y": likelihood}, log_p, guide.log_prob(z), plates, named, frozenset())
    )


def exact_terms(loc: float, scale: float) -> tuple[float, float]:
    """E[log p] and the entropy of the guide."""
    log_p = -math.log(2 * math.pi) - (loc**2 + scale**2) / 2 - ((Y - loc) ** 2 + scale**2) / 2
    return log_p, 0.5 * math.log(2 * math.pi * math.e * scale**2)


def test_exact_guide_has_no_gap_and_equal_weights() -> None:
    posterior = conjugate(0.25, 0.5**0.5, 1000)
    assert posterior.total_log_evidence == (pytest.approx(LOG_Z, abs=1e-7), pytest.approx(0, abs=1e-7))
    assert posterior.elbo == (pytest.approx(LOG_Z, abs=1e-7), pytest.approx(0, abs=1e-7))
    assert posterior.gap == (pytest.approx(0, abs=1e-9), pytest.approx(0, abs=1e-9))
    assert posterior.ess.item() == pytest.approx(1000)
    assert posterior.pareto_k.item() == 0


@pytest.mark.parametrize(("loc", "scale"), [(0.0, 1.0), (0.5, 0.6), (0.25, 0.9)])
def test_terms_of_the_elbo_and_the_gap_are_exact_within_their_errors(loc: float, scale: float) -> None:
    posterior = conjugate(loc, scale)
    log_p, entropy = exact_terms(loc, scale)
    exact = {"expected_log_prob": log_p, "entropy": entropy, "elbo": log_p + entropy, "total_log_evidence": LOG_Z}
    for name, value in {**exact, "gap": LOG_Z - log_p - entropy}.items():
        estimate = getattr(posterior, name)
        assert abs(estimate.value - value) < 3 * estimate.error, name
        assert 0 < estimate.error < 0.05 * max(abs(value), 0.2), name


def test_error_of_the_gap_counts_the_draws_that_its_terms_share() -> None:
    gaps = []
    for seed in range(300):
        torch.manual_seed(seed)
        z = torch.randn(500)
        likelihood = Normal(z, 1.0).log_prob(torch.tensor(Y))
        prior = Normal(0.0, 1.0).log_prob(z)
        posterior = WeightedDraws(Draws({"z": z}, {}, {}, {}, prior + likelihood, prior, (), {"z": ()}, frozenset()))
        gaps.append(posterior.gap)
    spread = torch.tensor([gap.value for gap in gaps]).std().item()
    assert sum(gap.error for gap in gaps) / 300 == pytest.approx(spread, rel=0.12)


def test_batch_elements_have_diagnostics_of_their_own_and_estimates_add_up() -> None:
    posterior = conjugate(0.0, 1.0, 4000, batch=5)
    assert posterior.log_weight.shape == (4000, 5)
    for i in range(5):
        column = posterior.log_weight[:, i]
        assert posterior.ess[i].item() == pytest.approx(effective_sample_size(column).item())
        assert posterior.pareto_k[i] == pareto_smooth(column)[1]
        assert posterior.log_evidence[1][i].item() == pytest.approx(log_evidence(column)[1].item())
    total, error = posterior.total_log_evidence
    assert total == pytest.approx(posterior.log_evidence[0].sum().item())
    assert error == pytest.approx(posterior.log_evidence[1].square().sum().sqrt().item())
    assert abs(total - 5 * LOG_Z) < 3 * error
    assert posterior.elbo.value == pytest.approx(posterior.log_weight.mean(0).sum().item())
    assert abs(posterior.gap.value - 5 * (LOG_Z - sum(exact_terms(0.0, 1.0)))) < 3 * posterior.gap.error


def test_subsample_scale_of_a_batch_plate_multiplies_the_estimates_and_no_weight() -> None:
    full = conjugate(0.0, 1.0, 500, batch=4)
    plate = Plate("data", -1, 4, 40)
    draws = full.draws
    scaled = Draws(
        draws.latents, {}, {}, {}, draws.log_p, draws.log_q, (plate,), {"z": (plate,), "y": (plate,)}, frozenset()
    )
    posterior = WeightedDraws(scaled)
    assert torch.equal(posterior.log_weight, full.log_weight)
    for name in ("elbo", "entropy", "total_log_evidence", "gap"):
        value, error = getattr(posterior, name)
        assert (value, error) == pytest.approx(tuple(10 * x for x in getattr(full, name)))


def with_densities(log_p: Tensor, log_q: Tensor | None, plates: tuple[Plate, ...] = ()) -> Draws:
    return Draws({"z": torch.zeros(len(log_p))}, {}, {}, {}, log_p, log_q, (), {"z": plates}, frozenset())


REFUSED = ["log_weight", "psis_log_weight", "pareto_k", "ess", "log_evidence", "total_log_evidence", "gap"]


@pytest.mark.parametrize("name", [*REFUSED, "entropy", "elbo"])
def test_mcmc_draws_refuse_what_needs_a_guide(name: str) -> None:
    posterior = WeightedDraws(with_densities(torch.zeros(30), None))
    with pytest.raises(ValueError, match="MCMC draws have no guide density"):
        getattr(posterior, name)
    assert posterior.is_mcmc
    assert not posterior.has_weights
    assert posterior.expected_log_prob.value == 0


@pytest.mark.parametrize("name", [*REFUSED, "entropy", "elbo"])
def test_point_guides_refuse_what_needs_a_density(name: str) -> None:
    posterior = WeightedDraws(with_densities(torch.zeros(30), torch.zeros(30)), frozenset({"z"}))
    with pytest.raises(ValueError, match=r"holds \['z'\] at a point"):
        getattr(posterior, name)
    assert posterior.is_dirac
    assert not posterior.has_weights


@pytest.mark.parametrize("name", REFUSED)
def test_subsampled_plates_outside_the_batch_have_no_weights_but_an_elbo(name: str) -> None:
    draws = with_densities(torch.ones(30), torch.zeros(30), (Plate("data", -1, 4, 40),))
    posterior = WeightedDraws(draws)
    with pytest.raises(ValueError, match=r"plates \['data'\] are subsampled"):
        getattr(posterior, name)
    assert not posterior.has_weights
    assert posterior.elbo == (1, 0)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_weights_that_are_no_numbers_are_refused(bad: float) -> None:
    log_p = torch.zeros(30)
    log_p[3] = bad
    with pytest.raises(ValueError, match="1 of 30 importance weights are NaN or infinite"):
        _ = WeightedDraws(with_densities(log_p, torch.zeros(30))).log_weight


def test_draws_outside_the_support_have_no_weight() -> None:
    log_p = torch.zeros(30)
    log_p[:10] = -math.inf
    assert WeightedDraws(with_densities(log_p, torch.zeros(30))).ess.item() == pytest.approx(20)


def test_resampling_corrects_the_guide() -> None:
    z = conjugate(0.0, 1.0).resample(20_000, seed=1)["z"]
    assert z.mean().item() == pytest.approx(0.25, abs=0.02)
    assert z.std().item() == pytest.approx(0.5**0.5, abs=0.02)


def test_resampling_is_seeded_and_leaves_the_random_state_alone() -> None:
    posterior = conjugate(0.0, 1.0, 200)
    state = torch.get_rng_state()
    first, second = posterior.resample(seed=3)["z"], posterior.resample(seed=3)["z"]
    assert torch.equal(first, second)
    assert torch.equal(state, torch.get_rng_state())
    assert not torch.equal(first, posterior.resample(seed=4)["z"])


def test_resampling_acts_on_each_batch_element_with_its_own_weights() -> None:
    """Two elements whose weights single out different draws, the site inside a further plate and with an event."""
    data, rep = Plate("data", -1, 2, 2), Plate("rep", -2, 3, 3)
    value = torch.arange(4.0)[:, None, None, None].expand(4, 3, 2, 5)
    log_weight = torch.full((4, 2), -math.inf)
    log_weight[1, 0] = log_weight[3, 1] = 0.0
    plates = {"z": (rep, data), "w": (data,)}
    draws = Draws(
        {"z": value, "w": value[:, 0, :, 0]}, {}, {}, {}, log_weight, torch.zeros(4, 2), (data,), plates, frozenset()
    )
    found = WeightedDraws(draws).resample(7)
    assert found["z"].shape == (7, 3, 2, 5)
    assert found["z"][:, :, 0].eq(1).all()
    assert found["z"][:, :, 1].eq(3).all()
    assert found["w"].tolist() == [[1, 3]] * 7


def test_unweighted_draws_come_back_as_they_are() -> None:
    draws = with_densities(torch.zeros(30), None)
    draws.latents["z"][:] = torch.arange(30.0)
    assert torch.equal(WeightedDraws(draws).resample()["z"], torch.arange(30.0))


def test_weights_align_with_plates_by_name() -> None:
    a, b, c = (Plate(name, dim, size, size) for name, dim, size in (("a", -3, 2), ("b", -2, 3), ("c", -1, 4)))
    weight = torch.randn(10, 2, 4)
    assert align(weight, [a, c], [a, b, c]).shape == (10, 2, 1, 4)
    assert torch.equal(align(weight, [a, c], [a, b, c])[:, :, 0], weight)
    with pytest.raises(ValueError, match=r"outside the plates \['c'\]"):
        align(weight, [a, c], [a, b])


def test_predictions_are_no_weighted_draws() -> None:
    with pytest.raises(ValueError, match="predictions, without densities"):
        WeightedDraws(Draws({}, {}, {}, {}, None, None, (), {}, frozenset()))


def test_estimates_print_with_their_error() -> None:
    assert str(Estimate(-1.23456, 0.0123)) == "-1.235 +- 0.012"
