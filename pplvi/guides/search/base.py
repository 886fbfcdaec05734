"""Guides that are found by a search instead of trained: Gaussians over the unconstrained latents, kept as buffers."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, ClassVar, Self

import torch
from pyro.distributions import TorchDistribution
from pyro.infer.autoguide import AutoContinuous
from pyro.infer.autoguide.guides import prototype_hide_fn
from torch import Tensor
from torch.distributions import biject_to

from pplvi.guides.base import ContinuousGuide
from pplvi.guides.search.gaussians import Gaussian, GaussianMixture
from pplvi.posterior.students import Students
from pplvi.programs.density import UnconstrainedDensity, outside_of_handlers
from pplvi.programs.errors import explained
from pplvi.programs.handlers import float_dtype
from pplvi.programs.state import preserved_rng, random_state
from pplvi.programs.summing import is_summed
from pplvi.programs.ways import Vectorize
from pplvi.types import Program

_TRIES = 100
_STATIONARY = 1e-8


class Search:
    """What guides that find themselves have in common: there is nothing to train in them.

    :cvar score_draws: draws by which the best of several searches is chosen.
    :cvar takes_minibatches: whether a search for each minibatch is of use, where the model is trained.
    :ivar vectorize: the way of running draws.
    """

    score_draws: ClassVar[int] = 1000
    takes_minibatches: ClassVar[bool] = False
    vectorize: Vectorize = None

    def run(self, *args: Any, **kwargs: Any) -> Self:
        """Search, given the arguments of the model.

        :returns: the guide itself.
        """
        raise NotImplementedError


class FoundGuide(ContinuousGuide, Search):
    """Base of guides with nothing to train: a subclass says in ``_find`` how it gets its Gaussians from a density.

    The first call searches, :meth:`run` searches anew. The density is the equal mixture of the Gaussians found.
    Enumerated sites (``pyro.infer.config_enumerate(model)``) are summed out.

    :param model: a Pyro model; its latent sites are continuous or enumerated, its plates are not subsampled.
    :param init_radius: starts are uniform on ``(-init_radius, init_radius)`` in every unconstrained coordinate.
    :param init_loc_fn: start from this instead, any of Pyro's ``init_to_*``, called anew for each start.
    :param seed: makes runs reproducible and leaves the global random state as it was.
    :param vectorize: the way of running rows, ``"broadcast"``, ``"vmap"`` or ``"loop"`` (``False``); the fastest that
        is right for the programs unless named.
    :raises ValueError: ``init_radius`` is not a positive number; on the first run, for a model without latent sites,
        with discrete ones that are not enumerated, with subsampled plates, or whose log density is not finite at any
        start (with the first bad site).
    """

    def __init__(
        self,
        model: Program,
        *,
        init_radius: float = 2.0,
        init_loc_fn: Callable[..., Any] | None = None,
        seed: int | None = None,
        vectorize: Vectorize = None,
    ) -> None:
        super().__init__(model, init_loc_fn=partial(_init_site, init_loc_fn or _init_to_zero))
        self._model: Any = (self._model[0], model)  # shared by copies, left out by pickle
        self._init_radius, self._init_loc_fn = float(init_radius), init_loc_fn
        self._seed, self.vectorize = seed, vectorize
        self.num_gradients = self.num_evaluations = 0

    _parts: ClassVar[tuple[str, ...]] = Gaussian._fields
    """Names of the buffers that hold what was found."""

    def _find(self, density: UnconstrainedDensity) -> Gaussian | Students:
        """Components with one leading dimension, the best first."""
        raise NotImplementedError

    # ------------------------------------------------------------------ running

    def run(self, *args: Any, **kwargs: Any) -> Self:
        """Search for the posterior given the model's arguments, anew if it ran before.

        :returns: the guide itself.
        :raises ValueError: see the class.
        """
        for name in self._parts:
            self._buffers.pop(name, None)
        self._setup_prototype(*args, **kwargs)
        return self

    _leaves_out_summed = True  # its density sums them out
    make_density: type[UnconstrainedDensity] = UnconstrainedDensity
    """What makes the density that is searched."""

    @staticmethod
    def _prototype_hide_fn(msg: Any) -> bool:
        return bool(prototype_hide_fn(msg)) or is_summed(msg)

    def _setup_prototype(self, *args: Any, **kwargs: Any) -> None:
        try:
            with preserved_rng(active=self._seed is not None), explained():
                self._read_model(*args, **kwargs)
            if "loc" not in self._buffers:  # else its result was loaded by load_state_dict
                with random_state(self._seed), outside_of_handlers():
                    self._search(args, kwargs)
            self._check_size()
        except BaseException:
            self.prototype_trace = None  # the next run starts over instead of finding half a guide
            raise

    @property
    def _target(self) -> Callable[..., Any]:
        model: Program = self._model[1]
        return model

    def _check_size(self) -> None:
        if self.loc.shape[-1] != self.latent_dim:
            raise ValueError(
                f"this {type(self).__name__} holds a posterior of {self.loc.shape[-1]} unconstrained coordinates, but "
                f"the model has {self.latent_dim} for these arguments; call guide.run(*args) to fit it to them"
            )

    def _search(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        wrapped, model = self.model, self._target
        density = self.make_density(model, args, kwargs, prototype=wrapped, vectorize=self.vectorize, in_units=True)
        found = self._find(density)
        found = found.affine(*(x.to(found.loc) for x in density.units))
        for name, value in zip(self._parts, found, strict=True):
            self.register_buffer(name, value.to(density.device, density.dtype))
        self.num_gradients, self.num_evaluations = density.gradients, density.rows

    def _starts(self, density: UnconstrainedDensity, number: int) -> list[Tensor]:
        """Vectors at which density and gradient are finite; each a bit beside a stationary point, if it is at one."""
        starts = torch.stack([self._start(density) for _ in range(number)])
        for _ in range(_TRIES):
            value, gradient = density.value_and_gradient(starts)
            bad = ~(value.isfinite() & gradient.isfinite().all(1))
            if not bool(bad.any()):
                still = gradient.norm(dim=1) < _STATIONARY
                starts[still] += 0.05 * torch.stack([self._uniform(density) for _ in starts])[still]
                return list(starts.double())  # from a stationary point there would be no path, and no curvature
            last = starts[bad][0]
            starts[bad] = torch.stack([self._start(density) for _ in range(int(bad.sum()))])
        site = density.bad_site(last)
        where = f"the first bad site is {site!r}" if site else "every site is finite, but the gradient is not"
        raise ValueError(
            f"{type(self).__name__} found no start with a finite log density in {_TRIES} tries; {where}. Expected a "
            "finite density near the start: look for NaN in the data and values outside of a support, use a smaller "
            "init_radius, or name a start by init_loc_fn=init_to_value(values={...})."
        )

    def _uniform(self, density: UnconstrainedDensity) -> Tensor:
        return self._init_radius * (2 * torch.rand(density.dim, dtype=density.dtype, device=density.device) - 1)

    def _start(self, density: UnconstrainedDensity) -> Tensor:
        if self._init_loc_fn is None:
            return self._uniform(density)
        trace = self.prototype_trace
        with torch.no_grad():
            values = {n: self._init_loc_fn(site) for n, site in trace.iter_stochastic_nodes()}  # type: ignore[union-attr]
        return density.pack(values)

    def forward(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """Draw every latent site of the model; same arguments as the model. The first call searches."""
        return AutoContinuous.forward(self, *args, **kwargs)

    def get_posterior(self, *args: Any, **kwargs: Any) -> TorchDistribution:
        """The mixture over the packed unconstrained latents.

        :raises ValueError: the guide has not run yet.
        """
        return GaussianMixture(self.gaussians)

    @property
    def gaussians(self) -> Gaussian:
        """What was found: Gaussians of equal weight over the packed unconstrained latents, the best first.

        :raises ValueError: the guide has not run yet.
        """
        self._need_prototype("density")
        return Gaussian(*(self._buffers[name] for name in self._parts))  # type: ignore[arg-type]

    def _components(self, density: UnconstrainedDensity) -> Gaussian:
        """What was found, in the coordinates of a density, in float64."""
        zero, one = density.units
        return Gaussian(*(part.double() for part in self.gaussians)).affine(-zero / one, 1 / one)

    def _latent_draws(self, *args: Any, **kwargs: Any) -> Tensor:
        mixture = GaussianMixture(self.gaussians)
        noise = torch.cat(list(self._base_draws()))
        pairs = torch.arange(len(noise) // 2, device=noise.device) % len(self.loc)  # both of a pair in one component
        return mixture.transport(noise, pairs.repeat(2))

    def best_values(self) -> dict[str, Tensor]:
        """Constrained values of the sites at the mean of the best Gaussian.

        :raises ValueError: the guide has not run yet.
        """
        self._need_prototype("density")
        return {name: biject_to(fn.support)(z[0]) for name, fn, z in self._split(self.loc[:1])}

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_init_loc_fn": None}  # without a model it cannot run again

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        for (
            name
        ) in self._parts:  # a guide that has not run, or found other numbers of Gaussians, takes the shapes given
            if prefix + name in state_dict:
                self.register_buffer(name, torch.empty_like(state_dict[prefix + name]))
        super()._load_from_state_dict(state_dict, prefix, *args)


def _init_site(init: Callable[..., Any], site: Any) -> Any:
    return site["fn"].sample() if is_summed(site) else init(site)


def _init_to_zero(site: Any) -> Tensor:
    """The value at zero in unconstrained space, which also exists where nothing can be drawn (improper priors)."""
    transform, fn = biject_to(site["fn"].support), site["fn"]
    return transform(torch.zeros(transform.inverse_shape(fn.shape()), dtype=float_dtype(fn))).expand(fn.shape())
