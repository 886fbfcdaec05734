"""State-space models under ``SVI``: a particle filter whose proposal, model and look-ahead factors are learned."""

from __future__ import annotations

from typing import Any, Literal

from pplvi.kinds.checked import checked
from pplvi.kinds.kinds import Count, Rate
from pplvi.losses.base import WeightedELBO
from pplvi.objectives.nested import FilteringBound, FilteringForwardKL, IncrementalBound
from pplvi.objectives.step import Objective
from pplvi.samplers.filtering import Filtering
from pplvi.weights.resampling import Resampling, ResamplingScheme

_OBJECTIVES: dict[str, Objective] = {"bound": FilteringBound(), "forward_kl": FilteringForwardKL()}


@checked
class FilteringELBO(WeightedELBO):
    """The filtering bound of a state-space model, and other objectives of its time steps.

    ``loss = -log Z`` as estimated by a particle filter, ``sum over t of -log E_A[v[t]]``; it is the average of these
    logarithms that bounds the log evidence. Model and guide are objects with ``init`` and ``step`` as for Pyro's
    ``SMCFilter``, or programs with a ``pyro.markov`` loop (:mod:`pplvi.samplers.state_space`): ``svi.step(ys,
    initial=x)`` runs ``init(state, initial=x)`` and then ``step(state, y)`` for every ``y`` in ``ys``. Sequences in a
    ``pyro.plate`` of their own have weights of their own.

    ============================================  ==========================================================
    algorithm                                     call
    ============================================  ==========================================================
    FIVO, VSMC, AESMC (Maddison et al. 2017;      ``FilteringELBO(K, resample=True)``, or a fraction: where
    Naesseth et al. 2018; Le et al. 2018)         the effective sample size falls below it
    importance-weighted bound (Burda et al.       ``FilteringELBO(K, resample=False)``
    2016)
    NASMC (Gu et al. 2015)                        ``FilteringELBO(K, objective="forward_kl")``
    nested inference with learned look-ahead      ``FilteringELBO(K, objective=NestedForwardKL())`` and a
    factors (Zimmermann et al. 2021)              proposal with a method ``look_ahead``
    ============================================  ==========================================================

    :param num_particles: number of particles ``K``.
    :param objective: ``"bound"``: end to end, gradients follow the draws back in time, through ancestors and not
        through their choice (so that a look-ahead factor cannot be learned by it); ``"forward_kl"``: step by step and
        without reparameterisation, for discrete latents too; or any objective of levels
        (:mod:`pplvi.objectives.nested`).
    :param resample: between time steps: ``True`` always, a fraction of the particles, or ``False`` never.
    :param scheme: ``"systematic"``, ``"stratified"`` or ``"multinomial"``.
    :raises ValueError: for another objective, fraction or scheme, or too few particles.

    >>> import pyro, pyro.distributions as dist, torch
    >>> class Walk:
    ...     def init(self, state):
    ...         state["z"] = pyro.sample("z", dist.Normal(0.0, 1.0))
    ...     def step(self, state, y=None):
    ...         state["z"] = pyro.sample("z", dist.Normal(state["z"], 1.0))
    ...         pyro.sample("y", dist.Normal(state["z"], 1.0), obs=y)
    >>> class Proposal:
    ...     def init(self, state):
    ...         pyro.sample("z", dist.Normal(0.0, 1.0))
    ...     def step(self, state, y=None):
    ...         weight = pyro.param("weight", torch.tensor(0.5))
    ...         pyro.sample("z", dist.Normal(state["z"] + weight * (y - state["z"]), 0.8))
    >>> _ = pyro.set_rng_seed(0)
    >>> loss = FilteringELBO(num_particles=2000, resample=0.5)
    >>> round(loss.loss(Walk(), Proposal(), torch.tensor([0.3, -0.2, 0.9])), 1)  # exact: 4.496
    4.5
    """

    def __init__(
        self,
        num_particles: Count = 10,
        objective: Literal["bound", "forward_kl"] | Objective = "bound",
        *,
        resample: bool | Rate = True,
        scheme: ResamplingScheme = "systematic",
        **options: Any,
    ) -> None:
        chosen = _OBJECTIVES.get(objective) if isinstance(objective, str) else objective
        if chosen is None or chosen.routing.local is None:
            raise ValueError(
                f"objective={objective!r}: expected 'bound', 'forward_kl' or an objective of levels "
                "(pplvi.objectives.nested)."
            )
        fixed = isinstance(chosen, FilteringBound | FilteringForwardKL | IncrementalBound)
        sampler = Filtering(Resampling(resample, scheme), learn_look_ahead=not fixed)
        super().__init__(chosen, sampler, num_particles, **options)
        self.shown = objective, resample

    def __repr__(self) -> str:
        objective, resample = self.shown
        return f"FilteringELBO(num_particles={self.num_particles}, objective={objective!r}, resample={resample!r})"
