"""Paths: sequences of unnormalised targets, from one that can be sampled to the one that is wanted.

A path has ``num_steps + 1`` targets ``gamma[0], ..., gamma[num_steps]``. It says which programs are to be scored at the
draws of a level and how their log densities make up ``log gamma[level]``; who runs the programs is the sampler's
business, so that each is run once a level, all particles together.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Any, ClassVar, Protocol, runtime_checkable

import torch
from pyro.nn import PyroModule, PyroParam
from torch import Tensor
from torch.distributions import TransformedDistribution, biject_to

from pplvi.kernels.invariant import InvariantMove
from pplvi.kinds.checked import checked
from pplvi.kinds.kinds import Count, Probability
from pplvi.programs.single import run_alone
from pplvi.programs.sites import latent_sites
from pplvi.programs.traces import Run
from pplvi.samplers.particles import draws_of
from pplvi.types import Program


class Path(Protocol):
    """A sequence of targets."""

    @property
    def num_steps(self) -> int:
        """Number of transitions."""
        ...

    def programs(self, level: int) -> tuple[Program, ...]:
        """Programs whose log densities make up the target of a level."""
        ...

    def __call__(self, level: int, densities: Sequence[Tensor]) -> Tensor:
        """``log gamma[level]`` from the log densities of its programs, in nats and of their shape."""
        ...


class Betas(PyroModule):
    """Inverse temperatures, ``0 = beta[0] < ... < beta[num_steps] = 1``.

    Learned betas are cumulative sums of a softmax, so that they stay ordered, evenly spaced at first or
    as in ``betas``.

    :param num_steps: number of transitions.
    :param learn: train the betas between the two ends.
    :param betas: their initial values, increasing, without the two ends; evenly spaced unless given.
    :raises ValueError: for fewer than one step, or betas that do not increase strictly between 0 and 1.

    >>> Betas(2, betas=(0.1,)).betas
    tensor([0.0000, 0.1000, 1.0000])
    """

    def __init__(self, num_steps: int, *, learn: bool = False, betas: Sequence[float] | None = None) -> None:
        super().__init__()
        inner = [level / num_steps for level in range(1, num_steps)] if betas is None and num_steps > 0 else betas or ()
        ends = torch.tensor([0.0, *inner, 1.0])
        if num_steps < 1 or len(ends) != num_steps + 1 or any(a >= b for a, b in pairwise(ends.tolist())):
            raise ValueError(
                f"num_steps={num_steps} and betas={betas}: expected at least one step (two targets), and num_steps - 1 "
                "betas that increase strictly between 0 and 1."
            )
        self.num_steps, self.learn = num_steps, learn
        self.logits: Any = PyroParam(ends.diff().log()) if learn else ends.diff().log()

    @property
    def betas(self) -> Tensor:
        """``beta[0], ..., beta[num_steps]``."""
        inner = torch.softmax(self.logits, 0).cumsum(0)[:-1]
        return torch.cat([inner.new_zeros(1), inner, inner.new_ones(1)])


@checked
class GeometricPath(Betas):
    """Geometric path, ``log gamma[k] = (1 - beta[k]) log base + beta[k] log target``, with ``0 = beta[0] < ... <= 1``.

    Neal 2001; learned betas by Zimmermann et al. 2021.

    :param target: the program that is wanted, at ``beta = 1``.
    :param base: a normalised program with the same latent sites, at ``beta = 0``.
    :param num_steps: number of transitions; the path has one target more.
    :param learn: train the betas between the two ends; they stay ordered.
    :param betas: their initial values, increasing, without the two ends; evenly spaced unless given.
    :raises ValueError: for fewer than one step, or betas that do not increase strictly between 0 and 1.

    >>> import pyro, pyro.distributions as dist
    >>> def base():
    ...     pyro.sample("z", dist.Normal(0.0, 1.0))
    >>> path = GeometricPath(base, base, num_steps=4)
    >>> path.betas
    tensor([0.0000, 0.2500, 0.5000, 0.7500, 1.0000])
    """

    slices: ClassVar[bool] = True

    def __init__(
        self,
        target: Program,
        base: Program,
        num_steps: Count,
        *,
        learn: bool = False,
        betas: Sequence[Probability] | None = None,
    ) -> None:
        super().__init__(num_steps, learn=learn, betas=betas)
        self.__dict__["ends"] = target, base  # programs that are modules stay what they are: no part of this one

    def programs(self, level: int) -> tuple[Program, ...]:
        """The base at the start, the target at the end, both between."""
        target, base = self.__dict__["ends"]
        if level == 0:
            return (base,)
        return (target,) if level == self.num_steps else (base, target)

    def forward(self, level: int | slice, densities: Sequence[Tensor]) -> Tensor:
        """``log gamma[level]`` from the log densities of its programs; of several levels, which are dimension 0."""
        if len(densities) == 1:
            return densities[0]
        base, target = densities
        beta = self.betas[level].to(base)
        beta = beta.reshape(*beta.shape, *[1] * (base.dim() - 1)) if isinstance(level, slice) else beta
        return (1 - beta) * base + beta * target


def sites_of_target(names: Iterable[str]) -> set[str]:
    """Names of a program's draws without those that begin with an underscore: auxiliary ones, of a kernel's own.

    >>> sorted(sites_of_target(["z", "_start_z"]))
    ['z']
    """
    return {name for name in names if not name.startswith("_")}


@dataclass(frozen=True)
class Plan:
    """A path with the kernels of its transitions: what an annealed guide gives to a sampler.

    :ivar forward: ``q[k](z[k] | z[k-1])`` for ``k = 1, ..., num_steps``, called with the previous values first.
    :ivar reverse: ``r[k-1](z[k-1] | z[k])`` likewise, called with the values that the forward kernel reached.
    :ivar num_inner: where the first draws are those of another guide's walk: how many of them for each particle.
    """

    path: Path
    forward: tuple[Program, ...]
    reverse: tuple[Program, ...]
    num_inner: int = 1

    @property
    def initial(self) -> Program:
        """The program that the first draws come from."""
        return self.path.programs(0)[0]

    def check_supports(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """Run every kernel once, and check that it draws from the support of the first draws.

        Otherwise a density is normalised over another set, and weights are not proper.

        :raises ValueError: for a kernel with another support.
        """
        run = _alone(self.initial, args, kwargs)
        first = latent_sites(run.model)
        for ahead, back in zip(self.forward, self.reverse, strict=True):
            if not isinstance(ahead, InvariantMove):
                run = _alone(ahead, (draws_of(run), *args), kwargs)
                for kind, kernel in (("forward", run), ("reverse", _alone(back, (draws_of(run), *args), kwargs))):
                    drawn = latent_sites(kernel.model)
                    for name in first.keys() & drawn.keys():
                        _check_support(kind, name, first[name]["fn"], drawn[name]["fn"])


@runtime_checkable
class Planned(Protocol):
    """A guide that moves draws along a path: it can be walked level by level."""

    def plan(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Plan:
        """Path and kernels for these arguments of the model."""
        ...


def _alone(program: Program, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Run:
    return run_alone(program, args, kwargs, num_particles=1, nesting=0, values={})


def _check_support(kind: str, name: str, first: Any, drawn: Any) -> None:
    with suppress(NotImplementedError):  # a distribution that does not tell its support
        if not (first.support.check(_anywhere(drawn)).all() and drawn.support.check(_anywhere(first)).all()):
            raise ValueError(
                f"site {name!r}: a {kind} kernel draws from {drawn.support}, but the first draws of the path come from "
                f"{first.support}: expected the same support, otherwise weights are not proper. Use a distribution on "
                "the site's support."
            )


def _anywhere(fn: Any) -> Tensor:
    """Values from all over a distribution's support; what is transformed does not always tell it right."""
    try:
        if isinstance(fn, TransformedDistribution):
            raise NotImplementedError
        transform = biject_to(fn.support)
    except NotImplementedError:
        draws: Tensor = fn.sample(torch.Size((100,)))
        return draws
    far: Tensor = transform(4.0 * torch.randn(100, *transform.inverse_shape(fn.shape())))
    return far


@checked
@dataclass(frozen=True)
class ProgramPath:
    """A path of the user's own programs, one for each target; the first is normalised and can be sampled.

    :param targets: programs with the same latent sites.
    :raises ValueError: for fewer than two targets.

    >>> import pyro, pyro.distributions as dist
    >>> def normal(scale):
    ...     return lambda: pyro.sample("z", dist.Normal(0.0, scale))
    >>> ProgramPath((normal(3.0), normal(2.0), normal(1.0))).num_steps
    2
    """

    targets: tuple[Program, ...]

    def __post_init__(self) -> None:
        if len(self.targets) < 2:
            raise ValueError(
                f"a path of {len(self.targets)} targets: expected at least two, one to start from and one to reach."
            )

    @property
    def num_steps(self) -> int:
        """Number of transitions."""
        return len(self.targets) - 1

    def programs(self, level: int) -> tuple[Program, ...]:
        """The level's own program."""
        return (self.targets[level],)

    def __call__(self, level: int, densities: Sequence[Tensor]) -> Tensor:
        """``log gamma[level]``: the log density of the level's program."""
        return densities[0]


@dataclass(frozen=True)
class RepeatedPath:
    """A path that stays at each of its targets for several transitions, so that several kernels take turns there.

    :param path: the path whose targets, after the first, are repeated.
    :param times: how often.

    >>> import pyro, pyro.distributions as dist
    >>> def normal():
    ...     pyro.sample("z", dist.Normal(0.0, 1.0))
    >>> RepeatedPath(ProgramPath((normal, normal)), 3).num_steps
    3
    """

    path: Path
    times: int

    @property
    def num_steps(self) -> int:
        """Number of transitions."""
        return self.times * self.path.num_steps

    def programs(self, level: int) -> tuple[Program, ...]:
        """The programs of the target that the level is at."""
        return self.path.programs(self._at(level))

    def __call__(self, level: int, densities: Sequence[Tensor]) -> Tensor:
        """``log gamma`` of the target that the level is at."""
        return self.path(self._at(level), densities)

    def _at(self, level: int) -> int:
        return -(-level // self.times)


@checked
@dataclass(frozen=True)
class DataPath:
    """One batch of data after another: ``gamma[k]`` is the model on the first ``k / num_steps`` of its data.

    Iterated batch importance sampling (Chopin 2002) and sequential Monte Carlo over data: the increments of log Z are
    the predictive densities of the batches. For latents that all data share; those of each datum would grow in number.

    :param model: the model; its growing arguments have the data on their first dimension.
    :param prior: a program with the model's latent sites and arguments, normalised: where there are no data yet.
    :param num_steps: number of batches.
    :param arguments: positions or names of the arguments that grow.
    :raises ValueError: for fewer than one step; when run, for fewer data than steps.

    >>> import pyro, pyro.distributions as dist
    >>> def prior(y):
    ...     return pyro.sample("z", dist.Normal(0.0, 1.0))
    >>> def model(y):
    ...     z = prior(y)
    ...     with pyro.plate("data", len(y)):
    ...         pyro.sample("y", dist.Normal(z, 1.0), obs=y)
    >>> DataPath(model, prior, num_steps=4).num_steps
    4
    """

    model: Program
    prior: Program
    num_steps: Count
    arguments: tuple[int | str, ...] = (0,)

    def __post_init__(self) -> None:
        if self.num_steps < 1 or not self.arguments:
            raise ValueError(
                f"num_steps={self.num_steps}, arguments={self.arguments}: expected a batch or more, and at least one "
                "argument that holds data."
            )

    def programs(self, level: int) -> tuple[Program, ...]:
        """The prior at the start, the model on the first data of a level, the model at the end."""
        if level == 0:
            return (self.prior,)
        return (self.model if level == self.num_steps else self._begun[level - 1],)

    @cached_property
    def _begun(self) -> tuple[_Begun, ...]:
        """The programs of the levels between, made once, so that what has been found of them is remembered."""
        return tuple(_Begun(self, level) for level in range(1, self.num_steps))

    def __call__(self, level: int, densities: Sequence[Tensor]) -> Tensor:
        """``log gamma[level]``: the log density of the level's program."""
        return densities[0]


@dataclass(frozen=True)
class _Begun:
    """A model on the first part of its data."""

    path: DataPath
    level: int

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        positions = {i: self._begin(arg) if i in self.path.arguments else arg for i, arg in enumerate(args)}
        names = {name: self._begin(arg) if name in self.path.arguments else arg for name, arg in kwargs.items()}
        return self.path.model(*positions.values(), **names)

    def _begin(self, data: Any) -> Any:
        if len(data) < self.path.num_steps:
            raise ValueError(
                f"{len(data)} data in {self.path.num_steps} batches: expected at least one for each. Lower num_steps."
            )
        return data[: -(-len(data) * self.level // self.path.num_steps)]
