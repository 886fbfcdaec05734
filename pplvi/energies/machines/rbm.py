"""Restricted Boltzmann machines: one visible and one hidden layer, and the distribution of the visible one."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import torch
from pyro.distributions import TorchDistribution, constraints
from torch import Size, Tensor

from pplvi.energies.machines.boltzmann import BoltzmannMachine
from pplvi.energies.machines.couplings import GIVEN
from pplvi.energies.machines.exact_posterior import ConditionalGuide
from pplvi.energies.machines.spike_slab import SpikeSlabUnits
from pplvi.energies.machines.units import BernoulliUnits, CategoricalUnits, GaussianUnits, Units
from pplvi.kinds.checked import checked
from pplvi.kinds.kinds import Count, NonNegative, Plural

Kind = Literal["bernoulli", "gaussian", "categorical", "spike_slab"]


@checked
class RestrictedBoltzmannMachine(BoltzmannMachine):
    r"""A restricted Boltzmann machine: visible layer ``"v"``, hidden layer ``"h"``, weights between them.

    .. math:: E(v, h) = -a \cdot v - b \cdot h - v^T W h, \qquad
        F(v) = -a \cdot v - \sum_j \log(1 + e^{b_j + (v^T W)_j})

    for Bernoulli units; with Gaussian ones, ``v`` is divided by its variance and ``|v|^2 / (2 variance)`` is added.

    :param num_visible: visible units.
    :param num_hidden: hidden units.
    :param visible: ``"bernoulli"``, ``"gaussian"``, ``"categorical"`` (softmax units), or units of your own.
    :param hidden: the same for the hidden layer, or ``"spike_slab"`` (:class:`SpikeSlabUnits`).
    :param num_categories: values of a categorical unit.
    :param mean_field_visible: accept grey levels in ``[0, 1]``, as means of Bernoulli units.
    :param centered: train with the centered gradient.
    :param name: prefix of the parameters' names.
    :param init_scale: standard deviation of the weights at the start.
    :param given: width of what the machine is conditional on: ``machine.model(v, given=x)``, with weights from ``x`` to
        both layers.
    :raises ValueError: for unknown kinds, or two Gaussian layers.

    Source: Smolensky (1986); Hinton (2002); Welling, Rosen-Zvi & Hinton (2004) for other units; Taylor, Hinton &
    Roweis (2007) for conditional machines.

    >>> rbm = RestrictedBoltzmannMachine(4, 3, init_scale=0.0)
    >>> rbm.distribution().log_prob(torch.ones(4))
    tensor(-2.7726, grad_fn=<SubBackward0>)
    """

    def __init__(
        self,
        num_visible: Count,
        num_hidden: Count,
        *,
        visible: Kind | Units = "bernoulli",
        hidden: Kind | Units = "bernoulli",
        num_categories: Plural | None = None,
        mean_field_visible: bool = False,
        centered: bool = True,
        name: str = "",
        init_scale: NonNegative = 0.01,
        given: Count | None = None,
    ) -> None:
        layers = {
            "v": make_units(visible, num_visible, num_categories, mean_field_visible),
            "h": make_units(hidden, num_hidden, num_categories),
        }
        super().__init__(layers, [("v", "h")], centered=centered, name=name, init_scale=init_scale, given=given)

    @property
    def guide(self) -> ConditionalGuide:
        """The exact posterior of the hidden layer, as a Pyro guide."""
        return ConditionalGuide(self)

    def distribution(
        self, *, log_z: Tensor | float | None = None, num_sweeps: int = 1000, given: Tensor | None = None
    ) -> BoltzmannDistribution:
        """The distribution of the visible layer; see :class:`BoltzmannDistribution`."""
        return BoltzmannDistribution(self, log_z=log_z, num_sweeps=num_sweeps, given=given)


def make_units(
    kind: Kind | Units, num_units: int, num_categories: int | None = None, mean_field: bool = False
) -> Units:
    """Units by their name.

    :raises ValueError: for an unknown name, or categorical units without a number of categories.
    """
    if isinstance(kind, Units):
        return kind
    if kind == "bernoulli":
        return BernoulliUnits(num_units, mean_field=mean_field)
    if kind == "gaussian":
        return GaussianUnits(num_units)
    if kind == "spike_slab":
        return SpikeSlabUnits(num_units)
    if kind == "categorical":
        if num_categories is None:
            raise ValueError("categorical units without num_categories: expected a whole number of at least 2.")
        return CategoricalUnits(num_units, num_categories)
    raise ValueError(f"units {kind!r}: expected 'bernoulli', 'gaussian', 'categorical', 'spike_slab' or Units.")


@checked
class BoltzmannDistribution(TorchDistribution):
    r"""The distribution of a machine's visible layer, :math:`p(v) = e^{-F(v)} / Z`, with one event dimension.

    :meth:`log_prob` is exact where log Z is: with at most 20 bits on the smaller side. Elsewhere it needs ``log_z``, an
    estimate, and is as good as that. :meth:`sample` runs a Gibbs chain for each draw.

    :param machine: the machine.
    :param log_z: an estimate of ``log Z``, in nats, such as that of annealed importance sampling.
    :param num_sweeps: Gibbs sweeps from a random start to a draw.
    :param given: what a conditional machine is given, ``(*batch, given)``: a distribution for each.
    :raises ValueError: for a conditional machine without it.

    >>> from pplvi.energies import RestrictedBoltzmannMachine
    >>> p = RestrictedBoltzmannMachine(4, 3).distribution()
    >>> round(p.log_prob(p.enumerate_support()).exp().sum().item(), 4)
    1.0
    """

    arg_constraints: ClassVar[dict[str, Any]] = {}

    def __init__(
        self,
        machine: BoltzmannMachine,
        *,
        log_z: Tensor | float | None = None,
        num_sweeps: Count = 1000,
        given: Tensor | None = None,
    ) -> None:
        self.machine, self.num_sweeps = machine, num_sweeps
        self.given = machine.conditions({} if given is None else {GIVEN: given})
        self.units = machine.layers[machine.visible]
        self._log_z = log_z
        super().__init__(Size() if given is None else given.shape[:-1], Size([self.units.width]), validate_args=False)
        self._validate_args = torch.distributions.Distribution._validate_args

    @property
    def has_enumerate_support(self) -> bool:  # type: ignore[override]
        """Whether the visible layer has at most 20 bits."""
        return self.units.log_states <= 20

    @property
    def support(self) -> Any:
        """Zeros and ones, or the reals."""
        continuous = self.units.num_states is None
        return constraints.real_vector if continuous else constraints.independent(constraints.boolean, 1)

    @property
    def log_partition(self) -> Tensor:
        """``log Z``, in nats: the estimate that was given, or exact, worked out once.

        :raises ValueError: without an estimate, if the machine is too large for an exact one.
        """
        if self._log_z is None:
            try:
                self._log_z = self.machine.log_marginal(self.given)
            except ValueError as error:
                raise ValueError(
                    f"log_prob needs log Z, which is not known: {error} Then pass it: distribution(log_z=...)."
                ) from error
        return torch.as_tensor(self._log_z)

    def expand(self, batch_shape: Any, _instance: Any = None) -> TorchDistribution:
        """Independent copies."""
        return super().expand(batch_shape) if tuple(batch_shape) != self.batch_shape else self

    def _validate_sample(self, value: Tensor) -> None:
        self.units.check(value, self.machine.visible)

    def log_prob(self, value: Tensor) -> Tensor:
        """``-F(v) - log Z``, ``(*batch)``, in nats."""
        if self._validate_args:
            self._validate_sample(value)
        density = self.machine.log_marginal({self.machine.visible: value, **self.given})
        return density - self.log_partition.to(density.dtype)

    def sample(self, sample_shape: Any = ()) -> Tensor:
        """Draws, ``(*sample_shape, *batch, width)``, each the end of a Gibbs chain."""
        start = {**self.machine.draw((*sample_shape, *self.batch_shape)), **self.given}
        return self.machine.gibbs(start, self.num_sweeps)[self.machine.visible]

    def enumerate_support(self, expand: bool = True) -> Tensor:
        """Every state of the visible layer, ``(num_states, width)``.

        :raises NotImplementedError: for more than 20 bits or a continuum.
        """
        if not self.has_enumerate_support:
            raise NotImplementedError(f"{self.units.log_states:g} bits are too many to enumerate: at most 20.")
        like = self.machine.bias(self.machine.visible)
        states = torch.cat([s[self.machine.visible] for s in self.machine.states([self.machine.visible], like)])
        return states.reshape(len(states), *(1 for _ in self.batch_shape), -1)
