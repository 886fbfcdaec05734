"""Expected log densities: what each distribution asks of its parameters and of its value.

:math:`E[\\log p(x | \\theta)]` where value and parameters may be polynomials of latent sites. A row of the table is a
function of blocks (whose expectations it takes), the distribution and the value.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from pplvi.guides.conjugate.arrangements import getitem
from pplvi.guides.conjugate.expectations import Blocks, Expected, NotConjugate, combined
from pplvi.guides.conjugate.expressions import Expression, Function, Symbolic, constant
from pplvi.guides.conjugate.parameters import parameters
from pplvi.guides.conjugate.quadrature import integrated
from pplvi.programs.sites import kind_of

Row = Callable[[Blocks, Any, Any], Expected]
ROWS: dict[str, Row] = {}

_WRAPPERS = ("Independent", "MaskedDistribution", "ExpandedDistribution")


def table_row(*kinds: str) -> Callable[[Row], Row]:
    """Register the row of distributions of these names."""

    def register(function: Row) -> Row:
        ROWS.update(dict.fromkeys(kinds, function))
        return function

    return register


def is_symbolic(fn: Any, value: Any) -> bool:
    """Whether a value, or a parameter of a distribution, depends on latent sites."""
    while type(fn).__name__ in _WRAPPERS or hasattr(fn, "base_dist"):
        fn = fn.base_dist
    return isinstance(value, Symbolic) or any(isinstance(v, Symbolic) for v in parameters(fn).values())


def expected_log_prob(blocks: Blocks, fn: Any, value: Any) -> Expected:
    """The expected log density of a value, one number for each element of the distribution's batch shape.

    :raises NotConjugate: where the table has no closed form.
    """
    if type(fn).__name__ == "Independent":
        count = fn.reinterpreted_batch_ndims
        inner, shape = expected_log_prob(blocks, fn.base_dist, value), fn.base_dist.batch_shape
        return combined(lambda lp: _sum_right(lp.expand(torch.broadcast_shapes(lp.shape, shape)), count), inner)
    if type(fn).__name__ == "MaskedDistribution":
        inner, mask = expected_log_prob(blocks, fn.base_dist, value), torch.as_tensor(fn._mask)
        return combined(lambda lp: torch.where(mask, lp, lp.new_zeros(())), inner)
    if type(fn).__name__ == "ExpandedDistribution":
        return expected_log_prob(blocks, fn.base_dist, value)
    if not is_symbolic(fn, value):
        known = fn.log_prob(value)
        if isinstance(known, Symbolic):
            raise NotConjugate(f"{kind_of(fn)} has no row in the table of conjugate distributions", known.sites)
        return Expected(lambda state: known, frozenset())
    try:
        return _closed_form(blocks, fn, value)
    except NotConjugate:
        if blocks.loose and _sites(fn, value) <= blocks.loose:
            return integrated(blocks, fn, value)
        raise


def _closed_form(blocks: Blocks, fn: Any, value: Any) -> Expected:
    if hasattr(fn, "transforms") and kind_of(fn) not in ROWS:
        return _transformed(blocks, fn, value)
    if any(isinstance(v, Function) for v in (value, *parameters(fn).values())):
        raise _refused(fn, value)
    if (known_row := ROWS.get(kind_of(fn))) is None:
        raise NotConjugate(f"{kind_of(fn)} has no row in the table of conjugate distributions", _sites(fn, value))
    return known_row(blocks, fn, value)


def _sum_right(lp: Tensor, count: int) -> Tensor:
    return lp.sum(list(range(-count, 0))) if count else lp


def _sites(fn: Any, value: Any) -> set[str]:
    found = [v for v in (value, *parameters(fn).values()) if isinstance(v, Symbolic)]
    return set().union(*(v.sites for v in found))


def _refused(fn: Any, value: Any) -> NotConjugate:
    bad = {n: v for n, v in {**parameters(fn), "value": value}.items() if isinstance(v, Function)}
    name, function = next(iter(bad.items()))
    return NotConjugate(
        f"the {name} of {kind_of(fn)} is torch.{function.operation} of {', '.join(map(repr, sorted(function.sites)))}",
        _sites(fn, value),
    )


def _transformed(blocks: Blocks, fn: Any, value: Any) -> Expected:
    """An observed value of a transformed distribution, taken back to the base distribution."""
    if isinstance(value, Symbolic):
        raise NotConjugate(f"{type(fn).__name__} has no row in the table of conjugate distributions", _sites(fn, value))
    total: Any = 0.0
    for transform in reversed(fn.transforms):
        before = transform.inv(value)
        total = total + transform.log_abs_det_jacobian(before, value)
        value = before
    inner = expected_log_prob(blocks, fn.base_dist, value)
    return combined(lambda lp: lp - total, inner)


# ---------------------------------------------------------------------- asked of expressions and numbers alike


def mean_of(blocks: Blocks, value: Any) -> Any:
    """``E[value]``."""
    return blocks.mean(value) if isinstance(value, Expression) else value


def log_of(blocks: Blocks, value: Any) -> Any:
    """``E[log value]``."""
    return blocks.log(value) if isinstance(value, Expression) else torch.as_tensor(value).log()


def _only(fn: Any, *names: str) -> None:
    """Refuse latent sites in parameters that have no conjugate update."""
    for name in names:
        if isinstance(parameter := getattr(fn, name), Symbolic):
            raise NotConjugate(f"the {name} of {kind_of(fn)} depends on latent sites", parameter.sites)


@table_row("Normal")
def _normal(blocks: Blocks, fn: Any, value: Any) -> Expected:
    residual, scale = value - fn.loc, fn.scale
    squared = blocks.second_moment(residual) if isinstance(residual, Expression) else residual**2
    precision = mean_of(blocks, scale**-2) if not isinstance(scale, Expression) else _precision(blocks, scale)
    if isinstance(squared, Expected) and isinstance(precision, Expected):
        blocks.independent(squared.sites, precision.sites)
    half = 0.5 * math.log(2 * math.pi)
    return combined(lambda r, p, s: -0.5 * p * r - s - half, squared, precision, log_of(blocks, scale))


def _precision(blocks: Blocks, scale: Expression) -> Expected:
    inverse = scale**-2
    if not isinstance(inverse, Expression):
        raise NotConjugate("a sum as the standard deviation of Normal", scale.sites)
    try:
        return blocks.mean(inverse)
    except NotConjugate as error:
        raise NotConjugate(f"a standard deviation of Normal that needs {error}", scale.sites) from None


@table_row("MultivariateNormal")
def _multivariate_normal(blocks: Blocks, fn: Any, value: Any) -> Expected:
    residual = value - fn.loc
    matrix, log_det = _precision_matrix(blocks, fn)
    size = fn.event_shape[0]
    if not isinstance(residual, Expression):
        outer: Any = residual.unsqueeze(-1) * residual.unsqueeze(-2)
    else:
        first: Any = residual.unsqueeze(-1)
        second: Any = residual.unsqueeze(-2)
        outer = combined(
            lambda m, c: m.unsqueeze(-1) * m.unsqueeze(-2) + c,
            _whole(blocks, residual),
            blocks.covariance(first, second),
        )
        blocks.independent(residual.sites, matrix.sites if isinstance(matrix, Expected) else ())
    half = 0.5 * size * math.log(2 * math.pi)
    return combined(lambda o, p, d: 0.5 * d - 0.5 * (o * p).sum((-2, -1)) - half, outer, matrix, log_det)


def _whole(blocks: Blocks, e: Expression) -> Expected:
    """The mean with its last dimension expanded."""
    size = e.shape[-1]
    return combined(lambda m: m.expand(*m.shape[:-1], size) if m.dim() else m.expand(size), blocks.mean(e))


def _precision_matrix(blocks: Blocks, fn: Any) -> tuple[Any, Any]:
    """Precision and its log determinant, known or those of a latent site."""
    given = fn.__dict__.get("precision_matrix")
    if isinstance(given, Expression):
        return blocks.mean(given), log_determinant(blocks, given)
    symbolic = [
        v
        for n in ("precision_matrix", "covariance_matrix", "scale_tril")
        if isinstance(v := fn.__dict__.get(n), Symbolic)
    ]
    if symbolic:
        raise NotConjugate(
            "a latent covariance_matrix or scale_tril of MultivariateNormal; expected a Wishart site as its "
            "precision_matrix", symbolic[0].sites,
        )  # fmt: skip
    tril = fn._unbroadcasted_scale_tril
    return torch.cholesky_inverse(tril), -2 * tril.diagonal(dim1=-2, dim2=-1).log().sum(-1)


def log_determinant(blocks: Blocks, e: Expression) -> Expected:
    """``E[log |e|]`` for a matrix that is a number times a site."""
    simple = len(e.terms) == 1 and not e.terms[0].constants and len(e.terms[0].atoms) == 1 and e.terms[0].factor > 0
    if not simple or blocks.families[e.terms[0].atoms[0].site] != "Wishart":
        raise NotConjugate("the log determinant of a matrix that is no Wishart site", e.sites)
    corner = getitem(e, (..., 0, 0))  # the site's log determinant stands for the logarithm at each of its entries
    return combined(lambda x: x + e.shape[-1] * math.log(e.terms[0].factor), blocks.log(corner / e.terms[0].factor))


@table_row("Gamma")
def _gamma(blocks: Blocks, fn: Any, value: Any) -> Expected:
    _only(fn, "concentration")
    shape = fn.concentration
    product = mean_of(blocks, value * fn.rate)
    return combined(
        lambda r, v, p: shape * r - torch.lgamma(shape) + (shape - 1) * v - p,
        log_of(blocks, fn.rate), log_of(blocks, value), product,
    )  # fmt: skip


@table_row("Chi2")
def _chi2(blocks: Blocks, fn: Any, value: Any) -> Expected:
    return _gamma(blocks, fn, value)


@table_row("Exponential")
def _exponential(blocks: Blocks, fn: Any, value: Any) -> Expected:
    return combined(lambda r, p: r - p, log_of(blocks, fn.rate), mean_of(blocks, value * fn.rate))


@table_row("InverseGamma")
def _inverse_gamma(blocks: Blocks, fn: Any, value: Any) -> Expected:
    shape, rate = fn.concentration, fn.rate
    for part in (shape,):
        if isinstance(part, Symbolic):
            raise NotConjugate("the concentration of InverseGamma depends on latent sites", part.sites)
    return combined(
        lambda r, v, p: shape * r - torch.lgamma(shape) - (shape + 1) * v - p,
        log_of(blocks, rate), log_of(blocks, value), mean_of(blocks, rate / value),
    )  # fmt: skip


@table_row("Poisson")
def _poisson(blocks: Blocks, fn: Any, value: Any) -> Expected:
    _observed(fn, value)
    constant_part = torch.lgamma(value + 1)
    return combined(lambda r, m: value * r - m - constant_part, log_of(blocks, fn.rate), mean_of(blocks, fn.rate))


def _observed(fn: Any, value: Any) -> None:
    if isinstance(value, Symbolic):
        raise NotConjugate(f"a latent {kind_of(fn)} that is not enumerated", value.sites)


@table_row("Beta")
def _beta(blocks: Blocks, fn: Any, value: Any) -> Expected:
    both = fn.__dict__["_dirichlet"].concentration
    if isinstance(both, Symbolic):
        raise NotConjugate("the concentrations of Beta depend on latent sites", both.sites)
    a, b = both.unbind(-1)
    normaliser = torch.lgamma(a + b) - torch.lgamma(a) - torch.lgamma(b)
    return combined(
        lambda x, y: (a - 1) * x + (b - 1) * y + normaliser, log_of(blocks, value), log_of(blocks, 1.0 - value)
    )


@table_row("Dirichlet")
def _dirichlet(blocks: Blocks, fn: Any, value: Any) -> Expected:
    _only(fn, "concentration")
    c = fn.concentration
    normaliser = torch.lgamma(c.sum(-1)) - torch.lgamma(c).sum(-1)
    return combined(lambda x: ((c - 1) * x).sum(-1) + normaliser, log_of(blocks, value))


@table_row("Wishart")
def _wishart(blocks: Blocks, fn: Any, value: Any) -> Expected:
    _only(fn, "df")
    size, df = fn.event_shape[-1], fn.df
    inverse = torch.cholesky_inverse(fn._unbroadcasted_scale_tril)
    log_scale = 2 * fn._unbroadcasted_scale_tril.diagonal(dim1=-2, dim2=-1).log().sum(-1)
    normaliser = -0.5 * df * (size * math.log(2) + log_scale) - torch.mvlgamma(df / 2, size)
    return combined(
        lambda d, m: 0.5 * (df - size - 1) * d - 0.5 * (inverse * m).sum((-2, -1)) + normaliser,
        log_determinant(blocks, value), mean_of(blocks, value),
    )  # fmt: skip


@table_row("Uniform")
def _uniform(blocks: Blocks, fn: Any, value: Any) -> Expected:
    _only(fn, "low", "high")
    known = -(fn.high - fn.low).log()
    return Expected(lambda state: known, frozenset())


# ---------------------------------------------------------------------- whole numbers


def _probabilities(fn: Any) -> Any:
    given = parameters(fn)
    if isinstance(given.get("logits"), Symbolic):
        raise NotConjugate(f"the logits of {kind_of(fn)} depend on latent sites", given["logits"].sites)
    return given.get("probs", fn.probs)


@table_row("Bernoulli")
def _bernoulli(blocks: Blocks, fn: Any, value: Any) -> Expected:
    _observed(fn, value)
    p = _probabilities(fn)
    return combined(lambda x, y: value * x + (1 - value) * y, log_of(blocks, p), log_of(blocks, 1.0 - p))


@table_row("Binomial")
def _binomial(blocks: Blocks, fn: Any, value: Any) -> Expected:
    _observed(fn, value)
    p, n = _probabilities(fn), fn.total_count
    count = torch.lgamma(n + 1) - torch.lgamma(value + 1) - torch.lgamma(n - value + 1)
    return combined(lambda x, y: value * x + (n - value) * y + count, log_of(blocks, p), log_of(blocks, 1.0 - p))


@table_row("Geometric")
def _geometric(blocks: Blocks, fn: Any, value: Any) -> Expected:
    _observed(fn, value)
    p = _probabilities(fn)
    return combined(lambda x, y: x + value * y, log_of(blocks, p), log_of(blocks, 1.0 - p))


@table_row("Categorical")
def _categorical(blocks: Blocks, fn: Any, value: Any) -> Expected:
    _observed(fn, value)
    return log_of(blocks, chosen(_probabilities(fn), value))


def chosen(probs: Expression, value: Tensor) -> Expression:
    """The probability of a whole number: the last dimension indexed by it, the others broadcast against it."""
    shape = torch.broadcast_shapes(probs.shape[:-1], value.shape)
    value = value.long().expand(shape)
    whole: Any = probs.expand(*shape, probs.shape[-1])
    places = [_count(size, dim, shape) for dim, size in enumerate(shape)]
    found: Expression = getitem(whole, (*places, value))
    return found


def _count(size: int, dim: int, shape: Any) -> Tensor:
    return torch.arange(size).reshape([-1 if d == dim else 1 for d in range(len(shape))])


@table_row("OneHotCategorical")
def _one_hot(blocks: Blocks, fn: Any, value: Any) -> Expected:
    _observed(fn, value)
    logs = log_of(blocks, _probabilities(fn._categorical))
    return combined(lambda x: (value * x).sum(-1), logs)


@table_row("Multinomial")
def _multinomial(blocks: Blocks, fn: Any, value: Any) -> Expected:
    _observed(fn, value)
    logs = log_of(blocks, _probabilities(fn._categorical))
    count = torch.lgamma(value.sum(-1) + 1) - torch.lgamma(value + 1).sum(-1)
    return combined(lambda x: torch.where(value > 0, value * x, value.new_zeros(())).sum(-1) + count, logs)


@table_row("Unit")
def _unit(blocks: Blocks, fn: Any, value: Any) -> Expected:
    factor = fn.log_factor
    return blocks.mean(factor if isinstance(factor, Expression) else constant(factor, factor))
