"""Milliseconds a training step, seconds of compilation, and seconds to a converged fit, beside Pyro and NumPyro.

Every way of training takes the same steps (Adam, the same model, guide and number of particles) in a process of its
own with one thread. CPU and wall time of a step are medians over chunks; compilation is the first call, with an empty
cache of inductor (cold) and again with the one that it left (warm), compilers' processes included in the CPU time.
"Converged" is the wall time from the call to the first step at which the ELBO is within 0.1 nat of the family's best.
NumPyro takes part where it is installed (pip install -c constraints.txt -e '.[bench]'). The annealing ring joins with
the annealed guides.

    python benchmarks/speed.py --out speed.json --data ../shared/data/targets/ionosphere.npz
"""

import argparse
import importlib.util
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from time import perf_counter, process_time
from typing import Any

import pyro
import pyro.distributions as dist
import pyro.infer
import torch
from pyro.infer.autoguide import AutoMultivariateNormal, AutoNormal
from torch import Tensor, nn

from pplvi.compile import CompiledSVI
from pplvi.elbo import ELBO

LR, NETWORK_LR = 0.02, 1e-3
BLOCK = 100  # steps between two looks at the ELBO, and in one call where a way takes several
MAX_STEPS = 6000
CHUNK_SECONDS, CHUNKS = 0.3, 7
WAYS = ("pyro", "pyro jit", "eager", "trace", "compiled", "max", "numpyro", "bare torch")

Advance = Callable[[int], Any]


# ---------------------------------------------------------------------- problems


def eight_schools(y: Tensor, sigma: Tensor) -> None:
    mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
    tau = pyro.sample("tau", dist.HalfCauchy(5.0))
    with pyro.plate("schools", 8):
        effect = pyro.sample("effect", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(mu + tau * effect, sigma), obs=y)


SCHOOLS = (
    torch.tensor([28.0, 8.0, -3.0, 7.0, -1.0, 1.0, 18.0, 12.0]),
    torch.tensor([15.0, 10.0, 16.0, 11.0, 9.0, 11.0, 10.0, 18.0]),
)


def logistic(x: Tensor, y: Tensor) -> None:
    weights = pyro.sample("weights", dist.Normal(torch.zeros(x.shape[1]), 1.0).to_event(1))
    logits = weights @ x.T if weights.dim() == 1 else (weights @ x.T).squeeze(-2)  # particles have a plate of their own
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Bernoulli(logits=logits), obs=y)


def regression_data(path: str | None) -> tuple[Tensor, Tensor]:
    """The columns of a file with ``X`` and ``y``, standardised, and a constant; or 350 simulated rows of 35."""
    if path is None:
        g = torch.Generator().manual_seed(0)
        x = torch.randn(350, 35, generator=g)
        return x, torch.bernoulli((x @ torch.randn(35, generator=g)).sigmoid(), generator=g)
    import numpy as np

    with np.load(path) as file:
        x, y = (torch.as_tensor(file[name], dtype=torch.float32) for name in _names(file))
    x = x[:, x.std(0) > 0]
    return torch.cat([(x - x.mean(0)) / x.std(0), torch.ones(len(x), 1)], 1), (y > y.min()).float()


def _names(file: Any) -> tuple[str, str]:
    return next(k for k in file if file[k].ndim == 2), next(k for k in file if file[k].ndim == 1)


def hierarchical(x: Tensor, group: Tensor, y: Tensor) -> None:
    """2,000 rows in 20 groups, 100 of them at every step."""
    slope = pyro.sample("slope", dist.Normal(torch.zeros(5), 1.0).to_event(1))
    spread, noise = pyro.sample("spread", dist.HalfNormal(1.0)), pyro.sample("noise", dist.HalfNormal(1.0))
    level = pyro.sample("level", dist.Normal(torch.zeros(20), 1.0).to_event(1))
    with pyro.plate("data", len(y), subsample_size=100) as index:
        mean = x[index] @ slope + spread * level[group[index]]
        pyro.sample("y", dist.Normal(mean, noise), obs=y[index])


def hierarchical_data() -> tuple[Tensor, ...]:
    g = torch.Generator().manual_seed(1)
    x, group = torch.randn(2000, 5, generator=g), torch.randint(20, (2000,), generator=g)
    mean = x.sum(1) / 2 + torch.randn(20, generator=g)[group]
    return x, group, mean + 0.5 * torch.randn(2000, generator=g)


class Autoencoder(nn.Module):
    """784-400-20 and back."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.encoder = nn.Sequential(nn.Linear(784, 400), nn.Softplus(), nn.Linear(400, 40))
        self.decoder = nn.Sequential(nn.Linear(20, 400), nn.Softplus(), nn.Linear(400, 784))

    def model(self, x: Tensor) -> None:
        pyro.module("decoder", self.decoder)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(20), 1.0).to_event(1))
            pyro.sample("x", dist.Bernoulli(logits=self.decoder(z)).to_event(1), obs=x)

    def guide(self, x: Tensor) -> None:
        pyro.module("encoder", self.encoder)
        with pyro.plate("data", len(x)):
            loc, log_scale = self.encoder(x).chunk(2, -1)
            pyro.sample("z", dist.Normal(loc, log_scale.exp()).to_event(1))

    def bare_loss(self, x: Tensor) -> Tensor:
        loc, log_scale = self.encoder(x).chunk(2, -1)
        noise = torch.randn_like(loc)
        z = loc + log_scale.exp() * noise
        fit = nn.functional.binary_cross_entropy_with_logits(self.decoder(z), x, reduction="sum")
        return fit + (z**2 / 2 - noise**2 / 2 - log_scale).sum()


def hidden_markov(y: Tensor) -> None:
    """Three hidden states, summed out over 20 times."""
    move = pyro.sample("move", dist.Dirichlet(torch.ones(3, 3)).to_event(1))
    loc = pyro.sample("loc", dist.Normal(torch.tensor([-2.0, 0.0, 2.0]), 1.0).to_event(1))
    k: Any = 0
    for t in pyro.markov(range(len(y))):
        probs = move[..., k, :] if t == 0 else pyro.ops.indexing.Vindex(move)[..., k, :]
        k = pyro.sample(f"k{t}", dist.Categorical(probs), infer={"enumerate": "parallel"})
        pyro.sample(f"y{t}", dist.Normal(pyro.ops.indexing.Vindex(loc)[..., k], 0.5), obs=y[t])


def continuous_guide(model: Any) -> AutoNormal:
    return AutoNormal(pyro.poutine.block(model, expose=["move", "loc"]))


def problem(name: str, data: str | None) -> tuple[Any, Any, tuple[Any, ...], int]:
    """Model, guide, arguments and number of particles."""
    if name.startswith("schools"):
        guide = AutoMultivariateNormal if "full" in name else AutoNormal
        return eight_schools, guide(eight_schools), SCHOOLS, 100 if "100" in name else 1
    if name.startswith("logistic"):
        guide = AutoMultivariateNormal if "full" in name else AutoNormal
        return logistic, guide(logistic), regression_data(data), 100 if "100" in name else 1
    if name == "hierarchical":
        return hierarchical, AutoNormal(hierarchical), hierarchical_data(), 1
    if name == "vae":
        networks = Autoencoder()
        x = torch.bernoulli(torch.full((128, 784), 0.2), generator=torch.Generator().manual_seed(2))
        return networks.model, networks.guide, (x,), 1
    y = torch.randn(20, generator=torch.Generator().manual_seed(3)) * 0.5 + 2 * (torch.arange(20) % 3 - 1)
    return hidden_markov, continuous_guide(hidden_markov), (y,), 1


PROBLEMS = {
    "schools": "eight schools, AutoNormal, 1 particle",
    "schools 100": "eight schools, AutoNormal, 100 particles",
    "schools full": "eight schools, AutoMultivariateNormal, 1 particle",
    "logistic 100": "logistic regression 350 x 35, AutoNormal, 100 particles",
    "logistic full": "logistic regression 350 x 35, AutoMultivariateNormal, 1 particle",
    "hierarchical": "hierarchical regression, minibatches of 100 of 2,000",
    "vae": "VAE 784-400-20, batch of 128",
    "hmm": "hidden Markov model, 3 states, 20 times, enumerated",
}
TO_CONVERGENCE = ("schools 100", "logistic 100")


# ---------------------------------------------------------------------- ways


def start(way: str, name: str, data: str | None) -> tuple[Advance, Callable[[], float]]:
    """A function that takes steps, and one that estimates the ELBO."""
    if way == "numpyro":
        return numpyro_svi(name, data)
    pyro.clear_param_store()
    pyro.set_rng_seed(0)
    model, guide, args, particles = problem(name, data)

    def elbo() -> float:
        return many_particles(model, guide, args)

    if way == "bare torch":
        return bare_torch(model.__self__, *args), elbo
    optim = pyro.optim.Adam({"lr": NETWORK_LR if name == "vae" else LR})
    if way in ("trace", "compiled", "max"):
        mode: Any = True if way == "compiled" else way
        svi = CompiledSVI(model, guide, optim, ELBO(particles), mode=mode, chunk=BLOCK)
        return lambda n: svi.run(n, *args)[-1].item(), elbo
    loss = ELBO(particles) if way == "eager" else pyro_loss(way, name, particles)
    slow = pyro.infer.SVI(model, guide, optim, loss)
    return lambda n: [slow.step(*args) for _ in range(n)], elbo


def pyro_loss(way: str, name: str, particles: int) -> Any:
    kind = "TraceEnum_ELBO" if name == "hmm" else "Trace_ELBO"
    options = {"num_particles": particles, "vectorize_particles": particles > 1}
    nesting = {"hmm": 0}.get(name, 1)
    jit = {"ignore_jit_warnings": True} if way == "pyro jit" else {}
    make = getattr(pyro.infer, f"Jit{kind}" if jit else kind)
    return make(max_plate_nesting=nesting, **options, **jit)


def bare_torch(networks: Autoencoder, x: Tensor) -> Advance:
    optimizer = torch.optim.Adam(networks.parameters(), lr=NETWORK_LR)

    def steps(n: int) -> None:
        for _ in range(n):
            optimizer.zero_grad()
            loss = networks.bare_loss(x)
            loss.backward()
            optimizer.step()

    return steps


def numpyro_svi(name: str, data: str | None) -> tuple[Advance, Callable[[], float]]:
    """NumPyro's SVI, a block of steps in one ``lax.scan``."""
    import jax
    import numpyro
    import numpyro.distributions as ndist
    from numpyro.infer import SVI, Trace_ELBO, autoguide

    def schools(y: Any, sigma: Any) -> None:
        mu = numpyro.sample("mu", ndist.Normal(0.0, 5.0))
        tau = numpyro.sample("tau", ndist.HalfCauchy(5.0))
        with numpyro.plate("schools", 8):
            effect = numpyro.sample("effect", ndist.Normal(0.0, 1.0))
            numpyro.sample("y", ndist.Normal(mu + tau * effect, sigma), obs=y)

    def regression(x: Any, y: Any) -> None:
        weights = numpyro.sample("weights", ndist.Normal(jax.numpy.zeros(x.shape[1]), 1.0).to_event(1))
        with numpyro.plate("data", len(y)):
            numpyro.sample("y", ndist.Bernoulli(logits=x @ weights), obs=y)

    def levels(x: Any, group: Any, y: Any) -> None:
        slope = numpyro.sample("slope", ndist.Normal(jax.numpy.zeros(5), 1.0).to_event(1))
        spread, noise = (numpyro.sample(n, ndist.HalfNormal(1.0)) for n in ("spread", "noise"))
        level = numpyro.sample("level", ndist.Normal(jax.numpy.zeros(20), 1.0).to_event(1))
        with numpyro.plate("data", len(y), subsample_size=100) as index:
            mean = x[index] @ slope + spread * level[group[index]]
            numpyro.sample("y", ndist.Normal(mean, noise), obs=y[index])

    model = {"schools": schools, "logistic": regression, "hierarchical": levels}[name.split()[0]]
    _, _, args, particles = problem(name, data)
    arrays = tuple(jax.numpy.asarray(x.numpy()) for x in args)
    kind = autoguide.AutoMultivariateNormal if "full" in name else autoguide.AutoNormal
    guide = kind(model)
    svi = SVI(model, guide, numpyro.optim.Adam(LR), Trace_ELBO(num_particles=particles))
    state = svi.init(jax.random.PRNGKey(0), *arrays)

    @partial(jax.jit, static_argnums=1)
    def block(state: Any, n: int) -> Any:
        return jax.lax.scan(lambda s, _: svi.update(s, *arrays), state, None, length=n)

    def steps(n: int) -> None:
        nonlocal state
        for taken in [BLOCK] * (n // BLOCK) or [n]:
            state, losses = block(state, taken)
        losses.block_until_ready()

    def elbo() -> float:
        loss = Trace_ELBO(num_particles=20_000)
        return -float(loss.loss(jax.random.PRNGKey(1), svi.get_params(state), model, guide, *arrays))

    return steps, elbo


# ---------------------------------------------------------------------- measuring


def cpu() -> float:
    """Seconds of this process and of the compilers that it has waited for."""
    return sum(os.times()[:4])


def measure(way: str, name: str, data: str | None, best: float | None) -> dict[str, Any]:
    """One way on one problem: runs in a process of its own."""
    torch.set_num_threads(1)
    began, busy = perf_counter(), cpu()
    advance, elbo = start(way, name, data)
    advance(BLOCK if way in ("max", "numpyro") else 1)
    row: dict[str, Any] = {"first_call_wall": perf_counter() - began, "first_call_cpu": cpu() - busy}
    if best is not None:
        row["converged_wall"] = converged(advance, elbo, best, perf_counter() - began)
    return row | chunks(advance, BLOCK)


def converged(advance: Advance, elbo: Callable[[], float], best: float, seconds: float) -> float | None:
    for _ in range(MAX_STEPS // BLOCK):
        before = perf_counter()
        advance(BLOCK)
        seconds += perf_counter() - before
        if elbo() > best - 0.1:
            return seconds
    return None


def chunks(advance: Advance, n: int) -> dict[str, float]:
    """Medians over chunks that last long enough for the clock."""
    before = process_time()
    advance(n)
    n *= max(1, min(200, round(CHUNK_SECONDS / max(process_time() - before, 1e-4))))
    walls, cpus = [], []
    for _ in range(CHUNKS):
        wall, used = perf_counter(), process_time()
        advance(n)
        walls.append((perf_counter() - wall) / n * 1e3)
        cpus.append((process_time() - used) / n * 1e3)
    return {"cpu_ms": statistics.median(cpus), "wall_ms": statistics.median(walls)}


def best_elbo(name: str, data: str | None) -> float:
    """What the family reaches: a long run with a falling learning rate."""
    pyro.clear_param_store()
    pyro.set_rng_seed(0)
    model, guide, args, particles = problem(name, data)
    svi = CompiledSVI(model, guide, pyro.optim.Adam({"lr": LR}), ELBO(particles), schedule=lambda t: 0.9995**t)
    svi.run(10_000, *args)
    return many_particles(model, guide, args)


def many_particles(model: Any, guide: Any, args: tuple[Any, ...]) -> float:
    """The ELBO from 20,000 draws: its error has to be well below the 0.1 nat that are asked about."""
    return statistics.mean(-ELBO(1000).loss(model, guide, *args) for _ in range(20))


def in_process(way: str, name: str, data: str | None, best: float | None, cache: str) -> dict[str, Any]:
    command = [sys.executable, __file__, "--worker", way, name, "--best", json.dumps(best)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TORCHINDUCTOR_CACHE_DIR": cache, "JAX_PLATFORMS": "cpu"}
    environment["XLA_FLAGS"] = "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1"
    run = subprocess.run(
        [*command, *(["--data", data] if data else [])], capture_output=True, text=True, env=environment, check=False
    )
    if run.returncode:
        return {"failed": run.stderr.strip().splitlines()[-1][:200]}
    row: dict[str, Any] = json.loads(run.stdout.splitlines()[-1])
    return row


def ways_of(name: str) -> list[str]:
    skipped = {"bare torch"} if name != "vae" else {"numpyro"}
    if name == "hmm" or importlib.util.find_spec("numpyro") is None:
        skipped |= {"numpyro"}
    return [way for way in WAYS if way not in skipped]


def table(rows: list[dict[str, Any]]) -> str:
    """Rows as text; "pays from" is the step at which compilation has been earned back against Pyro."""
    head = f"{'problem':<16}{'way':<12}{'CPU ms':>9}{'wall ms':>9}{'x Pyro':>8}{'cold s':>8}{'warm s':>8}"
    lines = [head + f"{'CPU s':>7}{'pays from':>11}{'converged s':>13}"]
    pyro_ms = {row["problem"]: row.get("cpu_ms") for row in rows if row["way"] == "pyro"}
    for row in rows:
        label = f"{row['problem']:<16}{row['way']:<12}"
        if "failed" in row:
            lines.append(f"{label} {row['failed']}")
            continue
        base = pyro_ms.get(row["problem"])
        gain = (base - row["cpu_ms"]) if base else 0.0
        pays = f"{row['first_call_cpu'] * 1e3 / gain:.0f}" if gain > 0 else "-"
        times = f"{base / row['cpu_ms']:.1f}" if base else "-"
        warm = f"{row['warm_wall']:.1f}" if "warm_wall" in row else "-"
        near = "-" if "converged_wall" not in row else f"{row['converged_wall'] or float('nan'):.1f}"
        lines.append(
            f"{label}{row['cpu_ms']:>9.4f}{row['wall_ms']:>9.4f}{times:>8}{row['first_call_wall']:>8.1f}{warm:>8}"
            f"{row['first_call_cpu']:>7.1f}{pays:>11}{near:>13}"
        )
    return "\n".join([*lines, "annealing ring: not measured, it needs the annealed guides"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("speed.json"))
    parser.add_argument("--data", help="an .npz file with a matrix and a vector of labels")
    parser.add_argument("--problems", nargs="+", choices=PROBLEMS, default=list(PROBLEMS))
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    parser.add_argument("--worker", nargs=2, help=argparse.SUPPRESS)
    parser.add_argument("--best", default="null", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        print(json.dumps(measure(*options.worker, options.data, json.loads(options.best))))
        return
    rows: list[dict[str, Any]] = []
    for name in options.problems:
        best = best_elbo(name, options.data) if name in TO_CONVERGENCE else None
        for way in [way for way in ways_of(name) if way in options.ways]:
            with tempfile.TemporaryDirectory() as cache:
                row = in_process(way, name, options.data, best, cache)
                if way in ("compiled", "max") and "failed" not in row:
                    warm = in_process(way, name, options.data, best, cache)
                    row |= {"warm_wall": warm["first_call_wall"], "warm_cpu": warm["first_call_cpu"]}
                    row["converged_warm_wall"] = warm.get("converged_wall")
            rows.append({"problem": name, "way": way, **row})
            options.out.write_text(json.dumps({"problems": PROBLEMS, "rows": rows}, indent=1))
            print(table(rows).splitlines()[-2], flush=True)
    print("\n" + table(rows))


if __name__ == "__main__":
    main()
