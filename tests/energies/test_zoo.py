"""Kinds of undirected machines against enumeration and quadrature: densities, chains, gradients, compiled steps."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import pyro
import pytest
import torch
from pyro.infer import SVI
from torch import Tensor

import pplvi
from pplvi import BoltzmannELBO, CompiledSVI, SparsityPenalty
from pplvi.energies import (
    BernoulliUnits,
    BoltzmannMachine,
    Chains,
    ClassificationBoltzmannMachine,
    ConvolutionalBoltzmannMachine,
    EnergyModel,
    EveryState,
    FactoredCoupling,
    GatedBoltzmannMachine,
    MeanCovarianceMachine,
    MeanFieldGuide,
    MeanProductOfStudents,
    RestrictedBoltzmannMachine,
    SpikeSlabUnits,
    annealed_importance_sampling,
)

pytestmark = pytest.mark.usefixtures("float64")


def disturbed(machine: Any, scale: float = 0.4) -> Any:
    """The machine with parameters that are not those of a start."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in machine.parameters():
            parameter.add_(scale * torch.randn(parameter.shape, generator=generator))
    return machine


def convolutional() -> EnergyModel:
    return ConvolutionalBoltzmannMachine((1, 3, 4), maps=2, filter_size=2, pool=1, init_scale=0.5)


def pooled() -> EnergyModel:
    return ConvolutionalBoltzmannMachine((1, 3, 3), maps=2, filter_size=2, pool=2, init_scale=0.5)


def spike_slab() -> EnergyModel:
    units = SpikeSlabUnits(3, precision=4.0)
    return RestrictedBoltzmannMachine(2, 3, visible="gaussian", hidden=units, centered=False, init_scale=0.3)


def gated() -> EnergyModel:
    return GatedBoltzmannMachine(4, 3, given=3, num_factors=4, init_scale=0.7)


def conditional(**options: Any) -> EnergyModel:
    return RestrictedBoltzmannMachine(4, 3, given=5, init_scale=0.5, **options)


def classification() -> EnergyModel:
    return ClassificationBoltzmannMachine(4, 3, num_labels=3, init_scale=0.5)


def real_hidden() -> EnergyModel:
    return RestrictedBoltzmannMachine(4, 3, hidden="gaussian", init_scale=0.5)


def third_order() -> EnergyModel:
    layers = {"v": BernoulliUnits(4), "x": BernoulliUnits(2), "h": BernoulliUnits(3)}
    coupling = FactoredCoupling(("v", "x", "h"), (4, 2, 3), 3)
    return BoltzmannMachine(layers, [coupling, ("v", "h")], centered=False, init_scale=0.7)


LEAPS: dict[str, Any] = {"init_scale": 0.5, "num_leapfrog": 2, "step_size": 0.4}
KINDS: dict[str, Callable[[], EnergyModel]] = {
    "spike and slab": spike_slab,
    "Gaussian hidden": real_hidden,
    "convolutional": convolutional,
    "pooled": pooled,
    "gated": gated,
    "conditional": conditional,
    "classification": classification,
    "third order": third_order,
    "mean and covariance": partial(
        MeanCovarianceMachine, 2, num_covariance=3, num_mean=2, num_factors=4, init_scale=0.5
    ),
    "product of Students": partial(MeanProductOfStudents, 2, num_covariance=3, num_mean=2, init_scale=0.5),
}
CELL = 0.25


@dataclass
class Case:
    """A machine, data, all that its visible layers can be, and the log volume of a cell of them."""

    machine: EnergyModel
    data: dict[str, Tensor]
    support: dict[str, Tensor]
    log_cell: float = 0.0

    def log_prob(self) -> Tensor:
        """Exact log likelihood of each datum."""
        given = self.machine.conditions(self.data)
        support = {n: x.unsqueeze(1) if given else x for n, x in self.support.items()}
        return self.machine.log_marginal(self.data) - self.log_z({**support, **given})

    def log_z(self, values: dict[str, Tensor]) -> Tensor:
        return self.machine.log_marginal(values).logsumexp(0) + self.log_cell


def case(kind: str, num_data: int = 5) -> Case:
    pyro.clear_param_store()
    torch.manual_seed(0)
    machine = disturbed(KINDS[kind]())
    width = machine.layers["v"].width
    data = {"v": torch.randint(2, (num_data, width)).double()}
    bits = torch.cartesian_prod(*[torch.tensor([0.0, 1.0])] * width)
    found = Case(machine, data, {"v": bits})
    if machine.layers["v"].num_states is None:
        axis = torch.arange(-9.0, 9.0, CELL)
        return Case(
            machine, {"v": torch.randn(num_data, width)}, {"v": torch.cartesian_prod(axis, axis)}, 2 * math.log(CELL)
        )
    for extra in ("y", "x"):
        if extra in machine.layers:
            units = machine.layers[extra]
            states = units.states(torch.arange(units.count_states()), bits)
            index = torch.cartesian_prod(torch.arange(len(bits)), torch.arange(len(states)))
            found.support = {"v": bits[index[:, 0]], extra: states[index[:, 1]]}
            data[extra] = states[torch.randint(len(states), (num_data,))]
    if machine.given is not None:
        data["given"] = torch.randn(num_data, machine.given)
    return found


def named(machine: torch.nn.Module) -> dict[str, Tensor]:
    return {name: p for name, p in machine.named_parameters() if p.requires_grad}


def derivative(machine: torch.nn.Module, value: Tensor) -> dict[str, Tensor]:
    parameters = named(machine)
    found = torch.autograd.grad(value, list(parameters.values()), allow_unused=True)
    return {n: torch.zeros_like(p) if g is None else g for (n, p), g in zip(parameters.items(), found, strict=True)}


@dataclass(frozen=True)
class Everywhere(Chains):
    """The exact negative phase: every value of the visible layers, weighted by its probability."""

    support: Any = field(default=None, compare=False)

    def move(self, machine: EnergyModel, data: Any, advance: bool) -> dict[str, Tensor]:
        given = machine.conditions(data)
        return {**{n: x.unsqueeze(1) if given else x for n, x in self.support.items()}, **given}

    def step(self, log_density: Tensor, batch: int = 0) -> Any:
        return EveryState().step(log_density, batch)


def through(machine: EnergyModel, program: str) -> tuple[Any, Any]:
    """A program of the machine and its guide."""
    if program == "marginal":
        return machine.marginal, machine.marginal_guide
    return (machine.model, machine.guide) if hasattr(machine, "guide") else (machine.model, MeanFieldGuide(machine, 1))


@pytest.mark.parametrize("program", ["marginal", "model"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_gradient_is_that_of_the_exact_log_likelihood(kind: str, program: str) -> None:
    found = case(kind)
    machine, loss = found.machine, BoltzmannELBO(negative=Everywhere(support=found.support))
    wanted = derivative(machine, -found.log_prob().mean())
    machine.centered = False
    gradient = derivative(machine, loss.differentiable_loss(*through(machine, program), found.data))
    for name, expected in wanted.items():
        torch.testing.assert_close(gradient[name], expected, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("kind", KINDS)
def test_the_exact_log_likelihood_has_the_slope_of_finite_differences(kind: str) -> None:
    found = case(kind)
    wanted, step = derivative(found.machine, found.log_prob().mean()), 1e-5
    generator = torch.Generator().manual_seed(1)
    for name, parameter in named(found.machine).items():
        way = torch.randn(parameter.shape, generator=generator)
        ends = []
        for sign in (1, -1):
            with torch.no_grad():
                parameter.add_(sign * step * way)
                ends.append(found.log_prob().mean().item())
                parameter.sub_(sign * step * way)
        slope = (ends[0] - ends[1]) / (2 * step)
        assert slope == pytest.approx((wanted[name] * way).sum().item(), abs=1e-6), name


@pytest.mark.parametrize("kind", KINDS)
def test_chains_leave_the_machine_invariant(kind: str) -> None:
    found, count = case(kind, num_data=1), 8000
    machine, given = found.machine, found.machine.conditions(found.data)
    given = {n: x.expand(count, -1) for n, x in given.items()}
    with torch.no_grad():
        density = machine.log_marginal({**found.support, **{n: x[:1] for n, x in given.items()}})
        start = torch.multinomial((density - density.max()).exp(), count, replacement=True)
        values = {**machine.draw((count,)), **{n: x[start] for n, x in found.support.items()}, **given}
        first = machine.gibbs(values, 1, clamped=tuple(found.support))
        moved = machine.gibbs(first, 3)
        probability = density.softmax(0)
        for name, states in found.support.items():
            for power in (1, 2):
                mean = probability @ states**power
                error = (probability @ (states**power - mean) ** 2 / count).sqrt()
                assert ((moved[name] ** power).mean(0) - mean).abs().le(4.5 * error + 1e-12).all(), name
            assert not torch.equal(moved[name], values[name])


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "third order"])
def test_annealed_importance_sampling_finds_the_exact_log_z(kind: str) -> None:
    found = case(kind)
    given = found.machine.conditions(found.data)
    with torch.no_grad():
        support = {n: x.unsqueeze(1) if given else x for n, x in found.support.items()}
        exact = found.log_z({**support, **given}).mean().item()
        estimate = annealed_importance_sampling(found.machine, 400, 60, data=found.data if given else None, seed=0)
        low, high = estimate.interval
        assert low < exact < high
        if given:
            assert estimate.log_weights.shape == (400, 5)
            assert estimate.log_likelihood[0] == pytest.approx(found.log_prob().mean().item(), abs=0.1)


def batches(found: Case) -> list[dict[str, Tensor]]:
    return [{n: x[i : i + 2] for n, x in found.data.items()} for i in (0, 2)]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.table(2)
def test_a_recorded_step_is_an_eager_one(kind: str) -> None:
    found: list[Any] = []
    for svi in (SVI, partial(CompiledSVI, mode="trace")):
        problem = case(kind)
        machine = problem.machine
        loss = BoltzmannELBO(4, 2, negative="persistent" if machine.given is None else "contrastive")
        program = "marginal" if kind == "third order" else "model"
        steps = svi(*through(machine, program), pyro.optim.SGD({"lr": 0.05, "momentum": 0.5}), loss)
        pyro.set_rng_seed(1)
        losses = [steps.step(batch) for batch in batches(problem) * 2]
        found.append((losses, machine.state_dict()))
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-9)
    for name, value in found[0][1].items():
        torch.testing.assert_close(value, found[1][1][name], msg=lambda text, name=name: f"{name}: {text}")


BITS = ["Gaussian hidden", "convolutional", "pooled", "gated", "conditional"]


@pytest.mark.parametrize("kind", BITS)
def test_missing_units_are_bounded_by_the_exact_marginal(kind: str) -> None:
    found = case(kind)
    machine, mask = found.machine, torch.rand(found.data["v"].shape) < 0.7
    given = machine.conditions(found.data)
    with torch.no_grad():
        support = {n: x.unsqueeze(1) if given else x for n, x in found.support.items()}
        density = machine.log_marginal({**support, **given}).expand(-1, 5) if given else None
        density = machine.log_marginal(support).unsqueeze(-1).expand(-1, 5) if density is None else density
        agrees = ((found.support["v"].unsqueeze(1) == found.data["v"]) | ~mask).all(-1)
        exact = torch.where(agrees, density, -torch.inf).logsumexp(0)
        bound = MeanFieldGuide(machine, 30).bound(found.data, mask=mask)
    assert (bound <= exact + 1e-9).all()
    assert (bound > exact - 1.5).all()
    svi = SVI(machine.model, MeanFieldGuide(machine, 2), pyro.optim.SGD({"lr": 0.01}), BoltzmannELBO(negative="exact"))
    assert math.isfinite(svi.step(found.data, mask=mask))


def test_missing_real_units_are_bounded_beside_spikes_and_slabs() -> None:
    found = case("spike and slab")
    machine, mask = found.machine, torch.tensor([True, False])
    axis = torch.arange(-9.0, 9.0, 0.05)
    with torch.no_grad():
        v = torch.stack(torch.broadcast_tensors(found.data["v"][:, :1], axis), -1)
        exact = machine.log_marginal({"v": v}).logsumexp(-1) + math.log(0.05)
        bound = MeanFieldGuide(machine, 30).bound(found.data, mask=mask)
    assert (bound <= exact + 1e-6).all()
    assert (bound > exact - 0.5).all()
    svi = SVI(machine.model, MeanFieldGuide(machine, 2), pyro.optim.SGD({"lr": 0.01}), BoltzmannELBO(5, 1))
    assert math.isfinite(svi.step(found.data, mask=mask))


@pytest.mark.parametrize("kind", KINDS)
def test_machines_of_all_kinds_are_fitted(kind: str) -> None:
    found = case(kind)
    loss = BoltzmannELBO(20, 2, negative="persistent" if found.machine.given is None else "contrastive")
    before = found.log_prob().mean().item()
    program = through(found.machine, "marginal" if kind == "third order" else "model")
    pplvi.fit(*program, args=(found.data,), objective=loss, num_steps=40, learning_rate=0.02, seed=0, progress=False)
    assert found.log_prob().mean().item() > before + 0.02


def test_pooled_units_are_kept_rarely_active() -> None:
    found = case("pooled")
    machine = found.machine
    loss = SparsityPenalty(0.02)
    svi = SVI(machine.model, machine.guide, pyro.optim.SGD({"lr": 0.2}), loss)
    losses = [svi.step(found.data["v"]) for _ in range(30)]
    assert losses[-1] < losses[0]
    mean = machine.guide.factorised(found.data["v"]).means["h"].mean(0)
    assert mean.max() < 0.2
    real = case("Gaussian hidden").machine
    with pytest.raises(ValueError, match="hidden layers of binary units"):
        loss.loss(real.model, real.guide, found.data["v"][:, :4])


def test_without_hidden_units_a_machine_of_means_is_a_normal_at_its_biases() -> None:
    machine = MeanProductOfStudents(2, num_covariance=3, num_mean=2)
    torch.nn.init.constant_(machine.bias_v, 0.5)
    v = torch.tensor([[1.0, -2.0]], dtype=machine.bias_v.dtype)
    torch.testing.assert_close(machine.base_energy({"v": v}), torch.tensor([3.0], dtype=v.dtype))  # 5/2 - (1/2 - 1)
