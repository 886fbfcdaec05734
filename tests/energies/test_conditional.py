"""Machines that are given something, sequences, classifiers, and what is refused by name."""

from collections.abc import Callable
from typing import Any

import pyro
import pytest
import torch
from pyro.infer import SVI
from torch import Tensor

import pplvi
from pplvi import BoltzmannELBO, ImportanceWeightedELBO, RestrictedBoltzmannMachine
from pplvi.energies import (
    BernoulliUnits,
    BoltzmannMachine,
    ClassificationBoltzmannMachine,
    ConditionalGuide,
    ConvolutionalBoltzmannMachine,
    DeepBoltzmannMachine,
    EnergyModel,
    FactoredCoupling,
    GatedBoltzmannMachine,
    MeanCovarianceMachine,
    MeanFieldGuide,
    PooledUnits,
    RecognitionGuide,
    RecurrentTemporalMachine,
    RNNBoltzmannMachine,
    SpikeSlabUnits,
    TAPGuide,
    TemperedChains,
    annealed_importance_sampling,
    chain_mixing,
    free_energy_gap,
    inpaint,
    plot_filters,
    raise_bound,
)
from pplvi.energies.machines.recurrent import SequenceMachine

pytestmark = pytest.mark.usefixtures("float64")

V = torch.tensor([[1.0, 1.0, 0.0, 0.0], [0.0, 1.0, 1.0, 0.0], [1.0, 1.0, 1.0, 1.0]], dtype=torch.float64)
GIVEN = torch.tensor([[0.5, -1.0, 2.0], [1.0, 0.0, 0.0], [-0.5, 0.3, 1.0]], dtype=torch.float64)


def conditional(**options: Any) -> RestrictedBoltzmannMachine:
    pyro.clear_param_store()
    torch.manual_seed(0)
    return RestrictedBoltzmannMachine(4, 3, given=3, init_scale=0.7, **options)


def exact(machine: RestrictedBoltzmannMachine, v: Tensor, given: Tensor) -> Tensor:
    return machine.distribution(given=given).log_prob(v)


def test_the_gradient_reaches_what_is_given() -> None:
    machine, given = conditional(), GIVEN.clone().requires_grad_()
    (wanted,) = torch.autograd.grad(-exact(machine, V, given).mean(), given)
    loss = BoltzmannELBO(negative="exact").differentiable_loss(machine.model, machine.guide, V, given=given)
    torch.testing.assert_close(torch.autograd.grad(loss, given)[0], wanted)


@pytest.mark.parametrize("centered", [True, False])
def test_the_short_way_has_the_conditional_gradient(centered: bool) -> None:
    machine = conditional(centered=centered)
    parameters = dict(machine.named_parameters())
    wanted = torch.autograd.grad(-exact(machine, V, GIVEN).mean(), list(parameters.values()))
    loss = BoltzmannELBO(negative="exact").differentiable_loss(machine.model, machine.guide, V, given=GIVEN)
    found = torch.autograd.grad(loss, list(parameters.values()))
    for name, mine, theirs in zip(parameters, found, wanted, strict=True):
        if not centered or name.startswith("weight_given"):  # what is given is not centered
            torch.testing.assert_close(mine, theirs, msg=lambda text, name=name: f"{name}: {text}")


def test_centering_and_adam_learn_what_depends_on_much_that_is_given() -> None:
    torch.manual_seed(0)
    given = (torch.rand(300, 60) < 0.8).double()
    v = given[:, :4]
    found = []
    for centered in (True, False):
        pyro.clear_param_store()
        torch.manual_seed(1)
        machine = RestrictedBoltzmannMachine(4, 3, given=60, centered=centered)
        loss = BoltzmannELBO(negative="exact")
        svi = SVI(machine.model, machine.guide, pyro.optim.Adam({"lr": 0.02}), loss)
        for _ in range(40):
            svi.step(v, given=given)
        found.append(exact(machine, v, given).mean().item())
    assert min(found) > -1.9  # independent fair coins have -2.77
    assert found[0] > found[1] - 0.2


def test_draws_and_programs_are_conditional() -> None:
    machine = conditional()
    p = machine.distribution(given=GIVEN, num_sweeps=30)
    torch.testing.assert_close(p.log_prob(p.enumerate_support()).exp().sum(0), torch.ones(3))
    draws = p.sample((3000,))
    mean = (p.log_prob(p.enumerate_support()).exp().unsqueeze(-1) * p.enumerate_support()).sum(0)
    assert ((draws.mean(0) - mean).abs() < 4.5 * (mean * (1 - mean) / 3000).sqrt()).all()
    assert machine.model(given=GIVEN)["v"].shape == (3, 4)
    pair = pplvi.ELBO(num_particles=2).loss(machine.model, machine.guide, V, given=GIVEN)
    assert pair == pytest.approx(machine.free_energy(V, given=GIVEN).sum().item())
    fit = pplvi.fit(
        machine.model,
        machine.guide,
        args=({"v": V, "given": GIVEN},),
        objective=BoltzmannELBO(negative="contrastive", sweeps=1),
        num_steps=5,
        progress=False,
    )
    assert torch.as_tensor(fit.losses).isfinite().all()


def test_missing_units_are_filled_in_given_the_rest() -> None:
    machine, mask = conditional(), torch.tensor([True, False, True, True])
    states = V.unsqueeze(0).repeat(2, 1, 1)
    states[0, :, 1], states[1, :, 1] = 0.0, 1.0
    chance = exact(machine, states, GIVEN).detach().softmax(0)[1]
    found = inpaint(machine, {"v": V, "given": GIVEN}, mask, num_sweeps=200, num_draws=60, seed=0)
    assert ((found[:, 1] - chance).abs() < 0.05).all()
    assert MeanFieldGuide(machine).fill_in(V, mask, GIVEN).shape == V.shape
    gap = free_energy_gap(machine, {"v": V, "given": GIVEN}, {"v": V, "given": GIVEN})
    assert gap.value == 0.0
    assert chain_mixing(machine, 3, 20, start={"given": GIVEN}, seed=0).free_energy.shape == (3, 20)


# ---------------------------------------------------------------------- sequences


SEQUENCES = {
    "RNN-RBM": lambda: RNNBoltzmannMachine(3, 2, num_state=4, init_scale=0.5),
    "RTRBM": lambda: RecurrentTemporalMachine(3, 2, init_scale=0.5),
}


@pytest.mark.parametrize("kind", SEQUENCES)
def test_sequences_have_the_gradient_of_the_exact_likelihood(kind: str) -> None:
    pyro.clear_param_store()
    torch.manual_seed(0)
    model: SequenceMachine = SEQUENCES[kind]()
    v, mask = (torch.rand(2, 4, 3) < 0.5).double(), torch.tensor([[True] * 4, [True, True, False, False]])
    density = exact(model.machine, v, model.states(v))
    parameters = dict(model.named_parameters())
    wanted = torch.autograd.grad(-(density * mask).sum(), list(parameters.values()), allow_unused=True)
    loss = BoltzmannELBO(negative="exact", per_datum=False).differentiable_loss(model.model, model.guide, v, mask)
    found = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
    for name, mine, theirs in zip(parameters, found, wanted, strict=True):
        torch.testing.assert_close(mine, theirs, msg=lambda text, name=name: f"{name}: {text}")
    assert wanted[list(parameters).index("start")].abs().sum() > 0
    frames = model.frames(v, mask)
    torch.testing.assert_close(exact(model.machine, frames["v"], frames["given"]), density[mask])


def test_compiled_sequences_are_eager_ones() -> None:
    found = []
    for kind in (SVI, lambda *args: pplvi.CompiledSVI(*args, mode="trace")):
        pyro.clear_param_store()
        torch.manual_seed(0)
        model, v = SEQUENCES["RNN-RBM"](), (torch.rand(2, 3, 3) < 0.5).double()
        svi = kind(model.model, model.guide, pyro.optim.SGD({"lr": 0.1}), BoltzmannELBO(2, 1, negative="contrastive"))
        pyro.set_rng_seed(1)
        found.append([svi.step(v, torch.ones(2, 3, dtype=torch.bool)) for _ in range(4)])
    assert found[0] == pytest.approx(found[1], rel=1e-9)


# ---------------------------------------------------------------------- labels


def labelled() -> ClassificationBoltzmannMachine:
    pyro.clear_param_store()
    torch.manual_seed(0)
    return ClassificationBoltzmannMachine(4, 3, num_labels=3, init_scale=0.7)


def test_labels_have_their_exact_probabilities() -> None:
    machine, y = labelled(), torch.tensor([0, 2, 1])
    joint = torch.stack([machine.log_marginal({"v": V, "y": torch.eye(3)[k].expand(3, 3)}) for k in range(3)], -1)
    torch.testing.assert_close(machine.label_logits(V).log_softmax(-1), joint.log_softmax(-1))
    nll = -joint.log_softmax(-1)[torch.arange(3), y].sum()
    assert pplvi.ELBO().loss(machine.classify, machine.marginal_guide, V, y) == pytest.approx(nll.item())
    assert machine.classify(V).shape == (3,)


def test_hybrid_training_adds_a_share_of_the_joint_likelihood() -> None:
    machine, y = labelled(), torch.tensor([0, 2, 1])
    values = {"v": V, "y": torch.eye(3)[y]}
    density = machine.log_marginal(values) - machine.log_partition()
    own = machine.label_logits(V).log_softmax(-1)[torch.arange(3), y]
    parameters = list(machine.parameters())
    wanted = torch.autograd.grad(-(own + 0.3 * density).sum(), parameters)
    loss = BoltzmannELBO(negative="exact", per_datum=False)
    value = loss.differentiable_loss(lambda v, y: machine.hybrid(v, y, generative=0.3), machine.marginal_guide, V, y)
    for mine, theirs in zip(torch.autograd.grad(value, parameters), wanted, strict=True):
        torch.testing.assert_close(mine, theirs)


# ---------------------------------------------------------------------- faults


class Doubled(RestrictedBoltzmannMachine):
    """A product of its own, with a parameter that no coupling has."""

    def __init__(self) -> None:
        super().__init__(4, 3, init_scale=0.7, centered=False)
        self.gain = torch.nn.Parameter(torch.tensor(1.5))

    def weight_of(self) -> Tensor:
        return self._parameters["gain"] * self.edges()["v", "h"]

    def contributions(self, layer: str, values: Any, known: Any = ()) -> Any:
        other = "h" if layer == "v" else "v"
        if other in values and other not in known:
            yield frozenset({other}), values[other] @ (self.weight_of() if other == "v" else self.weight_of().T)

    def log_density(self, values: Any) -> Tensor:
        total = sum(values[n] @ self.bias(n) for n in values)
        return total + (values["v"] @ self.weight_of() * values["h"]).sum(-1) if len(values) == 2 else total


def test_a_subclass_with_its_own_product_trains_all_that_it_has() -> None:
    pyro.clear_param_store()
    machine = Doubled()
    parameters = dict(machine.named_parameters())
    wanted = torch.autograd.grad(-machine.distribution().log_prob(V).mean(), list(parameters.values()))
    loss = BoltzmannELBO(negative="exact").differentiable_loss(machine.model, machine.guide, V)
    found = torch.autograd.grad(loss, list(parameters.values()))
    for name, mine, theirs in zip(parameters, found, wanted, strict=True):
        torch.testing.assert_close(mine, theirs, msg=lambda text, name=name: f"{name}: {text}")


def test_tempered_real_units_stay_finite() -> None:
    pyro.clear_param_store()
    machine = RestrictedBoltzmannMachine(3, 2, visible="gaussian")
    loss = BoltzmannELBO(negative=TemperedChains(5, 1, num_temperatures=3, lowest=0.3))
    svi = SVI(machine.model, machine.guide, pyro.optim.SGD({"lr": 0.01}), loss)
    assert all(torch.tensor(svi.step(torch.randn(6, 3))).isfinite() for _ in range(10))


def test_weights_of_missing_real_units_have_the_gradient_of_their_bound() -> None:
    """The posterior of missing Gaussian units is a distribution whose variance is held."""
    pyro.clear_param_store()
    torch.manual_seed(0)
    machine = RestrictedBoltzmannMachine(3, 2, visible="gaussian", init_scale=0.0, centered=False)
    mask = torch.tensor([True, True, False])
    v = torch.randn(5, 3)
    svi = SVI(machine.model, MeanFieldGuide(machine), pyro.optim.SGD({"lr": 0.0}), BoltzmannELBO(negative="exact"))
    svi.loss_and_grads(machine.model, MeanFieldGuide(machine), v, mask=mask)
    gradient = machine.layers["v"].log_precision.grad
    torch.testing.assert_close(gradient[2], torch.zeros(()))  # nothing is known of it: it learns nothing
    torch.testing.assert_close(gradient[:2], (v[:, :2] ** 2).mean(0) / 2 - 0.5)


def wide() -> RestrictedBoltzmannMachine:
    units = SpikeSlabUnits(3, precision=0.1)
    return RestrictedBoltzmannMachine(2, 3, visible="gaussian", hidden=units, centered=False, init_scale=1.0)


def step(machine: EnergyModel, negative: Any, **given: Any) -> float:
    svi = SVI(machine.model, machine.guide, pyro.optim.SGD({"lr": 0.1}), BoltzmannELBO(negative=negative))
    return svi.step(V, **given)


def three() -> BoltzmannMachine:
    layers = {"v": BernoulliUnits(2), "x": BernoulliUnits(2), "h": BernoulliUnits(2)}
    return BoltzmannMachine(layers, [FactoredCoupling(("v", "x", "h"), (2, 2, 2), 3)], centered=False)


REFUSED: dict[str, tuple[Callable[[], Any], str]] = {
    "persistent": (lambda: step(conditional(), "persistent", given=GIVEN), "every datum has its own distribution"),
    "fast": (lambda: step(conditional(), "fast", given=GIVEN), "every datum has its own distribution"),
    "tempered": (lambda: step(conditional(), "tempered", given=GIVEN), "every datum has its own distribution"),
    "nothing given": (lambda: step(conditional(), "contrastive"), "expected 'given' among them"),
    "given to another": (lambda: RestrictedBoltzmannMachine(4, 2).model(V, given=GIVEN), "expected no 'given'"),
    "another width": (lambda: conditional().model(V, given=GIVEN[:, :2]), r"expected \(\*batch, 3\)"),
    "a mask of it": (
        lambda: conditional().model(V, given=GIVEN, mask={"given": GIVEN > 0}),
        "has to be known",
    ),
    "a layer of that name": (lambda: BoltzmannMachine({"given": BernoulliUnits(2)}, []), "given=WIDTH"),
    "no width": (lambda: BoltzmannMachine({"v": BernoulliUnits(2)}, [("given", "v")]), "given=WIDTH"),
    "width 0": (lambda: RestrictedBoltzmannMachine(2, 2, given=0), "given=0"),
    "log Z": (lambda: conditional().log_partition(), "expected 'given' among them"),
    "AIS without it": (lambda: annealed_importance_sampling(conditional(), 5, 5), "expected 'given' among them"),
    "AIS, base rate": (
        lambda: annealed_importance_sampling(conditional(), 5, 5, base_rate=V[0], data={"given": GIVEN}),
        "base_rate= of a conditional machine",
    ),
    "AIS, samples": (
        lambda: annealed_importance_sampling(conditional(), 5, 5, samples=V, data={"given": GIVEN}),
        "samples= of a conditional machine",
    ),
    "AIS, moments": (
        lambda: annealed_importance_sampling(conditional(), 5, 5, path="moment_averaged", data={"given": GIVEN}),
        "moment-averaged path of a machine that is conditional",
    ),
    "AIS without fields": (
        lambda: annealed_importance_sampling(EnergyModel({"v": BernoulliUnits(2)}, centered=False, name=""), 5, 5),
        "machine is a EnergyModel",
    ),
    "AIS, three groups": (lambda: annealed_importance_sampling(three(), 5, 5), "expected two groups"),
    "AIS, no density": (lambda: annealed_importance_sampling(wide(), 5, 5), "no finite normaliser"),
    "RAISE without fields": (lambda: raise_bound(three(), V[:, :2]), "expected two groups"),
    "tempered real units": (
        lambda: step(RestrictedBoltzmannMachine(4, 2, visible="gaussian"), "tempered"),
        "lowest=0 with layers .'v'. that have a continuum",
    ),
    "centered convolution": (
        lambda: BoltzmannMachine(
            {"v": BernoulliUnits(2), "x": BernoulliUnits(2), "h": BernoulliUnits(2)},
            [FactoredCoupling(("v", "x", "h"), (2, 2, 2), 3)],
        ),
        "that are not dense: expected centered=False",
    ),
    "blocks": (lambda: PooledUnits(2, (3, 4), pool=2), "expected a divisor of both"),
    "filters": (lambda: ConvolutionalBoltzmannMachine((1, 3, 3), maps=2, filter_size=4), "filter_size=4"),
    "two in a block": (
        lambda: PooledUnits(1, (2, 2)).check(torch.ones(1, 4), "h"),
        "two units that are on in one block",
    ),
    "a matrix of filters": (
        lambda: ConvolutionalBoltzmannMachine((1, 3, 3), maps=2, filter_size=2).weight("v", "h"),
        "has no matrix of weights",
    ),
    "norms of filters": (
        lambda: ConvolutionalBoltzmannMachine((1, 3, 3), maps=2, filter_size=2).limit_norms(1.0),
        "limits no norms",
    ),
    "TAP of filters": (lambda: TAPGuide(ConvolutionalBoltzmannMachine((1, 3, 3), maps=2, filter_size=2)), "Bernoulli"),
    "TAP of gates": (lambda: TAPGuide(GatedBoltzmannMachine(2, 2, given=2, num_factors=2)), "expected DenseCoupling"),
    "recognition": (lambda: RecognitionGuide(conditional()), "use MeanFieldGuide"),
    "recognition of gates": (
        lambda: RecognitionGuide(GatedBoltzmannMachine(2, 2, given=2, num_factors=2)),
        "expected DenseCoupling",
    ),
    "units apart": (
        lambda: MeanCovarianceMachine(4, num_covariance=2, num_mean=2).gibbs({"v": V}, clamped={"v": V > 0}),
        "single units of MeanCovarianceMachine",
    ),
    "no units": (lambda: MeanCovarianceMachine(4, num_covariance=0, num_mean=2), "num_covariance=0"),
    "no step": (lambda: MeanCovarianceMachine(4, num_covariance=1, num_mean=2, step_size=0.0), "step_size=0.0"),
    "precision": (lambda: SpikeSlabUnits(2, precision=0.0), "precision=0.0"),
    "labels unknown": (lambda: labelled().guide.factorised(V), "data without values of the layers .'y'."),
    "hybrid of nothing": (lambda: labelled().hybrid(V, torch.tensor([0, 1, 2]), generative=0.0), "generative=0.0"),
    "sequences": (lambda: SEQUENCES["RTRBM"]().model(V), "num_sequences, time, width"),
    "a joint pair": (lambda: ConditionalGuide(DeepBoltzmannMachine([3, 2, 2])), "is not factorised"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_cannot_be_is_refused_by_name(what: str) -> None:
    pyro.clear_param_store()
    call, words = REFUSED[what]
    with pytest.raises(ValueError, match=words):
        call()


def test_machines_without_fields_have_monitors_and_pictures() -> None:
    machine = MeanCovarianceMachine(2, num_covariance=3, num_mean=2, num_leapfrog=3)
    assert chain_mixing(machine, 3, 10, seed=0).free_energy.shape == (3, 10)
    x = torch.randn(5, 2)
    assert free_energy_gap(machine, x, x).value == 0.0
    filters = ConvolutionalBoltzmannMachine((1, 4, 4), maps=3, filter_size=3, pool=1)
    assert len(plot_filters(filters, columns=3).axes) == 3


def test_particles_of_a_conditional_posterior_bound_the_same() -> None:
    machine = conditional()
    found = ImportanceWeightedELBO(3).loss(machine.model, machine.guide, V, given=GIVEN)
    assert found == pytest.approx(machine.free_energy(V, given=GIVEN).sum().item())


def test_the_likelihood_goes_without_raise() -> None:
    machine, data = conditional(), {"v": V, "given": GIVEN}
    plain = annealed_importance_sampling(machine, 20, 10, data=data, num_raise_chains=0, seed=0)
    both = annealed_importance_sampling(machine, 20, 10, data=data, num_raise_chains=2, seed=0)
    assert plain.log_likelihood == both.log_likelihood
    assert plain.log_likelihood_bound is None
    assert both.log_likelihood_bound[0] < 0
