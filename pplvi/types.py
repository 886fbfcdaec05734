"""The names of what goes around: programs, their arguments and their values. Each is said once, here."""

from collections.abc import Callable, Mapping
from typing import Annotated, Any, TypeAlias

from torch import Tensor

Program: TypeAlias = Annotated[Callable[..., Any], "a Pyro program, that is a callable with pyro.sample statements"]
"""A model or a guide: a function or a module with Pyro's sample statements. The words are those of errors."""

Call: TypeAlias = tuple[tuple[Any, ...], dict[str, Any]]
"""Positional and keyword arguments of a program."""

Values: TypeAlias = Mapping[str, Tensor]
"""Values by the name of their site, to be read."""

MutableValues: TypeAlias = dict[str, Tensor]
"""Values by the name of their site, made anew by a move."""

LogDensity: TypeAlias = Callable[[Values, tuple[Any, ...], Mapping[str, Any]], Tensor]
"""A log density of values, given a program's arguments."""

Score: TypeAlias = Callable[[Tensor], Tensor]
"""The gradient of a log density."""
