"""One table over fits: which predicts best, and which approximations can be trusted."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any, TypeAlias

from pplvi.kinds.checked import checked
from pplvi.kinds.kinds import Condition
from pplvi.posterior.arviz.groups import quality
from pplvi.posterior.arviz.quiet import arviz_itself, said_in_a_table
from pplvi.posterior.arviz.schema import equal
from pplvi.posterior.arviz.versions import compared, totals
from pplvi.posterior.looking import name_of
from pplvi.posterior.posterior import Posterior
from pplvi.posterior.verdict import UNRELIABLE, Verdict

if TYPE_CHECKING:
    import pandas
    from arviz import ELPDData


_Fits: TypeAlias = Annotated[
    Mapping[str, Any],
    Condition("a dictionary of fits or posteriors by name, such as {'flow': fit, 'normal': other}", bool),
]


@checked
def compare(fits: _Fits, *, var_name: str | Sequence[str] | None = None) -> pandas.DataFrame:
    r"""Compare fits of the same data by leave-one-out cross-validation, corrected for the guide.

    The expected log predictive density of each fit is :math:`\sum_i \log p(x_i \mid x_{-i})`, estimated by
    :meth:`pplvi.Posterior.loo`; ``az.compare`` makes differences and stacking weights of these. A guide near enough to
    the posterior agrees with NUTS on the same model: differences that remain are between models. Leave-one-out of draws
    that are not reliable says nothing of a model, however large it is: such fits come after all others, with a warning
    and without a difference or a weight.

    The columns of the table:

    ==================================  ======================================================================
    column                              meaning
    ==================================  ======================================================================
    ``verdict``                         the word of :attr:`pplvi.Posterior.verdict`, by which the table is ordered first
    ``rank``, ``elpd_loo``, ``p_loo``,  of ``az.compare``, densities in nats; differences to the best are at most 0.
    ``elpd_diff``, ``weight``, ``se``,  Missing, and last in the table, for a guide that holds sites at a point
    ``dse``, ``warning``
    ``pareto_k``                        k-hat of the guide, the largest of the batch; missing for MCMC
    ``ess``                             effective draws: of the weights, the smallest of the batch; for MCMC
                                        ArviZ's bulk ESS, the smallest of all latents
    ``elbo``, ``log_evidence``,         of all data, in nats, with the standard error of the log evidence; missing
    ``log_evidence_error``              for MCMC
    ``seconds``                         time of training, all restarts together; missing for a posterior
    ``guide``, ``objective``            their names; "-" for a guide that was found and not trained
    ==================================  ======================================================================

    Source: Vehtari, Gelman and Gabry 2017, Practical Bayesian model evaluation using leave-one-out cross-validation and
    WAIC; Yao, Vehtari, Simpson and Gelman 2018, Using stacking to average Bayesian predictive distributions.

    :param fits: fits or posteriors by name. Of a fit with several restarts the best is taken.
    :param var_name: the observed site, or several that share a plate; may be left out if each model has only one.
    :returns: a table with the best fit first and a row for each.
    :raises ValueError: if there is nothing to compare, something is not a fit, the data differ, or leave-one-out of a
        fit does not exist.

    >>> import pyro, pyro.distributions as dist, torch
    >>> def model(y):
    ...     z = pyro.sample("z", dist.Normal(0.0, 1.0))
    ...     with pyro.plate("datum", 3):
    ...         pyro.sample("y", dist.Normal(z, 1.0), obs=y)
    >>> def guide(scale):
    ...     return lambda y: pyro.sample("z", dist.Normal(0.5, scale))
    >>> posteriors = {
    ...     name: Posterior(model, guide(scale), (torch.tensor([0.5, 1.0, 0.5]),), seed=0)
    ...     for name, scale in {"exact": 0.5, "wide": 1.0}.items()
    ... }
    >>> table = compare(posteriors)
    >>> table["elpd_loo"].round(1).tolist(), table["ess"].sort_index().round(-1).tolist()
    ([-3.4, -3.4], [1000.0, 660.0])
    """
    import pandas

    posteriors = {name: _posterior(name, fit) for name, fit in fits.items()}
    _check_data(posteriors)
    scores = {name: _loo(name, each, var_name) for name, each in posteriors.items() if _has_loo(each)}
    verdicts = {n: fit.verdict if hasattr(fit, "verdict") else posteriors[n].verdict for n, fit in fits.items()}
    rows = {
        name: {"verdict": verdicts[name].word, **_quality(posteriors[name]), **_facts(fit, posteriors[name])}
        for name, fit in fits.items()
    }
    ranked = _ordered(scores, verdicts)
    order = [*ranked.index, *(name for name in fits if name not in scores)]
    table = ranked.reindex(order).join(pandas.DataFrame.from_dict(rows, orient="index"))
    table.insert(0, "verdict", table.pop("verdict"))
    return table.astype({"rank": "Int64", "warning": "boolean"})


def _posterior(name: str, fit: Any) -> Posterior:
    found = fit.posteriors[fit.best] if hasattr(fit, "posteriors") else fit
    if not isinstance(found, Posterior):
        raise ValueError(
            f"{name!r} is {type(fit).__name__}; expected what pplvi.fit returns, or a pplvi.Posterior. Make one with "
            "Posterior(model, guide, args) or Posterior.from_mcmc(mcmc, model, args)."
        )
    return found


def _check_data(posteriors: Mapping[str, Posterior]) -> None:
    first, *others = posteriors
    expected = list(posteriors[first].draws.observed.values())
    for name in others:
        data = list(posteriors[name].draws.observed.values())
        if len(data) != len(expected) or not all(any(equal(x, y) for y in expected) for x in data):
            shapes = [[tuple(value.shape) for value in values] for values in (data, expected)]
            raise ValueError(
                f"{name!r} has other data than {first!r} (shapes {shapes[0]} and {shapes[1]}); expected the same data, "
                "since densities of different data cannot be compared. Fit all of them to one data set."
            )


def _has_loo(posterior: Posterior) -> bool:
    return posterior.has_weights or posterior.is_mcmc


def _loo(name: str, posterior: Posterior, var_name: str | Sequence[str] | None) -> ELPDData:
    try:
        with said_in_a_table():
            return posterior.loo(var_name)
    except ValueError as error:
        raise ValueError(f"leave-one-out of {name!r}: {error}") from error


def _ordered(scores: Mapping[str, ELPDData], verdicts: Mapping[str, Verdict]) -> pandas.DataFrame:
    """The comparison of what can be believed; behind it, marked, the scores of what cannot."""
    import pandas

    believed = {name: score for name, score in scores.items() if verdicts[name].word != UNRELIABLE}
    ranked = compared(believed)
    ranked = ranked.loc[sorted(ranked.index, key=lambda name: (verdicts[name].rank, ranked["rank"][name]))]
    others = {name: {**totals(score), "warning": True} for name, score in scores.items() if name not in believed}
    if others:
        rest = pandas.DataFrame.from_dict(others, orient="index").sort_values("elpd_loo", ascending=False)
        ranked = pandas.concat([ranked, rest]) if len(ranked) else rest.reindex(columns=ranked.columns)
    ranked["rank"] = range(len(ranked))
    return ranked


def _quality(posterior: Posterior) -> dict[str, float]:
    """How good the approximation is; NaN for what does not exist."""
    if not posterior.has_weights:
        missing = dict.fromkeys(("pareto_k", "ess", "elbo", "log_evidence", "log_evidence_error"), math.nan)
        if posterior.evidence is not None:
            found = posterior.total_log_evidence
            missing |= {"log_evidence": found.value, "log_evidence_error": found.error}
        return missing | ({"ess": _bulk_ess(posterior)} if posterior.is_mcmc else {})
    return quality(posterior)


def _bulk_ess(posterior: Posterior) -> float:
    arviz = arviz_itself()
    chains = {
        name: value.reshape(posterior.num_chains, -1, *value.shape[1:]).cpu().numpy()
        for name, value in posterior.draws.latents.items()
    }
    return min(float(arviz.ess(arviz.convert_to_dataset(chains))[name].min()) for name in chains)


def _facts(fit: Any, posterior: Posterior) -> dict[str, Any]:
    guide = "MCMC" if posterior.guide is None else name_of(posterior.guide)
    objective, reasons = getattr(fit, "objective", None), getattr(fit, "reasons", None)
    if reasons and reasons[fit.best] == "found":
        objective = "-"
    return {
        "seconds": float(getattr(fit, "seconds", math.nan)),
        "guide": str(getattr(fit, "guide_name", guide)),
        "objective": "" if objective is None else str(objective),
    }
