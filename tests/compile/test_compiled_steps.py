"""Steps through inductor equal eager ones, are distributed as they are, resume, and share programs."""

import gc
import math
from collections import OrderedDict
from functools import cache, partial
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer.autoguide import AutoNormal
from scipy.stats import ks_2samp
from step_cases import (
    CASES,
    DATA,
    MODES,
    SGD,
    SHAPES,
    Case,
    assert_same,
    masked,
    schools,
    stepper,
    trajectory,
    with_guide,
)
from torch import Tensor

import pplvi.compile.backends
import pplvi.compile.svi
from benchmarks.speed_problems import SCHOOLS, eight_schools
from pplvi.compile.svi import CompiledSVI
from pplvi.losses.elbo import ELBO
from pplvi.training.schedules import Cosine

SINGLE = ("nested plates", "enumeration", "constrained supports")  # in float32 too


@pytest.mark.table(9)
@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        *((name, torch.float64) for name in sorted(SHAPES)),
        *((name, torch.float32) for name in SINGLE),
        ("nested, own programs", torch.float64),
        ("mean field", torch.float64),
    ],
    ids=lambda x: str(x).removeprefix("torch."),
)
def test_compiled_steps_equal_eager_ones(name, dtype, inductor_noise):
    """The ten shapes of models, level by level, and with analytic divergences, through inductor."""
    torch.set_default_dtype(dtype)
    try:
        assert_same(trajectory(CASES[name], True), trajectory(CASES[name], "SVI"))
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.slow
def test_looped_steps_equal_eager_ones(inductor_noise):
    """A loop of compiled steps on one call and on minibatches, with a schedule and a clip."""
    case = Case(with_guide(masked), (DATA, DATA > 0))
    batches = [(DATA + i, DATA > 0) for i in range(5)]

    def train(mode: Any) -> tuple[Tensor, Tensor]:
        svi, args = stepper(case, mode, schedule=Cosine(12), clip="adaptive", chunk=3)
        losses = torch.cat([svi.run(5, *args), svi.epoch(batches)])
        return losses, svi.parameters.flat.clone()

    torch.testing.assert_close(train("max"), train(False), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.table(2)
def test_noise_is_fresh_and_follows_the_seed(mode):
    """The losses of all steps differ; one seed gives one run; another seed another."""
    losses = schools(mode).run(250, *SCHOOLS)
    assert losses.unique().numel() == 250
    torch.testing.assert_close(schools(mode).run(250, *SCHOOLS), losses, rtol=0, atol=0)
    assert not torch.isclose(schools(mode, seed=4).run(250, *SCHOOLS), losses).any()


def at_fixed_parameters(mode: Any, first: int, count: int, scale: float = 1.0) -> Tensor:
    """Losses and gradients of single steps, a seed each, all from the same parameters: ``(count, 1 + parameters)``."""
    svi = schools(mode)
    with torch.no_grad():
        svi.parameters.flat += 0.05 * torch.linspace(-1.0, 1.0, svi.parameters.flat.numel())
        svi.parameters.flat[-1] += math.log(scale)
    start, found = svi.parameters.flat.clone(), []
    for seed in range(first, first + count):
        svi.parameters.flat.copy_(start)
        pyro.set_rng_seed(seed)
        loss = svi.step(*SCHOOLS)
        found.append(torch.cat([torch.tensor([loss]), (start - svi.parameters.flat) / 1e-3]))
    return torch.stack(found)


def least_p_value(ours: Tensor, theirs: Tensor) -> float:
    """Of the two-sample tests of Kolmogorov and Smirnov, one for the loss and one for each entry of the gradient,
    corrected for their number."""
    pairs = zip(ours.T.tolist(), theirs.T.tolist(), strict=True)
    return len(ours.T) * min(float(ks_2samp(a, b).pvalue) for a, b in pairs)


@cache
def eager_at_fixed_parameters() -> Tensor:
    return at_fixed_parameters(False, 1000, 600)


@pytest.mark.parametrize("mode", ["trace", pytest.param(True, marks=pytest.mark.slow)])
def test_losses_and_gradients_are_distributed_as_eager_ones(mode):
    """Over 600 seeds each; guides that are 40% too wide at one site would be noticed."""
    eager = eager_at_fixed_parameters()
    assert least_p_value(at_fixed_parameters(mode, 5000, 600), eager) > 0.01
    assert least_p_value(at_fixed_parameters(mode, 5000, 600, scale=1.4), eager) < 1e-6


@pytest.mark.slow
def test_losses_of_a_loop_are_distributed_as_eager_ones():
    """A small step size: all steps of a call are taken at the same parameters, nearly."""

    def losses(mode: Any, seed: int) -> list[float]:
        return schools(mode, lr=1e-9, seed=seed).run(1000, *SCHOOLS).tolist()

    assert ks_2samp(losses("max", 7), losses("trace", 8)).pvalue > 0.01


@pytest.mark.parametrize("mode", MODES)
def test_an_interrupted_run_goes_on_as_if_it_had_not_been(mode):
    def start() -> CompiledSVI:
        pyro.clear_param_store()
        pyro.set_rng_seed(2)
        optim = partial(torch.optim.SGD, lr=1e-3)
        options = {"mode": mode, "schedule": Cosine(60)}
        return CompiledSVI(eight_schools, AutoNormal(eight_schools), optim, ELBO(), **options)

    whole = start()
    losses = whole.run(60, *SCHOOLS)
    first = start()
    early = first.run(20, *SCHOOLS)
    state = first.state_dict()
    pyro.set_rng_seed(99)
    second = start()
    second.load_state_dict(state)
    late = second.run(40, *SCHOOLS)
    torch.testing.assert_close(torch.cat([early, late]), losses, rtol=0, atol=0)
    torch.testing.assert_close(second.parameters.flat, whole.parameters.flat, rtol=0, atol=0)


def test_a_state_of_another_model_is_refused():
    state = schools("trace").state_dict()
    svi, args = stepper(CASES["nested plates"], "trace")
    svi.load_state_dict(state)
    with pytest.raises(ValueError, match="the state has the parameters"):
        svi.step(*args)
    with pytest.raises(ValueError, match="before the first step"):
        stepper(CASES["nested plates"], "trace")[0].state_dict()


@pytest.mark.slow
def test_restarts_share_one_compiled_program():
    """The second restart records its own graph and finds the program that was compiled for the first."""
    schools(True).step(*SCHOOLS)
    known = len(pplvi.compile.backends._PROGRAMS)
    first = schools(True, seed=3).run(3, *SCHOOLS)
    second = schools(True, seed=4).run(3, *SCHOOLS)
    assert len(pplvi.compile.backends._PROGRAMS) == known
    assert not torch.isclose(first, second).any()


SPREAD = dist.Normal(torch.zeros(3), 2.0)  # its scale is one number, expanded


def expanded_model() -> None:
    pyro.factor("target", SPREAD.log_prob(pyro.sample("z", dist.Normal(0.0, 1.0)).unsqueeze(-1)).sum(-1))


def test_constants_that_are_expanded_keep_their_layout():
    guide = AutoNormal(expanded_model)
    svi = CompiledSVI(expanded_model, guide, SGD, ELBO(num_particles=2000), mode=True)
    assert svi.step() == pytest.approx(svi.evaluate_loss(), abs=0.3)


@pytest.mark.parametrize("mode", [True, "max"])
def test_other_processes_find_the_program_on_the_disk(mode, monkeypatch):
    """What a process does that has compiled nothing yet: it records the graph, and needs no compilation."""
    before = schools(mode).run(3, *SCHOOLS)
    monkeypatch.setattr(pplvi.compile.backends, "_PROGRAMS", OrderedDict())
    monkeypatch.setattr(torch._inductor, "compile", None)
    assert torch.equal(schools(mode).run(3, *SCHOOLS), before)
    assert len(pplvi.compile.backends._PROGRAMS) == 1


def test_programs_are_told_apart_by_graph_and_settings(monkeypatch):
    names = [pplvi.compile.backends._key("step", "x + 1"), pplvi.compile.backends._key("step", "x + 2")]
    with torch._inductor.config.patch(fallback_random=True):
        names.append(pplvi.compile.backends._key("step", "x + 1"))
    monkeypatch.setattr(torch, "get_default_dtype", lambda: torch.float64)
    names.append(pplvi.compile.backends._key("step", "x + 1"))
    assert len(set(names)) == 4


def test_tracing_and_compiling_leave_the_garbage_collector_as_it_was():
    with pplvi.compile.backends.uncollected():
        assert not gc.isenabled()
    assert gc.isenabled()
