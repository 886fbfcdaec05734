"""From a training plan of one process to one of all ranks."""

from __future__ import annotations

from dataclasses import replace

import pyro
import torch

from pplvi.losses.elbo import own_loss
from pplvi.training.parallel.ranks import Group
from pplvi.training.parallel.shares import share_of, split_of
from pplvi.training.parallel.stepping import Meeting, together
from pplvi.training.plan import TrainingPlan


def spread(plan: TrainingPlan, ranks: Group, shard: bool) -> TrainingPlan:
    """The plan with the data split over the ranks.

    :param shard: whether every rank has the full data as arguments and is to keep a slice.
    :raises ValueError: for guides that are found and not trained, losses that are not of this package, and programs or
        data that cannot be split.
    """
    batches = plan.batches
    batches.environment = plan.recipe.environment
    if plan.seed is None:  # a common one
        pyro.set_rng_seed(ranks.first(lambda: int(torch.randint(2**31, ()))))
    share = share_of(ranks, batches, shard)
    split = split_of(plan.recipe, batches.peek())
    batches.share = share
    monitor = plan.watch.monitor
    watch = plan.watch if monitor is None else replace(plan.watch, monitor=replace(monitor, objective=own_loss(monitor.objective)))
    return replace(plan, steps=together(plan.steps, Meeting(ranks, share, split)), watch=watch, ranks=ranks)
