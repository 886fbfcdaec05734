"""Groups of ArviZ's schema: names of dimensions, coordinates, attributes, and the data set around them.

A *group* is ``{variable: (dims, values)}``, as in :class:`xarray.Dataset`, and ``Groups`` maps the names of ArviZ's
groups to such dictionaries. Nothing here knows where the values come from; :mod:`pplvi.posterior.arviz.export` fills
the groups.
"""

from __future__ import annotations

import importlib.metadata
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

from pplvi.programs.sites import Plate

if TYPE_CHECKING:
    import xarray

Variable = tuple[tuple[str, ...], np.ndarray]
Group = dict[str, Variable]
Groups = dict[str, Group]
Labels = Collection[Any]

SAMPLE = ("chain", "draw")
_PACKAGES = {
    "inference_library_version": "pplvi",
    "pyro_version": "pyro-ppl",
    "torch_version": "torch",
    "arviz_version": "arviz",
}


@dataclass(frozen=True)
class Names:
    """Names for the dimensions of variables.

    The dimensions of a variable are its plates, left to right, and then the names that ``dims`` gives or, like in
    ArviZ, ``<variable>_dim_<i>``. A variable that is not a site (a constant) has the plates whose sizes its shape
    begins with, where that leaves no choice.

    :param plates: the plates of each site, left to right.
    :param dims: names for all dimensions of a variable, or for those that follow its plates.

    >>> Names({"theta": (Plate("school", -1, 8, 8),)}).of("theta", (8, 2))
    ('school', 'theta_dim_0')
    """

    plates: Mapping[str, tuple[Plate, ...]]
    dims: Mapping[str, Sequence[str]] = field(default_factory=dict)

    def of(self, name: str, shape: Sequence[int]) -> tuple[str, ...]:
        """Names of the dimensions of a variable whose own shape (without chain and draw) is ``shape``.

        :raises ValueError: if ``dims`` gives this variable a wrong number of names.
        """
        outer = self._plates_of(name, shape)
        given = tuple(self.dims.get(name, ()))
        inner = tuple(f"{name}_dim_{i}" for i in range(len(shape) - len(outer)))
        if name not in self.dims:
            return outer + inner
        if len(given) not in (len(shape), len(inner)):
            raise ValueError(
                f"dims[{name!r}] has {len(given)} names, {list(given)}, but {name!r} has shape {tuple(shape)} with "
                f"plates {list(outer)}: give {len(shape)} names, or {len(inner)} for what follows the plates."
            )
        return given if len(given) == len(shape) else outer + given

    def _plates_of(self, name: str, shape: Sequence[int]) -> tuple[str, ...]:
        candidates = [self.plates[name]] if name in self.plates else list(self.plates.values())
        found = {tuple(p.name for p in plates) for plates in candidates if _begins(shape, plates)}
        longest = [names for names in found if len(names) == max(map(len, found))]
        return longest[0] if len(longest) == 1 else ()


def _begins(shape: Sequence[int], plates: Sequence[Plate]) -> bool:
    return tuple(shape[: len(plates)]) == tuple(p.size for p in plates)


def to_numpy(value: Any) -> np.ndarray:
    """The values of a tensor, on the CPU and without its graph, or of anything else that NumPy takes."""
    return value.detach().cpu().numpy() if isinstance(value, Tensor) else np.asarray(value)


def equal_values(first: Mapping[str, Any], second: Mapping[str, Any]) -> bool:
    """Whether two sets of variables have the same names and values; missing values (NaN) are equal."""
    return first.keys() == second.keys() and all(equal(value, second[name]) for name, value in first.items())


def equal(first: Any, second: Any) -> bool:
    """Whether two arrays or tensors have the same shape and values; missing values (NaN) are equal."""
    first, second = to_numpy(first), to_numpy(second)
    numbers = all(np.issubdtype(values.dtype, np.inexact) for values in (first, second))
    return bool(np.array_equal(first, second, equal_nan=numbers))


def stack_chains(
    chains: Sequence[Mapping[str, Tensor]], names: Names, like: Mapping[str, Tensor] | None = None
) -> Group:
    """Put the draws of several chains, each ``(num_draws, *shape)``, into one group, chain and draw first.

    :param chains: the variables of each chain.
    :param names: how dimensions are named.
    :param like: variables, without chain and draw, whose leading dimensions the result shares, by name.
    """
    group = {}
    for name in chains[0]:
        values = np.stack([to_numpy(chain[name]) for chain in chains])
        own = values.shape[2:] if like is None else tuple(like[name].shape)
        group[name] = (SAMPLE + names.of(name, own)[: values.ndim - 2], values)
    return group


def datasets(
    groups: Groups, coords: Mapping[str, Labels] | None = None, attrs: Mapping[str, Any] | None = None
) -> dict[str, xarray.Dataset]:
    """One :class:`xarray.Dataset` a group, with coordinates on every dimension and ``attrs`` on each.

    :param groups: the groups; empty ones are left out.
    :param coords: labels for named dimensions; the others count from 0.
    :param attrs: attributes of every group.
    :raises ValueError: if ``coords`` names a dimension that no group has, or has the wrong number of labels for one; if
        a dimension has two sizes in a group or stands twice in a variable; if a variable is named like a dimension.
    """
    import xarray

    labels = _labels(groups, coords or {})
    found = {}
    for name, group in groups.items():
        if group:
            own = {dim: labels[dim, size] for dim, size in _sizes_of(name, group).items()}
            found[name] = xarray.Dataset(group, coords=own, attrs=dict(attrs or {}))
    return found


def storable(groups: Groups) -> tuple[Groups, dict[str, str]]:
    """The groups with names that a NetCDF file can hold, and the new name of each that was changed.

    A slash, which separates the groups of such a file, becomes a point, or what keeps different names different.

    >>> storable({"posterior": {"a/b": (("draw",), np.zeros(1))}})[1]
    {'a/b': 'a.b'}
    """
    names = {n for group in groups.values() for variable, (dims, _) in group.items() for n in (variable, *dims)}
    taken, new = {name for name in names if "/" not in name}, {}
    for name in sorted(names - taken):
        candidate = name.replace("/", ".")
        while candidate in taken:
            candidate += "_"
        taken.add(candidate)
        new[name] = candidate
    renamed = {
        kind: {new.get(n, n): (tuple(new.get(d, d) for d in dims), values) for n, (dims, values) in group.items()}
        for kind, group in groups.items()
    }
    return (renamed if new else groups), new


def _sizes(groups: Groups) -> set[tuple[str, int]]:
    """Every ``(dimension, size)`` in the groups."""
    return {pair for name, group in groups.items() for pair in _sizes_of(name, group).items()}


def _sizes_of(name: str, group: Group) -> dict[str, int]:
    """Sizes of the dimensions of one group, checked for what xarray cannot hold."""
    sizes: dict[str, int] = {}
    for variable, (dims, values) in group.items():
        if len(set(dims)) < len(dims):
            raise ValueError(
                f"{variable!r} of group {name!r} has the dimensions {list(dims)}; expected different names. "
                "Rename the plate, or the names given in dims=."
            )
        for dim, size in zip(dims, values.shape, strict=True):
            if sizes.setdefault(dim, size) != size:
                raise ValueError(
                    f"dimension {dim!r} of group {name!r} has the sizes {sizes[dim]} and {size}; expected one size. "
                    "Give the two different names in dims=."
                )
    for variable in sorted(group.keys() & sizes):
        raise ValueError(
            f"{variable!r} is both a variable and a dimension of group {name!r}; expected different names. "
            "Rename the site or argument, or the dimension with dims=."
        )
    return sizes


def _labels(groups: Groups, coords: Mapping[str, Labels]) -> dict[tuple[str, int], np.ndarray]:
    """Labels of each dimension and size; predictions for new inputs may have another size, which counts from 0."""
    sizes = _sizes(groups)
    fitted = _sizes({name: group for name, group in groups.items() if not name.startswith("predictions")})
    known = sorted({dim for dim, _ in sizes} - set(SAMPLE))
    for dim, labels in coords.items():
        if dim not in known:
            raise ValueError(f"coords names the dimension {dim!r}; expected one of {known}. Correct its name.")
        expected = sorted(size for name, size in fitted or sizes if name == dim)
        if not expected:
            expected = sorted(size for name, size in sizes if name == dim)
        if expected != [len(labels)]:
            raise ValueError(
                f"coords[{dim!r}] has {len(labels)} labels; dimension {dim!r} has size "
                f"{' and '.join(map(str, expected))}. Give one label to each of its elements."
            )
    return {
        (dim, size): np.asarray(coords[dim] if dim in coords and len(coords[dim]) == size else np.arange(size))
        for dim, size in sizes
    }


def attributes(attrs: Mapping[str, Any]) -> dict[str, Any]:
    """Attributes that a NetCDF file can hold, with the time of creation and the versions of the libraries.

    Tensors become numbers or one-dimensional arrays, ``None`` is left out, and what is neither a number nor an array
    is written as text.

    >>> attributes({"seed": 1, "guide": None, "pareto_k": Tensor([0.5])})["pareto_k"]
    0.5
    """
    versions = {name: _version(package) for name, package in _PACKAGES.items()}
    merged = {"created_at": datetime.now(UTC).isoformat(), "inference_library": "pplvi", **versions, **attrs}
    return {name: _attribute(value) for name, value in merged.items() if value is not None}


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:  # run from a checkout that was not installed
        return "not installed"


def _attribute(value: Any) -> Any:
    if isinstance(value, bool):
        return int(value)
    if isinstance(value, (Tensor, np.ndarray, np.generic)):
        flat = to_numpy(value).reshape(-1)
        return flat.item() if flat.size == 1 else flat
    return value if isinstance(value, (int, float)) else str(value)
