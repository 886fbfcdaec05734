"""Simulation-based calibration of any recipe of :func:`pplvi.fit`, in one call: :func:`calibrate`."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.parameter import is_lazy

from pplvi.fitting.arguments import check_model
from pplvi.fitting.clock import cpu_seconds
from pplvi.fitting.entry import fit
from pplvi.fitting.inputs import checked_inputs
from pplvi.fitting.result import Fit
from pplvi.kinds.checked import checked
from pplvi.kinds.kinds import Condition, Seed
from pplvi.posterior.arviz.quiet import arviz_itself
from pplvi.posterior.arviz.versions import wrap
from pplvi.posterior.gather import take
from pplvi.posterior.posterior import Posterior
from pplvi.posterior.ranks import CALIBRATED, UniformBand, frame_of_ranks, rank_among, scalars
from pplvi.posterior.tables import to_html
from pplvi.programs.calls import checked_call
from pplvi.programs.errors import explained
from pplvi.programs.handlers import parameters_of
from pplvi.programs.running import plain_run
from pplvi.programs.simulating import Simulator, draws_differ
from pplvi.programs.state import Environment, clone, map_tree, modules_of, random_state
from pplvi.training.describe import describe
from pplvi.training.restart import scratch
from pplvi.types import Call, Program, Values
from pplvi.weights.resampling import resample

if TYPE_CHECKING:
    import pandas
    from matplotlib.axes import Axes

_DRAWS = 1_000  # of a guide, before they are chosen from
_HOPELESS = 3  # fits that fail before any has worked
_TRUSTED_K = 0.7
_MOST = 1_000_000
_Simulations: TypeAlias = Annotated[int, Condition(f"a whole number from 1 to {_MOST:,}", lambda n: 1 <= n <= _MOST)]

_Level: TypeAlias = Annotated[float, Condition("a number between 0 and 1", lambda x: 0 < x < 1)]

_OWN = ("args", "kwargs", "seed", "progress", "data", "checkpoint", "resume")


@checked
@dataclass(frozen=True)
class Calibration:
    r"""The result of :func:`pplvi.calibrate`: ranks of the true values, and what they say.

    :ivar ranks: by site, ``(num_simulations, *shape)`` without the fits that failed, from 0 to ``num_draws``.
    :ivar num_draws: among how many posterior draws the truth is ranked.
    :ivar recipe: what was fitted, in words.
    :ivar prob: the probability that a calibrated recipe is called so, all elements together.
    :ivar pareto_k: the largest k-hat of each fit, NaN where there is none.
    :ivar failures: what failed, by the number of the simulation.
    :ivar messages: the warnings of the fits, each with how often it came.
    :ivar seconds: CPU time.

    Source: Talts, Betancourt, Simpson, Vehtari and Gelman 2018, Validating Bayesian inference algorithms with
    simulation-based calibration.

    >>> found = Calibration({"z": np.arange(100)}, 99, "AutoNormal", 0.95, np.full(100, 0.1))
    >>> print(found)
    calibrated: 1 element, 100 simulations of AutoNormal, smallest p-value 1
    """

    ranks: Mapping[str, NDArray[np.int64]]
    num_draws: int
    recipe: str
    prob: float
    pareto_k: NDArray[np.float64]
    failures: Mapping[int, str] = field(default_factory=dict)
    messages: Mapping[str, int] = field(default_factory=dict)
    seconds: float = 0.0

    @property
    def num_simulations(self) -> int:
        """How many fits worked."""
        return len(self.pareto_k)

    @property
    def is_calibrated(self) -> bool:
        """Whether all ranks are within the band."""
        return bool((self.summary()["verdict"] == CALIBRATED).all())

    @property
    def verdict(self) -> str:
        """``"calibrated"``, or ``"not calibrated"`` with how many elements are too narrow, too wide, too low, ..."""
        words = Counter(word for word in self.summary()["verdict"] if word != CALIBRATED)
        told = ", ".join(f"{word} for {number}" for word, number in words.most_common())
        return f"not calibrated, {told}" if told else CALIBRATED

    def __str__(self) -> str:
        return f"{self.verdict}: {'; '.join(self._facts())}"

    def __repr__(self) -> str:
        return f"Calibration({self.recipe}, simulations={self.num_simulations}, {self.verdict})"

    def _facts(self) -> list[str]:
        frame = self.summary()
        size = f"{len(frame)} element{'s' * (len(frame) != 1)}, {self.num_simulations} simulations of {self.recipe}"
        facts = [f"{size}, smallest p-value {frame['p_value'].min():.2g}"]
        if bad := int((self.pareto_k > _TRUSTED_K).sum()):
            facts.append(f"k-hat above {_TRUSTED_K} in {bad} of {self.num_simulations}")
        if self.failures:
            number, first = next(iter(self.failures.items()))
            facts.append(f"{len(self.failures)} fits failed, the first, of simulation {number}, with {first}")
        return facts

    def _repr_html_(self) -> str:
        return to_html(repr(self), self._facts(), self.summary())

    def summary(self) -> pandas.DataFrame:
        """A row for each element: see :func:`pplvi.posterior.ranks.frame_of_ranks`."""
        return frame_of_ranks(self.ranks, self.num_draws, self.prob)

    def to_arviz(self) -> Any:
        """The ranks in units of the largest as ArviZ's group ``prior_sbc``, which ``az.plot_ecdf_pit`` draws (1.x)."""
        place = {name: ((ranks + 0.5) / (self.num_draws + 1))[None] for name, ranks in self.ranks.items()}
        return wrap({"prior_sbc": arviz_itself().convert_to_dataset(place)}, {"recipe": self.recipe})

    def plot(
        self, var_names: Sequence[str] | None = None, kind: Literal["ecdf", "rank"] = "ecdf", axes: Any = None
    ) -> NDArray[Any]:
        """One panel for each site: the ranks of its elements, with the band in which they are if calibrated.

        :param var_names: which sites; all unless given.
        :param kind: ``"ecdf"``, the empirical distribution function minus the uniform one, with the simultaneous band
            of one element; ``"rank"``, a histogram of all elements.
        :param axes: as many axes to draw into.
        :returns: the axes, in an array.
        :raises ValueError: for unknown sites or kinds.
        """
        from matplotlib import pyplot

        names = list(self.ranks) if var_names is None else list(var_names)
        if not set(names) <= set(self.ranks) or kind not in ("ecdf", "rank"):
            raise ValueError(
                f"var_names={names}, kind={kind!r}: expected sites among {list(self.ranks)}, and 'ecdf' or 'rank'."
            )
        size: dict[str, Any] = {"figsize": (3.2 * len(names), 3), "layout": "constrained", "squeeze": False}
        panels = np.asarray(pyplot.subplots(1, len(names), **size)[1] if axes is None else axes).ravel()
        for name, ax in zip(names, panels, strict=True):
            (self._plot_ecdf if kind == "ecdf" else self._plot_ranks)(name, ax)
            ax.set_title(name)
        return panels

    def _plot_ecdf(self, name: str, ax: Axes) -> None:
        band = UniformBand(self.num_simulations, self.num_draws)
        low, high = (limit / self.num_simulations - band.points for limit in band.limits(self.prob))
        ax.fill_between(band.points, low, high, step="mid", alpha=0.2, color="gray", label=f"{self.prob:.0%} band")
        for label, ranks in scalars({name: self.ranks[name]}):
            ax.step(band.points, band.counts(ranks) / self.num_simulations - band.points, where="mid", label=label)
        ax.set(xlabel="rank / draws", ylabel="ECDF minus uniform")

    def _plot_ranks(self, name: str, ax: Axes) -> None:
        bins = max(4, min(20, self.num_simulations // 10))
        place = (self.ranks[name] + 0.5) / (self.num_draws + 1)
        ax.hist(place.ravel(), bins=bins, range=(0, 1), density=True, alpha=0.7)
        ax.axhline(1.0, color="gray", linestyle="dashed")
        ax.set(xlabel="rank / draws", ylabel="density")


@checked
@explained()
def calibrate(
    model: Program,
    guide: Any,
    *,
    args: tuple[Any, ...] = (),
    kwargs: Mapping[str, Any] | None = None,
    observed: Sequence[str] | None = None,
    num_simulations: _Simulations = 100,
    num_draws: _Simulations = 99,
    draws: Literal["psis", "guide"] = "psis",
    prob: _Level = 0.95,
    seed: Seed | None = None,
    progress: bool = True,
    **options: Any,
) -> Calibration:
    r"""Simulation-based calibration of a way of fitting: does it find parameters that are known?

    Parameters and data are drawn from the model, :math:`z_n \sim p(z), x_n \sim p(x \mid z_n)`; the model is fitted to
    each :math:`x_n`; and the rank of :math:`z_n` among posterior draws is noted. Under the exact posterior ranks are
    uniform (Talts et al. 2018), element by element: a posterior that is too narrow has too many at both ends, one that
    is too low too many at the top (Yao et al. 2018, for variational posteriors). Uniformity is judged by a simultaneous
    band of their empirical distribution function (Säilynoja et al. 2022), with the error rate of all elements together.

    The data of the call are replaced, wherever they enter: as an argument (``obs=y``), as ``y=None``, or by
    ``pyro.condition``. Parameters of the model have to be fixed, since learned ones have no prior to be drawn from.

    :param model: a Pyro program with proper priors, without factors, scales or subsampling.
    :param guide: what :func:`pplvi.fit` takes: a class, a function from the model to a guide, ``"auto"``, ``"smc"``,
        ``"nuts"``; each simulation is fitted anew. Or a :class:`pplvi.Fit` of an amortised guide, which draws for each
        data set as it is, without training.
    :param args: arguments of the model; the data in them give the shapes, and may be left out where the model draws
        them then.
    :param kwargs: keyword arguments of the model.
    :param observed: the sites that stand for data; all that are observed with these arguments unless given.
    :param num_simulations: how many data sets; 100 show a standard deviation that is off by a fifth.
    :param num_draws: among how many draws the truth is ranked.
    :param draws: ``"psis"`` ranks among draws resampled by smoothed importance weights, ``"guide"`` among those of the
        guide as they are. MCMC and SMC have one kind.
    :param prob: the probability that a calibrated recipe is called so.
    :param seed: makes the result reproducible; the global random state stays as it was.
    :param progress: show a bar.
    :param options: other arguments of :func:`pplvi.fit`, such as ``num_steps=``, ``objective=`` or ``budget=``.
    :returns: ranks, a table, plots and a verdict. Single fits that fail are counted and named there.
    :raises ValueError: for a model that cannot be simulated from, one with parameters, a guide that is one module or
        does not see the data, and if the first three fits fail.

    Source: Talts, Betancourt, Simpson, Vehtari and Gelman 2018, Validating Bayesian inference algorithms with
    simulation-based calibration; Yao, Vehtari, Simpson and Gelman 2018, Yes, but did it work? Evaluating variational
    inference.

    >>> import pplvi, pyro, pyro.distributions as dist
    >>> def model(y=None):
    ...     z = pyro.sample("z", dist.Normal(0.0, 1.0))
    ...     pyro.sample("y", dist.Normal(z, 1.0), obs=y)
    >>> found = calibrate(model, pplvi.AutoPathfinder, observed=("y",), num_simulations=8, seed=0, progress=False)
    >>> found
    Calibration(AutoPathfinder, simulations=8, calibrated)
    """
    check_model(model)
    _check_options(guide, options)
    if isinstance(guide, Fit) and not args and kwargs is None:
        args, kwargs = guide.args or (), guide.kwargs
    call = checked_call(args, kwargs, "calibrate(model, guide, args=(x, y))")
    environment = Environment(options.get("dtype"), options.get("device"))
    call = checked_inputs(model, *call, environment)
    start, entropy = cpu_seconds(), int(torch.randint(2**31, ())) if seed is None else seed
    with scratch(), _home(guide, environment), random_state(entropy):
        if not isinstance(guide, Fit):
            _check_parameters(model, call)
        simulator = Simulator(model, call, observed)
    recipe = _Recipe(guide, simulator, options, environment, max(_DRAWS, num_draws))
    rows: list[dict[str, NDArray[np.int64]]] = []
    pareto_k: list[float] = []
    failures: dict[int, str] = {}
    messages: Counter[str] = Counter()
    for index in _bar(num_simulations, progress):
        data_seed, fit_seed, rank_seed = _seeds(entropy, index)
        with warnings.catch_warnings(record=True, action="always") as told:
            try:
                truth, posterior = recipe.run(data_seed, fit_seed)
                weighted = draws == "psis" and posterior.has_weights
                rows.append(_ranked(truth, posterior, num_draws, weighted, rank_seed))
                pareto_k.append(float(posterior.pareto_k.max()) if posterior.has_weights else np.nan)
            except Exception as error:
                failures[index] = f"{type(error).__name__}: {error}"
                if not rows and len(failures) == min(_HOPELESS, num_simulations):
                    raise
        messages.update({str(each.message) for each in told})
    shared = [name for name in rows[0] if all(name in row for row in rows)]
    ranks = {name: np.stack([row[name] for row in rows]) for name in shared}
    named = guide.guide_name if isinstance(guide, Fit) else guide if isinstance(guide, str) else describe(guide)
    spent = cpu_seconds() - start
    return Calibration(ranks, num_draws, named, prob, np.array(pareto_k), failures, dict(messages), spent)


class _Recipe:
    """Simulates, and fits what was simulated."""

    def __init__(
        self, guide: Any, simulator: Simulator, options: Mapping[str, Any], environment: Environment, num_draws: int
    ) -> None:
        self.guide, self.simulator, self.num_draws, self.environment = guide, simulator, num_draws, environment
        self.options = {"progress": False, **options}
        networks = modules_of(guide) if callable(guide) else {}
        self.state = [x for module in networks.values() for x in module.state_dict().values() if not is_lazy(x)]
        self.initial = clone(self.state)
        self.checked = False

    def run(self, data_seed: int, fit_seed: int) -> tuple[dict[str, Tensor], Posterior]:
        """True values, and the posterior of data that they gave."""
        with scratch():
            with _home(self.guide, self.environment), random_state(data_seed):
                drawn, other = self.simulator.draw(), self.simulator.draw()
            with torch.no_grad():  # networks of the recipe are trained anew each time
                for tensor, value in zip(self.state, self.initial, strict=True):
                    tensor.copy_(value)
            model, call = self.simulator.with_data(drawn.data)
            if isinstance(self.guide, Fit):
                self._check_sees(self.guide, call, self.simulator.with_data(other.data)[1])
                found = self.guide.posterior(self.num_draws, args=call[0], kwargs=call[1], seed=fit_seed)
            else:
                fitted = fit(model, self.guide, args=call[0], kwargs=call[1], seed=fit_seed, **self.options)
                self._check_blind(fitted, call)
                found = fitted.posterior(self.num_draws, seed=fit_seed)
            return drawn.truth, found

    def _check_sees(self, fitted: Fit, one: Call, other: Call) -> None:
        """A guide that is not trained has to see the data."""
        if self.checked:
            return
        run = fitted.runs[fitted.best]
        with random_state(0), run.scope(), torch.no_grad():
            differ = not self.simulator.conditioned and draws_differ(run.guide, one, other)
        if not differ:
            raise ValueError(
                f"the guide of this fit ({fitted.guide_name}) draws the same whatever the data: expected an amortised "
                "one, of which the data are an argument. Give calibrate() what fit() was given, to fit it anew."
            )
        self.checked = True

    def _check_blind(self, fitted: Fit, call: Call) -> None:
        """Where data enter by conditioning, the guide must not read them from its arguments."""
        hidden = self.simulator.conditioned
        if self.checked or not hidden or fitted.mcmc is not None or fitted.islands is not None:
            return
        run = fitted.runs[fitted.best]
        changed: Call = map_tree(lambda x: x + 1 if x.is_floating_point() else x, call)
        with random_state(0), run.scope(), torch.no_grad():
            differ = draws_differ(run.guide, call, changed)
        if differ:
            raise ValueError(
                f"the guide reads arguments, but data of {sorted(hidden)} are no argument of their own, so that it "
                "would not see what is simulated: expected obs=y, with y an argument as it is."
            )
        self.checked = True


def _check_options(guide: Any, options: Mapping[str, Any]) -> None:
    if found := sorted(set(options) & set(_OWN)):
        raise ValueError(f"{found} cannot be given: each simulation is fitted anew, to data of its own, all at once.")
    if isinstance(guide, Fit) and (guide.mcmc is not None or guide.islands is not None or options):
        raise ValueError(
            f"guide={guide!r} with the options {sorted(options)}: expected the fit of an amortised guide and no option "
            "of fit(), or, to fit each simulation anew, what fit() was given as the guide."
        )
    if isinstance(guide, torch.nn.Module):
        raise ValueError(
            f"guide is one {type(guide).__name__}, which each fit would train on from the last: expected its class or "
            "a function from the model to a guide, lambda model: AutoNormal(model, init_scale=0.1); or, of an "
            "amortised guide, its fit."
        )


def _check_parameters(model: Program, call: Call) -> None:
    if names := sorted(parameters_of(lambda: plain_run(model, *call))):
        raise ValueError(
            f"the model has the parameters {names}, which a fit would learn: expected a model whose every unknown is "
            "drawn. Give them a prior (pyro.sample), or fix them."
        )


def _home(guide: Any, environment: Environment) -> AbstractContextManager[Any]:
    """Where the model has its parameters: those of a fit, or none."""
    return guide.runs[guide.best].scope() if isinstance(guide, Fit) else environment.active()


def _seeds(entropy: int, simulation: int) -> tuple[int, int, int]:
    """For data, fit and ranks of a simulation."""
    data, fitting, ranking = np.random.SeedSequence([entropy, simulation]).generate_state(3) // 2
    return int(data), int(fitting), int(ranking)


def _bar(num_simulations: int, progress: bool) -> Any:
    from tqdm.auto import tqdm

    return tqdm(range(num_simulations), desc="calibrate", disable=not progress)


def _ranked(
    truth: Values, posterior: Posterior, num_draws: int, weighted: bool, seed: int
) -> dict[str, NDArray[np.int64]]:
    """Ranks of all sites that both have, among draws resampled by their weights or spread evenly over the chains."""
    found, rng = posterior.draws, np.random.default_rng(seed)
    batch = found.batch if weighted else ()
    with random_state(seed):
        indices = resample(posterior.psis_log_weight if weighted else torch.zeros(posterior.num_draws), num_draws)
    inside = {plate.name for plate in batch}
    names = [n for n in truth if n in {**found.latents, **found.deterministics}]
    chosen = {n: take(found, n, indices, batch) for n in names if inside <= {p.name for p in found.plates.get(n, ())}}
    return {n: rank_among(truth[n].cpu().numpy(), value.cpu().numpy(), rng) for n, value in chosen.items()}
