"""Where another guide starts: the location and the spread of Pathfinder's Gaussian, put into its parameters."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from pyro.infer.autoguide import (
    AutoContinuous,
    AutoGuide,
    AutoGuideList,
    AutoIAFNormal,
    AutoNormal,
)
from pyro.infer.autoguide.utils import deep_setattr
from torch import Tensor
from torch.nn import Parameter

from pplvi.guides.flows.flow import AutoFlow
from pplvi.guides.search.base import FoundGuide
from pplvi.guides.search.batch_and_match import AutoBatchAndMatch
from pplvi.guides.search.pathfinder import AutoPathfinder
from pplvi.kinds.checked import checked
from pplvi.programs.errors import explained
from pplvi.types import Program

__all__ = ["start_at_pathfinder"]


class _Found:
    """A Gaussian over packed latents, by site."""

    def __init__(self, guide: FoundGuide) -> None:
        gaussian = guide.gaussians
        self.loc, self.covariance = gaussian.loc[0], type(gaussian)(*(part[0] for part in gaussian)).covariance
        sizes = {name: shape.numel() for name, shape in guide._unconstrained_shapes.items()}
        places = torch.arange(len(self.loc)).split(list(sizes.values()))
        self.places = dict(zip(sizes, places, strict=True))

    def part(self, guide: AutoGuide) -> tuple[Tensor, Tensor]:
        """Mean and covariance over the sites that a guide has, in its order."""
        index = torch.cat([self.places[name] for name, _ in guide.prototype_trace.iter_stochastic_nodes()])  # type: ignore[union-attr]
        return self.loc[index], self.covariance[index][:, index]


@checked
@torch.no_grad()
def start_at_pathfinder(
    guide: AutoGuide,
    model: Program,
    args: tuple[Any, ...] = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    search: type[AutoPathfinder] | type[AutoBatchAndMatch] = AutoPathfinder,
    **options: Any,
) -> None:
    r"""Set an automatic guide's parameters to the best Gaussian that Pathfinder finds, in place.

    .. math:: \mathrm{loc} = \mu, \qquad L L^T = \Sigma \text{ (full-rank guides)}, \qquad
        \mathrm{scale}_d = (\Sigma^{-1})_{dd}^{-1/2} \text{ (mean field)}

    the latter being the mean field that is nearest in :math:`KL(q \| p)`. ``pplvi.fit(..., init="pathfinder")`` does it
    before the first step.

    Source: Zhang, Carpenter, Gelman and Vehtari 2022, Pathfinder, JMLR 23(306), section 4.

    :param guide: ``AutoNormal``, one over a packed vector (``AutoDiagonalNormal``, ``AutoMultivariateNormal``,
        ``AutoLowRankMultivariateNormal``, ``AutoFlow``), or an ``AutoGuideList`` of such. It is run once, so that its
        parameters exist.
    :param model: the model that the guide is for.
    :param args: the positional arguments to fit it to.
    :param kwargs: the keyword arguments.
    :param search: ``AutoPathfinder``, or ``AutoBatchAndMatch``, whose Gaussian takes more gradients and has a larger
        ELBO.
    :param options: options of the search.
    :raises ValueError: for guides without a location, and where :class:`AutoPathfinder` does.

    >>> import pyro, pyro.distributions as dist
    >>> from pyro.infer.autoguide import AutoDiagonalNormal
    >>> def model():
    ...     pyro.sample("x", dist.Normal(5.0, 0.1))
    >>> pyro.clear_param_store(); guide = AutoDiagonalNormal(model)
    >>> start_at_pathfinder(guide, model, seed=0)
    >>> round(guide.loc.item(), 2), round(guide.scale.item(), 2)
    (5.0, 0.1)
    """
    _check(guide)
    one = {"num_components": 1} if issubclass(search, AutoPathfinder) else {}  # a Gaussian is what guides can start at
    found = search(model, **{**one, **options}).run(*args, **(kwargs or {}))
    with explained():
        guide(*args, **(kwargs or {}))
    _place(guide, _Found(found))


def _check(guide: Any) -> None:
    if isinstance(guide, AutoGuideList):
        for part in guide:
            _check(part)
        return
    packed = isinstance(guide, AutoContinuous) and not isinstance(guide, AutoIAFNormal)
    if not packed and not isinstance(guide, AutoNormal):
        raise ValueError(
            f"{type(guide).__name__} cannot start at Pathfinder's Gaussian: expected an automatic guide with a "
            "location (AutoNormal, AutoDiagonalNormal, AutoMultivariateNormal, AutoFlow, ...). Where a guide takes "
            "init_loc_fn=, pass init_to_pathfinder(model, args)."
        )


def _place(guide: Any, found: _Found) -> None:
    if isinstance(guide, AutoGuideList):
        for part in guide:
            _place(part, found)
    elif isinstance(guide, AutoContinuous):
        _place_packed(guide, *found.part(guide))
    else:
        _place_sites(guide, *found.part(guide))


def _place_packed(guide: Any, loc: Tensor, covariance: Tensor) -> None:
    if isinstance(guide, AutoFlow):
        guide.start_at(loc, torch.linalg.cholesky(covariance) if guide.root.dim() == 2 else nearest_scale(covariance))
        return
    if isinstance(guide.loc, Parameter):  # some of Pyro's guides keep it so, and others as a PyroParam
        guide.loc.copy_(loc)
    else:
        guide.loc = loc
    if hasattr(guide, "cov_factor"):
        rest = 1 + guide.cov_factor.square().sum(-1)
        guide.scale = (covariance.diagonal() / rest).sqrt()
    elif hasattr(guide, "scale_tril"):
        tril = torch.linalg.cholesky(covariance)
        guide.scale = tril.diagonal().clone()
        guide.scale_tril = tril / tril.diagonal().unsqueeze(-1)
    elif hasattr(guide, "scale"):
        guide.scale = nearest_scale(covariance)


def _place_sites(guide: AutoNormal, loc: Tensor, covariance: Tensor) -> None:
    start, scale = 0, nearest_scale(covariance)
    for name, _ in guide.prototype_trace.iter_stochastic_nodes():  # type: ignore[union-attr]
        shape = guide._get_loc_and_scale(name)[0].shape
        place = slice(start, start := start + shape.numel())
        deep_setattr(guide.locs, name, loc[place].reshape(shape))
        deep_setattr(guide.scales, name, scale[place].reshape(shape))


def nearest_scale(covariance: Tensor) -> Tensor:
    """Standard deviations of the mean field that is nearest to a Gaussian, ``(dim,)``.

    >>> nearest_scale(torch.tensor([[1.0, 0.6], [0.6, 1.0]]))
    tensor([0.8000, 0.8000])
    """
    return torch.linalg.inv(covariance).diagonal().rsqrt()
