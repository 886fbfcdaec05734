"""A network of noise as a model that has draws and no density."""

from __future__ import annotations

from typing import Literal

import pyro
import pyro.distributions as dist
import torch
from pyro.nn import PyroModule, pyro_method
from pyro.nn.module import to_pyro_module_
from torch import Tensor, nn

from pplvi.guides.owned import claim_name
from pplvi.kinds.checked import checked
from pplvi.kinds.kinds import Count
from pplvi.programs.calls import check_counts
from pplvi.programs.plates import data_plate

__all__ = ["Generator"]


@checked
class Generator(PyroModule):
    r"""An implicit model: a network of noise, :math:`x = g(z)`.

    There is no density of ``x`` and no posterior, so that no bound of the evidence trains it: ``model`` returns draws,
    as many as there are data, which :class:`pplvi.MomentMatching` and :class:`pplvi.Adversarial` compare with these.

    Source: Goodfellow, Bengio & Courville (2016), Deep learning, sections 20.10.2 and 20.10.4.

    :param network: from noise ``(N, num_latents)`` to data ``(N, D)``. It becomes part of the model.
    :param num_latents: numbers of noise.
    :param noise: ``"normal"``, or ``"uniform"`` between -1 and 1.
    :param name: prefix of the parameters' names.
    :raises ValueError: for a network that is no module, a size below 1, or another noise.

    >>> generator = Generator(nn.Linear(2, 3), 2)
    >>> generator.sample(5).shape, generator.model(torch.zeros(4, 3)).shape
    (torch.Size([5, 3]), torch.Size([4, 3]))
    """

    def __init__(
        self,
        network: nn.Module,
        num_latents: Count,
        *,
        noise: Literal["normal", "uniform"] = "normal",
        name: str = "generator",
    ) -> None:
        super().__init__(name)
        if not isinstance(network, nn.Module):
            raise ValueError(f"network is a {type(network).__name__}: expected a torch.nn.Module, from noise to data.")
        check_counts(num_latents=num_latents)
        if noise not in ("normal", "uniform"):
            raise ValueError(f"noise={noise!r}: expected 'normal' or 'uniform'.")
        to_pyro_module_(network)
        self.network, self.num_latents, self.noise = network, num_latents, noise

    @pyro_method
    def model(self, x: Tensor | None = None, *, size: int | None = None) -> Tensor:
        """Noise ``"z"`` in plate ``"data"``, and draws, ``(N, D)``, as deterministic site ``"draws"``.

        :param x: data, which say how many draws there are, and are not looked at.
        :param size: how many draws, without data (one).
        """
        claim_name(self)
        like = next(self.network.parameters(), torch.zeros(()))
        edge = torch.ones(self.num_latents, dtype=like.dtype, device=like.device)
        noise = dist.Normal(0 * edge, edge) if self.noise == "normal" else dist.Uniform(-edge, edge)
        with data_plate(size or 1 if x is None else len(x), None):
            z = pyro.sample("z", noise.to_event(1))
            draws: Tensor = pyro.deterministic("draws", self.network(z), event_dim=1)
        return draws

    def guide(self, x: Tensor | None = None, *, size: int | None = None) -> None:
        """Nothing: there is no posterior to approximate."""

    @torch.no_grad()
    def sample(self, num_draws: Count) -> Tensor:
        """Draws, ``(num_draws, D)``."""
        found: Tensor = self.model(size=num_draws)
        return found
