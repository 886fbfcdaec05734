"""From a training plan of one process to one of all ranks."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import pyro
import torch

from pplvi.losses.elbo import own_loss
from pplvi.programs.ranks import ProcessGroup
from pplvi.programs.state import preserved_rng, sharded_of
from pplvi.training.batches import FullData
from pplvi.training.parallel.parts import Parts, check_whole_modules
from pplvi.training.parallel.shares import share_of, split_of
from pplvi.training.parallel.stepping import Meeting, together
from pplvi.training.plan import TrainingPlan
from pplvi.training.restart import Restart, copy_into, evaluate, scratch


def distributed(plan: TrainingPlan, ranks: ProcessGroup, shard: bool) -> TrainingPlan:
    """The plan with the data split over the ranks.

    :param shard: whether every rank has the full data as arguments and is to keep a slice.
    :raises ValueError: for guides that are found and not trained, losses that are not of this package, sharded modules
        that cannot be trained, and programs or data that cannot be split.
    """
    parts = Parts.of(sharded_of(plan.recipe.model, plan.recipe.guide), ranks)
    if parts.modules and plan.recipe.apart:
        check_whole_modules(parts.modules, f"restarts={plan.restarts}")
    batches = plan.batches
    batches.environment = plan.recipe.environment
    _check_guide(plan)
    if plan.seed is None:  # a common one
        pyro.set_rng_seed(ranks.first(lambda: int(torch.randint(2**31, ()))))
    share = share_of(ranks, batches, shard)
    split = split_of(plan.recipe, batches.peek())
    batches.share = share
    monitor = plan.watch.monitor
    watch = plan.watch
    if ranks.any(watch.callbacks) and not watch.callbacks:  # of another rank only: its answers are heard here
        watch = replace(watch, callbacks=(_silent,))
    if monitor is not None:
        watch = replace(watch, monitor=replace(monitor, objective=own_loss(monitor.objective)))
    settings = plan.settings if share.common else {**(plan.settings or {}), "data": "of every rank"}
    if parts.modules and split.local:
        raise ValueError(
            f"the parameters {sorted(split.local)} have rows for single data, and others are sharded by fully_shard: "
            "expected one of them."
        )
    meeting = Meeting(ranks, share, split, parts)
    steps = together(plan.steps, meeting)
    ended = partial(_whole, plan, meeting)
    return replace(plan, steps=steps, watch=watch, ranks=ranks, settings=settings, ended=ended, mesh=parts.mesh)


def _silent(run: Restart) -> None:
    """Ask for nothing."""


def _check_guide(plan: TrainingPlan) -> None:
    with scratch(), plan.recipe.environment.active():
        _, guide = replace(plan.recipe, apart=False).build()
        if plan.start.needs_all_data(guide):
            raise ValueError(
                f"{type(guide).__name__} is found by a search with all data, which ranks have shares of: expected a "
                "guide that is trained from its own start. Use parallel='none' on every rank, or one process, for "
                "searches and init=."
            )


def _whole(plan: TrainingPlan, meeting: Meeting, run: Restart) -> None:
    """Give a guide whose parameters have rows for single data those of all ranks.

    On slices of full data only: ranks that bring their own data keep the guide of their own.
    """
    local, batches = meeting.split.local, plan.batches
    if not local or not isinstance(batches, FullData) or not meeting.share.common:
        return
    with run.scope():
        mine = {name: p.detach() for name, p in pyro.get_param_store().named_parameters()}
    absent = meeting.share.part.absent
    for name, dim in local.items():
        rows = mine[name].narrow(dim, 0, 0) if absent else mine[name]
        mine[name] = torch.cat(meeting.ranks.gather(rows), dim)
    run.store = {"params": {}, "constraints": {}}
    with preserved_rng(), run.scope():
        run.model, run.guide = plan.recipe.build()
        evaluate(plan.objective, run.model, run.guide, batches.call)
        copy_into(dict(pyro.get_param_store().named_parameters()), mine)
