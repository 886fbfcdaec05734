"""What guides over one unconstrained vector share, and the one place that knows Pyro's private ``AutoGuide`` members.

Pyro's :class:`~pyro.infer.autoguide.AutoContinuous` packs all latents of a model into a vector ``z`` of shape
``(*batch, latent_dim)`` in unconstrained space. :class:`ContinuousGuide` adds what a guide with a non-Gaussian density
needs on top: clear refusals, marginal quantiles by simulation, parameters that belong to one guide only, and copies
that leave the original alone. A subclass declares its parameters in ``_setup_parameters`` and its map in
``get_transform``; nothing else.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import reduce
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro.distributions import constraints
from pyro.infer.autoguide import AutoContinuous, init_to_median
from pyro.nn.module import PyroModule, PyroParam
from torch import Tensor
from torch.distributions import Distribution, Transform, biject_to
from torch.distributions.transforms import IndependentTransform

from pplvi.guides.owned import OwnedGuide
from pplvi.kinds.checked import checked
from pplvi.kinds.kinds import Positive
from pplvi.programs.errors import explanation, is_own, without_empty_tables
from pplvi.types import Program

__all__ = ["ContinuousGuide"]

_CHUNK = 1_000  # draws pushed through the map at once by `median` and `quantiles`


@checked
class ContinuousGuide(OwnedGuide, AutoContinuous):
    """Base of guides ``z = T(x)``, ``x ~ Normal(0, 1)``, over all continuous latents in unconstrained space.

    :param model: a Pyro model; all its latent sites are continuous and none sits in a subsampled plate.
    :param init_loc_fn: per-site initial value, any of Pyro's ``init_to_*``.
    :param init_scale: initial standard deviation of every unconstrained coordinate.
    :raises ValueError: ``init_scale`` is not a positive number; on the first run, when the model has no latent site, a
        discrete one, or a latent site in a subsampled plate.
    """

    scale_constraint = constraints.softplus_positive
    quantile_draws: int = 10_000
    """Number of draws behind :meth:`median` and :meth:`quantiles`."""

    def __init__(
        self,
        model: Program,
        *,
        init_loc_fn: Callable[..., Any] = init_to_median,
        init_scale: Positive = 0.1,
    ) -> None:
        super().__init__(model, init_loc_fn=init_loc_fn)
        self._init_scale = float(init_scale)

    # ------------------------------------------------------------------ set-up, on the first run

    def _setup_prototype(self, *args: Any, **kwargs: Any) -> None:
        try:
            self._read_model(*args, **kwargs)
            self._claim_name()
            loc = self._init_loc()
            self._declare("loc", loc)
            self._declare("scale", torch.full_like(loc, self._init_scale), self.scale_constraint)
            self._setup_parameters(loc)
        except BaseException:
            self.prototype_trace = None  # the next run starts over instead of finding half a guide
            raise

    def _read_model(self, *args: Any, **kwargs: Any) -> None:
        self.latent_dim = -1
        try:
            super()._setup_prototype(*args, **kwargs)
        except NotImplementedError as error:
            if is_own(error):
                raise
            if known := explanation(error):
                raise ValueError(known) from error
            reason = without_empty_tables(str(error))
            raise ValueError(
                f"{type(self).__name__} cannot guide this model: {reason}. Expected latent sites whose support maps to "
                "the real line, in plates that are entered (`with pyro.plate(...)`). Rewrite the site, for example "
                "with a reparameterisation of pyro.infer.reparam, or hide it: poutine.block(model, hide=[...])."
            ) from error
        except RuntimeError as error:
            if self.latent_dim != 0:
                raise
            raise ValueError(
                f"{type(self).__name__} got a model without latent sites; expected at least one continuous latent. "
                "To fit pyro.param values by maximum likelihood pass an empty guide, `lambda *args, **kwargs: None`."
            ) from error
        self._refuse_subsampling()

    def _refuse_subsampling(self) -> None:
        for frame in self._prototype_frames.values():
            if frame.full_size is not None and frame.full_size != frame.size:
                raise ValueError(
                    f"{type(self).__name__} got latent sites inside plate '{frame.name}', which is subsampled "
                    f"({frame.size} of {frame.full_size}); it has one joint density over all latents, so it needs the "
                    "whole plate. Run without subsample_size, or use pyro.infer.autoguide.AutoNormal, which keeps "
                    "full-size local parameters under subsampling."
                )

    def _setup_parameters(self, loc: Tensor) -> None:
        """Declare the parameters of the map; ``loc`` is the initial vector, whose dtype and device they follow."""

    def _declare(self, name: str, value: Tensor, constraint: Any = constraints.real, trained: bool = True) -> None:
        """Give the guide a parameter (or, not ``trained``, a buffer) under a dotted name."""
        *path, leaf = name.split(".")
        module: PyroModule = reduce(_child, path, self)
        if not trained:
            module.register_buffer(leaf, value)
            return
        self._check_stored(name, value)
        # PyroParam and not nn.Parameter: only its value passes through pyro.param, so that handlers (substitute, lift)
        # and values loaded into the store reach the guide.
        setattr(module, leaf, PyroParam(value, constraint))

    def _check_stored(self, name: str, value: Tensor) -> None:
        stored = pyro.get_param_store()._params.get(f"{self._pyro_name}.{name}") if self._pyro_context.active else None
        if stored is not None and stored.shape != value.shape:
            raise ValueError(
                f"the parameter store holds {self._pyro_name}.{name} with shape {tuple(stored.shape)}, but this guide "
                f"needs {tuple(value.shape)}: it is another model's. Call pyro.clear_param_store() before fitting this "
                "one, or run each in its own pyro.get_param_store().scope()."
            )

    def forward(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """Draw every latent site of the model; same arguments as the model. Shapes are the model's own."""
        if self.prototype_trace is not None:
            self._claim_name()
        result = super().forward(*args, **kwargs)
        self._own(self._parameters["loc_unconstrained"])
        return result

    # ------------------------------------------------------------------ Pyro's AutoContinuous contract

    def get_base_dist(self) -> Distribution:
        """The standard normal of shape ``(latent_dim,)`` that :meth:`get_transform` maps to the guide."""
        return dist.Normal(torch.zeros_like(self.loc), torch.ones_like(self.loc)).to_event(1)

    def _base_draws(self) -> Iterator[Tensor]:
        # Antithetic and from a generator of their own: the same answer every time, and the global seed is not touched.
        generator = torch.Generator(self.loc.device).manual_seed(0)
        half = torch.randn(
            self.quantile_draws // 2, self.latent_dim, generator=generator, dtype=self.loc.dtype, device=self.loc.device
        )
        return iter(torch.cat([half, -half]).split(_CHUNK))

    def _latent_draws(self, *args: Any, **kwargs: Any) -> Tensor:
        self._need_prototype("draws")
        transform = self.get_transform(*args, **kwargs)
        return torch.cat([transform(x) for x in self._base_draws()])

    def _need_prototype(self, what: str) -> None:
        if self.prototype_trace is None:
            raise ValueError(
                f"{type(self).__name__} has not seen the model's arguments yet, so it has no {what}; "
                "call guide(*args) or one SVI step first"
            )

    @torch.no_grad()
    def _loc_scale(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation ``(latent_dim,)`` of the unconstrained marginals, by simulation."""
        draws = self._latent_draws(*args, **kwargs)
        return draws.mean(0), draws.std(0)

    @torch.no_grad()
    def quantiles(self, quantiles: Sequence[float] | Tensor, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        r"""Marginal quantiles of every latent site, by simulation.

        Sorted values of ``quantile_draws`` antithetic draws from a generator of their own, so the answer is the same on
        every call and no seed moves; the standard error of the ``p`` quantile is about
        :math:`\sqrt{p (1 - p) / n} / q(z_p)`. Sites whose support is transformed coordinate by coordinate get
        quantiles of the constrained value; the others (simplex, covariance, ...) get the quantiles of the unconstrained
        coordinates mapped to the support, as in Pyro's own guides, so that a median is a valid value of the site.

        :param quantiles: probabilities in ``[0, 1]``, shape ``(Q,)``.
        :returns: ``{site: (Q, *shape of the site)}``.
        :raises ValueError: a probability outside ``[0, 1]``, or the guide has not run yet.
        """
        draws = self._latent_draws(*args, **kwargs)
        probs = torch.as_tensor(quantiles, dtype=draws.dtype, device=draws.device)
        if probs.dim() != 1 or not bool(((probs >= 0) & (probs <= 1)).all()):
            raise ValueError(f"quantiles is {quantiles!r}; expected a flat list of probabilities in [0, 1]")
        return {name: _site_quantiles(fn, z, probs) for name, fn, z in self._split(draws)}

    def _split(self, draws: Tensor) -> Iterator[tuple[str, Distribution, Tensor]]:
        """``(site, its distribution, unconstrained values (S, *shape))`` from packed draws ``(S, latent_dim)``."""
        shapes, sites = self._unconstrained_shapes, self.prototype_trace.nodes  # type: ignore[union-attr]
        parts = draws.split([shape.numel() for shape in shapes.values()], dim=-1)
        for (name, shape), part in zip(shapes.items(), parts, strict=True):
            yield name, sites[name]["fn"], part.reshape(-1, *shape)


def _child(module: Any, name: str) -> Any:
    if name not in module._modules:
        setattr(module, name, PyroModule())
    return module._modules[name]


def _site_quantiles(fn: Distribution, unconstrained: Tensor, probs: Tensor) -> Tensor:
    transform = biject_to(fn.support)
    if _is_elementwise(transform):  # counts decreasing maps the right way round
        return _quantile(transform(unconstrained), probs)
    return transform(_quantile(unconstrained, probs))


def _is_elementwise(transform: Transform) -> bool:
    while isinstance(transform, IndependentTransform):
        transform = transform.base_transform
    return transform.domain.event_dim == 0


def _quantile(values: Tensor, probs: Tensor) -> Tensor:
    """Linear interpolation of order statistics along dim 0; ``torch.quantile`` stops at 2**24 elements."""
    position = probs * (values.shape[0] - 1)
    below, above = position.floor().long(), position.ceil().long()
    ordered = values.sort(0).values
    weight = (position - below).reshape(-1, *(1,) * (values.dim() - 1))
    return torch.lerp(ordered[below], ordered[above], weight)
