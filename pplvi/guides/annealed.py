"""Guides that anneal: draws start at a base and are moved, kernel by kernel, towards the model.

An annealed guide is an ordinary Pyro guide on the extended space: it samples the values of all levels, those before the
last as auxiliary sites, and divides by the reverse kernels' densities,

    log q(z[0], ..., z[K]) = log q[0](z[0]) + sum over k of log q[k](z[k] | z[k-1]) - log r[k-1](z[k-1] | z[k]),

so that ``log p - log q`` is the weight of annealed importance sampling, and any objective on one step trains it end to
end. Walked level by level (:class:`pplvi.samplers.Annealed`) the same kernels are trained by nested objectives.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import pyro.distributions as dist
from pyro import poutine
from pyro.nn import PyroModule
from pyro.poutine.messenger import Messenger
from torch import Tensor

from pplvi.guides.owned import claim_name
from pplvi.kernels.base import Kernel
from pplvi.kernels.coordinates import coordinates_of, sites_of
from pplvi.kernels.residual import ResidualKernel
from pplvi.kinds.checked import checked
from pplvi.kinds.kinds import Count, Probability
from pplvi.programs.running import plain_run
from pplvi.programs.single import log_density_of
from pplvi.programs.sites import is_subsample
from pplvi.samplers.paths import GeometricPath, Path, Plan, ProgramPath, RepeatedPath, sites_of_target
from pplvi.types import Program


class _Reversed(dist.TorchDistribution):
    """A distribution whose log density counts negatively: a reverse kernel is divided by, never drawn from."""

    arg_constraints: ClassVar[dict[str, Any]] = {}
    has_rsample = True

    def __init__(self, base: Any) -> None:
        self.base = base
        super().__init__(base.batch_shape, base.event_shape, validate_args=False)

    @property
    def support(self) -> Any:
        return self.base.support

    def expand(self, batch_shape: Any, _instance: Any = None) -> _Reversed:
        return _Reversed(self.base.expand(batch_shape))

    def log_prob(self, value: Tensor) -> Tensor:
        return -self.base.log_prob(value)


class Level(Messenger):
    """Give the sites of one level names of their own, and share the plates' indices between levels."""

    def __init__(self, label: str, indices: dict[str, Any]) -> None:
        super().__init__()
        self.label, self.indices, self.values = label, indices, dict[str, Tensor]()

    def _pyro_sample(self, msg: Any) -> None:
        if is_subsample(msg):
            if msg["name"] in self.indices:  # the first level has drawn them
                msg["value"], msg["stop"] = self.indices[msg["name"]], True
        else:
            self._enter(msg)

    def _enter(self, msg: Any) -> None:
        msg["infer"] = {**msg["infer"], "_site": msg["name"]}
        if self.label:
            msg["name"] = f"_{msg['name']}{self.label}"
            msg["infer"]["is_auxiliary"] = True

    def _pyro_post_sample(self, msg: Any) -> None:
        if is_subsample(msg):
            self.indices[msg["name"]] = msg["value"]
        else:
            self.values[msg["infer"].pop("_site")] = msg["value"]


class Backward(Level):
    """Score the values of the level before under a reverse kernel, negatively."""

    def __init__(self, label: str, indices: dict[str, Any], given: Mapping[str, Tensor]) -> None:
        super().__init__(label, indices)
        self.given = given

    def _enter(self, msg: Any) -> None:
        if msg["name"] not in self.given:
            raise ValueError(
                f"a reverse kernel samples site {msg['name']!r}, but the draws have {sorted(self.given)}: expected the "
                "model's sites. Sample each of them once."
            )
        msg["fn"], msg["value"], msg["is_observed"] = _Reversed(msg["fn"]), self.given[msg["name"]], True
        super()._enter(msg)


@dataclass(frozen=True)
class _Density:
    """``log gamma[level]`` for kernels that follow its gradient; copied together with its guide.

    :ivar subsampled: plates whose minibatch the density of draws outside them depends on.
    """

    path: Path
    level: int
    subsampled: tuple[str, ...] = ()

    def __call__(self, values: Mapping[str, Tensor], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor:
        if self.subsampled:
            raise ValueError(
                f"plates {list(self.subsampled)} are subsampled, and this kernel would move draws outside them by a "
                "minibatch's density: bounds would no longer be bounds on average. Expected a target that is the same "
                "for every minibatch: pass a surrogate of the model as target, such as the likelihood of some of the "
                "data with learned weights, or anneal only what is inside the plates, by AutoSemiDAIS."
            )
        programs = self.path.programs(self.level)
        return self.path(self.level, [log_density_of(program, args, kwargs, values) for program in programs])


class _Walked(PyroModule):
    """What annealed guides share: the extended program, its plan, and a name of its own unless it was given one."""

    def __init__(self, name: str | None) -> None:
        super().__init__(name or type(self).__name__)
        self._named = name is not None

    def _claim_name(self) -> None:
        if not self._named:
            claim_name(self)

    def plan(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Plan:
        """Path and kernels for these arguments of the model."""
        raise NotImplementedError

    def forward(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """Draw from the guide on the extended space; the model's sites are those of the last level."""
        plan, indices = self.plan(args, kwargs), dict[str, Any]()
        if isinstance(plan.initial, _Walked):
            raise ValueError(
                "the first draws of this guide are weighted draws of another one, which have no density: expected a "
                "guide that is walked level by level, with NestedELBO or the Annealed sampler."
            )
        with Level("_0", indices) as level:
            plan.initial(*args, **kwargs)
        return climb(plan.forward, plan.reverse, level.values, args, kwargs, indices)


def climb(
    forward: Sequence[Program],
    reverse: Sequence[Program],
    values: dict[str, Tensor],
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    indices: dict[str, Any],
    last: str = "",
) -> dict[str, Tensor]:
    """Run forward and reverse kernels on values, one after another, as part of an extended program.

    :param indices: of the plates that have been drawn so far.
    :param last: appended to the names of the sites of the last level; auxiliary ones unless it is empty.
    :returns: the values that the last level reached.
    """
    for k, (ahead, back) in enumerate(zip(forward, reverse, strict=True), 1):
        previous = values
        with Level(last if k == len(forward) else f"_{k}", indices) as level:
            ahead(previous, *args, **kwargs)
        values = level.values
        _check_cover("forward", values, previous)
        with Backward(f"_{k}_reverse", indices, previous) as backward:
            back(values, *args, **kwargs)
        _check_cover("reverse", backward.values, previous)
    return values


def _check_cover(kind: str, sampled: Mapping[str, Tensor], sites: Mapping[str, Tensor]) -> None:
    if sites_of_target(sampled) != sites_of_target(sites):
        raise ValueError(
            f"a {kind} kernel samples {sorted(sampled)}, but the draws have sites {sorted(sites)}: expected the "
            "model's sites in the base and in every kernel. Sample each of them once."
        )


@checked
class AnnealedGuide(_Walked):
    """Anneal from a base to a model along a geometric path, with kernels that are learned.

    ``num_steps`` transitions between ``num_steps + 1`` targets. Kernels are built for the model's sites on the first
    run. Under ``Trace_ELBO`` or any objective here it is trained as ordinary variational inference on the extended
    space; under :class:`pplvi.losses.NestedELBO` level by level. All levels share the base's subsample indices.

    :param target: the model, with the same arguments as the guide.
    :param base: a normalised program with the model's latent sites, which is easy to draw from, such as the prior.
    :param num_steps: number of transitions.
    :param kernel: builds the kernels of each transition; several, one after another at each target, such as a flow and
        then moves that leave the target invariant (annealed flow transport, Arbel et al. 2021).
    :param learn_path: train the betas between 0 and 1 (they get a gradient from nested objectives, or from kernels
        that follow the targets' gradients).
    :param betas: their initial values; evenly spaced unless given.
    :param name: prefix of its parameters in the store: ``AnnealedGuide``, ``AnnealedGuide_1``, ... unless given.
    :raises ValueError: for fewer than one step, betas that do not increase, or a model that the kernel cannot move.

    >>> import pyro
    >>> def model():
    ...     pyro.sample("z", dist.Normal(3.0, 0.5))
    >>> def base():
    ...     pyro.sample("z", dist.Normal(0.0, 2.0))
    >>> guide = AnnealedGuide(model, base, num_steps=3, kernel=ResidualKernel(hidden=8))
    >>> sorted(guide())
    ['z']
    """

    def __init__(
        self,
        target: Program,
        base: Program,
        num_steps: Count,
        kernel: Kernel | Sequence[Kernel] | None = None,
        *,
        learn_path: bool = False,
        betas: Sequence[Probability] | None = None,
        name: str | None = None,
    ) -> None:
        super().__init__(name)
        self._follow(GeometricPath(target, base, num_steps, learn=learn_path, betas=betas), kernel)

    @classmethod
    def along(
        cls, path: Path, kernel: Kernel | Sequence[Kernel] | None = None, *, name: str | None = None
    ) -> AnnealedGuide:
        """Anneal along another path, such as :class:`pplvi.samplers.DataPath`; its last target is the model."""
        self = cls.__new__(cls)
        _Walked.__init__(self, name)
        self._follow(path, kernel)
        return self

    def _follow(self, path: Path, kernel: Kernel | Sequence[Kernel] | None) -> None:
        self.path: Any = path
        self.kernels = tuple(kernel) if isinstance(kernel, Sequence) else (kernel or ResidualKernel(),)
        self._built = False

    @property
    def betas(self) -> Tensor:
        """The betas of a geometric path, ``(num_steps + 1,)``."""
        betas: Tensor = self.path.betas
        return betas.detach()

    @property
    def walked(self) -> Path:
        """The path with each target as often as there are kernels to take turns at it."""
        path: Path = self.path
        return path if len(self.kernels) == 1 else RepeatedPath(path, len(self.kernels))

    def plan(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Plan:
        """Path and kernels; these are built for the target's sites on the first run."""
        self._claim_name()
        if not self._built:
            self._build(args, kwargs)
        steps = range(1, self.walked.num_steps + 1)
        ahead, back = (tuple(getattr(self, f"{way}_{k}") for k in steps) for way in ("forward", "reverse"))
        return Plan(self.walked, ahead, back)

    def _build(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        model = self.path.programs(self.path.num_steps)[0]
        with poutine.block():  # the look at the model is no part of the guide's run
            found: list[Any] = [
                (sites_of if _partial(kernel) else coordinates_of)(model, args, kwargs) for kernel in self.kernels
            ]
            subsampled = plain_run(model, args, kwargs).subsampled
        for k in range(1, self.walked.num_steps + 1):
            part = (k - 1) % len(self.kernels)
            ahead, back = self.kernels[part].build(found[part], _Density(self.walked, k, subsampled))
            setattr(self, f"forward_{k}", ahead)
            setattr(self, f"reverse_{k}", back)
        self._check_moved({site.name for site in found[0]})
        self._built = True

    def _check_moved(self, names: set[str]) -> None:
        if all(_partial(kernel) for kernel in self.kernels):
            moves = (getattr(self, f"forward_{k}") for k in range(1, len(self.kernels) + 1))
            if still := sorted(names - set().union(*(move.names for move in moves))):
                raise ValueError(
                    f"no kernel moves sites {still}: expected kernels for all, such as kernel=(GibbsKernel(), "
                    "HamiltonianKernel(0.1)) for a model with discrete and continuous sites."
                )


def _partial(kernel: Kernel) -> bool:
    """Whether a kernel moves some of the sites only, and leaves the others as they are."""
    return bool(getattr(kernel, "partial", False))


@checked
class NestedGuide(_Walked):
    """Anneal along the user's own targets with the user's own kernels.

    All are ordinary Pyro programs with the model's site names; kernels get the values to move as first argument.

    The first draws can be those of another annealed guide, which is walked first: nested importance sampling (Naesseth
    et al. 2015). For each particle its target's weighted draws are made ``num_inner`` times, one is taken in proportion
    to the weights, and their mean weight goes on with it, so that weights stay proper.

    :param initial: a normalised program that the first draws come from, or an annealed guide.
    :param steps: ``(target, forward, reverse)`` for each transition; the last target is the model.
    :param num_inner: draws of the inner guide for each particle.
    :param name: prefix of the parameters of kernels that are modules: ``NestedGuide``, ... unless given.
    :raises ValueError: without any step; on the first run, for kernels that do not sample the model's sites.

    >>> import pyro
    >>> def model():
    ...     pyro.sample("z", dist.Normal(3.0, 0.5))
    >>> def initial():
    ...     pyro.sample("z", dist.Normal(0.0, 2.0))
    >>> def kernel(previous):
    ...     pyro.sample("z", dist.Normal(previous["z"], 1.0))
    >>> guide = NestedGuide(initial, steps=[(model, kernel, kernel)])
    >>> sorted(guide())
    ['z']
    """

    def __init__(
        self,
        initial: Program,
        steps: Sequence[tuple[Program, Program, Program]],
        *,
        num_inner: Count = 1,
        name: str | None = None,
    ) -> None:
        super().__init__(name)
        if num_inner < 1 or (num_inner > 1 and not isinstance(initial, _Walked)):
            raise ValueError(
                f"num_inner={num_inner}: expected 1, or more where initial is an annealed guide, whose draws are "
                "weighted. Draws of a program are not."
            )
        self.num_inner = num_inner
        if isinstance(initial, _Walked):
            self.first = initial  # a part of this guide, so that its parameters have names of their own
        targets, self._ahead, self._back = [initial], [], []
        for k, (target, ahead, back) in enumerate(steps, 1):
            targets.append(target)
            self._ahead.append(self._own(f"forward_{k}", ahead))
            self._back.append(self._own(f"reverse_{k}", back))
        self._path: Path = ProgramPath(tuple(targets))

    def _own(self, name: str, program: Program) -> str | Program:
        """Kernels that are Pyro modules become parts of the guide, so that their parameters have names of their own."""
        if not isinstance(program, PyroModule):
            return program
        setattr(self, name, program)
        return name

    def plan(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Plan:
        """The path and the kernels as given."""
        self._claim_name()
        ahead, back = (
            tuple(getattr(self, p) if isinstance(p, str) else p for p in ps) for ps in (self._ahead, self._back)
        )
        return Plan(self._path, ahead, back, self.num_inner)
