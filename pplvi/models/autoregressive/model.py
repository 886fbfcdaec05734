"""What autoregressive models share: the program, the proposal where numbers are missing, and a start at the data."""

from __future__ import annotations

from typing import Any

import pyro
import torch
from pyro.nn import PyroModule, pyro_method
from torch import Tensor

from pplvi.guides.owned import claim_name
from pplvi.models.autoregressive.distributions import AutoregressiveDistribution, Completion, Seen
from pplvi.models.inputs import checked_data, checked_mask
from pplvi.programs.calls import check_counts
from pplvi.programs.plates import data_plate

__all__ = ["AutoregressiveModel", "BinaryAutoregressiveModel"]


class AutoregressiveModel(PyroModule):
    """A model with an exact density: ``model`` and ``guide`` are programs, :meth:`distribution` what they observe.

    The guide is empty, unless numbers are missing: then it draws them in turn given those before them, and the ELBO is
    a bound of what was seen (exact if what is missing comes last), tighter with more particles.

    :param num_visible: numbers in a datum.
    :param name: prefix of the parameters' names.
    :param num_given: numbers that the model is conditioned on.
    """

    def __init__(self, num_visible: int, name: str, num_given: int = 0) -> None:
        super().__init__(name)
        check_counts(num_visible=num_visible)
        check_counts(0, given=num_given)
        self.num_visible, self.num_given = num_visible, num_given

    @pyro_method
    def distribution(self, given: Tensor | None = None) -> AutoregressiveDistribution:
        """The distribution of data, with parameters as they are now.

        :param given: what it is conditioned on, ``(*batch, num_given)``, for a model with ``given``.
        """
        raise NotImplementedError

    @pyro_method
    def model(
        self,
        x: Tensor | None = None,
        given: Tensor | None = None,
        *,
        mask: Tensor | None = None,
        size: int | None = None,
    ) -> Tensor:
        """Data ``"x"`` in plate ``"data"``; what is missing is a latent site ``"missing"`` of whole vectors.

        :param x: data, ``(N, D)``; drawn if left out.
        :param given: what they are conditioned on, ``(N, num_given)``.
        :param mask: which numbers were seen, ``(N, D)`` or ``(D,)``, boolean.
        :param size: how many to draw (one), or how many the data given stand for.
        :raises ValueError: for data, conditions or a mask of another shape.
        """
        claim_name(self)
        p = self.distribution(given)
        if x is None:
            with data_plate(size or (1 if given is None else len(given)), None):
                drawn: Tensor = pyro.sample("x", p)
                return drawn
        x = checked_data(x, self.num_visible)
        with data_plate(len(x), size):
            if mask is not None:
                mask = checked_mask(mask, x)
                whole = pyro.sample("missing", Completion(p, x, mask))
                return pyro.sample("x", Seen(p, whole, mask), obs=x)
            return pyro.sample("x", p, obs=x)

    @pyro_method
    def guide(
        self,
        x: Tensor | None = None,
        given: Tensor | None = None,
        *,
        mask: Tensor | None = None,
        size: int | None = None,
    ) -> None:
        """Draws what is missing; same arguments as the model."""
        if x is not None and mask is not None:
            claim_name(self)
            mask = checked_mask(mask, checked_data(x, self.num_visible))
            with data_plate(len(x), size):
                pyro.sample("missing", Completion(self.distribution(given), x, mask, frozen=True))

    @torch.no_grad()
    def sample(self, num_draws: int, given: Tensor | None = None) -> Tensor:
        """Draws, ``(num_draws, *batch, D)``."""
        return self.distribution(given).sample((num_draws,))

    def check_given(self, given: Tensor | None) -> None:
        """Check what the model is conditioned on.

        :raises ValueError: for a condition that it does not have, or does not get.
        """
        if (given is None) != (self.num_given == 0) or (given is not None and given.shape[-1] != self.num_given):
            came: Any = None if given is None else tuple(given.shape)
            wanted = f"a tensor (..., {self.num_given})" if self.num_given else "none, as the model has no given="
            raise ValueError(f"given has shape {came}: expected {wanted}.")


class BinaryAutoregressiveModel(AutoregressiveModel):
    """A model of zeros and ones, with a bias for each."""

    bias: Tensor

    @torch.no_grad()
    def start_at(self, x: Any) -> None:
        """Visible biases at the log odds of the means of binary data, which is where training best begins.

        :param x: data, ``(N, D)``; a tensor or an array.
        """
        mean = checked_data(torch.as_tensor(x).to(self.bias), self.num_visible).mean(0)
        self.bias.copy_(torch.logit(mean.clamp(1e-3, 1 - 1e-3)))
