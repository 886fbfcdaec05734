"""Scouts: points that climb the posterior from the prior, from far away and from a guide's own draws.

Importance weights know nothing of where a guide never goes. Scouts go there: the modes that they find are turned into
a proposal of their own, and the evidence of one and the same region by both says what a guide misses.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor

from pplvi.posterior.ascent import Climb, KnownEnds, ascend
from pplvi.posterior.draws import predict
from pplvi.posterior.students import Students
from pplvi.programs.deadline import ending
from pplvi.programs.density import UnconstrainedDensity
from pplvi.programs.memo import Recent
from pplvi.weights.algebra import effective_sample_size, normalize
from pplvi.weights.pareto import pareto_smooth

MOST_DIMENSIONS = 100  # in which second derivatives are worth their cost
_ITERATIONS = 80
_MOST_MODES, _LIGHT = 16, 7.0  # nats of mass below the heaviest mode that still count
_NEAR = 3.0  # squared distance of ends of one mode, for a dimension
_ALIKE = 0.1  # nats, and squared distance, between a density and the Gaussian of a mode near it
_DF = 5.0
_FAR = 5.0
_ROUNDS, _HALF = 2, 0.5


class Weighed(NamedTuple):
    """Draws with their log density and log importance weight for the model, nats."""

    position: Tensor
    log_p: Tensor
    log_weight: Tensor


@dataclass(frozen=True)
class Missed:
    """A region of which scouts find more of the posterior than a guide.

    :ivar share: of the posterior that the guide misses there.
    :ivar error: its standard error.
    :ivar where: in words.
    :ivar tail: whether it is where the density is low.
    """

    share: float
    error: float
    where: str
    tail: bool = False

    @property
    def is_certain(self) -> bool:
        """Whether it is beyond four errors, and not small."""
        return self.share > max(_SMALL, _SURE * self.error)

    @property
    def is_likely(self) -> bool:
        """Whether it is large, and beyond three errors."""
        return self.share > max(_LARGE, _FAIRLY * self.error)

    @property
    def is_open(self) -> bool:
        """Whether more draws may make it certain."""
        return not self.is_certain and self.share > max(_SMALL, _LIKELY * self.error)

    def __str__(self) -> str:
        return f"{self.share:.0%} +- {self.error:.0%} of the evidence {self.where}"


_SMALL, _LARGE = 0.02, 0.05
_SURE, _FAIRLY, _LIKELY = 4.0, 3.0, 2.0


@torch.no_grad()
def prior_starts(
    density: UnconstrainedDensity, model: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any], number: int
) -> Tensor:
    """Points ``(number, dim)`` to climb from: draws of the prior, or, where it is improper, uniform on (-2, 2).

    :param density: of the model.
    """
    try:
        drawn = predict(model, None, args, kwargs, num_draws=number, vectorize=density.way.word).latents
        return density.pack_rows(drawn).double()
    except NotImplementedError:
        return 4 * torch.rand(number, density.dim, dtype=torch.float64) - 2


def spread_starts(own: Weighed, number: int) -> Tensor:
    """Points far from a guide's draws on all sides: five of their standard deviations, ``(number, dim)``."""
    loc, covariance = moments(own)
    scale = _FAR * covariance.diagonal().clamp(min=0).sqrt()
    return loc + scale * torch.randn(number, len(loc), dtype=torch.float64)


def moments(own: Weighed) -> tuple[Tensor, Tensor]:
    """Mean ``(dim,)`` and covariance of weighted draws."""
    weight = normalize(pareto_smooth(own.log_weight)[0])
    loc = weight @ own.position
    centred = own.position - loc
    return loc, (weight[:, None] * centred).T @ centred


def around(own: Weighed) -> Students | None:
    """One t distribution with the moments of a guide's draws and heavier tails, if they have a covariance."""
    loc, covariance = moments(own)
    tril, failed = torch.linalg.cholesky_ex(covariance)
    if bool(failed) or not bool(tril.isfinite().all()):
        return None
    one = torch.zeros(1, dtype=torch.float64)
    return Students(one, loc[None], tril[None], torch.full_like(one, max(_DF, len(loc) / 2)))


@torch.no_grad()
def screened(density: UnconstrainedDensity, mixture: Students, candidates: Tensor, number: int) -> Tensor:
    """The points at which the density is most above what a mixture would have it, ``(number, dim)``.

    Narrow modes have small basins: many points are looked at, and few climb.

    :param candidates: rows ``(S, dim)``.
    """
    log_p = density(candidates.to(density.dtype)).double().nan_to_num(-math.inf, -math.inf, -math.inf)
    surprise = log_p - mixture.log_prob(candidates)
    return candidates[surprise.topk(min(number, len(surprise))).indices]


def wide(mixture: Students, size: int) -> Tensor:
    """Draws from far around the components of a mixture, ``(size, dim)``: two degrees of freedom, twice the scale."""
    number = len(mixture.loc)
    equal = torch.full_like(mixture.log_share, -math.log(number))
    return Students(equal, mixture.loc, 2 * mixture.tril, torch.full_like(mixture.df, 2.0)).sample(size)


class Mode(NamedTuple):
    """A mode: its log mass by Laplace's method, location and scale."""

    mass: float
    loc: Tensor
    tril: Tensor

    @property
    def peak(self) -> float:
        """The log density at the mode, nats."""
        return self.mass - float(self.tril.diagonal().log().sum()) - len(self.loc) / 2 * math.log(2 * math.pi)


def climbed(density: UnconstrainedDensity, starts: Tensor, known: Sequence[Mode] = ()) -> list[Mode]:
    """Modes that are met by climbing from these starts, beside known ones.

    A scout that comes to where the density is that of a mode which was met before climbs no further.

    :param density: the target, in up to 100 dimensions.
    :param starts: rows ``(S, dim)``.
    """
    met = _Met(density, known)
    ends = ascend(density.value_and_gradient, starts, _ITERATIONS, met)
    met.see(ends, torch.arange(len(ends.value)))  # of climbs that the time has cut too
    found = list(known)
    for mode in sorted(met.modes[len(known) :], key=lambda mode: mode.peak, reverse=True):
        if len(found) < len(known) + _MOST_MODES and not any(_is_near(mode.loc, other) for other in found):
            found.append(mode)
    return found


class _Met(KnownEnds):
    """Modes that were met so far, and the scouts that need not climb to them again.

    :ivar metric: the covariance of the mode, where one is all that was known before.
    """

    def __init__(self, density: UnconstrainedDensity, known: Sequence[Mode]) -> None:
        self.density, self.modes, self._seen = density, list(known), set[int]()
        self.metric = known[0].tril @ known[0].tril.T if len(known) == 1 else None

    def __call__(self, at: Climb, rows: Tensor, ends: Tensor) -> Tensor:
        """Look for modes at the ends, and say which of these rows lead to one."""
        self.see(at, rows[ends])
        leading = self._leads_to_one(at, rows)
        self._seen.update(rows[leading].tolist())
        return leading

    def see(self, at: Climb, rows: Tensor) -> None:
        """Note the modes at which these rows are, the highest first; beside a mode there is none that is lower."""
        for row in rows[at.value[rows].argsort(descending=True)]:
            place, value = at.position[row], float(at.value[row])
            if int(row) in self._seen or any(mode.peak >= value and _is_near(place, mode) for mode in self.modes):
                continue
            self._seen.add(int(row))
            if (mode := _mode(self.density, at.position[row], at.gradient[row])) is not None:
                self.modes.append(mode)

    def _leads_to_one(self, at: Climb, rows: Tensor) -> Tensor:
        """Whether, near a mode, height and slope are those of its Gaussian."""
        leading = torch.zeros_like(rows, dtype=torch.bool)
        for mode in self.modes:
            away = torch.linalg.solve_triangular(mode.tril, (at.position[rows] - mode.loc).T, upper=False)
            beside = away + mode.tril.T @ at.gradient[rows].T  # where Newton's step leads
            square = away.square().sum(0)
            alike = (at.value[rows] + square / 2 - mode.peak).abs() < _ALIKE
            leading |= alike & (square < _NEAR * len(mode.loc)) & (beside.square().sum(0) < _ALIKE)
        return leading


def climbed_once(density: UnconstrainedDensity, starts: Tensor) -> list[Mode]:
    """As :func:`climbed`; what a density of the same values and gradients at the same starts has shown is remembered.

    The prior is the same for every guide of a model and its data, and so are the ends of climbs from it.
    """
    with ending(lambda: ""):  # what is remembered is whole
        return _CLIMBS.find((starts, *density.value_and_gradient(starts)), lambda: climbed(density, starts))


_CLIMBS = Recent[list[Mode]](most=8)


def mixed(modes: Sequence[Mode]) -> Students | None:
    """Modes as a mixture of t distributions shaped by their curvature, of those that may have mass.

    Shares are half by Laplace's estimate of the mass, half equal.

    :returns: ``None`` for no modes.
    """
    if not modes:
        return None
    mass = torch.tensor([mode.mass for mode in modes], dtype=torch.float64)
    kept = mass > mass.max() - _LIGHT
    share = 0.5 * mass[kept].softmax(0) + 0.5 / int(kept.sum())
    chosen = [mode for mode, keep in zip(modes, kept.tolist(), strict=True) if keep]
    locs, trils = (torch.stack(column) for column in list(zip(*chosen, strict=True))[1:])
    return Students(share.log(), locs, trils, torch.full_like(share, max(_DF, locs.shape[1] / 2)))


def _is_near(place: Tensor, mode: Mode) -> bool:
    whitened = torch.linalg.solve_triangular(mode.tril, (place - mode.loc)[:, None], upper=False)
    return float(whitened.square().sum()) < _NEAR * len(place)


def _mode(density: UnconstrainedDensity, place: Tensor, gradient: Tensor) -> Mode | None:
    """The mode near a place, if there is one."""
    hessian = density.hessian(place.to(density.dtype))
    hessian = None if hessian is None else hessian.detach()
    if hessian is None or not bool(hessian.isfinite().all()):
        return None
    root, failed = torch.linalg.cholesky_ex(-hessian)
    if bool(failed):
        return None
    step = torch.cholesky_solve(gradient[:, None], root).squeeze(1)
    if float(step @ gradient) > len(place) + 4:  # nats that Newton's step promises: not at a mode
        return None
    tril, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(root))
    if bool(failed):
        return None
    with torch.no_grad():
        value = float(density(place[None].to(density.dtype)))
    mass = value + float(tril.diagonal().log().sum()) + len(place) / 2 * math.log(2 * math.pi)
    return Mode(mass, place + step, tril)


@torch.no_grad()
def weighed(density: UnconstrainedDensity, mixture: Students, size: int) -> Weighed:
    """Draws of a mixture with their importance weights; where the target is not finite they have none."""
    draws = mixture.sample(size)
    log_p = density(draws.to(density.dtype)).double()
    log_p = log_p.nan_to_num(-math.inf, -math.inf, -math.inf)
    return Weighed(draws, log_p, log_p - mixture.log_prob(draws))


@torch.no_grad()
def adapted(
    density: UnconstrainedDensity, mixture: Students, size: int, rounds: int = _ROUNDS
) -> tuple[Students, Weighed]:
    """The mixture after rounds of weighted EM on its own draws, each kept if it has more effective draws; none where
    half of them are effective."""
    best = weighed(density, mixture, size)
    for _ in range(rounds):
        if not bool(best.log_weight.isfinite().any()) or float(effective_sample_size(best.log_weight)) > _HALF * size:
            break
        new = mixture.fitted(best.position, normalize(pareto_smooth(best.log_weight)[0]))
        found = weighed(density, new, size)
        if float(effective_sample_size(found.log_weight)) < float(effective_sample_size(best.log_weight)):
            break
        mixture, best = new, found
    return mixture, best


def missed(scouts: Weighed, guide: Weighed, regions: Regions) -> list[Missed]:
    r"""What a guide misses in each region, the most certain first.

    .. math:: A(R) = \frac1n \sum_i \frac{p(z_i)}{r(z_i)} 1_R(z_i), \quad z_i \sim r, \qquad
        B(R) = \frac1S \sum_s \frac{p(z_s)}{q(z_s)} 1_R(z_s), \quad z_s \sim q

    both estimate the evidence inside of ``R``, whatever ``q`` and ``r`` are, and neither is likely to be much too
    large: the difference is a part that the guide has not seen.

    :param scouts: draws of the scouts' proposal.
    :param guide: those of the guide.
    :param regions: where to compare them.
    """
    peak = max(float(part.log_weight.max()) for part in (scouts, guide))
    ours, theirs = ((part.log_weight - peak).exp().nan_to_num(0.0) for part in (scouts, guide))
    total = max(float(ours.mean()), float(theirs.mean()))
    pairs = zip(regions.of(scouts), regions.of(guide), strict=True)
    found = [_excess(ours * a.inside, theirs * b.inside, total, a) for a, b in pairs]
    return sorted(found, key=lambda each: (each.is_certain, each.share / max(each.error, 1e-9)), reverse=True)


class Region(NamedTuple):
    """Which draws are inside, in words, and whether the density is low there."""

    inside: Tensor
    where: str
    tail: bool


@dataclass(frozen=True)
class Regions:
    """Where evidence is compared: the basin of each mode, where the density is above or below a bound, and everywhere.

    :ivar modes: a mixture, whose components divide space.
    :ivar bounds: log densities and the parts of the posterior above them.
    """

    modes: Students | None
    bounds: tuple[tuple[float, float], ...]

    @classmethod
    def between(cls, modes: Students | None, scouts: Weighed) -> Self:
        """Regions by the modes and the density that scouts have met."""
        order = scouts.log_p.argsort(descending=True)
        above = normalize(scouts.log_weight)[order].cumsum(0)
        places = torch.searchsorted(above, torch.tensor(_MASSES, dtype=above.dtype)).clamp(max=len(order) - 1)
        return cls(modes, tuple(zip(scouts.log_p[order][places].tolist(), _MASSES, strict=True)))

    def of(self, points: Weighed) -> Iterator[Region]:
        """The regions, with the draws inside of them."""
        yield Region(torch.ones_like(points.log_p), "everywhere", True)
        if self.modes is not None and (number := len(self.modes.loc)) > 1:
            basin = self.modes.each(points.position).argmax(1)
            for k in range(number):
                yield Region((basin == k).double(), f"around mode {k + 1} of {number}", False)
        for bound, mass in self.bounds:
            if mass <= _BODY:
                yield Region((points.log_p > bound).double(), f"in the {mass:.0%} of highest density", False)
            if mass >= _BODY:
                yield Region((points.log_p <= bound).double(), f"in the {1 - mass:.0%} of lowest density", True)


def _excess(ours: Tensor, theirs: Tensor, total: float, region: Region) -> Missed:
    error = math.hypot(_error(ours), _error(theirs))
    return Missed(float(ours.mean() - theirs.mean()) / total, error / total, region.where, region.tail)


def _error(values: Tensor) -> float:
    return float(values.std()) / math.sqrt(len(values))


_MASSES, _BODY = (0.02, 0.05, 0.1, 0.25, 0.5, 0.75, 0.9, 0.95), 0.5
