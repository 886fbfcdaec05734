"""AutoPathfinder: exact where the posterior is Gaussian, right weights elsewhere, Pyro's contract, refusals."""

import copy
import io
import math
import pickle

import pyro
import pyro.distributions as dist
import pytest
import torch
from models import Collinear, coin, correlated, counts, nan_data, subsampled, words
from pyro.infer import SVI, Predictive, Trace_ELBO, config_enumerate
from pyro.infer.autoguide import AutoDiagonalNormal, AutoNormal, init_to_value
from torch.distributions import constraints

from pplvi import ELBO, ImportanceWeightedELBO, Posterior
from pplvi.guides import AutoFlow
from pplvi.guides.search import lbfgs
from pplvi.guides.search.batch_and_match import AutoBatchAndMatch
from pplvi.guides.search.gaussians import GaussianMixture, full_gaussian, local_gaussian, stack_gaussians
from pplvi.guides.search.lbfgs import Options, minimise
from pplvi.guides.search.pathfinder import AutoPathfinder, init_to_pathfinder
from pplvi.programs.density import UnconstrainedDensity

pytestmark = pytest.mark.usefixtures("float64")

PAPER = {"exact_hessian": False, "moment_matching": 0}
Y = torch.tensor([28.0, 8.0, -3.0, 7.0, -1.0, 1.0, 18.0, 12.0], dtype=torch.float64)
SIGMA = torch.tensor([15.0, 10.0, 16.0, 11.0, 9.0, 11.0, 10.0, 18.0], dtype=torch.float64)


def eight_schools() -> None:
    mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
    tau = pyro.sample("tau", dist.HalfCauchy(5.0))
    with pyro.plate("schools", 8):
        effect = pyro.sample("effect", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(mu + tau * effect, SIGMA), obs=Y)


def eight_schools_by_quadrature() -> tuple[torch.Tensor, torch.Tensor, float]:
    """Means and sds of (mu, log tau, effects) and the log evidence, on a grid over mu and log tau."""
    mu, u = torch.linspace(-25, 35, 601), torch.linspace(-12, 6, 901)
    m, t = mu[:, None, None], u[None, :, None].exp()
    log_p = dist.Normal(0.0, 5.0).log_prob(m) + dist.HalfCauchy(5.0).log_prob(t) + t.log()
    log_p = (log_p + dist.Normal(m, (t**2 + SIGMA**2).sqrt()).log_prob(Y).sum(-1, keepdim=True))[..., 0]
    cell = math.log(float((mu[1] - mu[0]) * (u[1] - u[0])))
    log_z = float(log_p.logsumexp((0, 1))) + cell
    weight = (log_p + cell - log_z).exp()
    mean = t * (Y - m) / (t**2 + SIGMA**2)
    square = mean**2 + SIGMA**2 / (t**2 + SIGMA**2)
    first = [(weight * m[..., 0]).sum(), (weight * u).sum(), *(weight[..., None] * mean).sum((0, 1))]
    second = [(weight * m[..., 0] ** 2).sum(), (weight * u**2).sum(), *(weight[..., None] * square).sum((0, 1))]
    first, second = torch.stack(first), torch.stack(second)
    return first, (second - first**2).sqrt(), log_z


def gaussian(dim: int):
    loc, covariance = correlated(dim, seed=0)
    return lambda: pyro.sample("x", dist.MultivariateNormal(loc, covariance))


def supports(rows: int = 3) -> None:
    pyro.sample("simplex", dist.Dirichlet(torch.tensor([2.0, 3.0, 4.0])))
    pyro.sample("positive", dist.Gamma(2.0, 2.0))
    pyro.sample("cholesky", dist.LKJCholesky(3, 2.0))
    with pyro.plate("rows", rows, dim=-2):
        pyro.sample("interval", dist.Uniform(-1.0, 2.0))
        with pyro.plate("columns", 2, dim=-1):
            pyro.sample("z", dist.Normal(0.0, 1.0))


def improper() -> dist.Distribution:
    return dist.ImproperUniform(constraints.real, (), ())


# ---------------------------------------------------------------------- exactness


@pytest.mark.parametrize("dim", [1, 3, 10, 30])
def test_a_gaussian_posterior_is_found_exactly(dim):
    loc, covariance = correlated(dim, seed=0)
    guide = AutoPathfinder(gaussian(dim), seed=0, moment_matching=0, num_paths=2).run()
    best = max(guide.paths, key=lambda path: path.elbos[-1])
    assert best.elbos[-1] == pytest.approx(0.0, abs=1e-6)  # log Z = 0: the Gaussian of the Hessian is the posterior
    posterior = guide.get_posterior()
    sd = covariance.diagonal().sqrt()
    if dim >= 10:  # with fewer dimensions the noise of an ELBO can prefer an iterate that is nearly exact
        assert torch.allclose(posterior.mean, loc, atol=1e-3)
        assert torch.allclose(posterior.parts.covariance[0], covariance, rtol=1e-4, atol=1e-5)
    assert ((posterior.mean - loc).abs() < 0.1 * sd).all()
    assert torch.allclose(posterior.variance.sqrt(), sd, rtol=0.1)


def test_many_dimensions_are_matched_by_their_scores():
    loc, covariance = correlated(110, seed=0)
    rough, guide = (AutoPathfinder(gaussian(110), seed=0, moment_matching=n).run() for n in (0, 10))
    assert (rough.is_matched, guide.is_matched) == (False, True)
    posterior, sd = guide.get_posterior(), covariance.diagonal().sqrt()
    assert ((posterior.mean - loc).abs() < 0.05 * sd).all()
    assert torch.allclose(posterior.variance.sqrt(), sd, rtol=0.05)
    gaps = [-Posterior(gaussian(110), each, seed=0).elbo.value for each in (rough, guide)]  # log Z = 0
    assert gaps[1] < 0.05 < 1.0 < gaps[0]


def test_modes_in_many_dimensions_are_all_matched():
    def apart():
        x = pyro.sample("x", dist.Normal(0.0, 3.0).expand([101]).to_event(1))
        pyro.factor("modes", torch.logaddexp(*(-50 * (x[..., 0] - m) ** 2 for m in (-1.5, 1.5))))

    guide = AutoPathfinder(apart, seed=0, num_paths=8).run()
    assert (guide.get_posterior().parts.loc[:, 0] > 0).tolist() in ([True, False], [False, True])
    posterior = Posterior(apart, guide, seed=0)
    assert float(posterior.pareto_k) < 0.5
    assert float(posterior.ess) > 900


@pytest.mark.parametrize("dim", [2, 5])
def test_the_papers_pathfinder_is_exact_after_resampling(dim):
    loc, covariance = correlated(dim, seed=0)
    guide = AutoPathfinder(gaussian(dim), seed=1, history=12, **PAPER).run()
    posterior = Posterior(gaussian(dim), guide, num_draws=20_000, seed=0)
    assert posterior.pareto_k < 0.7
    value, error = posterior.log_evidence
    assert abs(value) < 4 * error + 1e-6
    draws, sd = posterior.resample(seed=0)["x"], covariance.diagonal().sqrt()
    tolerance = 4 / math.sqrt(float(posterior.ess))
    assert ((draws.mean(0) - loc).abs() < 1.5 * tolerance * sd).all()
    assert (draws.T.cov() - covariance).abs().max() < 2 * tolerance * covariance.diagonal().max()


def test_eight_schools_agree_with_quadrature():
    mean, sd, log_z = eight_schools_by_quadrature()
    assert log_z == pytest.approx(-31.31135, abs=1e-4)
    guide = AutoPathfinder(eight_schools, seed=0).run()
    posterior = Posterior(eight_schools, guide, num_draws=20_000, seed=1)
    assert posterior.pareto_k < 0.7
    value, error = posterior.log_evidence
    assert abs(value - log_z) < max(4 * error, torch.tensor(0.05))
    latents = posterior.resample(seed=2)
    draws = torch.cat([latents["mu"][:, None], latents["tau"].log()[:, None], latents["effect"]], 1)
    assert ((draws.mean(0) - mean).abs() < 0.1 * sd).all()
    assert ((draws.std(0) / sd - 1).abs() < 0.1).all()


def test_a_collinear_regression_agrees_with_its_closed_form():
    known = Collinear()
    model, mean, sd = known.model, known.mean, known.sd
    posterior = Posterior(model, AutoPathfinder(model, seed=0).run(), num_draws=10_000, seed=1)
    draws = posterior.resample(seed=2)["w"]
    assert posterior.pareto_k < 0.5
    assert ((draws.mean(0) - mean).abs() < 0.05 * sd).all()
    assert ((draws.std(0) / sd - 1).abs() < 0.05).all()


def log_beta(a: torch.Tensor) -> torch.Tensor:
    return a.lgamma().sum() - a.sum().lgamma()


def test_evidence_of_conjugate_models():
    data = torch.tensor([3.0, 5.0, 2.0, 6.0])
    gamma = torch.tensor([3.0, 2.0, 19.0, 6.0])
    poisson = gamma[0] * gamma[1].log() - gamma[0].lgamma() + gamma[2].lgamma() - gamma[2] * gamma[3].log()
    prior, seen = torch.tensor([1.0, 2.0, 3.0]), torch.tensor([5.0, 1.0, 4.0])
    multinomial = torch.tensor(11.0).lgamma() - (seen + 1).lgamma().sum()
    exact = {
        coin: log_beta(torch.tensor([6.0, 5.0])) - log_beta(torch.tensor([2.0, 3.0])),
        counts: poisson - (data + 1).lgamma().sum(),
        words: multinomial + log_beta(prior + seen) - log_beta(prior),
    }
    for model, log_z in exact.items():
        posterior = Posterior(model, AutoPathfinder(model, seed=0).run(), num_draws=20_000, seed=1)
        value, error = posterior.log_evidence
        assert posterior.pareto_k < 0.7, model
        assert error < 0.02, model
        assert abs(value - log_z) < 4 * error, model


@pytest.mark.parametrize("options", [{}, PAPER, {**PAPER, "num_paths": 1}])
def test_the_density_on_constrained_supports_integrates_to_one(options):
    """The model is normalised, so E_q[p / q] = 1 if q is, with every Jacobian counted once."""
    model = lambda: supports(1)  # noqa: E731
    posterior = Posterior(model, AutoPathfinder(model, seed=3, history=20, **options).run(), num_draws=20_000, seed=1)
    value, error = posterior.log_evidence
    assert error < 0.1
    assert abs(value) < 4 * error


def test_an_enumerated_site_is_summed_out():
    y = torch.tensor([-2.1, -1.9, 2.0, 2.2, 1.8])

    @config_enumerate
    def model() -> None:
        center = pyro.sample("center", dist.Normal(0.0, 3.0))
        with pyro.plate("data", 5):
            side = pyro.sample("side", dist.Bernoulli(0.5))
            pyro.sample("y", dist.Normal(center * (2 * side - 1), 1.0), obs=y)

    grid = torch.linspace(-15, 15, 20_001)
    both = torch.stack([dist.Normal(sign * grid[:, None], 1.0).log_prob(y) for sign in (1.0, -1.0)])
    log_p = dist.Normal(0.0, 3.0).log_prob(grid) + (both.logsumexp(0) - math.log(2)).sum(1)
    log_z = log_p.logsumexp(0) + (grid[1] - grid[0]).log()
    posterior = Posterior(model, AutoPathfinder(model, seed=1, num_paths=8).run(), num_draws=4_000, seed=1)
    value, error = posterior.log_evidence
    assert error < 0.05
    assert abs(value - log_z) < 4 * error  # two modes: a path that finds one of them only would be log 2 off


# ---------------------------------------------------------------------- the parts


def test_lbfgs_finds_the_minimum_of_rosenbrock_from_all_starts():
    def rosenbrock(x):
        x = x.detach().requires_grad_()
        value = (1 - x[:, 0]) ** 2 + 100 * (x[:, 1] - x[:, 0] ** 2) ** 2
        return value.detach(), torch.autograd.grad(value.sum(), x)[0]

    starts = [torch.tensor([-1.2, 1.0]), torch.tensor([2.0, 2.0]), torch.tensor([0.0, 0.0])]
    trails = minimise(rosenbrock, starts, Options())
    assert [trail.reason for trail in trails] == ["converged"] * 3
    for trail in trails:
        assert torch.allclose(trail.points[-1].position, torch.ones(2), atol=1e-3)
        assert all(b.value <= a.value for a, b in zip(trail.points, trail.points[1:], strict=False))
        assert len(trail.points) < 60


def test_local_gaussian_is_the_dense_bfgs_inverse_hessian():
    torch.manual_seed(0)
    dim = 7
    hessian = torch.linalg.inv(correlated(dim, seed=0)[1])
    pairs = [(s, hessian @ s) for s in torch.randn(3, dim)]
    alpha = torch.rand(dim) + 0.5
    dense = alpha.diag()
    for s, y in pairs:
        left = torch.eye(dim) - torch.outer(s, y) / (s @ y)
        dense = left @ dense @ left.T + torch.outer(s, s) / (s @ y)
    position, gradient = torch.randn(2, dim)
    found = local_gaussian(position, gradient, alpha, pairs)
    assert torch.allclose(found.covariance, dense)
    assert torch.allclose(found.variance, dense.diagonal())
    assert torch.allclose(found.loc, position - dense @ gradient)
    assert found.log_scale == pytest.approx(0.5 * float(dense.logdet()))
    draws = found.push(torch.randn(5, dim))
    assert torch.allclose(found.log_prob(draws), dist.MultivariateNormal(found.loc, dense).log_prob(draws))


def test_mixture_has_the_density_of_its_draws():
    parts = [full_gaussian(*correlated(2, seed)) for seed in (1, 2)]
    normals = [dist.MultivariateNormal(*correlated(2, seed)) for seed in (1, 2)]
    mixture = GaussianMixture(stack_gaussians(parts))
    z = mixture.sample((50_000,))
    both = torch.stack([normal.log_prob(z) for normal in normals])
    assert torch.allclose(mixture.log_prob(z), both.logsumexp(0) - math.log(2))
    sd = mixture.variance.sqrt()
    assert ((z.mean(0) - mixture.mean).abs() < 4 * sd / math.sqrt(len(z))).all()
    assert torch.allclose(z.std(0), sd, rtol=0.03)
    assert mixture.expand((3, 1)).sample((5,)).shape == (5, 3, 1, 2)
    assert mixture.expand((3, 1)).log_prob(z[0]).shape == (3, 1)


def test_density_is_that_of_the_transformed_model():
    density = UnconstrainedDensity(supports, (2,))
    u = torch.randn(4, density.dim)
    values = density.unpack(u)
    expected = torch.zeros(4)
    for block, part in zip(density.blocks, u.split([b.size for b in density.blocks], -1), strict=True):
        for row in range(4):
            z = part[row].reshape(block.shape)
            expected[row] += block.transform.log_abs_det_jacobian(z, values[block.name][row]).sum()
    expected += dist.Dirichlet(torch.tensor([2.0, 3.0, 4.0])).log_prob(values["simplex"])
    expected += dist.Gamma(2.0, 2.0).log_prob(values["positive"])
    expected += dist.LKJCholesky(3, 2.0).log_prob(values["cholesky"])
    expected += -2 * math.log(3.0) + dist.Normal(0.0, 1.0).log_prob(values["z"]).sum((1, 2))
    assert torch.allclose(density(u), expected)
    assert torch.allclose(torch.cat([density(row) for row in u.split(1)]), expected)
    one = density.pack({name: value[2] for name, value in values.items()})
    assert torch.allclose(one, u[2])
    hessian = torch.autograd.functional.hessian(lambda z: density(z[None])[0], u[0])
    assert torch.allclose(density.hessian(u[0]), hessian)


# ---------------------------------------------------------------------- Pyro's contract


def test_shapes_median_and_quantiles():
    guide = AutoPathfinder(supports, seed=0)
    with pyro.plate("particles", 5, dim=-3):
        draws = guide()
    shapes = {"simplex": (3,), "positive": (), "cholesky": (3, 3), "interval": (3, 1), "z": (3, 2)}
    left = {"simplex": (5, 1, 1, 3), "positive": (5, 1, 1), "cholesky": (5, 1, 1, 3, 3)}
    assert {n: v.shape for n, v in draws.items()} == {**left, "interval": (5, 3, 1), "z": (5, 3, 2)}
    assert {n: v.shape for n, v in guide.median().items()} == shapes
    assert {n: v.shape for n, v in guide.quantiles([0.1, 0.9]).items()} == {n: (2, *s) for n, s in shapes.items()}
    low, high = guide.quantiles([0.05, 0.95])["z"]
    assert ((low - dist.Normal(0.0, 1.0).icdf(torch.tensor(0.05))).abs() < 0.25).all()
    assert (low < high).all()
    assert {n: v.shape for n, v in guide.best_values().items()} == shapes


def test_seeds_make_it_reproducible_and_leave_the_global_state_alone():
    torch.manual_seed(5)
    before = torch.get_rng_state()
    first, second, other = (AutoPathfinder(eight_schools, seed=s, **PAPER).run() for s in (0, 0, 1))
    assert torch.equal(before, torch.get_rng_state())
    assert torch.equal(first.loc, second.loc)
    assert first.paths == second.paths
    assert not torch.equal(first.loc, other.loc)
    torch.manual_seed(7)
    third = AutoPathfinder(eight_schools, **PAPER).run()
    torch.manual_seed(7)
    assert torch.equal(third.loc, AutoPathfinder(eight_schools, **PAPER).run().loc)


@pytest.mark.parametrize("vectorize", ["vmap", "loop", False])
def test_rows_in_any_way_find_the_same(vectorize):
    options = {"seed": 0, "num_paths": 2, **PAPER}
    together = AutoPathfinder(coin, **options).run()
    apart = AutoPathfinder(coin, vectorize=vectorize, **options).run()
    assert torch.allclose(together.loc, apart.loc, atol=1e-6)


def test_models_that_do_not_broadcast_are_carried():
    guide = AutoPathfinder(unbroadcast, seed=0).run()
    variance = guide.get_posterior().variance
    assert torch.allclose(variance, torch.tensor([1.0, 2.0, 2.0, 2.0]), rtol=0.1, atol=0.0)
    with pytest.raises(ValueError, match=r"vectorize='broadcast': the model cannot be run that way"):
        AutoPathfinder(unbroadcast, seed=0, vectorize="broadcast").run()


def test_pickle_state_dict_and_copies():
    guide = AutoPathfinder(eight_schools, seed=0, **PAPER).run()
    z = torch.randn(3, 10)
    expected = guide.get_posterior().log_prob(z)
    loaded = pickle.loads(pickle.dumps(guide))
    assert torch.equal(loaded.get_posterior().log_prob(z), expected)
    assert loaded.paths == guide.paths
    with pytest.raises(ValueError, match="unpickled"):
        loaded.run()
    twin = copy.deepcopy(guide)
    assert torch.equal(twin.get_posterior().log_prob(z), expected)
    assert guide.model is not None
    buffer = io.BytesIO()
    torch.save(guide.state_dict(), buffer)
    buffer.seek(0)
    fresh = AutoPathfinder(eight_schools, seed=9, num_paths=2)  # has not run, and has another number of paths
    fresh.load_state_dict(torch.load(buffer))
    fresh()
    assert torch.equal(fresh.get_posterior().log_prob(z), expected)


def test_two_guides_side_by_side():
    one, two = AutoPathfinder(coin, seed=0), AutoPathfinder(counts, seed=0)
    one()
    two()
    alone = AutoPathfinder(coin, seed=0).run()
    assert torch.equal(one.loc, alone.loc)
    assert one.median().keys() == {"p"}
    assert two.median().keys() == {"rate"}
    assert len(pyro.get_param_store()) == 0


def test_it_runs_again_for_new_data_and_refuses_another_size():
    def model(y):
        with pyro.plate("data", len(y)):
            x = pyro.sample("x", dist.Normal(0.0, 1.0))
            pyro.sample("y", dist.Normal(x, 1.0), obs=y)

    guide = AutoPathfinder(model, seed=0).run(torch.ones(3))
    assert torch.allclose(guide.median()["x"], torch.full((3,), 0.5), atol=0.05)
    guide.run(-torch.ones(4))
    assert torch.allclose(guide.median()["x"], torch.full((4,), -0.5), atol=0.05)
    with pytest.raises(ValueError, match="data"):
        Posterior(model, guide, (torch.ones(7),), num_draws=10)
    other = AutoPathfinder(model)
    other.load_state_dict(guide.state_dict())
    with pytest.raises(ValueError, match="4 unconstrained coordinates"):
        other(torch.ones(2))


def test_predictive_on_new_data():
    def model(x, y=None):
        slope = pyro.sample("slope", dist.Normal(0.0, 10.0))
        with pyro.plate("data", len(x)):
            return pyro.sample("y", dist.Normal(slope * x, 0.1), obs=y)

    x = torch.linspace(0, 1, 20)
    guide = AutoPathfinder(model, seed=0).run(x, 2 * x)
    found = Predictive(model, guide=guide, num_samples=500)(torch.tensor([3.0, 4.0]))["y"]
    assert found.shape == (500, 2)
    assert torch.allclose(found.mean(0), torch.tensor([6.0, 8.0]), atol=0.1)


def test_objectives_take_it_and_train_the_model_around_it():
    def model() -> None:
        shift = pyro.param("shift", torch.tensor(0.0))
        x = pyro.sample("x", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(x + shift, 1.0), obs=torch.tensor(2.0))

    guide = AutoPathfinder(model, seed=0).run()
    exact = -dist.Normal(0.0, math.sqrt(2)).log_prob(torch.tensor(2.0)).item()
    for objective in (ELBO(64), ImportanceWeightedELBO(64), Trace_ELBO(64, vectorize_particles=True)):
        assert objective.loss(model, guide) == pytest.approx(exact, abs=0.02)  # the guide is exact but for its choice
    svi = SVI(model, guide, pyro.optim.SGD({"lr": 0.1}), ELBO(1000))
    svi.step()
    assert pyro.param("shift").item() == pytest.approx(0.1 * (2 - 1), abs=0.02)  # E[y - x - shift] = 1


def test_float32():
    with_default = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    try:
        guide = AutoPathfinder(gaussian(3), seed=0).run()
        assert guide()["x"].dtype == torch.float32
        assert all(path.reason == "converged" for path in guide.paths)
    finally:
        torch.set_default_dtype(with_default)


@pytest.mark.parametrize("kind", [AutoPathfinder, AutoBatchAndMatch])
@pytest.mark.parametrize("scale", [1e-4, 1.0, 1e4, 1e8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_scales_far_from_one_are_no_matter(kind, scale, dtype):
    data = scale * torch.tensor([5.12, 4.87, 6.21, 3.99, 5.55], dtype=dtype)

    def income(y: torch.Tensor) -> None:
        mu = pyro.sample("mu", dist.Normal(y.new_tensor(5 * scale), scale))
        with pyro.plate("data", len(y)):
            pyro.sample("y", dist.Normal(mu, 0.8 * scale), obs=y)

    found = kind(income, seed=0).run(data).get_posterior()
    variance = 1 / (1 + len(data) / 0.64)  # closed form, in units of the scale
    mean = variance * (5.0 + float(data.sum()) / scale / 0.64)
    assert float(found.mean) / scale == pytest.approx(mean, abs=0.01 * math.sqrt(variance))
    assert float(found.variance.sqrt()) / scale == pytest.approx(math.sqrt(variance), rel=0.01)


# ---------------------------------------------------------------------- the start of other guides


@pytest.mark.parametrize("kind", [AutoNormal, AutoDiagonalNormal, AutoFlow])
def test_other_guides_start_where_it_ends(kind):
    guide = kind(counts, init_loc_fn=init_to_pathfinder(counts, seed=0), init_scale=0.01)
    guide()
    exact = dist.Gamma(19.0, 6.0)
    assert abs(guide.median()["rate"] - exact.mean) < 0.3 * exact.stddev


def test_a_start_at_the_mode_still_has_a_path():
    def model() -> None:
        pyro.sample("x", dist.Normal(1.0, 0.5))

    guide = AutoPathfinder(model, seed=0, init_loc_fn=init_to_value(values={"x": torch.tensor(1.0)})).run()
    assert torch.allclose(guide.get_posterior().variance.sqrt(), torch.tensor(0.5), rtol=0.05)


# ---------------------------------------------------------------------- refusals


def hidden() -> None:
    side = pyro.poutine.block(lambda: pyro.sample("side", dist.Normal(0.0, 1.0)))()
    pyro.sample("y", dist.Normal(side + pyro.sample("x", dist.Normal(0.0, 1.0)), 1.0), obs=torch.tensor(1.0))


def unbroadcast() -> None:
    pyro.sample("y", dist.Normal(pyro.sample("x", dist.Normal(0.0, 1.0)) * torch.ones(3), 1.0).to_event(1))


def rising() -> None:
    pyro.factor("rising", 1.0 * pyro.sample("x", improper()))


def rising_with_another() -> None:
    pyro.factor("rising", pyro.sample("x", improper()) - pyro.sample("y", dist.Normal(0.0, 1.0)) ** 2)


def flat() -> None:
    pyro.sample("x", improper())


def unidentified() -> None:
    total = pyro.sample("a", improper()) + pyro.sample("b", improper())
    pyro.sample("y", dist.Normal(total, 0.1), obs=torch.tensor(3.0))


def separable() -> None:
    logits = pyro.sample("slope", improper())[..., None] * torch.tensor([-1.0, -2.0, 1.0, 3.0])
    pyro.sample("y", dist.Bernoulli(logits=logits).to_event(1), obs=torch.tensor([0.0, 0.0, 1.0, 1.0]))


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (lambda: pyro.sample("k", dist.Poisson(3.0)), "discrete sample site 'k'"),
        (lambda: pyro.sample("y", dist.Normal(0.0, 1.0), obs=torch.tensor(1.0)), "without latent sites"),
        (subsampled, r"plates \['data'\] are subsampled"),
        (nan_data, "the first bad site is 'bad'"),
        (hidden, "not a function of its latent sites"),
        (rising, "improper"),
        (rising_with_another, "improper.*site 'x'"),
        (flat, "improper"),
        (unidentified, "improper.*site '[ab]'"),
        (separable, "improper.*site 'slope'"),
    ],
)
def test_refused_models(model, message):
    guide = AutoPathfinder(model, seed=0)
    with pytest.raises(ValueError, match=message):
        guide.run()
    with pytest.raises(ValueError, match="has not seen"):  # no half a guide is left
        guide.get_posterior()


@pytest.mark.parametrize(
    "options",
    [
        {"num_paths": 0},
        {"history": 1.5},
        {"elbo_draws": True},
        {"lbfgs": {"max_iterations": -1}},
        {"lbfgs": {"max_iterations": 0}},
        {"moment_matching": -1},
        {"init_radius": math.inf},
        {"lbfgs": {"tol_objective": 1e-3}},
        {"lbfgs": {"tol_obj": -1.0}},
    ],
)
def test_refused_settings(options):
    with pytest.raises(ValueError, match="expected"):
        AutoPathfinder(coin, **options)


def test_a_density_without_a_mode_does_not_run_for_ever():
    def centered() -> None:
        mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
        tau = pyro.sample("tau", dist.HalfCauchy(5.0))
        with pyro.plate("schools", 8):
            effect = pyro.sample("effect", dist.Normal(mu, tau))
            pyro.sample("y", dist.Normal(effect, SIGMA), obs=Y)

    guide = AutoPathfinder(centered, seed=0, num_paths=2, **PAPER).run()
    assert all(path.reason == "stopped" and len(path.elbos) < 200 for path in guide.paths)
    assert all(math.isfinite(path.elbo) for path in guide.paths)


def banana() -> None:
    """A posterior that no Gaussian comes near to."""
    a = pyro.sample("a", dist.Normal(0.0, 1.0))
    pyro.sample("b", dist.Normal(a**2, 0.8))


def test_mixtures_follow_a_bent_posterior():
    found = {}
    for size in (1, 8):
        guide = AutoPathfinder(banana, seed=0, num_components=size).run()
        found[size] = Posterior(banana, guide, num_draws=10_000, seed=0)
    assert found[8].ess > 2 * found[1].ess
    assert found[8].log_evidence[0] == pytest.approx(0.0, abs=0.05)
    assert guide.best_values()["b"] < 1.0  # of the component where the density is highest


def test_where_a_gaussian_will_do_there_is_no_mixture():
    assert len(AutoPathfinder(gaussian(3), seed=0).run().loc) <= 4  # the paths, or one


def test_guides_that_start_at_it_start_at_one_gaussian():
    value = init_to_pathfinder(banana, seed=0)
    assert value({"name": "b", "fn": dist.Normal(0.0, 1.0)}).shape == ()


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        ((0.0, 1.0, -1.0), (1.0, 1.0, 1.0), 0.5),  # a parabola's minimum
        ((0.0, 0.0, -1e-6), (1.0, 9.0, 9.0), 0.1),  # so near the lower end that it would not move
        ((0.0, 9.0, -9.0), (1.0, 0.0, 1e-6), 0.9),  # or the upper one
        ((0.0, 1.0, -1.0), (math.inf, math.nan, math.nan), 1.0),  # nothing above yet: on, and then ten times as far
        ((2.0, 1.0, -1.0), (math.inf, math.nan, math.nan), 20.0),
        ((0.0, 1.0, -1.0), (1.0, math.nan, math.nan), 0.1),  # not finite above: back
        ((1.0, 1.0, -1.0), (3.0, math.nan, math.nan), 2.0),
    ],
)
def test_a_line_search_keeps_away_from_the_ends_of_its_bracket(low, high, expected):
    assert lbfgs._next_step(lbfgs._Trial(*low), lbfgs._Trial(*high)) == pytest.approx(expected)


def test_a_tolerance_of_zero_is_one():
    AutoPathfinder(coin, lbfgs={"tol_obj": 0.0, "tol_rel_grad": 1.0})
    for bad in (-1e-9, math.inf, math.nan):
        with pytest.raises(ValueError, match=r"lbfgs( has |=).*'tol_obj'"):
            AutoPathfinder(coin, lbfgs={"tol_obj": bad})
