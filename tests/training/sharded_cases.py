"""Fits whose networks FSDP2 holds in parts, one on each rank, or whole in one process."""

import errno
import os
import signal
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import parallel_cases as cases
import pyro
import pyro.distributions as dist
import torch
from pyro.infer.autoguide import AutoDelta, AutoNormal
from pyro.nn.module import to_pyro_module_
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

import pplvi
from pplvi.fitting import Checkpoint, DataParallel
from pplvi.programs.ranks import join
from pplvi.training import shards

PARTICLES = cases.PARTICLES
IWAE = pplvi.ImportanceWeightedELBO(PARTICLES)


def mesh() -> Any:
    return init_device_mesh("cpu", (join().size,))


def network(parallel: Any, inputs: int, outputs: int) -> torch.nn.Module:
    """A small network; on ranks, in two groups of parts, some of them empty."""
    torch.manual_seed(3)
    net = torch.nn.Sequential(torch.nn.Linear(inputs, 5), torch.nn.Tanh(), torch.nn.Linear(5, outputs)).double()
    if parallel != cases.ALONE:
        fully_shard(net[0], mesh=mesh())
        fully_shard(net, mesh=mesh())
    return net


def whole(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def fitted(model: Any, guide: Any, parallel: Any, **options: Any) -> dict[str, Any]:
    """What is left of a short fit by Adam, and what its guide says then."""
    options = {"args": cases.ALL, "num_steps": 6, "seed": 0, "progress": False, "dtype": torch.float64, **options}
    fit = pplvi.fit(model, guide, parallel=parallel, **options)
    run = fit.runs[0]
    found = {name: whole(p).numpy() for name, p in run.params.items()}
    return {**found, "losses": fit.losses[0], "rollbacks": run.rollbacks, "monitored": run.monitored}


def autoencoder(parallel: Any, data: Any = None, broken: bool = False, **options: Any) -> dict[str, Any]:
    """Encoder and decoder; broken, the guide of one rank fails once, before the decoder gathers its parts."""
    encoder, decoder = network(parallel, 3, 2), network(parallel, 1, 3)
    steps = [0]

    def model(x, y, rows):
        pyro.module("decoder", decoder)
        with pyro.plate("data", cases.ROWS, subsample_size=len(y)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(decoder(z.unsqueeze(-1)), 1.0).to_event(1), obs=x)

    def guide(x, y, rows):
        pyro.module("encoder", encoder)
        bad = broken and steps[-1] == 3 and steps.count(3) == 1 and 0 in rows
        if bad:
            steps.append(0)
        with pyro.plate("data", cases.ROWS, subsample_size=len(y)), cases.Noise(rows):
            found = encoder(x)
            scale = found[..., 1].exp() * (torch.nan if bad else 1.0)
            pyro.sample("z", dist.Normal(found[..., 0], scale))

    options |= {"callbacks": [lambda run: steps.append(run.step)], "data": data, "args": () if data else cases.ALL}
    return fitted(model, guide, parallel, **options)


def regression(parallel: Any, carried: bool = False, **options: Any) -> dict[str, Any]:
    """Latents outside of the plate, that go through a network; one that takes no particles if they are carried."""
    net = network(parallel, 3, 1)

    def model(x, y, rows):
        pyro.module("net", net)
        w = pyro.sample("w", dist.Normal(torch.zeros(3), 1.0).to_event(1))
        f = net(x * (w if carried else w.unsqueeze(-2))).squeeze(-1)
        with pyro.plate("data", len(y)):
            pyro.sample("y", dist.Normal(f, 1.0), obs=y)

    return fitted(model, AutoNormal, parallel, **{"objective": IWAE, **options})


def amortised(parallel: Any) -> dict[str, Any]:
    """A guide that calls its encoder itself."""
    encoder = network(parallel, 3, 1)

    def model(x, y, rows):
        scale = pyro.sample("scale", dist.LogNormal(0.0, 1.0))
        with pyro.plate("data", len(y)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("y", dist.Normal(z, scale), obs=y)

    return fitted(model, lambda model: pplvi.AutoAmortized(model, encoder, "data", family="delta"), parallel)


CASES: dict[str, Callable[[Any], dict[str, Any]]] = {
    "inside": autoencoder,
    "inside, IWAE": partial(autoencoder, objective=IWAE),
    "minibatches with fewer rows than ranks": partial(autoencoder, data=cases.loader(5), objective=IWAE),
    "outside": regression,
    "outside, clipped": partial(regression, clip=0.5),
    "outside, Pyro's optimiser": partial(regression, optim=pyro.optim.ClippedAdam({"lr": 0.01})),
    "carried": partial(regression, carried=True),
    "looped": partial(regression, carried=True, vectorize="loop"),
    "monitored": partial(regression, monitor=pplvi.training.Monitor(every=2)),
    "an amortised guide": amortised,
    "NaN on one rank": partial(autoencoder, broken=True),
}


def saved(
    parallel: Any, path: Path | None = None, dies: bool = False, full: bool = False, **options: Any
) -> dict[str, Any]:
    """A fit that saves every four steps; a rank may be killed in the second save, or the disk of the last be full."""
    sums, saves = shards._own_sums, []

    def summed(*arguments: Any) -> Any:
        saves.append(arguments)
        if dies and len(saves) == 2:
            os.kill(os.getpid(), signal.SIGKILL)
        if full and join().rank == join().size - 1:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return sums(*arguments)

    options |= {} if path is None else {"checkpoint": Checkpoint(path, every=4)}
    with patch.object(shards, "_own_sums", summed):
        return regression(parallel, num_steps=10, **options)


def refusals(folder: Path) -> dict[str, str]:
    """What is said of fits with parts that cannot be trained."""
    held = [network(cases.FULL, 3, 1)]
    strange = torch.nn.Linear(3, 1, dtype=torch.float64)
    to_pyro_module_(strange)
    fully_shard(strange, mesh=mesh())
    alone = torch.nn.Linear(3, 1, dtype=torch.float64)
    fully_shard(alone, mesh=init_device_mesh("cpu", (join().size, 1), mesh_dim_names=("a", "b")))
    net = network(cases.FULL, 3, 1)

    def with_module(module: torch.nn.Module) -> Any:
        return lambda x, y, rows: likelihood(module, x, y)

    def likelihood(module, x, y):
        pyro.module("net", module)
        with pyro.plate("data", len(y)):
            pyro.sample("y", dist.Normal(module(x).squeeze(-1), 1.0), obs=y)

    def rowed(x, y, rows):
        with pyro.plate("rows", len(y)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
        likelihood(net, x, y + z)

    fit = partial(pplvi.fit, args=cases.ALL, num_steps=2, progress=False, dtype=torch.float64)
    train = partial(fit, with_module(net), AutoNormal)
    calls: dict[str, Callable[[], Any]] = {
        "not seen from outside": lambda: fit(
            lambda x, y, rows: likelihood(held[0], x, y), AutoNormal, parallel=cases.FULL
        ),
        "are PyroModules": lambda: fit(with_module(strange), AutoNormal, parallel=cases.FULL),
        "one dimension of all": lambda: fit(with_module(alone), AutoNormal, parallel=cases.FULL),
        "compile='trace' with modules": lambda: train(compile="trace", parallel=cases.FULL),
        "restarts=2 with modules": lambda: train(restarts=2, parallel=cases.FULL),
        "parallel='none' with modules": lambda: train(parallel="none"),
        "parallel='restarts' with modules": lambda: train(parallel="restarts"),
        "parallel=None with modules": lambda: fit(with_module(net), "nuts"),
        "have rows for single data": lambda: fit(rowed, AutoDelta, parallel=cases.FULL),
        "before fully_shard": lambda: fit(net, AutoNormal, parallel=cases.FULL, dtype=torch.float32),
        "which one file cannot hold": lambda: train(parallel=cases.FULL).save(folder / f"{join().rank}.pplvi"),
        "torch.float64 in parts here": lambda: regression(cases.FULL, resume=folder / "whole.pt"),
    }
    said = {}
    for words, call in calls.items():
        try:
            call()
        except Exception as error:
            said[words] = str(error)
    return said


def of_one_rank(folder: Path) -> dict[str, Any]:
    """A group of one rank, over which modules are sharded."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/one", rank=0, world_size=1)
    return regression(DataParallel(shard=True), checkpoint=folder / "one.pt")
