"""Deep belief networks: a restricted Boltzmann machine on top of a directed network."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise

import pyro
import torch
from pyro.nn import PyroModule, pyro_method
from torch import Tensor

from pplvi.energies.machines.boltzmann import BoltzmannMachine
from pplvi.energies.machines.rbm import Kind, make_units
from pplvi.energies.machines.units import Units
from pplvi.kinds.checked import checked
from pplvi.kinds.kinds import Count, NonNegative, Plural
from pplvi.programs.plates import data_plate


class DirectedLayers(PyroModule):
    """Weights from each layer to its neighbour on one side, and biases of the layers that they go to.

    :param layers: units by name, bottom to top.
    :param upward: whether weights go up (recognition) or down (generation).
    :param init_scale: standard deviation of the weights at the start, ``(width below, width above)`` each.
    """

    def __init__(self, layers: Mapping[str, Units], *, upward: bool, init_scale: float) -> None:
        super().__init__()
        self.units, self.upward = dict(layers), upward
        self.sources: dict[str, str] = {}
        for below, above in pairwise(layers):
            source, target = (below, above) if upward else (above, below)
            self.sources[target] = source
            weight = init_scale * torch.randn(layers[below].width, layers[above].width)
            self.register_parameter(f"weight_{below}_{above}", torch.nn.Parameter(weight))
            self.register_parameter(f"bias_{target}", torch.nn.Parameter(torch.zeros(layers[target].width)))

    def field(self, target: str, value: Tensor) -> Tensor:
        """Field of a layer given the value of its source, ``(*batch, width)``."""
        source = self.sources[target]
        below, above = (source, target) if self.upward else (target, source)
        weight = getattr(self, f"weight_{below}_{above}")
        return self.units[source].statistic(value) @ (weight if self.upward else weight.T) + getattr(
            self, f"bias_{target}"
        )

    @pyro_method
    def announce(self) -> None:
        """Tell Pyro about the parameters."""
        for name, parameter in self._parameters.items():
            if parameter is not None and parameter.requires_grad:
                getattr(self, name)

    def adopt(self, below: str, above: str, weight: Tensor, bias: Tensor) -> None:
        """Take weights between two layers, and biases of the one that they go to."""
        with torch.no_grad():
            self.get_parameter(f"weight_{below}_{above}").copy_(weight)
            self.get_parameter(f"bias_{above if self.upward else below}").copy_(bias)


@checked
class DeepBeliefNetwork(PyroModule):
    r"""A deep belief network: layers ``"v"``, ``"h1"`` and so on, the top two a restricted Boltzmann machine.

    .. math:: p(v, h) = p(v \mid h_1) \cdots p(h_{L-2} \mid h_{L-1})\; \frac{e^{-E(h_{L-1}, h_L)}}{Z}

    The program is unnormalised by ``Z`` alone. :attr:`guide` goes up with weights of its own, and ends with the exact
    posterior of the top layer. Train it layer by layer (:func:`pplvi.pretrain`), then together by
    :class:`pplvi.UpDown` (contrastive wake-sleep), or by :class:`pplvi.BoltzmannELBO`.

    :param widths: units of each layer, the visible one first; at least three layers.
    :param visible: ``"bernoulli"``, ``"gaussian"``, ``"categorical"``, or units of your own.
    :param num_categories: values of a categorical visible unit.
    :param mean_field_visible: accept grey levels in ``[0, 1]``.
    :param centered: train the top machine with the centered gradient.
    :param name: prefix of the parameters' names.
    :param init_scale: standard deviation of the weights at the start.
    :raises ValueError: for fewer than three layers or unknown kinds.

    Source: Hinton, Osindero & Teh (2006), "A fast learning algorithm for deep belief nets".

    >>> dbn = DeepBeliefNetwork([4, 3, 2])
    >>> dbn.bound(torch.ones(5, 4), log_z=dbn.top.log_partition()).shape, dbn.generate(7, num_sweeps=3)["v"].shape
    (torch.Size([5]), torch.Size([7, 4]))
    """

    def __init__(
        self,
        widths: Sequence[Count],
        *,
        visible: Kind | Units = "bernoulli",
        num_categories: Plural | None = None,
        mean_field_visible: bool = False,
        centered: bool = True,
        name: str = "",
        init_scale: NonNegative = 0.01,
    ) -> None:
        super().__init__(name)
        if len(widths) < 3:
            raise ValueError(f"widths={list(widths)}: expected at least three layers; two are an RBM.")
        self.layers = {"v": make_units(visible, widths[0], num_categories, mean_field_visible)}
        self.layers.update({f"h{k}": make_units("bernoulli", width) for k, width in enumerate(widths[1:], 1)})
        for layer, units in self.layers.items():
            setattr(self, f"units_{layer}", units)
        *_, penultimate, last = self.layers
        top = {layer: self.layers[layer] for layer in (penultimate, last)}
        self.top = BoltzmannMachine(top, [(penultimate, last)], centered=centered, init_scale=init_scale)
        self.directed = {layer: units for layer, units in self.layers.items() if layer != last}
        self.generation = DirectedLayers(self.directed, upward=False, init_scale=init_scale)
        self.depth = len(widths) - 1

    @property
    def visible(self) -> str:
        """Name of the visible layer."""
        return next(iter(self.layers))

    @property
    def levels(self) -> tuple[str, ...]:
        """Names of all layers, bottom to top."""
        return tuple(self.layers)

    @property
    def guide(self) -> DeepBeliefGuide:
        """The recognition model, made at the first use and kept."""
        if "recognition" not in self.__dict__:
            self.__dict__["recognition"] = DeepBeliefGuide(self)
        found: DeepBeliefGuide = self.__dict__["recognition"]
        return found

    @pyro_method
    def model(self, v: Tensor | None = None, *, size: int | None = None, num_draws: int = 1) -> dict[str, Tensor]:
        """The network as a program: plate ``"data"``, a site for every layer, and the factor ``exp(-E)`` of the top.

        :param v: values of the visible layer, ``(num_data, width)``; drawn if not given.
        :param size: how many data there are, if ``v`` is a minibatch of them.
        :param num_draws: size of the plate without data.
        """
        self.announce()
        if v is not None:
            self.layers[self.visible].validate(v, self.visible)
        with data_plate(num_draws if v is None else len(v), size):
            values = self.top.sites(num_draws if v is None else len(v), {})
            self.top.energy_site("energy", values)
            for layer in reversed(self.directed):
                if layer not in values:
                    field = self.generation.field(layer, values[self.generation.sources[layer]])
                    given = v if layer == self.visible else None
                    values[layer] = pyro.sample(layer, self.layers[layer].conditional(field), obs=given)
        return values

    @pyro_method
    def announce(self) -> None:
        """Tell Pyro about the parameters."""
        self.generation.announce()
        self.top.announce()

    def downward(self, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Values of all layers, those below the top machine drawn downwards from the given ones of that machine."""
        found = dict(values)
        with torch.no_grad():
            for layer in list(reversed(self.directed))[1:]:
                field = self.generation.field(layer, found[self.generation.sources[layer]])
                found[layer] = self.layers[layer].sample(field)
        return found

    @checked
    def generate(self, num_draws: Count, *, num_sweeps: Count = 1000) -> dict[str, Tensor]:
        """Ancestral draws of all layers, ``(num_draws, width)`` each, from Gibbs chains in the top machine."""
        return self.downward(self.top.gibbs(self.top.draw((num_draws,)), num_sweeps))

    def log_joint(self, values: Mapping[str, Tensor]) -> Tensor:
        """``log p(v, ..., h_(L-1)) + log Z``, ``(*batch)``, in nats, the top layer summed out."""
        penultimate = self.top.visible
        total = self.top.log_marginal({penultimate: values[penultimate]})
        for layer, source in self.generation.sources.items():
            field = self.generation.field(layer, values[source])
            total = total + self.layers[layer].conditional(field).log_prob(values[layer])
        return total

    @checked
    def bound(self, v: Tensor, *, log_z: Tensor | float = 0.0, num_particles: Count = 100) -> Tensor:
        """A lower bound of ``log p(v)``, ``(num_data,)``, in nats: the mean over draws of the guide; without gradient.

        .. math:: E_q[\\log p(v, h_1, .., h_{L-1}) - \\log q(h_1, .., h_{L-1} \\mid v)]

        :param log_z: log partition function of the top machine; without it the bound is one of ``log p + log Z``.
        :param num_particles: draws of the guide for each datum; the mean has their Monte Carlo error.
        """
        with torch.no_grad():
            values = self.guide.upward(v.expand(num_particles, *v.shape))
            return (self.log_joint(values) - self.guide.log_density(values)).mean(0) - log_z


@checked
class DeepBeliefGuide(PyroModule):
    """The recognition model of a deep belief network: layer by layer from the data up, then the top posterior.

    :param network: the network.
    :param name: prefix of the parameters' names.

    Source: Hinton, Dayan, Frey & Neal (1995), "The wake-sleep algorithm for unsupervised neural networks".
    """

    def __init__(
        self, network: DeepBeliefNetwork, *, name: str = "recognition", init_scale: NonNegative = 0.01
    ) -> None:
        super().__init__(name)
        self.__dict__["network"] = network  # not a part of the guide: its parameters are the model's
        self.recognition = DirectedLayers(network.directed, upward=True, init_scale=init_scale)

    def forward(self, v: Tensor | None = None, *, size: int | None = None, num_draws: int = 1) -> None:
        """Sample sites of all hidden layers, in plate ``"data"``.

        :raises ValueError: without data.
        """
        if v is None:
            raise ValueError("the recognition model got no data: expected v. Draw from the network with generate().")
        network: DeepBeliefNetwork = self.__dict__["network"]
        self.recognition.announce()
        value, penultimate = v, network.top.visible
        with data_plate(len(v), size):
            for layer in self.recognition.sources:
                value = pyro.sample(layer, network.layers[layer].conditional(self.recognition.field(layer, value)))
            last = network.top.hidden[0]
            with torch.no_grad():  # the exact posterior: the bound is stationary there
                field = network.top.field(last, {penultimate: value})
            pyro.sample(last, network.layers[last].conditional(field))

    def upward(self, v: Tensor) -> dict[str, Tensor]:
        """Draws of the layers up to the top machine's lower one, with the data, ``(*batch, width)``; no gradient."""
        network: DeepBeliefNetwork = self.__dict__["network"]
        values = {network.visible: v}
        with torch.no_grad():
            for layer, source in self.recognition.sources.items():
                values[layer] = network.layers[layer].sample(self.recognition.field(layer, values[source]))
        return values

    def log_density(self, values: Mapping[str, Tensor]) -> Tensor:
        """``log q(h_1, .., h_(L-1) | v)``, ``(*batch)``, in nats."""
        network: DeepBeliefNetwork = self.__dict__["network"]
        total = torch.zeros(())
        for layer, source in self.recognition.sources.items():
            field = self.recognition.field(layer, values[source])
            total = total + network.layers[layer].conditional(field).log_prob(values[layer])
        return total
