"""The lasso problem behind a program: read off, solved by every method, and told where there is none."""

import copy
import pickle
import warnings
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from torch import Tensor

import pplvi
from pplvi import AutoProximal
from pplvi.compile.iterating import RecordedMap
from pplvi.guides.search.lasso import Lasso, solve

pytestmark = pytest.mark.usefixtures("float64")
METHODS = ("ista", "fista", "coordinate")


def digits() -> tuple[Tensor, Tensor]:
    """200 digits, and 80 others as the atoms that explain them, all of length one."""
    x = torch.tensor(pytest.importorskip("sklearn.datasets").load_digits().data)
    x = x - x.mean(0)
    x = x / x.norm(dim=1, keepdim=True)
    return x[:200], x[200:280]


def problem(own: bool = False) -> Lasso:
    x, atoms = digits()
    penalty = torch.full((len(atoms),), 0.1)
    gram = atoms @ atoms.T
    if own:
        gram = torch.linspace(0.5, 2.0, len(x))[:, None, None] * gram
    return Lasso(gram, x @ atoms.T, penalty)


# ---------------------------------------------------------------------- the solver


@pytest.mark.parametrize("own", [False, True])
@pytest.mark.parametrize("method", METHODS)
def test_every_method_ends_at_the_minimum(method: Any, own: bool) -> None:
    lasso = problem(own).rows(torch.arange(15))
    found = solve(lasso, method, tol=1e-9, max_iterations=50_000)
    assert found.gap.max() <= 1e-9
    slope = lasso.linear - lasso.product(found.codes)  # within the penalty, and at it where the code is not zero
    assert (slope.abs() <= 0.1 + 1e-4).all()
    moved = found.codes.abs() > 1e-3
    torch.testing.assert_close(slope[moved], 0.1 * found.codes[moved].sign(), atol=2e-4, rtol=0)
    assert 1 < moved.sum(1).double().mean() < 40


def test_the_gap_is_never_below_the_distance_to_the_minimum() -> None:
    lasso = problem()
    least = lasso.value(solve(lasso, tol=1e-12, max_iterations=50_000).codes)
    length = lasso.squared_length()
    for steps in (1, 5, 20, 100):
        codes = solve(lasso, "ista", max_iterations=steps).codes
        excess, gap = lasso.value(codes) - least, lasso.gap(codes, length)
        assert (gap >= excess - 1e-12).all()
        assert (gap <= 1000 * excess + 1e-6).all()


def test_restarts_of_the_momentum_save_iterations() -> None:
    lasso = problem()
    steps = [solve(lasso, m, restart=r).iterations for m, r in (("fista", True), ("fista", False), ("ista", False))]
    assert steps[0] < 0.6 * steps[1] < 0.6 * steps[2]


def test_atoms_of_length_zero_have_no_code() -> None:
    gram, linear = torch.diag(torch.tensor([1.0, 0.0])), torch.tensor([[3.0, 0.0]])
    for method in METHODS:
        found = solve(Lasso(gram, linear, torch.ones(2)), method)
        torch.testing.assert_close(found.codes, torch.tensor([[2.0, 0.0]]), atol=1e-5, rtol=0)


def test_float32_ends_at_its_rounding() -> None:
    lasso = problem()
    single = Lasso(lasso.gram.float(), lasso.linear.float(), lasso.penalty.float())
    found = solve(single, tol=1e-12, max_iterations=20_000)
    assert found.iterations < 20_000
    assert found.gap.max() < 1e-5


# ---------------------------------------------------------------------- programs as they are written


def coding(v: Tensor, atoms: Tensor) -> None:
    with pyro.plate("data", len(v)):
        h = pyro.sample("h", dist.Laplace(0.0, 10.0).expand([len(atoms)]).to_event(1))
        pyro.sample("v", dist.Normal(h @ atoms, 1.0).to_event(1), obs=v)


def regression(x: Tensor, y: Tensor) -> None:
    with pyro.plate("features", x.shape[1]):
        h = pyro.sample("h", dist.Laplace(0.3, 0.1))
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Normal(x @ h, 0.7), obs=y)


def one_vector(x: Tensor, y: Tensor) -> None:
    h = pyro.sample("h", dist.Laplace(torch.zeros(x.shape[1]), torch.linspace(0.1, 1.0, x.shape[1])).to_event(1))
    pyro.sample("y", dist.MultivariateNormal(x @ h, torch.eye(len(y)) + 0.3), obs=y)


def own_noise(v: Tensor, atoms: Tensor) -> None:
    with pyro.plate("data", len(v)):
        h = pyro.sample("h", dist.Laplace(0.0, 10.0).expand([len(atoms)]).to_event(1))
        noise = 1 + torch.arange(len(v)) / len(v)
        pyro.sample("v", dist.Normal(h @ atoms, noise[:, None]).to_event(1), obs=v)


def masked(v: Tensor, atoms: Tensor) -> None:
    with pyro.plate("data", len(v)):
        h = pyro.sample("h", dist.Laplace(0.0, 10.0).expand([len(atoms)]).to_event(1))
        with pyro.plate("pixels", v.shape[1]), poutine.mask(mask=v.T > 0), poutine.scale(scale=2.0):
            pyro.sample("v", dist.Normal((h @ atoms).squeeze().T, 1.0), obs=v.T)


def twice(v: Tensor, atoms: Tensor) -> None:
    with pyro.plate("data", len(v), dim=-1):
        h = pyro.sample("h", dist.Laplace(0.0, 10.0).expand([len(atoms)]).to_event(1))
        pyro.sample("v", dist.Normal(h @ atoms, 1.0).to_event(1), obs=v)
        pyro.sample("sum", dist.Normal(h.sum(-1), 3.0), obs=v.sum(-1))


PROGRAMS = [coding, own_noise, masked, twice, regression, one_vector]


def call_of(model: Any) -> tuple[Tensor, Tensor]:
    if model in (regression, one_vector):
        design = torch.randn(30, 9, generator=torch.Generator().manual_seed(0))
        return design, design @ torch.tensor([3.0, 0, 0, -2, 0, 0, 0, 1, 0])
    x, atoms = digits()
    return x[:12], atoms[:20]


@pytest.mark.parametrize("model", PROGRAMS)
def test_programs_are_at_their_mode(model: Any) -> None:
    """The gradient of the rest balances the prior's where a code is not at its location, and is within it elsewhere."""
    call = call_of(model)
    guide = AutoProximal(model, sites="h", tol=1e-12)
    h = guide(*call)["h"].clone().requires_grad_()
    assert guide.gap.shape == (() if model in (regression, one_vector) else (12,))
    trace = poutine.trace(poutine.condition(model, {"h": h})).get_trace(*call)
    trace.compute_log_prob()
    prior = trace.nodes["h"]["fn"].base_dist if model is not regression else trace.nodes["h"]["fn"]
    rest = sum(s["log_prob_sum"] for n, s in trace.nodes.items() if s["type"] == "sample" and n != "h")
    (slope,) = torch.autograd.grad(rest, h)
    off = (h - prior.loc).abs() > 1e-4
    assert 0 < off.sum() < off.numel()
    assert (slope.abs() * prior.scale <= 1 + 1e-3).all()
    torch.testing.assert_close((slope * prior.scale)[off], (h - prior.loc).sign()[off], atol=1e-3, rtol=0)


def coding_in_two(v: Tensor, atoms: Tensor) -> None:
    with pyro.plate("data", len(v)):
        a = pyro.sample("a", dist.Laplace(0.0, 10.0).expand([8]).to_event(1))
        b = pyro.sample("b", dist.Laplace(0.0, 10.0).expand([12]).to_event(1))
        pyro.sample("v", dist.Normal(a @ atoms[:8] + b @ atoms[8:], 1.0).to_event(1), obs=v)


def regression_in_two(x: Tensor, y: Tensor) -> None:
    scales = torch.linspace(0.1, 1.0, x.shape[1])
    with pyro.plate("first", 4):
        a = pyro.sample("a", dist.Laplace(0.0, scales[:4]))
    b = pyro.sample("b", dist.Laplace(torch.zeros(5), scales[4:]).to_event(1))
    pyro.sample("y", dist.MultivariateNormal(x[:, :4] @ a + x[:, 4:] @ b, torch.eye(len(y)) + 0.3), obs=y)


@pytest.mark.parametrize(("one", "two"), [(coding, coding_in_two), (one_vector, regression_in_two)])
def test_several_sites_are_parts_of_one_code(one: Any, two: Any) -> None:
    call = call_of(one)
    guide = AutoProximal(two, sites=["a", "b"], tol=1e-12)
    found, whole = guide(*call), AutoProximal(one, sites="h", tol=1e-12)
    torch.testing.assert_close(torch.cat([found["a"], found["b"]], -1), whole(*call)["h"], atol=1e-5, rtol=0)
    assert guide.gap.shape == whole.gap.shape
    assert guide.quantiles([0.5], *call)["b"].shape == (1, *found["b"].shape)


def poisson(v: Tensor, atoms: Tensor) -> None:
    with pyro.plate("data", len(v)):
        h = pyro.sample("h", dist.Laplace(0.0, 1.0).expand([len(atoms)]).to_event(1))
        pyro.sample("v", dist.Poisson((h @ atoms).exp()).to_event(1), obs=v.abs().round())


def ridge(v: Tensor, atoms: Tensor) -> None:
    with pyro.plate("data", len(v)):
        h = pyro.sample("h", dist.Normal(0.0, 1.0).expand([len(atoms)]).to_event(1))
        pyro.sample("v", dist.Normal(h @ atoms, 1.0).to_event(1), obs=v)


def two_latents(v: Tensor, atoms: Tensor) -> None:
    pyro.sample("scale", dist.LogNormal(0.0, 1.0))
    coding(v, atoms)


def subsampled(v: Tensor, atoms: Tensor) -> None:
    with pyro.plate("data", len(v), subsample_size=2) as index:
        h = pyro.sample("h", dist.Laplace(0.0, 10.0).expand([len(atoms)]).to_event(1))
        pyro.sample("v", dist.Normal(h @ atoms, 1.0).to_event(1), obs=v[index])


def prior_alone(v: Tensor, atoms: Tensor) -> None:
    pyro.sample("h", dist.Laplace(0.0, 10.0).expand([len(atoms)]).to_event(1))
    pyro.sample("v", dist.Normal(0.0, 1.0), obs=v[0, 0])


REFUSED = {
    poisson: "not a concave quadratic in site 'h'",
    ridge: "'h' has a Normal prior: expected Laplace",
    two_latents: r"latent sites \['h', 'scale'\]: expected 'h' alone",
    subsampled: r"plates \['data'\] are subsampled",
    prior_alone: "no other site depends on 'h'",
}


@pytest.mark.parametrize("model", REFUSED)
def test_programs_that_have_no_lasso_are_refused(model: Any) -> None:
    with pytest.raises(ValueError, match=REFUSED[model]):
        AutoProximal(model, sites="h")(*call_of(coding))


@pytest.mark.parametrize(
    "wrong", [{"method": "lars"}, {"tol": 0.0}, {"max_iterations": 0}, {"sites": ["h", "h"]}, {"sites": [3]}]
)
def test_wrong_arguments(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        AutoProximal(coding, **{"sites": "h", **wrong})


def test_too_few_iterations_are_told() -> None:
    with pytest.warns(UserWarning, match="took all 3 steps and has a duality gap of up to"):
        AutoProximal(coding, sites="h", method="ista", max_iterations=3)(*call_of(coding))


# ---------------------------------------------------------------------- as a guide


def test_a_fit_has_a_mode_and_no_evidence() -> None:
    call = call_of(coding)
    fit = pplvi.fit(coding, lambda model: AutoProximal(model, "h"), args=call, progress=False)
    assert fit.reasons == ["found"]
    assert "at a point" in " ".join(fit.summary().split())
    posterior = fit.posterior(10)
    torch.testing.assert_close(posterior.draws.latents["h"][0], fit.guide.median(*call)["h"])
    with pytest.raises(ValueError, match="point"):
        _ = posterior.log_evidence


def test_it_is_a_point_for_the_data_and_the_parameters_of_the_call() -> None:
    v, atoms = call_of(coding)

    def model(v: Tensor) -> None:
        coding(v, pyro.param("atoms", lambda: atoms.clone()))

    guide = AutoProximal(model, "h")
    first = guide(v)["h"]
    assert guide(v)["h"] is guide(v)["h"] or torch.equal(guide(v)["h"], first)
    assert guide(v[:5])["h"].shape == (5, 20)
    torch.testing.assert_close(guide(v[:5])["h"], first[:5], atol=1e-3, rtol=0)
    with torch.no_grad():
        pyro.param("atoms").unconstrained().mul_(2.0)
    assert (guide(v)["h"] - first).abs().max() > 0.01
    assert guide.quantiles([0.1, 0.9], v)["h"].shape == (2, 12, 20)


def test_training_the_model_has_the_gradient_of_the_minimum() -> None:
    """By the envelope theorem codes are constants: compared with differences of the minimum itself."""
    v, atoms = call_of(coding)
    model = lambda v: coding(v, pyro.param("atoms", lambda: atoms.clone()))  # noqa: E731
    guide, loss = AutoProximal(model, "h", tol=1e-12), pplvi.ELBO()
    value = loss.differentiable_loss(model, guide, v)
    leaf = pyro.param("atoms").unconstrained()
    (gradient,) = torch.autograd.grad(value, leaf)
    direction = torch.randn(leaf.shape, generator=torch.Generator().manual_seed(1))
    ends = []
    for step in (1e-4, -2e-4):
        with torch.no_grad():
            leaf.add_(step * direction)
        ends.append(loss.loss(model, guide, v))
    assert (ends[0] - ends[1]) / 2e-4 == pytest.approx(float((gradient * direction).sum()), rel=1e-4)


@pytest.mark.parametrize("own", [False, True])
@pytest.mark.parametrize(("method", "most"), [("ista", 10_000), ("fista", 10_000), ("fista", 47), ("coordinate", 500)])
def test_recorded_iterations_are_those_that_are_not(method: Any, most: int, own: bool) -> None:
    """Also where rows are left out, where a recording is made anew, and where the last look comes early."""
    lasso = problem(own).rows(torch.arange(12))
    if method == "coordinate":
        lasso = Lasso(lasso.gram[..., :8, :8], lasso.linear[:, :8], lasso.penalty[:8])
    options: dict[str, Any] = {"tol": 1e-3 if method == "ista" else 1e-5, "max_iterations": most}
    made = []

    def recorder(*of: Any) -> RecordedMap:
        made.append(RecordedMap(*of, mode="trace"))
        return made[-1]

    eager, recorded = solve(lasso, method, **options), solve(lasso, method, recorder=recorder, **options)
    assert recorded.iterations == eager.iterations <= most
    torch.testing.assert_close(recorded.codes, eager.codes, atol=1e-10, rtol=0)
    torch.testing.assert_close(recorded.gap, eager.gap, atol=1e-10, rtol=0)
    assert len(made) > (most == 10_000)


def test_fit_records_the_iterations() -> None:
    call = call_of(coding)
    make = lambda model: AutoProximal(model, "h")  # noqa: E731
    eager, recorded = (pplvi.fit(coding, make, args=call, compile=c, progress=False).guide for c in (False, "trace"))
    assert recorded.recorder is not None
    assert recorded.iterations == eager.iterations
    torch.testing.assert_close(recorded(*call)["h"], eager(*call)["h"], atol=1e-10, rtol=0)
    torch.testing.assert_close(recorded.gap, eager.gap, atol=1e-10, rtol=0)


def test_dictionary_learning_is_not_recorded() -> None:
    v, atoms = call_of(coding)
    model = lambda v: coding(v, pyro.param("atoms", lambda: atoms.clone()))  # noqa: E731
    make = lambda model: AutoProximal(model, "h")  # noqa: E731
    for data in ({"args": (v,)}, {"data": [v[:6], v[6:]]}):
        with pytest.raises(ValueError, match=r"anew in every training step.*expected compile=False"):
            pplvi.fit(model, make, compile="trace", num_steps=3, progress=False, **data)


def test_copies_find_the_same() -> None:
    call = call_of(coding)
    guide = AutoProximal(coding, "h")
    h = guide(*call)["h"]
    torch.testing.assert_close(copy.deepcopy(guide)(*call)["h"], h)
    assert pickle.loads(pickle.dumps(guide)).gap.shape == (12,)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        torch.testing.assert_close(guide(*call)["h"], h)
