"""Deep latent Gaussian models with a ladder guide: variational autoencoders, of several layers and conditional."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any, Literal

import pyro
import pyro.distributions as dist
import torch
from pyro.nn import pyro_method
from pyro.nn.module import to_pyro_module_
from torch import Tensor, nn
from torch.nn.functional import softplus

from pplvi.kinds.checked import checked
from pplvi.kinds.kinds import Count, Natural
from pplvi.models.latent.layered import LayeredModel, masked_event, zero_filled
from pplvi.programs.calls import check_counts

__all__ = ["DeepLatentGaussian"]

_LEAST_SCALE = 1e-3


@checked
class DeepLatentGaussian(LayeredModel):
    r"""Layers of Gaussian latents through networks: one layer is a variational autoencoder.

    .. math:: z_L \sim \mathcal N(0, I), \qquad
        z_l \mid z_{l+1} \sim \mathcal N\big(\mu_l(z_{l+1}), \operatorname{diag}\sigma_l^2(z_{l+1})\big), \qquad
        x \mid z_1 \sim p(x; f(z_1))

    ``guide`` is a ladder: a network from the data up says for each layer a Gaussian, which is multiplied with the
    model's own of that layer given the one above. ``AutoAmortized(model.model, encoder, plates="data")`` is another.
    With ``given=`` both are conditional on numbers that the model does not generate.

    Source: Rezende, Mohamed & Wierstra (2014), "Stochastic backpropagation and approximate inference in deep generative
    models"; Kingma & Welling (2014); Sønderby et al. (2016), "Ladder variational autoencoders"; Sohn, Lee & Yan (2015)
    for conditional ones.

    :param num_visible: numbers in a datum.
    :param latents: widths of the latent layers, from the data up.
    :param hidden: hidden units of each network, of one layer.
    :param likelihood: ``"bernoulli"``, or ``"normal"`` with a learned scale for each number.
    :param given: numbers of a condition; none unless given.
    :param name: prefix of the parameters' names.
    :raises ValueError: for sizes below 1, or another likelihood.

    >>> vae = DeepLatentGaussian(6, [2], hidden=8)
    >>> svi = pyro.infer.SVI(vae.model, vae.guide, pyro.optim.Adam({"lr": 0.01}), pyro.infer.Trace_ELBO())
    >>> loss = svi.step(torch.ones(10, 6))
    >>> vae.traverse(torch.zeros(2), 0, torch.linspace(-2, 2, 5)).shape  # images along one latent
    torch.Size([5, 6])
    """

    def __init__(
        self,
        num_visible: Count,
        latents: Sequence[Count],
        *,
        hidden: Count = 200,
        likelihood: Literal["bernoulli", "normal"] = "bernoulli",
        given: Natural = 0,
        name: str = "deep_latent_gaussian",
    ) -> None:
        super().__init__([num_visible, *latents], name)
        check_counts(hidden=hidden)
        check_counts(0, given=given)
        if likelihood not in ("bernoulli", "normal"):
            raise ValueError(f"likelihood={likelihood!r}: expected 'bernoulli' or 'normal'.")
        self.likelihood, self.num_given = likelihood, given
        self.decoder = _network(latents[0] + given, hidden, num_visible)
        self.downward = nn.ModuleList(_network(z, hidden, 2 * w) for w, z in pairwise(latents))
        below = [num_visible + given, *[hidden] * (len(latents) - 1)]
        self.upward = nn.ModuleList(nn.Sequential(nn.Linear(w, hidden), nn.ReLU()) for w in below)
        self.reading = nn.ModuleList(nn.Linear(hidden, 2 * z) for z in latents)
        if likelihood == "normal":
            self.log_scale = nn.Parameter(torch.zeros(num_visible))
        to_pyro_module_(self)

    # ------------------------------------------------------------------ the programs

    @pyro_method
    def model(
        self,
        x: Tensor | None = None,
        given: Tensor | None = None,
        *,
        mask: Tensor | None = None,
        size: int | None = None,
    ) -> Tensor:
        """Layers from the top, and data ``"x"``, in plate ``"data"``.

        :param x: data, ``(N, D)``; drawn if left out.
        :param given: what they are conditioned on, ``(N, given)``.
        :param mask: which numbers were seen, ``(N, D)`` or ``(D,)``, boolean.
        :param size: how many to draw (one, or one for each condition), or how many the data given stand for.
        :raises ValueError: for data, conditions or a mask of another shape.
        """
        self._check_given(given)
        with self.plate(x, size or (len(given) if x is None and given is not None else size)):
            z = pyro.sample(f"z{len(self.widths) - 1}", self._top().to_event(1))
            for layer in range(len(self.widths) - 2, 0, -1):
                z = pyro.sample(f"z{layer}", _normal(self.downward[layer - 1](z)).to_event(1))
            found: Tensor = pyro.sample("x", masked_event(self.decoded(z, given), x, mask), obs=zero_filled(x, mask))
        return found

    @pyro_method
    def guide(
        self,
        x: Tensor | None = None,
        given: Tensor | None = None,
        *,
        mask: Tensor | None = None,
        size: int | None = None,
    ) -> None:
        """The ladder, which sees zeros where numbers are missing; same arguments as the model.

        :raises ValueError: without data.
        """
        if x is None:
            raise ValueError("x=None: expected data, whose latents the guide draws.")
        self._check_given(given)
        with self.plate(x, size):
            shown = zero_filled(x, mask)
            h = shown if given is None else torch.cat([shown, given], -1)
            read = []
            for up, reading in zip(self.upward, self.reading, strict=True):
                h = up(h)
                read.append(_normal(reading(h)))
            z = pyro.sample(f"z{len(read)}", read[-1].to_event(1))
            for layer in range(len(read) - 1, 0, -1):
                both = _product(read[layer - 1], _normal(self.downward[layer - 1](z)))
                z = pyro.sample(f"z{layer}", both.to_event(1))

    def _top(self) -> dist.Normal:
        zero = next(self.parameters()).new_zeros(self.widths[-1])
        return dist.Normal(zero, torch.ones_like(zero))

    def _check_given(self, given: Tensor | None) -> None:
        if (given is None) != (self.num_given == 0) or (given is not None and given.shape[-1] != self.num_given):
            came = None if given is None else tuple(given.shape)
            raise ValueError(f"given has shape {came}: expected (N, {self.num_given}), and none where given=0.")

    # ------------------------------------------------------------------ what it generates

    @pyro_method
    def decoded(self, z: Tensor, given: Tensor | None = None) -> dist.TorchDistribution:
        """The distribution of each number given the first latent layer, ``(*, D)``."""
        decoder: Any = self.decoder
        found = decoder(z if given is None else torch.cat([z, given.expand(*z.shape[:-1], -1)], -1))
        if self.likelihood == "bernoulli":
            return dist.Bernoulli(logits=found)
        return dist.Normal(found, self.log_scale.exp())

    @torch.no_grad()
    def traverse(self, z: Tensor, index: int, values: Tensor, given: Tensor | None = None) -> Tensor:
        """Means of data as one number of the first latent layer takes these values, ``(len(values), D)``.

        :param z: the others, ``(latents[0],)``.
        :param index: which one.
        :param values: of it.
        :param given: a condition, ``(given,)``.
        :raises ValueError: for an index that there is not.
        """
        if not 0 <= index < self.widths[1]:
            raise ValueError(f"index={index}: expected one of the {self.widths[1]} latents, from 0.")
        moved = z.repeat(len(values), 1)
        moved[:, index] = values
        return self.decoded(moved, given).mean

    @torch.no_grad()
    def sample(self, num_draws: Count, given: Tensor | None = None) -> Tensor:
        """Draws, ``(num_draws, D)``; of each condition one, where there are any."""
        found: Tensor = self.model(None, given, size=num_draws)
        return found


def _network(below: int, hidden: Count, above: int) -> nn.Module:
    return nn.Sequential(nn.Linear(below, hidden), nn.ReLU(), nn.Linear(hidden, above))


def _normal(outputs: Tensor) -> dist.Normal:
    loc, scale = outputs.chunk(2, -1)
    return dist.Normal(loc, softplus(scale) + _LEAST_SCALE)


def _product(a: dist.Normal, b: dist.Normal) -> dist.Normal:
    """The normalised product of two densities: precisions add."""
    first, second = a.scale**-2, b.scale**-2
    total = first + second
    return dist.Normal((a.loc * first + b.loc * second) / total, total.rsqrt())
