"""Local latents that are annealed element by element: proper weights, unbiased minibatches, bounds that rise."""

import copy
import math
import pickle
from itertools import combinations
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI, Predictive, Trace_ELBO
from pyro.infer.autoguide import AutoNormal
from torch import Tensor, nn

import pplvi
from pplvi.compile.svi import CompiledSVI
from pplvi.guides import AutoAmortized, AutoHierarchical, AutoSemiDAIS
from pplvi.kernels.flow import FlowKernel
from pplvi.kernels.hamiltonian import HamiltonianKernel
from pplvi.kernels.langevin import ControlledLangevinKernel, LangevinKernel
from pplvi.kernels.uncorrected import UncorrectedHamiltonianKernel
from pplvi.losses.elbo import ELBO, ForwardKL, ImportanceWeightedELBO
from pplvi.posterior.posterior import Posterior
from pplvi.programs.joint import execute

pytestmark = pytest.mark.usefixtures("float64")

KERNELS: dict[str, Any] = {
    "hamiltonian": UncorrectedHamiltonianKernel(0.3, 2, keep=0.5),
    "langevin": LangevinKernel(0.05),
    "controlled": ControlledLangevinKernel(0.05, 4),
    "flow": FlowKernel(4),
}
COUNTS = torch.tensor([0.0, 3.0, 1.0, 7.0, 0.0, 2.0], dtype=torch.float64)
WHOLE = torch.arange(6)


def counts(index: Tensor) -> None:
    """Counts whose rates are products: local posteriors are skewed and bent."""
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    with pyro.plate("group", 6, subsample=index):
        z = pyro.sample("z", dist.Normal(mu, 1.0))
        s = pyro.sample("s", dist.Gamma(1.0, 1.0))
        pyro.sample("y", dist.Poisson(s * z.exp()), obs=COUNTS[index])


def hierarchical(model: Any, **options: Any) -> AutoHierarchical:
    return AutoHierarchical(model, plates="group", hidden=4, **options)


@pytest.mark.parametrize("name", KERNELS)
def test_mean_over_all_minibatches_is_the_bound_of_all_data_and_its_gradient(name: str) -> None:
    guide = AutoSemiDAIS(hierarchical(counts), 2, KERNELS[name])
    guide(torch.tensor([0, 2]))
    with torch.no_grad():
        for parameter in guide.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    nodes = execute(counts, guide, (WHOLE,), {}).guide.nodes
    drawn = [n for n, s in nodes.items() if n == "_noise_0" or "_start_" in n or "global_guide_latent" in n]
    drawn += ["_noise_1", "_noise_2"] if name in ("langevin", "controlled") else []

    def bound(index: Tensor) -> Tensor:
        values = {n: nodes[n]["value"].detach() for n in drawn}
        values = {n: v if "latent" in n else v[index] for n, v in values.items()}
        run = execute(counts, guide, (index,), {}, values=values)
        return (run.scale * (run.log_target() - run.log_forward())).sum()

    found = torch.stack([bound(torch.tensor(pair)) for pair in combinations(range(6), 2)]).mean()
    exact = bound(WHOLE)
    torch.testing.assert_close(found, exact)
    parameters = list(guide.parameters())
    gradients = [torch.autograd.grad(value, parameters, allow_unused=True) for value in (found, exact)]
    for parameter, one, other in zip(guide.named_parameters(), *gradients, strict=True):
        torch.testing.assert_close(one, other, msg=parameter[0])
    assert len(drawn) >= 2


# ---------------------------------------------------------------- proper weights


def conjugate() -> None:
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    with pyro.plate("group", 3):
        z = pyro.sample("z", dist.Normal(mu, 0.7))
        pyro.sample("y", dist.Normal(z, 0.5), obs=torch.tensor([1.0, -0.5, 2.0]))


def log_evidence() -> float:
    covariance = torch.ones(3, 3) + (0.49 + 0.25) * torch.eye(3)
    return float(
        torch.distributions.MultivariateNormal(torch.zeros(3), covariance).log_prob(torch.tensor([1, -0.5, 2]))
    )


@pytest.mark.parametrize("name", KERNELS)
def test_weights_estimate_the_evidence_and_draws_the_posterior(name: str) -> None:
    guide = AutoSemiDAIS(hierarchical(conjugate, init_scale=0.8), 3, KERNELS[name])
    svi = SVI(conjugate, guide, pyro.optim.Adam({"lr": 0.03}), ELBO(20))
    for _ in range(30):
        svi.step()
    posterior = Posterior(conjugate, guide, num_draws=4000, seed=0)
    log_z, error = posterior.log_evidence
    assert float(error) < 0.1
    assert abs(float(log_z) - log_evidence()) < 4 * float(error)
    precision = torch.linalg.inv(torch.ones(3, 3) + 0.49 * torch.eye(3)) + 4 * torch.eye(3)
    mean = torch.linalg.solve(precision, 4 * torch.tensor([1.0, -0.5, 2.0]))
    weight = torch.softmax((posterior.draws.log_p - posterior.draws.log_q).reshape(-1), 0)
    z = posterior.draws.latents["z"].reshape(-1, 3)
    assert ((weight @ z - mean).abs() < 0.1).all()


def supports() -> None:
    """Nothing observed: the evidence is one, and every support and Jacobian counts."""
    scale = pyro.sample("scale", dist.Gamma(3.0, 2.0))
    with pyro.plate("group", 3, dim=-2):
        pyro.sample("mix", dist.Dirichlet(torch.tensor([2.0, 3.0, 4.0])))
        with pyro.plate("inner", 2, dim=-1):
            pyro.sample("rate", dist.Gamma(4.0, 3.0 * scale))


@pytest.mark.parametrize("family", ["normal", "multivariate_normal", "flow"])
def test_the_density_integrates_to_one_on_every_support(family: Any) -> None:
    guide = AutoSemiDAIS(hierarchical(supports, family=family, init_scale=0.7), 2, KERNELS["hamiltonian"])
    svi = SVI(supports, guide, pyro.optim.Adam({"lr": 0.05}), ELBO(10))
    for _ in range(15 if family == "flow" else 50):
        svi.step()
    with torch.no_grad():
        run = execute(supports, guide, (), {}, num_particles=4000)
        weight = (run.log_target() - run.log_forward()).exp()
    error = weight.std() / len(weight) ** 0.5
    assert error < 0.15
    assert (weight.mean() - 1.0).abs() < 4 * error


# ---------------------------------------------------------------- bounds


def train(model: Any, guide: Any, steps: int, *args: Any) -> None:
    ELBO(4).loss(model, guide, *args)
    svi = CompiledSVI(model, guide, lambda p: torch.optim.Adam(p, lr=0.03), ELBO(4), mode="trace")
    for _ in range(steps):
        svi.step(*args)


def grouped(size: int) -> None:
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    with pyro.plate("group", 6, subsample_size=size) as index:
        z = pyro.sample("z", dist.Normal(mu, 1.0))
        s = pyro.sample("s", dist.Gamma(1.0, 1.0))
        pyro.sample("y", dist.Poisson(s * z.exp()), obs=COUNTS[index])


@torch.no_grad()
def bound(guide: Any) -> float:
    """The mean over all minibatches of three."""
    batches = [torch.tensor(chosen) for chosen in combinations(range(6), 3)]
    runs = [execute(grouped, guide, (3,), {}, num_particles=100, values={"group": index}) for index in batches]
    return float(torch.stack([(run.scale * (run.log_target() - run.log_forward())).mean() for run in runs]).mean())


def test_minibatches_train_it_beyond_its_base_and_mean_field() -> None:
    makes = {
        "mean field": lambda: AutoNormal(grouped),
        "base": lambda: hierarchical(grouped, init_scale=0.5),
        "annealed": lambda: AutoSemiDAIS(
            hierarchical(grouped, init_scale=0.5), 2, UncorrectedHamiltonianKernel(0.3, 2)
        ),
    }
    found = {}
    for name, make in makes.items():
        pyro.clear_param_store()
        pyro.set_rng_seed(0)
        guide = make()
        train(grouped, guide, 200, 3)
        found[name] = bound(guide)
    assert found["annealed"] > max(found["base"], found["mean field"]) + 0.5, found


def autoencoder(x: Tensor) -> None:
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        pyro.sample(
            "x", dist.Normal(torch.tanh(z @ torch.tensor([[1.0, 2.0, 0.5], [0.3, -1.0, 1.0]])), 0.3).to_event(1), obs=x
        )


def test_with_an_encoder_weights_are_per_datum_and_new_data_need_no_training() -> None:
    encoder = nn.Sequential(nn.Linear(3, 8), nn.Tanh())
    guide = AutoSemiDAIS(AutoAmortized(autoencoder, encoder, plates="data"), 3)
    x = torch.randn(5, 3)
    run = execute(autoencoder, guide, (x,), {}, num_particles=7)
    assert run.log_forward().shape == (7, 5)
    before = ImportanceWeightedELBO(10).loss(autoencoder, guide, x)
    svi = SVI(autoencoder, guide, pyro.optim.Adam({"lr": 0.02}), ImportanceWeightedELBO(10))
    for _ in range(40):
        svi.step(x)
    assert ImportanceWeightedELBO(10).loss(autoencoder, guide, x) < before
    assert guide(torch.randn(9, 3))["z"].shape == (9, 2)


@pytest.mark.parametrize("loss", [ELBO(4), ELBO(4, estimator="stl"), ImportanceWeightedELBO(4, estimator="dreg")])
def test_every_parameter_is_trained(loss: Any) -> None:
    guide = AutoSemiDAIS(hierarchical(grouped), 2, KERNELS["controlled"])
    guide(3)
    with torch.no_grad():
        for parameter in guide.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    biased = {} if isinstance(loss, ELBO) else {"allow_biased_subsampling": True}
    loss = loss if not biased else ImportanceWeightedELBO(4, estimator="dreg", **biased)
    loss.loss_and_grads(grouped, guide, 3)
    for name, parameter in guide.named_parameters():
        assert parameter.grad is not None, name
        assert torch.isfinite(parameter.grad).all(), name
        assert parameter.grad.abs().sum() > 0 or "scale_tril" in name, name  # which has one entry, always one


def trajectory(mode: str) -> tuple[list[float], list[Tensor]]:
    pyro.clear_param_store()
    pyro.set_rng_seed(1)
    guide, loss = AutoSemiDAIS(hierarchical(grouped), 2), ELBO(4)
    loss.loss(grouped, guide, 3)
    pyro.set_rng_seed(2)
    if mode == "plain":
        svi: Any = SVI(grouped, guide, pyro.optim.SGD({"lr": 0.01}), loss)
    else:
        svi = CompiledSVI(grouped, guide, lambda p: torch.optim.SGD(p, lr=0.01), loss, mode="trace")
    return [svi.step(3) for _ in range(3)], [p.detach().clone() for p in guide.parameters()]


def test_a_traced_step_is_the_plain_step() -> None:
    plain, traced = trajectory("plain"), trajectory("trace")
    torch.testing.assert_close(torch.tensor(plain[0]), torch.tensor(traced[0]))
    for one, other in zip(plain[1], traced[1], strict=True):
        torch.testing.assert_close(one, other)


# ---------------------------------------------------------------- Pyro's contract


def test_it_is_a_plain_pyro_guide() -> None:
    guide = AutoSemiDAIS(hierarchical(grouped), 2)
    values = []
    for loss in (Trace_ELBO(num_particles=50, vectorize_particles=True, max_plate_nesting=1), ELBO(50)):
        loss.loss(grouped, guide, 6)
        pyro.set_rng_seed(3)
        values.append(loss.loss(grouped, guide, 6))
    assert values[0] == pytest.approx(values[1], abs=1e-10)
    drawn = Predictive(grouped, guide=guide, num_samples=10)(6)
    assert drawn["z"].shape == (10, 6)


def test_quantiles_are_those_of_draws() -> None:
    guide = AutoSemiDAIS(hierarchical(grouped, init_scale=0.5), 2)
    guide(6)
    state = torch.get_rng_state()
    low, middle, high = (guide.quantiles([0.1, 0.5, 0.9], 6)["s"][i] for i in range(3))
    assert torch.equal(torch.get_rng_state(), state)
    torch.testing.assert_close(guide.median(6)["s"], middle)
    with torch.no_grad():
        drawn = execute(grouped, guide, (6,), {}, num_particles=4000).guide.nodes["s"]["value"]
    for wanted, value in ((0.1, low), (0.5, middle), (0.9, high)):
        assert ((drawn < value).double().mean(0) - wanted).abs().max() < 0.05
    with pytest.raises(ValueError, match="no density"):
        guide.get_posterior(6)
    with pytest.raises(ValueError, match="probabilities"):
        guide.quantiles([1.5], 6)


def test_copies_states_and_neighbours() -> None:
    guide = AutoSemiDAIS(hierarchical(grouped), 2)
    guide(6)
    with torch.no_grad():
        for parameter in guide.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))

    def draws(guide: Any) -> Tensor:
        pyro.set_rng_seed(3)
        return guide(6)["z"].detach()

    before = draws(guide)
    other = AutoSemiDAIS(hierarchical(grouped), 2)
    assert not torch.equal(draws(other), before)
    torch.testing.assert_close(draws(guide), before)  # a second guide of the class has names of its own
    other.load_state_dict(guide.state_dict())
    torch.testing.assert_close(draws(other), before)
    twin = copy.deepcopy(guide)
    assert twin.reverse_1.ahead is twin.forward_1
    assert twin.forward_1.log_density.path is twin.path
    torch.testing.assert_close(draws(twin), before)
    restored = pickle.loads(pickle.dumps(guide))
    assert restored.state_dict().keys() == guide.state_dict().keys()
    torch.testing.assert_close(draws(guide), before)  # the original is as it was
    with pytest.raises(ValueError, match="was unpickled, without its model"):
        draws(restored)


def test_bad_input_says_what_to_do() -> None:
    with pytest.raises(ValueError, match=r"base=.*: expected an AutoAmortized"):
        AutoSemiDAIS(AutoNormal(grouped))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="num_steps=0"):
        AutoSemiDAIS(hierarchical(grouped), 0)
    with pytest.raises(ValueError, match="increase strictly"):
        AutoSemiDAIS(hierarchical(grouped), 3, betas=(0.7, 0.2))
    with pytest.raises(ValueError, match="leaves its target invariant and has no density"):
        AutoSemiDAIS(hierarchical(grouped), 2, HamiltonianKernel(0.1))(6)
    guide = AutoSemiDAIS(hierarchical(grouped), 2)
    with pytest.raises(ValueError, match="deterministic function of parameters"):
        ForwardKL(4).loss_and_grads(grouped, guide, 6)

    def sized(n: int) -> None:
        with pyro.plate("group", n):
            pyro.sample("z", dist.Normal(0.0, 1.0))

    grown = AutoSemiDAIS(hierarchical(sized), 2)
    grown(3)
    with pytest.raises(ValueError, match="has 4 elements, this guide was made for 3"):
        grown(4)


def test_betas_start_where_told_and_are_learned() -> None:
    guide = AutoSemiDAIS(hierarchical(grouped), 3, betas=(0.1, 0.4))
    torch.testing.assert_close(guide.betas, torch.tensor([0.0, 0.1, 0.4, 1.0]))
    svi = SVI(grouped, guide, pyro.optim.Adam({"lr": 0.1}), ELBO(4))
    svi.step(6)
    assert not torch.allclose(guide.betas, torch.tensor([0.0, 0.1, 0.4, 1.0]))
    assert math.isclose(float(guide.betas[-1]), 1.0)


def test_one_call_fits_reports_and_exports_it(capsys: pytest.CaptureFixture[str]) -> None:
    fit = pplvi.fit(
        grouped,
        lambda model: AutoSemiDAIS(hierarchical(model), 2),
        args=(6,),
        num_steps=20,
        restarts=2,
        seed=0,
    )
    fit.report()
    assert "log evidence" in capsys.readouterr().out.lower()
    posterior = fit.to_arviz().posterior
    assert posterior["z"].shape[0] == 2
    assert posterior["z"].shape[2:] == (6,)
