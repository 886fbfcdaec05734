"""Semi-amortised annealing: local latents are annealed from a guide's draws to their posterior, elements by themselves.

Global latents keep the distribution that their guide gives them. Given those, the elements of a plate are independent,
so that each is annealed by its own density alone: with minibatches the bound stays unbiased, and weights stay per datum
where there are no global latents.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro.distributions import constraints
from pyro.nn.module import PyroModule
from torch import Tensor
from torch.distributions import biject_to

from pplvi.guides.amortized.amortized import AutoAmortized, place
from pplvi.guides.amortized.elements import Locals
from pplvi.guides.annealed import Level, climb
from pplvi.guides.flows.conditional import from_noise
from pplvi.guides.owned import OwnedGuide
from pplvi.kernels.base import Kernel
from pplvi.kernels.coordinates import Coordinates
from pplvi.kernels.uncorrected import UncorrectedHamiltonianKernel
from pplvi.kinds.checked import checked
from pplvi.kinds.kinds import Count, Probability
from pplvi.programs.handlers import aside
from pplvi.programs.single import log_density_of
from pplvi.samplers.paths import Betas

__all__ = ["AutoSemiDAIS"]


@dataclass(frozen=True)
class _Setting:
    """Where local latents move in one run: all else is held, and noise stands for them.

    :ivar held: values of the global latents, and the plates' indices.
    :ivar start: distribution of an element's packed latents that annealing starts from.
    """

    model: Any
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    structure: Locals
    held: Mapping[str, Tensor]
    start: dist.TorchDistribution

    def log_density(self, noise: Tensor) -> Tensor:
        """Log density of the model in the coordinates of the noise, summed; an element of a minibatch counts once."""
        packed, gain = from_noise(self.start, noise)
        free = self.structure.split(packed)
        values = {site.name: site.write(free[site.name]) for site in self.structure.sites}
        with aside():
            total = log_density_of(self.model, self.args, self.kwargs, {**self.held, **values})
        jacobians = (site.log_jacobian(values).sum() for site in self.structure.sites)
        copies = math.prod(plate.scale for plate in self.structure.plates)
        return total / copies + sum(jacobians, gain.sum())


@dataclass(frozen=True)
class _LocalDensity:
    """``log gamma[level]`` of the noise, up to a constant: between a standard normal and the model."""

    path: Betas
    level: int

    def __call__(self, values: Mapping[str, Tensor], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor:
        (noise,), (setting,) = values.values(), args
        beta = self.path.betas[self.level]
        return beta * setting.log_density(noise) - (1 - beta) * noise.square().sum() / 2


@checked
class AutoSemiDAIS(OwnedGuide):
    r"""Anneal the local latents of another guide, each plate element by itself, in minibatches too.

    .. math:: q(\theta) \prod_n q_0(z_n^0 \mid \theta)
        \prod_k \frac{q_k(z_n^k \mid z_n^{k-1}, \theta)}{r_k(z_n^{k-1} \mid z_n^k, \theta)}

    The global latents are those of ``base``; its local draws are moved by ``num_steps`` transitions along the geometric
    path from ``q_0`` to the model given the global latents. Kernels work in the coordinates of the noise that ``q_0``
    is made from, so that its location and scale are every element's own preconditioner; their parameters are shared by
    the elements. Everything is trained together, on the extended space, by any objective that follows draws.

    :param base: an :class:`pplvi.AutoHierarchical` or :class:`pplvi.AutoAmortized` of the model.
    :param num_steps: number of transitions ``K``.
    :param kernel: builds their kernels; Hamiltonian dynamics without a Metropolis test unless given (DAIS, UHA).
    :param learn_path: train the betas between 0 and 1, through kernels that follow the targets' gradients.
    :param betas: their initial values; evenly spaced unless given.
    :raises ValueError: for another kind of base, fewer than one step, or betas that do not increase; when run, for
        kernels without a density.

    Jankowiak & Phan 2021 (semi-DAIS); Geffner & Domke 2022 (locally enhanced bounds); with an encoder Thin et al. 2021
    (Monte Carlo variational autoencoders).

    >>> from pplvi.guides import AutoHierarchical
    >>> def model(y):
    ...     scale = pyro.sample("scale", dist.LogNormal(0.0, 1.0))
    ...     with pyro.plate("group", len(y), subsample_size=2) as index:
    ...         effect = pyro.sample("effect", dist.Normal(0.0, scale))
    ...         pyro.sample("y", dist.Normal(effect, 1.0), obs=y[index])
    >>> pyro.clear_param_store(); pyro.set_rng_seed(0)
    >>> guide = AutoSemiDAIS(AutoHierarchical(model, plates="group"), num_steps=4)
    >>> {name: tuple(value.shape) for name, value in guide(torch.zeros(5)).items()}
    {'scale': (), 'effect': (2,)}
    """

    marker = "base.head.weight"

    def __init__(
        self,
        base: AutoAmortized,
        num_steps: Count = 4,
        kernel: Kernel | None = None,
        *,
        learn_path: bool = True,
        betas: Sequence[Probability] | None = None,
    ) -> None:
        if base._pyro_context.used:
            raise ValueError(
                "base has been run by itself, and its parameters have their names: expected one that is new."
            )
        if base.is_point:
            raise ValueError("base has family='delta', a point without a density: expected a family to anneal from.")
        super().__init__(base.model)
        PyroModule.__setattr__(self, "base", base)  # not Pyro's list of parts: a part would look for its plates here
        self.path = Betas(num_steps, learn=learn_path, betas=betas)
        self._kernel = kernel or UncorrectedHamiltonianKernel(step_size=0.1, keep=0.9)

    @property
    def betas(self) -> Tensor:
        """The betas of the path, ``(num_steps + 1,)``."""
        return self.path.betas.detach()

    def _setup(self, structure: Locals) -> None:
        site = Coordinates("noise", (structure.size,), (), biject_to(constraints.real_vector))
        for k in range(1, self.path.num_steps + 1):
            ahead, back = self._kernel.build((site,), _LocalDensity(self.path, k))
            setattr(self, f"forward_{k}", ahead)
            setattr(self, f"reverse_{k}", back)
        self.prototype_trace = self.base.prototype_trace

    def forward(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """Draw every latent site of the model; same arguments as the model."""
        self._claim_name()  # before parameters of the base are read from the store
        structure = self.base.structure(args, kwargs)
        if self.prototype_trace is None:
            self._setup(structure)
        latents = self.base.draw_globals(args, kwargs)
        with self.base.inside_plates(structure, args, kwargs) as indices:
            start, _ = self.base._distribution(args, kwargs, structure, indices, latents)
            self._own(self.base.head._parameters["weight"])
            setting = _Setting(self.model, args, kwargs, structure, {**indices, **latents}, start)
            packed, gain = from_noise(start, self._annealed(setting))
            delta = dist.Delta(packed, log_density=-gain, event_dim=1)
            pyro.sample(f"_{self._pyro_name}_latent", delta, infer={"is_auxiliary": True})
            return latents | place(structure, packed)

    def _annealed(self, setting: _Setting) -> Tensor:
        """Noise that stands for the latents of every element, after the last transition."""
        zero = self.base.head.weight.new_zeros(setting.start.shape())
        with Level("_0", {}) as level:
            pyro.sample("noise", dist.Normal(zero, 1.0).to_event(1))
        steps = range(1, self.path.num_steps + 1)
        ahead, back = (tuple(getattr(self, f"{way}_{k}") for k in steps) for way in ("forward", "reverse"))
        return climb(ahead, back, level.values, (setting,), {}, {}, last=f"_{len(steps)}")["noise"]

    def get_posterior(self, *args: Any, **kwargs: Any) -> Any:
        """Refused: the density of the last level alone is not known.

        :raises ValueError: always.
        """
        raise ValueError(
            "the draws of an annealed guide have no density that could be evaluated: expected weights on the extended "
            "space, as pplvi.Posterior has them. The distribution they start from is guide.base.get_posterior(...)."
        )

    @torch.no_grad()
    def quantiles(self, quantiles: Sequence[float] | Tensor, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """Marginal quantiles ``{site: (Q, *shape)}``, of local latents by simulation in unconstrained coordinates.

        :raises ValueError: for probabilities outside ``[0, 1]``.
        """
        probs = self.base._checked(quantiles)
        found = self.base.structure(args, kwargs).quantiles(self, probs, args, kwargs)
        return self.base.global_quantiles(probs, args, kwargs) | found
