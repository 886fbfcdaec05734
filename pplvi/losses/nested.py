"""Nested variational inference as a Pyro ELBO: each level of an annealed guide is trained on its own divergence."""

from __future__ import annotations

from typing import Any, Literal

from pyro.util import warn_if_nan
from torch import Tensor

from pplvi.kinds.checked import checked
from pplvi.kinds.kinds import Count, Rate
from pplvi.losses.base import WeightedELBO
from pplvi.objectives.bounds import RenyiBound
from pplvi.objectives.forward_kl import ForwardKLDivergence
from pplvi.objectives.nested import IncrementalBound, NestedForwardKL, NestedReverseKL
from pplvi.objectives.step import Objective
from pplvi.samplers.annealed import Annealed, Resampling
from pplvi.samplers.paths import Planned
from pplvi.types import Program
from pplvi.weights.resampling import ResamplingScheme

Divergence = Literal["reverse_kl", "forward_kl", "avo"]

_OBJECTIVES: dict[Any, Objective] = {
    "reverse_kl": NestedReverseKL(),
    ("reverse_kl", "reverse_kl"): NestedReverseKL(),
    "forward_kl": NestedForwardKL(),
    ("forward_kl", "reverse_kl"): NestedForwardKL(fit_reverse=True),
    "avo": IncrementalBound(),
}


@checked
class NestedELBO(WeightedELBO):
    """Nested variational inference: the loss is the sum over levels of a divergence (Zimmermann et al. 2021).

    For an annealed guide (:class:`pplvi.guides.AnnealedGuide`). Levels are local, no gradient goes from one to another,
    and ``loss_and_grads`` goes backward level by level, so that its memory does not grow with their number. For any
    other guide this is the ELBO (sticking the landing), or the forward KL divergence of the whole posterior.

    :param divergence: ``"reverse_kl"``; ``"forward_kl"``, which leaves reverse kernels as they are; the pair
        ``("forward_kl", "reverse_kl")``, the first for forward and the second for reverse kernels; or ``"avo"``, the
        annealed variational objective (Huang et al. 2018), which ignores weights, and learns no path because the
        targets between cancel.
    :param num_particles: number of draws, at least 2 but for ``"avo"``.
    :param resample: between levels: ``True`` always, a fraction of the particles where the effective sample size falls
        below it, ``False`` never; or a :class:`pplvi.samplers.annealed.Resampling`, which can change their number.
    :param scheme: ``"systematic"``, ``"stratified"`` or ``"multinomial"``.
    :param vectorize_levels: score all levels in one graph, which is faster; ``False``: level by level, with a backward
        pass each, so that memory does not grow with their number; ``None``: all at once where the kernels allow it
        (those of :class:`pplvi.kernels.ResidualKernel` do). Gradients are the same.
    :raises ValueError: for another divergence, fraction or scheme, or too few particles.

    >>> NestedELBO(divergence="reverse_kl", num_particles=36, resample=True)
    NestedELBO(divergence='reverse_kl', num_particles=36, resample=True)
    """

    def __init__(
        self,
        divergence: Divergence | tuple[Divergence, Divergence] = "reverse_kl",
        num_particles: Count = 10,
        *,
        resample: bool | Rate | Resampling = False,
        scheme: ResamplingScheme = "systematic",
        vectorize_levels: bool | None = None,
        **options: Any,
    ) -> None:
        if divergence not in _OBJECTIVES:
            raise ValueError(f"divergence={divergence!r}: expected one of {', '.join(map(repr, _OBJECTIVES))}.")
        resampling = resample if isinstance(resample, Resampling) else Resampling(resample, scheme)
        sampler = Annealed(resampling, vectorize_levels=vectorize_levels)
        super().__init__(_OBJECTIVES[divergence], sampler, num_particles, **options)
        self.divergence, self.resample = divergence, resample
        self.monitor = self.monitor if resampling.when is False else None
        forward = isinstance(self.objective, NestedForwardKL)
        plain = ForwardKLDivergence() if forward else RenyiBound(1.0, "stl")
        self._plain = WeightedELBO(plain, None, num_particles, **options)

    def differentiable_loss(self, model: Program, guide: Program, *args: Any, **kwargs: Any) -> Tensor:
        """The loss, in nats, of all levels at once: its gradient is that of the surrogates."""
        if not isinstance(guide, Planned):
            return self._plain.differentiable_loss(model, guide, *args, **kwargs)
        return super().differentiable_loss(model, guide, *args, **kwargs)

    def loss_and_grads(self, model: Program, guide: Program, *args: Any, **kwargs: Any) -> float:
        """An estimate of the loss; gradients are added to the parameters' ``grad``, level by level."""
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
        shown = f"divergence={self.divergence!r}, num_particles={self.num_particles}, resample={self.resample!r}"
        return f"NestedELBO({shown})"
