"""Optimisers, schedules and clips."""

import math
import warnings
from functools import partial

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI, Trace_ELBO
from pyro.infer.autoguide import AutoNormal

from pplvi.programs.state import fingerprint
from pplvi.training.optimizers import Update
from pplvi.training.schedules import AdaptiveClip, Cosine, NormClip

DATA = torch.tensor([1.0, 2.0, -1.0])


def model(y):
    loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
    scale = pyro.sample("scale", dist.LogNormal(0.0, 1.0))
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Normal(loc, scale), obs=y)


def steps(optim, num_steps=30, callback=lambda step, optim: None):
    pyro.set_rng_seed(0)
    pyro.clear_param_store()
    svi = SVI(model, AutoNormal(model), optim, Trace_ELBO())
    losses = []
    for step in range(num_steps):
        callback(step, optim)
        losses.append(svi.step(DATA))
    return losses


def plain(optim, **options):
    return Update(optim, 100, **{"schedule": None, "clip": None, **options})


@pytest.mark.parametrize(
    "make",
    [
        lambda: pyro.optim.Adam({"lr": 0.05}),
        lambda: pyro.optim.ClippedAdam({"lr": 0.05, "lrd": 0.99}),
        lambda: pyro.optim.SGD({"lr": 0.01, "momentum": 0.9}, {"clip_norm": 1.0}),
        lambda: pyro.optim.Adam(lambda name: {"lr": 0.1 if "loc" in name else 0.01}),
    ],
)
def test_pyro_optimisers_take_the_same_steps_as_by_themselves(make):
    assert steps(plain(make())) == steps(make())


def test_torch_optimiser_steps_all_parameters_as_pyros_one_by_one():
    assert steps(plain(partial(torch.optim.Adam, lr=0.05))) == steps(pyro.optim.Adam({"lr": 0.05}))
    assert steps(plain(torch.optim.Adagrad)) == steps(pyro.optim.Adagrad({}))


def test_learning_rate_schedulers_of_pyro_advance_once_a_step():
    def make():
        return pyro.optim.ExponentialLR({"optimizer": torch.optim.SGD, "optim_args": {"lr": 0.01}, "gamma": 0.9})

    def advance(step, optim):
        if step:
            optim.step()

    assert steps(plain(make())) == steps(make(), callback=advance)
    with pytest.raises(ValueError, match="schedule=None"):
        Update(make(), schedule="cosine")


def test_the_users_optimiser_is_left_alone():
    optim = pyro.optim.Adam({"lr": 0.05})
    steps(plain(optim))
    assert not optim.optim_objs


@pytest.mark.parametrize("optim", [pyro.optim.SGD({"lr": 1.0}), partial(torch.optim.SGD, lr=1.0)])
def test_schedule_and_halving_scale_the_step(optim):
    update = Update(optim, 4, schedule="cosine", clip=None)
    p = pyro.param("p", torch.tensor(0.0, dtype=torch.float64)).unconstrained()
    moved = []
    for step in range(4):
        if step == 3:
            update.backoff *= 0.5
        before, p.grad = p.item(), torch.ones_like(p)
        update([p])
        moved.append(before - p.item())
    expected = [0.5 * (1 + math.cos(math.pi * t / 4)) for t in range(4)]
    expected[3] /= 2
    assert moved == pytest.approx(expected, abs=1e-12)


def test_an_optimisers_own_decay_survives_the_schedule():
    update = Update(pyro.optim.ClippedAdam({"lr": 1.0, "lrd": 0.5}), 10, schedule=lambda step: 0.1, clip=None)
    p = pyro.param("p", torch.tensor(0.0)).unconstrained()
    for _ in range(3):
        p.grad = torch.ones_like(p)
        update([p])
    assert next(iter(update.engine.groups()))["lr"] == pytest.approx(0.125)


OPTIMISERS = {
    "default": lambda: None,
    "pyro": lambda: pyro.optim.Adam({"lr": 0.05}),
    "pyro scheduler": lambda: pyro.optim.StepLR(
        {"optimizer": torch.optim.Adam, "optim_args": {"lr": 0.05}, "step_size": 5}
    ),
    "torch": lambda: partial(torch.optim.SGD, lr=0.01, momentum=0.9),
}


@pytest.mark.parametrize("kind", OPTIMISERS)
def test_state_goes_back_and_forth_to_the_bit(kind):
    schedule = None if "scheduler" in kind else "cosine"
    update = Update(OPTIMISERS[kind](), 40, schedule=schedule, clip="adaptive")
    pyro.set_rng_seed(0)
    svi = SVI(model, AutoNormal(model), update, Trace_ELBO())
    for _ in range(10):
        svi.step(DATA)
    state = update.get_state()
    before = fingerprint(state)
    params = {k: v.detach().clone() for k, v in pyro.get_param_store().named_parameters()}
    rng = pyro.util.get_rng_state()
    first = [svi.step(DATA) for _ in range(10)]
    for attempt in (update, Update(OPTIMISERS[kind](), 40, schedule=schedule, clip="adaptive")):
        with torch.no_grad():
            for name, p in pyro.get_param_store().named_parameters():
                p.copy_(params[name])
        pyro.util.set_rng_state(rng)
        attempt.set_state(state)
        svi.optim = attempt
        assert [svi.step(DATA) for _ in range(10)] == first
    assert fingerprint(state) == before


def test_parameters_may_appear_later():
    update = plain(partial(torch.optim.SGD, lr=1.0))
    a = pyro.param("a", torch.tensor(0.0)).unconstrained()
    a.grad = torch.ones_like(a)
    update([a])
    b = pyro.param("b", torch.tensor(0.0)).unconstrained()
    b.grad = torch.ones_like(b)
    update([b])
    assert (a.item(), b.item()) == (-1.0, -1.0)
    again = plain(partial(torch.optim.SGD, lr=1.0))
    again.set_state(update.get_state())
    b.grad = torch.ones_like(b)
    again([b])
    assert (a.item(), b.item()) == (-1.0, -2.0)


def test_clip_is_of_all_parameters_together():
    g = [torch.full((2,), 3.0), torch.full((2,), 4.0)]
    NormClip(1.0)(g)
    assert torch.cat(g).norm().item() == pytest.approx(1.0)
    assert (g[0] / g[1]).tolist() == pytest.approx([0.75, 0.75])
    small = [torch.tensor([0.3])]
    NormClip(1.0)(small)
    assert small[0].item() == torch.tensor(0.3).item()


def test_adaptive_clip_cuts_outliers_only():
    clip = AdaptiveClip(factor=10.0)
    first = torch.tensor([1e6])
    clip([first])
    assert first.item() == 1e6
    for _ in range(200):
        g = torch.tensor([2.0])
        clip([g])
        assert g.item() == 2.0
    g = torch.tensor([1e9])
    clip([g])
    assert g.item() == pytest.approx(20.0)


def test_adaptive_clip_survives_gradients_of_zero():
    clip = AdaptiveClip()
    for _ in range(10):
        clip([torch.zeros(3)])
    g = torch.ones(3)
    clip([g])
    assert g.tolist() == [1.0, 1.0, 1.0]


def test_cosine_ends_at_zero_and_can_end_sooner():
    cosine = Cosine(100)
    assert [cosine(0), cosine(50), cosine(100)] == pytest.approx([1.0, 0.5, 0.0])
    cosine.cool_down(50, 20)
    assert [cosine(50), cosine(60), cosine(70), cosine(80)] == pytest.approx([0.5, 0.25, 0.0, 0.0])
    again = Cosine(100)
    again.load_state_dict(cosine.state_dict())
    assert again(63) == cosine(63)
    late = Cosine(100)
    late.cool_down(95, 50)
    assert late.end == 100


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"optim": torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.1)}, "torch optimiser class"),
        ({"optim": 0.1}, "expected a pyro.optim optimiser"),
        ({"schedule": "linear"}, "expected 'cosine'"),
        ({"clip": -1.0}, "positive norm"),
        ({"clip": "tight"}, "'adaptive'"),
    ],
)
def test_wrong_arguments_are_refused(options, words):
    with pytest.raises(ValueError, match=words):
        Update(**options)


@pytest.mark.parametrize(("factory", "words"), [(torch.optim.LBFGS, "LBFGS"), (lambda params: None, "NoneType")])
def test_wrong_factories_are_refused_at_the_first_step(factory, words):
    p = pyro.param("p", torch.tensor(0.0)).unconstrained()
    p.grad = torch.ones_like(p)
    with pytest.raises(ValueError, match=words):
        plain(factory)([p])


def test_nothing_to_train_is_said():
    with pytest.raises(ValueError, match="nothing to train"):
        plain(None)([])


def test_scheduler_does_not_warn_after_a_restore():
    update = plain(OPTIMISERS["pyro scheduler"]())
    steps(update, 3)
    update.set_state(update.get_state())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        p = next(p for _, p in pyro.get_param_store().named_parameters())
        p.grad = torch.ones_like(p)
        update([p])
