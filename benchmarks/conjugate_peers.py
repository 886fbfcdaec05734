"""Other packages on the problems of benchmarks/conjugate.py, where they are installed: BayesPy and hmmlearn."""

from collections.abc import Callable
from time import process_time
from typing import Any

import numpy as np
from torch import Tensor

Found = tuple[float, float]
_TINY = 1e-14


def bayespy_mixture(args: tuple[Tensor, ...], values: dict[str, Tensor], sweeps: int) -> Found:
    """BayesPy on the mixture of iris, from the same means: its bound in nats, and CPU milliseconds of a sweep."""
    from bayespy.inference import VB
    from bayespy.nodes import Categorical, Dirichlet, Gamma, GaussianARD, Mixture

    x, mu0 = args[0].numpy(), values["mu"].numpy().T
    k, width = mu0.shape[1], x.shape[1]
    weights = Dirichlet(np.full(k, 1 / k))
    z = Categorical(weights, plates=(len(x), 1))
    tau = Gamma(2.0, 2.0 * x.var(0)[:, None], plates=(width, k))
    mu = GaussianARD(x.mean(0)[:, None], tau, plates=(width, k))
    y = Mixture(z, GaussianARD, mu, tau, cluster_plate=-1)
    y.observe(x)
    mu.initialize_from_value(mu0)
    return _swept(VB(y, z, weights, tau, mu), sweeps)


def bayespy_components(args: tuple[Tensor, ...], values: dict[str, Tensor], sweeps: int) -> Found:
    """BayesPy on probabilistic PCA with relevance, from the same loadings and components."""
    from bayespy.inference import VB
    from bayespy.nodes import Gamma, GaussianARD, SumMultiply

    x, w0, z0 = args[0].numpy(), values["w"].numpy(), values["z"].numpy()
    k = w0.shape[1]
    alpha = Gamma(1e-2, 1e-2, plates=(k,))
    tau = Gamma(1e-2, 1e-2)
    w = GaussianARD(0, alpha, shape=(k,), plates=(1, x.shape[1]))
    z = GaussianARD(0, 1, shape=(k,), plates=(len(x), 1))
    y = GaussianARD(SumMultiply("d,d->", z, w), tau)
    y.observe(x)
    w.initialize_from_value(w0[None])
    z.initialize_from_value(z0[:, None])
    return _swept(VB(y, alpha, tau, w, z), sweeps)


def _swept(inference: Any, sweeps: int) -> Found:
    start = process_time()
    inference.update(repeat=sweeps, tol=_TINY, verbose=False)
    return float(inference.compute_lowerbound()), 1e3 * (process_time() - start) / max(1, inference.iter)


def hmmlearn_chain(args: tuple[Tensor, ...], values: dict[str, Tensor], sweeps: int) -> Found:
    """The variational hidden Markov model of hmmlearn, from the same Dirichlet distributions."""
    from hmmlearn.vhmm import VariationalCategoricalHMM

    x, emissions = args[0].numpy()[:, None], values["emissions"].numpy()
    states, symbols = emissions.shape
    options = {"n_features": symbols, "init_params": "", "n_iter": sweeps, "tol": 0.0}
    made = VariationalCategoricalHMM(states, **options)
    for name, part in {"startprob": "start", "transmat": "moves", "emissionprob": "emissions"}.items():
        number = values[part].numpy()
        setattr(made, f"{name}_posterior_", number.copy())
        setattr(made, f"{name}_prior_", np.full(number.shape, 1 / number.shape[-1]))
    start = process_time()
    made.fit(x)
    bounds = made.monitor_.history
    return float(bounds[-1]), 1e3 * (process_time() - start) / len(bounds)


PEERS: dict[str, tuple[str, Callable[..., Found]]] = {
    "mixture": ("BayesPy", bayespy_mixture),
    "PCA": ("BayesPy", bayespy_components),
    "Markov chain": ("hmmlearn", hmmlearn_chain),
}
