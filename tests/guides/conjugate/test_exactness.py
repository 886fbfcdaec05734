"""Conjugate programs whose posterior factorises: the fit is the posterior, the bound is the evidence."""

from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer.autoguide import init_to_sample
from scipy import stats
from torch import Tensor

import pplvi
from pplvi.guides.conjugate.ascent import started
from pplvi.guides.conjugate.program import read_program

pytestmark = pytest.mark.usefixtures("float64")

N = 30
GENERATOR = torch.Generator().manual_seed(0)
X = torch.randn(N, 3, generator=GENERATOR, dtype=torch.float64)
Y = torch.randn(N, generator=GENERATOR, dtype=torch.float64)
GROUP = torch.arange(N) % 6
EYE = torch.eye(N, dtype=torch.float64)
SERIES = torch.randn(8, generator=GENERATOR, dtype=torch.float64).cumsum(0)


def bound(model: Any, *args: Any, **options: Any) -> float:
    return pplvi.AutoConjugate(model, seed=0, **options).run(*args).bounds[-1]


def gaussian(covariance: Tensor, y: Tensor = Y) -> float:
    return float(dist.MultivariateNormal(torch.zeros(len(y)), covariance).log_prob(y))


# ---------------------------------------------------------------------- linear maps, as people write them


def product(b: Tensor) -> Tensor:
    return X @ b


def elementwise(b: Tensor) -> Tensor:
    return (X * b).sum(-1)


def einsum(b: Tensor) -> Tensor:
    return torch.einsum("nd,d->n", X, b)


def positions(b: Tensor) -> Tensor:
    return b[0] * X[:, 0] + b[1] * X[:, 1] + b[-1] * X[:, 2]


def linear(b: Tensor) -> Tensor:
    return torch.nn.functional.linear(X, b.unsqueeze(0)).squeeze(-1)


def reshaped(b: Tensor) -> Tensor:
    return (X @ b.reshape(3, 1)).flatten()


def concatenated(b: Tensor) -> Tensor:
    return X @ torch.cat([b[:1], b[1:]])


def where(b: Tensor) -> Tensor:
    return torch.where(X[:, 0] > 0, X @ b, (X * b).sum(1))


def averaged(b: Tensor) -> Tensor:
    return 3 * (X * b).mean(-1)


@pytest.mark.parametrize(
    "map", [product, elementwise, einsum, positions, linear, reshaped, concatenated, where, averaged]
)
def test_linear_maps_of_a_vector(map: Any) -> None:
    def model(y: Tensor) -> None:
        b = pyro.sample("b", dist.Normal(torch.zeros(3), 1.0).to_event(1))
        with pyro.plate("data", N):
            pyro.sample("y", dist.Normal(map(b), 0.5), obs=y)

    assert bound(model, Y) == pytest.approx(gaussian(X @ X.T + 0.25 * EYE), abs=1e-8)


def test_a_stack_of_scalar_sites_in_one_block() -> None:
    def model(y: Tensor) -> None:
        parts = [pyro.sample(f"b{i}", dist.Normal(0.0, 1.0)) for i in range(3)]
        with pyro.plate("data", N):
            pyro.sample("y", dist.Normal(X @ torch.stack(parts), 0.5), obs=y)

    exact = gaussian(X @ X.T + 0.25 * EYE)
    assert bound(model, Y, blocks=[("b0", "b1", "b2")]) == pytest.approx(exact, abs=1e-8)
    assert bound(model, Y) < exact - 1e-3  # naive mean field unless blocks are named


def test_a_gather_in_a_plate_and_a_sequential_plate() -> None:
    def gathered(y: Tensor) -> None:
        with pyro.plate("groups", 6):
            a = pyro.sample("a", dist.Normal(0.0, 1.0))
        with pyro.plate("data", N):
            pyro.sample("y", dist.Normal(a[GROUP], 0.5), obs=y)

    def sequential(y: Tensor) -> None:
        for j in pyro.plate("groups", 6):
            a = pyro.sample(f"a_{j}", dist.Normal(0.0, 1.0))
            rows = y[j == GROUP]
            with pyro.plate(f"data_{j}", len(rows)):
                pyro.sample(f"y_{j}", dist.Normal(a, 0.5), obs=rows)

    exact = gaussian((GROUP[:, None] == GROUP).double() + 0.25 * EYE)
    assert bound(gathered, Y) == pytest.approx(exact, abs=1e-8)
    assert bound(sequential, Y) == pytest.approx(exact, abs=1e-8)


def test_plates_without_a_size_and_batches_beside_plates() -> None:
    def sizeless(y: Tensor) -> None:
        with pyro.plate("data"):
            z = pyro.sample("z", dist.Normal(torch.zeros(len(y)), 1.0))
            pyro.sample("y", dist.Normal(z, 0.5), obs=y)

    def undeclared(y: Tensor) -> None:
        with pyro.plate("rows", 4, dim=-2):
            z = pyro.sample("z", dist.Normal(torch.zeros(4, 2), 1.0))
            pyro.sample("y", dist.Normal(z, 0.5), obs=y)

    exact = float(dist.Normal(0.0, 1.25**0.5).log_prob(SERIES).sum())
    assert bound(sizeless, SERIES) == pytest.approx(exact, abs=1e-8)
    assert bound(undeclared, SERIES.reshape(4, 2)) == pytest.approx(exact, abs=1e-8)


def test_programs_that_check_the_shapes_of_their_draws() -> None:
    def model(y: Tensor) -> None:
        weights = pyro.sample("weights", dist.Normal(0.0, 1.0).expand([3]).to_event(1))
        if weights.dim() != 1 or weights.numel() != X.shape[1]:
            raise RuntimeError(f"weights of shape {tuple(weights.shape)}")
        with pyro.plate("data", N):
            pyro.sample("y", dist.Normal(X @ weights, 0.5), obs=y)

    assert bound(model, Y) == pytest.approx(gaussian(X @ X.T + 0.25 * EYE), abs=1e-8)


def test_salaries_in_single_precision() -> None:
    """Values of 1e4 and a float32 program: the sweeps are in float64 all the same."""
    salaries = torch.tensor([42_350.0, 58_120.0, 71_480.0, 49_990.0], dtype=torch.float32)

    def model(y: Tensor) -> None:
        level = pyro.sample("level", dist.Normal(y.new_tensor(6e4), y.new_tensor(2e4)))
        with pyro.plate("people", len(y)):
            pyro.sample("salary", dist.Normal(level, y.new_tensor(7e3)), obs=y)

    exact = gaussian(4e8 * torch.ones(4, 4) + 49e6 * torch.eye(4), salaries.double() - 6e4)
    assert bound(model, salaries) == pytest.approx(exact, abs=1e-5)


def test_a_gaussian_process() -> None:
    gram = torch.exp(-0.5 * torch.cdist(X, X) ** 2) + 1e-4 * EYE

    def model(y: Tensor) -> None:
        f = pyro.sample("f", dist.MultivariateNormal(torch.zeros(N), gram))
        pyro.sample("y", dist.MultivariateNormal(f, 0.25 * EYE), obs=y)

    assert bound(model, Y) == pytest.approx(gaussian(gram + 0.25 * EYE), abs=1e-8)


def test_a_walk_as_one_block() -> None:
    def model(y: Tensor) -> None:
        x = pyro.sample("x_0", dist.Normal(0.0, 1.0))
        for t in range(len(y)):
            if t > 0:
                x = pyro.sample(f"x_{t}", dist.Normal(x, 0.5))
            pyro.sample(f"y_{t}", dist.Normal(x, 0.5), obs=y[t])

    times = torch.arange(8.0)
    covariance = 1.0 + 0.25 * torch.minimum(times[:, None], times) + 0.25 * torch.eye(8)
    block = [tuple(f"x_{t}" for t in range(8))]
    assert bound(model, SERIES, blocks=block) == pytest.approx(gaussian(covariance, SERIES), abs=1e-8)


def test_two_sites_in_one_block_across_a_plate() -> None:
    def model(y: Tensor) -> None:
        m = pyro.sample("m", dist.Normal(0.0, 2.0))
        with pyro.plate("groups", 6):
            a = pyro.sample("a", dist.Normal(m, 1.0))
        with pyro.plate("data", N):
            pyro.sample("y", dist.Normal(a[GROUP], 0.5), obs=y)

    exact = gaussian((GROUP[:, None] == GROUP).double() + 4.0 + 0.25 * EYE)
    assert bound(model, Y, blocks=[("m", "a")]) == pytest.approx(exact, abs=1e-8)
    guide = pplvi.AutoConjugate(model, blocks=[("m", "a")], seed=0)
    fit = pplvi.fit(model, guide, args=(Y,), seed=0, progress=False)
    assert fit.posterior(200).total_log_evidence.value == pytest.approx(exact, abs=1e-8)  # every weight is the evidence


def test_pyro_modules_with_sampled_weights() -> None:
    from pyro.nn import PyroModule, PyroSample

    class Regression(PyroModule):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.layer = PyroModule[torch.nn.Linear](3, 1)
            self.layer.weight = PyroSample(dist.Normal(0.0, 1.0).expand([1, 3]).to_event(2))
            self.layer.bias = PyroSample(dist.Normal(0.0, 2.0).expand([1]).to_event(1))

        def forward(self, y: Tensor) -> None:
            mean = self.layer(X).squeeze(-1)
            with pyro.plate("data", N):
                pyro.sample("y", dist.Normal(mean, 0.5), obs=y)

    exact = gaussian(X @ X.T + 4.0 + 0.25 * EYE)
    assert bound(Regression(), Y, blocks=[("layer.weight", "layer.bias")]) == pytest.approx(exact, abs=1e-8)


# ---------------------------------------------------------------------- one pair of prior and likelihood a row

COUNTS = torch.tensor([3.0, 0.0, 5.0, 2.0])
WAITS = torch.tensor([0.3, 2.0, 1.1, 0.7])
FLAGS = torch.tensor([1.0, 0.0, 1.0, 1.0])
WORDS = torch.tensor([0, 2, 1, 2, 2])
VECTORS = torch.randn(5, 2, generator=GENERATOR, dtype=torch.float64)
ROWS: dict[str, tuple[Any, Any, Tensor]] = {
    "Gamma, Poisson": (lambda: dist.Gamma(2.0, 3.0), dist.Poisson, COUNTS),
    "Gamma, Exponential": (lambda: dist.Gamma(2.0, 3.0), dist.Exponential, WAITS),
    "Exponential, Gamma": (lambda: dist.Exponential(3.0), lambda r: dist.Gamma(2.5, r), WAITS),
    "Gamma, precision": (lambda: dist.Gamma(2.0, 3.0), lambda t: dist.Normal(0.3, t.rsqrt()), WAITS),
    "InverseGamma, variance": (lambda: dist.InverseGamma(3.0, 2.0), lambda v: dist.Normal(0.3, v.sqrt()), WAITS),
    "Gamma, LogNormal": (lambda: dist.Gamma(2.0, 3.0), lambda t: dist.LogNormal(0.3, t.rsqrt()), WAITS),
    "Chi2, Poisson": (lambda: dist.Chi2(3.0), dist.Poisson, COUNTS),
    "Normal, Normal": (lambda: dist.Normal(1.0, 2.0), lambda m: dist.Normal(m, 0.7), WAITS),
    "Beta, Bernoulli": (lambda: dist.Beta(2.0, 3.0), dist.Bernoulli, FLAGS),
    "Uniform, Bernoulli": (lambda: dist.Uniform(0.0, 1.0), dist.Bernoulli, FLAGS),
    "Beta, Binomial": (lambda: dist.Beta(2.0, 3.0), lambda p: dist.Binomial(7, p), COUNTS),
    "Beta, Geometric": (lambda: dist.Beta(2.0, 3.0), dist.Geometric, COUNTS),
}


def evidence(prior: Any, likelihood: Any, data: Tensor) -> float:
    """By the trapezoid rule over the unconstrained value, where the joint density falls off at both ends."""
    to_support = torch.distributions.biject_to(prior.support)
    u = torch.linspace(-40.0, 40.0, 40_001)
    z = to_support(u)
    joint = prior.log_prob(z) + to_support.log_abs_det_jacobian(u, z)
    joint = joint + likelihood(z[:, None]).log_prob(data).sum(-1)
    return float(torch.logsumexp(joint[joint.isfinite()], 0) + torch.log(u[1] - u[0]))


@pytest.mark.parametrize("name", ROWS)
def test_the_evidence_of_a_pair_is_that_of_quadrature(name: str) -> None:
    make, likelihood, data = ROWS[name]
    data = data.double()

    def model() -> None:
        z = pyro.sample("z", make())
        with pyro.plate("data", len(data)):
            pyro.sample("y", likelihood(z), obs=data)

    assert bound(model) == pytest.approx(evidence(make(), likelihood, data), abs=1e-7)


def dirichlet_evidence(prior: Tensor, counts: Tensor) -> float:
    total = torch.lgamma(prior.sum()) - torch.lgamma(prior.sum() + counts.sum())
    return float(total + (torch.lgamma(prior + counts) - torch.lgamma(prior)).sum())


def test_dirichlet_rows() -> None:
    prior, counts = torch.tensor([0.5, 1.0, 2.0]), torch.bincount(WORDS).double()

    def categorical() -> None:
        p = pyro.sample("p", dist.Dirichlet(prior))
        with pyro.plate("data", len(WORDS)):
            pyro.sample("y", dist.Categorical(p), obs=WORDS)

    def one_hot() -> None:
        p = pyro.sample("p", dist.Dirichlet(prior))
        with pyro.plate("data", len(WORDS)):
            pyro.sample("y", dist.OneHotCategorical(p), obs=torch.nn.functional.one_hot(WORDS).double())

    def multinomial() -> None:
        p = pyro.sample("p", dist.Dirichlet(prior))
        pyro.sample("y", dist.Multinomial(5, p), obs=counts)

    def plate_of_multinomials() -> None:
        p = pyro.sample("p", dist.Dirichlet(prior))
        with pyro.plate("data", 3):
            pyro.sample("y", dist.Multinomial(7, p), obs=tables)

    exact = dirichlet_evidence(prior, counts)
    assert bound(categorical) == pytest.approx(exact, abs=1e-9)
    assert bound(one_hot) == pytest.approx(exact, abs=1e-9)
    ways = torch.lgamma(torch.tensor(6.0)) - torch.lgamma(counts + 1).sum()
    assert bound(multinomial) == pytest.approx(exact + float(ways), abs=1e-9)
    tables = torch.tensor([[7.0, 0.0, 0.0], [2.0, 4.0, 1.0], [1.0, 1.0, 5.0]])
    ways = 3 * torch.lgamma(torch.tensor(8.0)) - torch.lgamma(tables + 1).sum()
    together = dirichlet_evidence(prior, tables.sum(0)) + float(ways)
    assert bound(plate_of_multinomials) == pytest.approx(together, abs=1e-9)


def test_wishart_row() -> None:
    scale, df = torch.tensor([[0.5, 0.1], [0.1, 0.4]]), 4.0

    def model() -> None:
        precision = pyro.sample("precision", dist.Wishart(torch.tensor(df), scale))
        with pyro.plate("data", len(VECTORS)):
            pyro.sample("y", dist.MultivariateNormal(torch.zeros(2), precision_matrix=precision), obs=VECTORS)

    # A multivariate t of the data, one after another: p(y) = prior normaliser / posterior normaliser.
    def log_normaliser(n: Tensor, inverse: Tensor) -> Tensor:
        return -0.5 * n * torch.logdet(inverse) + n * torch.log(torch.tensor(2.0)) + torch.mvlgamma(n / 2, 2)

    before, after = torch.linalg.inv(scale), torch.linalg.inv(scale) + VECTORS.T @ VECTORS
    n = torch.tensor(df)
    exact = log_normaliser(n + 5, after) - log_normaliser(n, before) - 5 * torch.log(torch.tensor(2 * torch.pi))
    assert bound(model) == pytest.approx(float(exact), abs=1e-8)


# ---------------------------------------------------------------------- expectations against quadrature


def quantile_grid(fn: Any, count: int) -> Tensor:
    return torch.as_tensor(fn.ppf((torch.arange(count).double().numpy() + 0.5) / count))


def test_normal_with_latent_mean_and_precision_against_quadrature() -> None:
    """``E log N(y; a x, (3 tau)^-1/2)`` where nothing is exact but the expectation."""

    def model(y: Tensor) -> None:
        tau = pyro.sample("tau", dist.Gamma(2.0, 2.0))
        a = pyro.sample("a", dist.Normal(0.0, 1.0))
        c = pyro.sample("c", dist.Normal(1.0, 1.0))
        pyro.sample("y", dist.Normal(2 * a * c - c, (3 * tau).rsqrt()), obs=y)

    reading = read_program(model, (torch.tensor(0.7),), {}, init=init_to_sample)
    field = started(reading)
    for block in field.families:
        field.update(block)
    tau, a, c = (field.families[name].canonical for name in ("tau", "a", "c"))
    grid = 400
    t = quantile_grid(stats.gamma(float(tau["concentration"]), scale=1 / float(tau["rate"])), 200_000)
    z_a, z_c = (quantile_grid(stats.norm(float(q["loc"]), float(q["precision"]) ** -0.5), grid) for q in (a, c))
    mean_square = ((0.7 - 2 * z_a[:, None] * z_c + z_c) ** 2).mean()
    expected = 0.5 * (3 * t).log().mean() - 1.5 * t.mean() * mean_square - 0.5 * torch.log(torch.tensor(2 * torch.pi))
    (factor,) = [f for f in reading.factors if f.name == "y"]
    assert factor.at(field.state).item() == pytest.approx(float(expected), rel=0.02)  # the grid's error is in its tails
