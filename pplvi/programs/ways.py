"""Which way several particles of a pair of programs are run: found by trying once, and remembered.

Broadcasting, where a program takes particles as one more dimension on the left, is fastest; ``torch.func.vmap`` carries
nearly every other program; a loop is left for those that branch on draws. A way is right if two particles that are run
in it have the densities that each has by itself.
"""

from __future__ import annotations

import random
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, get_args

import numpy as np
from pyro import poutine
from pyro.poutine.guide import GuideMessenger
from torch import Tensor

from pplvi.programs import checks
from pplvi.programs.carrying import BROADCAST, CARRIED, LOOP, LOOPED_MODEL, Given, Way, WayName, run_particles
from pplvi.programs.factorising import SeparateFactors
from pplvi.programs.first_run import supplied_values
from pplvi.programs.handlers import Supply
from pplvi.programs.memo import Layout, recall, remember
from pplvi.programs.running import How, isolated
from pplvi.programs.sites import is_delta, is_enumerated, latent_sites
from pplvi.programs.state import is_recording, modules_of, preserved_buffers
from pplvi.programs.together import is_batched
from pplvi.programs.traces import Run
from pplvi.types import Program

Vectorize = WayName | bool | None
"""A way by its word; ``None`` and ``True`` leave the choice to what is found right, ``False`` is a loop."""


def named(vectorize: Vectorize, argument: str = "vectorize") -> WayName | None:
    """The word of a way that an argument names; ``None`` for any.

    :raises ValueError: for any other value.

    >>> named(False), named(True), named("vmap")
    ('loop', None, 'vmap')
    """
    if vectorize is None or vectorize is True:
        return None
    if vectorize is False:
        return "loop"
    if vectorize not in get_args(WayName):
        raise ValueError(f"{argument}={vectorize!r}: expected None, True, False, or one of {get_args(WayName)}.")
    return vectorize


def way_for(
    model: Program, guide: Program, args: Any, kwargs: Any, layout: Layout, word: WayName | None
) -> tuple[Way, Layout]:
    """The way in which this pair runs several particles, and the layout that remembers it.

    :raises ValueError: if the way that ``word`` names cannot run these programs.
    """
    if word in layout.ways:
        return layout.ways[word], layout
    if is_recording():  # nothing can be tried now
        return next(iter(layout.ways.values()), BROADCAST), layout
    way = _found(model, guide, args, kwargs, layout, word)
    layout = replace(layout, ways={**layout.ways, word: way})
    remember(model, guide, args, kwargs, layout)
    return way, layout


def _found(model: Program, guide: Program, args: Any, kwargs: Any, layout: Layout, word: WayName | None) -> Way:
    trial = Trial(model, guide, args, kwargs, layout, wanted=word is not None)
    trial.check_alone()
    coupled = isinstance(poutine.unwrap(guide), GuideMessenger)
    errors: list[Exception] = []
    for way in candidates(word):
        if way == LOOP:
            return way
        if coupled and way.guide != way.model:
            continue
        if (error := trial.failure(way)) is None:
            return way
        errors.append(error)
    raise ValueError(
        f"vectorize={word!r}: these programs cannot be run that way: {errors[0]}\nExpected "
        + (
            "tensors that broadcast over one more dimension on the left"
            if word == "broadcast"
            else "no branch on draws"
        )
        + ". Drop vectorize= to have a way chosen that can."
    ) from errors[0]


def way_taken(model: Program, guide: Program, args: Any, kwargs: Any, word: WayName | None = None) -> WayName | None:
    """The way in which several particles of these programs have been run; ``None`` if there were none.

    :param word: the way that was named.
    """
    layout = recall(model, guide, args, kwargs)
    found = layout.ways.get(word) if layout is not None else None
    return None if found is None else found.word


def candidates(word: WayName | None) -> list[Way]:
    """The ways that a word allows, the fastest first; a loop that is asked for takes the pair particle by particle."""
    if word == "loop":
        return [LOOP]
    return [way for way in (BROADCAST, *CARRIED, LOOPED_MODEL, LOOP) if word in (None, way.word)]


@dataclass(frozen=True)
class Trial:
    """Two particles of a pair, to be run in different ways and compared with each alone.

    :ivar wanted: whether a user named the way.
    """

    model: Program
    guide: Program
    args: Any
    kwargs: Mapping[str, Any]
    layout: Layout
    wanted: bool = False

    def check_alone(self) -> None:
        """Check the densities of one particle: arguments of distributions are not checked under ``vmap``.

        :raises ValueError: what is wrong with them.
        """
        with isolated(), preserved_buffers(model=self.model, guide=self.guide):
            values = supplied_values(self.model, self.args, self.kwargs, self.layout, None)
            how = How(1, self.layout.nesting, self.layout.enumerated, values=values)
            run_particles(self.model, self.guide, self.args, self.kwargs, how, BROADCAST, Given()).log_target()

    def failure(self, way: Way) -> Exception | None:
        """What goes wrong when the programs are run in this way."""
        try:
            with isolated(), preserved_buffers(model=self.model, guide=self.guide), warnings.catch_warnings():
                self._compare(way)
        except Exception as error:  # an error of the programs' own was met in the plain run before
            return error
        return None

    def _compare(self, way: Way) -> None:
        values = supplied_values(self.model, self.args, self.kwargs, self.layout, None)
        how = How(2, self.layout.nesting, self.layout.enumerated, values=values)
        given = Given(self.layout.indices, spoil=True)
        with OutsideState() as outside, SeparateFactors(2, active=way.model and not self.wanted):
            both = run_particles(self.model, self.guide, self.args, self.kwargs, how, way, given)
            if not both.guide_enumerated:  # scored at given values, as each alone will be: rounding is then the same
                how = replace(how, values={**both.subsample_indices(), **_drawn(both)})
                both = run_particles(self.model, self.guide, self.args, self.kwargs, how, way, given)
        outside.check(way)
        if held := list(held_by(self.model, self.guide)):
            raise checks.DiffersError(
                f"the programs keep draws in {held}, which would be those of all particles at once."
            )
        if both.guide_enumerated:  # its later draws have a dimension for each enumerated value: none is one particle's
            return
        for particle in range(2):
            self._compare_one(both, how, particle)

    def _compare_one(self, both: Run, how: How, particle: int) -> None:
        values = {**both.subsample_indices(), **both.draws_of(particle)}
        by_itself = replace(how, num_particles=1, values=values)
        with Supply(both.subsample_indices(of_model=True)):
            alone, again = (
                run_particles(self.model, self.guide, self.args, self.kwargs, by_itself, BROADCAST, Given())
                for _ in range(2)
            )
        checks.check_alone(both, alone, again, particle)


def _drawn(run: Run) -> dict[str, Tensor]:
    sites = latent_sites(run.guide).items()
    return {name: site["value"].clone() for name, site in sites if not (is_delta(site) or is_enumerated(site))}


class OutsideState:
    """Tells whether random numbers of NumPy or of Python's ``random`` were drawn inside."""

    def __init__(self) -> None:
        self.changed = False

    def __enter__(self) -> OutsideState:
        self._before = self._state()
        return self

    def __exit__(self, *_: Any) -> None:
        self.changed = self._state() != self._before

    def check(self, way: Way) -> None:
        """Check that such numbers are not shared by all particles.

        :raises DiffersError: if they would be.
        """
        if self.changed and way.word != "loop":
            raise checks.DiffersError("random numbers of NumPy or Python's random are the same for all particles.")

    @staticmethod
    def _state() -> Any:
        numpy: Any = np.random.get_state(legacy=True)
        return numpy[1].tobytes(), numpy[2:], random.getstate()


def held_by(*programs: Program) -> Iterator[str]:
    """Names of attributes and buffers of the modules behind programs that hold a tensor of all particles."""
    for program in programs:
        for name, module in modules_of(program).items():
            for path, part in module.named_modules(prefix=name):
                found: dict[str, Any] = {**vars(part), **part._buffers, **part._parameters}
                yield from (f"{path}.{key}".lstrip(".") for key, value in found.items() if is_batched(value))
