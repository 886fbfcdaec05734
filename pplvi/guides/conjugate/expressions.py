"""Tensors that remember how they came from latent sites: polynomials where that is possible, functions elsewhere.

A :class:`Symbolic` is a tensor with an example of a value, so that a program sees its shape, dtype and device. Torch's
functions on it end in ``__torch_function__``: the rules of ``operations`` give polynomials (:class:`Expression`), every
other function is kept as it is (:class:`Function`), to be refused by name, or integrated, where an expectation of it
is asked for.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.overrides import resolve_name

from pplvi.guides.conjugate.terms import Atom, Constant, Label, Term

_LOOKS = {"item", "__bool__", "__float__", "__int__", "__index__", "tolist", "numpy", "__contains__", "__array__"}
_FACTS = {
    "dim", "size", "numel", "nelement", "ndimension", "stride", "is_floating_point", "is_complex", "is_contiguous",
    "element_size", "get_device", "__len__", "__hash__", "__repr__", "is_inference", "is_signed", "result_type",
    "broadcast_shapes", "has_names", "data_ptr", "storage_offset", "requires_grad_", "register_hook",
}  # fmt: skip
_GETTERS = {"T", "mT", "H", "mH", "data", "real"}

RULES: dict[str, Callable[..., Any]] = {}


def rule(*names: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Register what functions of these names give for expressions; ``NotImplemented`` where they give no polynomial."""

    def register(function: Callable[..., Any]) -> Callable[..., Any]:
        RULES.update(dict.fromkeys(names, function))
        return function

    return register


class Symbolic(Tensor):
    """A value that depends on latent sites; its data are an example.

    :ivar shown: the example.
    """

    shown: Tensor

    def __init__(self, shown: Tensor) -> None:
        super().__init__()
        self.shown = shown

    @property
    def sites(self) -> set[str]:
        """Names of the latent sites in it."""
        return set()

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        name = func.__name__
        if name == "__get__":
            name = resolve_name(func).split(".")[-2]
            if name not in _GETTERS:
                return _plainly(func, args, kwargs)
        if name in _FACTS or name in ("__set__", "__delete__"):
            return _plainly(func, args, kwargs)
        if name in _LOOKS:
            raise ValueError(
                f"the program looks at the value of an expression of {_sites_of(args)} ({name.strip('_')}), which its "
                "updates cannot follow: expected a program without branches on latent values. Use another guide, or "
                "pyro.infer.config_enumerate for a discrete site."
            )
        return apply(name.strip("_") if name.startswith("__") else name, func, args, kwargs)


def apply(name: str, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """A torch function of symbolic arguments."""
    if name in RULES:
        found = RULES[name](*args, **kwargs)
        if found is not NotImplemented:
            return found
    result = _plainly(func, args, kwargs)
    if isinstance(result, (tuple, list)):
        pick: Any = lambda i: lambda *a, **k: func(*a, **k)[i]  # noqa: E731
        return type(result)(function_of(x, name, pick(i), args, kwargs) for i, x in enumerate(result))
    return function_of(result, name, func, args, kwargs) if isinstance(result, Tensor) else result


def _plainly(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    with torch._C.DisableTorchFunctionSubclass():
        return func(*map(example, args), **{k: example(v) for k, v in kwargs.items()})


def example(value: Any) -> Any:
    """A plain value in the place of a symbolic one, inside of lists and tuples too."""
    if isinstance(value, Symbolic):
        return value.shown
    if isinstance(value, torch.Size):
        return value
    return type(value)(map(example, value)) if isinstance(value, (list, tuple)) else value


class Expression(Symbolic):
    """A polynomial of latent sites.

    :ivar terms: what is summed.
    :ivar labels: one for each dimension; ``None`` where it has size one, or where the value does not depend on it.
    """

    terms: tuple[Term, ...]
    labels: tuple[Label | None, ...]

    @property
    def sites(self) -> set[str]:
        """Names of the latent sites in it."""
        return {atom.site for term in self.terms for atom in term.atoms}


class Function(Symbolic):
    """A function of expressions that is no polynomial.

    :ivar operation: name of the torch function that made it one.
    :ivar inputs: the expressions that it is a function of.
    """

    operation: str
    inputs: tuple[Expression, ...]
    _call: tuple[Any, tuple[Any, ...], dict[str, Any]]

    @property
    def sites(self) -> set[str]:
        """Names of the latent sites in it."""
        return {site for expression in self.inputs for site in expression.sites}

    def at(self, values: dict[int, Tensor]) -> Tensor:
        """Its value where its inputs, told apart by ``id``, have these."""
        func, args, kwargs = self._call
        result: Tensor = func(*substituted(args, values), **{k: substituted(v, values) for k, v in kwargs.items()})
        return result


def substituted(value: Any, values: dict[int, Tensor]) -> Any:
    """Numbers in the place of symbolic values."""
    if isinstance(value, Function):
        return value.at(values)
    if isinstance(value, Symbolic):
        return values[id(value)]
    if isinstance(value, (list, tuple)) and not isinstance(value, torch.Size):
        return type(value)(substituted(part, values) for part in value)
    return value


def sites_in(value: Any) -> set[str]:
    """Names of the latent sites that a value depends on."""
    return value.sites if isinstance(value, Symbolic) else set()


def function_of(shown: Tensor, name: str, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Function:
    """A value that no rule knows."""
    parts = list(_symbolic((args, tuple(kwargs.values()))))
    inputs = [e for p in parts for e in (p.inputs if isinstance(p, Function) else (p,))]
    made = _dressed(shown, Function)
    made.operation = next((p.operation for p in parts if isinstance(p, Function)), name)
    made.inputs = tuple({id(e): e for e in inputs}.values())
    made._call = (func, args, kwargs)
    return made


def _symbolic(value: Any) -> list[Any]:
    if isinstance(value, Symbolic):
        return [value]
    return [found for part in value for found in _symbolic(part)] if isinstance(value, (list, tuple)) else []


def _dressed(shown: Tensor, kind: Any) -> Any:
    with torch._C.DisableTorchFunctionSubclass():
        shown = shown.detach()
        made = shown.as_subclass(kind)
    made.shown = shown
    return made


def expression(terms: Sequence[Term], labels: Sequence[Label | None], shown: Tensor) -> Expression:
    """An expression from its parts."""
    made: Expression = _dressed(shown, Expression)
    made.terms, made.labels = tuple(terms), tuple(labels)
    return made


def latent(name: str, shown: Tensor) -> Expression:
    """A latent site itself."""
    labels = _new_labels(shown.shape)
    return expression([Term(1.0, (), (Atom(name, labels),))], labels, shown)


def constant(value: Any, like: Tensor) -> Expression:
    """A number or tensor, as an expression without latent sites."""
    shown = torch.as_tensor(value, device=like.device)
    number = shown.to(torch.float64)
    if shown.dim() == 0:
        return expression(
            [Term(1.0, (Constant(number, ()),)) if number.requires_grad else Term(float(number))], (), shown
        )
    labels = _new_labels(shown.shape)
    squeezed = number.reshape([size for size in shown.shape if size != 1])
    return expression([Term(1.0, (Constant(squeezed, tuple(n for n in labels if n)),))], labels, shown)


def _new_labels(shape: Sequence[int]) -> tuple[Label | None, ...]:
    return tuple(Label(size) if size != 1 else None for size in shape)


def _sites_of(args: Any) -> str:
    return ", ".join(sorted({repr(site) for part in _symbolic(list(args)) for site in part.sites}))
