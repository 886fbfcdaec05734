"""What SVI sees: equality with Pyro where Pyro is right, weights per datum, subsampling, refusals, sums."""

import math
from collections.abc import Callable
from itertools import combinations

import known
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import SVI, ReweightedWakeSleep, Trace_ELBO, TraceEnum_ELBO, TraceGraph_ELBO, config_enumerate
from pyro.infer import RenyiELBO as PyroRenyiELBO
from pyro.infer.autoguide import AutoDelta, AutoMultivariateNormal, AutoNormal
from pyro.nn import PyroModule, PyroParam, PyroSample
from torch import Tensor

from pplvi.losses.base import Loss, WeightedELBO
from pplvi.losses.elbo import ELBO, ChiELBO, ForwardKL, ImportanceWeightedELBO, RenyiELBO, ThermodynamicELBO
from pplvi.objectives.bounds import RenyiBound
from pplvi.objectives.forward_kl import ForwardKLDivergence
from pplvi.samplers.ancestral import Ancestral
from pplvi.weights.algebra import effective_sample_size

pytestmark = pytest.mark.usefixtures("float64")

LOSSES = [
    ELBO(4),
    ELBO(4, "exact"),
    ELBO(4, estimator="stl"),
    ELBO(4, estimator="vimco"),
    ELBO(4, estimator="score"),
    ImportanceWeightedELBO(4),
    ImportanceWeightedELBO(4, estimator="dreg"),
    ImportanceWeightedELBO(4, estimator="vimco"),
    RenyiELBO(0.5, 4),
    RenyiELBO(0.5, 4, estimator="dreg"),
    ChiELBO(4),
    ThermodynamicELBO(4, (0.0, 0.3)),
    ForwardKL(4),
]
NONLINEAR = [loss for loss in LOSSES if not isinstance(loss, ELBO)]


# One datum: equal to Pyro where Pyro is right.


def normal_model() -> None:
    mean = pyro.param("mean", torch.tensor(0.4))
    z = pyro.sample("z", dist.Normal(mean, 1.0))
    x = pyro.sample("x", dist.Normal(torch.tensor([0.2, -0.1]), 1.0).to_event(1))
    pyro.sample("y", dist.Normal(z + x.sum(-1), 0.7), obs=torch.tensor(1.3))


def normal_guide() -> None:
    pyro.sample("z", dist.Normal(pyro.param("loc", torch.tensor(0.3)), pyro.param("scale", torch.tensor(0.8))))
    pyro.sample("x", dist.Normal(pyro.param("locs", torch.zeros(2)), 0.9).to_event(1))


def discrete_model() -> None:
    c = pyro.sample("c", dist.Bernoulli(logits=pyro.param("prior", torch.tensor(0.2))))
    d = pyro.sample("d", dist.Categorical(logits=torch.stack([c, 1 - c, 0.5 * c], -1)))
    pyro.sample("y", dist.Normal(c - d, 1.0), obs=torch.tensor(0.6))


def discrete_guide() -> None:
    pyro.sample("c", dist.Bernoulli(logits=pyro.param("logit", torch.tensor(0.1))))
    pyro.sample("d", dist.Categorical(logits=pyro.param("logits", torch.tensor([0.1, -0.4, 0.3]))))


def value_and_gradients(
    loss: Loss | Trace_ELBO, model: Callable, guide: Callable, seed: int = 7
) -> tuple[float, dict[str, Tensor]]:
    pyro.clear_param_store()
    pyro.set_rng_seed(seed)
    value = loss.loss_and_grads(model, guide)
    store = pyro.get_param_store()
    return value, {name: store[name].unconstrained().grad for name in store}


PYRO = {"max_plate_nesting": 0, "vectorize_particles": True}
PAIRS = [
    (ELBO(), Trace_ELBO(max_plate_nesting=0), normal_model, normal_guide),
    (ELBO(6), Trace_ELBO(6, **PYRO), normal_model, normal_guide),
    (ELBO(6, vectorize_particles=False), Trace_ELBO(6, max_plate_nesting=0), normal_model, normal_guide),
    (ImportanceWeightedELBO(6), PyroRenyiELBO(0, 6, **PYRO), normal_model, normal_guide),
    (RenyiELBO(0.3, 6), PyroRenyiELBO(0.3, 6, **PYRO), normal_model, normal_guide),
]


@pytest.mark.parametrize(("ours", "pyros", "model", "guide"), PAIRS)
def test_one_datum_equals_pyro(ours: Loss, pyros: Trace_ELBO, model: Callable, guide: Callable) -> None:
    value, gradients = value_and_gradients(ours, model, guide)
    expected, reference = value_and_gradients(pyros, model, guide)
    assert value == pytest.approx(expected, abs=1e-10)
    assert gradients.keys() == reference.keys()
    for name in reference:
        torch.testing.assert_close(gradients[name], reference[name], rtol=0, atol=1e-10)


@pytest.mark.parametrize("num_particles", [1, 6])
def test_score_functions_equal_pyros(num_particles: int) -> None:
    """What comes before a draw is left out of its cost: the first has the whole bound, as in Trace_ELBO, and the
    last has that of TraceGraph_ELBO."""
    options = PYRO if num_particles > 1 else {"max_plate_nesting": 0}
    value, whole = value_and_gradients(Trace_ELBO(num_particles, **options), discrete_model, discrete_guide)
    _, after = value_and_gradients(TraceGraph_ELBO(num_particles, **options), discrete_model, discrete_guide)
    for loss in (ELBO(num_particles, estimator="score"), *([ELBO(1)] if num_particles == 1 else [])):
        ours, gradients = value_and_gradients(loss, discrete_model, discrete_guide)
        assert ours == pytest.approx(value, abs=1e-10)
        for name, expected in {"prior": whole, "logit": whole, "logits": after}.items():
            torch.testing.assert_close(gradients[name], expected[name], rtol=0, atol=1e-10)


def test_enumeration_equals_pyro() -> None:
    for model, guide in (
        (config_enumerate(discrete_model), lambda: None),
        (discrete_model, config_enumerate(discrete_guide)),
    ):
        value, gradients = value_and_gradients(ELBO(), model, guide)
        expected, reference = value_and_gradients(TraceEnum_ELBO(max_plate_nesting=0), model, guide)
        assert value == pytest.approx(expected, abs=1e-10)
        for name in reference:
            torch.testing.assert_close(gradients[name], reference[name], rtol=0, atol=1e-10)


@pytest.mark.parametrize(("model", "guide"), [(normal_model, normal_guide), (discrete_model, discrete_guide)])
def test_wake_phi_equals_reweighted_wake_sleep(model: Callable, guide: Callable) -> None:
    """Guide parameters follow the wake-phi update, model parameters the importance-weighted bound (wake-theta)."""
    wake = ReweightedWakeSleep(6, insomnia=1.0, model_has_params=True, max_plate_nesting=0, vectorize_particles=True)
    pyro.clear_param_store()
    pyro.set_rng_seed(7)
    wake.loss_and_grads(model, guide)
    store = pyro.get_param_store()
    reference = {name: store[name].grad.clone() for name in store}
    _, phi = value_and_gradients(ForwardKL(6), model, guide)
    _, theta = value_and_gradients(ImportanceWeightedELBO(6, estimator="score"), model, guide)
    for name, gradient in reference.items():
        ours = theta[name] if name in ("mean", "prior") else phi[name]
        torch.testing.assert_close(ours, gradient, rtol=0, atol=1e-10)


def test_forward_kl_is_right_where_pyros_wake_phi_is_biased() -> None:
    """A hierarchical guide: values have to be detached before later sites use them."""
    problem = known.NESTED
    expected = known.wake_phi(problem, 3, size=60_000)
    found = known.estimate(ForwardKL(3), problem, 60_000)
    known.check_one("loc", found.gradients["loc"], expected.gradients["loc"])


# Weights per datum.

DATA = torch.linspace(-2.0, 2.0, 200, dtype=torch.float64)


def local_model(x: Tensor) -> None:
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


def local_guide(x: Tensor) -> None:
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(0.5 * x + 0.5, 0.9))


def test_importance_weights_are_per_datum() -> None:
    (step,) = ImportanceWeightedELBO(1000).steps(local_model, local_guide, DATA)
    assert step.log_weight.shape == (1000, 200)
    assert effective_sample_size(step.log_weight).median() > 500
    assert effective_sample_size(step.log_weight.sum(-1)) < 5  # flattened: next to nothing is left


def test_bounds_of_independent_data_add() -> None:
    """With weights per datum the bound on 200 data is as tight as on one: K=1000 gives the log evidence."""
    exact = dist.Normal(0.0, 2.0**0.5).log_prob(DATA).sum().item()
    assert -ImportanceWeightedELBO(1000).loss(local_model, local_guide, DATA) == pytest.approx(exact, abs=0.3)


# Subsampling.


def subsampled_programs(index: Tensor | None) -> tuple[Callable, Callable]:
    """Local latents in a subsampled plate, inside replicas; three elements of data, two to a minibatch."""
    replicas, data = 5_000, torch.tensor([0.5, 2.0, -1.0])

    def model() -> None:
        prior = pyro.param("prior", torch.full((replicas, 1), 0.3))
        with pyro.plate("replicas", replicas, dim=-2), pyro.plate("data", 3, subsample=index, dim=-1) as i:
            z = pyro.sample("z", dist.Normal(prior, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=data[i])

    def guide() -> None:
        loc = pyro.param("loc", torch.tensor([0.8, 0.2, 0.5]).expand(replicas, 3).clone())
        log_scale = pyro.param("log_scale", torch.full((replicas, 1), -0.1))
        with pyro.plate("replicas", replicas, dim=-2), pyro.plate("data", 3, subsample=index, dim=-1) as i:
            pyro.sample("z", dist.Normal(loc[:, i], log_scale.exp()))

    return model, guide


def replica_estimates(loss: WeightedELBO, index: Tensor | None) -> dict[str, Tensor]:
    pyro.clear_param_store()
    (step,) = loss.steps(*subsampled_programs(index))
    assert step.scale == (1.0 if index is None else 3 / len(index))
    terms = loss.objective(step)
    (step.scale * terms.surrogate.sum()).backward()
    store = pyro.get_param_store()
    gradients = {name: torch.zeros(1) if store[name].grad is None else store[name].grad.sum(-1) for name in store}
    return {"value": step.scale * terms.value.sum(-1), **gradients}


@pytest.mark.parametrize("loss", LOSSES, ids=repr)
def test_minibatches_of_local_latents_average_to_the_full_data(loss: WeightedELBO) -> None:
    """The average over all minibatches of values and gradients, not only in expectation over draws of the plate."""
    full = replica_estimates(loss, None)
    batches = [replica_estimates(loss, torch.tensor(pair)) for pair in combinations(range(3), 2)]
    for name, expected in full.items():
        if expected.any():
            average = torch.stack([batch[name] for batch in batches]).mean(0)
            bar = (known.error_bar(average) ** 2 + known.error_bar(expected) ** 2) ** 0.5
            assert abs(average.mean() - expected.mean()) < known.SIGMAS * bar
            assert bar < 0.05 * expected.mean().abs() or name != "value"


@pytest.mark.parametrize("loss", [ELBO(3), ELBO(3, "exact"), ELBO(3, estimator="stl")], ids=repr)
def test_minibatches_with_global_latents_average_to_the_full_data(loss: WeightedELBO) -> None:
    """Rows are subsampled below two levels of latents: the scale is inside the densities of a linear objective."""
    expected = {"value": known.nested_elbo, **known.NESTED.params}
    problem, found = known.NESTED, []
    for rows in combinations(range(3), 2):
        programs = nested_programs(torch.tensor(rows))
        found.append(known.estimate(loss, problem, known.REPLICAS, programs))
    p = problem.plain_params(1)
    exact = known.differentiated(known.nested_elbo(p), p)
    average = known.Estimates(
        torch.stack([f.value for f in found]).mean(0),
        {name: torch.stack([f.gradients[name] for f in found]).mean(0) for name in found[0].gradients},
    )
    assert expected.keys() - {"value"} == average.gradients.keys()
    known.check(average, exact, -1.0)


def nested_programs(rows: Tensor) -> tuple[Callable, Callable]:
    def parameter(name: str) -> Tensor:
        return pyro.param(name, lambda: torch.full((known.REPLICAS, 1, 1, 1), known.NESTED.params[name]))

    def model() -> None:
        with pyro.plate("replicas", known.REPLICAS, dim=-4):
            known.nested_model(parameter, rows)

    def guide() -> None:
        with pyro.plate("replicas", known.REPLICAS, dim=-4):
            known.nested_guide(parameter)

    return model, guide


def minibatch_model(data: Tensor) -> None:
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    with pyro.plate("data", 10, subsample_size=4) as index:
        pyro.sample("x", dist.Normal(mu, 1.0), obs=data[index])


def minibatch_guide(data: Tensor) -> None:
    pyro.sample("mu", dist.Normal(pyro.param("mu_loc", torch.tensor(0.3)), 0.3))


@pytest.mark.parametrize("loss", NONLINEAR, ids=repr)
def test_nonlinear_bounds_refuse_biased_subsampling(loss: WeightedELBO) -> None:
    data = torch.randn(10)
    with pytest.raises(ValueError, match=r"biased here.*\['data'\].*allow_biased_subsampling=True"):
        loss.loss(minibatch_model, minibatch_guide, data)
    willing = WeightedELBO(loss.objective, num_particles=4, allow_biased_subsampling=True)
    assert torch.tensor(willing.loss_and_grads(minibatch_model, minibatch_guide, data)).isfinite()


def test_random_minibatches_average_to_the_full_data() -> None:
    data = torch.arange(10.0)
    losses = torch.tensor([ELBO(200, "exact").loss(minibatch_model, minibatch_guide, data) for _ in range(300)])
    with poutine.block():
        expected = ELBO(20_000, "exact").loss(*full_data_programs(), data)
    assert abs(losses.mean() - expected) < known.SIGMAS * losses.std() / len(losses) ** 0.5 + 0.05
    assert losses.std() > 5  # they are minibatches, not always the same one


def full_data_programs() -> tuple[Callable, Callable]:
    def model(data: Tensor) -> None:
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        with pyro.plate("data", 10):
            pyro.sample("x", dist.Normal(mu, 1.0), obs=data)

    return model, minibatch_guide


# Every class works where Pyro's do.


@pytest.mark.parametrize("loss", LOSSES, ids=repr)
def test_svi_trains_with_every_loss(loss: WeightedELBO) -> None:
    svi = SVI(normal_model, normal_guide, pyro.optim.Adam({"lr": 0.02}), loss)
    before = svi.evaluate_loss()
    assert isinstance(svi.step(), float)
    started = {name: value.detach().clone() for name, value in pyro.get_param_store().items()}
    for _ in range(30):
        svi.step()
    for name, value in pyro.get_param_store().items():
        untouched = isinstance(loss, ForwardKL) and name == "mean"
        assert torch.equal(value, started[name]) == untouched, name
    assert torch.tensor(before).isfinite()


class Regression(PyroModule):
    def __init__(self) -> None:
        super().__init__()
        self.noise = PyroParam(torch.tensor(0.5), torch.distributions.constraints.positive)
        self.weight = PyroSample(dist.Normal(0.0, 1.0))

    def forward(self, x: Tensor, y: Tensor) -> None:
        mean = self.weight * x
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(mean, self.noise), obs=y)


@pytest.mark.parametrize("loss", LOSSES, ids=repr)
def test_elbo_module_with_a_torch_optimiser(loss: WeightedELBO) -> None:
    x = torch.linspace(-1.0, 1.0, 20)
    model = Regression()
    guide = AutoNormal(model)
    module = loss(model, guide)
    module(x, x)
    optimiser = torch.optim.Adam(module.parameters(), lr=0.05)
    values = []
    for _ in range(20):
        optimiser.zero_grad()
        value = module(x, 2 * x)
        value.backward()
        optimiser.step()
        values.append(value.item())
    assert model.noise.item() != 0.5 or isinstance(loss, ForwardKL)
    assert guide.locs.weight.item() != 0.0
    assert torch.tensor(values).isfinite().all()


@pytest.mark.parametrize("loss", LOSSES, ids=repr)
def test_differentiable_loss_is_the_sum_of_the_objective_over_data(loss: WeightedELBO) -> None:
    pyro.set_rng_seed(3)
    (step,) = loss.steps(local_model, local_guide, DATA)
    pyro.set_rng_seed(3)
    value = loss.differentiable_loss(local_model, local_guide, DATA)
    assert value.item() == pytest.approx(loss.objective(step).value.sum().item(), abs=1e-9)
    pyro.set_rng_seed(3)
    assert loss.loss(local_model, local_guide, DATA) == pytest.approx(value.item(), abs=1e-9)


def test_one_object_serves_models_of_different_depth() -> None:
    loss = ImportanceWeightedELBO(3)
    assert torch.tensor(loss.loss(normal_model, normal_guide)).isfinite()
    assert torch.tensor(loss.loss(local_model, local_guide, DATA)).isfinite()
    assert torch.tensor(loss.loss(*known.NESTED.programs(2))).isfinite()


def test_maximum_likelihood_needs_no_latent_site() -> None:
    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(pyro.param("loc", torch.tensor(0.0)), 1.0), obs=x)

    for loss in (
        ELBO(),
        ELBO(3, "exact"),
        ImportanceWeightedELBO(2),
        RenyiELBO(0.5, 2),
        ChiELBO(2),
        ELBO(2, estimator="stl"),
    ):
        pyro.clear_param_store()
        svi = SVI(model, lambda x: None, pyro.optim.SGD({"lr": 0.01 / 200}), loss)
        expected = -dist.Normal(0.0, 1.0).log_prob(DATA + 1).sum().item()
        value = svi.step(DATA + 1)
        assert value == pytest.approx(expected if loss.monitor == "lower" else -expected)
        moved = pyro.param("loc").item()
        assert moved == pytest.approx(0.01 if loss.monitor == "lower" else -0.01)


# Looped particles.


def unvectorisable_model() -> None:
    z = pyro.sample("z", dist.Normal(0.3, 1.0))
    level = 1.0 if z.item() > 0 else -1.0  # a branch on one number
    pyro.sample("y", dist.Normal(z + level, 1.0), obs=torch.tensor(1.0))


def single_guide() -> None:
    pyro.sample("z", dist.Normal(pyro.param("loc", torch.tensor(0.5)), 0.8))


@pytest.mark.parametrize("loss", LOSSES, ids=repr)
def test_models_that_do_not_broadcast_are_looped_or_carried(loss: WeightedELBO) -> None:
    for way in (False, None):
        pyro.clear_param_store()
        trained = WeightedELBO(loss.objective, num_particles=4, vectorize_particles=way)
        assert torch.tensor(trained.loss_and_grads(unvectorisable_model, single_guide)).isfinite()
        assert pyro.param("loc").grad is not None
    with pytest.raises(ValueError, match="vectorize='broadcast': these programs cannot be run that way"):
        WeightedELBO(loss.objective, num_particles=4, vectorize_particles="broadcast").loss(
            unvectorisable_model, single_guide
        )


@pytest.mark.parametrize("loss", [ELBO(3), ImportanceWeightedELBO(3, estimator="dreg"), ForwardKL(3)], ids=repr)
def test_looped_equals_vectorised_in_distribution(loss: WeightedELBO) -> None:
    looped = WeightedELBO(loss.objective, num_particles=3, vectorize_particles=False)
    one, other = (known.estimate(way, known.GAUSSIAN) for way in (looped, loss))
    for name, value in one.rows():
        expected = dict(other.rows())[name]
        bar = (known.error_bar(value) ** 2 + known.error_bar(expected) ** 2) ** 0.5
        assert abs(value.mean() - expected.mean()) <= known.SIGMAS * bar


@pytest.mark.parametrize("estimator", [None, "dreg"])
def test_looped_particles_share_their_minibatch(estimator: str | None) -> None:
    """A bound on K draws compares weights of the same data: with the exact posterior it has no variance."""
    data = torch.arange(8.0)

    def model() -> None:
        with pyro.plate("data", 8, subsample_size=2) as index:
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=data[index])

    def guide() -> None:
        with pyro.plate("data", 8, subsample_size=2) as index:
            pyro.sample("z", dist.Normal(data[index] / 2, 0.5**0.5))

    loss = ImportanceWeightedELBO(5, estimator=estimator, vectorize_particles=False)
    (step,) = loss.steps(model, guide)
    assert step.log_weight.shape == (5, 2)
    torch.testing.assert_close(step.log_weight, step.log_weight[:1].expand(5, 2))


# Terms of the ELBO.


@pytest.mark.parametrize("entropy", ["sampled", "exact"])
@pytest.mark.parametrize("vectorize", [True, False])
def test_terms_are_the_two_halves(entropy: str, vectorize: bool) -> None:
    count = 20_000 if vectorize else 200
    loss = ELBO(count, entropy, vectorize_particles=vectorize)
    found = loss.terms(normal_model, normal_guide, per_site=True)
    assert found["elbo"] == pytest.approx(found["expected_log_prob"] + found["entropy"])
    assert sum(found["sites"]["expected_log_prob"].values()) == pytest.approx(found["expected_log_prob"])
    assert sum(found["sites"]["entropy"].values()) == pytest.approx(found["entropy"])
    assert found["sites"]["expected_log_prob"].keys() == {"z", "x", "y"}
    exact = {"z": dist.Normal(0.0, 0.8).entropy().item(), "x": 2 * dist.Normal(0.0, 0.9).entropy().item()}
    allowed = 1e-10 if entropy == "exact" else 4.5 / count**0.5
    assert found["sites"]["entropy"] == pytest.approx(exact, abs=allowed)
    prior = dist.Normal(0.4, 1.0).log_prob(torch.tensor(0.3)).item() - 0.32
    assert found["sites"]["expected_log_prob"]["z"] == pytest.approx(prior, abs=4.5 * 0.7 / count**0.5)


def test_terms_count_a_minibatch_in_full() -> None:
    data = torch.zeros(10)
    found = ELBO(1, "exact").terms(minibatch_model, minibatch_guide, data, per_site=True)
    local = found["sites"]["expected_log_prob"]["x"]
    assert local < 10 * dist.Normal(0.0, 1.0).log_prob(torch.tensor(0.0)).item()
    assert found["elbo"] == pytest.approx(sum(found["sites"]["expected_log_prob"].values()) + found["entropy"])


def test_terms_of_a_minibatch_of_local_latents_are_those_of_its_loss() -> None:
    loss = ELBO(2)
    programs = subsampled_programs(torch.tensor([0, 2]))
    pyro.set_rng_seed(4)
    value = loss.loss(*programs)
    pyro.set_rng_seed(4)
    found = loss.terms(*programs, per_site=True)
    assert found["elbo"] == pytest.approx(-value)
    assert sum(found["sites"]["entropy"].values()) == pytest.approx(found["entropy"])


def test_exact_entropy_of_an_automatic_guide_keeps_its_sampled_jacobian() -> None:
    """A log-normal guide: entropy of the normal plus the expected log of the value."""

    def model() -> None:
        pyro.sample("rate", dist.Gamma(2.0, 1.0))

    guide = AutoNormal(model, init_scale=0.3)
    guide()
    found = ELBO(20_000, "exact").terms(model, guide)
    expected = dist.Normal(0.0, 0.3).entropy().item() + guide.locs.rate.item()
    assert found["entropy"] == pytest.approx(expected, abs=4.5 * 0.3 / 20_000**0.5)


def test_exact_entropy_is_refused_where_there_is_none() -> None:
    def model() -> None:
        pyro.sample("z", dist.Normal(0.0, 1.0))

    def guide() -> None:
        transform = dist.transforms.SigmoidTransform()
        pyro.sample("z", dist.TransformedDistribution(dist.Normal(torch.zeros(()), 1.0), [transform]))

    with pytest.raises(ValueError, match=r"'z'.*no exact entropy.*entropy='sampled'"):
        ELBO(2, "exact").loss(model, guide)
    with pytest.raises(ValueError, match=r"enumerated.*Drop entropy='exact'"):
        ELBO(1, "exact").loss(discrete_model, config_enumerate(discrete_guide))


def test_terms_per_site_are_refused_for_enumerated_sites() -> None:
    with pytest.raises(ValueError, match="per_site=True with enumerated sites"):
        ELBO().terms(config_enumerate(discrete_model), lambda: None, per_site=True)


# Sums and multiples.


def test_losses_add_and_scale() -> None:
    total = 0.5 * ELBO(2) + ImportanceWeightedELBO(3) * 2 + ChiELBO(2)
    values = [value_and_gradients(total, normal_model, normal_guide)]
    pyro.clear_param_store()
    pyro.set_rng_seed(7)
    parts = [(0.5, ELBO(2)), (2.0, ImportanceWeightedELBO(3)), (1.0, ChiELBO(2))]
    expected = sum(weight * part.differentiable_loss(normal_model, normal_guide) for weight, part in parts)
    expected.backward()
    assert values[0][0] == pytest.approx(expected.item(), abs=1e-12)
    for name, gradient in values[0][1].items():
        torch.testing.assert_close(gradient, pyro.param(name).grad)
    assert str(total) == (
        "0.5 * ELBO(num_particles=2) + 2 * ImportanceWeightedELBO(num_particles=3) + ChiELBO(num_particles=2)"
    )


def test_losses_sum_and_divide() -> None:
    assert repr(sum([ELBO(2), ChiELBO(2)]) / 2) == "0.5 * ELBO(num_particles=2) + 0.5 * ChiELBO(num_particles=2)"
    with pytest.raises(TypeError):
        1 + ELBO()
    with pytest.raises(TypeError):
        ELBO() / ELBO()


def test_sums_are_vectorised_where_all_their_terms_are() -> None:
    assert (ELBO() + ChiELBO(2)).vectorize_particles
    assert not (ELBO() + ChiELBO(2, vectorize_particles=False)).vectorize_particles


def test_sums_report_a_bound_only_where_they_are_one() -> None:
    assert (ELBO() + 2 * RenyiELBO()).monitor == "lower"
    assert (0.5 * ChiELBO()).monitor == "upper"
    assert (ELBO() + ChiELBO()).monitor is None
    assert (ELBO() + ForwardKL()).monitor is None
    assert (-1.0 * ELBO()).monitor is None
    with pytest.raises(TypeError):
        ELBO() + 1.0
    with pytest.raises(TypeError):
        ELBO() * ELBO()


def test_sums_train() -> None:
    svi = SVI(normal_model, normal_guide, pyro.optim.Adam({"lr": 0.01}), ELBO(2) + 0.1 * ForwardKL(5))
    first = svi.step()
    assert isinstance(first, float)
    assert pyro.param("loc").item() != 0.3


# Refusals.

REFUSALS = [
    (lambda: ELBO(0), "num_particles=0.*at least 1"),
    (lambda: ELBO(2.5), "num_particles=2.5.*whole number"),
    (lambda: ImportanceWeightedELBO(-1), "num_particles=-1"),
    (lambda: ELBO(estimator="dreg"), "ELBO has no estimator='dreg'.*'stl'"),
    (lambda: ImportanceWeightedELBO(estimator="reinforce"), "estimator='reinforce'.*'dreg'"),
    (lambda: ForwardKL(estimator="score"), "ForwardKL has no estimator='score'"),
    (lambda: ThermodynamicELBO(estimator="reparam"), "ThermodynamicELBO has no estimator"),
    (lambda: ELBO(entropy="mean"), "entropy='mean'.*'sampled', 'exact' or 'kl'"),
    (lambda: ELBO(entropy="exact", estimator="stl"), "entropy='exact'.*drop it or estimator='stl'"),
    (lambda: ELBO(1, estimator="vimco"), "num_particles=1.*at least 2"),
    (lambda: ImportanceWeightedELBO(1, estimator="vimco"), "num_particles=1.*at least 2"),
    (lambda: RenyiELBO(-0.5), "alpha=-0.5.*ChiELBO"),
    (lambda: RenyiELBO(1.5), "alpha=1.5.*between 0"),
    (lambda: ThermodynamicELBO(1), "num_particles=1.*at least 2"),
    (lambda: ThermodynamicELBO(betas=()), "betas=.*start at 0"),
    (lambda: ThermodynamicELBO(betas=(0.1, 0.5)), "betas=.*start at 0"),
    (lambda: ThermodynamicELBO(betas=(0.0, 0.5, 0.2)), "betas=.*increasing"),
    (lambda: ThermodynamicELBO(betas=(0.0, 1.0)), "betas=.*below 1"),
    (lambda: ForwardKL(1), "num_particles=1.*at least 2"),
    (lambda: WeightedELBO(ForwardKLDivergence(), num_particles=1), "num_particles=1.*at least 2"),
    (lambda: WeightedELBO(RenyiBound(0.0), Ancestral()), "cannot use draws from the model.*guide"),
]


@pytest.mark.parametrize(("make", "message"), REFUSALS)
def test_what_cannot_be_is_refused(make: Callable[[], Loss], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize("loss", NONLINEAR, ids=repr)
def test_nonlinear_objectives_refuse_enumeration_in_the_guide(loss: WeightedELBO) -> None:
    with pytest.raises(ValueError, match="enumerat"):
        loss.loss(discrete_model, config_enumerate(discrete_guide))


@pytest.mark.parametrize(
    "loss",
    [ELBO(2, estimator="stl"), ImportanceWeightedELBO(2, estimator="dreg"), ELBO(2, estimator="reparam")],
    ids=repr,
)
def test_estimators_of_the_path_refuse_discrete_sites(loss: WeightedELBO) -> None:
    with pytest.raises(ValueError, match=r"reparameterised.*Use estimator=None"):
        loss.loss(discrete_model, discrete_guide)


def test_one_particle_has_no_baseline_and_needs_none() -> None:
    """The mean over seeds is the gradient of the enumerated bound."""
    _, exact = value_and_gradients(ELBO(), discrete_model, config_enumerate(discrete_guide))
    for loss in (ELBO(1), ImportanceWeightedELBO(1)):
        found: dict[str, list[Tensor]] = {name: [] for name in exact}
        for seed in range(600):
            _, gradients = value_and_gradients(loss, discrete_model, discrete_guide, seed)
            for name, gradient in gradients.items():
                found[name].append(gradient)
        for name, drawn in found.items():
            every = torch.stack(drawn)
            assert bool(((every.mean(0) - exact[name]).abs() < 4.5 * every.std(0) / math.sqrt(600)).all()), name


@pytest.mark.parametrize("loss", [ForwardKL(2), ThermodynamicELBO(2), ELBO(2, estimator="score")], ids=repr)
def test_detached_draws_refuse_point_estimates(loss: WeightedELBO) -> None:
    def model() -> None:
        pyro.sample("y", dist.Normal(pyro.sample("z", dist.Normal(0.0, 1.0)), 1.0), obs=torch.tensor(1.0))

    with pytest.raises(ValueError, match=r"'z'.*deterministic function of parameters"):
        loss.loss_and_grads(model, AutoDelta(model))


def test_monitors_and_names() -> None:
    monitors = {repr(loss): loss.monitor for loss in LOSSES}
    assert {m for r, m in monitors.items() if r.startswith("Chi")} == {"upper"}
    assert {m for r, m in monitors.items() if r.startswith("Forward")} == {None}
    assert {m for r, m in monitors.items() if not r.startswith(("Chi", "Forward"))} == {"lower"}
    assert repr(ELBO(3, "exact")) == "ELBO(num_particles=3, entropy='exact')"
    assert "Ancestral" in repr(WeightedELBO(ForwardKLDivergence(), Ancestral(), 2))


def test_auto_multivariate_normal_with_every_loss() -> None:
    """A guide with one joint latent makes the weights joint; every loss works on it."""
    model, _ = known.GAUSSIAN.programs(3)
    for loss in LOSSES:
        pyro.clear_param_store()
        guide = AutoMultivariateNormal(model)
        value = loss.loss_and_grads(model, guide)
        assert torch.tensor(value).isfinite(), loss
        assert guide.loc.grad.isfinite().all(), loss
        (step,) = loss.steps(model, guide)
        assert step.log_weight.shape == (4,)
