"""Annealed and nested sampling: draws that are moved and re-weighted from target to target, one step a level.

Annealed importance sampling, sequential Monte Carlo samplers, nested variational inference and the filtering objectives
differ in path, kernels, resampling and objective; the walk is this one. Draws have one weight per particle and per
independent element of the data, and are resampled per element. Nothing branches on a tensor's value.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from pplvi.kernels.invariant import InvariantMove
from pplvi.kinds.checked import checked
from pplvi.objectives.step import Step
from pplvi.programs.joint import execute
from pplvi.programs.memo import Memo, dimensions
from pplvi.programs.running import isolated
from pplvi.programs.traces import Run
from pplvi.samplers import annealed_at_once
from pplvi.samplers.base import Request
from pplvi.samplers.importance import Importance
from pplvi.samplers.particles import Particles
from pplvi.samplers.paths import Planned
from pplvi.samplers.walk import Walk
from pplvi.types import Program
from pplvi.weights.rejection import Rejection
from pplvi.weights.resampling import Resampling as Resampling


@checked
class Annealed:
    """Walk along the path of a guide, ``num_steps`` steps from its first target to the model.

    With a guide that has no path this is importance sampling, one step. The model itself is always the last target.
    Each level runs the forward kernel, the reverse kernel and every program of the level's target once, all particles
    together (a kernel of several sites twice where its density is frozen).

    :param resampling: when and how to resample between levels; never after the last.
    :param vectorize_levels: for objectives of one level: draw without gradient first, then score all levels at once,
        each program in one run over levels and particles, as one step whose batch has the levels first. Results are
        the same. ``None``: where forward and reverse kernels allow it; ``False``: level by level, which needs no more
        memory for more levels.
    :param rejection: try moves of small weight again (:class:`pplvi.weights.Rejection`), level by level. A step's
        incoming weights then hold for the draws before *and* after the move, and the last step's ``log_weight`` is what
        estimates the evidence.

    >>> import pyro, pyro.distributions as dist
    >>> from pplvi.guides import NestedGuide
    >>> from pplvi.objectives import Routing
    >>> def start():
    ...     pyro.sample("z", dist.Normal(0.0, 1.0))
    >>> def kernel(previous):
    ...     pyro.sample("z", dist.Normal(0.6 * previous["z"], 0.8))
    >>> guide = NestedGuide(start, [(start, kernel, kernel)])  # a kernel and its own reversal: all weights are one
    >>> (step,) = Annealed()(start, guide, (), {}, Request(3, routing=Routing(detach=True, local=True)))
    >>> bool((step.log_weight.abs() < 1e-6).all())
    True
    """

    def __init__(
        self,
        resampling: Resampling | None = None,
        *,
        vectorize_levels: bool | None = False,
        rejection: Rejection | None = None,
    ) -> None:
        self.resampling = Resampling() if resampling is None else resampling
        self.vectorize_levels, self.rejection = vectorize_levels, rejection

    @property
    def proposal(self) -> str:
        """``"guide"``; ``"rejection"`` where draws are accepted or not, so that only their weights know their law."""
        return "guide" if self.rejection is None else "rejection"

    def __call__(
        self, model: Program, guide: Program, args: tuple[Any, ...], kwargs: Mapping[str, Any], request: Request
    ) -> Iterator[Step]:
        """Yield the steps of one walk, level by level.

        :raises ValueError: for an objective that is not one of levels, programs that do not fit together, or rejection
            with one particle or without levels.
        """
        self.check_rejection(guide, request.num_particles)
        if not isinstance(guide, Planned):
            yield from Importance()(model, guide, args, kwargs, request)
            return
        check_levels(request)
        nesting, batch = _layout(model, guide, args, kwargs)
        particles = Particles(request.num_particles, nesting, batch, request.routing, vectorize=request.vectorize)
        walk = Walk(model, guide.plan(args, kwargs), args, kwargs, particles, self.rejection)
        if annealed_at_once.wanted(self.vectorize_levels, walk, self.resampling):
            yield annealed_at_once.all_levels(walk, self.resampling)
        else:
            yield from walk.steps(self.resampling)

    def check_rejection(self, guide: Program, num_particles: int) -> None:
        """Check that there is something to reject.

        :raises ValueError: for a guide without levels, or one particle.
        """
        if self.rejection is not None and not (isinstance(guide, Planned) and num_particles > 1):
            raise ValueError(
                f"{self.rejection} with {type(guide).__name__} and num_particles={num_particles}: expected a guide of "
                "levels, such as NestedGuide(initial, steps), and at least 2 particles."
            )


def check_levels(request: Request) -> None:
    """Check that an objective is one of levels.

    :raises ValueError: for one that sees a single step.
    """
    if request.routing.local is None:
        raise ValueError(
            "this objective sees a single step, but the sampler walks along a path: expected an objective of levels "
            "(pplvi.objectives.nested). For bounds "
            "of the whole path use the guide with the ordinary importance sampler."
        )


_LAYOUTS = Memo[tuple[int, frozenset[str]]]()


def _layout(model: Program, guide: Planned, args: Any, kwargs: Any) -> tuple[int, frozenset[str]]:
    """How deep plates nest, and the names of those common to all sites, from one run on the extended space."""
    programs, key = (guide, model), dimensions(args, kwargs)
    if (known := _LAYOUTS.recall(programs, key)) is not None:
        return known
    run = _first_run(model, guide, args, kwargs)
    return _LAYOUTS.keep(programs, key, (run.nesting, frozenset(plate.name for plate in run.batch)))


def _first_run(model: Program, guide: Any, args: Any, kwargs: Any) -> Run:
    plan = guide.plan(args, kwargs)
    start, nested = plan.initial, isinstance(plan.initial, Planned)
    while isinstance(start, Planned):
        start = start.plan(args, kwargs).initial
    invariant = any(isinstance(kernel, InvariantMove) for kernel in plan.forward)
    with isolated():
        run = execute(model, start if invariant or nested else guide, args, kwargs)
        if not nested:
            plan.check_supports(args, kwargs)
    return run
