"""AutoStudentMixture: modes near and far, wide and narrow, heavy tails, bananas, and refusals."""

import math
from functools import partial

import pyro
import pyro.distributions as dist
import pytest
import torch

import pplvi
from pplvi import AutoStudentMixture
from pplvi.guides.search import moments, students

pytestmark = pytest.mark.usefixtures("float64")


def peaks(where, widths, shares):
    """Two peaks under a wide prior, of log evidence 0."""
    prior = dist.Normal(torch.zeros(3), 5.0).to_event(1)

    def model():
        z = pyro.sample("z", prior)
        parts = [
            math.log(share) + dist.Normal(torch.full((3,), at), width).to_event(1).log_prob(z)
            for at, width, share in zip(where, widths, shares, strict=True)
        ]
        pyro.factor("peaks", torch.logaddexp(*parts) - prior.log_prob(z))

    return model


def found(model, **options):
    return pplvi.fit(model, lambda program: AutoStudentMixture(program, seed=0, **options), progress=False, seed=0)


def rounds_of(monkeypatch, module, name, work, guide):
    """How often a search has drawn from its proposals, where a draw takes so many elements."""
    sizes, inner = [], getattr(module, name)
    with monkeypatch.context() as patched:
        patched.setattr(module, "work_of_row", lambda density: work)
        patched.setattr(module, name, lambda *args: sizes.append(1) or inner(*args))
        guide(lambda: pyro.sample("z", dist.Gamma(6.0, 1.0).expand([3]).to_event(1)), seed=0).run()
    return len(sizes)


@pytest.mark.parametrize(
    ("module", "name", "guide"),
    [
        (students, "weighed", partial(AutoStudentMixture, num_scouts=4)),
        (moments, "_judge", partial(pplvi.AutoPathfinder, num_components=1)),
    ],
)
def test_dear_draws_are_not_spent_on_rounds_that_save_fewer(monkeypatch, module, name, guide):
    cheap, dear = (rounds_of(monkeypatch, module, name, work, guide) for work in (1e3, 3e5))
    assert dear == 1 < cheap


@pytest.mark.parametrize(
    ("where", "widths", "shares"),
    [((4.0, -4.0), (1.0, 1.0), (0.8, 0.2)), ((2.0, -2.0), (1.0, 0.25), (0.6, 0.4))],
)
def test_all_modes_are_found_with_their_shares(where, widths, shares):
    posterior = found(peaks(where, widths, shares)).posterior(2000, seed=0)
    value, error = posterior.total_log_evidence
    assert abs(value) < 4 * error < 0.1
    right = (posterior.resample(2000, seed=0)["z"].mean(-1) > 0).double().mean()
    assert float(right) == pytest.approx(shares[0], abs=0.05)
    assert posterior.verdict.word == "reliable"


def test_heavy_tails_are_answered_by_t_distributions():
    def model():
        pyro.sample("z", dist.MultivariateStudentT(3.0, torch.zeros(4), torch.eye(4)))

    fit = found(model)
    assert float(fit.guide.df.min()) < 6
    assert float(fit.posterior(2000, seed=0).ess) > 0.85 * 2000


def test_it_starts_at_the_gaussians_of_another_guide():
    """Light tails become heavy without another climb; scales far from one are counted in units by the search."""

    def model():
        pyro.sample("z", dist.MultivariateStudentT(3.0, torch.full((4,), 1e4), 5e3 * torch.eye(4)))

    first = pplvi.fit(model, pplvi.AutoPathfinder, progress=False, seed=0)
    fit = found(model, start=first.guide)
    climbed = found(model)
    assert float(fit.guide.df.min()) < 6
    assert float(fit.posterior(2000, seed=0).ess) > 0.85 * 2000 > float(first.posterior(2000, seed=0).ess)
    assert fit.guide.num_gradients == 0 < climbed.guide.num_gradients


def test_a_banana_takes_several_components():
    def model():
        x = pyro.sample("x", dist.Normal(0.0, 2.0))
        pyro.sample("y", dist.Normal(0.5 * x**2, 1.0))

    fit = found(model)
    assert len(fit.guide.loc) > 1
    posterior = fit.posterior(4000, seed=0)
    assert float(posterior.ess) > 0.4 * 4000
    assert abs(posterior.total_log_evidence.value) < 4 * posterior.total_log_evidence.error


def test_the_search_is_reproducible():
    one, two = (found(peaks((4.0, -4.0), (1.0, 1.0), (0.5, 0.5))).guide for _ in range(2))
    assert torch.equal(one.loc, two.loc)


def test_many_dimensions_are_refused():
    with pytest.raises(ValueError, match=r"of 101 unconstrained dimensions: expected at most 100"):
        AutoStudentMixture(lambda: pyro.sample("z", dist.Normal(torch.zeros(101), 1.0).to_event(1))).run()
    with pytest.raises(ValueError, match="num_scouts=0"):
        AutoStudentMixture(lambda: None, num_scouts=0)
