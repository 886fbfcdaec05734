"""Kinds of argument, each said once: a signature that names one is checked by :func:`pplvi.kinds.checked`."""

from __future__ import annotations

import math
import numbers
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any, TypeAlias

from torch import Tensor

HUGE = 2**32
"""Whole numbers of this size count nothing: they overflow, or ask for more memory than there is."""


@dataclass(frozen=True)
class Condition:
    """What an argument has to be beyond its type, as the metadata of an ``Annotated`` type.

    :ivar words: what is expected, as an error says it.
    :ivar holds: whether a value of the type is one.

    >>> even = Condition("an even number", lambda n: n % 2 == 0)
    >>> even.holds(2), even.holds(3)
    (True, False)
    """

    words: str
    holds: Callable[[Any], bool]


def is_whole(value: Any) -> bool:
    """Whether this is a whole number that can count something, and no flag.

    >>> is_whole(3), is_whole(True), is_whole(3.0), is_whole(10**18)
    (True, False, False, False)
    """
    return isinstance(value, numbers.Integral) and not isinstance(value, bool) and -HUGE < int(value) < HUGE


def is_number(value: Any) -> bool:
    """Whether this is a real number that fits a float: infinite, perhaps, but not NaN, and no flag.

    >>> is_number(3), is_number(math.inf), is_number(math.nan), is_number(True), is_number(10**400)
    (True, True, False, False, False)
    """
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        return False
    if isinstance(value, numbers.Integral) and not -HUGE < int(value) < HUGE:
        return False
    return not math.isnan(float(value))


Count: TypeAlias = Annotated[int, Condition("a whole number of at least 1", lambda n: n >= 1)]
"""How many: a whole number of at least 1."""

Natural: TypeAlias = Annotated[int, Condition("a whole number of at least 0", lambda n: n >= 0)]
"""How many, perhaps none."""

Plural: TypeAlias = Annotated[int, Condition("a whole number of at least 2", lambda n: n >= 2)]
"""How many, where one is no choice."""

Seed: TypeAlias = Annotated[int, Condition("a whole number from 0 to 2**32 - 1", lambda n: n >= 0)]
"""Of a generator of random numbers."""

Number: TypeAlias = Annotated[float, Condition("a finite number", math.isfinite)]
"""A finite number."""

Positive: TypeAlias = Annotated[float, Condition("a positive finite number", lambda x: 0 < x < math.inf)]
"""A finite number above 0."""

NonNegative: TypeAlias = Annotated[float, Condition("a finite number of at least 0", lambda x: 0 <= x < math.inf)]
"""A finite number of at least 0."""

Probability: TypeAlias = Annotated[float, Condition("a number from 0 to 1", lambda x: 0 <= x <= 1)]
"""A number from 0 to 1."""

Rate: TypeAlias = Annotated[float, Condition("a number above 0 and at most 1", lambda x: 0 < x <= 1)]
"""The share of something new, which is never none."""

Fraction: TypeAlias = Annotated[float, Condition("a number in [0, 1)", lambda x: 0 <= x < 1)]
"""The share of something old, which is never all."""

Floats: TypeAlias = Annotated[Tensor, Condition("a tensor of floating point numbers", Tensor.is_floating_point)]
"""Real numbers, of any shape."""

Matrix: TypeAlias = Annotated[
    Tensor,
    Condition(
        "a matrix of finite floating point numbers",
        lambda x: x.is_floating_point() and x.dim() == 2 and bool(x.isfinite().all()),
    ),
]
"""Finite numbers in rows and columns."""

Rows: TypeAlias = Annotated[
    Tensor, Condition("floating point data, (num_data, ...)", lambda x: x.is_floating_point() and x.dim() > 0)
]
"""Data along the first dimension."""
