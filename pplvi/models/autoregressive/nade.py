"""Neural autoregressive distribution estimators of binary data, and of numbers (RNADE)."""

from __future__ import annotations

from typing import Any, Literal

import pyro.distributions as dist
import torch
from pyro.distributions import constraints
from pyro.nn import pyro_method
from torch import Tensor, nn
from torch.nn.functional import softplus

from pplvi.kinds.checked import checked
from pplvi.kinds.kinds import Count, Natural, Number
from pplvi.models.autoregressive.distributions import AutoregressiveDistribution
from pplvi.models.autoregressive.kernel import nade_logits
from pplvi.models.autoregressive.model import AutoregressiveModel, BinaryAutoregressiveModel
from pplvi.models.autoregressive.walk import OutputCells
from pplvi.programs.calls import check_counts

__all__ = ["NADE", "RNADE", "BernoulliNADE", "MixtureNADE"]


class BernoulliNADE(AutoregressiveDistribution):
    r"""Binary numbers, each from the hidden states that those before it make: see :class:`NADE`.

    :param weight: ``W``, ``(D, H)``.
    :param output: ``V``, ``(D, H)``.
    :param bias: ``b``, ``(D,)`` or ``(*batch, D)``.
    :param hidden: ``c``, ``(H,)`` or ``(*batch, H)``.

    >>> p = BernoulliNADE(torch.zeros(3, 2), torch.zeros(3, 2), torch.zeros(3), torch.zeros(2))
    >>> p.log_prob(torch.ones(3))  # fair coins
    tensor(-2.0794)
    """

    def __init__(self, weight: Tensor, output: Tensor, bias: Tensor, hidden: Tensor) -> None:
        super().__init__(len(weight), bias, torch.broadcast_shapes(bias.shape[:-1], hidden.shape[:-1]))
        self.weight, self.output, self.bias, self.hidden = weight, output, bias, hidden

    def logits(self, x: Tensor) -> Tensor:
        """Log odds of every number given those before it, ``(*, D)``."""
        hidden = self.hidden.expand(*x.shape[:-1], -1).reshape(-1, self.hidden.shape[-1])
        found = nade_logits(x.reshape(-1, x.shape[-1]), self.weight, self.output, hidden)
        return found.reshape(x.shape) + self.bias

    def conditionals(self, x: Tensor) -> dist.TorchDistribution:
        """Coins."""
        return dist.Bernoulli(logits=self.logits(x), validate_args=False)

    @torch.no_grad()
    def complete(self, x: Tensor, observed: Tensor) -> Tensor:
        """Draw what is missing; a hidden state is carried along."""
        rows = x.shape[:-1].numel()
        hidden, bias = (part.expand(*x.shape[:-1], -1).reshape(rows, -1) for part in (self.hidden, self.bias))
        order = torch.arange(x.shape[-1], device=x.device).expand(rows, -1)
        cells = OutputCells(hidden, self.weight, None, self.output, bias)
        return cells.filled(order, x.reshape(rows, -1), observed.reshape(rows, -1)).reshape(x.shape)


@checked
class NADE(BinaryAutoregressiveModel):
    r"""The neural autoregressive distribution estimator of binary data.

    .. math:: p(x_d = 1 \mid x_{<d}) = \sigma\Big(b_d + V_d \cdot \sigma\big(c + \sum_{i<d} x_i W_i\big)\Big)

    With ``V = W`` these log odds are those of one step of mean field in the restricted Boltzmann machine with these
    weights, from zero, given the numbers before. All log odds take one pass, and its gradient another
    (:func:`pplvi.models.autoregressive.kernel.nade_logits`).

    Source: Larochelle & Murray (2011), "The neural autoregressive distribution estimator"; Boulanger-Lewandowski,
    Bengio & Vincent (2012) for biases that a recurrent network gives (``given=`` its state).

    :param num_visible: ``D``.
    :param num_hidden: ``H``.
    :param given: numbers that biases are linear functions of, none unless given.
    :param tied: ``V = W``.
    :param init_scale: standard deviation of the weights at the start.
    :param name: prefix of the parameters' names.
    :raises ValueError: for sizes below 1.

    >>> import pyro
    >>> nade = NADE(4, 3, init_scale=0.0)
    >>> nade.distribution().log_prob(torch.ones(4)).detach()
    tensor(-2.7726)
    >>> x = torch.tensor([[1.0, 1.0, 0.0, 0.0]]).expand(20, 4)
    >>> svi = pyro.infer.SVI(nade.model, nade.guide, pyro.optim.Adam({"lr": 0.1}), pyro.infer.Trace_ELBO())
    >>> losses = [svi.step(x) for _ in range(50)]
    >>> bool(nade.distribution().log_prob(x[0]) > -0.5)
    True
    """

    def __init__(
        self,
        num_visible: Count,
        num_hidden: Count,
        *,
        given: Natural = 0,
        tied: bool = False,
        init_scale: Number = 0.05,
        name: str = "nade",
    ) -> None:
        super().__init__(num_visible, name, given)
        check_counts(num_hidden=num_hidden)
        self.weight = nn.Parameter(init_scale * torch.randn(num_visible, num_hidden))
        self.output = None if tied else nn.Parameter(init_scale * torch.randn(num_visible, num_hidden))
        self.bias = nn.Parameter(torch.zeros(num_visible))
        self.hidden_bias = nn.Parameter(torch.zeros(num_hidden))
        if given:
            self.given_weight = nn.Parameter(init_scale * torch.randn(given, num_visible))
            self.given_hidden = nn.Parameter(init_scale * torch.randn(given, num_hidden))

    @pyro_method
    def distribution(self, given: Tensor | None = None) -> BernoulliNADE:
        """The distribution of data, with parameters as they are now.

        :param given: ``(*batch, given)``, where the model has conditions.
        """
        self.check_given(given)
        bias: Tensor = self.bias
        hidden: Tensor = self.hidden_bias
        if given is not None:
            bias, hidden = bias + given @ self.given_weight, hidden + given @ self.given_hidden
        weight = self.weight
        return BernoulliNADE(weight, weight if self.output is None else self.output, bias, hidden)


class MixtureNADE(AutoregressiveDistribution):
    """Numbers, each from a mixture that hidden states of those before it parametrise: see :class:`RNADE`.

    :param weight: ``(D, H)``.
    :param hidden: ``(H,)``.
    :param rescale: ``(D,)``.
    :param heads: ``(D, 3, C, H)``: of log weights, locations and inverse softplus scales.
    :param bias: the same without ``H``.
    :param kernel: ``Normal`` or ``Laplace``.
    """

    def __init__(
        self, weight: Tensor, hidden: Tensor, rescale: Tensor, heads: Tensor, bias: Tensor, kernel: Any
    ) -> None:
        super().__init__(len(weight), bias)
        self.weight, self.hidden, self.rescale, self.heads, self.bias = weight, hidden, rescale, heads, bias
        self.kernel = kernel

    @property
    def support(self) -> Any:
        """The reals."""
        return constraints.real_vector

    def conditionals(self, x: Tensor) -> dist.TorchDistribution:
        """Mixtures."""
        added = x.unsqueeze(-1) * self.weight
        state = self.hidden + added.cumsum(-2) - added
        return self._mixture(state, slice(None))

    def _mixture(self, state: Tensor, which: slice) -> dist.TorchDistribution:
        """The mixtures of some numbers, from their states ``(*, D', H)``."""
        h = torch.relu(self.rescale[which, None] * state)
        outputs = torch.einsum("...dh,dkch->k...dc", h, self.heads[which]) + self._spread(h, which)
        logits, loc, scale = outputs.unbind(0)
        parts = self.kernel(loc, softplus(scale) + 1e-4, validate_args=False)
        return dist.MixtureSameFamily(dist.Categorical(logits=logits, validate_args=False), parts, validate_args=False)

    def _spread(self, h: Tensor, which: slice) -> Tensor:
        bias = self.bias[which].transpose(0, 1)  # (3, D', C)
        return bias.reshape(3, *[1] * (h.dim() - 2), *bias.shape[1:])

    @torch.no_grad()
    def complete(self, x: Tensor, observed: Tensor) -> Tensor:
        """Draw what is missing; a hidden state is carried along."""
        x = torch.where(observed, x, 0.0)
        state = self.hidden.expand(*x.shape[:-1], -1)
        for d in self.order:
            drawn = self._mixture(state.unsqueeze(-2), slice(d, d + 1)).sample()[..., 0]
            x[..., d] = torch.where(observed[..., d], x[..., d], drawn)
            state = state + x[..., d : d + 1] * self.weight[d]
        return x


@checked
class RNADE(AutoregressiveModel):
    r"""The real-valued neural autoregressive density estimator.

    .. math:: p(x_d \mid x_{<d}) = \sum_c \pi_{dc}(h_d)\, K\big(x_d; \mu_{dc}(h_d), s_{dc}(h_d)\big), \qquad
        h_d = \max\Big(0, \rho_d \big(c + \sum_{i<d} x_i W_i\big)\Big)

    Standardise data first.

    Source: Uria, Murray & Larochelle (2013), "RNADE: the real-valued neural autoregressive density-estimator".

    :param num_visible: ``D``.
    :param num_hidden: hidden units.
    :param components: of each mixture.
    :param family: ``"normal"`` or ``"laplace"``.
    :param name: prefix of the parameters' names.
    :raises ValueError: for sizes below 1, or another family.

    >>> rnade = RNADE(2, 8, components=3)
    >>> rnade.distribution().log_prob(torch.zeros(5, 2)).shape, rnade.sample(4).shape
    (torch.Size([5]), torch.Size([4, 2]))
    """

    def __init__(
        self,
        num_visible: Count,
        num_hidden: Count,
        *,
        components: Count = 10,
        family: Literal["normal", "laplace"] = "normal",
        name: str = "rnade",
    ) -> None:
        super().__init__(num_visible, name)
        check_counts(num_hidden=num_hidden, components=components)
        kernels: dict[str, Any] = {"normal": dist.Normal, "laplace": dist.Laplace}
        if family not in kernels:
            raise ValueError(f"family={family!r}: expected 'normal' or 'laplace'.")
        self._kernel = kernels[family]
        self.weight = nn.Parameter(torch.randn(num_visible, num_hidden) * num_visible**-0.5)
        self.hidden_bias = nn.Parameter(torch.zeros(num_hidden))
        self.rescale = nn.Parameter((1.0 + torch.arange(num_visible)).rsqrt())
        self.heads = nn.Parameter(0.1 * torch.randn(num_visible, 3, components, num_hidden) * num_hidden**-0.5)
        bias = torch.zeros(num_visible, 3, components)
        bias[:, 1] = torch.linspace(-1, 1, components) if components > 1 else 0.0
        bias[:, 2] = 0.5
        self.bias = nn.Parameter(bias)

    @pyro_method
    def distribution(self, given: Tensor | None = None) -> MixtureNADE:
        """The distribution of data, with parameters as they are now."""
        self.check_given(given)
        return MixtureNADE(self.weight, self.hidden_bias, self.rescale, self.heads, self.bias, self._kernel)
