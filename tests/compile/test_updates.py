"""Flat updates against the optimisers of torch and Pyro, step by step."""

from functools import partial

import pyro
import pytest
import torch
from pyro.optim.adagrad_rmsprop import AdagradRMSProp
from pyro.optim.clipped_adam import ClippedAdam

from pplvi.compile.flat_optimizers import FlatParameters, FlatUpdate, flat_update, nanmedian
from pplvi.training.schedules import AdaptiveClip, NormClip

STEPS = 40
OPTIMISERS = {
    "adam": partial(torch.optim.Adam, lr=0.05),
    "adam, decay": partial(torch.optim.Adam, lr=0.05, betas=(0.8, 0.95), eps=1e-4, weight_decay=0.1),
    "amsgrad": partial(torch.optim.Adam, lr=0.05, amsgrad=True, betas=(0.5, 0.7)),
    "maximise": partial(torch.optim.Adam, lr=0.05, maximize=True),
    "adamw": partial(torch.optim.AdamW, lr=0.05, weight_decay=0.3),
    "clipped adam": partial(ClippedAdam, lr=0.05, clip_norm=0.7, lrd=0.98, weight_decay=0.1),
    "centred": partial(ClippedAdam, lr=0.05, centered_variance=True),
    "sgd": partial(torch.optim.SGD, lr=0.05),
    "momentum": partial(torch.optim.SGD, lr=0.05, momentum=0.9, dampening=0.2, weight_decay=0.1),
    "nesterov": partial(torch.optim.SGD, lr=0.05, momentum=0.9, nesterov=True),
    "adagrad": partial(torch.optim.Adagrad, lr=0.1, lr_decay=0.1, initial_accumulator_value=0.5, weight_decay=0.1),
    "adagrad rmsprop": partial(AdagradRMSProp, eta=0.3, delta=1e-3, t=0.2),
}


def parameters(dtype: torch.dtype) -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(1)
    values = {"a": (3,), "b": (), "c": (2, 2)}
    return {n: torch.nn.Parameter(torch.randn(s, generator=g, dtype=dtype)) for n, s in values.items()}


def gradients(named: dict[str, torch.Tensor], step: int) -> list[torch.Tensor]:
    g = torch.Generator().manual_seed(100 + step)
    noise = (torch.randn(p.shape, generator=g, dtype=torch.float64).to(p.dtype) for p in named.values())
    return [p.detach() + 2 * e for p, e in zip(named.values(), noise, strict=True)]


def compare(named, flat, update, step_theirs, rate=lambda t: 1.0, tolerance=None) -> None:
    """Feed both the same gradients, at the parameters of torch's optimiser, and compare after every step."""
    state = update.init(flat)
    tolerance = tolerance or (1e-6 if flat.dtype == torch.float32 else 1e-12)
    for t in range(STEPS):
        grads = gradients(named, t)
        gradient = torch.cat([g.reshape(-1) for g in grads])
        for p, g in zip(named.values(), grads, strict=True):
            p.grad = g.clone()
        flat, state = update(flat, gradient, state, torch.tensor(rate(t), dtype=torch.float64))
        step_theirs(t)
        theirs = torch.cat([p.detach().reshape(-1) for p in named.values()])
        torch.testing.assert_close(flat, theirs, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@pytest.mark.parametrize("name", OPTIMISERS)
def test_steps_equal_torch(name, dtype):
    named = parameters(dtype)
    flat = torch.cat([p.detach().reshape(-1) for p in named.values()])
    optimizer = OPTIMISERS[name](list(named.values()))
    # Adagrad-like sums of squares amplify rounding in float32: one more digit for 40 steps.
    compare(named, flat, flat_update(OPTIMISERS[name], named), lambda t: optimizer.step())


PYRO = {
    "Adam": (pyro.optim.Adam, {"lr": 0.05, "betas": (0.8, 0.99)}),
    "AdamW": (pyro.optim.AdamW, {"lr": 0.05, "weight_decay": 0.2}),
    "ClippedAdam": (pyro.optim.ClippedAdam, {"lr": 0.05, "lrd": 0.99, "clip_norm": 1.0}),
    "SGD": (pyro.optim.SGD, {"lr": 0.05, "momentum": 0.5}),
    "Adagrad": (pyro.optim.Adagrad, {"lr": 0.05}),
    "AdagradRMSProp": (pyro.optim.AdagradRMSProp, {"eta": 0.1}),
}


@pytest.mark.parametrize("name", PYRO)
def test_steps_equal_pyro_with_hyperparameters_of_each_parameter(name):
    make, options = PYRO[name]
    rate = "eta" if "eta" in options else "lr"

    def of_each(parameter: str) -> dict:
        return {**options, rate: options[rate] * {"a": 1.0, "b": 0.5, "c": 2.0}[parameter]}

    named = {n: pyro.param(n, p.detach()).unconstrained() for n, p in parameters(torch.float64).items()}
    flat = torch.cat([p.detach().reshape(-1) for p in named.values()])
    optim = make(of_each)
    compare(named, flat, flat_update(make(of_each), named), lambda t: optim(list(named.values())))


def test_betas_of_each_parameter():
    def of_each(parameter: str) -> dict:
        return {"lr": 0.05, "betas": (0.5, 0.9) if parameter == "a" else (0.9, 0.99)}

    named = {n: pyro.param(n, p.detach()).unconstrained() for n, p in parameters(torch.float32).items()}
    flat = torch.cat([p.detach().reshape(-1) for p in named.values()])
    optim, update = pyro.optim.Adam(of_each), flat_update(pyro.optim.Adam(of_each), named)
    assert update(flat, flat, update.init(flat), torch.tensor(1.0))[0].dtype == torch.float32
    compare(named, flat, update, lambda t: optim(list(named.values())))


def test_groups_of_a_torch_optimiser():
    def make(ps: list[torch.Tensor]) -> torch.optim.Optimizer:
        return torch.optim.Adam([{"params": ps[:1], "lr": 0.5}, {"params": ps[1:]}], lr=0.01)

    named = parameters(torch.float64)
    flat = torch.cat([p.detach().reshape(-1) for p in named.values()])
    optimizer = make(list(named.values()))
    compare(named, flat, flat_update(make, named), lambda t: optimizer.step())


@pytest.mark.parametrize(("clip", "theirs"), [(0.875, NormClip(0.875)), ("adaptive", AdaptiveClip(factor=10.0))])
def test_clip_and_rate_equal_those_of_the_eager_loop(clip, theirs):
    named = parameters(torch.float64)
    flat = torch.cat([p.detach().reshape(-1) for p in named.values()])
    optimizer = torch.optim.SGD(list(named.values()), lr=0.05)

    def rate(t: int) -> float:
        return 1.0 - t / STEPS

    def step(t: int) -> None:
        theirs([p.grad for p in named.values()])
        optimizer.param_groups[0]["lr"] = 0.05 * rate(t)
        optimizer.step()

    compare(named, flat, flat_update(partial(torch.optim.SGD, lr=0.05), named, clip), step, rate)


def test_adaptive_clip_cuts_an_outlier_after_more_than_a_window():
    flat = torch.zeros(2, dtype=torch.float64)
    update = FlatUpdate(*_sgd(), clip="adaptive")
    state = update.init(flat)
    for _ in range(130):
        flat, state = update(flat, torch.tensor([0.6, 0.8], dtype=torch.float64), state, torch.tensor(1.0))
    moved, _ = update(flat, torch.tensor([600.0, 800.0], dtype=torch.float64), state, torch.tensor(1.0))
    torch.testing.assert_close((moved - flat).norm(), torch.tensor(10.0, dtype=torch.float64))


def _sgd():
    update = flat_update(partial(torch.optim.SGD, lr=1.0), {"x": torch.nn.Parameter(torch.zeros(2))})
    return update.rule, update.slots, update.hyper


@pytest.mark.parametrize("size", [1, 2, 7, 100])
def test_nanmedian_equals_torch(size):
    x = torch.randn(size).round(decimals=1)
    x[::3] = torch.nan
    torch.testing.assert_close(nanmedian(x), x.nanmedian(), equal_nan=True)


def test_flat_parameters_share_memory_and_take_over_new_values():
    named = parameters(torch.float32)
    together = FlatParameters({**named, "tied": named["a"]})
    assert len(together.flat) == 8
    together.flat.zero_()
    assert all(float(p.detach().abs().sum()) == 0 for p in named.values())
    named["b"].data = torch.tensor(3.0)
    together.refresh()
    assert together.flat[3] == 3.0
    together.flat.mul_(2)
    assert named["b"] == 6.0


def test_unsupported_optimisers_are_refused():
    named = parameters(torch.float32)
    with pytest.raises(ValueError, match=r"RMSprop has no compiled update.*Adam, AdamW"):
        flat_update(partial(torch.optim.RMSprop, lr=0.1), named)
    scheduler = pyro.optim.ExponentialLR({"optimizer": torch.optim.Adam, "optim_args": {"lr": 0.1}, "gamma": 0.9})
    with pytest.raises(ValueError, match="PyroLRScheduler"):
        flat_update(scheduler, named)
    with pytest.raises(ValueError, match="clip_args"):
        flat_update(pyro.optim.Adam({"lr": 0.1}, {"clip_norm": 1.0}), named)
    with pytest.raises(ValueError, match=r"expected a pyro\.optim optimiser"):
        flat_update(torch.optim.Adam(list(named.values())), named)
    with pytest.raises(ValueError, match=r"clip=-1\.0"):
        flat_update(partial(torch.optim.Adam, lr=0.1), named, clip=-1.0)


def test_nothing_to_train_and_mixed_dtypes_are_refused():
    with pytest.raises(ValueError, match="no parameter requires a gradient"):
        FlatParameters({})
    mixed = {"a": torch.nn.Parameter(torch.zeros(1)), "b": torch.nn.Parameter(torch.zeros(1, dtype=torch.float64))}
    with pytest.raises(ValueError, match="different dtypes"):
        FlatParameters(mixed)
