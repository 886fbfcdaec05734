"""Between zuko's lazy flows and a guide: build one, make it the identity, and run it on given parameters.

zuko writes a flow as a transform from data to base; its inverse draws. Here the direction is a flag, and a call returns
the value and the log-determinant together.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from types import MappingProxyType, ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.distributions import Distribution, Independent, Normal, Transform, constraints

from pplvi.guides.flows.bnaf import BlockNeuralFlow
from pplvi.guides.flows.copula import gaussian_copula
from pplvi.guides.flows.import_zuko import import_zuko
from pplvi.guides.flows.quadratic import QuadraticFlow
from pplvi.programs.errors import warn
from pplvi.programs.state import is_recording

MUCH = 2 * 2**30  # bytes

__all__ = ["FAMILIES", "AffineFlowTransform", "build", "make_identity", "with_tensors"]


class FlowFamily(NamedTuple):
    """A family of flows: a class in ``zuko.flows`` or a factory, and what is not said when it is named.

    :ivar draws_fast: whether drawing is the fast direction.
    :ivar options: keywords for the factory.
    """

    factory: Any
    draws_fast: bool
    options: Mapping[str, Any] = MappingProxyType({})


FAMILIES = {
    # Two passes: couplings, whose densities of any points cost as much in every dimension.
    "nsf": FlowFamily("NSF", True, MappingProxyType({"passes": 2})),
    "maf": FlowFamily("MAF", False),
    "iaf": FlowFamily("MAF", True),
    "nice": FlowFamily("NICE", False),
    "coupling": FlowFamily("NICE", False),
    "copula": FlowFamily(gaussian_copula, True),
    "quadratic": FlowFamily(QuadraticFlow, True),
    "bnaf": FlowFamily(BlockNeuralFlow, True),
}


def build(flow: Any, features: int, options: Mapping[str, Any]) -> nn.Module:
    """The lazy transform of a flow over ``features`` coordinates, a copy of its own.

    :param flow: a name in :data:`FAMILIES`, a factory ``features -> zuko.lazy.Flow``, or a ``zuko.lazy.Flow``.
    :param features: number of unconstrained coordinates.
    :param options: keywords for the factory.
    :raises ValueError: not a flow, a base other than the standard normal, or a flow over another number of features.
    """
    zuko = import_zuko()
    if isinstance(flow, str):
        flow, _, unsaid = FAMILIES[flow]
        options = {**unsaid, **options}
    factory = getattr(zuko.flows, flow) if isinstance(flow, str) else flow
    made = copy.deepcopy(flow) if isinstance(flow, nn.Module) else _call(factory, features, options)
    if isinstance(made, (QuadraticFlow, BlockNeuralFlow)):
        return made
    if not isinstance(made, zuko.lazy.Flow):
        raise ValueError(
            f"flow gave {type(made).__name__}; expected a zuko.lazy.Flow (a transform and a base), for example "
            "zuko.flows.NSF or lambda features: zuko.flows.NSF(features, transforms=5)"
        )
    _check_base(made.base)
    _check_features(made.transform, features)
    return made.transform


def _call(factory: Callable[..., Any], features: int, options: Mapping[str, Any]) -> Any:
    try:
        return factory(features, **options)
    except TypeError as error:
        raise ValueError(
            f"the flow's factory did not take ({features}, {', '.join(map(str, options))}): {error}. Expected the "
            "number of features and keywords that it knows."
        ) from error


def _check_base(base: nn.Module) -> None:
    if any(True for _ in base.parameters()) or not _is_standard_normal(base()):
        raise ValueError(
            f"the flow's base is {base}; expected the fixed standard normal that zuko's real-line flows come with. "
            "Flows over a bounded or circular space and mixtures do not cover the unconstrained latents."
        )


def _is_standard_normal(base: Distribution) -> bool:
    normal = base.base_dist if isinstance(base, Independent) else base
    return isinstance(normal, Normal) and bool((normal.loc == 0).all() and (normal.scale == 1).all())


@torch.no_grad()
def _check_features(transform: nn.Module, features: int) -> None:
    dtype = next((p.dtype for p in transform.parameters()), torch.get_default_dtype())
    try:
        shapes = [tuple(t.shape) for t in transform().call_and_ladj(torch.zeros(2, features, dtype=dtype))]
    except (RuntimeError, IndexError, TypeError, ValueError, AttributeError) as error:
        raise ValueError(_wrong_features(features)) from error
    if shapes != [(2, features), (2,)]:
        raise ValueError(_wrong_features(features))


def _wrong_features(features: int) -> str:
    return (
        f"the flow does not map {features} coordinates, which is what the model's latents have in unconstrained space; "
        "pass a factory, which is told the number (zuko.flows.NSF), or a flow without context of that size"
    )


@torch.no_grad()
def make_identity(transform: nn.Module, features: int, context: Tensor | None = None) -> None:
    """Set what shapes the transforms to zero: last layers of hyper networks, parameters without a network.

    A monotone affine map, a rational-quadratic spline, a Bernstein polynomial and an ODE with zero parameters are the
    identity, so the flow is; the hidden layers keep their random weights and learn from the second step on. A
    conditional flow is checked at one value of its ``context``.

    :raises ValueError: the flow is not the identity at zero (neural monotone networks, soft clipping between
        transforms), or its parts would stay equal for ever (Gaussianization).
    """
    zuko = import_zuko()
    networks = [m for m in transform.modules() if isinstance(m, (zuko.nn.MLP, zuko.nn.MaskedMLP))]
    inside = {id(p) for net in networks for p in net.parameters()}
    outputs = [p for net in networks for p in net[-1].parameters()]
    for parameter in outputs + [p for p in transform.parameters() if id(p) not in inside]:
        parameter.zero_()
    if _has_equal_parts(transform, zuko) or not _is_identity(transform, features, context):
        raise ValueError(
            "this flow cannot start at the identity: zero parameters do not give it. Pass identity_init=False to start "
            "from its own random weights, or use 'nsf', 'maf', 'iaf' or 'nice'."
        )


def _has_equal_parts(transform: nn.Module, zuko: ModuleType) -> bool:
    mixture = zuko.transforms.GaussianizationTransform
    return any(getattr(m, "univariate", None) is mixture for m in transform.modules())


def _is_identity(transform: nn.Module, features: int, context: Tensor | None) -> bool:
    dtype = next((p.dtype for p in transform.parameters()), torch.get_default_dtype())
    x = torch.linspace(-4.0, 4.0, 33, dtype=dtype).unsqueeze(-1) * torch.linspace(0.5, 1.0, features, dtype=dtype)
    y, ladj = transform(context).call_and_ladj(x)
    return torch.allclose(x, y, atol=1e-4) and torch.allclose(ladj, torch.zeros_like(ladj), atol=1e-4)


def with_tensors(module: nn.Module, tensors: Mapping[str, Tensor], prefix: str = "") -> nn.Module:
    """A copy of a module's structure whose parameters and buffers are the given tensors.

    Unlike ``torch.func.functional_call`` it stays valid after the call: a flow evaluates its networks lazily, and an
    ODE once more in the backward pass.
    """
    clone = object.__new__(type(module))
    clone.__dict__.update(module.__dict__)
    for slot in ("_parameters", "_buffers"):
        held = {name: None if t is None else tensors[prefix + name] for name, t in module.__dict__[slot].items()}
        clone.__dict__[slot] = held
    children = module.__dict__["_modules"].items()
    clone.__dict__["_modules"] = {name: with_tensors(child, tensors, f"{prefix}{name}.") for name, child in children}
    return clone


class AffineFlowTransform(Transform):
    r"""``z = loc + scale * (tril f(x))`` for a flow ``f``, which never computes one point twice.

    :math:`\log |dz/dx| = \log |df/dx| + \sum_d \log \mathrm{scale}_d` comes with the value, and the last point is
    remembered **by this object only**: the density of a draw under the transform that made it costs nothing, while a
    transform built from other (frozen, substituted, updated) parameters computes its own. What was remembered without
    gradients is forgotten as soon as gradients are wanted.

    :param draw: ``f``, a transform with zuko's ``call_and_ladj``.
    :param score: its inverse.
    :param loc: shape ``(D,)``.
    :param scale: shape ``(D,)``, positive.
    :param tril: shape ``(D, D)``, lower triangular with a unit diagonal; the identity unless given.
    """

    domain = constraints.real_vector
    codomain = constraints.real_vector
    bijective = True

    def __init__(self, draw: Any, score: Any, loc: Tensor, scale: Tensor, tril: Tensor | None = None) -> None:
        super().__init__(cache_size=1)
        self._draw = draw
        self._score = score
        self.loc = loc
        self.scale = scale
        self.tril = tril
        self._ladj: Tensor | None = None
        self._with_grad = False
        self.weighed: set[int] | None = None  # numbers of draws whose memory has been looked at, if it is to be

    def _forget_gradless(self) -> None:
        if torch.is_grad_enabled() and not self._with_grad:
            self._cached_x_y = (None, None)

    def __call__(self, x: Tensor) -> Tensor:
        """The latent vector of a base vector, shapes ``(*batch, D)``."""
        self._forget_gradless()
        return super().__call__(x)

    def _inv_call(self, y: Tensor) -> Tensor:
        self._forget_gradless()
        return super()._inv_call(y)

    def _remember(self, ladj: Tensor) -> None:
        self._ladj = ladj + self.scale.log().sum(-1)
        self._with_grad = torch.is_grad_enabled()

    def _call(self, x: Tensor) -> Tensor:
        y, ladj = self._draw.call_and_ladj(x)
        self._remember(ladj)
        return self.loc + self.scale * (y if self.tril is None else y @ self.tril.mT)

    def _inverse(self, y: Tensor) -> Tensor:
        if self.weighed is not None:
            self._weigh(y)
        x, ladj = self._score.call_and_ladj(self._unscaled(y))
        self._remember(-ladj)
        return x

    def _weigh(self, y: Tensor) -> None:
        """Say before it is taken how much memory a density with gradients will need, if that is much."""
        rows = y.numel() // y.shape[-1]
        traced = is_recording() or torch._C._functorch.peek_interpreter_stack() is not None
        if self.weighed is None or rows in self.weighed or rows < 8 or traced or not torch.is_grad_enabled():
            return
        self.weighed.add(rows)
        points = self._unscaled(y.detach()).detach().reshape(-1, y.shape[-1])
        needed = rows * (self._kept(points[:4]) - self._kept(points[:2])) // 2
        if needed > MUCH:
            warn(
                f"the density of {rows} draws of a flow over {y.shape[-1]} coordinates keeps about "
                f"{needed / 2**30:.1f} GB for its gradient: this direction of the flow is the slow one. Take fewer "
                "particles, another estimator than 'stl', or a flow whose density is fast elsewhere: flow='nice'."
            )

    def _kept(self, points: Tensor) -> int:
        """Bytes that autograd keeps of the density at some points."""
        kept: dict[int, Tensor] = {}

        def keep(x: Tensor) -> Tensor:
            kept[x.untyped_storage().data_ptr()] = x
            return x

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
            self._score.call_and_ladj(points)
        return sum(x.untyped_storage().nbytes() for x in kept.values())

    def _unscaled(self, z: Tensor) -> Tensor:
        y = (z - self.loc) / self.scale
        if self.tril is None:
            return y
        rows = y.reshape(-1, y.shape[-1])
        solved = torch.linalg.solve_triangular(self.tril, rows.mT, upper=False, unitriangular=True).mT
        return solved.reshape(y.shape)

    def log_abs_det_jacobian(self, x: Tensor, y: Tensor) -> Tensor:
        """``log |dz/dx|`` in nats, shape ``(*batch,)``."""
        self._forget_gradless()
        x_old, y_old = self._cached_x_y
        if x is not x_old or y is not y_old:
            self(x)
        assert self._ladj is not None
        return self._ladj
