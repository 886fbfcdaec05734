"""Analytic divergences in the ELBO: Pyro's mean-field ELBO where that is right, and the ELBO everywhere."""

from functools import partial
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import Trace_ELBO, TraceMeanField_ELBO, config_enumerate
from pyro.infer.autoguide import AutoNormal
from torch import Tensor

from pplvi.losses.elbo import ELBO
from pplvi.programs.joint import execute
from pplvi.samplers.divergences import divergences

pytestmark = pytest.mark.usefixtures("float64")

DATA = torch.linspace(-1.0, 2.0, 12)
SEEN = DATA > -0.5
MASK = torch.tensor([True, True, False, True])  # one tensor for model and guide


def positive(name: str, value: Any) -> Tensor:
    return pyro.param(name, lambda: torch.as_tensor(value), constraint=dist.constraints.positive)


def hierarchical(y: Tensor) -> None:
    mu = pyro.sample("mu", dist.Normal(0.0, 2.0))
    noise = pyro.sample("noise", dist.Gamma(2.0, 1.0))
    shares = pyro.sample("shares", dist.Dirichlet(torch.ones(2)))
    with pyro.plate("data", 12, subsample_size=4) as index, poutine.scale(scale=0.7):
        with poutine.mask(mask=MASK):
            z = pyro.sample("z", dist.Normal(mu + shares[..., 0], 1.0))
        w = pyro.sample("w", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        with poutine.mask(mask=SEEN[index]):
            pyro.sample("y", dist.Normal(z + w.sum(-1), noise), obs=y[index])


def hierarchical_guide(y: Tensor) -> None:
    loc = pyro.param("loc", lambda: torch.tensor(0.3))
    pyro.sample("mu", dist.Normal(loc, positive("mu_scale", 0.5)))
    pyro.sample("noise", dist.LogNormal(loc, 0.3))  # no closed form against the gamma distribution
    pyro.sample("shares", dist.Dirichlet(positive("alpha", [2.0, 3.0])))
    with pyro.plate("data", 12, subsample_size=4) as index, poutine.scale(scale=0.7):
        with poutine.mask(mask=MASK):
            pyro.sample("z", dist.Normal(y[index] * loc, positive("z_scale", 0.8)))
        pyro.sample("w", dist.Normal(loc * torch.ones(2), 0.6).to_event(1))


PAIR = hierarchical, hierarchical_guide


def gradients(loss: Any, model: Any, guide: Any, *args: Any, seed: int = 1) -> tuple[Tensor, dict[str, Tensor]]:
    pyro.clear_param_store()
    pyro.set_rng_seed(0)
    guide(*args)
    named = dict(pyro.get_param_store().named_parameters())
    pyro.set_rng_seed(seed)
    value = loss.differentiable_loss(model, guide, *args)
    grads = torch.autograd.grad(value, list(named.values()), allow_unused=True, materialize_grads=True)
    return value.detach(), dict(zip(named, grads, strict=True))


def same(a: tuple[Tensor, dict[str, Tensor]], b: tuple[Tensor, dict[str, Tensor]]) -> None:
    torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("count", [1, 5])
def test_equal_to_pyro_where_pyro_is_right(count):
    """Scales, subsamples, masks, events, sites with and without closed form: loss and gradients to 1e-10."""
    theirs = gradients(TraceMeanField_ELBO(count, vectorize_particles=True, max_plate_nesting=1), *PAIR, DATA)
    same(gradients(ELBO(count, "kl"), *PAIR, DATA), theirs)


def test_which_sites_have_a_divergence():
    """All but the one without closed form; none of those that are masked or scaled otherwise than in the model."""
    pyro.clear_param_store()
    assert divergences(execute(*PAIR, (DATA,), {})).keys() == {"mu", "shares", "z", "w"}

    def masked(y: Tensor) -> None:
        with poutine.mask(mask=torch.tensor(True)):
            hierarchical(y)

    def scaled(y: Tensor) -> None:
        with poutine.scale(scale=0.5):
            hierarchical(y)

    for changed in (masked, scaled):
        assert not divergences(execute(changed, hierarchical_guide, (DATA,), {}))
        same(gradients(ELBO(2, "kl"), changed, PAIR[1], DATA), gradients(ELBO(2), changed, PAIR[1], DATA))


def test_no_variance_without_data():
    def prior() -> None:
        pyro.sample("z", dist.Normal(torch.zeros(3), 1.0).to_event(1))

    def guide() -> None:
        pyro.sample("z", dist.Normal(torch.ones(3), 0.5).to_event(1))

    exact = 3 * float(torch.distributions.kl_divergence(dist.Normal(1.0, 0.5), dist.Normal(0.0, 1.0)))
    assert [ELBO(entropy="kl").loss(prior, guide) for _ in range(3)] == [pytest.approx(exact)] * 3
    assert abs(ELBO().loss(prior, guide) - exact) > 1e-3


def counts(y: Tensor) -> None:
    rate = pyro.sample("rate", dist.Gamma(2.0, 1.0))
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Poisson(rate), obs=y)


def test_automatic_guides_keep_their_jacobian():
    """Their sites are deltas with a log density, which Pyro's mean-field ELBO drops."""
    y, guide = torch.tensor([4.0, 5.0, 3.0]), AutoNormal(counts)
    ours, sampled = (gradients(loss, counts, guide, y) for loss in (ELBO(entropy="kl"), Trace_ELBO()))
    same(ours, sampled)
    pyros = gradients(TraceMeanField_ELBO(), counts, guide, y)
    assert (pyros[0] - sampled[0]).abs() > 0.05
    assert (pyros[1]["AutoNormal.locs.rate"] - sampled[1]["AutoNormal.locs.rate"]).abs() > 0.05


def test_a_guide_in_another_order_is_no_mean_field():
    """``p(a) p(b | a)`` and ``q(b) q(a | b)``: the divergence at b, given its own child a, would be wrong."""

    def model() -> None:
        a = pyro.sample("a", dist.Normal(0.0, 1.0))
        pyro.sample("b", dist.Normal(a, 1.0))

    def guide() -> None:
        b = pyro.sample("b", dist.Normal(0.5, 1.0))
        pyro.sample("a", dist.Normal(0.9 * b, 0.5))

    pyro.set_rng_seed(0)
    assert divergences(execute(model, guide, (), {})).keys() == {"a"}
    sampled, ours = (torch.tensor([loss(50).loss(model, guide) for _ in range(200)]) for loss in LOSSES)
    error = ((sampled.var() + ours.var()) / 200).sqrt()
    assert abs(sampled.mean() - ours.mean()) < 4 * error
    wrong = partial(TraceMeanField_ELBO, vectorize_particles=True, max_plate_nesting=0)
    with pytest.warns(UserWarning, match="mean field restriction"):
        theirs = torch.tensor([wrong(50).loss(model, guide) for _ in range(200)])
    assert abs(sampled.mean() - theirs.mean()) > 10 * error


LOSSES = ELBO, partial(ELBO, entropy="kl")


def test_draws_that_cannot_be_reparameterised():
    """A score function of the ELBO with divergences: right on average, exact where every site has one."""

    def model(y: Tensor) -> None:
        k = pyro.sample("k", dist.Bernoulli(0.3))
        pyro.sample("y", dist.Normal(2 * k, 1.0), obs=y)

    def guide(y: Tensor) -> None:
        pyro.sample("k", dist.Bernoulli(logits=pyro.param("logit", lambda: torch.tensor(0.4))))

    y = torch.tensor(1.5)
    ours = torch.stack([gradients(ELBO(200, "kl"), model, guide, y, seed=s)[1]["logit"] for s in range(50)])
    enumerated = config_enumerate(guide)
    exact = gradients(ELBO(), model, enumerated, y)[1]["logit"]
    assert (ours.mean() - exact).abs() < 4 * ours.std() / 50**0.5


def test_what_is_refused():
    def model() -> None:
        pyro.sample("k", dist.Bernoulli(0.3), infer={"enumerate": "parallel"})
        pyro.sample("z", dist.Normal(0.0, 1.0))

    def guide() -> None:
        pyro.sample("z", dist.Normal(0.0, 1.0))

    with pytest.raises(ValueError, match="entropy='kl' with enumerated sites"):
        ELBO(entropy="kl").loss(model, guide)
    with pytest.raises(ValueError, match="entropy='kl' leaves no sampled log q"):
        ELBO(entropy="kl", estimator="stl")
    with pytest.raises(ValueError, match="expected 'sampled', 'exact' or 'kl'"):
        ELBO(entropy="divergence")
