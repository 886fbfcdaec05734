"""What ``fit`` returns: the runs, the best of them, and the ways on from there."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any, Literal, cast

import numpy as np
from numpy.typing import NDArray
from pyro.infer import MCMC
from torch import Tensor

from pplvi.fitting.clock import Timing
from pplvi.fitting.mcmc import SavedChains
from pplvi.fitting.saving import save
from pplvi.fitting.smc import Islands
from pplvi.fitting.summary import describe_end, describe_guide, describe_restarts, has_latents
from pplvi.kinds.checked import checked
from pplvi.kinds.kinds import Natural, Seed
from pplvi.losses.base import Loss
from pplvi.posterior.arviz.export import to_arviz
from pplvi.posterior.draws import Draws
from pplvi.posterior.gathering import disagreements
from pplvi.posterior.kept import Kept
from pplvi.posterior.leave_one_out import LeftOut
from pplvi.posterior.particles import posterior_of_islands
from pplvi.posterior.posterior import Posterior
from pplvi.posterior.report import report, report_likelihood
from pplvi.posterior.tables import Summary, to_html
from pplvi.posterior.verdict import Verdict, judge
from pplvi.programs.inputs import to_inputs
from pplvi.programs.ways import Vectorize
from pplvi.training.checkpoint import PathLike
from pplvi.training.restart import Restart, ScopedProgram
from pplvi.training.stopping import has_settled
from pplvi.types import Call, Program

if TYPE_CHECKING:
    import arviz


@checked
class Fit:
    r"""The result of :func:`pplvi.fit`: every restart with its parameters, and the best one.

    A restart is a chain in ArviZ. The best restart has the least score,

    .. math:: r^* = \arg\min_r \bar\ell_r,

    the mean of the last tenth of the trace of its objective or, if there is one, of the monitor that the user named
    (nats). An objective that is no bound, and no monitor: the best is restart 0. Its parameters are in Pyro's global
    store when ``fit`` returns; the others are kept and used under scopes of their own.

    :ivar runs: the restarts (:class:`pplvi.training.Restart`); one for all MCMC chains.
    :ivar best: index of the best restart.
    :ivar objective: the objective; ``None`` for MCMC.
    :ivar mcmc: the ``pyro.infer.MCMC``, if the fit is one; its draws and diagnostics alone after :func:`pplvi.load`.
    :ivar islands: the draws of a sequential Monte Carlo run, if the fit is one.
    :ivar origin: what ``fit`` was given as the guide.
    :ivar reformed: whether the model is a form of the user's that ``"auto"`` has found to be easier.
    :ivar seed: the seed of restart 0.
    :ivar notes: what the report says besides, such as what ``"auto"`` tried.
    :ivar timing: what the clock of a budget has told: as the budget of another run, it repeats this one.
    :ivar vectorize: the way in which draws of a posterior are run, ``"broadcast"``, ``"vmap"`` or ``"loop"``
        (``False``); where it is ``None`` or ``True``, the fastest that is right for the programs.

    Source: Kucukelbir et al. (2017), "Automatic differentiation variational inference", for the work flow; restarts
    as chains after Gelman & Rubin (1992), "Inference from iterative simulation using multiple sequences".

    >>> import pyro, torch, pyro.distributions as dist
    >>> from pplvi import fit
    >>> def model(y):
    ...     z = pyro.sample("z", dist.Normal(0.0, 1.0))
    ...     pyro.sample("y", dist.Normal(z, 1.0), obs=y)
    >>> result = fit(
    ...     model, pyro.infer.autoguide.AutoNormal, args=(torch.tensor(1.0),), num_steps=300, seed=0, progress=False
    ... )
    >>> result.losses.shape, result.reasons, round(result.posterior().draws.latents["z"].mean().item(), 1)
    ((1, 300), ['num_steps'], 0.5)
    """

    def __init__(
        self,
        runs: list[Restart],
        best: Natural,
        *,
        guide_name: str,
        args: tuple[Any, ...] | None,
        kwargs: Mapping[str, Any],
        seed: Seed | None,
        objective: Any = None,
        is_bound: bool = False,
        mcmc: MCMC | SavedChains | None = None,
        islands: Islands | None = None,
        vectorize: Vectorize = None,
        origin: Any = None,
    ) -> None:
        self.runs, self.best, self.objective, self.mcmc, self.seed = runs, best, objective, mcmc, seed
        self.guide_name, self.args, self.kwargs, self.is_bound = guide_name, args, dict(kwargs), is_bound
        self.islands = islands
        self.notes: dict[str, str] = {}
        self._kept = Kept()
        self.origin, self.reformed = origin, False
        self.total_seconds: float | None = None
        self.timing = Timing()
        own = isinstance(objective, Loss)  # Pyro's losses loop by default, which says nothing about the programs
        self.vectorize: Vectorize = objective.vectorize_particles if own and vectorize is None else vectorize

    def __repr__(self) -> str:
        if self.mcmc is not None:
            return f"Fit({self.guide_name}, chains={self.mcmc.num_chains})"
        if self.islands is not None:
            return f"Fit({self.guide_name}, islands={len(self.islands.found.log_evidence)})"
        ended = ", ".join(self.reasons)
        return f"Fit({self.guide_name}, {self.objective}, restarts={len(self.runs)}, best={self.best}, {ended})"

    def _repr_html_(self) -> str:
        took = f"{self.seconds:.1f} seconds"
        if self.args is None:
            return to_html(repr(self), [took, "no full data: give it as args= to posterior() and report()"])
        if self.mcmc is None and not has_latents(self.runs[self.best], self._call(None, None)):
            return to_html(repr(self), [took, "maximum likelihood: the model has no latent sites"])
        frame = self._best_posterior(None, None).to_frame()
        return to_html(repr(self), [took, str(self.verdict)], frame)

    @property
    def losses(self) -> NDArray[np.float64]:
        """The objective at every step, in nats: shape ``(restarts, steps)``, NaN after a restart that ended early."""
        longest = max(run.step for run in self.runs)
        rows = [[*map(float, run.losses), *[np.nan] * (longest - run.step)] for run in self.runs]
        return np.array(rows, dtype=np.float64).reshape(len(rows), longest)

    @property
    def guides(self) -> list[Program]:
        """The guide of every restart; call it inside ``runs[r].scope()``."""
        return [run.guide for run in self.runs]

    @property
    def guide(self) -> Program:
        """The guide of the best restart, whose parameters ``fit`` left in the global store."""
        return self.runs[self.best].guide

    @property
    def model(self) -> Program:
        """The model of the best restart."""
        return self.runs[self.best].model

    @property
    def params(self) -> list[dict[str, Tensor]]:
        """The parameters of every restart by name, constrained and detached."""
        return [run.params for run in self.runs]

    @property
    def reasons(self) -> list[str]:
        """Why each restart ended: see :class:`pplvi.training.Restart`."""
        return [run.reason for run in self.runs]

    @property
    def seconds(self) -> float:
        """Time that it took, all restarts together; of ``"auto"`` all that was tried."""
        return sum(run.seconds for run in self.runs) if self.total_seconds is None else self.total_seconds

    @property
    def converged(self) -> bool | None:
        """Whether the best restart's objective (or monitor) had levelled off; ``None`` if it cannot be judged by.

        See :func:`pplvi.training.has_settled`.
        """
        return self._has_converged(self.runs[self.best])

    def _has_converged(self, run: Restart) -> bool | None:
        if run.reason == "converged":
            return True
        trace = run.monitored or run.losses
        return has_settled([float(loss) for loss in trace]) if self.is_bound and len(trace) >= 32 else None

    def posterior(
        self,
        num_draws: int = 1000,
        *,
        restart: int | None = None,
        args: tuple[Any, ...] | None = None,
        kwargs: Mapping[str, Any] | None = None,
        vectorize: Vectorize = None,
        chunk_size: int | None = None,
        seed: int | None = None,
        parallel: Literal["draws"] | None = None,
    ) -> Posterior:
        """Weighted draws from the guide of a restart; of MCMC and SMC, all its draws, whatever ``num_draws``.

        The last two are kept: the same call finds the same object and its verdict, until parameters or data change.

        :param num_draws: how many.
        :param restart: its index; the best unless given.
        :param args: the full data, where the fit saw minibatches.
        :param kwargs: keyword arguments that go with ``args``.
        :param vectorize: the way of running draws; :attr:`vectorize` unless given.
        :param chunk_size: draw at most so many at once.
        :param seed: for the draws; by default the seed of the restart.
        :param parallel: ``"draws"``: ranks share the drawing, as :class:`pplvi.Posterior` says.
        :raises ValueError: if the fit had no ``args`` and none are given, or there is no such restart.
        """
        run = self._run(self.best if restart is None else restart)
        options: dict[str, Any] = {"chunk_size": chunk_size, "parallel": parallel}
        options["vectorize"] = self.vectorize if vectorize is None else vectorize
        options["seed"] = run.seed if seed is None else seed
        draw = partial(self._posterior, run, self._call(args, kwargs), num_draws, options)
        given = args is not None or kwargs is not None or options["seed"] is None
        return draw() if given else self._kept.find((run.index, num_draws, *options.values()), draw)

    def _posterior(self, run: Restart, call: Call, num_draws: int, options: dict[str, Any]) -> Posterior:
        model = ScopedProgram(run.model, run)
        scored = {name: options[name] for name in ("vectorize", "chunk_size")}
        if self.mcmc is not None:
            return Posterior.from_mcmc(cast(MCMC, self.mcmc), model, *call, **scored)
        if self.islands is not None:
            found = self.islands
            return posterior_of_islands(found.latents, found.found.log_evidence, model, call, **scored)
        with run.scope():  # the guide is called now, the model later too; effect-based guides cannot be wrapped
            posterior = Posterior(model, run.guide, *call, num_draws=num_draws, **options)
        posterior.scope, posterior.converged = run.scope, self._has_converged(run)
        return posterior

    @property
    def _has_guide(self) -> bool:
        """Whether a guide was fitted, and not draws made."""
        return self.mcmc is None and self.islands is None

    def _run(self, restart: int) -> Restart:
        if not 0 <= restart < len(self.runs):
            raise ValueError(f"restart={restart}: expected an index from 0 to {len(self.runs) - 1}.")
        return self.runs[restart]

    def _call(self, args: tuple[Any, ...] | None, kwargs: Mapping[str, Any] | None) -> tuple[tuple[Any, ...], Any]:
        if args is None and kwargs is None and self.args is None:
            raise ValueError(
                "the fit saw minibatches (data=) and no full data: expected args= (or kwargs=) with the full data, "
                "here or in the call of fit."
            )
        own = args is None and kwargs is None
        call = (self.args or (), self.kwargs) if own else (args or (), kwargs or {})
        return self._inputs(*call)

    def _inputs(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Call:
        run = self.runs[self.best]
        return to_inputs(run.model, args, kwargs, run.environment)

    @cached_property
    def posteriors(self) -> list[Posterior]:
        """A posterior of 1,000 draws for every restart, drawn once; one with all chains for MCMC."""
        return [self.posterior(restart=index) for index in self._restarts]

    def _best_posterior(self, args: tuple[Any, ...] | None, kwargs: Mapping[str, Any] | None) -> Posterior:
        if args is None and kwargs is None:
            return self.posteriors[self.best if self._has_guide else 0]
        return self.posterior(args=args, kwargs=kwargs)

    @cached_property
    def verdict(self) -> Verdict:
        """How far the posterior of the best restart can be believed: :attr:`pplvi.Posterior.verdict`, and whether
        other restarts contradict it.

        :raises ValueError: for a fit on minibatches alone, and for a model without latent sites.
        """
        return self._verdict(self._best_posterior(None, None))

    def _verdict(self, posterior: Posterior) -> Verdict:
        if len(self.runs) == 1 or posterior.draws.batch or not posterior.has_weights:
            return posterior.verdict
        others = [each for index, each in enumerate(self.posteriors) if index != self.best]
        return judge(replace(posterior.facts, disagreement=disagreements(posterior, others)))

    @property
    def _restarts(self) -> range:
        return range(len(self.runs))

    def save(self, path: PathLike, *, data: bool = True) -> None:
        """Write the fit into a file, which :func:`pplvi.load` reads and ``fit(resume=path)`` goes on from.

        The file holds parameters, traces, the state of the optimiser and of the random numbers, the data, and the name
        and options of a guide of Pyro or of this package; neither code nor the model. It is written beside ``path`` and
        then takes its place at once.

        :param path: of the file; one that is there is replaced.
        :param data: write the data too: the arguments of the fit, or the last minibatch of one that has only seen
            those.
        :raises ValueError: for data that are no tensors, arrays, numbers or strings, where nothing can be written, and
            for draws of SMC.
        """
        if self.islands is not None:
            raise ValueError(
                "draws of SMC are no parameters: expected a fit of a guide. Use fit.to_arviz().to_netcdf(path)."
            )
        save(self, path, data)

    def predict(self, *args: Any, num_samples: int | None = None, seed: int | None = None, **kwargs: Any) -> Draws:
        """Posterior predictive draws of the best restart: see :meth:`pplvi.Posterior.predict`."""
        moved_args, moved_kwargs = self._inputs(args, kwargs)
        posterior = self.posteriors[self.best]
        seed = self.seed if seed is None else seed
        return posterior.predict(*moved_args, num_samples=num_samples, seed=seed, **moved_kwargs)

    def loo(
        self,
        var_name: str | Sequence[str] | None = None,
        groups: LeftOut | None = None,
        *,
        args: tuple[Any, ...] | None = None,
        kwargs: Mapping[str, Any] | None = None,
    ) -> arviz.ELPDData:
        """Leave-one-out cross-validation of the best restart: see :func:`pplvi.posterior.leave_one_out.loo`.

        :param var_name: the observed site or ``pyro.factor``, or several that share a plate; for one it may be left
            out.
        :param groups: leave out what belongs to an element of a plate, ``"school"``, or to all elements of one label,
            ``{"pupil": school_of_pupil}``.
        :param args: the full data, where the fit saw minibatches.
        :param kwargs: keyword arguments that go with ``args``.
        """
        return self._best_posterior(args, kwargs).loo(var_name, groups)

    def to_arviz(
        self,
        draws: Literal["psis", "guide"] = "psis",
        restarts: Literal["all", "best"] = "all",
        coords: Mapping[str, Any] | None = None,
        args: tuple[Any, ...] | None = None,
        kwargs: Mapping[str, Any] | None = None,
        **options: Any,
    ) -> arviz.InferenceData:
        """All groups of ArviZ's schema, a restart as a chain: see :func:`pplvi.to_arviz`.

        :param draws: ``"psis"`` resamples by smoothed importance weights, ``"guide"`` exports the draws as they are.
        :param restarts: ``"all"`` or ``"best"``.
        :param coords: labels of the dimensions that plates are named after.
        :param args: the full data, where the fit saw minibatches.
        :param kwargs: keyword arguments that go with ``args``.
        :param options: other arguments of :func:`pplvi.to_arviz`, such as ``predictions=(x_new,)``.
        :raises ValueError: where that does, and for a fit on minibatches without ``args``.
        """
        attrs = {"guide": self.guide_name, "objective": self.objective, "seed": self.seed, "runtime": self.seconds}
        options["attrs"] = {**attrs, "steps": self.runs[self.best].step or None, **options.get("attrs", {})}
        options.setdefault("seed", self.seed)
        if self._has_guide:
            options.setdefault("losses", self.losses)
        given = args is not None or kwargs is not None
        chains = (
            [self.posterior(restart=r, args=args, kwargs=kwargs) for r in self._restarts] if given else self.posteriors
        )
        one = 0 if self.mcmc is not None else self.best
        return to_arviz(chains, draws=draws, restarts=one if restarts == "best" else restarts, coords=coords, **options)

    def summary(self, *, args: tuple[Any, ...] | None = None, kwargs: Mapping[str, Any] | None = None) -> Summary:
        """The text of :meth:`report`, with means and quantiles as a pandas frame, ``fit.summary().frame``.

        :param args: the full data, where the fit saw minibatches.
        :param kwargs: keyword arguments that go with ``args``.
        """
        run, trained = self.runs[self.best], self._has_guide
        facts: dict[str, Any] = {"guide": self.guide_name, **self.notes}
        if self.islands is not None:
            facts["SMC"] = self.islands.description
        if trained and run.reason != "found":
            facts["objective"] = self.objective
        if len(self.runs) > 1:
            facts["restarts"] = describe_restarts(self.runs, self.best)
        if trained and not has_latents(run, self._call(args, kwargs)):
            facts["seconds"] = f"{self.seconds:.1f}"
            how, settled = describe_end(run), self.converged
            return Summary(report_likelihood(-run.score, facts=facts, convergence=how, converged=settled))
        posterior = self._best_posterior(args, kwargs)
        if trained:
            facts |= describe_guide(run, posterior, self._call(args, kwargs), self.seed)
            if posterior.way == "loop":
                facts["draws"] = (
                    f"run one after another, {posterior.num_draws} runs of the programs, which branch on what they draw"
                )
        facts["seconds"] = f"{self.seconds:.1f}"
        ended = describe_end(run) if trained else None
        verdict = posterior.verdict if args is not None or kwargs is not None else self._verdict(posterior)
        return Summary(report(posterior, facts=facts, convergence=ended, verdict=verdict), posterior.to_frame())

    def report(
        self,
        file: Any = None,
        *,
        args: tuple[Any, ...] | None = None,
        kwargs: Mapping[str, Any] | None = None,
    ) -> None:
        """Print what was fitted, how well, what that means and what to try next.

        :param file: where to; standard output unless given.
        :param args: the full data, where the fit saw minibatches.
        :param kwargs: keyword arguments that go with ``args``.
        """
        (file or sys.stdout).write(self.summary(args=args, kwargs=kwargs) + "\n")
