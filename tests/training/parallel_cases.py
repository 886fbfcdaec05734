"""Fits that any number of ranks has to do alike, each a function of the parallel options to what came out."""

import os
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro.infer.autoguide import AutoDelta, AutoMultivariateNormal, AutoNormal
from pyro.infer.autoguide.initialization import init_to_feasible
from pyro.poutine.messenger import Messenger
from torch import Tensor
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

import pplvi
from pplvi.energies import PersistentChains
from pplvi.fitting import Checkpoint
from pplvi.programs.ranks import Processes, join
from pplvi.training import Monitor

ROWS, PARTICLES = 11, 4
_RANDOM = torch.Generator().manual_seed(0)
X = torch.randn(ROWS, 3, generator=_RANDOM, dtype=torch.float64)
Y = X @ torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64) + 0.3
NOISE = torch.randn(PARTICLES, ROWS, generator=_RANDOM, dtype=torch.float64)  # of local latents, the same on any rank
ROW = torch.arange(ROWS)
ALL = (X, Y, ROW)


class Noise(Messenger):
    """Draws of local latents whose noise belongs to the row."""

    def __init__(self, rows: Tensor) -> None:
        super().__init__()
        self.rows = rows

    def _pyro_sample(self, msg: Any) -> None:
        if msg["name"] == "z" and msg["value"] is None and not msg["done"]:
            noise = NOISE[:, self.rows] if len(msg["fn"].batch_shape) > 1 else NOISE[0, self.rows]
            msg["value"], msg["done"] = msg["fn"].loc + msg["fn"].scale * noise, True


def regression(x, y, rows):
    w = pyro.sample("w", dist.Normal(torch.zeros(3), 1.0).to_event(1))
    s = pyro.param("s", torch.tensor(1.0), constraint=dist.constraints.positive)
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Normal((x * w.unsqueeze(-2)).sum(-1), s), obs=y)


def factors(x, y, rows):
    slope = pyro.param("slope", torch.tensor(0.3))
    with pyro.plate("data", len(y)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(slope * z + x[:, 0], 1.0), obs=y)


def amortised(x, y, rows):
    a, b = pyro.param("a", torch.tensor([0.2, -0.1, 0.3])), pyro.param("b", torch.tensor(-0.5))
    with pyro.plate("data", len(y)), Noise(rows):
        pyro.sample("z", dist.Normal(x @ a, b.exp()))


def both(x, y, rows):
    w = pyro.sample("w", dist.Normal(torch.zeros(3), 1.0).to_event(1))
    with pyro.plate("data", len(y)):
        z = pyro.sample("z", dist.Normal((x * w.unsqueeze(-2)).sum(-1), 1.0))
        pyro.sample("y", dist.Normal(z, 0.5), obs=y)


def both_guide(x, y, rows):
    loc, scale = pyro.param("loc", torch.zeros(3)), pyro.param("scale", torch.full((3,), -1.0)).exp()
    pyro.sample("w", dist.Normal(loc, scale).to_event(1))
    amortised(x, y, rows)


def fitted(model: Any, guide: Any, parallel: Any, **options: Any) -> dict[str, Any]:
    """What is left of a short fit."""
    options = {
        "optim": partial(torch.optim.SGD, lr=0.002),
        "args": ALL,
        "num_steps": 3,
        "seed": 0,
        "progress": False,
        "dtype": torch.float64,
        **options,
    }
    fit = pplvi.fit(model, guide, parallel=parallel, **options)
    return {**{n: p.numpy() for n, p in fit.runs[0].params.items()}, "losses": fit.losses[0]}


def minibatch(x, y, rows):
    w = pyro.sample("w", dist.Normal(torch.zeros(3), 1.0).to_event(1))
    with pyro.plate("data", ROWS, subsample_size=len(y)):
        pyro.sample("y", dist.Normal((x * w.unsqueeze(-2)).sum(-1), 0.7), obs=y)


def loader(size: int) -> DataLoader[Any]:
    """Shuffled batches, the last of which is shorter."""
    return DataLoader(TensorDataset(*ALL), batch_size=size, shuffle=True)


def base(x, y, rows):
    pyro.sample("w", dist.Normal(pyro.param("w0", torch.zeros(3)), 1.0).to_event(1))


def ahead(previous, x, y, rows):
    pull = pyro.param("pull", torch.tensor(0.6))
    with pyro.plate("data", len(y)), Noise(rows):
        pyro.sample("z", dist.Normal(pull * previous["z"] + 0.1 * x[:, 0], 0.8))


def back(previous, x, y, rows):
    push = pyro.param("push", torch.tensor(0.5))
    with pyro.plate("data", len(y)):
        pyro.sample("z", dist.Normal(push * previous["z"], 0.9))


def annealed(model: Any, base: Any, parallel: Any, **options: Any) -> dict[str, Any]:
    """Nested variational inference along a path of two levels."""
    guide = pplvi.AnnealedGuide(model, base, 2, pplvi.ResidualKernel(), learn_path=True)
    return fitted(model, guide, parallel, **options)


STATES = torch.rand(6, 4, generator=_RANDOM, dtype=torch.float64).round()
ROWS_OF_UNITS = torch.rand(7, 4, generator=_RANDOM, dtype=torch.float64).round()


@dataclass(frozen=True)
class GivenChains(PersistentChains):
    """Chains whose moves are not random: every rank has its part of the same six."""

    first: int = 0

    def move(self, machine: Any, data: Any, advance: bool) -> dict[str, Tensor]:
        """Mean-field sweeps of the visible units."""
        with torch.no_grad():
            v = STATES[self.first :: 6 // self.num_chains]
            h = machine.layers["h"].mean(machine.field("h", {"v": v}))
            return {"v": machine.layers["v"].mean(machine.field("v", {"h": h}))}


def machine(parallel: Any, negative: Any = None) -> dict[str, Any]:
    """Persistent contrastive divergence of a centered machine."""
    pyro.set_rng_seed(1)
    rbm = pplvi.RestrictedBoltzmannMachine(4, 3)
    ranks = join() if parallel != ALONE else Processes()
    negative = GivenChains(6 // ranks.size, first=ranks.rank) if negative is None else negative
    found = fitted(
        rbm.model, rbm.guide, parallel, args=(ROWS_OF_UNITS,), objective=pplvi.BoltzmannELBO(negative=negative)
    )
    return {**found, **{n: b.numpy() for n, b in rbm.named_buffers() if n.startswith("offset")}}


FULL, ALONE = pplvi.fitting.DataParallel(shard=True), "none"
MODELS = {"global": (regression, AutoMultivariateNormal), "local": (factors, amortised), "both": (both, both_guide)}
OBJECTIVES = {
    "ELBO": pplvi.ELBO(PARTICLES),
    "vimco": pplvi.ImportanceWeightedELBO(PARTICLES, estimator="vimco"),
    "IWAE": pplvi.ImportanceWeightedELBO(PARTICLES),
    "dreg": pplvi.ImportanceWeightedELBO(PARTICLES, estimator="dreg"),
    "Renyi": pplvi.RenyiELBO(0.5, PARTICLES),
    "chi": pplvi.ChiELBO(PARTICLES),
    "RWS": pplvi.ReweightedWakeSleep(PARTICLES),
    "sum": pplvi.ELBO(PARTICLES) + 0.5 * pplvi.ForwardKL(PARTICLES),
}
CHOSEN = {
    "global": ("ELBO", "vimco", "IWAE", "Renyi", "RWS"),
    "local": ("ELBO", "IWAE"),
    "both": ("IWAE", "dreg", "chi", "sum"),
}
CASES: dict[str, Callable[[Any], dict[str, Any]]] = {
    f"{latents}, {name}": partial(fitted, *MODELS[latents], objective=OBJECTIVES[name])
    for latents, names in CHOSEN.items()
    for name in names
}


def factors_in_minibatches(x, y, rows):
    with pyro.plate("data", ROWS, subsample_size=len(y)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(pyro.param("slope", torch.tensor(0.3)) * z + x[:, 0], 1.0), obs=y)


def amortised_in_minibatches(x, y, rows):
    loc = x @ pyro.param("a", torch.tensor([0.2, -0.1, 0.3]))
    with pyro.plate("data", ROWS, subsample_size=len(y)), Noise(rows):
        pyro.sample("z", dist.Normal(loc, 0.6))


IN_MINIBATCHES = factors_in_minibatches, amortised_in_minibatches
NVI = pplvi.NestedELBO(num_particles=4)
FORWARD_NVI = pplvi.NestedELBO("forward_kl", 4, resample=True)
CASES |= {
    "global, NVI": partial(annealed, regression, base, objective=NVI),
    "global, NVI forward": partial(annealed, regression, base, objective=FORWARD_NVI),
    "local, NVI": lambda parallel: fitted(
        factors, pplvi.NestedGuide(amortised, [(factors, ahead, back)]), parallel, objective=NVI
    ),
    "PCD": machine,
    "exact": partial(machine, negative="exact"),
    "minibatches": partial(fitted, minibatch, AutoNormal, data=loader(4), args=()),
    "fewer rows than ranks": partial(fitted, minibatch, AutoNormal, data=loader(5), args=()),
    "local minibatches, IWAE": lambda parallel: fitted(
        factors_in_minibatches,
        amortised_in_minibatches,
        parallel,
        data=loader(5),
        args=(),
        objective=OBJECTIVES["IWAE"],
    ),
    "recorded": partial(fitted, regression, AutoNormal, compile="trace", objective=pplvi.ImportanceWeightedELBO(3)),
    "recorded minibatches": partial(fitted, minibatch, AutoNormal, data=loader(5), args=(), compile="trace"),
    "adaptive": partial(fitted, regression, AutoNormal, optim=None, num_steps=8),
}


def rank_of(parallel: Any) -> int:
    """The rank that a case runs on, 0 alone."""
    return join().rank if parallel != ALONE else 0


def broken(parallel: Any, kind: str, **options: Any) -> dict[str, Any]:
    """A fit in which one rank, or one process alone, meets numbers that are none at one of its steps."""
    steps = [0]

    def model(x, y, rows):
        bad = steps.count(5) == 1 and steps[-1] == 5 and 0 in rows
        if bad:
            steps.append(0)
        w = pyro.sample("w", dist.Normal(torch.zeros(3), 1.0).to_event(1))
        with pyro.plate("data", len(y)):
            scale = x.new_tensor(torch.nan if bad and kind == "error" else 0.7)
            pyro.sample("y", dist.Normal((x * w).sum(-1), scale), obs=y)
            pyro.factor("penalty", torch.full((len(y),), torch.nan if bad and kind == "loss" else 0.0))

    options |= {"callbacks": [lambda run: steps.append(run.step)], "dtype": torch.float64, "parallel": parallel}
    fit = pplvi.fit(model, AutoNormal, args=ALL, num_steps=8, seed=0, progress=False, **options)
    run = fit.runs[0]
    return {"rollbacks": run.rollbacks, "steps": run.step, **{n: p.numpy() for n, p in run.params.items()}}


def stopped(parallel: Any) -> dict[str, Any]:
    """A callback on the last rank ends the training of all."""
    last = parallel == ALONE or join().rank == join().size - 1
    return fitted(regression, AutoNormal, parallel, callbacks=[lambda run: last and run.step == 2])


def interrupted(parallel: Any, press: Callable[[], Any]) -> dict[str, Any]:
    """Ctrl-C on the last rank, which alone has a callback, ends all at the same step."""

    def after_second(run: Any) -> None:
        if run.step == 2:
            press()

    last = parallel == ALONE or join().rank == join().size - 1
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # shells let background jobs ignore it
    try:
        return fitted(regression, AutoNormal, parallel, callbacks=[after_second] if last else [])
    finally:
        signal.signal(signal.SIGINT, before)


class Interrupting(torch.optim.SGD):
    """Presses Ctrl-C in the last of three steps on the last rank."""

    def step(self, closure: Any = None) -> None:
        super().step()
        self.defaults["taken"] = self.defaults.get("taken", 0) + 1
        if self.defaults["taken"] == 3 and join().rank == join().size - 1:
            press_control_c()


def interrupted_last() -> str:
    """Why a fit has ended in whose last step one rank was interrupted."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        options = {"args": ALL, "num_steps": 3, "parallel": FULL, "optim": Interrupting, "progress": False}
        fit = pplvi.fit(regression, AutoNormal, **options)
        return f"{fit.reasons[0]} after {fit.runs[0].step}"
    finally:
        signal.signal(signal.SIGINT, before)


def press_control_c() -> None:
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(0.001)  # Python handles it before the next one comes


def raise_interrupt() -> None:
    raise KeyboardInterrupt


def started_apart(parallel: Any) -> dict[str, Any]:
    """A module whose first weights are other ones on every rank."""
    torch.manual_seed(rank_of(parallel))
    net = torch.nn.Linear(3, 1, dtype=torch.float64)

    def model(x, y, rows):
        pyro.module("net", net)
        with pyro.plate("data", len(y)):
            z = pyro.sample("z", dist.Normal(net(x).squeeze(-1), 1.0))
            pyro.sample("y", dist.Normal(z, 1.0), obs=y)

    return fitted(model, amortised, parallel)


def checkpointed(parallel: Any, path: Any = None, dies: bool = False, **options: Any) -> dict[str, Any]:
    """A fit that writes a checkpoint every four steps, and may be killed in the seventh."""
    steps = [0]

    def model(x, y, rows):
        if dies and steps[-1] == 6:
            os.kill(os.getpid(), signal.SIGKILL)
        minibatch(x, y, rows)

    options |= {"checkpoint": None if path is None else Checkpoint(path, every=4)}
    watching = [lambda run: steps.append(run.step)]
    return fitted(model, AutoNormal, parallel, data=loader(5), args=(), num_steps=10, callbacks=watching, **options)


def without_plate(x, y, rows):
    w = pyro.sample("w", dist.Normal(torch.zeros(3), 1.0).to_event(1))
    pyro.sample("y", dist.Normal(x.float() @ w, 1.0).to_event(1), obs=y.float())


def with_factor(x, y, rows):
    w = pyro.sample("w", dist.Normal(torch.zeros(3), 1.0).to_event(1))
    pyro.factor("rows", -(x.float() @ w).square().sum())
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Normal(0.0, 1.0), obs=y.float())


def grouped(x, y, rows):
    loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(y)):
        z = pyro.sample("z", dist.Normal(loc, 0.5))
        pyro.sample("y", dist.Normal(z, 0.5), obs=y)


CASES |= {
    "NaN in the loss": partial(broken, kind="loss"),
    "NaN in a program": partial(broken, kind="error"),
    "NaN in a program, monitored": partial(broken, kind="error", monitor=Monitor(every=1)),
    "callback": stopped,
    "starts": started_apart,
    "rows of parameters": partial(
        fitted, grouped, partial(AutoDelta, init_loc_fn=init_to_feasible), optim=None, num_steps=8
    ),
    "monitor": partial(fitted, regression, AutoNormal, monitor=pplvi.ImportanceWeightedELBO(4)),
}


TWELVE = TensorDataset(*(torch.cat([x, x[:1]]) for x in ALL))


def sampled(parallel: Any) -> dict[str, Any]:
    """Two epochs of a loader whose sampler gives every rank its rows."""
    alone = parallel == ALONE
    size = {"num_replicas": 1, "rank": 0} if alone else {}
    sampler: Any = DistributedSampler(TWELVE, shuffle=True, seed=0, **size)
    data = DataLoader(TWELVE, batch_size=6 if alone else 6 // join().size, sampler=sampler)
    return fitted(minibatch, AutoNormal, parallel, data=data, args=(), num_steps=4)


def chains(parallel: Any) -> dict[str, Any]:
    """Three chains, whoever runs them."""
    kernel = partial(pyro.infer.NUTS, max_tree_depth=2)
    options: dict[str, Any] = {"num_steps": 6, "num_warmup": 4, "restarts": 3, "seed": 0, "progress": False}
    options |= {"dtype": torch.float64, "parallel": ALONE if parallel == ALONE else None}
    mcmc = pplvi.fit(regression_of_one, kernel, args=ALL, **options).mcmc
    told = mcmc.diagnostics()
    return {
        "draws": mcmc.get_samples(group_by_chain=True)["w"].numpy(),
        "r_hat": told["w"]["r_hat"].numpy(),
        "acceptance": [told["acceptance rate"][f"chain {chain}"] for chain in range(3)],
    }


def regression_of_one(x, y, rows):
    w = pyro.sample("w", dist.Normal(torch.zeros(3), 1.0).to_event(1))
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Normal((x * w.unsqueeze(-2)).sum(-1), 1.0), obs=y)


def islands(parallel: Any) -> dict[str, Any]:
    """Particles whose densities the ranks share."""
    options: dict[str, Any] = {"seed": 0, "dtype": torch.float64, "parallel": ALONE if parallel == ALONE else None}
    method = pplvi.TemperedSMC(num_particles=16, num_islands=2, max_moves=1, max_kept=1, max_leapfrog=2)
    fit = pplvi.fit(regression_of_one, method, args=ALL, init="pathfinder", num_steps=16, progress=False, **options)
    found = fit.islands
    return {
        "draws": found.latents["w"].numpy(),
        "evidence": found.found.log_evidence.numpy(),
        "end": fit.reasons == ["done"],
    }


def restarts(parallel: Any, guide: Any = AutoNormal, **options: Any) -> dict[str, Any]:
    """Restarts that the ranks share."""
    options |= {"num_steps": 5, "restarts": 3, "seed": 0, "progress": False, "dtype": torch.float64}
    kept = ALONE if parallel == ALONE else "restarts"
    fit = pplvi.fit(regression_of_one, guide, args=ALL, parallel=kept, **options)
    found: dict[str, Any] = {"losses": fit.losses, "best": fit.best, "reasons": [len(reason) for reason in fit.reasons]}
    for run in fit.runs:
        found |= {f"{name} of {run.index}": p.numpy() for name, p in run.params.items()}
        with run.scope():
            found[f"median of {run.index}"] = run.guide.median(*ALL)["w"].detach().numpy()
    return found


CASES |= {
    "Ctrl-C": partial(interrupted, press=press_control_c),
    "Ctrl-C in a callback": partial(interrupted, press=raise_interrupt),
    "samplers": sampled,
    "chains": chains,
    "islands": islands,
    "restarts": restarts,
    "restarts of a search": partial(restarts, guide=partial(pplvi.AutoPathfinder, num_paths=2)),
    "restarts, recorded": partial(restarts, compile="trace"),
}


def drawn(num_draws: int, seed: int, **options: Any) -> dict[str, Any]:
    """Draws of a guide, and their weights."""

    def guide(x, y, rows):
        pyro.sample("w", dist.Normal(torch.full((3,), 0.1, dtype=torch.float64), 0.5).to_event(1))

    found = pplvi.Posterior(regression_of_one, guide, ALL, num_draws=num_draws, seed=seed, **options)
    return {"w": found.draws.latents["w"].numpy(), "weights": found.log_weight.numpy()}


def refusals() -> dict[str, str]:
    """What is said of fits that several ranks cannot share."""
    own = tuple(x + join().rank for x in ALL)
    calls: dict[str, Callable[[], Any]] = {
        "every rank would do the whole": lambda: pplvi.fit(regression_of_one, "auto", args=ALL),
        "ExpectationMaximization on": lambda: pplvi.fit(factors, pplvi.ExpectationMaximization(), args=ALL),
        "checkpoint= and resume=": lambda: pplvi.fit(
            regression_of_one, AutoNormal, args=ALL, restarts=2, parallel="restarts", checkpoint="run.pt"
        ),
        "different data or seeds": lambda: pplvi.fit(regression_of_one, "nuts", args=own),
        "only here": lambda: join().each(one_bad_rank),
    }
    found = {}
    for words, call in calls.items():
        try:
            call()
        except Exception as error:
            found[words] = str(error)
    return found


def one_bad_rank() -> None:
    if join().rank == 1:
        raise KeyError("only here")
