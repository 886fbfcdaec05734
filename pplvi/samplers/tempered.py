"""Tempered sequential Monte Carlo: particles on islands, from a Gaussian to a posterior that is a plain function."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from pplvi.kinds.checked import checked
from pplvi.kinds.kinds import Count, Probability
from pplvi.samplers.autocorrelation import WORST, Lengths, effective_draws
from pplvi.samplers.metric import GaussianBase, Metric
from pplvi.weights.algebra import effective_sample_size as effective_weights
from pplvi.weights.algebra import logmeanexp
from pplvi.weights.resampling import resample

Target = Callable[[Tensor], tuple[Tensor, Tensor]]

_WANTED_ACCEPTANCE = 0.75
_JITTER = 0.5  # of step sizes, relative: no trajectory is a period of the dynamics
_EAGER = 1.5  # how fast the step size follows
_STRIDE, _LOOKS = 1.2, 8  # of lengths of a trajectory that are compared, and how many; at most two strides are made
_DECAYED, _FORGOTTEN = 0.5, 0.1  # correlation with the start of a level at which it ends, and the last one keeps draws
_FIRST_LEAPFROG = 8
_LARGEST_STEP = 0.25  # of temperature: a heavy tail of the ratio is as much lighter, whatever the particles have seen
_STALLED, _GROWING = 20, 1.02  # moves after which, and growth without which, more moves make no draws effective


@dataclass(frozen=True)
class TemperedLevel:
    """What is done at one temperature: draws are weighted for it, resampled, and moved.

    :ivar beta: the temperature, from 0 (the base) to 1 (the target).
    :ivar metric: of the moves.
    :ivar step_size: of a leapfrog step; each particle's varies around it.
    :ivar num_leapfrog: leapfrog steps of a move.
    :ivar num_moves: how many moves, before any draw is kept.
    :ivar num_kept: how many moves more, after each of which the particles are draws; at the last temperature.
    """

    beta: float
    metric: Metric
    step_size: float
    num_leapfrog: int
    num_moves: int
    num_kept: int = 0


@dataclass
class Cloud:
    """Particles with the densities at their places: ``(S, dim)`` and ``(S,)``."""

    position: Tensor
    target: tuple[Tensor, Tensor]
    base: tuple[Tensor, Tensor]
    stale: bool = False
    """Whether they have left the places that the base was last evaluated at."""

    def tempered(self, beta: float) -> tuple[Tensor, Tensor]:
        """Value and gradient of the tempered density."""
        if beta == 1.0:
            return self.target
        value, slope = (torch.lerp(b, t, beta) for b, t in zip(self.base, self.target, strict=True))
        return value, slope

    @property
    def energies(self) -> Tensor:
        """Log densities of the target, and of the base while it is looked at, ``(S, 1 or 2)``."""
        pairs = [self.target] if self.stale else [self.target, self.base]
        return torch.stack([value for value, _ in pairs], 1)

    def taken(self, chosen: Tensor) -> Cloud:
        """Some of the particles."""
        pairs = [(value[chosen], slope[chosen]) for value, slope in (self.target, self.base)]
        return Cloud(self.position[chosen], pairs[0], pairs[1])

    def where(self, accept: Tensor, other: Cloud) -> Cloud:
        """These particles where ``accept`` is true, and others elsewhere."""
        wide = accept.unsqueeze(-1)
        pairs = [
            (torch.where(accept, a[0], b[0]), torch.where(wide, a[1], b[1]))
            for a, b in ((self.target, other.target), (self.base, other.base))
        ]
        return Cloud(torch.where(wide, self.position, other.position), pairs[0], pairs[1], self.stale or other.stale)


@dataclass(frozen=True)
class TemperedDraws:
    """What a run found.

    :ivar draws: of the target, ``(islands, draws, dim)``: the places of a particle after several moves, and copies of
        one, lie next to each other.
    :ivar log_evidence: log evidence by each island, ``(islands,)``, in nats.
    :ivar levels: what was done, which another run can repeat.
    :ivar ess: effective draws of each coordinate's mean, ``(dim,)``.
    :ivar acceptance: mean acceptance probability of the last moves.
    :ivar ended: ``"done"``, or why the run was cut.
    :ivar reached: the temperature up to which particles were moved; below 1 only for a run that was cut.
    """

    draws: Tensor
    log_evidence: Tensor
    levels: tuple[TemperedLevel, ...]
    ess: Tensor
    acceptance: float
    ended: str = "done"
    reached: float = 1.0


@checked
@dataclass(frozen=True)
class TemperedSMC:
    r"""Sequential Monte Carlo along the geometric path from a Gaussian :math:`q` to a target :math:`\gamma`.

    .. math:: \gamma_t(z) = q(z)^{1 - \beta_t} \gamma(z)^{\beta_t}, \qquad
        \log \hat Z = \sum_t \log \frac1N \sum_{i=1}^N \big(\gamma(z_i) / q(z_i)\big)^{\beta_t - \beta_{t-1}}

    Particles are weighted for the next temperature, which is as far as their conditional effective sample size stays
    above a fraction of them, resampled, and moved by Hamiltonian Monte Carlo until their autocorrelation has decayed.
    The inverse mass is their covariance, of few particles in many dimensions drawn towards the one known before; the
    step size keeps an acceptance of 3/4, and trajectories are as long as makes most draws effective for an evaluation,
    of the median and the worst coordinate. At the last temperature the particles go on, and all places after the first
    moves are draws (waste-free), until so many are effective.

    Islands of particles are resampled apart from each other, so that what they agree on is known, and the spread of
    their log evidences is its error. Adaptation looks at all of them. With levels given, nothing is adapted, and
    the evidence is unbiased for any number of particles.

    Source: Del Moral, Doucet and Jasra 2006, Sequential Monte Carlo samplers; Zhou, Johansen and Aston 2016, Toward
    automatic model comparison; Buchholz, Chopin and Jacob 2021, Adaptive tuning of Hamiltonian Monte Carlo within
    sequential Monte Carlo; Dau and Chopin 2022, Waste-free sequential Monte Carlo.

    :param num_particles: of all islands together.
    :param num_islands: how many islands.
    :param num_draws: a run ends when so many draws are effective of the median coordinate, half as many of the worst.
    :param threshold: the fraction of particles that stay effective from one temperature to the next.
    :param max_moves: most moves at a temperature, and before the first draws are kept.
    :param max_kept: most moves after each of which the particles are draws.
    :param max_leapfrog: most leapfrog steps of a move.
    :raises ValueError: for numbers out of range, or particles that are no multiple of the islands.

    >>> _ = torch.manual_seed(1)
    >>> def target(z):  # ten times the density of a normal with mean 3 and scale 1/2
    ...     return -2 * (z[:, 0] - 3) ** 2 - math.log(0.5 * (2 * math.pi) ** 0.5) + math.log(10), -4 * (z - 3)
    >>> method = TemperedSMC(num_particles=400, num_draws=1000)
    >>> found = method.run(target, GaussianBase.of(torch.full((1,), 2.0), torch.eye(1)))
    >>> found.draws.shape[0], round(found.draws.mean().item(), 1), round(found.log_evidence.mean().item(), 1)
    (4, 3.0, 2.3)
    """

    num_particles: Count = 512
    num_islands: Count = 4
    num_draws: Count = 4000
    threshold: Probability = 0.5
    max_moves: Count = 10
    max_kept: Count = 100
    max_leapfrog: Count = 64

    def __post_init__(self) -> None:
        if not 0 < self.threshold < 1:
            raise ValueError(f"threshold={self.threshold!r}: expected a fraction of the particles between 0 and 1.")
        if self.num_islands < 2 or self.num_particles % self.num_islands or self.num_particles < 4 * self.num_islands:
            raise ValueError(
                f"num_particles={self.num_particles}, num_islands={self.num_islands}: expected at least 2 islands, and "
                "a multiple of them of at least 4 particles each."
            )

    def run(
        self,
        target: Target,
        base: GaussianBase,
        *,
        levels: Sequence[TemperedLevel] = (),
        stop: Callable[[], str] = lambda: "",
    ) -> TemperedDraws:
        """Bring particles from the base to the target.

        :param target: positions ``(S, dim)`` to log densities ``(S,)``, in nats, and their gradients ``(S, dim)``.
        :param base: where particles start.
        :param levels: those of an earlier run, to be repeated without adaptation.
        :param stop: asked before each leapfrog step: why to stop, or an empty word. The move is not made then, the rest
            of the path is one step, and islands that disagree show what is missing. ``Ctrl-C`` is "interrupted".
        :returns: draws and evidences.
        :raises ValueError: if the target is not finite at any particle of an island.
        """
        return _Run(self, target, base, stop).all(levels)


@dataclass
class _Run:
    settings: TemperedSMC
    target: Target
    base: GaussianBase
    stop: Callable[[], str]
    levels: list[TemperedLevel] = field(default_factory=list)
    ended: str = ""
    acceptance: float = math.nan
    tried: int = _FIRST_LEAPFROG
    """Steps of the next trajectories that are compared: more than are known to be best, where that may be better."""
    longest: int = _FIRST_LEAPFROG
    """The most steps that were nearly as good as the best."""

    def all(self, levels: Sequence[TemperedLevel]) -> TemperedDraws:
        s = self.settings
        self.cloud = self._at(self.base.draw(s.num_particles))
        self.log_evidence = torch.zeros(s.num_islands, dtype=torch.float64)
        self.level = TemperedLevel(0.0, self.base.metric, _first_step(len(self.base.loc)), _FIRST_LEAPFROG, 0)
        kept: list[Tensor] = []
        reached = 0.0
        for level in levels:
            self._weigh(level.beta)
            kept = self._repeat(level)
            self.levels.append(level)
            if self.ended and not kept:
                break
            reached = level.beta
        while self.level.beta < 1:
            self._weigh(self._next_beta())
            kept = self._move()
            self.levels.append(self.level)
            reached = reached if self.ended and not kept else self.level.beta
        places = torch.stack(kept or [self.cloud.position], 1)
        return TemperedDraws(
            places.reshape(s.num_islands, -1, places.shape[-1]),
            self.log_evidence,
            tuple(self.levels),
            effective_draws(places),
            self.acceptance,
            self.ended or "done",
            reached,
        )

    # ------------------------------------------------------------------ weights

    @property
    def _ratio(self) -> Tensor:
        """Log ratios of target and base, ``(particles of an island, islands)``."""
        ratio = (self.cloud.target[0] - self.cloud.base[0]).double().nan_to_num(-math.inf, -math.inf, -math.inf)
        return ratio.reshape(self.settings.num_islands, -1).mT

    def _next_beta(self) -> float:
        """The temperature to which as many particles stay effective as are wanted, on the worst island."""
        ratio, beta, least = self._ratio, self.level.beta, self.settings.threshold

        def enough(to: float) -> bool:
            return bool((effective_weights((to - beta) * ratio) >= least * len(ratio)).all())

        if self._asked_to_stop():
            return 1.0
        low, high = beta, min(beta + _LARGEST_STEP, 1.0)
        if enough(high):
            return high
        for _ in range(40):
            middle = (low + high) / 2
            low, high = (middle, high) if enough(middle) else (low, middle)
        return high  # the smallest step is a step

    def _weigh(self, beta: float) -> None:
        log_weight = (beta - self.level.beta) * self._ratio
        if bool((log_weight == -math.inf).all(0).any()):
            raise ValueError(
                "the log density is finite at no particle of an island: expected a guide whose draws lie within the "
                "support of the model. Start from another guide (init=), or use float64."
            )
        self.log_evidence = self.log_evidence + logmeanexp(log_weight)
        size = len(log_weight)
        chosen = resample(log_weight) + size * torch.arange(self.settings.num_islands).to(log_weight.device)
        self.cloud = self.cloud.taken(chosen.mT.reshape(-1))
        self.level = replace(self.level, beta=beta, num_moves=0, num_kept=0)

    # ------------------------------------------------------------------ moves

    def _asked_to_stop(self) -> str:
        self.ended = self.ended or self.stop()
        return self.ended

    def _move(self) -> list[Tensor]:
        """Adapt, and move until the start is forgotten; at the last temperature, go on until there are enough draws."""
        self.level = replace(
            self.level, metric=self.level.metric.updated(self.cloud.position, self.settings.num_islands)
        )
        last = self.level.beta == 1.0
        start = self.cloud
        try:
            while self.level.num_moves < self.settings.max_moves and not self._asked_to_stop():
                self._adapting_move()
                self.level = replace(self.level, num_moves=self.level.num_moves + 1)
                if _slow(start, self.cloud) < (_FORGOTTEN if last else _DECAYED):
                    break
            if not last or self.ended:
                return []
            self.level = replace(self.level, num_leapfrog=self.longest)  # of two as good the one of fewer draws
            return self._kept()
        except KeyboardInterrupt:
            self.ended = "interrupted"
            return []

    def _adapting_move(self) -> None:
        tried = self.tried
        lengths = Lengths({max(1, round(tried / _STRIDE**look)) for look in range(_LOOKS)})
        self.acceptance = self._once(replace(self.level, num_leapfrog=tried), lengths)
        if self.ended:
            return
        size = self.level.step_size * math.exp(_EAGER * (self.acceptance - _WANTED_ACCEPTANCE))
        number = max(lengths.best, round(tried / _STRIDE**2), 2)
        longer = min(math.ceil(_STRIDE**2 * tried), self.settings.max_leapfrog)
        self.tried, self.longest = longer if number >= tried else number, lengths.longest
        self.level = replace(self.level, step_size=size, num_leapfrog=number)

    def _kept(self) -> list[Tensor]:
        s, kept, look, before = self.settings, list[Tensor](), 1, 0.0
        while len(kept) < s.max_kept and not (kept and self._asked_to_stop()):
            self.acceptance = self._once(self.level)
            if self.ended and kept:
                break
            kept.append(self.cloud.position)
            if len(kept) >= look and len(kept) * s.num_particles >= s.num_draws:
                ess = effective_draws(torch.stack(kept, 1))
                median, least = float(ess.median()), float(ess.min())
                if median >= s.num_draws and least >= WORST * s.num_draws:
                    break
                if len(kept) >= _STALLED and least < _GROWING * before:
                    break  # particles stay where they are, as at modes that are far apart
                before = least
                look = math.ceil(1.2 * len(kept))
        self.level = replace(self.level, num_kept=len(kept))
        return kept

    def _repeat(self, level: TemperedLevel) -> list[Tensor]:
        self.level = level
        for _ in range(level.num_moves):
            self.acceptance = self._once(level)
        kept = []
        for _ in range(level.num_kept):
            self.acceptance = self._once(level)
            if self.ended:
                break
            kept.append(self.cloud.position)
        return kept

    def _once(self, level: TemperedLevel, lengths: Lengths | None = None) -> float:
        """One move of all particles; the mean acceptance probability."""
        old, metric = self.cloud, level.metric
        noise = torch.rand(len(old.position), 1, dtype=old.position.dtype).to(old.position)
        size = level.step_size * (1 - _JITTER + 2 * _JITTER * noise)
        momentum = metric.momentum(torch.randn_like(old.position))
        value, slope = old.tempered(level.beta)
        energy = value - metric.kinetic(momentum)
        new = old
        for number in range(1, level.num_leapfrog + 1):
            if self._asked_to_stop():  # by the clock, which knows of no particle: the move is not made
                return self.acceptance
            momentum = momentum + 0.5 * size * slope
            new = self._at(
                new.position + size * metric.velocity(momentum), new if level.beta == 1.0 else None
            )  # the base is of no use there
            value, slope = new.tempered(level.beta)
            momentum = momentum + 0.5 * size * slope
            if lengths is not None:
                lengths.note(number, new.position)
        gain = value - metric.kinetic(momentum) - energy
        probability = gain.exp().clamp(max=1.0).nan_to_num(0.0)
        if lengths is not None:
            lengths.end(old.position, probability)
        accept = torch.rand_like(probability) < probability
        self.cloud = new.where(accept, old)
        return float(probability.mean())

    def _at(self, position: Tensor, known: Cloud | None = None) -> Cloud:
        value, slope = (x.to(position) for x in self.target(position))
        if known is not None:
            return Cloud(position, (value, slope), known.base, stale=True)
        return Cloud(position, (value, slope), self.base.value_and_gradient(position))


def _first_step(dim: int) -> float:
    return float(1.2 * dim**-0.25)


def _slow(before: Cloud, after: Cloud) -> float:
    """The largest correlation between what the same particles were and are: coordinates, and log densities."""
    width = after.energies.shape[1]
    pairs = [(before.position, after.position), (before.energies[:, :width], after.energies)]
    x, y = (torch.cat(each, 1) for each in zip(*pairs, strict=True))
    x, y = x - x.mean(0), y - y.mean(0)
    tiny = torch.finfo(x.dtype).tiny
    correlation = (x * y).sum(0) / (x.square().sum(0) * y.square().sum(0)).sqrt().clamp(min=tiny)
    return float(correlation.nan_to_num(1.0).max())
