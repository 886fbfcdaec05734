"""Training deep machines: layer by layer, up-down, multi-prediction, and classifiers that start from them."""

import copy
import pickle
from itertools import pairwise

import pyro
import pytest
import torch
from models import binary
from pyro.infer import SVI, Predictive
from pyro.optim import SGD, Adam
from torch import Tensor

import pplvi
from pplvi.energies import (
    BernoulliUnits,
    BoltzmannMachine,
    CategoricalUnits,
    CopiedUnits,
    DeepBeliefNetwork,
    DeepBoltzmannMachine,
    GaussianUnits,
    MeanFieldGuide,
    RestrictedBoltzmannMachine,
    stages,
    to_classifier,
)
from pplvi.energies.learning.boltzmann_elbo import BoltzmannELBO
from pplvi.energies.learning.multi_prediction import MultiPrediction
from pplvi.energies.learning.pretraining import pretrain
from pplvi.energies.learning.up_down import UpDown

pytestmark = pytest.mark.usefixtures("float64")

PATTERNS = torch.tensor([[1, 1, 1, 0, 0, 0], [0, 0, 0, 1, 1, 1], [1, 0, 1, 0, 1, 0]]).double()


def states(width: int) -> Tensor:
    return torch.cartesian_prod(*[torch.tensor([0.0, 1.0]).double()] * width)


def scrambled(module: torch.nn.Module, scale: float = 1.0) -> None:
    for parameter in module.parameters():
        parameter.data.normal_(0.0, scale)


@pytest.fixture(scope="module")
def digits() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Binary digits of scikit-learn: training and test images and labels."""
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    v, y = (torch.as_tensor(images)[order] > 7.5).double(), torch.as_tensor(labels)[order]
    return v[:1300], y[:1300], v[1300:], y[1300:]


# ---------------------------------------------------------------------- copies


def test_copies_are_the_machine_with_every_copy_written_out() -> None:
    """An RBM with two copies of v against the machine over (v, v', h) with the same weights twice."""
    short = RestrictedBoltzmannMachine(3, 2, visible=CopiedUnits(BernoulliUnits(3)), init_scale=1.0)
    for bias in short.biases().values():
        bias.data.normal_()
    long = RestrictedBoltzmannMachine(6, 2)
    with torch.no_grad():
        long.edges()["v", "h"].copy_(torch.cat([short.weight("v", "h")] * 2))
        long.biases()["v"].copy_(torch.cat([short.bias("v")] * 2))
        long.biases()["h"].copy_(short.bias("h"))
    torch.testing.assert_close(short.log_partition(), long.log_partition())
    v = binary(5, 3)
    torch.testing.assert_close(short.free_energy(2 * v), long.free_energy(torch.cat([v, v], 1)))
    once = torch.tensor([[1.0, 0.0, 2.0]])  # the first copy or the second: two states for one sum
    both = [torch.tensor([[1.0, 0, 1, 0, 0, 1]]), torch.tensor([[0.0, 0, 1, 1, 0, 1]])]
    torch.testing.assert_close(-short.free_energy(once), torch.stack([-long.free_energy(x) for x in both]).logsumexp(0))


@pytest.mark.parametrize("units", [BernoulliUnits(3), CategoricalUnits(2, 3), GaussianUnits(3, variance=0.5)])
def test_copies_have_the_moments_and_the_entropy_of_independent_layers(units: object) -> None:
    copied, field = CopiedUnits(units, 2), torch.randn(units.width)
    draws = copied.sample(field.expand(20_000, -1))
    error = 4.5 * draws.std(0) / 20_000**0.5
    assert ((draws.mean(0) - copied.mean(field)).abs() < error).all()
    mean = copied.mean(field)
    value = copied.field_entropy(field, mean) - copied.base_energy(mean)
    torch.testing.assert_close(value, 2 * (units.entropies(mean / 2).sum() - units.base_energy(mean / 2)))


# ---------------------------------------------------------------------- layer by layer


def test_centres_of_copies_are_shared_among_them() -> None:
    dbm = DeepBoltzmannMachine([6, 5, 4])
    first, _ = stages(dbm)
    first.machine.offset("v").fill_(0.8)
    first.adopt()
    assert first.copies[0] == 2
    torch.testing.assert_close(dbm.offset("v"), torch.full((6,), 0.4))


def test_stages_of_a_deep_boltzmann_machine_double_what_comes_from_one_side() -> None:
    dbm = DeepBoltzmannMachine([6, 5, 4, 3])
    first, middle, last = stages(dbm)
    for stage in (first, middle, last):
        scrambled(stage.machine)
    v, h1, h2, h3 = (binary(7, width) for width in (6, 5, 4, 3))

    def field(stage: object, target: str, value: Tensor) -> Tensor:
        source = "v" if target == "h" else "h"
        copies = stage.copies[0 if source == "v" else 1]
        return stage.machine.field(target, {source: copies * value})

    w1, w2, w3 = (stage.machine.weight("v", "h") for stage in (first, middle, last))
    torch.testing.assert_close(field(first, "h", v), 2 * v @ w1 + first.machine.bias("h"))
    torch.testing.assert_close(field(first, "v", h1), h1 @ w1.T + first.machine.bias("v"))
    torch.testing.assert_close(field(middle, "h", h1), 2 * h1 @ w2 + middle.machine.bias("h"))
    torch.testing.assert_close(field(middle, "v", h2), 2 * h2 @ w2.T + middle.machine.bias("v"))
    torch.testing.assert_close(field(last, "h", h2), h2 @ w3 + last.machine.bias("h"))
    torch.testing.assert_close(field(last, "v", h3), 2 * h3 @ w3.T + last.machine.bias("v"))
    for stage in (first, middle, last):
        stage.adopt()
    # The composed machine: half of each side's logit.
    expected = (field(first, "h", v) + field(middle, "v", h2)) / 2
    torch.testing.assert_close(dbm.field("h1", {"v": v, "h2": h2}), expected)
    torch.testing.assert_close(dbm.field("v", {"h1": h1}), field(first, "v", h1))
    torch.testing.assert_close(dbm.field("h3", {"h2": h2}), field(last, "h", h2))


def test_pretraining_raises_the_likelihood_of_a_deep_boltzmann_machine() -> None:
    dbm, v = DeepBoltzmannMachine([6, 5, 4]), PATTERNS.repeat(20, 1)
    before = (dbm.log_marginal({"v": v}) - dbm.log_partition()).mean()
    fits = pretrain(dbm, v, num_steps=200, batch_size=20, seed=0)
    after = (dbm.log_marginal({"v": v}) - dbm.log_partition()).mean()
    assert len(fits) == 2
    assert after > before + 0.8
    assert len(pyro.get_param_store()) == 0
    again = DeepBoltzmannMachine([6, 5, 4])
    pretrain(again, v, num_steps=200, batch_size=20, seed=0)
    for name, value in dbm.state_dict().items():
        torch.testing.assert_close(again.state_dict()[name], value)


def test_pretraining_refuses_what_it_cannot_train() -> None:
    with pytest.raises(ValueError, match="threshold"):
        pretrain(DeepBoltzmannMachine([6, 5, 4]), torch.full((4, 6), 0.5))
    with pytest.raises(ValueError, match="one for each of 2 stages"):
        pretrain(DeepBoltzmannMachine([6, 5, 4]), PATTERNS, num_steps=[1, 2, 3])
    with pytest.raises(ValueError, match="DeepBeliefNetwork"):
        list(stages(RestrictedBoltzmannMachine(6, 5)))


# ---------------------------------------------------------------------- deep belief networks


def random_network() -> DeepBeliefNetwork:
    dbn = DeepBeliefNetwork([5, 4, 3, 2])
    scrambled(dbn)
    scrambled(dbn.guide)
    return dbn


def exact(dbn: DeepBeliefNetwork, v: Tensor) -> Tensor:
    """log p(v) by enumeration of h1 and h2."""
    h1, h2 = (t.reshape(-1, t.shape[-1]) for t in product(states(4), states(3)))
    terms = []
    for datum in v:
        terms.append(dbn.log_joint({"v": datum.expand(len(h1), -1), "h1": h1, "h2": h2}).logsumexp(0))
    return torch.stack(terms).detach() - dbn.top.log_partition().detach()


def product(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    return a.repeat_interleave(len(b), 0), b.repeat(len(a), 1)


def test_network_is_normalised_by_the_top_machine_alone() -> None:
    dbn = random_network()
    torch.testing.assert_close(exact(dbn, states(5)).exp().sum(), torch.ones(()))


def test_bound_is_below_the_exact_log_likelihood() -> None:
    dbn, v = random_network(), binary(6, 5)
    log_z = dbn.top.log_partition().detach()
    bound, likelihood = dbn.bound(v, log_z=log_z, num_particles=20_000), exact(dbn, v)
    assert (bound < likelihood).all()
    loss = pplvi.ELBO(num_particles=1000).loss(dbn.model, dbn.guide, v)  # the same, as a Pyro program
    assert -loss - 6 * log_z.item() == pytest.approx(bound.sum().item(), abs=0.8)
    tight = pplvi.ImportanceWeightedELBO(num_particles=1000).loss(dbn.model, dbn.guide, v)
    assert -tight - 6 * log_z.item() == pytest.approx(likelihood.sum().item(), abs=0.6)


def test_generation_is_ancestral() -> None:
    dbn = random_network()
    everything = states(5)
    p = exact(dbn, everything).exp()
    draws = dbn.generate(20_000, num_sweeps=30)
    index = (draws["v"] @ (2.0 ** torch.arange(4, -1, -1))).long()
    frequency = torch.bincount(index, minlength=32) / 20_000
    assert ((frequency - p).abs() < 4.5 * (p * (1 - p) / 20_000).sqrt() + 1e-3).all()
    assert Predictive(dbn.model, num_samples=3)(num_draws=4)["v"].shape == (3, 4, 5)


def test_gradient_of_boltzmann_elbo_is_that_of_the_bound_and_log_z() -> None:
    dbn, v = random_network(), binary(6, 5)
    parameters = [*dbn.generation.parameters(), *dbn.guide.parameters()]
    hidden = product(states(4), states(3))

    def exact_bound() -> Tensor:
        total = torch.zeros(())
        for datum in v:
            values = {"v": datum.expand(128, -1), "h1": hidden[0], "h2": hidden[1]}
            q = dbn.guide.log_density(values)
            total = total + (q.exp() * (dbn.log_joint(values) - q)).sum()
        return total

    expected = torch.autograd.grad(-exact_bound() / 6, parameters)
    elbo, found = BoltzmannELBO(negative="exact", num_particles=200), []
    for _ in range(40):
        loss = elbo.differentiable_loss(dbn.model, dbn.guide, v)
        found.append(torch.autograd.grad(loss, parameters))
    for exact_one, samples in zip(expected, zip(*found, strict=True), strict=True):
        stacked = torch.stack(samples)
        assert ((stacked.mean(0) - exact_one).abs() < 4.5 * stacked.std(0) / 40**0.5 + 1e-9).all()


def test_greedy_training_and_up_down_raise_the_likelihood() -> None:
    dbn, v = DeepBeliefNetwork([6, 5, 4]), PATTERNS.repeat(20, 1)

    def likelihood() -> float:
        h1 = states(5)
        terms = [dbn.log_joint({"v": x.expand(32, -1), "h1": h1}).logsumexp(0) for x in PATTERNS]
        return (torch.stack(terms).mean() - dbn.top.log_partition()).item()

    start = likelihood()
    pretrain(dbn, v, num_steps=400, batch_size=20, seed=0)
    greedy = likelihood()
    weight = dbn.generation.get_parameter("weight_v_h1")
    torch.testing.assert_close(dbn.guide.recognition.get_parameter("weight_v_h1"), weight)
    svi = SVI(dbn.model, dbn.guide, SGD({"lr": 0.05}), UpDown(sweeps=3))
    for _ in range(500):
        svi.step(v)
    tuned = likelihood()
    assert start < -4.0
    assert greedy > start + 0.8
    assert tuned > greedy + 0.1
    assert not torch.allclose(dbn.guide.recognition.get_parameter("weight_v_h1"), weight)  # untied


def test_gradient_of_up_down_is_that_of_wake_and_sleep() -> None:
    dbn, v = random_network(), binary(200, 5)
    generation, recognition = list(dbn.generation.parameters()), list(dbn.guide.parameters())
    loss = UpDown(sweeps=50)
    found = [
        torch.autograd.grad(loss.differentiable_loss(dbn.model, dbn.guide, v), [*generation, *recognition])
        for _ in range(60)
    ]
    wake = [-dbn.log_joint(dbn.guide.upward(v)).mean() for _ in range(60)]
    sleep = [-dbn.guide.log_density(dbn.generate(200, num_sweeps=50)).mean() for _ in range(60)]
    expected = [
        (*torch.autograd.grad(w, generation), *torch.autograd.grad(s, recognition))
        for w, s in zip(wake, sleep, strict=True)
    ]
    for mine, theirs in zip(zip(*found, strict=True), zip(*expected, strict=True), strict=True):
        a, b = torch.stack(mine), torch.stack(theirs)
        error = (a.var(0) / 60 + b.var(0) / 60).sqrt()
        assert ((a.mean(0) - b.mean(0)).abs() < 4.5 * error + 1e-9).all()


def test_network_in_fit_and_copies() -> None:
    dbn, v = DeepBeliefNetwork([6, 5, 4]), PATTERNS.repeat(5, 1)
    result = pplvi.fit(
        dbn.model,
        dbn.guide,
        args=(v,),
        objective=UpDown(2),
        optim=SGD({"lr": 0.05}),
        num_steps=20,
        seed=0,
        progress=False,
    )
    assert result.posterior(10).draws.latents["h2"].shape == (10, 15, 4)
    for again in (copy.deepcopy(dbn), pickle.loads(pickle.dumps(dbn))):
        torch.testing.assert_close(again.guide.recognition.state_dict(), dbn.guide.recognition.state_dict())
        assert again.guide.__dict__["network"] is again


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: DeepBeliefNetwork([5, 4]), "at least three layers"),
        (lambda: UpDown(0), "at least 1"),
        (lambda: DeepBeliefNetwork([5, 4, 3]).guide(), "no data"),
        (lambda: UpDown().loss(lambda v: None, lambda v: None, torch.ones(1)), "dbn.model and dbn.guide"),
        (lambda: DeepBeliefNetwork([5, 4, 3]).model(torch.ones(2, 6)), r"\(2, 6\)"),
    ],
)
def test_mistakes_with_networks_are_explained(call: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


# ---------------------------------------------------------------------- multi-prediction


def test_unit_log_probs_are_the_conditionals() -> None:
    for units in (BernoulliUnits(4), CategoricalUnits(2, 3), GaussianUnits(4, variance=0.3)):
        field = torch.randn(5, units.width)
        value = units.sample(field)
        torch.testing.assert_close(units.log_probs(field, value).sum(-1), units.conditional(field).log_prob(value))


def test_gradient_of_multi_prediction_is_that_of_its_value() -> None:
    dbm, v = DeepBoltzmannMachine([5, 4, 3], centered=False, num_labels=3, init_scale=0.7), binary(6, 5)
    y = dbm.layers["y"].encode(torch.randint(3, (6, 1)))
    guide, loss = MeanFieldGuide(dbm, 6), MultiPrediction(0.4)

    def value() -> Tensor:
        torch.manual_seed(3)
        return loss.differentiable_loss(dbm.model, guide, {"v": v, "y": y})

    parameters = {**dbm.edges(), **dbm.biases()}
    gradients = torch.autograd.grad(value(), list(parameters.values()))
    for parameter, gradient in zip(parameters.values(), gradients, strict=True):
        index = tuple(int(torch.randint(n, ())) for n in parameter.shape)
        ends = []
        for change in (1e-6, -2e-6):
            parameter.data[index] += change
            ends.append(value().item())
        parameter.data[index] += 1e-6
        assert (ends[0] - ends[1]) / 2e-6 == pytest.approx(gradient[index].item(), rel=1e-4, abs=1e-8)


def test_multi_prediction_scores_only_what_is_masked() -> None:
    dbm, v = DeepBoltzmannMachine([5, 4, 3], init_scale=0.0), binary(4000, 5)
    loss = MultiPrediction(0.7).loss(dbm.model, MeanFieldGuide(dbm, 1), v)
    assert loss == pytest.approx(0.3 * 5 * torch.log(torch.tensor(2.0)).item(), rel=0.03)


def test_multi_prediction_fills_in_digits_better_than_the_mean_image_and_tells_them_apart(
    digits: tuple[Tensor, Tensor, Tensor, Tensor],
) -> None:
    v, labels, test, truth = digits
    dbm = DeepBoltzmannMachine([64, 60, 40], num_labels=10, init_scale=0.1)
    y = dbm.layers["y"].encode(labels.unsqueeze(1))
    guide = MeanFieldGuide(dbm, 6)
    svi = SVI(dbm.model, guide, Adam({"lr": 0.02}), MultiPrediction())
    for _ in range(20):
        for index in torch.randperm(len(v)).split(50):
            svi.step({"v": v[index], "y": y[index]})
    mask = torch.rand(test.shape) < 0.5
    filled, mean_image = guide.fill_in(test, mask), v.mean(0).expand_as(test)

    def cross_entropy(p: Tensor) -> float:
        missing = p.clamp(1e-6, 1 - 1e-6)[~mask]
        return torch.nn.functional.binary_cross_entropy(missing, test[~mask]).item()

    assert cross_entropy(filled) < 0.75 * cross_entropy(mean_image)
    predicted = guide.means(test)["y"].argmax(-1)
    assert (predicted == truth).double().mean() > 0.85


def test_multi_prediction_refuses_other_guides() -> None:
    dbm = DeepBoltzmannMachine([5, 4, 3])
    with pytest.raises(ValueError, match="expected a MeanFieldGuide"):
        MultiPrediction().loss(dbm.model, lambda v: None, binary(2, 5))
    with pytest.raises(ValueError, match=r"keep=1\.0"):
        MultiPrediction(1.0)


# ---------------------------------------------------------------------- classifiers


def test_classifier_starts_with_the_features_of_mean_field() -> None:
    dbm, v = DeepBoltzmannMachine([6, 5, 4, 3], init_scale=1.0, num_labels=3), binary(7, 6)
    dbm.edges()["h3", "y"].data.zero_()
    means = MeanFieldGuide(dbm, 300).means(v)
    classifier = to_classifier(dbm, 10, iterations=300)
    for level, feature in enumerate(classifier.features(v), 1):
        torch.testing.assert_close(feature, means[f"h{level}"])
    dbm.edges()["v", "h1"].data.normal_()  # the classifier has a copy
    torch.testing.assert_close(classifier.features(v)[0], means["h1"])
    augmented = classifier.augment(v)
    torch.testing.assert_close(classifier(*augmented), classifier(v))


def test_classifier_of_a_network_starts_with_its_recognition_model() -> None:
    dbn, v = random_network(), binary(7, 5)
    value, features = v, to_classifier(dbn, 10).features(v)
    for (below, above), feature in zip(pairwise(["v", "h1", "h2"]), features, strict=False):
        recognition = dbn.guide.recognition
        weight, bias = (recognition.get_parameter(n) for n in (f"weight_{below}_{above}", f"bias_{above}"))
        value = torch.sigmoid(value @ weight + bias)
        torch.testing.assert_close(feature, value)
    torch.testing.assert_close(features[2], torch.sigmoid(dbn.top.field("h3", {"h2": value})))


def test_fine_tuning_learns_digits_and_leaves_the_machine_alone(digits: tuple[Tensor, Tensor, Tensor, Tensor]) -> None:
    v, labels, test, truth = digits
    dbm = DeepBoltzmannMachine([64, 40, 30])
    pretrain(dbm, v, num_steps=150, seed=0)
    weights = copy.deepcopy(dbm.state_dict())
    classifier = to_classifier(dbm, 10, iterations=5)
    inputs = classifier.augment(v)
    optimiser = torch.optim.Adam([p for p in classifier.parameters() if p.requires_grad], lr=0.01)
    for _ in range(12):
        for index in torch.randperm(len(v)).split(50):
            optimiser.zero_grad()
            torch.nn.functional.cross_entropy(classifier(*(x[index] for x in inputs)), labels[index]).backward()
            optimiser.step()
    assert (classifier(test).argmax(-1) == truth).double().mean() > 0.87
    for name, value in weights.items():
        assert torch.equal(classifier.machine.state_dict()[name], value)
    again = to_classifier(DeepBoltzmannMachine([64, 40, 30]), 10, iterations=5)
    missing = again.load_state_dict(classifier.state_dict(), strict=False)
    assert not [name for name in missing.missing_keys if "chain" not in name]
    torch.testing.assert_close(again(test[:5]), classifier(test[:5]))
    torch.testing.assert_close(pickle.loads(pickle.dumps(classifier))(test[:5]), classifier(test[:5]))


def test_classifiers_of_other_graphs_are_refused() -> None:
    layers = {"v": BernoulliUnits(3), "h": BernoulliUnits(3)}
    with pytest.raises(ValueError, match="chain of layers"):
        to_classifier(BoltzmannMachine(layers, [("v", "h"), ("v", "v")]), 2)
    with pytest.raises(ValueError, match="at least 2"):
        to_classifier(DeepBoltzmannMachine([3, 2]), 1)
