"""Linear Gaussian models: every marginal and posterior is exact, so that they judge what is not."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import pyro
import pyro.distributions as dist
import torch
from pyro.distributions import constraints
from pyro.nn import PyroParam, pyro_method
from torch import Tensor

from pplvi.kinds.checked import checked
from pplvi.kinds.kinds import Count
from pplvi.models.inputs import checked_data, checked_mask
from pplvi.models.latent.layered import LayeredModel, given_to_guide, masked_event, zero_filled

__all__ = ["FactorAnalysis", "GaussianBeliefNetwork", "ProbabilisticPCA"]


class LinearGaussian(NamedTuple):
    """``child ~ N(weight parent + bias, diag(scale)^2)``."""

    weight: Tensor
    bias: Tensor
    scale: Tensor

    def given(self, parent: Tensor) -> dist.Normal:
        """The child's distribution, element by element."""
        return dist.Normal(parent @ self.weight.T + self.bias, self.scale)

    def above(self, mean: Tensor, covariance: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and covariance of the child, from those of the parent."""
        spread = self.weight @ covariance @ self.weight.T + self.scale.expand(len(self.bias)).square().diag()
        return self.weight @ mean + self.bias, spread

    def posterior(self, child: Tensor, prior: dist.MultivariateNormal, mask: Tensor | None) -> dist.MultivariateNormal:
        """Of the parent, where ``mask`` says which of the child's numbers were seen."""
        precision = self.scale.expand(len(self.bias)).square().reciprocal()
        if mask is not None:
            precision = precision * mask
        scaled = precision.unsqueeze(-1) * self.weight
        total = prior.precision_matrix + scaled.mT @ self.weight
        linear = prior.precision_matrix @ prior.loc + ((child - self.bias).unsqueeze(-2) @ scaled).squeeze(-2)
        tril = torch.linalg.cholesky(total)
        loc = torch.cholesky_solve(linear.unsqueeze(-1), tril.expand(*linear.shape[:-1], -1, -1)).squeeze(-1)
        return dist.MultivariateNormal(loc, precision_matrix=total)


@checked
class GaussianBeliefNetwork(LayeredModel):
    r"""Layers of Gaussian units, each a linear function of the one above, with noise of its own.

    .. math:: z_L \sim \mathcal N(b_L, \operatorname{diag}(s_L^2)), \qquad
        z_l \mid z_{l+1} \sim \mathcal N(W_l z_{l+1} + b_l, \operatorname{diag}(s_l^2)), \qquad x = z_0

    Everything is jointly Gaussian: ``guide`` is the exact posterior, so that every draw's ELBO is ``log p(x)``, and
    :meth:`distribution` the exact marginal. Missing numbers are left out exactly.

    Source: Shachter & Kenley (1989), "Gaussian influence diagrams"; Roweis & Ghahramani (1999), "A unifying review of
    linear Gaussian models".

    :param widths: of the data and of each latent layer.
    :param name: prefix of the parameters' names.
    :raises ValueError: for fewer than two layers, or widths below 1.

    >>> network = GaussianBeliefNetwork([3, 2, 2])
    >>> x = torch.tensor([[0.0, 1.0, -1.0]])
    >>> loss = pyro.infer.Trace_ELBO().loss(network.model, network.guide, x)
    >>> bool((network.distribution().log_prob(x) + loss).abs() < 1e-5)
    True
    """

    def __init__(self, widths: Sequence[Count], *, name: str = "gaussian_belief_network") -> None:
        super().__init__(widths, name)
        for layer, (width, parents) in enumerate(pairwise(widths)):
            self._declare(layer, width, parents)
        self._declare_top(len(widths) - 1, widths[-1])

    def _declare(self, layer: int, width: int, parents: int) -> None:
        self._parameter(f"weight_{layer}", torch.randn(width, parents) * parents**-0.5)
        self._parameter(f"bias_{layer}", torch.zeros(width))
        self._parameter(f"scale_{layer}", torch.ones(width), constraints.positive)

    def _declare_top(self, layer: int, width: int) -> None:
        self._parameter(f"bias_{layer}", torch.zeros(width))
        self._parameter(f"scale_{layer}", torch.ones(width), constraints.positive)

    def _parameter(self, name: str, value: Tensor, constraint: Any = constraints.real) -> None:
        setattr(self, name, PyroParam(value, constraint))

    def _links(self) -> list[LinearGaussian]:
        depth = len(self.widths) - 1
        parts = [[getattr(self, f"{part}_{i}") for part in ("weight", "bias", "scale")] for i in range(depth)]
        return [LinearGaussian(*each) for each in parts]

    def _top(self) -> tuple[Tensor, Tensor]:
        depth = len(self.widths) - 1
        return getattr(self, f"bias_{depth}"), getattr(self, f"scale_{depth}")

    def _priors(self) -> Iterator[tuple[LinearGaussian, dist.MultivariateNormal]]:
        """Each link with the marginal of its parent, from the top."""
        mean, scale = self._top()
        covariance = scale.square().diag()
        for link in reversed(self._links()):
            yield link, dist.MultivariateNormal(mean, covariance)
            mean, covariance = link.above(mean, covariance)

    @pyro_method
    def model(self, x: Tensor | None = None, *, mask: Tensor | None = None, size: int | None = None) -> Tensor:
        """Layers from the top, and data ``"x"``, in plate ``"data"``.

        :param x: data, ``(N, D)``; drawn if left out.
        :param mask: which numbers were seen, ``(N, D)`` or ``(D,)``, boolean.
        :param size: how many to draw (one), or how many the data given stand for.
        :raises ValueError: for data or a mask of another shape.
        """
        with self.plate(x, size):
            first, *rest = self._links()
            value = pyro.sample(f"z{len(rest) + 1}", dist.Normal(*self._top()).to_event(1))
            for layer in range(len(rest), 0, -1):
                value = pyro.sample(f"z{layer}", rest[layer - 1].given(value).to_event(1))
            found: Tensor = pyro.sample("x", masked_event(first.given(value), x, mask), obs=zero_filled(x, mask))
        return found

    @pyro_method
    def guide(self, x: Tensor | None = None, *, mask: Tensor | None = None, size: int | None = None) -> None:
        """The exact posterior: a chain from the data up; same arguments as the model.

        :raises ValueError: without data.
        """
        with self.plate(x := given_to_guide(x), size):
            child, shown = zero_filled(x, mask), None if mask is None else checked_mask(mask, x)
            for layer, (link, prior) in enumerate(reversed(list(self._priors())), 1):
                child = pyro.sample(f"z{layer}", link.posterior(child, prior, shown))
                shown = None

    @pyro_method
    def distribution(self) -> dist.LowRankMultivariateNormal:
        """The marginal of data, with parameters as they are now."""
        *_, (link, prior) = self._priors()
        scale = link.scale.expand(self.widths[0])
        return dist.LowRankMultivariateNormal(
            link.weight @ prior.loc + link.bias, link.weight @ prior.scale_tril, scale.square()
        )

    @torch.no_grad()
    def sample(self, num_draws: Count) -> Tensor:
        """Draws, ``(num_draws, D)``."""
        return self.distribution().sample((num_draws,))

    @pyro_method
    def log_marginal(self, x: Tensor, mask: Tensor) -> Tensor:
        """``log p`` of what was seen, ``(N,)``, in nats: exact, with what is missing integrated out.

        :param x: data, ``(N, D)``; missing entries may hold anything.
        :param mask: which numbers were seen, ``(N, D)`` or ``(D,)``, boolean.
        """
        *_, (link, prior) = self._priors()
        shown = checked_mask(mask, checked_data(x, self.widths[0]))
        x = torch.where(shown, x, 0.0)
        posterior = link.posterior(x, prior, shown)
        at = posterior.loc  # Bayes' rule holds everywhere
        seen_there = link.given(at).log_prob(x).masked_fill(~shown, 0.0).sum(-1)
        return prior.log_prob(at) + seen_there - posterior.log_prob(at)


@checked
class FactorAnalysis(GaussianBeliefNetwork):
    r"""Factor analysis: standard normal factors, linear Gaussian data with a noise of its own for each number.

    .. math:: z \sim \mathcal N(0, I), \qquad x \mid z \sim \mathcal N(W z + b, \operatorname{diag}(s^2)), \qquad
        x \sim \mathcal N(b, W W^T + \operatorname{diag}(s^2))

    Source: Bartholomew, Knott & Moustaki (2011), Latent variable models and factor analysis.

    :param num_visible: numbers in a datum.
    :param num_latents: factors.
    :param name: prefix of the parameters' names.
    :raises ValueError: for sizes below 1.

    >>> factors = FactorAnalysis(4, 2)
    >>> factors.distribution().log_prob(torch.zeros(5, 4)).shape, factors.sample(3).shape
    (torch.Size([5]), torch.Size([3, 4]))
    """

    def __init__(self, num_visible: Count, num_latents: Count, *, name: str = "factor_analysis") -> None:
        super().__init__([num_visible, num_latents], name=name)

    def _declare_top(self, layer: int, width: int) -> None:
        """Nothing to learn: it would be in the weights once more."""

    def _top(self) -> tuple[Tensor, Tensor]:
        mean = self.weight_0.new_zeros(self.widths[-1])
        return mean, torch.ones_like(mean)


@checked
class ProbabilisticPCA(FactorAnalysis):
    r"""Probabilistic principal components: factor analysis with one noise for all numbers.

    The maximum of the likelihood is known: the principal axes, each with its variance less the noise, and as noise the
    mean variance of all other axes (:meth:`maximise`).

    Source: Tipping & Bishop (1999), "Probabilistic principal component analysis".

    :param num_visible: numbers in a datum.
    :param num_latents: axes.
    :param name: prefix of the parameters' names.
    :raises ValueError: for sizes below 1.

    >>> x = torch.randn(500, 3) * torch.tensor([3.0, 1.0, 1.0])
    >>> pca = ProbabilisticPCA(3, 1)
    >>> pca.maximise(x)
    >>> bool((pca.scale_0 - 1.0).abs() < 0.1)
    True
    """

    def __init__(self, num_visible: Count, num_latents: Count, *, name: str = "probabilistic_pca") -> None:
        super().__init__(num_visible, num_latents, name=name)

    def _declare(self, layer: int, width: int, parents: int) -> None:
        super()._declare(layer, width, parents)
        self._parameter(f"scale_{layer}", torch.tensor(1.0), constraints.positive)

    @torch.no_grad()
    def maximise(self, x: Tensor) -> None:
        """The parameters that maximise the likelihood, in closed form.

        :param x: data, ``(N, D)``, without missing numbers.
        :raises ValueError: for data of another width, or as many axes as numbers, which leave no noise.
        """
        x = checked_data(x, self.widths[0])
        if self.widths[1] >= self.widths[0]:
            raise ValueError(f"num_latents={self.widths[1]}: expected fewer than the {self.widths[0]} numbers.")
        variances, axes = torch.linalg.eigh(x.T.cov(correction=0))
        rest, top = variances.split([self.widths[0] - self.widths[1], self.widths[1]])
        noise = rest.mean()
        self.weight_0 = axes[:, -self.widths[1] :] * (top - noise).sqrt()
        self.bias_0, self.scale_0 = x.mean(0), noise.sqrt()
