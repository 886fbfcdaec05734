"""Binary sparse coding: mean field in turn or at once, restarts, exact posteriors, and learning with any of them."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import pyro
import pyro.distributions as dist
import torch
from pyro.distributions import constraints
from pyro.nn import PyroModule, PyroParam, pyro_method
from torch import Tensor
from torch.nn.functional import logsigmoid

from pplvi.guides.owned import claim_name
from pplvi.kinds.checked import checked
from pplvi.kinds.kinds import Count, Floats, Fraction, Matrix, Natural, NonNegative
from pplvi.programs.calls import check_counts
from pplvi.programs.plates import data_plate, full_size
from pplvi.programs.state import is_recording

__all__ = ["BinaryMeanField", "BinarySparseCoding", "learn_binary_coding"]

MOST_ENUMERATED = 20


class Moments(NamedTuple):
    """What a posterior of the codes says of all data together.

    :ivar first: means ``E h_n``, ``(N, m)``.
    :ivar second: ``sum_n E h_n h_n^T``, ``(m, m)``.
    """

    first: Tensor
    second: Tensor


@checked
class BinarySparseCoding(PyroModule):
    r"""Binary codes, linear Gaussian observations.

    .. math:: p(h_i = 1) = \sigma(b_i), \qquad p(v \mid h) = \mathcal N(v; W h, \operatorname{diag}(\beta)^{-1})

    Observing ``v`` makes all codes depend on each other, so that the posterior is that of a Boltzmann machine:
    :class:`BinaryMeanField` approximates it, :meth:`exact` enumerates it where there are few codes.

    Source: Goodfellow, Bengio & Courville (2016), Deep learning, section 19.4.1; Henniges et al. (2010), "Binary sparse
    coding".

    :param num_visible: ``n``, numbers in one observation.
    :param num_codes: ``m``.
    :param weight: ``W``, ``(n, m)``; random with columns of about length one unless given.
    :param bias: ``b``, ``(m,)``; -1 unless given.
    :param precision: ``beta``, ``(n,)``; 4 unless given.
    :param name: prefix of the parameters' names.
    :raises ValueError: for tensors of other shapes, and a precision that is not positive.

    >>> coding = BinarySparseCoding(2, 2, weight=torch.eye(2), bias=torch.zeros(2), precision=torch.full((2,), 100.0))
    >>> log_p, probs = coding.exact(torch.tensor([[1.0, 0.0]]))
    >>> probs.round()
    tensor([[1., 0.]])
    """

    def __init__(
        self,
        num_visible: Count,
        num_codes: Count,
        *,
        weight: Floats | None = None,
        bias: Floats | None = None,
        precision: Floats | None = None,
        name: str = "binary_sparse_coding",
    ) -> None:
        super().__init__(name)
        self.num_visible, self.num_codes = num_visible, num_codes
        start = torch.randn(num_visible, num_codes) / math.sqrt(num_visible) if weight is None else weight
        parameters: dict[str, tuple[Tensor, tuple[int, ...], Any]] = {
            "weight": (start, (num_visible, num_codes), constraints.real),
            "bias": (torch.full((num_codes,), -1.0) if bias is None else bias, (num_codes,), constraints.real),
            "precision": (
                torch.full((num_visible,), 4.0) if precision is None else precision,
                (num_visible,),
                constraints.positive,
            ),
        }
        for what, (tensor, shape, constraint) in parameters.items():
            if tuple(tensor.shape) != shape or not bool(constraint.check(tensor).all()):
                raise ValueError(f"{what} of shape {tuple(tensor.shape)}: expected {shape} and {constraint}.")
            setattr(self, what, PyroParam(tensor.detach().clone(), constraint))

    weight: Tensor
    bias: Tensor
    precision: Tensor

    @pyro_method
    def model(self, v: Tensor | None = None, *, size: int | None = None) -> Tensor:
        """Codes ``"h"`` and observations ``"v"`` in plate ``"data"``.

        :param v: data, ``(N, n)``; drawn if left out.
        :param size: how many to draw (one), or how many the data given stand for.
        """
        claim_name(self)
        weight, bias, scale = self.weight, self.bias, self.precision.rsqrt()
        with data_plate(full_size(1, size), None) if v is None else data_plate(len(v), size):
            h = pyro.sample("h", dist.Bernoulli(logits=bias).to_event(1))
            found: Tensor = pyro.sample("v", dist.Normal(h @ weight.T, scale).to_event(1), obs=v)
        return found

    # ------------------------------------------------------------------ the posterior and its bound

    def problem(self, v: Tensor) -> BinaryProblem:
        """What the posteriors of data depend on.

        :raises ValueError: for data of another shape.
        """
        if v.dim() != 2 or v.shape[1] != self.num_visible:
            raise ValueError(f"v of shape {tuple(v.shape)}: expected (N, {self.num_visible}).")
        weight, precision = self.weight.detach(), self.precision.detach()
        gram, linear = weight.T @ (precision[:, None] * weight), (v * precision) @ weight
        constant = dist.Normal(0.0, precision.rsqrt()).log_prob(v).sum(-1)
        return BinaryProblem(gram, linear, self.bias.detach(), constant)

    @torch.no_grad()
    def exact(self, v: Tensor) -> tuple[Tensor, Tensor]:
        """Log evidence, ``(N,)`` in nats, and posterior means of the codes, ``(N, m)``, by enumeration.

        :raises ValueError: for more than 20 codes.
        """
        log_p, weights, states = self._enumerated(v)
        return log_p, weights @ states

    def exact_moments(self, v: Tensor) -> Moments:
        """Moments of the exact posterior.

        :raises ValueError: for more than 20 codes.
        """
        _, weights, states = self._enumerated(v)
        return Moments(weights @ states, states.T @ (weights.sum(0)[:, None] * states))

    @torch.no_grad()
    def _enumerated(self, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        if self.num_codes > MOST_ENUMERATED:
            raise ValueError(
                f"{self.num_codes} codes have too many states to enumerate: expected at most {MOST_ENUMERATED}. Use "
                "BinaryMeanField."
            )
        problem = self.problem(v)
        states = torch.cartesian_prod(*[torch.tensor([0.0, 1.0])] * self.num_codes).reshape(-1, self.num_codes).to(v)
        joint = problem.log_joint(states)
        return joint.logsumexp(-1), joint.softmax(-1), states

    @torch.no_grad()
    def maximise(self, v: Tensor, moments: Moments) -> None:
        """The M-step: the parameters that maximise the expected log joint under a posterior, in closed form.

        :param v: the data that the moments are of.
        :raises ValueError: for data without noise, whose precision has no maximum.
        """
        cross, count = v.T @ moments.first, len(v)
        weight = cross @ torch.linalg.pinv(moments.second, hermitian=True)
        rest = v.square().sum(0) - 2 * (cross * weight).sum(-1) + ((weight @ moments.second) * weight).sum(-1)
        if not bool((rest > 0).all()):
            raise ValueError("the codes explain the data without noise: expected data of more numbers, or fewer codes.")
        eps = torch.finfo(weight.dtype).eps
        self.weight, self.precision = weight, count / rest
        self.bias = torch.logit(moments.first.mean(0).clamp(eps, 1 - eps))


@dataclass(frozen=True)
class BinaryProblem:
    """The posteriors of data: ``log p(v, h) = h b' + constant - h G h / 2`` with a field ``b' = b + W^T diag(beta) v``.

    :ivar gram: ``G = W^T diag(beta) W``, ``(m, m)``.
    :ivar linear: ``W^T diag(beta) v``, ``(N, m)``.
    :ivar bias: ``b``, ``(m,)``.
    :ivar constant: ``log N(v; 0, 1 / beta)``, ``(N,)``.
    """

    gram: Tensor
    linear: Tensor
    bias: Tensor
    constant: Tensor

    def log_joint(self, states: Tensor) -> Tensor:
        """``log p(v, h)`` of every datum with each state ``(S, m)``, ``(N, S)``."""
        prior = states @ logsigmoid(self.bias) + (1 - states) @ logsigmoid(-self.bias)
        own = 0.5 * ((states @ self.gram) * states).sum(-1)
        return self.constant[:, None] + prior - own + self.linear @ states.T

    def bound(self, means: Tensor) -> Tensor:
        """The evidence lower bound of factorised codes with these means, ``(N,)``, in nats."""
        entropy = -(torch.xlogy(means, means) + torch.xlogy(1 - means, 1 - means)).sum(-1)
        prior = (means * logsigmoid(self.bias) + (1 - means) * logsigmoid(-self.bias)).sum(-1)
        spread = (means * (1 - means)) @ self.gram.diagonal()
        likelihood = (self.linear * means).sum(-1) - 0.5 * (((means @ self.gram) * means).sum(-1) + spread)
        return self.constant + likelihood + prior + entropy

    def in_turn(self, means: Tensor) -> Tensor:
        """One sweep, each mean at its maximum given the others: the bound never falls."""
        means, own = means.clone(), self.gram.diagonal()
        field = self.bias + self.linear - 0.5 * own - means @ self.gram
        for i in range(means.shape[1]):
            new = torch.sigmoid(field[:, i] + own[i] * means[:, i])
            field = torch.addr(field, new - means[:, i], self.gram[i], alpha=-1)
            means[:, i] = new
        return means

    def at_once(self, means: Tensor, damping: float) -> Tensor:
        """All means from the old ones, and a share ``damping`` of the old ones kept: the bound may fall."""
        own = self.gram.diagonal()
        field = self.bias + self.linear - 0.5 * own - (means @ self.gram - means * own)
        return torch.lerp(torch.sigmoid(field), means, damping)


@checked
class BinaryMeanField:
    r"""The factorised posterior of binary codes, by coordinate ascent from several starts.

    .. math:: \hat h_i = \sigma\Big(b_i + v^T \beta W_{:i} - \tfrac12 W_{:i}^T \beta W_{:i}
        - \sum_{j \ne i} W_{:j}^T \beta W_{:i} \hat h_j\Big)

    A Pyro guide for ``coding.model`` without parameters. In turn, the bound never falls; all at once it may, and may
    circle for ever, damped or not: that is there to be compared with.

    Source: Goodfellow, Bengio & Courville (2016), Deep learning, equation 19.44.

    :param coding: the model.
    :param sweeps: the most of them.
    :param restarts: starts uniform at random beside one half everywhere; for each datum the best counts.
    :param update: ``"in turn"`` or ``"at once"``.
    :param damping: share of the old means that is kept, of updates at once.
    :param tol: stop when no mean moves by more; a recorded step takes all sweeps.
    :param network: a module from data to the log odds of the codes, ``(N, m)``, which sweeps start from; trained on
        what they find by :class:`pplvi.RecognitionLoss`. With ``sweeps=0`` it is the posterior.
    :raises ValueError: for numbers outside their ranges, unknown updates, and no sweeps without a network.

    >>> coding = BinarySparseCoding(2, 2, weight=torch.eye(2), bias=torch.zeros(2))
    >>> guide = BinaryMeanField(coding)  # exact, as the columns are orthogonal
    >>> v = torch.tensor([[1.0, 0.2]])
    >>> bool((guide.bound(v) - coding.exact(v)[0]).abs() < 1e-6)
    True
    """

    def __init__(
        self,
        coding: BinarySparseCoding,
        sweeps: Natural = 100,
        *,
        restarts: Natural = 0,
        update: Literal["in turn", "at once"] = "in turn",
        damping: Fraction = 0.0,
        tol: NonNegative = 1e-8,
        network: torch.nn.Module | None = None,
    ) -> None:
        check_counts(int(network is None), sweeps=sweeps)
        if damping and update == "in turn":
            raise ValueError(f"damping={damping!r}: expected update='at once' with it.")
        self.coding, self.sweeps, self.restarts = coding, sweeps, restarts
        self.update, self.damping, self.tol, self.network = update, damping, tol, network

    def _sweep(self, problem: BinaryProblem) -> Callable[[Tensor], Tensor]:
        return problem.in_turn if self.update == "in turn" else lambda means: problem.at_once(means, self.damping)

    @torch.no_grad()
    def trace(self, v: Tensor, start: Tensor | None = None) -> Tensor:
        """The bound of every datum at the start and after each of all sweeps, ``(sweeps + 1, N)``, in nats."""
        problem = self.coding.problem(v)
        sweep, means = self._sweep(problem), self._start(v, problem) if start is None else start
        bounds = [problem.bound(means)]
        for _ in range(self.sweeps):
            means = sweep(means)
            bounds.append(problem.bound(means))
        return torch.stack(bounds)

    @torch.no_grad()
    def means(self, v: Tensor, start: Tensor | None = None) -> Tensor:
        """Means of the codes, ``(N, m)``.

        :param v: data, ``(N, n)``.
        :param start: means to start from, in place of one half or of what the network says.
        """
        problem = self.coding.problem(v)
        best = self._ascend(problem, self._start(v, problem) if start is None else start)
        for _ in range(self.restarts):
            other = self._ascend(problem, torch.rand_like(problem.linear))
            best = torch.where((problem.bound(other) > problem.bound(best)).unsqueeze(-1), other, best)
        return best

    def _start(self, v: Tensor, problem: BinaryProblem) -> Tensor:
        return torch.full_like(problem.linear, 0.5) if self.network is None else torch.sigmoid(self.guess(v))

    def guess(self, v: Tensor) -> Tensor:
        """The network's log odds, ``(N, m)``, with their gradient.

        :raises ValueError: without a network, or if it gives another shape.
        """
        if self.network is None:
            raise ValueError("this mean field has no network: expected BinaryMeanField(coding, network=...).")
        claim_name(self.coding)
        pyro.module(f"{self.coding._pyro_name}_recognition", self.network)
        logits: Tensor = self.network(v)
        if tuple(logits.shape) != (len(v), self.coding.num_codes):
            raise ValueError(
                f"the network gave {tuple(logits.shape)}: expected log odds {(len(v), self.coding.num_codes)}."
            )
        return logits

    def divergence(self, v: Tensor, *, size: int | None = None) -> Tensor:
        """``KL(q || q_network)`` of the mean field to the network's guess, ``(N,)``, in nats, with its gradient."""
        logits, means = self.guess(v), self.means(v)
        entropy = -(torch.xlogy(means, means) + torch.xlogy(1 - means, 1 - means)).sum(-1)
        return -(means * logsigmoid(logits) + (1 - means) * logsigmoid(-logits)).sum(-1) - entropy

    def _ascend(self, problem: BinaryProblem, means: Tensor) -> Tensor:
        sweep = self._sweep(problem)
        for _ in range(self.sweeps):
            old, means = means, sweep(means)
            if not is_recording() and bool((means - old).abs().max() <= self.tol):
                break
        return means

    @torch.no_grad()
    def bound(self, v: Tensor, means: Tensor | None = None) -> Tensor:
        """The evidence lower bound, ``(N,)``, in nats: of these means, or of those that are found."""
        return self.coding.problem(v).bound(self.means(v) if means is None else means)

    def moments(self, v: Tensor, means: Tensor | None = None) -> Moments:
        """Moments of the factorised posterior."""
        means = self.means(v) if means is None else means
        return Moments(means, means.T @ means + torch.diag((means * (1 - means)).sum(0)))

    def __call__(self, v: Tensor, *, size: int | None = None) -> None:
        """Sample the codes in plate ``"data"``; arguments are those of the model."""
        means = self.means(v)
        with data_plate(len(v), size):
            pyro.sample("h", dist.Bernoulli(means).to_event(1))


@checked
def learn_binary_coding(
    coding: BinarySparseCoding, v: Matrix, posterior: BinaryMeanField | Literal["exact"], num_steps: Count = 100
) -> Tensor:
    """EM with an exact or a factorised posterior of the codes, in place; parameters are maximised in closed form.

    Exact EM never lets the evidence fall, and mean-field EM, which starts from the means of the step before, never the
    bound: it pulls the model towards posteriors that factorise.

    Source: Neal & Hinton (1998), "A view of the EM algorithm that justifies incremental, sparse, and other variants".

    :param coding: the model.
    :param v: data, ``(N, n)``.
    :param posterior: ``"exact"``, or a mean field of this model.
    :param num_steps: EM steps.
    :returns: mean log evidence, or mean bound, in nats for each datum, before each step and at the end,
        ``(num_steps + 1,)``.
    :raises ValueError: for a mean field of another model.

    >>> pyro.set_rng_seed(0)
    >>> coding = BinarySparseCoding(6, 3)
    >>> v = coding.model(size=200).detach()
    >>> coding = BinarySparseCoding(6, 3)
    >>> trace = learn_binary_coding(coding, v, BinaryMeanField(coding), num_steps=20)
    >>> bool((trace.diff() > -1e-5).all())
    True
    """
    if posterior != "exact" and posterior.coding is not coding:
        raise ValueError("the mean field is one of another model: expected BinaryMeanField(coding).")
    trace: list[Tensor] = []
    means: Tensor | None = None
    for step in range(num_steps + 1):
        if posterior == "exact":
            value, moments = coding.exact(v)[0], coding.exact_moments(v)
        else:
            means = posterior.means(v, means)
            value, moments = posterior.bound(v, means), posterior.moments(v, means)
        trace.append(value.mean())
        if step < num_steps:
            coding.maximise(v, moments)
    return torch.stack(trace)
