"""Supports that torch gives no coordinates: those of mixtures, such as the prior of a spike and a slab."""

from __future__ import annotations

from torch import Tensor
from torch.distributions import Transform, biject_to, constraints, transform_to

__all__: list[str] = []


@biject_to.register(constraints.MixtureSameFamilyConstraint)
@transform_to.register(constraints.MixtureSameFamilyConstraint)
def _of_mixture(support: constraints.MixtureSameFamilyConstraint) -> Transform:
    """The coordinates of its components, where they share one support.

    >>> biject_to(constraints.MixtureSameFamilyConstraint(constraints.simplex))
    StickBreakingTransform()
    """
    base = support.base_constraint
    while isinstance(base, constraints.independent):
        base = base.base_constraint
    if any(isinstance(bound, Tensor) and bound.dim() for bound in vars(base).values()):
        raise NotImplementedError("Cannot transform supports that differ between the components of a mixture")
    return biject_to(support.base_constraint)
