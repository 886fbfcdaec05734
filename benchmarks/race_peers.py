"""NUTS of other packages in benchmarks/race.py, where they are installed: NumPyro, nutpie through PyMC, BlackJAX.

Each has 4 chains of 500 draws after 500 steps, one after the other in one thread. ``log_densities`` shows that their
programs, in race_numpyro.py and race_pymc.py, are those of race_problems.py.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from inspect import signature
from typing import Any

import numpy as np
import pyro
import torch
from torch import Tensor

from benchmarks.race_problems import Draws, Problem

CHAINS, WARMUP, SAMPLES = 4, 500, 500


def _program(problem: Problem, module: str) -> tuple[Callable[..., None], dict[str, np.ndarray]]:
    """The problem's program in another language, and the data that it takes."""
    program = import_module(f"benchmarks.{module}").programs()[problem.name]
    return program, {name: problem.data[name] for name in signature(program).parameters}


def _drawn(values: Mapping[str, Any]) -> Draws:
    """Draws of all chains, one after the other: from ``(chain, draw, ...)``."""
    return {name: torch.as_tensor(np.array(value)).flatten(0, 1) for name, value in values.items()}


def _in_jax(problem: Problem) -> tuple[Callable[..., None], dict[str, np.ndarray]]:
    import jax

    jax.config.update("jax_enable_x64", problem.dtype == torch.float64)
    return _program(problem, "race_numpyro")


def numpyro_nuts(problem: Problem, seed: int) -> tuple[Draws, int]:
    """NumPyro's NUTS: draws, and how many transitions diverged."""
    import jax
    from numpyro.infer import MCMC, NUTS

    program, data = _in_jax(problem)
    options = {"num_chains": CHAINS, "chain_method": "sequential", "progress_bar": False}
    mcmc = MCMC(NUTS(program), num_warmup=WARMUP, num_samples=SAMPLES, **options)
    mcmc.run(jax.random.PRNGKey(seed), **data)
    return _drawn(mcmc.get_samples(group_by_chain=True)), int(mcmc.get_extra_fields()["diverging"].sum())


def blackjax_nuts(problem: Problem, seed: int) -> tuple[Draws, int]:
    """BlackJAX's NUTS with its window adaptation, on the potential of the NumPyro program."""
    import blackjax
    import jax
    from numpyro.infer.util import initialize_model

    program, data = _in_jax(problem)
    starts = jax.random.split(jax.random.PRNGKey(seed), CHAINS)
    start, potential, postprocess, _ = initialize_model(starts, program, model_kwargs=data)

    def log_density(position: Any) -> Any:
        return -potential(position)

    def chain(given: tuple[Any, Any]) -> Any:
        key, position = given
        first, rest = jax.random.split(key)
        adapted, _ = blackjax.window_adaptation(blackjax.nuts, log_density).run(first, position, WARMUP)
        kernel = blackjax.nuts(log_density, **adapted.parameters)

        def step(state: Any, key: Any) -> Any:
            state, info = kernel.step(key, state)
            return state, (postprocess(state.position), info.is_divergent)

        return jax.lax.scan(step, adapted.state, jax.random.split(rest, SAMPLES))[1]

    keys = jax.random.split(jax.random.PRNGKey(seed + 1), CHAINS)
    draws, divergent = jax.jit(lambda given: jax.lax.map(chain, given))((keys, start.z))
    return _drawn(draws), int(divergent.sum())


def _pymc_model(problem: Problem) -> Any:
    import pymc

    program, data = _program(problem, "race_pymc")
    with pymc.Model() as model:
        program(**data)
    return model


def nutpie_nuts(problem: Problem, seed: int) -> tuple[Draws, int]:
    """nutpie's NUTS on the PyMC program, compiled by Numba."""
    import nutpie

    compiled = nutpie.compile_pymc_model(_pymc_model(problem))
    options = {"chains": CHAINS, "cores": 1, "progress_bar": False, "save_warmup": False}
    found = nutpie.sample(compiled, tune=WARMUP, draws=SAMPLES, seed=seed, **options)
    return _drawn(found.posterior.data_vars), int(found.sample_stats.diverging.sum())


@dataclass(frozen=True)
class Peer:
    """Another package's sampler.

    :ivar run: from a problem and a seed to draws and the number of divergences.
    :ivar modules: that have to be installed; imported before the time counts.
    :ivar log_density: of the program, from a problem to a function of one draw on the constrained scale.
    """

    run: Callable[[Problem, int], tuple[Draws, int]]
    modules: tuple[str, ...]
    log_density: Callable[[Problem], Callable[[dict[str, np.ndarray]], float]]

    @property
    def installed(self) -> bool:
        """Whether its modules are there."""
        return all(find_spec(module) for module in self.modules)


# ---------------------------------------------------------------------- the same posterior


def _of_numpyro(problem: Problem) -> Callable[[dict[str, np.ndarray]], float]:
    import jax
    from numpyro.infer.util import log_density

    program, data = _program(problem, "race_numpyro")
    jax.config.update("jax_enable_x64", True)
    return jax.jit(lambda values: log_density(program, (), data, values)[0])


def _of_pymc(problem: Problem) -> Callable[[dict[str, np.ndarray]], float]:
    model = _pymc_model(problem)
    compiled = model.compile_logp(jacobian=False)

    def log_density(values: dict[str, np.ndarray]) -> float:
        point = {}
        for variable, seen in model.rvs_to_values.items():
            if variable in model.free_RVs:
                transform = model.rvs_to_transforms[variable]
                value = values[variable.name]
                inputs = variable.owner.inputs
                point[seen.name] = value if transform is None else transform.forward(value, *inputs).eval()
        return float(compiled(point))

    return log_density


def log_densities(problem: Problem, peer: str, points: int = 5, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Unnormalised log posterior of the Pyro program and of a peer's, at draws of the prior, in double precision."""
    theirs = PEERS[peer].log_density(problem)
    args = [torch.as_tensor(argument) for argument in problem.args]
    pyro.set_rng_seed(seed)
    found = []
    for _ in range(points):
        trace = pyro.poutine.trace(problem.model).get_trace(*args)
        drawn: dict[str, Tensor] = {name: trace.nodes[name]["value"] for name in trace.stochastic_nodes}
        values = {name: value.numpy() for name, value in drawn.items()}
        found.append((float(trace.log_prob_sum()), float(theirs(values))))
    ours, other = np.array(found).T
    return ours, other


PEERS: dict[str, Peer] = {
    "numpyro": Peer(numpyro_nuts, ("numpyro",), _of_numpyro),
    "nutpie": Peer(nutpie_nuts, ("nutpie", "pymc", "numba"), _of_pymc),
    "blackjax": Peer(blackjax_nuts, ("blackjax", "numpyro"), _of_numpyro),
}
