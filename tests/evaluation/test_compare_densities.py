"""One table for all families: kinds of numbers, what ranks, pairs of data, hashes, and what draws are like."""

import math
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor, nn

from pplvi import (
    NADE,
    DeepBeliefNetwork,
    FullyVisibleBeliefNetwork,
    Generator,
    ProbabilisticPCA,
    RestrictedBoltzmannMachine,
    SigmoidBeliefNetwork,
    compare_densities,
)
from pplvi.energies import EnergyModel
from pplvi.energies.evaluation import densities
from pplvi.evaluation import data_hash, log_density, mode_coverage

WIDTH = 5


@pytest.fixture
def data() -> Tensor:
    return torch.bernoulli(torch.full((40, WIDTH), 0.3))


def test_kinds_and_ranks(data: Tensor) -> None:
    """Exact values and bounds rank by their means; what has no density comes last, unranked."""
    coins, network = FullyVisibleBeliefNetwork(WIDTH), SigmoidBeliefNetwork([WIDTH, 3])
    coins.start_at(data)
    rbm = RestrictedBoltzmannMachine(WIDTH, 2)
    models = {
        "network": (network, network.guide),
        "noise": Generator(nn.Linear(1, WIDTH), 1),
        "coins": coins,
        "machine": rbm,
        "fair": dist.Bernoulli(torch.full((WIDTH,), 0.5)).to_event(1),
    }
    state = torch.get_rng_state()
    table = compare_densities(models, data, num_draws=300, num_samples=50, seed=0)
    assert torch.equal(state, torch.get_rng_state())
    assert table["kind"].to_dict() == {
        "coins": "exact",
        "network": "lower bound",
        "noise": "none",
        "machine": "exact",
        "fair": "exact",
    }
    assert table.index[0] == "coins"
    assert table.index[-1] == "noise"
    assert table["rank"].tolist()[:4] == [0, 1, 2, 3]
    assert table["rank"].isna()["noise"]
    each = coins.distribution().log_prob(data) - network.distribution().log_prob(data)
    assert table["diff"]["network"] == pytest.approx(-each.mean().item(), abs=0.05)
    assert table["log_prob"]["fair"] == pytest.approx(-WIDTH * math.log(2), abs=1e-5)
    fair = coins.distribution().log_prob(data) + WIDTH * math.log(2)
    assert table["diff_error"]["fair"] == pytest.approx((fair.std() / 40**0.5).item(), abs=1e-5)
    assert table.attrs["data"] == data_hash(data)


def test_a_bound_of_a_pair_of_programs_is_below_the_exact_value() -> None:
    """Functions of the data, with a guide that is not the posterior; more draws tighten it, in parts of any size."""
    pca, x = ProbabilisticPCA(3, 1), torch.randn(12, 3)

    def guide(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z1", dist.Normal(torch.zeros(1), 1.5).to_event(1))

    exact = log_density(pca, x)
    few, many = (log_density((pca.model, guide), x, num_draws=k, seed=0) for k in (2, 4000))
    assert few.mean < many.mean < exact.mean + 0.05
    torch.testing.assert_close(many.log_prob, exact.log_prob, rtol=0.0, atol=0.3)


@pytest.mark.parametrize(("chains", "betas", "ranked"), [(100, 300, True), (100, 3, False)])
def test_machines_are_ranked_by_annealing_that_can_be_trusted(
    chains: int, betas: int, ranked: bool, data: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Annealing in a few steps leaves few effective chains, and no rank however high the number is."""
    rbm, exact = RestrictedBoltzmannMachine(WIDTH, 4, init_scale=4.0), FullyVisibleBeliefNetwork(WIDTH)
    log_z = rbm.log_partition()

    def unknown() -> None:
        raise ValueError("too many states")

    monkeypatch.setattr(rbm, "log_partition", unknown)
    monkeypatch.setattr(densities, "NUM_CHAINS", chains)
    monkeypatch.setattr(densities, "NUM_BETAS", betas)
    models = {"machine": rbm, "pair": (rbm, rbm.guide), "coins": exact}
    table = compare_densities(models, data, num_samples=0, seed=0)
    for name in ("machine", "pair"):
        row = table.loc[name]
        assert row["kind"] == "AIS estimate"
        assert row["low"] <= row["log_prob"] <= row["high"]
        assert (row["rank"] is not None and row["rank"] == row["rank"]) if ranked else table["rank"].isna()[name]
        assert (row["ess"] >= densities.LEAST_SHARE * chains) == ranked
    if ranked:
        expected = (rbm.log_marginal({"v": data}) - log_z).mean().item()
        assert table["log_prob"]["machine"] == pytest.approx(expected, abs=0.2)
        assert table["log_prob"]["pair"] == pytest.approx(expected, abs=0.2)
    else:
        assert table.index[0] == "coins"


def test_a_deep_belief_network_is_bounded_with_its_top_machines_normaliser(data: Tensor) -> None:
    network = DeepBeliefNetwork([WIDTH, 4, 3], init_scale=0.5)
    table = compare_densities({"network": (network, network.guide)}, data, num_draws=200, num_samples=20, seed=0)
    elbo = network.bound(data, log_z=network.top.log_partition(), num_particles=200).mean().item()
    assert table["kind"]["network"] == "lower bound"
    assert elbo - 0.05 < table["log_prob"]["network"] < elbo + 0.5
    with pytest.raises(ValueError, match=r"expected \(machine, guide\)"):
        log_density(network, data)


def test_another_binarisation_is_refused(data: Tensor) -> None:
    """Densities that were estimated before stand for their model on the same data, and on no other."""
    nade = NADE(WIDTH, 3)
    found = log_density(nade, data)
    table = compare_densities({"before": found, "now": nade}, data.byte().numpy())
    assert table["diff"].tolist() == [0.0, 0.0]
    other = torch.bernoulli(torch.full((40, WIDTH), 0.3))
    with pytest.raises(ValueError, match=f"'before'.*{data_hash(data)}.*{data_hash(other)}.*one binarisation"):
        compare_densities({"before": found, "now": nade}, other)
    with pytest.raises(ValueError, match="one binarisation"):
        compare_densities({"now": nade}, data, train=torch.rand(40, WIDTH))


def test_copies_and_gaps_are_seen() -> None:
    """A sampler of the training data is near to them; a model that knows them by heart has a gap."""
    train, test = torch.randn(200, 3), torch.randn(200, 3)

    class Copier:
        def distribution(self) -> Any:
            parts = dist.Normal(train, 0.05).to_event(1)
            return dist.MixtureSameFamily(dist.Categorical(logits=torch.zeros(200)), parts)

        def sample(self, count: int) -> Tensor:
            return train[torch.randint(200, (count,))]

    normal = dist.Normal(torch.zeros(3), 1.0).to_event(1)
    table = compare_densities({"copier": Copier(), "normal": normal}, test, train=train, seed=0)
    assert table.index[0] == "normal"
    assert table["train_gap"]["copier"] > 10
    assert abs(table["train_gap"]["normal"]) < 1
    assert table["nearest"]["copier"] < 1e-3
    assert table["copies"]["copier"] == 1
    assert table["nearest"]["normal"] == pytest.approx(1.0, abs=0.15)
    assert table["copies"]["normal"] == pytest.approx(0.05, abs=0.05)


def test_precision_and_coverage_come_from_the_package(data: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the package its numbers are in the table, of test data and draws; without it they are missing."""
    seen: list[Any] = []

    def compute_prdc(real: Any, fake: Any, nearest_k: int) -> dict[str, float]:
        seen.append((real.shape, fake.shape, nearest_k))
        return {"precision": 0.9, "recall": 0.0, "density": 0.0, "coverage": 0.8}

    package = ModuleType("prdc")
    package.compute_prdc = compute_prdc
    monkeypatch.setattr("pplvi.evaluation.draws.find_spec", lambda name: None)
    assert compare_densities({"a": NADE(WIDTH, 2)}, data)[["precision", "coverage"]].isna().all(axis=None)
    monkeypatch.setattr("pplvi.evaluation.draws.find_spec", lambda name: package)
    monkeypatch.setitem(sys.modules, "prdc", package)
    table = compare_densities({"a": NADE(WIDTH, 2)}, data, num_samples=30)
    assert table[["precision", "coverage"]].loc["a"].tolist() == [0.9, 0.8]
    assert seen == [((40, WIDTH), (30, WIDTH), 5)]


def test_modes_are_counted() -> None:
    centres = torch.tensor([[0.0, 0.0], [4.0, 0.0], [0.0, 4.0]])
    draws = torch.cat([torch.zeros(50, 2), centres[1].repeat(49, 1), torch.full((1, 2), 9.0)])
    found = mode_coverage(draws, centres, radius=1.0)
    assert (found.covered, found.share, found.counts.tolist()) == (2, pytest.approx(0.99), [50, 49, 0])


def joint(x: Tensor) -> None:
    z = pyro.sample("z", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal(z, torch.ones(WIDTH)).to_event(1), obs=x)


def whole(x: Tensor) -> None:
    pyro.sample("z", dist.Normal(0.0, 1.0))


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda x: compare_densities({}, x), "models by name"),
        (lambda x: compare_densities({"a": NADE(WIDTH, 2)}, x[0]), "at least two data"),
        (lambda x: compare_densities({"a": NADE(WIDTH, 2)}, x, train=x[:, :2]), "train of shape"),
        (lambda x: compare_densities({"a": joint}, x), "'a': function has neither"),
        (lambda x: compare_densities({"a": (joint, whole)}, x), "plate of the data"),
        (lambda x: compare_densities({"a": NADE(3, 2)}, x), "'a'"),
        (
            lambda x: compare_densities({"a": EnergyModel({}, centered=False, name="")}, x),
            "constant that nothing estimates",
        ),
        (lambda x: log_density(NADE(WIDTH, 2), x, num_draws=0), "num_draws=0"),
        (lambda x: mode_coverage(x, x, 0.0), "radius=0.0"),
    ],
)
def test_bad_input_is_refused(call: Callable[[Tensor], Any], words: str, data: Tensor) -> None:
    with pytest.raises(ValueError, match=words):
        call(data)
