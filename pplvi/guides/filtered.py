"""The distribution over sequences that a particle filter draws from, as a guide: posteriors of state-space models.

One draw is one run of a filter: of its last particles one is chosen in proportion to its weight and traced back to the
start. The mean weight of the run, an unbiased estimate of the evidence, is the draw's importance weight: on the space
of all that the filter draws, ``log p(x, z) - log q(z) = log Z``, so that the guide's density is taken to be
``log p(x, z) - log Z``. A weighted sampler is thus the proposal of another one, and proper.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import pyro
import pyro.distributions as dist
import torch
from pyro.nn import PyroModule
from torch import Tensor

from pplvi.kinds.checked import checked
from pplvi.kinds.kinds import Count, Rate
from pplvi.objectives.step import Routing
from pplvi.programs.handlers import aside
from pplvi.programs.markov import numbered
from pplvi.programs.sites import PARTICLES, Plate, site_plates
from pplvi.samplers.filtering import Filter, plates_found, way_of
from pplvi.samplers.particles import Particles
from pplvi.samplers.state_space import Course, Plates, course_of, has_steps
from pplvi.types import Program
from pplvi.weights.algebra import logmeanexp
from pplvi.weights.resampling import Resampling, ResamplingScheme, resample

_FILTERS = "_pplvi_filters"


@checked
class FilteredGuide(PyroModule):
    """A particle filter as a guide: draws whole sequences, weighted by the filter's estimate of the evidence.

    The family of variational SMC (Naesseth et al. 2018), and particle marginal draws (Andrieu, Doucet & Holenstein
    2010). The bound of ``ELBO()`` with this guide is the filtering bound; :class:`pplvi.losses.FilteringELBO`
    trains its proposal with any objective. With one particle it is the plain sequential proposal.

    :param model: an object with ``init`` and ``step``, or a program with a ``pyro.markov`` loop. In the first case the
        guide goes with ``StateSpace(model)``, whose sites are numbered.
    :param proposal: written in the same way as the model.
    :param num_particles: particles of each filter.
    :param resample: between time steps: ``True`` always, a fraction of the particles, or ``False`` never.
    :param scheme: ``"systematic"``, ``"stratified"`` or ``"multinomial"``.
    :raises ValueError: for a fraction or scheme that does not exist, or fewer than one particle.

    >>> from pplvi import Posterior
    >>> def model(y):
    ...     z = 0.0
    ...     for t in pyro.markov(range(len(y))):
    ...         z = pyro.sample(f"z_{t}", dist.Normal(z, 1.0))
    ...         pyro.sample(f"y_{t}", dist.Normal(z, 1.0), obs=y[t])
    >>> def prior(y):
    ...     z = 0.0
    ...     for t in pyro.markov(range(len(y))):
    ...         z = pyro.sample(f"z_{t}", dist.Normal(z, 1.0))
    >>> guide = FilteredGuide(model, prior, num_particles=50)
    >>> posterior = Posterior(model, guide, (torch.tensor([0.3, -0.2, 0.9]),), num_draws=500, seed=0)
    >>> round(float(posterior.log_evidence[0]), 1)  # exact: -4.264
    -4.3
    """

    def __init__(
        self,
        model: Any,
        proposal: Any,
        num_particles: Count = 100,
        *,
        resample: bool | Rate = 0.5,
        scheme: ResamplingScheme = "systematic",
        name: str = "FilteredGuide",
    ) -> None:
        super().__init__(name)
        if num_particles < 1:
            raise ValueError(f"num_particles={num_particles}: expected at least 1.")
        model = model.model if hasattr(model, "model") and has_steps(model) else model
        self.__dict__["filtered"] = model, proposal  # modules keep their own names: no part of this one
        self.num_particles, self.resampling = num_particles, Resampling(resample, scheme)

    @property
    def filtered(self) -> tuple[Any, Any]:
        """The model and the proposal of the filter, in time steps."""
        pair: tuple[Any, Any] = self.__dict__["filtered"]
        return pair

    def forward(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """Draw sequences from filters of their own, one for each particle around."""
        model, proposal = self.filtered
        course = course_of(model, proposal, args, kwargs)
        with aside():
            plates = plates_found(model, proposal, course)
        around = _Plates()
        with around.inside(plates.common):
            probe = pyro.sample("_filter", dist.Uniform(0.0, 1.0), infer={"is_auxiliary": True})
        filters = probe.shape[0] if probe.dim() > plates.nesting else 0
        with aside():
            passed = self._run(course, plates, filters) if filters else _as_one_of_several(self._run(course, plates, 0))
        return _Chosen(passed, plates.nesting, bool(filters), has_steps(model), around).sample(plates.common)

    def _run(self, course: Course, plates: Plates, filters: int) -> Filter:
        way = way_of(*self.filtered, course, plates, self.num_particles)
        if filters:
            if not way.model:
                raise ValueError(
                    "the programs of this filter do not broadcast over one more dimension on the left: several filters "
                    "cannot be run in one call."
                )
            course, plates = _Beside(course, filters, -plates.nesting - 1), _around(plates, filters)
        particles = Particles(self.num_particles, plates.nesting, plates.batch, Routing(local=False))
        passed = Filter(course, particles, way, visits=[])
        for _ in passed.steps(self.resampling):
            pass
        if particles.subsampled or particles.scale != 1.0:
            raise ValueError(
                "a plate of the state-space model is subsampled: expected full data, whose sequences can be drawn. "
                "Drop subsample_size; the filter's objectives take minibatches (FilteringELBO)."
            )
        return passed


def _as_one_of_several(passed: Filter) -> Filter:
    """One filter with the dimension that several have."""
    particles, last = passed.particles, passed.last
    assert last is not None
    dims, batch = (-particles.nesting - 1, *particles.dims), particles.batch | {_FILTERS}
    wider = replace(particles, nesting=particles.nesting + 1, dims=dims, batch=batch)
    last = replace(last, log_weight=last.log_weight.unsqueeze(1), log_joint=last.log_joint.unsqueeze(1))
    visits = [
        replace(
            visit,
            sites={n: {**s, "value": s["value"].unsqueeze(1)} for n, s in visit.sites.items()},
            chosen=None if visit.chosen is None else visit.chosen.unsqueeze(1),
        )
        for visit in passed.visits or []
    ]
    return replace(passed, particles=wider, last=last, visits=visits)


def _around(plates: Plates, filters: int) -> Plates:
    """The plates of a model with one more around, over independent filters."""
    dim = -plates.nesting - 1
    around = Plate(_FILTERS, dim, filters, filters)
    return replace(plates, nesting=plates.nesting + 1, common=(around, *plates.common))


class _Plates:
    """The plates of a program, each made once."""

    def __init__(self) -> None:
        self.made: dict[str, Any] = {}

    @contextmanager
    def inside(self, plates: Sequence[Plate]) -> Iterator[None]:
        """Enter some of them."""
        with ExitStack() as stack:
            for plate in plates:
                if plate.name not in self.made:
                    self.made[plate.name] = pyro.plate(plate.name, plate.size, dim=plate.dim)
                stack.enter_context(self.made[plate.name])
            yield


@dataclass(frozen=True)
class _Beside:
    """A course inside a plate over independent filters."""

    course: Course
    filters: int
    dim: int

    def __getattr__(self, name: str) -> Any:
        return getattr(self.course, name)

    def _within(self, program: Program) -> Program:
        def part() -> None:
            with pyro.plate(_FILTERS, self.filters, dim=self.dim):
                program()

        return part

    def propose(self, step: int, memory: Any) -> Program:
        return self._within(self.course.propose(step, memory))

    def score(self, step: int, memory: Any) -> Program:
        return self._within(self.course.score(step, memory))


class _Held(dist.TorchDistribution):
    """Values that a filter has drawn; their density is in a factor of its own."""

    arg_constraints: ClassVar[dict[str, Any]] = {}
    has_rsample = True

    def __init__(self, value: Tensor, like: Any) -> None:
        self.value, self.like = value, like
        events = value.dim() - like.event_dim
        super().__init__(value.shape[:events], value.shape[events:], validate_args=False)

    @property
    def support(self) -> Any:
        return self.like.support

    def expand(self, batch_shape: Any, _instance: Any = None) -> _Held:
        return _Held(self.value.expand(*batch_shape, *self.event_shape), self.like)

    def rsample(self, sample_shape: Any = ()) -> Tensor:
        return self.value.expand(self._extended_shape(torch.Size(sample_shape)))

    def log_prob(self, value: Tensor) -> Tensor:
        return torch.zeros(value.shape[: value.dim() - self.like.event_dim], device=value.device)


@dataclass(frozen=True)
class _Chosen:
    """One particle of each filter, traced back to the start."""

    passed: Filter
    nesting: int
    several: bool
    numbers: bool
    around: _Plates

    def sample(self, common: Sequence[Plate]) -> dict[str, Tensor]:
        """Sample statements for the whole sequence, and the factor that holds its density."""
        last = self.passed.last
        assert last is not None
        chosen = resample(last.log_weight.detach(), 1)
        with self.around.inside(common):
            log_q = torch.take_along_dim(last.log_joint, chosen, 0)[0] - logmeanexp(last.log_weight)
            pyro.factor("_filter_density", self._placed(log_q, common, 0), has_rsample=True)
        return self._sequence(chosen)

    def _sequence(self, chosen: Tensor) -> dict[str, Tensor]:
        found: list[tuple[str, Any, Tensor]] = []
        for visit in reversed(self.passed.visits or []):
            chosen = chosen if visit.chosen is None else torch.take_along_dim(visit.chosen, chosen, 0)
            for name, site in visit.sites.items():
                shown = numbered(name, visit.step) if self.numbers and visit.step else name
                found.append((shown, site, self.passed.particles.take(site["value"], chosen)[0]))
        return {name: self._sample(name, site, value) for name, site, value in reversed(found)}

    def _sample(self, name: str, site: Any, value: Tensor) -> Tensor:
        plates = [plate for plate in site_plates(site) if plate.name not in (_FILTERS, PARTICLES)]
        if not getattr(site["fn"], "has_rsample", False) and torch.is_grad_enabled() and self._learned:
            raise ValueError(
                f"site {name!r} cannot be reparameterised, so the bound of a filter has no gradient through its draws: "
                "expected sites with has_rsample. Train with FilteringELBO(objective='forward_kl')."
            )
        with self.around.inside(plates):
            drawn: Tensor = pyro.sample(name, _Held(self._cut(value, plates, site["fn"].event_dim), site["fn"]))
        return drawn

    @property
    def _learned(self) -> bool:
        last = self.passed.last
        return last is not None and last.log_weight.requires_grad

    def _placed(self, density: Tensor, common: Sequence[Plate], events: int) -> Tensor:
        """A tensor ``(filters, *batch)`` in the dimensions of the plates around."""
        sizes = {plate.dim: plate.size for plate in common}
        shape = [len(density), *(sizes.get(dim, 1) for dim in range(-self.nesting, 0))]
        return self._cut(density.reshape(shape), common, events)

    def _cut(self, value: Tensor, plates: Sequence[Plate], events: int) -> Tensor:
        """Without the dimension of the filters, and of plates further left, where there is one filter alone."""
        depth = max((-plate.dim for plate in plates), default=0)
        return value if self.several else value.reshape(value.shape[value.dim() - events - depth :])
