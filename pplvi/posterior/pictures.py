"""Pictures that ArviZ draws from a fit, whichever version of it is installed: predictions and comparisons."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from pplvi.kinds.checked import checked
from pplvi.kinds.kinds import Count
from pplvi.posterior.arviz.export import to_arviz
from pplvi.posterior.arviz.quiet import its_own_affairs
from pplvi.posterior.arviz.versions import plot_comparison, plot_predictions
from pplvi.posterior.posterior import Posterior

if TYPE_CHECKING:
    import numpy as np
    import pandas


@checked
@its_own_affairs()
def plot_predictive(
    source: Any, *, prior: bool = False, var_names: Sequence[str] | None = None, num_draws: Count = 50, **options: Any
) -> np.ndarray:
    r"""Data that the model predicts, data set by data set, as densities, with those that were observed.

    .. math:: \tilde x_s \sim p(x \mid z_s), \qquad z_s \sim p(z \mid x) \text{ or } p(z)

    Source: Gabry, Simpson, Vehtari, Betancourt and Gelman 2019, Visualization in Bayesian workflow; Gelman et al. 2013,
    Bayesian data analysis, section 6.3.

    :param source: a fit, a posterior, or what ``to_arviz`` made of one.
    :param prior: predictions of the prior instead of those of the posterior.
    :param var_names: which observed sites; all unless given.
    :param num_draws: how many data sets are drawn; as many as there are, if these are fewer.
    :param options: other arguments of what draws, ``az.plot_ppc_dist``, or ``az.plot_ppc`` before ArviZ 1.0.
    :returns: the axes, one for each site, in an array.
    :raises ValueError: if the source has no such predictions.

    >>> import pyro, pyro.distributions as dist, torch
    >>> def model(y):
    ...     z = pyro.sample("z", dist.Normal(0.0, 1.0))
    ...     with pyro.plate("data", 3):
    ...         pyro.sample("y", dist.Normal(z, 1.0), obs=y)
    >>> def guide(y):
    ...     pyro.sample("z", dist.Normal(0.5, 0.5))
    >>> posterior = Posterior(model, guide, (torch.tensor([0.0, 1.0, 2.0]),), num_draws=60, seed=0)
    >>> plot_predictive(posterior, num_draws=20).size
    1
    """
    if isinstance(source, Posterior):
        source = to_arviz(source, num_prior=num_draws if prior else 0)
    elif hasattr(source, "to_arviz"):
        source = source.to_arviz(num_prior=num_draws if prior else 0)
    group = "prior_predictive" if prior else "posterior_predictive"
    if not hasattr(source, "groups") or group not in source:
        raise ValueError(
            f"there is no group {group} in {type(source).__name__}: expected a fit or posterior of a model with "
            "observed sites, or data that to_arviz() has exported with predictions (num_prior=, "
            "posterior_predictive=True)."
        )
    return plot_predictions(source, group, var_names, num_draws, **options)


@checked
@its_own_affairs()
def plot_compare(table: pandas.DataFrame, **options: Any) -> Any:
    """Expected log predictive densities of :func:`pplvi.compare` with their standard errors, the best fit on top.

    Fits without a density, and those that are not reliable, which have no rank among the others, are left out.

    Source: Vehtari, Gelman and Gabry 2017, Practical Bayesian model evaluation using leave-one-out cross-validation and
    WAIC.

    :param table: what :func:`pplvi.compare` has made.
    :param options: other arguments of ``az.plot_compare``.
    :returns: the axes.
    :raises ValueError: for another table, and if no fit of it can be compared.

    >>> import pandas
    >>> table = pandas.DataFrame({"elpd_loo": [-30.0, -32.0], "se": [1.0, 1.1]}, index=["flow", "normal"])
    >>> table = table.assign(rank=[0, 1], p_loo=1.0, elpd_diff=[0.0, -2.0], dse=[0.0, 0.5], weight=0.5, warning=False)
    >>> [label.get_text().strip() for label in plot_compare(table).get_yticklabels()][:1]
    ['flow']
    """
    if not {"elpd_loo", "weight"} <= set(getattr(table, "columns", ())):
        raise ValueError(f"table is {type(table).__name__}: expected the table of pplvi.compare({{...}}).")
    found = table[table["weight"].notna() & table["elpd_loo"].notna()]
    if found.empty:
        raise ValueError(
            f"none of {list(table.index)} can be compared: expected fits whose verdict is not 'not reliable', from "
            "pplvi.compare({...})."
        )
    return plot_comparison(found, **options)
