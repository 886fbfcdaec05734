"""The lasso problem behind sites of a program with Laplace priors: two gradients of its log density and a curvature."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from pplvi.guides.search.lasso import Lasso
from pplvi.programs.running import plain_run
from pplvi.programs.single import run_alone
from pplvi.programs.sites import base_distribution, is_deterministic, latent_sites, sample_sites, site_plates
from pplvi.programs.state import preserved_rng
from pplvi.programs.traces import Run
from pplvi.types import Program

_MOST = 2**26  # entries of all Gram matrices


class LassoReading:
    """The lasso problem behind sites of a program.

    :param model: the program.
    :param names: the sites.
    :ivar plain: a run of the program.
    :ivar lasso: the problem, in coordinates around the priors' locations.
    :ivar gap_shape: the plates whose elements are problems of their own.
    :raises ValueError: where there is none.
    """

    def __init__(self, model: Program, names: Sequence[str], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        self.model, self.names, self.call = model, tuple(names), (args, kwargs)
        self.plain = plain_run(model, args, kwargs)
        sites = self._checked()
        shapes = {n: tuple(s["value"].shape) for n, s in sites.items()}
        batches = {shapes[n][: len(shapes[n]) - s["fn"].event_dim] for n, s in sites.items()}
        with torch.no_grad():
            fresh = self._at({n: s["value"].detach() for n, s in sites.items()})[0].model.nodes
            priors = {n: base_distribution(fresh[n]["fn"]) for n in self.names}
            self.loc = {n: prior.loc.detach().expand(shapes[n]).clone() for n, prior in priors.items()}
            scales = {n: torch.as_tensor(fresh[n]["scale"]) / prior.scale.detach() for n, prior in priors.items()}
            self.penalty = {n: scale.expand(shapes[n]) for n, scale in scales.items()}
        self.gap_shape = batches.pop() if len(batches) == 1 else ()
        self.lasso = self._read()

    def _checked(self) -> dict[str, Any]:
        latents: dict[str, Any] = latent_sites(self.plain.model)
        if set(latents) != {*self.names}:
            raise ValueError(
                f"the model has the latent sites {sorted(latents)}: expected {', '.join(map(repr, self.names))} alone. "
                "Make the others pyro.param, condition on them, or name all sites of codes by sites=."
            )
        for name, site in latents.items():
            if (kind := type(base_distribution(site["fn"])).__name__) != "Laplace":
                raise ValueError(f"site {name!r} has a {kind} prior: expected Laplace, whose mode is sparse.")
            if cut := [p.name for p in site_plates(site) if p.size != p.full_size]:
                raise ValueError(f"plates {cut} are subsampled: expected whole plates, or minibatches as arguments.")
        return {name: latents[name] for name in self.names}

    # ------------------------------------------------------------------ between sites and rows

    def packed(self, values: Mapping[str, Tensor], rows: int) -> Tensor:
        """Values of the sites, side by side in so many rows."""
        return torch.cat([values[name].reshape(rows, -1) for name in self.names], -1)

    def unpacked(self, rows: Tensor) -> dict[str, Tensor]:
        """The inverse of :meth:`packed`."""
        parts = rows.split([self.loc[name].numel() // len(rows) for name in self.names], -1)
        return {name: part.reshape(self.loc[name].shape) for name, part in zip(self.names, parts, strict=True)}

    def rows_of(self, codes: Mapping[str, Tensor]) -> Tensor | None:
        """Codes as rows, where they are of the same shapes."""
        if any(codes[name].shape != self.loc[name].shape for name in self.names):
            return None
        return self.packed({name: codes[name] - self.loc[name] for name in self.names}, len(self.lasso.linear))

    def codes_of(self, rows: Tensor) -> dict[str, Tensor]:
        """The inverse of :meth:`rows_of`."""
        return {name: self.loc[name] + value for name, value in self.unpacked(rows).items()}

    # ------------------------------------------------------------------ reading

    def _at(self, codes: Mapping[str, Tensor]) -> tuple[Run, Tensor]:
        args, kwargs = self.call
        run = run_alone(self.model, args, kwargs, num_particles=1, nesting=self.plain.nesting, values=dict(codes))
        rest = [(n, s) for n, s in sample_sites(run.model) if n not in self.names and not is_deterministic(s)]
        like = next(iter(codes.values()))
        return run, sum((run.site_log_prob(n, s).sum() for n, s in rest), like.new_zeros(()))

    @torch.enable_grad()
    def _slope(self, shift: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], list[Tensor]]:
        """The gradient of the rest's log density, at the locations moved by ``shift``, and the leaves."""
        leaves = {name: shift[name].detach().clone().requires_grad_() for name in self.names}
        total = self._at({name: self.loc[name] + leaf for name, leaf in leaves.items()})[1]
        found: Sequence[Tensor | None] = [None] * len(leaves)
        if total.requires_grad:
            found = torch.autograd.grad(total, [*leaves.values()], create_graph=True, allow_unused=True)
        if lonely := [name for name, slope in zip(self.names, found, strict=True) if slope is None]:
            raise ValueError(f"no other site depends on {lonely[0]!r}: expected observations of the codes.")
        return dict(zip(self.names, found, strict=True)), [*leaves.values()]  # type: ignore[arg-type]

    def _read(self) -> Lasso:
        slope, leaves = self._slope({name: torch.zeros_like(loc) for name, loc in self.loc.items()})
        with preserved_rng():
            elsewhere = {n: torch.randn(x.shape, dtype=x.dtype, device=x.device) for n, x in self.loc.items()}
        there = {name: slope.detach() for name, slope in self._slope(elsewhere)[0].items()}
        for rows in dict.fromkeys((math.prod(self.gap_shape), 1)):
            for shared in (True, False):
                found = self._candidate(slope, leaves, rows, shared)
                if found is not None and self._fits(found, self.packed(elsewhere, rows), self.packed(there, rows)):
                    self.gap_shape = self.gap_shape if rows == math.prod(self.gap_shape) else ()
                    return found
        raise ValueError(
            f"the log density of the rest is not a concave quadratic in site {', '.join(map(repr, self.names))}: "
            "expected Gaussian observations of something linear. Use AutoDelta, or a guide with a density."
        )

    def _candidate(
        self, slope: Mapping[str, Tensor], leaves: Sequence[Tensor], rows: int, shared: bool
    ) -> Lasso | None:
        """The problem, if rows do not interact and (``shared``) have one curvature."""
        width = sum(leaf.numel() for leaf in leaves) // rows
        if (width**2 if shared else rows * width**2) > _MOST:
            return None
        gram = self._shared(slope, leaves, rows, width) if shared else self._own(slope, leaves, rows, width)
        linear, penalty = self.packed(slope, rows).detach(), self.packed(self.penalty, rows)
        same = bool((penalty == penalty[:1]).all())
        return Lasso((gram + gram.mT) / 2, linear, penalty[0] if same else penalty)

    def _shared(self, slope: Mapping[str, Tensor], leaves: Sequence[Tensor], rows: int, width: int) -> Tensor:
        """A column of the matrix from each row, as many backward passes as it takes to have them all."""
        like = leaves[0]
        gram, first = like.new_zeros(width, width), 0
        while first < width:
            columns = torch.arange(first, first + rows, device=like.device) % width
            directions = torch.nn.functional.one_hot(columns, width).to(like)
            gram[columns] = self._curvature(slope, leaves, directions)
            first += rows
        return gram

    def _own(self, slope: Mapping[str, Tensor], leaves: Sequence[Tensor], rows: int, width: int) -> Tensor:
        eye = torch.eye(width).to(leaves[0])
        return torch.stack([self._curvature(slope, leaves, e.expand(rows, width)) for e in eye], -2)

    def _curvature(self, slope: Mapping[str, Tensor], leaves: Sequence[Tensor], directions: Tensor) -> Tensor:
        along = self.unpacked(directions)
        curved = {name: value for name, value in slope.items() if value.requires_grad}
        if not curved:
            return torch.zeros_like(directions)
        found = torch.autograd.grad(
            [*curved.values()], leaves, [along[name] for name in curved], retain_graph=True, materialize_grads=True
        )
        return -self.packed(dict(zip(self.names, found, strict=True)), len(directions))

    def _fits(self, problem: Lasso, elsewhere: Tensor, there: Tensor) -> bool:
        gap = problem.linear - problem.product(elsewhere) - there
        close = (1e-8 if gap.dtype == torch.float64 else 1e-3) * (1 + float(there.abs().max()))
        values = torch.linalg.eigvalsh(problem.gram)
        concave = bool((values[..., 0] >= -close * (1 + values[..., -1])).all() & (values[..., -1] > 0).all())
        return concave and bool((gap.abs() <= close).all())
