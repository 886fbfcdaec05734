"""Loops over time: enumerated chains as trees of products, walks as one block, turns of a loop as one factor."""

from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer.autoguide import init_to_sample
from torch import Tensor

import pplvi
from pplvi.guides.conjugate.ascent import ascend_bound, started
from pplvi.guides.conjugate.chains import log_product
from pplvi.guides.conjugate.loops import stem_of
from pplvi.guides.conjugate.program import read_program

pytestmark = pytest.mark.usefixtures("float64")

LENGTH = 20


def level(y: Tensor) -> None:
    x = pyro.sample("x_0", dist.Normal(0.0, 1.0))
    for t in range(len(y)):
        if t > 0:
            x = pyro.sample(f"x_{t}", dist.Normal(x, 0.5))
        pyro.sample(f"y_{t}", dist.Normal(x, 1.0), obs=y[t])


def smoothed(y: Tensor, q: float, r: float) -> tuple[Tensor, Tensor]:
    """Means and variances of a local level by a Kalman filter and a Rauch-Tung-Striebel smoother."""
    means, variances, ahead = [], [], []
    m, p = torch.tensor(0.0), torch.tensor(1.0)
    for t in range(len(y)):
        if t > 0:
            p = p + q
        ahead.append((m, p))
        gain = p / (p + r)
        m, p = m + gain * (y[t] - m), (1 - gain) * p
        means.append(m)
        variances.append(p)
    for t in range(len(y) - 2, -1, -1):
        gain = variances[t] / ahead[t + 1][1]
        means[t] = means[t] + gain * (means[t + 1] - ahead[t + 1][0])
        variances[t] = variances[t] + gain**2 * (variances[t + 1] - ahead[t + 1][1])
    return torch.stack(means), torch.stack(variances)


def test_a_local_level_equals_the_smoother_and_has_the_evidence() -> None:
    y = torch.randn(LENGTH, generator=torch.Generator().manual_seed(0), dtype=torch.float64).cumsum(0)
    reading = read_program(level, (y,), {}, init=init_to_sample)
    assert len(reading.factors) == 3  # the first step, the others, the data
    assert list(reading.blocks) == [f"x_0 to x_{LENGTH - 1}"]
    fit = pplvi.fit(level, pplvi.AutoConjugate, args=(y,), seed=0, progress=False)
    times = torch.arange(float(LENGTH))
    covariance = 1.0 + 0.25 * torch.minimum(times[:, None], times) + torch.eye(LENGTH)
    exact = float(dist.MultivariateNormal(torch.zeros(LENGTH), covariance).log_prob(y))
    assert fit.guide.bounds[-1] == pytest.approx(exact, abs=1e-8)
    means, variances = smoothed(y, 0.25, 1.0)
    found = fit.guide.quantiles([0.1, 0.5, 0.9], y)
    low, middle, high = torch.stack([found[f"x_{t}"] for t in range(LENGTH)], 1)
    assert torch.allclose(middle, means, rtol=0, atol=1e-8)
    assert torch.allclose((high - low) / (2 * 1.2815515655446004), variances.sqrt(), rtol=1e-8)
    assert fit.posterior(20).total_log_evidence.value == pytest.approx(exact, abs=1e-8)


def test_a_vector_walk_with_latent_precisions_never_falls() -> None:
    move = torch.tensor([[0.9, 0.2], [-0.2, 0.9]])
    y = torch.randn(15, 2, generator=torch.Generator().manual_seed(1), dtype=torch.float64)

    def model(y: Tensor) -> None:
        q = pyro.sample("q", dist.Gamma(2.0, 1.0))
        r = pyro.sample("r", dist.Gamma(2.0, 1.0))
        x = pyro.sample("x0", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        for t in pyro.markov(range(len(y))):
            if t > 0:
                x = pyro.sample(f"x{t}", dist.Normal(x @ move.T, q.rsqrt()).to_event(1))
            pyro.sample(f"y{t}", dist.Normal(x, r.rsqrt()).to_event(1), obs=y[t])

    guide = pplvi.AutoConjugate(model, seed=0).run(y)
    bounds = torch.tensor(guide.bounds)
    assert (bounds.diff() >= -1e-12 * bounds[1:].abs()).all()
    assert len(guide.state_dict()) == 7  # q, r, one block, and the trace of the bound
    known = pyro.poutine.condition(model, {"q": torch.tensor(4.0), "r": torch.tensor(1.0)})
    evidence = pplvi.Posterior(known, pplvi.AutoConjugate(known, seed=0).run(y), (y,), num_draws=20, seed=0)
    assert evidence.total_log_evidence.value == pytest.approx(evidence.elbo.value, abs=1e-8)


def test_many_series_in_a_plate_are_independent() -> None:
    y = torch.randn(6, 5, generator=torch.Generator().manual_seed(2), dtype=torch.float64)

    def model(y: Tensor) -> None:
        with pyro.plate("series", y.shape[1]):
            x = pyro.sample("x_0", dist.Normal(0.0, 1.0))
            for t in range(len(y)):
                if t > 0:
                    x = pyro.sample(f"x_{t}", dist.Normal(x, 0.5))
                pyro.sample(f"y_{t}", dist.Normal(x, 1.0), obs=y[t])

    guide = pplvi.AutoConjugate(model, seed=0).run(y)
    each = [pplvi.AutoConjugate(level, seed=0).run(column).bounds[-1] for column in y.T]
    assert guide.bounds[-1] == pytest.approx(sum(each), abs=1e-8)
    assert guide(y)["x_3"].shape == (5,)


def test_a_named_block_is_what_it_is_named() -> None:
    y = torch.tensor([0.3, 1.0, 0.2, -0.5])
    exact = pplvi.AutoConjugate(level, seed=0).run(y).bounds[-1]
    pairs = pplvi.AutoConjugate(level, seed=0, blocks=[("x_0", "x_1"), ("x_2", "x_3")]).run(y).bounds[-1]
    alone = pplvi.AutoConjugate(level, seed=0, blocks=[(f"x_{t}",) for t in range(4)]).run(y).bounds[-1]
    assert alone < pairs < exact


# ---------------------------------------------------------------------- enumerated chains


def sequences(y: Tensor) -> None:
    """Several chains in a plate, with normal emissions."""
    moves = pyro.sample("moves", dist.Dirichlet(torch.ones(2, 2)).to_event(1))
    loc = pyro.sample("loc", dist.Normal(torch.tensor([-1.0, 1.0]), 1.0).to_event(1))
    z: Any = None
    with pyro.plate("sequences", y.shape[1]):
        for t in pyro.markov(range(len(y))):
            z = pyro.sample(f"z_{t}", dist.Categorical(torch.ones(2) / 2 if t == 0 else moves[z]))
            pyro.sample(f"y_{t}", dist.Normal(loc[z], 0.5), obs=y[t])


def of_lengths(y: Tensor) -> None:
    """Chains that end at steps of their own, and have an observation that is missing."""
    moves = pyro.sample("moves", dist.Dirichlet(torch.ones(2, 2)).to_event(1))
    loc = pyro.sample("loc", dist.Normal(torch.tensor([-1.0, 1.0]), 1.0).to_event(1))
    lengths, z = torch.tensor([5, 3, 1]), 0
    with pyro.plate("sequences", y.shape[1]):
        for t in pyro.markov(range(len(y))):
            with poutine.mask(mask=t < lengths):
                z = pyro.sample(f"z_{t}", dist.Categorical(moves[z]))
                with poutine.mask(mask=t != 2):
                    pyro.sample(f"y_{t}", dist.Normal(loc[z], 0.5), obs=y[t])


@pytest.mark.parametrize("model", [sequences, of_lengths])
def test_a_tree_of_products_equals_the_contraction_of_factors(model: Any) -> None:
    """The chain against Pyro's plated contraction of the same factors: bound, and probabilities that updates see."""
    from pplvi.guides.conjugate import chains

    y = torch.randn(5, 3, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    y[4, 1:] = torch.nan if model is of_lengths else 0.0  # beyond the length
    pyro.set_rng_seed(0)
    tree = started(read_program(model, (y,), {}, init=init_to_sample))
    assert tree.reading.chain is not None
    least, chains.LEAST = chains.LEAST, 100
    try:
        pyro.set_rng_seed(0)
        plain = started(read_program(model, (y,), {}, init=init_to_sample))
    finally:
        chains.LEAST = least
    assert plain.reading.chain is None
    assert ascend_bound(tree, most=4, tolerance=0.0) == pytest.approx(
        ascend_bound(plain, most=4, tolerance=0.0), abs=1e-9
    )


def test_what_is_masked_counts_nowhere() -> None:
    def apart(y: Tensor) -> None:
        moves = pyro.sample("moves", dist.Dirichlet(torch.ones(2, 2)).to_event(1))
        loc = pyro.sample("loc", dist.Normal(torch.tensor([-1.0, 1.0]), 1.0).to_event(1))
        for n, length in enumerate((5, 3, 1)):
            z: Any = 0
            for t in pyro.markov(range(length)):
                z = pyro.sample(f"z_{n}_{t}", dist.Categorical(moves[z]))
                if t != 2:
                    pyro.sample(f"y_{n}_{t}", dist.Normal(loc[z], 0.5), obs=y[t, n])

    y = torch.randn(5, 3, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    found = []
    for model in (of_lengths, apart):
        pyro.set_rng_seed(0)
        field = started(read_program(model, (y,), {}, init=init_to_sample))
        found.append(ascend_bound(field, most=4, tolerance=0.0))
    assert found[0] == pytest.approx(found[1], abs=1e-9)


@pytest.mark.parametrize("model", [sequences, of_lengths])
def test_paths_of_sequences_are_drawn_from_the_bound(model: Any) -> None:
    y = torch.randn(4, 3, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    fit = pplvi.fit(model, pplvi.AutoConjugate, args=(y,), seed=0, progress=False)
    posterior = fit.posterior(4000)
    assert posterior.draws.latents["z_2"].shape == (4000, 3)
    assert posterior.elbo.value == pytest.approx(fit.guide.bounds[-1], abs=4 * posterior.elbo.error)


@pytest.mark.parametrize("length", [1, 2, 3, 6, 7])
def test_products_of_any_length(length: int) -> None:
    factors = torch.randn(length, 3, 3, generator=torch.Generator().manual_seed(length), dtype=torch.float64)
    factors[0] = factors[0, :1]  # a vector: rows are equal
    product = factors[0, 0].exp()
    for matrix in factors[1:]:
        product = product @ matrix.exp()
    assert log_product(factors).item() == pytest.approx(product.sum().log().item(), abs=1e-12)


def test_names_of_turns() -> None:
    assert [stem_of(name) for name in ("z_0", "x12", "layer.2.w", "beta")] == ["z_*", "x*", "layer.*.w", "beta"]


def test_probabilities_of_zero_are_no_nan() -> None:
    move = torch.tensor([[1.0, 0.0], [0.5, 0.5]])

    def model(y: Tensor) -> None:
        loc = pyro.sample("loc", dist.Normal(torch.tensor([-1.0, 1.0]), 1.0).to_event(1))
        z: Any = 1
        for t in pyro.markov(range(len(y))):
            z = pyro.sample(f"z_{t}", dist.Categorical(move[z]))
            pyro.sample(f"y_{t}", dist.Normal(loc[z], 0.5), obs=y[t])

    y = torch.tensor([1.0, 1.2, -1.0, -0.8, -1.1])
    bounds = torch.tensor(pplvi.AutoConjugate(model, seed=0).run(y).bounds)
    assert bounds.isfinite().all()
    assert (bounds.diff() >= -1e-12 * bounds[1:].abs()).all()
