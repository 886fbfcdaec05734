"""Normalising flows as a guide over all continuous latents."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from operator import attrgetter
from typing import Any, Literal

import torch
from pyro.distributions import constraints
from pyro.infer.autoguide import init_to_median
from torch import Tensor, nn

from pplvi.guides.base import ContinuousGuide
from pplvi.guides.flows.build import FAMILIES, AffineFlowTransform, build, make_identity, with_tensors
from pplvi.kinds.checked import checked
from pplvi.kinds.kinds import Count, Positive
from pplvi.types import Program

__all__ = ["AutoFlow"]

_FULL_UP_TO = 100  # dimensions


@checked
class AutoFlow(ContinuousGuide):
    r"""A normalising flow over all continuous latents, in unconstrained space.

    .. math:: z = c + R (\mathrm{loc} + \mathrm{scale} \odot L f_\phi(x)), \quad x \sim \mathrm{Normal}(0, I), \qquad
        \log q(z) = \log \mathrm{Normal}(x; 0, I) - \log |\partial f_\phi / \partial x|
        - \sum_d \log R_{dd} \mathrm{scale}_d

    with ``z`` the latents of the model packed into ``(*batch, latent_dim)`` after Pyro's ``biject_to``, densities in
    nats. ``L`` is lower triangular with a unit diagonal, so that the flow need not learn what a Gaussian can do. At the
    start ``f`` and ``L`` are the identity: the guide *is* ``AutoDiagonalNormal(model, init_loc_fn, init_scale)``, and
    its family contains all of those and, with ``L``, all of ``AutoMultivariateNormal``. ``c = 0`` and ``R = I``, unless
    the guide starts at a Gaussian (:func:`pplvi.start_at_pathfinder`): then ``c`` and the lower triangular ``R`` are
    that Gaussian's, fixed (buffers), and all parameters are in units of its spread, whatever the units of the latents.

    What a pass over ``D`` coordinates costs, in evaluations of each of the ``transforms`` networks (forward and
    backward alike):

    ================= ============================================== ======= =========================== ==========
    ``flow``          one transform                                  draws   density of its own draw     elsewhere
    ================= ============================================== ======= =========================== ==========
    ``"nsf"``         rational-quadratic spline, coupling            1       0                           2
    ``"iaf"``         affine, autoregressive                         1       0                           D + 1
    ``"maf"``         affine, autoregressive                         D + 1   0                           1
    ``"nice"``        affine, coupling; ``"coupling"`` is the same   1       0                           1
    ``"quadratic"``   affine, coupling; quadratic forms, rotations   1       0                           1
    ``"copula"``      normal copula, a spline for each marginal      1       0                           1
    ``"bnaf"``        one block autoregressive monotone network      1       0                           75 D + 1
    ================= ============================================== ======= =========================== ==========

    ``passes=2`` makes couplings of the autoregressive families, as it does of ``"nsf"`` unless told otherwise:
    "elsewhere" and draws then cost 2 at most. ``passes=None`` makes ``"nsf"`` autoregressive, which costs ``D + 1`` and
    ends within half a nat of couplings (``benchmarks/flows.py``). ``inverse`` turns the order of these families round.
    "Elsewhere" is what objectives pay that score draws apart from their making: a frozen guide (``estimator="stl"`` or
    ``"dreg"``), the forward KL and the thermodynamic objective. So take ``"quadratic"`` with :func:`pplvi.flow_recipe`,
    which starts at a Gaussian, where a Gaussian comes near the posterior; ``"nsf"`` for the ELBO, importance-weighted
    and Renyi bounds, above all for skewed, heavy or multimodal posteriors of few dimensions; ``"iaf"`` where splines
    are too slow; ``"nice"`` for many dimensions and for objectives that score elsewhere; ``inverse=False`` for the
    forward KL with an autoregressive flow. ``"bnaf"`` is the most flexible in one transform; points from elsewhere are
    found by bisection, so take it for the ELBO as it is (no sticking the landing, no DReG). Splines act on ``[-5, 5]``
    around ``loc`` in units of ``scale`` and are the identity beyond, so tails stay Gaussian.

    Source: Rezende & Mohamed 2015 (flows as guides); Kingma et al. 2016 (IAF); Papamakarios et al. 2017 (MAF); Dinh et
    al. 2014, 2017 (NICE, RealNVP); Durkan et al. 2019 (NSF); Tran, Blei & Airoldi 2015 (copulas); De Cao, Titov & Aziz
    2019 (BNAF).

    :param model: a Pyro model; all its latent sites are continuous, none in a subsampled plate.
    :param flow: a name from the table, a factory ``latent_dim -> zuko.lazy.Flow`` (a class from ``zuko.flows`` will
        do), or a ``zuko.lazy.Flow``, of which the guide takes a copy.
    :param transforms: number of transforms (3 for zuko's families); passed on to a factory only if given.
    :param hidden_features: widths of each network's hidden layers (``(64, 64)`` for zuko's; for ``"bnaf"`` units of
        each coordinate, ``(8, 8)``); likewise.
    :param inverse: whether zuko's transform is used from base to data, which makes draws fast, instead of from data to
        base, which makes densities fast. ``None``: the table's for a name, ``False`` for anything else.
    :param affine: ``"full"`` learns ``L``, ``"diagonal"`` leaves it out. ``None``: full in 2 to 100 dimensions.
    :param init_loc_fn: per-site initial value, any of Pyro's ``init_to_*``.
    :param init_scale: initial standard deviation of every unconstrained coordinate.
    :param identity_init: whether to start ``f`` at the identity. ``None``: yes, except for a flow instance, which may
        be trained and is used with the weights that it has.
    :param options: further keywords for the family or factory, such as ``bins=16`` or ``activation=torch.nn.ELU``.
    :raises ValueError: an unknown name or option; on the first run, a model without latent sites, with discrete ones,
        or with some in a subsampled plate, and a flow that does not fit the model or cannot start at the identity.

    >>> import pyro, pyro.distributions as dist, torch
    >>> from pyro.infer import SVI, Trace_ELBO
    >>> def model():
    ...     x = pyro.sample("x", dist.Normal(0., 1.))
    ...     pyro.sample("y", dist.Normal(x ** 2, 0.5))
    >>> pyro.clear_param_store(); pyro.set_rng_seed(0)
    >>> guide = AutoFlow(model, flow="nsf", transforms=2, hidden_features=(16,), init_scale=1.0)
    >>> elbo = Trace_ELBO(num_particles=16, vectorize_particles=True)
    >>> svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.01}), elbo)
    >>> losses = [svi.step() for _ in range(60)]
    >>> sum(losses[-10:]) < sum(losses[:10])
    True
    >>> guide.median()["x"].shape, guide.quantiles([0.05, 0.95])["y"].shape
    (torch.Size([]), torch.Size([2]))
    """

    def __init__(
        self,
        model: Program,
        flow: str | Callable[..., Any] | nn.Module = "nsf",
        *,
        transforms: Count | None = None,
        hidden_features: Sequence[Count] | None = None,
        inverse: bool | None = None,
        affine: Literal["full", "diagonal"] | None = None,
        init_loc_fn: Callable[..., Any] = init_to_median,
        init_scale: Positive = 0.1,
        identity_init: bool | None = None,
        **options: Any,
    ) -> None:
        sizes = {"transforms": transforms, "hidden_features": hidden_features}
        given = {key: value for key, value in sizes.items() if value is not None}
        _check_flow(flow, {**given, **options})
        super().__init__(model, init_loc_fn=init_loc_fn, init_scale=init_scale)
        self._flow = (flow,)  # a tuple, so that a flow given as a module is not registered: the guide trains its copy
        self._options = {**given, **options}
        self._inverse = FAMILIES[flow].draws_fast if inverse is None and isinstance(flow, str) else bool(inverse)
        self._affine, self._weighed = affine, set[int]()
        self._identity_init = not isinstance(flow, nn.Module) if identity_init is None else identity_init

    def _setup_parameters(self, loc: Tensor) -> None:
        whole = self._flow[0] != "copula"  # which has its correlations inside
        full = self._affine == "full" or (self._affine is None and whole and 1 < self.latent_dim <= _FULL_UP_TO)
        self._declare("centre", torch.zeros_like(loc), trained=False)
        self._declare("root", torch.eye(self.latent_dim).to(loc) if full else torch.ones_like(loc), trained=False)
        if full:
            self._declare("scale_tril", torch.eye(self.latent_dim).to(loc), constraints.unit_lower_cholesky)
        transform = build(self._flow[0], self.latent_dim, self._options)
        if self._identity_init:
            make_identity(transform, self.latent_dim)
        transform.to(loc.device, loc.dtype)
        tensors = {**dict(transform.named_parameters()), **dict(transform.named_buffers())}
        for name, tensor in tensors.items():
            self._declare(f"flow.{name}", tensor.detach(), trained=tensor.requires_grad)
        self._tensor_names = list(tensors)
        self._structure = (transform.to("meta"),)  # no values: a tensor that we failed to pass would raise

    def get_transform(self, *args: Any, **kwargs: Any) -> AffineFlowTransform:
        """The map from the standard normal to the guide at the present parameters; it remembers its last point.

        :raises ValueError: the guide has not run yet.
        """
        self._need_prototype("transform")
        tensors = {name: attrgetter(f"flow.{name}")(self) for name in self._tensor_names}
        to_base = with_tensors(self._structure[0], tensors)()
        draw, score = (to_base, to_base.inv) if self._inverse else (to_base.inv, to_base)
        transform = AffineFlowTransform(draw, score, *self._affine_map())
        transform.weighed = self._weighed
        return transform

    def _affine_map(self) -> tuple[Tensor, Tensor, Tensor | None]:
        """``c + R loc``, and ``R diag(scale) L`` as a diagonal and a unit lower triangle."""
        loc, scale = self.loc, self.scale
        if self.root.dim() == 1:
            return self.centre + self.root * loc, self.root * scale, None
        tril, diagonal = self.root @ (scale.unsqueeze(-1) * self.scale_tril), self.root.diagonal() * scale
        return self.centre + self.root @ loc, diagonal, tril / diagonal.unsqueeze(-1)

    @torch.no_grad()
    def start_at(self, loc: Tensor, root: Tensor) -> None:
        """Become a Gaussian, for a flow that is at the identity; parameters are in its units from then on.

        :param loc: mean over the packed latents, ``(latent_dim,)``.
        :param root: lower Cholesky factor of the covariance, or standard deviations where there is no ``L``.
        :raises ValueError: the guide has not run yet.
        """
        self._need_prototype("parameters")
        self.centre.copy_(loc)
        self.root.copy_(root)
        self.loc = torch.zeros_like(self.centre)
        self.scale = torch.ones_like(self.centre)
        if self.root.dim() == 2:
            self.scale_tril = torch.eye(self.latent_dim).to(self.centre)

    def __getstate__(self) -> dict[str, Any]:
        state = super().__getstate__()
        built = self.prototype_trace is not None  # then the recipe, often a lambda, has done its work
        return {**state, "_flow": (None,), "_options": {}} if built else state


def _check_flow(flow: Any, options: Mapping[str, Any]) -> None:
    if isinstance(flow, str) and flow not in FAMILIES:
        raise ValueError(f"flow is {flow!r}; expected one of {sorted(FAMILIES)}, a factory, or a zuko.lazy.Flow")
    if isinstance(flow, nn.Module) and options:
        raise ValueError(f"{sorted(options)} came with a flow that is already built; pass them to its constructor")
