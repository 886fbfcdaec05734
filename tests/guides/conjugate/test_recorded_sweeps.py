"""Sweeps that are recorded give the bounds of sweeps that are not."""

from functools import partial
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor

import pplvi
from pplvi.compile.iterating import RecordedMap
from pplvi.compile.tracing import Untraceable

pytestmark = pytest.mark.usefixtures("float64")

GENERATOR = torch.Generator().manual_seed(0)
Y = torch.cat([torch.randn(6, generator=GENERATOR) - 2, torch.randn(9, generator=GENERATOR) + 2]).double()


def clusters(y: Tensor) -> None:
    w = pyro.sample("w", dist.Dirichlet(torch.ones(2)))
    tau = pyro.sample("tau", dist.Gamma(2.0, 2.0))
    b = pyro.sample("b", dist.Normal(torch.zeros(2), tau.rsqrt()).to_event(1))
    with pyro.plate("data", len(y)):
        z = pyro.sample("z", dist.Categorical(w))
        pyro.sample("y", dist.Normal(torch.eye(2)[z] @ b, tau.rsqrt()), obs=y)


def chain(y: Tensor) -> None:
    p = pyro.sample("p", dist.Dirichlet(3 * torch.eye(2) + 1).to_event(1))
    mu = pyro.sample("mu", dist.Normal(torch.tensor([-2.0, 2.0]), 1.0).to_event(1))
    s: Any = 0
    for t in pyro.markov(range(8)):
        s = pyro.sample(f"s_{t}", dist.Categorical(p[s]))
        pyro.sample(f"y_{t}", dist.Normal(mu[s], 1.0), obs=y[t])


def fitted(model: Any, mode: Any, **options: Any) -> Any:
    make = partial(pplvi.AutoConjugate, **options)
    return pplvi.fit(model, lambda m: make(m), args=(Y,), seed=0, progress=False, compile=mode)


@pytest.mark.parametrize("model", [clusters, chain])
def test_recorded_sweeps_give_the_same_bounds(model: Any) -> None:
    eager, recorded = (fitted(model, mode, max_sweeps=9) for mode in (False, "trace"))
    assert recorded.guide.bounds == pytest.approx(eager.guide.bounds, rel=1e-12)
    assert list(-recorded.losses[0]) == recorded.guide.bounds
    for name, value in eager.guide.state_dict().items():
        assert torch.allclose(recorded.guide.state_dict()[name], value, rtol=1e-10)
    assert sum(recorded.guide.terms(Y).values()) == pytest.approx(eager.guide.bounds[-1], rel=1e-12)


def test_searches_and_minibatches_are_not_recorded() -> None:
    def logistic(y: Tensor) -> None:
        b = pyro.sample("b", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Bernoulli(logits=b).expand([len(y)]).to_event(1), obs=(y > 0).double())

    with pytest.raises(ValueError, match=r"'b' has no closed form.*fallback='cvi'.*compile=False"):
        fitted(logistic, "trace", fallback={"b": "cvi"})
    assert fitted(logistic, "auto", fallback={"b": "cvi"}).guide.bounds[-1] < 0
    with pytest.raises(ValueError, match=r"compile='trace' of AutoConjugate with minibatches.*compile=False"):
        fitted(clusters, "trace", rate=pplvi.RobbinsMonro(10, 0.7))


def test_a_step_that_writes_elsewhere_is_refused() -> None:
    count = torch.zeros(())
    with pytest.raises(Untraceable, match="expected one that returns them"):
        RecordedMap(lambda x: (x, count.add_(1) + x.sum()), [torch.ones(2)], "trace")
