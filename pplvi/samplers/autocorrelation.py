"""What moves of particles are worth: effective draws of places, and the length at which a trajectory is worth most."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

WORST = 0.6  # of the effective draws that are wanted, of the worst coordinate
_LEAST = 1e-6  # of a move, of an independent draw
_START = 4  # steps that a move takes as long as beside its own: a momentum, a place that is kept and looked at
_NEARLY = 0.85  # as good as the best


def effective_draws(places: Tensor) -> Tensor:
    r"""Effective draws of the mean of each coordinate, by the means of the particles, which are independent.

    .. math:: N \frac{\operatorname{var}(z)}{\operatorname{var}_i(\bar z_i)}

    :param places: where ``N`` particles were after several moves, ``(N, moves, dim)``.

    >>> _ = torch.manual_seed(0)
    >>> still = torch.randn(1000, 1, 1).expand(1000, 5, 1)
    >>> effective_draws(still).round(), bool(effective_draws(torch.randn(1000, 5, 1)) > 4500)
    (tensor([1000.]), True)
    """
    means, tiny = places.mean(1), torch.finfo(places.dtype).tiny
    apart = (places - means.mean(0)).square().mean((0, 1))
    return len(places) * apart / means.var(0, correction=0).clamp(min=tiny)


def best_lengths(before: Tensor, path: Mapping[int, Tensor], probability: Tensor) -> tuple[int, int]:
    r"""The number of steps at which a trajectory has the most effective draws for its time, and the largest that is
    nearly as good, of those that are known.

    A move by :math:`\Delta` that is accepted with probability :math:`a` leaves a correlation of

    .. math:: \rho = 1 - \frac{E[a \Delta^2]}{2 \operatorname{var}(z)}

    and is worth :math:`(1 - \rho) / (1 + \rho)` draws: one at most, as what is beyond helps means alone.

    Source: Pasarica and Gelman 2010, Adaptively scaling the Metropolis algorithm using expected squared jumped
    distance, Statistica Sinica 20(1).

    :param before: where particles were, ``(N, dim)``.
    :param path: where they came to, by the number of steps.
    :param probability: of accepting the end of each, ``(N,)``.

    >>> start, end = torch.tensor([[-1.0], [1.0]]), torch.tensor([[1.0], [-1.0]])
    >>> best_lengths(start, {1: start, 10: end, 11: end, 20: end}, torch.ones(2))
    (10, 11)
    """
    variance = before.var(0).clamp(min=torch.finfo(before.dtype).tiny)

    def rate(steps: int) -> float:
        jump = (probability.unsqueeze(-1) * (path[steps] - before).square()).nan_to_num(0.0, 0.0).mean(0)
        correlation = (1 - 0.5 * jump / variance).clamp(min=0.0)
        worth = ((1 - correlation) / (1 + correlation)).clamp(min=_LEAST)
        return min(float(worth.median()), float(worth.min()) / WORST) / (_START + steps)

    rates = {steps: rate(steps) for steps in path}
    most = max(rates.values())
    return max(rates, key=rates.__getitem__), max(s for s, found in rates.items() if found >= _NEARLY * most)


class Lengths:
    """Lengths of one trajectory, for the best of them.

    :param wanted: numbers of steps; the last one is the whole.
    :ivar best: of them.
    :ivar longest: of those that are nearly as good.
    """

    def __init__(self, wanted: set[int]) -> None:
        self.wanted, self.best, self.longest = wanted, max(wanted), max(wanted)
        self._path: dict[int, Tensor] = {}

    def note(self, steps: int, position: Tensor) -> None:
        """Where particles are after so many steps."""
        if steps in self.wanted:
            self._path[steps] = position

    def end(self, before: Tensor, probability: Tensor) -> None:
        """Compare the lengths, with the probabilities of accepting the end."""
        self.best, self.longest = best_lengths(before, self._path, probability)
