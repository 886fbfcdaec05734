"""Log densities of data under models of every family, with what kind of number they are."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import singledispatch
from typing import Any, Literal

import torch
from torch import Tensor
from torch.distributions import Distribution

from pplvi.kinds.checked import checked
from pplvi.kinds.kinds import Count, Matrix, Seed
from pplvi.programs.calls import check_counts
from pplvi.programs.joint import execute
from pplvi.programs.state import random_state
from pplvi.types import Program
from pplvi.weights.algebra import logmeanexp

__all__ = ["DensityEstimate", "Unnormalised", "data_hash", "log_density"]

DensityKind = Literal["exact", "lower bound", "AIS estimate", "none"]
NUM_DRAWS = 1000
_CHUNK = 2**22  # numbers of draws that are in memory at a time


@checked
def data_hash(x: Tensor) -> str:
    """A short hash of data: log densities of another binarisation, or of other units, cannot be compared.

    >>> data_hash(torch.zeros(2, 3)) == data_hash(torch.zeros(2, 3, dtype=torch.float64)), len(data_hash(torch.ones(1)))
    (True, 12)
    """
    values = x.detach().cpu().to(torch.float64).contiguous().numpy()
    return hashlib.sha256(str(values.shape).encode() + values.tobytes()).hexdigest()[:12]


@checked
@dataclass(frozen=True)
class DensityEstimate:
    """Log densities of data, and what they are worth.

    :ivar kind: ``"exact"``; ``"lower bound"``, importance-weighted, on average; ``"AIS estimate"``, whose log
        normaliser is too small on average, so that densities are too large; ``"none"``, for a model without density.
    :ivar log_prob: of each datum, ``(N,)``, float64, in nats.
    :ivar data: hash of the data.
    :ivar interval: for an AIS estimate, what is to be added to the mean for either end of three standard errors.
    :ivar ess: for an AIS estimate, effective chains.
    :ivar reliable: whether it may be ranked.
    """

    kind: DensityKind
    log_prob: Tensor
    data: str
    interval: tuple[float, float] | None = None
    ess: float | None = None
    reliable: bool = True

    @property
    def mean(self) -> float:
        """Nats a datum."""
        return float(self.log_prob.mean())

    @property
    def error(self) -> float:
        """Standard error of the mean over data."""
        return float(self.log_prob.std() / math.sqrt(len(self.log_prob)))


@checked
@dataclass(frozen=True)
class Unnormalised:
    """A model whose density is known but for a constant.

    :ivar log_density: ``log p*(x)`` of data, ``(N,)``; ``None`` where only a guide bounds it.
    :ivar log_z: the constant, in nats, or its estimate.
    :ivar interval: of it; ``None`` where it is exact.
    :ivar ess: effective chains of the estimate.
    :ivar reliable: whether no few chains dominate it.
    :ivar sample: from a number to draws.
    """

    log_density: Callable[[Tensor], Tensor] | None
    log_z: float
    interval: tuple[float, float] | None
    ess: float | None
    reliable: bool
    sample: Callable[[int], Tensor]


@singledispatch
def unnormalised(model: Any, seed: int | None) -> Unnormalised | None:
    """What is known of a model without a normaliser; ``None`` for all others. Families register themselves.

    >>> unnormalised(print, None) is None
    True
    """
    return None


@checked
def log_density(
    model: Any, x: Matrix, *, num_draws: Count = NUM_DRAWS, seed: Seed | None = None, energy: Unnormalised | None = None
) -> DensityEstimate:
    r"""Log densities of data: exact where there is a density, a bound where there is a guide.

    .. math:: \log p(x) \ge E \log \frac1K \sum_k \frac{p(x, z_k)}{q(z_k \mid x)}

    :param model: a model with ``distribution()``; a distribution; ``(model, guide)`` of any Pyro programs, called with
        the data, whose latents are all in the data's plate; a machine; or what this function returned.
    :param x: data, ``(N, D)``.
    :param num_draws: draws ``K`` of a guide for each datum.
    :param seed: makes it reproducible; the global random state stays as it was.
    :param energy: of a machine, where it was worked out before.
    :returns: the densities, and what kind of number they are.
    :raises ValueError: for other models, weights that are not of each datum, and estimates of other data.

    >>> from pplvi import ProbabilisticPCA
    >>> model, x = ProbabilisticPCA(3, 1), torch.zeros(5, 3)
    >>> exact, bound = log_density(model, x), log_density((model, model.guide), x, num_draws=10)
    >>> exact.kind, bound.kind, round(exact.mean - bound.mean, 3)  # the guide is the posterior
    ('exact', 'lower bound', 0.0)
    """
    check_counts(num_draws=num_draws)
    if not x.numel():
        raise ValueError(f"x has shape {tuple(x.shape)}: expected data, (N, D), one datum at least.")
    where = data_hash(x)
    if isinstance(model, DensityEstimate):
        if model.data != where:
            raise ValueError(
                f"these log densities are of data {model.data}, and the test data are {where}: expected the same data, "
                "of one binarisation. Densities of others cannot be compared: estimate them again."
            )
        return model
    with random_state(seed), torch.no_grad():
        own, guide = model if isinstance(model, tuple) else (model, None)
        energy = unnormalised(own, seed) if energy is None else energy
        if guide is not None:
            found: tuple[DensityKind, Tensor] = ("lower bound", _bound(own, guide, x, num_draws))
        elif energy is not None:
            found = ("exact", _of_machine(energy, x))
        else:
            found = _of_model(own, x)
    kind, values = found[0], found[1].double()
    if energy is None:
        return DensityEstimate(kind, values, where)
    values = values - energy.log_z
    if energy.interval is None:
        return DensityEstimate(kind, values, where)
    ends = energy.log_z - energy.interval[1], energy.log_z - energy.interval[0]
    return DensityEstimate("AIS estimate", values, where, ends, energy.ess, energy.reliable)


def _of_machine(energy: Unnormalised, x: Tensor) -> Tensor:
    if energy.log_density is None:
        raise ValueError("the hidden layers of this machine cannot be summed out: expected (machine, guide).")
    return energy.log_density(x)


def _of_model(model: Any, x: Tensor) -> tuple[DensityKind, Tensor]:
    if isinstance(model, Distribution):
        return "exact", _in_parts(model.log_prob, x)
    if hasattr(model, "distribution"):
        return "exact", _in_parts(model.distribution().log_prob, x)
    if hasattr(model, "sample"):
        return "none", torch.full((len(x),), math.nan)
    raise ValueError(
        f"{type(model).__name__} has neither distribution() nor sample(): expected a model that has, a distribution, "
        "or a pair (model, guide)."
    )


def _in_parts(log_prob: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    return torch.cat([log_prob(part) for part in x.split(500)])


def _bound(model: Any, guide: Program, x: Tensor, num_draws: int) -> Tensor:
    program = getattr(model, "model", model)
    size = max(1, _CHUNK // (num_draws * x[0].numel()))
    return torch.cat([_of_part(program, guide, part, num_draws) for part in x.split(size)])


def _of_part(model: Program, guide: Program, x: Tensor, num_draws: int) -> Tensor:
    """The bounds of some data, from runs of no more draws than fit."""
    most, weights = max(1, _CHUNK // x.numel()), []
    for first in range(0, num_draws, most):
        run = execute(model, guide, (x,), {}, num_particles=min(most, num_draws - first))
        log_weight = run.log_target() - run.log_forward()
        if tuple(log_weight.shape[1:]) != (len(x),):
            raise ValueError(
                f"log weights of shape {tuple(log_weight.shape)} for {len(x)} data: expected one of each datum. Put "
                "all latents into the plate of the data."
            )
        weights.append(log_weight)
    return logmeanexp(torch.cat(weights))
