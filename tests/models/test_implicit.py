"""Models without density: what a discrepancy sees, what both players learn, and what is refused."""

import math
from collections.abc import Callable
from typing import Any

import pyro
import pytest
import torch
from torch import Tensor, nn

import pplvi
from pplvi import Adversarial, Generator, MomentMatching
from pplvi.models import maximum_mean_discrepancy


def test_discrepancy_is_zero_only_for_equal_distributions() -> None:
    """Means of 100 unbiased estimates: zero within four standard errors; ten from it where two moments agree."""

    def estimates(other: Callable[[int], Tensor]) -> Tensor:
        pairs = [(torch.randn(100, 1), other(100)) for _ in range(100)]
        return torch.stack([maximum_mean_discrepancy(x, y, [0.5, 1.0]) for x, y in pairs])

    same = estimates(lambda n: torch.randn(n, 1))
    shape = estimates(lambda n: torch.randn(n, 1).sign() + 0.1 * torch.randn(n, 1))
    error = same.std() / 10
    assert same.mean().abs() < 4 * error
    assert (same < 0).float().mean() > 0.3  # unbiased: as often below zero
    assert shape.mean() > 10 * error


def test_discrepancy_is_its_definition() -> None:
    x, y = torch.randn(4, 2), torch.randn(3, 2)

    def kernel(a: Tensor, b: Tensor) -> Tensor:
        return sum((torch.exp(-(a - b).square().sum() / (2 * s * s)) for s in (1.0, 2.0)), torch.tensor(0.0))

    within = sum(kernel(a, b) for i, a in enumerate(x) for j, b in enumerate(x) if i != j) / 12
    within += sum(kernel(a, b) for i, a in enumerate(y) for j, b in enumerate(y) if i != j) / 6
    across = sum(kernel(a, b) for a in x for b in y) / 12
    torch.testing.assert_close(maximum_mean_discrepancy(x, y, [1.0, 2.0]), within - 2 * across)


@pytest.mark.parametrize("compiled", [False, "trace"])
def test_moment_matching_moves_draws_to_the_data(compiled: Any) -> None:
    x = 3.0 + 0.5 * torch.randn(100, 2)
    generator = Generator(nn.Linear(2, 2), 2)
    run = pplvi.fit(
        generator.model,
        generator.guide,
        args=(x,),
        objective=MomentMatching([1.0, 3.0]),
        num_steps=250,
        learning_rate=0.05,
        compile=compiled,
        seed=0,
        progress=False,
    )
    assert run.objective.monitor is None
    draws = generator.sample(500)
    assert (draws.mean(0) - 3.0).abs().max() < 0.2
    assert (draws.std(0) - 0.5).abs().max() < 0.2


@pytest.mark.parametrize("saturating", [False, True])
def test_each_player_has_the_gradient_of_its_own_loss(saturating: bool) -> None:
    generator, judge = Generator(nn.Linear(2, 3), 2), nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1))
    x = torch.randn(6, 3)

    def guide(x: Tensor) -> Tensor:
        return pyro.module("judge", judge)(x).squeeze(-1)

    pyro.set_rng_seed(0)
    Adversarial(saturating=saturating).differentiable_loss(generator.model, guide, x).backward()
    parts = [*generator.parameters()], [*judge.parameters()]
    found = [[p.grad.clone() for p in part] for part in parts]
    pyro.set_rng_seed(0)
    draws = generator.model(x)
    real, fake = torch.sigmoid(guide(x)), torch.sigmoid(guide(draws))
    judged = -real.log().mean() - (1 - fake).log().mean()
    fooled = (1 - fake).log().mean() if saturating else -fake.log().mean()
    expected = [torch.autograd.grad(fooled, parts[0], retain_graph=True), torch.autograd.grad(judged, parts[1])]
    for one, other in zip([*found[0], *found[1]], [*expected[0], *expected[1]], strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


def test_the_best_discriminator_is_the_ratio_of_densities() -> None:
    """Against a fixed model with p = N(1, 1) and q = N(0, 1): D = p / (p + q), and log 4 where both are equal."""
    x = 1.0 + torch.randn(4000, 1)
    generator = Generator(nn.Identity(), 1)

    def ratio(x: Tensor) -> Tensor:
        slope, shift = pyro.param("slope", torch.tensor(0.0)), pyro.param("shift", torch.tensor(0.0))
        return slope * x[:, 0] + shift

    loss = Adversarial()
    assert loss.loss(generator.model, ratio, x) == pytest.approx(math.log(4.0))
    svi = pyro.infer.SVI(generator.model, ratio, pyro.optim.Adam({"lr": 0.05}), loss)
    for _ in range(150):
        svi.step(x)
    assert pyro.param("slope").item() == pytest.approx(1.0, abs=0.1)  # log p / q = x - 1/2
    assert pyro.param("shift").item() == pytest.approx(-0.5, abs=0.1)


def test_players_have_optimisers_of_their_own() -> None:
    generator, judge, x = Generator(nn.Linear(2, 2), 2), nn.Linear(2, 1), torch.randn(20, 2)
    before = [p.clone() for p in generator.parameters()], [p.clone() for p in judge.parameters()]

    def guide(x: Tensor) -> Tensor:
        return pyro.module("judge", judge)(x).squeeze(-1)

    two = {"model": pyro.optim.Adam({"lr": 0.0}), "guide": pyro.optim.Adam({"lr": 0.1})}
    pplvi.fit(
        generator.model, guide, args=(x,), objective=Adversarial(), optim=two, num_steps=3, seed=0, progress=False
    )
    assert all(torch.equal(p, q) for p, q in zip(generator.parameters(), before[0], strict=True))
    store = pyro.get_param_store()
    assert not torch.equal(store["judge$$$weight"], before[1][0])


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: Generator("net", 2), "torch.nn.Module"),
        (lambda: Generator(nn.Linear(1, 1), 1, noise="cauchy"), "'normal' or 'uniform'"),
        (lambda: MomentMatching([]), "positive numbers"),
        (lambda: maximum_mean_discrepancy(torch.zeros(1, 2), torch.zeros(3, 2)), "at least two draws"),
        (lambda: MomentMatching().loss(lambda x: None, lambda x: None, torch.zeros(2, 2)), "returns draws"),
        (lambda: Adversarial().loss(lambda x: x, lambda x: x, torch.zeros(2, 2)), r"\(2,\)"),
    ],
)
def test_bad_input_is_refused(call: Callable[[], Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        call()
