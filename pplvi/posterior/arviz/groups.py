"""The groups of ArviZ's schema, filled from posteriors: draws, predictions, densities, data and diagnostics.

:func:`chains_of` decides which draws are exported, one chain for each restart or MCMC chain. Whatever belongs to a draw
(its values, densities, weights) is then taken at the same index, so that the groups stay aligned draw by draw.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from pyro.infer import MCMC
from torch import Tensor

from pplvi.posterior.arviz.schema import SAMPLE, Group, Groups, Names, equal, stack_chains, to_numpy
from pplvi.posterior.draws import Draws, log_prior, predict, score
from pplvi.posterior.gather import align
from pplvi.posterior.looking import name_of
from pplvi.posterior.posterior import Posterior
from pplvi.posterior.predictions import observed_as_before, told_how_to_predict
from pplvi.posterior.weighted import WeightedDraws
from pplvi.programs.calls import checked_call
from pplvi.programs.inputs import to_inputs
from pplvi.programs.sites import Plate
from pplvi.weights.resampling import resample

DrawsKind = Literal["psis", "guide"]
Dims = Mapping[str, Sequence[str]]
NewInputs = tuple[Any, ...] | Mapping[str, Any]


@dataclass(frozen=True)
class Chain:
    """One chain as it is exported: its draws, and statistics of them of shape ``(num_draws, *batch)``."""

    posterior: Posterior
    draws: Draws
    stats: dict[str, Tensor]


def chains_of(posterior: Posterior, kind: DrawsKind) -> list[Chain]:
    """The chains of a posterior: one for each of MCMC, one for a guide."""
    if posterior.is_mcmc:
        parts = torch.arange(posterior.num_draws).reshape(posterior.num_chains, -1)
        return [_chain(posterior, part) for part in parts]
    if kind == "psis":
        _check_weights(posterior)
        pool = posterior.pool
        return [_chain(posterior, resample(pool.psis_log_weight, posterior.num_draws), pool)]
    return [Chain(posterior, posterior.draws, _stats(posterior))]


def _check_weights(posterior: Posterior) -> None:
    if posterior.is_dirac:
        raise ValueError(
            f"draws='psis' for a guide that holds {sorted(posterior.point_sites)} at a point; expected one whose draws "
            "have importance weights. Export the draws as they are, with draws='guide'."
        )


def _stats(posterior: WeightedDraws) -> dict[str, Tensor]:
    if posterior.is_mcmc:
        return {"log_p": posterior.log_p}
    names = ("log_p", "log_q", "log_weight", "psis_log_weight") if posterior.has_weights else ()
    return {name: getattr(posterior, name) for name in names}


def _chain(posterior: Posterior, index: Tensor, pool: WeightedDraws | None = None) -> Chain:
    """The draws at ``index``, ``(num_draws, *batch)`` or ``(num_draws,)``: everything of a draw is taken together.

    :param pool: what they are taken from, if there are more than those of the posterior.
    """
    source = posterior if pool is None else pool
    batch = posterior.draws.batch if index.dim() > 1 else ()

    def pick(values: Mapping[str, Tensor], plates: Mapping[str, tuple[Plate, ...]]) -> dict[str, Tensor]:
        return {name: _pick(value, index, batch, plates[name]) for name, value in values.items()}

    draws, stats = source.draws, _stats(source)
    latents = pick(draws.latents, draws.plates)
    taken = dataclasses.replace(
        draws,
        latents=latents,
        deterministics=_deterministics(posterior, draws, latents, index),
        log_likelihood=pick(draws.log_likelihood, draws.plates),
        log_factors=pick(draws.log_factors, draws.plates),
        log_p=None,
        log_q=None,
    )
    origin = {} if posterior.is_mcmc else {"source_draw": index}
    return Chain(posterior, taken, pick(stats, dict.fromkeys(stats, draws.batch)) | origin)


def _pick(values: Tensor, index: Tensor, batch: Sequence[Plate], plates: Sequence[Plate]) -> Tensor:
    aligned = align(index, batch, plates) if batch else index
    aligned = aligned.reshape(tuple(aligned.shape) + (1,) * (values.dim() - aligned.dim()))
    return torch.take_along_dim(values, aligned.to(values.device), 0)


def _deterministics(posterior: Posterior, draws: Draws, latents: dict[str, Tensor], index: Tensor) -> dict[str, Tensor]:
    """Deterministic sites of the picked draws; run anew where one may mix batch elements that were picked apart."""
    found = draws.deterministics
    if index.dim() == 1 or not found:
        return {name: value[index.to(value.device)] for name, value in found.items()}
    return _run(score, posterior, latents, len(index)).deterministics


def _run(how: Callable[..., Draws], posterior: Posterior, latents: Mapping[str, Tensor] | None, size: int) -> Draws:
    return how(
        posterior.model, latents, posterior.args, posterior.kwargs, num_draws=size, vectorize=posterior.vectorize
    )


# --- groups ---------------------------------------------------------------------------------------------------------


def base_groups(chains: Sequence[Chain], dims: Dims) -> Groups:
    """The groups that need no further run of the model."""
    first, names = chains[0].draws, Names(chains[0].draws.plates, dims)
    stats = [chain.stats for chain in chains]
    return {
        "posterior": stack_chains([chain.draws.latents | chain.draws.deterministics for chain in chains], names),
        "log_likelihood": stack_chains([chain.draws.log_likelihood for chain in chains], names, like=first.observed),
        "sample_stats": stack_chains(stats, Names(dict.fromkeys(stats[0], first.batch))),
        "observed_data": {n: (names.of(n, v.shape), to_numpy(v)) for n, v in first.observed.items()},
        "constant_data": _constant_data(chains[0].posterior, names),
    }


def predictive_groups(chains: Sequence[Chain], dims: Dims) -> Groups:
    """Observed sites drawn anew, one for each draw of the posterior."""
    drawn = [_run(predict, chain.posterior, chain.draws.latents, chain.draws.num_draws) for chain in chains]
    return {"posterior_predictive": stack_chains([draws.observed for draws in drawn], Names(drawn[0].plates, dims))}


def prior_densities(chains: Sequence[Chain], dims: Dims) -> Groups:
    """The log density of each latent site at the draws of the posterior; nothing where sites are enumerated."""
    found = []
    for chain in chains:
        source, draws = chain.posterior, chain.draws
        call = source.args, source.kwargs
        found.append(log_prior(source.model, call, draws.latents, draws.num_draws, source.vectorize))
    first = chains[0].draws
    like = {name: value[0] for name, value in first.latents.items()}
    return {"log_prior": stack_chains(found, Names(first.plates, dims), like=like)} if found[0] else {}


def new_groups(chains: Sequence[Chain], inputs: NewInputs, dims: Dims) -> Groups:
    """Observed sites drawn for new inputs, one for each draw of the posterior, and these inputs.

    :raises ValueError: if a latent site has another shape for them than it had in the fit.
    """
    args, kwargs = ((), inputs) if isinstance(inputs, Mapping) else (inputs, {})
    first = chains[0].posterior
    call = to_inputs(first.model, *checked_call(args, kwargs, "to_arviz(posterior, predictions=(x_new,))"))
    drawn = []
    for chain in chains:
        source, size = chain.posterior, chain.draws.num_draws
        with told_how_to_predict():
            found = predict(source.model, chain.draws.latents, *call, num_draws=size, vectorize=source.vectorize)
        drawn.append(observed_as_before(found, source.draws))
    names = Names(drawn[0].plates, dims)
    return {
        "predictions": stack_chains([draws.observed for draws in drawn], names),
        "predictions_constant_data": _constants(first, *call, {}, names),
    }


def prior_groups(posterior: Posterior, num_draws: int, dims: Dims) -> Groups:
    """The sites of the model drawn without the data.

    :raises ValueError: if a prior cannot be drawn from.
    """
    try:
        drawn = _run(predict, posterior, None, num_draws)
    except NotImplementedError as error:
        raise ValueError(
            f"the prior cannot be drawn from: {error}; expected proper priors at every latent site. Leave the prior "
            "groups out with num_prior=0."
        ) from error
    names = Names(drawn.plates, dims)
    prior = stack_chains([drawn.latents | drawn.deterministics], names)
    return {"prior": prior, "prior_predictive": stack_chains([drawn.observed], names)}


def _constant_data(posterior: Posterior, names: Names) -> Group:
    return _constants(posterior, posterior.args, posterior.kwargs, posterior.draws.observed, names)


def _constants(
    posterior: Posterior, args: tuple[Any, ...], kwargs: Mapping[str, Any], values: Mapping[str, Tensor], names: Names
) -> Group:
    """Array arguments of the model, by the names in its signature, without the observed values among them."""
    observed = [to_numpy(value).squeeze() for value in values.values()]
    found = dict(_arguments(posterior.model, args, kwargs))
    kept = {n: v for n, v in found.items() if not any(equal(v.squeeze(), data) for data in observed)}
    group = {name: (names.of(name, value.shape), value) for name, value in kept.items()}
    taken = {dim for dims, _ in group.values() for dim in dims}
    return {f"{name}_data" if name in taken else name: variable for name, variable in group.items()}


def _arguments(model: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Iterator[tuple[str, np.ndarray]]:
    program = inspect.unwrap(model, stop=inspect.ismethod)  # what a method wraps is not bound
    signature = inspect.signature(program.forward if isinstance(program, torch.nn.Module) else program)
    for name, value in signature.bind(*args, **kwargs).arguments.items():
        keywords = signature.parameters[name].kind is inspect.Parameter.VAR_KEYWORD
        for own, entry in value.items() if keywords else [(name, value)]:
            yield from _arrays(own, entry)


def _arrays(name: str, value: Any) -> Iterator[tuple[str, np.ndarray]]:
    """Tensors and arrays in an argument; entries of containers are called ``<name>_<key>``."""
    if isinstance(value, Tensor) or (isinstance(value, np.ndarray) and value.dtype != object):
        yield name, to_numpy(value)
    elif isinstance(value, (Mapping, list, tuple)):
        for key, entry in value.items() if isinstance(value, Mapping) else enumerate(value):
            yield from _arrays(f"{name}_{key}", entry)


# --- diagnostics ----------------------------------------------------------------------------------------------------


def diagnostics(posteriors: Sequence[Posterior]) -> Group:
    """k-hat and ESS of the weights before resampling, ``(chain, *batch)``."""
    if not all(posterior.has_weights for posterior in posteriors):
        return {}
    dims = ("chain", *(plate.name for plate in posteriors[0].draws.batch))
    return {name: (dims, np.stack([to_numpy(getattr(p, name)) for p in posteriors])) for name in ("pareto_k", "ess")}


def divergent_transitions(posteriors: Sequence[Posterior]) -> Group:
    """Which draws of MCMC runs diverged, where their kernels say so."""
    found = [row for posterior in posteriors for row in _diverging(posterior.mcmc)]
    return {"diverging": (SAMPLE, np.stack(found))} if found else {}


def _diverging(mcmc: MCMC | None) -> Iterator[np.ndarray]:
    """One row for each chain; Pyro counts divergent draws from the first one after the warm-up."""
    if mcmc is None:
        return
    for draws in mcmc.diagnostics().get("divergences", {}).values():
        yield np.isin(np.arange(mcmc.num_samples), draws)


def summary(posteriors: Sequence[Posterior], best: int) -> dict[str, Any]:
    """Attributes that say how good the weights are, one number for each chain, and the verdict on the best of them."""
    guide = posteriors[0].guide
    names: dict[str, Any] = {} if guide is None else {"guide": name_of(guide)}
    names |= {"verdict": posteriors[best].verdict.word, "verdict_reasons": "; ".join(posteriors[best].verdict.reasons)}
    if posteriors[best].evidence is not None:
        value, error = posteriors[best].total_log_evidence
        return names | {"log_evidence": value, "log_evidence_error": error}
    if not all(posterior.has_weights for posterior in posteriors):
        return names
    numbers = [quality(posterior) for posterior in posteriors]
    return names | {key: np.array([row[key] for row in numbers]) for key in numbers[0]}


def quality(posterior: Posterior) -> dict[str, float]:
    """How good the weights are: the worst k-hat and ESS of the batch, ELBO and log evidence of all data, in nats."""
    evidence = posterior.total_log_evidence
    return {
        "pareto_k": posterior.pareto_k.max().item(),
        "ess": posterior.ess.min().item(),
        "elbo": posterior.elbo.value,
        "log_evidence": evidence.value,
        "log_evidence_error": evidence.error,
    }
