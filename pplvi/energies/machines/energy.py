"""Energies as Pyro programs: sample sites under base measures and a factor ``exp(-E)``.

:class:`EnergyModel` is what the kinds of undirected models share. A new kind brings its energy and its conditionals;
the program, training and evaluation stay the same.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro.nn import PyroModule, pyro_method
from torch import Tensor

from pplvi.energies.machines.couplings import GIVEN
from pplvi.energies.machines.measures import BaseMeasure
from pplvi.energies.machines.training_step import Reminder, active_step
from pplvi.energies.machines.units import Units
from pplvi.kinds.checked import checked
from pplvi.programs.errors import warn
from pplvi.programs.plates import data_plate
from pplvi.programs.sharding import data_mean
from pplvi.types import Values

Mask = Tensor | Mapping[str, Tensor] | None
Shown = Tensor | Values | None
"""Values of the visible layer, or of layers by name; nothing is drawn."""
Fixed = Tensor | None
"""What a conditional machine is given."""
Clamped = Sequence[str] | Mapping[str, Tensor | None]


@checked
class EnergyModel(PyroModule):
    """An unnormalised density over named layers of units.

    A subclass says what its energy is, how layers are drawn given others, and what can be summed out.

    :param layers: units by name, bottom to top; the first is the visible one.
    :param centered: whether training centers the gradient.
    :param name: prefix of the parameters' names.
    :param given: width of what the machine is conditional on, the values named ``"given"``; none by default.
    :raises ValueError: for a width below 1.
    """

    classes: tuple[tuple[str, ...], ...]

    def __init__(self, layers: Mapping[str, Units], *, centered: bool, name: str, given: int | None = None) -> None:
        super().__init__(name)
        self.layers: dict[str, Units] = dict(layers)
        if given is not None and (not isinstance(given, int) or given < 1):
            raise ValueError(f"given={given!r}: expected the width of what the machine is conditional on, or None.")
        self.given, self.centered = given, centered
        self._warned = False
        for layer, units in layers.items():
            setattr(self, f"units_{layer}", units)
            start = units.statistic(units.mean(torch.zeros(units.width)))
            self.register_buffer(f"offset_{layer}", start.detach().clone())
        self.register_buffer("offset_count", torch.zeros(()))

    @property
    def visible(self) -> str:
        """Name of the visible layer, the first one."""
        return next(iter(self.layers))

    @property
    def hidden(self) -> tuple[str, ...]:
        """Names of the other layers, bottom to top."""
        return tuple(self.layers)[1:]

    def offset(self, layer: str) -> Tensor:
        """The mean statistic of a layer that centered gradients are taken around, ``(width,)``."""
        return self.kept(f"offset_{layer}")

    def move_offsets(self, values: Values, rate: float) -> None:
        """Move the offsets towards the mean statistics of data and their posterior means, in place.

        ``c <- (1 - r) c + r mean``, with ``r`` the larger of the rate and one over the number of moves. Layers that
        have no values stay where they are.
        """
        with torch.no_grad():
            count = self.kept("offset_count").add_(1)
            weight = torch.clamp(1 / count, min=rate)
            for layer in self.layers.keys() & values.keys():
                units = self.layers[layer]
                mean = data_mean(units.statistic(values[layer]).reshape(-1, units.width).mean(0))
                self.offset(layer).lerp_(mean, weight.to(mean.dtype))

    def forget_chains(self) -> None:
        """Drop the chains of the negative phase: the next training step starts new ones."""
        for name in [n for n in self._buffers if n.startswith(("chain_", "fast_"))]:
            del self._buffers[name]

    def kept(self, name: str) -> Tensor:
        """What the machine remembers under a name: an offset, or the states of chains."""
        return self._found(self._buffers, name)

    def remembers(self, name: str) -> bool:
        """Whether there is such a thing."""
        return name in self._buffers

    def _found(self, table: Mapping[str, Tensor | None], name: str) -> Tensor:
        value = table.get(name)
        if value is None:
            raise ValueError(f"{type(self).__name__} has no tensor {name!r}: expected one of {sorted(table)}.")
        return value

    def energy(self, values: Values) -> Tensor:
        """``E(s)``, ``(*batch)``, in nats, of values of all layers."""
        raise NotImplementedError

    def log_marginal(self, values: Values, beta: Any = 1.0) -> Tensor:
        """``log sum exp(-beta E)`` over the layers that are not given, ``(*batch)``, in nats."""
        raise NotImplementedError

    def gibbs(
        self, values: Values, num_sweeps: int = 1, *, clamped: Clamped = (), beta: Any = 1.0
    ) -> dict[str, Tensor]:
        """Sweeps of Gibbs sampling from given values."""
        raise NotImplementedError

    def like(self) -> Tensor:
        """A tensor of the dtype and on the device of the parameters."""
        return next(self.parameters())

    def conditions(self, values: Values) -> dict[str, Tensor]:
        """What the machine is given, ``(*batch, given)``, by the name ``"given"``; nothing if it is not conditional.

        :raises ValueError: if it is conditional and the values lack it, or have it for a machine that is not.
        """
        if self.given is None and GIVEN not in values:
            return {}
        if self.given is None or GIVEN not in values:
            raise ValueError(
                f"{type(self).__name__} with given={self.given} got values of {sorted(values)}: expected "
                + (f"{GIVEN!r} among them, (*batch, {self.given})." if self.given else f"no {GIVEN!r} among them.")
            )
        return {GIVEN: values[GIVEN]}

    def joined(self, v: Tensor | Values | None, given: Tensor | None) -> Tensor | Values | None:
        """Data and what they are given as values by name."""
        if given is None:
            return v
        return {**({} if v is None else {self.visible: v} if isinstance(v, Tensor) else v), GIVEN: given}

    def draw(self, shape: tuple[int, ...] = ()) -> dict[str, Tensor]:
        """A start for Gibbs sampling: values of all layers, ``(*shape, width)``, from the base measures."""
        return {layer: units.uniform(shape, self.like()) for layer, units in self.layers.items()}

    def redrawn(self, layer: str, values: Values, beta: Any = 1.0, *, held: Tensor | None = None) -> Tensor:
        """A draw of one layer given the values of the others, without gradient; ``held`` units stay as they are."""
        raise NotImplementedError

    @pyro_method
    def model(
        self, v: Shown = None, *, mask: Mask = None, size: int | None = None, num_draws: int = 1, given: Fixed = None
    ) -> dict[str, Tensor]:
        """The machine as a Pyro program: plate ``"data"``, a site for every layer, and the factor ``exp(-E)``.

        Unnormalised: losses other than :class:`pplvi.BoltzmannELBO` have no gradient of ``log Z``.

        :param v: values of the visible layer, ``(num_data, width)``, or of several layers by name.
        :param mask: which units were observed, if some are missing: true there, ``(num_data, width)`` or ``(width,)``,
            for the visible layer or by layer. A layer with missing units is a latent site, whose observed units have
            their values in every draw; what ``v`` has in the place of missing ones, such as NaN, is not looked at.
        :param size: how many data there are, if ``v`` is a minibatch of them.
        :param num_draws: size of the plate without data; the layers are drawn by Gibbs sampling then.
        :param given: what a conditional machine is given, ``(num_data, given)``; or ``"given"`` among the values.
        :returns: values of all layers.
        :raises ValueError: for values outside the support, or of another shape or dtype; for masks without values.
        """
        self.announce()
        observed = self.checked(self.joined(v, given), mask)
        count = next((len(value) for value in observed.values()), num_draws)
        with data_plate(count, size):
            values = self.sites(count, observed, mask)
            self.energy_site("energy", values)
        return values

    @pyro_method
    def marginal(self, v: Tensor | Values, *, size: int | None = None, given: Tensor | None = None) -> None:
        """The same program with the layers that are not given summed out: the factor is ``exp(-F(v))``.

        Nothing is latent, so that its guide is :meth:`marginal_guide`, which samples nothing, and whatever units hidden
        layers have, the gradient is exact.

        :param v: values of the visible layer, or of several layers by name.
        :param size: how many data there are, if ``v`` is a minibatch of them.
        :param given: what a conditional machine is given, ``(num_data, given)``.
        :raises ValueError: as :meth:`model` does, and if layers cannot be summed out exactly.

        >>> import pyro, pplvi
        >>> rbm = pplvi.RestrictedBoltzmannMachine(3, 2, hidden="gaussian", init_scale=0.1)
        >>> loss = pplvi.BoltzmannELBO(num_chains=10, sweeps=1)
        >>> svi = pyro.infer.SVI(rbm.marginal, rbm.marginal_guide, pyro.optim.SGD({"lr": 0.1}), loss)
        >>> losses = [svi.step(torch.ones(5, 3)) for _ in range(3)]
        """
        self.announce()
        observed = self.checked(self.joined(v, given))
        count = len(next(iter(observed.values())))
        with data_plate(count, size):
            for layer in reversed(self.layers):
                if layer in observed:
                    measure = BaseMeasure(self.layers[layer], (count,), self.like(), checked=layer)
                    pyro.sample(layer, measure, obs=observed[layer])
            self.energy_site("energy", self.with_means(observed), self.log_marginal(observed))

    @staticmethod
    def marginal_guide(*args: Any, **kwargs: Any) -> None:
        """The guide of :meth:`marginal`, which has no latent sites."""

    def with_means(self, values: Values) -> dict[str, Tensor]:
        """Values with the means of layers that are independent given them, without gradient; here, none."""
        return dict(values)

    def observed(self, v: Tensor | Values | None, mask: Mask = None) -> dict[str, Tensor]:
        """Observed layers by name, ``(*batch, width)``, with a value of the support where a unit is missing.

        :param v: values of the visible layer, or of several layers by name.
        :param mask: which of their units were observed, as in :meth:`model`.
        :raises ValueError: for unknown layers, or values of another width or dtype.
        """
        given = {} if v is None else {self.visible: v} if isinstance(v, Tensor) else dict(v)
        for layer, value in given.items():
            if layer == GIVEN and self.conditions(given):
                if value.dim() == 0 or value.shape[-1] != self.given:
                    raise ValueError(f"given of shape {tuple(value.shape)}: expected (*batch, {self.given}).")
                continue
            if layer not in self.layers:
                raise ValueError(f"values of an unknown layer {layer!r}: expected some of {list(self.layers)}.")
            self.layers[layer].check_width(value, layer)
            if value.dtype != self.like().dtype:
                raise ValueError(
                    f"layer {layer!r} got values of {value.dtype}: expected {self.like().dtype}, as the machine's "
                    "parameters. Use v.to(machine.like())."
                )
        for layer, known in self.masks(mask, given).items():
            given[layer] = torch.where(known, given[layer], self.layers[layer].first_state(given[layer]))
        return given

    def checked(self, v: Tensor | Values | None, mask: Mask = None) -> dict[str, Tensor]:
        """:meth:`observed`, refusing what is not in the support.

        :raises ValueError: then, where torch's validation is on, and as :meth:`observed` does.
        """
        given = self.observed(v, mask)
        for layer in self.layers.keys() & given.keys():
            self.layers[layer].validate(given[layer], layer)
        return given

    def masks(self, mask: Mask, given: Values) -> dict[str, Tensor]:
        """Masks by layer; a mask alone is one of the visible layer.

        :raises ValueError: for masks of layers without values, of another type, or of another shape.
        """
        found = {} if mask is None else {self.visible: mask} if isinstance(mask, Tensor) else dict(mask)
        if without := sorted(found.keys() - given.keys()):
            raise ValueError(f"a mask without data: expected values of the layers {without} that it belongs to.")
        if GIVEN in found:
            raise ValueError(f"a mask of {GIVEN!r}: expected one of layers, what a machine is given has to be known.")
        for layer, known in found.items():
            shape = tuple(given[layer].shape)
            if known.dtype != torch.bool or known.dim() > len(shape) or not _broadcasts(known.shape, shape):
                raise ValueError(
                    f"the mask of layer {layer!r} has dtype {known.dtype} and shape {tuple(known.shape)}: expected "
                    f"booleans of shape {shape} or {shape[-1:]}, true where a unit was observed."
                )
        return found

    def sites(self, count: int, observed: Values, mask: Mask = None) -> dict[str, Tensor]:
        """Sample sites of all layers, top to bottom, under their base measures.

        Sites that a guide or an observation does not supply are drawn from what is known by then: given the layers
        above, or, at the top, by Gibbs sampling from nothing. Of partly observed layers only what is missing is.
        """
        values, masks = self.conditions(observed), self.masks(mask, observed)
        for layer in reversed(self.layers):
            given, known = observed.get(layer), masks.get(layer)
            pinned = None if known is None or given is None else (known, given)
            measure = BaseMeasure(
                self.layers[layer],
                (count,),
                self.like(),
                draw=_LayerDraw(self, layer, values, pinned),
                checked=None if given is None or pinned else layer,
            )
            value = pyro.sample(layer, measure, obs=None if pinned else given)
            values[layer] = torch.where(*pinned, value) if pinned else value
        return values

    def energy_site(self, name: str, values: Values, density: Tensor | None = None) -> None:
        """The factor ``exp(-E)`` at given values, as a site that tells objectives which machine it belongs to.

        :param density: the log of the factor, if it is another one, such as with layers summed out.
        """
        density = -self.energy(values) if density is None else density
        if active_step() is None and density.requires_grad:
            live = [p for p in self.parameters() if p.requires_grad]
            density = density + Reminder.apply(self._remind, density.detach(), *live)
        infer: Any = {"energy": self, "values": dict(values)}
        pyro.sample(
            name,
            dist.Unit(density),
            obs=density.new_empty((*density.shape, 0)),
            infer=infer,
        )

    def _remind(self) -> None:
        """Warn once that a gradient without that of log Z reaches the parameters."""
        if not self._warned:
            self._warned = True
            warn(
                f"the parameters of {type(self).__name__} are trained, but its energy is not normalised and this loss "
                "leaves out the gradient of log Z: the energy of the data only falls. Train it with "
                "pplvi.BoltzmannELBO, or freeze it with requires_grad_(False).",
            )

    @pyro_method
    def announce(self) -> None:
        """Tell Pyro about the parameters.

        :raises ValueError: if the store holds another machine's parameters under these names.
        """
        for module in self.modules():
            for name, mine in module._parameters.items():
                if mine is None or not mine.requires_grad:  # Pyro would unfreeze it
                    continue
                getattr(module, name)
                known = pyro.get_param_store()._params.get(_full_name(module, name))
                if known is not None and known is not mine:
                    raise ValueError(
                        f"the parameter store holds another tensor as {_full_name(module, name)!r}: expected "
                        f"that of this {type(self).__name__}. Give each machine a name of its own (name='first'), "
                        "train them in scopes (pyro.get_param_store().scope()), or call pyro.clear_param_store()."
                    )


def _full_name(module: Any, name: str) -> str:
    full: str = module._pyro_get_fullname(name)
    return full


class _LayerDraw:
    """Draws of one layer for a program that has nothing better: given the layers above, or by Gibbs sampling."""

    SWEEPS = 100

    def __init__(
        self, machine: EnergyModel, layer: str, above: Values, pinned: tuple[Tensor, Tensor] | None = None
    ) -> None:
        self.machine, self.layer, self.above, self.pinned = machine, layer, dict(above), pinned

    def __call__(self, shape: tuple[int, ...]) -> Tensor:
        machine = self.machine
        held = {n: v.detach().expand(*shape, v.shape[-1]) for n, v in self.above.items()}
        start, clamped = {**machine.draw(shape), **held}, dict.fromkeys(held.keys() - {GIVEN})
        if self.pinned is not None:
            start[self.layer] = torch.where(*self.pinned, start[self.layer])
            clamped[self.layer] = self.pinned[0]
        with torch.no_grad():
            if set(machine.layers) == {*held, self.layer} - {GIVEN}:
                return machine.redrawn(self.layer, start, held=clamped.get(self.layer))
            return machine.gibbs(start, self.SWEEPS, clamped=clamped)[self.layer]


def _broadcasts(shape: Sequence[int], to: Sequence[int]) -> bool:
    return all(mine in (1, other) for mine, other in zip(reversed(shape), reversed(to), strict=False))
