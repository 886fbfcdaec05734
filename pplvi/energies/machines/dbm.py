"""Deep Boltzmann machines: a chain of layers, and labels beside the top one."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from pplvi.energies.machines.boltzmann import BoltzmannMachine
from pplvi.energies.machines.rbm import Kind, make_units
from pplvi.energies.machines.units import CategoricalUnits, Units
from pplvi.kinds.checked import checked
from pplvi.kinds.kinds import Count, NonNegative, Plural

LABELS = "y"


@checked
class DeepBoltzmannMachine(BoltzmannMachine):
    r"""A deep Boltzmann machine: layers ``"v"``, ``"h1"``, ``"h2"`` and so on, each connected with the next.

    .. math:: E(v, h) = -a \cdot v - \sum_l b_l \cdot h_l - v^T W_1 h_1 - \sum_l h_l^T W_{l+1} h_{l+1}

    Layers are independent of those of the same parity given the others, so that a Gibbs sweep has two steps. The
    posterior of the hidden layers is not factorised: use a :class:`pplvi.energies.MeanFieldGuide`.

    :param widths: units of each layer, the visible one first; at least two layers.
    :param visible: ``"bernoulli"``, ``"gaussian"``, ``"categorical"`` (softmax units), or units of your own.
    :param hidden: the kind of all hidden layers, or units of your own for each.
    :param num_categories: values of a categorical unit.
    :param num_labels: classes of a label, a softmax unit ``"y"`` connected with the top layer; none unless given.
    :param mean_field_visible: accept grey levels in ``[0, 1]``, as means of Bernoulli units.
    :param centered: train with the centered gradient, without which training from a random start is slow.
    :param name: prefix of the parameters' names.
    :param init_scale: standard deviation of the weights at the start.
    :raises ValueError: for fewer than two layers, unknown kinds, or neighbouring Gaussian layers.

    Source: Salakhutdinov & Hinton (2009), "Deep Boltzmann machines"; Montavon & Mueller (2012), "Deep Boltzmann
    machines and the centering trick".

    >>> dbm = DeepBoltzmannMachine([4, 3, 2], num_labels=2)
    >>> dbm.connections, dbm.classes
    ((('v', 'h1'), ('h1', 'h2'), ('h2', 'y')), (('v', 'h2'), ('h1', 'y')))
    """

    def __init__(
        self,
        widths: Sequence[Count],
        *,
        visible: Kind | Units = "bernoulli",
        hidden: Kind | Sequence[Units] = "bernoulli",
        num_categories: Plural | None = None,
        num_labels: Count | None = None,
        mean_field_visible: bool = False,
        centered: bool = True,
        name: str = "",
        init_scale: NonNegative = 0.01,
    ) -> None:
        if len(widths) < 2:
            raise ValueError(
                f"widths={list(widths)}: expected at least a visible and a hidden layer, such as [784, 500]."
            )
        kinds: Sequence[Kind | Units] = [hidden] * (len(widths) - 1) if isinstance(hidden, str) else list(hidden)
        if len(kinds) != len(widths) - 1:
            raise ValueError(
                f"{len(kinds)} units for {len(widths) - 1} hidden layers: expected one for each of {widths}."
            )
        layers = {"v": make_units(visible, widths[0], num_categories, mean_field_visible)}
        for level, (kind, width) in enumerate(zip(kinds, widths[1:], strict=True), 1):
            layers[f"h{level}"] = make_units(kind, width, num_categories)
        self._refuse_other_widths(widths, layers)
        chain = list(layers)
        if num_labels is not None:
            layers[LABELS] = CategoricalUnits(1, num_labels)
            chain.append(LABELS)
        connections = list(pairwise(chain))
        super().__init__(layers, connections, centered=centered, name=name, init_scale=init_scale)
        self.depth = len(widths) - 1

    @staticmethod
    def _refuse_other_widths(widths: Sequence[int], layers: dict[str, Units]) -> None:
        found = [units.num_units for units in layers.values()]
        if found != list(widths):
            raise ValueError(f"widths={list(widths)}, but the units given make layers of {found}: expected the same.")

    @property
    def levels(self) -> tuple[str, ...]:
        """Names of the layers bottom to top, without the labels."""
        return tuple(self.layers)[: self.depth + 1]
