"""Expectation maximisation against brute force, scikit-learn and numerical maximisation."""

import itertools
import math
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.nn import PyroModule, PyroParam
from torch import Tensor
from torch.distributions import constraints

import pplvi
from pplvi import ExpectationMaximization
from pplvi.training.em.algorithm import SummedLatents
from pplvi.training.em.complete import CompleteData
from pplvi.training.em.maximisation import Maximisation

pytestmark = pytest.mark.usefixtures("float64")
IRIS = -180.18547713


def mixture(x: Tensor, init: dict[str, Tensor]) -> None:
    w = pyro.param("w", lambda: init["w"].clone(), constraint=constraints.simplex)
    mu = pyro.param("mu", lambda: init["mu"].clone())
    tril = pyro.param("L", lambda: init["L"].clone(), constraint=constraints.lower_cholesky)
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Categorical(w), infer={"enumerate": "parallel"})
        pyro.sample("x", dist.MultivariateNormal(mu[z], scale_tril=tril[z]), obs=x)


def alike(count: int, dim: int) -> dict[str, Tensor]:
    return {"w": torch.ones(count) / count, "mu": torch.zeros(count, dim), "L": torch.eye(dim).repeat(count, 1, 1)}


def maximum_likelihood(model: Any, *args: Any, **options: Any) -> pplvi.Fit:
    algorithm = options.pop("algorithm", ExpectationMaximization())
    return pplvi.fit(model, algorithm, args=args, **{"seed": 0, "progress": False, **options})


def iris() -> Any:
    return pytest.importorskip("sklearn.datasets").load_iris().data


def falls(fit: pplvi.Fit) -> float:
    """The largest rise of the loss, relative to it."""
    losses = fit.losses[fit.best]
    return float(np.max(np.diff(losses) / np.abs(losses[1:])))


def test_iris_has_the_likelihood_of_scikit_learn_in_as_many_iterations() -> None:
    from sklearn.cluster import KMeans
    from sklearn.mixture import GaussianMixture

    data = iris()
    clusters = [data[KMeans(3, n_init=1, random_state=0).fit(data).labels_ == k] for k in range(3)]
    weights, means = np.array([len(c) / 150 for c in clusters]), np.stack([c.mean(0) for c in clusters])
    covariances = np.stack([np.cov(c.T, bias=True) for c in clusters])
    init = {"w": weights, "mu": means, "L": np.linalg.cholesky(covariances)}
    peer = GaussianMixture(3, weights_init=weights, means_init=means, precisions_init=np.linalg.inv(covariances))
    peer.set_params(reg_covar=0.0, tol=1e-13, max_iter=2000).fit(data)
    algorithm = ExpectationMaximization(tol=1e-13 * len(data), start="program")
    model = partial(mixture, init={name: torch.tensor(value) for name, value in init.items()})
    fit = maximum_likelihood(model, torch.tensor(data), algorithm=algorithm)
    assert -fit.losses[0, -1] == pytest.approx(IRIS, abs=1e-8)
    assert fit.losses.shape[1] <= 1.1 * peer.n_iter_
    assert falls(fit) < 1e-12
    assert fit.guide.closed == ["L", "mu", "w"]


def test_components_that_are_all_alike_start_from_k_means() -> None:
    fit = maximum_likelihood(partial(mixture, init=alike(3, 4)), torch.tensor(iris()))
    assert -fit.losses[0, -1] == pytest.approx(IRIS, abs=1e-6)
    assert fit.reasons == ["converged"]
    assert fit.converged
    assert "stopped at iteration" in fit.summary()
    assert "closed form for L, mu, w" in fit.summary()
    with pytest.raises(ValueError, match="no 200 clusters"):
        maximum_likelihood(partial(mixture, init=alike(200, 4)), torch.tensor(iris()))


def test_restarts_differ_and_the_best_is_kept() -> None:
    algorithm = ExpectationMaximization(start="random")
    fit = maximum_likelihood(
        partial(mixture, init=alike(3, 4)), torch.tensor(iris()), algorithm=algorithm, restarts=3, seed=4
    )
    final = [-run.loss for run in fit.runs]
    assert fit.best == int(np.argmax(final))
    assert max(final) - min(final) > 1e-3
    assert torch.equal(pyro.param("mu"), fit.params[fit.best]["mu"])


# ---------------------------------------------------------------------- closed forms against numerical maximisation

G = torch.Generator().manual_seed(0)
F64 = partial(torch.tensor, dtype=torch.float64)
COUNTS = F64([0.0, 1.0, 3.0, 2.0, 7.0, 5.0, 9.0, 6.0])
REAL = torch.randn(8, 3, generator=G, dtype=torch.float64) + F64([[0.0]] * 4 + [[3.0]] * 4)
SPD = torch.stack([torch.eye(3, dtype=torch.float64), 2 * torch.eye(3, dtype=torch.float64)])
POSITIVE, UNIT = constraints.positive, constraints.unit_interval
A, B = F64([0.3, 0.6]), F64([1.0, 2.5])
P = F64([[0.2, 0.3, 0.5], [0.6, 0.3, 0.1]])
ONE_HOT = torch.eye(3, dtype=torch.float64)[[0, 1, 2, 1, 0, 0, 2, 0]]
Q = constraints.simplex
CASES: dict[str, tuple[dict[str, tuple[Tensor, Any]], Any, Tensor]] = {
    "bernoulli": ({"p": (A, UNIT)}, lambda z, p: dist.Bernoulli(p[z]), (COUNTS > 3).double()),
    "bernoulli logits": ({"o": (B, None)}, lambda z, o: dist.Bernoulli(logits=o[z]), (COUNTS > 2).double()),
    "binomial": ({"p": (A, UNIT)}, lambda z, p: dist.Binomial(10, p[z]), COUNTS),
    "categorical": ({"p": (P, Q)}, lambda z, p: dist.Categorical(p[z]), ONE_HOT.argmax(-1)),
    "categorical logits": ({"o": (P, None)}, lambda z, o: dist.Categorical(logits=o[z]), ONE_HOT.argmax(-1)),
    "one hot": ({"p": (P, Q)}, lambda z, p: dist.OneHotCategorical(p[z]), ONE_HOT),
    "multinomial": (
        {"p": (P, Q)},
        lambda z, p: dist.Multinomial(total_count=3, probs=p[z], validate_args=False),
        ONE_HOT + 2 * ONE_HOT.roll(1, 0),
    ),
    "exponential": ({"r": (B, POSITIVE)}, lambda z, r: dist.Exponential(r[z]), COUNTS + 0.5),
    "gamma": ({"r": (B, POSITIVE)}, lambda z, r: dist.Gamma(F64([2.0, 3.0])[z], r[z]), COUNTS + 0.5),
    "geometric": ({"p": (A, UNIT)}, lambda z, p: dist.Geometric(p[z]), COUNTS),
    "poisson": ({"r": (B, POSITIVE)}, lambda z, r: dist.Poisson(r[z]), COUNTS),
    "log normal": ({"m": (A, None), "s": (B, POSITIVE)}, lambda z, m, s: dist.LogNormal(m[z], s[z]), COUNTS + 0.5),
    "normal": ({"m": (A, None), "s": (B, POSITIVE)}, lambda z, m, s: dist.Normal(m[z], s[z]), COUNTS),
    "normal, one scale": ({"m": (A, None), "s": (B[1], POSITIVE)}, lambda z, m, s: dist.Normal(m[z], s), COUNTS),
    "normal, one mean": ({"m": (A[0], None)}, lambda z, m: dist.Normal(m, B[z]), COUNTS),
    "normal, known mean": ({"s": (B, POSITIVE)}, lambda z, s: dist.Normal(4 * A[z], s[z]), COUNTS),
    "normals": (
        {"m": (P, None), "s": (P, POSITIVE)},
        lambda z, m, s: dist.Normal(m[z], s[z]).to_event(1),
        REAL,
    ),
    "normals, one scale each": (
        {"m": (P, None), "s": (B[:, None], POSITIVE)},
        lambda z, m, s: dist.Normal(m[z], s[z]).to_event(1),
        REAL,
    ),
    "covariance": (
        {"m": (P, None), "c": (SPD, constraints.positive_definite)},
        lambda z, m, c: dist.MultivariateNormal(m[z], c[z]),
        REAL,
    ),
    "one precision": (
        {"m": (P, None), "c": (SPD[1], constraints.positive_definite)},
        lambda z, m, c: dist.MultivariateNormal(m[z], precision_matrix=c),
        REAL,
    ),
    "known covariance": ({"m": (P, None)}, lambda z, m: dist.MultivariateNormal(m[z], SPD[1]), REAL),
}


def case(name: str) -> tuple[Any, Tensor]:
    parameters, distribution, data = CASES[name]

    def model(x: Tensor) -> None:
        values = {
            n: pyro.param(n, v.clone(), **({} if c is None else {"constraint": c})) for n, (v, c) in parameters.items()
        }
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Categorical(torch.tensor([0.4, 0.6])))
            pyro.sample("x", distribution(z, **values), obs=x)

    return model, data


@pytest.mark.parametrize("name", CASES)
def test_closed_form_is_the_maximum(name: str) -> None:
    model, data = case(name)
    found = []
    for searched in (False, True):
        pyro.clear_param_store()
        problem = CompleteData(model, SummedLatents(model), ((data,), {}))
        step = Maximisation(problem)
        assert not step.searched
        if searched:
            step.blocks, step.searched = [], list(problem.leaves)
        _, counts = problem.expect()
        step(counts)
        found.append(problem.expected_log_joint(counts).item())
    closed, numerical = found
    assert closed >= numerical - 1e-12 * abs(numerical)
    assert closed == pytest.approx(numerical, abs=1e-6)


def test_a_gaussian_by_itself_is_fitted_in_one_step() -> None:
    x = torch.randn(50, generator=G) * 3 + 1

    def model(x: Tensor) -> None:
        scale = pyro.param("scale", torch.tensor(1.0), constraint=constraints.positive)
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(pyro.param("loc", torch.tensor(0.0)), scale), obs=x)

    fit = maximum_likelihood(model, x)
    assert fit.losses.shape == (1, 3)  # before, after, and to see that it stays
    torch.testing.assert_close(fit.params[0]["loc"], x.mean())
    torch.testing.assert_close(fit.params[0]["scale"], x.std(correction=0))


# ---------------------------------------------------------------------- what has no closed form


def bounded(x: Tensor) -> None:
    w = pyro.param("w", torch.tensor([0.5, 0.5]), constraint=constraints.simplex)
    mu = pyro.param("mu", torch.tensor([-1.0, 1.0]))
    sd = pyro.param("sd", torch.ones(2), constraint=constraints.greater_than(0.5))
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Categorical(w))
        pyro.sample("x", dist.Normal(mu[z], sd[z]), obs=x)


def regressions(x: Tensor, y: Tensor) -> None:
    b = pyro.param("b", torch.tensor([[1.0, 0.0], [-1.0, 0.0]]))
    sd = pyro.param("sd", torch.ones(2), constraint=constraints.positive)
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Categorical(pyro.param("w", torch.ones(2) / 2, constraint=constraints.simplex)))
        pyro.sample("y", dist.Normal((b[z] * x).sum(-1), sd[z]), obs=y)


def one_mean_two_scales(x: Tensor) -> None:
    mu = pyro.param("mu", torch.tensor(0.5))
    sd = pyro.param("sd", torch.tensor([0.5, 3.0]), constraint=constraints.positive)
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Bernoulli(0.5))
        pyro.sample("x", dist.Normal(mu, sd[z.long()]), obs=x)


def test_constraints_without_a_closed_form_are_kept() -> None:
    x = torch.tensor([-1.0, -1.01, -0.99, 4.0, 5.0, 3.0])
    fit = maximum_likelihood(bounded, x)
    assert fit.guide.closed == ["w"]
    assert fit.guide.searched == ["mu", "sd"]
    assert 0.5 <= float(fit.params[0]["sd"][0]) < 0.5 + 1e-4
    assert falls(fit) < 1e-12
    with pytest.raises(ValueError, match=r"no maximum: a spread in \['m', 's'\] went to zero"):
        maximum_likelihood(case("normal")[0], torch.tensor([0.0, 0.0, 0.0, 5.0, 6.0, 7.0]))


def test_restarts_that_collapse_are_left_out() -> None:
    def three(x: Tensor) -> None:
        w = pyro.param("w", torch.ones(3) / 3, constraint=Q)
        mu, sd = pyro.param("m", torch.zeros(3)), pyro.param("s", torch.ones(3), constraint=POSITIVE)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Categorical(w))
            pyro.sample("x", dist.Normal(mu[z], sd[z]), obs=x)

    x = torch.tensor([0.0, 0.1, 0.2, 0.3, 3.4, 3.6, 9.0])
    algorithm = ExpectationMaximization(start="random")
    fit = maximum_likelihood(three, x, algorithm=algorithm, restarts=8)
    lost = [run.index for run in fit.runs if run.guide.collapsed]
    assert 0 < len(lost) < 8
    assert fit.best not in lost
    assert f"restarts {', '.join(map(str, lost))}, where a component" in " ".join(fit.summary().split())
    with pytest.raises(ValueError, match="every restart: the likelihood has no maximum"):
        maximum_likelihood(three, torch.tensor([0.0, 0.0, 5.0, 5.0, 9.0, 9.0]), restarts=2)


@pytest.mark.parametrize("name", ["regressions", "one mean"])
def test_searched_parameters_end_where_the_likelihood_is_flat(name: str) -> None:
    x = torch.stack([torch.ones(40), torch.randn(40, generator=G)], -1)
    y = torch.where(torch.arange(40) < 20, x @ torch.tensor([1.0, 2.0]), x @ torch.tensor([-1.0, -2.0]))
    y = y + 0.3 * torch.randn(40, generator=G)
    model, args = (regressions, (x, y)) if name == "regressions" else (one_mean_two_scales, (y,))
    fit = maximum_likelihood(model, *args)
    assert falls(fit) < 1e-12
    assert {"sd"} <= set(fit.guide.searched)
    loss = pplvi.ELBO().differentiable_loss(fit.model, fit.guide, *args)
    leaves = [p for _, p in pyro.get_param_store().named_parameters()]
    assert max(g.abs().max() for g in torch.autograd.grad(loss, leaves)) < 1e-3


def test_generalised_em_takes_more_iterations_to_the_same_place() -> None:
    x, model = torch.tensor(iris()), partial(mixture, init=alike(3, 4))
    whole = maximum_likelihood(model, x, algorithm=ExpectationMaximization(tol=1e-4))
    part = maximum_likelihood(model, x, algorithm=ExpectationMaximization(m_steps=3, tol=1e-4))
    assert part.losses.shape[1] > whole.losses.shape[1]
    assert part.losses[0, -1] == pytest.approx(whole.losses[0, -1], abs=0.01)
    assert falls(part) < 1e-12


# ---------------------------------------------------------------------- other programs


def chain(y: Tensor) -> None:
    pi = pyro.param("pi", torch.tensor([0.5, 0.5]), constraint=constraints.simplex)
    move = pyro.param("move", torch.tensor([[0.7, 0.3], [0.4, 0.6]]), constraint=constraints.simplex)
    mu = pyro.param("mu", torch.tensor([-1.0, 1.0]))
    sd = pyro.param("sd", torch.tensor(1.0), constraint=constraints.positive)
    z: Any = None
    for t in pyro.markov(range(len(y))):
        z = pyro.sample(f"z_{t}", dist.Categorical(pi if t == 0 else move[z]))
        pyro.sample(f"y_{t}", dist.Normal(mu[z], sd), obs=y[t])


def chain_log_joints(y: Tensor, values: dict[str, Tensor]) -> tuple[list[tuple[int, ...]], Tensor]:
    paths = list(itertools.product(range(2), repeat=len(y)))
    density = dist.Normal(values["mu"][:, None], values["sd"]).log_prob(y)
    pi, move = values["pi"].log(), values["move"].log()
    joints = [
        pi[p[0]] + sum(density[s, t] for t, s in enumerate(p)) + sum(move[a, b] for a, b in itertools.pairwise(p))
        for p in paths
    ]
    return paths, torch.stack(joints)


def test_a_markov_chain_against_all_its_paths() -> None:
    y = torch.tensor([-1.2, -0.8, 1.1, 0.9, 1.3, -1.0, -0.7])
    fit = maximum_likelihood(chain, y, num_steps=2)
    start = {
        "pi": torch.tensor([0.5, 0.5]),
        "move": torch.tensor([[0.7, 0.3], [0.4, 0.6]]),
        "mu": torch.tensor([-1.0, 1.0]),
        "sd": torch.tensor(1.0),
    }
    paths, joints = chain_log_joints(y, start)
    assert -fit.losses[0, 0] == pytest.approx(float(joints.logsumexp(0)), abs=1e-10)
    weights = joints.softmax(0)
    pairs, means, first = torch.zeros(2, 2), torch.zeros(2, 2), torch.zeros(2)
    for path, weight in zip(paths, weights, strict=True):
        first[path[0]] += weight
        for a, b in itertools.pairwise(path):
            pairs[a, b] += weight
        for t, s in enumerate(path):
            means[s] += weight * torch.stack([y[t], torch.tensor(1.0)])
    mu = means[:, 0] / means[:, 1]
    new = {"pi": first, "move": pairs / pairs.sum(1, keepdim=True), "mu": mu}
    spread = sum(w * sum((y[t] - mu[s]) ** 2 for t, s in enumerate(p)) for p, w in zip(paths, weights, strict=True))
    new["sd"] = (spread / len(y)).sqrt()
    _, joints = chain_log_joints(y, new)
    assert -fit.losses[0, 1] == pytest.approx(float(joints.logsumexp(0)), abs=1e-9)
    assert fit.guide.closed == ["move", "mu", "pi", "sd"]
    whole = maximum_likelihood(chain, y, algorithm=ExpectationMaximization(start="kmeans"))
    assert falls(whole) < 1e-12


def test_networks_are_searched_for() -> None:
    """A mixture of experts: parameters of modules beside those in closed form."""
    experts = torch.nn.ModuleList([torch.nn.Linear(1, 1) for _ in range(2)])

    def model(x: Tensor, y: Tensor) -> None:
        pyro.module("experts", experts)
        w = pyro.param("w", torch.ones(2) / 2, constraint=Q)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Categorical(w))
            loc = pyro.deterministic("loc", torch.cat([expert(x[:, None]) for expert in experts], -1))
            pyro.sample("y", dist.Normal(torch.where(z == 0, loc[:, 0], loc[:, 1]), 0.1), obs=y)

    pyro.set_rng_seed(0)
    x = torch.randn(60)
    y = torch.where(torch.arange(60) < 30, 2 * x + 1, -x - 1) + 0.1 * torch.randn(60)
    fit = maximum_likelihood(model, x, y)
    assert fit.guide.closed == ["w"]
    assert len(fit.guide.searched) == 4
    assert falls(fit) < 1e-12
    slopes = sorted(expert.weight.item() for expert in experts)
    assert slopes == pytest.approx([-1.0, 2.0], abs=0.1)


def tree(x: Tensor) -> None:
    g = pyro.param("g", torch.tensor([0.4, 0.6]), constraint=Q)
    t = pyro.param("t", torch.tensor([[0.8, 0.2], [0.3, 0.7]]), constraint=Q)
    mu = pyro.param("mu", torch.tensor([-1.0, 1.0]))
    with pyro.plate("groups", x.shape[0], dim=-2):
        c = pyro.sample("c", dist.Categorical(g))
        with pyro.plate("people", x.shape[1], dim=-1):
            z = pyro.sample("z", dist.Categorical(t[c]))
            pyro.sample("x", dist.Normal(mu[z], 1.0), obs=x)


def test_latents_of_latents_in_nested_plates() -> None:
    x = torch.randn(4, 5, generator=torch.Generator().manual_seed(0))
    fit = maximum_likelihood(tree, x, algorithm=ExpectationMaximization(start="program"), num_steps=1)
    g, t, mu = torch.tensor([0.4, 0.6]), torch.tensor([[0.8, 0.2], [0.3, 0.7]]), torch.tensor([-1.0, 1.0])
    joint = t.log()[:, None, None] + dist.Normal(mu, 1.0).log_prob(x[..., None])  # (c, groups, people, z)
    groups = g.log() + joint.logsumexp(-1).sum(-1).T
    assert -fit.losses[0, 0] == pytest.approx(float(groups.logsumexp(-1).sum()), abs=1e-10)
    members = torch.einsum("gc,cgpz->gpz", groups.softmax(-1), joint.softmax(-1))
    found = fit.params[0]  # after one M-step
    torch.testing.assert_close(found["g"], groups.softmax(-1).mean(0))
    torch.testing.assert_close(found["mu"], (members * x[..., None]).sum((0, 1)) / members.sum((0, 1)))
    assert fit.guide.closed == ["g", "mu", "t"]


class Coins(PyroModule):
    def __init__(self) -> None:
        super().__init__()
        self.p = PyroParam(torch.tensor([0.3, 0.3]), constraints.unit_interval)

    def forward(self, x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Bernoulli(0.5))
            with pyro.plate("throws", x.shape[1]):
                pyro.sample("x", dist.Bernoulli(self.p[z.long()]), obs=x.T)


def test_a_module_gets_its_best_restart_back() -> None:
    x = torch.tensor([[1.0, 1, 1, 1, 0], [0, 0, 0, 1, 0], [1, 1, 1, 1, 1], [0, 0, 0, 0, 1]])
    model = Coins()
    fit = maximum_likelihood(model, x, restarts=2)
    assert fit.guide.closed == ["p"]
    torch.testing.assert_close(model.p.detach(), fit.params[fit.best]["p"])
    p = model.p.detach()
    likelihood = dist.Binomial(5, p[:, None]).log_prob(x.sum(1))
    torch.testing.assert_close(fit.guide.marginals(x)["z"], likelihood.softmax(0).T)


def test_scale_and_mask_count_as_in_the_density() -> None:
    x = torch.tensor([-1.0, 0.2, 3.0, 4.5, 8.0])
    model = case("normal")[0]
    observed = torch.tensor([True, True, True, True, False])

    def masked(x: Tensor) -> None:
        m = pyro.param("m", A.clone())
        s = pyro.param("s", B.clone(), constraint=POSITIVE)
        with pyro.plate("data", len(x)), poutine.mask(mask=observed), poutine.scale(scale=2.0):
            z = pyro.sample("z", dist.Categorical(torch.tensor([0.4, 0.6])))
            pyro.sample("x", dist.Normal(m[z], s[z]), obs=x)

    algorithm = ExpectationMaximization(start="program")
    fit = maximum_likelihood(masked, x, algorithm=algorithm, num_steps=20)
    plain = maximum_likelihood(model, x[:4], algorithm=algorithm, num_steps=20)
    np.testing.assert_allclose(fit.losses, 2 * plain.losses, rtol=1e-9)


def test_float32_stops_at_its_rounding() -> None:
    init = {name: value.float() for name, value in alike(3, 4).items()}
    fit = maximum_likelihood(partial(mixture, init=init), torch.tensor(iris(), dtype=torch.float32))
    assert fit.reasons == ["converged"]
    assert -fit.losses[0, -1] == pytest.approx(IRIS, abs=0.05)


# ---------------------------------------------------------------------- as a fit


def test_resuming_goes_on_to_the_bit(tmp_path: Path) -> None:
    model, x = partial(mixture, init=alike(3, 4)), torch.tensor(iris())
    whole = maximum_likelihood(model, x, num_steps=12)
    file = tmp_path / "em.pt"
    maximum_likelihood(model, x, num_steps=5, checkpoint=file)
    resumed = maximum_likelihood(model, x, num_steps=12, resume=file)
    np.testing.assert_array_equal(resumed.losses, whole.losses)


def test_a_fit_comes_back_from_a_file(tmp_path: Path) -> None:
    x = torch.tensor([[1.0, 1, 1, 1, 0], [0, 0, 0, 1, 0], [1, 1, 1, 1, 1], [0, 0, 0, 0, 1]])
    fit = maximum_likelihood(Coins(), x, restarts=2)
    fit.save(tmp_path / "em.pplvi")
    again = pplvi.load(tmp_path / "em.pplvi", model := Coins(), ExpectationMaximization())
    np.testing.assert_array_equal(again.losses, fit.losses)
    assert again.summary() == fit.summary()
    torch.testing.assert_close(again.guide.marginals(x)["z"], fit.guide.marginals(x)["z"])
    torch.testing.assert_close(model.p.detach(), fit.params[fit.best]["p"])


def test_callbacks_see_every_iteration() -> None:
    seen: list[float] = []

    def stop(run: Any) -> bool:
        seen.append(run.loss)
        return len(seen) == 3

    fit = maximum_likelihood(partial(mixture, init=alike(3, 4)), torch.tensor(iris()), callbacks=[stop])
    assert fit.reasons == ["callback"]
    assert seen == fit.losses[0].tolist()


def without_parameters(x: Tensor) -> None:
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal(pyro.sample("z", dist.Bernoulli(0.5)), 1.0), obs=x)


def subsampled(x: Tensor) -> None:
    mu = pyro.param("mu", torch.tensor([0.0, 1.0]))
    with pyro.plate("data", len(x), subsample_size=3) as index:
        pyro.sample("x", dist.Normal(mu[pyro.sample("z", dist.Bernoulli(0.5)).long()], 1.0), obs=x[index])


@pytest.mark.parametrize(
    ("model", "options", "message"),
    [
        (subsampled, {}, r"plates \['data'\] are subsampled"),
        (without_parameters, {}, "no parameters"),
        (bounded, {"data": [COUNTS]}, r"has no use for \['data'\]"),
        (bounded, {"learning_rate": 0.1}, r"has no use for \['learning_rate'\]"),
        (bounded, {"algorithm": ExpectationMaximization, "restarts": 1}, "pass an instance"),
    ],
)
def test_refusals(model: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        maximum_likelihood(model, COUNTS, **options)


@pytest.mark.parametrize("wrong", [{"m_steps": 0}, {"tol": -1.0}, {"tol": math.nan}, {"start": "best"}])
def test_wrong_arguments(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        ExpectationMaximization(**wrong)
