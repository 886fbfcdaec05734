"""Wake-sleep: Pyro's numbers where Pyro is right, gradients that stay on their side, dreams, and the mixture."""

import math
from collections.abc import Callable

import known
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI, config_enumerate
from pyro.infer import ReweightedWakeSleep as PyroReweightedWakeSleep
from pyro.infer.autoguide import AutoNormal, init_to_value
from torch import Tensor

import pplvi
from pplvi.compile.svi import CompiledSVI
from pplvi.losses.base import Loss, WeightedELBO
from pplvi.losses.elbo import ELBO, ForwardKL, ImportanceWeightedELBO
from pplvi.losses.wake_sleep import ReweightedWakeSleep, WakePhase, WakeSleep
from pplvi.objectives.bounds import RenyiBound
from pplvi.samplers.mixture import DefensiveMixture, _systematic
from pplvi.weights.algebra import effective_sample_size, logmeanexp

pytestmark = pytest.mark.usefixtures("float64")

Observations = dict[str, Tensor]


def normal_model(observations: Observations) -> None:
    z = pyro.sample("z", dist.Normal(pyro.param("mean", torch.tensor(0.4)), 1.0))
    x = pyro.sample("x", dist.Normal(torch.tensor([0.2, -0.1]), 1.0).to_event(1))
    pyro.sample("y", dist.Normal(z + x.sum(-1), 0.7), obs=observations["y"])


def normal_guide(observations: Observations) -> None:
    y = observations["y"]
    pyro.sample("z", dist.Normal(pyro.param("slope", torch.tensor(0.3)) * y, 0.8))
    slopes = pyro.param("slopes", torch.tensor([0.3, 0.2]))
    pyro.sample("x", dist.Normal(slopes * y.unsqueeze(-1), 0.9).to_event(1))


def discrete_model(observations: Observations) -> None:
    c = pyro.sample("c", dist.Bernoulli(logits=pyro.param("prior", torch.tensor(0.2))))
    d = pyro.sample("d", dist.Categorical(logits=torch.stack([c, 1 - c, 0.5 * c], -1)))
    pyro.sample("y", dist.Normal(c - d, 1.0), obs=observations["y"])


def discrete_guide(observations: Observations) -> None:
    y = observations["y"]
    pyro.sample("c", dist.Bernoulli(logits=pyro.param("logit", torch.tensor(0.1)) * y))
    logits = pyro.param("logits", torch.tensor([0.1, -0.4, 0.3]))
    pyro.sample("d", dist.Categorical(logits=logits * y.unsqueeze(-1)))


PAIRS = [(normal_model, normal_guide), (discrete_model, discrete_guide)]
DATUM = {"y": torch.tensor(1.3, dtype=torch.float64)}


def value_and_gradients(
    loss: object, model: Callable, guide: Callable, *args: Tensor, seed: int = 7, **kwargs: object
) -> tuple[float, dict[str, Tensor]]:
    pyro.clear_param_store()
    pyro.set_rng_seed(seed)
    value = loss.loss_and_grads(model, guide, *args, **kwargs)
    gradients = {name: p.grad for name, p in pyro.get_param_store().named_parameters()}
    return sum(value) if isinstance(value, tuple) else value, gradients


# One datum: equal to Pyro.


@pytest.mark.parametrize(("model", "guide"), PAIRS)
@pytest.mark.parametrize("insomnia", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("vectorize", [True, False])
@pytest.mark.parametrize("num_dreams", [None, 1, 3])
def test_one_datum_equals_pyro(
    model: Callable, guide: Callable, insomnia: float, vectorize: bool, num_dreams: int | None
) -> None:
    pyros = PyroReweightedWakeSleep(6, insomnia, True, num_dreams, vectorize_particles=vectorize, max_plate_nesting=0)
    ours = ReweightedWakeSleep(6, insomnia, num_dreams, vectorize_particles=vectorize)
    expected, reference = value_and_gradients(pyros, model, guide, observations=DATUM)
    value, gradients = value_and_gradients(ours, model, guide, observations=DATUM)
    assert value == pytest.approx(expected, abs=1e-10)
    assert gradients.keys() == reference.keys()
    for name in reference:
        torch.testing.assert_close(gradients[name], reference[name], rtol=0, atol=1e-10)


def test_wake_draws_come_before_sleep_draws() -> None:
    both = ReweightedWakeSleep(6, 0.5, 4)
    values = [value_and_gradients(ReweightedWakeSleep(6, i, 4), *PAIRS[0], observations=DATUM)[0] for i in (0.5, 1.0)]
    pyro.clear_param_store()
    pyro.set_rng_seed(7)
    wake = both.wake.loss(*PAIRS[0], observations=DATUM)
    sleep = both.sleep.loss(*PAIRS[0], observations=DATUM)
    assert values[0] == pytest.approx(wake + 0.5 * sleep, abs=1e-12)
    phi = values[1] - value_and_gradients(ImportanceWeightedELBO(6), *PAIRS[0], observations=DATUM)[0]
    theta = wake - 0.5 * phi  # what insomnia=1 saw first are the same draws
    assert values[1] == pytest.approx(theta + phi, abs=1e-12)


# Gradients: exact, and each on its own side.


def chain_model(y: Tensor) -> None:
    z1 = pyro.sample("z1", dist.Normal(0.0, 1.0))
    z2 = pyro.sample("z2", dist.Normal(z1, pyro.param("sd", torch.tensor(1.0))))
    pyro.sample("y", dist.Normal(z2, 1.0), obs=y)


def chain_guide(y: Tensor) -> None:
    z1 = pyro.sample("z1", dist.Normal(pyro.param("a", torch.tensor(0.2)), 1.0))
    pyro.sample("z2", dist.Normal(0.5 * z1, 1.0))


def test_wake_phi_of_a_hierarchical_guide_is_exact_where_pyros_is_not() -> None:
    """E[z1 | y] = y / 3 and E[z2 | y] = 2 y / 3, hence -d/da E[log q] = a - E[z1] = -0.4.

    Pyro detaches z1 only after z2's density has used it, which adds -0.5 E[z2 - 0.5 z1] = -0.45.
    """
    y = torch.tensor(1.8)
    pyros = PyroReweightedWakeSleep(200_000, vectorize_particles=True, max_plate_nesting=0)
    theirs = value_and_gradients(pyros, chain_model, chain_guide, y)[1]["a"]
    ours = value_and_gradients(ReweightedWakeSleep(200_000), chain_model, chain_guide, y)[1]["a"]
    assert theirs.item() == pytest.approx(-0.850, abs=0.02)
    assert ours.item() == pytest.approx(-0.400, abs=0.02)


def positive_model(y: Tensor) -> None:
    z = pyro.sample("z", dist.LogNormal(pyro.param("centre", torch.tensor(0.0)), 1.0))
    pyro.sample("y", dist.LogNormal(z.log(), 0.5), obs=y)


def automatic(model: Callable, y: Tensor) -> AutoNormal:
    guide = AutoNormal(model, init_loc_fn=init_to_value(values={"z": torch.tensor(1.3)}), init_scale=0.4)
    guide(y)
    return guide


@pytest.mark.parametrize("which", ["hierarchical", "automatic"])
def test_gradients_are_those_of_the_two_objectives(which: str) -> None:
    """The guide's is that of the forward KL divergence, the model's that of the importance-weighted bound."""
    y = torch.tensor(1.8)
    model, guide = (chain_model, chain_guide) if which == "hierarchical" else (positive_model, None)
    guide = guide or automatic(model, y)
    own = {name for name, _ in pyro.get_param_store().named_parameters()} - {"sd", "centre"} | {"a"}
    found = {}
    for loss in (ReweightedWakeSleep(5), ForwardKL(5), ImportanceWeightedELBO(5, estimator="score")):
        if which == "automatic":
            pyro.clear_param_store()
            guide = automatic(model, y)
        pyro.set_rng_seed(3)
        for _, p in pyro.get_param_store().named_parameters():
            p.grad = None
        loss.loss_and_grads(model, guide, y)
        found[type(loss).__name__] = {n: p.grad for n, p in pyro.get_param_store().named_parameters()}
    for name, gradient in found["ReweightedWakeSleep"].items():
        expected = found["ForwardKL" if name in own else "ImportanceWeightedELBO"][name]
        assert gradient.any()
        torch.testing.assert_close(gradient, expected, rtol=0, atol=1e-12)


def test_gradients_do_not_leak() -> None:
    """Asleep nothing reaches the model; awake nothing of wake-theta reaches the guide."""
    for loss in (WakeSleep(4, 3), ReweightedWakeSleep(4, 0.0, 3)):
        _, awake = value_and_gradients(loss.wake, *PAIRS[0], observations=DATUM)
        _, asleep = value_and_gradients(loss.sleep, *PAIRS[0], observations=DATUM)
        assert awake["mean"].any()
        assert awake["slope"] is None
        assert asleep["mean"] is None
        assert asleep["slope"].any()


# Wake-sleep on a conjugate Gaussian: z ~ N(prior, 1), y ~ N(z, 1), q(z | y) = N(a y + b, e^s).

REPLICAS = 100_000


def dreaming_model(y: Tensor) -> None:
    with pyro.plate("replicas", len(y)):
        z = pyro.sample("z", dist.Normal(pyro.param("prior", torch.full(y.shape, 0.8)), 1.0))
        pyro.sample("y", dist.Normal(z, 1.0), obs=y)


def encoder(y: Tensor) -> None:
    a, b, s = (pyro.param(name, torch.full((len(y),), v)) for name, v in (("a", 0.2), ("b", -0.4), ("s", -0.2)))
    with pyro.plate("replicas", len(y)):
        pyro.sample("z", dist.Normal(a * y + b, s.exp()))


def test_wake_sleep_has_the_exact_gradients() -> None:
    value, gradients = value_and_gradients(WakeSleep(2, 4), dreaming_model, encoder, torch.full((REPLICAS,), 0.6))
    p = {name: torch.tensor(v, requires_grad=True) for name, v in (("a", 0.2), ("b", -0.4), ("s", -0.2))}
    prior = torch.tensor(0.8, requires_grad=True)
    normaliser = 0.5 * math.log(2 * math.pi)
    mean, variance = (0.2 * 0.6 - 0.4), math.exp(-0.4)
    wake = 2 * normaliser + 0.5 * ((mean - prior) ** 2 + (mean - 0.6) ** 2 + 2 * variance)
    wake.backward()
    spread = (0.8 * (1 - p["a"]) - p["b"]) ** 2 + 1 + 2 * p["a"] ** 2 - 2 * p["a"]  # of z - a y - b under the joint
    sleep = p["s"] + normaliser + spread / (2 * (2 * p["s"]).exp())
    sleep.backward()
    entropy = -0.2 + normaliser + 0.5
    assert value / REPLICAS == pytest.approx((wake - entropy + sleep).item(), abs=0.02)
    known.check_one("prior", gradients["prior"], prior.grad)
    for name, leaf in p.items():
        known.check_one(name, gradients[name], leaf.grad)


def test_poor_dreams_mislead_a_guide_that_cannot_be_right_everywhere() -> None:
    """One mean for all: awake it goes to the posterior of the data, (0.8 + 6) / 2, asleep to that of dreams, 0.8.

    Early in training, dreams are unlike data; a guide trained on them is wrong where it matters.
    """

    def constant(y: Tensor) -> None:
        with pyro.plate("replicas", len(y)):
            pyro.sample("z", dist.Normal(pyro.param("b", torch.full((len(y),), 2.0)), 1.0))

    for insomnia, exact in ((1.0, 2.0 - 3.4), (0.0, 2.0 - 0.8)):
        loss = ReweightedWakeSleep(200, insomnia, 1)
        _, gradients = value_and_gradients(loss, dreaming_model, constant, torch.full((5000,), 6.0))
        assert gradients["b"].mean().item() == pytest.approx(exact, abs=0.06)


# The pinned numbers.


def pinned_model(y: Tensor) -> None:
    pyro.sample("y", dist.Normal(pyro.sample("z", dist.Normal(0.0, 1.0)), 1.0), obs=y)


def exact_guide(y: Tensor) -> None:
    pyro.sample("z", dist.Normal(y / 2, 0.5**0.5))


@pytest.mark.parametrize("mixture", [0.0, 0.5])
def test_an_exact_guide_has_equal_weights(mixture: float) -> None:
    loss = ReweightedWakeSleep(50, 0.0, mixture=mixture)
    (step,) = loss.wake.steps(pinned_model, exact_guide, torch.tensor(0.5))
    if not mixture:  # half of its draws are the prior's
        torch.testing.assert_close(step.log_weight, torch.full((50,), -1.3280121), rtol=0, atol=1e-7)
        assert effective_sample_size(step.log_weight).item() == pytest.approx(50.0, abs=1e-9)
        assert loss.wake.loss(pinned_model, exact_guide, torch.tensor(0.5)) == pytest.approx(1.3280121, abs=1e-7)
    else:
        assert effective_sample_size(step.log_weight).item() < 49.0


# Weights per datum, minibatches.


def test_weights_are_per_datum() -> None:
    y = torch.linspace(-1.0, 1.0, 7)
    loss = ReweightedWakeSleep(9, 0.0)
    pyro.set_rng_seed(1)
    (step,) = loss.wake.steps(dreaming_model, encoder, y)
    pyro.set_rng_seed(1)
    z = (0.2 * y - 0.4) + math.exp(-0.2) * torch.randn(9, 7)
    for n in range(7):
        log_weight = dist.Normal(0.8, 1.0).log_prob(z[:, n]) + dist.Normal(z[:, n], 1.0).log_prob(y[n])
        log_weight = log_weight - dist.Normal(0.2 * y[n] - 0.4, math.exp(-0.2)).log_prob(z[:, n])
        torch.testing.assert_close(step.log_weight[:, n], log_weight)
    pyro.set_rng_seed(1)
    assert loss.wake.loss(dreaming_model, encoder, y) == pytest.approx(-logmeanexp(step.log_weight).sum().item())


PLACES = 10.0 * torch.arange(6.0, dtype=torch.float64)


def minibatch_model(observations: Observations, pixels: tuple[int, ...] = ()) -> None:
    with pyro.plate("data", 6, subsample_size=2) as index:
        z = pyro.sample("z", dist.Normal(PLACES[index], 1.0))
        same = z.reshape(*z.shape, *(1 for _ in pixels)).expand(*z.shape, *pixels)
        pyro.sample("y", dist.Normal(same, 0.1).to_event(len(pixels)), obs=observations["y"][index])


def minibatch_guide(observations: Observations, pixels: tuple[int, ...] = ()) -> None:
    scale = pyro.param("scale", torch.tensor(0.1))
    with pyro.plate("data", 6, subsample_size=2) as index:
        y = observations["y"][index]
        pyro.sample("z", dist.Normal(y.reshape(*y.shape[: y.dim() - len(pixels)], -1).mean(-1), scale))


@pytest.mark.parametrize("pixels", [(), (2, 2)], ids=["numbers", "images"])
@pytest.mark.parametrize("vectorize", [True, False])
def test_dreams_of_a_minibatch_lie_at_its_indices(vectorize: bool, pixels: tuple[int, ...]) -> None:
    """The mean of a dream is N(z, 0.1), or N(z, 0.05) of four pixels, if the guide finds each dream where the model put
    it, and 10 from there otherwise."""
    loss = ReweightedWakeSleep(4, 0.0, 200, vectorize_particles=vectorize)
    data = {"y": PLACES.reshape(6, *(1 for _ in pixels)).repeat(1, *pixels)}
    before = data["y"].clone()
    pyro.param("scale", torch.tensor(0.1 / math.prod(pixels) ** 0.5))
    found = loss.sleep.loss(minibatch_model, minibatch_guide, observations=data, pixels=pixels)
    entropy = dist.Normal(0.0, pyro.param("scale").detach()).entropy().item()
    assert found == pytest.approx(6 * entropy, abs=6 * 0.2)
    assert torch.equal(data["y"], before)


# Dreams: all in one call where that is possible, and refused where they have no way.


def test_all_dreams_come_from_one_run_of_each_program() -> None:
    runs = {"model": 0, "guide": 0}

    def model(y: Tensor) -> None:
        runs["model"] += 1
        dreaming_model(y)

    def guide(y: Tensor) -> None:
        runs["guide"] += 1
        assert len(y) == 4  # each dream comes in the size of the data
        encoder(y)

    sleep = WakeSleep(1, 50).sleep
    sleep.loss(model, guide, torch.zeros(4))
    sleep.loss(model, guide, torch.zeros(4))
    before = dict(runs)
    sleep.loss(model, guide, torch.zeros(4))
    assert {name: runs[name] - before[name] for name in runs} == {"model": 1, "guide": 1}


def test_programs_that_cannot_be_mapped_dream_one_after_another() -> None:
    """A guide that branches on a value: the exact loss by enumeration of the joint."""

    def model(y: Tensor) -> None:
        c = pyro.sample("c", dist.Bernoulli(0.3))
        pyro.sample("y", dist.Bernoulli(0.2 + 0.6 * c), obs=y)

    def guide(y: Tensor) -> None:
        logit = pyro.param("logit", torch.tensor(0.5))
        pyro.sample("c", dist.Bernoulli(logits=logit if y.item() else -logit))

    losses = torch.tensor([WakeSleep(1, 40).sleep.loss(model, guide, torch.tensor(1.0)) for _ in range(40)])
    exact = -sum(
        (0.3 if c else 0.7) * (p if y else 1 - p) * dist.Bernoulli(logits=0.5 * (2 * y - 1)).log_prob(torch.tensor(c))
        for c, p in ((0.0, 0.2), (1.0, 0.8))
        for y in (0.0, 1.0)
    )
    known.check_one("value", losses, exact)


def test_a_sleep_phase_with_no_way_to_dream() -> None:
    x, sleepy = torch.zeros(6), ReweightedWakeSleep(4, 0.5)

    def sliced(x: Tensor) -> None:
        with pyro.plate("data", 6, subsample_size=2) as index:
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x[index])

    def sliced_guide(x: Tensor) -> None:
        with pyro.plate("data", 6, subsample_size=2) as index:
            pyro.sample("z", dist.Normal(x[index], 1.0))

    with pytest.raises(ValueError, match=r"dreams of \['x'\] cannot reach.*slices such as x\[index\].*`observations`"):
        sleepy.loss(sliced, sliced_guide, x)
    assert math.isfinite(ReweightedWakeSleep(4, 1.0).loss(sliced, sliced_guide, x))  # nothing to dream

    def with_factor(y: Tensor) -> None:
        pinned_model(y)
        pyro.factor("penalty", torch.tensor(-1.0))

    with pytest.raises(ValueError, match=r"cannot dream: it has the factors \['penalty'\].*insomnia=1.0"):
        sleepy.loss(with_factor, exact_guide, torch.tensor(0.5))

    def improper(y: Tensor) -> None:
        z = pyro.sample("z", dist.ImproperUniform(dist.constraints.real, (), ()))
        pyro.sample("y", dist.Normal(z, 1.0), obs=y)

    with pytest.raises(ValueError, match=r"cannot dream: its site \['z'\] cannot be drawn from"):
        WakeSleep(4).sleep.loss(improper, exact_guide, torch.tensor(0.5))
    with pytest.raises(ValueError, match=r"observations\['y'\] has shape \(3, 6\), but the model dreams.*\(2,\)"):
        sleepy.loss(minibatch_model_of_row, minibatch_guide_of_row, observations={"y": torch.zeros(3, 6)})


def minibatch_model_of_row(observations: Observations) -> None:
    minibatch_model({"y": observations["y"][1]})


def minibatch_guide_of_row(observations: Observations) -> None:
    minibatch_guide({"y": observations["y"][1]})


# The defensive mixture.


def branching_model(y: Tensor) -> None:
    with pyro.plate("data", len(y)):
        c = pyro.sample("c", dist.Categorical(torch.tensor([0.5, 0.3, 0.2])))
        z = pyro.sample("z", dist.Normal(2.0 * c, 1.0))
        pyro.sample("y", dist.Normal(z, 0.5), obs=y)


def branching_guide(y: Tensor) -> None:
    logits = pyro.param("logits", torch.tensor([0.0, -0.5, -3.0]))
    with pyro.plate("data", len(y)):
        c = pyro.sample("c", dist.Categorical(logits=logits.expand(len(y), 3)))
        pyro.sample("z", dist.Normal(0.5 * c + 0.5 * y, 0.7))


def uniform(y: Tensor) -> None:
    with pyro.plate("data", len(y)):
        c = pyro.sample("c", dist.Categorical(torch.ones(3)))
        pyro.sample("z", dist.Normal(2.0 * c, 2.0))


@pytest.mark.parametrize("component", [None, uniform])
@pytest.mark.parametrize("weight", [0.2, 0.37])
@pytest.mark.parametrize("vectorize", [True, False])
@pytest.mark.table(2)
def test_mixtures_are_properly_weighted(component: Callable | None, weight: float, vectorize: bool) -> None:
    """E[w f(z)] = Z E_p[f] per datum, hence E[w] = p(y), E[w c] and E[w z]."""
    y = torch.linspace(-1.0, 5.0, 20_000)
    wake = ReweightedWakeSleep(5, mixture=DefensiveMixture(weight, component), vectorize_particles=vectorize).wake
    noted = {}

    def model(y: Tensor) -> None:
        with pyro.plate("data", len(y)):
            noted["c"] = pyro.sample("c", dist.Categorical(torch.tensor([0.5, 0.3, 0.2])))
            noted["z"] = pyro.sample("z", dist.Normal(2.0 * noted["c"], 1.0))
            pyro.sample("y", dist.Normal(noted["z"], 0.5), obs=y)

    for _ in range(2):  # the first time, programs are checked in runs of their own
        (step,) = wake.steps(model, branching_guide, y)
    classes = torch.arange(3.0)
    joint = dist.Normal(2 * classes, 1.25**0.5).log_prob(y[:, None]).exp() * torch.tensor([0.5, 0.3, 0.2])
    expected = {"one": joint.sum(-1)}
    weights = step.log_weight.exp()
    found = {"one": weights.mean(0)}
    if vectorize:
        expected["c"] = (joint * classes).sum(-1)
        expected["z"] = (joint * (2 * classes + (y[:, None] - 2 * classes) / 1.25)).sum(-1)
        found |= {name: (weights * noted[name]).mean(0) for name in ("c", "z")}
    for name, estimate in found.items():
        difference = estimate - expected[name]
        assert difference.mean().abs() < 4 * difference.std() / len(y) ** 0.5, name
        assert difference.std() / len(y) ** 0.5 < 0.02 * expected[name].mean().abs(), name


def test_particles_of_the_component_are_spread_evenly() -> None:
    chosen = _systematic(0.2, torch.zeros(10, 400))
    assert (chosen.sum(0) == 2).all()
    uneven = _systematic(0.37, torch.zeros(5, 20_000)).double()
    assert uneven.mean(1) == pytest.approx([0.37] * 5, abs=0.02)
    assert set(uneven.sum(0).tolist()) == {1.0, 2.0}


def test_the_mixture_revives_a_branch_that_the_guide_has_pruned() -> None:
    """The third cause explains the datum, but the guide never draws it: only the mixture can tell the guide."""

    def guide(y: Tensor) -> None:
        logits = pyro.param("logits", torch.tensor([0.0, 0.0, -40.0]))
        with pyro.plate("data", len(y)):
            c = pyro.sample("c", dist.Categorical(logits=logits.expand(len(y), 3)))
            pyro.sample("z", dist.Normal(2.0 * c, 1.0))

    y = torch.full((50,), 4.5)
    plain, mixed = (
        value_and_gradients(ReweightedWakeSleep(20, mixture=weight), branching_model, guide, y)[1]["logits"]
        for weight in (0.0, 0.2)
    )
    assert plain[2].abs() < 1e-10
    assert mixed[2] < -20  # of 50 data, at most -50


def test_mixtures_are_refused_where_they_cannot_be() -> None:
    y = torch.tensor(1.8)
    with pytest.raises(ValueError, match=r"draws of a mixture cannot be put into the guide.*automatic guides"):
        ReweightedWakeSleep(4, mixture=0.2).loss(positive_model, automatic(positive_model, y), y)
    for weight in (1.0, -0.2):
        with pytest.raises(ValueError, match="mixture"):
            ReweightedWakeSleep(4, mixture=weight)
    with pytest.raises(ValueError, match="cannot use draws from the mixture"):
        WeightedELBO(RenyiBound(0.0), DefensiveMixture(0.2), 4)
    with pytest.raises(ValueError, match="cannot use draws from the mixture"):
        WeightedELBO(WakePhase(alpha=1.0), DefensiveMixture(0.2), 4)

    def enumerated(y: Tensor) -> None:
        with pyro.plate("data", len(y)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            c = pyro.sample("c", dist.Bernoulli(0.5), infer={"enumerate": "parallel"})
            pyro.sample("y", dist.Normal(z + c, 1.0), obs=y)

    def guide(y: Tensor) -> None:
        with pyro.plate("data", len(y)):
            pyro.sample("z", dist.Normal(0.0, 1.0))

    with pytest.raises(ValueError, match=r"the model enumerates sites.*component\) with a program of yours"):
        ReweightedWakeSleep(4, mixture=0.2).loss(enumerated, guide, torch.zeros(3))
    own = DefensiveMixture(0.2, guide)
    assert math.isfinite(ReweightedWakeSleep(4, mixture=own).loss(enumerated, guide, torch.zeros(3)))


# What is refused, and the interface of losses.


def test_wake_sleep_refuses() -> None:
    with pytest.raises(ValueError, match="self-normalised weights need at least 2 particles"):
        ReweightedWakeSleep(1)
    with pytest.raises(ValueError, match="num_sleep_particles=0"):
        WakeSleep(1, 0)
    with pytest.raises(ValueError, match=r"insomnia=1\.5: expected a number from 0 to 1"):
        ReweightedWakeSleep(4, 1.5)
    for loss in (WakeSleep(4), ReweightedWakeSleep(4)):
        with pytest.raises(ValueError, match=r"not linear|guide enumerates sites"):
            loss.loss(discrete_model, config_enumerate(discrete_guide), observations=DATUM)


def test_enumerated_sites_of_the_model_are_summed_out_awake_and_drawn_asleep() -> None:
    def guide(observations: Observations) -> None:
        pyro.sample("c", dist.Bernoulli(logits=pyro.param("logit", torch.tensor(0.1)) * observations["y"]))

    def model(observations: Observations) -> None:
        c = pyro.sample("c", dist.Bernoulli(0.55))
        d = pyro.sample("d", dist.Categorical(torch.ones(3)), infer={"enumerate": "parallel"})
        pyro.sample("y", dist.Normal(c - d, 1.0), obs=observations["y"])

    loss = ReweightedWakeSleep(2000, 0.0, 2000)
    components = dist.Normal(torch.tensor([0.0, 1.0])[:, None] - torch.arange(3.0), 1.0).log_prob(DATUM["y"])
    log_joint = torch.logsumexp(components, 1) - math.log(3) + torch.tensor([0.45, 0.55]).log()
    log_z = torch.logsumexp(log_joint, 0).item()
    assert -loss.wake.loss(model, guide, observations=DATUM) == pytest.approx(log_z, abs=0.05)
    assert math.isfinite(loss.sleep.loss(model, guide, observations=DATUM))


LOSSES = [WakeSleep(3), ReweightedWakeSleep(3, 0.5), ReweightedWakeSleep(5, mixture=0.2)]


@pytest.mark.parametrize("loss", LOSSES, ids=str)
def test_the_interface_of_losses(loss: Loss) -> None:
    y = torch.linspace(-1.0, 1.0, 5)
    assert loss.monitor is None
    assert math.isfinite(loss.loss(branching_model, branching_guide, y))
    pyro.set_rng_seed(0)
    value = loss.differentiable_loss(branching_model, branching_guide, y)
    value.backward()
    logits = pyro.param("logits").unconstrained()
    by_hand, logits.grad = logits.grad, None
    pyro.set_rng_seed(0)
    assert loss.loss_and_grads(branching_model, branching_guide, y) == pytest.approx(value.item())
    torch.testing.assert_close(logits.grad, by_hand)
    module = (0.5 * loss + ELBO(2))(branching_model, branching_guide)
    module(y).backward()
    assert type(loss).__name__ in repr(loss)


def test_names_of_the_losses() -> None:
    assert repr(WakeSleep(2, 5)) == "WakeSleep(num_particles=2, num_sleep_particles=5)"
    shown = "ReweightedWakeSleep(num_particles=4, insomnia=0.5, mixture=0.2)"
    assert repr(ReweightedWakeSleep(4, 0.5, mixture=0.2)) == shown
    assert repr(ReweightedWakeSleep(4) + ELBO()).startswith("WeightedELBO(WakePhase")


@pytest.mark.parametrize("loss", LOSSES, ids=str)
def test_a_traced_step_is_the_eager_step(loss: Loss) -> None:
    def trained(make: Callable) -> tuple[list[float], Tensor]:
        pyro.clear_param_store()
        svi = make(branching_model, branching_guide, pyro.optim.Adam({"lr": 0.05}), loss)
        svi.evaluate_loss(y)
        pyro.set_rng_seed(2)
        return [svi.step(y) for _ in range(4)], pyro.param("logits").detach().clone()

    y = torch.linspace(-1.0, 5.0, 6)
    eager, expected = trained(SVI)
    traced, found = trained(lambda *args: CompiledSVI(*args, mode="trace"))
    assert traced == pytest.approx(eager)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("loss", [WakeSleep(5, 20), ReweightedWakeSleep(10, 0.5), ReweightedWakeSleep(10)], ids=str)
def test_a_discrete_model_is_learned(loss: Loss) -> None:
    """Causes of binary patterns: prior and posterior are recovered by each algorithm."""

    def model(x: Tensor) -> None:
        logit = pyro.param("logit", torch.tensor(0.0))
        with pyro.plate("data", len(x)):
            c = pyro.sample("c", dist.Bernoulli(logits=logit))
            pyro.sample("x", dist.Bernoulli((0.1 + 0.8 * c).unsqueeze(-1).expand(*c.shape, 3)).to_event(1), obs=x)

    def guide(x: Tensor) -> None:
        weight, bias = pyro.param("weight", torch.tensor(0.0)), pyro.param("bias", torch.tensor(0.0))
        with pyro.plate("data", len(x)):
            pyro.sample("c", dist.Bernoulli(logits=weight * (x.sum(-1) - 1.5) + bias))

    pyro.set_rng_seed(0)
    c = torch.bernoulli(torch.full((300,), 0.7))
    x = torch.bernoulli((0.1 + 0.8 * c)[:, None].expand(300, 3))
    fit = pplvi.fit(model, guide, args=(x,), objective=loss, num_steps=250, seed=1, progress=False,
                    optim=pyro.optim.Adam({"lr": 0.15}), stop=None, compile="trace")  # fmt: skip
    found = fit.params[0]
    share = torch.sigmoid(found["logit"]).item()
    assert share == pytest.approx(c.mean().item(), abs=0.04)
    assert found["weight"].item() == pytest.approx(2 * math.log(9), abs=0.8)  # the exact posterior is logistic
    assert found["bias"].item() == pytest.approx(math.log(share / (1 - share)), abs=0.5)
