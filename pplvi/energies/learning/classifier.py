"""Classifiers that start from the weights of a deep Boltzmann machine or a deep belief network."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from itertools import pairwise

from torch import Tensor, nn

from pplvi.energies.machines.boltzmann import BoltzmannMachine
from pplvi.energies.machines.dbm import LABELS
from pplvi.energies.machines.dbn import DeepBeliefNetwork
from pplvi.energies.machines.units import Units
from pplvi.energies.posteriors.mean_field import FactorisedInference, MeanFieldGuide
from pplvi.kinds.checked import checked
from pplvi.kinds.kinds import Floats, Matrix, Natural, Plural


@checked
class BoltzmannClassifier(nn.Module):
    r"""A feed-forward network made of a machine's layers, with a linear layer of classes on top.

    .. math:: x_l = E[s_l \mid \text{field } x_{l-1} W_l + q_{l+1} W_{l+1}^T + b_l], \qquad \text{logits} = x_L C + c

    ``q`` are the mean-field means of the layers above under the machine as it was (a copy, that is not trained), so
    that before fine-tuning the features of every layer are those of mean field. They depend on the data alone:
    :meth:`augment` once, and train on the result. A deep belief network has no input from above.

    :param weights: upward weights, ``(width below, width above)``, bottom to top.
    :param biases: biases of the layers that they go to.
    :param units: the units of these layers.
    :param num_classes: number of classes.
    :param guide: the mean field of the layers above; none for directed networks.
    :param feedback: weights from the layer above, ``(width above, width)``, for all layers but the last.

    Source: Salakhutdinov & Hinton (2009), "Deep Boltzmann machines", section 3.4; Hinton & Salakhutdinov (2006).
    """

    def __init__(
        self,
        weights: Sequence[Matrix],
        biases: Sequence[Floats],
        units: Sequence[Units],
        num_classes: Plural,
        *,
        guide: FactorisedInference | None = None,
        feedback: Sequence[Matrix] = (),
    ) -> None:
        super().__init__()
        if not weights or not len(weights) == len(biases) == len(units):
            raise ValueError(
                f"{len(weights)} weights, {len(biases)} biases, units of {len(units)} layers: expected as many of each."
            )
        self.up = nn.ParameterList([nn.Parameter(w.detach().clone()) for w in weights])
        self.down = nn.ParameterList([nn.Parameter(w.detach().clone()) for w in feedback])
        self.biases = nn.ParameterList([nn.Parameter(b.detach().clone()) for b in biases])
        self.units, self.guide = [copy.deepcopy(u).requires_grad_(False) for u in units], guide
        self.machine = guide.machine if guide is not None else None
        like = weights[-1]
        self.output = nn.Linear(like.shape[1], num_classes, dtype=like.dtype, device=like.device)
        nn.init.zeros_(self.output.weight)
        nn.init.zeros_(self.output.bias)

    def augment(self, v: Tensor) -> tuple[Tensor, ...]:
        """The data and the mean-field means of the layers above the first hidden one, ``(*batch, width)`` each."""
        if self.guide is None or not self.down:
            return (v,)
        means = self.guide.means(v)
        return (v, *(means[f"h{level}"] for level in range(2, len(self.up) + 1)))

    def features(self, v: Tensor, above: Sequence[Tensor] | None = None) -> list[Tensor]:
        """Activities of the hidden layers, bottom to top, ``(*batch, width)`` each.

        :param above: what :meth:`augment` gave beside the data; worked out here unless given.
        """
        above = self.augment(v)[1:] if above is None else above
        found, value = [], v
        for level, (weight, bias, units) in enumerate(zip(self.up, self.biases, self.units, strict=True)):
            field = value @ weight + bias
            if level < len(self.down):
                field = field + above[level] @ self.down[level]
            value = units.mean(field)
            found.append(value)
        return found

    def forward(self, v: Tensor, *above: Tensor) -> Tensor:
        """Logits of the classes, ``(*batch, num_classes)``, of data alone or of what :meth:`augment` returns."""
        logits: Tensor = self.output(self.features(v, above or None)[-1])
        return logits


@checked
def to_classifier(
    network: BoltzmannMachine | DeepBeliefNetwork, num_classes: Plural, *, iterations: Natural = 25
) -> BoltzmannClassifier:
    """A classifier that starts with the features of a trained machine.

    :param network: a deep or restricted Boltzmann machine, whose label layer, if any, is left out; or a deep belief
        network, whose recognition weights are used.
    :param num_classes: number of classes.
    :param iterations: sweeps of mean field for the input from above.
    :raises ValueError: for fewer than two classes, or a machine that is no chain of layers.

    >>> import torch
    >>> from pplvi.energies import DeepBoltzmannMachine
    >>> classifier = to_classifier(DeepBoltzmannMachine([4, 3, 2]), num_classes=10)
    >>> classifier(torch.ones(5, 4)).shape
    torch.Size([5, 10])
    """
    if isinstance(network, DeepBeliefNetwork):
        return _of_directed(network, num_classes)
    chain = [layer for layer in network.layers if layer != LABELS]
    pairs = list(pairwise(chain))
    if {frozenset(pair) for pair in network.connections if LABELS not in pair} != set(map(frozenset, pairs)):
        raise ValueError(f"a machine with connections {network.connections}: expected a chain of layers.")
    machine = copy.deepcopy(network).requires_grad_(False)
    return BoltzmannClassifier(
        [network.weight(a, b) for a, b in pairs],
        [network.bias(b) for _, b in pairs],
        [network.layers[b] for _, b in pairs],
        num_classes,
        guide=MeanFieldGuide(machine, iterations),
        feedback=[network.weight(b, a) for a, b in pairs[1:]],
    )


def _of_directed(network: DeepBeliefNetwork, num_classes: int) -> BoltzmannClassifier:
    recognition, top = network.guide.recognition, network.top
    pairs = list(pairwise(network.directed))
    weights = [recognition.get_parameter(f"weight_{a}_{b}") for a, b in pairs]
    biases = [recognition.get_parameter(f"bias_{b}") for _, b in pairs]
    last = top.hidden[0]
    units = [network.layers[layer] for layer in network.levels[1:]]
    return BoltzmannClassifier([*weights, top.weight(top.visible, last)], [*biases, top.bias(last)], units, num_classes)
