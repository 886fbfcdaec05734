"""One program by itself with all particles, in the way that is right for it: the levels of a path, a filter's steps."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

from pplvi.programs import checks
from pplvi.programs.carrying import BROADCAST, LOOP, Given, Way, gathered, one_sound, ways_of_rows
from pplvi.programs.factorising import SeparateFactors
from pplvi.programs.memo import Memo, dimensions
from pplvi.programs.running import How, isolated
from pplvi.programs.single import run_alone
from pplvi.programs.sites import latent_sites, site_plates
from pplvi.programs.state import is_recording, preserved_buffers
from pplvi.programs.together import is_batched
from pplvi.programs.traces import Run
from pplvi.programs.ways import OutsideState, Vectorize, held_by, named
from pplvi.types import Program, Values

_GIVEN = "given to the program: "


@dataclass(frozen=True)
class Own:
    """A tensor with the particles in front, among things that all particles share."""

    value: Tensor


def each_own(container: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """Nested containers with every particle's own tensors changed.

    >>> import torch
    >>> each_own({"z": Own(torch.zeros(2)), "n": 3}, lambda x: x + 1)
    {'z': Own(value=tensor([1., 1.])), 'n': 3}
    """
    return tree_map(lambda leaf: Own(change(leaf.value)) if isinstance(leaf, Own) else leaf, container, is_leaf=_is_own)


def _is_own(leaf: Any) -> bool:
    return isinstance(leaf, Own)


@dataclass(frozen=True)
class Broadcasting:
    """A program that is known to broadcast over particles, so that no other way of running it is tried.

    >>> Broadcasting(lambda: 3)()
    3
    """

    program: Program

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run it."""
        return self.program(*args, **kwargs)


@dataclass(frozen=True)
class Alone:
    """How one program is run by itself; see :func:`pplvi.programs.single.run_alone`.

    :ivar values: values that its latents and plates' indices take, ``(num_particles, *plates, *event)``.
    :ivar indices: names of those that are indices of minibatches: they are no particle's own.
    """

    num_particles: int
    nesting: int
    values: Values = field(default_factory=dict)
    indices: frozenset[str] = frozenset()
    complete: bool = False
    detach: bool = False
    redraw: bool = False

    def run(self, program: Program) -> Run:
        """Run it once, with all particles in one call."""
        how = {"complete": self.complete, "detach": self.detach, "redraw": self.redraw}
        count, nesting = self.num_particles, self.nesting
        return run_alone(program, (), {}, num_particles=count, nesting=nesting, values=self.values, **how)

    def of(self, values: Values) -> Alone:
        """The same for one particle with these values of its own."""
        shared = {name: value for name, value in self.values.items() if name in self.indices}
        return replace(self, num_particles=1, values={**shared, **values})

    @property
    def own(self) -> dict[str, Tensor]:
        """Values of each particle."""
        return {name: value for name, value in self.values.items() if name not in self.indices}


def run_each(build: Callable[[Any], Program], given: Any, alone: Alone, way: Way) -> tuple[Run, Any]:
    """Run a program for each particle, carried or looped.

    :param build: makes the program of one particle from what is given to it, in the shapes of one.
    :param given: nested containers, into which the program may write; each particle's tensors are :class:`Own`.
    :returns: the run, and the containers as the program has left them.

    >>> import pyro, pyro.distributions as dist, torch
    >>> from pplvi.programs.carrying import CARRIED
    >>> def step(state):
    ...     def program():
    ...         state["z"] = pyro.sample("z", dist.Normal(state["z"], 1.0)) + 1.0
    ...     return program
    >>> alone = Alone(2, 0, {"z": torch.tensor([1.0, 2.0])})
    >>> run, state = run_each(step, {"z": Own(torch.zeros(2))}, alone, CARRIED[1])
    >>> run.log_target(), state["z"].value
    (tensor([-1.4189, -2.9189]), tensor([2., 3.]))
    """
    leaves, spec = tree_flatten(given, is_leaf=_is_own)
    lanes = {f"{_GIVEN}{place}": leaf.value for place, leaf in enumerate(leaves) if isinstance(leaf, Own)}
    left: list[Any] = []

    def one(values: dict[str, Tensor], single: How) -> Run:
        found = [values.get(f"{_GIVEN}{place}", leaf) for place, leaf in enumerate(leaves)]
        container = tree_unflatten(found, spec)
        run = alone.of({n: v for n, v in values.items() if n not in lanes}).run(build(container))
        left[:] = tree_flatten(container)
        own = is_batched if way.word == "vmap" else lambda leaf: isinstance(leaf, Tensor)
        return replace(run, kept={str(place): leaf for place, leaf in enumerate(left[0]) if own(leaf)})

    how = How(alone.num_particles, alone.nesting)
    run = gathered(one, {**alone.own, **lanes}, how, way, Given(alone.indices, frozenset(alone.values)))
    after, spec = left
    return run, tree_unflatten([_kept(run, place, leaf) for place, leaf in enumerate(after)], spec)


def _kept(run: Run, place: int, leaf: Any) -> Any:
    return Own(run.kept[str(place)]) if str(place) in run.kept else leaf


@dataclass(frozen=True)
class Lone:
    """A program with what it is called with: values to start from, then the arguments of the model.

    :ivar given: values from site names, ``(num_particles, *plates, *event)``.
    :ivar depths: numbers of dimensions that the values of sites have without particles.
    """

    program: Program
    given: tuple[Values, ...]
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    depths: Mapping[str, int]

    def run(self, alone: Alone, vectorize: Vectorize = None) -> Run:
        """Run it with all particles, in the fastest way that is right unless one is named."""
        if alone.num_particles == 1:
            return one_sound(lambda: alone.run(self._built(self.given)))
        return self._run(alone, self._way(alone, vectorize))

    def _built(self, given: tuple[Any, ...]) -> Program:
        return lambda: self.program(*given, *self.args, **self.kwargs)

    def _run(self, alone: Alone, way: Way) -> Run:
        if way.model:
            return alone.run(self._built(self.given))
        given = tuple({name: Own(self._compact(name, x)) for name, x in values.items()} for values in self.given)
        return run_each(self._built, given, alone, way)[0]

    def _compact(self, name: str, value: Tensor) -> Tensor:
        depth = self.depths.get(name, value.dim() - 1)
        return value.reshape(len(value), *value.shape[value.dim() - depth :])

    def _way(self, alone: Alone, vectorize: Vectorize) -> Way:
        word = named(vectorize)
        key = dimensions(self.args, self.kwargs), word
        if (known := _WAYS.recall((self.program,), key)) is not None:
            return known
        if isinstance(self.program, Broadcasting) or is_recording():  # nothing can be tried while recording
            return BROADCAST
        for way in ways_of_rows(word):
            if way == LOOP or self._failure(alone, way) is None:
                return _WAYS.keep((self.program,), key, way)
        raise ValueError(
            f"vectorize_particles={word!r}: a program of the path cannot be run that way: {self._failure(alone, way)} "
            "Drop the option to have a way chosen that can."
        )

    def _failure(self, alone: Alone, way: Way) -> Exception | None:
        """What goes wrong when two particles are run in this way."""
        try:
            with isolated(), preserved_buffers(program=self.program), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                self._of([0, 1])._compare(alone, way)
        except Exception as error:  # an error of the program's own is met again in the loop
            return error
        return None

    def _of(self, chosen: list[int]) -> Lone:
        return replace(self, given=tuple({n: v[chosen].detach() for n, v in values.items()} for values in self.given))

    def _compare(self, alone: Alone, way: Way) -> None:
        shared = {name: value for name, value in alone.values.items() if name in alone.indices}
        values = {name: value[:2].detach() for name, value in alone.own.items()}
        two = replace(alone, num_particles=2, values={**shared, **values}, detach=False, redraw=False)
        with OutsideState() as outside, SeparateFactors(2, active=way.model):
            run = self._run(two, way)
        outside.check(way)
        drawn = {name: site["value"].clone() for name, site in latent_sites(run.model).items()}
        indices = run.subsample_indices(of_model=True)
        two = replace(two, values={**drawn, **indices}, indices=frozenset(indices))
        both = self._run(two, way)
        if held := list(held_by(self.program)):
            raise checks.DiffersError(f"the program keeps draws in {held}.")
        for particle in range(2):
            own = replace(self, given=tuple(self._given_to(particle, values) for values in self.given))
            one = two.of({name: value[particle] for name, value in drawn.items()})
            single, again = (own.run(one) for _ in range(2))
            checks.check_alone(both, single, again, particle)

    def _given_to(self, particle: int, values: Values) -> dict[str, Tensor]:
        return {name: self._compact(name, value)[particle] for name, value in values.items()}


_WAYS = Memo[Way]()


def depths_of(run: Run) -> dict[str, int]:
    """Numbers of dimensions that the values of a program's latents have without particles."""
    sites = latent_sites(run.model).items()
    return {n: s["fn"].event_dim + max((-p.dim for p in site_plates(s)), default=0) for n, s in sites}
