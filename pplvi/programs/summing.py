"""Sites marked for enumeration: no guide has to know of them, and guides that enumerate can be drawn from."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from functools import partial
from typing import Any

import pyro
from pyro import poutine
from pyro.distributions.util import scale_and_mask
from pyro.infer.autoguide import AutoDiscreteParallel, AutoGuide, AutoLaplaceApproximation
from pyro.infer.autoguide.initialization import InitMessenger
from pyro.poutine.guide import GuideMessenger
from pyro.poutine.trace_struct import Trace

from pplvi.programs.running import plain_run
from pplvi.programs.sites import is_enumerated, is_subsample, latent_sites
from pplvi.programs.traces import Run
from pplvi.types import Program


def is_summed(site: Any) -> bool:
    """Whether a site is, or asks to be, enumerated in parallel."""
    return is_enumerated(site) or site["infer"].get("enumerate") == "parallel"


def leaves_out_summed(guide: Any) -> Any:
    """The same automatic guide, of Pyro or of this package, which from now on leaves to the model what it enumerates.

    Pyro's guides cover every latent site that they see, unless the model is given to them under ``poutine.block``. A
    guide that enumerates by itself (``AutoDiscreteParallel``, or a list with one in it) and any other program stay as
    they are.

    :param guide: a guide, which is changed in place before its first run.

    >>> import pyro, torch, pyro.distributions as dist
    >>> from pyro.infer.autoguide import AutoNormal
    >>> @pyro.infer.config_enumerate
    ... def model():
    ...     z = pyro.sample("z", dist.Bernoulli(0.3))
    ...     pyro.sample("x", dist.Normal(z, 1.0))
    >>> sorted(leaves_out_summed(AutoNormal(model))())
    ['x']
    """
    program = poutine.unwrap(guide)
    if isinstance(program, GuideMessenger):
        program._pyro_sample = partial(_sample_unless_summed, type(program), program)  # type: ignore[method-assign]
        program.get_traces = partial(_traces, type(program), program)  # type: ignore[method-assign]
    elif isinstance(program, AutoGuide):
        parts = [part for part in program.modules() if isinstance(part, AutoGuide)]
        if not any(isinstance(part, AutoDiscreteParallel) for part in parts):
            for part in parts:
                _hide_in_model(part)
    return guide


def _hide_in_model(guide: Any) -> None:
    """Give an automatic guide a model that shows it no summed site; its initial values are found inside."""
    if guide._model is None or getattr(guide, "_leaves_out_summed", False):  # it has come from a file, or was here
        return
    model, *others = guide._model
    whole = model
    start, *inner = getattr(getattr(model, "func", None), "args", ())[:2] or (None,)
    if isinstance(start, InitMessenger):  # of partial(run inside, handler, model)
        whole = inner[0]
        model = start(poutine.block(whole, hide_fn=_is_hidden))
    else:
        model = poutine.block(model, hide_fn=_is_hidden)
    guide._model, guide._leaves_out_summed = (model, *others), True
    if isinstance(guide, AutoLaplaceApproximation):
        guide.laplace_approximation = partial(_laplace, guide, whole)  # type: ignore[method-assign]
    if getattr(guide, "_original_model", None):  # whose dependencies a structured guide looks at
        guide._original_model = tuple(poutine.block(whole, hide_fn=_is_hidden) for whole in guide._original_model)


def _laplace(guide: AutoLaplaceApproximation, model: Program, *args: Any, **kwargs: Any) -> Any:
    """The Gaussian of the Hessian of the density that is left when sites are summed out."""
    before: Any = guide._model
    guide._model = (_summed(model), *before[1:])
    try:
        found: Any = AutoLaplaceApproximation.laplace_approximation(guide, *args, **kwargs)
    finally:
        guide._model = before
    found._model = (before[0], *found._model[1:])
    found._leaves_out_summed = True
    return found


def _summed(model: Program) -> Program:
    """A program with the latents that are left, and a factor that makes its log density that of them alone."""

    def program(*args: Any, **kwargs: Any) -> None:
        with poutine.block():
            nesting = plain_run(model, args, kwargs).nesting
        apart = poutine.block(hide_fn=lambda msg: msg["type"] == "sample" and (msg["is_observed"] or is_summed(msg)))
        with apart, poutine.trace() as recorder, poutine.enum(first_available_dim=-nesting - 1):
            model(*args, **kwargs)
        run = Run(Trace(), recorder.trace, 1, nesting, enumerated=True)
        left = [site for site in latent_sites(recorder.trace).values() if not is_summed(site)]
        own = [scale_and_mask(site["fn"].log_prob(site["value"]), site["scale"], site["mask"]).sum() for site in left]
        pyro.factor("_summed", run.scale * run.log_target().sum() - sum(own))

    return program


def _is_hidden(msg: Any) -> bool:
    return msg["type"] == "sample" and not msg["is_observed"] and is_summed(msg)


def _sample_unless_summed(kind: type[GuideMessenger], guide: GuideMessenger, msg: Any) -> None:
    if not is_summed(msg):
        kind._pyro_sample(guide, msg)


def _traces(kind: type[GuideMessenger], guide: GuideMessenger) -> tuple[Trace, Trace]:
    """Model and guide of a run of both in one; the latents that are summed out are the model's alone."""
    sites: dict[str, Any] = latent_sites(guide.trace)
    own = [name for name, site in sites.items() if is_summed(site)]
    for name in own:
        sites[name]["infer"]["prior"] = sites[name]["fn"]  # where Pyro looks for the model's distribution
    model, program = kind.get_traces(guide)
    for name in own:
        program.nodes.pop(name)
    return model, program


def enumerated_by(guide: Program, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> frozenset[str]:
    """Names of the sites that a guide enumerates, which leaves no draws of them."""
    if isinstance(poutine.unwrap(guide), GuideMessenger):
        return frozenset()
    return frozenset(n for n, s in latent_sites(plain_run(guide, args, kwargs).model).items() if is_summed(s))


def summing(program: Program, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Program:
    """The same program with every discrete latent enumerated; the program itself, if it asks for that by itself.

    :raises ValueError: for latents that have no finite number of values.
    """
    latents = latent_sites(plain_run(program, args, kwargs).model)
    if endless := sorted(name for name, site in latents.items() if not site["fn"].has_enumerate_support):
        raise ValueError(
            f"latent sites {endless} do not have a finite number of values that can be summed over: expected discrete "
            "ones, such as Categorical or Bernoulli. Make what is to be estimated a pyro.param, or fit a guide."
        )
    if all(is_summed(site) for site in latents.values()):
        return program
    configure: Any = _every_latent
    found: Program = poutine.infer_config(program, configure)
    return found


def _every_latent(msg: Any) -> dict[str, Any]:
    latent = msg["type"] == "sample" and not (msg["is_observed"] or is_subsample(msg))
    return {"enumerate": "parallel"} if latent else {}


def drawing(program: Program, names: Collection[str]) -> Program:
    """The same program with these sites drawn, whatever they ask for."""
    configure: Any = partial(_drawn, frozenset(names))
    found: Program = poutine.infer_config(program, configure)
    return found


def _drawn(names: frozenset[str], msg: Any) -> dict[str, Any]:
    return {"enumerate": None} if msg["type"] == "sample" and msg["name"] in names else {}
