"""MAP of sparse codes: a guide at the minimum of a lasso problem that is read off the program."""

from __future__ import annotations

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
from pplvi.guides.recording import Recorder
from pplvi.guides.search.base import Search
from pplvi.guides.search.lasso import LassoMethod, solve
from pplvi.guides.search.lasso_reading import LassoReading
from pplvi.kinds.checked import checked
from pplvi.kinds.kinds import Count, Positive
from pplvi.programs.calls import Arguments
from pplvi.programs.handlers import parameters_of
from pplvi.programs.running import plain_run
from pplvi.programs.sites import site_plates
from pplvi.programs.state import buffers_of, is_recording, map_tree, preserved_rng
from pplvi.types import Program

__all__ = ["AutoProximal"]


@checked
class AutoProximal(OwnedGuide, Search):
    r"""The posterior mode of sparse codes, by proximal gradient steps or coordinate descent, with its duality gap.

    .. math:: \hat h = \arg\min_h \big\{ -\log p(v \mid h) + \sum_j |h_j - m_j| / b_j \big\}, \qquad
        P(\hat h) - \min_h P(h) \le \text{gap}

    for sites with Laplace priors of location ``m`` and scale ``b`` on which the rest of the program depends through a
    concave quadratic log density: Gaussian observations of anything linear, ``h @ dictionary.T``, ``X @ h``, masked or
    scaled. That is read off the program as it is: two gradients and a curvature. Plates whose elements do not interact
    are as many problems, solved together, if all sites are in them; others are one.

    The guide is a point for the data that it is called with, found at every call at the present parameters of the
    model, so that training these by ``fit`` or ``SVI`` is dictionary learning by gradient. A point has no density: the
    fit has a mode and no evidence, and its report says so. ``fit(..., compile=)`` of a model without parameters records
    the iterations from one look at the gaps to the next. Dictionary learning is not recorded, on all data or in
    minibatches: every step reads its lasso problem anew, by checks that need its values, and takes as many iterations
    as its data need.

    After a call: ``gap``, in nats, of the shape of the site's plates, and ``iterations``.

    Source: Olshausen & Field (1996), sparse coding; Beck & Teboulle (2009), FISTA; O'Donoghue & Candès (2015), its
    restart; Goodfellow, Bengio & Courville (2016), Deep learning, section 19.3.

    :param model: a Pyro model without other latent sites.
    :param sites: the name of the site of the codes, or the names of several.
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
        sites: str | Sequence[str],
        method: LassoMethod = "fista",
        *,
        tol: Positive = 1e-6,
        max_iterations: Count = 10_000,
    ) -> None:
        super().__init__(model)
        names = (sites,) if isinstance(sites, str) else tuple(sites)
        if not names or len(set(names)) < len(names):
            raise ValueError(f"sites={sites!r}: expected the name of the site of the codes, or different names.")
        self._names, self._method, self._tol, self._most = names, method, float(tol), max_iterations
        self._found: tuple[Any, dict[str, Tensor]] | None = None
        self.gap, self.iterations = torch.zeros(()), 0
        self.recorder: Recorder | None = None

    # ------------------------------------------------------------------ the search

    def run(self, *args: Any, **kwargs: Any) -> Self:
        """Find the codes for these arguments of the model.

        :returns: the guide itself.
        :raises ValueError: see the class.
        """
        with preserved_rng(), poutine.block():
            self._solve(args, kwargs, _parameters(self.model, args, kwargs), self.recorder)
        return self

    def _solve(
        self,
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        leaves: Mapping[str, Tensor],
        recorder: Recorder | None = None,
    ) -> dict[str, Tensor]:
        with _held(leaves.values()):
            problem = LassoReading(self.model, self._names, args, kwargs)
        self.prototype_trace = problem.plain.model
        start = None if self._found is None else problem.rows_of(self._found[1])
        options: dict[str, Any] = {"tol": self._tol, "max_iterations": self._most, "recorder": recorder}
        found = solve(problem.lasso, self._method, start, **options)
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

    def codes(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """The mode for these arguments, by site; what was found last, if nothing has changed since."""
        if is_recording():
            raise ValueError(
                "AutoProximal reads the program anew in every training step, and searches until its gap is closed, "
                "which a recorded step cannot: expected compile=False. Of a model without parameters "
                "fit(..., compile=) records the iterations."
            )
        with preserved_rng(), poutine.block():
            leaves = _parameters(self.model, args, kwargs)
            if self._found is not None and _same(self._found[0], _state(self.model, args, kwargs, leaves)):
                return self._found[1]
            return self._solve(args, kwargs, leaves)

    # ------------------------------------------------------------------ as a guide

    def forward(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """Put the sites at their mode; same arguments as the model."""
        codes = self.codes(*args, **kwargs)
        found = {}
        for name, value in codes.items():
            site = self.prototype_trace.nodes[name]  # type: ignore[union-attr]
            with ExitStack() as stack:
                for plate in site_plates(site):
                    stack.enter_context(pyro.plate(plate.name, plate.size, dim=plate.dim))
                found[name] = pyro.sample(name, dist.Delta(value, event_dim=site["fn"].event_dim))
        return found

    def quantiles(self, quantiles: Sequence[float] | Tensor, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """The mode at every probability: all of its mass is there."""
        codes = self.codes(*args, **kwargs)
        return {name: value.expand(len(quantiles), *value.shape) for name, value in codes.items()}

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
