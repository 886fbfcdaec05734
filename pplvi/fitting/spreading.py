"""Chains, islands and restarts over the ranks of a process group: each has its own part, and all have the whole."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from pyro.infer import MCMC
from pyro.infer.mcmc.util import diagnostics
from torch import Tensor

from pplvi.fitting.clock import Clock
from pplvi.fitting.mcmc import SavedChains
from pplvi.programs.ranks import Processes, common_seed, join
from pplvi.programs.state import sharded_of
from pplvi.samplers.tempered import Target
from pplvi.training.parallel.parts import check_whole_modules
from pplvi.training.plan import TrainingPlan
from pplvi.training.restart import Restart
from pplvi.training.restarts import restored, train_restarts

_Chain = tuple[int, dict[str, Tensor], Any]  # its number, draws (draws, ...) by site, diagnostics


def sharers(parallel: Any, *programs: Any) -> Processes:
    """The ranks that share the work: this process alone for ``"none"``, or where there is no group.

    :raises ValueError: for programs with modules of which every rank has a part.
    """
    check_whole_modules(sharded_of(*programs), f"parallel={parallel!r}")
    return Processes() if parallel == "none" else join()


def check_whole(guide: str, ranks: Processes) -> None:
    """Refuse what would be run whole on every rank.

    :raises ValueError: for several ranks.
    """
    if ranks.size > 1:
        raise ValueError(
            f"guide={guide} on {ranks.size} ranks: it is not split, and every rank would do the whole. Expected "
            "parallel='none', which says so, or one process; chains of 'nuts', islands of 'smc' and the restarts of "
            "other guides (parallel='restarts') are spread over the ranks."
        )


def spread_chains(ranks: Processes, count: int, run: Callable[[Sequence[int]], MCMC]) -> MCMC | SavedChains:
    """Chains of MCMC, each with the seed of its number, whoever runs it: they are those of one process.

    A chain that was cut short by Ctrl-C is left out where another one is longer.

    :param run: makes the chains of some numbers.
    """
    if ranks.size == 1:
        return run(range(count))
    mine = ranks.share(count)
    found = ranks.each(lambda: _chains_of(run(mine), mine) if mine else [])
    chains = sorted((chain for part in found for chain in part), key=lambda chain: chain[0])
    longest = max(_length(chain) for chain in chains)
    chains = [chain for chain in chains if _length(chain) == longest]
    samples = {name: torch.stack([draws[name] for _, draws, _ in chains]) for name in chains[0][1]}
    told: dict[str, Any] = diagnostics(samples)
    for name in chains[0][2]:
        told[name] = {f"chain {number}": own[name] for number, (_, _, own) in enumerate(chains)}
    return SavedChains(samples, told)


def _chains_of(mcmc: MCMC, numbers: Sequence[int]) -> list[_Chain]:
    draws = mcmc.get_samples(group_by_chain=True)
    return [
        (number, {name: x[index] for name, x in draws.items()}, mcmc._diagnostics[index])
        for index, number in zip(range(mcmc.num_chains), numbers, strict=False)
    ]


def _length(chain: _Chain) -> int:
    return len(next(iter(chain[1].values())))


def spread_rows(ranks: Processes, target: Target) -> Target:
    """A density whose rows are evaluated by the ranks, each a part of them, and which all have then.

    Particles, their random numbers and what adapts to them are the same everywhere.
    """
    if ranks.size == 1:
        return target

    def shared(position: Tensor) -> tuple[Tensor, Tensor]:
        own = position.tensor_split(ranks.size)[ranks.rank]
        found = ranks.each(lambda: target(own) if len(own) else (own.new_empty(0), own))
        value, slope = (torch.cat([part.to(position) for part in parts]) for parts in zip(*found, strict=True))
        return value, slope

    return shared


def common_stop(ranks: Processes, clock: Clock) -> Callable[[], str]:
    """Why to stop, the same for all ranks: the clock of rank 0, or Ctrl-C on any."""
    if ranks.size == 1:
        return clock.over

    def stop() -> str:
        told = ranks.gather("interrupted" if ranks.interrupted else "")
        return next(filter(None, told), "") or ranks.first(clock.over)

    return stop


def spread_restarts(plan: TrainingPlan, ranks: Processes) -> list[Restart]:
    """Train every restart on one of the ranks; all have all of them in the end.

    :raises ValueError: for a checkpoint, which only one rank could write.
    """
    if ranks.size == 1:
        return train_restarts(plan)
    if plan.checkpoint is not None or plan.resume is not None:
        raise ValueError(
            "checkpoint= and resume= with parallel='restarts': a file holds the restarts of one process. Expected "
            "neither; what a rank that dies has trained is lost."
        )
    plan.batches.environment = plan.recipe.environment
    seed = common_seed(ranks, plan.seed, plan.batches.peek())
    plan = replace(plan, seed=seed, progress=plan.progress and ranks.rank == 0, mine=ranks.share(plan.restarts))
    own: list[Restart] = []

    def states() -> dict[int, Mapping[str, Any]]:
        own.extend(_trained(plan))
        return {run.index: run.ended.state for run in own}

    saved = {index: state for part in ranks.each(states) for index, state in part.items()}
    if not saved:
        raise KeyboardInterrupt
    there = {index: state for index, state in saved.items() if index not in plan.indices}
    runs = sorted([*own, *restored(plan, there)], key=lambda run: run.index)
    for index, run in enumerate(runs):  # some may be missing after Ctrl-C
        run.index = index
    return runs


def _trained(plan: TrainingPlan) -> list[Restart]:
    try:
        return train_restarts(plan) if plan.indices else []
    except KeyboardInterrupt:
        return []
