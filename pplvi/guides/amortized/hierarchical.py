"""Guides that follow a model's plates: elements with parameters of their own, which see the global latents."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from pyro.infer.autoguide import AutoMultivariateNormal
from pyro.nn.module import PyroParam, to_pyro_module_
from torch import Tensor, nn

from pplvi.guides.amortized.amortized import AutoAmortized, Family
from pplvi.guides.amortized.elements import Locals
from pplvi.kernels.coordinates import Coordinates, coordinates
from pplvi.kinds.checked import checked
from pplvi.kinds.kinds import Count, Positive
from pplvi.programs.sites import latent_sites, site_plates
from pplvi.types import Program

__all__ = ["AutoHierarchical"]


@checked
class AutoHierarchical(AutoAmortized):
    r"""A structured guide: a joint distribution of the global latents, and of each plate element's given those.

    .. math:: q(\theta, z_{1:N}) = q(\theta) \prod_n q(z_n \mid \lambda_n, \theta)

    Each element of the plates has features ``lambda_n`` of its own; one network for all elements maps features and
    global latents (in unconstrained coordinates) to the parameters of the element's distribution. The guide so follows
    the model's conditional independence, which a dense full-rank guide or flow has to learn, and its size grows with
    the number of elements only through ``lambda``: with ``D`` latents an element, ``2 D`` numbers each.

    :param model: a Pyro model.
    :param plates: name of the plate, or names, whose latents are local; plates may be subsampled.
    :param family: per element ``"normal"``, ``"multivariate_normal"`` (a batched full covariance) or ``"flow"``
        (a spline flow whose network is shared).
    :param global_guide: guide of the global latents, a class or factory ``model -> guide``.
    :param hidden: width of the network.
    :param init_scale: initial standard deviation of every local coordinate.
    :raises ValueError: as :class:`pplvi.AutoAmortized`; when the plate's size changed since the first run.

    Hoffman & Blei 2015 (structured variational inference); Agrawal & Domke 2021 (amortised, branched families).

    >>> import pyro, pyro.distributions as dist
    >>> pyro.clear_param_store()
    >>> def model(y):
    ...     scale = pyro.sample("scale", dist.LogNormal(0.0, 1.0))
    ...     with pyro.plate("group", len(y)):
    ...         effect = pyro.sample("effect", dist.Normal(0.0, scale))
    ...         pyro.sample("y", dist.Normal(effect, 1.0), obs=y)
    >>> guide = AutoHierarchical(model, plates="group")
    >>> {name: tuple(value.shape) for name, value in guide(torch.zeros(5)).items()}
    {'scale': (), 'effect': (5,)}
    """

    amortized = False

    def __init__(
        self,
        model: Program,
        plates: str | Sequence[str],
        *,
        family: Family = "normal",
        global_guide: Callable[[Any], Any] = AutoMultivariateNormal,
        hidden: Count = 32,
        init_scale: Positive = 0.1,
    ) -> None:
        if family == "delta":
            raise ValueError("family='delta' is for the encoder of an AutoAmortized: expected a density, or AutoDelta.")
        super().__init__(model, nn.Identity(), plates, family=family, global_guide=global_guide, init_scale=init_scale)
        self._hidden = hidden
        self._globals: tuple[Coordinates, ...] = ()

    def _setup_globals(self, structure: Locals) -> None:
        self._claim_name()  # before the elements are read from the store
        super()._setup_globals(structure)
        trace: Any = self.prototype_trace
        local = {site.name for site in structure.sites}
        sites = {name: site for name, site in latent_sites(trace).items() if name not in local}
        self._globals = tuple(
            coordinates(name, site)
            for name, site in sites.items()
            if not site_plates(site) and not getattr(site["fn"], "has_enumerate_support", False)
        )
        width = 2 * structure.size
        sizes = [plate.full_size for plate in structure.plates]
        like = torch.cat(
            [site.read({site.name: sites[site.name]["value"]}) for site in self._globals] or [torch.zeros(0)]
        )
        self.elements: Any = PyroParam(0.1 * torch.randn(*sizes, width, dtype=like.dtype, device=like.device))
        network = nn.Sequential(nn.Linear(width + like.shape[-1], self._hidden), nn.Tanh()).to(like)
        to_pyro_module_(network)
        self.network = network

    def _encode(
        self, args: tuple[Any, ...], kwargs: Mapping[str, Any], structure: Locals, indices: Mapping[str, Tensor]
    ) -> Tensor:
        features: Tensor = self.elements
        for axis, plate in enumerate(structure.plates):
            if features.shape[axis] != plate.full_size:
                raise ValueError(
                    f"plate {plate.name!r} has {plate.full_size} elements, this guide was made for "
                    f"{features.shape[axis]}: expected the same ones. Make a new guide, or use AutoAmortized, which "
                    "takes new data."
                )
            if plate.size != plate.full_size:
                features = features.index_select(axis, indices[plate.name].to(features.device))
        return features

    def _joined(self, features: Tensor, latents: Mapping[str, Tensor]) -> Tensor:
        seen = [site.read(latents) for site in self._globals]
        batch = torch.broadcast_shapes(features.shape[:-1], *(part.shape[:-1] for part in seen))
        joined = torch.cat([part.expand(*batch, part.shape[-1]) for part in (features, *seen)], -1)
        return torch.cat([joined, self.network(joined)], -1)

    @torch.no_grad()
    def quantiles(self, quantiles: Sequence[float] | Tensor, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """Marginal quantiles ``{site: (Q, *shape)}``, of local latents by simulation in unconstrained coordinates.

        :raises ValueError: for probabilities outside ``[0, 1]``.
        """
        probs = self._checked(quantiles)
        found = self.structure(args, kwargs).quantiles(self, probs, args, kwargs)
        return self.global_quantiles(probs, args, kwargs) | found

    def get_posterior(self, *args: Any, **kwargs: Any) -> Any:
        """The posterior of every element's packed coordinates at the median of the global latents."""
        structure = self.structure(args, kwargs)
        middle = self.global_guide.median(*args, **kwargs) if self._has_globals else {}
        every = {plate.name: torch.arange(plate.size) for plate in structure.plates}
        return self._distribution(args, kwargs, structure, every, middle)[0]

    def tabulate(self, *args: Any, **kwargs: Any) -> AutoAmortized:
        """Refused: elements have parameters of their own already.

        :raises ValueError: always.
        """
        raise ValueError(
            "elements of AutoHierarchical have parameters of their own already: there is nothing to refine."
        )
