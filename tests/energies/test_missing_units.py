"""Boltzmann machines on data with missing units: masks of the program, of its guides and of training."""

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import pyro
import pytest
import torch
from pyro.infer import SVI, Predictive
from torch import Tensor

import pplvi
from pplvi import BoltzmannELBO, CompiledSVI, MultiPrediction
from pplvi.energies import (
    BernoulliUnits,
    BoltzmannMachine,
    DeepBoltzmannMachine,
    GaussianUnits,
    GibbsGuide,
    MeanFieldGuide,
    RecognitionGuide,
    RestrictedBoltzmannMachine,
    TAPGuide,
    annealed_importance_sampling,
    free_energy_gap,
    inpaint,
    raise_bound,
)
from pplvi.energies.machines.measures import PartlyObserved

pytestmark = pytest.mark.usefixtures("float64")

V = torch.tensor([[1.0, 0.0, 1.0, 1.0, 0.0], [0.0, 0.0, 1.0, 0.0, 1.0], [1.0, 1.0, 0.0, 0.0, 1.0]]).double()
SEEN = torch.tensor([[1, 0, 1, 0, 1], [1, 1, 0, 0, 1], [1, 1, 1, 1, 1]]).bool()
HOLES = V.masked_fill(~SEEN, torch.nan)


def randomised(machine: Any) -> Any:
    for bias in machine.biases().values():
        bias.data.normal_()
    return machine


def deep(scale: float = 0.8, **options: Any) -> DeepBoltzmannMachine:
    machine: DeepBoltzmannMachine = randomised(DeepBoltzmannMachine([5, 3, 2], init_scale=scale, **options))
    return machine


def restricted() -> RestrictedBoltzmannMachine:
    machine: RestrictedBoltzmannMachine = randomised(RestrictedBoltzmannMachine(5, 3, init_scale=0.8))
    return machine


def lateral() -> BoltzmannMachine:
    layers = {"v": BernoulliUnits(5), "h": BernoulliUnits(3)}
    machine: BoltzmannMachine = randomised(BoltzmannMachine(layers, [("v", "h"), ("v", "v")], init_scale=0.8))
    return machine


def completions(row: int) -> Tensor:
    """Every way to fill the holes of one datum."""
    holes = int((~SEEN[row]).sum())
    filled = V[row].repeat(2**holes, 1)
    if holes:
        filled[:, ~SEEN[row]] = torch.cartesian_prod(*[torch.tensor([0.0, 1.0])] * holes).reshape(2**holes, holes)
    return filled


def exact(machine: BoltzmannMachine) -> Tensor:
    """Log evidence of what is observed plus log Z, ``(num_data,)``, by enumeration."""
    return torch.stack([machine.log_marginal({"v": completions(row)}).logsumexp(0) for row in range(len(V))])


def gradients(machine: BoltzmannMachine, loss: Tensor) -> dict[Any, Tensor]:
    parameters = {**machine.edges(), **machine.biases()}
    return dict(zip(parameters, torch.autograd.grad(loss, list(parameters.values())), strict=True))


@pytest.mark.parametrize("make", [restricted, deep, lateral])
def test_elbo_of_program_and_guide_is_the_bound_of_what_is_observed(make: Callable[[], Any]) -> None:
    machine = make()
    guide = MeanFieldGuide(machine, 50)
    bound = guide.bound(HOLES, mask=SEEN)
    assert (bound <= exact(machine) + 1e-9).all()
    loss = pplvi.ELBO(num_particles=4000)
    losses = torch.tensor([-loss.loss(machine.model, guide, HOLES, mask=SEEN) for _ in range(5)])
    assert losses.mean() == pytest.approx(bound.sum().item(), abs=4.5 * losses.std().item() / 5**0.5 + 1e-6)


def test_sites_of_partly_observed_layers_hold_what_is_observed() -> None:
    dbm = deep()
    for guide in (MeanFieldGuide(dbm), TAPGuide(dbm), GibbsGuide(dbm), RecognitionGuide(dbm), None):
        drawn = Predictive(dbm.model, guide=guide, num_samples=7, parallel=True)(HOLES, mask=SEEN)["v"]
        assert drawn.shape == (7, 3, 5)
        assert torch.equal(drawn[:, SEEN], V[SEEN].expand(7, -1)), guide
        assert drawn[:, ~SEEN].unique().tolist() == [0.0, 1.0]
    posterior = pplvi.Posterior(dbm.model, MeanFieldGuide(dbm), (HOLES,), {"mask": SEEN}, num_draws=20)
    assert posterior.draws.latents["v"].shape == (20, 3, 5)


def test_gibbs_guide_draws_missing_units_from_their_posterior() -> None:
    for machine in (deep(), lateral()):
        found = GibbsGuide(machine, 30).factorised(HOLES.repeat(1000, 1), mask=SEEN.repeat(1000, 1)).means["v"]
        mean = found.reshape(1000, 3, 5).mean(0)
        for row in range(3):
            p = machine.log_marginal({"v": completions(row)}).softmax(0).detach() @ completions(row)
            assert ((mean[row] - p).abs() < 4.5 * (p * (1 - p) / 1000).sqrt() + 1e-9).all()


@pytest.mark.parametrize("make", [restricted, deep])
@pytest.mark.parametrize("through", ["its own program", "a traced program"])
def test_gradient_is_that_of_the_bound_of_what_is_observed(make: Callable[[], Any], through: str) -> None:
    machine = make()
    machine.centered = False
    guide = MeanFieldGuide(machine, 300)
    model = machine.model if through == "its own program" else lambda v, **kwargs: machine.model(v, **kwargs)
    found = gradients(machine, BoltzmannELBO(negative="exact").differentiable_loss(model, guide, HOLES, mask=SEEN))
    energy = machine.energy(guide.means(HOLES, mask=SEEN)).mean()  # the bound is stationary in the means
    for key, expected in gradients(machine, energy + machine.log_partition()).items():
        torch.testing.assert_close(found[key], expected, rtol=1e-6, atol=1e-8)


def test_value_of_the_loss_has_the_bound_of_what_is_observed() -> None:
    dbm = deep()
    guide, loss = MeanFieldGuide(dbm, 50), BoltzmannELBO(negative="exact")  # whose negative phase is always the same
    gain = (guide.bound(HOLES, mask=SEEN) - guide.bound(V)).mean().item()
    for model in (dbm.model, lambda v, **kwargs: dbm.model(v, **kwargs)):
        assert loss.loss(model, guide, V) - loss.loss(model, guide, HOLES, mask=SEEN) == pytest.approx(gain)


@pytest.mark.parametrize(
    ("loss", "optim"),
    [(BoltzmannELBO(50, 2), pyro.optim.SGD({"lr": 0.1})), (MultiPrediction(0.6), pyro.optim.Adam({"lr": 0.03}))],
    ids=["likelihood", "multi-prediction"],
)
@pytest.mark.parametrize("kind", [SVI, partial(CompiledSVI, mode="trace")], ids=["SVI", "recorded"])
def test_training_on_data_with_holes_learns_to_fill_them(loss: Any, optim: Any, kind: Callable[..., Any]) -> None:
    """Two patterns; every unit is missing in a quarter of the data."""
    pyro.set_rng_seed(0)
    patterns = torch.tensor([[1.0, 1, 1, 0, 0, 0], [0, 0, 0, 1, 1, 1]]).repeat(100, 1)
    seen = torch.rand(patterns.shape) < 0.75
    data = patterns.masked_fill(~seen, torch.nan)
    dbm = DeepBoltzmannMachine([6, 5, 4], init_scale=0.1)
    guide = MeanFieldGuide(dbm, 8)
    svi = kind(dbm.model, guide, copy.deepcopy(optim), loss)
    for _ in range(300):
        svi.step(data, mask=seen)
    enough = seen.sum(-1) >= 3
    filled = guide.fill_in(data, seen)[enough]
    assert ((filled - patterns[enough])[~seen[enough]].abs() < 0.2).double().mean() > 0.98


def test_labels_of_some_data() -> None:
    """Semi-supervised: a mask of labels alone."""
    dbm = deep(num_labels=2)
    y, known = dbm.layers["y"].encode(torch.tensor([[0], [1], [1]])), torch.tensor([[True], [False], [False]])
    means = MeanFieldGuide(dbm, 20).means({"v": V, "y": y}, mask={"y": known})
    assert torch.equal(means["y"][0], y[0])
    torch.testing.assert_close(means["y"][1:], MeanFieldGuide(dbm, 20).means(V)["y"][1:])
    assert torch.isfinite(
        torch.tensor(BoltzmannELBO(5, 1).loss(dbm.model, MeanFieldGuide(dbm), {"v": V, "y": y}, mask={"y": known}))
    )


def test_real_units_may_be_missing_too() -> None:
    rbm = RestrictedBoltzmannMachine(5, 3, visible=GaussianUnits(5, variance=0.5), init_scale=0.5)
    guide = MeanFieldGuide(rbm, 100)
    hidden = torch.cartesian_prod(*[torch.tensor([0.0, 1.0])] * 3)
    seen = SEEN[0]

    def density(h: Tensor) -> Tensor:
        """Log density of one hidden state and what is observed: the missing units integrated out."""
        field, t = rbm.field("v", {"h": h}), rbm.layers["v"].precision
        each = t * V[0] * field - t * V[0] ** 2 / 2
        missing = t * field**2 / 2 + 0.5 * torch.log(2 * torch.pi / t)
        return torch.where(seen, each, missing).sum() + h @ rbm.bias("h")

    log_evidence = torch.stack([density(h) for h in hidden]).logsumexp(0)
    bound = guide.bound(HOLES[:1], mask=SEEN[:1])
    assert log_evidence - 0.2 < bound.item() <= log_evidence


def test_partly_observed_units_have_the_density_of_the_missing_ones() -> None:
    field, known = torch.randn(4, 5), torch.tensor([True, False, True, False, False])
    for units in (BernoulliUnits(5), GaussianUnits(5, variance=0.3)):
        layer = PartlyObserved(units, field, known, torch.ones(4, 5))
        value = layer.sample()
        assert torch.equal(value[:, known], torch.ones(4, 2))
        torch.testing.assert_close(layer.log_prob(value), units.log_probs(field, value)[:, ~known].sum(-1))
        assert layer.expand((3, 4)).sample((2,)).shape == (2, 3, 4, 5)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda dbm: dbm.model(V, mask=SEEN.double()), r"float64.*booleans"),
        (lambda dbm: dbm.model(V, mask=SEEN[:2]), r"\(2, 5\).*booleans of shape \(3, 5\)"),
        (lambda dbm: dbm.model(None, mask=SEEN), "a mask without data"),
        (lambda dbm: BoltzmannELBO().loss(dbm.model, MeanFieldGuide(dbm), HOLES), r"NaN.*mask=~v\.isnan\(\)"),
        (lambda dbm: RestrictedBoltzmannMachine(5, 3).guide(V, mask=SEEN), "MeanFieldGuide"),
        (lambda dbm: RestrictedBoltzmannMachine(5, 3).guide.factorised(V, mask=SEEN), "MeanFieldGuide"),
    ],
)
def test_mistakes_with_masks_are_explained(call: Callable[[DeepBoltzmannMachine], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call(deep())


GREY = torch.full((2, 5), 0.5).double()


@pytest.mark.parametrize(
    ("v", "message"),
    [
        (GREY, r"threshold.*torch\.bernoulli.*mean_field_visible=True"),
        (torch.ones(0, 5).double(), "empty batch"),
        (torch.ones(2, 6).double(), r"\(2, 6\).*\(\*batch, 5\)"),
        (torch.full((2, 5), torch.nan).double(), r"mask=~v\.isnan\(\)"),
        (torch.ones(2, 5, dtype=torch.float32), r"float32.*float64.*machine\.like\(\)"),
        (torch.ones(2, 5, dtype=torch.uint8), r"uint8.*float64"),
    ],
    ids=["grey", "empty", "wide", "NaN", "float32", "bytes"],
)
def test_bad_data_are_refused_wherever_they_come_in(v: Tensor, message: str) -> None:
    dbm, rbm = deep(name="deep"), restricted()
    guide = MeanFieldGuide(dbm)
    calls = [
        lambda: rbm.model(v),
        lambda: BoltzmannELBO(5, 1).loss(rbm.model, rbm.guide, v),
        lambda: SVI(dbm.model, guide, pyro.optim.SGD({"lr": 0.1}), BoltzmannELBO(5, 1)).step(v),
        lambda: MultiPrediction().loss(dbm.model, guide, v),
        lambda: guide.means(v),
        lambda: guide.bound(v),
        lambda: inpaint(rbm, v, torch.ones(5).bool()),
        lambda: free_energy_gap(rbm, V, v),
        lambda: raise_bound(rbm, v, 2, 5),
        lambda: annealed_importance_sampling(rbm, 5, 5, data=v),
    ]
    for call in calls:
        with pytest.raises(ValueError, match=message):
            call()


def test_declared_means_are_taken_wherever_they_come_in() -> None:
    dbm = deep(mean_field_visible=True)
    guide = MeanFieldGuide(dbm)
    assert guide.means(GREY)["h2"].shape == (2, 2)
    losses = [loss.loss(dbm.model, guide, GREY) for loss in (BoltzmannELBO(5, 1), MultiPrediction())]
    assert torch.isfinite(torch.tensor(losses)).all()
    with pytest.raises(ValueError, match="between 0 and 1"):
        guide.means(3 * GREY)
