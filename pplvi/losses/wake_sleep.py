"""Wake-sleep: the model learns from the guide's draws, the guide from weighted draws or from the model's dreams.

Three updates, each on draws without a gradient path, so that discrete latents are as good as continuous ones, and none
of the guide's gradient reaches the model or the other way round (``sg`` stops gradients, ``u = softmax(log w)``):

====================  ==============================================  ==========================
update                loss                                            draws
====================  ==============================================  ==========================
wake-theta            ``-log mean w``; Hinton: ``-mean log w``        of the guide
wake-phi              ``-sum u log q(z given x)``                     the same
sleep-phi             ``-mean log q(z given x)``                      of the model, data included
====================  ==============================================  ==========================

With two optimisers, or two learning rates: ``Adam(lambda name: {"lr": ...})`` under Pyro's ``SVI``, which asks for each
parameter by name; :func:`pplvi.fit` also takes ``optim={"model": ..., "guide": ...}``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from pplvi.kinds.checked import checked
from pplvi.kinds.kinds import Count, Probability
from pplvi.losses.base import LossSum, WeightedELBO
from pplvi.objectives.bounds import RenyiBound
from pplvi.objectives.forward_kl import ForwardKLDivergence, weighted_sum
from pplvi.objectives.step import Objective, Routing, Step, Terms
from pplvi.samplers.ancestral import Ancestral
from pplvi.samplers.mixture import DefensiveMixture


@dataclass(frozen=True)
class WakePhase(Objective):
    """Wake-theta, and wake-phi on the same draws: the value is ``-L + insomnia * -sum u log q``.

    ``L`` is the Renyi bound of order ``alpha``, with its gradient in the model alone: ``sum u log_target`` for
    ``u = softmax((1 - alpha) log w)``. ``alpha=1`` is the wake phase of Hinton et al. (1995), ``alpha=0`` that of
    Bornschein & Bengio (2015). The second term (:class:`pplvi.objectives.ForwardKLDivergence`) is the guide's.

    >>> step = Step.from_proposal(log_target=torch.tensor([0.0, -1.0]), log_forward=torch.zeros(2))
    >>> WakePhase(alpha=1.0)(step).value
    tensor(0.5000)
    """

    alpha: float = 0.0
    insomnia: float = 0.0

    @property
    def linear(self) -> bool:  # type: ignore[override]
        """Equal weights are linear."""
        return self.alpha == 1.0

    @property
    def self_normalised(self) -> bool:  # type: ignore[override]
        """Weights of particles are compared unless they are equal."""
        return self.alpha != 1.0

    @property
    def proposals(self) -> frozenset[str]:  # type: ignore[override]
        """Equal weights need draws of the guide itself."""
        return frozenset({"guide"}) if self.alpha == 1.0 else frozenset({"guide", "mixture"})

    @property
    def routing(self) -> Routing:
        """Draws are detached."""
        return Routing(detach=True)

    def __call__(self, step: Step) -> Terms:
        """Value and surrogate, each of shape ``(*batch)``.

        :raises ValueError: for guides that enumerate sites: a gradient of the guide would reach the model's.
        """
        if step.averaged:
            raise ValueError(
                "the guide enumerates sites, but wake-sleep learns from draws: expected a guide that draws them. "
                "Enumerate them in the model instead, or use ELBO."
            )
        weight = torch.softmax((1.0 - self.alpha) * step.log_weight, 0)
        theta = Terms(-RenyiBound(self.alpha).bound(step.log_weight), -weighted_sum(weight, step.log_target))
        if self.insomnia == 0:
            return theta
        phi = ForwardKLDivergence()(step)
        return Terms(*(model + self.insomnia * guide for model, guide in zip(theta, phi, strict=True)))


class _WakeSleep(LossSum):
    """A wake phase, then a sleep phase: what is dreamt never depends on the order of random numbers awake."""

    def __init__(self, wake: WeightedELBO, sleep: WeightedELBO, share: float, **arguments: Any) -> None:
        super().__init__([(1.0, wake), (share, sleep)] if share else [(1.0, wake)])
        self.wake, self.sleep, self.arguments = wake, sleep, arguments

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(f'{k}={v!r}' for k, v in self.arguments.items() if v is not None)})"


@checked
class WakeSleep(_WakeSleep):
    """The wake-sleep algorithm (Hinton, Dayan, Frey & Neal 1995): ``-E_q[log p(x, z)] - E_p[log q(z | x)]``.

    Awake, the model learns from the guide's draws for the data; asleep, the guide learns from what the model dreams,
    latents and data together. The two have no common objective, so ``monitor`` is ``None``; the loss that is reported
    is ``-ELBO - mean log q(z | x)``, in nats, of data and dreams. Sites that are enumerated in the model are summed out
    awake and drawn asleep.

    Dreams of the data must be able to take their place: they come in the keyword argument ``observations``, a dict from
    site name to value, if there is one; otherwise they replace the arguments that are themselves observed values.

    :param num_particles: number of the guide's draws for each datum.
    :param num_sleep_particles: number of dreams, each of the size of the data; ``num_particles`` unless given.
    :param options: of :class:`pplvi.losses.WeightedELBO`.
    :raises ValueError: for fewer than 1 of either; at the first step, for models without dreams of the data: with
        factors, with distributions that have no sampler, or whose data reach neither keyword nor argument.

    Source: Hinton, Dayan, Frey & Neal (1995), "The wake-sleep algorithm for unsupervised neural networks".

    >>> import pyro, pyro.distributions as dist
    >>> def model(y):
    ...     pyro.sample("y", dist.Normal(pyro.sample("z", dist.Normal(0.0, 1.0)), 1.0), obs=y)
    >>> def guide(y):
    ...     pyro.sample("z", dist.Normal(pyro.param("slope", torch.tensor(0.0)) * y, 0.5**0.5))
    >>> svi = pyro.infer.SVI(model, guide, pyro.optim.Adam({"lr": 0.02}), WakeSleep(num_sleep_particles=20))
    >>> losses = [svi.step(torch.tensor(0.5)) for _ in range(200)]
    >>> round(pyro.param("slope").item(), 1)
    0.5
    """

    def __init__(self, num_particles: Count = 1, num_sleep_particles: Count | None = None, **options: Any) -> None:
        wake = WeightedELBO(WakePhase(alpha=1.0), None, num_particles, **options)
        sleep = _sleep(num_sleep_particles, num_particles, options)
        super().__init__(wake, sleep, 1.0, num_particles=num_particles, num_sleep_particles=num_sleep_particles)


@checked
class ReweightedWakeSleep(_WakeSleep):
    """Reweighted wake-sleep (Bornschein & Bengio 2015; Le et al. 2019), weights per datum.

    ``-log mean_k w_k + insomnia * -sum_k u_k log q(z_k) + (1 - insomnia) * -mean_s log q(z_s)`` with
    ``u = softmax(log w)``: wake-theta and wake-phi on the same draws of the guide, then sleep-phi on dreams of the
    model (:class:`WakeSleep` says how these reach the guide). The model's gradient is that of the
    importance-weighted bound, the guide's that of a forward KL divergence; both are biased by O(1/K). Their sum is no
    bound: ``monitor`` is ``None``.

    :param num_particles: number of the guide's draws ``K`` for each datum, at least 2.
    :param insomnia: share of wake-phi in the guide's update, from 0 (asleep) to 1 (no sleep phase).
    :param num_sleep_particles: number of dreams, each of the size of the data; ``num_particles`` unless given.
    :param mixture: probability of drawing from the model's prior instead of from the guide awake, which keeps guides
        from pruning what they do not draw; or a :class:`pplvi.samplers.DefensiveMixture` with a component of your own;
        0 for the guide alone.
    :param options: of :class:`pplvi.losses.WeightedELBO`.
    :raises ValueError: for fewer than 2 particles, whose weights say nothing, an insomnia outside 0 to 1, and as
        :class:`WakeSleep` if there is a sleep phase.

    Source: Bornschein & Bengio (2015), "Reweighted wake-sleep"; Le, Kosiorek, Siddharth, Teh & Wood (2019), "Revisiting
    reweighted wake-sleep for models with stochastic control flow".

    >>> ReweightedWakeSleep(num_particles=5, insomnia=0.5)
    ReweightedWakeSleep(num_particles=5, insomnia=0.5)
    """

    def __init__(
        self,
        num_particles: Count = 10,
        insomnia: Probability = 1.0,
        num_sleep_particles: Count | None = None,
        *,
        mixture: Probability | DefensiveMixture = 0.0,
        **options: Any,
    ) -> None:
        sampler = mixture if isinstance(mixture, DefensiveMixture) else DefensiveMixture(mixture) if mixture else None
        wake = WeightedELBO(WakePhase(0.0, insomnia), sampler, num_particles, **options)
        sleep = _sleep(num_sleep_particles, num_particles, options)
        super().__init__(
            wake,
            sleep,
            1.0 - insomnia,
            num_particles=num_particles,
            insomnia=insomnia,
            num_sleep_particles=num_sleep_particles,
            mixture=mixture or None,
        )


def _sleep(num_sleep_particles: int | None, num_particles: int, options: dict[str, Any]) -> WeightedELBO:
    count = num_particles if num_sleep_particles is None else num_sleep_particles
    return WeightedELBO(ForwardKLDivergence(), Ancestral(), count, **options)
