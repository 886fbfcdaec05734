"""``poutine.scale``: a quantity is never silently that of another density."""

import math
from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from arviz_results import elpd
from pyro import poutine
from pyro.infer.autoguide import AutoNormal, AutoNormalMessenger
from torch import Tensor

import pplvi

Y = torch.tensor([1.0, 2.0, 0.0, 1.5], dtype=torch.float64)
EVIDENCE = dist.MultivariateNormal(torch.zeros(4).double(), torch.eye(4).double() + 1).log_prob(Y).item()
SD = 5**-0.5
LOO = sum(dist.Normal((4.5 - y) / 4, math.sqrt(1.25)).log_prob(y).item() for y in Y)
Pair = tuple[Callable[..., Any], Callable[..., Any]]


def model(y: Tensor) -> None:
    """Its posterior is a normal of mean 0.9 and variance 1 / 5."""
    z = pyro.sample("z", dist.Normal(torch.zeros(()).double(), 1.0))
    with pyro.plate("data", 4):
        pyro.sample("y", dist.Normal(z, 1.0), obs=y)


def guide(y: Tensor) -> None:
    """Near the posterior."""
    pyro.sample("z", dist.Normal(torch.tensor(0.9).double(), 0.5))


def warming(factor: float) -> Pair:
    """A KL term that is not yet weighted in full: the latent alone is scaled, in both programs."""

    def warm_model(y: Tensor) -> None:
        with poutine.scale(scale=factor):
            z = pyro.sample("z", dist.Normal(torch.zeros(()).double(), 1.0))
        with pyro.plate("data", 4):
            pyro.sample("y", dist.Normal(z, 1.0), obs=y)

    return warm_model, poutine.scale(guide, factor)


PAIRS: dict[str, Pair] = {
    "both, by datum": (poutine.scale(model, 0.01), poutine.scale(guide, 0.01)),
    "both, by 25": (poutine.scale(model, 25.0), poutine.scale(guide, 25.0)),
    "warm-up": warming(0.1),
    "guide alone": (model, poutine.scale(guide, 0.2)),
    "none": (model, guide),
}


@pytest.mark.parametrize("name", PAIRS)
def test_weights_are_those_of_the_posterior(name: str) -> None:
    posterior = pplvi.Posterior(*PAIRS[name], (Y,), num_draws=4000, seed=0)
    evidence, error = posterior.log_evidence
    assert abs(evidence - EVIDENCE) < 4 * error + 1e-9
    z = posterior.resample(seed=0)["z"]
    size = posterior.ess.item()
    assert abs(z.mean().item() - 0.9) < 4 * SD / math.sqrt(size)
    assert abs(z.std().item() - SD) < 4 * SD / math.sqrt(size)
    assert abs(elpd(posterior.loo()) - LOO) < 0.05
    exported = pplvi.to_arviz(posterior, seed=0, num_prior=0)
    assert abs(float(exported.posterior.z.std()) - SD) < 0.03
    assert abs(exported.attrs["log_evidence"] - EVIDENCE) < 4 * error + 1e-6


def test_scale_in_the_model_alone_is_part_of_the_target() -> None:
    posterior = pplvi.Posterior(poutine.scale(model, 25.0), guide, (Y,), num_draws=4000, seed=0)
    assert abs(posterior.resample(seed=0)["z"].std().item() - SD / 5) < 0.01


def test_scales_of_plates_are_left() -> None:
    """Full data under a subsampled plate in the guide's batch: nothing is scaled by ``poutine.scale``."""

    def local(y: Tensor) -> None:
        with pyro.plate("data", 8, subsample=torch.arange(4)):
            z = pyro.sample("z", dist.Normal(torch.zeros(4).double(), 1.0))
            pyro.sample("y", dist.Normal(z, 1.0), obs=y)

    def local_guide(y: Tensor) -> None:
        with pyro.plate("data", 8, subsample=torch.arange(4)):
            pyro.sample("z", dist.Normal(y / 2, math.sqrt(0.5)))

    exact = 2 * dist.Normal(torch.zeros(()).double(), math.sqrt(2.0)).log_prob(Y).sum().item()
    assert pplvi.Posterior(local, local_guide, (Y,), seed=0).total_log_evidence.value == pytest.approx(exact, abs=1e-9)


def test_fit_of_scaled_programs_has_the_posterior() -> None:
    fit = pplvi.fit(
        poutine.scale(model, 25.0),
        lambda model: poutine.scale(AutoNormal(model), 25.0),
        args=(Y,),
        optim=pyro.optim.Adam({"lr": 0.05}),
        num_steps=300,
        seed=0,
        progress=False,
        dtype=torch.float64,
    )
    posterior = fit.posterior(num_draws=4000)
    assert abs(posterior.log_evidence[0] - EVIDENCE) < 4 * posterior.log_evidence[1] + 1e-3
    assert abs(posterior.resample(seed=0)["z"].std().item() - SD) < 0.03


def test_messengers_that_inherit_a_scale_are_refused() -> None:
    scaled, _ = warming(0.1)
    messenger = AutoNormalMessenger(scaled)
    with pytest.raises(ValueError, match=r"sites \['z'\] of AutoNormalMessenger stand under poutine.scale.*without"):
        pplvi.Posterior(scaled, messenger, (Y,), seed=0)
