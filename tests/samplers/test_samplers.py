"""Where steps come from: frozen densities, the zero gradient at the exact posterior, and dreams of the model."""

from collections.abc import Callable
from dataclasses import replace
from functools import cache

import known
import pyro
import pyro.distributions as dist
import pytest
import torch
from known import GAUSSIAN, OBSERVED
from pyro.infer import SVI, autoguide, config_enumerate
from torch import Tensor

from pplvi.losses.base import WeightedELBO
from pplvi.losses.elbo import ELBO, ChiELBO, ImportanceWeightedELBO, RenyiELBO
from pplvi.objectives.forward_kl import ForwardKLDivergence
from pplvi.objectives.step import Routing
from pplvi.samplers.ancestral import Ancestral
from pplvi.samplers.base import Request
from pplvi.samplers.importance import Importance

pytestmark = pytest.mark.usefixtures("float64")

PATHWISE = [
    ELBO(5, estimator="stl"),
    ImportanceWeightedELBO(5, estimator="dreg"),
    ImportanceWeightedELBO(5, estimator="stl"),
    RenyiELBO(0.5, 5, estimator="dreg"),
    ChiELBO(5, estimator="dreg"),
]
HALF = 0.5**0.5


def steps_of(model: Callable, guide: Callable, routing: Routing, seed: int = 5) -> object:
    pyro.set_rng_seed(seed)
    (step,) = Importance()(model, guide, (), {}, Request(4, True, routing))
    return step


# Importance sampling: the routing of gradients.


def test_frozen_and_live_steps_have_the_same_densities() -> None:
    for problem in (known.GAUSSIAN, known.NESTED, known.BETA):
        pyro.clear_param_store()
        live, frozen = (steps_of(*problem.programs(3), Routing(freeze=freeze)) for freeze in (False, True))
        for name in ("log_weight", "log_target", "log_forward"):
            torch.testing.assert_close(getattr(frozen, name), getattr(live, name))
        torch.testing.assert_close(frozen.log_target_fixed, live.log_target)


def test_frozen_steps_know_no_gradient_of_the_guides_own_parameters() -> None:
    """log q moves by the path alone, log_target_fixed by the model's parameters alone."""
    model, guide = GAUSSIAN.programs(3)
    step = steps_of(model, guide, Routing(freeze=True))
    leaves = [pyro.param(name) for name in ("prior", "loc", "log_scale")]
    scale = leaves[2].exp().detach()
    noise = (-2 * (step.log_forward.detach() + leaves[2] + 0.5 * torch.tensor(2 * torch.pi).log())).clamp(min=0).sqrt()
    fixed = torch.autograd.grad(step.log_target_fixed.sum(), leaves, retain_graph=True, allow_unused=True)
    assert fixed[0].any()
    assert fixed[1] is None or not fixed[1].any()
    on_prior, on_loc, on_scale = torch.autograd.grad(step.log_forward.sum(), leaves, allow_unused=True)
    assert on_prior is None or not on_prior.any()
    assert on_loc.any()  # d log q / dz is -noise / scale, dz / d loc is 1, dz / d log_scale is scale * noise
    torch.testing.assert_close(on_scale, -(noise**2).sum(0).detach())
    assert (on_loc.abs() <= (noise / scale).sum(0) + 1e-9).all()


def test_detached_draws_have_no_path() -> None:
    model, guide = GAUSSIAN.programs(3)
    step = steps_of(model, guide, Routing(detach=True))
    gradient = torch.autograd.grad(step.log_target.sum(), pyro.param("loc"), allow_unused=True)[0]
    assert gradient is None
    torch.testing.assert_close(step.log_score, step.log_forward)


def test_sticking_the_landing_is_the_path_derivative_of_the_log_weight() -> None:
    """Per draw, worked by hand: d log w / dz = (prior - z) + (y - z) + (z - loc) / scale^2."""
    loss = ELBO(4, estimator="stl")
    model, guide = GAUSSIAN.programs(1)
    pyro.set_rng_seed(5)
    loss.loss_and_grads(model, guide)
    pyro.set_rng_seed(5)
    p = GAUSSIAN.params
    scale = torch.tensor(p["log_scale"]).exp()
    noise = torch.randn(4, 1)
    z = p["loc"] + scale * noise
    slope = (p["prior"] - z) + (OBSERVED - z) + (z - p["loc"]) / scale**2
    torch.testing.assert_close(pyro.param("loc").grad, -slope.mean(0))
    torch.testing.assert_close(pyro.param("log_scale").grad, -(slope * scale * noise).mean(0))


# Gradients are zero, draw for draw, where the guide is exact.


def exact_params(prior: float = 0.8) -> dict[str, float]:
    return {"prior": prior, "loc": (prior + OBSERVED) / 2, "log_scale": float(torch.tensor(HALF).log())}


@pytest.mark.parametrize("loss", PATHWISE, ids=repr)
def test_no_gradient_at_the_exact_posterior(loss: WeightedELBO) -> None:
    found = known.estimate(loss, replace(GAUSSIAN, params=exact_params()), 50)
    for name in ("loc", "log_scale"):
        assert found.gradients[name].abs().max() < 1e-10
    plain = known.estimate(ELBO(5), replace(GAUSSIAN, params=exact_params()), 50)
    assert plain.gradients["loc"].abs().max() > 1e-2  # the plain estimator is noisy there


@pytest.mark.parametrize("loss", PATHWISE, ids=repr)
@pytest.mark.parametrize("looped", [False, True])
def test_no_gradient_at_the_exact_posterior_of_a_hierarchical_guide(loss: WeightedELBO, looped: bool) -> None:
    """mu ~ N(0, 1), m ~ N(mu, 1), y ~ N(m, 1): first mu given y, N(y/3, 2/3), then m given both, N((mu+y)/2, 1/2)."""

    def model() -> None:
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        m = pyro.sample("m", dist.Normal(mu, 1.0))
        pyro.sample("y", dist.Normal(m, 1.0), obs=torch.tensor(1.2))

    def guide() -> None:
        mu = pyro.sample(
            "mu", dist.Normal(pyro.param("a", torch.tensor(0.4)), pyro.param("b", torch.tensor(2 / 3)).sqrt())
        )
        mean = pyro.param("slope", torch.tensor(0.5)) * mu + pyro.param("offset", torch.tensor(0.6))
        pyro.sample("m", dist.Normal(mean, pyro.param("c", torch.tensor(0.5)).sqrt()))

    WeightedELBO(loss.objective, num_particles=5, vectorize_particles=not looped).loss_and_grads(model, guide)
    for name in ("a", "b", "slope", "offset", "c"):
        assert pyro.param(name).grad.abs().max() < 1e-10, name


@pytest.mark.parametrize("loss", PATHWISE, ids=repr)
@pytest.mark.parametrize(
    "family", [autoguide.AutoNormal, autoguide.AutoDiagonalNormal, autoguide.AutoMultivariateNormal]
)
def test_no_gradient_at_the_exact_posterior_of_an_automatic_guide(family: type, loss: WeightedELBO) -> None:
    model, _ = replace(GAUSSIAN, params=exact_params()).programs(1)
    guide = family(model, init_scale=HALF, init_loc_fn=lambda site: torch.full((1,), exact_params()["loc"]))
    guide()
    loss.loss_and_grads(model, guide)
    gradients = [p.grad for p in guide.parameters() if p.grad is not None]
    assert len(gradients) >= 2
    assert max(g.abs().max() for g in gradients) < 1e-10


def test_no_gradient_where_the_sites_are_positive() -> None:
    """Through a Jacobian: LogNormal prior and posterior, AutoNormal on the logarithm."""

    def model() -> None:
        rate = pyro.sample("rate", dist.LogNormal(0.0, 1.0))
        pyro.sample("y", dist.Normal(rate.log(), 1.0), obs=torch.tensor(1.0))

    for loss in PATHWISE:
        guide = autoguide.AutoNormal(model, init_scale=HALF, init_loc_fn=lambda site: torch.tensor(0.5).exp())
        guide()
        loss.loss_and_grads(model, guide)
        assert max(p.grad.abs().max() for p in guide.parameters()) < 1e-10


# Guides with parameters in deterministic sites: still unbiased, against the same answers.


def noise_guide(p: known.Getter) -> None:
    """The same normal guide as a deterministic function of standard noise."""
    noise = pyro.sample("noise", dist.Normal(0.0, 1.0).expand(p("loc").shape), infer={"is_auxiliary": True})
    scale = p("log_scale").exp()
    pyro.sample("z", dist.Delta(p("loc") + scale * noise, log_density=-p("log_scale").expand(noise.shape)))


def halfway_guide(p: known.Getter) -> None:
    """Part of the location and of the scale inside the draw, the rest in the deterministic site."""
    first = pyro.sample(
        "first", dist.Normal(p("loc") - 0.5, (0.5 * p("log_scale")).exp()), infer={"is_auxiliary": True}
    )
    stretch = (0.5 * p("log_scale")).exp()
    value = p("loc") + stretch * (first - p("loc") + 0.5)
    pyro.sample("z", dist.Delta(value, log_density=(-0.5 * p("log_scale")).expand(value.shape)))


@cache
def gaussian_reference(alpha: float) -> known.Estimates:
    return known.expectation(GAUSSIAN, 1 if alpha == 1.0 else 5, known.renyi(alpha), size=150_000)


@pytest.mark.parametrize(
    "loss", [loss for loss in PATHWISE if loss.objective.alpha == 1 or "dreg" in repr(loss)], ids=repr
)
@pytest.mark.parametrize("guide", [noise_guide, halfway_guide])
def test_frozen_estimators_are_unbiased_with_parameters_in_deterministic_sites(
    guide: Callable, loss: WeightedELBO
) -> None:
    found = known.estimate(loss, replace(GAUSSIAN, guide=guide), 100_000)
    known.check(found, gaussian_reference(loss.objective.alpha), 1.0 if loss.objective.alpha < 0 else -1.0)


def test_frozen_densities_are_unbiased_for_structured_guides() -> None:
    """AutoStructured computes later sites from earlier ones with learned coefficients."""

    def model() -> None:
        a = pyro.sample("a", dist.Normal(0.0, 1.0))
        b = pyro.sample("b", dist.Normal(a, 1.0))
        pyro.sample("y", dist.Normal(b, 1.0), obs=torch.tensor(3.0))

    guide = autoguide.AutoStructured(
        model, conditionals={"a": "normal", "b": "normal"}, dependencies={"b": {"a": "linear"}}, init_scale=0.6
    )
    guide()
    draws = {}
    for loss in (ELBO(2000), ELBO(2000, estimator="stl")):
        gradients = [gradient_of(loss, model, guide) for _ in range(30)]
        draws[str(loss)] = {name: torch.stack([g[name].flatten() for g in gradients]) for name in gradients[0]}
    plain, frozen = draws.values()
    assert plain.keys() == frozen.keys()
    assert any("deps" in name for name in plain)
    for name, estimates in plain.items():
        bar = ((estimates.var(0) + frozen[name].var(0)) / len(estimates)).sqrt()
        difference = (estimates.mean(0) - frozen[name].mean(0)).abs()
        assert (difference < known.SIGMAS * bar).all(), name
        assert (bar < 0.05 * estimates.mean(0).abs().clamp(min=0.2)).all(), name


def gradient_of(loss: WeightedELBO, model: Callable, guide: torch.nn.Module) -> dict[str, Tensor]:
    guide.zero_grad()
    loss.loss_and_grads(model, guide)
    return {name: p.grad.clone() for name, p in guide.named_parameters() if p.grad is not None}


# Ancestral sampling: sleep.

REPLICAS = 100_000
SLEEP = WeightedELBO(ForwardKLDivergence(), Ancestral(), 2)


def dreaming_model(y: Tensor) -> None:
    prior = pyro.param("prior", torch.full(y.shape, 0.8))
    with pyro.plate("replicas", len(y)):
        z = pyro.sample("z", dist.Normal(prior, 1.0))
        pyro.sample("y", dist.Normal(z, 1.0), obs=y)


def encoder(y: Tensor) -> None:
    a, b, s = (pyro.param(name, torch.full(y.shape, value)) for name, value in (("a", 0.2), ("b", -0.4), ("s", -0.2)))
    with pyro.plate("replicas", len(y)):
        pyro.sample("z", dist.Normal(a * y + b, s.exp()))


def sleep_loss(p: known.Values) -> Tensor:
    """E[-log q(z | y)] under the joint: the residual z - a y - b is normal."""
    mean = 0.8 * (1 - p["a"]) - p["b"]
    variance = 1 + 2 * p["a"] ** 2 - 2 * p["a"]
    return p["s"] + 0.5 * torch.tensor(2 * torch.pi).log() + (mean**2 + variance) / (2 * (2 * p["s"]).exp())


def sleeping(model: Callable, guide: Callable, *args: Tensor, **kwargs: object) -> Tensor:
    (step,) = SLEEP.steps(model, guide, *args, **kwargs)
    assert not step.log_weight.any()  # exact draws: equal weights
    terms = SLEEP.objective(step)
    terms.surrogate.sum().backward()
    return terms.value


def test_sleep_phi_is_right_on_the_conjugate_gaussian() -> None:
    value = sleeping(dreaming_model, encoder, torch.zeros(REPLICAS))
    p = {"a": 0.2, "b": -0.4, "s": -0.2}
    p = {name: torch.tensor(v, requires_grad=True) for name, v in p.items()}
    exact = sleep_loss(p)
    exact.backward()
    known.check_one("value", value, exact.detach())
    for name, leaf in p.items():
        known.check_one(name, pyro.param(name).grad, leaf.grad)
    assert pyro.param("prior").grad is None  # the model dreams without gradient


def test_sleep_trains_an_encoder_to_the_exact_posterior() -> None:
    """The posterior is N((0.8 + y) / 2, 1/2)."""
    y = torch.zeros(1000)
    optim = pyro.optim.Adam({"lr": 0.05})
    svi = SVI(dreaming_model, lambda y: amortised(y), optim, WeightedELBO(ForwardKLDivergence(), Ancestral(), 1))
    for _ in range(200):
        svi.step(y)
    assert pyro.param("slope").item() == pytest.approx(0.5, abs=0.05)
    assert pyro.param("offset").item() == pytest.approx(0.4, abs=0.08)
    assert pyro.param("sd").item() == pytest.approx(HALF, abs=0.05)


def amortised(y: Tensor) -> None:
    slope, offset = (pyro.param(name, torch.tensor(0.0)) for name in ("slope", "offset"))
    sd = pyro.param("sd", torch.tensor(1.0), constraint=dist.constraints.positive)
    with pyro.plate("replicas", len(y)):
        pyro.sample("z", dist.Normal(slope * y + offset, sd))


def observing_model(observations: dict[str, Tensor]) -> None:
    with pyro.plate("replicas", REPLICAS):
        z = pyro.sample("z", dist.Normal(0.8, 1.0))
        pyro.sample("y", dist.Normal(z, 1.0), obs=2 * observations["y"] / 2)  # a copy of the data


def observing_guide(observations: dict[str, Tensor]) -> None:
    encoder(observations["y"])


def test_dreams_come_in_the_keyword_observations() -> None:
    value = sleeping(observing_model, observing_guide, observations={"y": torch.zeros(REPLICAS)})
    p = {name: torch.tensor(v) for name, v in (("a", 0.2), ("b", -0.4), ("s", -0.2))}
    known.check_one("value", value, sleep_loss(p))


def test_dreams_that_cannot_reach_the_guide_are_refused() -> None:
    def model(data: dict[str, Tensor]) -> None:
        dreaming_model(data["y"])

    with pytest.raises(ValueError, match=r"dreams of \['y'\] cannot reach the guide.*`observations`"):
        SLEEP.loss(model, lambda data: encoder(data["y"]), {"y": torch.zeros(3)})


def positive_model(y: Tensor) -> None:
    with pyro.plate("replicas", len(y)):
        rate = pyro.sample("rate", dist.LogNormal(0.7, 0.5))
        pyro.sample("y", dist.Normal(rate, 1.0), obs=y)


@pytest.mark.parametrize(
    ("family", "size"),
    [
        (autoguide.AutoNormal, REPLICAS),
        (autoguide.AutoNormalMessenger, REPLICAS),
        (autoguide.AutoDiagonalNormal, REPLICAS),
        (autoguide.AutoMultivariateNormal, 300),
        (autoguide.AutoLowRankMultivariateNormal, 300),
    ],
)
def test_sleep_phi_of_automatic_guides_is_finite_and_right(family: type, size: int) -> None:
    """E[-log q(rate)] = E[-log N(log rate; loc, scale)] + E[log rate], of the prior's dreams."""
    y = torch.zeros(size)
    guide = family(positive_model, init_scale=0.8, init_loc_fn=lambda site: torch.full((size,), 1.5).exp())
    guide(y)
    losses = WeightedELBO(ForwardKLDivergence(), Ancestral(), 20 if size < REPLICAS else 2)
    value = losses.differentiable_loss(positive_model, guide, y) / size
    value.backward()
    loc = guide.locs.rate if hasattr(guide, "locs") else guide.loc
    spread = 0.8 if family is not autoguide.AutoLowRankMultivariateNormal else None
    if spread is not None:
        exact = -dist.Normal(1.5, spread).log_prob(torch.tensor(0.7)).item() + 0.5**2 / (2 * spread**2) + 0.7
        assert value.item() == pytest.approx(exact, rel=0.03)
        known.check_one("loc", loc.grad * size, torch.tensor([(1.5 - 0.7) / spread**2]))
    assert value.isfinite()
    assert loc.grad.mean() > 0  # towards the prior's mean


def test_guides_that_cannot_be_scored_at_dreams_are_refused() -> None:
    y = torch.zeros(3)
    with pytest.raises(ValueError, match="AutoStructured cannot be scored at draws of the model"):
        SLEEP.loss(positive_model, autoguide.AutoStructured(positive_model), y)


@pytest.mark.parametrize("own", [noise_guide, lambda p: pyro.sample("z", dist.Delta(p("loc")))])
def test_guides_that_compute_their_latents_are_refused(own: Callable) -> None:
    """They would be scored at draws of their own, and nothing would say so."""
    (_, guide), y = replace(GAUSSIAN, guide=own).programs(3), torch.full((3,), 2.5)

    def dreaming(y: Tensor) -> None:
        with pyro.plate("replicas", 3):
            pyro.sample("y", dist.Normal(pyro.sample("z", dist.Normal(0.0, 1.0)), 1.0), obs=y)

    with pytest.raises(ValueError, match=r"cannot be scored at draws of the model: its sites .*'z'"):
        SLEEP.loss(dreaming, lambda y: guide(), y)


def test_discrete_dreams() -> None:
    """An encoder of a discrete cause: the exact loss by enumeration of the joint."""

    def model(y: Tensor) -> None:
        with pyro.plate("replicas", len(y)):
            c = pyro.sample("c", dist.Bernoulli(0.3))
            pyro.sample("y", dist.Bernoulli(0.2 + 0.6 * c), obs=y)

    def guide(y: Tensor) -> None:
        logit = pyro.param("logit", torch.full(y.shape, 0.5))
        with pyro.plate("replicas", len(y)):
            pyro.sample("c", dist.Bernoulli(logits=logit * (2 * y - 1)))

    value = sleeping(model, guide, torch.zeros(REPLICAS))
    logit, exact = torch.tensor(0.5, requires_grad=True), torch.tensor(0.0)
    for c in (0.0, 1.0):
        for y in (0.0, 1.0):
            right = 0.2 + 0.6 * c
            joint = (0.3 if c else 0.7) * (right if y else 1 - right)
            exact = exact - joint * dist.Bernoulli(logits=logit * (2 * y - 1)).log_prob(torch.tensor(c))
    exact.backward()
    known.check_one("value", value, exact.detach())
    known.check_one("logit", pyro.param("logit").grad, logit.grad)


def test_dreams_of_a_minibatch_are_scored_on_the_same_elements() -> None:
    """Prior and guide agree around a location of each element's own, far from the others'."""
    places = torch.arange(6.0)

    def program(observations: dict[str, Tensor], *, observe: bool) -> None:
        with pyro.plate("data", 6, subsample_size=2) as index:
            z = pyro.sample("z", dist.Normal(places[index], 0.01))
            if observe:
                pyro.sample("y", dist.Normal(z, 1.0), obs=observations["y"][index])

    losses = WeightedELBO(ForwardKLDivergence(), Ancestral(), 50)
    found = losses.loss(
        lambda observations: program(observations, observe=True),
        lambda observations: program(observations, observe=False),
        observations={"y": torch.zeros(6)},
    )
    assert found == pytest.approx(6 * dist.Normal(0.0, 0.01).entropy().item(), abs=6 * 0.3)


def test_sleep_with_global_latents_may_be_subsampled() -> None:
    """Equal weights leave the loss linear, so that minibatches are no bias: compare with the exact full-data loss."""

    def program(observations: dict[str, Tensor], *, deep: bool) -> None:
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        with pyro.plate("data", 6, subsample_size=2) as index:
            z = pyro.sample("z", dist.Normal(mu if deep else 0.0, 1.0))
            if deep:
                pyro.sample("y", dist.Normal(z, 1.0), obs=observations["y"][index])

    model, guide = (lambda observations, d=deep: program(observations, deep=d) for deep in (True, False))
    losses = torch.tensor([SLEEP.loss(model, guide, observations={"y": torch.zeros(6)}) for _ in range(400)])
    normaliser = 0.5 * torch.tensor(2 * torch.pi).log()
    known.check_one("value", losses, normaliser + 0.5 + 6 * (normaliser + 1.0))


def test_dreams_leave_the_data_alone() -> None:
    y = torch.full((4,), 7.0)
    SLEEP.loss(dreaming_model, encoder, y)
    assert torch.equal(y, torch.full((4,), 7.0))


def test_frozen_densities_are_refused_where_the_model_sums_out_but_the_guide_draws() -> None:
    """Sites enumerated in the model are no obstacle to a frozen guide, sites enumerated in the guide are."""
    (model, guide), loss = known.MIXTURE.programs(2), ImportanceWeightedELBO(3, estimator="dreg")
    with pytest.raises(ValueError, match="reparameterised"):
        loss.loss(model, config_enumerate(guide))


def test_doubly_reparameterised_gradient_with_sites_summed_out_in_the_model() -> None:
    """The marginal over c of a mixture is a bimodal prior: compare with the plain gradient of the same bound."""

    def guide(p: known.Getter) -> None:
        pyro.sample("x", dist.Normal(p("base"), p("log_scale").exp()))

    problem = replace(known.MIXTURE, guide=guide)
    problem = replace(problem, model=config_enumerate(problem.model))
    found = [known.estimate(ImportanceWeightedELBO(3, estimator=e), problem, 40_000) for e in (None, "dreg")]
    for name, plain in found[0].rows():
        doubly = dict(found[1].rows())[name]
        bar = (known.error_bar(plain) ** 2 + known.error_bar(doubly) ** 2) ** 0.5
        assert abs(plain.mean() - doubly.mean()) < known.SIGMAS * bar, name
    assert {"prior", "base", "log_scale"} <= found[0].gradients.keys()


def test_laplace_guides_are_point_estimates_until_they_are_expanded() -> None:
    """Its draws are deterministic in training, so that detached draws are refused and the ELBO trains it."""
    model, _ = GAUSSIAN.programs(1)
    guide = autoguide.AutoLaplaceApproximation(model)
    assert torch.tensor(ELBO(2).loss_and_grads(model, guide)).isfinite()
    with pytest.raises(ValueError, match="deterministic function of parameters"):
        ELBO(2, estimator="score").loss(model, guide)
