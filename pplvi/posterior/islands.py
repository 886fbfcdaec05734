"""What islands of particles say: the evidence by their mean, its error by their spread, and effective draws."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from pyro.ops.stats import effective_sample_size
from torch import Tensor

from pplvi.weights.algebra import logmeanexp

_QUANTILES = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571, 7: 2.447, 8: 2.365, 9: 2.306, 10: 2.262}
_NORMAL = 1.96
_COLUMNS = 16  # scalars whose autocorrelations are computed at once


def evidence_of_islands(evidence: Tensor) -> tuple[Tensor, Tensor]:
    r"""Log evidence and its standard error, by islands that are independent.

    .. math:: \log \hat Z = \log \frac1I \sum_i \hat Z_i, \qquad
        \text{error} = \frac{t_{I - 1}}{1.96}\, \frac{\text{sd}_i(\hat Z_i)}{\hat Z \sqrt I}

    The factor, of the 97.5 % quantiles of Student's t and the normal distribution, is for the spread of few islands
    being uncertain itself: 1.96 errors hold in 19 of 20 runs.

    Source: Lee and Whiteley 2018, Variance estimation in the particle filter.

    :param evidence: by each island, ``(islands,)``, in nats.
    :returns: two scalars, in nats.

    >>> evidence_of_islands(torch.tensor([0.1, -0.1, 0.1, -0.1]))
    (tensor(0.0050), tensor(0.0934))
    """
    value = logmeanexp(evidence)
    islands = len(evidence)
    wider = _QUANTILES.get(islands, _NORMAL) / _NORMAL
    return value, wider * (evidence - value).exp().std() / math.sqrt(islands)


def smallest_ess(values: Iterable[Tensor], num_chains: int) -> Tensor:
    """The effective sample size of the worst scalar, of rank-normalised draws: variances need not exist.

    Source: Vehtari, Gelman, Simpson, Carpenter and Buerkner 2021, Rank-normalization, folding, and localization.

    :param values: draws of sites, ``(num_chains * draws, ...)``, one chain after another.

    >>> _ = torch.manual_seed(0)
    >>> bool(smallest_ess([torch.randn(4000)], 4) > 3000)
    True
    """
    columns = [part for value in values for part in value.reshape(len(value), -1).split(_COLUMNS, 1)]
    found = [effective_sample_size(_ranked(part).reshape(num_chains, -1, part.shape[1])) for part in columns]
    return torch.stack([each.nan_to_num(0.0).min() for each in found if each.numel()]).min()


def _ranked(draws: Tensor) -> Tensor:
    """Normal quantiles of the ranks of draws ``(S, n)``."""
    ranks = draws.argsort(0).argsort(0).double() + 1
    return torch.special.ndtri((ranks - 0.375) / (len(draws) + 0.25))
