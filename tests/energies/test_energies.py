"""Undirected models: energies, sums over layers, Gibbs sampling and the Pyro program against enumeration."""

import warnings
from typing import Any

import pyro
import pytest
import torch
from pyro.infer import SVI, Predictive, Trace_ELBO
from torch import Tensor

import pplvi
from pplvi.energies import (
    BernoulliUnits,
    BoltzmannMachine,
    CategoricalUnits,
    CopiedUnits,
    EnergyModel,
    GaussianUnits,
    RestrictedBoltzmannMachine,
    Units,
)
from pplvi.energies.machines.measures import BaseMeasure
from pplvi.energies.machines.training_step import training_step

pytestmark = pytest.mark.usefixtures("float64")

B, C = BernoulliUnits, CategoricalUnits
MACHINES = {
    "restricted": lambda: ({"v": B(4), "h": B(3)}, [("v", "h")]),
    "deep": lambda: ({"v": B(4), "h1": B(3), "h2": B(2)}, [("v", "h1"), ("h1", "h2")]),
    "semi-restricted": lambda: ({"v": B(4), "h": B(3)}, [("v", "h"), ("v", "v")]),
    "general": lambda: ({"v": B(4)}, [("v", "v")]),
    "softmax": lambda: ({"v": C(2, 3), "h": B(3)}, [("v", "h")]),
    "with labels": lambda: ({"v": B(3), "y": C(1, 3), "h": B(3)}, [("v", "h"), ("y", "h")]),
    "a triangle": lambda: ({"v": B(2), "x": B(3), "h": B(2)}, [("v", "x"), ("x", "h"), ("v", "h")]),
}


def make(kind: str) -> BoltzmannMachine:
    layers, connections = MACHINES[kind]()
    machine = BoltzmannMachine(layers, connections, init_scale=1.0)
    for bias in machine.biases().values():
        bias.data.normal_()
    return machine


def all_states(machine: BoltzmannMachine) -> dict[str, Tensor]:
    """Every joint state, counted independently of the machine."""
    codes = {name: one_layer(units) for name, units in machine.layers.items()}
    index = torch.cartesian_prod(*(torch.arange(len(c)) for c in codes.values())).reshape(-1, len(codes))
    return {name: c[i] for (name, c), i in zip(codes.items(), index.unbind(1), strict=True)}


def one_layer(units: Units) -> Tensor:
    states = torch.eye(units.num_states) if isinstance(units, C) else torch.tensor([[0.0], [1.0]])
    index = torch.cartesian_prod(*[torch.arange(len(states))] * units.num_units).reshape(-1, units.num_units)
    return states[index].flatten(1)


def plain_energy(machine: BoltzmannMachine, states: dict[str, Tensor]) -> Tensor:
    total = -sum(states[name] @ bias for name, bias in machine.biases().items())
    for (a, b), weight in machine.edges().items():
        total = total - torch.einsum("si,ij,sj->s", states[a], weight.triu(1) if a == b else weight, states[b])
    return total


@pytest.mark.parametrize("kind", MACHINES)
def test_energy_and_partition_function_are_those_of_the_definition(kind: str) -> None:
    machine = make(kind)
    states = all_states(machine)
    energy = plain_energy(machine, states)
    torch.testing.assert_close(machine.energy(states), energy)
    for beta in (1.0, 0.3):
        torch.testing.assert_close(machine.log_partition(beta), (-beta * energy).logsumexp(0))


@pytest.mark.parametrize("kind", MACHINES)
def test_marginal_sums_out_whatever_is_missing(kind: str) -> None:
    machine = make(kind)
    states = all_states(machine)
    energy = plain_energy(machine, states)
    v = states["v"][:: max(1, len(energy) // 5)]
    same = (states["v"].unsqueeze(0) == v.unsqueeze(1)).all(-1)
    expected = torch.where(same, -energy, -torch.inf).logsumexp(1)
    torch.testing.assert_close(-machine.free_energy(v), expected)
    torch.testing.assert_close(-machine.free_energy(v[0]), expected[0])


@pytest.mark.parametrize("kind", MACHINES)
def test_gibbs_sampling_leaves_the_machine_invariant(kind: str) -> None:
    machine = make(kind)
    states = all_states(machine)
    probability = (-plain_energy(machine, states)).softmax(0)
    exact = torch.multinomial(probability, 20_000, replacement=True)
    moved = machine.gibbs({name: s[exact] for name, s in states.items()}, 2)
    for name in machine.layers:
        mean = probability @ states[name]
        error = (moved[name].mean(0) - mean).abs()
        assert (error < 4.5 * (mean * (1 - mean) / 20_000).sqrt()).all(), name


def test_gibbs_holds_what_is_clamped() -> None:
    machine = make("deep")
    start = machine.draw((50,))
    mask = torch.tensor([True, False, True, False])
    moved = machine.gibbs(start, 3, clamped={"v": mask, "h2": None})
    assert torch.equal(moved["v"][:, mask], start["v"][:, mask])
    assert not torch.equal(moved["v"][:, ~mask], start["v"][:, ~mask])
    assert torch.equal(moved["h2"], start["h2"])


def test_gaussian_units_integrate_to_the_same_normaliser() -> None:
    machine = RestrictedBoltzmannMachine(2, 3, visible=GaussianUnits(2, variance=0.5), init_scale=0.7)
    grid = torch.linspace(-8.0, 8.0, 401)
    v = torch.cartesian_prod(grid, grid)
    integral = machine.log_marginal({"v": v}).logsumexp(0) + 2 * (grid[1] - grid[0]).log()
    torch.testing.assert_close(machine.log_partition(), integral, rtol=1e-9, atol=1e-9)
    draws = machine.distribution(num_sweeps=50).sample((4000,))
    density = (machine.log_marginal({"v": v}) - machine.log_partition()).softmax(0)
    mean, square = density @ v, density @ v**2
    assert ((draws.mean(0) - mean).abs() < 4.5 * ((square - mean**2) / 4000).sqrt()).all()


def test_distribution_is_a_distribution() -> None:
    rbm = RestrictedBoltzmannMachine(4, 3, init_scale=1.0)
    p = rbm.distribution()
    torch.testing.assert_close(p.log_prob(p.enumerate_support()).exp().sum(), torch.ones(()))
    assert p.sample((7,)).shape == (7, 4)
    assert p.event_shape == (4,)


def test_distribution_without_log_z_says_what_is_missing() -> None:
    big = RestrictedBoltzmannMachine(50, 40)
    with pytest.raises(ValueError, match=r"40 bits.*at most 20.*annealed importance sampling.*log_z="):
        big.distribution().log_prob(torch.zeros(50))
    known = big.distribution(log_z=60.0).log_prob(torch.zeros(50))
    torch.testing.assert_close(known, -big.free_energy(torch.zeros(50)) - 60.0)


def test_elbo_of_the_exact_posterior_is_the_free_energy() -> None:
    rbm = RestrictedBoltzmannMachine(4, 3, init_scale=1.0)
    v = torch.randint(2, (5, 4)).double()
    loss = pplvi.ELBO(num_particles=2).loss(rbm.model, rbm.guide, v)
    assert loss == pytest.approx(rbm.free_energy(v).sum().item())
    assert pplvi.ELBO(num_particles=2).loss(rbm.model, rbm.guide, v, size=50) == pytest.approx(10 * loss)


def reminders(record: list[warnings.WarningMessage]) -> list[str]:
    return [str(w.message) for w in record if "log Z" in str(w.message)]


def test_a_plain_elbo_warns_once_that_log_z_is_missing() -> None:
    rbm = RestrictedBoltzmannMachine(4, 3)
    v = torch.ones(5, 4)
    with warnings.catch_warnings(record=True) as record:
        warnings.simplefilter("always")
        Predictive(rbm.model, guide=rbm.guide, num_samples=3)(v)
        assert not reminders(record)
        svi = SVI(rbm.model, rbm.guide, pyro.optim.SGD({"lr": 1e-3}), Trace_ELBO())
        svi.step(v)
        svi.step(v)
        assert len(reminders(record)) == 1
        assert "BoltzmannELBO" in reminders(record)[0]


def test_no_reminder_when_the_energy_is_frozen() -> None:
    rbm = RestrictedBoltzmannMachine(4, 3).requires_grad_(False)

    def guide(v: Tensor) -> None:
        logits = pyro.param("logits", torch.zeros(3))
        with pyro.plate("data", len(v)):
            pyro.sample("h", pyro.distributions.Bernoulli(logits=logits).expand([len(v), 3]).to_event(1))

    with warnings.catch_warnings(record=True) as record:
        warnings.simplefilter("always")
        SVI(rbm.model, guide, pyro.optim.SGD({"lr": 1e-3}), pplvi.ELBO(num_particles=4)).step(torch.ones(5, 4))
    assert not reminders(record)


def test_no_reminder_under_mcmc() -> None:
    rbm = RestrictedBoltzmannMachine(2, 3, visible="gaussian", hidden="bernoulli")

    def model() -> None:
        with pyro.plate("data", 1):
            v = pyro.sample("v", pyro.distributions.Normal(0.0, 3.0).expand([1, 2]).to_event(1))
            rbm.energy_site("energy", {"v": v, "h": torch.ones(1, 3)})

    with warnings.catch_warnings(record=True) as record:
        warnings.simplefilter("always")
        kernel = pyro.infer.NUTS(model)
        pyro.infer.MCMC(kernel, num_samples=5, warmup_steps=5, disable_progbar=True).run()
    assert not reminders(record)


def test_a_second_machine_of_one_name_is_refused() -> None:
    first, second = RestrictedBoltzmannMachine(4, 3), RestrictedBoltzmannMachine(4, 3)
    first.model(torch.ones(2, 4))
    with pytest.raises(ValueError, match="name of its own"):
        second.model(torch.ones(2, 4))
    RestrictedBoltzmannMachine(4, 3, name="second").model(torch.ones(2, 4))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (torch.full((2, 4), 0.5), r"threshold.*torch\.bernoulli.*mean_field_visible=True"),
        (torch.full((2, 4), torch.nan), r"NaN.*mask=~v\.isnan\(\)"),
        (torch.ones(2, 5), r"\(2, 5\).*\(\*batch, 4\)"),
        (torch.ones(0, 4), "empty batch"),
        (torch.full((2, 4), torch.inf), "expected only 0 and 1"),
        (torch.ones(2, 4, dtype=torch.uint8), r"torch\.uint8.*float\(\)"),
    ],
)
def test_data_outside_the_support_are_refused(values: Tensor, message: str) -> None:
    rbm = RestrictedBoltzmannMachine(4, 3)
    with pytest.raises(ValueError, match=message):
        rbm.distribution().log_prob(values)


def test_grey_levels_are_taken_where_they_are_declared() -> None:
    rbm = RestrictedBoltzmannMachine(4, 3, mean_field_visible=True)
    assert rbm.distribution().log_prob(torch.full((2, 4), 0.5)).shape == (2,)
    with pytest.raises(ValueError, match="between 0 and 1"):
        rbm.distribution().log_prob(torch.full((2, 4), 1.5))


def test_softmax_codes_are_made_from_integers_and_checked() -> None:
    units = CategoricalUnits(2, 3)
    assert torch.equal(units.decode(units.encode(torch.tensor([2, 0]))), torch.tensor([2, 0]))
    with pytest.raises(ValueError, match=r"one-hot codes.*encode"):
        units.check(torch.ones(6), "v")
    with pytest.raises(ValueError, match="integers from 0 to 2"):
        units.encode(torch.tensor([3, 0]))


@pytest.mark.parametrize(
    ("layers", "connections", "message"),
    [
        ({}, [], "without layers"),
        ({"v": B(2)}, [("v", "x")], "unknown layers"),
        ({"v": B(2), "h": B(2)}, [("v", "h"), ("h", "v")], "more than once"),
        ({"v": GaussianUnits(2), "h": GaussianUnits(2)}, [("v", "h")], "Gaussian"),
        ({"v": C(2, 3)}, [("v", "v")], "Bernoulli"),
    ],
)
def test_graphs_that_make_no_machine_are_refused(layers: dict, connections: list, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        BoltzmannMachine(layers, connections)


# ---------------------------------------------------------------------- another kind of model


class Gated(EnergyModel):
    """Three layers that meet in triples, ``E = -sum W_ijk x_i y_j h_k``: an energy and conditionals, nothing more."""

    classes = (("x",), ("y",), ("h",))

    def __init__(self, x: int, y: int, h: int) -> None:
        super().__init__({"x": B(x), "y": B(y), "h": B(h)}, centered=False, name="gated")
        self.register_parameter("weight", torch.nn.Parameter(torch.randn(x, y, h)))

    def energy(self, values: Any) -> Tensor:
        return -(self._field("h", values) * values["h"]).sum(-1)

    def _field(self, layer: str, values: Any) -> Tensor:
        one, two = (n for n in self.layers if n != layer)
        i, j, k = (dict(zip(self.layers, "ijk", strict=True))[n] for n in (one, two, layer))
        return torch.einsum(f"...{i},...{j},ijk->...{k}", values[one], values[two], self.get_parameter("weight"))

    def log_marginal(self, values: Any, beta: Any = 1.0) -> Tensor:
        (missing,) = (layer for layer in self.layers if layer not in values)
        return self.layers[missing].log_partition(self._field(missing, values), beta)

    def redrawn(self, layer: str, values: Any, beta: Any = 1.0, *, held: Tensor | None = None) -> Tensor:
        return self.layers[layer].sample(self._field(layer, values), beta)

    def gibbs(self, values: Any, num_sweeps: int = 1, *, clamped: Any = (), beta: Any = 1.0) -> dict[str, Tensor]:
        state = dict(values)
        with torch.no_grad():
            for layer in list(self.layers) * num_sweeps:
                if layer not in clamped:
                    state[layer] = self.redrawn(layer, state, beta)
        return state

    def guide(self, v: Any, **kwargs: Any) -> None:
        with pyro.plate("data", len(v["x"])):
            pyro.sample("h", self.layers["h"].conditional(self._field("h", v).detach()))


def test_an_energy_with_its_conditionals_is_trained_as_any_other() -> None:
    """Training, chains and checks are shared: the gradient is that of the enumerated likelihood."""
    torch.manual_seed(0)
    gated = Gated(3, 2, 2)
    states = torch.cartesian_prod(*[torch.tensor([0.0, 1.0])] * 7)
    every = {"x": states[:, :3], "y": states[:, 3:5], "h": states[:, 5:]}
    v = {"x": torch.randint(2, (6, 3)).double(), "y": torch.randint(2, (6, 2)).double()}
    log_likelihood = gated.log_marginal(v).mean() - (-gated.energy(every)).logsumexp(0)
    (exact,) = torch.autograd.grad(-log_likelihood, [gated.get_parameter("weight")])
    loss = pplvi.BoltzmannELBO(num_chains=300, sweeps=2, num_particles=10)
    found = []
    for step in range(70):
        value = loss.differentiable_loss(gated.model, gated.guide, v)
        if step >= 10:
            found.append(torch.autograd.grad(value, [gated.get_parameter("weight")])[0])
    batches = torch.stack(found).reshape(12, 5, *exact.shape).mean(1)
    assert ((batches.mean(0) - exact).abs() < 4.5 * batches.std(0) / 12**0.5 + 1e-9).all()
    svi = SVI(gated.model, gated.guide, pyro.optim.SGD({"lr": 0.5}), loss)
    for _ in range(30):
        svi.step(v)
    after = gated.log_marginal(v).mean() - (-gated.energy(every)).logsumexp(0)
    assert after > log_likelihood + 0.2


@pytest.mark.parametrize("kind", [*MACHINES, "Gaussian", "copies of Gaussian"])
def test_a_training_step_knows_the_same_energies_and_fields(kind: str) -> None:
    gaussian = GaussianUnits(3, variance=0.25)
    real = {"Gaussian": gaussian, "copies of Gaussian": CopiedUnits(gaussian)}
    layers, connections = MACHINES[kind]() if kind in MACHINES else ({"v": real[kind], "h": B(2)}, [("v", "h")])
    machine = BoltzmannMachine(layers, connections, init_scale=1.0)
    values = machine.draw((5,))
    plain = {layer: machine.field(layer, values) for layer in layers}
    with training_step():
        for _ in range(2):  # worked out, and known
            for layer, field in plain.items():
                torch.testing.assert_close(machine.field(layer, values), field)
        energy = machine.energy(values)
    torch.testing.assert_close(energy, machine.energy(values))


def test_a_continuum_has_no_states_to_list() -> None:
    rbm = RestrictedBoltzmannMachine(2, 3, visible="gaussian")
    with pytest.raises(ValueError, match=r"states of GaussianUnits.*num_states"):
        list(rbm.states(["v"], rbm.like()))
    with pytest.raises(NotImplementedError, match="GaussianUnits are a continuum"):
        BaseMeasure(rbm.layers["v"], (), rbm.like()).enumerate_support()
    with pytest.raises(ValueError, match=r"no tensor 'chain_v': expected one of.*offset_v"):
        rbm.kept("chain_v")


@pytest.mark.parametrize("beta", [4.0, torch.tensor(4.0), torch.tensor([4.0, 0.25])])
def test_temperature_widens_gaussian_units(beta: Any) -> None:
    units, field = GaussianUnits(3, variance=0.25), torch.randn(2, 3)
    draws = []
    for value in (1.0, beta):
        torch.manual_seed(0)
        draws.append((units.sample(field, value) - field) * torch.as_tensor(value).reshape(-1, 1) ** 0.5)
    torch.testing.assert_close(*draws)


@pytest.mark.parametrize("make", [lambda: B(3), lambda: C(2, 3), lambda: GaussianUnits(3, variance=0.25)])
def test_entropy_under_a_field_is_that_of_the_means(make: Any) -> None:
    """At the field's own means ``log Z(f) - phi(mu) . f + base(mu)`` is the entropy; elsewhere it is the formula."""
    units = make()
    field = torch.randn(4, units.width)
    mean = units.mean(field)
    torch.testing.assert_close(units.field_entropy(field, mean), units.entropies(mean).sum(-1))
    other = units.mean(field + 1.0)
    by_hand = units.log_partition(field) - (units.statistic(other) * field).sum(-1) + units.base_energy(other)
    torch.testing.assert_close(units.field_entropy(field, other), by_hand)
