"""The complete-data problem of EM: a program with enumerated latents, its arguments and its parameters."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import pyro
import torch
from torch import Tensor
from torch.distributions import transform_to

from pplvi.programs.handlers import parameters_of
from pplvi.programs.joint import execute
from pplvi.programs.sites import is_deterministic, sample_sites, site_plates
from pplvi.programs.summing import summing
from pplvi.programs.traces import Run, unscaled_log_prob
from pplvi.types import Call, Program

Counts = dict[str, Tensor]


class ParameterLeaves:
    """The parameters of a program, as unconstrained leaves.

    :param model: the program.
    :param call: its arguments.
    :raises ValueError: for a program without parameters.
    """

    def __init__(self, model: Program, call: Call) -> None:
        self.model, self.call = model, call
        self.leaves = parameters_of(lambda: self.model(*call[0], **call[1]))
        if not self.leaves:
            raise ValueError("the model has no parameters, so there is nothing to maximise: expected pyro.param.")

    @abstractmethod
    def expect(self, instead: Mapping[str, Tensor] | None = None) -> tuple[float, Counts]:
        """The log evidence (nats), and what the M-step needs of the posterior."""

    @abstractmethod
    def expected_log_joint(self, counts: Mapping[str, Tensor]) -> Tensor:
        """``Q`` at the present parameters, a scalar with its gradient, in nats."""

    def value_and_gradient(self, counts: Mapping[str, Tensor], leaves: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Minus ``Q``, and its gradient in these leaves as a vector."""
        with torch.enable_grad():
            loss = -self.expected_log_joint(counts)
            found = torch.autograd.grad(loss, leaves, allow_unused=True, materialize_grads=True)
        return loss.detach(), torch.cat([g.flatten() for g in found])

    # ------------------------------------------------------------------ parameters

    def constraint(self, name: str) -> Any:
        """Where a parameter is constrained to."""
        return pyro.get_param_store()._constraints.get(name, torch.distributions.constraints.real)

    def value(self, name: str) -> Tensor:
        """The constrained value of a parameter, detached."""
        found: Tensor = transform_to(self.constraint(name))(self.leaves[name].detach().clone())
        return found

    @torch.no_grad()
    def assign(self, values: Mapping[str, Tensor]) -> None:
        """Set parameters to constrained values, in place."""
        for name, value in values.items():
            self.leaves[name].copy_(transform_to(self.constraint(name)).inv(value))

    @contextmanager
    def elsewhere(self, generator: torch.Generator) -> Iterator[None]:
        """All parameters at random points of their domains, put back afterwards."""
        before = {name: leaf.data for name, leaf in self.leaves.items()}
        try:
            for leaf in self.leaves.values():  # in other memory, as what is computed meanwhile may be a view of it
                leaf.data = torch.randn(leaf.shape, generator=generator, dtype=leaf.dtype).to(leaf.device)
            yield
        finally:
            for name, leaf in self.leaves.items():
                leaf.data = before[name]


class CompleteData(ParameterLeaves):
    r"""A program with its latents enumerated, at fixed arguments.

    .. math:: Q(\theta) = E_{p(z \mid x, \theta_\text{old})}[\log p_\theta(x, z)]
        = \sum_s \sum_e c_{se} \log p_\theta(s)_e

    over the entries ``e`` of the log density of each site ``s``, with their posterior expected counts ``c``.

    :param model: the program; discrete latents that do not ask for enumeration are enumerated too.
    :param guide: a guide without sites.
    :param call: its arguments.
    :raises ValueError: for latents without a finite number of values, subsampled plates, and a program without
        parameters.
    """

    def __init__(self, model: Program, guide: Program, call: Call) -> None:
        super().__init__(summing(model, *call), call)
        self.guide = guide
        if cut := _subsampled(self.run()):
            raise ValueError(
                f"plates {cut} are subsampled, so that log p(x) would change by itself: expected whole plates."
            )

    def run(self) -> Run:
        """The program at the present parameters."""
        return execute(self.model, self.guide, *self.call)

    @torch.no_grad()
    def expect(self, instead: Mapping[str, Tensor] | None = None) -> tuple[float, Counts]:
        """The log evidence (nats), and the expected counts by site."""
        total, counts = self.run().expected_counts(instead)
        return float(total), counts

    def expected_log_joint(self, counts: Mapping[str, Tensor]) -> Tensor:
        """``Q`` at the present parameters, a scalar with its gradient, in nats."""
        sites = [(n, s) for n, s in sample_sites(self.run().model) if not is_deterministic(s)]
        return torch.stack([_weighted(counts[name], unscaled_log_prob(name, site)) for name, site in sites]).sum()


def _subsampled(run: Run) -> list[str]:
    return sorted({p.name for _, s in sample_sites(run.model) for p in site_plates(s) if p.size != p.full_size})


def _weighted(counts: Tensor, density: Tensor) -> Tensor:
    """Entries of no count may have a density of minus infinity."""
    return (counts * density.masked_fill(counts == 0, 0.0)).sum()
