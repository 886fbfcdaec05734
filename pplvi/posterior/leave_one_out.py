r"""Leave-one-out cross-validation of an approximate posterior, by Pareto-smoothed importance sampling.

Draws of a guide q stand for the posterior without observation i after weighting them by

.. math:: r_{is} \propto \frac{p(x, z_s)}{q(z_s)\, p(x_i \mid z_s)}

One Pareto fit per observation smooths both corrections at once: that for the guide and that for the observation left
out. Plain ``az.loo`` on the draws knows only the second. The result is ArviZ's own.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from pplvi.posterior.arviz.quiet import arviz_itself
from pplvi.posterior.draws import Draws
from pplvi.posterior.gather import align
from pplvi.posterior.weighted import WeightedDraws
from pplvi.programs.errors import warn
from pplvi.programs.sites import Plate
from pplvi.weights.pareto import pareto_k_threshold, pareto_smooth

if TYPE_CHECKING:
    from arviz.stats.stats_utils import ELPDData
    from xarray import DataArray

_CHUNK = 2**22
"""How many weights are smoothed at a time: 32 MiB in double precision, a few times over."""


def loo(posterior: WeightedDraws, var_name: str | Sequence[str] | None = None) -> ELPDData:
    r"""Expected log predictive density of each observation given all others.

    .. math::
        \widehat{\text{elpd}}_i = \log \sum_s \tilde r_{is}\, p(x_i \mid z_s), \qquad
        p_\text{loo} = \sum_i \log \sum_s \tilde w_s\, p(x_i \mid z_s) - \widehat{\text{elpd}}_i

    with :math:`\tilde r_i` and :math:`\tilde w` Pareto-smoothed and normalised. Where weights are per batch element,
    an observation uses those of its own element. Observations that are masked out (their log likelihood is 0 in every
    draw) do not count. Several sites are one: an observation is what they have in an element of the plates that all of
    them are in, and its density is the product of theirs. MCMC draws are passed to ArviZ's own ``az.loo``.

    Warns (``UserWarning``) as ``az.loo`` does, if a Pareto k is above the threshold for this number of draws.

    Source: Magnusson, Andersen, Jonasson and Vehtari 2019, Bayesian leave-one-out cross-validation for large data;
    Vehtari, Gelman and Gabry 2017, Practical Bayesian model evaluation using leave-one-out cross-validation.

    :param posterior: draws with their weights, or MCMC draws.
    :param var_name: the observed site, or several; may be left out if there is only one.
    :returns: ArviZ's ``ELPDData``, pointwise, in nats, with the plates as dimensions: ``az.compare`` takes it.
    :raises ValueError: if there is no such site, several and none is named, or no plate that those named share, or if
        the draws have no weights (a guide that holds sites at a point, a subsampled plate).

    >>> from pyro.distributions import Normal
    >>> from pplvi.programs.sites import Plate
    >>> _, y = torch.manual_seed(0), torch.tensor([0.5, 1.0, -0.5])
    >>> prior, guide = Normal(0.0, 1.0), Normal(0.25, 0.5)  # the exact posterior of the mean of three
    >>> z = guide.sample((4000,))
    >>> likelihood = Normal(z[:, None], 1.0).log_prob(y)
    >>> log_p, plates = prior.log_prob(z) + likelihood.sum(1), {"z": (), "y": (Plate("data", -1, 3, 3),)}
    >>> draws = Draws({"z": z}, {}, {"y": y}, {"y": likelihood}, log_p, guide.log_prob(z), (), plates, frozenset())
    >>> round(loo(WeightedDraws(draws))["elpd_loo"], 1)
    -4.1
    """
    names = _sites(posterior.draws, var_name)
    likelihood, plates = _together(posterior.draws, names)
    counted = (likelihood != 0).any(0)
    if not counted.any():
        raise ValueError(f"every observation of {_quoted(names)} is masked out: expected at least one that counts.")
    coords = _coordinates(counted.cpu().numpy(), [plate.name for plate in plates])
    if posterior.is_mcmc:
        return _loo_of_mcmc(posterior, likelihood[:, counted], coords)
    weight = align(posterior.log_weight, posterior.draws.batch, plates)
    columns = (
        torch.arange(weight[0].numel(), device="cpu").reshape(weight.shape[1:]).expand(counted.shape)[counted.cpu()]
    )
    elpd, lpd, pareto_k = _pointwise(likelihood[:, counted], weight.reshape(len(weight), -1), columns)
    return _elpd_data(elpd, (lpd - elpd).sum().item(), pareto_k, coords, posterior.num_draws)


def _quoted(names: Sequence[str]) -> str:
    return f"site {names[0]!r}" if len(names) == 1 else f"the sites {list(names)}"


def _sites(draws: Draws, var_name: str | Sequence[str] | None) -> list[str]:
    names = sorted(draws.log_likelihood)
    if not names:
        raise ValueError(
            "the model has no observed site with a log likelihood for each datum: they come in by pyro.factor, or are "
            "joined by a site that is summed out. Expected pyro.sample(..., obs=...) given the latents that are drawn."
        )
    if var_name is None and len(names) == 1:
        return names
    if var_name is None and names:
        raise ValueError(
            f"several observed sites {names}, and it is not known what one observation is: pass var_name, the name "
            "of one or a list of those that belong together."
        )
    asked = [var_name] if var_name is None or isinstance(var_name, str) else list(dict.fromkeys(var_name))
    if not asked or not set(asked) <= set(names):
        raise ValueError(
            f"var_name={var_name!r} names no observed site with a log likelihood; expected one of {names}, or a list "
            "of some. Pass its name as var_name."
        )
    return [name for name in asked if name is not None]


def _together(draws: Draws, names: Sequence[str]) -> tuple[Tensor, tuple[Plate, ...]]:
    """The log likelihood of several sites for each element of the plates that they share, and these plates."""
    plates = {name: draws.plates[name] for name in names}
    common = [p for p in plates[names[0]] if all(p.name in {q.name for q in plates[name]} for name in names)]
    if len(names) > 1 and not common:
        inside = ", ".join(f"{name!r} in {[p.name for p in plates[name]]}" for name in names)
        raise ValueError(
            f"the sites {list(names)} have no plate in common ({inside}), so that it is not known which of their "
            "observations are left out together: expected sites of one plate. Leave them out one site at a time."
        )
    kept = common if len(names) > 1 else plates[names[0]]
    total: Tensor | int = 0
    for name in names:
        others = [p.name for p in plates[name] if p.name not in {q.name for q in kept}]
        value, own = draws.log_likelihood[name], [p.name for p in plates[name]]
        value = value.permute(0, *(1 + own.index(n) for n in [*(p.name for p in kept), *others]))
        total = total + value.flatten(1 + len(kept)).sum(-1) if others else total + value
    return torch.as_tensor(total), tuple(kept)


def _coordinates(counted: np.ndarray, dims: list[str]) -> DataArray:
    """An empty array with the dimensions of the observations: the plates, or one dimension where some do not count."""
    from xarray import DataArray

    grid = DataArray(np.zeros(counted.shape), {d: np.arange(n) for d, n in zip(dims, counted.shape, strict=True)}, dims)
    return grid if counted.all() else grid.stack(observation=dims)[counted.ravel()].reset_index("observation")


def _pointwise(likelihood: Tensor, log_weight: Tensor, columns: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Leave-one-out and within-sample log predictive densities and k-hat, for ``likelihood`` of shape ``(S, N)``.

    ``columns`` says which column of ``log_weight`` belongs to each of the ``N`` observations.
    """
    likelihood, log_weight = likelihood.reshape(len(likelihood), -1), log_weight.double().cpu()
    posterior = torch.log_softmax(pareto_smooth(log_weight)[0], 0)
    parts = []
    for chunk in torch.arange(len(columns), device="cpu").split(max(1, _CHUNK // len(likelihood))):
        density = likelihood[:, chunk].double().cpu()
        parts.append(_leave_out(density, log_weight[:, columns[chunk]], posterior[:, columns[chunk]]))
    elpd, lpd, pareto_k = (torch.cat(part) for part in zip(*parts, strict=True))
    if bad := int(elpd.isnan().sum()):
        raise ValueError(
            f"leave-one-out is undefined for {bad} of {len(elpd)} observations: they have density 0 under some draw, "
            "or no draw has any weight. Expected finite log densities; use a likelihood with wider support, or a guide "
            "nearer to the posterior."
        )
    return elpd, lpd, pareto_k


def _leave_out(density: Tensor, log_weight: Tensor, posterior: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    ratio = log_weight - density
    undefined = ratio.isnan().any(0)
    smoothed, pareto_k = pareto_smooth(ratio.masked_fill(undefined, 0.0))
    elpd = torch.logsumexp(smoothed + density, 0) - torch.logsumexp(smoothed, 0)
    return elpd.masked_fill(undefined, math.nan), torch.logsumexp(posterior + density, 0), pareto_k


def _elpd_data(elpd: Tensor, p_loo: float, pareto_k: Tensor, coords: DataArray, num_draws: int) -> ELPDData:
    threshold = pareto_k_threshold(num_draws)
    high = int((pareto_k > threshold).sum())
    if high:
        warn(
            f"Pareto k is above {threshold:.2f} for {high} of {len(elpd)} observations, whose leave-one-out densities "
            "are not to be trusted: they are influential, or the guide is far from the posterior (see its own k-hat).",
        )
    fields = {
        "elpd_loo": elpd.sum().item(),
        "se": math.sqrt(len(elpd) * elpd.var(correction=0).item()),
        "p_loo": p_loo,
        "n_samples": num_draws,
        "n_data_points": len(elpd),
        "warning": bool(high),
        "loo_i": coords.copy(data=elpd.numpy().reshape(coords.shape)).rename("loo_i"),
        "pareto_k": coords.copy(data=pareto_k.numpy().reshape(coords.shape)).rename("pareto_shape"),
        "scale": "log",
        "good_k": threshold,
    }
    return _wrap(fields)


def _wrap(fields: dict[str, Any]) -> ELPDData:
    """ArviZ 0.x keeps the fields in a pandas Series, ArviZ 1.x in a data class with shorter names."""
    try:
        from arviz.stats.stats_utils import ELPDData
    except ImportError:
        from arviz_stats import utils

        names = {"elpd_loo": "elpd", "p_loo": "p", "loo_i": "elpd_i"}
        renamed = {names.get(name, name): value for name, value in fields.items()}
        kind = {} if hasattr(utils, "ELPDDataLOO") else {"kind": "loo"}
        return getattr(utils, "ELPDDataLOO", utils.ELPDData)(**kind, **renamed, approx_posterior=True)
    return ELPDData(data=list(fields.values()), index=list(fields))


def _loo_of_mcmc(posterior: WeightedDraws, likelihood: Tensor, coords: DataArray) -> ELPDData:
    arviz = arviz_itself()

    def chains(value: Tensor) -> np.ndarray:
        return value.reshape(posterior.num_chains, -1, *value.shape[1:]).cpu().numpy()

    likelihood = likelihood.reshape(posterior.num_draws, *coords.shape)
    groups: dict[str, Any] = {
        "posterior": {name: chains(value) for name, value in posterior.draws.latents.items()},
        "log_likelihood": {"observed": chains(likelihood)},
    }
    dims = {"observed": [str(dim) for dim in coords.dims]}
    if hasattr(arviz, "InferenceData"):
        return arviz.loo(arviz.from_dict(**groups, dims=dims), pointwise=True)
    return arviz.loo(arviz.from_dict(groups, dims=dims), pointwise=True)
