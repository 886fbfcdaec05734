"""One optimiser for the parameters of the model and another for those of the guide."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pyro
import torch
from pyro.optim import PyroOptim
from pyro.optim.lr_scheduler import PyroLRScheduler
from torch.optim import Optimizer

from pplvi.compile.flat_optimizers import OptimFactory
from pplvi.kinds.checked import checked
from pplvi.programs.handlers import parameters_of
from pplvi.programs.running import isolated, plain_run
from pplvi.types import Program

ROLES = ("model", "guide")


@checked
class PerProgram(PyroOptim):
    """Two optimisers in the place of one: ``{"model": ..., "guide": ...}``.

    A parameter belongs to the program that asks for it; one that both ask for is the model's. Which are which is seen
    in a run of the pair, so that the optimiser needs the programs and a call of them: :func:`pplvi.fit` and
    ``CompiledSVI`` give them, for Pyro's ``SVI`` they are arguments here. Each parameter has an optimiser of its own,
    as with any Pyro optimiser.

    :param optims: for ``"model"`` and for ``"guide"`` a Pyro optimiser, a torch optimiser class, or a callable from the
        list of parameters to a torch optimiser.
    :param call: model, guide, their arguments and keyword arguments.
    :raises ValueError: for other keys, or something that is no optimiser; at the first step, for parameters of which
        neither program is seen to ask.

    >>> import pyro.distributions as dist
    >>> def model():
    ...     pyro.sample("z", dist.Normal(pyro.param("loc", torch.tensor(0.0)), 1.0))
    >>> def guide():
    ...     pyro.sample("z", dist.Normal(pyro.param("mean", torch.tensor(2.0)), 1.0))
    >>> optims = {"model": pyro.optim.SGD({"lr": 0.1}), "guide": pyro.optim.SGD({"lr": 0.01})}
    >>> optim = PerProgram(optims, (model, guide, (), {}))
    >>> _ = pyro.infer.SVI(model, guide, optim, pyro.infer.TraceMeanField_ELBO()).step()
    >>> [round(pyro.param(name).item(), 2) for name in ("loc", "mean")]
    [0.2, 1.98]
    """

    def __init__(
        self,
        optims: Mapping[str, OptimFactory],
        call: tuple[Program, Program, tuple[Any, ...], Mapping[str, Any]] | None = None,
    ) -> None:
        super().__init__(torch.optim.Adam, {})  # what Pyro's methods for saving and loading need
        if set(optims) != set(ROLES):
            raise ValueError(f"optim has the keys {list(optims)}: expected 'model' and 'guide', an optimiser for each.")
        for role, optim in optims.items():
            _check(role, optim)
        self.optims, self.call = dict(optims), call
        self.roles: dict[str, str] = {}

    def _get_optim(self, param: Any) -> Any:
        optim = self._of(param)
        return optim._get_optim(param) if isinstance(optim, PyroOptim) else optim([param])

    def _get_grad_clip(self, param: Any) -> Any:
        optim: Any = self._of(param)
        return optim._get_grad_clip(param) if isinstance(optim, PyroOptim) else None

    def _of(self, param: Any) -> OptimFactory:
        name = str(pyro.get_param_store().param_name(param))
        if name not in self.roles and self.call is not None:
            self.roles.update(roles_of(*self.call))
        if name not in self.roles:
            raise ValueError(
                f"parameter {name!r} was not asked for by model or guide in a run of the two: expected to see which it "
                "belongs to. Give the optimiser the programs and their arguments, or one optimiser with learning rates "
                "by name: pyro.optim.Adam(lambda name: {'lr': 1e-3 if name.startswith('encoder') else 1e-4})."
            )
        return self.optims[self.roles[name]]

    def __repr__(self) -> str:
        return f"PerProgram({self.optims})"


def _check(role: str, optim: Any) -> None:
    if isinstance(optim, PyroLRScheduler):
        raise ValueError(
            f"optim[{role!r}] is a PyroLRScheduler: expected its optimiser, and schedule= for both. Rates that change "
            "in another way are functions of the step in a callable of your own."
        )
    if isinstance(optim, Optimizer) or not (isinstance(optim, PyroOptim) or callable(optim)):
        raise ValueError(
            f"optim[{role!r}]={type(optim).__name__}: expected a pyro.optim optimiser, a torch optimiser class, or a "
            "callable from the list of parameters to a torch optimiser."
        )


def roles_of(model: Program, guide: Program, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, str]:
    """By name of a parameter, which of the two programs asks for it; the random state is left alone."""
    of_model = {name for name, site in plain_run(model, args, kwargs).model.nodes.items() if site["type"] == "param"}
    with isolated():
        asked = [*parameters_of(lambda: model(*args, **kwargs)), *parameters_of(lambda: guide(*args, **kwargs))]
    return {name: "model" if name in of_model else "guide" for name in asked}
