"""R-hat and effective sample size of many scalars at once, as ArviZ computes them one by one."""

from __future__ import annotations

import math

import torch
from torch import Tensor

_MOST_ELEMENTS = 2**17  # of chains at once, for the caches' sake
_LEAST = 4  # draws of a chain


def rhat_and_ess(chains: Tensor) -> tuple[Tensor, Tensor]:
    r"""R-hat and bulk effective sample size of every column.

    .. math:: \hat R = \max_{z} \sqrt{\frac{n - 1}{n} + \frac{B(z)}{n W(z)}}, \qquad
        \mathrm{ESS} = \frac{m n}{\max(-1 + 2 \sum_{k < L} P_k + \rho_{2 L}^+,\ 1 / \log_{10} (m n))}

    over the ``m`` halves of the chains, ``n`` draws each: ``B`` and ``W`` are the variances between and within them of
    rank-normalised draws ``z``, and of rank-normalised distances to the median; ``P`` are sums of autocorrelations
    of ``z`` in pairs as long as they are positive, none larger than the one before.

    Source: Vehtari, Gelman, Simpson, Carpenter and Buerkner 2021, Rank-normalization, folding, and localization: an
    improved R-hat for assessing convergence of MCMC, Bayesian Analysis 16(2).

    :param chains: ``(chains, draws, columns)``.
    :returns: R-hat ``(columns,)``, NaN for a single chain, and ESS ``(columns,)``; both NaN with fewer than 4 draws and
        where values are not finite, R-hat where they never vary.

    >>> rhat, ess = rhat_and_ess(torch.randn(4, 1000, 2, generator=torch.Generator().manual_seed(0)))
    >>> bool((rhat < 1.01).all()), bool((ess > 3_000).all())
    (True, True)
    """
    num_chains, num_draws, num_columns = chains.shape
    if num_draws < _LEAST or not num_columns:
        unknown = chains.new_full((num_columns,), math.nan).double().cpu()
        return unknown, unknown
    half = num_draws // 2
    split = torch.cat([chains[:, :half], chains[:, -half:]]).permute(2, 0, 1).cpu()  # (columns, 2 chains, half)
    size = max(1, _MOST_ELEMENTS // (2 * num_chains * half))
    parts = [_of_halves(part.double()) for part in split.split(size)]
    rhat, ess = (torch.cat(found) for found in zip(*parts, strict=True))
    return rhat if num_chains > 1 else torch.full_like(rhat, math.nan), ess


def _of_halves(halves: Tensor) -> tuple[Tensor, Tensor]:
    normal, middle = _normalised(halves)
    folded, _ = _normalised((halves - middle[:, None, None]).abs())
    finite = halves.isfinite().flatten(1).all(1)
    return torch.maximum(_rhat(normal), _rhat(folded)).where(finite, math.nan), _ess(normal).where(finite, math.nan)


def _normalised(values: Tensor) -> tuple[Tensor, Tensor]:
    """Normal quantiles of the ranks of each row of ``(columns, ...)``, and the median of each.

    Equal values share the mean of their ranks.
    """
    flat = values.flatten(1)
    places = torch.from_numpy(flat.numpy().argsort(1))  # five times as fast as torch's
    ordered = flat.gather(1, places)
    number = ordered.shape[1]
    position = torch.arange(number)
    twice = (2 * position + 2).expand_as(ordered)  # a rank
    new = ordered[:, 1:] != ordered[:, :-1]
    if not bool(new.all()):
        edge = new.new_ones(len(new), 1)
        first = torch.where(torch.cat([edge, new], 1), position, 0).cummax(1).values
        last = torch.where(torch.cat([new, edge], 1), position, number).flip(1).cummin(1).values.flip(1)
        twice = first + last + 2
    quantiles = torch.special.ndtri((0.5 * torch.arange(2 * number + 1).to(values) - 0.375) / (number + 0.25))
    normal = torch.empty_like(ordered).scatter_(1, places, quantiles[twice])
    return normal.reshape(values.shape), 0.5 * (ordered[:, (number - 1) // 2] + ordered[:, number // 2])


def _rhat(values: Tensor) -> Tensor:
    """R-hat ``(columns,)`` of chains ``(columns, chains, draws)``."""
    size = values.shape[-1]
    between, within = values.mean(-1).var(-1), values.var(-1).mean(-1)
    return ((size - 1) / size + between / within).sqrt()


def _ess(values: Tensor) -> Tensor:
    """Effective sample size ``(columns,)`` by Geyer's initial monotone sequence."""
    columns, chains, size = values.shape
    centered = values - values.mean(-1, keepdim=True)
    spectrum = torch.fft.rfft(centered, n=2 ** math.ceil(math.log2(2 * size)))
    covariance = torch.fft.irfft(spectrum.abs().square())[..., :size].mean(1) / size
    within = covariance[:, :1] * size / (size - 1)
    total = covariance[:, :1] + (values.mean(-1).var(-1)[:, None] if chains > 1 else 0.0)
    correlation = 1 - (within - covariance) / total
    correlation[:, 0] = 1.0
    last = max((size - 3) // 2, 0)  # the last pair that is looked at
    pairs = correlation[:, : 2 * last + 2].reshape(columns, last + 1, 2).sum(-1)
    length = ((pairs > 0).cumprod(1).sum(1)).clamp(max=last)
    kept = torch.arange(last + 1) < length[:, None]
    monotone = pairs.cummin(1).values
    rest = correlation.gather(1, 2 * length[:, None])[:, 0]
    rest = torch.where(pairs.gather(1, length[:, None])[:, 0] >= 0, rest, rest.clamp(min=0))
    tau = -1 + 2 * (monotone * kept).sum(1) + rest
    found = chains * size / tau.clamp(min=1 / math.log10(chains * size))
    level = (values.amax((1, 2)) - values.amin((1, 2))) < 1e-15
    return found.where(~level, float(chains * size))
