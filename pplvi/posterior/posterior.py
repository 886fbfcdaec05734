"""Weighted draws of an approximate posterior, and what they say about it.

A :class:`Posterior` holds draws of a trained guide, scored by the guide and by the model. Their importance weights
turn a guide that is near the posterior into exact averages, estimate the evidence, and tell by their tail (Pareto
k-hat) whether the guide is near enough for either. Densities and weights are in nats and have shape
``(num_draws, *batch)``, where ``batch`` are the plates common to every site: with an amortised model every datum has
weights of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal

from pyro.infer.mcmc.api import MCMC
from torch import Tensor

from pplvi.kinds.checked import checked
from pplvi.kinds.kinds import Count, Seed
from pplvi.posterior import looking
from pplvi.posterior.draws import Draws, draw, predict, score
from pplvi.posterior.gathering import ModelCall, facts_of, facts_with_scouts, grown, verdict_of, verdict_on_chains
from pplvi.posterior.leave_one_out import LeftOut, loo
from pplvi.posterior.predictions import observed_as_before, told_how_to_predict
from pplvi.posterior.stacking import repeated, shared, stack
from pplvi.posterior.verdict import Facts, Verdict, is_settled, judge
from pplvi.posterior.weighted import WeightedDraws
from pplvi.programs.calls import checked_call
from pplvi.programs.carrying import WayName
from pplvi.programs.deadline import is_time_over
from pplvi.programs.errors import explained
from pplvi.programs.inputs import check_finite, to_inputs
from pplvi.programs.joint import execute
from pplvi.programs.plates import with_all_data
from pplvi.programs.ranks import Processes, common_seed, join
from pplvi.programs.running import isolated, plain_run
from pplvi.programs.scales import without_scale
from pplvi.programs.sites import batch_sizes, latent_sites
from pplvi.programs.state import random_state
from pplvi.programs.summing import drawing, enumerated_by, leaves_out_summed
from pplvi.programs.traces import Run
from pplvi.programs.ways import Vectorize, named, way_taken
from pplvi.programs.work import Work
from pplvi.types import Call, Program

if TYPE_CHECKING:
    from arviz import ELPDData

_FAR_SEED = 1_000_003
_LEAST = 500  # draws that are made when time is over


@checked
class Posterior(WeightedDraws):
    r"""Draws of a trained guide with the importance weights that correct them.

    .. math:: z_s \sim q, \qquad \log w_s = \log p(x, z_s) - \log q(z_s)

    It takes any guide that was trained in any way, ``pplvi.fit`` or a loop written by hand. Where a site of the guide
    stands under ``poutine.scale``, as in a KL term that is warmed up, densities and weights are those of both programs
    without it; a scale in the model alone is a part of the target. Plates that the programs subsample themselves
    (``subsample_size=``) are whole here, if the arguments hold the data for it.

    Source: Yao, Vehtari, Simpson and Gelman 2018, Yes, but did it work? Evaluating variational inference.

    :param model: the model, a callable with Pyro primitives.
    :param guide: its trained guide.
    :param args: positional arguments of model and guide; the full data, not a minibatch.
    :param kwargs: their keyword arguments.
    :param num_draws: how many draws are taken.
    :param vectorize: the way of running draws, ``"broadcast"``, ``"vmap"`` or ``"loop"`` (``False``); the fastest that
        is right for the programs unless named.
    :param chunk_size: run at most so many draws in one call, to bound the memory; as many as values of the sites of a
        hundred MiB unless given, and all at once where plates are subsampled.
    :param seed: makes the draws reproducible and leaves the global random state as it was; the global state is used
        unless given.
    :param parallel: ``"draws"``: every rank of the process group, or of ``torchrun``, takes a part of the draws, from a
        seed of its own, and all get all of them; every rank has to make the posterior, and nothing after it is shared.
    :raises ValueError: if ``args`` is no tuple, if the model has no latent sites, if model and guide do not fit
        together, if ``num_draws`` or ``chunk_size`` is below 1, if several runs would draw different minibatches, or
        if ranks have different guides or data.

    >>> import pyro, pyro.distributions as dist, torch
    >>> def model(y):
    ...     z = pyro.sample("z", dist.Normal(0.0, 1.0))
    ...     pyro.sample("y", dist.Normal(z, 1.0), obs=y)
    >>> def guide(y):
    ...     pyro.sample("z", dist.Normal(0.25, 0.6))
    >>> posterior = Posterior(model, guide, (torch.tensor(0.5),), num_draws=4000, seed=0)
    >>> bool(posterior.pareto_k < 0.7), round(posterior.log_evidence[0].item(), 2)  # exact: -1.328
    (True, -1.33)
    """

    model: Program
    guide: Program | None
    converged: bool | None = None
    """Whether the training of the guide had converged, where a fit knows."""
    scope: Callable[[], AbstractContextManager[Any]] = nullcontext
    """Where the guide has its parameters, if not in the global store."""
    _source: looking.MoreDraws | None = None
    _pair: tuple[Program, Program]

    @explained()
    def __init__(
        self,
        model: Program,
        guide: Program,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
        *,
        num_draws: Count = 1000,
        vectorize: Vectorize = None,
        chunk_size: Count | None = None,
        seed: Seed | None = None,
        parallel: Literal["draws"] | None = None,
    ) -> None:
        checked_call(args, kwargs, "Posterior(model, guide, (x, y))")
        self._remember(model, guide, args, kwargs, vectorize)
        model, guide = without_scale(model, leaves_out_summed(guide), self.args, self.kwargs)
        self.model, self.guide = model, guide = with_all_data(model, guide, self.args, self.kwargs)
        if names := enumerated_by(guide, self.args, self.kwargs):
            model, guide = drawing(model, names), drawing(guide, names)  # it can be drawn from all the same
        self._pair = model, guide
        with Work() as work:
            run = self._look()
            mark = looking.mark_of(run)
        most = chunk_size or looking.fitting(run, num_draws, self._few, work.widest)
        ranks = join() if parallel == "draws" else Processes()
        seed = common_seed(ranks, seed, (mark, self._call))

        def make(size: int, own: int | None) -> Draws:
            return self._drawn(looking.chunks_of(size, chunk_size, most), own)

        at_a_point = looking.is_at_a_point(run)
        draws = repeated(make(1, seed), num_draws) if at_a_point else shared(ranks, num_draws, seed, make)
        looking.check_latents(draws)
        if not at_a_point and (ranks.size > 1 or (chunk_size is not None and chunk_size < num_draws)):
            looking.check_same_data(draws)
        super().__init__(draws, looking.point_sites(draws, run))
        self._source = looking.MoreDraws(mark, seed or 0, most, looking.bytes_of(run))

    def _look(self) -> Run:
        """A run for inspection, the same as long as the programs and their parameters are."""
        with random_state(0), isolated():
            return execute(*self._pair, self.args, self.kwargs)

    def _few(self, size: int) -> Draws:
        with random_state(0), isolated():
            return draw(*self._pair, self.args, self.kwargs, num_draws=size, vectorize=self.vectorize)

    def _drawn(self, chunks: list[tuple[int, int]], seed: int | None) -> Draws:
        def parts() -> Iterator[Draws]:
            for start, stop in chunks:
                if start >= _LEAST and is_time_over():
                    return
                yield draw(*self._pair, self.args, self.kwargs, num_draws=stop - start, vectorize=self.vectorize)

        with random_state(seed):
            return stack(parts(), chunks[-1][1])

    @property
    def way(self) -> WayName | None:
        """How the programs ran all draws: ``"broadcast"``, ``"vmap"`` or ``"loop"``; ``None`` for chains and one draw.

        One seed draws other numbers in another way: name it (``vectorize=``) to repeat a run on other versions.
        """
        if self.guide is None:
            return None
        return way_taken(*self._pair, self.args, self.kwargs, named(self.vectorize))

    @cached_property
    def pool(self) -> WeightedDraws:
        """These draws and more of the same guide, until as many are effective as these are, at little cost.

        Up to 100,000 draws, 256 MiB and 500 million elements computed, so that a seed has one pool; none where every
        datum has weights of its own, for MCMC, and where the guide's parameters have changed since.
        """
        source = self._source
        if source is None or not self.has_weights or self.draws.batch or not self.is_current:
            return self

        def more(size: int, number: int) -> Draws:
            return self._drawn(looking.chunks_of(size, None, source.chunk), source.seed + _FAR_SEED * number)

        with self.scope():
            return grown(self, more, source.bytes)

    @property
    def is_current(self) -> bool:
        """Whether parameters and data are what they were, as far as one run can tell; true of chains."""
        with self.scope():
            return self._source is None or looking.mark_of(self._look()) == self._source.mark

    @cached_property
    def facts_without_scouts(self) -> Facts | None:
        """What is known before scouts are sent, of the :attr:`pool` where more draws may make them reliable; ``None``
        for chains and weights of single data."""
        if self.is_mcmc or not self.has_weights or self.draws.batch:
            return None
        own = facts_of(self, self.converged)
        return own if is_settled(own) else facts_of(self.pool, self.converged)

    @cached_property
    def facts(self) -> Facts:
        """What the verdict is computed from, for draws with weights that are not those of single data."""
        with self.scope():
            return facts_with_scouts(self, self.converged, self._model_call)

    @cached_property
    def verdict(self) -> Verdict:
        """How far these draws can be believed, with reasons and what to do next.

        It looks at the :attr:`pool`, and sends scouts from the prior, from far away and from the guide's tails up the
        posterior, to see whether the guide misses what they find: :func:`pplvi.posterior.verdict.judge`. Where every
        datum has weights of its own it counts the data that are badly approximated; chains are judged by R-hat, ESS,
        and modes that none has visited.

        Source: Yao, Vehtari, Simpson and Gelman 2018, Yes, but did it work? Evaluating variational inference.
        """
        if self.is_mcmc:
            return verdict_on_chains(self, self._model_call)
        if not self.has_weights or self.draws.batch:
            return verdict_of(self, self.converged)
        return judge(self.facts)

    @property
    def _model_call(self) -> ModelCall:
        size = 1 if self._source is None else self._source.bytes
        return ModelCall(self.model, *self._call, self.vectorize, size)

    @classmethod
    @explained()
    def from_mcmc(
        cls,
        mcmc: MCMC,
        model: Program,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
        *,
        vectorize: Vectorize = None,
        chunk_size: int | None = None,
    ) -> Posterior:
        """The draws of a finished MCMC run, equally weighted, scored by the model.

        Such a posterior has no guide density, hence neither k-hat nor evidence: asking for them raises.

        Source: Hoffman and Gelman 2014, The No-U-turn sampler, for the sampler that is mostly meant.

        :param mcmc: a ``pyro.infer.MCMC`` after its ``run``.
        :param model: the model it was run on.
        :param args: positional arguments of the model.
        :param kwargs: its keyword arguments.
        :param vectorize: the way of running draws, as for a guide.
        :param chunk_size: score at most so many draws in one call; chosen as for a guide unless given.
        :returns: a posterior of ``num_chains * num_samples`` draws, one chain after another.
        :raises ValueError: if the run has no draws, or ``args`` is no tuple.

        >>> import pyro, pyro.distributions as dist, torch
        >>> def model(y):
        ...     pyro.sample("y", dist.Normal(pyro.sample("z", dist.Normal(0.0, 1.0)), 1.0), obs=y)
        >>> mcmc = pyro.infer.MCMC(
        ...     pyro.infer.NUTS(model), num_samples=20, warmup_steps=20, disable_progbar=True
        ... )
        >>> mcmc.run(torch.tensor(0.5))
        >>> Posterior.from_mcmc(mcmc, model, (torch.tensor(0.5),)).log_p.shape
        torch.Size([20])
        """
        checked_call(args, kwargs, "Posterior(model, guide, (x, y))")
        chains = mcmc.get_samples(group_by_chain=True)
        if not chains:
            raise ValueError("the MCMC run has no draws: expected a finished run. Call mcmc.run(...) first.")
        return cls.of_chains(chains, model, args, kwargs, vectorize, chunk_size, mcmc=mcmc)

    @classmethod
    def of_chains(
        cls,
        chains: Mapping[str, Tensor],
        model: Program,
        args: tuple[Any, ...],
        kwargs: Any,
        vectorize: Vectorize,
        chunk_size: int | None,
        *,
        mcmc: MCMC | None = None,
        evidence: Tensor | None = None,
    ) -> Posterior:
        """Draws of equal weight, ``(chains, draws, *plates, *event)`` of each latent site, scored by the model."""
        self = cls.__new__(cls)
        self._remember(model, None, args, kwargs, vectorize, mcmc)
        num_chains, length = next(iter(chains.values())).shape[:2]
        latents = self._without_padding({name: value.flatten(0, 1) for name, value in chains.items()})
        run = plain_run(self.model, self.args, self.kwargs)
        bounds = looking.chunks_of(num_chains * length, chunk_size, looking.fitting(run))
        scored = stack((self._score(latents, *b) for b in bounds), num_chains * length)
        super(Posterior, self).__init__(scored, num_chains=num_chains, evidence=evidence)
        return self

    def __repr__(self) -> str:
        kind = f"MCMC, chains={self.num_chains}" if self.evidence is None else f"SMC, islands={self.num_chains}"
        source = kind if self.guide is None else looking.name_of(self.guide)
        return f"Posterior({looking.name_of(self.model)}, {source}, {self.draws!r})"

    def _remember(
        self,
        model: Program,
        guide: Program | None,
        args: tuple[Any, ...],
        kwargs: Any,
        vectorize: Vectorize,
        mcmc: MCMC | None = None,
    ) -> None:
        self.model, self.guide = model, guide
        self._call: Call = to_inputs(model, tuple(args), dict(kwargs or {}))
        check_finite(model, self.args, self.kwargs)
        self.vectorize, self.mcmc = vectorize, mcmc

    def _without_padding(self, latents: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Drop the dimensions of size 1 that stand for plates a site is not in: ``(S, *plates, *event)`` is left."""
        sites = latent_sites(plain_run(self.model, self.args, self.kwargs).model)
        shapes = {name: (*batch_sizes(s).values(), *s["fn"].event_shape) for name, s in sites.items()}
        return {name: value.reshape(-1, *shapes.get(name, value.shape[1:])) for name, value in latents.items()}

    @property
    def args(self) -> tuple[Any, ...]:
        """Positional arguments of model and guide."""
        return self._call[0]

    @property
    def kwargs(self) -> dict[str, Any]:
        """Their keyword arguments."""
        return self._call[1]

    def _score(self, latents: Mapping[str, Tensor], start: int, stop: int) -> Draws:
        part = {name: value[start:stop] for name, value in latents.items()}
        return score(self.model, part, self.args, self.kwargs, num_draws=stop - start, vectorize=self.vectorize)

    @explained()
    def predict(
        self,
        *args: Any,
        num_samples: int | None = None,
        new_sites: Iterable[str] = (),
        seed: int | None = None,
        **kwargs: Any,
    ) -> Draws:
        """Posterior predictive draws, for new inputs or, without arguments, for those of the fit.

        Source: Gelman et al. 2013, Bayesian data analysis, section 6.3.

        :param args: positional arguments of the model, with or without data: observed sites are drawn in any case.
        :param num_samples: how many draws; as many as the posterior has unless given.
        :param new_sites: latent sites to draw anew from the model instead of taking them from the posterior, such as
            the effects of groups that were not in the data.
        :param seed: makes the draws reproducible and leaves the global random state as it was.
        :param kwargs: keyword arguments of the model.
        :returns: the draws; ``.observed[site]`` has shape ``(num_samples, *plates, *event)``, ``.deterministics`` and
            ``.latents`` go with it.
        :raises ValueError: if a latent site has another shape under the new arguments than it had in the fit, or
            belongs to a minibatch, or if a name in ``new_sites`` is not a latent site.
        """
        new_sites = frozenset(new_sites)
        if unknown := new_sites - set(self.draws.latents):
            raise ValueError(f"new_sites names {sorted(unknown)}; the latent sites are {sorted(self.draws.latents)}.")
        if names := looking.subsampled(self.draws, set(self.draws.latents) - new_sites):
            raise ValueError(
                f"latent sites in the subsampled plates {names} belong to one minibatch, and the model would draw "
                "another: expected a posterior on the full data. Or let the model draw these sites: new_sites=."
            )
        args, kwargs = to_inputs(self.model, args, kwargs) if args or kwargs else (self.args, self.kwargs)
        with random_state(seed):
            drawn = self.resample(num_samples, deterministics=False)
            latents = {name: value for name, value in drawn.items() if name not in new_sites}
            size = self.num_draws if num_samples is None else num_samples
            with told_how_to_predict():
                found = predict(self.model, latents, args, kwargs, num_draws=size, vectorize=self.vectorize)
        return observed_as_before(found, self.draws)

    @explained()
    def loo(self, var_name: str | Sequence[str] | None = None, groups: LeftOut | None = None) -> ELPDData:
        """Leave-one-out cross-validation, corrected for the guide; see :func:`pplvi.posterior.leave_one_out.loo`.

        Source: Magnusson, Andersen, Jonasson and Vehtari 2019, Bayesian leave-one-out cross-validation for large data.

        :param var_name: the observed site or ``pyro.factor``, or several that share a plate; for one it may be left
            out.
        :param groups: leave out what belongs to an element of a plate, ``"school"``, or to all elements of one label,
            ``{"pupil": school_of_pupil}``.
        :returns: ArviZ's ``ELPDData`` with pointwise values, ready for ``az.compare``.
        :raises ValueError: where :attr:`log_weight` does (but not for MCMC draws), and if the site is ambiguous or
            unknown.
        """
        return loo(self, var_name, groups)
