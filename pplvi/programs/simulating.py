"""Parameters and data drawn from a model, and the model with such data in the place of its own."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pyro
import torch
from torch import Tensor

from pplvi.programs.dreams import observed
from pplvi.programs.handlers import Uncondition
from pplvi.programs.running import plain_run, trace_within
from pplvi.programs.sites import is_deterministic, is_subsample, latent_sites, sample_sites
from pplvi.types import Call, MutableValues, Program, Values


@dataclass(frozen=True)
class Simulated:
    """One draw of a model.

    :ivar truth: values of latent and deterministic sites.
    :ivar data: values of the sites that stand for data.
    """

    truth: MutableValues
    data: MutableValues


class Simulator:
    """Draws data from a model's own prior predictive distribution, and puts them where the model has its own.

    Data reach a program as the argument that is, by identity, the value of the observed site; as the argument of the
    site's name that is ``None`` or left out; or, where there is neither, by ``pyro.condition``, which a guide that
    reads its arguments does not see.

    :param model: the model.
    :param call: its arguments.
    :param names: the sites that stand for data; all observed ones unless given.
    :ivar conditioned: the sites of which data enter by ``pyro.condition``.
    :raises ValueError: if there are no data, or runs of the model are no draws of what it is fitted to: factors,
        scales, subsampled plates, priors that cannot be drawn from.

    >>> import pyro.distributions as dist
    >>> def model(x, y=None):
    ...     b = pyro.sample("b", dist.Normal(0.0, 1.0))
    ...     with pyro.plate("data", len(x)):
    ...         pyro.sample("y", dist.Normal(b * x, 1.0), obs=y)
    >>> x = torch.tensor([1.0, 2.0])
    >>> simulator = Simulator(model, ((x,), {}), ["y"])
    >>> drawn = simulator.draw()
    >>> _, (args, kwargs) = simulator.with_data(drawn.data)
    >>> args[1] is drawn.data["y"], simulator.conditioned
    (True, frozenset())
    """

    def __init__(self, model: Program, call: Call, names: Sequence[str] | None = None) -> None:
        self.model, self.call = model, call
        sites = dict(sample_sites(plain_run(model, *call).model))
        found = [n for n, s in sites.items() if s["is_observed"] and not is_deterministic(s)]
        self.names = tuple(found if names is None else names)
        _check_sites(sites, self.names)
        self._values = {name: sites[name]["value"] for name in found}
        self.conditioned: frozenset[str] = frozenset(self.names)
        drawn = self.draw()
        args, kwargs = self._replaced(drawn.data)
        reached = dict(sample_sites(plain_run(model, args, kwargs).model))
        self.conditioned = frozenset(n for n in self.names if not _is_there(reached.get(n), drawn.data[n]))

    @torch.no_grad()
    def draw(self) -> Simulated:
        """Run the model forward once, its observed sites drawn too."""
        try:
            with Uncondition():
                trace = trace_within(self.model, *self.call)
        except NotImplementedError as error:
            raise ValueError(
                f"the model cannot be drawn from ({error}): expected proper priors and distributions with a sampler."
            ) from error
        observed(trace)
        sites = {n: s for n, s in sample_sites(trace) if not is_subsample(s)}
        values = {name: site["value"].detach().clone() for name, site in sites.items()}
        return Simulated(
            {name: value for name, value in values.items() if name not in {*self.names, *self._values}},
            {name: values[name] for name in self.names},
        )

    def with_data(self, data: Values) -> tuple[Program, Call]:
        """The model and its arguments with these data."""
        rest = {name: data[name] for name in self.conditioned}
        return pyro.condition(self.model, data=rest) if rest else self.model, self._replaced(data)

    def _replaced(self, data: Values) -> Call:
        new_of = {id(self._values[name]): value for name, value in data.items() if name in self._values}
        args, kwargs = self.call
        args = tuple(new_of.get(id(value), value) for value in args)
        kwargs = {name: new_of.get(id(value), value) for name, value in kwargs.items()}
        return _with_named(self.model, (args, kwargs), data)


def _with_named(model: Program, call: Call, data: Values) -> Call:
    """A call with data for those arguments of their names that have no value."""
    try:
        signature = inspect.signature(getattr(model, "forward", model))
        bound = signature.bind(*call[0], **call[1])
    except (TypeError, ValueError):
        return call
    free = {name for name in signature.parameters if name in data and bound.arguments.get(name) is None}
    if not free:
        return call
    bound.arguments.update({name: data[name] for name in free})
    bound.arguments = {name: bound.arguments[name] for name in signature.parameters if name in bound.arguments}
    return bound.args, bound.kwargs


def _is_there(site: Any, value: Tensor) -> bool:
    return site is not None and bool(site["is_observed"]) and site["value"] is value


def _check_sites(sites: dict[str, Any], names: Sequence[str]) -> None:
    drawn = [n for n, s in sites.items() if not is_deterministic(s)]
    if not names or not set(names) <= set(drawn):
        raise ValueError(
            f"the data are {list(names)}: expected sites of the model that are observed, or drawn where the data are "
            f"left out. Name them as observed=('y',); the model has {drawn}."
        )
    if scaled := [n for n in drawn if not isinstance(sites[n]["scale"], Tensor) and sites[n]["scale"] != 1]:
        raise ValueError(
            f"the sites {scaled} are scaled, by a subsampled plate or poutine.scale, so that a run of the model is no "
            "draw of what it is fitted to: expected all data at once, unscaled."
        )


def draws_differ(guide: Program, one: Call, other: Call) -> bool:
    """Whether a guide draws something else for other arguments, with the same random numbers; if it fails, too.

    >>> import pyro.distributions as dist
    >>> draws_differ(lambda x: pyro.sample("z", dist.Normal(0.0, 1.0)), ((0.0,), {}), ((1.0,), {}))
    False
    """
    try:
        traces = []
        for args, kwargs in (one, other):
            pyro.set_rng_seed(0)
            traces.append(latent_sites(trace_within(guide, args, kwargs)))
    except Exception:  # it is run for this only
        return True
    first, second = traces
    return any(not torch.equal(site["value"], second[name]["value"]) for name, site in first.items())
