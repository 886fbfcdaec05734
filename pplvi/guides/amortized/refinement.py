"""What amortisation costs, and how to take the loss back: refinement of an amortised guide for given data."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pplvi.guides.amortized.amortized import AutoAmortized
from pplvi.kinds.checked import checked
from pplvi.kinds.kinds import Count, Positive, Seed
from pplvi.programs.joint import execute
from pplvi.programs.state import preserved_parameters, random_state

__all__ = ["AmortizationGap", "amortization_gap", "refine"]


@checked
def refine(
    guide: AutoAmortized,
    args: tuple[Any, ...] = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    num_steps: Count = 100,
    lr: Positive = 0.05,
    num_particles: Count = 8,
    seed: Seed | None = None,
) -> AutoAmortized:
    """Semi-amortised inference: for these data, the posterior of each element by gradient steps from where the
    network puts it (Hjelm et al. 2016; Kim et al. 2018).

    :param guide: an amortised guide; it is left as it was.
    :param args: arguments of the model, with the plates' whole data.
    :param num_steps: steps of Adam on the ELBO, in all elements' own parameters at once.
    :param lr: learning rate of the first step; it falls linearly to zero.
    :param num_particles: draws for each gradient.
    :param seed: seed of the draws; the process's random state stays as it was.
    :returns: a guide for these data only, whose elements have parameters of their own.
    :raises ValueError: for a subsampled plate.

    >>> import pyro, pyro.distributions as dist
    >>> def model(x):
    ...     with pyro.plate("data", len(x)):
    ...         pyro.sample("x", dist.Normal(pyro.sample("z", dist.Normal(0.0, 1.0)), 1.0), obs=x)
    >>> pyro.clear_param_store(); pyro.set_rng_seed(0)
    >>> encoder = torch.nn.Sequential(torch.nn.Unflatten(-1, (-1, 1)), torch.nn.Linear(1, 4))
    >>> x = torch.tensor([-2.0, 0.0, 2.0])
    >>> refined = refine(AutoAmortized(model, encoder, plates="data"), (x,), num_steps=300, seed=0)
    >>> bool(((refined.median(x)["z"] - x / 2).abs() < 0.1).all())
    True
    """
    kwargs = dict(kwargs or {})
    with random_state(seed), preserved_parameters():
        refined = guide.tabulate(*args, **kwargs)
        _loss(refined, args, kwargs, num_particles)  # the parameter store hands out its tensors
        leaf = refined.table_unconstrained
        optimizer = torch.optim.Adam([leaf], lr)
        for step in range(num_steps):
            optimizer.param_groups[0]["lr"] = lr * (1 - step / num_steps)
            (leaf.grad,) = torch.autograd.grad(_loss(refined, args, kwargs, num_particles), [leaf])
            optimizer.step()
    return refined


def _elbo(guide: AutoAmortized, args: tuple[Any, ...], kwargs: Mapping[str, Any], num_particles: int) -> Tensor:
    """The ELBO of each draw, ``(num_particles,)``."""
    run = execute(guide.model, guide, args, kwargs, num_particles=num_particles)
    return (run.log_target() - run.log_forward()).reshape(num_particles, -1).sum(1)


def _loss(guide: AutoAmortized, args: tuple[Any, ...], kwargs: Mapping[str, Any], num_particles: int) -> Tensor:
    return -_elbo(guide, args, kwargs, num_particles).mean()


class AmortizationGap(NamedTuple):
    """What amortisation costs on some data, in nats for each of their elements.

    :ivar value: ELBO after refinement minus ELBO of the amortised guide.
    :ivar standard_error: of the value, from the draws of both.
    """

    value: float
    standard_error: float


@checked
def amortization_gap(
    guide: AutoAmortized,
    args: tuple[Any, ...] = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    num_draws: Count = 200,
    seed: Seed | None = None,
    **refinement: Any,
) -> AmortizationGap:
    """How much ELBO one network for all elements costs, against parameters of their own for each (Cremer et al. 2018).

    :param args: arguments of the model: a sample of the data is enough.
    :param num_draws: draws that the two ELBOs are estimated from.
    :param refinement: ``num_steps``, ``lr`` and ``num_particles`` of :func:`refine`.
    :raises ValueError: for a subsampled plate.

    >>> import pyro, pyro.distributions as dist
    >>> def counts(y):
    ...     with pyro.plate("data", len(y)):
    ...         pyro.sample("y", dist.Poisson(pyro.sample("rate", dist.LogNormal(0.0, 1.0))), obs=y)
    >>> pyro.clear_param_store()
    >>> pyro.set_rng_seed(0)
    >>> untrained = AutoAmortized(counts, torch.nn.Unflatten(-1, (-1, 1)), plates="data")
    >>> amortization_gap(untrained, (torch.tensor([0.0, 3.0, 9.0]),), seed=0).value > 0.5
    True
    """
    kwargs = dict(kwargs or {})
    refined = refine(guide, args, kwargs, seed=seed, **refinement)
    with random_state(seed), preserved_parameters(), torch.no_grad():
        after, before = (_elbo(each, args, kwargs, num_draws) for each in (refined, guide))
    elements = refined.table.shape[:-1].numel()
    error = ((after.var() + before.var()) / num_draws).sqrt()
    return AmortizationGap(float((after.mean() - before.mean()) / elements), float(error / elements))
