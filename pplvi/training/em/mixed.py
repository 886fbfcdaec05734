"""The complete-data problem of EM with local discrete latents, and continuous ones that are conjugate given them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro.infer.autoguide import init_to_sample
from torch import Tensor

from pplvi.guides.conjugate.draws import draw_block
from pplvi.guides.conjugate.families import BlockFamily
from pplvi.guides.conjugate.keeping import constants_of, new_plates
from pplvi.guides.conjugate.reading import Reading
from pplvi.guides.conjugate.shapes import Structure
from pplvi.programs.density import outside_of_handlers
from pplvi.programs.running import plain_run
from pplvi.programs.sites import kind_of, sample_sites
from pplvi.programs.state import preserved_rng
from pplvi.training.em.complete import Counts
from pplvi.training.em.conditioned import ConditionedProgram, LocalLatents
from pplvi.training.em.conjugate import RecordedProblem, check_exact, joint_blocks
from pplvi.training.em.starts import clustered, random_elements
from pplvi.types import Call, Program

_SHARES = "p(z | x)"


class ConjugateMixture:
    """A program given each joint value of its discrete latents.

    :raises ValueError: for discrete latents that are not local, and for continuous ones without a closed form.
    """

    def __init__(self, model: Program, call: Call) -> None:
        with torch.no_grad(), preserved_rng():
            self.local = LocalLatents.of(model, call)
            values = self.local.values()
            joint = joint_blocks(pyro.condition(model, data=values[0]), call)
            options: Any = (joint, init_to_sample, _check)
            self.components = [ConditionedProgram(model, call, self.local, value, *options) for value in values]

    def posterior(self, *canonical: Tensor) -> tuple[Tensor, ...]:
        """The posterior of each component, ``log p(x_n, z_n = k)`` (nats), ``(components, *elements)``."""
        found: list[Tensor] = []
        table, left = [], list(canonical)
        with torch.no_grad():
            for component in self.components:
                own, left = left[: len(component.names)], left[len(component.names) :]
                field = component.again(own)
                found += field.swept(*own)[:-1]
                table.append(component.log_joint(field))
        return (*found, torch.stack(table))

    @property
    def canonical(self) -> list[Tensor]:
        """Parameters of the distributions of all components."""
        return [value for component in self.components for value in component.field.canonical]

    @property
    def names(self) -> list[str]:
        """Of these."""
        return [f"{i} {name}" for i, component in enumerate(self.components) for name in component.names]

    def place(self, canonical: Any) -> None:
        """Put all components there."""
        left = iter(canonical)
        for component in self.components:
            component.field.place([next(left) for _ in component.names])


def _check(reading: Reading) -> None:
    if cut := reading.subsampled():
        raise ValueError(
            f"plates {[*cut]} are subsampled, so that log p(x) would change by itself: expected whole ones."
        )
    check_exact(reading)


class MixedData(RecordedProblem):
    r"""A program with discrete and continuous latents, at fixed arguments.

    .. math:: \log p(x) = \sum_n \log \sum_k p(x_n, z_n = k), \qquad
        Q(\theta) = \sum_{nk} p(z_n = k \mid x_n) \, E_{p(h \mid x_n, z_n = k)}[\log p_\theta(x_n, z_n = k, h)]

    :raises ValueError: see :class:`ConjugateMixture`.

    Source: Ghahramani & Hinton (1996), "The EM algorithm for mixtures of factor analyzers".
    """

    def __init__(self, model: Program, call: Call) -> None:
        super().__init__(model, call)
        self.mixture = ConjugateMixture(model, call)

    @torch.no_grad()
    def expect(self, instead: Mapping[str, Tensor] | None = None) -> tuple[float, Counts]:
        """The log evidence (nats), probabilities of the components, and the posteriors given them.

        :param instead: those of another distribution, which is taken in its place.
        """
        if instead is not None:
            return math.nan, dict(instead)
        *canonical, table = self.recorded("E", self.mixture.posterior, self.mixture.canonical)
        self.mixture.place(canonical)
        return float(table.logsumexp(0).sum()), self._counts(table.softmax(0))

    def _counts(self, shares: Tensor) -> Counts:
        return {_SHARES: shares, **dict(zip(self.mixture.names, self.mixture.canonical, strict=True))}

    def expected_log_joint(self, counts: Mapping[str, Tensor]) -> Tensor:
        """``Q`` at the present parameters, a scalar with its gradient, in nats."""
        shares, *left = (value.detach() for value in counts.values())
        parts = []
        for component, share in zip(self.mixture.components, shares, strict=True):
            own, left = left[: len(component.names)], left[len(component.names) :]
            value: Any = sum(component.expected(component.again(own)).values())
            parts.append((share * value.masked_fill(share == 0, 0.0)).sum())
        return torch.stack(parts).sum()

    @torch.no_grad()
    def tells_apart(self) -> bool:
        """Whether, for each discrete latent, the data have other densities under its values."""
        *_, table = self.mixture.posterior(*self.mixture.canonical)
        local, prior = self.mixture.local, []
        for component in self.mixture.components:
            values = component.expected(component.field)
            prior.append(torch.stack([values[name] for name in local.sites]).sum(0))
        seen = (table - torch.stack(prior)).reshape(*local.sizes, *local.shape)
        return all(not torch.allclose(seen, seen.mean(d, keepdim=True)) for d in range(len(local.sizes)))

    @torch.no_grad()
    def start(self, kind: str) -> Counts:
        """Posteriors around draws of the prior, and components from k-means of what is observed, or random ones."""
        self.mixture = ConjugateMixture(self.model, self.call)
        local, number = self.mixture.local, len(self.mixture.components)
        site = next(iter(local.sites.values()))
        if kind == "kmeans":
            seen = [s for _, s in sample_sites(plain_run(self.model, *self.call).model) if s["is_observed"]]
            logits = clustered(site, seen, number)
        else:
            logits = random_elements(site, number)
        like = self.mixture.canonical[0]
        return self._counts(logits.T.reshape(number, *local.shape).to(like).softmax(0))


class MixedLatents:
    """The exact posterior of a program's latents at the present values of its parameters, as a guide.

    :param model: the program.
    """

    def __init__(self, model: Program) -> None:
        self.model = model
        self.closed: list[str] = []
        self.searched: list[str] = []
        self.collapsed = ""

    def __call__(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """Draw every latent: a joint value of the discrete ones, then the others given it."""
        mixture, table = self._found(args, kwargs)
        local, first = mixture.local, mixture.components[0]
        structure = Structure.of(first.field.reading)
        plates = new_plates([*local.plates, *(p for s in structure.sites.values() for p in s.plates)])
        drawn, which = _draw_discrete(table, local, plates)
        for block in first.field.families:
            drawn |= draw_block(block, _given(which, mixture, block), structure, plates)
        return drawn

    def marginals(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """Posterior probabilities of the values of each discrete latent given the data, ``(*plates, values)``.

        Arguments are those of the model; the parameters are those in Pyro's store.
        """
        mixture, table = self._found(args, kwargs)
        sizes = mixture.local.sizes
        joint = table.softmax(0).reshape(*sizes, *table.shape[1:])
        others = [[e for e in range(len(sizes)) if e != d] for d in range(len(sizes))]
        summed = [joint.sum(rest) if rest else joint for rest in others]
        return {name: probs.movedim(0, -1) for name, probs in zip(mixture.local.sites, summed, strict=True)}

    def _found(self, args: Any, kwargs: Any) -> tuple[ConjugateMixture, Tensor]:
        with outside_of_handlers(), torch.no_grad():
            mixture = ConjugateMixture(self.model, (args, kwargs))
            *canonical, table = mixture.posterior(*mixture.canonical)
            mixture.place(canonical)
        return mixture, table


def _draw_discrete(table: Tensor, local: LocalLatents, plates: Mapping[str, Any]) -> tuple[dict[str, Tensor], Tensor]:
    """Each discrete site given those before; their values, and which joint value that is."""
    left = table.movedim(0, -1).unsqueeze(-2)  # one row for each joint value of the sites before
    which = torch.zeros((), dtype=torch.long, device=table.device)
    drawn = {}
    for name, site in local.sites.items():
        size = len(local.supports[name])
        left = left.reshape((*left.shape[:-2], -1, size, left.shape[-1] // size))
        logits = left.logsumexp(-1)
        row = which.reshape((*(1,) * (len(local.shape) - which.dim()), *which.shape))
        places = _places(local.shape, table.device)
        with ExitStack() as stack:
            for plate in local.plates:
                stack.enter_context(plates[plate.name])
            drawn[name] = pyro.sample(name, _law(site, logits[(*places, row)]))
        index = drawn[name].argmax(-1) if site["fn"].event_dim else drawn[name].long()
        which = which * size + index
        left = left.reshape((*left.shape[:-3], -1, left.shape[-1]))
    return drawn, which


def _law(site: Any, logits: Tensor) -> Any:
    kind, dtype = kind_of(site["fn"]), site["value"].dtype
    logits = logits.to(dtype) if dtype.is_floating_point else logits
    if kind == "Bernoulli":
        return dist.Bernoulli(logits=logits[..., 1] - logits[..., 0])
    return dist.OneHotCategorical(logits=logits) if kind == "OneHotCategorical" else dist.Categorical(logits=logits)


def _given(which: Tensor, mixture: ConjugateMixture, block: str) -> BlockFamily:
    """The distribution of a block given the component of each element, with any draws on the left."""
    families = [component.field.families[block] for component in mixture.components]
    dims = mixture.components[0].dims(block)
    batch = max((-d for d in dims if d is not None), default=0)
    which = which.reshape((*(1,) * (batch - which.dim()), *which.shape))
    lead = which.dim() - batch
    kept = [d for d in dims if d is not None]
    rest = [d for d in range(-batch, 0) if d not in kept]  # of size one
    ordered = which.permute((*range(lead), *(which.dim() + d for d in (*kept, *rest))))
    sizes = iter(ordered.shape[lead:])
    ordered = ordered.reshape((*ordered.shape[:lead], *(1 if d is None else next(sizes) for d in dims)))
    found = {}
    for name in families[0].canonical:
        values = torch.stack([family.canonical[name] for family in families])
        own = values.shape[1 : 1 + len(dims)]
        found[name] = values[(ordered, *_places(own, which.device))]
    return type(families[0]).revived(found, **constants_of(families[0]))


def _places(sizes: Sequence[int], device: torch.device) -> list[Tensor]:
    """Indices of every place of an array, which broadcast against each other."""
    return [torch.arange(n, device=device).reshape((n, *(1,) * (len(sizes) - 1 - i))) for i, n in enumerate(sizes)]
