"""One call from a Pyro program to a trained guide, or to MCMC draws: :func:`fit`."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, Literal

import torch
from pyro.infer import MCMC

from pplvi.compile.svi import CompileMode
from pplvi.fitting.arguments import (
    check_budget,
    check_loss,
    check_model,
    check_numbers,
    check_seed,
    in_way,
    monitor_of,
    named_monitor,
    optimizer_of,
    recipe_of,
    refuse,
    stopping_rule,
)
from pplvi.fitting.attempt import WRITTEN
from pplvi.fitting.auto import select
from pplvi.fitting.clock import Clock, Timing
from pplvi.fitting.inputs import check_chains, checked_inputs, warn_of_no_data
from pplvi.fitting.likelihood import maximise_likelihood
from pplvi.fitting.mcmc import kernel_factory, run_chains
from pplvi.fitting.options import Checkpoint, Compile, DataParallel, Minibatches
from pplvi.fitting.result import Fit
from pplvi.fitting.smc import found_start, given_start, run_islands, smc_settings
from pplvi.fitting.spreading import check_whole, common_stop, sharers, spread_chains, spread_restarts
from pplvi.fitting.starts import SearchedStart, check_init
from pplvi.kinds.checked import check_values
from pplvi.kinds.kinds import Count, Positive, Seed
from pplvi.losses.elbo import ELBO, own_loss
from pplvi.programs import ways
from pplvi.programs.calls import checked_call
from pplvi.programs.errors import explained
from pplvi.programs.inputs import Inputs
from pplvi.programs.memory import keep_freed_memory
from pplvi.programs.ranks import Processes, common_seed
from pplvi.programs.reparam import forms_of
from pplvi.programs.state import Environment, fingerprint, random_state
from pplvi.programs.ways import Vectorize
from pplvi.samplers.tempered import TemperedSMC
from pplvi.training.batches import make_batches
from pplvi.training.checkpoint import PathLike, UnwrittenError
from pplvi.training.describe import describe
from pplvi.training.em.algorithm import ExpectationMaximization
from pplvi.training.optimizers import OptimLike
from pplvi.training.plan import TrainingPlan
from pplvi.training.replicas import Originals, Recipe
from pplvi.training.restart import Restart, one_thread, publish
from pplvi.training.restarts import best_of, train_restarts
from pplvi.training.schedules import Schedule
from pplvi.training.stopping import Plateau
from pplvi.training.watch import Watch
from pplvi.types import Call, Program

__all__ = ["Fit", "fit"]

NUM_STEPS = 5000
NUM_DRAWS = 1000
BUDGET = 60.0  # seconds


@one_thread()
@explained()
def fit(
    model: Program,
    guide: Any,
    *,
    args: tuple[Any, ...] = (),
    kwargs: Mapping[str, Any] | None = None,
    data: Iterable[Any] | Minibatches | None = None,
    objective: Any = None,
    optim: OptimLike = None,
    learning_rate: Positive | None = None,
    schedule: str | Schedule | None = "cosine",
    clip: str | float | None = "adaptive",
    init: Any = None,
    num_steps: Count | None = None,
    num_warmup: Count | None = None,
    budget: Positive | Timing | None = None,
    restarts: Count = 1,
    seed: Seed | None = None,
    compile: CompileMode | Compile = False,
    stop: Plateau | Literal["auto"] | None = "auto",
    monitor: Any = None,
    callbacks: Sequence[Callable[[Restart], Any]] = (),
    progress: bool = True,
    checkpoint: PathLike | Checkpoint | None = None,
    resume: PathLike | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    vectorize: Vectorize = None,
    parallel: DataParallel | Literal["none", "restarts"] | None = None,
) -> Fit:
    r"""Train a guide on a model, from one or several seeds, and keep every restart.

    It minimises the objective :math:`\ell(\theta, \phi)` (nats), for the default :math:`-\text{ELBO}`, over the
    parameters of model and guide:

    .. math:: \text{ELBO} = E_{q_\phi(z)}[\log p_\theta(x, z) - \log q_\phi(z)] \le \log p_\theta(x)

    With ``schedule=None, clip=None`` and the same seed and optimiser it is, to the bit, the loop ::

        pyro.set_rng_seed(seed); pyro.clear_param_store()
        guide = make_guide(model); svi = SVI(model, guide, optim, objective)
        losses = [svi.step(*args, **kwargs) for _ in range(num_steps)]

    Every restart starts from an empty parameter store; what the global one holds is not looked at. A guide that finds
    itself, such as :class:`pplvi.AutoPathfinder`, takes no step: each restart is a search with a seed of its own, and
    the best of them has the largest ELBO.

    :param model: a Pyro program: a function, a module, or a method of a module.
    :param guide: a guide class; a function from the model to a guide (its only argument is named ``model``, or what it
        returns for the model can be called); a guide, which, if it is a module, takes one restart;
        :class:`pplvi.ExpectationMaximization` for maximum likelihood with discrete latents; ``"auto"``: one
        family after another until the draws are reliable (:attr:`Fit.verdict`), within ``budget=`` seconds (60), on the
        easiest of the model as written and its non-centered forms (:func:`pplvi.noncentered`); parameters of the model
        are trained anew with each family; ``"nuts"``, or another MCMC kernel class or ``functools.partial`` of one, for
        MCMC instead of training; ``"smc"``, or a :class:`pplvi.TemperedSMC`, for sequential Monte Carlo from a Gaussian
        to the posterior, on the easiest form of the model.
    :param args: arguments of model and guide. With ``data=`` they are the full data for the posterior.
    :param kwargs: their keyword arguments.
    :param data: minibatches: a ``DataLoader`` or another iterable, each item what the model is called with: a tuple of
        arguments, a dictionary of keyword arguments, or one tensor. It starts anew when it is used up; an iterator,
        which cannot, ends the training. :class:`pplvi.fitting.Minibatches` says what becomes of a short last one.
    :param objective: a loss of :mod:`pplvi.losses.elbo` or of Pyro; ``ELBO()`` unless given.
    :param optim: a ``pyro.optim`` optimiser, a torch optimiser class, or a callable from the list of parameters to a
        torch optimiser; ``{"model": ..., "guide": ...}`` with one of these for each; Adam unless given.
    :param learning_rate: of Adam, where no ``optim`` is given; 0.01 unless given.
    :param schedule: ``"cosine"``, ``None``, or a function from the step to a factor of the learning rate.
    :param clip: ``"adaptive"`` cuts gradients of ten times the median norm, a number those of a greater norm.
    :param init: ``"pathfinder"`` starts an automatic guide at the Gaussian that Pathfinder finds, location and spread
        (:func:`pplvi.start_at_pathfinder`), anew for each restart; ``"match"`` at that of batch and match, which is
        nearer. Both need all data at once. SMC starts at either (batch and match unless given), or at a fitted guide.
    :param num_steps: the most steps to take, 5,000 unless given; draws of each chain for MCMC, 1,000 unless given;
        effective draws for SMC, 4,000 unless given.
    :param num_warmup: steps of each MCMC chain that are dropped; as many as ``num_steps`` unless given.
    :param budget: CPU seconds, of this process and its children, after which ``"auto"`` ends what it trains and begins
        no other family, 60 unless given, and SMC moves no more. The :attr:`Fit.timing` of an earlier run of the same
        seed repeats it to the bit, wherever its time cut it.
    :param restarts: how many seeds to train from; restart ``r`` has the seed ``seed + r``. Modules are copied, so that
        restarts have no parameter in common. They are trained one after another, or, with ``compile`` (but for
        ``"max"``) and all data at once, as the rows of one program: then restart ``r`` is what it would be alone with
        ``compile="trace"``, up to rounding. Programs that cannot be vectorised, such as those that draw from gamma
        distributions, are trained side by side without that. For MCMC, the number of chains; for SMC, of islands, 4
        unless it is more than one.
    :param seed: makes the result reproducible to the bit; the global random state stays as it was.
    :param compile: ``True``: a step that is traced once and compiled; ``"trace"``, ``"max"``, ``"auto"`` or ``False``,
        Pyro's handlers at every step: see :class:`pplvi.fitting.Compile`, which can be given whole.
    :param stop: the rule for stopping before ``num_steps``; ``"auto"`` is ``Plateau()`` where there is a schedule, and
        ``None`` (never) otherwise. With the cosine schedule the learning rate first falls to zero within another
        quarter of the steps so far. Objectives that are no bound (``monitor`` is ``None``) never stop early unless a
        monitor is named.
    :param monitor: a loss to judge by in place of the objective, evaluated every tenth step; a
        :class:`pplvi.training.Monitor` for held-back data or other steps.
    :param callbacks: functions of the :class:`pplvi.training.Restart`, called after each step; returning true ends it.
    :param progress: show a bar with the smoothed loss and the time left.
    :param checkpoint: a file to write every 500 steps, or those of :class:`pplvi.fitting.Checkpoint`, at the end of
        every restart, when it goes back and on ``Ctrl-C``. Where it cannot be written there is a warning, and, if the
        last try failed, an error at the end whose attribute ``fit`` is the result.
    :param resume: a checkpoint to continue; the result is, to the bit, that of a run that was never interrupted.
    :param device: where to move the data and modules to, and the default device meanwhile.
    :param dtype: floating point type of data and modules, and the default meanwhile.
    :param vectorize: the way of running several particles and draws: ``"broadcast"``, as one more dimension on the left
        of all tensors; ``"vmap"``, carried by ``torch.func.vmap``; ``"loop"`` (``False``), one after another. The
        fastest that is right for the programs is found by trying unless one is named.
    :param parallel: under ``torchrun``, or in a process group that was made before, the ranks train together on shares
        of the data: ``None``, or a :class:`pplvi.fitting.DataParallel`. ``"restarts"``: each trains some of the
        restarts, and all get all of them; as MCMC chains and SMC islands are spread. ``"none"``: each by itself.
    :returns: the result; the parameters of its best restart are left in Pyro's global store. ``Ctrl-C`` returns what
        there is.
        Fits run in one thread at a time, and one in a callback of another leaves the store alone.
    :raises ValueError: for arguments of a wrong kind or that contradict each other, programs that do not fit together,
        restarts that would share parameters, a checkpoint that is damaged, of another run, or would be overwritten, and
        a loss that stays non-finite after ten returns to a good state with half the learning rate each.

    Source: Ranganath, Gerrish & Blei (2014), "Black box variational inference"; the parts name their own sources:
    :class:`pplvi.training.Plateau`, :class:`pplvi.training.Cosine`, :class:`pplvi.training.AdaptiveClip`.

    >>> import pyro, pyro.distributions as dist
    >>> from pyro.infer.autoguide import AutoNormal
    >>> def model(y):
    ...     scale = pyro.sample("scale", dist.LogNormal(0.0, 1.0))
    ...     with pyro.plate("data", len(y)):
    ...         pyro.sample("y", dist.Normal(0.0, scale), obs=y)
    >>> y = torch.tensor([1.0, -2.0, 3.0, -1.0])
    >>> result = fit(model, AutoNormal, args=(y,), num_steps=400, restarts=2, seed=0, progress=False)
    >>> result.losses.shape, round(result.guide.median(y)["scale"].item(), 1)
    ((2, 400), 1.9)
    """
    keep_freed_memory()
    check_model(model)
    call = checked_call(args, kwargs, "fit(model, guide, args=(x, y))")
    environment = Environment(dtype, device)
    check_numbers(num_steps=num_steps, num_warmup=num_warmup, restarts=restarts)
    check_budget(budget)
    check_values(bool, progress=progress)
    check_values(CompileMode | Compile, compile=compile)
    check_values(Sequence[Callable[..., Any]], callbacks=callbacks)
    check_seed(seed, restarts)
    ways.named(vectorize)
    split = DataParallel.of(parallel)
    if data is None:
        call = checked_inputs(model, *call, environment)
    unused: dict[str, Any] = {"data": data, "objective": objective, "optim": optim, "learning_rate": learning_rate}
    unused |= {"init": init, "monitor": monitor, "callbacks": callbacks or None, "compile": compile or None}
    unused |= {
        "checkpoint": checkpoint,
        "resume": resume,
        "parallel": parallel if isinstance(parallel, DataParallel) else None,
    }
    if isinstance(guide, str) and guide == "auto":
        refuse({**unused, "num_steps": num_steps, "num_warmup": num_warmup}, "guide='auto'", "budget, ")
        check_whole("'auto'", sharers(parallel, model))
        same: dict[str, Any] = {"restarts": restarts, "seed": seed, "device": device, "dtype": dtype}
        same |= {"vectorize": vectorize, "parallel": "none"}
        originals = Originals(model, *call, environment)
        again = partial(fit, args=call[0], kwargs=call[1], progress=progress, **same)
        return select(again, model, originals, BUDGET if budget is None else budget)
    settings = smc_settings(guide)
    if budget is not None and settings is None:
        raise ValueError(f"budget={budget!r} is for guide='auto' and 'smc': expected one of them, or num_steps=.")
    if guide is ExpectationMaximization:
        raise ValueError("guide=ExpectationMaximization: pass an instance, ExpectationMaximization().")
    if isinstance(guide, ExpectationMaximization):
        kept: dict[str, Any] = {"checkpoint": checkpoint, "resume": resume}
        refuse(
            {**{k: v for k, v in unused.items() if k not in (*kept, "callbacks")}, "num_warmup": num_warmup},
            "ExpectationMaximization",
            "num_steps, callbacks, checkpoint, resume, ",
        )
        check_whole("ExpectationMaximization", sharers(parallel, model))
        same = {"num_steps": num_steps, "restarts": restarts, "seed": seed, "callbacks": callbacks}
        return maximise_likelihood(model, guide, call, environment, progress=progress, **same, **kept)
    if data is None and not getattr(objective, "compares_draws", False):
        warn_of_no_data(model, *call, environment)
    if settings is not None:
        refuse({**unused, "init": None, "num_warmup": num_warmup}, "SMC", "init, num_steps, budget, ")
        settings = replace(settings, num_draws=num_steps or settings.num_draws)
        settings = replace(settings, num_islands=restarts) if restarts > 1 else settings
        ranks = sharers(parallel, model)
        return _fit_islands(settings, model, call, environment, init, seed, budget, vectorize, ranks)
    if (make_kernel := kernel_factory(guide)) is not None:
        refuse(unused, "MCMC", "num_steps, num_warmup, ")
        recipe = Recipe(model, make_kernel, True, False, environment)
        ranks = sharers(parallel, model)
        run = _fit_chains(recipe, call, num_steps or NUM_DRAWS, num_warmup, restarts, seed, progress, ranks)
        run.vectorize = vectorize
        return run
    if num_warmup is not None:
        raise ValueError(f"num_warmup={num_warmup} is for MCMC: expected guide='nuts', got {guide!r}.")
    check_init(init)
    objective = in_way(check_loss(ELBO() if objective is None else objective, "objective"), vectorize)
    named, steps = named_monitor(monitor, environment), num_steps or NUM_STEPS
    source, compiled = Minibatches.of(data), Compile.of(compile)
    batches = make_batches(source.data, *call, seed is not None, source.last_batch)
    batches.inputs = Inputs(model, dtype, check=data is not None)
    recipe = recipe_of(model, guide, batches, restarts, environment)
    bound = named is not None or monitor_of(objective) is not None
    rule = stopping_rule(stop, schedule) if bound else None
    chosen = (optimizer_of(optim, learning_rate), steps, schedule, clip)
    if compiled.mode is not False:
        own_loss(objective)
    file = Checkpoint.of(checkpoint)
    plan = TrainingPlan(
        recipe,
        objective,
        steps=compiled.steps(*chosen),
        batches=batches,
        watch=Watch(steps, rule, named, tuple(callbacks), save_every=Checkpoint.every if file is None else file.every),
        restarts=restarts,
        seed=seed,
        progress=progress,
        checkpoint=None if file is None else file.path,
        resume=resume,
        settings={
            "guide": describe(guide),
            "objective": describe(objective),
            "optim": describe(chosen[0]),
            "schedule": f"{describe(schedule)} over {steps} steps" if schedule == "cosine" else describe(schedule),
            "clip": describe(clip),
            "seed": describe(seed),
            **({} if compiled.mode is False else {"compile": describe(compiled.mode)}),
            **({} if init is None else {"init": init}),
            "data": fingerprint(call),
        },
        start=SearchedStart(init, compiled.mode),
    )
    plan, ranks = (plan, sharers(parallel, model, guide)) if split is None else (split.applied(plan), plan.ranks)
    unwritten = None
    try:
        runs = spread_restarts(plan, ranks) if parallel == "restarts" else train_restarts(plan)
    except UnwrittenError as error:
        if not error.runs:
            raise
        runs, unwritten = list(error.runs), error
    best = best_of(runs, bound)
    recipe.adopt(runs[best])
    publish(runs[best])
    found = Fit(
        runs,
        best,
        guide_name=describe(guide),
        args=call[0] if data is None or any(call) else None,
        kwargs=call[1],
        seed=seed,
        objective=objective,
        is_bound=bound,
        vectorize=vectorize,
        origin=guide,
    )
    if unwritten is not None:
        unwritten.fit = found
        unwritten.args = (f"{unwritten} The fit is in the attribute fit of this error.",)
        raise unwritten
    return found


def _fit_chains(
    recipe: Recipe,
    call: Call,
    num_samples: int,
    num_warmup: int | None,
    chains: int,
    seed: int | None,
    progress: bool,
    ranks: Processes,
) -> Fit:
    run = Restart(0, recipe.model, recipe.guide, recipe.environment, seed)
    recipe.environment.move_module(recipe.model)
    common = common_seed(ranks, seed, call)
    ranks.each(lambda: check_chains(recipe.model, *call, recipe.environment))
    start, (args, kwargs) = time.perf_counter(), recipe.environment.move(call)

    def chosen(numbers: Sequence[int]) -> MCMC:
        return run_chains(
            recipe.guide,
            recipe.model,
            args,
            kwargs,
            numbers,
            num_samples=num_samples,
            num_warmup=num_samples if num_warmup is None else num_warmup,
            seed=common,
            progress=progress and ranks.rank == 0,
        )

    with run.scope():
        mcmc = spread_chains(ranks, chains, chosen)
    run.seconds = time.perf_counter() - start
    name = getattr(recipe.guide, "func", recipe.guide).__name__
    return Fit([run], 0, guide_name=name, args=call[0], kwargs=call[1], seed=seed, mcmc=mcmc)


def _fit_islands(
    settings: TemperedSMC,
    model: Program,
    call: Call,
    environment: Environment,
    init: Any,
    seed: int | None,
    budget: float | Timing | Clock | None,
    vectorize: Vectorize,
    ranks: Processes,
) -> Fit:
    clock, start = Clock.of(budget), time.perf_counter()
    environment.move_module(model)
    check_chains(model, *call, environment)
    run = Restart(0, model, model, environment, seed)
    seed = common_seed(ranks, seed, call)
    with run.scope(), random_state(seed), ranks.listening():
        args, kwargs = environment.move(call)
        if callable(init):
            form, (guide, named) = WRITTEN, given_start(init, model, (args, kwargs), vectorize)
        else:
            check_init(init)
            forms = {WRITTEN: model, **forms_of(model, args, kwargs)}
            form, guide, named = found_start(forms, (args, kwargs), init=init, seed=seed, vectorize=vectorize)
            run.model = forms[form]
        named = named if form == WRITTEN else f"{named} ({form})"
        moved, stop = (args, kwargs), common_stop(ranks, clock)
        islands = run_islands(settings, run.model, moved, guide, named, vectorize=vectorize, stop=stop, ranks=ranks)
    run.seconds, run.reason = time.perf_counter() - start, islands.found.ended
    fit = Fit([run], 0, guide_name="SMC", args=call[0], kwargs=call[1], seed=seed, islands=islands, vectorize=vectorize)
    fit.reformed, fit.timing = form != WRITTEN, ranks.first(lambda: clock.timing)
    return fit
