"""Transition kernels: conditional programs that share the model's site names and get the values to move as an argument.

A kernel is called as ``kernel(previous, *args, **kwargs)``, with ``previous`` a dict from site name to value, and
samples every latent site of the model once. The same kind of program serves forward, ``q[k](z[k] | z[k-1])``, and
reverse, ``r[k-1](z[k-1] | z[k])``. The classes here build such programs for a model's sites, in unconstrained
coordinates: what they sample lies in each site's support, and the Jacobian is in its density once. Values have the
particles leftmost.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import torch
from pyro.nn import PyroModule
from torch import Tensor

from pplvi.kernels.coordinates import Coordinates
from pplvi.types import LogDensity, Program, Values


class Kernel(Protocol):
    """Builds the forward and the reverse program of one transition."""

    def build(self, sites: Sequence[Coordinates], log_density: LogDensity) -> tuple[Program, Program]:
        """Forward and reverse kernel for a model's sites.

        :param log_density: ``log gamma[k]`` at given values and the model's arguments, summed over everything.
        """
        ...


class Reversible(Protocol):
    """A forward program that knows the way back."""

    def back(self, reached: Values, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """Sample every site's previous value, given the values that were reached."""
        ...


class ReverseProgram(PyroModule):
    """The reverse program of a forward program that knows the way back: its parameters are the forward program's.

    :param ahead: the forward program.
    """

    def __init__(self, ahead: Reversible) -> None:
        super().__init__()
        self.__dict__["ahead"] = ahead  # its parameters belong to the forward program

    def forward(self, reached: Values, *args: Any, **kwargs: Any) -> None:
        """Sample every site one step back from the value that was reached."""
        with self.ahead._pyro_context:
            self.ahead.back(reached, args, kwargs)


def log_density_gradient(
    sites: Sequence[Coordinates], free: Values, log_density: Callable[[Values], Tensor]
) -> dict[str, Tensor]:
    """Gradient of a log density, Jacobian included, in the sites' flat unconstrained coordinates.

    It is differentiable itself where gradients are on, for kernels whose draws carry a path through it. The scale of a
    site's subsampled plates is taken out: a kernel moves an element by that element's own density.

    :param log_density: of constrained values, summed over everything, subsampled plates scaled.

    >>> site = Coordinates("z", (), (), torch.distributions.identity_transform)
    >>> with torch.no_grad():
    ...     log_density_gradient([site], {"z": torch.tensor([[2.0]])}, lambda z: -(z["z"] ** 2).sum() / 2)
    {'z': tensor([[-2.]])}
    """
    live = torch.is_grad_enabled()
    with torch.enable_grad():
        points = {name: x if live and x.requires_grad else x.detach().requires_grad_() for name, x in free.items()}
        values = {site.name: site.write(points[site.name]) for site in sites}
        copies = {site.name: site.copies(values) for site in sites}
        total = log_density(values) + sum(copies[site.name] * site.log_jacobian(values).sum() for site in sites)
        gradients = torch.autograd.grad(total, list(points.values()), create_graph=live)
    return {name: slope / copies.get(name, 1.0) for name, slope in zip(points, gradients, strict=True)}
