"""LISTA: a network shaped as the iterations of a proximal method, which learns what they would need many of."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from pplvi.guides.search.lasso import soft_threshold
from pplvi.kinds.checked import checked
from pplvi.kinds.kinds import Matrix, Natural, Positive

__all__ = ["LISTA"]


@checked
class LISTA(nn.Module):
    r"""Learned iterative shrinkage and thresholding: an encoder of sparse codes.

    .. math:: z_0 = s_{\theta_0}(B v), \qquad z_{t+1} = s_{\theta_{t+1}}(B v + S z_t), \qquad
        s_\theta(x) = \operatorname{sign}(x) \max(|x| - |\theta|, 0)

    It starts as ISTA's first ``num_layers + 1`` iterations for its dictionary, and is trained to need no more: as the
    encoder of ``AutoAmortized(model, LISTA(dictionary, 7), plates="data", family="delta")``, by the codes' objective.

    Source: Gregor & LeCun (2010), "Learning fast approximations of sparse coding".

    :param dictionary: ``W``, ``(num_visible, num_codes)``.
    :param num_layers: how many after the first threshold.
    :param penalty: :math:`\lambda` of the lasso in units of the noise's variance.
    :raises ValueError: for a number of layers below zero, a penalty that is not positive, or no matrix.

    >>> network = LISTA(torch.eye(2), num_layers=3, penalty=1.0)
    >>> network(torch.tensor([[3.0, -0.5]])).detach()  # for an orthogonal dictionary ISTA ends at once
    tensor([[2., 0.]])
    """

    def __init__(self, dictionary: Matrix, num_layers: Natural, penalty: Positive = 0.1) -> None:
        super().__init__()
        atoms = dictionary.detach().T
        gram = atoms @ atoms.T
        largest = torch.linalg.eigvalsh(gram)[-1]
        self.encode = nn.Parameter(atoms.T / largest)
        self.inhibit = nn.Parameter(torch.eye(len(atoms)).to(gram) - gram / largest)
        self.thresholds = nn.Parameter((penalty / largest).expand(num_layers + 1, len(atoms)).clone())

    def forward(self, v: Tensor) -> Tensor:
        """Codes ``(*, num_codes)`` of data ``(*, num_visible)``."""
        first, *others = self.thresholds.abs().unbind(0)
        drive = v @ self.encode
        codes = soft_threshold(drive, first)
        for threshold in others:
            codes = soft_threshold(drive + codes @ self.inhibit, threshold)
        return codes
