"""Gibbs moves: exact draws stay exact, discrete targets are annealed, mixed models take two kernels."""

from itertools import product
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor

from pplvi.guides.annealed import AnnealedGuide
from pplvi.kernels.coordinates import sites_of
from pplvi.kernels.flow import FlowKernel
from pplvi.kernels.gibbs import GibbsKernel
from pplvi.kernels.hamiltonian import HamiltonianKernel
from pplvi.kernels.invariant import Frame
from pplvi.kernels.residual import ResidualKernel
from pplvi.losses.nested import NestedELBO
from pplvi.objectives.step import Routing, Step
from pplvi.samplers.annealed import Annealed, Resampling
from pplvi.samplers.base import Request
from pplvi.weights.algebra import logmeanexp

pytestmark = pytest.mark.usefixtures("float64")

LOCAL = Routing(detach=True, local=True)
TABLE = torch.tensor([[0.3, 2.0], [1.5, 0.1], [0.7, 0.4]], dtype=torch.float64)
COUPLING = torch.tensor([0.8, -0.5], dtype=torch.float64)


def free() -> None:
    """A category, a vector of bits, a one-hot vector: independent."""
    pyro.sample("c", dist.Categorical(torch.ones(3)))
    pyro.sample("bits", dist.Bernoulli(0.5 * torch.ones(2)).to_event(1))
    pyro.sample("hot", dist.OneHotCategorical(torch.ones(2)))


def coupled() -> None:
    """The same sites, with a density that ties them together."""
    c = pyro.sample("c", dist.Categorical(torch.ones(3)))
    bits = pyro.sample("bits", dist.Bernoulli(0.5 * torch.ones(2)).to_event(1))
    hot = pyro.sample("hot", dist.OneHotCategorical(torch.ones(2)))
    pyro.factor("tie", energy(c, bits, hot))


def energy(c: Tensor, bits: Tensor, hot: Tensor) -> Tensor:
    first = (TABLE[c] * hot).sum(-1)
    return first * (1 + bits[..., 0]) + (COUPLING * bits).sum(-1) * (c + 1.0) - 2.0 * bits.prod(-1)


STATES = list(product(range(3), (0.0, 1.0), (0.0, 1.0), ([1.0, 0.0], [0.0, 1.0])))


def exact() -> Tensor:
    """Mass of every state under the coupled density."""
    c, a, b, hot = (torch.tensor([state[i] for state in STATES]) for i in range(4))
    return energy(c, torch.stack([a, b], -1), hot).exp() / len(STATES)


def state_of(values: dict[str, Tensor]) -> Tensor:
    """Number of each particle's state in the list of all."""
    bits, hot = values["bits"], values["hot"]
    return (values["c"] * 8 + bits[..., 0] * 4 + bits[..., 1] * 2 + hot[..., 1]).long()


def walk(model: Any, guide: Any, *args: Any, count: int, resample: Any = False) -> list[Step]:
    return list(Annealed(Resampling(resample))(model, guide, args, {}, Request(count, routing=LOCAL)))


def recording(model: Any, seen: list[dict[str, Tensor]]) -> Any:
    def recorded() -> None:
        tracer = pyro.poutine.trace(model)
        tracer()
        sites = tracer.trace.nodes.items()
        seen.append({n: s["value"] for n, s in sites if s["type"] == "sample" and not s["is_observed"]})

    return recorded


def test_sites_with_their_values() -> None:
    found = {site.name: site for site in sites_of(coupled, (), {})}
    assert found["c"].values.tolist() == [0, 1, 2]
    assert (found["bits"].values.tolist(), found["bits"].events) == ([0.0, 1.0], 1)
    assert (found["hot"].values.tolist(), found["hot"].unit) == ([[1.0, 0.0], [0.0, 1.0]], 1)


@pytest.mark.parametrize("sweeps", [1, 3])
def test_exact_draws_stay_exact(sweeps: int) -> None:
    """Frequencies of all 24 states after a step from a path whose two targets are the same: chi-square."""
    probabilities = exact() / exact().sum()
    move, _ = GibbsKernel(sweeps).build(sites_of(coupled, (), {}), lambda *_: torch.zeros(()))

    def log_density(values: Any) -> Tensor:
        return energy(values["c"], values["bits"], values["hot"])

    def align(tensor: Tensor, events: int) -> Tensor:
        return tensor.reshape(*tensor.shape, *[1] * events)

    frame = Frame(log_density, lambda x, events: x.sum(list(range(-events, 0))) if events else x, align)
    index = torch.distributions.Categorical(probabilities).sample((6000,))
    rows = torch.tensor([[s[0], s[1], s[2], *s[3]] for s in STATES])[index]
    before = {"c": rows[:, 0].long(), "bits": rows[:, 1:3], "hot": rows[:, 3:]}
    after = move.move(before, frame)
    assert {name: value.shape for name, value in after.items()} == {n: v.shape for n, v in before.items()}
    assert float((state_of(after) != state_of(before)).double().mean()) > 0.5
    counts = torch.bincount(state_of(after), minlength=24).double()
    kept = probabilities > 5 / 6000
    chi_square = ((counts - 6000 * probabilities) ** 2 / (6000 * probabilities))[kept].sum()
    assert float(chi_square) < 23 + 4 * (2 * 23) ** 0.5


@pytest.mark.parametrize("resample", [False, True, 0.6])
def test_weights_on_a_discrete_target_are_proper(resample: bool | float) -> None:
    guide, seen = AnnealedGuide(coupled, free, 4, GibbsKernel()), []
    found = []
    for _ in range(16):
        weight = walk(recording(coupled, seen), guide, count=200, resample=resample)[-1].log_weight.exp()
        found.append((weight.unsqueeze(-1) * features(seen[-1])).mean(0))
    estimates = torch.stack(found)
    error = estimates.std(0) / len(estimates) ** 0.5
    c, a, b, hot = (torch.tensor([state[i] for state in STATES]) for i in range(4))
    wanted = exact() @ features({"c": c, "bits": torch.stack([a, b], -1), "hot": hot})
    assert ((estimates.mean(0) - wanted).abs() < 4 * error).all(), (estimates.mean(0), wanted, error)
    assert (error < 0.2 * wanted).all()


def features(values: dict[str, Tensor]) -> Tensor:
    """One, indicators of each site, and a product."""
    c, bits, hot = values["c"], values["bits"], values["hot"]
    parts = [torch.ones(c.shape), c == 1, c == 2, bits[..., 0], bits[..., 1], hot[..., 1], c * bits[..., 0]]
    return torch.stack([part.double() for part in parts], -1)


def mixture_model(y: Tensor) -> None:
    """Two clusters with unknown means and a label for each datum."""
    mu = pyro.sample("mu", dist.Normal(torch.zeros(2), 2.0).to_event(1))
    with pyro.plate("data", len(y)):
        c = pyro.sample("c", dist.Categorical(torch.tensor([0.4, 0.6])))
        pyro.sample("y", dist.Normal(torch.where(c == 0, mu[..., 0], mu[..., 1]), 1.0), obs=y)


def mixture_prior(y: Tensor) -> None:
    pyro.sample("mu", dist.Normal(torch.zeros(2), 2.0).to_event(1))
    with pyro.plate("data", len(y)):
        pyro.sample("c", dist.Categorical(torch.tensor([0.4, 0.6])))


def test_discrete_and_continuous_sites_take_turns() -> None:
    y = torch.tensor([-1.0, 2.0, 1.5])
    kernels = (GibbsKernel(), HamiltonianKernel(0.4, 2))
    guide = AnnealedGuide(mixture_model, mixture_prior, 4, kernels, learn_path=True)
    steps = walk(mixture_model, guide, y, count=1500, resample=0.5)
    assert len(steps) == 8
    torch.testing.assert_close(steps[1].log_increment, torch.zeros(1500))  # the same target: nothing to weight
    mu = 2.0 * torch.randn(200_000, 2)
    parts = torch.distributions.Normal(mu.unsqueeze(-1), 1.0).log_prob(y) + torch.tensor([0.4, 0.6]).log()[:, None]
    log_z = logmeanexp(parts.logsumexp(1).sum(-1))
    found = torch.stack([walk(mixture_model, guide, y, count=300)[-1].log_weight for _ in range(15)])
    ratio = (logmeanexp(found, 1) - log_z).exp()
    assert (ratio.mean() - 1).abs() < 4 * ratio.std() / 15**0.5 + 0.02
    NestedELBO("forward_kl", 50, resample=True).loss_and_grads(mixture_model, guide, y)
    assert guide.path.logits_unconstrained.grad.abs().sum() > 0


def test_elements_of_the_data_are_moved_side_by_side() -> None:
    y = torch.tensor([-1.0, 0.3, 2.0])

    def model() -> None:
        with pyro.plate("data", 3):
            c = pyro.sample("c", dist.Categorical(torch.ones(3)))
            pyro.sample("y", dist.Normal(2.0 * c - 2.0, 1.0), obs=y)

    def prior() -> None:
        with pyro.plate("data", 3):
            pyro.sample("c", dist.Categorical(torch.ones(3)))

    calls = []

    def counted() -> None:
        calls.append(1)
        model()

    guide = AnnealedGuide(counted, prior, 3, GibbsKernel())
    walk(counted, guide, count=10)
    calls.clear()
    log_weight = walk(counted, guide, count=2000)[-1].log_weight
    # one to weight, one for the size, one a value, and one at the end of each move, whatever the number of data
    assert len(calls) == 3 * (1 + 1 + 3 + 1)
    assert log_weight.shape == (2000, 3)
    exact = torch.distributions.Normal(torch.tensor([-2.0, 0.0, 2.0]), 1.0).log_prob(y[:, None]).exp().mean(1)
    weight = log_weight.exp()
    assert ((weight.mean(0) - exact).abs() < 4 * weight.std(0) / 2000**0.5).all()


def test_annealed_flow_transport_is_a_flow_and_then_moves() -> None:
    def target() -> None:
        pyro.sample("z", dist.Normal(torch.tensor([1.0, -1.0]), 0.5).to_event(1))
        pyro.factor("mass", torch.tensor(3.0).log())

    def base() -> None:
        pyro.sample("z", dist.Normal(torch.zeros(2), 2.0).to_event(1))

    guide = AnnealedGuide(target, base, 3, (FlowKernel(hidden=4), HamiltonianKernel(0.3, 2)))
    guide.plan((), {})
    svi = pyro.infer.SVI(target, guide, pyro.optim.Adam({"lr": 0.03}), NestedELBO("reverse_kl", 30, resample=True))

    @torch.no_grad()
    def spread() -> float:
        return float(walk(target, guide, count=2000)[-1].log_weight.std())

    before = spread()
    for _ in range(40):
        svi.step()
    assert spread() < 0.7 * before
    with torch.no_grad():
        ends = [walk(target, guide, count=200, resample=True)[-1].log_weight for _ in range(15)]
    found = logmeanexp(torch.stack(ends), 1)
    assert (found.exp().mean() - 3.0).abs() < 4 * found.exp().std() / 15**0.5


def test_errors_say_what_to_do() -> None:
    with pytest.raises(ValueError, match="num_sweeps=0: expected"):
        GibbsKernel(0)

    def normal() -> None:
        pyro.sample("z", dist.Normal(0.0, 1.0))

    y = torch.zeros(2)
    with pytest.raises(ValueError, match="no finite support"):
        AnnealedGuide(normal, normal, 2, GibbsKernel()).plan((), {})
    with pytest.raises(ValueError, match="are discrete"):
        AnnealedGuide(coupled, free, 2, HamiltonianKernel()).plan((), {})
    with pytest.raises(ValueError, match=r"no kernel moves sites \['mu'\]"):
        AnnealedGuide(mixture_model, mixture_prior, 2, GibbsKernel()).plan((y,), {})
    with pytest.raises(ValueError, match="move it by GibbsKernel"):
        AnnealedGuide(mixture_model, mixture_prior, 2, ResidualKernel()).plan((y,), {})
    with pytest.raises(ValueError, match="has no density"):
        AnnealedGuide(coupled, free, 2, GibbsKernel())()
