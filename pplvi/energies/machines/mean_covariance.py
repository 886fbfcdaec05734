"""Mean-and-covariance machines: hidden units for what pixels have to do with each other, and others for their means."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import softplus

from pplvi.energies.machines.hamiltonian import HamiltonianMachine
from pplvi.kinds.checked import checked
from pplvi.kinds.kinds import Count, NonNegative, Positive
from pplvi.types import Values


@checked
class MeanCovarianceMachine(HamiltonianMachine):
    r"""The mean-and-covariance restricted Boltzmann machine (mcRBM), its hidden units summed out.

    .. math:: E(v) = \tfrac12 |v|^2 - a \cdot v - \sum_k \log\Big(1 + e^{c_k - \frac12 \sum_f P_{fk} (v^T C_f)^2}\Big)
        - \sum_j \log(1 + e^{b_j + v^T W_j})

    with ``P`` positive. Chains are moved by Hamiltonian Monte Carlo on this energy.

    :param num_visible: visible units, real.
    :param num_covariance: hidden units ``k`` that gate covariances.
    :param num_mean: hidden units ``j`` that give means.
    :param num_factors: filters ``C_f``; as many as covariance units unless given, each pooled by one of them at first.
    :param name: prefix of the parameters' names.
    :param init_scale: standard deviation of the filters at the start.
    :param step_size: of a leapfrog step, to begin with.
    :param num_leapfrog: leapfrog steps of a move.
    :raises ValueError: for numbers that are not positive.

    Source: Ranzato & Hinton (2010), "Modeling pixel means and covariances using factorized third-order Boltzmann
    machines".

    >>> machine = MeanCovarianceMachine(3, num_covariance=4, num_mean=2)
    >>> machine.model(torch.randn(5, 3))["v"].shape, machine.gibbs(machine.draw((7,)), 2)["v"].shape
    (torch.Size([5, 3]), torch.Size([7, 3]))
    """

    def __init__(
        self,
        num_visible: Count,
        *,
        num_covariance: Count,
        num_mean: Count,
        num_factors: Count | None = None,
        name: str = "",
        init_scale: NonNegative = 0.1,
        step_size: Positive = 0.2,
        num_leapfrog: Count = 10,
    ) -> None:
        super().__init__(num_visible, name=name, step_size=step_size, num_leapfrog=num_leapfrog)
        factors = num_covariance if num_factors is None else num_factors
        pooled = torch.arange(factors).unsqueeze(-1) % num_covariance == torch.arange(num_covariance)
        self.filters = torch.nn.Parameter(init_scale * torch.randn(num_visible, factors))
        self.pooling = torch.nn.Parameter(torch.where(pooled, 0.5, -4.0))
        self.bias_covariance = torch.nn.Parameter(torch.ones(num_covariance))
        self.weight_mean = torch.nn.Parameter(init_scale * torch.randn(num_visible, num_mean))
        self.bias_mean = torch.nn.Parameter(torch.full((num_mean,), -1.0))

    def energy(self, values: Values) -> Tensor:
        """``E(v)``, ``(*batch)``, in nats."""
        v, own = values["v"], self._parameters
        squares = (v @ self._found(own, "filters")) ** 2 @ softplus(self._found(own, "pooling"))
        means = softplus(v @ self._found(own, "weight_mean") + self._found(own, "bias_mean"))
        return self.base_energy(values) + self._covariance(squares) - means.sum(-1)

    def _covariance(self, squares: Tensor) -> Tensor:
        """What the covariance units, summed out, make of pooled squares, ``(*batch)``."""
        return -softplus(self._found(self._parameters, "bias_covariance") - squares / 2).sum(-1)


class MeanProductOfStudents(MeanCovarianceMachine):
    r"""The mean product of Student's t machine (mPoT): covariance units with Gamma distributions, summed out.

    .. math:: E(v) = \tfrac12 |v|^2 - a \cdot v + \sum_k \gamma_k \log\Big(1 + \tfrac12 \sum_f P_{fk} (v^T C_f)^2\Big)
        - \sum_j \log(1 + e^{b_j + v^T W_j}), \qquad \gamma_k = \log(1 + e^{c_k})

    Parameters are those of :class:`MeanCovarianceMachine`.

    Source: Ranzato, Mnih & Hinton (2010), "Generating more realistic images using gated MRF's"; Welling, Hinton &
    Osindero (2002) for products of Student's t.

    >>> MeanProductOfStudents(3, num_covariance=4, num_mean=2).free_energy(torch.zeros(2, 3)).shape
    torch.Size([2])
    """

    def _covariance(self, squares: Tensor) -> Tensor:
        degrees = softplus(self._found(self._parameters, "bias_covariance"))
        return (degrees * torch.log1p(squares / 2)).sum(-1)
