"""``fit``: equal to Pyro's own loop, restarts apart, resumed to the bit, and clear about what it cannot do."""

import copy
import os
import signal
import subprocess
import sys
import textwrap
import warnings
from functools import partial

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from arviz_results import elpd
from pyro.infer import NUTS, SVI, Trace_ELBO
from pyro.infer.autoguide import (
    AutoDelta,
    AutoDiagonalNormal,
    AutoLowRankMultivariateNormal,
    AutoMultivariateNormal,
    AutoNormal,
    AutoNormalMessenger,
)
from pyro.nn import PyroModule, PyroParam, PyroSample
from torch.utils.data import DataLoader, TensorDataset

import pplvi
from pplvi.fitting import Checkpoint, Compile, starts
from pplvi.guides.search.pathfinder import AutoPathfinder
from pplvi.programs.deadline import ending
from pplvi.programs.state import Environment, rng_state
from pplvi.training import checkpoint
from pplvi.training.watch import Monitor

Y = torch.tensor([1.0, 2.0, -1.0, 0.5, 3.0, -2.0, 1.5, 0.0])
X = torch.linspace(-1.0, 1.0, 8)
fit = partial(pplvi.fit, progress=False)
exact = partial(fit, schedule=None, clip=None)


def model(y):
    loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
    scale = pyro.sample("scale", dist.LogNormal(0.0, 1.0))
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Normal(loc, scale), obs=y)


def other_model(y):
    loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
    scale = pyro.sample("scale", dist.Gamma(1.0, 1.0))
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.StudentT(3.0, loc, scale), obs=y)


def guide_function(y):
    loc = pyro.param("q_loc", lambda: torch.randn(()))
    pyro.sample("loc", dist.Normal(loc, 0.5))
    pyro.sample("scale", dist.LogNormal(pyro.param("q_scale", lambda: torch.zeros(())), 0.3))


class Net(PyroModule):
    """A model with a network, a constrained parameter and a buffer that training changes."""

    def __init__(self):
        super().__init__()
        self.linear = torch.nn.Linear(1, 3)
        self.norm = torch.nn.BatchNorm1d(3)
        self.sigma = PyroParam(torch.tensor(1.0), constraint=dist.constraints.positive)

    def forward(self, x, y=None):
        loc = self.norm(self.linear(x[:, None])).sum(-1)
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(loc + z, self.sigma), obs=y)


class Amortised(torch.nn.Module):
    """Model and guide as methods of one module, in the style of Pyro's own examples."""

    def __init__(self):
        super().__init__()
        self.encoder, self.decoder = torch.nn.Linear(1, 2), torch.nn.Linear(1, 1)

    def model(self, y):
        pyro.module("decoder", self.decoder)
        with pyro.plate("data", len(y)):
            z = pyro.sample("z", dist.Normal(torch.zeros(len(y)), 1.0))
            pyro.sample("y", dist.Normal(self.decoder(z[..., None])[..., 0], 1.0), obs=y)

    def guide(self, y):
        pyro.module("encoder", self.encoder)
        loc, log_scale = self.encoder(y[:, None]).unbind(-1)
        with pyro.plate("data", len(y)):
            pyro.sample("z", dist.Normal(loc, log_scale.exp()))


def state():
    return {name: p.detach().clone() for name, p in pyro.get_param_store().named_parameters()}


def assert_same(first, second):
    assert sorted(first) == sorted(second)
    assert all(torch.equal(first[name], second[name]) for name in first)


# --- equal to Pyro's loop ---


@pytest.mark.parametrize(
    "guide",
    [AutoNormal, AutoDiagonalNormal, AutoMultivariateNormal, AutoDelta, pplvi.AutoFlow, AutoNormalMessenger],
)
@pytest.mark.parametrize("objective", [Trace_ELBO, partial(pplvi.ImportanceWeightedELBO, 4)])
def test_equal_to_a_loop_by_hand_to_the_bit(guide, objective):
    if guide is AutoDelta and objective is not Trace_ELBO:
        objective = pplvi.ELBO
    pyro.set_rng_seed(3)
    pyro.clear_param_store()
    svi = SVI(model, guide(model), pyro.optim.Adam({"lr": 0.02}), objective())
    losses = [svi.step(Y) for _ in range(12)]
    params, store = state(), pyro.get_param_store()
    store.clear()
    optim = pyro.optim.Adam({"lr": 0.02})
    result = exact(model, guide, args=(Y,), objective=objective(), optim=optim, num_steps=12, seed=3)
    assert result.losses[0].tolist() == losses
    assert_same(state(), params)


def test_the_bare_loop_never_stops_early():
    result = exact(model, lambda m: AutoDelta(m), args=(Y,), num_steps=2000, seed=0, stop="auto")
    assert result.losses.shape == (1, 2000)
    assert result.converged


@pytest.mark.parametrize("restart", [0, 1])
def test_every_restart_equals_a_loop_by_hand(restart):
    result = exact(
        model, AutoNormal, args=(Y,), objective=Trace_ELBO(num_particles=2, vectorize_particles=True),
        optim=pyro.optim.Adam({"lr": 0.02}), num_steps=10, seed=3, restarts=2,
    )  # fmt: skip
    pyro.set_rng_seed(3 + restart)
    pyro.clear_param_store()
    loss = Trace_ELBO(num_particles=2, vectorize_particles=True)
    svi = SVI(model, AutoNormal(model), pyro.optim.Adam({"lr": 0.02}), loss)
    assert result.losses[restart].tolist() == [svi.step(Y) for _ in range(10)]


def test_a_seed_is_reproducible_and_leaves_the_random_state_alone():
    torch.rand(3), np.random.normal()
    before = rng_state()
    results = [fit(model, AutoNormal, args=(Y,), num_steps=20, restarts=2, seed=5) for _ in range(2)]
    after = rng_state()
    assert torch.equal(before["torch"], after["torch"])
    assert before["random"] == after["random"]
    assert before["numpy"][1].tolist() == after["numpy"][1].tolist()
    assert (results[0].losses == results[1].losses).all()
    assert (results[0].losses[0] != results[0].losses[1]).all()
    for first, second in zip(results[0].params, results[1].params, strict=True):
        assert_same(first, second)


def test_the_first_fit_of_a_pair_of_functions_equals_the_second():
    def fresh_guide(y):
        guide_function(y)

    results = [exact(model, fresh_guide, args=(Y,), num_steps=5, seed=5).losses for _ in range(2)]
    assert (results[0] == results[1]).all()
    pyro.set_rng_seed(5)
    pyro.clear_param_store()
    svi = SVI(model, lambda y: guide_function(y), pyro.optim.Adam({"lr": 0.01}), pplvi.ELBO())
    assert results[0][0].tolist() == [svi.step(Y) for _ in range(5)]


def test_without_a_seed_the_global_random_state_is_used():
    results = []
    for _ in range(2):
        pyro.set_rng_seed(1)
        results.append(exact(model, AutoNormal, args=(Y,), num_steps=5).losses)
    assert (results[0] == results[1]).all()
    assert (exact(model, AutoNormal, args=(Y,), num_steps=5).losses != results[0]).any()


# --- what a guide may be ---


@pytest.mark.parametrize(
    "guide",
    [
        AutoNormal,
        partial(AutoLowRankMultivariateNormal, rank=1),
        lambda model: AutoNormal(model),
        lambda m: AutoNormal(m),
        lambda *anything: AutoNormal(*anything),
        guide_function,
    ],
)
def test_classes_factories_and_guides_with_restarts(guide):
    result = fit(model, guide, args=(Y,), num_steps=30, restarts=2, seed=0)
    assert result.losses.shape == (2, 30)
    assert any(not torch.equal(a, b) for a, b in zip(*(p.values() for p in result.params), strict=True))


def test_an_instance_is_trained_in_place():
    guide = AutoNormal(model)
    result = fit(model, guide, args=(Y,), num_steps=30, seed=0)
    assert result.guide is guide
    with pytest.raises(ValueError, match=r"AutoNormal.*its class, or a function"):
        fit(model, guide, args=(Y,), num_steps=30, restarts=2)


@pytest.mark.parametrize("guide", ["best", 3, None])
def test_other_guides_are_refused(guide):
    with pytest.raises(ValueError, match=r"AutoNormal or pplvi.AutoFlow.*'nuts'"):
        fit(model, guide, args=(Y,))


def test_maximum_likelihood_without_latent_sites():
    def likelihood(y):
        loc = pyro.param("loc", lambda: torch.tensor(0.0))
        with pyro.plate("data", len(y)):
            pyro.sample("y", dist.Normal(loc, 1.0), obs=y)

    result = fit(
        likelihood, lambda *a: None, args=(Y,), num_steps=800, optim=partial(torch.optim.Adam, lr=0.05), seed=0
    )
    assert pyro.param("loc").item() == pytest.approx(Y.mean().item(), abs=1e-3)
    with pytest.raises(ValueError, match="latent"):
        result.posterior()


# --- restarts ---


def test_restarts_are_kept_apart_and_the_best_is_left_in_the_global_store():
    def far_away(run):
        if run.index == 1:
            pyro.param("AutoNormal.locs.loc").data.fill_(30.0)

    pyro.param("mine", torch.tensor(1.0))
    result = fit(model, AutoNormal, args=(Y,), num_steps=40, restarts=3, seed=0, callbacks=[far_away])
    assert result.best != 1
    assert result.best == int(np.argmin([run.score for run in result.runs]))
    store = pyro.get_param_store()
    assert pyro.param("mine").item() == 1.0
    assert_same(result.params[result.best], {k: store[k].detach() for k in store if k != "mine"})
    means = [result.posterior(restart=r, num_draws=200).draws.latents["loc"].mean().item() for r in range(3)]
    assert means[1] > 20
    assert max(means[0], means[2]) < 5
    assert pyro.param("AutoNormal.locs.loc").item() < 5


@pytest.mark.parametrize("restarts", [1, 2])
def test_modules_are_trained_apart_and_get_the_best_parameters(restarts):
    pyro.set_rng_seed(0)
    net = Net()
    initial = net.linear.weight.detach().clone()
    result = fit(net, AutoNormal, args=(X, Y), num_steps=20, restarts=restarts, seed=0)
    assert not torch.equal(net.linear.weight, initial)
    assert torch.equal(net.linear.weight, result.model.linear.weight)
    assert torch.equal(net.norm.running_mean, result.model.norm.running_mean)
    assert result.runs[0].losses[0] > result.runs[0].losses[-1]
    if restarts == 2:
        firsts = [run.losses[0] for run in result.runs]
        assert all(first > 15 for first in firsts)  # the second starts from scratch too
        assert not torch.equal(*(run.model.linear.weight for run in result.runs))


def test_methods_of_one_module_are_copied_together():
    pyro.set_rng_seed(0)
    vae = Amortised()
    result = fit(vae.model, vae.guide, args=(Y,), num_steps=20, restarts=2, seed=0)
    first, second = (run.model.__self__ for run in result.runs)
    assert first is result.runs[0].guide.__self__
    assert not torch.equal(first.encoder.weight, second.encoder.weight)
    assert torch.equal(vae.encoder.weight, result.model.__self__.encoder.weight)


def test_parameters_outside_the_store_are_refused():
    with pyro.settings.context(module_local_params=True), pytest.raises(ValueError, match="module_local_params"):
        fit(model, AutoNormal, args=(Y,), num_steps=5)


@pytest.mark.parametrize("kind", ["module", "tensor"])
def test_restarts_that_would_share_parameters_are_refused(kind):
    net, start = torch.nn.Linear(1, 1), torch.zeros(())

    def program(y):
        w = pyro.module("net", net).weight.sum() if kind == "module" else pyro.param("w", start)
        loc = pyro.sample("loc", dist.Normal(w, 1.0))
        pyro.sample("y", dist.Normal(loc, 1.0).expand(y.shape).to_event(1), obs=y)

    before = net.weight.clone()
    with pytest.raises(ValueError, match=r"would share the parameters.*(net|w)"):
        fit(program, AutoNormal, args=(Y,), num_steps=5, restarts=2)
    assert torch.equal(net.weight, before)
    assert fit(program, AutoNormal, args=(Y,), num_steps=5).losses.shape == (1, 5)


def test_effect_based_guides_keep_their_restarts():
    result = fit(model, AutoNormalMessenger, args=(Y,), num_steps=300, restarts=2, seed=0)
    assert result.posterior(num_draws=500).pareto_k < 1.0


# --- checkpoints ---


def loader(generator=None):
    return DataLoader(TensorDataset(Y), batch_size=3, shuffle=True, generator=generator)


class Stream:
    """An iterable that knows where it is; ``endless`` ones are their own iterators."""

    def __init__(self, endless):
        self.i, self.endless = 0, endless

    def __iter__(self):
        return self

    def __next__(self):
        self.i += 1
        if not self.endless and self.i % 6 == 0:
            raise StopIteration
        return (torch.roll(Y, self.i)[:4] * (1.0 + 0.1 * self.i),)

    def state_dict(self):
        return {"i": self.i}

    def load_state_dict(self, state):
        self.i = state["i"]


class Shards(Stream):
    """The same, with an iterator of its own for every epoch."""

    def __iter__(self):
        stream = self

        class Epoch:
            def __iter__(self):
                return self

            def __next__(self):
                return Stream.__next__(stream)

        return Epoch()


SOURCES = {
    "full": lambda: {"args": (Y,)},
    "keywords": lambda: {"kwargs": {"y": Y}},
    "list": lambda: {"data": [(Y[:4],), (Y[4:],), (Y,)]},
    "loader": lambda: {"data": loader()},
    "loader with a generator": lambda: {"data": loader(torch.Generator().manual_seed(4))},
    "stateful iterator": lambda: {"data": Stream(True)},
    "stateful epochs": lambda: {"data": Shards(False)},
}
GUIDES = {
    "AutoNormal": AutoNormal,
    "AutoFlow": pplvi.AutoFlow,
    "function": guide_function,
    "AutoMultivariateNormal": AutoMultivariateNormal,
}
OPTIMISERS = {
    "default": lambda: {"optim": None},
    "pyro": lambda: {"optim": pyro.optim.Adam({"lr": 0.05})},
    "pyro decaying": lambda: {
        "optim": pyro.optim.ExponentialLR({"optimizer": torch.optim.Adam, "optim_args": {"lr": 0.05}, "gamma": 0.99}),
        "schedule": None,
    },
    "torch": lambda: {"optim": partial(torch.optim.SGD, lr=0.01, momentum=0.9)},
}


def interrupted_at(step, index=0):
    def callback(run):
        if (run.index, run.step) == (index, step):
            raise KeyboardInterrupt

    return [callback]


def check_resume(path, options, at, index=0, program=lambda: model, guide=AutoNormal, steps=24):
    """Run without an interruption, and again with one: the same to the bit, and the random state too."""
    common = {"num_steps": steps, "stop": None}
    pyro.set_rng_seed(2)
    whole = fit(program(), guide, **options(), **common)
    expected, rng = state(), rng_state()
    pyro.clear_param_store()
    pyro.set_rng_seed(2)
    file = Checkpoint(path, every=5)
    part = fit(program(), guide, **options(), **common, checkpoint=file, callbacks=interrupted_at(at, index))
    assert part.reasons[-1] == "interrupted"
    pyro.clear_param_store()
    pyro.set_rng_seed(99)
    torch.rand(7), np.random.normal()
    resumed = fit(program(), guide, **options(), **common, checkpoint=file, resume=path)
    assert (resumed.losses == whole.losses).all()
    assert resumed.reasons == whole.reasons
    assert_same(state(), expected)
    for first, second in zip(resumed.params, whole.params, strict=True):
        assert_same(first, second)
    return rng


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("at", [7, 13])
def test_resume_is_to_the_bit_for_every_source_of_data(tmp_path, source, at):
    check_resume(tmp_path / "run.pt", lambda: {"seed": 1, **SOURCES[source]()}, at)


@pytest.mark.table(3)
@pytest.mark.parametrize("guide", GUIDES)
@pytest.mark.parametrize("optim", OPTIMISERS)
def test_resume_is_to_the_bit_for_every_guide_and_optimiser(tmp_path, guide, optim):
    check_resume(tmp_path / "run.pt", lambda: {"seed": 1, "args": (Y,), **OPTIMISERS[optim]()}, 12, guide=GUIDES[guide])


@pytest.mark.parametrize("objective", [Trace_ELBO(num_particles=2, vectorize_particles=True), pplvi.RenyiELBO(0.5)])
def test_resume_is_to_the_bit_for_other_objectives(tmp_path, objective):
    check_resume(tmp_path / "run.pt", lambda: {"seed": 1, "args": (Y,), "objective": objective}, 12)


def test_resume_without_a_seed_leaves_the_random_state_of_the_whole_run(tmp_path):
    rng = check_resume(tmp_path / "run.pt", lambda: {"args": (Y,)}, 12)
    now = rng_state()
    assert torch.equal(now["torch"], rng["torch"])
    assert now["random"] == rng["random"]
    assert now["numpy"][1].tolist() == rng["numpy"][1].tolist()


@pytest.mark.table(2)
@pytest.mark.parametrize(
    ("at", "index", "seed"), [(3, 1, 1), (12, 1, 1), (24, 0, 1), (1, 2, 1), (12, 1, None), (1, 2, None)]
)
def test_resume_in_the_middle_of_restarts(tmp_path, at, index, seed):
    check_resume(tmp_path / "run.pt", lambda: {"seed": seed, "data": loader(), "restarts": 3}, at, index)


def net():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Net()


@pytest.mark.parametrize("restarts", [1, 2])
def test_resume_of_a_module_with_buffers_and_constraints(tmp_path, restarts):
    options = lambda: {"seed": 1, "args": (X, Y), "restarts": restarts}  # noqa: E731
    check_resume(tmp_path / "run.pt", options, 13, restarts - 1, program=net)


def interrupted_net(path, methods=False):
    """Two restarts of a module, from two states of the random numbers, interrupted in the first restart."""
    options = {"seed": 1, "restarts": 2, "num_steps": 12}
    pyro.set_rng_seed(3)
    first, second = (Amortised() if methods else Net() for _ in range(2))
    data = (Y,) if methods else (X, Y)

    def run(module, **more):
        programs = (module.model, module.guide) if methods else (module, AutoNormal)
        return fit(*programs, args=data, **options, **more)

    whole = run(copy.deepcopy(first))
    run(first, checkpoint=Checkpoint(path, every=5), callbacks=interrupted_at(7))
    return whole, second, partial(run, checkpoint=Checkpoint(path, every=5), resume=path)


@pytest.mark.parametrize("methods", [False, True])
def test_restarts_not_yet_begun_start_from_the_modules_of_the_first_call(tmp_path, methods):
    whole, other, resume = interrupted_net(tmp_path / "run.pt", methods)
    resumed = resume(other)
    assert (resumed.losses == whole.losses).all()
    for first, second in zip(resumed.params, whole.params, strict=True):
        assert_same(first, second)


def test_modules_survive_two_interruptions(tmp_path):
    whole, other, resume = interrupted_net(tmp_path / "run.pt")
    resume(other, callbacks=interrupted_at(10))
    assert (resume(Net()).losses == whole.losses).all()


def test_a_module_trained_in_place_is_taken_back_for_more_restarts(tmp_path):
    options = {"args": (X, Y), "seed": 1, "num_steps": 6, "dtype": torch.float64}
    module, path = net(), tmp_path / "run.pt"
    fit(module, AutoNormal, **options, checkpoint=path)
    more = fit(module, AutoNormal, **options, checkpoint=path, resume=path, restarts=2)
    assert (more.losses == fit(net(), AutoNormal, **options, restarts=2).losses).all()


def test_restarts_not_yet_begun_need_modules_of_the_same_shape(tmp_path):
    _, other, resume = interrupted_net(tmp_path / "run.pt")
    other.register_buffer("extra", torch.zeros(2))
    with pytest.raises(ValueError, match=r"its modules differ: model.extra: none in the file"):
        resume(other)


def test_resume_with_monitor_and_stop(tmp_path):
    from pplvi.training.stopping import Plateau

    options = {
        "args": (Y,), "seed": 0, "num_steps": 3000, "stop": Plateau(min_steps=200, every=50, patience=2),
        "monitor": pplvi.ELBO(),
    }  # fmt: skip
    whole = fit(model, AutoNormal, **options)
    assert whole.reasons == ["converged"]
    at = whole.losses.shape[1] - 20  # while the learning rate falls to zero
    fit(model, AutoNormal, **options, checkpoint=Checkpoint(tmp_path / "a", every=75), callbacks=interrupted_at(at))
    resumed = fit(model, AutoNormal, **options, resume=tmp_path / "a")
    assert (resumed.losses == whole.losses).all()
    assert resumed.runs[0].monitored == whole.runs[0].monitored


def test_a_finished_run_can_be_read_back_and_extended(tmp_path):
    path, options = tmp_path / "run.pt", {"args": (Y,), "seed": 0, "schedule": None, "restarts": 2}
    fit(model, AutoNormal, **options, num_steps=10, checkpoint=path)
    params = state()
    pyro.clear_param_store()
    again = fit(model, AutoNormal, **options, num_steps=10, resume=path)
    assert_same(state(), params)
    assert again.reasons == ["num_steps", "num_steps"]
    longer = fit(model, AutoNormal, **options, num_steps=20, resume=path)
    assert (longer.losses == fit(model, AutoNormal, **options, num_steps=20).losses).all()
    with pytest.raises(ValueError, match="holds 2 restarts"):
        fit(model, AutoNormal, **{**options, "restarts": 1}, num_steps=10, resume=path)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"model": other_model}, "sites differ.*model.scale: LogNormal.*in the file, Gamma"),
        ({"guide": AutoMultivariateNormal}, "parameters differ"),
        ({"optim": torch.optim.SGD}, "settings differ: optim"),
        ({"objective": pplvi.ImportanceWeightedELBO(2)}, "settings differ: objective"),
        ({"args": (Y + 1,)}, "settings differ: data"),
        ({"seed": 1}, "settings differ: seed"),
        ({"num_steps": 10}, "settings differ: schedule"),
    ],
)
def test_a_checkpoint_of_another_run_is_refused_and_left_alone(tmp_path, change, words):
    path = tmp_path / "run.pt"
    options = {"model": model, "guide": AutoNormal, "args": (Y,), "seed": 0, "num_steps": 20}
    fit(**options, checkpoint=path)
    content = path.read_bytes()
    pyro.clear_param_store()
    with pytest.raises(ValueError, match=f"of another model or run; its {words}"):
        fit(**{**options, **change}, resume=path, checkpoint=path)
    assert path.read_bytes() == content
    assert not len(pyro.get_param_store())


def test_a_damaged_checkpoint_is_refused_and_left_alone(tmp_path):
    path = tmp_path / "run.pt"
    fit(model, AutoNormal, args=(Y,), num_steps=5, checkpoint=path)
    content = path.read_bytes()
    for damaged in (content[: len(content) // 2], b"", content[:-200] + b"x" * 200):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"corrupt or truncated.*left as it is"):
            fit(model, AutoNormal, args=(Y,), num_steps=5, resume=path, checkpoint=path)
        assert path.read_bytes() == damaged


def test_no_checkpoint_is_overwritten(tmp_path):
    path = tmp_path / "run.pt"
    fit(model, AutoNormal, args=(Y,), num_steps=5, checkpoint=path)
    content = path.read_bytes()
    with pytest.raises(ValueError, match=r"exists already and would be overwritten: pass resume="):
        fit(model, AutoNormal, args=(Y,), num_steps=5, checkpoint=path)
    assert path.read_bytes() == content
    with pytest.raises(ValueError, match="there is no checkpoint"):
        fit(model, AutoNormal, args=(Y,), num_steps=5, resume=tmp_path / "none")
    with pytest.raises(ValueError, match="existing directory"):
        fit(model, AutoNormal, args=(Y,), num_steps=5, checkpoint=tmp_path / "no" / "run.pt")


def test_a_one_shot_iterator_is_refused_with_a_checkpoint_and_with_restarts(tmp_path):
    for options in ({"checkpoint": tmp_path / "run.pt"}, {"restarts": 2}):
        with pytest.raises(ValueError, match="one-shot iterator"):
            fit(model, AutoNormal, data=iter([(Y,)] * 9), num_steps=5, **options)


def test_constraints_come_from_the_program_and_never_from_the_file(tmp_path):
    path = tmp_path / "run.pt"
    fit(model, AutoNormal, args=(Y,), num_steps=5, seed=0, checkpoint=path)
    saved = checkpoint.read(path)
    assert "constraints" not in saved["runs"][0]
    assert set(saved["runs"][0]["params"]) == set(pyro.get_param_store().keys())
    pyro.clear_param_store()
    fit(model, AutoNormal, args=(Y,), num_steps=5, seed=0, resume=path)
    scales = [pyro.get_param_store()._constraints[f"AutoNormal.scales.{s}"] for s in ("loc", "scale")]
    assert all("softplus" in str(c).lower() for c in scales)


@pytest.mark.skipif(os.name != "posix", reason="kill -9 is a signal")
def test_kill_in_the_middle_of_a_write_loses_nothing(tmp_path):
    path = tmp_path / "run.pt"
    script = f"""
        import os, sys, time
        sys.path[:0] = {[os.path.dirname(__file__), os.path.dirname(os.path.dirname(__file__))]!r}
        from test_fit import AutoNormal, Checkpoint, fit, loader, model
        fsync, calls = os.fsync, []
        def slow(handle):
            calls.append(handle)
            if len(calls) == 6:  # two for a checkpoint: the file and its directory
                print("writing", flush=True)
                time.sleep(60)
            fsync(handle)
        os.fsync = slow
        fit(model, AutoNormal, data=loader(), num_steps=24, seed=1, checkpoint=Checkpoint({str(path)!r}, every=5))
    """
    process = subprocess.Popen([sys.executable, "-c", textwrap.dedent(script)], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "writing\n"
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    saved = len(checkpoint.read(path)["runs"][0]["losses"])
    assert saved in (10, 15)
    options = {"num_steps": 24, "seed": 1}
    resumed = fit(model, AutoNormal, data=loader(), checkpoint=Checkpoint(path, every=5), resume=path, **options)
    expected = state()
    pyro.clear_param_store()
    whole = fit(model, AutoNormal, data=loader(), **options)
    assert (resumed.losses == whole.losses).all()
    assert_same(state(), expected)


# --- dtype, device, arguments ---


def test_dtype_is_for_the_run_and_its_posterior_only():
    result = fit(model, AutoNormal, args=(Y,), num_steps=10, dtype=torch.float64, seed=0)
    assert torch.get_default_dtype() is torch.float32
    assert all(p.dtype is torch.float64 for p in result.params[0].values())
    assert result.posterior(num_draws=5).draws.latents["loc"].dtype is torch.float64
    assert result.predict(num_samples=5).observed["y"].dtype is torch.float64
    with pytest.raises(ValueError, match="floating point dtype"):
        fit(model, AutoNormal, args=(Y,), dtype=torch.int64)


def test_device_is_set_inside_and_put_back():
    environment = Environment(device="meta")
    with environment.active():
        assert torch.zeros(2).device.type == "meta"
    with pytest.raises(KeyError), environment.active():
        raise KeyError
    assert torch.zeros(2).device.type == "cpu"


def test_device_moves_data_wherever_they_are_and_modules():
    environment, net = Environment(torch.float64, "meta"), Net()
    args, kwargs = environment.move(((Y, [X, {"n": 3}]), {"pair": (torch.arange(2), None)}))
    assert [t.device.type for t in (args[0], args[1][0], kwargs["pair"][0])] == ["meta"] * 3
    assert (args[0].dtype, kwargs["pair"][0].dtype) == (torch.float64, torch.int64)
    assert (args[1][1], kwargs["pair"][1]) == ({"n": 3}, None)
    environment.move_module(net.forward)
    assert {value.device.type for value in (*net.parameters(), *net.buffers())} == {"meta"}


def device_mode():
    """The device that ``with torch.device(...)`` has set; ``torch.get_default_device`` cannot tell "cpu" from none."""
    stack = torch.overrides._get_current_function_mode_stack()
    return next((mode.device.type for mode in stack if isinstance(mode, torch.utils._device.DeviceContext)), None)


def test_fit_runs_its_programs_and_posterior_on_its_device(monkeypatch):
    """No other device is here, so that what a run moves is written down on the way."""
    moved, move = [], Environment._move
    monkeypatch.setattr(Environment, "_move", lambda self, x: moved.append((self.device, x.shape)) or move(self, x))
    seen = []

    def own(y):
        seen.append(device_mode())
        model(y)

    result = fit(own, AutoNormal, kwargs={"y": Y}, num_steps=2, device="cpu")
    result.posterior(num_draws=2)
    assert len(moved) >= 2
    assert set(moved) == {("cpu", Y.shape)}
    assert set(seen) == {"cpu"}
    assert device_mode() is None


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"args": Y}, r"args is a Tensor: expected a tuple"),
        ({"kwargs": [1]}, "kwargs is a list"),
        ({"num_steps": 0}, "num_steps=0"),
        ({"num_steps": 1.5}, "num_steps=1.5"),
        ({"restarts": 0}, "restarts=0"),
        ({"learning_rate": -0.1}, "learning_rate=-0.1: expected a positive"),
        ({"learning_rate": 0.1, "optim": torch.optim.Adam}, "learning_rate=0.1 beside optim="),
        ({"compile": "fast"}, "compile='fast'"),
        ({"seed": -1}, "seed=-1"),
        ({"seed": 2**32 - 1, "restarts": 2}, "seed="),
        ({"objective": pplvi.ELBO}, "expected a loss such as"),
        ({"objective": "elbo"}, "expected a loss such as"),
        ({"monitor": 3}, "monitor=3"),
        ({"optim": 0.1}, "expected a pyro.optim"),
        ({"schedule": "linear"}, "'cosine'"),
        ({"clip": 0}, "'adaptive'"),
        ({"stop": 100}, "stop=100"),
    ],
)
def test_wrong_arguments_are_refused_before_anything_runs(options, words):
    with pytest.raises(ValueError, match=words):
        fit(model, AutoNormal, **{"args": (Y,), **options})
    assert not len(pyro.get_param_store())


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Checkpoint("run.pt", every=-1), "every=-1"),
        (lambda: fit(model, "nuts", args=(Y,), num_warmup=0), "num_warmup=0"),
        (lambda: fit(model, AutoNormal, args=(Y,), num_warmup=10), "num_warmup=10 is for MCMC"),
        (lambda: fit(model, AutoNormal, args=(Y,), budget=10.0), "budget=10.0 is for guide='auto'"),
        (lambda: Compile("max", chunk=0), "chunk=0"),
        (lambda: Compile("max", chunk=51), "at most 50"),
        (lambda: Compile("quick"), "mode='quick'"),
        (lambda: Monitor(every=0), "every=0"),
        (lambda: fit(model, AutoNormal, args=(Y,), monitor=Monitor(held_back=3)), "the data yielded a int"),
    ],
)
def test_wrong_options_are_refused(make, words):
    with pytest.raises(ValueError, match=words):
        make()


def test_a_learning_rate_is_that_of_adam():
    options = {"args": (Y,), "num_steps": 5, "seed": 0}
    named = fit(model, AutoNormal, **options, learning_rate=0.03)
    assert (named.losses == fit(model, AutoNormal, **options, optim=partial(torch.optim.Adam, lr=0.03)).losses).all()
    assert (named.losses != fit(model, AutoNormal, **options).losses).any()


def test_the_short_forms_are_the_long_ones(tmp_path):
    options = {"args": (Y,), "num_steps": 20, "seed": 0, "restarts": 2}
    short = fit(model, AutoNormal, **options, monitor=pplvi.ELBO(), compile="trace", checkpoint=tmp_path / "a")
    monitor, file = Monitor(pplvi.ELBO(), every=10), Checkpoint(tmp_path / "b")
    long = fit(model, AutoNormal, **options, monitor=monitor, compile=Compile("trace"), checkpoint=file)
    assert (short.losses == long.losses).all()
    assert [run.monitored for run in short.runs] == [run.monitored for run in long.runs]
    saved = [checkpoint.read(tmp_path / name) for name in "ab"]
    assert saved[0]["settings"] == saved[1]["settings"]


def test_wrong_model_and_modules_that_cannot_be_copied_are_refused():
    with pytest.raises(ValueError, match="expected a Pyro program"):
        fit(3, AutoNormal, args=(Y,))
    module = Net()
    module.history = [module.linear.weight * 2]  # not a leaf: torch refuses to copy it
    with pytest.raises(ValueError, match="cannot be copied"):
        fit(module, AutoNormal, args=(X, Y), restarts=2)


@pytest.mark.parametrize("guide", [model, "nuts"])
def test_a_class_as_model_is_refused(guide):
    with pytest.raises(ValueError, match=r"model=AutoNormal: .* may be swapped"):
        fit(AutoNormal, guide, args=(Y,))


def test_nothing_to_train_is_said():
    with pytest.raises(ValueError, match="nothing to train"):
        fit(model, lambda y: {"loc": pyro.sample("loc", dist.Normal(0.0, 1.0)),
                              "scale": pyro.sample("scale", dist.LogNormal(0.0, 1.0))}, args=(Y,))  # fmt: skip


# --- the result ---


@pytest.fixture(scope="module")
def trained():
    pyro.clear_param_store()
    return fit(model, AutoNormal, args=(Y,), num_steps=300, restarts=2, seed=0)


def test_the_result_reads_well(trained, capsys):
    assert trained.losses.shape == (2, 300)
    assert trained.reasons == ["num_steps", "num_steps"]
    assert trained.seconds > 0
    assert repr(trained).startswith("Fit(AutoNormal, ELBO(num_particles=1), restarts=2, best=")
    trained.report()
    text = capsys.readouterr().out
    assert all(word in text for word in ("AutoNormal", "ELBO", "restarts", "took all 300 steps", "k-hat"))


def test_the_posterior_is_seeded_and_that_of_the_restart(trained):
    first, again = (trained.posterior(num_draws=50).draws.latents["loc"] for _ in range(2))
    assert torch.equal(first, again)
    assert not torch.equal(first, trained.posterior(num_draws=50, seed=8).draws.latents["loc"])
    assert len(trained.posteriors) == 2
    with pytest.raises(ValueError, match="index from 0 to 1"):
        trained.posterior(restart=2)


@pytest.mark.filterwarnings("ignore:Pareto k is above:UserWarning")
def test_predict_and_loo_and_arviz(trained):
    assert trained.predict(torch.zeros(3), num_samples=20).observed["y"].shape == (20, 3)
    assert np.isfinite(elpd(trained.loo()))
    data = trained.to_arviz()
    assert dict(data.posterior.sizes) == {"chain": 2, "draw": 1000}
    assert data.optimization.loss.shape == (2, 300)
    assert data.attrs["objective"] == "ELBO(num_particles=1)"
    assert data.attrs["seed"] == 0
    assert dict(trained.to_arviz(restarts="best", draws="guide").posterior.sizes) == {"chain": 1, "draw": 1000}


class Regression(PyroModule):
    """A model that allows no call with many draws: ``nn.Linear`` transposes its weight."""

    def __init__(self):
        super().__init__()
        self.linear = PyroModule[torch.nn.Linear](1, 1)
        self.linear.weight = PyroSample(dist.Normal(0.0, 1.0).expand([1, 1]).to_event(2))
        self.linear.bias = PyroSample(dist.Normal(0.0, 1.0).expand([1]).to_event(1))

    def forward(self, x, y=None):
        loc = self.linear(x[:, None]).squeeze(-1)
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(loc, 1.0), obs=y)


def test_programs_trained_with_one_draw_a_call_are_looked_at_that_way():
    objective = pplvi.ELBO(vectorize_particles=False)
    result = fit(Regression(), AutoNormal, args=(X, Y), objective=objective, num_steps=100, seed=0)
    assert not result.vectorize
    result.__dict__["posteriors"] = [result.posterior(100)]  # 1,000 draws take ten times as long, one after another
    assert "k-hat" in result.summary()
    assert result.to_arviz(num_prior=5).log_likelihood["y"].shape == (1, 100, 8)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert np.isfinite(elpd(result.loo()))
        assert np.isfinite(pplvi.compare({"regression": result}).loc["regression", "elpd_loo"])
    assert result.predict(X, num_samples=9).observed["y"].shape == (9, 8)
    assert result.posterior(num_draws=3, vectorize=True).num_draws == 3


def test_of_other_objectives_the_way_is_found():
    result = fit(Regression(), AutoNormal, args=(X, Y), objective=Trace_ELBO(), num_steps=10, seed=0)
    assert result.vectorize is None
    assert result.posterior(num_draws=3, vectorize=False).num_draws == 3
    assert "k-hat" in result.summary()
    named = fit(Regression(), AutoNormal, args=(X, Y), num_steps=10, seed=0, vectorize="loop")
    assert named.vectorize == named.objective.vectorize_particles == "loop"
    with pytest.raises(ValueError, match=r"vectorize='fast': expected None, True, False, or one of"):
        fit(Regression(), AutoNormal, args=(X, Y), num_steps=10, vectorize="fast")


def test_a_fit_on_minibatches_is_given_the_full_data():
    options = {"num_steps": 50, "seed": 0}
    with_args = fit(model, AutoNormal, data=loader(), args=(Y,), **options)
    without = fit(model, AutoNormal, data=loader(), **options)
    assert (with_args.losses == without.losses).all()
    assert with_args.posterior(num_draws=7).draws.observed["y"].shape == (8,)
    with pytest.raises(ValueError, match="full data"):
        without.posterior()
    assert without.posterior(num_draws=7, args=(Y,)).draws.observed["y"].shape == (8,)
    data = without.to_arviz(args=(Y,), draws="guide")
    assert data.observed_data["y"].shape == (8,)
    assert data.posterior["loc"].equals(with_args.to_arviz(draws="guide").posterior["loc"])
    assert "seed" not in fit(model, AutoNormal, args=(Y,), num_steps=2).to_arviz(draws="guide").attrs
    with pytest.warns(UserWarning, match="Pareto k"):
        assert without.loo(args=(Y,)).n_data_points == 8
    assert "ELBO" in without.summary(args=(Y,))


def test_the_bar_shows_the_smoothed_loss(capsys):
    pplvi.fit(model, AutoNormal, args=(Y,), num_steps=60, restarts=2, seed=0)
    text = capsys.readouterr().err
    assert "restart 2/2" in text
    assert "60/60" in text
    assert "loss" in text


# --- MCMC ---


@pytest.fixture(scope="module")
def chains():
    with torch.random.fork_rng():
        return fit(model, "nuts", args=(Y,), num_steps=60, restarts=2, seed=0)


@pytest.mark.filterwarnings("ignore:Estimated shape parameter of Pareto:UserWarning")
def test_nuts_is_a_fit(chains):
    assert chains.mcmc.num_chains == 2
    assert chains.mcmc.get_samples(group_by_chain=True)["loc"].shape == (2, 60)
    assert chains.posterior().draws.latents["loc"].shape == (120,)
    assert chains.losses.shape == (1, 0)
    assert repr(chains) == "Fit(NUTS, chains=2)"
    assert "R-hat" in chains.summary()
    assert np.isfinite(elpd(chains.loo()))
    assert dict(chains.to_arviz().posterior.sizes) == {"chain": 2, "draw": 60}
    chains.mcmc.summary()


def test_chains_are_seeded_one_by_one(chains):
    before = torch.get_rng_state()
    second = fit(model, NUTS, args=(Y,), num_steps=60, num_warmup=60, seed=1).mcmc.get_samples()["loc"]
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(chains.mcmc.get_samples(group_by_chain=True)["loc"][1], second)


def test_kernels_take_options_and_chains_can_be_interrupted():
    calls = []

    class Interrupted(NUTS):
        def setup(self, *args, **kwargs):
            calls.append(1)
            if len(calls) == 2:
                raise KeyboardInterrupt
            super().setup(*args, **kwargs)

    kernel = partial(Interrupted, max_tree_depth=3)
    result = fit(model, kernel, args=(Y,), num_steps=5, restarts=3, seed=0)
    assert result.mcmc.num_chains == 1


def test_what_mcmc_has_no_use_for_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"no use for \['checkpoint', 'compile', 'objective'\]"):
        fit(model, "nuts", args=(Y,), objective=pplvi.ELBO(), checkpoint=tmp_path / "a", compile=True)


# --- light imports ---


def test_the_import_is_light():
    script = (
        "import sys, pplvi; print([m for m in ('arviz', 'matplotlib', 'zuko', 'sklearn', 'tqdm') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_a_posterior_that_the_clock_has_cut_is_not_kept():
    def model():
        pyro.sample("z", dist.Normal(0.0, 1.0))

    result = fit(model, AutoNormal, num_steps=2, seed=0)
    with ending(lambda: "budget"):
        assert result.posterior(700, chunk_size=100).num_draws == 500
    assert result.posterior(700, chunk_size=100).num_draws == 700


def test_a_search_is_scored_in_parts_of_which_there_are_fewer_when_the_time_is_over(monkeypatch):
    sizes = []
    monkeypatch.setattr(starts, "evaluate", lambda loss, *rest: sizes.append(loss.num_particles) or float(len(sizes)))
    monkeypatch.setattr(starts, "_NUMBERS", 800)
    late = iter([False, True])

    def model():
        pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))

    guide = partial(AutoPathfinder, num_paths=1)
    assert fit(model, guide, seed=0).runs[0].score == pytest.approx((400 * 1 + 400 * 2 + 200 * 3) / 1000)
    monkeypatch.setattr(starts, "is_time_over", lambda: next(late))
    assert fit(model, guide, seed=0).runs[0].score == pytest.approx((400 * 4 + 400 * 5) / 800)
    assert sizes == [400, 400, 200, 400, 400]


def test_a_posterior_is_kept_until_parameters_or_data_change():
    y = torch.tensor([0.3, 0.1, -0.2])

    def model(data):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        with pyro.plate("data", 3):
            pyro.sample("y", dist.Normal(z, 1.0), obs=data)

    result = fit(model, AutoNormal, args=(y,), num_steps=20, seed=0)
    first = result.posterior(200)
    assert result.posterior(200) is first
    assert result.posterior(200, seed=1) is not first
    assert result.posterior(201) is not first  # and two are kept
    assert result.posterior(200) is not first
    found = result.posterior(200)
    y += 0.1
    moved = result.posterior(200)
    assert moved is not found
    assert not torch.equal(moved.log_weight, found.log_weight)
    with torch.no_grad():
        result.guide.locs.z += 1.0
    assert not torch.equal(result.posterior(200).draws.latents["z"], moved.draws.latents["z"])
