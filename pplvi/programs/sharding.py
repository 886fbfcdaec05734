"""One plate whose elements are spread over the ranks of a process group.

A shard is a subsample that stands for all data: its plate is scaled so that the *mean* over the ranks is the whole
density. Where that plate is a batch plate, weights are per datum, and nothing is exchanged but the mean of the ranks'
losses and gradients. Where weights are joint, the densities of the sites inside are averaged before anything nonlinear
sees them (:meth:`Shard.mean`). Either way the mean of the ranks' gradients is the gradient of one process.

Latents inside the plate have noise of their own on every rank; all others are drawn from the common random state.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from pyro.poutine.messenger import Messenger
from pyro.poutine.runtime import _PYRO_STACK
from torch import Tensor

from pplvi.programs.shard import Shard
from pplvi.programs.sites import is_delta, is_subsample
from pplvi.programs.state import is_recording, set_torch_rng_state, torch_rng_state
from pplvi.programs.traces import Run

_APART = 0x9E3779B97F4A7C15  # between the seeds of ranks


class Sharded(Messenger):
    """Programs inside see a plate that is split as one that stands for all of it.

    :param shard: ``None`` hides one that is active outside.
    :ivar drawn: whether latents inside (``True``) and outside (``False``) the plate were drawn.
    """

    def __init__(self, shard: Shard | None) -> None:
        super().__init__()
        self.shard = shard
        self.drawn: set[bool] = set()

    def _pyro_sample(self, msg: Any) -> None:
        shard = self.shard
        if shard is None or is_subsample(msg):
            return
        latent = not (msg["is_observed"] or msg["done"] or is_delta(msg)) and msg["value"] is None
        if latent:
            self.drawn.add(shard.splits(msg))
        if not shard.splits(msg):
            return
        msg["cond_indep_stack"] = tuple(self._standing_in(shard, frame, msg) for frame in msg["cond_indep_stack"])
        if latent:
            with own_noise():
                msg["value"], msg["done"] = msg["fn"](*msg["args"], **msg["kwargs"]), True

    @staticmethod
    def _standing_in(shard: Shard, frame: Any, msg: Any) -> Any:
        if frame.name not in shard.plates:
            return frame
        size, full = frame.size, frame.full_size or frame.size
        scale = shard.scale(size, full)
        if full in (size, shard.total):
            shard.whole.add(frame.name)
        msg["scale"] = msg["scale"] * (scale * size / full)
        return frame._replace(full_size=size * scale)


def current_shard() -> Shard | None:
    """The shard that programs run on now; ``None`` in a single process, and where programs are only looked at."""
    return next((handler.shard for handler in reversed(_PYRO_STACK) if isinstance(handler, Sharded)), None)


def sharded(run: Run) -> Run:
    """A run whose densities are those of all ranks."""
    return run if (shard := current_shard()) is None else replace(run, shard=shard)


def unsplit() -> Messenger:
    """Programs inside are only looked at: nothing is exchanged with other ranks."""
    return Sharded(None)


def data_scale(count: int, full: int) -> float:
    """What each of the data here stands for, if there are ``full`` in all.

    >>> data_scale(3, 3), data_scale(3, 12)
    (1.0, 4.0)
    """
    shard = current_shard()
    return full / count if shard is None else shard.scale(count, full)


def data_mean(mean: Tensor) -> Tensor:
    """The mean over the data of all ranks, from that of the data here."""
    shard = current_shard()
    return mean if shard is None else shard.mean(mean * (shard.share * shard.rows / shard.total))


def mean_of_ranks(*numbers: Any) -> tuple[Any, ...]:
    """Means of numbers over the ranks; in a single process the numbers."""
    if (shard := current_shard()) is None:
        return numbers
    return shard.mean(torch.stack([torch.as_tensor(number, dtype=torch.float64) for number in numbers])).unbind()


@contextmanager
def own_noise(plates: Iterable[str] | None = None) -> Iterator[None]:
    """Random numbers of this rank's own, if there is a shard; the common random state moves alike on all ranks.

    :param plates: names of the plates that the numbers are for: common ones if none of them is split.
    """
    shard = current_shard()
    common = shard is None or (plates is not None and shard.plates.isdisjoint(plates))
    if shard is None or common or is_recording():  # a recording keeps no seeds
        yield
        return
    seed = (random.getrandbits(63) + shard.rank * _APART) % 2**63
    state = torch_rng_state()
    torch.manual_seed(seed)
    try:
        yield
    finally:
        set_torch_rng_state(state)
