"""Expectation maximisation as the steps of a training loop."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from pplvi.compile.svi import CompiledSVI
from pplvi.compile.vectorized import Apart
from pplvi.kinds.checked import checked
from pplvi.kinds.kinds import Count, NonNegative
from pplvi.programs.joint import execute
from pplvi.programs.running import isolated
from pplvi.programs.sites import is_enumerated, latent_sites
from pplvi.programs.summing import summing
from pplvi.training.batches import Batches
from pplvi.training.em.complete import CompleteData, Counts
from pplvi.training.em.conjugate import ConjugateData, ConjugateLatents
from pplvi.training.em.families import CollapseError
from pplvi.training.em.maximisation import Maximisation
from pplvi.training.em.starts import kmeans_start, random_start, tells_apart
from pplvi.training.optimizers import Update
from pplvi.training.steps import BeforeFirst, Find, Stepper, Steps
from pplvi.training.watch import Watch
from pplvi.types import Call, Program

__all__ = ["ExpectationMaximization"]

EMStart = Literal["program", "kmeans", "random"]
_ROUNDING = 10.0  # rounding errors of the log evidence


@checked
@dataclass(frozen=True)
class ExpectationMaximization:
    r"""Maximum likelihood with latents: exact E-steps, M-steps exact or complete.

    .. math:: \theta_{k+1} = \arg\max_\theta E_{p(z \mid x, \theta_k)}[\log p_\theta(x, z)],
        \qquad \log p_{\theta_{k+1}}(x) \ge \log p_{\theta_k}(x)

    ``pplvi.fit(model, pplvi.ExpectationMaximization(), args=(x,))`` takes a program whose ``pyro.param`` are to be
    estimated. Its discrete latents are summed over, whether or not they ask for it, in plates, trees and Markov chains;
    where ``mu[z]`` and the like are arguments of distributions of an exponential family, the M-step is in closed form;
    all other parameters, under any constraint, are maximised by L-BFGS to convergence. ``fit.losses`` is
    :math:`-\log p(x)` (nats) at the beginning of each iteration and never rises.

    Continuous latents are taken where their exact posterior is in closed form, by what :class:`pplvi.AutoConjugate`
    knows: factor analysis, probabilistic PCA, linear-Gaussian state spaces, random effects, Gamma rates of counts.
    Their M-step is in closed form for linear maps, means, spreads and rates. E- and M-step are recorded once;
    ``fit.guide`` draws from the posterior at the maximum.

    Source: Dempster, Laird & Rubin (1977), "Maximum likelihood from incomplete data via the EM algorithm"; Neal &
    Hinton (1998), "A view of the EM algorithm that justifies incremental, sparse, and other variants", for ``m_steps``.

    :param m_steps: generalised EM: so many iterations of L-BFGS for all parameters in place of a maximisation, which
        takes more iterations.
    :param tol: stop when an iteration raises :math:`\log p(x)` by less than this, in nats, or by less than its rounding
        errors.
    :param start: ``"kmeans"`` starts from the clusters of what each latent explains (k-means++), ``"random"`` from
        random probabilities of the latents (continuous ones: from draws of their prior), ``"program"`` from the values
        that the parameters have in the program. ``None``: the first restart from the program, unless its components
        are all alike, which EM cannot tell apart; that, and the others, from k-means, or from draws of the prior.
    :raises ValueError: for other arguments; when fitting, for latents without a closed form, minibatches, and a
        likelihood without a maximum, such as that of a component that closes in on one datum.

    >>> import pyro, pplvi, pyro.distributions as dist
    >>> from torch.distributions import constraints
    >>> def model(x):
    ...     w = pyro.param("w", torch.ones(2) / 2, constraint=constraints.simplex)
    ...     mu = pyro.param("mu", torch.zeros(2))
    ...     sd = pyro.param("sd", torch.ones(2), constraint=constraints.positive)
    ...     with pyro.plate("data", len(x)):
    ...         z = pyro.sample("z", dist.Categorical(w))
    ...         pyro.sample("x", dist.Normal(mu[z], sd[z]), obs=x)
    >>> x = torch.tensor([-2.0, -1.0, -1.5, 4.0, 5.0])
    >>> fit = pplvi.fit(model, ExpectationMaximization(), args=(x,), seed=0, progress=False)
    >>> fit.params[0]["mu"].sort().values
    tensor([-1.5000,  4.5000])
    >>> fit.guide.marginals(x)["z"].max(-1).values.round()  # whose component is clear
    tensor([1., 1., 1., 1., 1.])
    """

    m_steps: Count | None = None
    tol: NonNegative = 1e-9
    start: EMStart | None = None


class SummedLatents:
    """The guide of a program whose latents are all summed over: it has no sites, and knows their probabilities.

    :param model: the program.
    :ivar closed: parameters that the M-step has in closed form.
    :ivar searched: parameters that it searches for by L-BFGS.
    :ivar collapsed: why the likelihood has no maximum on this way; empty if it has.
    """

    def __init__(self, model: Program) -> None:
        self.model = model
        self.closed: list[str] = []
        self.searched: list[str] = []
        self.collapsed = ""

    def __call__(self, *args: Any, **kwargs: Any) -> None:
        """Nothing is drawn."""

    def marginals(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """Posterior probabilities of the values of each latent given the data, ``(*plates, values)``.

        Arguments are those of the model; the parameters are those in Pyro's store.
        """
        with isolated():
            run = execute(summing(self.model, args, kwargs), self, args, kwargs)
            _, counts = run.expected_counts()
        latents = {n: s for n, s in latent_sites(run.model).items() if is_enumerated(s)}
        return {name: _marginal(counts[name], site) for name, site in latents.items()}


def _marginal(counts: Tensor, site: Any) -> Tensor:
    """Probabilities of a site's own values, the last dimension, whatever others its density depends on."""
    place = counts.dim() + site["infer"]["_enumerate_dim"]
    kept = {place, *(counts.dim() + f.dim for f in site["cond_indep_stack"] if f.vectorized)}
    others = [d for d in range(counts.dim()) if d not in kept]
    found = counts.movedim(place, -1)
    found = found.sum([d - (d > place) for d in others]) if others else found
    return found / found.sum(-1, keepdim=True)


class EMUpdate(Update):
    """Counts iterations and knows when the evidence has stopped rising.

    :ivar converged: whether it has.
    :ivar last: log evidence of the iteration before, in nats.
    """

    def __init__(self) -> None:
        super().__init__(None, 1, None, None)
        self.converged, self.last = False, -math.inf

    @property
    def left(self) -> int | None:
        """None where the evidence has stopped rising, no end otherwise."""
        return 0 if self.converged else None

    def pace(self) -> dict[str, Any]:
        """How many iterations there were, and where they have come to."""
        return {**super().pace(), "converged": self.converged, "last": self.last}

    def set_pace(self, state: Any) -> None:
        """Continue there."""
        super().set_pace(state)
        self.converged, self.last = state["converged"], state["last"]


class EMStepper(Stepper):
    """Iterations of EM on the same data.

    :param algorithm: how.
    :param restart: which restart these are the steps of.
    :param several: whether there are others, so that this one may end without a maximum.
    """

    exact: ClassVar[bool] = True
    update: EMUpdate

    def __init__(
        self,
        algorithm: ExpectationMaximization,
        model: Program,
        guide: Any,
        before_first: BeforeFirst,
        restart: int = 0,
        several: bool = False,
    ) -> None:
        self.algorithm, self.model, self.guide = algorithm, model, guide
        self.before_first, self.restart, self.several = before_first, restart, several
        self.update = EMUpdate()
        self.problem: CompleteData | ConjugateData | None = None
        self.maximise: Maximisation

    def many(self, calls: Sequence[Call]) -> Sequence[float]:
        """One iteration after another."""
        return [self._step(call) for call in calls]

    def _step(self, call: Call) -> float:
        self.prepare(call)
        if self.update.count == 0:
            self.before_first()
            self._begin()
        evidence, counts = self._problem.expect()
        rise = evidence - self.update.last
        self.update.converged = rise <= max(self.algorithm.tol, self._rounding * abs(evidence))
        self.update.last, self.update.count = evidence, self.update.count + 1
        if not self.update.converged:
            self._raise_bound(counts)
        return -evidence

    def _raise_bound(self, counts: Counts) -> None:
        """An M-step; a restart whose likelihood has no maximum ends, if there are others."""
        try:
            self.maximise(counts)
            self.guide.closed, self.guide.searched = self.maximise.closed, self.maximise.searched
        except CollapseError as error:
            if not self.several:
                raise
            self.guide.collapsed, self.update.converged = str(error), True

    @property
    def _problem(self) -> CompleteData | ConjugateData:
        if self.problem is None:
            raise ValueError("EM has no data yet: expected prepare(call) first.")
        return self.problem

    @property
    def _rounding(self) -> float:
        return _ROUNDING * max(torch.finfo(leaf.dtype).eps for leaf in self._problem.leaves.values())

    def _begin(self) -> None:
        """Go to the start: an M-step from given distributions of the latents, unless the program has good values."""
        start = self._start(self._problem)
        if start is not None:
            Maximisation(self._problem)(self._problem.expect(start)[1])  # a whole one, whatever the others are

    @torch.no_grad()
    def _start(self, problem: CompleteData | ConjugateData) -> dict[str, Tensor] | None:
        kind = self.algorithm.start
        if isinstance(problem, ConjugateData):
            if kind == "kmeans":
                raise ValueError(f"start='kmeans' is for discrete latents, not {problem.sites}: expected 'random'.")
            return None if kind == "program" or (kind is None and self.restart == 0) else problem.random_start()
        run = problem.run()
        run.expected_counts()  # packs its tensors
        if kind is None:
            kind = "program" if self.restart == 0 and tells_apart(run) else "kmeans"
        return None if kind == "program" else (kmeans_start if kind == "kmeans" else random_start)(run)

    def stride(self, at: int, batches: Batches, watch: Watch, settle_every: int) -> int:
        """One: every iteration may be the last."""
        return 1

    def replay(self, find: Find, calls: Sequence[Call]) -> str | None:
        """Nothing to replay."""
        return find(*calls[0])

    def prepare(self, call: Call) -> None:
        """Read the program: which latents are summed, which parameters have a closed form."""
        if self.problem is None:
            kind = ConjugateData if isinstance(self.guide, ConjugateLatents) else CompleteData
            self.problem = kind(self.model, self.guide, call)
            self.maximise = Maximisation(self.problem, self.algorithm.m_steps)
            self.guide.closed, self.guide.searched = self.maximise.closed, self.maximise.searched

    def shared(self) -> CompiledSVI:
        """Nothing is recorded.

        :raises Apart: always.
        """
        raise Apart("EM is not recorded")

    def get_state(self) -> dict[str, Any]:
        """The pace, and whether there is a maximum."""
        return {**self.update.pace(), "collapsed": self.guide.collapsed}

    def set_state(self, state: dict[str, Any]) -> None:
        """Give both back."""
        self.update.set_pace(state)
        self.guide.collapsed = state["collapsed"]


class EMSteps(Steps):
    """Makes the iterations of each restart.

    :param algorithm: how.
    :param several: whether there are several.
    """

    def __init__(self, algorithm: ExpectationMaximization, several: bool = False) -> None:
        super().__init__(None, 1, None, None)
        self.algorithm, self.several, self.made = algorithm, several, 0

    def __call__(self, model: Program, guide: Program, objective: Any, before_first: BeforeFirst) -> Stepper:
        """The iterations of the next restart."""
        self.made += 1
        return EMStepper(self.algorithm, model, guide, before_first, self.made - 1, self.several)
