"""Sparse coding: observations are sums of a few atoms of a dictionary, which is learned in turn with the codes."""

from __future__ import annotations

from typing import Any, Self

import pyro
import pyro.distributions as dist
import torch
from pyro.distributions import constraints
from pyro.nn import PyroModule, PyroParam, pyro_method
from torch import Tensor

from pplvi.guides.owned import claim_name
from pplvi.guides.search.lasso import Lasso, LassoMethod, solve
from pplvi.kinds.checked import checked
from pplvi.kinds.kinds import Count, Floats, Positive
from pplvi.programs.plates import data_plate, full_size

__all__ = ["SparseCoding", "learn_dictionary"]

_TINY = 1e-12


@checked
class SparseCoding(PyroModule):
    r"""Linear sparse coding with a Laplace prior.

    .. math:: h_{nj} \sim \text{Laplace}(0, b), \qquad v_n \mid h_n \sim \mathcal N(W h_n, \sigma^2 I), \qquad
        \lVert W_{:j} \rVert = 1

    In units of :math:`\sigma^2` the negative log joint is the lasso,
    :math:`\tfrac12 \lVert v - W h \rVert^2 + \lambda \lVert h \rVert_1` with :math:`\lambda = \sigma^2 / b`, but for a
    constant. ``model`` is a program for :class:`pplvi.AutoProximal` and every other guide; :func:`learn_dictionary` is
    how dictionaries are learned.

    Source: Olshausen & Field (1996), "Emergence of simple-cell receptive field properties by learning a sparse code for
    natural images"; Goodfellow, Bengio & Courville (2016), Deep learning, section 13.4.

    :param num_visible: numbers in one observation.
    :param num_codes: atoms, columns of the dictionary.
    :param penalty: :math:`\lambda`.
    :param noise: :math:`\sigma`.
    :param dictionary: where it starts, ``(num_visible, num_codes)``, its columns scaled to length one; random unless
        given.
    :param name: prefix of the parameter's name.
    :raises ValueError: for sizes below 1, numbers that are not positive, a dictionary of another shape or with a zero
        column.

    >>> coding = SparseCoding(2, 2, penalty=1.0, dictionary=torch.eye(2))
    >>> v = torch.tensor([[3.0, 0.5]])
    >>> coding.codes(v)
    tensor([[2., 0.]])
    >>> coding.objective(v, coding.codes(v)).detach()  # 1/2 (1 + 0.25) + 2
    tensor([2.6250])
    """

    def __init__(
        self,
        num_visible: Count,
        num_codes: Count,
        *,
        penalty: Positive = 0.1,
        noise: Positive = 1.0,
        dictionary: Floats | None = None,
        name: str = "sparse_coding",
    ) -> None:
        super().__init__(name)
        self.num_visible, self.num_codes = num_visible, num_codes
        self.penalty, self.noise = float(penalty), float(noise)
        start: Any = PyroParam(self._start(dictionary), constraint=constraints.sphere)
        self.atoms: Tensor = start

    def _start(self, dictionary: Tensor | None) -> Tensor:
        shape = (self.num_visible, self.num_codes)
        columns = torch.randn(shape) if dictionary is None else dictionary.detach()
        if tuple(columns.shape) != shape or not bool((columns.norm(dim=0) > 0).all()):
            raise ValueError(f"dictionary of shape {tuple(columns.shape)}: expected {shape} and no column of zeros.")
        return _unit(columns.T)

    @classmethod
    def from_data(cls, v: Tensor, num_codes: int, **options: Any) -> Self:
        """Sparse coding of data of this kind, whose atoms are at first some of the data, drawn at random.

        :param v: data, ``(N, num_visible)``, at least ``num_codes`` of which are not zero.
        :param num_codes: atoms.
        :param options: of the class.
        :raises ValueError: for too few data.
        """
        candidates = _checked(v)[v.norm(dim=1) > 0]
        if len(candidates) < num_codes:
            raise ValueError(f"{len(candidates)} data that are not zero: expected at least num_codes={num_codes}.")
        chosen = candidates[torch.randperm(len(candidates))[:num_codes]]
        return cls(v.shape[1], num_codes, dictionary=chosen.T, **options)

    @property
    def dictionary(self) -> Tensor:
        """``W``, ``(num_visible, num_codes)``, with columns of length one."""
        return self.atoms.T

    # ------------------------------------------------------------------ the program

    @pyro_method
    def model(self, v: Tensor | None = None, *, size: int | None = None) -> Tensor:
        """Codes ``"h"`` and observations ``"v"`` in plate ``"data"``.

        :param v: data, ``(N, num_visible)``; drawn if left out.
        :param size: how many to draw (one), or how many the data given stand for.
        """
        claim_name(self)
        atoms = self.atoms
        with data_plate(full_size(1, size), None) if v is None else data_plate(len(v), size):
            zero = atoms.new_zeros(self.num_codes)
            h = pyro.sample("h", dist.Laplace(zero, self.noise**2 / self.penalty).to_event(1))
            found: Tensor = pyro.sample("v", dist.Normal(h @ atoms, self.noise).to_event(1), obs=v)
        return found

    # ------------------------------------------------------------------ codes

    def lasso(self, v: Tensor) -> Lasso:
        """The problem that the codes of data solve, in units of the noise's variance."""
        atoms = self.atoms.detach()
        return Lasso(atoms @ atoms.T, _checked(v) @ atoms.T, atoms.new_full((self.num_codes,), self.penalty))

    @torch.no_grad()
    def codes(self, v: Tensor, method: LassoMethod = "fista", **options: Any) -> Tensor:
        """The codes with the largest posterior density, ``(N, num_codes)``.

        :param method: ``"fista"``, ``"ista"`` or ``"coordinate"``.
        :param options: ``tol=`` (duality gap) and ``max_iterations=``.
        """
        return solve(self.lasso(v), method, **options).codes

    def objective(self, v: Tensor, h: Tensor) -> Tensor:
        """Half the squared error and the penalty, ``(N,)``: minus the log joint but for a constant, times the noise's
        variance."""
        return 0.5 * (v - h @ self.atoms).square().sum(-1) + self.penalty * h.abs().sum(-1)


def _checked(v: Tensor) -> Tensor:
    if v.dim() != 2 or not v.is_floating_point():
        raise ValueError(f"v of shape {tuple(v.shape)} and {v.dtype}: expected floating point data (N, num_visible).")
    return v


def _unit(rows: Tensor) -> Tensor:
    return rows / rows.norm(dim=-1, keepdim=True)


# ---------------------------------------------------------------------- learning


@checked
@torch.no_grad()
def learn_dictionary(
    coding: SparseCoding,
    v: Tensor,
    *,
    num_steps: Count = 60,
    batch_size: Count | None = None,
    code_steps: Count = 20,
    forget: float = 0.75,
) -> Tensor:
    r"""Learn a dictionary, in place: codes by FISTA, and columns one after another, each at its minimum.

    .. math:: W_{:j} \propto \sum_n h_{nj} \Big(v_n - \sum_{i \ne j} W_{:i} h_{ni}\Big)

    On all data the objective falls at every step. With ``batch_size`` a step takes so many data, drawn anew in each
    epoch, and sums over data are averages in which step ``t`` counts ``(t + 1) ** -forget``. Atoms that no datum uses
    are moved to what is explained worst.

    Source: Olshausen & Field (1996); Mairal, Bach, Ponce & Sapiro (2009), "Online dictionary learning for sparse
    coding".

    :param coding: the model.
    :param v: data, ``(N, num_visible)``.
    :param num_steps: alternations, or minibatches.
    :param batch_size: data of a step; all unless given.
    :param code_steps: iterations of FISTA in a step; from the codes of the step before, where all data are used.
    :param forget: between one half and one.
    :returns: the mean objective of the data of each step, after its codes were found, ``(num_steps,)``.
    :raises ValueError: for numbers outside their ranges, and data of another width.

    >>> pyro.set_rng_seed(0)
    >>> truth = torch.randn(4, 6)
    >>> v = (torch.randn(200, 6) * (torch.rand(200, 6) < 0.2)) @ truth.T
    >>> coding = SparseCoding.from_data(v, 6, penalty=0.1)
    >>> trace = learn_dictionary(coding, v)
    >>> bool(trace[-1] < 0.9 * trace[0])
    True
    """
    if not 0.5 < forget <= 1:
        raise ValueError(f"forget={forget!r}: expected a number above 0.5 and at most 1.")
    if _checked(v).shape[1] != coding.num_visible:
        raise ValueError(f"v of shape {tuple(v.shape)}: expected (N, {coding.num_visible}).")
    atoms, trace = coding.atoms.detach().clone(), []
    codes: Tensor | None = None
    grams: Tensor | None = None
    for step, batch in zip(range(num_steps), _batches(v, batch_size), strict=False):
        codes = _found(coding, batch, codes if batch_size is None else None, code_steps)
        trace.append(coding.objective(batch, codes).mean())
        new = torch.cat([codes.T @ codes, codes.T @ batch], 1) / len(batch)
        rate = 1.0 if batch_size is None or grams is None else (step + 1) ** -forget
        grams = new if grams is None else torch.lerp(grams, new, rate)
        _move(atoms, grams, batch - codes @ atoms)
        coding.atoms = atoms
    return torch.stack(trace)


def _found(coding: SparseCoding, batch: Tensor, start: Tensor | None, steps: int) -> Tensor:
    """Codes after some steps; accelerated ones may rise: rows that have, stay where they were."""
    problem = coding.lasso(batch)
    found = solve(problem, "fista", start, max_iterations=steps).codes
    if start is None:
        return found
    return torch.where((problem.value(found) <= problem.value(start)).unsqueeze(1), found, start)


def _batches(v: Tensor, batch_size: int | None) -> Any:
    while batch_size is None:
        yield v
    while True:
        yield from (v[part] for part in torch.randperm(len(v)).split(batch_size))


def _move(atoms: Tensor, grams: Tensor, residual: Tensor) -> None:
    """One round over the atoms, in place.

    :param grams: averages of ``h h^T`` and ``h v^T`` side by side, ``(K, K + D)``.
    :param residual: of the batch, for atoms that are not used.
    """
    count = len(atoms)
    own, cross = grams[:, :count], grams[:, count:]
    unused = own.diagonal() <= _TINY * own.diagonal().max()
    worst = residual.square().sum(-1).argsort(descending=True).tolist()
    for j in range(count):
        best = cross[j] - own[j] @ atoms + own[j, j] * atoms[j]
        if unused[j]:
            best = residual[worst.pop(0)] if worst else best
        length = best.norm()
        if length > 0:
            atoms[j] = best / length
