"""Plots of a fit: its objective, its weights, and its posterior beside a reference.

Every function draws into the axes it is given, or into new ones, and
returns them, so that a caller can go on from there. ArviZ and matplotlib are imported on the first call.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from pplvi.kinds.checked import check_values, checked
from pplvi.kinds.kinds import Count
from pplvi.posterior.arviz.export import to_arviz
from pplvi.posterior.arviz.quiet import arviz_itself, its_own_affairs
from pplvi.posterior.arviz.schema import to_numpy
from pplvi.posterior.arviz.versions import density, group_of, plot_densities
from pplvi.posterior.posterior import Posterior
from pplvi.weights.pareto import pareto_k_threshold

if TYPE_CHECKING:
    import xarray
    from matplotlib.axes import Axes

_EARLY = 0.25
_LIGHTEST = 0.01
_TEXT = 10


@checked
def plot_objective(
    source: Any, *, window: Count | None = None, labels: Sequence[str] | None = None, ax: Axes | None = None
) -> Axes:
    r"""Trace of the objective, one colour for each restart: every step, and a moving average on top.

    .. math:: \bar\ell_t = \frac{1}{|W_t|} \sum_{s \in W_t} \ell_s, \qquad W_t = \{t - w + 1, \dots, t\}

    Steps that are NaN or infinite are left out of the average. The vertical axis fits the averages after the first
    quarter of the steps, so that a steep start does not flatten the rest.

    Source: Gelman et al. 2013, Bayesian data analysis, section 13.7, on watching a bound converge.

    :param source: a fit, what ``to_arviz`` made of one, or losses of shape ``(restarts, num_steps)``, in nats.
    :param window: how many steps are averaged; a fiftieth of them unless given.
    :param labels: what the legend calls the restarts.
    :param ax: axes to draw into.
    :returns: the axes, two lines for each restart.
    :raises ValueError: if there is no trace to plot, ``window`` is below 1, or ``labels`` has the wrong length.

    >>> axes = plot_objective(np.array([[5.0, 3.0, 2.0, 2.0], [6.0, 4.0, 2.0, 2.0]]), window=2)
    >>> axes.lines[1].get_label(), axes.lines[1].get_ydata().tolist()
    ('restart 0, mean of 2 steps', [5.0, 4.0, 2.5, 2.0])
    """
    from matplotlib import pyplot

    losses = _losses(source)
    window = max(1, losses.shape[1] // 50) if window is None else window
    names = [f"restart {i}" for i in range(len(losses))] if labels is None else list(labels)
    if ax is not None and not hasattr(ax, "plot"):
        raise ValueError(f"ax is {type(ax).__name__}; expected axes of matplotlib, or None for new ones.")
    if window < 1 or len(names) != len(losses):
        raise ValueError(
            f"window={window} and {len(names)} labels for {len(losses)} restarts; expected a window of at least 1 step "
            "and one label for each restart."
        )
    ax = pyplot.subplots()[1] if ax is None else ax
    averages = np.stack([_moving_average(row, window) for row in losses])
    for row, average, name in zip(losses, averages, names, strict=True):
        (line,) = ax.plot(row, alpha=0.25, linewidth=0.5)
        ax.plot(average, color=line.get_color(), label=f"{name}, mean of {window} steps")
    _fit_axis(ax, averages)
    ax.set(xlabel="step", ylabel="objective (nats)")
    ax.legend()
    return ax


def _losses(source: Any) -> np.ndarray:
    found = getattr(source, "losses", source)
    if hasattr(source, "groups"):
        found = source["optimization"]["loss"].values if "optimization" in source else []
    if isinstance(found, torch.Tensor):
        check_values(torch.Tensor, source=found)
    losses = np.atleast_2d(to_numpy(found))
    if losses.dtype.kind not in "fiu" or losses.ndim != 2 or losses.size == 0:
        raise ValueError(
            f"source is {type(source).__name__} without a trace of an objective; expected a fit that was trained, what "
            "its to_arviz() returned, or losses of shape (restarts, num_steps). MCMC has no objective."
        )
    return losses.astype(float)


def _moving_average(losses: np.ndarray, window: int) -> np.ndarray:
    finite = np.isfinite(losses)
    totals, counts = (
        np.convolve(values, np.ones(window))[: len(losses)] for values in (np.where(finite, losses, 0.0), finite)
    )
    return np.divide(totals, np.round(counts), out=np.full(len(losses), np.nan), where=np.round(counts) > 0)


def _fit_axis(ax: Axes, averages: np.ndarray) -> None:
    late = averages[:, int(_EARLY * averages.shape[1]) :]
    late = late[np.isfinite(late)]
    if late.size and late.max() > late.min():
        margin = 0.1 * (late.max() - late.min())
        ax.set_ylim(late.min() - margin, late.max() + margin)


@checked
def plot_weights(source: Any, *, axes: Sequence[Axes] | None = None) -> np.ndarray:
    r"""Importance weights of a guide: their density on the left, Pareto k-hat on the right.

    The density is that of :math:`\log w_s - \log \hat Z`, in nats, which is 0 throughout for an exact guide; weights of
    a batch are pooled, and the lightest hundredth is left out, which has no influence and would stretch the axis. k-hat
    is one point for each restart and batch element, with lines at 0, at the threshold for the number of draws and at 1.

    Source: Vehtari, Simpson, Gelman, Yao and Gabry 2024, Pareto smoothed importance sampling; Yao, Vehtari, Simpson and
    Gelman 2018, Yes, but did it work? Evaluating variational inference.

    :param source: a posterior, several of them (restarts), or a fit.
    :param axes: two axes to draw into.
    :returns: the two axes, in an array.
    :raises ValueError: if the draws have no weights (MCMC, a guide that holds sites at a point), or there are not two
        axes.

    >>> import pyro, pyro.distributions as dist
    >>> def model():
    ...     pyro.sample("z", dist.Normal(0.0, 1.0))
    >>> def guide():
    ...     pyro.sample("z", dist.Normal(0.5, 1.0))
    >>> axes = plot_weights(Posterior(model, guide, num_draws=1000, seed=0))
    >>> axes[0].get_legend().get_texts()[0].get_text()
    'k-hat 0.1, ESS 777 of 1000'
    """
    from matplotlib import pyplot

    posteriors = _posteriors(source)
    pair = list(pyplot.subplots(1, 2, figsize=(10, 4), layout="constrained")[1] if axes is None else axes)
    if len(pair) != 2 or not all(hasattr(ax, "plot") for ax in pair):
        raise ValueError(f"axes has shape ({len(pair)},); expected two axes, as pyplot.subplots(1, 2) makes them.")
    for index, posterior in enumerate(posteriors):
        name = f"restart {index}: " if len(posteriors) > 1 else ""
        _plot_density(posterior, f"C{index}", name, pair[0])
    pair[0].set_xlabel("log weight minus log evidence (nats)", fontsize=_TEXT)
    pair[0].set_ylabel("density", fontsize=_TEXT)
    pair[0].legend()
    _plot_pareto_k(posteriors, pair[1])
    return np.array(pair, dtype=object)


def _posteriors(source: Any) -> list[Posterior]:
    found = getattr(source, "posteriors", source)
    posteriors = [found] if isinstance(found, Posterior) else list(found)
    if not all(isinstance(each, Posterior) for each in posteriors) or not posteriors:
        raise ValueError(f"source is {source!r}; expected a posterior, a list of them, or what pplvi.fit returns.")
    return posteriors


def _plot_density(posterior: Posterior, color: str, name: str, ax: Axes) -> None:
    relative = to_numpy(posterior.log_weight - posterior.log_evidence[0]).ravel()
    relative = np.sort(relative[np.isfinite(relative)])[int(_LIGHTEST * relative.size) :]
    quality = f"k-hat {posterior.pareto_k.max():.1f}, ESS {posterior.ess.min():.0f} of {posterior.num_draws}"
    label = name + quality
    if np.ptp(relative) < 1e-6:  # an exact guide has no density to estimate
        ax.axvline(relative[0], color=color, label=label)
    else:
        ax.plot(*density(relative), color=color, label=label)


def _plot_pareto_k(posteriors: Sequence[Posterior], ax: Axes) -> None:
    from matplotlib.ticker import MaxNLocator

    values = torch.stack([posterior.pareto_k for posterior in posteriors])
    ax.scatter(np.arange(values.numel()), to_numpy(values).ravel(), marker="+")
    ax.hlines([0.0, pareto_k_threshold(posteriors[0].num_draws), 1.0], *ax.get_xlim(), colors="C7", linestyles="--")
    dims = ["restart", *(plate.name for plate in posteriors[0].draws.batch)]
    ax.set_xlabel(" x ".join(dims), fontsize=_TEXT)
    ax.set_ylabel("Pareto k-hat", fontsize=_TEXT)
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))


@checked
@its_own_affairs()
def plot_against_reference(
    source: Any,
    reference: Any,
    *,
    var_names: Sequence[str] | None = None,
    labels: Sequence[str] = ("posterior", "reference"),
    **options: Any,
) -> np.ndarray:
    """Marginal densities of a posterior on top of those of a reference, such as a run of NUTS.

    Posteriors of a guide are resampled by their smoothed weights first; to see the guide itself, pass
    ``fit.to_arviz(draws="guide")``.

    Source: Yao, Vehtari, Simpson and Gelman 2018, Yes, but did it work? Evaluating variational inference.

    :param source: a fit, a posterior, what ``to_arviz`` made of one, or draws ``{name: (num_draws, *shape)}`` such as
        those of ``mcmc.get_samples()``.
    :param reference: the same.
    :param var_names: which variables; all that both have unless given.
    :param labels: what the legend calls the two.
    :param options: other arguments of what draws, ``az.plot_dist``, or ``az.plot_density`` before ArviZ 1.0.
    :returns: the axes, one for each scalar, in an array.
    :raises ValueError: if the two share no variable, one lacks a name in ``var_names``, or a variable has two shapes.

    >>> _ = torch.manual_seed(0)
    >>> axes = plot_against_reference({"z": torch.randn(500)}, {"z": torch.randn(500), "other": torch.randn(500)})
    >>> axes.size, axes.ravel()[0].get_title()
    (1, 'z')
    """
    first, second = (_draws(each) for each in (source, reference))
    shared = [str(name) for name in first.data_vars if name in second.data_vars]
    names = shared if var_names is None else list(var_names)
    _check_names(names, shared, first, second)
    pair = [first[names], _same_dims(second[names], first[names])]
    return plot_densities(pair, labels, **options)


def _draws(source: Any) -> xarray.Dataset:
    """The posterior group of whatever it is."""
    if hasattr(source, "to_arviz"):
        source = source.to_arviz(num_prior=0, posterior_predictive=False)
    elif isinstance(source, Posterior):
        source = to_arviz(source, num_prior=0, posterior_predictive=False)
    elif isinstance(source, Mapping) and "posterior" not in source:
        return arviz_itself().convert_to_dataset({name: to_numpy(value)[None] for name, value in source.items()})
    elif not isinstance(source, Mapping):
        raise ValueError(
            f"source is {type(source).__name__}; expected a fit, a posterior, what to_arviz returns, or draws by name."
        )
    return group_of(source, "posterior")


def _check_names(names: Sequence[str], shared: Sequence[str], *datasets: xarray.Dataset) -> None:
    if not names or not set(names) <= set(shared):
        raise ValueError(
            f"got the variables {list(names)}; expected some that both posterior and reference have: {shared}. "
            "Correct var_names, or export both from models with the same sites."
        )
    for name in names:
        shapes = [data[name].shape[2:] for data in datasets]
        if shapes[0] != shapes[1]:
            raise ValueError(
                f"variable {name!r} has shape {shapes[0]} in the posterior and {shapes[1]} in the reference; expected "
                "one shape. Leave it out of var_names."
            )


def _same_dims(data: xarray.Dataset, like: xarray.Dataset) -> xarray.Dataset:
    """The same values under the names and labels of another data set, which ArviZ matches panels by."""
    import xarray

    coords = {name: values for name, values in like.coords.items() if name not in ("chain", "draw")}
    variables = {name: (like[name].dims, data[name].values) for name in data.data_vars}
    return xarray.Dataset(variables, coords=coords)
