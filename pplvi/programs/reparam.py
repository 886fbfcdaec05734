"""Non-centered forms of hierarchical models, site by site, without a change to the program."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro.infer.reparam import LocScaleReparam, TransformReparam
from pyro.infer.reparam.reparam import Reparam
from torch import Tensor
from torch.distributions import Independent, MultivariateNormal, TransformedDistribution, constraints

from pplvi.kinds.checked import checked
from pplvi.kinds.kinds import Fraction
from pplvi.programs.handlers import Supply, aside, rewritten
from pplvi.programs.running import isolated, plain_run
from pplvi.programs.sites import latent_sites, sample_sites
from pplvi.types import Program, Values

__all__ = ["Reparametrized", "noncentered"]


_FORMS = {"non-centered": 0.0, "half centered": 0.5}


class Reparametrized:
    """A program with some of its latent sites in non-centered form: what :func:`noncentered` returns.

    :ivar sites: names of the sites; ``None`` until the first run, which finds them.
    """

    def __init__(self, model: Program, centered: float | None, sites: frozenset[str] | None) -> None:
        self.__wrapped__, self.centered, self.sites = model, centered, sites
        self._looked = False
        self.__doc__ = model.__doc__

    @property
    def __self__(self) -> Any:
        """The module that the program is, or is a method of; else this object."""
        return getattr(self.__wrapped__, "__self__", self.__wrapped__)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the program in its other form."""
        self.look(args, kwargs)
        return rewritten(self.__wrapped__, self._rule)(*args, **kwargs)

    def __repr__(self) -> str:
        name = getattr(self.__wrapped__, "__name__", type(self.__wrapped__).__name__)
        return f"noncentered({name}, sites={sorted(self.sites or ())})"

    def look(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> frozenset[str]:
        """Names of the sites to rewrite, found in two runs of the program unless they are known.

        :raises ValueError: for names of no site.
        """
        if not self._looked:
            if self.sites is None:
                self.sites = dependent_sites(self.__wrapped__, args, kwargs)
            elif unknown := sorted(self.sites - (known := _names(self.__wrapped__, args, kwargs))):
                raise ValueError(f"sites={unknown}: the model has no such sites, expected some of {sorted(known)}.")
            self._looked = True
        return self.sites or frozenset()

    def values_at(self, values: Values, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Tensor]:
        """Values of the latents of this form where those of the program itself have the given ones."""
        self.look(args, kwargs)

        def supplied(*args: Any, **kwargs: Any) -> Any:
            with Supply(values):
                return self.__wrapped__(*args, **kwargs)

        with aside(), isolated():
            run = plain_run(rewritten(supplied, self._rule), args, kwargs)
        return {name: site["value"] for name, site in latent_sites(run.model).items()}

    def _rule(self, msg: Any) -> Reparam | None:
        whole = msg["name"].removesuffix("_base")
        if msg["is_observed"] or self.sites is None or whole not in self.sites:
            return None
        fn = _inner(msg["fn"])
        if isinstance(fn, TransformedDistribution):
            return TransformReparam()
        if isinstance(fn, MultivariateNormal):
            return _Whitened()
        if _parts(fn) is None:
            raise ValueError(
                f"site {whole!r} has the distribution {type(fn).__name__}: expected a location-scale family on the "
                "real line, a transform of one, or a MultivariateNormal. Leave it out of sites=."
            )
        return LocScaleReparam(self.centered)


@checked
def noncentered(
    model: Program, *, sites: Iterable[str] | None = None, centered: Fraction | None = 0.0
) -> Reparametrized:
    r"""The same model with the latents of its hierarchies standardised, a plain Pyro program as before.

    A latent :math:`x \sim \mu + \sigma \varepsilon` whose location or scale depends on other latents becomes

    .. math:: \tilde x \sim \lambda \mu + \sigma^\lambda \varepsilon, \qquad
        x = \mu + \sigma^{1 - \lambda} (\tilde x - \lambda \mu)

    with :math:`\lambda` = ``centered``. The latent site is now ``x_decentered``, which at :math:`\lambda = 0` is
    standard noise, and ``x`` is a deterministic site of the same shape, in ArviZ's posterior too. Likelihood and
    evidence are what they were, so that bounds of the two forms can be compared; which is the better one for a guide
    depends on how much the data say of each element. ``fit(model, "auto")`` tries both.

    Rewritten are, unless ``sites`` names others, the latents with a location-scale family on the real line (normal,
    Student's t, Laplace, ...), invertible transforms of these (log-normal; they get ``x_base`` in between), and
    multivariate normals such as Gaussian processes, whatever :math:`\lambda`: :math:`x = \mu + L \tilde x`. What
    depends on other latents is seen by running the model twice, at the first call. The form that ``"auto"`` took is
    its ``fit.model``, to which richer guides can be fitted: ``fit(easier.model, AutoFlow, **flow_recipe())``.

    Source: Papaspiliopoulos, Roberts and Sköld 2007, A general framework for the parametrization of hierarchical
    models; Gorinova, Moore and Hoffman 2020, Automatic reparameterisation of probabilistic programs.

    :param model: a Pyro program: a function, a module, or a method of one. Condition it before, not after.
    :param sites: names of the latent sites to rewrite.
    :param centered: :math:`\lambda`, 0 for non-centered, below 1; ``None`` learns one in [0, 1] for each element of an
        event, the parameter ``x_centered`` of the model (variationally inferred parametrisation).
    :returns: the program.
    :raises ValueError: for ``centered`` outside of [0, 1); on a run, for a site in ``sites`` that is of no such family.

    >>> import pyro.distributions as dist
    >>> def schools():
    ...     scale = pyro.sample("scale", dist.HalfCauchy(5.0))
    ...     with pyro.plate("school", 8):
    ...         return pyro.sample("effect", dist.Normal(0.0, scale))
    >>> model = noncentered(schools)
    >>> model().shape, sorted(model.sites)
    (torch.Size([8]), ['effect'])
    """
    if isinstance(sites, str):
        raise ValueError(f"sites={sites!r}: expected a list of names, [{sites!r}].")
    found = None if sites is None else frozenset(sites)
    return Reparametrized(model, None if centered is None else float(centered), found)


def forms_of(model: Program, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Program]:
    """The non-centered forms of a model to try beside the written one, by name; none where nothing would change."""
    found = _dependent(model, args, kwargs)
    whole = all(isinstance(_inner(fn), MultivariateNormal) for fn in found.values())
    sizes = {name: size for name, size in _FORMS.items() if not (whole and size)}
    return {name: Reparametrized(model, size, frozenset(found)) for name, size in sizes.items()} if found else {}


def dependent_sites(model: Program, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> frozenset[str]:
    """Latents of a location-scale family whose location or scale depends on other latents: two runs differ in them."""
    return frozenset(_dependent(model, args, kwargs))


def _names(model: Program, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> set[str]:
    with aside(), isolated():
        return {name for name, _ in sample_sites(plain_run(model, args, kwargs).model)}


def _dependent(model: Program, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Their distributions, by name; without those that depend on enumerated sites, as they would have no draws."""
    with aside(), isolated():
        run = plain_run(model, args, kwargs)
        first, rows = latent_sites(run.model), run.subsample_indices(of_model=True)
        torch.rand(())  # from here on other random numbers, but for the minibatch
        second = _latents_given(rows, model, args, kwargs)
        summed = {name: site["fn"] for name, site in first.items() if site["infer"].get("enumerate") == "parallel"}
        same = {**rows, **{name: site["value"] for name, site in first.items()}}
        ends = [
            _latents_given({**same, **{name: _state(fn, end) for name, fn in summed.items()}}, model, args, kwargs)
            for end in ((0, -1) if summed else ())
        ]
    found = {name: site["fn"] for name, site in first.items() if name in second and _varies(site, second[name])}
    return {name: fn for name, fn in found.items() if not ends or not _varies(*(end[name] for end in ends))}


def _latents_given(values: Values, model: Program, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    with Supply(values):
        return latent_sites(plain_run(model, args, kwargs).model)


def _state(fn: Any, end: int) -> Tensor:
    """One of the values that a discrete variable can have, for all its elements."""
    return fn.enumerate_support(expand=False)[end].expand(fn.shape())


def _varies(one: Any, other: Any) -> bool:
    pairs = zip(_parts(one["fn"]) or (), _parts(other["fn"]) or (), strict=False)
    return any(a.shape == b.shape and not torch.equal(a, b) for a, b in pairs)


def _inner(fn: Any) -> Any:
    while isinstance(fn, Independent):
        fn = fn.base_dist
    return fn


def _parts(fn: Any) -> tuple[Tensor, Tensor] | None:
    """Location and scale of a distribution that can be rewritten."""
    fn = _inner(fn)
    if isinstance(fn, TransformedDistribution):
        return _parts(fn.base_dist) if all(t.bijective for t in fn.transforms) else None
    if isinstance(fn, MultivariateNormal):
        return fn.loc, fn.scale_tril
    real = {"loc", "scale"} <= fn.arg_constraints.keys() and fn.support is constraints.real
    return (fn.loc, fn.scale) if real else None


def decentered(name: str) -> str:
    """The latent site that a non-centered one is computed from, as Pyro names it.

    >>> decentered("theta")
    'theta_decentered'
    """
    return f"{name}_decentered"


class _Whitened(Reparam):
    """A multivariate normal as a linear map of standard noise."""

    def apply(self, msg: Any) -> Any:
        fn, events = _inner(msg["fn"]), msg["fn"].event_dim
        value, noise = msg["value"], dist.Normal(torch.zeros_like(fn.loc), 1.0).to_event(events)
        white = None if value is None else _solve(fn.scale_tril, value - fn.loc)
        white = pyro.sample(decentered(msg["name"]), noise, obs=white, infer={"is_observed": False})
        value = fn.loc + (fn.scale_tril @ white.unsqueeze(-1)).squeeze(-1) if value is None else value
        return {"fn": dist.Delta(value, event_dim=events).mask(False), "value": value, "is_observed": True}


def _solve(tril: Tensor, value: Tensor) -> Tensor:
    found: Tensor = torch.linalg.solve_triangular(tril, value.unsqueeze(-1), upper=False)
    return found.squeeze(-1)
