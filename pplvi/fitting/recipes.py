"""How a flow is best trained: the recipe of its steps, and a search for their size."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch

from pplvi.fitting.result import Fit
from pplvi.kinds.checked import checked
from pplvi.kinds.kinds import Count, Positive
from pplvi.losses.elbo import ELBO
from pplvi.training.restart import publish

__all__ = ["flow_recipe", "search_learning_rate"]

_DRAWS = 10_000
_FLOOR = 0.05  # of Adam's denominators


@checked
def flow_recipe(num_steps: Count = 1000, learning_rate: Positive = 5e-3, num_particles: Count = 256) -> dict[str, Any]:
    """Arguments of :func:`pplvi.fit` that train a flow as the literature has come to do it.

    Sticking the landing, many draws in one call, a full-rank start at the Gaussian of batch and match, a small learning
    rate that falls to zero along a cosine, clipped gradients. It is for any flow, and best and cheapest for quadratic
    couplings: ``fit(model, partial(AutoFlow, flow="quadratic"), args=..., **flow_recipe())``.

    The parameters of a flow that started at a Gaussian are in units of its spread, and near the optimum the ELBO is
    about equally curved in all of them. Adam's ``epsilon`` is therefore large, 0.05: gradients below that make steps in
    proportion, as in gradient descent, instead of steps of full size in the direction of noise.

    :param num_steps: how many steps.
    :param learning_rate: of Adam, at the start.
    :param num_particles: draws in each step.

    Source: Agrawal, Sheldon & Domke (2020), "Advances in black-box VI: normalizing flows, importance weighting, and
    optimization"; Roeder, Wu & Duvenaud (2017).

    >>> sorted(flow_recipe())
    ['init', 'num_steps', 'objective', 'optim', 'stop']
    """
    return {
        "objective": ELBO(num_particles, estimator="stl"),
        "optim": partial(torch.optim.Adam, lr=learning_rate, eps=_FLOOR),
        "init": "match",
        "num_steps": num_steps,
        "stop": None,
    }


@checked
def search_learning_rate(
    train: Callable[[float], Fit], rates: Sequence[Positive] = (5e-4, 1.5e-3, 5e-3, 1.5e-2, 5e-2)
) -> Fit:
    """Train once with each learning rate; the fit whose guide has the largest ELBO.

    The five-point search of the paper, at five times the cost of one fit, for posteriors on which the recipe's rate is
    in doubt. The ELBO (nats) is that of 10,000 draws after training, whatever the objective was, with the same random
    numbers for every rate. A rate that fails (:class:`ValueError`, such as a loss that stays non-finite) or
    ends at an ELBO that is not finite is passed over.

    :param train: from the learning rate to a fit.
    :param rates: positive numbers, without repetition.
    :returns: the best fit, whose ``notes`` hold the ELBO of every rate; its parameters are in Pyro's global store.
    :raises ValueError: for rates that are none, and the first error if every rate fails.

    Source: Agrawal, Sheldon & Domke (2020), "Advances in black-box VI: normalizing flows, importance weighting, and
    optimization".

    >>> import pyro, pyro.distributions as dist
    >>> from pplvi import AutoFlow, fit
    >>> def model():
    ...     pyro.sample("x", dist.Exponential(1.0))
    >>> def train(rate):
    ...     recipe = flow_recipe(20, rate, num_particles=16)
    ...     return fit(model, partial(AutoFlow, flow="quadratic"), seed=0, progress=False, **recipe)
    >>> search_learning_rate(train, (1e-5, 5e-3)).notes["learning rate"][:5]
    '0.005'
    """
    _check_rates(rates)
    found: dict[float, tuple[float, Fit]] = {}
    failures: dict[float, ValueError] = {}
    for rate in rates:
        try:
            fit = train(rate)
            if not hasattr(fit, "posterior"):
                raise TypeError(f"train({rate:g}) returned a {type(fit).__name__}: expected what pplvi.fit returns.")
            elbo = float(fit.posterior(_DRAWS, seed=0).elbo.value)
        except ValueError as error:
            failures[rate] = error
            continue
        if elbo > float("-inf"):
            found[rate] = elbo, fit
    if not found:
        raise next(iter(failures.values()), ValueError(f"no guide of the rates {list(rates)} has a finite ELBO."))
    best = max(found, key=lambda rate: found[rate][0])
    fit = found[best][1]
    publish(fit.runs[fit.best])
    told = [f"{rate:g}: {found[rate][0]:.2f}" if rate in found else f"{rate:g}: failed" for rate in rates]
    fit.notes = {**fit.notes, "learning rate": f"{best:g}, by its ELBO; {', '.join(told)}"}
    return fit


def _check_rates(rates: Sequence[float]) -> None:
    if not rates or len(set(rates)) < len(rates):
        raise ValueError(f"rates={rates!r}: expected different positive numbers, such as (5e-4, 1.5e-3, 5e-3).")
