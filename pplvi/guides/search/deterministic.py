"""Deterministic ADVI: mean field by second-order optimisation on fixed draws, with linear-response covariances."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from pplvi.guides.search.base import FoundGuide
from pplvi.guides.search.explore import check_proper, improper
from pplvi.guides.search.gaussians import Gaussian, full_gaussian, stack_gaussians
from pplvi.guides.search.lbfgs import Options, Point, Trail, minimise
from pplvi.guides.search.moments import MOST_DIMENSIONS
from pplvi.guides.search.newton import newton
from pplvi.kinds.checked import checked
from pplvi.kinds.kinds import Count, Positive, Seed
from pplvi.programs.density import CHUNK, UnconstrainedDensity
from pplvi.programs.ways import Vectorize
from pplvi.types import Program

__all__ = ["AutoDeterministicNormal"]

_NEWTON_STEPS = 100
_LOOK = 50  # iterations


@checked
class AutoDeterministicNormal(FoundGuide):
    r"""Deterministic ADVI: a Gaussian mean field fitted on fixed draws, with the linear-response covariance.

    .. math:: (\hat\mu, \hat\xi) = \arg\min_{\mu, \xi} \Big\{ -\frac1M \sum_{m=1}^M \ell(\mu + e^\xi \odot x_m)
        - \sum_d \xi_d \Big\}, \qquad \Sigma_{LR} = \big(H^{-1}\big)_{\mu\mu}

    with ``l`` the unconstrained log density of the model, ``x_m`` standard normal draws that are taken once, in pairs
    ``x, -x``, and ``H`` the Hessian of the objective at its minimum. As the objective is a plain function it is
    minimised to the end, by L-BFGS and then by Newton's method, with exact Hessians in up to 100 dimensions and by
    Hessian-vector products in a trust region in more: no learning rate, no noise, no tuning. Mean field underestimates
    spread; the linear response, how the means move when the model is tilted, corrects it and restores correlations. The
    guide is ``Normal(mu, Sigma_LR)``: exact where the posterior is Gaussian. (Pairs of draws are not in the paper; they
    make its mean exact there too.)

    There is nothing to train: the first call runs it, :meth:`run` runs it again. After a run, ``elbo`` is the ELBO of
    the mean field on the fixed draws, in nats.

    Source: Giordano, Ingram and Broderick 2024, Black box variational inference with a deterministic objective: faster,
    more accurate, and even more black box, JMLR 25(18).

    :param model: a Pyro model; its latent sites are continuous or enumerated, its plates are not subsampled.
    :param num_draws: how many fixed draws ``M``; even. The paper's 30.
    :param linear_response: use the linear-response covariance; ``False`` keeps the mean field's own.
    :param init_scale: initial standard deviation of every unconstrained coordinate.
    :param init_radius: of the start, as ``init_loc_fn``, ``seed`` and ``vectorize`` of :class:`pplvi.AutoPathfinder`.
    :raises ValueError: where :class:`pplvi.AutoPathfinder` does; on the first run, for a log density that has no second
        derivatives, and for a posterior whose objective has no minimum.

    >>> import pyro, pyro.distributions as dist
    >>> def model(y):
    ...     a = pyro.sample("a", dist.Normal(0.0, 1.0))
    ...     b = pyro.sample("b", dist.Normal(0.0, 1.0))
    ...     pyro.sample("y", dist.Normal(a + b, 0.1), obs=y)
    >>> guide = AutoDeterministicNormal(model, seed=0).run(torch.tensor(1.0))
    >>> guide.get_posterior().variance  # exact: 0.5025; mean field: 0.01
    tensor([0.5025, 0.5025])
    """

    def __init__(
        self,
        model: Program,
        *,
        num_draws: Count = 30,
        linear_response: bool = True,
        init_scale: Positive = 0.1,
        init_radius: Positive = 0.5,
        init_loc_fn: Callable[..., Any] | None = None,
        seed: Seed | None = None,
        vectorize: Vectorize = None,
    ) -> None:
        if num_draws % 2:
            raise ValueError(f"num_draws is {num_draws!r}; expected an even number of at least 2, for example 30")
        super().__init__(model, init_radius=init_radius, init_loc_fn=init_loc_fn, seed=seed, vectorize=vectorize)
        self._num_draws, self._linear_response, self._log_scale = num_draws, linear_response, math.log(init_scale)
        self.elbo = math.nan

    def _find(self, density: UnconstrainedDensity) -> Gaussian:
        (loc,) = self._starts(density, 1)
        half = torch.randn(self._num_draws // 2, density.dim, dtype=torch.float64, device=density.device)
        objective = _Objective(density, torch.cat([half, -half]))
        minimum = objective.minimise(torch.cat([loc, torch.full_like(loc, self._log_scale)]))
        self.elbo = -objective.value_and_gradient(minimum)[0]
        hessian = objective.hessian(minimum)
        if hessian is None:
            raise ValueError(
                "the log density of the model has no second derivatives: expected operations that torch can "
                "differentiate twice; use AutoPathfinder or an ordinary guide."
            )
        response = objective.response(minimum, hessian)  # as wide as the posterior, which the mean field need not be
        check_proper(density, response, -hessian[: density.dim, : density.dim], float(density(response.loc[None])))
        return stack_gaussians([response if self._linear_response else objective.mean_field(minimum)])


class _Objective:
    """Minus the ELBO of a mean field at fixed draws, as a function of ``(loc, log scale)``, shape ``(2 * dim,)``."""

    def __init__(self, density: UnconstrainedDensity, noise: Tensor) -> None:
        self.density, self.noise = density, noise

    def __call__(self, eta: Tensor) -> Tensor:
        loc, log_scale = eta.chunk(2)
        rows = (loc + log_scale.exp() * self.noise).to(self.density.dtype)
        self.density.gradients += len(rows)
        constant = 0.5 * len(loc) * (1 + math.log(2 * math.pi))
        return -self.density(rows).double().mean() - log_scale.sum() - constant

    def value_and_gradient(self, eta: Tensor) -> tuple[float, Tensor]:
        with torch.enable_grad():
            leaf = eta.detach().requires_grad_()
            value = self(leaf)
            (gradient,) = torch.autograd.grad(value, leaf, materialize_grads=True)
        return float(value.detach()), gradient

    def _rows(self, eta: Tensor) -> tuple[Tensor, Tensor]:
        found = [self.value_and_gradient(row) for row in eta]
        return torch.tensor([value for value, _ in found], dtype=torch.float64), torch.stack(
            [gradient for _, gradient in found]
        )

    def curvature(self, eta: Tensor) -> Callable[[Tensor], Tensor]:
        """The Hessian at a point as a map of vectors: one graph, a backward pass for each product."""
        with torch.enable_grad():
            leaf = eta.detach().requires_grad_()
            (gradient,) = torch.autograd.grad(self(leaf), leaf, create_graph=True)

        def product(vector: Tensor) -> Tensor:
            (found,) = torch.autograd.grad(gradient, leaf, vector, retain_graph=True, materialize_grads=True)
            return found

        return product

    def hessian(self, eta: Tensor) -> Tensor | None:
        """The Hessian, ``(2 * dim, 2 * dim)``, from those of the log density at the draws, or ``None`` without any."""
        loc, log_scale = eta.chunk(2)
        moves = log_scale.exp() * self.noise
        _, scores = self.density.value_and_gradient(loc + moves)
        total = torch.diag(torch.cat([torch.zeros_like(loc), (scores * moves).sum(0)]))
        size = max(CHUNK // len(loc), 1)
        for move in moves.split(size):
            each = self.density.hessians(loc + move)
            if each is None:
                return None
            both = torch.cat([torch.ones_like(move), move], 1)
            tiled = each.repeat(1, 2, 2)
            total = total + (both.unsqueeze(2) * tiled * both.unsqueeze(1)).sum(0)
        return -total / len(moves)

    def minimise(self, start: Tensor) -> Tensor:
        """The minimum: L-BFGS, then Newton steps.

        :raises ValueError: if there is none.
        """
        precision = torch.finfo(self.density.dtype).eps
        (trail,) = minimise(self._rows, [start], Options(precision=precision), [self._leap])
        end = trail.points[-1]
        if trail.reason == "converged":
            return self._polish(end)
        raise improper(
            f"the objective has no minimum that L-BFGS can find: it ended by {trail.reason!r} after "
            f"{len(trail.points) - 1} iterations at {end.value:.6g} nats"
        )

    def _leap(self, trail: Trail) -> str:
        """End a path by Newton's method, which ill-conditioned objectives want, where it converges."""
        found = [] if len(trail.points) % _LOOK else self._newton(trail.points[-1])
        trail.points += found
        return "converged" if found else ""

    def _polish(self, end: Point) -> Tensor:
        found = self._newton(end)
        return found[-1].position if found else self._trust_region(end.position)

    def _newton(self, start: Point) -> list[Point]:
        """The way to the minimum with exact Hessians; empty where they are dear, or where it does not converge."""
        if self.density.dim > MOST_DIMENSIONS:
            return []
        return newton(self._rows, self.hessian, start, torch.finfo(self.density.dtype).eps)

    def _trust_region(self, eta: Tensor) -> Tensor:
        from scipy.optimize import minimize  # not at import: it is slow to load

        def function(x: Any) -> tuple[float, Any]:
            value, gradient = self.value_and_gradient(eta.new_tensor(x))
            return value, gradient.cpu().numpy()

        def product(x: Any, vector: Any) -> Any:
            return self.curvature(eta.new_tensor(x))(eta.new_tensor(vector)).cpu().numpy()

        options = {"maxiter": _NEWTON_STEPS, "gtol": 1e-8}
        found = minimize(function, eta.cpu().numpy(), jac=True, hessp=product, method="trust-ncg", options=options)
        return eta.new_tensor(found.x)

    def mean_field(self, eta: Tensor) -> Gaussian:
        """The mean field itself."""
        loc, log_scale = eta.chunk(2)
        dim = len(loc)
        return Gaussian(loc, log_scale.exp(), torch.eye(dim).to(eta), torch.eye(dim).to(eta))

    def response(self, eta: Tensor, hessian: Tensor) -> Gaussian:
        """The Gaussian with the linear-response covariance.

        :raises ValueError: if the Hessian is not positive definite.
        """
        dim = len(eta) // 2
        tril, failed = torch.linalg.cholesky_ex(hessian)
        gaussian = None if bool(failed) else full_gaussian(eta[:dim], torch.cholesky_inverse(tril)[:dim, :dim])
        if gaussian is None:
            raise improper("the Hessian of the objective is not positive definite at its minimum")
        return gaussian
