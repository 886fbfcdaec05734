"""Training steps traced once and compiled: an unchanged Pyro program without Pyro's handlers at run time.

A step is a pure function of parameters, optimiser state and data: run guide and model, take the objective's gradient,
update. ``make_fx`` records it once as a graph of tensor operations; the parameters, which the programs reach through
the parameter store or as attributes of their modules, are found among the graph's constants by identity and become
slices of one flat vector. The graph is then run as it is (``"trace"``), compiled by inductor (``True``), or compiled with a loop
of many steps inside (``"max"``). Random numbers are drawn anew at every step.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal

import pyro
import torch
from pyro.infer import Trace_ELBO, TraceEnum_ELBO
from pyro.optim import PyroOptim
from torch import Tensor, fx
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from pplvi.elbo import ELBO, Loss
from pplvi.programs import last_site, parameters_of
from pplvi.updates import FlatUpdate, flat_update

Program = Callable[..., Any]
Mode = Literal["trace", "max"] | bool

_BRANCH = "a Python branch on a tensor's value (.item(), float(), bool() or an index)"
_SHAPE = "a shape that depends on the data (boolean indexing, nonzero, unique)"
_REFUSED = {
    "aten::_local_scalar_dense": _BRANCH,
    "aten::equal": _BRANCH,
    "aten::nonzero": _SHAPE,
    "aten::masked_select": _SHAPE,
    "aten::_unique2": _SHAPE,
    "aten::unique_dim": _SHAPE,
}


class _Watch(TorchDispatchMode):
    """Stop a trace at an operation that would be baked into the graph with today's values."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        reason = _REFUSED.get(func.name().split(".")[0])
        if reason is None and func.name().startswith("aten::index.") and _by_mask(args):
            reason = _SHAPE
        if reason is not None:
            raise _Untraceable(reason)
        return func(*args, **(kwargs or {}))


class _Untraceable(Exception):
    """Why a step cannot be traced."""


def _by_mask(args: Any) -> bool:
    return any(isinstance(i, Tensor) and i.dtype == torch.bool for i in args[1])


class FlatParameters:
    """The parameters of a model and guide as one flat vector that shares their memory.

    :ivar named: unconstrained leaf tensors by name, in the order of the vector.
    :ivar flat: the vector: writing to it moves the parameters, in the parameter store and in their modules.
    :raises ValueError: if there is nothing to train, or parameters differ in dtype or device.
    """

    def __init__(self, named: Mapping[str, Tensor]) -> None:
        if not named:
            raise ValueError(
                "no parameter requires a gradient: expected a guide or model with pyro.param or a PyroModule."
            )
        kinds = {(p.dtype, p.device) for p in named.values()}
        if len(kinds) != 1:
            raise ValueError(f"parameters have different dtypes or devices, {sorted(map(str, kinds))}: expected one.")
        self.named = dict(named)
        self.flat = torch.cat([p.detach().reshape(-1) for p in self.named.values()])
        for (start, size), p in zip(self.spans(), self.named.values(), strict=True):
            p.data = self.flat[start : start + size].view(p.shape)

    def spans(self) -> Iterator[tuple[int, int]]:
        """Start and length of each parameter in the vector."""
        start = 0
        for p in self.named.values():
            yield start, p.numel()
            start += p.numel()

    def lift(self, graph: fx.GraphModule) -> fx.GraphModule:
        """Make the parameters, constants of a traced graph, slices of its first input."""
        first = next(node for node in graph.graph.nodes if node.op == "placeholder")
        spans = {id(p): (span, p.shape) for span, p in zip(self.spans(), self.named.values(), strict=True)}
        for node in list(graph.graph.nodes):
            if node.op == "get_attr" and id(getattr(graph, node.target, None)) in spans:
                (start, size), shape = spans[id(getattr(graph, node.target))]
                with graph.graph.inserting_before(node):
                    part = graph.graph.call_function(torch.ops.aten.slice.Tensor, (first, 0, start, start + size))
                    view = graph.graph.call_function(torch.ops.aten.view.default, (part, list(shape)))
                node.replace_all_uses_with(view)
                graph.graph.erase_node(node)
        graph.graph.eliminate_dead_code()
        graph.recompile()
        return graph


class CompiledSVI:
    """Pyro's ``SVI`` with a step that is traced once and compiled.

    :param model: a Pyro model.
    :param guide: a Pyro guide.
    :param optim: a Pyro optimiser, or a callable from the list of parameters to a torch optimiser, among Adam, AdamW,
        ClippedAdam, SGD, Adagrad and AdagradRMSProp.
    :param loss: any loss of this package; Pyro's ``Trace_ELBO`` and ``TraceEnum_ELBO`` stand for :class:`pplvi.ELBO`.
    :param mode: ``"trace"`` (the graph run eagerly; needs no compiler), ``True`` (inductor), or ``"max"`` (inductor,
        with a loop of steps inside for :meth:`run`).
    :raises ValueError: for an optimiser or loss that cannot be compiled; at the first step, for a program that cannot
        be traced, with the site and the reason; parameters are untouched then.

    A new graph is made for each new shape, dtype or non-tensor argument. Parameters share the memory of one vector, so
    that the parameter store, ``guide.median`` and ``Predictive`` see every step.

    >>> import pyro.distributions as dist
    >>> from pyro.infer.autoguide import AutoNormal
    >>> def model(y):
    ...     pyro.sample("y", dist.Normal(pyro.sample("z", dist.Normal(0.0, 1.0)), 1.0), obs=y)
    >>> guide = AutoNormal(model)
    >>> svi = CompiledSVI(model, guide, pyro.optim.Adam({"lr": 0.02}), ELBO(num_particles=8), mode="trace")
    >>> losses = svi.run(500, torch.tensor(2.0))
    >>> round(guide.median()["z"].item(), 1)
    1.0
    """

    def __init__(
        self,
        model: Program,
        guide: Program,
        optim: PyroOptim | Callable[[list[Tensor]], torch.optim.Optimizer],
        loss: Any,
        *,
        mode: Mode = True,
    ) -> None:
        if mode not in (True, "trace", "max"):
            raise ValueError(f"mode={mode!r}: expected True (inductor), 'trace' or 'max'.")
        self.model, self.guide, self.optim, self.mode = model, guide, optim, mode
        self.loss = own_loss(loss)
        self.parameters: FlatParameters | None = None
        self.state: tuple[Tensor, ...] = ()
        self.rate = torch.ones(())
        self._update: FlatUpdate | None = None
        self._graphs: dict[Any, Callable[..., Any]] = {}

    def step(self, *args: Any, **kwargs: Any) -> float:
        """One training step.

        :returns: the loss before the step, in nats.
        """
        return float(self.run(1, *args, **kwargs))

    def run(self, num_steps: int, *args: Any, **kwargs: Any) -> Tensor:
        """Several training steps on the same arguments.

        :returns: the losses, ``(num_steps,)``, in nats; reading them is the first wait for the device.
        """
        tensors, key = self._prepared(args, kwargs)
        with torch.no_grad():
            if self.mode == "max" and num_steps > 1:
                return self._program((key, num_steps), args, kwargs)(*tensors)
            one = self._program((key, None), args, kwargs)
            return torch.stack([one(*tensors) for _ in range(num_steps)])

    def evaluate_loss(self, *args: Any, **kwargs: Any) -> float:
        """The loss at the present parameters, through Pyro's handlers."""
        return float(self.loss.loss(self.model, self.guide, *args, **kwargs))

    def _prepared(self, args: Any, kwargs: Any) -> tuple[list[Tensor], Any]:
        """Materialise the parameters, and split the arguments into tensors and a key for the rest."""
        if self.parameters is None:
            named = parameters_of(lambda: self.loss.differentiable_loss(self.model, self.guide, *args, **kwargs))
            self._update = flat_update(self.optim, named)
            self.parameters = FlatParameters(named)
            self.rate = self.parameters.flat.new_ones(())
            self.state = self._update.init(self.parameters.flat)
        leaves, structure = pytree.tree_flatten((args, kwargs))
        tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        rest = [(tuple(x.shape), x.dtype, x.device) if isinstance(x, Tensor) else x for x in leaves]
        return tensors, (str(structure), repr(rest))

    def _program(self, key: Any, args: Any, kwargs: Any) -> Callable[..., Any]:
        if key not in self._graphs:
            graph = self._trace(args, kwargs)
            self._graphs[key] = self._in_place(graph) if key[1] is None else self._loop(graph, key[1])
        return self._graphs[key]

    def _trace(self, args: Any, kwargs: Any) -> fx.GraphModule:
        assert self.parameters is not None
        leaves, structure = pytree.tree_flatten((args, kwargs))
        places = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]

        def step(flat: Tensor, rate: Tensor, state: tuple[Tensor, ...], *tensors: Tensor) -> tuple[Any, ...]:
            filled = list(leaves)
            for i, tensor in zip(places, tensors, strict=True):
                filled[i] = tensor
            new_args, new_kwargs = pytree.tree_unflatten(filled, structure)
            return self._pure_step(flat, rate, state, new_args, new_kwargs)

        given = [leaves[i] for i in places]
        with last_site() as site, traceable(), _named_failure(site):
            graph = make_fx(step)(self.parameters.flat, self.rate, self.state, *given)
        return self.parameters.lift(graph)

    def _pure_step(
        self, flat: Tensor, rate: Tensor, state: tuple[Tensor, ...], args: Any, kwargs: Any
    ) -> tuple[Any, ...]:
        assert self.parameters is not None
        assert self._update is not None
        leaves = list(self.parameters.named.values())
        with torch.enable_grad(), _Watch():
            loss = self.loss.differentiable_loss(self.model, self.guide, *args, **kwargs)
            gradients = torch.autograd.grad(loss, leaves, allow_unused=True, materialize_grads=True)
        gradient = torch.cat([g.reshape(-1) for g in gradients])
        return *self._update(flat, gradient, state, rate), loss.detach()

    def _in_place(self, graph: fx.GraphModule) -> Callable[..., Tensor]:
        def step(flat: Tensor, rate: Tensor, state: tuple[Tensor, ...], *tensors: Tensor) -> Tensor:
            new, new_state, loss = graph(flat, rate, state, *tensors)
            flat.copy_(new)
            for old, value in zip(state, new_state, strict=True):
                old.copy_(value)
            return loss

        return self._bound(step)

    def _loop(self, graph: fx.GraphModule, num_steps: int) -> Callable[..., Tensor]:
        from torch._higher_order_ops.while_loop import while_loop

        def loop(flat: Tensor, rate: Tensor, state: tuple[Tensor, ...], *tensors: Tensor) -> Tensor:
            def more(i: Tensor, *_: Tensor) -> Tensor:
                return i < num_steps

            def body(i: Tensor, losses: Tensor, flat: Tensor, *state: Tensor) -> tuple[Tensor, ...]:
                new, new_state, loss = graph(flat, rate, state, *tensors)
                return (i + 1, torch.where(torch.arange(num_steps) == i, loss, losses), new, *new_state)

            start = torch.zeros((), dtype=torch.int64)
            _, losses, new, *new_state = while_loop(more, body, (start, flat.new_zeros(num_steps), flat, *state))
            flat.copy_(new)
            for old, value in zip(state, new_state, strict=True):
                old.copy_(value)
            return losses

        return self._bound(loop)

    def _bound(self, program: Callable[..., Tensor]) -> Callable[..., Tensor]:
        compiled = program if self.mode == "trace" else torch.compile(program, fullgraph=True)
        assert self.parameters is not None
        flat = self.parameters.flat
        return lambda *tensors: compiled(flat, self.rate, self.state, *tensors)


def own_loss(loss: Any) -> Loss:
    """A loss that traces: one of this package, or ours for exactly Pyro's ``Trace_ELBO`` and ``TraceEnum_ELBO``.

    :raises ValueError: for any other, subclasses included.
    """
    if isinstance(loss, Loss):
        return loss
    if type(loss) in (Trace_ELBO, TraceEnum_ELBO):
        return ELBO(loss.num_particles, vectorize_particles=loss.vectorize_particles)
    raise ValueError(
        f"{type(loss).__name__} branches on values and cannot be traced: expected a loss of this package, or exactly "
        "Trace_ELBO or TraceEnum_ELBO, which stand for pplvi.ELBO. Use one of these, or compile=False."
    )


@contextmanager
def traceable() -> Iterator[None]:
    """Switch off the checks of torch and Pyro that branch on values, and put them back after."""
    with pyro.validation_enabled(False):
        yield


@contextmanager
def _named_failure(site: list[str]) -> Iterator[None]:
    try:
        yield
    except ValueError:
        raise
    except Exception as error:
        reason = str(error) if isinstance(error, _Untraceable) else f"an unsupported operation: {error}"
        where = f"near site {site[-1]!r}" if site else "before the first site"
        raise ValueError(
            f"the step cannot be traced: {where} it met {reason}. Expected tensor operations whose shapes do not "
            "depend on values: use torch.where or masks instead of branches, or compile=False."
        ) from error
