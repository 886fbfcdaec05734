"""Sequences: a conditional restricted machine at each time, given a state that runs through what has been seen."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

import pyro
import torch
from pyro.nn import PyroModule, pyro_method
from torch import Tensor

from pplvi.energies.machines.couplings import GIVEN
from pplvi.energies.machines.measures import BaseMeasure
from pplvi.energies.machines.rbm import Kind, RestrictedBoltzmannMachine
from pplvi.energies.machines.units import Units
from pplvi.kinds.checked import checked
from pplvi.kinds.kinds import Count, NonNegative


class SequenceMachine(PyroModule):
    """``p(v_1, .., v_T) = prod_t p(v_t | u_(t-1))``, each a conditional restricted machine given a state.

    The state is a function of what was seen before, which a subclass says, so that all times are trained together, with
    a gradient back through them: ``SVI(machine.model, machine.guide, optim, BoltzmannELBO(negative="contrastive"))``.

    :ivar machine: the conditional machine, which annealed importance sampling takes with :meth:`frames`.
    """

    def __init__(self, name: str, visible: Kind | Units, widths: tuple[int, int, int], init_scale: float) -> None:
        super().__init__(name)
        num_visible, num_hidden, num_state = widths
        self.machine = RestrictedBoltzmannMachine(
            num_visible, num_hidden, visible=visible, centered=False, init_scale=init_scale, given=num_state
        )

    @abstractmethod
    def following(self, state: Tensor, v: Tensor) -> Tensor:
        """The state after values ``(*batch, width)`` were seen, ``(*batch, num_state)``."""

    @abstractmethod
    def first(self) -> Tensor:
        """The state before anything was seen, ``(num_state,)``."""

    def states(self, v: Tensor) -> Tensor:
        """The state before each time of sequences ``(*batch, time, width)``, ``(*batch, time, num_state)``."""
        state = self.first().expand(*v.shape[:-2], -1)
        found = [state]
        for t in range(v.shape[-2] - 1):
            found.append(state := self.following(state, v[..., t, :]))
        return torch.stack(found, -2)

    def frames(self, v: Tensor, mask: Tensor | None = None) -> dict[str, Tensor]:
        """What was seen at each time and what it is given, ``(num_frames, width)`` by name, without gradient.

        :param mask: which times there are, ``(num_sequences, time)``, boolean; all unless given.
        """
        with torch.no_grad():
            given = self.states(v)
        seen = torch.ones(v.shape[:-1], dtype=torch.bool, device=v.device) if mask is None else mask
        return {"v": v[seen], GIVEN: given[seen]}

    def _announce(self) -> None:
        """Tell Pyro about the parameters."""
        self.machine.announce()
        for name, parameter in self._parameters.items():
            if parameter is not None and parameter.requires_grad:
                getattr(self, name)

    @pyro_method
    def model(self, v: Tensor, mask: Tensor | None = None) -> None:
        """The sequences as a program, hidden layers summed out: plates ``"sequences"`` and ``"time"``.

        :param v: sequences, ``(num_sequences, time, width)``.
        :param mask: which times there are, ``(num_sequences, time)``, boolean; all unless given.
        :raises ValueError: for values outside the support, or of another shape.
        """
        if v.dim() != 3 or (mask is not None and mask.shape != v.shape[:-1]):
            raise ValueError(
                f"sequences of shape {tuple(v.shape)}, mask {None if mask is None else tuple(mask.shape)}: expected "
                "(num_sequences, time, width) and (num_sequences, time)."
            )
        self._announce()
        values = self.machine.checked({"v": v, GIVEN: self.states(v)})
        there: Any = True if mask is None else mask
        density, means = self.machine.log_marginal(values), self.machine.with_means(values)
        sequences, time = pyro.plate("sequences", len(v), dim=-2), pyro.plate("time", v.shape[1], dim=-1)
        with sequences, time, pyro.poutine.mask(mask=there):
            pyro.sample("v", BaseMeasure(self.machine.layers["v"], tuple(v.shape[:-1]), v), obs=v)
            self.machine.energy_site("energy", means, density)

    @staticmethod
    def guide(*args: Any, **kwargs: Any) -> None:
        """The guide of :meth:`model`, which has no latent sites."""

    def generate(self, num_sequences: int, length: int, *, num_sweeps: int = 100) -> Tensor:
        """Sequences drawn time by time, ``(num_sequences, length, width)``, each by its own Gibbs chain."""
        found, machine = [], self.machine
        with torch.no_grad():
            state = self.first().expand(num_sequences, -1)
            for _ in range(length):
                v = machine.gibbs({**machine.draw((num_sequences,)), GIVEN: state}, num_sweeps)["v"]
                found.append(v)
                state = self.following(state, v)
        return torch.stack(found, -2)


@checked
class RNNBoltzmannMachine(SequenceMachine):
    r"""The RNN-RBM: a recurrent network whose state shifts the biases of a restricted machine.

    .. math:: u_t = \tanh(c + v_t^T A + u_{t-1}^T B), \qquad
        p(v_t \mid u_{t-1}) \propto \sum_h e^{(a + u_{t-1}^T C) \cdot v_t + (b + u_{t-1}^T D) \cdot h + v_t^T W h}

    :param num_visible: visible units.
    :param num_hidden: hidden units.
    :param num_state: units of the recurrent network.
    :param visible: ``"bernoulli"``, ``"gaussian"``, or units of your own.
    :param name: prefix of the parameters' names.
    :param init_scale: standard deviation of the weights at the start.
    :raises ValueError: for numbers below 1, or unknown kinds of units.

    Source: Boulanger-Lewandowski, Bengio & Vincent (2012), "Modeling temporal dependencies in high-dimensional
    sequences".

    >>> machine = RNNBoltzmannMachine(4, 3, num_state=5)
    >>> machine.states(torch.ones(2, 6, 4)).shape, machine.generate(2, 3, num_sweeps=5).shape
    (torch.Size([2, 6, 5]), torch.Size([2, 3, 4]))
    """

    def __init__(
        self,
        num_visible: Count,
        num_hidden: Count,
        *,
        num_state: Count,
        visible: Kind | Units = "bernoulli",
        name: str = "",
        init_scale: NonNegative = 0.01,
    ) -> None:
        super().__init__(name, visible, (num_visible, num_hidden, num_state), init_scale)
        self.weight_input = torch.nn.Parameter(init_scale * torch.randn(num_visible, num_state))
        self.weight_state = torch.nn.Parameter(init_scale * torch.randn(num_state, num_state))
        self.bias_state = torch.nn.Parameter(torch.zeros(num_state))
        self.start = torch.nn.Parameter(torch.zeros(num_state))

    def _own(self, name: str) -> Tensor:
        return self.get_parameter(name)

    def first(self) -> Tensor:
        """The state before anything was seen, learned."""
        return self._own("start")

    def following(self, state: Tensor, v: Tensor) -> Tensor:
        """``tanh(c + v A + u B)``."""
        statistic = self.machine.layers["v"].statistic(v)
        reached = statistic @ self._own("weight_input") + state @ self._own("weight_state")
        return torch.tanh(self._own("bias_state") + reached)


@checked
class RecurrentTemporalMachine(SequenceMachine):
    r"""The recurrent temporal restricted Boltzmann machine (RTRBM): the state is the hidden layer's own mean.

    .. math:: r_t = E[h \mid v_t, r_{t-1}] = \sigma(b + v_t^T W + r_{t-1}^T U), \qquad
        p(v_t \mid r_{t-1}) \propto \sum_h e^{(a + r_{t-1}^T A) \cdot v_t + (b + r_{t-1}^T U) \cdot h + v_t^T W h}

    :param num_visible: visible units.
    :param num_hidden: hidden units.
    :param visible: ``"bernoulli"``, ``"gaussian"``, or units of your own.
    :param name: prefix of the parameters' names.
    :param init_scale: standard deviation of the weights at the start.
    :raises ValueError: for numbers below 1, or unknown kinds of units.

    Source: Sutskever, Hinton & Taylor (2008), "The recurrent temporal restricted Boltzmann machine".

    >>> RecurrentTemporalMachine(4, 3).states(torch.ones(2, 6, 4)).shape
    torch.Size([2, 6, 3])
    """

    def __init__(
        self,
        num_visible: Count,
        num_hidden: Count,
        *,
        visible: Kind | Units = "bernoulli",
        name: str = "",
        init_scale: NonNegative = 0.01,
    ) -> None:
        super().__init__(name, visible, (num_visible, num_hidden, num_hidden), init_scale)
        self.start = torch.nn.Parameter(torch.zeros(num_hidden))

    def first(self) -> Tensor:
        """The state before anything was seen, learned: the mean of units under a field."""
        return torch.sigmoid(self.get_parameter("start"))

    def following(self, state: Tensor, v: Tensor) -> Tensor:
        """The mean of the hidden layer."""
        return self.machine.layers["h"].mean(self.machine.field("h", {"v": v, GIVEN: state}))
