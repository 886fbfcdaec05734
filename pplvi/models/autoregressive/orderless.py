"""One network for every order of the numbers: orderless training, ensembles of orders, and missing numbers exactly."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pyro
import torch
from pyro.nn import pyro_method
from torch import Size, Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits, linear

from pplvi.guides.owned import claim_name
from pplvi.kinds.checked import checked
from pplvi.kinds.kinds import Count
from pplvi.models.autoregressive.distributions import EventDistribution
from pplvi.models.autoregressive.model import BinaryAutoregressiveModel
from pplvi.models.autoregressive.walk import OutputCells
from pplvi.models.inputs import checked_data, checked_mask
from pplvi.programs.calls import check_counts
from pplvi.programs.plates import data_plate
from pplvi.programs.state import random_state
from pplvi.weights.algebra import logmeanexp

__all__ = ["OrderEnsemble", "OrderlessNADE"]


class RandomSubset(EventDistribution):
    """How far an order has come: a number uniform from none to all but one, and as many of what was seen at random.

    :param observed: what was seen, ``(N, D)``, boolean.
    :param like: a tensor of the dtype of subsets.
    """

    def __init__(self, observed: Tensor, like: Tensor) -> None:
        super().__init__(observed.shape[-1], observed.shape[:-1])
        self.observed, self.like = observed, like

    def log_prob(self, value: Tensor) -> Tensor:
        """``-log n - log binomial(n, k)``, ``(*batch)``, in nats."""
        count, chosen = self.observed.sum(-1).to(value).clamp(min=1), value.sum(-1)
        ways = torch.lgamma(count + 1) - torch.lgamma(chosen + 1) - torch.lgamma(count - chosen + 1)
        return -count.log() - ways

    def sample(self, sample_shape: Any = ()) -> Tensor:
        """Zeros and ones."""
        shape = Size(sample_shape) + self.batch_shape + self.event_shape
        key = torch.rand(shape, dtype=self.like.dtype, device=self.like.device).masked_fill(~self.observed, 2.0)
        rank = key.argsort(-1).argsort(-1)
        length = torch.floor(torch.rand_like(key[..., 0]) * self.observed.sum(-1))
        return (rank < length.unsqueeze(-1)).to(key.dtype)


class Rest(EventDistribution):
    r"""What an order has yet to come to: ``n / (n - k)`` times the log probability of the rest, each given the same.

    :param logits: of every number given the subset, ``(*, D)``.
    :param rest: which numbers those are, ``(*, D)``, boolean.
    :param factor: ``n / (n - k)``, ``(*)``.
    """

    def __init__(self, logits: Tensor, rest: Tensor, factor: Tensor) -> None:
        super().__init__(logits.shape[-1], logits.shape[:-1])
        self.logits, self.rest, self.factor = logits, rest, factor

    def log_prob(self, value: Tensor) -> Tensor:
        """An unbiased estimate of the mean over orders, ``(*batch)``, in nats."""
        loss = binary_cross_entropy_with_logits(self.logits, value.expand(self.logits.shape), reduction="none")
        return -self.factor * loss.masked_fill(~self.rest, 0.0).sum(-1)

    def sample(self, sample_shape: Any = ()) -> Tensor:
        """All numbers given the subset, as if they were independent."""
        return torch.bernoulli(torch.sigmoid(self.logits).expand(Size(sample_shape) + self.logits.shape))


class OrderEnsemble(EventDistribution):
    r"""A mixture of one network's distributions for several orders.

    .. math:: p(x) = \frac1K \sum_k \prod_d p(x_{o_k(d)} \mid x_{o_k(<d)})

    Probabilities of whole vectors are averaged, so that it is a distribution; averages of numbers' log odds make none.

    :param cells: the network.
    :param orders: ``(K, D)``.
    """

    def __init__(self, cells: OutputCells, orders: Tensor) -> None:
        super().__init__(orders.shape[-1])
        self.cells, self.orders = cells, orders

    def each(self, value: Tensor, observed: Tensor | None = None) -> Tensor:
        """Log probability under every order, those that were seen first, ``(K, *batch)``, in nats."""
        rows = value.reshape(-1, value.shape[-1])
        seen = torch.ones_like(rows, dtype=torch.bool) if observed is None else observed.expand(rows.shape)
        return torch.stack([self._one(order, rows, seen).reshape(value.shape[:-1]) for order in self.orders])

    def _one(self, order: Tensor, rows: Tensor, seen: Tensor) -> Tensor:
        turns = self.cells.walk(_first(order, seen), rows, seen)
        terms = [torch.where(seen.gather(1, turn.number[:, None])[:, 0], turn.log_prob, 0.0) for turn in turns]
        return torch.stack(terms).sum(0)

    def log_prob(self, value: Tensor, observed: Tensor | None = None) -> Tensor:
        """Exact, ``(*batch)``, in nats.

        :param observed: which numbers count, ``(*batch, D)``; the others are left out, exactly.
        """
        return logmeanexp(self.each(self._checked(value) if observed is None else value, observed))

    @torch.no_grad()
    def sample(self, sample_shape: Any = ()) -> Tensor:
        """Draws, each in an order of the ensemble."""
        nothing = self.cells.output.new_zeros(Size(sample_shape) + self.batch_shape + self.event_shape)
        return self.complete(nothing, torch.zeros_like(nothing, dtype=torch.bool))

    @torch.no_grad()
    def complete(self, x: Tensor, observed: Tensor) -> Tensor:
        """Draw what is missing given all that was seen, under orders that have that first."""
        rows, seen = (part.reshape(-1, part.shape[-1]) for part in (x, observed.expand(x.shape)))
        if len(self.orders) == 1 or not bool(seen.any()):
            which = torch.randint(len(self.orders), (len(rows),), device=rows.device)
        else:
            which = torch.distributions.Categorical(logits=self.each(rows, seen).T).sample()
        return self.cells.filled(_first(self.orders[which], seen), rows, seen).reshape(x.shape)


def _first(order: Tensor, seen: Tensor) -> Tensor:
    """Orders of each datum that have what was seen first, ``(N, D)``."""
    order = order.expand(seen.shape)
    return order.gather(1, (~seen).gather(1, order).to(torch.int8).sort(dim=1, stable=True)[1])


@checked
class OrderlessNADE(BinaryAutoregressiveModel):
    r"""A network that predicts any binary numbers from any others, trained on all orders at once.

    .. math:: E_o \log p(x \mid o) = E_S \frac{D}{D - |S|} \sum_{d \notin S} \log p(x_d \mid x_S)

    ``model`` draws the subset ``S`` as site ``"seen"``, and ``guide`` the same: the ELBO is the mean over orders, a
    lower bound of any ensemble's. It is estimated without bias from one subset; nonlinear bounds are not.
    :meth:`distribution` is exact for an ensemble of orders. Missing numbers are left out exactly: a subset is one of
    what was seen.

    Source: Uria, Murray & Larochelle (2014), "A deep and tractable density estimator".

    :param num_visible: ``D``.
    :param hidden: units of each hidden layer.
    :param name: prefix of the parameters' names.
    :raises ValueError: for sizes below 1, or no hidden layer.

    >>> orderless = OrderlessNADE(4, [8])
    >>> orderless.distribution(num_orders=3).log_prob(torch.zeros(5, 4)).shape
    torch.Size([5])
    """

    def __init__(self, num_visible: Count, hidden: Sequence[Count], *, name: str = "orderless_nade") -> None:
        super().__init__(num_visible, name)
        check_counts(**{f"hidden[{i}]": width for i, width in enumerate(hidden)})
        if not hidden:
            raise ValueError("hidden=[]: expected the units of at least one hidden layer.")
        first, *rest = hidden
        self.depth = len(rest)
        self.seen = nn.Parameter(torch.randn(num_visible, first) * (2 * num_visible) ** -0.5)
        self.known = nn.Parameter(torch.randn(num_visible, first) * (2 * num_visible) ** -0.5)
        self.hidden_bias = nn.Parameter(torch.zeros(first))
        for layer, (below, width) in enumerate(zip(hidden, rest, strict=False)):
            setattr(self, f"weight_{layer}", nn.Parameter(torch.randn(width, below) * (2 / below) ** 0.5))
            setattr(self, f"bias_{layer}", nn.Parameter(torch.zeros(width)))
        self.output = nn.Parameter(0.1 * torch.randn(num_visible, hidden[-1]) * hidden[-1] ** -0.5)
        self.bias = nn.Parameter(torch.zeros(num_visible))

    @pyro_method
    def cells(self) -> OutputCells:
        """The network, one number at a time, with parameters as they are now."""
        layers = [(getattr(self, f"weight_{i}"), getattr(self, f"bias_{i}")) for i in range(self.depth)]

        def activate(state: Tensor) -> Tensor:
            h = torch.relu(state)
            for weight, bias in layers:
                h = torch.relu(linear(h, weight, bias))
            return h

        return OutputCells(self.hidden_bias, self.seen, self.known, self.output, self.bias, activate)

    @pyro_method
    def distribution(self, num_orders: int = 1, *, seed: int = 0) -> OrderEnsemble:  # type: ignore[override]
        """An ensemble of random orders, with parameters as they are now.

        :param num_orders: how many; density evaluations take as many times as long.
        :param seed: of the orders.
        :raises ValueError: for fewer than one order.
        """
        check_counts(num_orders=num_orders)
        with random_state(seed):
            orders = torch.stack([torch.randperm(self.num_visible) for _ in range(num_orders)])
        return OrderEnsemble(self.cells(), orders.to(self.bias.device))

    @pyro_method
    def model(  # type: ignore[override]
        self, x: Tensor | None = None, *, mask: Tensor | None = None, size: int | None = None
    ) -> Tensor:
        """Data ``"x"`` in plate ``"data"``, in part given another part ``"seen"``.

        :param x: data, ``(N, D)``; drawn if left out.
        :param mask: which numbers are there, ``(N, D)`` or ``(D,)``, boolean.
        :param size: how many to draw (one), or how many the data given stand for.
        :raises ValueError: for data or a mask of another shape.
        """
        claim_name(self)
        if x is None:
            with data_plate(size or 1, None):
                drawn: Tensor = pyro.sample("x", self.distribution())
                return drawn
        there = self._there(x, mask)
        with data_plate(len(x), size):
            seen = pyro.sample("seen", RandomSubset(there, x))
            cells = self.cells()
            state = cells.state + (seen * x.masked_fill(~there, 0.0)) @ cells.seen + seen @ self.known
            logits = linear(cells.activate(state), cells.output, cells.bias)
            count = there.sum(-1).to(x)
            rest = there & (seen == 0)
            return pyro.sample("x", Rest(logits, rest, count / (count - seen.sum(-1)).clamp(min=1)), obs=x)

    @pyro_method
    def guide(  # type: ignore[override]
        self, x: Tensor | None = None, *, mask: Tensor | None = None, size: int | None = None
    ) -> None:
        """Draws the subset; same arguments as the model."""
        if x is not None:
            with data_plate(len(x), size):
                pyro.sample("seen", RandomSubset(self._there(x, mask), x))

    def _there(self, x: Tensor, mask: Tensor | None) -> Tensor:
        x = checked_data(x, self.num_visible)
        return torch.ones_like(x, dtype=torch.bool) if mask is None else checked_mask(mask, x)
