"""MAP of sparse codes: a guide at the minimum of a lasso problem that is read off the program."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, Self

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from torch import Tensor

from pplvi.guides.owned import OwnedGuide
from pplvi.guides.search.base import Search
from pplvi.guides.search.lasso import Lasso, LassoMethod, solve
from pplvi.kinds.checked import checked
from pplvi.kinds.kinds import Count, Positive
from pplvi.programs.calls import Arguments
from pplvi.programs.handlers import parameters_of
from pplvi.programs.running import plain_run
from pplvi.programs.single import run_alone
from pplvi.programs.sites import base_distribution, is_deterministic, latent_sites, sample_sites, site_plates
from pplvi.programs.state import buffers_of, is_recording, map_tree, preserved_rng
from pplvi.programs.traces import Run
from pplvi.types import Program

__all__ = ["AutoProximal"]

_MOST = 2**26  # entries of all Gram matrices


@checked
class AutoProximal(OwnedGuide, Search):
    r"""The posterior mode of sparse codes, by proximal gradient steps or coordinate descent, with its duality gap.

    .. math:: \hat h = \arg\min_h \big\{ -\log p(v \mid h) + \sum_j |h_j - m_j| / b_j \big\}, \qquad
        P(\hat h) - \min_h P(h) \le \text{gap}

    for a site with a Laplace prior of location ``m`` and scale ``b`` on which the rest of the program depends through a
    concave quadratic log density: Gaussian observations of anything linear, ``h @ dictionary.T``, ``X @ h``, masked or
    scaled. That is read off the program as it is: two gradients and a curvature. Plates whose elements do not interact
    are as many problems, solved together; others are one.

    The guide is a point for the data that it is called with, found at every call at the present parameters of the
    model, so that training these by ``fit`` or ``SVI`` is dictionary learning by gradient. A point has no density: the
    fit has a mode and no evidence, and its report says so. Steps are not compiled, as a search ends when it is done.

    After a call: ``gap``, in nats, of the shape of the site's plates, and ``iterations``.

    Source: Olshausen & Field (1996), sparse coding; Beck & Teboulle (2009), FISTA; O'Donoghue & Candès (2015), its
    restart; Goodfellow, Bengio & Courville (2016), Deep learning, section 19.3.

    :param model: a Pyro model whose only latent site is the one of the codes.
    :param sites: its name.
    :param method: ``"fista"``, with restarts of its momentum; ``"ista"``, without momentum; ``"coordinate"``.
    :param tol: the largest duality gap of one problem, in nats.
    :param max_iterations: steps, or sweeps, after which a warning names the gap that is left.
    :raises ValueError: for an unknown method; on the first call for another prior, other latents, subsampled plates,
        and a log density that is not quadratic in the codes.

    >>> import pplvi
    >>> def model(v, dictionary):
    ...     with pyro.plate("data", len(v)):
    ...         h = pyro.sample("h", dist.Laplace(0.0, 1.0).expand([2]).to_event(1))
    ...         pyro.sample("v", dist.Normal(h @ dictionary.T, 1.0).to_event(1), obs=v)
    >>> v = torch.tensor([[3.0, 0.5], [-2.0, 4.0]])
    >>> guide = AutoProximal(model, sites="h")
    >>> guide(v, torch.eye(2))["h"]
    tensor([[ 2.,  0.], [-1.,  3.]])
    >>> guide.gap.shape, bool(guide.gap.max() < 1e-5)
    (torch.Size([2]), True)
    """

    score_draws = 1
    takes_minibatches = True

    def __init__(
        self,
        model: Program,
        sites: str,
        method: LassoMethod = "fista",
        *,
        tol: Positive = 1e-6,
        max_iterations: Count = 10_000,
    ) -> None:
        super().__init__(model)
        self._site, self._method, self._tol, self._most = sites, method, float(tol), max_iterations
        self._found: tuple[Any, Tensor] | None = None
        self.gap, self.iterations = torch.zeros(()), 0

    # ------------------------------------------------------------------ the search

    def run(self, *args: Any, **kwargs: Any) -> Self:
        """Find the codes for these arguments of the model.

        :returns: the guide itself.
        :raises ValueError: see the class.
        """
        with preserved_rng(), poutine.block():
            self._solve(args, kwargs, _parameters(self.model, args, kwargs))
        return self

    def _solve(self, args: tuple[Any, ...], kwargs: Mapping[str, Any], leaves: Mapping[str, Tensor]) -> Tensor:
        with _held(leaves.values()):
            problem = LassoReading(self.model, self._site, args, kwargs)
        self.prototype_trace = problem.plain.model
        start = None if self._found is None else problem.rows_of(self._found[1])
        found = solve(problem.lasso, self._method, start, tol=self._tol, max_iterations=self._most)
        self.gap, self.iterations = found.gap.reshape(problem.gap_shape), found.iterations
        if found.iterations == self._most and bool(found.gap.max() > 10 * self._tol):
            warnings.warn(
                f"{self._method} took all {self._most} steps and has a duality gap of up to {found.gap.max():.2g} nats "
                f"left, not {self._tol:g}: raise max_iterations=, or use method='fista'.",
                stacklevel=3,
            )
        codes = problem.codes_of(found.codes)
        if self._found is None:  # parameters were made by the first reading
            leaves = _parameters(self.model, args, kwargs)
        self._found = (_state(self.model, args, kwargs, leaves), codes)
        return codes

    def codes(self, *args: Any, **kwargs: Any) -> Tensor:
        """The mode for these arguments, of the shape of the site; what was found last, if nothing has changed since."""
        if is_recording():
            raise ValueError(
                "AutoProximal ends its search when it is done, which a recorded step cannot: expected compile=False."
            )
        with preserved_rng(), poutine.block():
            leaves = _parameters(self.model, args, kwargs)
            if self._found is not None and _same(self._found[0], _state(self.model, args, kwargs, leaves)):
                return self._found[1]
            return self._solve(args, kwargs, leaves)

    # ------------------------------------------------------------------ as a guide

    def forward(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """Put the site at its mode; same arguments as the model."""
        codes = self.codes(*args, **kwargs)
        site = self.prototype_trace.nodes[self._site]  # type: ignore[union-attr]
        with ExitStack() as stack:
            for plate in site_plates(site):
                stack.enter_context(pyro.plate(plate.name, plate.size, dim=plate.dim))
            value = pyro.sample(self._site, dist.Delta(codes, event_dim=site["fn"].event_dim))
        return {self._site: value}

    def quantiles(self, quantiles: Sequence[float] | Tensor, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """The mode at every probability: all of its mass is there."""
        codes = self.codes(*args, **kwargs)
        return {self._site: codes.expand(len(quantiles), *codes.shape)}

    def __deepcopy__(self, memo: dict[int, Any]) -> OwnedGuide:
        found, self._found = self._found, None
        try:
            return super().__deepcopy__(memo)
        finally:
            self._found = found

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_found": None, "prototype_trace": None}


def _parameters(model: Program, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Tensor]:
    return parameters_of(lambda: plain_run(model, args, kwargs))


def _state(
    model: Program, args: tuple[Any, ...], kwargs: Mapping[str, Any], leaves: Mapping[str, Tensor]
) -> list[tuple[Any, int]]:
    """The tensors that codes depend on, with the number of times that they were written."""
    found: list[tuple[Any, int]] = []

    def note(x: Tensor) -> Tensor:
        found.append((x, x._version))
        return x

    map_tree(note, (args, dict(kwargs), buffers_of(model=model), dict(leaves)))
    return [(Arguments.of(args, kwargs).key, 0), *found]


def _same(one: list[tuple[Any, int]], other: list[tuple[Any, int]]) -> bool:
    return len(one) == len(other) and all(map(_is_same, one, other))


def _is_same(one: tuple[Any, int], other: tuple[Any, int]) -> bool:
    (x, version), (y, again) = one, other
    return version == again and (x is y if isinstance(x, Tensor) else bool(x == y))


class LassoReading:
    """The lasso problem behind a site of a program.

    :param model: the program.
    :param name: the site.
    :ivar plain: a run of the program.
    :ivar lasso: the problem, in coordinates around the prior's location.
    :raises ValueError: where there is none.
    """

    def __init__(self, model: Program, name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        self.model, self.name, self.call = model, name, (args, kwargs)
        self.plain = plain_run(model, args, kwargs)
        self._check()
        site = self.plain.model.nodes[name]
        prior = base_distribution(site["fn"])
        shape = site["value"].shape
        self.batch, self.event = tuple(shape[: len(shape) - site["fn"].event_dim]), site["fn"].event_shape
        with torch.no_grad():
            fresh = self._at(site["value"].detach())[0].model.nodes[name]
            prior = base_distribution(fresh["fn"])
            self.loc = prior.loc.detach().expand(shape).clone()
            self.penalty = (torch.as_tensor(fresh["scale"]) / prior.scale.detach()).expand(shape)
        self.gap_shape = self.batch
        self.lasso = self._read()

    def _check(self) -> None:
        latents = latent_sites(self.plain.model)
        if set(latents) != {self.name}:
            raise ValueError(
                f"the model has the latent sites {sorted(latents)}: expected {self.name!r} alone. Make the others "
                "pyro.param, condition on them, or name the site of the codes by sites=."
            )
        site = latents[self.name]
        if (kind := type(base_distribution(site["fn"])).__name__) != "Laplace":
            raise ValueError(f"site {self.name!r} has a {kind} prior: expected Laplace, whose mode is sparse.")
        if cut := [p.name for p in site_plates(site) if p.size != p.full_size]:
            raise ValueError(f"plates {cut} are subsampled: expected whole plates, or minibatches as arguments.")

    # ------------------------------------------------------------------ between sites and rows

    def rows_of(self, codes: Tensor) -> Tensor | None:
        """Codes as rows, where they are of the same shape."""
        return (codes - self.loc).reshape(self.lasso.linear.shape) if codes.shape == self.loc.shape else None

    def codes_of(self, rows: Tensor) -> Tensor:
        """The inverse of :meth:`rows_of`."""
        return self.loc + rows.reshape(self.loc.shape)

    # ------------------------------------------------------------------ reading

    def _at(self, codes: Tensor) -> tuple[Run, Tensor]:
        args, kwargs = self.call
        run = run_alone(
            self.model, args, kwargs, num_particles=1, nesting=self.plain.nesting, values={self.name: codes}
        )
        rest = [(n, s) for n, s in sample_sites(run.model) if n != self.name and not is_deterministic(s)]
        return run, sum((run.site_log_prob(n, s).sum() for n, s in rest), codes.new_zeros(()))

    @torch.enable_grad()
    def _slope(self, shift: Tensor) -> tuple[Tensor, Tensor]:
        """Minus the gradient of the rest's negative log density, at the location moved by ``shift``, and the leaf."""
        leaf = shift.detach().clone().requires_grad_()
        total = self._at(self.loc + leaf)[1]
        if not total.requires_grad:
            raise ValueError(f"no other site depends on {self.name!r}: expected observations of the codes.")
        (slope,) = torch.autograd.grad(total, leaf, create_graph=True)
        return slope, leaf

    def _read(self) -> Lasso:
        slope, leaf = self._slope(torch.zeros_like(self.loc))
        with preserved_rng():
            elsewhere = torch.randn(leaf.shape, dtype=leaf.dtype, device=leaf.device)
        there = self._slope(elsewhere)[0].detach()
        for rows in (math.prod(self.batch), 1):
            for shared in (True, False):
                found = self._candidate(slope, leaf, rows, shared)
                if found is not None and self._fits(found, elsewhere, there):
                    self.gap_shape = self.batch if rows == math.prod(self.batch) else ()
                    return found
        raise ValueError(
            f"the log density of the rest is not a concave quadratic in site {self.name!r}: expected Gaussian "
            "observations of something linear in it. Use AutoDelta, or a guide with a density."
        )

    def _candidate(self, slope: Tensor, leaf: Tensor, rows: int, shared: bool) -> Lasso | None:
        """The problem, if rows do not interact and (``shared``) have one curvature."""
        width = leaf.numel() // rows
        if (width**2 if shared else rows * width**2) > _MOST:
            return None
        gram = self._shared(slope, leaf, rows, width) if shared else self._own(slope, leaf, rows, width)
        linear, penalty = slope.detach().reshape(rows, width), self.penalty.reshape(rows, width)
        same = bool((penalty == penalty[:1]).all())
        return Lasso((gram + gram.mT) / 2, linear, penalty[0] if same else penalty)

    def _shared(self, slope: Tensor, leaf: Tensor, rows: int, width: int) -> Tensor:
        """A column of the matrix from each row, as many backward passes as it takes to have them all."""
        gram, first = slope.new_zeros(width, width), 0
        while first < width:
            columns = torch.arange(first, first + rows, device=leaf.device) % width
            directions = torch.nn.functional.one_hot(columns, width).to(slope)
            gram[columns] = self._curvature(slope, leaf, directions)
            first += rows
        return gram

    def _own(self, slope: Tensor, leaf: Tensor, rows: int, width: int) -> Tensor:
        eye = torch.eye(width).to(slope)
        return torch.stack([self._curvature(slope, leaf, e.expand(rows, width)) for e in eye], -2)

    def _curvature(self, slope: Tensor, leaf: Tensor, directions: Tensor) -> Tensor:
        if not slope.requires_grad:
            return torch.zeros_like(directions)
        found = torch.autograd.grad(
            slope, leaf, directions.reshape(leaf.shape), retain_graph=True, materialize_grads=True
        )
        return -found[0].reshape(directions.shape)

    def _fits(self, problem: Lasso, elsewhere: Tensor, there: Tensor) -> bool:
        rows = elsewhere.reshape(problem.linear.shape)
        gap = problem.linear - problem.product(rows) - there.reshape(rows.shape)
        close = (1e-8 if gap.dtype == torch.float64 else 1e-3) * (1 + float(there.abs().max()))
        values = torch.linalg.eigvalsh(problem.gram)
        concave = bool((values[..., 0] >= -close * (1 + values[..., -1])).all() & (values[..., -1] > 0).all())
        return concave and bool((gap.abs() <= close).all())


@contextmanager
def _held(leaves: Iterable[Tensor]) -> Iterator[None]:
    """Hold parameters fixed, so that the derivatives in codes are all that is worked out."""
    leaves = list(leaves)
    for leaf in leaves:
        leaf.requires_grad_(False)
    try:
        yield
    finally:
        for leaf in leaves:
            leaf.requires_grad_(True)
