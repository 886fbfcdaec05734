"""What an example is: a Pyro model, the arguments that carry its data, and names for the elements of its plates."""

import csv
from dataclasses import dataclass, field
from importlib import resources
from typing import Any

from torch import Tensor

from pplvi.types import Program


@dataclass(frozen=True)
class Example:
    """A model with its data.

    :param name: what tables and files call it.
    :param model: an ordinary Pyro program; its last argument is the observed data, None to sample it.
    :param args: the arguments of the model, data last.
    :param coords: dimension -> names of its elements, for ArviZ; a plate is a dimension.
    :param dims: variable -> names of its dimensions, where they are no plates.

    >>> from pplvi.examples import eight_schools
    >>> example = eight_schools.load()
    >>> example.name, len(example.args)
    ('eight_schools', 2)
    """

    name: str
    model: Program
    args: tuple[Tensor, ...]
    coords: dict[str, list[Any]] = field(default_factory=dict)
    dims: dict[str, list[str]] = field(default_factory=dict)


def standardize(x: Tensor) -> Tensor:
    """Columns with mean 0 and standard deviation 1 over dim 0: (x - mean) / sd, same shape.

    >>> import torch
    >>> standardize(torch.tensor([1.0, 2.0, 3.0])).tolist()
    [-1.0, 0.0, 1.0]
    """
    return (x - x.mean(0)) / x.std(0)


def read_rows(name: str) -> list[dict[str, str]]:
    """The rows of a file beside this one, by column; lines that begin with # say where it is from.

    >>> len(read_rows("diabetes.csv")), read_rows("diabetes.csv")[0]["progression"]
    (442, '151')
    """
    text = resources.files("pplvi.examples").joinpath(name).read_text(encoding="utf-8")
    return list(csv.DictReader(line for line in text.splitlines() if not line.startswith("#")))
