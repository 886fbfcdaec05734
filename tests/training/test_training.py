"""The loop of one restart: data sources, callbacks, monitors, early stops, and losses that are not numbers."""

import math
from functools import partial

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI, Trace_ELBO
from pyro.infer.autoguide import AutoDelta, AutoNormal
from pyro.infer.autoguide.initialization import init_to_value
from torch.utils.data import DataLoader, Dataset, TensorDataset

import pplvi
from pplvi.programs.calls import to_call
from pplvi.training import batches, loop
from pplvi.training.batches import make_batches
from pplvi.training.steps import EagerStepper
from pplvi.training.stopping import Plateau
from pplvi.training.watch import Monitor

Y = torch.linspace(-1.0, 2.0, 20)
fit = partial(pplvi.fit, progress=False, schedule=None, clip=None, stop=None, seed=0)


def model(y, size=20):
    loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
    with pyro.plate("data", size, subsample=y):
        pyro.sample("y", dist.Normal(loc, 1.0), obs=y)


def adam():
    return pyro.optim.Adam({"lr": 0.05})


def by_hand(calls, objective=None, seed=0):
    pyro.set_rng_seed(seed)
    pyro.clear_param_store()
    svi = SVI(model, AutoNormal(model), adam(), objective or Trace_ELBO())
    return [svi.step(*call) for call in calls]


# --- data ---


def test_loader_steps_as_by_hand():
    def loader():
        return DataLoader(TensorDataset(Y), batch_size=6, shuffle=True)

    pyro.set_rng_seed(0)
    pyro.clear_param_store()
    svi = SVI(model, AutoNormal(model), adam(), Trace_ELBO())
    hand = [svi.step(*batch) for _ in range(3) for batch in loader()]
    result = fit(model, AutoNormal, data=loader(), objective=Trace_ELBO(), optim=adam(), num_steps=len(hand))
    assert result.losses[0].tolist() == hand


@pytest.mark.parametrize("wrap", [lambda y: (y,), lambda y: [y], lambda y: {"y": y}, lambda y: y])
def test_an_item_is_a_tuple_a_dictionary_or_a_tensor(wrap):
    items = [Y[:10], Y[10:]]
    result = fit(model, AutoNormal, data=[wrap(y) for y in items], objective=Trace_ELBO(), optim=adam(), num_steps=5)
    assert result.losses[0].tolist() == by_hand([(items[i % 2],) for i in range(5)])


def test_an_iterator_ends_the_training():
    result = fit(model, AutoNormal, data=iter([(Y,)] * 7), num_steps=50)
    assert (result.losses.shape, result.reasons) == ((1, 7), ["data"])


@pytest.mark.parametrize(
    ("data", "words"),
    [([], "no batch"), (iter([]), "no batch"), ([1.0], "yielded a float"), (Y, "expected a DataLoader"), (3, "data=3")],
)
def test_wrong_data_are_refused(data, words):
    with pytest.raises(ValueError, match=words):
        fit(model, AutoNormal, data=data, num_steps=3)


def test_items_are_taken_apart():
    assert to_call((1, 2)) == ((1, 2), {})
    assert to_call({"y": 1}) == ((), {"y": 1})


def test_a_loaders_generator_is_put_back_with_a_seed():
    generator = torch.Generator().manual_seed(7)
    before = generator.get_state()
    loader = DataLoader(TensorDataset(Y), batch_size=6, shuffle=True, generator=generator)
    first = fit(model, AutoNormal, data=loader, num_steps=9)
    assert torch.equal(generator.get_state(), before)
    assert (fit(model, AutoNormal, data=loader, num_steps=9).losses == first.losses).all()


def test_restarts_shuffle_differently():
    seen = []
    loader = DataLoader(
        TensorDataset(torch.arange(20.0)), batch_size=20, shuffle=True, generator=torch.Generator().manual_seed(7)
    )

    def spy(y):
        seen.append(tuple(y.tolist()))
        model(y)

    def guide(y):
        pyro.sample("loc", dist.Normal(pyro.param("m", lambda: torch.tensor(0.0)), 1.0))

    fit(spy, guide, data=loader, num_steps=1, restarts=2, objective=Trace_ELBO())
    assert len(set(seen)) == 2


class Noisy(Dataset):
    """Samples that are transformed with the global random state."""

    def __len__(self):
        return 20

    def __getitem__(self, i):
        return Y[i] + torch.randn(())


def test_a_loader_that_cannot_be_replayed_is_refused():
    source = make_batches(DataLoader(Noisy(), batch_size=5), (), {})
    source.start(0, 0)
    for _ in range(3):
        next(source)
        torch.randn(3)  # what a training step does
    state = source.get_state()
    again = make_batches(DataLoader(Noisy(), batch_size=5), (), {})
    again.start(0, 0)
    with pytest.raises(ValueError, match="did not return the batches of the checkpointed run"):
        again.set_state(state)


def test_peeking_changes_nothing():
    sources = [DataLoader(TensorDataset(Y), batch_size=6, shuffle=True), [(Y,), (Y + 1,)], iter([(Y,), (Y + 1,)])]
    for data in sources:
        source = make_batches(data, (), {})
        source.start(0, 0)
        before = torch.get_rng_state()
        source.peek()
        assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(next(source)[0][0], Y)
    assert isinstance(source, batches.OneShot)


# --- what is looked at between the steps ---


def test_callbacks_see_the_run_and_can_stop_it():
    seen = []

    def callback(run):
        seen.append((run.step, run.loss, "AutoNormal.locs.loc" in pyro.get_param_store()))
        return run.step == 4

    result = fit(model, AutoNormal, args=(Y,), num_steps=50, callbacks=[callback])
    assert [s[0] for s in seen] == [1, 2, 3, 4]
    assert [s[1] for s in seen] == result.losses[0].tolist()
    assert all(s[2] for s in seen)
    assert result.reasons == ["callback"]


def test_interrupt_returns_what_there_is():
    def interrupt(run):
        if run.index == 1 and run.step == 6:
            raise KeyboardInterrupt

    result = fit(model, AutoNormal, args=(Y,), num_steps=20, restarts=3, callbacks=[interrupt])
    assert result.reasons == ["num_steps", "interrupted"]
    assert torch.tensor(result.losses).isnan().sum(1).tolist() == [0, 14]
    assert result.posterior(num_draws=10, restart=1).draws.latents["loc"].shape == (10,)


def test_interrupt_before_the_first_step_is_passed_on():
    def broken(y):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fit(broken, AutoNormal, args=(Y,))


def test_interrupt_inside_a_step():
    calls = []

    def interrupted(y):
        calls.append(1)
        if len(calls) == 12:
            raise KeyboardInterrupt
        model(y)

    result = fit(interrupted, AutoNormal, args=(Y,), objective=Trace_ELBO(), num_steps=50)
    assert result.reasons == ["interrupted"]
    assert 5 < result.losses.shape[1] < 12
    assert result.posterior(num_draws=10).draws.latents["loc"].shape == (10,)


QUICK = Plateau(min_steps=100, every=20, patience=2)


def test_training_stops_when_the_objective_has_levelled_off():
    result = fit(model, AutoNormal, args=(Y,), num_steps=4000, stop=QUICK, optim=partial(torch.optim.Adam, lr=0.1))
    assert result.reasons == ["converged"]
    assert result.converged
    assert result.losses.shape[1] < 1500


def test_with_the_cosine_schedule_the_learning_rate_falls_to_zero_first():
    rates = []
    result = fit(
        model,
        AutoNormal,
        args=(Y,),
        num_steps=4000,
        stop=QUICK,
        schedule="cosine",
        optim=partial(torch.optim.Adam, lr=0.1),
        callbacks=[lambda run: rates.append(run.losses) and None],
    )
    steps = result.losses.shape[1]
    assert result.reasons == ["converged"]
    assert steps < 2000
    mean = result.params[0]["AutoNormal.locs.loc"].item()
    assert mean == pytest.approx(Y.sum().item() / 21, abs=0.02)  # without the last small steps it is off by 0.1


@pytest.mark.parametrize("objective", [pplvi.ForwardKL(num_particles=4)])
def test_an_objective_that_is_no_bound_never_stops_early_nor_says_which_is_best(objective):
    result = fit(model, AutoNormal, args=(Y,), objective=objective, num_steps=300, stop=QUICK, restarts=2)
    assert result.reasons == ["num_steps", "num_steps"]
    assert result.best == 0
    assert result.converged is None


def test_a_named_monitor_stops_such_an_objective():
    result = fit(
        model,
        AutoNormal,
        args=(Y,),
        objective=pplvi.ForwardKL(num_particles=16),
        monitor=pplvi.ELBO(num_particles=4),
        optim=partial(torch.optim.Adam, lr=0.1),
        num_steps=6000,
        stop=Plateau(min_steps=640, every=40, patience=2),
    )
    assert result.reasons == ["converged"]
    run = result.runs[0]
    assert len(run.monitored) == run.step // 10


def test_watching_changes_nothing():
    options = {"args": (Y,), "num_steps": 35, "objective": Trace_ELBO()}
    watched = fit(model, AutoNormal, monitor=Trace_ELBO(num_particles=2), **options)
    assert (watched.losses == fit(model, AutoNormal, **options).losses).all()
    assert len(watched.runs[0].monitored) == 3


def test_held_back_data_choose_the_best():
    def bad_in_restart_0(run):
        if run.index == 0:
            pyro.param("AutoNormal.locs.loc").data.fill_(5.0)

    result = fit(
        model,
        AutoNormal,
        args=(Y,),
        monitor=Monitor(held_back=(Y + 0.1,)),
        num_steps=50,
        restarts=2,
        callbacks=[bad_in_restart_0],
    )
    scores = [run.score for run in result.runs]
    assert result.best == 1
    short = fit(model, AutoNormal, args=(Y,), monitor=Monitor(held_back=(Y,)), num_steps=3)
    assert short.runs[0].score == short.runs[0].monitored[0]
    assert scores[0] > scores[1] + 10


# --- losses that are not numbers ---


def fragile(y, edge=1.0):
    """Its density is not a number once ``loc`` is above the edge."""
    loc = pyro.sample("loc", dist.Normal(0.0, 10.0))
    pyro.factor("cliff", torch.where(loc > edge, math.nan, 2.0 * loc))


def at_zero(model):
    return AutoDelta(model, init_loc_fn=init_to_value(values={"loc": torch.tensor(0.0)}))


def test_a_bad_loss_takes_training_back_and_halves_the_learning_rate():
    sgd = partial(torch.optim.SGD, lr=0.3)
    with pytest.warns(UserWarning, match="halved the learning rate") as record:
        result = fit(fragile, at_zero, args=(Y,), objective=Trace_ELBO(), optim=sgd, num_steps=4, callbacks=[])
    backs = [w for w in record if "Went back to step 0" in str(w.message)]
    assert result.runs[0].rollbacks == len(backs) >= 1
    assert len(result.runs[0].losses) == 4
    assert all(map(math.isfinite, result.runs[0].losses))


@pytest.mark.filterwarnings("ignore:.*:UserWarning")
def test_the_error_names_the_first_site_at_fault():
    with pytest.raises(ValueError, match="'cliff'") as error:
        fit(fragile, at_zero, args=(Y, 1e-4), objective=Trace_ELBO(), optim=partial(torch.optim.SGD, lr=0.3))
    assert f"after {loop.MAX_ROLLBACKS} returns" in str(error.value)


@pytest.mark.filterwarnings("ignore:.*:UserWarning")
@pytest.mark.parametrize("objective", [Trace_ELBO(), pplvi.ELBO()])
def test_a_model_that_is_never_finite_says_where(objective):
    def broken(y):
        loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
        pyro.factor("penalty", loc * math.nan)

    with pytest.raises(ValueError, match="'penalty'"):
        fit(broken, AutoNormal, args=(Y,), objective=objective, num_steps=20)


@pytest.mark.filterwarnings("ignore:.*:UserWarning")
def test_finished_restarts_are_not_lost_in_an_error():
    def break_later(run):
        if run.index == 1:
            pyro.param("AutoNormal.locs.loc").data.fill_(math.nan)

    with pytest.raises(loop.TrainingError, match="restart 1") as error:
        fit(model, AutoNormal, args=(Y,), num_steps=10, restarts=3, callbacks=[break_later])
    assert [run.reason for run in error.value.runs] == ["num_steps"]
    assert torch.isfinite(error.value.runs[0].params["AutoNormal.locs.loc"])


def test_a_gradient_that_is_no_number_is_found_too():
    bad = {"left": 1}

    def model(y):
        loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
        if bad["left"] and training_step() == 3:
            bad["left"] -= 1
            pyro.factor("sqrt", 0.0 * torch.sqrt(loc - loc.detach()))  # value 0, gradient not a number
        with pyro.plate("data", len(y)):
            pyro.sample("y", dist.Normal(loc, 1.0), obs=y)

    calls = []
    training_step = lambda: len(calls)  # noqa: E731
    with pytest.warns(UserWarning, match="halved the learning rate"):
        result = fit(
            model,
            AutoNormal,
            args=(Y,),
            objective=Trace_ELBO(),
            num_steps=60,
            optim=adam(),
            callbacks=[lambda run: calls.append(run.step)],
        )
    assert result.runs[0].rollbacks == 1
    assert all(map(math.isfinite, result.runs[0].losses))
    assert all(torch.isfinite(p).all() for p in result.params[0].values())


def test_mistakes_are_raised_at_once():
    def broken(y, calls=[]):  # noqa: B006
        calls.append(1)
        loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
        if len(calls) > 5:
            raise ValueError("a mistake of the user")
        pyro.factor("f", loc)

    with pytest.raises(ValueError, match="a mistake of the user"):
        fit(broken, AutoNormal, args=(Y,), objective=Trace_ELBO(), num_steps=20)


def test_losses_that_are_tensors_are_read_late(monkeypatch):
    def many(self, calls):
        return [torch.tensor(loss, dtype=torch.float64) for loss in floats(self, calls)]

    floats = EagerStepper.many
    options = {"args": (Y,), "num_steps": 120, "objective": Trace_ELBO(), "optim": adam()}
    expected = fit(model, AutoNormal, **options).losses
    monkeypatch.setattr(EagerStepper, "many", many)
    kinds = []
    result = fit(model, AutoNormal, **options, callbacks=[lambda run: kinds.append(type(run.losses[-1])) and None])
    assert kinds.count(torch.Tensor) > 100
    assert (result.losses == expected).all()
