"""TODO"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from pplvi.energies.machines.units import BernoulliUnits, GaussianUnits, Units

Edge = tuple[str, str]


def colour_classes(layers: tuple[str, ...], connections: Sequence[Edge]) -> tuple[tuple[str, ...], ...]:
    """Groups of layers without connections between them, found greedily from the bottom."""
    colour: dict[str, int] = {}
    for layer in layers:
        taken = {
            colour[b if a == layer else a]
            for a, b in connections
            if layer in (a, b) and {a, b} - {layer} & colour.keys()
        }
        colour[layer] = next(c for c in range(len(layers)) if c not in taken)
    return tuple(tuple(n for n in layers if colour[n] == c) for c in range(max(colour.values()) + 1))


def check_graph(layers: Mapping[str, Units], connections: Sequence[Edge]) -> None:
    """Refuse graphs that make no machine.

    :raises ValueError: for connections of unknown layers, given twice, or without a normalisable energy.
    """
    if not layers:
        raise ValueError("a machine without layers: expected at least one, such as {'v': BernoulliUnits(9)}.")
    pairs = [frozenset(pair) for pair in connections]
    for pair in connections:
        if unknown := [name for name in pair if name not in layers]:
            raise ValueError(f"connection {pair} of unknown layers {unknown}: expected names among {list(layers)}.")
        if pairs.count(frozenset(pair)) > 1:
            raise ValueError(f"connection {pair} is given more than once: expected each pair of layers once.")
        if all(isinstance(layers[name], GaussianUnits) for name in pair):
            raise ValueError(f"connection {pair} between Gaussian layers: its energy may have no finite normaliser.")
        if pair[0] == pair[1] and not isinstance(layers[pair[0]], BernoulliUnits):
            raise ValueError(f"lateral connection {pair}: expected Bernoulli units, one of which is drawn at a time.")
