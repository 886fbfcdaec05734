"""Coordinate ascent variational inference as a guide: :class:`AutoConjugate`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, Self

import pyro
import torch
from pyro.infer.autoguide import init_to_sample
from pyro.infer.autoguide.guides import prototype_hide_fn
from torch import Tensor

from pplvi.guides.conjugate import fallbacks  # noqa: F401  registers them
from pplvi.guides.conjugate.ascent import BlockMeanField, ascend_bound, settle_locals, started
from pplvi.guides.conjugate.complete import check_conditional, complete_conditional
from pplvi.guides.conjugate.draws import auxiliary_name, draw_block, draw_site, is_across
from pplvi.guides.conjugate.enumerated import EnumeratedConditional, conditionals, draw_enumerated
from pplvi.guides.conjugate.families import BlockFamily
from pplvi.guides.conjugate.keeping import are_same, checked_blocks, constants_of, key_of, named_values, new_plates
from pplvi.guides.conjugate.program import read_program
from pplvi.guides.conjugate.quantiles import medians, site_quantiles
from pplvi.guides.conjugate.rates import RobbinsMonro
from pplvi.guides.conjugate.reading import Reading
from pplvi.guides.conjugate.sampled import SampledMeanField, ascend_by_draws, by_draws
from pplvi.guides.conjugate.shapes import Structure
from pplvi.guides.conjugate.trained import TRAINED, GuideFactory, TrainedFactor, check_families, of_guides, one_draw
from pplvi.guides.owned import OwnedGuide
from pplvi.guides.recording import Recorder
from pplvi.guides.search.base import Search
from pplvi.kinds.checked import checked
from pplvi.kinds.kinds import Count, Fraction, Seed
from pplvi.programs.density import outside_of_handlers
from pplvi.programs.errors import explained
from pplvi.programs.sites import Plate, site_plates
from pplvi.programs.state import preserved_rng, random_state
from pplvi.programs.summing import is_summed
from pplvi.types import Program

__all__ = ["AutoConjugate"]

_PREFIX, _WALK = "q:", "walk:"
_RECENT = 4.0  # how much the average of a walk is of its last steps: they count as step**_RECENT
_TRACE = "trace_of_bound"


@checked
class AutoConjugate(OwnedGuide, Search):
    r"""Coordinate ascent for conditionally conjugate models, on the program as it is written.

    The mean field :math:`q(z) = \prod_i q_i(z_i)` is updated block by block to its maximiser

    .. math:: q_i \propto \exp E_{q_{-i}}[\log p(x, z)], \qquad
        \mathcal{L} = E_q[\log p(x, z)] + H(q) \le \log p(x)

    (nats), so that the bound never falls; sweeps end where it stands still. Natural parameters are gradients of the
    expected log joint in the mean parameters, which is found in closed form: the program runs once with symbols in the
    place of its latent sites. Known are Normal and MultivariateNormal (latent means under linear maps and gathers;
    latent precisions: Gamma, InverseGamma, Wishart), Gamma, Exponential, Beta, Dirichlet, and observed Poisson,
    Bernoulli, Binomial, Geometric, Categorical and Multinomial. Elements of a normal site that interact share a joint
    distribution, found from the program; sites are independent unless ``blocks`` says otherwise. Discrete sites have
    their exact joint distribution given the rest (mixtures, topic models, Markov chains).

    There is nothing to train: the first call runs it, :meth:`run` runs it again. ``bounds`` has the bound at the start
    and after each sweep. Sites that the model enumerates (``infer={"enumerate": "parallel"}``) are left to be summed
    out, which makes the bound of :class:`pplvi.ELBO` tighter; other discrete sites are drawn.

    Source: Goodfellow, Bengio & Courville (2016), "Deep Learning", equation 19.56; Winn & Bishop (2005), "Variational
    message passing"; Hoffman et al. (2013), "Stochastic variational inference", for minibatches.

    :param model: a Pyro model; its arguments are those of the guide.
    :param blocks: normal sites that share a joint distribution, ``[("mu", "beta")]``; a single one, ``[("b",)]``, is
        joint across its plates too, where its elements interact.
    :param fallback: sites without a closed form, and how they are updated: ``"cvi"``, a normal distribution (of the
        logarithm, for positive sites) by natural gradients; ``"laplace"``, at the mode with the curvature there;
        ``"delta"``, a point; a guide family, ``{"w": AutoNormal}`` or ``{("u", "v"): lambda model: ...}``, whose factor
        is trained by gradients of the same bound between sweeps. That takes whatever is conjugate given these sites;
        expectations are means over draws, and ``bounds`` estimates by 32 of them, the last one by 1,024.
    :param conditional: sites that are drawn given all others from their exact conditional distribution, in place of the
        mean field's, which brings the guide nearer to the posterior than ``bounds`` say (Hoffman & Blei 2015): a
        precision given the coefficients. Medians and quantiles stay those of the mean field.
    :param rate: step sizes for minibatches (``fit(..., data=loader)``, plates with ``subsample_size``). The guide has
        the average of the steps' natural parameters, the last ones above all (Shamir & Zhang 2013): less noise.
    :param init_loc_fn: the first value of each site, any of Pyro's ``init_to_*``.
    :param max_sweeps: the most sweeps.
    :param tolerance: relative gain of the bound below which sweeps end.
    :param seed: makes runs reproducible and leaves the global random state as it was.
    :raises ValueError: for arguments out of range; on the first run, for sites without a closed form, by site and
        operation, plates whose elements interact, and subsampled plates without a ``rate``.

    >>> import pyro.distributions as dist
    >>> def model(y):
    ...     tau = pyro.sample("tau", dist.Gamma(2.0, 2.0))
    ...     mu = pyro.sample("mu", dist.Normal(0.0, 10.0))
    ...     with pyro.plate("data", len(y)):
    ...         pyro.sample("y", dist.Normal(mu, tau.rsqrt()), obs=y)
    >>> y = torch.tensor([1.2, 0.7, 1.9, 1.4])
    >>> guide = AutoConjugate(model, seed=0).run(y)
    >>> round(guide.bounds[-1], 4), round(guide.median(y)["mu"].item(), 2)
    (-7.1833, 1.3)
    """

    _leaves_out_summed = True  # the model sums out what it enumerates

    def __init__(
        self,
        model: Program,
        *,
        blocks: Sequence[str | Sequence[str]] = (),
        fallback: Mapping[str | tuple[str, ...], str | GuideFactory] | None = None,
        conditional: Sequence[str] = (),
        rate: RobbinsMonro | Callable[[int], float] | None = None,
        init_loc_fn: Callable[..., Any] = init_to_sample,
        max_sweeps: Count = 1000,
        tolerance: Fraction = 1e-10,
        seed: Seed | None = None,
    ) -> None:
        super().__init__(model)
        self.blocks, self.rate, self.conditional = checked_blocks(blocks), rate, tuple(conditional)
        self.fallback = {str(site): how for site, how in (fallback or {}).items() if isinstance(how, str)}
        self._makers: Mapping[tuple[str, ...], Any] = check_families(fallback or {}, rate, self.conditional)
        self._trained: tuple[TrainedFactor, ...] = ()
        self._init_loc_fn, self._seed = init_loc_fn, seed
        self.max_sweeps, self.tolerance = max_sweeps, float(tolerance)
        self._structure: Structure | None = None
        self._kinds: dict[str, tuple[type[BlockFamily], dict[str, Any]]] = {}
        self._drawn: tuple[str, ...] = ()
        self._locals: tuple[str, ...] = ()
        self._around: list[Plate] = []
        self._last: tuple[Any, BlockMeanField] | None = None
        self.recorder: Recorder | None = None

    # ------------------------------------------------------------------ running

    def run(self, *args: Any, **kwargs: Any) -> Self:
        """Sweep until the bound stands still, anew if it ran before.

        :returns: the guide itself.
        :raises ValueError: see the class.
        """
        with random_state(self._seed), outside_of_handlers(), explained():
            self._trained = self._made(args, kwargs)
            reading = self._read(args, kwargs)
            if (parts := reading.subsampled()) and self.rate is None:
                raise ValueError(
                    f"AutoConjugate got plate {parts[0]!r}, which is subsampled: expected all data at once, or "
                    "rate=pplvi.RobbinsMonro(10, 0.8) and minibatches, fit(..., data=loader)."
                )
            if self.rate is not None:
                return self.step(*args, **kwargs)
            field = self._averaged(started(reading, named_values(self._init_loc_fn)), args, kwargs)
            if isinstance(field, SampledMeanField):
                bounds = ascend_by_draws(field, most=self.max_sweeps, tolerance=self.tolerance)
            else:
                bounds = ascend_bound(field, most=self.max_sweeps, tolerance=self.tolerance, recorder=self.recorder)
            self._keep(field, bounds)
        return self

    def step(self, *args: Any, **kwargs: Any) -> Self:
        """One natural-gradient step on a minibatch: local blocks to their maximisers, the others by the rate.

        :returns: the guide itself.
        :raises ValueError: see the class; a guide without a ``rate``.
        """
        if self.rate is None:
            raise ValueError(
                "step is for minibatches: expected AutoConjugate(model, rate=pplvi.RobbinsMonro(10, 0.7))."
            )
        with random_state(None), outside_of_handlers(), explained():
            field = self._field(self._read(args, kwargs), _WALK)
            bounds = [*self.bounds, settle_locals(field)]
            rate = self.rate(len(self.bounds))
            for block in field.families:
                if block not in field.reading.locals():
                    field.update(block, rate)
            self._average(field, len(bounds))
            self._keep(field, bounds)
        return self

    def _average(self, field: BlockMeanField, step: int) -> None:
        """Keep the walk, and go on with the mean field that it averages to in place of it."""
        known = self._families()
        for block, family in list(field.families.items()):
            if block not in field.reading.locals():
                self._keep_block(_WALK, block, family)
                if block in known:
                    known[block].step(tuple(family.canonical.values()), min(1.0, (_RECENT + 1) / (_RECENT + step)))
                    field.families[block] = known[block]

    @property
    def bounds(self) -> list[float]:
        """The bound, nats, at the start and after each sweep; of the minibatch before each step."""
        found = self._buffers.get(_TRACE)
        return [] if found is None else found.tolist()

    def _read(
        self, args: tuple[Any, ...], kwargs: Mapping[str, Any], indices: Mapping[str, Tensor] | None = None
    ) -> Reading:
        values = one_draw(self._trained, (args, kwargs))
        return self._read_at(values, self._init_loc_fn, args=args, kwargs=kwargs, indices=indices)

    def _read_at(self, values: Mapping[str, Tensor], init: Any, *, args: Any, kwargs: Any, indices: Any) -> Reading:
        """The program with the trained sites at these values."""
        model = pyro.condition(self.model, data=dict(values)) if values else self.model
        options: dict[str, Any] = {"joint": self.blocks, "fallback": self.fallback, "indices": indices or {}}
        return read_program(model, args, kwargs, init=init, **options)

    def _averaged(self, field: BlockMeanField, args: Any, kwargs: Any) -> BlockMeanField:
        """The mean field, with expectations over draws of the trained factors if there are any."""
        read = partial(self._read_at, args=args, kwargs=kwargs, indices=None)
        return by_draws(field, self._trained, read, (args, kwargs)) if self._trained else field

    def _made(self, args: Any, kwargs: Any) -> tuple[TrainedFactor, ...]:
        """The trained factors, anew or as they are kept."""
        kept = self._buffers if self._structure is None else {}
        return tuple(TrainedFactor.of(self.model, s, make, (args, kwargs), kept) for s, make in self._makers.items())

    def _field(self, reading: Reading, prefix: str = _PREFIX) -> BlockMeanField:
        """The mean field of a program, with the blocks that are known."""
        field = started(reading, named_values(self._init_loc_fn))
        known = self._families(prefix) if self._structure is not None or self._buffers else {}
        blocks = {b: f for b, f in known.items() if b not in reading.locals()}
        return BlockMeanField(reading, {**field.families, **blocks}) if blocks else field

    def _keep(self, field: BlockMeanField, bounds: list[float]) -> None:
        self._describe(field)
        self.register_buffer(_TRACE, torch.tensor(bounds, dtype=torch.float64))
        for block, family in field.families.items():
            if block not in self._locals:
                self._keep_block(_PREFIX, block, family)
        for factor in self._trained:
            for name, value in factor.kept().items():
                self.register_buffer(name, value)
        self._last = None

    def _keep_block(self, prefix: str, block: str, family: BlockFamily) -> None:
        for name, value in family.canonical.items():
            self.register_buffer(key_of(prefix, block, name), value.detach())

    def _describe(self, field: BlockMeanField) -> None:
        reading = field.reading
        check_conditional(reading, self.conditional)
        drawn = [p for name in reading.drawn for p in site_plates(reading.summed[name])]
        self._around = [*(p for found in reading.latents.values() for p in found.plates), *drawn]
        self._structure, self._drawn, self._locals = Structure.of(reading), reading.drawn, reading.locals()
        self._kinds = {b: (type(f), constants_of(f)) for b, f in field.families.items()}

    def _families(self, prefix: str = _PREFIX) -> dict[str, BlockFamily]:
        """The distributions that are kept: those of the guide, or where its walk is."""
        found = {}
        for block, (kind, facts) in self._kinds.items():
            start = key_of(prefix, block, "")
            names = [name.removeprefix(start) for name in self._buffers if name.startswith(start)]
            if names:
                canonical = {name: self._buffers[start + name] for name in names}
                found[block] = kind.revived({n: v for n, v in canonical.items() if v is not None}, **facts)
        return found

    def _setup_prototype(self, *args: Any, **kwargs: Any) -> None:
        if not self._buffers:
            self.run(*args, **kwargs)
            return
        with preserved_rng(), outside_of_handlers(), explained():  # loaded: the program is only read
            self._trained = self._made(args, kwargs)
            self._describe(started(self._read(args, kwargs)))

    @staticmethod
    def _prototype_hide_fn(msg: Any) -> bool:
        return bool(prototype_hide_fn(msg)) or is_summed(msg)

    # ------------------------------------------------------------------ as a guide

    def forward(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """Draw every latent site of the model; same arguments as the model. The first call sweeps."""
        if self._structure is None:
            self._setup_prototype(*args, **kwargs)
        structure = self._known()
        families: Mapping[str, BlockFamily] = self._families()
        found: Mapping[str, EnumeratedConditional] = {}
        plates = new_plates(self._around)
        if self._drawn or self._locals or self.conditional:
            field = self._local(args, kwargs, plates)
            structure, families = Structure.of(field.reading), field.families
            with outside_of_handlers():
                enumerated = conditionals(field) if self._drawn else {}
            found = {n: c for n, c in enumerated.items() if n in self._drawn}
        drawn: dict[str, Tensor] = {}
        for factor in self._trained:
            drawn |= factor(*args, **kwargs)
        for block, family in families.items():
            if block not in self.conditional:
                drawn |= draw_block(block, family, structure, plates)
        for name in self.conditional:
            fn = complete_conditional(field, name, drawn, structure.sites)
            drawn[name] = draw_site(name, fn, structure.sites[name], plates)
        return drawn | draw_enumerated(found, plates)

    def _local(
        self, args: tuple[Any, ...], kwargs: Mapping[str, Any], plates: Mapping[str, Any] | None = None
    ) -> BlockMeanField:
        """The mean field for these arguments: blocks that are kept, local blocks and enumerated sites given them.

        :param plates: those of the guide, whose minibatch is that of the model.
        """
        indices = {n: p.indices for n, p in (plates or {}).items() if p.subsample_size < p.size}
        key = (*args, *kwargs.values(), *indices.values())
        if self._last is None or not are_same(self._last[0], key):
            with random_state(0), outside_of_handlers():
                field = self._averaged(self._field(self._read(args, kwargs, indices)), args, kwargs)
                settle_locals(field)
            self._last = key, field
        return self._last[1]

    def summary(self) -> str:
        """Where the bound stands, and after how many sweeps or steps."""
        if self.rate is not None:
            return f"{len(self.bounds)} natural-gradient steps on minibatches"
        if self._makers and self.bounds:
            return f"{self.bounds[-1]:.2f} nats by draws after {len(self.bounds) - 1} steps"
        return f"{self.bounds[-1]:.4f} nats after {len(self.bounds) - 1} sweeps" if self.bounds else "not run"

    def terms(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """The bound by terms, nats: ``E[log p]`` of every site, then the entropy of every block.

        :param args: the model's arguments.
        :param kwargs: its keyword arguments.
        :raises ValueError: the guide has not run yet.
        """
        self._known()
        return self._local(args, kwargs).terms()

    def _known(self) -> Structure:
        if self._structure is None:
            raise ValueError("AutoConjugate has not seen the model's arguments yet: call guide.run(*args) first")
        return self._structure

    @torch.no_grad()
    def quantiles(self, quantiles: Sequence[float] | Tensor, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """Marginal quantiles of every element of every continuous latent site, exact but for Wishart sites (drawn).

        :param quantiles: probabilities in ``[0, 1]``, shape ``(Q,)``.
        :returns: ``{site: (Q, *shape of the site)}``.
        :raises ValueError: a probability outside ``[0, 1]``, or the guide has not run yet.
        """
        probs = torch.as_tensor(quantiles, dtype=torch.float64)
        if probs.dim() != 1 or not bool(((probs >= 0) & (probs <= 1)).all()):
            raise ValueError(f"quantiles is {quantiles!r}; expected a flat list of probabilities in [0, 1]")
        found = self._by_site(partial(site_quantiles, probs=probs), args, kwargs)
        return found | of_guides(self._trained, "quantiles", probs, *args, **kwargs)

    @torch.no_grad()
    def median(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """Marginal medians of every continuous latent site; those of a simplex are divided by their sum."""
        return self._by_site(medians, args, kwargs) | of_guides(self._trained, "median", *args, **kwargs)

    def _by_site(self, function: Callable[..., Tensor], args: Any, kwargs: Any) -> dict[str, Tensor]:
        if self._structure is None and self._buffers:
            self._setup_prototype(*args, **kwargs)
        structure = self._known()
        families = self._local(args, kwargs).families if self._locals else self._families()
        return {
            site: function(families[block], site).to(structure.sites[site].dtype)
            for block, sites in structure.blocks.items()
            for site in sites
        }

    def auxiliary_values(self, latents: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Values of auxiliary sites that give these latents: those of normal blocks that are joint across plates.

        :param latents: values of the model's sites.
        """
        structure, found = self._known(), {}
        for block, layout in structure.layouts.items():
            sites = structure.blocks[block]
            if is_across(layout, structure):
                found[auxiliary_name(block)] = torch.cat([layout.row(latents[s], s) for s in sites], -1)
        return found

    # ------------------------------------------------------------------ copies and files

    def __getstate__(self) -> dict[str, Any]:
        own: dict[str, Any] = {"_init_loc_fn": None, "_last": None, "rate": None, "recorder": None}
        made = {"_makers": dict.fromkeys(self._makers), "_trained": (), "_structure": None}
        return {**super().__getstate__(), **own, **(made if self._makers else {})}

    def __deepcopy__(self, memo: dict[int, Any]) -> OwnedGuide:
        self._last, trained, structure = None, self._trained, self._structure
        self._trained, self._structure = (), None if self._makers else structure
        try:
            return super().__deepcopy__(memo)
        finally:
            self._trained, self._structure = trained, structure

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        own = tuple(prefix + start for start in (_PREFIX, _WALK, TRAINED, _TRACE))
        for name in [key.removeprefix(prefix) for key in state_dict if key.startswith(own)]:
            self.register_buffer(name, torch.empty_like(state_dict[prefix + name]))
        self._last, self._structure = None, None if self._makers else self._structure
        super()._load_from_state_dict(state_dict, prefix, *args)
