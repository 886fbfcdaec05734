"""The unconstrained log density of a Pyro model as a plain function, for guides that optimise or explore it directly.

.. math:: \\ell(u) = \\log p(x, T(u)) + \\log |\\partial T / \\partial u|

``T`` is Pyro's ``biject_to`` at every continuous latent, ``u`` all of them packed into one vector in the order of
``AutoContinuous``. Rows of ``u`` go through the model in one run, under the particle plate.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.distributions.util import sum_rightmost
from pyro.poutine import runtime
from pyro.poutine.messenger import Messenger
from torch import Tensor
from torch.distributions import AffineTransform, ComposeTransform, Transform, biject_to, constraints
from torch.linalg import LinAlgError  # type: ignore[attr-defined]

from pplvi.programs import checks
from pplvi.programs.carrying import LOOP, Way, for_each, ways_of_rows
from pplvi.programs.factorising import SeparateFactors
from pplvi.programs.running import plain_run
from pplvi.programs.sites import PARTICLES, Site, base_distribution, latent_sites, site_plates
from pplvi.programs.state import preserved_rng, random_state
from pplvi.programs.summing import is_summed
from pplvi.programs.traces import Run
from pplvi.programs.ways import Vectorize, named
from pplvi.programs.work import Work
from pplvi.types import Program

CHUNK = 1_000  # rows that go through the model in one call, at most
_VALUES = 8  # times as many without a gradient, for which nothing is kept
_WIDEST = 4 * 2**20  # bytes of the largest tensor of a call: what is larger waits for memory
_FEWEST = 16  # rows that go through together, however large
_CHECKED = 8  # rows that a way of running them is tried with, and one


@dataclass(frozen=True)
class _Block:
    """Where one site lies in the packed vector."""

    name: str
    transform: Transform
    batch: tuple[int, ...]
    event: tuple[int, ...]
    units: tuple[Tensor, Tensor] | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        return (*self.batch, *self.event)

    @property
    def size(self) -> int:
        return torch.Size(self.shape).numel()

    def unconstrain(self, values: Tensor) -> Tensor:
        """Rows ``(S, size)`` of values ``(S, *plates, *event)``."""
        shape = self.transform.forward_shape(self.shape)
        return self.transform.inv(values.reshape(len(values), *shape)).reshape(len(values), -1)

    def constrain(self, u: Tensor, nesting: int | None) -> tuple[Tensor, Tensor]:
        """Values ``(S, *plates, *event)`` and log Jacobians ``(S,)`` of rows; ``nesting=None`` is one row, plain."""
        padding = () if nesting is None else (len(u), *(1,) * (nesting - len(self.batch)))
        unconstrained = u.reshape((*padding, *self.shape))
        value = self.transform(unconstrained)
        jacobian = self.transform.log_abs_det_jacobian(unconstrained, value)
        return value, sum_rightmost(jacobian, jacobian.dim() - (nesting is not None))


class _Values(Messenger):
    """Give latent sites these values."""

    def __init__(self, values: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.values = values

    def _pyro_sample(self, msg: Any) -> None:
        if not msg["is_observed"] and msg["name"] in self.values:
            msg["value"], msg["done"] = self.values[msg["name"]], True


class UnconstrainedDensity:
    r"""``log p(x, T(u)) + log |dT/du|`` of a model at fixed arguments, in nats.

    Enumerated sites are summed out. Validation is off inside: a value out of range is a density of ``-inf`` or NaN and
    no error, so that a line search can go back.

    :param model: a Pyro model; its latent sites are continuous, or enumerated in parallel.
    :param args: positional arguments of the model.
    :param kwargs: its keyword arguments.
    :param prototype: a model with the same sites that runs without values, such as the model with an ``InitMessenger``;
        the model itself unless given.
    :param vectorize: the way of running rows, ``"broadcast"``, ``"vmap"`` or ``"loop"`` (``False``); the fastest that
        is right for the programs unless named.
    :param in_units: count sites whose priors have very large or very small scales in units of these (:attr:`units`), so
        that a search meets no scales but ordinary ones.
    :raises ValueError: for subsampled plates, a model without continuous latents, and a density that is not a function
        of ``u`` alone.

    >>> import pyro.distributions as dist
    >>> density = UnconstrainedDensity(lambda: pyro.sample("x", dist.Exponential(1.0)))
    >>> density(torch.zeros(3, 1))  # x = exp(0): log p = -1, log Jacobian 0
    tensor([-1., -1., -1.])
    >>> density.unpack(torch.zeros(2, 1))["x"]
    tensor([1., 1.])
    """

    def __init__(
        self,
        model: Program,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
        *,
        prototype: Callable[..., Any] | None = None,
        vectorize: Vectorize = None,
        in_units: bool = False,
    ) -> None:
        self.model, self.args, self.kwargs = model, args, dict(kwargs or {})
        self._ways = ways_of_rows(named(vectorize))
        self.way = self._ways[0]
        self.plain = plain_run(prototype or model, self.args, self.kwargs)
        _refuse_subsampling(self.plain)
        sites = {n: s for n, s in latent_sites(self.plain.model).items() if not is_summed(s)}
        if not sites:
            raise ValueError("the model has no continuous latent site: expected at least one pyro.sample without obs=.")
        units = _units(model, self.args, self.kwargs) if in_units else {}
        self.blocks = [_block(name, site, units.get(name)) for name, site in sites.items()]
        self.dim = sum(block.size for block in self.blocks)
        self.rows, self.gradients, self.rows_at_once, self.values_at_once = 0, 0, CHUNK, CHUNK
        first = next(iter(sites.values()))["value"]
        self.dtype, self.device = first.dtype, first.device
        self._check_function()

    @property
    def units(self) -> tuple[Tensor, Tensor]:
        """Where zero lies and what one is in each coordinate, ``(dim,)``: 0 and 1 unless they are counted in units."""
        plain = torch.zeros(()), torch.ones(())
        zero, one = (
            torch.cat([(b.units or plain)[which].double().expand(b.shape).reshape(-1) for b in self.blocks])
            for which in range(2)
        )
        return zero.to(self.device), one.to(self.device)

    @property
    def start(self) -> Tensor:
        """The packed vector ``(dim,)`` of the prototype's values."""
        return self.pack({b.name: self.plain.model.nodes[b.name]["value"] for b in self.blocks}).detach()

    def __call__(self, u: Tensor) -> Tensor:
        """Log densities ``(S,)`` of rows ``(S, dim)`` of any floating type; differentiable where autograd is on."""
        u = u.to(self.device, self.dtype)  # the model may hold constants of its own type
        most = self.rows_at_once if torch.is_grad_enabled() else self.values_at_once
        return torch.cat([self._chunk(part) for part in u.split(1 if self.way == LOOP else most)])

    def log_jacobian(self, u: Tensor) -> Tensor:
        """``log |dT/du|`` at rows ``(S, dim)``, ``(S,)``: the density less that of the constrained values, in nats."""
        return sum((b.constrain(part, len(b.batch))[1] for b, part in self._parts(u)), u.new_zeros(len(u)))

    def value_and_gradient(self, u: Tensor) -> tuple[Tensor, Tensor]:
        """Log densities ``(S,)`` and their gradients ``(S, dim)``, detached and in float64."""
        self.gradients += len(u)
        parts = u.detach().to(self.device, self.dtype).split(self.rows_at_once)
        values, gradients = zip(*map(self._with_gradient, parts), strict=True)
        return torch.cat(values).double(), torch.cat(gradients).double()

    @torch.enable_grad()
    def _with_gradient(self, leaf: Tensor) -> tuple[Tensor, Tensor]:
        leaf = leaf.requires_grad_()
        value = self(leaf) + 0.0 * leaf.sum(1)  # a flat density has no graph of its own
        (gradient,) = torch.autograd.grad(value.sum(), leaf, materialize_grads=True)
        return value.detach(), gradient

    def descent(self, u: Tensor) -> tuple[Tensor, Tensor]:
        """As :meth:`value_and_gradient` of *minus* the log density, for minimisers."""
        value, gradient = self.value_and_gradient(u)
        return -value, -gradient

    def hessian(self, u: Tensor) -> Tensor | None:
        """Hessian ``(dim, dim)`` at ``u``, of shape ``(dim,)``, in float64, from one run over ``dim`` rows; ``None``
        where the model has no second derivatives."""
        found = self.hessians(u[None])
        return None if found is None else found[0]

    def hessians(self, u: Tensor) -> Tensor | None:
        """Hessians ``(S, dim, dim)`` at rows ``(S, dim)``, as :meth:`hessian`."""
        self.gradients += u.numel()
        with torch.enable_grad():
            leaf = u.detach().to(self.device, self.dtype).repeat_interleave(self.dim, 0).requires_grad_()
            try:
                (gradient,) = torch.autograd.grad(self(leaf).sum(), leaf, create_graph=True)
                diagonals = gradient.reshape(len(u), self.dim, self.dim).diagonal(dim1=-2, dim2=-1)
                (rows,) = torch.autograd.grad(diagonals.sum(), leaf, materialize_grads=True)
            except RuntimeError:  # some operations of torch are differentiable only once
                return None
        found = rows.reshape(len(u), self.dim, self.dim).double()
        return 0.5 * (found + found.mT)

    def unpack(self, u: Tensor) -> dict[str, Tensor]:
        """Constrained values of the sites, each ``(S, *shape of the site)``, at rows ``(S, dim)``."""
        return {b.name: b.constrain(part, len(b.batch))[0] for b, part in self._parts(u)}

    def pack(self, values: Mapping[str, Tensor]) -> Tensor:
        """The packed vector ``(dim,)`` of constrained values, each of the shape of its site."""
        parts = [b.transform.inv(values[b.name]).reshape(-1) for b in self.blocks]
        return torch.cat(parts).to(self.device, self.dtype)

    def pack_rows(self, values: Mapping[str, Tensor]) -> Tensor:
        """Packed vectors ``(S, dim)`` of constrained values, each ``(S, *shape of the site)``, as draws have them."""
        parts = [b.unconstrain(values[b.name]) for b in self.blocks]
        return torch.cat(parts, 1).to(self.device, self.dtype)

    def largest(self, u: Tensor) -> str:
        """Name of the site with the largest entry of ``u``, of shape ``(dim,)``."""
        return max(self._parts(u), key=lambda pair: float(pair[1].abs().max()))[0].name

    def bad_site(self, u: Tensor) -> str | None:
        """Name of the first site whose value or log density is not finite at ``u``, of shape ``(dim,)``."""
        with pyro.validation_enabled(False), torch.no_grad():
            return checks.bad_site_of(self._run(u[None].to(self.device, self.dtype))[0])

    # ------------------------------------------------------------------ parts

    def _parts(self, u: Tensor) -> Iterator[tuple[_Block, Tensor]]:
        return zip(self.blocks, u.split([b.size for b in self.blocks], -1), strict=True)

    def _run(self, u: Tensor) -> tuple[Run, Tensor]:
        nesting = None if len(u) == 1 else self.plain.nesting
        found = {b.name: b.constrain(part, nesting) for b, part in self._parts(u)}
        values = {name: value for name, (value, _) in found.items()}
        run = self._run_at(values, len(u))
        return run, sum((jacobian for _, jacobian in found.values()), u.new_zeros(len(u)))

    def _run_at(self, values: Mapping[str, Tensor], num_rows: int) -> Run:
        nesting, enumerated = self.plain.nesting, checks.enumerates(self.plain)
        with ExitStack() as stack:
            trace = stack.enter_context(poutine.trace())
            stack.enter_context(_Values(values))
            if enumerated:
                stack.enter_context(poutine.enum(first_available_dim=-nesting - (1 if num_rows == 1 else 2)))
            if num_rows > 1:
                stack.enter_context(pyro.plate(PARTICLES, num_rows, dim=-nesting - 1))
            self.model(*self.args, **self.kwargs)
        return Run(poutine.Trace(), trace.trace, num_rows, nesting, enumerated)

    def _chunk(self, u: Tensor) -> Tensor:
        self.rows += len(u)
        if len(u) > 1 and not self.way.model:
            return for_each(self._row, u, written=self.way.written)
        try:
            with pyro.validation_enabled(False):
                run, jacobian = self._run(u)
                target = run.log_target().reshape(len(u), -1).sum(1)
                return target + jacobian
        except LinAlgError:  # a factorisation inside the model failed, in one row or in all
            if len(u) == 1:
                return u.sum(1) * torch.nan
            return torch.cat([self._chunk(row) for row in u.split(1)])

    def _row(self, u: Tensor) -> Tensor:
        run, jacobian = self._run(u[None])
        return run.log_target().sum() + jacobian.squeeze(0)

    @torch.no_grad()
    def _check_function(self) -> None:
        with preserved_rng():
            with Work() as work:
                alone = torch.cat([self(self.start[None]) for _ in range(3)])
            if bool(alone.isfinite().all()) and not _agree(alone):
                raise ValueError(
                    "the log density of the model is not a function of its latent sites: runs at the same values gave "
                    f"{alone.min():.6g} and {alone.max():.6g}. Expected every random site to be seen: do not hide "
                    "sites with poutine.block (enumerate discrete ones: pyro.infer.config_enumerate(model)), and draw "
                    "no random numbers outside of pyro.sample."
                )
            self.way = self._first_right(work.widest)

    def _first_right(self, alone: int) -> Way:
        """The first way in which rows have the density that one has alone, which makes a tensor of so many bytes."""
        errors: list[str] = []
        for way in self._ways:
            self.way = way
            with Work() as work:
                if way == LOOP or (error := self._failure()) is None:
                    each = max(1, (work.widest - alone) // _CHECKED)
                    most = max(_FEWEST, _WIDEST // each)
                    self.rows_at_once, self.values_at_once = min(CHUNK, most), min(_VALUES * CHUNK, most)
                    return way
            errors.append(error)
        raise ValueError(f"vectorize={self._ways[0].word!r}: the model cannot be run that way: {errors[0]}")

    def _failure(self) -> str | None:
        rows = self.start + 0.1 * torch.linspace(-1.0, 1.0, _CHECKED, dtype=self.dtype)[:, None]
        rows = torch.cat([rows.to(self.device), self.start[None]])
        try:
            with SeparateFactors(len(rows), active=self.way.model and len(self._ways) > 1):
                together = self(rows)
            each = torch.cat([self._chunk(row) for row in rows[[0, -1]].split(1)])
        except Exception as error:  # the model's own errors were met alone
            return str(error)
        return None if _agree(torch.stack([together[[0, -1]], each])) else "rows differ from what each is alone."


def _agree(found: Tensor) -> bool:
    size = found.abs().nan_to_num(0.0, 0.0, 0.0).max().clamp(min=1.0)
    return torch.allclose(found, found[:1], rtol=1e-3, atol=1e-3 * float(size), equal_nan=True)


def _units(model: Program, args: Any, kwargs: Any) -> dict[str, tuple[Tensor, Tensor]]:
    """Zero and one, in unconstrained space, of the sites whose priors have scales far from 1, given a draw of all that
    is above them: real numbers are counted in that scale, positive ones, by their logarithms, from it on."""
    try:
        with random_state(0):
            sites = latent_sites(plain_run(model, args, kwargs).model)
    except Exception:  # a prior that cannot be drawn from is met again where its posterior is
        return {}
    found = {}
    for name, site in sites.items():
        scale = _spread(fn := base_distribution(site["fn"]))
        if scale is None or bool(((scale > 1e-3) & (scale < 1e3)).all()):
            continue
        power = torch.log2(scale).round()
        if getattr(fn.support, "base_constraint", fn.support) is constraints.real:
            found[name] = torch.zeros_like(scale), torch.exp2(power)
        elif fn.support in (constraints.positive, constraints.nonnegative):
            found[name] = power * math.log(2.0), torch.ones_like(scale)
    return found


def _spread(fn: Any) -> Tensor | None:
    """Standard deviation of a distribution, or its scale if it has none."""
    for name in ("stddev", "scale"):
        with suppress(NotImplementedError, AttributeError):
            scale = getattr(fn, name)
            if isinstance(scale, Tensor) and bool((scale.isfinite() & (scale > 0)).all()):
                return scale.detach()
    return None


def _block(name: str, site: Site, units: tuple[Tensor, Tensor] | None) -> _Block:
    try:
        transform = biject_to(site["fn"].support)
    except NotImplementedError as error:
        raise ValueError(
            f"site {name!r} has no density to climb, its values are discrete: expected continuous or enumerated sites "
            "(pyro.infer.config_enumerate)."
        ) from error
    if units is not None:
        transform = ComposeTransform([AffineTransform(*units), transform])
    batch = tuple(site["fn"].batch_shape)
    unconstrained = transform.inv(site["value"])
    return _Block(name, transform, batch, tuple(unconstrained.shape[len(batch) :]), units)


def _refuse_subsampling(run: Run) -> None:
    plates = {p for site in run.model.nodes.values() if site["type"] == "sample" for p in site_plates(site)}
    if names := sorted({p.name for p in plates if p.scale != 1}):
        raise ValueError(
            f"the plates {names} are subsampled, so that the log density changes with every minibatch; expected the "
            "full data. Run without subsample_size, with all data as arguments; train on minibatches afterwards."
        )


@contextmanager
def outside_of_handlers() -> Iterator[None]:
    """Run programs as if no trace, plate or other handler were around, whoever calls."""
    stack, dims = runtime._PYRO_STACK, runtime._DIM_ALLOCATOR._stack
    before = stack[:], dims[:]
    stack.clear()
    dims.clear()
    try:
        yield
    finally:
        stack[:], dims[:] = before
