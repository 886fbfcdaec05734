"""Networks that say at once what inference finds in many steps."""

import copy
import pickle
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor, nn

import pplvi
from pplvi import (
    LISTA,
    AutoAmortized,
    AutoProximal,
    BinaryMeanField,
    BinarySparseCoding,
    PredictionPenalty,
    RecognitionGuide,
    RecognitionLoss,
    SparseCoding,
)
from pplvi.energies import DeepBoltzmannMachine
from pplvi.guides.search.lasso import solve

pytestmark = pytest.mark.usefixtures("float64")


def problem(count: int = 400) -> tuple[SparseCoding, Tensor]:
    """Sparse coding with a known dictionary, and data of it."""
    pyro.set_rng_seed(0)
    coding = SparseCoding(12, 20, penalty=0.2)
    coding.requires_grad_(False)
    codes = torch.randn(count, 20) * (torch.rand(count, 20) < 0.1)
    return coding, codes @ coding.dictionary.T + 0.05 * torch.randn(count, 12)


def excess(coding: SparseCoding, v: Tensor, codes: Tensor) -> float:
    lasso = coding.lasso(v)
    return float((lasso.value(codes) - lasso.value(solve(lasso, tol=1e-10).codes)).mean())


def test_untrained_layers_are_iterations_of_ista() -> None:
    coding, v = problem(30)
    lasso = coding.lasso(v)
    for layers in (0, 1, 4):
        expected = solve(lasso, "ista", max_iterations=layers + 1).codes
        torch.testing.assert_close(LISTA(coding.dictionary, layers, 0.2)(v).detach(), expected)


def lista(coding: SparseCoding, network: nn.Module) -> Any:
    return lambda model: AutoAmortized(model, network, plates="data", family="delta")


def test_lista_learns_the_codes_in_minibatches() -> None:
    coding, v = problem(600)
    train, test = v[:500], v[500:]
    network = LISTA(coding.dictionary, 3, 0.2)
    before = excess(coding, test, network(test).detach())
    batches = [train[i : i + 100] for i in range(0, 500, 100)]
    fit = pplvi.fit(
        coding.model, lista(coding, network), data=batches, num_steps=80, learning_rate=1e-2, seed=0, progress=False
    )
    codes = fit.guide.median(test)["h"]
    torch.testing.assert_close(codes, network(test).detach())
    assert excess(coding, test, codes) < 0.5 * before
    report = fit.summary(args=(test,))
    assert "at a point" in " ".join(report.split())


def positive(x: Tensor) -> None:
    with pyro.plate("data", len(x)):
        rate = pyro.sample("rate", dist.Gamma(3.0, 1.0))
        pyro.sample("x", dist.Poisson(rate), obs=x)


class Free(nn.Module):
    """Numbers of their own for every datum."""

    def __init__(self, count: int) -> None:
        super().__init__()
        self.free = nn.Parameter(torch.zeros(count, 1))

    def forward(self, x: Tensor) -> Tensor:
        return self.free


def test_a_point_is_at_the_mode_of_the_density_as_it_is() -> None:
    """Not of that of its logarithm: ``Gamma(3 + x, 2)`` has its mode at ``(2 + x) / 2``."""
    x = torch.tensor([0.0, 2.0, 5.0])
    make = lambda model: AutoAmortized(model, Free(3), plates="data", family="delta")  # noqa: E731
    fit = pplvi.fit(positive, make, args=(x,), num_steps=400, learning_rate=0.05, progress=False)
    torch.testing.assert_close(fit.guide.median(x)["rate"], (2 + x) / 2, rtol=1e-3, atol=0)
    loss = pplvi.ELBO().loss(positive, fit.guide, x)
    mode = (2 + x) / 2
    expected = dist.Gamma(3.0, 1.0).log_prob(mode) + dist.Poisson(mode).log_prob(x)
    assert -loss == pytest.approx(float(expected.sum()), abs=1e-4)
    with pytest.raises(ValueError, match="point"):
        _ = fit.posterior(10).log_evidence


def test_guides_of_points_do_not_share_parameters_and_can_be_copied() -> None:
    x = torch.tensor([0.0, 2.0, 5.0])
    first, second = (AutoAmortized(positive, Free(3), plates="data", family="delta") for _ in range(2))
    first(x), second(x)
    with torch.no_grad():
        first.encoder.free.add_(1.0)
    assert not torch.equal(first(x)["rate"], second(x)["rate"])
    torch.testing.assert_close(copy.deepcopy(first)(x)["rate"], first(x)["rate"])
    assert isinstance(pickle.loads(pickle.dumps(first)), AutoAmortized)


def test_points_that_cannot_be() -> None:
    x = torch.tensor([0.0, 2.0, 5.0])
    with pytest.raises(ValueError, match="gave 2 numbers for each element: family='delta' expects the 1"):
        AutoAmortized(positive, nn.Sequential(nn.Unflatten(-1, (-1, 1)), nn.Linear(1, 2)), "data", family="delta")(x)
    with pytest.raises(ValueError, match="without a density"):
        pplvi.AutoSemiDAIS(AutoAmortized(positive, Free(3), "data", family="delta"))
    with pytest.raises(ValueError, match="for the encoder of an AutoAmortized"):
        pplvi.AutoHierarchical(positive, "data", family="delta")
    for wrong in ({"num_layers": -1}, {"penalty": 0.0}, {"dictionary": torch.zeros(3)}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            LISTA(**{"dictionary": torch.eye(3), "num_layers": 1, **wrong})


# ---------------------------------------------------------------------- predictive sparse decomposition


def test_codes_that_are_predicted_give_in_to_the_prediction() -> None:
    coding, v = problem(20)
    encoder = nn.Linear(12, 20)
    target = encoder(v).detach()
    free, bound = (
        AutoProximal(program, "h", tol=1e-10)(v)["h"]
        for program in (coding.model, PredictionPenalty(coding.model, encoder, weight=100.0))
    )
    assert (bound - target).norm() < 0.1 * (free - target).norm()


def test_an_encoder_that_is_trained_with_the_dictionary_predicts_the_codes() -> None:
    pyro.set_rng_seed(1)
    _, v = problem(150)
    coding = SparseCoding.from_data(v, 20, penalty=0.2)
    encoder = LISTA(coding.dictionary, 1, 0.2)
    program = PredictionPenalty(coding.model, encoder, weight=0.5)
    before = (coding.codes(v) - encoder(v).detach()).square().sum(1).mean()
    start = coding.objective(v, coding.codes(v)).mean().item()
    options = {"num_steps": 30, "learning_rate": 0.02, "progress": False}
    fit = pplvi.fit(program, lambda model: AutoProximal(model, "h"), args=(v,), **options)
    assert fit.losses[0, -1] < fit.losses[0, 0]
    assert coding.objective(v, coding.codes(v)).mean().item() < start
    assert (coding.codes(v) - encoder(v).detach()).square().sum(1).mean() < 0.6 * before
    amortized = AutoAmortized(coding.model, encoder, plates="data", family="delta")
    torch.testing.assert_close(amortized(v)["h"].detach(), encoder(v).detach())


def test_wrong_predictions_are_told() -> None:
    coding, v = problem(5)
    with pytest.raises(ValueError, match=r"predicts \(5, 3\) for site 'h'"):
        PredictionPenalty(coding.model, nn.Linear(12, 3))(v)
    with pytest.raises(ValueError, match="no site 'z'"):
        PredictionPenalty(coding.model, nn.Linear(12, 20), "z")(v)
    with pytest.raises(ValueError, match="weight=0"):
        PredictionPenalty(coding.model, nn.Linear(12, 20), weight=0)
    with pytest.raises(ValueError, match=r"expected a torch\.nn\.Module"):
        PredictionPenalty(coding.model, lambda v: v)


# ---------------------------------------------------------------------- recognition networks


def test_a_network_learns_the_mean_field_of_binary_codes() -> None:
    torch.manual_seed(0)
    coding = BinarySparseCoding(10, 5)
    v = coding.model(size=300).detach()
    guide = BinaryMeanField(coding, network=nn.Linear(10, 5))
    means = guide.means(v)
    before = guide.divergence(v).mean().item()
    weight = coding.weight.detach().clone()
    fit = pplvi.fit(
        coding.model, guide, args=(v,), objective=RecognitionLoss(), num_steps=100, learning_rate=0.1, progress=False
    )
    assert fit.losses[0, -1] / 300 < 0.3 * before
    assert torch.equal(weight, coding.weight.detach())
    at_once = BinaryMeanField(coding, 0, network=guide.network)
    assert (at_once.means(v) - means).abs().mean() < 0.1
    assert (at_once.bound(v) <= guide.bound(v) + 1e-9).all()
    assert (BinaryMeanField(coding).bound(v) - at_once.bound(v)).mean() < 0.3


def test_the_same_loss_trains_the_network_of_a_boltzmann_machine() -> None:
    pyro.set_rng_seed(0)
    machine = DeepBoltzmannMachine([6, 4, 3], init_scale=1.0)
    v = (torch.rand(60, 6) < 0.5).double()
    guide = RecognitionGuide(machine, iterations=20)
    before = guide.divergence(v).sum().item()
    options: dict[str, Any] = {"num_steps": 60, "learning_rate": 0.02, "progress": False}
    fit = pplvi.fit(machine.model, guide, args=(v,), objective=RecognitionLoss(), **options)
    assert fit.losses[0, 0] == pytest.approx(before)
    assert fit.losses[0, -1] < 0.7 * before


def test_guides_without_a_network_are_refused() -> None:
    coding = BinarySparseCoding(4, 2)
    v = torch.randn(3, 4)
    with pytest.raises(ValueError, match="no network"):
        RecognitionLoss().loss(coding.model, BinaryMeanField(coding), v)
    with pytest.raises(ValueError, match=r"function has no divergence\(\)"):
        RecognitionLoss().loss(coding.model, lambda v: None, v)
    with pytest.raises(ValueError, match="expected log odds"):
        BinaryMeanField(coding, network=nn.Linear(4, 3)).means(v)
    with pytest.raises(ValueError, match="sweeps=0"):
        BinaryMeanField(coding, 0)
