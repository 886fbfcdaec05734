"""Real data sets with their models, for demo, tutorials and tests. Imports ``fitting`` and what stands below.

`load(name)` gives an `Example` with `model`, `args`, and `coords` and `dims` for ArviZ.
"""

from pplvi.examples import bioassay, diabetes, eight_schools, grunfeld
from pplvi.examples.example import Example

LOADERS = {
    "eight_schools": eight_schools.load,
    "bioassay": bioassay.load,
    "grunfeld": grunfeld.load,
    "diabetes": diabetes.load,
}

__all__ = ["LOADERS", "Example", "bioassay", "diabetes", "eight_schools", "grunfeld", "load"]


def load(name: str) -> Example:
    """The example of that name: one of `LOADERS`.

    :raises ValueError: for a name that is not there.

    >>> load("grunfeld").name
    'grunfeld'
    """
    if name not in LOADERS:
        raise ValueError(f"no example is called {name!r}: expected one of {sorted(LOADERS)}")
    return LOADERS[name]()
