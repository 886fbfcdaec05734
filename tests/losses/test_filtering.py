"""Particle filters under SVI: exact evidence, exact gradients, proposals and look-ahead factors that are learned."""

from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI, SMCFilter
from pyro.nn import PyroModule, PyroParam
from pyro.optim import Adam
from torch import Tensor

from pplvi.compile.svi import CompiledSVI
from pplvi.losses.base import WeightedELBO
from pplvi.losses.filtering import FilteringELBO
from pplvi.objectives.bounds import RenyiBound
from pplvi.objectives.nested import (
    FilteringBound,
    FilteringForwardKL,
    IncrementalBound,
    NestedForwardKL,
    NestedReverseKL,
)
from pplvi.objectives.step import Step
from pplvi.samplers.annealed import Resampling
from pplvi.samplers.filtering import Filtering
from pplvi.weights.algebra import logmeanexp

pytestmark = pytest.mark.usefixtures("float64")

RESAMPLE = [False, True, 0.5]
YS = torch.tensor([0.8, -0.1, 1.3, 2.0, 0.7], dtype=torch.float64)
DECAY, NOISE = 0.9, 0.6


def normal(loc: Any, scale: Any) -> torch.distributions.Distribution:
    return torch.distributions.Normal(loc, scale)


class Linear:
    """z[0] ~ N(0, 1), z[t] ~ N(0.9 z[t-1], 1), y[t] ~ N(z[t], 0.6)."""

    def __init__(self, decay: Any = DECAY) -> None:
        self.decay = decay

    def init(self, state: dict[str, Tensor]) -> None:
        state["z"] = pyro.sample("z", dist.Normal(0.0, 1.0))

    def step(self, state: dict[str, Tensor], y: Any = None) -> None:
        state["z"] = pyro.sample("z", dist.Normal(self.decay * state["z"], 1.0))
        pyro.sample("y", dist.Normal(state["z"], NOISE), obs=y)


class Proposal:
    def init(self, state: dict[str, Tensor]) -> None:
        pyro.sample("z", dist.Normal(0.1, 1.1))

    def step(self, state: dict[str, Tensor], y: Any = None) -> None:
        weight, scale = pyro.param("weight", torch.tensor(0.5)), pyro.param("scale", torch.tensor(0.8))
        pyro.sample("z", dist.Normal(state["z"] + weight * (y - state["z"]), scale))


def loop_model(ys: Tensor) -> None:
    z = pyro.sample("z_0", dist.Normal(0.0, 1.0))
    for t in pyro.markov(range(len(ys))):
        z = pyro.sample(f"z_{t + 1}", dist.Normal(DECAY * z, 1.0))
        pyro.sample(f"y_{t + 1}", dist.Normal(z, NOISE), obs=ys[t])


def loop_guide(ys: Tensor) -> None:
    z = pyro.sample("z_0", dist.Normal(0.1, 1.1))
    for t in pyro.markov(range(len(ys))):
        weight, scale = pyro.param("weight", torch.tensor(0.5)), pyro.param("scale", torch.tensor(0.8))
        z = pyro.sample(f"z_{t + 1}", dist.Normal(z + weight * (ys[t] - z), scale))


PAIRS = {"steps": (Linear(), Proposal()), "loop": (loop_model, loop_guide)}


def kalman(ys: Tensor, decay: Any = DECAY) -> Tensor:
    """log p(y), exactly."""
    mean, variance, total = torch.tensor(0.0), torch.tensor(1.0), torch.tensor(0.0)
    for y in ys:
        mean, variance = decay * mean, decay**2 * variance + 1.0
        total = total + normal(mean, (variance + NOISE**2).sqrt()).log_prob(y)
        gain = variance / (variance + NOISE**2)
        mean, variance = mean + gain * (y - mean), (1 - gain) * variance
    return total


def within(found: Tensor, exact: Any, errors: float = 4.0) -> None:
    """The mean over independent runs (first dimension) is exact to within standard errors."""
    mean, error = found.mean(0), found.std(0) / len(found) ** 0.5
    assert ((mean - exact).abs() < errors * error).all(), (mean, exact, error)


@pytest.mark.parametrize("resample", RESAMPLE)
@pytest.mark.parametrize("form", PAIRS)
def test_evidence_is_the_kalman_filters(form: str, resample: bool | float) -> None:
    loss = FilteringELBO(900, resample=resample)
    ratios = torch.stack([(-torch.tensor(loss.loss(*PAIRS[form], YS)) - kalman(YS)).exp() for _ in range(20)])
    within(ratios, 1.0)
    assert ratios.std() < 0.35


def test_kalman_filter_is_the_joint_normal() -> None:
    n = len(YS)
    covariance = torch.empty(n, n)
    for i in range(n):
        for j in range(n):
            low, gap = min(i, j) + 1, abs(i - j)
            variance = DECAY ** (2 * low) + sum(DECAY ** (2 * k) for k in range(low))
            covariance[i, j] = DECAY**gap * variance + (i == j) * NOISE**2
    joint = torch.distributions.MultivariateNormal(torch.zeros(n), covariance).log_prob(YS)
    torch.testing.assert_close(kalman(YS), joint)


def middle(total: Tensor, count: int, scheme: str) -> Tensor:
    return ((torch.arange(count) + 0.5) / count).expand(*total.shape[:-1], count).contiguous()


def gradients(loss: Any, model: Any, guide: Any, *args: Any, names: tuple[str, ...] = ("weight", "scale")) -> Tensor:
    for name in names:
        if name in pyro.get_param_store():
            pyro.param(name).unconstrained().grad = None
    loss.loss_and_grads(model, guide, *args)
    grads = [pyro.param(name).unconstrained().grad for name in names]
    return torch.stack([torch.zeros(()) if grad is None else grad.clone() for grad in grads])


def by_hand(count: int, resample: bool) -> tuple[Tensor, Tensor]:
    """A filter with stepped objects in plain torch, weights attached, and the gradient of its bound."""
    weight, scale = (torch.tensor(x, requires_grad=True) for x in (0.5, 0.8))
    z = 0.1 + 1.1 * torch.empty(count).normal_()
    log_weight = normal(0.0, 1.0).log_prob(z) - normal(0.1, 1.1).log_prob(z)
    loss = torch.zeros(())
    for y in YS:
        if resample:
            total = torch.softmax(log_weight, 0).cumsum(0).detach()
            chosen = torch.searchsorted(total, (torch.arange(count) + 0.5) / count)
            loss, z, log_weight = loss - logmeanexp(log_weight), z[chosen], torch.zeros(count)
        mean = z + weight * (y - z)
        moved = mean + scale * torch.empty(count).normal_()
        log_weight = log_weight + normal(DECAY * z, 1.0).log_prob(moved) + normal(moved, NOISE).log_prob(y)
        log_weight = log_weight - normal(mean, scale).log_prob(moved)
        z = moved
    loss = loss - logmeanexp(log_weight)
    loss.backward()
    return loss.detach(), torch.stack([weight.grad, scale.grad])


@pytest.mark.parametrize("form", PAIRS)
def test_without_resampling_it_is_the_importance_bound_with_attached_weights(form: str, monkeypatch: Any) -> None:
    monkeypatch.setattr("pplvi.weights.resampling._uniform_points", middle)  # no random number spent on resampling
    pyro.set_rng_seed(5)
    value, wanted = by_hand(20, resample=False)
    for resample in (False, 1e-6):  # so low that it never happens: weights stay attached
        loss = FilteringELBO(20, resample=resample)
        pyro.set_rng_seed(5)
        found = gradients(loss, *PAIRS[form], YS)
        torch.testing.assert_close(found, wanted, rtol=0, atol=1e-10)
        pyro.set_rng_seed(5)
        assert loss.loss(*PAIRS[form], YS) == pytest.approx(float(value), abs=1e-10)


def test_with_resampling_gradients_follow_ancestors_and_not_their_choice(monkeypatch: Any) -> None:
    monkeypatch.setattr("pplvi.weights.resampling._uniform_points", middle)
    pyro.set_rng_seed(5)
    _, wanted = by_hand(20, resample=True)
    pyro.set_rng_seed(5)
    found = gradients(FilteringELBO(20, resample=True), Linear(), Proposal(), YS)
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-10)


class Learned(Linear):
    """The model with its decay learned."""

    @property
    def decay(self) -> Any:
        return pyro.param("decay", torch.tensor(DECAY))

    @decay.setter
    def decay(self, value: Any) -> None:
        pass


@pytest.mark.parametrize("objective", ["bound", "forward_kl"])
def test_gradient_of_the_model_is_that_of_the_exact_evidence(objective: Any) -> None:
    decay = torch.tensor(DECAY, requires_grad=True)
    (-kalman(YS, decay)).backward()
    loss = FilteringELBO(4000, objective, resample=False)
    within(torch.stack([gradients(loss, Learned(), Proposal(), YS, names=("decay",)) for _ in range(25)]), decay.grad)


def smoothing(t: int) -> tuple[float, float, float]:
    """p(y[t+1..T] | z) as exp(c + b z - a z^2 / 2), by the backward recursion."""
    a, b, c = torch.tensor(0.0), torch.tensor(0.0), torch.tensor(0.0)
    for y in reversed(YS[t:]):
        a, b = a + 1 / NOISE**2, b + y / NOISE**2
        c = c + normal(0.0, NOISE).log_prob(y)
        c = c + b**2 / (2 * (1 + a)) - (1 + a).log() / 2
        a, b = DECAY**2 * a / (1 + a), DECAY * b / (1 + a)
    return float(a), float(b), float(c)


class Smoother:
    """The exact proposal, p(z[t] | z[t-1], all data), and the exact look-ahead factor."""

    def init(self, state: Any) -> None:
        a, b, _ = smoothing(0)
        pyro.sample("z", dist.Normal(b / (1 + a), (1 + a) ** -0.5))
        self.t = 0

    def step(self, state: Any, y: Tensor) -> None:
        self.t += 1
        a, b, _ = smoothing(self.t)
        precision = 1 + a + 1 / NOISE**2
        pyro.sample("z", dist.Normal((DECAY * state["z"] + b + y / NOISE**2) / precision, precision**-0.5))

    def look_ahead(self, state: Any, ys: Tensor) -> Tensor:
        a, b, c = smoothing(len(YS) - len(ys))
        return c + b * state["z"] - a * state["z"] ** 2 / 2


@pytest.mark.parametrize("objective", [FilteringBound(), NestedForwardKL(), NestedReverseKL(), IncrementalBound()])
def test_exact_proposals_and_look_ahead_factors_leave_nothing_to_weight(objective: Any) -> None:
    sampler = Filtering(Resampling(True))
    steps = list(WeightedELBO(objective, sampler, 7).steps(Linear(), Smoother(), YS))
    for step in steps[:1]:
        torch.testing.assert_close(step.log_weight, kalman(YS).expand(7))
    for step in steps[1:]:
        torch.testing.assert_close(step.log_increment.detach(), torch.zeros(7), rtol=0, atol=1e-10)


# ---------------------------------------------------------------- sequences in a plate

TRANSITION = torch.tensor([[0.8, 0.15, 0.05], [0.1, 0.7, 0.2], [0.3, 0.3, 0.4]], dtype=torch.float64)
LOCS = torch.tensor([-1.5, 0.0, 2.0], dtype=torch.float64)
SEQUENCES = torch.tensor([[-1.0, 2.2, 0.1], [-2.0, 1.4, 0.4], [0.3, 0.2, 2.5], [-0.2, 2.0, 1.8]], dtype=torch.float64)


class Mixture:
    """A hidden Markov model with Gaussian emissions, and sequences in a plate."""

    def init(self, state: Any) -> None:
        with pyro.plate("sequences", SEQUENCES.shape[1]):
            state["z"] = pyro.sample("z", dist.Categorical(torch.ones(3) / 3))

    def step(self, state: Any, y: Any = None) -> None:
        with pyro.plate("sequences", SEQUENCES.shape[1]):
            state["z"] = pyro.sample("z", dist.Categorical(TRANSITION[state["z"]]))
            pyro.sample("y", dist.Normal(LOCS[state["z"]], 0.8), obs=y)


class Blind:
    def init(self, state: Any) -> None:
        with pyro.plate("sequences", SEQUENCES.shape[1]):
            pyro.sample("z", dist.Categorical(torch.ones(3) / 3))

    def step(self, state: Any, y: Any = None) -> None:
        slope = pyro.param("slope", torch.zeros(3))
        with pyro.plate("sequences", SEQUENCES.shape[1]):
            pyro.sample("z", dist.Categorical(logits=TRANSITION[state["z"]].log() + slope * y.unsqueeze(-1)))


def forward_algorithm(ys: Tensor) -> Tensor:
    """log p(y) of one sequence, states summed out."""
    log_alpha = torch.full((3,), 1 / 3).log()
    for y in ys:
        log_alpha = (log_alpha[:, None] + TRANSITION.log()).logsumexp(0) + normal(LOCS, 0.8).log_prob(y)
    return log_alpha.logsumexp(0)


@pytest.mark.parametrize("resample", RESAMPLE)
def test_evidence_of_each_sequence_is_the_forward_algorithms(resample: bool | float) -> None:
    loss = FilteringELBO(600, "forward_kl", resample=resample)
    exact = torch.stack([forward_algorithm(ys) for ys in SEQUENCES.T])

    def ratio() -> Tensor:
        with torch.no_grad():
            values = [loss.objective(step).value for step in loss.steps(Mixture(), Blind(), SEQUENCES)]
        assert values[0].shape == (3,)
        return (-torch.stack(values).sum(0) - exact).exp()

    within(torch.stack([ratio() for _ in range(20)]), 1.0)


def test_discrete_proposals_are_learned_by_the_forward_divergence() -> None:
    loss = FilteringELBO(60, "forward_kl")
    svi = SVI(Mixture(), Blind(), Adam({"lr": 0.05}), loss)

    def value() -> float:
        return sum(loss.loss(Mixture(), Blind(), SEQUENCES) for _ in range(30)) / 30

    before = value()
    for _ in range(60):
        svi.step(SEQUENCES)
    assert value() < before - 0.02
    assert pyro.param("slope")[2] > 0.5 > -0.3 > pyro.param("slope")[0]
    with pytest.raises(ValueError, match="cannot be reparameterised"):
        FilteringELBO(60).loss_and_grads(Mixture(), Blind(), SEQUENCES)


class Tabled(dist.Normal):
    """A normal whose noise comes from a table, so that a batch and a loop over it draw the same."""

    noise: Any = None

    def rsample(self, sample_shape: Any = ()) -> Tensor:
        shape = self._extended_shape(sample_shape)
        return self.loc + self.scale * (torch.zeros(shape) if len(shape) < 2 else next(Tabled.noise))

    def expand(self, batch_shape: Any, _instance: Any = None) -> "Tabled":
        return Tabled(self.loc.expand(batch_shape), self.scale.expand(batch_shape))


def plated(size: int) -> tuple[Any, Any]:
    def within_plate(run: Callable[[], Any]) -> Any:
        with pyro.plate("sequences", size):
            return run()

    class Model:
        def init(self, state: Any) -> None:
            state["z"] = within_plate(lambda: pyro.sample("z", dist.Normal(0.0, 1.0)))
            state["history"] = state["z"].unsqueeze(-1)

        def step(self, state: Any, y: Tensor) -> None:
            with pyro.plate("sequences", size):
                state["z"] = pyro.sample("z", dist.Normal(state["history"].mean(-1), 1.0))
                pyro.sample("y", dist.Normal(state["z"], NOISE), obs=y)
            state["history"] = torch.cat([state["history"], state["z"].unsqueeze(-1)], -1)

    class Guide:
        def init(self, state: Any) -> None:
            within_plate(lambda: pyro.sample("z", Tabled(torch.tensor(0.0), torch.tensor(1.2))))

        def step(self, state: Any, y: Tensor) -> None:
            within_plate(lambda: pyro.sample("z", Tabled(0.5 * state["z"] + 0.3 * y, torch.tensor(0.9))))

    return Model(), Guide()


@pytest.mark.parametrize("resample", RESAMPLE)
def test_particles_times_sequences_equals_a_loop_over_the_sequences(monkeypatch: Any, resample: bool | float) -> None:
    monkeypatch.setattr("pplvi.weights.resampling._uniform_points", middle)
    ys, table = torch.randn(4, 7), torch.randn(5, 9, 7)

    def run(ys: Tensor, table: Tensor, objective: Any) -> list[Step]:
        Tabled.noise = iter(table)
        loss = WeightedELBO(objective, Filtering(Resampling(resample)), 9)
        return list(loss.steps(*plated(ys.shape[1]), ys))

    for objective in (FilteringBound(), FilteringForwardKL(), NestedReverseKL()):
        whole = run(ys, table, objective)
        assert whole[-1].log_weight.shape == (9, 7)
        for n in range(7):
            for one, all_ in zip(run(ys[:, n : n + 1], table[..., n : n + 1], objective), whole, strict=True):
                torch.testing.assert_close(one.log_weight[:, 0], all_.log_weight[:, n], rtol=0, atol=1e-12)
                torch.testing.assert_close(objective(one).value[0], objective(all_).value[n])


# ---------------------------------------------------------------- learning


class Net(PyroModule):
    """A proposal that is a Pyro module, with a look-ahead factor in the next observation."""

    def __init__(self, look_ahead: bool = True) -> None:
        super().__init__("net")
        self.layer = PyroModule[torch.nn.Linear](2, 1)
        torch.nn.init.zeros_(self.layer.weight)
        torch.nn.init.zeros_(self.layer.bias)
        self.scale = PyroParam(torch.tensor(1.0), dist.constraints.positive)
        self.log_variance = PyroParam(torch.tensor(3.0))
        if not look_ahead:
            self.look_ahead: Any = None

    def init(self, state: Any) -> None:
        pyro.sample("z", dist.Normal(0.0, 1.0))

    def step(self, state: Any, y: Tensor) -> None:
        inputs = torch.stack([state["z"], y.expand_as(state["z"])], -1)
        pyro.sample("z", dist.Normal(self.layer(inputs).squeeze(-1), self.scale))

    def look_ahead(self, state: Any, ys: Tensor) -> Tensor:
        return -((ys[0] - DECAY * state["z"]) ** 2) / (2 * self.log_variance.exp())


@pytest.mark.parametrize("objective", ["bound", NestedForwardKL(), NestedReverseKL()], ids=str)
def test_proposals_and_look_ahead_factors_of_a_module_are_learned(objective: Any) -> None:
    local = objective != "bound"
    net, loss = Net(local), FilteringELBO(30, objective, resample=local)
    svi = SVI(Linear(), net, Adam({"lr": 0.03}), loss)
    for _ in range(80):
        svi.step(YS)
    weight = net.layer.weight.detach()[0]
    gain = 1 / (1 + NOISE**2)  # of the optimal proposal: 0.735
    assert abs(float(weight[1]) - gain) < (0.25 if local else 0.5)
    if objective != "bound":
        assert float(net.log_variance.detach()) < 2.5


def test_parameters_that_pyro_does_not_see_are_named() -> None:
    net = Net(look_ahead=False)
    net.layer = PyroModule[torch.nn.Sequential](torch.nn.Linear(2, 1))  # SVI would train nothing of it and say nothing
    with pytest.warns(UserWarning, match=r"\['layer.0.weight', 'layer.0.bias'\] of Net are not trained"):
        FilteringELBO(5).loss(Linear(), net, YS)


@pytest.mark.parametrize("objective", ["bound", "forward_kl", IncrementalBound()], ids=str)
def test_objectives_that_cannot_train_look_ahead_factors_refuse_them(objective: Any) -> None:
    """With resampling whose choice has no gradient, the bound would train them the wrong way."""
    with pytest.raises(ValueError, match="look-ahead factor has parameters"):
        FilteringELBO(10, objective).loss_and_grads(Linear(), Net(), YS)
    FilteringELBO(10, objective).loss_and_grads(Linear(), Smoother(), YS)


def test_any_look_ahead_factor_leaves_the_evidence_alone() -> None:
    class Wrong(Proposal):
        def look_ahead(self, state: Any, ys: Tensor) -> Tensor:
            return 0.3 * state["z"].sin() - ys[0]

    for resample in (True, 0.5):
        loss = FilteringELBO(800, resample=resample)
        ratios = [(-torch.tensor(loss.loss(Linear(), Wrong(), YS)) - kalman(YS)).exp() for _ in range(15)]
        within(torch.stack(ratios), 1.0)


def test_no_look_ahead_factor_is_asked_for_where_no_data_are_left() -> None:
    asked = []

    class Curious(Proposal):
        def look_ahead(self, state: Any, ys: Tensor) -> Tensor:
            asked.append(len(ys))
            return ys[0] * state["z"]

    for length in (1, 2):
        FilteringELBO(4).loss(Linear(), Curious(), YS[:length])
    assert min(asked) == 1


def test_level_gradients_agree_between_detached_and_frozen_objectives() -> None:
    """The bound of single steps, -mean log v: pathwise with frozen densities against finite differences."""
    sampler = Filtering(Resampling(False))
    loss = WeightedELBO(IncrementalBound(), sampler, 50_000)
    found = gradients(loss, Linear(), Proposal(), YS[:1])
    weight, scale = (torch.tensor(x, requires_grad=True) for x in (0.5, 0.8))
    z = 0.1 + 1.1 * torch.empty(200_000).normal_()
    moved = z + weight * (YS[0] - z) + scale * torch.empty(200_000).normal_()
    log_v = normal(DECAY * z, 1.0).log_prob(moved) + normal(moved, NOISE).log_prob(YS[0]) + scale.log()
    (-log_v.mean()).backward()
    torch.testing.assert_close(found, torch.stack([weight.grad, scale.grad]), rtol=0, atol=0.05)


@pytest.mark.parametrize("objective", ["bound", "forward_kl", NestedReverseKL()], ids=str)
@pytest.mark.parametrize("form", PAIRS)
def test_training_steps_can_be_traced(form: str, objective: Any) -> None:
    losses = []
    for engine, options in ((SVI, {}), (CompiledSVI, {"mode": "trace"})):
        pyro.clear_param_store()
        pyro.set_rng_seed(0)
        svi = engine(*PAIRS[form], Adam({"lr": 0.01}), FilteringELBO(10, objective, resample=0.7), **options)
        losses.append([svi.step(YS[:3]) for _ in range(3)])
    assert losses[0] == pytest.approx(losses[1], abs=1e-10)


# ---------------------------------------------------------------- Pyro's own filter, and errors


class Oscillator:
    """As in Pyro's example: the first state is given, sites are numbered by the model itself."""

    def init(self, state: Any, initial: Tensor) -> None:
        self.t = 0
        state["z"] = pyro.sample("z_init", dist.Delta(initial, event_dim=1))

    def step(self, state: Any, y: Any = None) -> None:
        self.t += 1
        turn = torch.tensor([[0.9, 0.3], [-0.3, 0.9]])
        state["z"] = pyro.sample(f"z_{self.t}", dist.Normal(state["z"] @ turn, 0.2).to_event(1))
        pyro.sample(f"y_{self.t}", dist.Normal(state["z"][..., 0], 0.3), obs=y)


class Bootstrap(Oscillator):
    def init(self, state: Any, initial: Tensor) -> None:
        self.t = 0
        pyro.sample("z_init", dist.Delta(initial, event_dim=1))

    def step(self, state: Any, y: Any = None) -> None:
        self.t += 1
        turn = torch.tensor([[0.9, 0.3], [-0.3, 0.9]])
        pyro.sample(f"z_{self.t}", dist.Normal(state["z"] @ turn, 0.25).to_event(1))


def test_models_of_pyros_filter_run_as_they_are() -> None:
    ys, initial = torch.tensor([0.9, 0.7, 0.2]), torch.tensor([1.0, 0.0])
    found = [-FilteringELBO(3000, resample=0.5).loss(Oscillator(), Bootstrap(), ys, initial=initial) for _ in range(20)]
    smc = SMCFilter(Oscillator(), Bootstrap(), num_particles=3000, max_plate_nesting=0)
    smc.init(initial=initial)
    for y in ys:
        smc.step(y)
    turn = torch.tensor([[0.9, 0.3], [-0.3, 0.9]])
    means, covariance, joint = [initial], torch.zeros(2, 2), torch.zeros(3, 3)
    covariances = []
    for _ in range(3):
        means.append(means[-1] @ turn)
        covariance = turn.T @ covariance @ turn + 0.04 * torch.eye(2)
        covariances.append(covariance)
    for i in range(3):
        for j in range(i + 1):
            joint[i, j] = joint[j, i] = (covariances[j] @ torch.matrix_power(turn, i - j))[0, 0] + (i == j) * 0.09
    exact = torch.distributions.MultivariateNormal(torch.stack(means)[1:, 0], joint).log_prob(ys)
    within((torch.tensor(found) - exact).exp(), 1.0)


class Writes(Proposal):
    def step(self, state: Any, y: Any = None) -> None:
        super().step(state, y)
        state["z"] = torch.zeros(())


class Other(Proposal):
    def step(self, state: Any, y: Any = None) -> None:
        pyro.sample("x", dist.Normal(0.0, 1.0))


def short_guide(ys: Tensor) -> None:
    loop_guide(ys[1:])


@pytest.mark.parametrize(
    ("run", "message"),
    [
        (lambda: FilteringELBO(objective="kl"), "objective='kl'"),
        (lambda: FilteringELBO(objective=RenyiBound(0.0)), "objective of levels"),
        (lambda: FilteringELBO(1, "forward_kl"), "at least 2"),
        (lambda: FilteringELBO(resample=0.0), "a number above 0"),
        (lambda: Filtering(Resampling(True, num_particles=3)), "keeps its number of particles"),
        (lambda: FilteringELBO().loss(Linear(), loop_guide, YS), "Write both in the same way"),
        (lambda: FilteringELBO().loss(Linear(), Proposal()), "at least one"),
        (lambda: FilteringELBO().loss(Linear(), Proposal(), YS, YS[1:]), "equally long"),
        (lambda: FilteringELBO().loss(Linear(), Proposal(), torch.tensor(1.0)), "over time"),
        (lambda: FilteringELBO().loss(Linear(), Writes(), YS), "read only"),
        (lambda: FilteringELBO().loss(Linear(), Other(), YS), r"draws \['x'\].*latent sites are \['z'\]"),
        (lambda: FilteringELBO().loss(loop_model, short_guide, YS), "expected one length"),
        (lambda: WeightedELBO(RenyiBound(0.0), Filtering(), 4).loss(*PAIRS["steps"], YS), "single step"),
    ],
)
def test_errors_say_what_to_do(run: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        run()


def test_it_prints_as_the_call_that_makes_it() -> None:
    assert repr(FilteringELBO(8)) == "FilteringELBO(num_particles=8, objective='bound', resample=True)"
