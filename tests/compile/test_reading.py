"""Python values that follow from arguments alone are constants of a recording, which holds where they are the same."""

import warnings
from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer.autoguide import AutoDelta, AutoNormal
from step_cases import DATA, SGD, Case, assert_same, trajectory, with_guide
from torch import Tensor

import pplvi
from pplvi.compile.svi import CompiledSVI
from pplvi.compile.tracing import Untraceable
from pplvi.losses.elbo import ELBO

X = torch.tensor([[0.5, 1.5, -1.0, 0.3], [1.0, -0.5, 0.2, 2.0], [0.0, 0.1, -0.4, 0.9]])
LENGTHS = torch.tensor([3, 1, 2])


def branch(y: Tensor) -> None:
    z = pyro.sample("z", dist.Normal(0.0, 1.0))
    scale = 1.0 if float(y.max()) > 1 else 2.0
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Normal(z, scale), obs=y)


def boolean_index(y: Tensor) -> None:
    z = pyro.sample("z", dist.Normal(0.0, 1.0))
    seen = y[(2 * y) > 0]
    with pyro.plate("data", len(seen)):
        pyro.sample("y", dist.Normal(z, 1.0), obs=seen)


def in_groups(y: Tensor) -> None:
    """Lists, NumPy's arrays, unique values, and a loop over them."""
    z = pyro.sample("z", dist.Normal(0.0, 1.0))
    sign = (y > 0).long()
    for group in sign.unique().tolist():
        for row in sign.numpy().nonzero()[0][:2]:
            pyro.sample(f"y_{group}_{row}", dist.Normal(z * group, 1.0), obs=y[int(row)])


def series(x: Tensor, lengths: Tensor) -> None:
    """Sequences of different lengths, as Pyro's examples write them."""
    if lengths.max() > x.shape[1]:
        raise ValueError("too long")
    z = pyro.sample("z", dist.Normal(0.0, 1.0))
    with pyro.plate("series", len(x)):
        for t in range(int(lengths.max())):
            with poutine.mask(mask=t < lengths):
                pyro.sample(f"x_{t}", dist.Normal(z, 1.0), obs=x[:, t])


def hidden_markov(x: Tensor, lengths: Tensor) -> None:
    p = pyro.sample("p", dist.Dirichlet(torch.eye(2) + 1).to_event(1))
    loc = pyro.sample("loc", dist.Normal(torch.tensor([-1.0, 1.0]), 1.0).to_event(1))
    for i in range(len(x)):
        state = 0
        for t in pyro.markov(range(int(lengths[i]))):
            state = pyro.sample(f"s_{i}_{t}", dist.Categorical(p[state]), infer={"enumerate": "parallel"})
            pyro.sample(f"x_{i}_{t}", dist.Normal(loc[state], 0.5), obs=x[i, t])


def point(model: Callable[..., Any]) -> AutoDelta:
    return AutoDelta(poutine.block(model, expose=["p", "loc"]))


CASES = {
    "branch": Case(with_guide(branch), (DATA,)),
    "boolean index": Case(with_guide(boolean_index), (DATA,)),
    "groups": Case(with_guide(in_groups), (DATA,)),
    "series": Case(with_guide(series), (X, LENGTHS)),
    "hidden Markov": Case(with_guide(hidden_markov, point), (X, LENGTHS)),
}


@pytest.mark.parametrize("name", CASES)
def test_recorded_steps_are_those_of_the_handlers(name: str) -> None:
    assert_same(trajectory(CASES[name], "trace"), trajectory(CASES[name], "SVI"))


def _made(svi: CompiledSVI) -> int:
    return sum(map(len, svi._programs._made.values()))


def test_a_recording_holds_where_the_same_is_read() -> None:
    """Batches of the same longest sequence share a program; another one is recorded, and both are kept."""
    svi = CompiledSVI(series, AutoNormal(series), SGD, ELBO(), mode="trace")
    made = []
    for lengths in ([3, 1, 2], [1, 3, 1], [2, 2, 1], [3, 3, 3], [1, 2, 2]):
        svi.step(X, torch.tensor(lengths))
        made.append(_made(svi))
    assert made == [1, 1, 2, 2, 2]


def test_losses_of_changing_batches_are_those_of_the_handlers() -> None:
    batches = [(X, torch.tensor(lengths)) for lengths in ([3, 1, 2], [2, 2, 1], [3, 3, 3], [1, 2, 2], [4, 1, 1])]

    def losses(mode: Any) -> Tensor:
        pyro.clear_param_store()
        pyro.set_rng_seed(3)
        svi = CompiledSVI(series, AutoNormal(series), SGD, ELBO(), mode=mode)
        return svi.epoch(batches)

    assert torch.allclose(losses("trace"), losses(False), atol=1e-5)


def test_arguments_changed_in_place_are_looked_at_again() -> None:
    lengths = torch.tensor([1, 1, 1])
    svi = CompiledSVI(series, AutoNormal(series), SGD, ELBO(), mode="trace")
    svi.step(X, lengths)
    svi.step(X, lengths)
    lengths += 1
    svi.step(X, lengths)
    assert _made(svi) == 2


def test_values_that_change_at_every_batch_are_refused() -> None:
    svi = CompiledSVI(boolean_index, AutoNormal(boolean_index), SGD, ELBO(), mode="trace")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for size in range(8):
            svi.step(torch.where(torch.arange(9) < size + 1, 1.0, -1.0))
        with pytest.raises(Untraceable, match=r"recorded for 8 different values.*Use torch\.where"):
            svi.step(torch.ones(9))


def test_errors_of_the_program_about_its_arguments_are_its_own() -> None:
    svi = CompiledSVI(series, AutoNormal(series), SGD, ELBO(), mode="trace")
    svi.step(X, LENGTHS)
    with pytest.raises(ValueError, match="too long"):
        svi.step(X, LENGTHS + 5)


def test_fit_on_sequences_is_recorded() -> None:
    fit = pplvi.fit(series, AutoNormal, args=(X, LENGTHS), compile="trace", num_steps=20, seed=0, progress=False)
    plain = pplvi.fit(series, AutoNormal, args=(X, LENGTHS), num_steps=20, seed=0, progress=False)
    assert torch.allclose(torch.tensor(fit.losses), torch.tensor(plain.losses), atol=1e-4)
