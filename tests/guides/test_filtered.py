"""Particle filters as guides: posteriors over sequences, their evidence, and the bound that they give."""

from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from models import Proposal, Walk
from pyro.optim import Adam
from torch import Tensor

from pplvi.fitting.entry import fit
from pplvi.guides.filtered import FilteredGuide
from pplvi.losses.elbo import ELBO
from pplvi.losses.filtering import FilteringELBO
from pplvi.posterior.arviz.export import to_arviz
from pplvi.posterior.posterior import Posterior
from pplvi.samplers.state_space import StateSpace

pytestmark = pytest.mark.usefixtures("float64")

YS = torch.tensor([0.3, -0.2, 0.9], dtype=torch.float64)


def loop(ys: Tensor, proposal: bool = False) -> None:
    z = pyro.sample("z", dist.Normal(0.0, 1.0))
    for t in pyro.markov(range(len(ys))):
        loc, scale = (z + 0.4 * (ys[t] - z), 0.8) if proposal else (z, 1.0)
        z = pyro.sample(f"z_{t + 1}", dist.Normal(loc, scale))
        if not proposal:
            pyro.sample(f"y_{t + 1}", dist.Normal(z, 1.0), obs=ys[t])


def loop_proposal(ys: Tensor) -> None:
    loop(ys, proposal=True)


def exact() -> tuple[Tensor, Tensor, Tensor]:
    """Log evidence, and posterior mean and sd of z[0..3]."""
    prior = torch.tensor([[min(i, j) + 1.0 for j in range(4)] for i in range(4)])
    data = prior[1:, 1:] + torch.eye(3)
    gain = prior[:, 1:] @ torch.linalg.inv(data)
    log_z = torch.distributions.MultivariateNormal(torch.zeros(3), data).log_prob(YS)
    return log_z, gain @ YS, (prior - gain @ prior[1:]).diagonal().sqrt()


PAIRS: dict[str, tuple[Any, Any, Any]] = {
    "steps": (StateSpace(Walk()), Walk(), Proposal()),
    "loop": (loop, loop, loop_proposal),
}


@pytest.mark.parametrize("resample", [False, 0.6])
@pytest.mark.parametrize("form", PAIRS)
def test_posterior_and_evidence_are_exact(form: str, resample: bool | float) -> None:
    program, model, proposal = PAIRS[form]
    guide = FilteredGuide(model, proposal, 20, resample=resample)
    posterior = Posterior(program, guide, (YS,), num_draws=3000, seed=1)
    log_z, means, sds = exact()
    estimate, error = posterior.log_evidence
    assert abs(float(estimate - log_z)) < 4 * float(error) < 0.1
    weight = torch.softmax(posterior.log_weight, 0)
    tolerance = 4 * sds / posterior.ess**0.5
    for t, name in enumerate(["z", "z_1", "z_2", "z_3"]):
        draws = posterior.draws.latents[name]
        assert abs(float((weight * draws).sum() - means[t])) < tolerance[t]
        assert abs(float((weight * (draws - means[t]) ** 2).sum() / sds[t] ** 2 - 1)) < 6 / float(posterior.ess) ** 0.5
    assert float(posterior.ess) > 1500  # of 3000: a draw is as good as its filter


def test_its_elbo_is_the_filtering_bound(monkeypatch: Any) -> None:
    def middle(total: Tensor, count: int, scheme: str) -> Tensor:
        return ((torch.arange(count) + 0.5) / count).expand(*total.shape[:-1], count).contiguous()

    monkeypatch.setattr("pplvi.weights.resampling._uniform_points", middle)
    guide = FilteredGuide(Walk(), Proposal(), 10, resample=True)
    found = []
    for loss, pair in ((ELBO(), (StateSpace(Walk()), guide)), (FilteringELBO(10), (Walk(), Proposal()))):
        loss.loss(*pair, YS)  # looks at the programs
        pyro.set_rng_seed(2)
        if isinstance(loss, FilteringELBO):
            torch.rand(())  # the guide's own look at how many draws are wanted
        pyro.param("weight", torch.tensor(0.4)).unconstrained().grad = None
        found.append((loss.loss_and_grads(*pair, YS), float(pyro.param("weight").unconstrained().grad)))
    assert found[0] == pytest.approx(found[1], abs=1e-10)


def plated(sequences: int) -> tuple[Any, Any]:
    class Model:
        def init(self, state: Any) -> None:
            with pyro.plate("sequences", sequences):
                state["z"] = pyro.sample("z", dist.Categorical(torch.tensor([0.5, 0.5])))

        def step(self, state: Any, y: Any = None) -> None:
            with pyro.plate("sequences", sequences):
                state["z"] = pyro.sample("z", dist.Bernoulli(0.2 + 0.6 * state["z"])).long()
                pyro.sample("y", dist.Normal(2.0 * state["z"], 1.0), obs=y)

    class Guide(Model):
        def init(self, state: Any) -> None:
            with pyro.plate("sequences", sequences):
                pyro.sample("z", dist.Categorical(torch.tensor([0.5, 0.5])))

        def step(self, state: Any, y: Any = None) -> None:
            with pyro.plate("sequences", sequences):
                slope = pyro.param("slope", torch.tensor(0.5))
                pyro.sample("z", dist.Bernoulli(logits=slope * y + state["z"] - 1.0))

    return Model(), Guide()


def test_sequences_in_a_plate_go_through_fit_to_arviz() -> None:
    model, proposal = plated(2)
    ys = torch.tensor([[2.0, -0.3], [1.5, 0.2], [0.1, 2.2]])
    fitted = fit(
        StateSpace(model),
        lambda _: FilteredGuide(model, proposal, 20),
        args=(ys,),
        objective=FilteringELBO(20, "forward_kl"),
        optim=Adam({"lr": 0.05}),
        num_steps=40,
        seed=0,
        progress=False,
    )
    assert float(fitted.params[0]["slope"].detach()) != 0.5
    posterior = fitted.posterior(num_draws=1500)
    log_z, error = posterior.log_evidence
    for n in range(2):
        alpha = torch.tensor([0.5, 0.5]).log()
        turn = torch.tensor([[0.8, 0.2], [0.2, 0.8]]).log()
        for y in ys[:, n]:
            emission = torch.distributions.Normal(torch.tensor([0.0, 2.0]), 1.0).log_prob(y)
            alpha = (alpha[:, None] + turn).logsumexp(0) + emission
        assert abs(float(log_z[n] - alpha.logsumexp(0))) < 4 * float(error[n])
    data = to_arviz(posterior)
    assert data.posterior["z_3"].dims == ("chain", "draw", "sequences")
    assert data.log_likelihood["y_1"].shape == (1, 1500, 2)


def test_errors_say_what_to_do() -> None:
    with pytest.raises(ValueError, match="at least 1"):
        FilteredGuide(Walk(), Proposal(), 0)
    with pytest.raises(ValueError, match="no methods init and step"):
        StateSpace(loop)
    model, proposal = plated(2)
    with pytest.raises(ValueError, match="cannot be reparameterised"):
        ELBO().loss_and_grads(StateSpace(model), FilteredGuide(model, proposal), torch.zeros(3, 2))


def test_names_of_time_steps() -> None:
    trace = pyro.poutine.trace(StateSpace(Walk())).get_trace(YS)
    names = [name for name, site in trace.nodes.items() if site["type"] == "sample"]
    assert names == ["z", "z_1", "y_1", "z_2", "y_2", "z_3", "y_3"]
