"""Draws of several runs as one, and one draw as many."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

from pplvi.posterior.draws import Draws
from pplvi.programs.ranks import Processes

_APART = 2_000_003  # between the seeds of ranks


def stack(parts: Iterable[Draws], num_draws: int) -> Draws:
    """Put several sets of draws of one program behind each other, each freed once it is copied.

    :param num_draws: how many there are in all of them at most.
    """
    iterator = iter(parts)
    first = next(iterator)
    if first.num_draws == num_draws:
        return first
    drawn = ["latents", "deterministics", "log_likelihood", "log_factors", "log_p", "log_q"]
    if first.log_p is None:
        drawn.append("observed")  # predictions
    whole = replace(first, **{name: _room_for(getattr(first, name), num_draws) for name in drawn})
    start = 0
    for part in itertools.chain([first], iterator):
        stop = start + part.num_draws
        for name in drawn:
            _copy(getattr(whole, name), getattr(part, name), start, stop)
        start = stop
    if start == num_draws:
        return whole
    return replace(whole, **{name: _first(getattr(whole, name), start) for name in drawn})


def _room_for(value: Any, size: int) -> Any:
    if isinstance(value, dict):
        return {name: _room_for(each, size) for name, each in value.items()}
    return None if value is None else value.new_empty(size, *value.shape[1:])


def _first(value: Any, size: int) -> Any:
    if isinstance(value, dict):
        return {name: _first(each, size) for name, each in value.items()}
    return None if value is None else value[:size].clone()


def _copy(whole: Any, part: Any, start: int, stop: int) -> None:
    if isinstance(whole, dict):
        for name, each in whole.items():
            _copy(each, part[name], start, stop)
    elif whole is not None:
        whole[start:stop] = part


def repeated(draws: Draws, num_draws: int) -> Draws:
    """One draw as many: every tensor with a draw dimension shows the same numbers ``num_draws`` times."""

    def again(value: Any) -> Any:
        if isinstance(value, dict):
            return {name: again(entry) for name, entry in value.items()}
        return None if value is None else value.expand(num_draws, *value.shape[1:])

    names = ("latents", "deterministics", "log_likelihood", "log_factors", "log_p", "log_q")
    return replace(draws, **{name: again(getattr(draws, name)) for name in names})


def shared(ranks: Processes, num_draws: int, seed: int | None, make: Callable[[int, int | None], Draws]) -> Draws:
    """Draws of which every rank makes its share, from a seed of its own; all ranks get all of them.

    :param make: so many draws, from a seed.
    """
    if ranks.size == 1:
        return make(num_draws, seed)
    size, own = len(ranks.share(num_draws)), ((seed or 0) + _APART * ranks.rank) % 2**32
    found = ranks.each(lambda: make(size, own) if size else None)
    return stack((part for part in found if part is not None), num_draws)
