"""Units of undirected models: what a layer's values are, and everything that is known in closed form about one layer.

The energy of a pairwise machine is ``sum_l base(s_l)`` less terms that are linear in every layer's statistic
``phi(s_l)``. Given the rest of a machine, the units of a layer are therefore independent, and a layer is described by
one vector, its *field* ``f``: ``p(s) = exp(beta (phi(s) . f - base(s))) / Z(f)``. Values are vectors of ``width``
numbers on the last dimension; ``beta`` is an inverse temperature, a number or a tensor that broadcasts over the batch.
"""

from __future__ import annotations

import math
from typing import Any

import pyro.distributions as dist
import torch
from pyro.distributions import TorchDistribution
from pyro.nn import PyroModule
from torch import Tensor
from torch.distributions import Distribution
from torch.nn.functional import one_hot, softplus

from pplvi.energies.machines.one_hot import OneHots
from pplvi.energies.machines.under_field import UnderField
from pplvi.kinds.checked import checked
from pplvi.kinds.kinds import Count, Plural, Positive, is_number
from pplvi.programs.state import is_recording

Beta = float | Tensor


def check_beta(beta: Beta) -> None:
    """Check that inverse temperatures are numbers of at least 0, where a step is not being recorded.

    :raises ValueError: if they are not.
    """
    if isinstance(beta, Tensor):
        wrong = not is_recording() and bool((beta.isnan() | (beta < 0)).any())
    else:
        wrong = not (is_number(beta) and beta >= 0)
    if wrong:
        raise ValueError(f"beta={beta}: expected an inverse temperature, a number of at least 0.")


def times(beta: Beta, x: Tensor) -> Tensor:
    """``beta x``, with one beta for each element of the batch."""
    if isinstance(beta, Tensor):
        return beta.unsqueeze(-1) * x if beta.dim() else beta * x
    return x if beta == 1.0 else beta * x


@checked
class Units(PyroModule):
    """The units of one layer.

    :ivar num_units: number of units.
    :ivar width: numbers that describe the layer's value: ``num_units``, times the categories of a unit.
    :ivar num_states: states of one unit, or ``None`` for a continuum.
    :ivar num_biases: biases of the layer: fewer than ``width`` where neighbours share one, all equally many.
    """

    num_states: int | None = None

    def __init__(self, num_units: Count, width: Count | None = None) -> None:
        super().__init__()
        self.num_units = num_units
        self.width = num_units if width is None else width
        self.num_biases = self.width

    @property
    def log_states(self) -> float:
        """Logarithm of the number of states of the layer, in bits; infinite for a continuum."""
        return math.inf if self.num_states is None else self.num_units * math.log2(self.num_states)

    def statistic(self, value: Tensor) -> Tensor:
        """``phi(s)``, ``(*batch, width)``: linear in the value."""
        return value

    def base_energy(self, value: Tensor) -> Tensor | float:
        """``base(s)``, ``(*batch)``: the part of the energy that is not linear in the value."""
        return 0.0

    def entropies(self, mean: Tensor) -> Tensor:
        """Entropy (nats) of units with these means, less ``E[base(s)] - base(mean)``, ``(*batch, width)``.

        :raises ValueError: if that is not known of each unit.
        """
        raise ValueError(f"{type(self).__name__} are observed together or not at all: expected no mask of them.")

    def field_entropy(self, field: Tensor, mean: Tensor) -> Tensor:
        """:meth:`entropies` of all units under a field, with their means: ``log Z(f) - phi(mu) . f + base(mu)``.

        At a field and means without gradient, the gradient in the units' own parameters is that of ``-E[base(s)] +
        base(mean)`` under a distribution that is held: what the gradient of a bound needs.
        """
        linear = (self.statistic(mean) * field).sum(-1)
        return self.log_partition(field) - linear + self.base_energy(mean)

    def mean(self, field: Tensor, beta: Beta = 1.0) -> Tensor:
        """Mean value under a field, ``(*batch, width)``."""
        raise NotImplementedError

    def sample(self, field: Tensor, beta: Beta = 1.0) -> Tensor:
        """A draw under a field, ``(*batch, width)``, without gradient."""
        raise NotImplementedError

    def log_partition(self, field: Tensor, beta: Beta = 1.0) -> Tensor:
        """``log Z(f)``, ``(*batch)``, in nats: the layer summed out."""
        raise NotImplementedError

    def conditional(self, field: Tensor, beta: Beta = 1.0) -> TorchDistribution:
        """The distribution under a field, with one event dimension."""
        return UnderField(self, field, beta)

    def log_probs(self, field: Tensor, value: Tensor) -> Tensor:
        """Log density of each unit under a field, ``(*batch, width)``, in nats: to add up.

        :raises ValueError: if that is not known of each unit.
        """
        each: Any = self.conditional(field)
        if isinstance(each, UnderField):
            raise ValueError(f"{type(self).__name__} are observed together or not at all: expected no mask of them.")
        density: Tensor = each.base_dist.log_prob(value)
        return density

    def uniform(self, shape: tuple[int, ...], like: Tensor) -> Tensor:
        """Draws of the base measure where it is finite, else of a standard normal: ``(*shape, width)``."""
        raise NotImplementedError

    def problem(self, value: Tensor) -> str | None:
        """What is wrong with values, if anything: a sentence that says what to do."""
        raise NotImplementedError

    def count_states(self) -> int:
        """Number of states of the layer.

        :raises ValueError: for a continuum.
        """
        return int(self._levels() ** self.num_units)

    def _levels(self) -> int:
        if self.num_states is None:
            raise ValueError(f"the states of {type(self).__name__} cannot be listed: expected units with num_states.")
        return self.num_states

    def states(self, index: Tensor, like: Tensor) -> Tensor:
        """The layer's states of these numbers, ``(*index.shape, width)``, counting with the first unit fastest.

        :raises ValueError: for a continuum.
        """
        levels = self._levels()
        powers = torch.tensor([levels**i for i in range(self.num_units)], device=index.device)
        return self.encode(index.unsqueeze(-1) // powers % levels).to(like.dtype)

    def encode(self, levels: Tensor) -> Tensor:
        """Values of integer levels, ``(*batch, num_units)`` to ``(*batch, width)``."""
        return levels

    def first_state(self, like: Tensor) -> Tensor:
        """A value of the support: level 0 of every unit, ``(width,)``."""
        return self.encode(torch.zeros(self.num_units, device=like.device)).to(like.dtype)

    def validate(self, value: Tensor, name: str) -> None:
        """:meth:`check`, where torch's validation is on."""
        if Distribution._validate_args:
            self.check(value, name)

    def check_width(self, value: Tensor, name: str) -> None:
        """Refuse values of another width.

        :raises ValueError: then.
        """
        if value.dim() == 0 or value.shape[-1] != self.width:
            raise ValueError(
                f"layer {name!r} got values of shape {tuple(value.shape)}: expected (*batch, {self.width}). Flatten "
                "images, and put the units on the last dimension."
            )

    def check(self, value: Tensor, name: str) -> None:
        """Refuse values that are not in the support.

        :raises ValueError: for a wrong width, an empty batch, or values outside the support.
        """
        self.check_width(value, name)
        if not value.is_floating_point():
            raise ValueError(f"layer {name!r} got values of {value.dtype}: expected real numbers. Use value.float().")
        if value.numel() == 0:
            raise ValueError(f"layer {name!r} got an empty batch, {tuple(value.shape)}: expected at least one datum.")
        if (problem := self.problem(value)) is not None:
            if bool(value.isnan().any()):
                problem = "NaN: expected numbers. If these units are missing, say so: mask=~v.isnan()."
            raise ValueError(f"layer {name!r} got {problem}")


def _range_of(value: Tensor) -> str:
    return f"values from {value.min().item():.4g} to {value.max().item():.4g}"


@checked
class BernoulliUnits(Units):
    """Binary units, 0 or 1: ``p(s = 1) = sigmoid(f)`` and ``log Z = sum softplus(f)``.

    :param num_units: number of units.
    :param mean_field: accept means in ``[0, 1]`` as values, such as grey levels of images.

    >>> units = BernoulliUnits(2)
    >>> units.mean(torch.zeros(2)), units.log_partition(torch.zeros(2))
    (tensor([0.5000, 0.5000]), tensor(1.3863))
    """

    num_states = 2

    def __init__(self, num_units: Count, *, mean_field: bool = False) -> None:
        super().__init__(num_units)
        self.mean_field = mean_field

    def mean(self, field: Tensor, beta: Beta = 1.0) -> Tensor:
        """``sigmoid(beta f)``."""
        return torch.sigmoid(times(beta, field))

    def sample(self, field: Tensor, beta: Beta = 1.0) -> Tensor:
        """Independent coin flips."""
        p = self.mean(field.detach(), beta)
        return torch.empty_like(p).uniform_().lt_(p)  # five times as fast as torch.bernoulli

    def log_partition(self, field: Tensor, beta: Beta = 1.0) -> Tensor:
        """``sum softplus(beta f)``."""
        return softplus(times(beta, field)).sum(-1)

    def entropies(self, mean: Tensor) -> Tensor:
        """``-mu log mu - (1 - mu) log(1 - mu)``."""
        return -(torch.xlogy(mean, mean) + torch.xlogy(1 - mean, 1 - mean))

    def conditional(self, field: Tensor, beta: Beta = 1.0) -> TorchDistribution:
        """Independent Bernoulli distributions."""
        return dist.Bernoulli(logits=times(beta, field), validate_args=False).to_event(1)

    def uniform(self, shape: tuple[int, ...], like: Tensor) -> Tensor:
        """Fair coins."""
        return like.new_empty((*shape, self.width)).uniform_().lt_(0.5)

    def problem(self, value: Tensor) -> str | None:
        """Refuse all but 0 and 1, or all but ``[0, 1]`` where means are accepted."""
        if self.mean_field:
            inside = torch.equal(value, value.clamp(0, 1))
            return None if inside else f"{_range_of(value)}: expected means between 0 and 1. Rescale the data."
        if torch.equal(value, value.clamp(0, 1).round_()):  # three times as fast as comparing with 0 and with 1
            return None
        return (
            f"{_range_of(value)}: expected only 0 and 1. Binarise grey levels in [0, 1]: by threshold, "
            "(v > 0.5).float(), or by sampling, torch.bernoulli(v), anew at every epoch; or declare that they are "
            "means with mean_field_visible=True (mean_field=True of the units)."
        )


@checked
class CategoricalUnits(Units):
    """Units with one of ``num_categories`` values: ``p(s = k) = softmax(f)_k`` (softmax units).

    A layer's value is the one-hot codes of its units side by side, so ``width = num_units * num_categories``;
    :meth:`encode` makes it from integers and :meth:`decode` goes back.

    :param num_units: number of units.
    :param num_categories: values of each unit, at least 2.
    :raises ValueError: for fewer than two categories.

    >>> units = CategoricalUnits(2, num_categories=3)
    >>> units.encode(torch.tensor([2, 0]))
    tensor([0., 0., 1., 1., 0., 0.])
    """

    def __init__(self, num_units: Count, num_categories: Plural) -> None:
        super().__init__(num_units, num_units * num_categories)
        self.num_categories = self.num_states = num_categories

    def _apart(self, x: Tensor) -> Tensor:
        return x.reshape(*x.shape[:-1], self.num_units, self.num_categories)

    def encode(self, levels: Tensor) -> Tensor:
        """One-hot codes side by side, ``(*batch, num_units)`` integers to ``(*batch, width)``.

        :raises ValueError: for integers outside the categories.
        """
        if bool(((levels < 0) | (levels >= self.num_categories)).any()):
            raise ValueError(f"{_range_of(levels)}: expected integers from 0 to {self.num_categories - 1}.")
        return one_hot(levels.long(), self.num_categories).flatten(-2).to(torch.get_default_dtype())

    def decode(self, value: Tensor) -> Tensor:
        """Integers, ``(*batch, num_units)``, of one-hot codes or the likeliest ones of means."""
        return self._apart(value).argmax(-1)

    def mean(self, field: Tensor, beta: Beta = 1.0) -> Tensor:
        """``softmax(beta f)`` of each unit."""
        return self._apart(times(beta, field)).softmax(-1).flatten(-2)

    def sample(self, field: Tensor, beta: Beta = 1.0) -> Tensor:
        """Independent one-hot draws, by the largest of ``f`` plus Gumbel noise."""
        logits = self._apart(times(beta, field.detach()))
        noise = -torch.empty_like(logits).exponential_().log()
        largest = (logits + noise).argmax(-1, keepdim=True)
        return torch.zeros_like(logits).scatter_(-1, largest, 1.0).flatten(-2)  # one_hot() looks at values

    def log_partition(self, field: Tensor, beta: Beta = 1.0) -> Tensor:
        """``sum logsumexp(beta f)``."""
        return self._apart(times(beta, field)).logsumexp(-1).sum(-1)

    def entropies(self, mean: Tensor) -> Tensor:
        """``-mu log mu`` of each category."""
        return -torch.xlogy(mean, mean)

    def log_probs(self, field: Tensor, value: Tensor) -> Tensor:
        """Log probability of each unit in the column that it took; grey values count as soft ones."""
        return value * self._apart(field).log_softmax(-1).flatten(-2)

    def conditional(self, field: Tensor, beta: Beta = 1.0) -> TorchDistribution:
        """Independent one-hot distributions, side by side."""
        return OneHots(self._apart(times(beta, field)))

    def uniform(self, shape: tuple[int, ...], like: Tensor) -> Tensor:
        """Each category with the same probability."""
        return self.sample(like.new_zeros((*shape, self.width)))

    def problem(self, value: Tensor) -> str | None:
        """Refuse what are not one-hot codes."""
        binary = bool(((value == 0) | (value == 1)).all())
        if binary and bool((self._apart(value).sum(-1) == 1).all()):
            return None
        return f"{_range_of(value)}: expected one-hot codes side by side. Make them from integers with units.encode()."


@checked
class GaussianUnits(Units):
    """Real units with a learned precision ``t``: ``base(s) = t s^2 / 2``, ``phi(s) = t s``, so ``s ~ N(f, 1 / t)``.

    :param num_units: number of units.
    :param variance: initial variance of each unit given the others.
    :param learn_variance: whether training moves it.
    :raises ValueError: for a variance that is not positive.

    Source: Welling, Rosen-Zvi & Hinton (2004), "Exponential family harmoniums"; Goodfellow et al. (2016), section 20.5.

    >>> units = GaussianUnits(2, variance=0.25, learn_variance=False)
    >>> units.conditional(torch.ones(2)).variance
    tensor([0.2500, 0.2500])
    """

    def __init__(self, num_units: Count, *, variance: Positive = 1.0, learn_variance: bool = True) -> None:
        super().__init__(num_units)
        value = torch.full((num_units,), -math.log(variance))
        self.log_precision = torch.nn.Parameter(value, requires_grad=learn_variance)

    @property
    def precision(self) -> Tensor:
        """Precision of each unit given the others, ``(num_units,)``."""
        return self.log_precision.exp()

    def statistic(self, value: Tensor) -> Tensor:
        """``t s``."""
        return self.precision * value

    def base_energy(self, value: Tensor) -> Tensor:
        """``sum t s^2 / 2``."""
        return (self.precision * value**2).sum(-1) / 2

    def mean(self, field: Tensor, beta: Beta = 1.0) -> Tensor:
        """The field itself."""
        return field

    def _deviation(self, beta: Beta) -> Tensor:
        precision = self.precision
        if isinstance(beta, Tensor) and beta.dim():
            beta = beta.unsqueeze(-1)
        return (beta * precision) ** -0.5

    def sample(self, field: Tensor, beta: Beta = 1.0) -> Tensor:
        """``f + noise / sqrt(beta t)``."""
        return (field + torch.randn_like(field) * self._deviation(beta)).detach()

    def log_partition(self, field: Tensor, beta: Beta = 1.0) -> Tensor:
        """``sum beta t f^2 / 2 + log(2 pi / (beta t)) / 2``."""
        return times(beta, self.precision * field**2).sum(-1) / 2 + self._log_volume(beta).sum(-1)

    def _log_volume(self, beta: Beta) -> Tensor:
        return self._deviation(beta).log() + math.log(2 * math.pi) / 2

    def entropies(self, mean: Tensor) -> Tensor:
        """``log(2 pi / t) / 2``: the entropy of variance ``1 / t`` less one half."""
        return self._log_volume(1.0).expand(mean.shape)

    def conditional(self, field: Tensor, beta: Beta = 1.0) -> TorchDistribution:
        """Independent normal distributions."""
        return dist.Normal(field, self._deviation(beta), validate_args=False).to_event(1)

    def uniform(self, shape: tuple[int, ...], like: Tensor) -> Tensor:
        """Standard normal draws: the base measure, Lebesgue's, is not finite."""
        return torch.randn((*shape, self.width), dtype=like.dtype, device=like.device)

    def problem(self, value: Tensor) -> str | None:
        """Refuse what is not finite."""
        return None if bool(value.isfinite().all()) else "values that are not finite: expected real numbers."
