"""Restricted machines with a label: p(label | data) is exact, so that they are classifiers too."""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import torch
from pyro.nn import pyro_method
from torch import Tensor

from pplvi.energies.machines.boltzmann import BoltzmannMachine
from pplvi.energies.machines.exact_posterior import ConditionalGuide
from pplvi.energies.machines.measures import BaseMeasure
from pplvi.energies.machines.rbm import Kind, make_units
from pplvi.energies.machines.units import CategoricalUnits, Units
from pplvi.kinds.checked import checked
from pplvi.kinds.kinds import Count, NonNegative, Plural
from pplvi.programs.plates import data_plate


@checked
class ClassificationBoltzmannMachine(BoltzmannMachine):
    r"""A restricted Boltzmann machine of data ``"v"`` and labels ``"y"``, with one hidden layer ``"h"``.

    .. math:: E(v, y, h) = -a \cdot v - d_y - b \cdot h - v^T W h - U_y \cdot h, \qquad
        p(y \mid v) \propto e^{d_y + \sum_j \log(1 + e^{b_j + (v^T W)_j + U_{yj}})}

    Three ways to train one: discriminative, ``SVI(machine.classify, machine.marginal_guide, optim, ELBO())``, whose
    program is normalised; generative, ``SVI(machine.model, machine.guide, optim, BoltzmannELBO())`` on ``{"v": v, "y":
    one_hot}``; hybrid, ``SVI(machine.hybrid, machine.marginal_guide, optim, BoltzmannELBO())``.

    :param num_visible: visible units.
    :param num_hidden: hidden units.
    :param num_labels: classes.
    :param visible: ``"bernoulli"``, ``"gaussian"``, or units of your own.
    :param mean_field_visible: accept grey levels in ``[0, 1]``, as means of Bernoulli units.
    :param name: prefix of the parameters' names.
    :param init_scale: standard deviation of the weights at the start.
    :raises ValueError: for unknown kinds of units or fewer than two classes.

    Source: Larochelle & Bengio (2008), "Classification using discriminative restricted Boltzmann machines".

    >>> machine = ClassificationBoltzmannMachine(4, 3, num_labels=2, init_scale=0.0)
    >>> machine.label_logits(torch.ones(1, 4)).softmax(-1)
    tensor([[0.5000, 0.5000]], grad_fn=<SoftmaxBackward0>)
    """

    def __init__(
        self,
        num_visible: Count,
        num_hidden: Count,
        *,
        num_labels: Plural,
        visible: Kind | Units = "bernoulli",
        mean_field_visible: bool = False,
        name: str = "",
        init_scale: NonNegative = 0.01,
    ) -> None:
        layers = {
            "v": make_units(visible, num_visible, mean_field=mean_field_visible),
            "y": CategoricalUnits(1, num_labels),
            "h": make_units("bernoulli", num_hidden),
        }
        edges = [("v", "h"), ("y", "h")]
        super().__init__(layers, edges, centered=False, name=name, init_scale=init_scale)

    @property
    def guide(self) -> ConditionalGuide:
        """The exact posterior of the hidden layer, given data and labels."""
        return ConditionalGuide(self, observed=["y"])

    def label_logits(self, v: Tensor) -> Tensor:
        """``log p(v, y) + const`` of each class, ``(*batch, num_labels)``: softmax of them is ``p(y | v)``."""
        field = self.field("h", {"v": v}).unsqueeze(-2) + self.weight("y", "h")
        return self.bias("y") + self.layers["h"].log_partition(field)

    @pyro_method
    def classify(self, v: Tensor, y: Tensor | None = None, *, size: int | None = None) -> Tensor:
        """``p(y | v)`` as a Pyro program, normalised: plate ``"data"`` and the site ``"y"``.

        :param v: data, ``(num_data, width)``.
        :param y: labels, ``(num_data,)`` whole numbers; drawn if not given.
        :param size: how many data there are, if these are a minibatch of them.
        :raises ValueError: for data outside the support.
        """
        self.announce()
        with data_plate(len(v), size):
            return self._labels(v, y)

    def _labels(self, v: Tensor, y: Tensor | None) -> Tensor:
        """The site of the labels."""
        labels = dist.Categorical(logits=self.label_logits(self.checked(v)["v"]))
        found: Tensor = pyro.sample("y", labels, obs=y)
        return found

    @pyro_method
    def hybrid(self, v: Tensor, y: Tensor, *, generative: float = 0.01, size: int | None = None) -> None:
        """``log p(y | v) + generative * log p(v, y)`` as a program for :class:`pplvi.BoltzmannELBO`.

        :param generative: weight of the joint likelihood.
        :raises ValueError: for data outside the support, or a weight that is not positive.
        """
        if not generative > 0:
            raise ValueError(f"generative={generative}: expected a positive weight. Without it, train classify().")
        self.announce()
        code = torch.arange(self.layers["y"].width, device=v.device) == y.unsqueeze(-1)
        values = {"v": v, "y": code.to(v.dtype)}
        with data_plate(len(v), size):
            self._labels(v, y)
            with pyro.poutine.scale(scale=generative):
                pyro.sample("v", BaseMeasure(self.layers["v"], (len(v),), v), obs=v)
                self.energy_site("energy", self.with_means(values), self.log_marginal(values))
