"""Nested variational inference as a Pyro ELBO: each level of an annealed guide is trained on its own divergence."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

from pyro.util import warn_if_nan
from torch import Tensor

from pplvi.kinds.checked import checked
from pplvi.kinds.kinds import Count, Rate
from pplvi.losses.base import WeightedELBO
from pplvi.objectives.bounds import RenyiBound
from pplvi.objectives.f_divergences import F_DIVERGENCES, FDivergenceName, NestedDivergence, shown
from pplvi.objectives.forward_kl import ForwardKLDivergence
from pplvi.objectives.nested import IncrementalBound, NestedForwardKL, NestedReverseKL
from pplvi.objectives.step import Objective
from pplvi.samplers.annealed import Annealed, Resampling
from pplvi.samplers.paths import Planned
from pplvi.types import Program
from pplvi.weights.rejection import Rejection
from pplvi.weights.resampling import ResamplingScheme

Divergence = FDivergenceName | Callable[[Tensor], Tensor]

_OBJECTIVES: dict[tuple[Any, ...], Objective] = {
    ("reverse_kl",): NestedReverseKL(),
    ("reverse_kl", "reverse_kl"): NestedReverseKL(),
    ("forward_kl",): NestedForwardKL(),
    ("forward_kl", "reverse_kl"): NestedForwardKL(fit_reverse=True),
    ("avo",): IncrementalBound(),
}


@checked
class NestedELBO(WeightedELBO):
    """Nested variational inference: the loss is the sum over levels of a divergence (Zimmermann et al. 2021).

    For an annealed guide (:class:`pplvi.guides.AnnealedGuide`). Levels are local, no gradient goes from one to another,
    and ``loss_and_grads`` goes backward level by level, so that its memory does not grow with their number. For any
    other guide this is the ELBO (sticking the landing), the forward KL divergence of the whole posterior, or another
    divergence of it, by which a model's own parameters come near the guide and learn nothing of the evidence.

    :param divergence: ``"reverse_kl"``; ``"forward_kl"``, which leaves reverse kernels as they are; ``"chi_square"``,
        ``"hellinger"``, ``"jensen_shannon"``, or any function of the log incremental weight that is an f-divergence
        (:class:`pplvi.objectives.NestedDivergence`, which may be given itself); a pair, the first for forward and the
        second for reverse kernels, such as ``("forward_kl", "reverse_kl")``; or ``"avo"``, the annealed variational
        objective (Huang et al. 2018), which ignores weights, and learns no path because the targets between cancel.
    :param num_particles: number of draws, at least 2 but for ``"avo"``.
    :param resample: between levels: ``True`` always, a fraction of the particles where the effective sample size falls
        below it, ``False`` never; or a :class:`pplvi.samplers.annealed.Resampling`, which can change their number.
    :param scheme: ``"systematic"``, ``"stratified"`` or ``"multinomial"``.
    :param vectorize_levels: score all levels in one graph, which is faster; ``False``: level by level, with a backward
        pass each, so that memory does not grow with their number; ``None``: all at once where the kernels allow it
        (those of :class:`pplvi.kernels.ResidualKernel` do). Gradients are the same.
    :param rejection: try moves of small weight again, level by level (:class:`pplvi.weights.Rejection`); not with
        ``"avo"``.
    :raises ValueError: for another divergence, fraction or scheme, or too few particles.

    >>> NestedELBO(divergence="reverse_kl", num_particles=36, resample=True)
    NestedELBO(divergence='reverse_kl', num_particles=36, resample=True)
    >>> loss = NestedELBO(lambda log_ratio: log_ratio.expm1() ** 2, 36)  # chi-square, written out
    """

    def __init__(
        self,
        divergence: Literal["avo"] | Divergence | tuple[Divergence, Divergence] | Objective = "reverse_kl",
        num_particles: Count = 10,
        *,
        resample: bool | Rate | Resampling = False,
        scheme: ResamplingScheme = "systematic",
        vectorize_levels: bool | None = None,
        rejection: Rejection | None = None,
        **options: Any,
    ) -> None:
        objective = _objective(divergence)
        resampling = resample if isinstance(resample, Resampling) else Resampling(resample, scheme)
        sampler = Annealed(resampling, vectorize_levels=vectorize_levels, rejection=rejection)
        super().__init__(objective, sampler, num_particles, **options)
        self._check_levels = sampler.check_rejection
        self.divergence, self.resample, self.rejection = divergence, resample, rejection
        self.monitor = self.monitor if resampling.when is False else None
        self._plain = WeightedELBO(_of_one_level(objective), None, num_particles, **options)

    def differentiable_loss(self, model: Program, guide: Program, *args: Any, **kwargs: Any) -> Tensor:
        """The loss, in nats, of all levels at once: its gradient is that of the surrogates."""
        self._check_levels(guide, self.num_particles)
        if not isinstance(guide, Planned):
            return self._plain.differentiable_loss(model, guide, *args, **kwargs)
        return super().differentiable_loss(model, guide, *args, **kwargs)

    def loss_and_grads(self, model: Program, guide: Program, *args: Any, **kwargs: Any) -> float:
        """An estimate of the loss; gradients are added to the parameters' ``grad``, level by level."""
        self._check_levels(guide, self.num_particles)
        if not isinstance(guide, Planned):
            return self._plain.loss_and_grads(model, guide, *args, **kwargs)
        total = 0.0
        for step in self.steps(model, guide, *args, **kwargs):
            level = self._level(step)
            if level.requires_grad:
                level.backward(retain_graph=True)  # the next level still scores this one's target
            total += float(level.detach())
        warn_if_nan(total, "loss")
        return total

    def __repr__(self) -> str:
        more = "" if self.rejection is None else f", rejection={self.rejection!r}"
        first = f"divergence={shown(self.divergence)}, num_particles={self.num_particles}"
        return f"NestedELBO({first}, resample={self.resample!r}{more})"


def _objective(divergence: Any) -> Objective:
    """The objective of a name, a function or a pair of them; an objective of levels is one already."""
    if isinstance(divergence, Objective):
        if divergence.routing.local:
            return divergence
    else:
        pair = tuple(divergence) if isinstance(divergence, tuple | list) else (divergence,)
        if all(isinstance(part, str) for part in pair) and pair in _OBJECTIVES:
            return _OBJECTIVES[pair]
        if all(callable(part) or part in F_DIVERGENCES for part in pair):
            return NestedDivergence(*pair)
    names = ", ".join(map(repr, (*F_DIVERGENCES, "avo")))
    raise ValueError(
        f"divergence={divergence!r}: expected one of {names}, a function of log weights, a pair of these (without "
        "'avo'), or an objective of levels such as NestedDivergence."
    )


def _of_one_level(objective: Objective) -> Objective:
    """What stands for an objective where the guide has no levels."""
    if isinstance(objective, NestedDivergence):
        return objective
    return ForwardKLDivergence() if isinstance(objective, NestedForwardKL) else RenyiBound(1.0, "stl")
