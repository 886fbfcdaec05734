r"""Leave-one-out cross-validation of an approximate posterior, by Pareto-smoothed importance sampling.

Draws of a guide q stand for the posterior without observation i after weighting them by

.. math:: r_{is} \propto \frac{p(x, z_s)}{q(z_s)\, p(x_i \mid z_s)}

One Pareto fit per observation smooths both corrections at once: that for the guide and that for the observation left
out. Plain ``az.loo`` on the draws knows only the second. The result is ArviZ's own.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from pplvi.posterior.arviz.schema import to_numpy
from pplvi.posterior.arviz.versions import Pointwise, loo_of_chains
from pplvi.posterior.draws import Draws
from pplvi.posterior.gather import align
from pplvi.posterior.weighted import WeightedDraws
from pplvi.programs.errors import warn
from pplvi.programs.sites import Plate
from pplvi.weights.pareto import pareto_k_threshold, pareto_smooth

if TYPE_CHECKING:
    from arviz import ELPDData
    from xarray import DataArray

_CHUNK = 2**22
"""How many weights are smoothed at a time: 32 MiB in double precision, a few times over."""

LeftOut = str | Mapping[str, Sequence[Any] | np.ndarray | Tensor]
Members = dict[str, tuple[Tensor, np.ndarray]]  # the group of each element of a plate, and names of the groups


def loo(
    posterior: WeightedDraws, var_name: str | Sequence[str] | None = None, groups: LeftOut | None = None
) -> ELPDData:
    r"""Expected log predictive density of each observation given all others.

    .. math::
        \widehat{\text{elpd}}_i = \log \sum_s \tilde r_{is}\, p(x_i \mid z_s), \qquad
        p_\text{loo} = \sum_i \log \sum_s \tilde w_s\, p(x_i \mid z_s) - \widehat{\text{elpd}}_i

    with :math:`\tilde r_i` and :math:`\tilde w` Pareto-smoothed and normalised. Where weights are per batch element,
    an observation uses those of its own element. Observations that are masked out (their log likelihood is 0 in every
    draw) do not count. MCMC draws are passed to ArviZ's own ``az.loo``.

    Several sites are one: an observation is what they have in an element of the plates that all of them are in, and its
    density is the product of theirs. A ``pyro.factor`` in a plate can be one of them; one that is not named stays where
    it is, as a part of the prior.

    ``groups`` leaves out more at once: all that belongs to an element of a plate, ``groups="school"``, or all elements
    of a plate that have the same label, ``groups={"pupil": school_of_pupil}``. An observation is then a group, and its
    density is the product of those in it. Latents of a group that is left out are drawn with its data, so that their
    weights are uneven and k-hat is often too large.

    Warns (``UserWarning``) as ``az.loo`` does, if a Pareto k is above the threshold for this number of draws.

    Source: Magnusson, Andersen, Jonasson and Vehtari 2019, Bayesian leave-one-out cross-validation for large data;
    Vehtari, Gelman and Gabry 2017, Practical Bayesian model evaluation using leave-one-out cross-validation; Merkle,
    Furr and Rabe-Hesketh 2019, Bayesian comparison of latent variable models (leave-group-out).

    :param posterior: draws with their weights, or MCMC draws.
    :param var_name: the observed site or factor, or several; may be left out if there is only one.
    :param groups: the plate whose elements are left out, or labels of the elements of a plate, by its name.
    :returns: ArviZ's ``ELPDData``, pointwise, in nats, with the plates as dimensions: ``az.compare`` takes it.
    :raises ValueError: if there is no such site, several and none is named, or no plate that those named share; if a
        factor may or may not belong to the observations; if groups do not fit; or if the draws have no weights (a guide
        that holds sites at a point, a subsampled plate).

    >>> from pyro.distributions import Normal
    >>> from pplvi.programs.sites import Plate
    >>> _, y = torch.manual_seed(0), torch.tensor([0.5, 1.0, -0.5])
    >>> prior, guide = Normal(0.0, 1.0), Normal(0.25, 0.5)  # the exact posterior of the mean of three
    >>> z = guide.sample((4000,))
    >>> likelihood = Normal(z[:, None], 1.0).log_prob(y)
    >>> log_p, plates = prior.log_prob(z) + likelihood.sum(1), {"z": (), "y": (Plate("data", -1, 3, 3),)}
    >>> draws = Draws({"z": z}, {}, {"y": y}, {"y": likelihood}, log_p, guide.log_prob(z), (), plates, frozenset())
    >>> found = loo(WeightedDraws(draws))
    >>> round(found["se"], 1), found.pareto_k.dims
    (0.3, ('data',))
    >>> loo(WeightedDraws(draws), groups={"data": ["a", "a", "b"]}).pareto_k.coords["data"].values
    array(['a', 'b'], dtype='<U1')
    """
    draws, names = posterior.draws, _sites(posterior.draws, var_name)
    plates = _common_plates(draws, names)
    members = _members(groups, plates, names)
    batch = () if posterior.is_mcmc else draws.batch
    own = {plate.name for plate in batch}
    kept = tuple(plate for plate in plates if plate.name in own or plate.name in members)
    rest = {plate.name for plate in kept} - own
    likelihood = _joined(_together(draws, names, kept), kept, members, rest)
    counted = (likelihood != 0).any(0)
    if not counted.any():
        raise ValueError(f"every observation of {_quoted(names)} is masked out: expected at least one that counts.")
    if posterior.is_mcmc:
        return _loo_of_mcmc(posterior, likelihood, counted, members)
    weight = align(posterior.log_weight, batch, kept)
    columns = torch.arange(weight[0].numel(), device="cpu").reshape(weight.shape[1:]).expand(counted.shape)
    values = likelihood if counted.all() else likelihood[:, counted]  # where all count, no copy of the largest array
    found = _pointwise(values, weight.reshape(len(weight), -1), columns[counted.cpu()])
    # Elements of the batch are independent: what each predicts does not depend on the others that are left out.
    elpd, lpd = (_joined(_on_grid(each, counted, 0.0), kept, members, own) for each in found[:2])
    pareto_k = _joined(_on_grid(found[2], counted, -math.inf), kept, members, own, torch.amax)
    counted = _joined(counted.cpu(), kept, members, own, torch.any)
    return _elpd_data((elpd, lpd - elpd, pareto_k), counted, members, posterior.num_draws)


# --- what is left out -----------------------------------------------------------------------------------------------


def _quoted(names: Sequence[str]) -> str:
    return f"site {names[0]!r}" if len(names) == 1 else f"the sites {list(names)}"


def _sites(draws: Draws, var_name: str | Sequence[str] | None) -> list[str]:
    observed, factors = sorted(draws.log_likelihood), sorted(draws.log_factors)
    names = observed or [name for name in factors if draws.plates[name]]
    if not names:
        raise ValueError(
            "the model has no observed site with a log likelihood for each datum: they come in by pyro.factor outside "
            "of plates, or are joined by a site that is summed out. Expected pyro.sample(..., obs=...) given the "
            "latents that are drawn, or pyro.factor in the plate of the data."
        )
    if var_name is None:
        return [_only(draws, names, factors)]
    asked = [var_name] if isinstance(var_name, str) else list(dict.fromkeys(var_name))
    if not asked or not set(asked) <= {*observed, *factors}:
        raise ValueError(
            f"var_name={var_name!r} names no observed site with a log likelihood; expected one of "
            f"{[*observed, *factors]}, or a list of some. Pass its name as var_name."
        )
    if alone := [name for name in asked if name in factors and not draws.plates[name]]:
        raise ValueError(
            f"the factor {alone[0]!r} is in no plate, so that it is not known which observations it belongs to: "
            "expected pyro.factor inside the plate of the data. Leave it out of var_name, as a part of the prior."
        )
    return asked


def _only(draws: Draws, names: Sequence[str], factors: Sequence[str]) -> str:
    """The one site that can be meant."""
    if len(names) > 1:
        raise ValueError(
            f"several observed sites {list(names)}, and it is not known what one observation is: pass var_name, the "
            "name of one or a list of those that belong together."
        )
    around = {plate.name for plate in draws.plates[names[0]]}
    beside = [n for n in factors if n != names[0] and around & {plate.name for plate in draws.plates[n]}]
    if beside:
        raise ValueError(
            f"the factors {beside} are in plates of {names[0]!r}, and it is not known whether they are left out with "
            f"its observations: pass var_name={[names[0], *beside]} if they are, or var_name={names[0]!r} if they "
            "belong to the prior."
        )
    return names[0]


def _common_plates(draws: Draws, names: Sequence[str]) -> tuple[Plate, ...]:
    """The plates that several sites share, or those of one."""
    plates = {name: draws.plates[name] for name in names}
    common = [p for p in plates[names[0]] if all(p.name in {q.name for q in plates[name]} for name in names)]
    if len(names) > 1 and not common:
        inside = ", ".join(f"{name!r} in {[p.name for p in plates[name]]}" for name in names)
        raise ValueError(
            f"the sites {list(names)} have no plate in common ({inside}), so that it is not known which of their "
            "observations are left out together: expected sites of one plate. Leave them out one site at a time."
        )
    return tuple(common)


def _members(groups: LeftOut | None, plates: Sequence[Plate], names: Sequence[str]) -> Members:
    """The group of each element of the plates that remain, and what the groups are called."""
    if groups is None:
        return {plate.name: _each(plate) for plate in plates}
    sizes = {plate.name: plate.size for plate in plates}
    given = {groups: None} if isinstance(groups, str) else groups
    if not isinstance(given, Mapping) or not given or not set(given) <= set(sizes):
        raise ValueError(
            f"groups={groups!r}; expected a plate of {_quoted(names)}, one of {list(sizes)}, or a dictionary of labels "
            "for the elements of one, {'plate': labels}."
        )
    labels = {name: None if found is None else to_numpy(found) for name, found in given.items()}
    for name, found in labels.items():
        if found is not None and found.shape != (sizes[name],):
            raise ValueError(
                f"groups[{name!r}] has shape {found.shape}; expected one label for each of the {sizes[name]} elements "
                f"of plate {name!r}."
            )
    chosen = [plate for plate in plates if plate.name in labels]
    return {p.name: _each(p) if labels[p.name] is None else _labelled(labels[p.name]) for p in chosen}


def _each(plate: Plate) -> tuple[Tensor, np.ndarray]:
    return torch.arange(plate.size, device="cpu"), np.arange(plate.size)


def _labelled(labels: Any) -> tuple[Tensor, np.ndarray]:
    names, numbers = np.unique(labels, return_inverse=True)
    return torch.as_tensor(numbers, device="cpu"), names


def _joined(
    values: Tensor, plates: Sequence[Plate], members: Members, only: set[str], how: Callable[..., Tensor] = torch.sum
) -> Tensor:
    """Values of shape ``(..., *plates)``, put together by the groups of some plates; one without groups is a group."""
    for dim, plate in reversed(list(enumerate(plates, values.dim() - len(plates)))):
        if plate.name in only and plate.name not in members:
            values = how(values, dim)
        elif plate.name in only:
            numbers, names = members[plate.name]
            if not torch.equal(numbers, torch.arange(values.shape[dim], device="cpu")):
                own = [(numbers == group).nonzero()[:, 0].to(values.device) for group in range(len(names))]
                values = torch.stack([how(values.index_select(dim, each), dim) for each in own], dim)
    return values


def _together(draws: Draws, names: Sequence[str], kept: Sequence[Plate]) -> Tensor:
    """The log density of several sites for each element of some plates that they share."""
    total: Tensor | int = 0
    for name in names:
        others = [p.name for p in draws.plates[name] if p.name not in {q.name for q in kept}]
        value = draws.log_likelihood[name] if name in draws.log_likelihood else draws.log_factors[name]
        own = [p.name for p in draws.plates[name]]
        value = value.permute(0, *(1 + own.index(n) for n in [*(p.name for p in kept), *others]))
        value = value.flatten(1 + len(kept)).sum(-1) if others else value
        total = value if isinstance(total, int) else total + value  # of one site no copy
    return torch.as_tensor(total)


def _on_grid(values: Tensor, counted: Tensor, missing: float) -> Tensor:
    grid = values.new_full(counted.shape, missing)
    grid[counted.cpu()] = values
    return grid


def _coordinates(counted: np.ndarray, members: Members) -> DataArray:
    """An empty array with the dimensions of the observations: the plates, or one dimension where some do not count."""
    from xarray import DataArray

    dims = list(members)
    grid = DataArray(np.zeros(counted.shape), {name: names for name, (_, names) in members.items()}, dims)
    return grid if counted.all() else grid.stack(observation=dims)[counted.ravel()].reset_index("observation")


# --- densities of what is left out ----------------------------------------------------------------------------------


def _pointwise(likelihood: Tensor, log_weight: Tensor, columns: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Leave-one-out and within-sample log predictive densities and k-hat, for ``likelihood`` of shape ``(S, N)``.

    ``columns`` says which column of ``log_weight`` belongs to each of the ``N`` observations.
    """
    likelihood, log_weight = likelihood.reshape(len(likelihood), -1), log_weight.double().cpu()
    posterior = torch.log_softmax(pareto_smooth(log_weight)[0], 0)
    # Written in place: small results that were kept one by one would keep the memory around them from being used again.
    elpd, lpd, pareto_k = log_weight.new_empty(3, len(columns))
    for chunk in torch.arange(len(columns), device="cpu").split(max(1, _CHUNK // len(likelihood))):
        density = likelihood[:, chunk].double().cpu()
        found = _leave_out(density, log_weight[:, columns[chunk]], posterior[:, columns[chunk]])
        elpd[chunk], lpd[chunk], pareto_k[chunk] = found
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


def _elpd_data(found: Sequence[Tensor], counted: Tensor, members: Members, num_draws: int) -> ELPDData:
    coords, threshold = _coordinates(counted.numpy(), members), pareto_k_threshold(num_draws)
    elpd, p, pareto_k = (coords.copy(data=each[counted].numpy().reshape(coords.shape)) for each in found)
    result = Pointwise(elpd, p, pareto_k, num_draws, threshold)
    if result.num_high:
        warn(
            f"Pareto k is above {threshold:.2f} for {result.num_high} of {elpd.size} observations, whose leave-one-out "
            "densities are not to be trusted: they are influential, or the guide is far from the posterior (see its "
            "own k-hat).",
        )
    return result.elpd_data()


def _loo_of_mcmc(posterior: WeightedDraws, likelihood: Tensor, counted: Tensor, members: Members) -> ELPDData:
    def chains(value: Tensor) -> np.ndarray:
        return to_numpy(value.reshape(posterior.num_chains, -1, *value.shape[1:]))

    coords = _coordinates(counted.cpu().numpy(), members)
    likelihood = likelihood[:, counted].reshape(posterior.num_draws, *coords.shape)
    latents = {name: chains(value) for name, value in posterior.draws.latents.items()}
    return loo_of_chains(latents, chains(likelihood), coords)
