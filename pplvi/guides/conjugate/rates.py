"""How far a natural-gradient step goes."""

from __future__ import annotations

import math
from dataclasses import dataclass

from pplvi.kinds.checked import checked


@checked
@dataclass(frozen=True)
class RobbinsMonro:
    r"""Rates that fall as :math:`\rho_t = (t + \tau)^{-\kappa}`, for stochastic natural-gradient steps.

    Their sum is infinite and that of their squares finite for :math:`1/2 < \kappa \le 1`, so that minibatches average
    out.

    Source: Robbins & Monro (1951), "A stochastic approximation method"; Hoffman et al. (2013), "Stochastic variational
    inference".

    :param delay: ``tau``, at least one; the larger, the smaller the first steps.
    :param exponent: ``kappa``, above 1/2, at most 1.
    :raises ValueError: for other numbers.

    >>> rate = RobbinsMonro(10, 0.7)
    >>> round(rate(0), 4), round(rate(90), 4)
    (0.1995, 0.0398)
    """

    delay: float = 1.0
    exponent: float = 0.7

    def __post_init__(self) -> None:
        if not 1 <= self.delay < math.inf:
            raise ValueError(f"delay={self.delay!r}: expected a number of at least 1, for example 10.")
        if not 0.5 < self.exponent <= 1:
            raise ValueError(f"exponent={self.exponent!r}: expected a number above 0.5 and at most 1, for example 0.7.")

    def __call__(self, step: int) -> float:
        """The rate of a step, counted from zero."""
        return float((step + self.delay) ** -self.exponent)
