"""Mixtures as a guide over all continuous latents, trained together or boosted one component at a time."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from functools import cached_property
from typing import Any, ClassVar

import pyro
import pyro.distributions as dist
import torch
from pyro.distributions import TorchDistribution, constraints
from pyro.infer.autoguide import init_to_median
from torch import Size, Tensor
from torch.distributions import Transform

from pplvi.guides.base import ContinuousGuide
from pplvi.guides.flows.build import AffineFlowTransform
from pplvi.kinds.checked import checked
from pplvi.kinds.kinds import Count, NonNegative, Positive
from pplvi.programs.density import UnconstrainedDensity
from pplvi.programs.state import random_state
from pplvi.types import Program
from pplvi.weights.resampling import resample

__all__ = ["AutoMixture"]


class _Identity:
    """The identity, as zuko's transforms are called."""

    def call_and_ladj(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x, torch.zeros_like(x[..., 0])


@checked
class AutoMixture(ContinuousGuide):
    r"""A mixture of normals over all continuous latents, in unconstrained space.

    .. math:: z = \mathrm{loc} + \mathrm{scale} \odot L x, \qquad
        x \sim \sum_{k=1}^{K} \pi_k \mathrm{Normal}(\mu_k, \mathrm{diag}(\sigma_k^2))

    with a unit lower triangular ``L`` that the components share. A draw is a component, drawn by stratified sampling
    over the particles, and a point of it, whose density is that of the whole mixture. Means and scales have path
    gradients, weights a score function with VIMCO's baseline, so that objectives need at least two particles; a bound
    of several, such as ``ImportanceWeightedELBO(num_particles=16)``, keeps components from collapsing onto one mode.
    With ``enumerate_components`` every component is drawn from at every training step, and the ELBO sums over them.
    :meth:`grow` adds one component where the guide is most wanting: boosting.

    :param model: a Pyro model; all its latent sites are continuous, none in a subsampled plate.
    :param num_components: number ``K`` of components.
    :param full_rank: whether ``L`` is trained; otherwise it is the identity.
    :param enumerate_components: whether components are enumerated instead of drawn; for linear objectives (the ELBO).
    :param init_loc_fn: per-site initial value, any of Pyro's ``init_to_*``.
    :param init_scale: initial standard deviation of every unconstrained coordinate in each component.
    :param init_spread: distance of the components' first means from the initial value, in each coordinate and in units
        of ``init_scale``.
    :raises ValueError: for fewer than one component; on the first run as :class:`pplvi.AutoFlow` does.

    Morningstar et al. 2021; Jordan et al. 1998; boosting: Guo et al. 2016, Miller, Foti & Adams 2017.

    >>> import pyro, pyro.distributions as dist
    >>> from pplvi import ELBO
    >>> def model():
    ...     x = pyro.sample("x", dist.Normal(0.0, 2.0))
    ...     pyro.sample("y", dist.Normal(x.abs(), 0.3), obs=torch.tensor(2.0))
    >>> pyro.clear_param_store(); pyro.set_rng_seed(0)
    >>> guide = AutoMixture(model, num_components=2, init_scale=0.5, init_spread=3.0)
    >>> elbo = ELBO(num_particles=16)
    >>> svi = pyro.infer.SVI(model, guide, pyro.optim.Adam({"lr": 0.02}), elbo)
    >>> losses = [svi.step() for _ in range(300)]
    >>> x = torch.stack([guide()["x"] for _ in range(200)])
    >>> bool((x > 1).float().mean() > 0.2), bool((x < -1).float().mean() > 0.2)  # both modes
    (True, True)
    """

    def __init__(
        self,
        model: Program,
        num_components: Count = 4,
        *,
        full_rank: bool = True,
        enumerate_components: bool = False,
        init_loc_fn: Callable[..., Any] = init_to_median,
        init_scale: Positive = 0.1,
        init_spread: NonNegative = 1.0,
    ) -> None:
        super().__init__(model, init_loc_fn=init_loc_fn, init_scale=init_scale)
        self._size, self._full_rank, self._spread = num_components, full_rank, init_spread
        self._enumerate, self._num_fixed = enumerate_components, 0

    def _setup_parameters(self, loc: Tensor) -> None:
        self._declare("logits", torch.zeros(self._size).to(loc))
        self._declare("locs", self._spread * _means(self._size, self.latent_dim).to(loc))
        self._declare("scales", torch.ones(self._size, self.latent_dim).to(loc), constraints.softplus_positive)
        if self._full_rank and self.latent_dim > 1:
            self._declare("scale_tril", torch.eye(self.latent_dim).to(loc), constraints.unit_lower_cholesky)

    def _parameters_of_mixture(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.logits, self._partly_fixed(self.locs), self._partly_fixed(self.scales)

    def get_base_dist(self) -> Any:
        """The mixture in the coordinates that :meth:`get_transform` maps to the latents."""
        return mixture(*self._parameters_of_mixture())

    def sample_latent(self, *args: Any, **kwargs: Any) -> Tensor:
        """Draw a component, then the packed latents."""
        parts, name = self._parameters_of_mixture(), self._pyro_name
        infer: Any = {"is_auxiliary": True}
        if self._enumerate and torch.is_grad_enabled():  # a posterior wants draws
            infer["enumerate"] = "parallel"
        component = pyro.sample(f"_{name}_component", StratifiedCategorical(logits=parts[0]), infer=infer)
        posterior = dist.TransformedDistribution(Component(component, *parts), [self.get_transform(*args, **kwargs)])
        return pyro.sample(f"_{name}_latent", posterior, infer={"is_auxiliary": True})

    def _partly_fixed(self, parts: Tensor) -> Tensor:
        fixed = self._num_fixed
        return torch.cat([parts[:fixed].detach(), parts[fixed:]]) if fixed else parts

    def get_transform(self, *args: Any, **kwargs: Any) -> Transform:
        """The affine map ``z = loc + scale * (L x)``."""
        self._need_prototype("transform")
        loc, scale, tril = self.loc, self.scale, getattr(self, "scale_tril", None)
        if self._num_fixed:  # earlier components stay where they are
            loc, scale, tril = loc.detach(), scale.detach(), None if tril is None else tril.detach()
        return AffineFlowTransform(_Identity(), _Identity(), loc, scale, tril)

    def _base_draws(self) -> Iterator[Tensor]:
        with random_state(0):
            draws = self.get_base_dist().sample((self.quantile_draws,))
        return iter(draws.split(1_000))

    @torch.no_grad()
    def grow(
        self, *args: Any, num_candidates: int = 1000, widen: float = 3.0, seed: int | None = 0, **kwargs: Any
    ) -> AutoMixture:
        """A guide with one component more, where ``log p - log q`` is largest among rough posterior draws.

        Those are draws of this guide with its components' scales multiplied by ``widen``, resampled by their weights
        for the model. The new guide trains the new component and all weights; :meth:`release` lets all components move
        again.

        :param args: arguments of the model.
        :param num_candidates: number of draws.
        :param widen: factor of the scales.
        :param seed: seed of the draws.
        :returns: the new guide, with parameters of its own.
        :raises ValueError: if the model's log density is finite at none of them.
        """
        self._need_prototype("components")
        transform, wide = self.get_transform(*args, **kwargs), mixture(self.logits, self.locs, widen * self.scales)
        with random_state(seed):
            x = wide.sample((num_candidates,))
            z = transform(x)
            log_p = UnconstrainedDensity(self.model, args, kwargs)(z) + transform.log_abs_det_jacobian(x, z)
            log_p = log_p.nan_to_num(nan=-torch.inf, posinf=-torch.inf, neginf=-torch.inf)
            if not bool(log_p.isfinite().any()):
                raise ValueError(
                    f"the model's log density is finite at none of {num_candidates} draws of the guide, widened "
                    f"{widen} times: expected some inside the support. Train the guide first, or widen it less."
                )
            likely = resample(log_p - wide.log_prob(x), scheme="systematic").unique()
        residual = log_p[likely] - self.get_base_dist().log_prob(x[likely])
        return self._with_component(x[likely[residual.argmax()]])

    def _with_component(self, center: Tensor) -> AutoMixture:
        new = copy.deepcopy(self)
        new._size = self._size + 1
        new._num_fixed = self._size
        share = self.logits.logsumexp(0) - torch.tensor(float(self._size)).log()  # a weight of 1 / (K + 1)
        new._declare("logits", torch.cat([self.logits, share.reshape(1)]).detach())
        new._declare("locs", torch.cat([self.locs, center.reshape(1, -1)]).detach())
        narrow = self.scales.amin(0, keepdim=True)
        new._declare("scales", torch.cat([self.scales, narrow]).detach(), constraints.softplus_positive)
        return new

    def release(self) -> AutoMixture:
        """Let all components, and the affine map, be trained again; returns the guide itself."""
        self._num_fixed = 0
        return self


def _means(size: int, dim: int) -> Tensor:
    """First means in random directions, in pairs on either side and at growing distance: no two start together."""
    half = torch.nn.functional.normalize(torch.randn(size // 2, dim), dim=-1) * dim**0.5
    half = half * torch.linspace(1.0 / max(size // 2, 1), 1.0, size // 2).unsqueeze(-1)
    return torch.cat([half, -half, torch.zeros(size % 2, dim)])


class StratifiedCategorical(dist.Categorical):
    """A categorical distribution whose draws of one call are stratified.

    Systematic sampling in random order: of ``S`` draws ``S p_k``, up to one, are ``k``, and each of them by itself has
    the distribution (Morningstar et al. 2021).

    >>> _ = torch.manual_seed(0)
    >>> int(StratifiedCategorical(logits=torch.zeros(2)).sample((10,)).sum())
    5
    """

    def expand(self, batch_shape: Any, _instance: Any = None) -> StratifiedCategorical:
        """The same distribution, with another batch shape."""
        return StratifiedCategorical(logits=self.logits.expand(*batch_shape, self.logits.shape[-1]))

    def sample(self, sample_shape: Any = Size()) -> Tensor:  # noqa: B008
        """Draws ``(*sample_shape, *batch_shape)``; probabilities are the same all over the batch."""
        shape = self._extended_shape(Size(sample_shape))
        edges = self.probs.reshape(-1, self.probs.shape[-1])[0].cumsum(-1)[:-1].contiguous()
        start = torch.rand(1, dtype=edges.dtype, device=edges.device)
        points = (torch.randperm(shape.numel(), device=edges.device) + start) / shape.numel()
        return torch.searchsorted(edges.detach(), points).reshape(shape)


def mixture(logits: Tensor, locs: Tensor, scales: Tensor) -> dist.MixtureSameFamily:
    """``sum_k softmax(logits)_k N(locs_k, diag(scales_k^2))``, of ``(K,)``, ``(K, D)`` and ``(K, D)``."""
    return dist.MixtureSameFamily(dist.Categorical(logits=logits), dist.Normal(locs, scales).to_event(1))


class Component(TorchDistribution):
    """The second draw: from component ``k``, with density ``log q(z) - log pi_k`` where ``q`` is the whole mixture.

    With the density ``log pi_k`` of the first draw that makes ``log q(z)`` (nats), whatever ``k``, and draws carry the
    component's path gradient.

    :param component: the components drawn, ``(*batch)``.
    """

    has_rsample = True
    support = constraints.real_vector
    arg_constraints: ClassVar[dict[str, Any]] = {}

    def __init__(self, component: Tensor, logits: Tensor, locs: Tensor, scales: Tensor) -> None:
        self.component, self.logits, self.locs, self.scales = component, logits, locs, scales
        super().__init__(component.shape, locs.shape[-1:], validate_args=False)

    def expand(self, batch_shape: Any, _instance: Any = None) -> Component:
        """The same distribution, with another batch shape."""
        return Component(self.component.expand(batch_shape), self.logits, self.locs, self.scales)

    @cached_property
    def _mixture(self) -> dist.MixtureSameFamily:
        return mixture(self.logits, self.locs, self.scales)

    def rsample(self, sample_shape: Any = Size()) -> Tensor:  # noqa: B008
        """Draws ``(*sample_shape, *batch_shape, D)``."""
        noise = torch.randn(self._extended_shape(Size(sample_shape)), dtype=self.locs.dtype, device=self.locs.device)
        return self.locs[self.component] + self.scales[self.component] * noise

    def log_prob(self, value: Tensor) -> Tensor:
        """Log density of the mixture less the log weight of the component, ``(*batch)``."""
        return self._mixture.log_prob(value) - self.logits.log_softmax(-1)[self.component]
