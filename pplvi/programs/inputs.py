"""Inputs as people have them: arrays, lists of numbers and columns of tables become tensors, here and nowhere else."""

from __future__ import annotations

import inspect
import re
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import pyro
import torch
from torch import Tensor

from pplvi.programs import checks
from pplvi.programs.running import plain_run
from pplvi.programs.state import Environment, map_tree, module_of
from pplvi.types import Call, Program

ANYWHERE = Environment()
_OTHERS = (TypeError, AttributeError, KeyError, IndexError)  # what a program says of a tensor in place of its table


def model_dtype(program: Any, tree: Any) -> torch.dtype:
    """The floating point type that inputs are given: that of the module's parameters, or of tensors among them.

    >>> model_dtype(torch.nn.Linear(1, 1).double(), ()), model_dtype(None, (torch.zeros(2, dtype=torch.float64), [1.0]))
    (torch.float64, torch.float64)
    """
    module = module_of(program)
    found = [p for p in (() if module is None else module.parameters()) if p.is_floating_point()]
    map_tree(lambda x: found.append(x) if x.is_floating_point() else None, tree)
    return found[0].dtype if found else torch.get_default_dtype()


def as_tensors(tree: Any, dtype: torch.dtype | None = None, *, apart: bool = False) -> Any:
    """Arrays, columns, tables and lists of numbers in nested containers as tensors; everything else as it is.

    Numbers with a fraction get the dtype, whole numbers stay whole (``int64``, fit for an index), and so do booleans.
    A missing entry of a table is NaN. Tuples of numbers are sizes, not data, and text is left alone.

    :param dtype: of floating point numbers; torch's default unless given.
    :param apart: a table as a dictionary of its columns, and not as one matrix.
    :raises ValueError: for columns of categories.

    >>> as_tensors(([1, 2], np.array([0.5]), {"sizes": (3, 4), "name": "a"}))
    (tensor([1, 2]), tensor([0.5000]), {'sizes': (3, 4), 'name': 'a'})
    """
    make = partial(as_tensors, dtype=dtype or torch.get_default_dtype(), apart=apart)
    if isinstance(tree, Mapping):
        return {key: make(value) for key, value in tree.items()}
    if isinstance(tree, tuple) and hasattr(tree, "_fields"):
        return type(tree)(*map(make, tree))
    if apart and is_array(tree) and hasattr(tree, "columns"):
        return {name: make(tree[name]) for name in tree.columns}
    if (array := _array(tree)) is not None:
        return _tensor(array, dtype or torch.get_default_dtype())
    if isinstance(tree, (tuple, list)):
        return type(tree)(map(make, tree))
    return tree


def is_array(value: Any) -> bool:
    """Whether a value is one input: an array, a column or a table."""
    return isinstance(value, np.ndarray) or (hasattr(value, "to_numpy") and hasattr(value, "__array__"))


def _array(value: Any) -> np.ndarray | None:
    """The numbers in an input, or ``None`` if it is something else."""
    if isinstance(value, list):
        value = _rectangle(value) if value and _are_numbers(value) else None
    elif hasattr(value, "to_numpy") and hasattr(value, "__array__"):
        value = _of_table(value)
    return value if isinstance(value, np.ndarray) and value.dtype.kind in "biufc" and value.ndim else None


def _are_numbers(value: list[Any]) -> bool:
    return all(_are_numbers(x) if isinstance(x, list) and x else isinstance(x, (int, float, np.number)) for x in value)


def _rectangle(value: list[Any]) -> np.ndarray | None:
    try:
        return np.array(value)
    except ValueError:  # rows of different lengths stay apart
        return None


def _of_table(value: Any) -> np.ndarray | None:
    kinds = value.dtypes if hasattr(value, "columns") else [getattr(value, "dtype", None)]
    if "category" in map(str, kinds):
        raise ValueError(
            f"a {type(value).__name__} holds categories: expected numbers. Pass their codes, column.cat.codes."
        )
    array = np.asarray(value.to_numpy())
    if array.dtype == object:  # numbers with missing ones, or columns of different types
        try:
            return np.asarray(value.to_numpy(dtype=float, na_value=np.nan), dtype=float)
        except (TypeError, ValueError):
            return None  # text
    return array


def _tensor(array: np.ndarray, dtype: torch.dtype) -> Tensor:
    if array.dtype.kind in "iu":
        return torch.tensor(array.astype(np.int64))
    if array.dtype.kind == "f":
        return torch.tensor(np.ascontiguousarray(array.astype(np.float64))).to(dtype)
    return torch.tensor(np.ascontiguousarray(array))


class Inputs:
    """Calls of a program with tensors for arrays, lists of numbers, columns and tables.

    A program that does not run on that, but on what it was given (it calls ``torch.from_numpy``) or on a table taken
    apart (it reads ``df["age"]``), gets that: it is tried, once, on the first call with such an argument.

    :param dtype: of floating point numbers; that of :func:`model_dtype` unless given.
    :param check: check the first call for NaN and infinite numbers.

    >>> Inputs(lambda x, n: None)((np.array([1.0, 2.0]), 2), {})
    ((tensor([1., 2.]), 2), {})
    >>> Inputs(lambda x: torch.from_numpy(x))((np.array([1.0, 2.0]),), {})
    ((array([1., 2.]),), {})
    """

    def __init__(
        self, program: Program | None = None, dtype: torch.dtype | None = None, *, check: bool = False
    ) -> None:
        self.program, self.dtype, self.check = program, dtype, check
        self._way: Callable[[Call, torch.dtype], Call] | None = None

    def __call__(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Call:
        """The call as the program takes it.

        :raises ValueError: where :func:`as_tensors` and, on the first call, :func:`check_finite` do.
        """
        call = self._converted(args, kwargs)
        if self.check and self.program is not None:
            self.check = False
            check_finite(self.program, *call)
        return call

    def _converted(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Call:
        given: Call = tuple(args), dict(kwargs)
        dtype = self.dtype or model_dtype(self.program, given)
        made = _as_matrices(given, dtype)
        if _same(given, made):
            return given
        if self._way is None:
            self._way = self._find(given, dtype)
        return made if self._way is _as_matrices else self._way(given, dtype)

    def _find(self, given: Call, dtype: torch.dtype) -> Callable[[Call, torch.dtype], Call]:
        if self.program is None:
            return _as_matrices
        program = self.program
        ways = (_as_matrices, _as_given, _as_columns)
        return next((way for way in ways if _runs(program, way(given, dtype), way)), _as_matrices)


def _as_matrices(call: Call, dtype: torch.dtype) -> Call:
    made: Call = as_tensors(call, dtype)
    return made


def _as_given(call: Call, dtype: torch.dtype) -> Call:
    return call


def _as_columns(call: Call, dtype: torch.dtype) -> Call:
    made: Call = as_tensors(call, dtype, apart=True)
    return made


def to_inputs(
    program: Program | None, args: tuple[Any, ...], kwargs: Mapping[str, Any], environment: Environment = ANYWHERE
) -> Call:
    """One call by :class:`Inputs`, moved to where the program runs.

    :raises ValueError: where :func:`as_tensors` does.

    >>> to_inputs(None, ([1.0, 2.0],), {}, Environment(torch.float64))[0][0].dtype
    torch.float64
    """
    with environment.active():
        moved: Call = environment.move(Inputs(program, environment.dtype)(args, kwargs))
    return moved


def _same(one: Any, other: Any) -> bool:
    """Whether nothing was converted; containers are made anew."""
    if isinstance(one, Mapping):
        return isinstance(other, Mapping) and all(_same(one[key], other[key]) for key in one)
    if isinstance(one, (tuple, list)):
        return isinstance(other, (tuple, list)) and all(map(_same, one, other))
    return one is other


def _runs(program: Program, call: Call, way: Any) -> bool:
    try:
        with warnings.catch_warnings(action="ignore"):
            run = plain_run(program, *call)
            run.log_probs(run.model)
    except Exception as error:  # another one is told where the program is really run on tensors
        return way is _as_matrices and not isinstance(error, _OTHERS) and not isinstance(error.__cause__, _OTHERS)
    return True


@dataclass(frozen=True)
class _Found:
    """A tensor among the arguments, and how the user writes it."""

    name: str
    tensor: Tensor

    def describe(self) -> str:
        """The first entry that is not finite, and where it is."""
        place = tuple(torch.nonzero(~self.tensor.isfinite())[0].tolist())
        where = f" at position {list(place)}" if place else ""
        return f"{self.name} is {self.tensor[place].item()}{where}"


def named_tensors(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Iterator[tuple[str, Tensor]]:
    """The tensors and arrays of a call, each with the expression that gives it.

    >>> [name for name, _ in named_tensors((torch.zeros(1), [np.zeros(2)]), {"x": {"a": torch.zeros(1)}})]
    ['args[0]', 'args[1][0]', "kwargs['x']['a']"]
    """
    yield from _walk("args", tuple(args))
    yield from _walk("kwargs", dict(kwargs))


def _walk(name: str, tree: Any) -> Iterator[tuple[str, Tensor]]:
    if isinstance(tree, Tensor):
        yield name, tree
    elif (array := _array(tree) if is_array(tree) else None) is not None:
        yield name, torch.as_tensor(np.array(array))
    elif isinstance(tree, Mapping):
        for key, value in tree.items():
            yield from _walk(f"{name}[{key!r}]", value)
    elif isinstance(tree, (tuple, list)):
        for index, value in enumerate(tree):
            yield from _walk(f"{name}[{index}]", value)


def check_finite(program: Program, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
    """Check that no NaN and no infinite number of the arguments reaches a density.

    Entries that the program hides (``obs_mask``, ``poutine.mask``, the mask of a machine), replaces or never uses may
    be anything: the program is run to see.

    :raises ValueError: with the argument, its first such entry, and the site whose density it spoils.

    >>> import pyro.distributions as dist
    >>> def model(x):
    ...     pyro.sample("z", dist.Normal(x.sum(), 1.0))
    >>> check_finite(model, (torch.tensor([0.0, float("nan")]),), {})
    Traceback (most recent call last):
    ValueError: args[0] (x) is nan at position [1], which site 'z' depends on: expected finite numbers. ...
    """
    suspects = [_Found(_called(program, name), x) for name, x in named_tensors(args, kwargs) if _is_suspect(x)]
    for suspect in suspects:
        others = [other.tensor for other in suspects if other is not suspect]
        call = map_tree(lambda x, others=others: _filled(x) if any(x is y for y in others) else x, (args, kwargs))
        if (site := _first_bad_site(program, call)) is not None:
            raise ValueError(
                f"{suspect.describe()}, which site {site!r} depends on: expected finite numbers. Drop such rows, fill "
                "them in, or hide missing observations with obs_mask= or poutine.mask."
            )


def _called(program: Program, name: str) -> str:
    """A positional argument with its own name, where the program gives it one."""
    place = re.match(r"args\[(\d+)\]", name)
    try:
        parameters = list(inspect.signature(getattr(program, "forward", program)).parameters.values())
    except (TypeError, ValueError):
        parameters = []
    if place is None or int(place[1]) >= len(parameters) or parameters[int(place[1])].kind.name.startswith("VAR"):
        return name
    return f"{name} ({parameters[int(place[1])].name})"


def _is_suspect(x: Tensor) -> bool:
    return x.is_floating_point() and not bool(x.isfinite().all())


def _filled(x: Tensor) -> Tensor:
    finite = x[x.isfinite()]
    return torch.where(x.isfinite(), x, finite[0] if len(finite) else torch.ones_like(x))


def _first_bad_site(program: Program, call: Call) -> str | None:
    try:
        with pyro.validation_enabled(False):
            return checks.bad_site_of(plain_run(program, *call))
    except Exception:  # told where the program is really run
        return None


def observes(program: Program, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
    """Whether a program has data: an observed site or a factor.

    >>> import pyro.distributions as dist
    >>> def model(y=None):
    ...     pyro.sample("y", dist.Normal(0.0, 1.0), obs=y)
    >>> observes(model, (), {}), observes(model, (torch.tensor(1.0),), {})
    (False, True)
    """
    return checks.has_data(plain_run(program, args, kwargs))
