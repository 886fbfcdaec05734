"""Posterior draws in ArviZ: what was fitted, as groups with named dimensions.

A plate of the model is a named dimension, and a restart or an MCMC chain is a ``chain``, so that R-hat measures
whether restarts agree. The draws of a guide carry importance weights; unless asked for as they are, they are
resampled with their Pareto-smoothed weights, so that summaries which know no weights are right too.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from pyro.infer import MCMC
from torch import Tensor

from pplvi.kinds.checked import checked
from pplvi.kinds.kinds import Natural, Seed
from pplvi.posterior.arviz.groups import (
    Dims,
    DrawsKind,
    NewInputs,
    base_groups,
    chains_of,
    diagnostics,
    divergent_transitions,
    new_groups,
    predictive_groups,
    prior_densities,
    prior_groups,
    summary,
)
from pplvi.posterior.arviz.schema import Groups, Labels, attributes, datasets, equal_values, storable, to_numpy
from pplvi.posterior.arviz.versions import wrap
from pplvi.posterior.draws import Draws
from pplvi.posterior.posterior import Posterior
from pplvi.programs.errors import explained
from pplvi.programs.state import random_state

if TYPE_CHECKING:
    import arviz

RestartsKind = Literal["all", "best"] | int


@checked
@explained()
def to_arviz(
    source: Any,
    *,
    draws: DrawsKind = "psis",
    restarts: RestartsKind = "all",
    coords: Mapping[str, Labels] | None = None,
    dims: Dims | None = None,
    num_prior: Natural = 500,
    posterior_predictive: bool = True,
    predictions: NewInputs | None = None,
    losses: Tensor | np.ndarray | None = None,
    attrs: Mapping[str, Any] | None = None,
    seed: Seed | None = None,
    args: tuple[Any, ...] = (),
) -> arviz.InferenceData:
    r"""Posterior draws, predictions, densities and data in the groups of ArviZ's schema.

    ``draws="psis"`` resamples the draws of a guide, :math:`z_s \sim q`, in proportion to their Pareto-smoothed
    weights, :math:`\Pr(s) \propto \text{PSIS}(p(x, z_s) / q(z_s))`, each batch element (a datum with weights of its
    own) by itself. Then ``az.summary``, ``az.loo`` and everything else that knows no weights is right as far as k-hat
    says that the weights are. Copies of a draw lie next to each other, so that ArviZ's ESS counts them as one.
    ``draws="guide"`` exports the guide's draws as they are, with their weights in ``sample_stats``.

    ============================  =========================================================================
    group                         variables, with dimensions ``(chain, draw, *plates, *event)`` or without draws
    ============================  =========================================================================
    posterior                     latent and deterministic sites, in constrained space
    posterior_predictive          observed sites, drawn anew given the same draw of ``posterior``
    prior, prior_predictive       the same sites, drawn from the model; one chain
    log_prior                     each latent site, one number (nats) for each element of its plates: what ``az.psense``
                                  (``psens`` before 1.0) scales; not for models with enumerated sites
    predictions,                  observed sites, drawn for new inputs given the same draw of ``posterior``, and these
    predictions_constant_data     inputs
    log_likelihood                each observed site, one number (nats) for each element of its plates
    sample_stats                  ``log_p``, ``log_q``, ``log_weight``, ``psis_log_weight`` (nats), each of them
                                  ``(chain, draw, *batch)``; ``source_draw``, the guide's draw that was taken;
                                  ``pareto_k`` and ``ess``, ``(chain, *batch)``; for MCMC ``log_p`` and ``diverging``
    observed_data                 the data
    constant_data                 tensors and arrays among the arguments of the model that are not observed values,
                                  by the names in its signature
    optimization                  ``loss``, ``(chain, step)``
    ============================  =========================================================================

    Masked observations keep their place in ``log_likelihood``, with zeros: ArviZ's schema has none for elements that
    are not there. Plain ``az.loo`` refuses them as values that are all the same; before ArviZ 1.0 it takes them for
    observations of density 1, which leaves ``elpd_loo`` and ``p_loo`` as they are, but changes ``n_data_points`` and
    ``se`` and gives them an infinite Pareto k, with a warning. :meth:`pplvi.Posterior.loo` leaves them out.

    The plates are named dimensions; what follows them is named by ``dims`` or ``<variable>_dim_<i>``. Dimensions of a
    constant are named after the plates of a site if its shape begins with theirs. A slash in a name, which a NetCDF
    file cannot hold, becomes a point; the attribute ``renamed`` says where.

    Source: Vehtari, Simpson, Gelman, Yao and Gabry 2024, Pareto smoothed importance sampling; Rubin 1988, Using the SIR
    algorithm to simulate posterior distributions; Kumar, Carroll, Hartikainen and Martin 2019, ArviZ.

    :param source: the posterior; several of them, one for each restart, of the same model, data and number of draws; or
        a finished ``pyro.infer.MCMC``.
    :param draws: ``"psis"`` or ``"guide"``. MCMC draws are equally weighted and exported as they are in any case.
    :param restarts: ``"all"``, a chain each, ``"best"``, that of the largest ELBO alone, or the index of one. The prior
        is that of the model of the best, or of this one.
    :param coords: labels of dimensions, ``{"school": ["A", "B"]}``; a dimension without labels counts from 0.
    :param dims: names of all dimensions of a variable but chain and draw, or of those that follow its plates.
    :param num_prior: number of draws from the prior; 0 leaves the two groups out.
    :param posterior_predictive: whether to draw predictions of the data.
    :param predictions: new inputs to predict for, ``(x_new,)`` or keyword arguments by name.
    :param losses: the objective at each step, ``(restarts, num_steps)``, in nats.
    :param attrs: attributes to add, such as the objective and the seed.
    :param seed: makes the export reproducible and leaves the global random state as it was.
    :param args: the arguments of an MCMC run of its kernel's model; for another model, or keyword arguments, export
        ``Posterior.from_mcmc(mcmc, model, args, kwargs)``.
    :returns: an :class:`xarray.DataTree` of these groups; before ArviZ 1.0 its ``InferenceData``. Its attributes,
        and those of ``posterior``, are ``attrs``, ``pareto_k`` (the largest of the batch), ``ess`` (the smallest),
        ``elbo``, ``log_evidence``, ``log_evidence_error`` (nats), for each chain, the ``verdict`` on the best of them
        with its reasons, and the versions of the libraries.
    :raises ValueError: if the draws have no weights and ``draws="psis"``, if a plate outside the batch is subsampled,
        if ``coords`` or ``dims`` do not fit, if restarts do not fit together, or if the prior cannot be drawn from.

    >>> import pyro, pyro.distributions as dist
    >>> def model(y):
    ...     z = pyro.sample("z", dist.Normal(0.0, 1.0))
    ...     with pyro.plate("school", 2):
    ...         pyro.sample("y", dist.Normal(z, 1.0), obs=y)
    >>> def guide(y):
    ...     pyro.sample("z", dist.Normal(0.5, 1.0))
    >>> posterior = Posterior(model, guide, (torch.tensor([1.0, 2.0]),), num_draws=4000, seed=0)
    >>> data = to_arviz(posterior, coords={"school": ["A", "B"]}, seed=0)
    >>> data.log_likelihood.y.dims, round(float(data.posterior.z.mean()), 1)  # exact: 1
    (('chain', 'draw', 'school'), 1.0)
    """
    dims, posteriors = dims or {}, _posteriors(source, args)
    traces = _traces(losses, len(posteriors))
    chosen = _chosen(posteriors, restarts)
    if restarts != "all":
        posteriors, traces, chosen = [posteriors[chosen]], traces[chosen : chosen + 1], 0
    _check_restarts(posteriors)
    with torch.no_grad(), random_state(seed):
        chains = [chain for posterior in posteriors for chain in chains_of(posterior, draws)]
        groups = base_groups(chains, dims) | prior_densities(chains, dims)
        if posterior_predictive:
            groups |= predictive_groups(chains, dims)
        if predictions is not None:
            groups |= new_groups(chains, predictions, dims)
        if num_prior:
            groups |= prior_groups(posteriors[chosen], num_prior, dims)
    groups["sample_stats"] |= diagnostics(posteriors) | divergent_transitions(posteriors)
    groups["optimization"] = {"loss": (("chain", "step"), traces)} if traces.size else {}
    _check_dims(groups, dims)
    kind = ("mcmc" if posteriors[0].evidence is None else "smc") if posteriors[0].is_mcmc else draws
    groups, renamed = storable(groups)
    notes = {"renamed": ", ".join(f"{old} is {new}" for old, new in renamed.items())} if renamed else {}
    described = attributes({"draws": kind, **summary(posteriors, chosen), **notes, **(attrs or {})})
    labels = {renamed.get(dim, dim): values for dim, values in (coords or {}).items()}
    return wrap(datasets(groups, labels, described), described)


# --- what is exported -----------------------------------------------------------------------------------------------


def _posteriors(source: Any, args: tuple[Any, ...]) -> list[Posterior]:
    if isinstance(source, MCMC):
        return [Posterior.from_mcmc(source, source.kernel.model, args)]
    if args:
        raise ValueError(
            "args are those of an MCMC run, and a posterior has its own; expected none. Give the full data to the "
            "posterior: Posterior(model, guide, args), or fit.posterior(args=args)."
        )
    if hasattr(source, "posteriors"):
        raise ValueError(
            "source is a fit; expected its posteriors. Call fit.to_arviz(), which adds losses and settings."
        )
    found = [source] if isinstance(source, Posterior) else source
    if not isinstance(found, Sequence) or not found or not all(isinstance(each, Posterior) for each in found):
        raise ValueError(
            f"source is {source!r}; expected a Posterior, a list of them or a finished pyro.infer.MCMC. "
            "Build one with pplvi.Posterior(model, guide, args)."
        )
    return list(found)


def _traces(losses: Any, restarts: int) -> np.ndarray:
    traces = np.zeros((restarts, 0)) if losses is None else np.atleast_2d(to_numpy(losses))
    if traces.ndim != 2 or len(traces) != restarts:
        raise ValueError(
            f"losses has shape {traces.shape}; expected {restarts} restarts: (restarts, num_steps). Give one row for "
            "each posterior."
        )
    return traces


def _chosen(posteriors: Sequence[Posterior], restarts: RestartsKind) -> int:
    """The given one, or the largest ELBO; for point estimates and MCMC, which have none, the largest joint density."""
    if isinstance(restarts, str):
        return int(np.argmax([(p.elbo if p.has_weights else p.expected_log_prob).value for p in posteriors]))
    if not 0 <= restarts < len(posteriors):
        raise ValueError(f"restarts={restarts}; expected one of the {len(posteriors)} restarts, counted from 0.")
    return restarts


def _check_restarts(posteriors: Sequence[Posterior]) -> None:
    first = posteriors[0].draws
    for i, posterior in enumerate(posteriors):
        shapes, expected = ({n: tuple(v.shape) for n, v in d.latents.items()} for d in (posterior.draws, first))
        if shapes != expected or not equal_values(posterior.draws.observed, first.observed):
            raise ValueError(
                f"restart {i} has draws of shapes {shapes}, restart 0 {expected}; expected equal shapes and data. "
                "Give posteriors of one model, one data set and one number of draws, or export them one by one."
            )
        if subsampled := _subsampled(posterior.draws):
            raise ValueError(
                f"the plates {subsampled} are subsampled, so that densities and predictions would belong to a part of "
                "the data; expected the full data. Give them to the posterior as args."
            )


def _subsampled(draws: Draws) -> list[str]:
    names = {plate.name for site in draws.plates.values() for plate in site if plate.scale != 1}
    return sorted(names - {plate.name for plate in draws.batch})


def _check_dims(groups: Groups, dims: Dims) -> None:
    known = {name for group in groups.values() for name in group}
    if unknown := sorted(set(dims) - known):
        raise ValueError(f"dims names the variables {unknown}; expected some of {sorted(known)}. Correct the names.")
