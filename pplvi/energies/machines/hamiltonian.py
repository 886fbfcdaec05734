"""Densities of a real visible layer whose hidden layers are summed out: chains are moved by Hamiltonian Monte Carlo."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.distributions import identity_transform
from torch.distributions.transforms import IndependentTransform

from pplvi.energies.machines.energy import Clamped, EnergyModel
from pplvi.energies.machines.training_step import active_step
from pplvi.energies.machines.units import GaussianUnits
from pplvi.kernels.coordinates import Coordinates
from pplvi.kernels.hamiltonian import HamiltonianMove
from pplvi.kernels.invariant import Frame
from pplvi.kinds.checked import checked
from pplvi.kinds.kinds import Count, Positive
from pplvi.types import Values

_GOAL, _RATE = 0.8, 0.02


@dataclass(frozen=True)
class _Leaps:
    """One move with a step size that may be a tensor."""

    step_size: Any
    num_leapfrog: int
    num_moves: int = 1


def hamiltonian_move(
    log_density: Callable[[Tensor], Tensor], point: Tensor, step_size: Tensor | float, num_leapfrog: int
) -> Tensor:
    """Where one move of Hamiltonian Monte Carlo leads from each point, ``(*batch, width)``, without gradient.

    :param log_density: of points, ``(*batch)``, in nats.

    >>> _ = torch.manual_seed(0)
    >>> x = torch.randn(1000, 2)
    >>> for _ in range(20):
    ...     x = hamiltonian_move(lambda x: -2 * (x**2).sum(-1), x, 0.3, 3)
    >>> [round(variance, 1) for variance in x.var(0).tolist()]
    [0.2, 0.3]
    """
    sites = (Coordinates("v", (point.shape[-1],), (), IndependentTransform(identity_transform, 1)),)
    frame = Frame(lambda values: log_density(values["v"]), _total, lambda x, events: x[(..., *[None] * events)])
    return HamiltonianMove(_Leaps(step_size, num_leapfrog), sites).move({"v": point}, frame)["v"]  # type: ignore[arg-type]


def _total(x: Tensor, events: int) -> Tensor:
    return x.flatten(x.dim() - events).sum(-1) if events else x


@checked
class HamiltonianMachine(EnergyModel):
    """A density of one layer ``"v"`` of real units; a subclass says its :meth:`energy`, and which part is Gaussian.

    :meth:`gibbs` is Hamiltonian Monte Carlo, so that chains, :class:`pplvi.BoltzmannELBO` and ``fit`` are those of
    other machines; nothing is latent: ``machine.guide`` samples nothing. Its step size follows an acceptance of 0.8, in
    training steps alone. Annealed importance sampling goes from :meth:`base_energy` to :meth:`energy`.

    :param num_visible: visible units.
    :param name: prefix of the parameters' names.
    :param step_size: of a leapfrog step, to begin with.
    :param num_leapfrog: leapfrog steps of a move.
    :raises ValueError: for numbers that are not positive.
    """

    classes = (("v",), ())

    def __init__(self, num_visible: Count, *, name: str, step_size: Positive, num_leapfrog: Count) -> None:
        super().__init__({"v": GaussianUnits(num_visible, learn_variance=False)}, centered=False, name=name)
        self.num_leapfrog = num_leapfrog
        self.bias_v = torch.nn.Parameter(torch.zeros(num_visible))
        self.register_buffer("step_size", torch.tensor(float(step_size)))

    @property
    def guide(self) -> Callable[..., None]:
        """A guide that samples nothing: hidden layers are summed out already."""
        return self.marginal_guide

    def like(self) -> Tensor:
        """The biases of the visible units."""
        return self._found(self._parameters, "bias_v")

    def base_energy(self, values: Values) -> Tensor:
        """``|v|^2 / 2 - a . v``: what is left without hidden units, ``(*batch)``."""
        v = values["v"]
        return (v**2).sum(-1) / 2 - v @ self.like()

    def log_marginal(self, values: Values, beta: Any = 1.0) -> Tensor:
        """``-beta E(v)``, ``(*batch)``, in nats."""
        return -beta * self.energy(values)

    def free_energy(self, v: Tensor) -> Tensor:
        """``E(v)``, ``(*batch)``, in nats."""
        return self.energy({"v": v})

    def gibbs(
        self, values: Values, num_sweeps: int = 1, *, clamped: Clamped = (), beta: Any = 1.0
    ) -> dict[str, Tensor]:
        """Moves of Hamiltonian Monte Carlo, each accepted or not.

        :raises ValueError: for single units that are clamped.
        """
        if "v" in clamped:
            if isinstance(clamped, dict) and clamped["v"] is not None:
                raise ValueError(
                    f"single units of {type(self).__name__} are not drawn given others: expected all of them, no mask."
                )
            return dict(values)
        v, step_size = values["v"], self.kept("step_size")
        adapts = active_step() is not None and torch.is_grad_enabled()
        for _ in range(num_sweeps):
            moved = hamiltonian_move(lambda x: self.log_marginal({"v": x}, beta), v, step_size, self.num_leapfrog)
            if adapts:
                with torch.no_grad():
                    accepted = (moved != v).any(-1).to(v.dtype).mean()
                    step_size.mul_(torch.exp(_RATE * (accepted - _GOAL).sign()))
            v = moved
        return {"v": v}

    def redrawn(self, layer: str, values: Values, beta: Any = 1.0, *, held: Tensor | None = None) -> Tensor:
        """A chain of moves from the values.

        :raises ValueError: for single units that are held.
        """
        return self.gibbs(values, 100, clamped=() if held is None else {layer: held}, beta=beta)[layer]
