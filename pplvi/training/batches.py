"""What a step is given: the full data at every step, or one item of an iterable after another.

An item is what the model is called with: a tuple or list of its arguments, a dictionary of its keyword arguments, or
one tensor. Each source can be put back to where a checkpoint was written: see :class:`Epochs` and :class:`Stateful`.
"""

from __future__ import annotations

import copy
import itertools
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader
from torch.utils.data.distributed import DistributedSampler

from pplvi.programs.calls import Arguments, LastBatch, check_last_batch, to_call
from pplvi.programs.inputs import Inputs, is_array
from pplvi.programs.state import Environment, clone, fingerprint, preserved_rng, rng_state, set_rng_state
from pplvi.types import Call


def _no_batch(data: Any) -> ValueError:
    return ValueError(f"data={type(data).__name__} yielded no batch: expected at least one.")


class Share:
    """What of every batch is for this process: all of it.

    >>> Share()(((1.0,), {}))
    ((1.0,), {})
    """

    def __call__(self, call: Call) -> Call:
        """This process's share of a batch."""
        return call


class Batches(ABC):
    """A source of batches that knows where it is."""

    resumable = True
    environment = Environment()
    inputs = Inputs()
    share = Share()
    last_batch: LastBatch = "compile"
    size: int | None = None  # of the first batch, once it is asked for

    @abstractmethod
    def start(self, restart: int, seed: int | None) -> None:
        """Go to the first batch of a restart."""

    @abstractmethod
    def next_item(self) -> Any:
        """The next item.

        :raises StopIteration: when the data are used up for good.
        """

    def __next__(self) -> Call:
        if self.last_batch != "compile" and self.size is None:
            self.size = Arguments.of(*self.peek()).size
        while True:
            arguments = Arguments.of(*self._call(self.next_item()))
            if (fitted := arguments.fitted(self.size, self.last_batch)) is not None:
                return self.share(fitted.call(fitted.tensors))

    def _call(self, item: Any) -> Call:
        """What the model is called with for an item."""
        with self.environment.active():
            call: Call = self.environment.move(self.inputs(*to_call(item)))
        return call

    @abstractmethod
    def peek(self) -> Call:
        """The first batch, without moving on; the random state is left as it was."""

    def get_state(self) -> dict[str, Any]:
        """Where the source is, for a checkpoint."""
        return {}

    def set_state(self, state: dict[str, Any]) -> None:  # noqa: B027
        """Go to where :meth:`get_state` was called. Changes the global random state."""

    def finish(self) -> None:  # noqa: B027
        """Leave the user's objects as they were."""


class FullData(Batches):
    """The same arguments at every step."""

    def __init__(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        self.call = self.mine = (tuple(args), dict(kwargs))

    def start(self, restart: int, seed: int | None) -> None:
        """Nothing to do, but the data are moved once instead of at every step."""
        self.call = self.environment.move(self.call)
        self.mine = self.share(self.call)

    def next_item(self) -> Any:
        """Not used: the arguments come with their keywords."""
        raise NotImplementedError

    def __next__(self) -> Call:
        return self.mine

    def peek(self) -> Call:
        """The arguments."""
        return self.environment.move(self.call)


def generators_of(data: Any) -> list[torch.Generator]:
    """The random generators that a ``DataLoader`` and its samplers were given, each once."""
    if not isinstance(data, DataLoader):
        return []
    owners = [data, data.sampler, data.batch_sampler, getattr(data.batch_sampler, "sampler", None)]
    found = [getattr(owner, "generator", None) for owner in owners]
    return list({id(g): g for g in found if isinstance(g, torch.Generator)}.values())


class Epochs(Batches):
    """An iterable that starts anew when it is used up: a ``DataLoader``, a list, any object with ``__iter__``.

    It is put back by starting the epoch again from the random state it had, and passing over the batches that were
    used; the last of them has to be the same, or else the continuation would not be.

    A generator that the ``DataLoader`` was given is used as it is by the first restart and seeded by the others; with
    a seed, it is put back in the end.
    """

    def __init__(self, data: Iterable[Any], seeded: bool = False) -> None:
        self.data, self.seeded = data, seeded
        self.generators = generators_of(data)
        self.original = [g.get_state() for g in self.generators]
        self.iterator: Iterator[Any] = iter(())
        self.position, self.epochs = 0, -1
        self.last: Any = None

    def start(self, restart: int, seed: int | None) -> None:
        """Set the generators; the first epoch begins with the first batch."""
        for g, state in zip(self.generators, self.original, strict=True):
            g.set_state(state)
            if restart > 0:
                g.manual_seed(g.initial_seed() + restart if seed is None else seed)
        self.iterator, self.position, self.last, self.epochs = iter(()), -1, None, -1

    def next_item(self) -> Any:
        """The next item of this epoch, or the first of the next one."""
        try:
            item = next(self.iterator) if self.position > 0 else self._first()
        except StopIteration:
            item = self._first()
        self.position, self.last = self.position + 1, item
        return item

    def _first(self) -> Any:
        self._begin_epoch()
        try:
            return next(self.iterator)
        except StopIteration:
            raise _no_batch(self.data) from None

    def _begin_epoch(self) -> None:
        self.epochs += 1
        if isinstance(sampler := getattr(self.data, "sampler", None), DistributedSampler):
            sampler.set_epoch(self.epochs)
        self.epoch = {"rng": rng_state(), "generators": [g.get_state() for g in self.generators]}
        self.iterator, self.position = iter(self.data), 0

    def peek(self) -> Call:
        """The first batch of an epoch that started now."""
        states = [g.get_state() for g in self.generators]
        with preserved_rng():
            item = next(iter(self.data), None)
        for g, state in zip(self.generators, states, strict=True):
            g.set_state(state)
        if item is None:
            raise _no_batch(self.data)
        return self._call(item)

    def get_state(self) -> dict[str, Any]:
        """Random state at the start of the epoch, number of batches used, and a hash of the last one."""
        if self.position < 1:
            return {"position": 0, "generators": [g.get_state() for g in self.generators]}
        return {**self.epoch, "position": self.position, "epochs": self.epochs, "last": fingerprint(self.last)}

    def set_state(self, state: dict[str, Any]) -> None:
        """Pass over the batches that were used.

        :raises ValueError: if the data are not those of the checkpoint.
        """
        for g, saved in zip(self.generators, state["generators"], strict=True):
            g.set_state(saved)
        if state["position"] < 1:
            return
        set_rng_state(state["rng"])
        self.epochs = state.get("epochs", 0) - 1
        self._begin_epoch()
        for item in itertools.islice(self.iterator, state["position"]):
            self.position, self.last = self.position + 1, item
        if self.position != state["position"] or fingerprint(self.last) != state["last"]:
            raise ValueError(
                f"data={type(self.data).__name__} did not return the batches of the checkpointed run again (batch "
                f"{state['position']} of its epoch differs): expected the same data in the same order. If its samples "
                "are drawn or transformed with the global random state, use worker processes, a sampler with its own "
                "generator, or an iterable with state_dict() and load_state_dict()."
            )

    def finish(self) -> None:
        """Put the generators of the ``DataLoader`` back."""
        for g, state in zip(self.generators, self.original, strict=True):
            if self.seeded:
                g.set_state(state)


class Stateful(Batches):
    """An iterable with ``state_dict()`` and ``load_state_dict()``, such as torchdata's ``StatefulDataLoader``."""

    def __init__(self, data: Any) -> None:
        self.data = data
        self.original = copy.deepcopy(data.state_dict())
        self.iterator: Iterator[Any] | None = None

    def start(self, restart: int, seed: int | None) -> None:
        """Go back to the state at the beginning."""
        if restart > 0:
            self.data.load_state_dict(copy.deepcopy(self.original))
        self.iterator = None

    def next_item(self) -> Any:
        """The next item; a new epoch when one ends, unless the iterable is an iterator."""
        if self.iterator is None:
            self.iterator = iter(self.data)
        try:
            return next(self.iterator)
        except StopIteration:
            if self.iterator is self.data:
                raise
            self.iterator = iter(self.data)
            return next(self.iterator)

    def peek(self) -> Call:
        """The next item, after which the state is put back."""
        state = copy.deepcopy(self.data.state_dict())
        with preserved_rng():
            item = next(iter(self.data), None)
        if item is None:
            raise _no_batch(self.data)
        self.data.load_state_dict(state)
        self.iterator = None
        return self._call(item)

    def get_state(self) -> dict[str, Any]:
        """The iterable's own state."""
        return {"state": clone(self.data.state_dict())}

    def set_state(self, state: dict[str, Any]) -> None:
        """Give the iterable its state back."""
        self.data.load_state_dict(state["state"])
        self.iterator = None


class OneShot(Batches):
    """An iterator, whose items can be had once."""

    resumable = False

    def __init__(self, data: Iterator[Any]) -> None:
        self.data = data
        self.first: list[Any] = []

    def start(self, restart: int, seed: int | None) -> None:
        """Nothing to go back to."""

    def next_item(self) -> Any:
        """The next item."""
        return self.first.pop() if self.first else next(self.data)

    def peek(self) -> Call:
        """The next item, which is kept for the first step."""
        try:
            self.first = self.first or [next(self.data)]
        except StopIteration:
            raise _no_batch(self.data) from None
        return self._call(self.first[0])


def make_batches(
    data: Any,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    seeded: bool = False,
    last_batch: LastBatch = "compile",
) -> Batches:
    """The source for ``data``, or for the full ``args`` and ``kwargs`` if it is ``None``.

    :param seeded: put the random generators of a ``DataLoader`` back in the end.
    :param last_batch: what to do with batches that are shorter than the first: ``"compile"`` leaves them as they are.
    :raises ValueError: if ``data`` cannot be iterated over, or for an unknown ``last_batch``.
    """
    check_last_batch(last_batch)
    if data is None:
        return FullData(args, kwargs)
    batches = _source(data, seeded)
    batches.last_batch = last_batch
    return batches


def _source(data: Any, seeded: bool) -> Batches:
    if is_array(data) or isinstance(data, (Tensor, Mapping, str)) or not isinstance(data, Iterable):
        raise ValueError(
            f"data={type(data).__name__}: expected a DataLoader or another iterable over batches, each what the model "
            "is called with. Full data are given as args= and kwargs=."
        )
    if hasattr(data, "state_dict") and hasattr(data, "load_state_dict"):
        return Stateful(data)
    return OneShot(data) if isinstance(data, Iterator) else Epochs(data, seeded)
