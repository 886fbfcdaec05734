"""Particles under programs: how all of them are run, weighed, summed and chosen, whoever moves them.

Annealed walks and particle filters differ in the programs that they run and in what they weigh; everything that knows
how the particles lie in a tensor, leftmost and before the plates, stands here.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from pplvi.objectives.step import Routing
from pplvi.programs.lone import Alone, Lone, depths_of
from pplvi.programs.sharding import sharded
from pplvi.programs.single import carried_path, rescored
from pplvi.programs.sites import latent_sites
from pplvi.programs.stacked import Stacked
from pplvi.programs.traces import Run
from pplvi.programs.ways import Vectorize
from pplvi.types import MutableValues, Program, Values


@dataclass
class Particles:
    """Particles with one weight for each of them and each independent element of the data.

    :ivar num_particles: how many.
    :ivar nesting: how deep plates nest: the particles are one dimension further left.
    :ivar batch: names of the plates around all sites, whose elements have weights of their own.
    :ivar routing: what the objective needs of the draws.
    :ivar indices: indices of subsampled plates, given to every program that is run.
    :ivar dims: dimensions of the batch plates, left to right.
    :ivar scale: product of their subsample scales, which densities leave out.
    :ivar subsampled: other subsampled plates, whose scale is inside the densities.
    :ivar vectorize: the way of running particles; for each program the fastest that is right unless named.
    :ivar depths: numbers of dimensions that the values of sites have without particles.

    >>> particles = Particles(2, nesting=1, batch=frozenset({"data"}), routing=Routing(), dims=(-1,))
    >>> particles.total(torch.ones(2, 3, 5), events=1)
    tensor([[5., 5., 5.],
            [5., 5., 5.]])
    """

    num_particles: int
    nesting: int
    batch: frozenset[str]
    routing: Routing
    indices: MutableValues = field(default_factory=dict)
    dims: tuple[int, ...] = ()
    scale: float = 1.0
    subsampled: frozenset[str] = frozenset()
    vectorize: Vectorize = None
    depths: dict[str, int] = field(default_factory=dict)

    @property
    def followed(self) -> bool:
        """Whether a gradient is to follow the draws, so that they have to be reparameterised."""
        return not self.routing.detach and torch.is_grad_enabled()

    @property
    def frozen(self) -> bool:
        """Whether densities are to be computed at leaves in the place of the draws."""
        return self.routing.freeze and torch.is_grad_enabled()

    @property
    def accounts(self) -> dict[str, Any]:
        """What a :class:`pplvi.objectives.Step` says of scales."""
        return {"scale": self.scale, "subsampled": tuple(sorted(self.subsampled))}

    def run(
        self,
        program: Program,
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        values: Values,
        given: tuple[Values, ...] = (),
        copies: int = 1,
        **how: Any,
    ) -> Run:
        """Run a program at values, for all particles or for several copies of them, in the way that is right for it.

        :param given: values of sites that the program is called with, before its other arguments.
        :param how: see :class:`pplvi.programs.lone.Alone`.
        """
        alone = self.alone(values, copies, **how)
        run = Lone(program, given, args, kwargs, self.depths).run(alone, self.vectorize)
        self.depths.update(depths_of(run))
        return sharded(run)

    def alone(self, values: Values, copies: int = 1, **how: Any) -> Alone:
        """How a program is run at values, with the indices of the minibatch."""
        count, values = self.num_particles * copies, {**self.indices, **values}
        return Alone(count, self.nesting, values, frozenset(self.indices), **how)

    def note(self, run: Run) -> None:
        """Note where the batch plates are, and their scale."""
        plates = [plate for plate in run.batch if plate.name in self.batch]
        self.dims = tuple(plate.dim for plate in plates)
        self.scale = math.prod(plate.scale for plate in plates)

    def density(self, run: Run) -> Tensor:
        """A program's log density, ``(num_particles, *batch)``, the batch plates' scale left out."""
        more = [plate for plate in run.batch if plate.name not in self.batch]
        whole = run.shard.whole if run.shard is not None else set()
        cut = {plate.name for plate in more if plate.scale != 1.0} - whole
        self.subsampled |= {*run.subsampled, *cut} - self.batch
        summed = [index for index, plate in enumerate(run.batch, 1) if plate.name not in self.batch]
        density = run.log_target()
        density = (density.sum(summed) if summed else density) * math.prod(plate.scale for plate in more)
        split = run.shard is not None and not run.shard.plates.isdisjoint(plate.name for plate in more)
        return run.shard.mean(density) if run.shard is not None and split else density

    def total(self, tensor: Tensor, events: int) -> Tensor:
        """Sum over event dimensions and all plates outside the batch: ``(num_particles, *batch)`` is left."""
        tensor = tensor.sum(list(range(-events, 0))) if events else tensor
        tensor = tensor.reshape((1,) * (self.nesting + 1 - tensor.dim()) + tuple(tensor.shape))
        summed = [dim for dim in range(-self.nesting, 0) if dim not in self.dims]
        return tensor.sum(summed) if summed else tensor

    def align(self, tensor: Tensor, events: int) -> Tensor:
        """Give a tensor ``(num_particles, *batch)`` the dimensions of a site's value."""
        particles = [] if len(tensor) == 1 else [len(tensor)]  # one particle runs programs without a dimension for it
        return tensor.reshape(*particles, *self._plates(tensor), *[1] * events)

    def take(self, value: Tensor, chosen: Tensor) -> Tensor:
        """Particles of a site's value, ``(num_particles, *plates, *event)``, each batch element by its own indices.

        :param chosen: indices of the particles to take, ``(num_taken, *batch)``.
        :returns: ``(num_taken, *plates, *event)``.

        >>> particles = Particles(2, nesting=1, batch=frozenset({"data"}), routing=Routing(), dims=(-1,))
        >>> particles.take(torch.tensor([[1, 2, 3], [4, 5, 6]]), torch.tensor([[0, 1, 0]]))
        tensor([[1, 5, 3]])
        """
        chosen = chosen.reshape(len(chosen), *self._plates(chosen), *[1] * (value.dim() - self.nesting - 1))
        wanted = [max(a, b) for a, b in zip(value.shape[1:], chosen.shape[1:], strict=True)]
        return torch.take_along_dim(value.expand(len(value), *wanted), chosen.expand(len(chosen), *wanted), 0)

    def _plates(self, tensor: Tensor) -> list[int]:
        """Sizes of a tensor ``(num_particles, *batch)`` in the dimensions of the plates."""
        sizes = dict(zip(self.dims, tensor.shape[1:], strict=True))
        return [sizes.get(dim, 1) for dim in range(-self.nesting, 0)]


@dataclass(frozen=True)
class DrawPaths:
    """Draws of one program, and the leaves that densities are computed at in their place where these are frozen.

    :ivar particles: the particles that were drawn.
    :ivar drawn: the run that they come from.
    :ivar live: the draws with their graph.
    :ivar at: the leaves; the draws themselves where nothing is frozen.
    """

    particles: Particles
    drawn: Run
    live: MutableValues
    at: MutableValues

    @classmethod
    def of(cls, particles: Particles, drawn: Run, live: MutableValues) -> DrawPaths:
        """The paths of the draws of a run."""
        return cls(particles, drawn, live, leaves(live) if particles.frozen and live else live)

    def __call__(self, density: Tensor) -> Tensor:
        """The gradient path of the draws through a density that was computed at leaves; zero in value."""
        return carried_path(density, self.at, self.live, self._total)

    def log_forward(self, again: Callable[[], Run]) -> Tensor:
        """Log density of what drew, ``(num_particles, *batch)``, its parameters frozen where there are leaves.

        :param again: runs the program at the leaves.
        """
        if self.at is self.live:
            return self.particles.density(self.drawn)
        density = self.particles.density(run_at(self.drawn, self.at, again))
        return density.detach() + self(density)

    def _total(self, name: str, product: Tensor) -> Tensor:
        return self.particles.total(product, self.drawn.model.nodes[name]["fn"].event_dim)


def run_at(drawn: Run, at: Values, again: Callable[[], Run]) -> Run:
    """The program of a run at other values of its draws.

    A site whose distribution depends on no other draw, and is still there, is not run again.
    """
    lost = any(isinstance(drawn.model.nodes[name]["fn"], Stacked) for name in at)
    return rescored(drawn, at) if len(at) == 1 and not lost else again()


def leaves(values: Values) -> MutableValues:
    """The same values, detached, as leaves of a graph of their own."""
    return {name: value.detach().requires_grad_() for name, value in values.items()}


def draws_of(run: Run) -> MutableValues:
    """Values of a run's latent sites."""
    return {name: site["value"] for name, site in latent_sites(run.model).items()}
