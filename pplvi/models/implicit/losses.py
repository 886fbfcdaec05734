"""Losses of models that have draws and no density: moments of kernels, and a discriminator."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn.functional import softplus

from pplvi.kinds.checked import checked
from pplvi.kinds.kinds import Positive
from pplvi.losses.base import Loss
from pplvi.types import Program

__all__ = ["Adversarial", "MomentMatching", "maximum_mean_discrepancy"]


@checked
def maximum_mean_discrepancy(x: Tensor, y: Tensor, bandwidths: Sequence[Positive] = (2.0, 5.0, 10.0, 20.0)) -> Tensor:
    r"""Squared distance of two distributions in the mean of a mixture of Gaussian kernels, without bias.

    .. math:: \text{MMD}^2 = E[k(x, x')] - 2 E[k(x, y)] + E[k(y, y')], \qquad
        k(x, y) = \sum_s e^{-\lVert x - y \rVert^2 / 2 s^2}

    Zero if and only if the distributions are the same; estimates from draws of the same ones scatter around zero, below
    it as often as above. Pairs of a draw with itself are left out.

    Source: Gretton et al. (2012), "A kernel two-sample test".

    :param x: draws of one distribution, ``(N, D)``, at least 2.
    :param y: draws of the other, ``(M, D)``, at least 2.
    :param bandwidths: ``s``, in units of the data.
    :returns: the estimate, a scalar, between -2 and 2 for each bandwidth.
    :raises ValueError: for fewer than two draws of either, other shapes, or bandwidths that are not positive.

    >>> x = torch.tensor([[0.0], [1.0]])
    >>> bool(maximum_mean_discrepancy(x, x + 100.0) > 2.0)
    True
    """
    _check(x, y, bandwidths)

    def mean(a: Tensor, b: Tensor, same: bool) -> Tensor:
        square = a.square().sum(-1)[:, None] - 2 * a @ b.T + b.square().sum(-1)
        kernel = torch.stack([torch.exp(square / (-2 * s * s)) for s in bandwidths]).sum(0)
        if not same:
            return kernel.mean()
        return (kernel.sum() - kernel.diagonal().sum()) / (len(a) * (len(a) - 1))

    return mean(x, x, True) - 2 * mean(x, y, False) + mean(y, y, True)


def _check(x: Any, y: Any, bandwidths: Sequence[Positive]) -> None:
    for name, draws in (("x", x), ("y", y)):
        if not isinstance(draws, Tensor) or draws.dim() != 2 or len(draws) < 2 or draws.shape[1] != x.shape[1]:
            came = tuple(draws.shape) if isinstance(draws, Tensor) else type(draws).__name__
            raise ValueError(f"{name} is {came}: expected at least two draws (N, D), of equal width. Flatten images.")
    if not bandwidths or not all(s > 0 for s in bandwidths):
        raise ValueError(f"bandwidths={tuple(bandwidths)}: expected positive numbers.")


@checked
class MomentMatching(Loss):
    r"""Squared maximum mean discrepancy of a model's draws from the data: generative moment matching.

    For every model that returns draws, such as :class:`pplvi.Generator`; the guide has nothing to do. The estimate has
    no bias (:func:`pplvi.models.maximum_mean_discrepancy`), but its noise falls with the batch: with 50 data the
    gradient says little of what 500 show. ``monitor`` is ``None``.

    Source: Li, Swersky & Zemel (2015), "Generative moment matching networks"; Dziugaite, Roy & Ghahramani (2015).

    :param bandwidths: of the Gaussian kernels, in units of the data.
    :raises ValueError: for bandwidths that are not positive; at the first step, for a model that returns no draws.

    >>> import pyro
    >>> from pplvi import Generator
    >>> generator = Generator(torch.nn.Linear(1, 2), 1)
    >>> svi = pyro.infer.SVI(generator.model, generator.guide, pyro.optim.Adam({"lr": 0.1}), MomentMatching([1.0, 3.0]))
    >>> losses = [svi.step(torch.ones(20, 2)) for _ in range(50)]
    >>> losses[-1] < 0.5 * losses[0]
    True
    """

    compares_draws: ClassVar[bool] = True

    def __init__(self, bandwidths: Sequence[Positive] = (2.0, 5.0, 10.0, 20.0)) -> None:
        super().__init__()
        if not bandwidths or not all(s > 0 for s in bandwidths):
            raise ValueError(f"bandwidths={tuple(bandwidths)}: expected positive numbers.")
        self.bandwidths = tuple(bandwidths)

    def differentiable_loss(self, model: Program, guide: Program, *args: Any, **kwargs: Any) -> Tensor:
        """The squared discrepancy of the first argument from what the model returns."""
        data, draws = _both(model, args, kwargs)
        return maximum_mean_discrepancy(data, draws, self.bandwidths)

    def __repr__(self) -> str:
        return f"MomentMatching({self.bandwidths})"


@checked
class Adversarial(Loss):
    r"""Generative adversarial training: the guide tells data from draws, and the model learns to mislead it.

    .. math:: \min_D -E \log D(x) - E \log(1 - D(g(z))), \qquad \min_g -E \log D(g(z))

    For every model that returns draws; ``guide(x)`` returns log odds of being data, ``(N,)``, with which it has nothing
    else to do. Each learns by its own objective in one step; give them rates of their own by
    ``optim={"model": ..., "guide": ...}``. The value is the discriminator's loss: at ``D = p / (p + q)`` it is
    ``2 log 2 - 2 JS(p, q)`` nats, and ``log 4`` where draws are as the data. ``monitor`` is ``None``.

    Source: Goodfellow et al. (2014), "Generative adversarial networks".

    :param saturating: the model minimises ``E log(1 - D)`` instead, the other player's loss with its sign changed
        (minimax), whose gradient vanishes where the discriminator is sure.
    :raises ValueError: at the first step, for programs that do not return draws and log odds.

    >>> import pyro
    >>> from pplvi import Generator
    >>> generator, network = Generator(torch.nn.Linear(1, 2), 1), torch.nn.Linear(2, 1)
    >>> def discriminator(x):
    ...     return pyro.module("discriminator", network)(x).squeeze(-1)
    >>> svi = pyro.infer.SVI(generator.model, discriminator, pyro.optim.Adam({"lr": 0.01}), Adversarial())
    >>> svi.step(torch.ones(20, 2)) > 0
    True
    """

    compares_draws: ClassVar[bool] = True

    def __init__(self, *, saturating: bool = False) -> None:
        super().__init__()
        self.saturating = saturating

    def differentiable_loss(self, model: Program, guide: Program, *args: Any, **kwargs: Any) -> Tensor:
        """The discriminator's loss, in nats, with both players' gradients."""
        data, draws = _both(model, args, kwargs)
        with torch.enable_grad():
            shown = draws.detach().requires_grad_()
            fake, real = guide(shown, *args[1:], **kwargs), guide(data, *args[1:], **kwargs)
            _check_odds(fake, real, len(data))
            fooled = -softplus(fake) if self.saturating else softplus(-fake)
            (pull,) = torch.autograd.grad(fooled.mean(), shown, retain_graph=True)
        loss = softplus(-real).mean() + softplus(fake).mean()
        pulled = (pull * draws).sum()
        return loss + (pulled - pulled.detach())

    def __repr__(self) -> str:
        return f"Adversarial(saturating={self.saturating})"


def _both(model: Program, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """The data, and what the model returns for them."""
    data, draws = next(iter((*args, *kwargs.values())), None), model(*args, **kwargs)
    if not isinstance(data, Tensor) or not isinstance(draws, Tensor) or data.shape[1:] != draws.shape[1:]:
        came = [tuple(x.shape) if isinstance(x, Tensor) else type(x).__name__ for x in (data, draws)]
        raise ValueError(
            f"data and draws of shapes {came}: expected the data as the first argument, and a model that returns draws "
            "like them, such as Generator(network, num_latents).model."
        )
    return data, draws


def _check_odds(fake: Any, real: Any, count: int) -> None:
    for odds in (fake, real):
        if not isinstance(odds, Tensor) or tuple(odds.shape) != (count,):
            came = tuple(odds.shape) if isinstance(odds, Tensor) else type(odds).__name__
            raise ValueError(f"the discriminator returned {came}: expected log odds of being data, ({count},).")
