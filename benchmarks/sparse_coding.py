"""EM, lasso, dictionaries, LISTA and binary sparse coding against scikit-learn and exact answers.

Time is CPU time of one thread, the median of runs that take turns. scikit-learn's digits, centred and scaled to length
one, are the data of all but the first and the last table.

- EM: Gaussian mixtures from the same k-means; iterations and log-likelihood of ``ExpectationMaximization`` and of
  scikit-learn's ``GaussianMixture`` at equal tolerances, its generalised form, and the largest fall of log p.
- Lasso: 500 digits, 100 atoms, lambda 0.1; steps until the largest duality gap is 1e-6, as they are, recorded and
  compiled, the time of making recordings apart.
- Dictionaries: all digits, 50 atoms; the mean objective with exact codes.
- LISTA: 7 layers, trained on mixtures of the other digits; mean objective above the minimum.
- Binary sparse coding: 12 codes; the mean bound with 21 starts, exact log p, and how many of 100 data have a bound that
  ever falls in turn, at once, and at once with damping.

    python -m benchmarks.sparse_coding --data ../shared/data --out benchmarks/results/sparse_coding.json

``--data`` is a folder with ``faithful.csv`` (Old Faithful: eruptions, waiting), which is not shipped.
"""

import argparse
import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from pyro.distributions import constraints
from torch import Tensor

import pplvi
from benchmarks.reporting import Rows, command_line, write
from pplvi.compile.iterating import RecordedMap
from pplvi.compile.svi import CompileMode
from pplvi.guides.search.lasso import Lasso, LassoMethod, solve

MODES: dict[str, CompileMode] = {"recorded": "trace", "compiled": True}
QUICK = (
    "--rounds 1 --em-steps 45 --images 300 --digits 60 --atoms 20 --steps 5 --lista-steps 20 --starts 1 "
    "--modes recorded"
)
PENALTY = 0.1
Row = dict[str, Any]


def seconds(run: Callable[[], Any], rounds: int) -> tuple[float, Any]:
    """Median CPU time of some runs, and what the last one gave."""
    times: list[float] = []
    found = None
    for _ in range(rounds):
        began = time.process_time()
        found = run()
        times.append(time.process_time() - began)
    return statistics.median(times), found


# ---------------------------------------------------------------------- EM


def mixture(x: Tensor, start: dict[str, Tensor]) -> None:
    """A Gaussian mixture as users write it."""
    w = pyro.param("w", lambda: start["w"].clone(), constraint=constraints.simplex)
    mu = pyro.param("mu", lambda: start["mu"].clone())
    tril = pyro.param("tril", lambda: start["tril"].clone(), constraint=constraints.lower_cholesky)
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Categorical(w))
        pyro.sample("x", dist.MultivariateNormal(mu[z], scale_tril=tril[z]), obs=x)


def em_table(folder: Path | None, rounds: int, most: int) -> Iterator[Row]:
    from sklearn.datasets import load_iris

    sets = [("iris", load_iris().data, 3)]
    if folder is not None and (file := folder / "faithful.csv").exists():
        sets.append(("faithful", np.loadtxt(file, delimiter=",", skiprows=1)[:, 1:], 2))
    for name, data, count in sets:
        yield from em_rows(name, data, count, rounds, most)


def em_rows(name: str, data: Any, count: int, rounds: int, most: int) -> Iterator[Row]:
    from sklearn.cluster import KMeans
    from sklearn.mixture import GaussianMixture

    labels = KMeans(count, n_init=1, random_state=0).fit(data).labels_
    clusters = [data[labels == k] for k in range(count)]
    w, mu = np.array([len(c) / len(data) for c in clusters]), np.stack([c.mean(0) for c in clusters])
    covariance = np.stack([np.cov(c.T, bias=True) for c in clusters])
    options = {"weights_init": w, "means_init": mu, "precisions_init": np.linalg.inv(covariance), "reg_covar": 0.0}
    peer = GaussianMixture(count, tol=1e-13, max_iter=5000, **options)
    took, fitted = seconds(lambda: peer.fit(data), rounds)
    likelihood = fitted.score(data) * len(data)
    yield {
        "data": name,
        "method": "scikit-learn",
        "log_p": f"{likelihood:.8f}",
        "iterations": fitted.n_iter_,
        "fall": None,
    } | {"ms_an_iteration": 1e3 * took / fitted.n_iter_}
    start = {"w": torch.tensor(w), "mu": torch.tensor(mu), "tril": torch.tensor(np.linalg.cholesky(covariance))}
    for m_steps, tol in ((None, 1e-13 * len(data)), (3, 1e-9)):
        algorithm = pplvi.ExpectationMaximization(m_steps=m_steps, tol=tol, start="program")
        run = partial(pplvi.fit, partial(mixture, start=start), algorithm, args=(torch.tensor(data),), seed=0)
        took, fit = seconds(lambda run=run: run(progress=False, num_steps=most), rounds)
        losses = fit.losses[0]
        label = "exact M-steps" if m_steps is None else f"{m_steps} steps of L-BFGS"
        yield {"data": name, "method": label, "log_p": f"{-losses[-1]:.8f}", "iterations": len(losses)} | {
            "fall": float(max(0.0, np.diff(losses).max())),
            "ms_an_iteration": 1e3 * took / len(losses),
        }


# ---------------------------------------------------------------------- digits


def digits() -> Tensor:
    from sklearn.datasets import load_digits

    x = torch.tensor(load_digits().data) / 16
    x = x - x.mean(0)
    return x / x.norm(dim=1, keepdim=True)


def dictionary_of(x: Tensor, atoms: int) -> Tensor:
    """Atoms in rows, from scikit-learn."""
    from sklearn.decomposition import MiniBatchDictionaryLearning

    peer = MiniBatchDictionaryLearning(
        n_components=atoms, alpha=PENALTY, max_iter=50, batch_size=min(256, len(x)), random_state=0, fit_algorithm="cd"
    )
    return torch.tensor(peer.fit(x.numpy()).components_)


def lasso_table(x: Tensor, atoms: Tensor, rounds: int, modes: Sequence[str]) -> Iterator[Row]:
    from sklearn.decomposition import sparse_encode

    problem = Lasso(atoms @ atoms.T, x @ atoms.T, torch.full((len(atoms),), PENALTY, dtype=x.dtype))
    length = problem.squared_length()
    peer = partial(sparse_encode, x.numpy(), atoms.numpy(), algorithm="lasso_cd", alpha=PENALTY, max_iter=10_000)
    took, codes = seconds(lambda: torch.tensor(peer(n_jobs=1)), rounds)
    gap = float(problem.gap(codes, length).max())
    yield {
        "method": "scikit-learn lasso_cd",
        "steps": None,
        "gap": gap,
        "seconds": took,
        "recording": None,
        "apart": None,
    }
    ways: list[tuple[Any, bool]] = [("ista", False), ("fista", False), ("fista", True), ("coordinate", False)]
    for method, restart in ways:
        took, found = seconds(lambda m=method, r=restart: solve(problem, m, restart=r), rounds)
        label = f"{method}, restarts" if restart else method
        yield {"method": label, "steps": found.iterations, "gap": float(found.gap.max()), "seconds": took} | {
            "recording": None,
            "apart": None,
        }
    for name in ("ista", "fista"):
        for mode in modes:
            yield recorded_row(problem, name, MODES[mode], rounds)


def recorded_row(problem: Lasso, method: LassoMethod, mode: CompileMode, rounds: int) -> Row:
    """Iterations that are recorded, or compiled: CPU seconds without and of recording, and how far codes and gaps are
    from those of iterations that are neither."""
    spent: list[float] = []

    def recorder(*of: Any) -> RecordedMap:
        began = time.process_time()
        made = RecordedMap(*of, mode=mode)
        spent.append(time.process_time() - began)
        return made

    solve(problem, method, recorder=recorder)  # the first one compiles
    spent.clear()
    took, found = seconds(partial(solve, problem, method, recorder=recorder), rounds)
    recording, plain = sum(spent) / rounds, solve(problem, method)
    apart = max(float((x - y).abs().max()) for x, y in zip(found[:2], plain[:2], strict=True))
    label = ("fista, restarts" if method == "fista" else method) + (", compiled" if mode is True else ", recorded")
    row = {"method": label, "steps": found.iterations, "gap": float(found.gap.max()), "seconds": took - recording}
    return row | {"recording": recording, "apart": apart}


def dictionary_table(x: Tensor, atoms: int, steps: int) -> Iterator[Row]:
    from sklearn.decomposition import DictionaryLearning

    options = {"n_components": atoms, "alpha": PENALTY, "max_iter": steps, "tol": 0, "random_state": 0}
    peer = DictionaryLearning(fit_algorithm="cd", transform_algorithm="lasso_cd", transform_alpha=PENALTY, **options)
    took, fitted = seconds(lambda: peer.fit(x.numpy()), 1)
    found = pplvi.SparseCoding(64, atoms, penalty=PENALTY, dictionary=torch.tensor(fitted.components_).T)
    yield {"method": "scikit-learn", "objective": objective(found, x), "seconds": took}
    for batch in (None, 256):
        pyro.set_rng_seed(0)
        coding = pplvi.SparseCoding.from_data(x, atoms, penalty=PENALTY)
        number = steps if batch is None else 2 * steps
        took, _ = seconds(partial(pplvi.learn_dictionary, coding, x, num_steps=number, batch_size=batch), 1)
        yield {"method": "alternating" if batch is None else f"batches of {batch}"} | {
            "objective": objective(coding, x),
            "seconds": took,
        }


def objective(coding: pplvi.SparseCoding, x: Tensor) -> float:
    with torch.no_grad():
        return float(coding.objective(x, coding.codes(x)).mean())


class Mixtures:
    """Minibatches of mixtures of two data each, of length one: as many kinds as one likes."""

    def __init__(self, x: Tensor, size: int = 128) -> None:
        self.x, self.size = x, size

    def __iter__(self) -> Iterator[Tensor]:
        for _ in range(len(self.x)):
            first, second = (self.x[torch.randint(len(self.x), (self.size,))] for _ in range(2))
            share = 0.3 * torch.rand(self.size, 1, dtype=self.x.dtype)
            mixed = (1 - share) * first + share * second
            yield mixed / mixed.norm(dim=1, keepdim=True)


def lista_table(train: Tensor, test: Tensor, atoms: Tensor, steps: int) -> Iterator[Row]:
    coding = pplvi.SparseCoding(64, len(atoms), penalty=PENALTY, dictionary=atoms.T)
    coding.requires_grad_(False)
    problem = coding.lasso(test)
    least = problem.value(solve(problem, tol=1e-10).codes)

    def excess(codes: Tensor) -> float:
        return float((problem.value(codes) - least).mean())

    for number in (8, 13):
        codes = solve(problem, "fista", max_iterations=number, restart=False).codes
        yield {"method": f"FISTA, {number} iterations", "excess": excess(codes), "seconds": None}
    network = pplvi.LISTA(coding.dictionary, 7, PENALTY)
    yield {"method": "ISTA, 8 iterations", "excess": excess(network(test).detach()), "seconds": None}
    run = partial(
        pplvi.fit,
        coding.model,
        lambda model: pplvi.AutoAmortized(model, network, plates="data", family="delta"),
        data=Mixtures(train),
        num_steps=steps,
        learning_rate=3e-3,
        stop=None,
        seed=0,
        progress=False,
    )
    took, _ = seconds(run, 1)
    yield {"method": "LISTA, 7 layers", "excess": excess(network(test).detach()), "seconds": took}


# ---------------------------------------------------------------------- binary sparse coding


def binary_table(starts: int) -> Iterator[Row]:
    torch.manual_seed(0)
    for num_visible, scale in ((16, 1.0), (16, 2.0), (8, 2.0)):
        weight = torch.randn(num_visible, 12, dtype=torch.float64) / math.sqrt(num_visible) * scale
        bias, precision = torch.full((12,), -1.0).double(), torch.full((num_visible,), 4.0).double()
        h = torch.bernoulli(torch.sigmoid(bias).expand(100, 12))
        v = h @ weight.T + torch.randn(100, num_visible, dtype=torch.float64) / 2
        coding = pplvi.BinarySparseCoding(num_visible, 12, weight=weight, bias=bias, precision=precision)
        log_p, bound = coding.exact(v)[0], pplvi.BinaryMeanField(coding, 200, restarts=starts).bound(v)
        row = {"num_visible": num_visible, "scale": scale, "log_p": float(log_p.mean()), "bound": float(bound.mean())}
        ways: dict[str, dict[str, Any]] = {
            "falls_in_turn": {},
            "falls_at_once": {"update": "at once"},
            "falls_damped": {"update": "at once", "damping": 0.5},
        }
        for name, options in ways.items():
            steps = pplvi.BinaryMeanField(coding, 200, **options).trace(v).diff(dim=0)
            row[name] = int((steps < -1e-9).any(0).sum())
        yield row


# ---------------------------------------------------------------------- all of it


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = command_line(__doc__)
    parser.add_argument("--data", type=Path, help="folder with faithful.csv")
    parser.add_argument("--modes", nargs="+", default=list(MODES), choices=MODES, help="ways of recording iterations")
    parser.add_argument("--rounds", type=int, default=5, help="runs of which the median time is taken")
    parser.add_argument("--em-steps", type=int, default=3000, help="the most iterations of EM")
    parser.add_argument("--images", type=int, default=1797, help="digits that dictionaries are learned from")
    parser.add_argument("--digits", type=int, default=500, help="digits that are encoded")
    parser.add_argument("--atoms", type=int, default=100, help="atoms that encode them; half as many are learned")
    parser.add_argument("--steps", type=int, default=60, help="alternations of dictionary learning")
    parser.add_argument("--lista-steps", type=int, default=600, help="training steps of LISTA")
    parser.add_argument("--starts", type=int, default=20, help="random starts of the mean field")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> dict[str, list[Row]]:
    """Run all tables."""
    options = parse(argv)
    x = digits()[: options.images]
    atoms, test = dictionary_of(x, options.atoms), x[: options.digits]
    tables: dict[str, Iterator[Row]] = {
        "em": em_table(options.data, options.rounds, options.em_steps),
        "lasso": lasso_table(test, atoms, options.rounds, options.modes),
        "dictionary": dictionary_table(x, options.atoms // 2, options.steps),
        "lista": lista_table(x[options.digits :], test, atoms, options.lista_steps),
        "binary": binary_table(options.starts),
    }
    printed, found = Rows(), {}
    for name, rows in tables.items():
        found[name] = []
        for row in rows:
            printed.show(row)
            found[name].append(row)
    write(options, **found)
    return found


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
