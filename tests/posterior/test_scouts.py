"""What scouts are made of: mixtures of Student distributions that are pushed and fitted, and rows that climb."""

import math

import pyro
import pyro.distributions as dist
import torch

from pplvi.posterior.ascent import ascend
from pplvi.posterior.scouts import Weighed, adapted, climbed, spread_starts
from pplvi.posterior.students import Students
from pplvi.programs.density import UnconstrainedDensity

TRIL = torch.tensor([[1.0, 0.0], [0.5, 2.0]], dtype=torch.float64)


def normal(loc: list[float]) -> Students:
    return Students(torch.zeros(1), torch.tensor([loc]).double(), TRIL[None], torch.tensor([math.inf]))


def test_noise_is_pushed_along_the_scale():
    noise = torch.tensor([[1.0, 0.0], [0.0, 1.0]], dtype=torch.float64)
    pushed = normal([3.0, -1.0]).push(noise, torch.zeros(2, dtype=torch.long))
    torch.testing.assert_close(pushed, torch.tensor([3.0, -1.0]) + noise @ TRIL.T)


def test_densities_are_those_of_normal_and_t_distributions():
    torch.manual_seed(0)
    shares, df = torch.tensor([0.3, 0.7], dtype=torch.float64), torch.tensor([math.inf, 3.0], dtype=torch.float64)
    loc, value = torch.randn(2, 2, dtype=torch.float64), torch.randn(5, 2, dtype=torch.float64)
    mixture = Students(shares.log(), loc, torch.stack([TRIL, 2 * TRIL]), df)
    parts = [
        dist.MultivariateNormal(loc[0], scale_tril=TRIL).log_prob(value),
        dist.MultivariateStudentT(df[1], loc[1], 2 * TRIL).log_prob(value),
    ]
    exact = torch.logaddexp(*(share.log() + part for share, part in zip(shares, parts, strict=True)))
    torch.testing.assert_close(mixture.log_prob(value), exact)


def test_a_component_of_one_draw_is_dropped_and_one_of_two_kept():
    """In two dimensions a component needs the weight of a draw and a half."""
    torch.manual_seed(0)
    draws = torch.cat([torch.randn(20, 2, dtype=torch.float64), torch.full((2, 2), 100.0, dtype=torch.float64)])
    two = normal([0.0, 0.0])._replace(
        log_share=torch.full((2,), math.log(0.5)).double(),
        loc=torch.tensor([[0.0, 0.0], [100.0, 100.0]]).double(),
        tril=TRIL.expand(2, 2, 2),
        df=torch.full((2,), math.inf),
    )
    for kept, components in ((22, 2), (21, 1)):
        weight = torch.full((kept,), 1 / kept, dtype=torch.float64)
        assert len(two.fitted(draws[:kept], weight, steps=1).loc) == components


def test_scouts_start_five_standard_deviations_from_the_draws_of_a_guide():
    torch.manual_seed(0)
    sd = torch.tensor([0.1, 10.0], dtype=torch.float64)
    draws = 3.0 + sd * torch.randn(4000, 2, dtype=torch.float64)
    own = Weighed(draws, torch.zeros(4000).double(), torch.zeros(4000).double())
    starts = (spread_starts(own, 4000) - 3.0) / (5 * sd)
    assert bool((starts.mean(0).abs() < 5 / 4000**0.5).all())
    assert bool((starts.square().mean(0) - 1).abs().max() < 0.15)


def test_one_normal_is_fitted_by_moments_drawn_towards_the_present_covariance():
    torch.manual_seed(0)
    draws, weight = torch.randn(50, 2, dtype=torch.float64), torch.rand(50, dtype=torch.float64)
    weight = weight / weight.sum()
    found, effective = normal([0.5, 0.5]).fitted(draws, weight, steps=1), 1 / weight.square().sum()
    loc = weight @ draws
    scatter = (weight[:, None] * (draws - loc)).T @ (draws - loc)
    covariance = (effective * scatter + 4 * TRIL @ TRIL.T) / (effective + 4)
    torch.testing.assert_close(found.loc[0], loc)
    torch.testing.assert_close(found.tril[0] @ found.tril[0].T, covariance)


def test_rows_climb_a_narrow_ridge_in_a_few_steps():
    scale = torch.logspace(0, 3, 6, dtype=torch.float64)

    def ridge(x):
        return -0.5 * (scale * (x - 1).square()).sum(1), -scale * (x - 1)

    starts = torch.stack([torch.zeros(6), torch.linspace(-2, 3, 6)]).double()
    assert bool((ascend(ridge, starts, 40).value > -0.002).all())


class Counted(UnconstrainedDensity):
    """Counts how many times values and gradients are asked for."""

    calls = 0

    def value_and_gradient(self, u):
        self.calls += 1
        return super().value_and_gradient(u)


def mixture(places, scales):
    """A density with normal modes of equal mass at these places."""
    parts = dist.MultivariateNormal(places, scale_tril=scales[:, None, None] * torch.eye(places.shape[1]).to(places))

    def model():
        wide = dist.Normal(torch.zeros(places.shape[1], dtype=torch.float64), 10.0).to_event(1)
        z = pyro.sample("z", wide)
        pyro.factor("z itself", parts.log_prob(z.unsqueeze(-2)).logsumexp(-1) - wide.log_prob(z))

    return Counted(model)


FAR_APART = torch.tensor([[-6.0, 0.0, 0.0], [6.0, 0.0, 0.0]], dtype=torch.float64)


def test_scouts_that_lead_to_a_mode_which_was_met_climb_no_further():
    """Where height and slope are those of a known mode, the climb is over before its first step."""
    density = mixture(FAR_APART, torch.ones(2, dtype=torch.float64))
    torch.manual_seed(0)
    starts = torch.cat([FAR_APART, FAR_APART]) + torch.randn(4, 3, dtype=torch.float64)
    modes = climbed(density, starts + 5 * torch.eye(3)[1])
    assert [round(float(mode.loc[0])) for mode in modes] in ([-6, 6], [6, -6])
    density.calls = 0
    assert climbed(density, starts, modes) == modes
    assert density.calls == 1


def test_scouts_beside_a_known_mode_climb_to_others():
    """A narrow mode two standard deviations from a wide one has the slope of none but itself."""
    places = torch.tensor([[0.0, 0.0], [3.0, 0.0]], dtype=torch.float64)
    density = mixture(places, torch.tensor([1.0, 0.1], dtype=torch.float64))
    (wide,) = climbed(density, -torch.ones(1, 2, dtype=torch.float64))
    assert float(wide.loc.norm()) < 0.01
    found = climbed(density, torch.tensor([[-1.0, 0.5], [2.8, 0.1]], dtype=torch.float64), [wide])
    assert len(found) == 2
    assert abs(float(found[1].loc[0]) - 3) < 0.01


class InUnitsOf:
    """Knows of no end, and of the scale of the climbs."""

    def __init__(self, metric):
        self.metric = metric

    def __call__(self, at, rows, ends):
        return torch.zeros_like(rows, dtype=torch.bool)


def test_climbs_in_units_of_a_covariance_are_those_of_a_round_hill():
    """Three steps lead to the top of a ridge that takes ten and more without them."""
    scale = torch.tensor([1.0, 1e-3], dtype=torch.float64)
    starts = torch.tensor([[3.0, 4e-3], [-2.0, 1e-3]], dtype=torch.float64)

    def ridge(x):
        return -((x / scale) ** 2).sum(1) / 2, -x / scale**2

    known = InUnitsOf(scale.square().diag())
    assert bool((ascend(ridge, starts, 3, known).value > -1e-6).all())
    assert bool((ascend(ridge, starts, 3).value < -0.1).all())


def test_a_proposal_with_good_weights_is_not_fitted_anew():
    """Where half of the draws are effective, rounds of EM would cost more than they bring."""
    density = mixture(FAR_APART, torch.ones(2, dtype=torch.float64))
    tril = torch.eye(3, dtype=torch.float64).expand(2, -1, -1)
    shares, normal = torch.full((2,), -math.log(2.0), dtype=torch.float64), torch.full((2,), 40.0).double()
    for scale, rows in ((1.0, 500), (4.0, 1500)):
        before = density.rows
        adapted(density, Students(shares, FAR_APART, scale * tril, normal), 500)
        assert density.rows - before == rows
