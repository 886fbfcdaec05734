"""Amortised guides: one network from the data of a plate element to the posterior of its latents."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, Literal

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.infer.autoguide import AutoNormal
from pyro.nn.module import PyroModule, PyroParam, to_pyro_module_
from torch import Tensor, nn

from pplvi.guides.amortized.elements import Locals
from pplvi.guides.flows.conditional import DeltaConditional, build_conditional
from pplvi.guides.owned import OwnedGuide, network_of
from pplvi.kernels.coordinates import Coordinates, coordinates
from pplvi.kinds.checked import checked
from pplvi.kinds.kinds import Positive
from pplvi.programs.autoguides import auxiliary_values
from pplvi.programs.calls import Arguments
from pplvi.programs.first_run import given_subsamples
from pplvi.programs.parts import sharded_in
from pplvi.programs.running import plain_run
from pplvi.programs.sites import Plate, latent_sites, site_plates
from pplvi.programs.state import preserved_rng
from pplvi.types import Program

__all__ = ["AutoAmortized"]

Family = Literal["normal", "multivariate_normal", "flow", "delta"]


@checked
class AutoAmortized(OwnedGuide):
    r"""A guide whose local latents get their posterior from a network that sees their data.

    .. math:: q(\theta, z_{1:N}) = q(\theta) \prod_n q_{f(x_n)}(z_n)

    For latents inside the plates ``plates`` the encoder ``f`` maps the data of each element to features, and a linear
    head maps those to the parameters of a distribution over the element's latents, packed in unconstrained coordinates.
    Its size does not grow with the data: minibatches come in any order, and new data of any size get a posterior
    without training. All other latents ("global") have a guide of their own.

    :param model: a Pyro model.
    :param encoder: a module from the inputs, ``(*plates, ...)``, to features, ``(*plates, F)``. It becomes part of the
        guide, so that each guide needs one of its own.
    :param plates: name of the plate of the data, or names, when elements are indexed by several.
    :param inputs: what the encoder sees, from the model's arguments: a tensor or a tuple of them, whose first
        dimensions are the plates, left to right. By default the first argument. Full-size inputs of a subsampled plate
        are indexed; inputs of the minibatch's size are taken as they are. Put a mask of missing entries in here.
    :param family: per element ``"normal"`` (independent), ``"multivariate_normal"`` (full covariance), ``"flow"`` (a
        conditional neural spline flow on features) or ``"delta"``: the encoder's output is the latents themselves, in
        unconstrained coordinates, without a linear head; trained with an ELBO, it predicts posterior modes.
    :param global_guide: guide of the global latents, a class or factory ``model -> guide``.
    :param init_scale: initial standard deviation of every local coordinate.
    :raises ValueError: for plates or families that do not exist; on the first run for an encoder whose output does not
        have the plates in front, discrete latents inside the plates, or a subsampled plate inside them.

    Kingma & Welling 2014; Rezende, Mohamed & Wierstra 2014; flows per datum: Rezende & Mohamed 2015.

    >>> import pyro, pyro.distributions as dist
    >>> def model(x):
    ...     scale = pyro.sample("scale", dist.LogNormal(0.0, 1.0))
    ...     with pyro.plate("data", len(x)):
    ...         z = pyro.sample("z", dist.Normal(0.0, scale))
    ...         pyro.sample("x", dist.Normal(z, 1.0), obs=x)
    >>> pyro.clear_param_store(); pyro.set_rng_seed(0)
    >>> encoder = nn.Sequential(nn.Unflatten(-1, (-1, 1)), nn.Linear(1, 8), nn.Tanh())
    >>> guide = AutoAmortized(model, encoder, plates="data")
    >>> {name: tuple(value.shape) for name, value in guide(torch.zeros(5)).items()}
    {'scale': (), 'z': (5,)}
    >>> guide(torch.zeros(3))["z"].shape  # new data
    torch.Size([3])
    """

    amortized = True  # its size does not grow with the data

    def __init__(
        self,
        model: Program,
        encoder: nn.Module,
        plates: str | Sequence[str],
        *,
        inputs: Callable[..., Any] | None = None,
        family: Family = "normal",
        global_guide: Callable[[Program], Program] = AutoNormal,
        init_scale: Positive = 0.1,
    ) -> None:
        super().__init__(model)
        if not sharded_in([encoder]):
            to_pyro_module_(encoder)
        self.encoder = encoder
        self._names = (plates,) if isinstance(plates, str) else tuple(plates)
        self._how: dict[str, Any] = {"inputs": inputs or _first, "global_guide": global_guide}
        self._family, self._init_scale = family, init_scale
        self._seen: dict[Any, Locals] = {}

    # ------------------------------------------------------------------ structure

    def _setup(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        with poutine.block():
            run = plain_run(self.model, args, kwargs)
        self.prototype_trace = run.model
        self._claim_name()
        try:
            structure = self._read(run.model, run.given_subsamples)
            self._setup_globals(structure)
            # Shapes only: the plates' elements are the first ones.
            drawn = {name: site["value"] for name, site in latent_sites(run.model).items()}
            features = self._joined(self._encode(args, kwargs, structure, _all(structure)), drawn)
            self._own_marker()  # a point's is one of the encoder, which may have been another guide's elsewhere
            where = {"device": features.device, "dtype": features.dtype}
            conditional = build_conditional(self._family, structure.size, features.shape[-1], self._init_scale, **where)
            self.conditional = conditional
            if isinstance(conditional, DeltaConditional):
                _check_codes(features, structure.size)
            else:
                self.head = _head(features, conditional.num_outputs, structure.size)
            self._claim_name()
        except BaseException:
            self.prototype_trace = None  # the next run starts over instead of finding half a guide
            raise

    def _setup_globals(self, structure: Locals) -> None:
        local = {site.name for site in structure.sites}
        trace: Any = self.prototype_trace
        rest = [name for name in latent_sites(trace) if name not in local]
        guide = self._how["global_guide"](poutine.block(self.model, hide=sorted(local))) if rest else None
        # Not Pyro's list of parts: a part would look for its plates here.
        self.__dict__["_has_globals"] = guide is not None
        if guide is not None:
            PyroModule.__setattr__(self, "global_guide", guide)

    def _read(self, trace: Any, given: frozenset[str]) -> Locals:
        sites = {name: site for name, site in latent_sites(trace).items() if self._is_local(site)}
        if not sites:
            found = sorted({plate.name for site in latent_sites(trace).values() for plate in site_plates(site)})
            raise ValueError(
                f"plates={list(self._names)}: the model has no latent site inside all of these; its latents are in "
                f"{found}. Name the plate of the data."
            )
        first = site_plates(next(iter(sites.values())))
        structure = Locals(
            tuple(coordinates(name, site) for name, site in sites.items()),
            tuple(plate for plate in first if plate.name in self._names),
            bool(given & set(self._names)),
        )
        structure.check()
        return structure

    def _is_local(self, site: Any) -> bool:
        return set(self._names) <= {plate.name for plate in site_plates(site)}

    def structure(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Locals:
        """Sites and plates for these arguments; one run of the model for each new shape."""
        if self.prototype_trace is None:
            self._setup(args, kwargs)
        key = Arguments.of(args, kwargs).key
        if key not in self._seen:
            with poutine.block():
                run = plain_run(self.model, args, kwargs)
            self._seen[key] = self._read(run.model, run.given_subsamples)
        return self._seen[key]

    # ------------------------------------------------------------------ from data to distributions

    def _encode(
        self, args: tuple[Any, ...], kwargs: Mapping[str, Any], structure: Locals, indices: Mapping[str, Tensor]
    ) -> Tensor:
        """Features ``(*plates, F)`` of the elements that the plates have drawn."""
        given = self._how["inputs"](*args, **kwargs)
        given = given if isinstance(given, tuple) else (given,)
        features = network_of(self, "encoder")(*(_chosen(x, structure.plates, indices) for x in given))
        expected = tuple(plate.size for plate in structure.plates)
        if features.dim() != len(expected) + 1 or tuple(features.shape[:-1]) != expected:
            raise ValueError(
                f"the encoder gave {tuple(features.shape)} for inputs {[tuple(x.shape) for x in given]}: expected "
                f"{expected} and one dimension of features. Put plates {[p.name for p in structure.plates]} first."
            )
        return features

    def _distribution(
        self,
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        structure: Locals,
        indices: Mapping[str, Tensor],
        latents: Mapping[str, Tensor],
    ) -> tuple[dist.TorchDistribution, Tensor]:
        features = self._encode(args, kwargs, structure, indices)
        features = self._joined(features.reshape(*structure.batch_shape, features.shape[-1]), latents)
        outputs = self._outputs(features)
        return self.conditional(outputs, features), outputs

    def _joined(self, features: Tensor, latents: Mapping[str, Tensor]) -> Tensor:
        """Features of the elements, with what the family makes of the global latents."""
        return features

    def _outputs(self, features: Tensor) -> Tensor:
        """What parametrises each element's distribution, ``(*batch, num_outputs)``."""
        if "table" not in self._pyro_params:
            return features if self.is_point else self.head(features)
        table: Tensor = self.table
        if table.shape[:-1] != features.shape[:-1]:
            raise ValueError(
                f"this guide was refined for data of shape {tuple(table.shape[:-1])} and got "
                f"{tuple(features.shape[:-1])}: expected the data that it was refined for. Use the amortised guide."
            )
        return table

    def tabulate(self, *args: Any, **kwargs: Any) -> AutoAmortized:
        """A copy in which each element's parameters are free, and start where the network puts them.

        :raises ValueError: for a subsampled plate.
        """
        structure = self.structure(args, kwargs)
        if cut := [plate.name for plate in structure.plates if plate.size != plate.full_size]:
            raise ValueError(f"plates {cut} are subsampled: expected whole plates, with parameters for each element.")
        _, outputs = self._distribution(args, kwargs, structure, _all(structure), {})
        new = copy.deepcopy(self)
        new.table = PyroParam(outputs.detach().clone())
        return new

    def forward(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """Draw every latent site of the model; same arguments as the model."""
        structure = self.structure(args, kwargs)
        self._claim_name()
        latents = self.draw_globals(args, kwargs)
        with self.inside_plates(structure, args, kwargs) as indices:
            posterior, _ = self._distribution(args, kwargs, structure, indices, latents)
            packed = pyro.sample(f"_{self._pyro_name}_latent", posterior, infer={"is_auxiliary": True})
            self._own_marker()
            return latents | place(structure, packed, self.is_point)

    @property
    def is_point(self) -> bool:
        """Whether the local latents are at a point, which has no density."""
        return self._family == "delta"

    @property
    def marker(self) -> str:  # type: ignore[override]
        """A parameter that every such guide has; a point has only those of its encoder, if there are any."""
        if not self.is_point:
            return "head.weight"
        return next((name for name, _ in self.named_parameters() if name.startswith("encoder.")), "encoder.")

    def _own_marker(self) -> None:
        found = dict(self.named_parameters()).get(self.marker)
        if found is not None:
            self._own(found)

    def draw_globals(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Tensor]:
        """Draw the latents outside the amortised plates."""
        return dict(self.global_guide(*args, **kwargs) or {}) if self._has_globals else {}

    @contextmanager
    def inside_plates(
        self, structure: Locals, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> Iterator[dict[str, Tensor]]:
        """Enter the amortised plates; the indices of their elements by name."""
        with poutine.block():
            given = given_subsamples(self.model, args, kwargs) if structure.own_subsample else {}
        with ExitStack() as stack:
            plates = {plate.name: _plate(plate, given.get(plate.name)) for plate in structure.plates}
            yield {name: stack.enter_context(plate) for name, plate in plates.items()}

    # ------------------------------------------------------------------ Pyro's AutoGuide contract

    def get_posterior(self, *args: Any, **kwargs: Any) -> dist.TorchDistribution:
        """The posterior of every element's packed unconstrained coordinates, batch ``(*plates)``, event ``(D,)``."""
        structure = self.structure(args, kwargs)
        return self._distribution(args, kwargs, structure, _all(structure), {})[0]

    @torch.no_grad()
    def quantiles(self, quantiles: Sequence[float] | Tensor, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """Marginal quantiles ``{site: (Q, *shape)}`` of unconstrained coordinates, mapped to each site's support.

        :raises ValueError: for probabilities outside ``[0, 1]``.
        """
        probs = self._checked(quantiles)
        structure = self.structure(args, kwargs)
        found = self.global_quantiles(probs, args, kwargs)
        packed = self._marginal_quantiles(probs, *self._distribution(args, kwargs, structure, _all(structure), {}))
        return found | {site.name: site.write(structure.split(packed)[site.name]) for site in structure.sites}

    def global_quantiles(self, probs: Tensor, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Tensor]:
        """Marginal quantiles ``{site: (Q, *shape)}`` of the latents outside the amortised plates."""
        found = self.global_guide.quantiles(probs.tolist(), *args, **kwargs) if self._has_globals else {}
        return {name: torch.as_tensor(value) for name, value in found.items()}

    @staticmethod
    def _checked(quantiles: Sequence[float] | Tensor) -> Tensor:
        probs = torch.as_tensor(quantiles)
        if probs.dim() != 1 or not bool(((probs >= 0) & (probs <= 1)).all()):
            raise ValueError(f"quantiles is {quantiles!r}; expected a flat list of probabilities in [0, 1]")
        return probs

    def _marginal_quantiles(self, probs: Tensor, posterior: dist.TorchDistribution, outputs: Tensor) -> Tensor:
        if (moments := self.conditional.moments(outputs)) is None:
            with preserved_rng():
                return torch.quantile(posterior.sample((2_000,)), probs.to(outputs), 0)
        loc, scale = moments
        return loc + scale * torch.special.ndtri(probs.to(loc)).reshape(-1, *[1] * loc.dim())

    # ------------------------------------------------------------------ copies leave the original alone

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_how": {**self._how, "global_guide": None}, "_seen": {}}

    def __deepcopy__(self, memo: dict[int, Any]) -> OwnedGuide:
        memo[id(self._seen)] = self._seen
        part = getattr(self, "global_guide", None)
        model = getattr(part, "_model", None)
        new = super().__deepcopy__(memo)
        for guide in (part, getattr(new, "global_guide", None)):
            if model is not None:
                guide.__dict__["_model"] = model  # Pyro's own guides lose it
        return new

    def auxiliary_values(self, latents: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Values of the auxiliary sites that give these latents (constrained), for scoring draws of the model."""
        if not self._seen:
            raise ValueError("this guide has not seen the model's arguments yet: call guide(*args) first.")
        structure = next(iter(self._seen.values()))  # where sites sit does not depend on sizes
        found = {f"_{self._pyro_name}_latent": structure.pack(latents)}
        return found | (auxiliary_values(self.global_guide, latents) if self._has_globals else {})


def _first(*args: Any, **kwargs: Any) -> Any:
    given = (*args, *kwargs.values())
    if not given:
        raise ValueError("an amortised guide got no data: expected the model's arguments. Call guide(*args).")
    return given[0]


def _head(features: Tensor, num_outputs: int, size: int) -> nn.Module:
    """A linear map to outputs: locations see the data from the start, all else begins at its initial value."""
    head = nn.Linear(features.shape[-1], num_outputs, device=features.device, dtype=features.dtype)
    with torch.no_grad():
        head.weight[size:] = 0.0
        head.bias.zero_()
    to_pyro_module_(head)
    return head


def _plate(plate: Plate, subsample: Tensor | None) -> Any:
    size = None if subsample is not None or plate.size == plate.full_size else plate.size
    return pyro.plate(plate.name, plate.full_size, subsample_size=size, subsample=subsample, dim=plate.dim)


def _all(structure: Locals) -> dict[str, Tensor]:
    return {plate.name: torch.arange(plate.size) for plate in structure.plates}


def _chosen(given: Tensor, plates: Sequence[Plate], indices: Mapping[str, Tensor]) -> Tensor:
    """Inputs of the elements in the minibatch: full-size inputs are indexed, others are the minibatch already."""
    for axis, plate in enumerate(plates):
        if given.shape[axis] == plate.full_size != plate.size:
            given = given.index_select(axis, indices[plate.name].to(given.device))
    return given


def _check_codes(features: Tensor, size: int) -> None:
    if features.shape[-1] != size:
        raise ValueError(
            f"the encoder gave {features.shape[-1]} numbers for each element: family='delta' expects the {size} "
            "unconstrained coordinates of its latents, in the order of the model."
        )


def place(structure: Locals, packed: Tensor, point: bool = False) -> dict[str, Tensor]:
    """Sample the local latents at packed coordinates, inside the amortised plates.

    :param point: the coordinates are no draws of a density, which would be changed by the map to the support.
    """
    return {site.name: _unpack(site, structure, packed, point) for site in structure.sites}


def _unpack(site: Coordinates, structure: Locals, packed: Tensor, point: bool) -> Tensor:
    free = structure.split(packed)[site.name]
    value = site.write(free)
    jacobian = site.transform.log_abs_det_jacobian(free.reshape((*free.shape[:-1], *site.shape)), value)
    density = torch.zeros_like(jacobian) if point else -jacobian
    delta = dist.Delta(value, log_density=density, event_dim=site.transform.codomain.event_dim)
    with ExitStack() as stack:
        for plate in structure.inner(site):
            stack.enter_context(pyro.plate(plate.name, plate.size, dim=plate.dim))
        return pyro.sample(site.name, delta)
