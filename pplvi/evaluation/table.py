"""One table over densities of all families: what kind of number each is, and paired differences of those that rank."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch.distributions import Distribution

from pplvi.evaluation.draws import likeness
from pplvi.evaluation.estimates import NUM_DRAWS, DensityEstimate, Unnormalised, data_hash, log_density, unnormalised
from pplvi.kinds.checked import check_values, checked
from pplvi.kinds.kinds import Count, Natural, Seed
from pplvi.programs.calls import check_counts
from pplvi.programs.state import random_state

if TYPE_CHECKING:
    import pandas

NUM_SAMPLES = 500
COLUMNS = ["rank", "kind", "log_prob", "error", "diff", "diff_error", "train_gap", "low", "high", "ess"]
COLUMNS += ["nearest", "copies", "precision", "coverage"]


@checked
def compare_densities(
    models: Mapping[str, Any],
    test: Any,
    *,
    train: Any = None,
    num_draws: Count = NUM_DRAWS,
    num_samples: Natural = NUM_SAMPLES,
    seed: Seed | None = None,
) -> pandas.DataFrame:
    r"""Compare models of all families by log densities of unseen data, in nats a datum.

    Exact values and lower bounds are ranked, the latter by what they promise; estimates by annealed importance sampling
    are, unless a few chains dominate them; models without density are not. Windows around draws (Parzen) are no density
    of the model, and can rank centroids of the data above the data themselves: they are not here. Differences are of
    the same data, whose standard error is far below that of either mean.

    ===========================  ==============================================================================
    column                       meaning
    ===========================  ==============================================================================
    ``rank``                     from 0; missing for what cannot be ranked
    ``kind``                     ``"exact"``, ``"lower bound"``, ``"AIS estimate"`` or ``"none"``
    ``log_prob``, ``error``      mean over test data, and its standard error over data
    ``diff``, ``diff_error``     mean difference from the best, over pairs of the same datum, and its standard error
    ``train_gap``                mean over as many training data, less ``log_prob``: what is learned by heart
    ``low``, ``high``, ``ess``   of AIS: three standard errors of the normaliser on either side; effective chains
    ``nearest``, ``copies``      distance of draws to the nearest training datum over that of test data; the share of
                                 draws that are as near as 5 % of test data are
    ``precision``, ``coverage``  of draws, with the package ``prdc``
    ===========================  ==============================================================================

    The table's ``attrs["data"]`` is the hash of the test data. :func:`pplvi.evaluation.log_density` gives a row's
    densities, which may stand for their model here; those of other data, another binarisation for one, are refused.

    Source: Theis, van den Oord & Bethge (2016), "A note on the evaluation of generative models"; Salakhutdinov & Murray
    (2008); Burda et al. (2016); Naeem et al. (2020), "Reliable fidelity and diversity metrics for generative models".

    :param models: by name: a model with ``distribution()``, a distribution, ``(model, guide)``, a machine, or what
        ``log_density`` returned; with ``sample`` alone, it has no density.
    :param test: unseen data, ``(N, D)``; a tensor or an array.
    :param train: what the models were trained on.
    :param num_draws: of a guide, for each datum.
    :param num_samples: draws that are looked at; 0 for none.
    :param seed: makes the table reproducible; the global random state stays as it was.
    :returns: a table, the best first, and what is not ranked last.
    :raises ValueError: if there is nothing to compare, for data of other widths, or units, in training and test, and
        for models or densities as :func:`pplvi.evaluation.log_density` refuses them.

    >>> from pplvi import FullyVisibleBeliefNetwork
    >>> coins = torch.distributions.Independent(torch.distributions.Bernoulli(torch.full((4,), 0.5)), 1)
    >>> table = compare_densities({"network": FullyVisibleBeliefNetwork(4)}, coins.sample((20,)), seed=0)
    >>> round(float(table["log_prob"]["network"]), 4), table["kind"]["network"]
    (-2.7726, 'exact')
    """
    import pandas

    test, train = _numbers(test), None if train is None else _numbers(train)
    _check(models, test, train)
    check_counts(0, num_samples=num_samples)
    rows, found = {}, {}
    for name, model in models.items():
        try:
            with random_state(seed):
                found[name], rows[name] = _row(model, test, train, num_draws, num_samples)
        except ValueError as error:
            raise ValueError(f"{name!r}: {error}") from error
    order = sorted(models, key=lambda name: -found[name].mean if _ranks(found[name]) else math.inf)
    for rank, name in enumerate(order):
        if _ranks(found[name]):
            rows[name] |= {"rank": rank, **_difference(found[name], found[order[0]])}
    table = pandas.DataFrame.from_dict(rows, orient="index").reindex(order).reindex(columns=COLUMNS)
    numbers = {name: "Int64" if name == "rank" else "float64" for name in COLUMNS if name != "kind"}
    table = table.astype(numbers)
    table.attrs["data"] = data_hash(test)
    return table


def _numbers(x: Any) -> Tensor:
    """A tensor of floating point numbers, of tensors and arrays of any kind."""
    if not isinstance(x, (Tensor, np.ndarray)):
        raise ValueError(f"the data are a {type(x).__name__}: expected a tensor or an array (N, D).")
    x = torch.as_tensor(x)
    check_values(Tensor, data=x)
    if x.is_complex():
        raise ValueError("the data are complex: expected real numbers.")
    return x if x.is_floating_point() else x.to(torch.get_default_dtype())


def _check(models: Any, test: Tensor, train: Tensor | None) -> None:
    if not isinstance(models, Mapping) or not models:
        raise ValueError(f"models is {models!r:.60}: expected models by name, {{'NADE': nade, 'VAE': (vae, guide)}}.")
    for name, x in (("test", test), ("train", train)):
        if x is not None and (x.dim() != 2 or x.shape[1] != test.shape[1] or len(x) < 2):
            raise ValueError(f"{name} of shape {tuple(x.shape)}: expected at least two data (N, D). Flatten images.")
    if train is not None and _is_binary(train) != _is_binary(test):
        raise ValueError(
            "one of train and test is binary and the other is not: expected data of one binarisation, since densities "
            "of others cannot be compared."
        )


def _is_binary(x: Tensor) -> bool:
    return bool(((x == 0) | (x == 1)).all())


def _ranks(found: DensityEstimate) -> bool:
    return found.kind != "none" and found.reliable


def _row(
    model: Any, test: Tensor, train: Tensor | None, num_draws: int, num_samples: int
) -> tuple[DensityEstimate, dict[str, Any]]:
    own = model[0] if isinstance(model, tuple) else model
    energy = unnormalised(own, None)
    found = log_density(model, test, num_draws=num_draws, energy=energy)
    row: dict[str, Any] = {"kind": found.kind, "log_prob": found.mean, "error": found.error, "ess": found.ess}
    if found.interval is not None:
        row |= {"low": found.mean + found.interval[0], "high": found.mean + found.interval[1]}
    if train is not None and found.kind != "none" and not isinstance(model, DensityEstimate):
        some = train[torch.randperm(len(train))[: len(test)]]
        row["train_gap"] = log_density(model, some, num_draws=num_draws, energy=energy).mean - found.mean
    if num_samples and (samples := _samples(own, energy, num_samples)) is not None:
        row |= likeness(samples, train, test)
    return found, row


def _samples(model: Any, energy: Unnormalised | None, count: int) -> Tensor | None:
    """Draws, of whatever has a way to draw."""
    with torch.no_grad():
        if energy is not None:
            return energy.sample(count)
        if isinstance(model, Distribution):
            return model.sample(torch.Size([count]))
        draw = getattr(model, "sample", None)
        return None if draw is None else draw(count)


def _difference(found: DensityEstimate, best: DensityEstimate) -> dict[str, float]:
    each = found.log_prob - best.log_prob
    return {"diff": float(each.mean()), "diff_error": float(each.std() / math.sqrt(len(each)))}
