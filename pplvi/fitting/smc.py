"""``fit(model, "smc")``: tempered sequential Monte Carlo from a Gaussian to the posterior."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pplvi.fitting.recorded import RecordedDensity
from pplvi.fitting.spreading import spread_rows
from pplvi.guides.search.base import FoundGuide
from pplvi.guides.search.batch_and_match import AutoBatchAndMatch
from pplvi.guides.search.gaussians import Gaussian
from pplvi.guides.search.pathfinder import AutoPathfinder
from pplvi.posterior.draws import draw
from pplvi.programs.ranks import Processes
from pplvi.programs.ways import Vectorize
from pplvi.samplers.metric import DENSE, GaussianBase
from pplvi.samplers.tempered import TemperedDraws, TemperedSMC
from pplvi.training.describe import describe
from pplvi.types import Call, Program

# Sds of the base, relative to those of the guide: what is too narrow misses tails, and what is too wide costs levels.
_WIDER, _WIDEST, _VOLUME = 1.1, 3.0, 5.0  # the last in nats
_MOMENT_DRAWS = 4_000
_MATCHES = 60
_BATCHES, _BATCH = 16, 512  # few large ones, where one tells all at once, and where small ones would tell nothing
_SMALL, _LARGE = 64, 256  # dimensions: up to the one, and beyond the other
_PATHS, _ITERATIONS = 4, 150
_APART, _AS_HIGH = 5.0, 10.0  # standard deviations; nats
_JUDGE_DRAWS = 500


@dataclass(frozen=True)
class Islands:
    """Draws of a posterior by sequential Monte Carlo.

    :ivar found: the draws on the unconstrained space, evidences, and what was done.
    :ivar latents: the draws of each site, constrained, ``(islands, draws, *plates, *event)``.
    :ivar evaluations: rows that went through the model with their gradient.
    :ivar start: what the particles started from, in words.
    """

    found: TemperedDraws
    latents: dict[str, Tensor]
    evaluations: int
    start: str

    @property
    def description(self) -> str:
        """What was done, in words."""
        found, last = self.found, self.found.levels[-1]
        moves = sum(level.num_moves + level.num_kept for level in found.levels)
        cut = "" if found.ended == "done" else f"; cut ({found.ended}) when moved up to temperature {found.reached:.3g}"
        return (
            f"{len(found.levels)} temperatures from {self.start}, {moves} moves, the last of {last.num_leapfrog} "
            f"leapfrog steps with acceptance {found.acceptance:.2f}{cut}"
        )


def smc_settings(guide: Any) -> TemperedSMC | None:
    """What a guide asks for: ``"smc"`` with its defaults, or the settings themselves.

    >>> smc_settings("smc") == TemperedSMC(), smc_settings("nuts")
    (True, None)
    """
    if isinstance(guide, TemperedSMC):
        return guide
    return TemperedSMC() if isinstance(guide, str) and guide == "smc" else None


def is_gaussian(fit: Any) -> bool:
    """Whether a fit is of one Gaussian, or an equal mixture of several, that was found by a search."""
    return isinstance(fit.guide, (AutoPathfinder, AutoBatchAndMatch))


def run_islands(
    settings: TemperedSMC,
    model: Program,
    call: Call,
    guide: Program | None,
    start: str,
    *,
    vectorize: Vectorize = None,
    stop: Callable[[], str] = lambda: "",
    ranks: Processes | None = None,
) -> Islands:
    """Bring particles from the Gaussian of a guide to the posterior of a model.

    :param guide: a guide that was found or trained; its distribution is taken as Gaussian on the unconstrained space.
    :param start: what it is called.
    :param stop: asked before each leapfrog step.
    :param ranks: processes that share the evaluations of the density; this one alone unless given.
    :raises ValueError: for models that have no unconstrained density: subsampled plates, discrete latents that are not
        enumerated, no latents.
    """
    density = RecordedDensity(model, *call, prototype=getattr(guide, "model", None), vectorize=vectorize)
    ranks, base = ranks or Processes(), _base(density, guide, call, vectorize)
    base = ranks.first(lambda: base)  # all draw from one, whatever their processors have rounded
    with torch.no_grad():
        found = settings.run(spread_rows(ranks, density.value_and_gradient), base, stop=stop)
        flat = found.draws.reshape(-1, density.dim)
        latents = {n: v.reshape(*found.draws.shape[:2], *v.shape[1:]) for n, v in density.unpack(flat).items()}
    return Islands(found, latents, sum(ranks.gather(density.gradients)), start)


def _base(density: RecordedDensity, guide: Any, call: Call, vectorize: Vectorize) -> GaussianBase:
    """The Gaussian with the moments of a guide, a bit wider."""
    if isinstance(guide, (AutoPathfinder, AutoBatchAndMatch)):
        mixture = guide.get_posterior()
        if len(mixture.parts.loc) == 1:
            one = Gaussian(*(part[0] for part in mixture.parts))
            return _wider(density, one.loc, one.covariance if density.dim <= DENSE else one.variance)
        draws = mixture.sample(torch.Size([_MOMENT_DRAWS]))
    else:
        values = draw(density.model, guide, *call, num_draws=_MOMENT_DRAWS, vectorize=vectorize).latents
        draws = density.pack_rows(values)
    if density.dim > DENSE:
        return _wider(density, draws.mean(0), draws.var(0))
    return _wider(density, draws.mean(0), torch.cov(draws.mT).reshape(density.dim, density.dim))


def _wider(density: RecordedDensity, loc: Tensor, covariance: Tensor) -> GaussianBase:
    """From a covariance ``(dim, dim)``, or variances ``(dim,)`` where that would be more than memory allows."""
    wider = max(_WIDER, min(_WIDEST, math.exp(_VOLUME / density.dim)))
    return GaussianBase.of(loc.to(density.start), wider**2 * covariance.to(density.start))


def found_start(
    forms: Mapping[str, Program], call: Call, *, init: str | None, seed: int | None, vectorize: Vectorize
) -> tuple[str, Program, str]:
    """The easiest form of a model, where a search has the largest bound on the evidence, and the guide that it found.

    :param forms: of the model, by name.
    :param init: ``"pathfinder"``, or ``"match"`` (also ``None``), which goes on from there by batch and match.
    :returns: the name of the form, the guide, and what the guide is called.
    :raises ValueError: the first error if the search fails on every form.
    """
    found: dict[str, FoundGuide] = {}
    errors: list[ValueError] = []
    for form, model in forms.items():
        try:
            found[form] = _searched(model, call, init, {"seed": seed, "vectorize": vectorize})
        except ValueError as error:
            errors.append(error)
    if not found:
        raise errors[0]
    if len(found) == 1:
        (best,) = found
    else:
        best = max(found, key=lambda form: _elbo(found[form], forms[form], call, vectorize))
    return best, found[best], "Pathfinder" if isinstance(found[best], AutoPathfinder) else "batch and match"


def _searched(model: Program, call: Call, init: str | None, options: Mapping[str, Any]) -> FoundGuide:
    paths: AutoPathfinder = AutoPathfinder(
        model,
        num_paths=_PATHS,
        num_components=1,
        moment_matching=0,
        exact_hessian=False,
        lbfgs={"max_iterations": _ITERATIONS},
        **options,
    ).run(*call[0], **call[1])
    return paths if init == "pathfinder" else _matched(paths, model, call, options)


def given_start(guide: Program, model: Program, call: Call, vectorize: Vectorize) -> tuple[Program, str]:
    """Where particles start from a guide that is given, and what that is called.

    From paths of Pathfinder batch and match goes on, as from those of :func:`found_start`: their Gaussians, of low
    rank, are hundreds of nats away from a posterior with many correlated dimensions.
    """
    if not isinstance(guide, AutoPathfinder) or guide.latent_dim > DENSE or guide.is_matched:
        return guide, describe(guide)
    found = _matched(guide, model, call, {"vectorize": vectorize})
    return found, describe(guide) if found is guide else f"{describe(guide)}, matched"


def _matched(paths: AutoPathfinder, model: Program, call: Call, options: Mapping[str, Any]) -> FoundGuide:
    """Batch and match from the best path on; the paths themselves where one has ended at another mode."""
    few: dict[str, Any] = {"num_iterations": _MATCHES}
    if paths.latent_dim <= _SMALL or _LARGE < paths.latent_dim <= DENSE:
        few = {"num_iterations": _BATCHES, "batch_size": max(_BATCH, paths.latent_dim)}
    guide = AutoBatchAndMatch(model, start=paths, **few, **options)
    guide.make_density = RecordedDensity
    guide.run(*call[0], **call[1])
    return paths if _are_modes_apart(paths, guide) else guide


def _are_modes_apart(paths: AutoPathfinder, guide: AutoBatchAndMatch) -> bool:
    """Whether a path has ended as high as a Gaussian is, but where that one never goes."""
    parts, one = paths.gaussians, Gaussian(*(part[0] for part in guide.gaussians))
    far = one.pull(parts.loc).square().sum(1).sqrt() > one.loc.shape[0] ** 0.5 + _APART
    elbos = sorted((path.elbo for path in paths.paths), reverse=True)
    if len(elbos) != len(far):  # components of a mixture that has learned from all paths
        elbos = elbos[:1] * len(far)
    return any(bool(f) and elbo > guide.elbo - _AS_HIGH for f, elbo in zip(far, elbos, strict=False))


def _elbo(guide: FoundGuide, model: Program, call: Call, vectorize: Vectorize) -> float:
    draws = draw(model, guide, *call, num_draws=_JUDGE_DRAWS, vectorize=vectorize)
    assert draws.log_p is not None
    assert draws.log_q is not None
    gap = (draws.log_p - draws.log_q).reshape(_JUDGE_DRAWS, -1).sum(1)
    return float(gap.nan_to_num(-1e30, 1e30, -1e30).mean())
