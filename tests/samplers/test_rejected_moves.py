"""Walks whose moves are tried again: weights are proper, by a sum over all outcomes, and gradients stay right."""

from itertools import product
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor

from pplvi.guides.annealed import AnnealedGuide, NestedGuide
from pplvi.kernels.hamiltonian import HamiltonianKernel
from pplvi.kernels.residual import ResidualKernel
from pplvi.losses.base import WeightedELBO
from pplvi.losses.nested import NestedELBO
from pplvi.objectives.f_divergences import NestedDivergence
from pplvi.objectives.nested import FilteringBound, FilteringForwardKL
from pplvi.objectives.step import Routing
from pplvi.samplers.annealed import Annealed, Resampling
from pplvi.samplers.base import Request
from pplvi.weights.rejection import Rejection

pytestmark = pytest.mark.usefixtures("float64")
LOCAL = Routing(detach=True, local=True)

# One level of two values and then three. The weight of each pair is a quarter of the threshold 2, or more than it.
START = torch.tensor([0.4, 0.6], dtype=torch.float64)
AHEAD = torch.tensor([[0.5, 0.2, 0.3], [0.1, 0.6, 0.3]], dtype=torch.float64)
WEIGHT = torch.tensor([[0.5, 3.0, 1.0], [1.5, 2.0, 0.5]], dtype=torch.float64)
JOINT = START[:, None] * AHEAD * WEIGHT
QUARTERS = (0.125, 0.375, 0.625, 0.875)


def discrete(outcomes: int) -> tuple[Any, NestedGuide]:
    """Model and guide, an independent copy of them for each outcome."""

    def program(probabilities: Any) -> Any:
        def sample(*previous: Any) -> None:
            with pyro.plate("outcomes", outcomes, dim=-1):
                pyro.sample("z", dist.Categorical(probabilities(*previous)))

        return sample

    padded = torch.cat([START, torch.zeros(1)])
    ahead = torch.cat([AHEAD, torch.ones(1, 3) / 3])
    back = torch.cat([(JOINT / JOINT.sum(0)).T, torch.zeros(3, 1)], 1)

    def model() -> None:
        with pyro.plate("outcomes", outcomes, dim=-1):
            z = pyro.sample("z", dist.Categorical(torch.ones(3)))
            pyro.factor("mass", (3 * JOINT.sum(0))[z].log())

    start, forward, reverse = program(lambda: padded), *(program(lambda v, t=t: t[v["z"]]) for t in (ahead, back))
    return model, NestedGuide(start, [(model, forward, reverse)])


def test_weights_of_a_walk_are_proper_by_a_sum_over_all_outcomes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two particles with two tries each: all first draws, all tries and all uniform numbers, in exact proportion."""
    one = list(product(range(2), range(3), range(3), QUARTERS))
    outcomes = torch.tensor([[*a, *b] for a in one for b in one]).T  # (8, outcomes): z0, two tries, a number; twice
    first, tries, noise = outcomes[[0, 4]].long(), outcomes[[1, 5, 2, 6]].long(), outcomes[[3, 7]]
    mass = (START[first] * AHEAD[first, tries[:2]] * AHEAD[first, tries[2:]] / 4).prod(0)
    assert float(mass.sum()) == pytest.approx(1.0)
    model, guide = discrete(len(mass))
    sampler = Annealed(rejection=Rejection(2, float(torch.tensor(2.0).log())))
    request = Request(2, routing=LOCAL)
    list(sampler(model, guide, (), {}, request))  # what is looked at once is looked at now
    scripted = [first, tries]
    reached: list[Tensor] = []

    def draw(categorical: Any, shape: Any = ()) -> Tensor:
        return scripted.pop(0).reshape(categorical._extended_shape(torch.Size(shape)))

    monkeypatch.setattr(torch.distributions.Categorical, "sample", draw)
    monkeypatch.setattr(torch, "rand_like", lambda like: torch.stack([noise, noise]).expand_as(like))
    monkeypatch.setattr("pplvi.samplers.walk.Walk.taken", keeping(reached))
    (step,) = sampler(model, guide, (), {}, request)
    assert not scripted
    weight, z = step.log_weight.exp(), reached[-1]
    found = torch.stack([(mass * (weight * (z == value)).mean(0)).sum() for value in range(3)])
    torch.testing.assert_close(found, JOINT.sum(0), rtol=1e-10, atol=0)
    torch.testing.assert_close((mass * weight.mean(0)).sum(), JOINT.sum(), rtol=1e-10, atol=0)
    extended = (mass * step.log_weight_in.exp().mean(0)).sum()  # pairs are proper for the extended proposal
    assert float(extended) == pytest.approx(1.0, rel=1e-10)
    assert (z != tries[:2]).any()


def keeping(reached: list[Tensor]) -> Any:
    """``Walk.taken``, writing down the values that it leaves."""
    from pplvi.samplers.walk import Walk

    taken = Walk.taken

    def kept(self: Walk, *args: Any) -> Any:
        state = taken(self, *args)
        reached.append(state.values["z"])
        return state

    return kept


COPIES, PARTICLES = 100, 40


def base() -> None:
    with pyro.plate("copies", COPIES, dim=-1):
        pyro.sample("z", dist.Normal(0.0, 2.0))


def bimodal() -> None:
    """Z = 1/2, modes at 2 and -2 with sd 0.7."""
    with pyro.plate("copies", COPIES, dim=-1):
        parts = dist.Normal(torch.tensor([2.0, -2.0]), 0.7)
        pyro.sample("z", dist.MixtureSameFamily(dist.Categorical(torch.ones(2)), parts))
        pyro.factor("mass", torch.tensor(0.5).log().expand(COPIES))


@pytest.mark.parametrize("resample", [False, 0.7])
@pytest.mark.parametrize("rejection", [Rejection(3), Rejection(2, 0.5)])
def test_weights_along_a_path_are_proper(resample: bool | float, rejection: Rejection) -> None:
    guide = AnnealedGuide(bimodal, base, 3, ResidualKernel(hidden=4, covariance=0.3))
    request = Request(PARTICLES, routing=LOCAL)
    with torch.no_grad():
        steps = list(Annealed(Resampling(resample), rejection=rejection)(bimodal, guide, (), {}, request))
        plain = list(Annealed(Resampling(resample))(bimodal, guide, (), {}, request))
    found = steps[-1].log_weight.exp().mean(0)
    assert abs(found.mean() - 0.5) < 4 * found.std() / COPIES**0.5 < 0.1
    for step in steps:
        torch.testing.assert_close(step.log_weight, step.log_weight_out)
    assert not torch.allclose(steps[0].log_weight_in, plain[0].log_weight_in)


def start() -> None:
    pyro.sample("z", dist.Normal(0.0, 1.5))


def final() -> None:
    pyro.sample("z", dist.Normal(1.0, 0.7))
    pyro.factor("mass", torch.tensor(0.7))


def between() -> None:
    theta = pyro.param("theta", torch.tensor(0.4))
    pyro.sample("z", dist.Normal(theta, 1.0))


def moved(name: str, shift: float) -> Any:
    def kernel(previous: dict[str, Tensor]) -> None:
        pyro.sample("z", dist.Normal(0.7 * previous["z"] + pyro.param(name, torch.tensor(shift)), 0.9))

    return kernel


def slopes(loss: Any, guide: NestedGuide) -> Tensor:
    for _, leaf in pyro.get_param_store().named_parameters():
        leaf.grad = None
    loss.loss_and_grads(final, guide)
    grads = (pyro.param(name).grad for name in ("theta", "a", "b", "c", "d"))
    return torch.stack([torch.zeros(()) if grad is None else grad for grad in grads])


@pytest.mark.parametrize(
    "divergence",
    ["reverse_kl", ("forward_kl", "reverse_kl"), NestedDivergence("hellinger", estimator="score")],
    ids=str,
)
def test_gradients_are_those_without_rejection(divergence: Any) -> None:
    """Both estimate the same, with errors of their own."""
    kernels = [moved(name, 0.2 * k) for k, name in enumerate("abcd")]
    guide = NestedGuide(start, [(between, *kernels[:2]), (final, *kernels[2:])])
    found = [
        torch.stack([slopes(NestedELBO(divergence, 2000, rejection=rejection), guide) for _ in range(12)])
        for rejection in (None, Rejection(2))
    ]
    error = sum(x.var(0) / len(x) for x in found).sqrt()
    assert ((found[0].mean(0) - found[1].mean(0)).abs() < 4.5 * error).all(), (
        found[0].mean(0),
        found[1].mean(0),
        error,
    )
    assert (found[0].mean(0).abs() > 8 * error).sum() >= 4


def test_what_cannot_reject_is_refused() -> None:
    rejection = Rejection(2)
    with pytest.raises(ValueError, match="IncrementalBound cannot use draws from the rejection"):
        NestedELBO("avo", 4, rejection=rejection)
    for objective in (FilteringBound(), FilteringForwardKL()):
        with pytest.raises(ValueError, match="draws from the rejection"):
            WeightedELBO(objective, Annealed(rejection=rejection), 4)
    loss = NestedELBO("reverse_kl", 4, rejection=rejection)
    for evaluate in (loss.loss, loss.loss_and_grads):
        with pytest.raises(ValueError, match="expected a guide of levels"):
            evaluate(final, start)
    with pytest.raises(ValueError, match="at least 2 particles"):
        list(Annealed(rejection=rejection)(final, NestedGuide(start, [(final, start, start)]), (), {}, Request(1)))
    with pytest.raises(ValueError, match="nothing can be rejected"):
        loss.loss(final, AnnealedGuide(final, start, 2, HamiltonianKernel(0.1)))
    with pytest.raises(ValueError, match="vectorize_levels=True, but moves may be rejected"):
        NestedELBO(num_particles=4, rejection=rejection, vectorize_levels=True).loss(
            final, AnnealedGuide(final, start, 2)
        )
