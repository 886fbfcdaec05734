"""What differs between ArviZ 0.23 and ArviZ 1.x: the one place that knows which of them is installed.

Before 1.0 data are an ``InferenceData``, densities in a pandas series and plots in one package; from then on data are
an :class:`xarray.DataTree`, and the parts are arviz-base, arviz-stats and arviz-plots.
"""

from __future__ import annotations

import importlib.metadata
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

import numpy as np

from pplvi.posterior.arviz.quiet import arviz_itself, its_own_affairs

if TYPE_CHECKING:
    import pandas
    import xarray
    from arviz import ELPDData

_LEGACY = {"elpd": "elpd_loo", "p": "p_loo", "elpd_i": "loo_i"}
_COLUMNS = ["rank", "elpd_loo", "p_loo", "elpd_diff", "weight", "se", "dse", "warning"]


@cache
def is_legacy() -> bool:
    """Whether the installed ArviZ is one from before 1.0; asked without importing it."""
    return int(importlib.metadata.version("arviz").split(".")[0]) < 1


def predictive_plot() -> str:
    """What the plot of posterior predictive checks is called."""
    return "az.plot_ppc" if is_legacy() else "az.plot_ppc_dist"


# --- data -----------------------------------------------------------------------------------------------------------


def wrap(found: Mapping[str, xarray.Dataset], attrs: Mapping[str, Any]) -> Any:
    """Make what the installed ArviZ works on: ``InferenceData`` before 1.0, :class:`xarray.DataTree` from then on."""
    if is_legacy():
        return arviz_itself().InferenceData(attrs=dict(attrs), **found)
    import xarray

    tree = xarray.DataTree.from_dict(dict(found))
    tree.attrs.update(attrs)
    return tree


def group_of(data: Any, name: str) -> xarray.Dataset:
    """One of the groups."""
    return data[name] if is_legacy() else data[name].to_dataset()


# --- leave-one-out --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Pointwise:
    """What leave-one-out found, in nats, with the observations as dimensions of the two arrays.

    :ivar elpd_i: expected log predictive density of each observation.
    :ivar p_i: by how much it is smaller than that within the sample.
    :ivar pareto_k: k-hat of the weights that leave it out.
    :ivar num_draws: how many draws there are.
    :ivar good_k: the threshold of k-hat for so many.
    """

    elpd_i: xarray.DataArray
    p_i: xarray.DataArray
    pareto_k: xarray.DataArray
    num_draws: int
    good_k: float

    @property
    def num_high(self) -> int:
        """How many observations have a k-hat above the threshold."""
        return int((self.pareto_k > self.good_k).sum())

    def _error(self) -> float:
        """Standard error of the sum; ArviZ 1.x divides by one observation less."""
        lost, size = 0 if is_legacy() else 1, self.elpd_i.size
        return float((size * self.elpd_i.values.var(ddof=lost)) ** 0.5) if size > lost else math.nan

    def elpd_data(self) -> ELPDData:
        """The same as ArviZ has it: a pandas series before 1.0, a data class with shorter names from then on."""
        fields: dict[str, Any] = {
            "elpd": float(self.elpd_i.sum()),
            "se": self._error(),
            "p": float(self.p_i.sum()),
            "n_samples": self.num_draws,
            "n_data_points": self.elpd_i.size,
            "warning": self.num_high > 0,
            "elpd_i": self.elpd_i,
            "pareto_k": self.pareto_k,
            "scale": "log",
            "good_k": self.good_k,
        }
        if is_legacy():
            from arviz import ELPDData

            named = {_LEGACY.get(name, name): value for name, value in fields.items()}
            named["loo_i"], named["pareto_k"] = self.elpd_i.rename("loo_i"), self.pareto_k.rename("pareto_shape")
            return ELPDData(data=list(named.values()), index=list(named))
        from arviz_stats.utils import ELPDDataLOO

        return ELPDDataLOO(**fields, p_loo_i=self.p_i, approx_posterior=True)


def loo_of_chains(latents: dict[str, np.ndarray], likelihood: np.ndarray, like: xarray.DataArray) -> ELPDData:
    """ArviZ's own leave-one-out of draws that have no weights, with chain and draw as the first dimensions.

    :param like: an array with the dimensions and labels of the observations.
    """
    arviz = arviz_itself()
    groups = {"posterior": latents, "log_likelihood": {"observed": likelihood}}
    names: dict[str, Any] = {
        "dims": {"observed": list(like.dims)},
        "coords": {dim: like.coords[dim].values for dim in like.dims if dim in like.coords},
    }
    data = arviz.from_dict(**groups, **names) if is_legacy() else arviz.from_dict(groups, **names)
    return arviz.loo(data, pointwise=True)


def totals(score: ELPDData) -> dict[str, float]:
    """Sum, standard error and effective number of parameters, under the names that a table of fits has for them."""
    elpd, p = (score[_LEGACY[name] if is_legacy() else name] for name in ("elpd", "p"))
    return {"elpd_loo": float(elpd), "p_loo": float(p), "se": float(score["se"])}


def compared(scores: Mapping[str, ELPDData]) -> pandas.DataFrame:
    """ArviZ's comparison, unrounded, under the names of 0.23 and with differences that are negative, as in 1.x."""
    import pandas

    if not scores:
        return pandas.DataFrame(columns=_COLUMNS, dtype=float)
    with its_own_affairs():
        if is_legacy():
            return arviz_itself().compare(dict(scores)).assign(elpd_diff=lambda table: -table["elpd_diff"])[_COLUMNS]
        table = arviz_itself().compare(dict(scores), round_to="none")
    table["warning"] = [bool(scores[name]["warning"]) for name in table.index]
    return table.rename(columns=_LEGACY)[_COLUMNS]


# --- plots ----------------------------------------------------------------------------------------------------------


def density(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """A kernel density estimate between the least and the largest value: points, and densities there."""
    if is_legacy():
        points, found = arviz_itself().kde(values)
    else:
        from arviz_stats.base import array_stats

        points, found, _ = array_stats.kde(values)
    return np.asarray(points), np.asarray(found)


def plot_densities(data: Sequence[xarray.Dataset], labels: Sequence[str], **options: Any) -> np.ndarray:
    """Marginal densities on top of each other, a panel for each scalar: ``plot_density``, or ``plot_dist`` in 1.x."""
    if is_legacy():
        return np.asarray(arviz_itself().plot_density(list(data), data_labels=list(labels), **options))
    most = max(each.sizes["chain"] * each.sizes["draw"] for each in data)
    models = {
        label: wrap({"posterior": _as_one_chain(each, most)}, {}) for label, each in zip(labels, data, strict=True)
    }
    options.setdefault("visuals", {"point_estimate_text": False})
    options.setdefault("figure_kwargs", {"layout": "constrained"})
    drawn = arviz_itself().plot_dist(models, backend="matplotlib", **options)
    drawn.add_legend("model")
    return _axes(drawn)


def _as_one_chain(data: xarray.Dataset, length: int) -> xarray.Dataset:
    """All draws in one chain of a length, some more than once: ArviZ 1.x puts models side by side, draw by draw."""
    flat = data.drop_vars(["chain", "draw"], errors="ignore").stack(sample=["chain", "draw"], create_index=False)
    flat = flat.isel(sample=np.arange(length) * flat.sizes["sample"] // length)
    return flat.rename(sample="draw").expand_dims("chain").transpose("chain", "draw", ...)


def plot_predictions(
    data: Any, group: str, var_names: Sequence[str] | None, num_draws: int, **options: Any
) -> np.ndarray:
    """Densities of predicted data sets, a panel for each site: ``plot_ppc_dist``, or ``plot_ppc`` before 1.0."""
    sizes = data[group].sizes
    num_draws = min(num_draws, sizes["chain"] * sizes["draw"])
    arviz, names = arviz_itself(), None if var_names is None else list(var_names)
    if is_legacy():
        options = {"group": group.split("_")[0], "num_pp_samples": num_draws, "random_seed": 0, **options}
        return np.atleast_1d(arviz.plot_ppc(data, var_names=names, **options))
    options = {"group": group, "num_samples": num_draws, "backend": "matplotlib", **options}
    return _axes(arviz.plot_ppc_dist(data, var_names=names, **options))


def plot_comparison(table: pandas.DataFrame, **options: Any) -> Any:
    """``plot_compare`` of a table with the names of 0.23."""
    if is_legacy():
        return arviz_itself().plot_compare(table.assign(scale="log"), **options)
    named = table.rename(columns={old: new for new, old in _LEGACY.items()})
    return arviz_itself().plot_compare(named, backend="matplotlib", **options).viz["plot"].item()


def _axes(drawn: Any) -> np.ndarray:
    """The panels of what ArviZ 1.x has drawn."""
    panels = drawn.viz["plot"].to_dataset()
    return np.concatenate([np.ravel(panels[name].values) for name in panels.data_vars])
