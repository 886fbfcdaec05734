"""Compiled steps of undirected models: the same random numbers, parameters, offsets and chains as Pyro's SVI."""

from collections.abc import Callable
from functools import partial
from typing import Any

import pyro
import pytest
import torch
from pyro.infer import SVI
from torch import Tensor

from pplvi import BoltzmannELBO, CompiledSVI, MultiPrediction, SparsityPenalty, UpDown
from pplvi.energies import (
    BernoulliUnits,
    BoltzmannMachine,
    CategoricalUnits,
    ConditionalGuide,
    DeepBeliefNetwork,
    DeepBoltzmannMachine,
    FastPersistentChains,
    GibbsGuide,
    MeanFieldGuide,
    RecognitionGuide,
    RestrictedBoltzmannMachine,
    TAPGuide,
    TemperedChains,
)

pytestmark = pytest.mark.usefixtures("float64")

BATCHES = [torch.randint(2, (4, 6), generator=torch.Generator().manual_seed(i)).double() for i in range(3)]
Case = tuple[torch.nn.Module, Any, Any]


def restricted(visible: Any = "bernoulli", **options: Any) -> Case:
    rbm = RestrictedBoltzmannMachine(6, 4, visible=visible, init_scale=0.5)
    return rbm, rbm.guide, BoltzmannELBO(5, 2, **options)


def softmax() -> Case:
    rbm = RestrictedBoltzmannMachine(3, 4, visible="categorical", num_categories=2, init_scale=0.5)
    return rbm, rbm.guide, BoltzmannELBO(5, 2)


def deep(guide: Callable[..., Any], *options: Any, loss: Any = None, num_labels: int | None = 2) -> Case:
    dbm = DeepBoltzmannMachine([6, 5, 4], num_labels=num_labels, init_scale=0.5)
    return dbm, guide(dbm, *options), BoltzmannELBO(5, 2) if loss is None else loss


def general() -> Case:
    layers = {"v": BernoulliUnits(6), "h": BernoulliUnits(3)}
    machine = BoltzmannMachine(layers, [("v", "h"), ("v", "v")], init_scale=0.5)
    return machine, ConditionalGuide(machine), BoltzmannELBO(5, 2)


def directed(loss: Any) -> Case:
    dbn = DeepBeliefNetwork([6, 5, 4], init_scale=0.5)
    return dbn, dbn.guide, loss


CASES: dict[str, Callable[[], Case]] = {
    "persistent": restricted,
    "contrastive": partial(restricted, negative="contrastive"),
    "fast": partial(restricted, negative=FastPersistentChains(5, 2)),
    "tempered": partial(restricted, negative=TemperedChains(5, 2, num_temperatures=3)),
    "mean-field chains": partial(restricted, negative="mean_field"),
    "every state": partial(restricted, negative="exact"),
    "Gaussian": partial(restricted, "gaussian"),
    "softmax": softmax,
    "lateral": general,
    "mean field": partial(deep, MeanFieldGuide, 3),
    "TAP": partial(deep, TAPGuide, 3, num_labels=None),
    "recognition": partial(deep, RecognitionGuide, 1),
    "Gibbs": partial(deep, GibbsGuide, 2),
    "multi-prediction": partial(deep, MeanFieldGuide, 3, loss=MultiPrediction()),
    "labels": partial(deep, MeanFieldGuide, 3, loss=MultiPrediction()),
    "sparsity": partial(deep, MeanFieldGuide, 3, loss=BoltzmannELBO(5, 2) + 0.1 * SparsityPenalty(0.2)),
    "up-down": lambda: directed(UpDown(2)),
    "belief network": lambda: directed(BoltzmannELBO(5, 2)),
}


def data(case: str) -> list[Any]:
    if case == "softmax":
        return [CategoricalUnits(3, 2).encode(v[:, :3].long()) for v in BATCHES]
    if case == "labels":
        return [{"v": v, "y": CategoricalUnits(1, 2).encode(v[:, :1].long())} for v in BATCHES]
    return BATCHES


def trained(case: str, kind: Callable[..., Any]) -> tuple[list[float], dict[str, Tensor]]:
    """Losses, and parameters with offsets and chains afterwards, of steps on some batches."""
    pyro.clear_param_store()
    pyro.set_rng_seed(0)
    machine, guide, loss = CASES[case]()
    batches = data(case)
    optim = pyro.optim.SGD({"lr": 0.2, "momentum": 0.5, "weight_decay": 1e-3})
    svi = kind(machine.model, guide, optim, loss)
    pyro.set_rng_seed(1)
    losses = [svi.step(batch) for batch in batches * 2]
    parts = {"machine": machine, "guide": guide}
    modules = {name: part for name, part in parts.items() if isinstance(part, torch.nn.Module)}
    return losses, {f"{n}.{key}": x for n, m in modules.items() for key, x in m.state_dict().items()}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.table(2)
def test_a_recorded_step_is_the_step_of_svi(case: str) -> None:
    losses, state = trained(case, SVI)
    recorded_losses, recorded = trained(case, partial(CompiledSVI, mode="trace"))
    assert recorded_losses == pytest.approx(losses, rel=1e-9)
    assert recorded.keys() == state.keys()
    for name, value in state.items():
        torch.testing.assert_close(recorded[name], value, msg=lambda text, name=name: f"{name}: {text}")
