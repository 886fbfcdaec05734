"""What is looked at along a quasi-Newton path: the ELBOs of its Gaussians, and whether there is a posterior at all."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pplvi.guides.search.gaussians import Gaussian, LocalGaussians, full_gaussian, standard_normal
from pplvi.guides.search.lbfgs import Options, Point, Trail, minimise
from pplvi.guides.search.moments import MOST_DIMENSIONS
from pplvi.guides.search.newton import newton
from pplvi.programs.deadline import is_time_over
from pplvi.programs.density import CHUNK, UnconstrainedDensity

_FAR, _DROP = (30.0, 1e3), 3.0  # so many standard deviations away a proper density has fallen by so many nats
_MOST_AXES = 256
_LOOK, _PATIENCE = 50, 50  # iterations


@dataclass(frozen=True)
class OptimizationPath:
    """What one path found.

    :ivar elbos: ELBO of the local Gaussian at every iterate, nats; ``-inf`` where there is none. With
        ``exact_hessian`` the Gaussian of the Hessian at the end of a converged path comes last.
    :ivar log_density: unconstrained log density at the start and at every iterate, nats.
    :ivar best: index of the chosen iterate in ``elbos``.
    :ivar reason: why the path ended: ``"converged"``, ``"max_iterations"``, ``"line search"`` (no step goes up), or
        ``"stopped"`` (its best Gaussian was more than 50 iterations ago, or the time was over: then earlier iterates
        may be without an ELBO).
    """

    elbos: tuple[float, ...]
    log_density: tuple[float, ...]
    best: int
    reason: str

    @property
    def elbo(self) -> float:
        """The best ELBO, in nats; ``-inf`` for a path without a Gaussian."""
        return self.elbos[self.best] if self.elbos else -math.inf


class Scout:
    """The local Gaussians of one path and their ELBOs, computed as the path goes on."""

    def __init__(self, density: UnconstrainedDensity, history: int, num_draws: int, *, exact: bool = False) -> None:
        self.density, self.local, self.exact = density, LocalGaussians(history), exact
        self.noise = torch.randn(num_draws, density.dim, dtype=torch.float64, device=density.device)
        self.gaussian: Gaussian | None = None  # the best so far
        self.elbos: list[float] = []
        self.hessian: Tensor | None = None

    @property
    def best(self) -> int:
        """Index of the best Gaussian so far."""
        return max(range(len(self.elbos)), key=self.elbos.__getitem__, default=0)

    def end(self, trail: Trail) -> str:
        """Why a path ends here, if it does, asked of long ones only. It has left its best Gaussian far behind, as
        densities without a mode are climbed for ever; or Newton's method, with exact Hessians, finds its end at once.
        Every path ends when the time is over.
        """
        if is_time_over():
            return "stopped"
        if len(trail.points) % _LOOK:
            return ""
        self.look(trail)
        if len(self.elbos) - self.best > _PATIENCE:
            return "stopped"
        return "converged" if self.exact and self._leap(trail) else ""

    def _leap(self, trail: Trail) -> bool:
        if self.density.dim > MOST_DIMENSIONS:
            return False
        found = newton(self.density.descent, self._curvature, trail.points[-1], torch.finfo(self.density.dtype).eps)
        trail.points += found
        return bool(found)

    def _curvature(self, position: Tensor) -> Tensor | None:
        hessian = self.density.hessian(position)
        return None if hessian is None else -hessian

    def look(self, trail: Trail) -> None:
        """Judge the points that are new."""
        self._judge(self.local.advance(trail))

    def finish(self, trail: Trail) -> tuple[OptimizationPath, Gaussian | None]:
        """The summary of a path that has ended and its best Gaussian, if exact that of the Hessian among them."""
        if trail.reason == "converged" and self.exact and torch.finfo(self.density.dtype).bits < 64:
            self._leap(trail)  # rounding can end a path on a ridge, where values no longer change
        self.look(trail)
        end = trail.points[-1]
        if trail.reason == "converged" and self.density.dim <= MOST_DIMENSIONS:
            self.hessian = self.density.hessian(end.position)
        if self.exact and self.hessian is not None:
            self._judge([_laplace(end, self.hessian)])
        path = OptimizationPath(tuple(self.elbos), tuple(-p.value for p in trail.points), self.best, trail.reason)
        return path, self.gaussian if path.elbo > -math.inf else None

    @torch.no_grad()
    def _judge(self, parts: list[Gaussian | None]) -> None:
        """ELBOs, of the last Gaussians first: when the time is over the others have none, but a path has one."""
        elbos, places = [-math.inf] * len(parts), [(i, p) for i, p in enumerate(parts) if p is not None]
        while places:
            late, known = is_time_over(), max([*self.elbos, *elbos], default=-math.inf) > -math.inf
            if late and known:
                break
            size = 1 if late else max(CHUNK // len(self.noise), 1)
            now, places = places[-size:], places[:-size]
            for (i, _), elbo in zip(now, self._elbos([part for _, part in now]), strict=True):
                elbos[i] = elbo
        before = len(self.elbos)
        self.elbos += elbos
        if parts and self.best >= before:
            self.gaussian = parts[self.best - before]

    def _elbos(self, parts: list[Gaussian]) -> list[float]:
        draws = torch.cat([part.push(self.noise) for part in parts])
        log_p = self.density(draws.to(self.density.dtype)).double().reshape(len(parts), -1)
        log_q = torch.stack([standard_normal(self.noise) - part.log_scale for part in parts])
        return (log_p - log_q).mean(1).nan_to_num(-math.inf, -math.inf, -math.inf).tolist()


def explore(
    density: UnconstrainedDensity, starts: Sequence[Tensor], options: Options, num_draws: int, *, exact: bool = True
) -> tuple[tuple[OptimizationPath, ...], list[Gaussian]]:
    """Climb from several starts.

    :param density: the target.
    :param starts: vectors ``(dim,)``.
    :param options: of the optimiser.
    :param num_draws: draws behind each ELBO.
    :param exact: have the Gaussian of the exact Hessian at the end of a path among its Gaussians, and end paths of more
        than 50 iterations by Newton's method where that converges.
    :returns: the paths, and the best Gaussians of those that have one, best first.
    :raises ValueError: if there is none, or the density does not fall off around one.
    """
    scouts = [Scout(density, options.history, num_draws, exact=exact) for _ in starts]
    trails = minimise(density.descent, starts, options, [scout.end for scout in scouts])
    ends = [scout.finish(trail) for scout, trail in zip(scouts, trails, strict=True)]
    kept = {scout: gaussian for scout, (_, gaussian) in zip(scouts, ends, strict=True) if gaussian is not None}
    if not kept:
        raise improper(f"none of {len(trails)} paths has a Gaussian: they ended by {[t.reason for t in trails]}")
    peak = max(-point.value for trail in trails for point in trail.points)
    for scout, gaussian in kept.items():
        if not is_time_over():  # a path that was cut has a Gaussian of the way, which shows nothing
            check_proper(density, gaussian, scout.hessian, peak)
    best_first = sorted(kept, key=lambda scout: -scout.elbos[scout.best])
    return tuple(path for path, _ in ends), [kept[scout] for scout in best_first]


def elbos(density: UnconstrainedDensity, parts: Sequence[Gaussian], num_draws: int) -> list[float]:
    """ELBOs of Gaussians on shared noise, in nats; ``-inf`` where the density is not finite."""
    scout = Scout(density, 1, num_draws)
    scout._judge(list(parts))
    return scout.elbos


def _laplace(mode: Point, hessian: Tensor) -> Gaussian | None:
    """The Gaussian of the exact Hessian, centred where Newton's next step leads to."""
    inverse, failed = torch.linalg.inv_ex(-hessian)
    loc = mode.position - inverse @ mode.gradient
    return None if bool(failed) else full_gaussian(loc, 0.5 * (inverse + inverse.T))


@torch.no_grad()
def check_proper(density: UnconstrainedDensity, part: Gaussian, hessian: Tensor | None, peak: float) -> None:
    """Refuse a density that has not fallen below its peak far out on the principal axes of a Gaussian or a Hessian.

    :raises ValueError: with the site in whose direction it has not.
    """
    axes = _axes(part) if hessian is None else torch.cat([_axes(part), _axes_of_curvature(part, hessian)])
    ways = torch.cat([axes, -axes])
    reach = torch.cat([far * ways for far in _FAR])
    rise = (density((part.loc + reach).to(density.dtype)).double() - peak).nan_to_num(-math.inf, math.inf)
    rise = rise.reshape(len(_FAR), -1).amin(0)  # at one distance there may be another mode
    if bool((rise > -_DROP).any()):
        worst = int(rise.argmax())
        raise improper(
            f"far out, mostly along site {density.largest(ways[worst])!r}, the log density is "
            f"{float(rise[worst]):+.3g} nats from its best value"
        )


def _axes(part: Gaussian) -> Tensor:
    """Principal axes ``(n, dim)``, one standard deviation long; in many dimensions those of the low-rank part."""
    if part.loc.shape[-1] > _MOST_AXES:
        return part.push(part.basis.T) - part.loc
    values, vectors = torch.linalg.eigh(part.covariance)
    return values.clamp(min=0).sqrt().unsqueeze(-1) * vectors.T


def _axes_of_curvature(part: Gaussian, hessian: Tensor) -> Tensor:
    """Eigenvectors of a Hessian, as long as the Gaussian is wide along them; flat directions are among them."""
    vectors = torch.linalg.eigh(hessian).eigenvectors.T
    return ((vectors @ part.covariance) * vectors).sum(1).clamp(min=0).sqrt().unsqueeze(-1) * vectors


def improper(found: str) -> ValueError:
    """The error for a posterior that is not proper, as far as one can see."""
    return ValueError(
        f"the posterior looks improper, as flat or ever rising densities do: {found}. Expected a density that falls "
        "off in every direction. Give every latent a proper prior, and check that the data identify them. Write "
        "an angle as dist.Uniform(-pi, pi) with a factor: dist.VonMises repeats itself on the real line."
    )
