"""What draws of a model are like, whether or not it has a density: copies of its data, and modes that it leaves out."""

from __future__ import annotations

from importlib.util import find_spec
from typing import NamedTuple

import torch
from torch import Tensor

from pplvi.kinds.checked import checked
from pplvi.kinds.kinds import Matrix, Positive

__all__ = ["ModeCoverage", "Neighbours", "mode_coverage", "nearest_neighbours"]

_COMMON = 0.05  # share of unseen data that are as near to the training data as what is called a copy
_NEIGHBOURS = 5


class Neighbours(NamedTuple):
    """The data that are nearest to samples.

    :ivar indices: which datum, ``(num_samples,)``.
    :ivar distance: Euclidean distance; of binary units the root of the number of units that differ.
    """

    indices: Tensor
    distance: Tensor


@checked
def nearest_neighbours(samples: Matrix, data: Matrix) -> Neighbours:
    """The training datum that is nearest to each sample: a model that copies its data has distances near 0.

    :param samples: ``(num_samples, width)``.
    :param data: ``(num_data, width)``.
    :raises ValueError: for different widths or no data.

    >>> nearest_neighbours(torch.tensor([[1.0, 1.0]]), torch.tensor([[0.0, 0.0], [1.0, 0.0]]))
    Neighbours(indices=tensor([1]), distance=tensor([1.]))
    """
    if not len(data) or samples.shape[-1] != data.shape[-1]:
        raise ValueError(
            f"samples of shape {tuple(samples.shape)} and data of shape {tuple(data.shape)}: expected some data, and "
            "the same width. Flatten images."
        )
    distance, index = torch.cdist(samples, data).min(1)
    return Neighbours(index, distance)


class ModeCoverage(NamedTuple):
    """Which of the known modes draws come to.

    :ivar covered: modes with at least a fifth of the draws that they would have if all had as many.
    :ivar share: of the draws that are within the radius of any mode.
    :ivar counts: draws of each mode.
    """

    covered: int
    share: float
    counts: Tensor


@checked
def mode_coverage(samples: Matrix, centres: Matrix, radius: Positive) -> ModeCoverage:
    """Count the modes that draws come to, where these are known.

    Source: Srivastava et al. (2017), "VEEGAN: reducing mode collapse in GANs using implicit variational learning".

    :param samples: draws, ``(num_samples, width)``.
    :param centres: of the modes, ``(num_modes, width)``.
    :param radius: how far from its centre a draw is of the mode; three or four of its standard deviations.
    :raises ValueError: for different widths, or a radius that is not positive.

    >>> mode_coverage(torch.tensor([[0.0], [0.1], [5.0]]), torch.tensor([[0.0], [1.0]]), radius=0.5).covered
    1
    """
    if not radius > 0:
        raise ValueError(f"radius={radius!r}: expected a positive number.")
    index, distance = nearest_neighbours(samples, centres)
    counts = torch.bincount(index[distance <= radius], minlength=len(centres))
    covered = int((counts >= 0.2 * len(samples) / len(centres)).sum())
    return ModeCoverage(covered, float((distance <= radius).double().mean()), counts)


def likeness(samples: Matrix, train: Tensor | None, test: Tensor) -> dict[str, float]:
    """Numbers of draws beside those of unseen data.

    ``nearest``: their mean distance to the training data over that of test data; ``copies``: the share that is as near
    as only 5 % of test data are; ``precision`` and ``coverage`` of test data (Kynkäänniemi et al. 2019; Naeem et al.
    2020), with the package ``prdc``.

    >>> x = torch.arange(10.0)[:, None]
    >>> likeness(x, x, x + 0.4)["nearest"]
    0.0
    """
    found = {}
    if train is not None:
        own, other = nearest_neighbours(samples, train).distance, nearest_neighbours(test, train).distance
        found["nearest"] = float(own.mean() / other.mean())
        found["copies"] = float((own < torch.quantile(other, _COMMON)).double().mean())
    if find_spec("prdc") is not None:
        from prdc import compute_prdc

        numbers = compute_prdc(test.cpu().numpy(), samples.cpu().numpy(), nearest_k=_NEIGHBOURS)
        found |= {name: float(numbers[name]) for name in ("precision", "coverage")}
    return found
