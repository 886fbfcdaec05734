"""The complete-data problem of EM with continuous latents, whose exact posterior is in closed form."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import accumulate
from typing import Any

import torch
from pyro.infer.autoguide import init_to_sample
from torch import Tensor

from pplvi.compile import backends
from pplvi.compile.broadcasting import without_repetition
from pplvi.compile.tracing import Untraceable, record
from pplvi.guides.conjugate.ascent import BlockMeanField, started
from pplvi.guides.conjugate.auto import AutoConjugate
from pplvi.guides.conjugate.program import read_program
from pplvi.guides.conjugate.reading import Reading
from pplvi.programs.running import isolated, plain_run
from pplvi.programs.sites import latent_sites
from pplvi.programs.state import preserved_rng
from pplvi.training.em.complete import Counts, ParameterLeaves
from pplvi.types import Call, Program


class ConjugateLatents(AutoConjugate):
    """The exact posterior of a program's latents at the present values of its parameters.

    :param model: the program.
    :param blocks: normal sites that depend on each other given the data.
    """

    def __init__(self, model: Program, blocks: Sequence[Sequence[str]] = ()) -> None:
        super().__init__(model, blocks=blocks)
        self.closed: list[str] = []
        self.searched: list[str] = []
        self.collapsed = ""


class ConjugateData(ParameterLeaves):
    r"""A program with continuous latents whose exact posterior is in closed form, at fixed arguments.

    ``Q`` is the expected log density of every site under that posterior, by the expectations of
    :class:`pplvi.AutoConjugate`; what it costs to read the program again at other parameters is saved by a recording.

    :param guide: of the program; its blocks are set to the sites that depend on each other given the data.
    :raises ValueError: for latents without a closed form, and for a posterior that is no product of blocks.
    """

    def __init__(self, model: Program, guide: ConjugateLatents, call: Call) -> None:
        super().__init__(model, call)
        guide.blocks = self.joint = tuple(joint_blocks(model, call))
        with torch.no_grad(), preserved_rng():
            self.field = started(read_program(model, *call, init=init_to_sample, joint=self.joint))
        if cut := self.field.reading.subsampled():
            raise ValueError(
                f"plates {[*cut]} are subsampled, so that log p(x) would change by itself: expected whole ones."
            )
        _check_exact(self.field.reading)
        self._programs: dict[str, Any] = {}

    def _read(self) -> Reading:
        """The program at the present parameters; where its latents are shown does not matter."""
        values = {site: found.start.to(found.dtype) for site, found in self.field.reading.latents.items()}
        return read_program(self.model, *self.call, init=lambda site: values[site["name"]], joint=self.joint)

    @property
    def sites(self) -> list[str]:
        """Names of the latents."""
        return list(self.field.reading.latents)

    def random_start(self) -> Counts:
        """A distribution of the latents around a draw of their prior."""
        reading = read_program(self.model, *self.call, init=init_to_sample, joint=self.joint)
        return _named(started(reading))

    @torch.no_grad()
    def expect(self, instead: Mapping[str, Tensor] | None = None) -> tuple[float, Counts]:
        """The log evidence (nats), and the parameters of the posterior by block.

        :param instead: those of another distribution, which is taken in its place.
        """
        names = list(_named(self.field))
        if instead is not None:
            self.field.place([instead[name] for name in names])
            return math.nan, dict(instead)
        *canonical, evidence = self._run("E", self._posterior, self.field.canonical)
        self.field.place(canonical)
        return float(evidence), dict(zip(names, canonical, strict=True))

    def _posterior(self, *canonical: Tensor) -> tuple[Tensor, ...]:
        """Blocks at their maximisers, and the bound, which is the log evidence."""
        with torch.no_grad():
            return BlockMeanField(self._read(), self.field.families).swept(*canonical)

    def expected_log_joint(self, counts: Mapping[str, Tensor]) -> Tensor:
        """``Q`` at the present parameters, a scalar with its gradient, in nats."""
        field = BlockMeanField(self._read(), self.field.families)
        field.place([value.detach() for value in counts.values()])
        parts: list[Any] = [(field.marginals[f.name] * f.at(field.state)).sum() for f in field.reading.factors]
        return torch.stack(parts).sum()

    def value_and_gradient(self, counts: Mapping[str, Tensor], leaves: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Minus ``Q``, and its gradient in these leaves as a vector."""

        def both(*values: Tensor) -> tuple[Tensor, Tensor]:
            return super(ConjugateData, self).value_and_gradient(dict(zip(counts, values, strict=True)), leaves)

        names = [name for name, leaf in self.leaves.items() if any(leaf is other for other in leaves)]
        loss, gradient = self._run(f"M {names}", both, list(counts.values()))
        return loss, gradient

    def _run(self, name: str, function: Callable[..., tuple[Tensor, ...]], given: Sequence[Tensor]) -> Any:
        """A function of tensors and the present parameters, recorded the first time."""
        flat = torch.cat([leaf.detach().flatten() for leaf in self.leaves.values()])
        inputs = (flat, *(value.detach() for value in given))
        if name not in self._programs:
            starts = accumulate((leaf.numel() for leaf in self.leaves.values()), initial=0)
            places = {id(leaf): (start, leaf) for start, leaf in zip(starts, self.leaves.values(), strict=False)}
            self._programs[name] = _recorded(lambda _, *values: function(*values), inputs, places)
        with torch.no_grad():
            return self._programs[name](*inputs)


def _recorded(
    function: Callable[..., tuple[Tensor, ...]], inputs: Sequence[Tensor], places: Mapping[int, tuple[int, Tensor]]
) -> Callable[..., tuple[Tensor, ...]]:
    """The function as one graph; itself for programs that look at their parameters."""
    try:
        with backends.uncollected():
            traced = record(function, inputs, places)
            graph = without_repetition(traced.graph, (*inputs, *traced.constants))
    except Untraceable:
        return function
    return partial(_replayed, graph, traced.constants)


def _replayed(graph: Program, constants: Sequence[Tensor], *inputs: Tensor) -> tuple[Tensor, ...]:
    found: tuple[Tensor, ...] = graph(*inputs, *constants)
    return found


def _named(field: BlockMeanField) -> Counts:
    names = [f"{block}:{name}" for block, family in field.families.items() for name in family.canonical]
    return dict(zip(names, field.canonical, strict=True))


def has_continuous(model: Program, call: Call) -> bool:
    """Whether a program has latents that cannot be enumerated."""
    latents = latent_sites(plain_run(model, *call).model)
    return any(not site["fn"].has_enumerate_support for site in latents.values())


def joint_blocks(model: Program, call: Call) -> list[tuple[str, ...]]:
    """The normal sites of a program in groups that depend on each other given the data."""
    with isolated():
        first = read_program(model, *call, init=init_to_sample)
    normal = [site for block in first.layouts for site in first.blocks[block]]
    groups = [{site} for site in normal]
    links = [set(first.blocks[b]) for b in first.layouts] + [f.expected.sites & {*normal} for f in first.factors]
    for link in links:
        touched = [g for g in groups if g & link]
        groups = [g for g in groups if not g & link] + ([set().union(*touched)] if touched else [])
    return [tuple(site for site in normal if site in group) for group in groups]


def _check_exact(reading: Reading) -> None:
    block_of = {site: block for block, sites in reading.blocks.items() for site in sites}
    for factor in reading.factors:
        sites = {s for s in factor.expected.sites if s in block_of}
        if len({block_of[s] for s in sites}) > 1 or (factor.summed and sites):
            raise ValueError(
                f"site {factor.name!r} depends on {sorted(sites)} at once, whose exact posterior is no product of "
                "distributions: expected normal latents, or latents that are independent given the data. Use "
                "fit(model, AutoConjugate) with priors for the parameters, or SVI with a guide."
            )
