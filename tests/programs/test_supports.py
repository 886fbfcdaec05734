"""Supports that torch gives no coordinates."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer.autoguide import AutoNormal

import pplvi


def mixture(components):
    return dist.MixtureSameFamily(dist.Categorical(torch.tensor([0.3, 0.7])), components)


def spike_and_slab(y):
    scale = torch.tensor([0.1, 2.0])
    with pyro.plate("effects", len(y)):
        b = pyro.sample("b", mixture(dist.Normal(torch.zeros(2), scale)))
        pyro.sample("y", dist.Normal(b, 0.5), obs=y)


def test_a_spike_and_a_slab_as_a_prior():
    """Each effect is conjugate given its component, and so are their evidence and its mean."""
    y = torch.tensor([0.2, -1.5, 3.0], dtype=torch.float64)
    variance = torch.tensor([0.1, 2.0], dtype=torch.float64).square()
    parts = torch.tensor([0.3, 0.7]).log() + dist.Normal(0.0, (variance + 0.25).sqrt()).log_prob(y[:, None])
    mean = (parts.softmax(-1) * variance / (variance + 0.25)).sum(-1) * y

    posterior = pplvi.fit(spike_and_slab, "auto", args=(y,), seed=0, progress=False).posterior(4000)

    assert torch.allclose(posterior.resample(seed=0)["b"].double().mean(0), mean, atol=0.12)
    evidence = posterior.total_log_evidence
    assert abs(evidence.value - float(parts.logsumexp(-1).sum())) < 4 * evidence.error


def test_a_mixture_of_positive_components_stays_positive():
    def model():
        scale = pyro.sample("scale", mixture(dist.LogNormal(torch.tensor([-1.0, 1.0]), 0.5)))
        pyro.sample("y", dist.Normal(0.0, scale), obs=torch.tensor(2.0))

    guide = AutoNormal(model)
    guide()
    assert float(guide.median()["scale"]) > 0
    assert pplvi.fit(model, "auto", seed=0, progress=False).posterior(100).draws.latents["scale"].min() > 0


def test_components_with_bounds_of_their_own_are_named():
    def model():
        pyro.sample("p", mixture(dist.Uniform(torch.tensor([0.0, 2.0]), torch.tensor([1.0, 3.0]))))

    with pytest.raises(ValueError, match=r"site 'p': Cannot transform supports that differ.*the same bounds"):
        pplvi.fit(model, pplvi.AutoPathfinder, seed=0, progress=False)


def test_the_advice_for_angles_can_be_followed():
    def repeating():
        a = pyro.sample("a", dist.VonMises(0.0, 0.5))
        pyro.sample("y", dist.VonMises(a, 3.0), obs=torch.tensor(1.0))

    def angle():
        a = pyro.sample("a", dist.Uniform(-math.pi, math.pi))
        pyro.factor("prior", dist.VonMises(0.0, 0.5).log_prob(a) + math.log(2 * math.pi))
        pyro.sample("y", dist.VonMises(a, 3.0), obs=torch.tensor(1.0))

    with pytest.raises(ValueError, match=r"looks improper.*dist\.Uniform\(-pi, pi\).*dist\.VonMises"):
        pplvi.fit(repeating, pplvi.AutoPathfinder, seed=0, progress=False)

    evidence = pplvi.fit(angle, "auto", seed=0, progress=False).posterior(4000).total_log_evidence
    grid = torch.linspace(-math.pi, math.pi, 20_001, dtype=torch.float64)
    joint = dist.VonMises(0.0, 0.5).log_prob(grid) + dist.VonMises(grid, 3.0).log_prob(torch.tensor(1.0))
    assert abs(evidence.value - math.log(float(torch.trapezoid(joint.exp(), grid)))) < 4 * evidence.error + 1e-3
