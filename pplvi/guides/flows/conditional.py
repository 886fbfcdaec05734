"""Families of a conditional distribution over ``D`` unconstrained coordinates, by the outputs of a network."""

from __future__ import annotations

import math
from typing import Any

import pyro.distributions as dist
import torch
from pyro.nn.module import PyroModule, PyroParam
from torch import Tensor
from torch.nn.functional import softplus

from pplvi.guides.flows.build import AffineFlowTransform, make_identity, with_tensors
from pplvi.guides.flows.import_zuko import import_zuko

__all__ = ["CONDITIONALS", "Conditional", "build_conditional", "from_noise"]


class Conditional(PyroModule):
    """Independent normals: outputs are locations and, through a softplus, scales.

    :param size: number ``D`` of coordinates.
    :param features: number of features that the outputs come from.
    :param init_scale: the scale that outputs of zero stand for.
    """

    def __init__(self, size: int, features: int, init_scale: float) -> None:
        super().__init__()
        self.size = size
        self.offset = init_scale + math.log(-math.expm1(-init_scale))  # inverse of softplus

    @property
    def num_outputs(self) -> int:
        """How many outputs the distribution takes."""
        return 2 * self.size

    def forward(self, outputs: Tensor, features: Tensor) -> dist.TorchDistribution:
        """Distribution of event shape ``(D,)`` from outputs ``(*batch, num_outputs)``."""
        return dist.Normal(*self._moments(outputs)).to_event(1)

    def moments(self, outputs: Tensor) -> tuple[Tensor, Tensor] | None:
        """Locations and marginal standard deviations, ``(*batch, D)``, of a Gaussian; ``None`` for others."""
        return self._moments(outputs)

    def _moments(self, outputs: Tensor) -> tuple[Tensor, Tensor]:
        return outputs[..., : self.size], softplus(outputs[..., self.size : 2 * self.size] + self.offset)


class DeltaConditional(Conditional):
    """A point: the outputs are the coordinates themselves."""

    @property
    def num_outputs(self) -> int:
        """As many as there are coordinates."""
        return self.size

    def forward(self, outputs: Tensor, features: Tensor) -> dist.TorchDistribution:
        """All mass at the outputs."""
        return dist.Delta(outputs, event_dim=1)

    def moments(self, outputs: Tensor) -> tuple[Tensor, Tensor] | None:
        """The outputs, without spread."""
        return outputs, torch.zeros_like(outputs)


class _FullCovariance(Conditional):
    """A multivariate normal; its scale's Cholesky factor is ``diag(scale) (I + strictly lower outputs)``."""

    @property
    def num_outputs(self) -> int:
        return 2 * self.size + self.size * (self.size - 1) // 2

    def forward(self, outputs: Tensor, features: Tensor) -> dist.TorchDistribution:
        loc, _ = self._moments(outputs)
        return dist.MultivariateNormal(loc, scale_tril=self._scale_tril(outputs))

    def _scale_tril(self, outputs: Tensor) -> Tensor:
        _, scale = self._moments(outputs)
        unit = torch.eye(self.size, dtype=outputs.dtype, device=outputs.device).expand(*scale.shape, self.size).clone()
        row, column = torch.tril_indices(self.size, self.size, -1)
        unit[..., row, column] = outputs[..., 2 * self.size :]
        return scale.unsqueeze(-1) * unit

    def moments(self, outputs: Tensor) -> tuple[Tensor, Tensor] | None:
        loc, _ = self._moments(outputs)
        return loc, self._scale_tril(outputs).square().sum(-1).sqrt()


class _ConditionalFlow(Conditional):
    """A neural spline flow that sees the features (Durkan et al. 2019), then an affine map; the identity at first."""

    def __init__(self, size: int, features: int, init_scale: float) -> None:
        super().__init__(size, features, init_scale)
        flow = import_zuko().flows.NSF(size, context=features, transforms=2).transform
        make_identity(flow, size, torch.zeros(features))
        for name, tensor in flow.named_parameters():
            setattr(self, _flat(name), PyroParam(tensor.detach()))
        for name, tensor in flow.named_buffers():
            self.register_buffer(_flat(name), tensor)
        self._structure = (flow.to("meta"),)  # a tuple, so that it is no part of this module

    def forward(self, outputs: Tensor, features: Tensor) -> dist.TorchDistribution:
        loc, scale = self._moments(outputs)
        (flow,) = self._structure
        names = [name for name, _ in (*flow.named_parameters(), *flow.named_buffers())]
        # Networks are evaluated when a draw is made or scored: with the tensors of this call.
        to_data = with_tensors(flow, {name: getattr(self, _flat(name)) for name in names})(features)
        base = dist.Normal(torch.zeros_like(loc), torch.ones_like(loc)).to_event(1)
        return dist.TransformedDistribution(base, [AffineFlowTransform(to_data, to_data.inv, loc, scale)])

    def moments(self, outputs: Tensor) -> tuple[Tensor, Tensor] | None:
        return None


def _flat(name: str) -> str:
    return "flow_" + name.replace(".", "_")


def from_noise(posterior: Any, noise: Tensor) -> tuple[Tensor, Tensor]:
    """Draws of a family from standard normal noise ``(*batch, D)``, and the log Jacobian ``(*batch)``."""
    if isinstance(posterior, dist.TransformedDistribution):
        (flow,) = posterior.transforms
        draws = flow(noise)
        return draws, flow.log_abs_det_jacobian(noise, draws).expand(draws.shape[:-1])
    if isinstance(posterior, dist.MultivariateNormal):
        factor = posterior.scale_tril
        draws, scale = posterior.loc + (factor @ noise.unsqueeze(-1)).squeeze(-1), factor.diagonal(dim1=-2, dim2=-1)
    else:
        draws, scale = posterior.base_dist.loc + posterior.base_dist.scale * noise, posterior.base_dist.scale
    return draws, scale.log().sum(-1).expand(draws.shape[:-1])


CONDITIONALS: dict[str, type[Conditional]] = {
    "normal": Conditional,
    "multivariate_normal": _FullCovariance,
    "flow": _ConditionalFlow,
    "delta": DeltaConditional,
}


def build_conditional(family: str, size: int, features: int, init_scale: float, **where: Any) -> Conditional:
    """The family's distribution over ``size`` coordinates; ``where`` are its ``device`` and ``dtype``."""
    return CONDITIONALS[family](size, features, init_scale).to(**where)
