"""Score-function terms: unbiased, equal to Pyro's where Pyro has them, and with no more noise."""

from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import Trace_ELBO, TraceGraph_ELBO, config_enumerate
from torch import Tensor

from pplvi import ELBO, ImportanceWeightedELBO
from pplvi.objectives.bounds import RenyiBound
from pplvi.objectives.step import Routing, Step
from pplvi.programs.joint import execute
from pplvi.samplers.score_terms import score_terms

pytestmark = pytest.mark.usefixtures("float64")

Y = torch.tensor([-1.0, 0.3, 2.0, 0.9])


def mixture(y: Tensor) -> None:
    """A global latent beside local ones, with a sum over the data after them."""
    mean = pyro.sample("mean", dist.Normal(0.0, 2.0))
    with pyro.plate("data", len(y)):
        z = pyro.sample("z", dist.Bernoulli(0.3))
        pyro.sample("y", dist.Normal(mean + z, 1.0), obs=y)
    pyro.sample("count", dist.Normal(z.sum(-1, keepdim=True), 0.5), obs=torch.tensor(2.0))


def mixture_guide(y: Tensor) -> None:
    logits = pyro.param("logits", lambda: torch.tensor([-0.5, 0.2, 1.0, 0.0]))
    pyro.sample("mean", dist.Normal(pyro.param("m", lambda: torch.tensor(0.4)), 0.5))
    with pyro.plate("data", len(y)):
        pyro.sample("z", dist.Bernoulli(logits=logits))


def wide(y: Tensor) -> None:
    """Many local latents beside a global one, and nothing that joins them."""
    mean = pyro.sample("mean", dist.Normal(0.0, 8.0))
    with pyro.plate("data", len(y)):
        z = pyro.sample("z", dist.Bernoulli(0.5))
        pyro.sample("y", dist.Normal(mean + 6 * z, 1.0), obs=y)


def wide_guide(y: Tensor) -> None:
    logits = pyro.param("logits", lambda: torch.zeros(len(y)))
    pyro.sample("mean", dist.Normal(pyro.param("m", lambda: torch.tensor(0.0)), 0.5))
    with pyro.plate("data", len(y)):
        pyro.sample("z", dist.Bernoulli(logits=logits))


def gradients(loss: Any, model: Callable[..., Any], guide: Callable[..., Any], *args: Any, repeat: int = 1) -> Tensor:
    """Gradients of all parameters, one row for each of ``repeat`` evaluations."""
    guide(*args)
    leaves = pyro.get_param_store()._params
    rows = []
    for _ in range(repeat):
        pyro.infer.util.zero_grads(leaves.values())
        loss.loss_and_grads(model, guide, *args)
        rows.append(torch.cat([leaves[name].grad.flatten().clone() for name in sorted(leaves)]))
    return torch.stack(rows)


def assert_unbiased(found: Tensor, exact: Tensor) -> None:
    error = found.std(0) / len(found) ** 0.5
    assert bool(((found.mean(0) - exact).abs() <= 3.5 * error + 1e-10).all()), (found.mean(0), exact, error)


def exact_gradient(y: Tensor) -> Tensor:
    """Of minus the ELBO of ``mixture``: the mean in closed form, ``z`` by enumeration of its 16 values."""
    m = torch.tensor(0.4, requires_grad=True)
    logits = torch.tensor([-0.5, 0.2, 1.0, 0.0], requires_grad=True)
    z = torch.cartesian_prod(*[torch.tensor([0.0, 1.0])] * 4)
    log_q = dist.Bernoulli(logits=logits).log_prob(z).sum(-1)
    data = dist.Normal(m + z, 1.0).log_prob(y).sum(-1) - 4 * 0.5 * 0.25
    rest = dist.Bernoulli(0.3).log_prob(z).sum(-1) + dist.Normal(z.sum(-1), 0.5).log_prob(torch.tensor(2.0))
    prior = dist.Normal(0.0, 2.0).log_prob(m) - 0.5 * 0.25 / 4
    loss = -(log_q.exp() * (data + rest - log_q)).sum() - prior
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss, (logits, m))])


@pytest.mark.parametrize(
    "loss",
    [
        ELBO(),  # nothing to leave out as a baseline
        ELBO(3),
        ELBO(3, estimator="vimco"),
        ELBO(2, estimator="score"),
        ELBO(3, entropy="exact"),
        ELBO(3, entropy="kl"),
        ELBO(3, vectorize_particles=False),
    ],
    ids=repr,
)
@pytest.mark.table(2)
def test_gradients_are_unbiased_beside_global_latents(loss: ELBO) -> None:
    assert_unbiased(gradients(loss, mixture, mixture_guide, Y, repeat=200), exact_gradient(Y))


def test_the_plain_score_function_is_that_of_pyro_draw_by_draw() -> None:
    rows = []
    for loss in (TraceGraph_ELBO(), ELBO(estimator="score")):
        pyro.set_rng_seed(3)
        loss.loss(wide, wide_guide, Y)
        pyro.set_rng_seed(4)
        rows.append(gradients(loss, wide, wide_guide, Y)[0, :4])  # of the logits: Pyro's mean is pathwise
    torch.testing.assert_close(rows[1], rows[0], rtol=0, atol=1e-10)


def test_noise_of_local_terms_is_not_that_of_the_whole_data() -> None:
    y = torch.cat([torch.randn(30) - 3, torch.randn(30) + 3])
    pyros, plain, ours = (
        gradients(loss, wide, wide_guide, y, repeat=60)[:, :-1].std(0).mean()
        for loss in (Trace_ELBO(4, vectorize_particles=True, max_plate_nesting=1), ELBO(4, estimator="score"), ELBO(4))
    )
    assert plain < 1.1 * pyros
    assert ours < 0.75 * pyros


def chain() -> None:
    z = torch.tensor(0.0)
    for t in range(8):
        z = pyro.sample(f"z{t}", dist.Bernoulli(0.2 + 0.6 * z))
        pyro.sample(f"y{t}", dist.Normal(z, 0.3), obs=torch.tensor(float(t % 2)))


def chain_guide() -> None:
    logits = pyro.param("logits", lambda: torch.zeros(8))
    for t in range(8):
        pyro.sample(f"z{t}", dist.Bernoulli(logits=logits[t]))


def test_what_comes_before_a_draw_is_no_part_of_its_signal() -> None:
    """The last draw of a chain has the signal of its own three terms alone."""
    run = execute(chain, chain_guide, (), {}, num_particles=5)
    terms = score_terms(run, Routing(per_draw=True))
    assert terms is not None
    densities, forward = run.log_probs(run.model), run.log_probs(run.guide)
    last = densities["z7"] + densities["y7"] - forward["z7"]
    torch.testing.assert_close(terms.below[:, 7], last.detach())
    torch.testing.assert_close(terms.below[:, 0], (run.log_target() - run.log_forward()).detach())


def test_a_model_that_reads_a_late_draw_early_keeps_it_in_the_signal() -> None:
    """``w`` comes first in the model and second in the guide, where it depends on ``s``: so does the density of y."""

    def model() -> None:
        w = pyro.sample("w", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(w, 0.5), obs=torch.tensor(1.0))
        pyro.sample("s", dist.Bernoulli(0.5))

    def guide() -> None:
        s = pyro.sample("s", dist.Bernoulli(logits=pyro.param("logit", lambda: torch.tensor(0.3))))
        pyro.sample("w", dist.Normal(s, 0.7))

    logit = torch.tensor(0.3, requires_grad=True)
    q = torch.stack([1 - logit.sigmoid(), logit.sigmoid()])
    s = torch.tensor([0.0, 1.0])
    inner = -0.5 * (s**2 + 0.49) - 2 * ((s - 1) ** 2 + 0.49) - q.log()
    (exact,) = torch.autograd.grad(-(q * inner).sum(), logit)
    assert_unbiased(gradients(ELBO(2), model, guide, repeat=800), exact[None])


def test_elements_of_a_sequential_plate_are_independent() -> None:
    def model() -> None:
        for i in pyro.plate("data", 3):
            z = pyro.sample(f"z{i}", dist.Bernoulli(0.3))
            pyro.sample(f"y{i}", dist.Normal(z, 1.0), obs=Y[i])

    def guide() -> None:
        for i in pyro.plate("data", 3):
            pyro.sample(f"z{i}", dist.Bernoulli(0.4))

    run = execute(model, guide, (), {}, num_particles=2)
    terms = score_terms(run, Routing(detach=True, per_draw=True))
    assert terms is not None
    p, q = run.log_probs(run.model), run.log_probs(run.guide)
    own = [p[f"z{i}"] + p[f"y{i}"] - q[f"z{i}"] for i in range(3)]
    torch.testing.assert_close(terms.below, torch.stack(own, -1))


def test_signals_beside_sites_that_the_model_sums_out() -> None:
    """An enumerated class beside a drawn one, in one plate: element by element, and unbiased."""
    locs = torch.tensor([-1.0, 2.0])

    @config_enumerate
    def model() -> None:
        pyro.sample("mean", dist.Normal(0.0, 1.0))
        with pyro.plate("data", 4):
            c = pyro.sample("c", dist.Categorical(torch.tensor([0.4, 0.6])))
            z = pyro.sample("z", dist.Bernoulli(0.3), infer={"enumerate": None})
            pyro.sample("y", dist.Normal(locs[c] + z, 1.0), obs=Y)

    def guide() -> None:
        pyro.sample("mean", dist.Normal(0.0, 1.0))
        with pyro.plate("data", 4):
            pyro.sample("z", dist.Bernoulli(logits=pyro.param("logits", lambda: torch.zeros(4))))

    logits = torch.zeros(4, requires_grad=True)
    z = torch.tensor([[0.0], [1.0]])
    parts = dist.Normal(locs[:, None, None] + z, 1.0).log_prob(Y) + torch.tensor([0.4, 0.6]).log()[:, None, None]
    q = torch.stack([1 - logits.sigmoid(), logits.sigmoid()])
    inner = torch.logsumexp(parts, 0) + dist.Bernoulli(0.3).log_prob(z) - q.log()
    (exact,) = torch.autograd.grad(-(q * inner).sum(), logits)
    found = gradients(ELBO(3), model, guide, repeat=200)
    assert_unbiased(found, exact)
    assert found.std(0).max() < 1.0


def with_factor(y: Tensor) -> None:
    with pyro.plate("data", 3):
        pyro.sample("y", dist.Normal(pyro.sample("z", dist.Normal(0.0, 1.0)), 1.0), obs=y)


def guide_with_factor(y: Tensor) -> None:
    a = pyro.param("a", lambda: torch.tensor(1.0))
    with pyro.plate("data", 3):
        pyro.sample("z", dist.Normal(torch.zeros(3), 0.7))
        pyro.factor("extra", -(a * a) * torch.ones(3), has_rsample=True)


@pytest.mark.parametrize(
    "loss",
    [
        ELBO(),
        ELBO(4),
        ELBO(estimator="score"),
        ELBO(4, estimator="vimco"),
        ImportanceWeightedELBO(4),
        ImportanceWeightedELBO(4, estimator="vimco"),
        ImportanceWeightedELBO(4, estimator="score"),
    ],
    ids=repr,
)
def test_a_factor_of_the_guide_is_no_random_choice(loss: ELBO) -> None:
    """Its log density is a constant of the draws: the derivative of three times ``-a**2`` in ``-log q``, exactly."""
    found = gradients(loss, with_factor, guide_with_factor, Y[:3], repeat=3)
    torch.testing.assert_close(found, torch.full((3, 1), -6.0))


def test_leave_one_out_signals_need_memory_for_each_particle_alone() -> None:
    """50,000 particles: a square of them would take 20 GB."""
    log_weight = torch.randn(50_000)
    score = torch.zeros(50_000, requires_grad=True)
    for alpha in (1.0, 0.0):
        step = Step.from_proposal(log_weight, torch.zeros(50_000), log_score=score)
        (found,) = torch.autograd.grad(RenyiBound(alpha, "vimco")(step).surrogate, score)
        others = (log_weight.sum() - log_weight) / 49_999
        bound = RenyiBound(alpha).bound
        for k in (0, 7, 49_999):
            without = torch.cat([log_weight[:k], log_weight[k + 1 :], others[k : k + 1]])
            control = 1 / 50_000 if alpha == 1.0 else 0.0
            assert float(-found[k]) == pytest.approx(float(bound(log_weight) - bound(without)) + control, abs=1e-12)


def test_particles_without_support_have_finite_signals() -> None:
    score = torch.zeros(3, requires_grad=True)
    step = Step.from_proposal(torch.tensor([0.0, -torch.inf, 1.0]), torch.zeros(3), log_score=score)
    (found,) = torch.autograd.grad(RenyiBound(0.0, "vimco")(step).surrogate, score)
    assert bool(found.isfinite().all())


def sticks(y: Tensor) -> None:
    """A Dirichlet process mixture, cut at four components."""
    with pyro.plate("sticks", 3):
        b = pyro.sample("b", dist.Beta(1.0, 1.0))
    rest = torch.nn.functional.pad((1 - b).cumprod(-1), (1, 0), value=1)
    weights = torch.nn.functional.pad(b, (0, 1), value=1) * rest
    with pyro.plate("components", 4):
        mu = pyro.sample("mu", dist.Normal(0.0, 4.0))
    with pyro.plate("data", len(y)):
        z = pyro.sample("z", dist.Categorical(weights))
        pyro.sample("y", dist.Normal(mu[z], 1.0), obs=y)


def sticks_guide(y: Tensor) -> None:
    with pyro.plate("sticks", 3):
        pyro.sample("b", dist.Beta(torch.ones(3), pyro.param("kappa", lambda: torch.tensor([1.0, 2.0, 1.5]))))
    with pyro.plate("components", 4):
        pyro.sample("mu", dist.Normal(pyro.param("tau", lambda: torch.tensor([-3.0, -1.0, 1.0, 2.5])), 0.8))
    phi = pyro.param("phi", lambda: torch.randn(len(y), 4))
    with pyro.plate("data", len(y)):
        pyro.sample("z", dist.Categorical(logits=phi))


def test_one_particle_learns_a_dirichlet_process_mixture_as_pyro_does() -> None:
    """The gradient of Pyro's ``TraceGraph_ELBO`` draw by draw, with less noise than that of ``Trace_ELBO``."""
    y = torch.cat([torch.randn(8) - 4, torch.randn(8) + 4])
    found = {}
    for name, loss in {"graph": TraceGraph_ELBO(), "trace": Trace_ELBO(), "ours": ELBO()}.items():
        pyro.clear_param_store()
        pyro.set_rng_seed(0)
        loss.loss(sticks, sticks_guide, y)
        pyro.set_rng_seed(1)
        found[name] = gradients(loss, sticks, sticks_guide, y, repeat=40)
    torch.testing.assert_close(found["ours"][0], found["graph"][0], rtol=0, atol=1e-9)
    assert found["ours"].std(0).mean() < found["trace"].std(0).mean()
