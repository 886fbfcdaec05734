"""A fit that comes back from a file: :func:`load`."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from os import fspath
from typing import Any

import pyro
import torch
from torch import Tensor

from pplvi.fitting.arguments import check_model, recipe_of
from pplvi.fitting.inputs import checked_inputs
from pplvi.fitting.likelihood import recipe_of_likelihood
from pplvi.fitting.mcmc import SavedChains
from pplvi.fitting.result import Fit
from pplvi.fitting.saving import guide_of_recipe, signature_of
from pplvi.fitting.starts import SearchedStart
from pplvi.programs.calls import checked_call
from pplvi.programs.errors import explained
from pplvi.programs.handlers import parameters_of
from pplvi.programs.reparam import Reparametrized
from pplvi.programs.state import Environment, preserved_rng, set_rng_state
from pplvi.training import checkpoint
from pplvi.training.batches import make_batches
from pplvi.training.checkpoint import PathLike
from pplvi.training.em.algorithm import ExpectationMaximization
from pplvi.training.replicas import Recipe
from pplvi.training.restart import Ended, Restart, copy_into, publish
from pplvi.training.resume import check_equal, put_back, shapes
from pplvi.types import Call, Program


@explained()
def load(
    path: PathLike,
    model: Program,
    guide: Any = None,
    *,
    args: tuple[Any, ...] | None = None,
    kwargs: Mapping[str, Any] | None = None,
    device: torch.device | str | None = None,
) -> Fit:
    """The fit that :meth:`Fit.save` wrote, in this process or another, on this machine or another.

    Draws with a seed, losses and report are, to the bit, those of the fit that was saved. No code of the file is run:
    the model is given again, and so is a guide that is no class of Pyro or of this package with plain options. As
    after ``fit``, the parameters of the best restart are in Pyro's global store, and modules have them.

    Train on by ``fit(model, guide, ..., resume=path, num_steps=more)`` with the arguments of the first call: without a
    schedule the steps are those of a run that never stopped; rates of the cosine schedule start anew.

    :param path: of the file.
    :param model: the model that was fitted.
    :param guide: what ``fit`` was given, where that was a program, a function or a guide, or had such options.
    :param args: arguments of model and guide, if the data are not in the file; in place of those in it otherwise.
    :param kwargs: keyword arguments that go with ``args``.
    :param device: where to move parameters and data to; the default device unless given.
    :returns: the fit; its ``objective`` is the description of the one that it was trained by.
    :raises ValueError: if there is no such file, it is damaged, of a newer format, a checkpoint of a run, or of another
        model or guide; if it holds no data, or does not say how the guide is made, and they are not given.

    >>> import pyro, pyro.distributions as dist, tempfile, pplvi
    >>> def model(y):
    ...     pyro.sample("y", dist.Normal(pyro.sample("z", dist.Normal(0.0, 1.0)), 1.0), obs=y)
    >>> guide = pyro.infer.autoguide.AutoNormal
    >>> fit = pplvi.fit(model, guide, args=(torch.tensor(1.0),), num_steps=50, seed=0, progress=False)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     fit.save(f"{folder}/fit.pplvi")
    ...     again = load(f"{folder}/fit.pplvi", model)
    >>> torch.equal(again.posterior().draws.latents["z"], fit.posterior().draws.latents["z"])
    True
    """
    check_model(model)
    content = checkpoint.read_content(path)
    if "fit" not in content:
        raise ValueError(
            f"{fspath(path)!r} is a checkpoint of a training: expected a file that Fit.save wrote. Go on with it by "
            "fit(..., resume=path), which returns the fit at once where training had ended."
        )
    facts = content["fit"]
    environment = Environment(_dtype(facts["dtype"]), device)
    model = _in_form(model, facts["form"])
    call = _call(path, model, facts, args, kwargs, environment)
    found = _Loaded(fspath(path), content, model, call, environment)
    return found.chains() if facts["mcmc"] is not None else found.trained(guide)


def _dtype(name: str) -> torch.dtype | None:
    """The default dtype of the fit, ``None`` where it is the present one."""
    found = getattr(torch, name, None)
    dtype: torch.dtype | None = found if isinstance(found, torch.dtype) else None
    return None if dtype == torch.get_default_dtype() else dtype


def _in_form(model: Program, form: Mapping[str, Any] | None) -> Program:
    return model if form is None else Reparametrized(model, form["centered"], frozenset(form["sites"]))


def _call(
    path: PathLike,
    model: Program,
    facts: Mapping[str, Any],
    args: tuple[Any, ...] | None,
    kwargs: Mapping[str, Any] | None,
    environment: Environment,
) -> Call:
    """The data that are given, or else those of the file."""
    if args is None and kwargs is None:
        if facts["data"] is None:
            raise ValueError(f"{fspath(path)!r} holds no data (data=False): expected args= (or kwargs=) with them.")
        args, kwargs = facts["data"]
    return checked_inputs(
        model, *checked_call(() if args is None else args, kwargs, "load(path, model, args=(x, y))"), environment
    )


class _Loaded:
    """A file of a fit, with the model and the data that go with it."""

    def __init__(
        self, path: str, content: Mapping[str, Any], model: Program, call: Call, environment: Environment
    ) -> None:
        self.path, self.content, self.facts = path, content, content["fit"]
        self.model, self.call, self.environment = model, call, environment

    def trained(self, guide: Any) -> Fit:
        """The restarts of a guide."""
        guide, facts = self._guide(guide), self.facts
        batches = make_batches(None, *self.call, False, "compile")
        number, exact = len(facts["runs"]), isinstance(guide, ExpectationMaximization)
        recipe = (
            recipe_of_likelihood(self.model, self.call, number, self.environment)
            if exact
            else recipe_of(self.model, guide, batches, number, self.environment)
        )
        with preserved_rng():
            runs = [self._restart(number, recipe) for number in range(number)]
        for run in runs:
            run.exact = exact
        recipe.adopt(runs[facts["best"]])
        publish(runs[facts["best"]])
        return self._fit(runs, guide)

    def chains(self) -> Fit:
        """MCMC chains."""
        self.environment.move_module(self.model)
        run = self._empty(0, self.model, None)
        self._take_tensors(run, self.facts["runs"][0])
        check_equal(self.path, "sites", self.content["model"], signature_of(run, self.call, chains=True))
        samples = self.environment.move(self.facts["mcmc"]["samples"])
        return self._fit([run], None, SavedChains(samples, self.facts["mcmc"]["diagnostics"]))

    def _fit(self, runs: list[Restart], origin: Any, mcmc: SavedChains | None = None) -> Fit:
        facts = self.facts
        fit = Fit(
            runs,
            facts["best"],
            guide_name=facts["guide_name"],
            args=self.call[0] if facts["whole"] else None,
            kwargs=self.call[1] if facts["whole"] else {},
            seed=facts["seed"],
            objective=facts["objective"],
            is_bound=facts["is_bound"],
            mcmc=mcmc,
            vectorize=facts["vectorize"],
            origin=origin,
        )
        fit.notes, fit.total_seconds, fit.reformed = dict(facts["notes"]), facts["seconds"], facts["form"] is not None
        return fit

    def _guide(self, given: Any) -> Any:
        if given is not None:
            return given
        if self.facts["guide"] is None:
            raise ValueError(
                f"{self.path!r} cannot say how its guide, {self.facts['guide_name']}, is made: expected guide=, "
                "what fit was given. Only classes of Pyro and of pplvi with plain options need not be given again."
            )
        return guide_of_recipe(self.facts["guide"])

    def _empty(self, number: int, model: Program, guide: Any) -> Restart:
        saved = self.facts["runs"][number]
        run = Restart(saved["index"], model, guide, self.environment, saved["seed"])
        run.losses, run.monitored = list(saved["losses"]), list(saved["monitored"])
        run.reason, run.seconds, run.rollbacks = saved["reason"], saved["seconds"], saved["rollbacks"]
        return run

    def _restart(self, number: int, recipe: Recipe) -> Restart:
        saved = self.facts["runs"][number]
        with put_back(self.path):
            set_rng_state(saved["start"])  # what a program draws when it is made is drawn again
        with self.environment.active():
            run = self._empty(number, *recipe.build())
        with run.scope():
            SearchedStart().take_back(run, saved)
        self._take_tensors(run, saved)
        check_equal(self.path, "sites", self.content["model"], signature_of(run, self.call, chains=False))
        states = self.content["runs"]
        state = states[number] if number < len(states) else {}
        run.ended = Ended(state, self.call, self.content["settings"], self.content["initial"])
        return run

    def _take_tensors(self, run: Restart, saved: Mapping[str, Any]) -> None:
        """Have the programs make their parameters, and give these and the buffers their values."""
        args, kwargs = self.call
        with run.scope():
            for program in (run.guide, run.model):
                if program is not None:
                    parameters_of(partial(program, *args, **kwargs))
            store = pyro.get_param_store()
            buffers = {} if run.guide is None else run.buffers()
            self._check(saved["params"], dict(store.named_parameters()), "parameters")
            self._check(saved["buffers"], buffers, "buffers")
            copy_into(dict(store.named_parameters()), saved["params"])
            copy_into(buffers, saved["buffers"])

    def _check(self, saved: Mapping[str, Tensor], found: Mapping[str, Tensor], what: str) -> None:
        check_equal(self.path, what, shapes(saved), shapes(found))
