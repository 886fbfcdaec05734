"""What a report says of a fit beside its posterior: restarts, how training ended, parameters, costs of amortisation."""

from __future__ import annotations

import math
from collections.abc import Sequence

from pplvi.guides.amortized.amortized import AutoAmortized
from pplvi.guides.amortized.refinement import amortization_gap
from pplvi.guides.conjugate.auto import AutoConjugate
from pplvi.posterior.posterior import Posterior
from pplvi.posterior.report import describe_parameters
from pplvi.programs.handlers import parameters_of
from pplvi.programs.running import plain_run
from pplvi.programs.sites import latent_sites
from pplvi.programs.summing import enumerated_by, is_summed
from pplvi.training.restart import Restart
from pplvi.types import Call

_TERMS = 20  # of a bound that a report lists
_SAMPLE = 1_000  # data on which a report measures what amortisation costs
_REASONS = {
    "converged": "stopped at step {steps}: the objective no longer improved by more than its Monte Carlo error",
    "num_steps": "took all {steps} steps",
    "callback": "stopped by a callback at step {steps}",
    "data": "stopped at step {steps}: the data were used up",
    "interrupted": "interrupted at step {steps}",
    "found": "nothing to train: the guide was found by a search",
}


def describe_end(run: Restart) -> str:
    """Why the training of a restart ended, and what it went through."""
    backs = f", after {run.rollbacks} returns from a loss that was not finite" if run.rollbacks else ""
    if run.exact and run.reason == "converged":
        return f"stopped at iteration {run.step}: log p(x) no longer rose"
    return _REASONS[run.reason].format(steps=run.step) + backs


def has_latents(run: Restart, call: Call) -> bool:
    """Whether there is anything to have a posterior of: sites that are drawn, or enumerated by the guide."""
    with run.scope():
        sites = latent_sites(plain_run(run.model, *call).model).values()
        return not all(is_summed(site) for site in sites) or bool(enumerated_by(run.guide, *call))


def describe_restarts(runs: Sequence[Restart], best: int) -> str:
    """How many restarts there are, and how far apart they ended (nats)."""
    scores = [run.score for run in runs]
    return f"{len(scores)}, final loss {min(scores):.4g} to {max(scores):.4g}, best is restart {best}"


def describe_guide(run: Restart, posterior: Posterior, call: Call, seed: int | None) -> dict[str, str]:
    """How many parameters the guide has; of an amortised one also what one network for all data costs.

    :param posterior: draws of the guide.
    :param call: the full data.
    :param seed: for what has to be measured.
    """
    guide, (args, kwargs) = run.guide, call
    if isinstance(guide, AutoConjugate):
        terms = {} if guide.rate is not None else guide.terms(*args, **kwargs)
        listed = {"bound by terms": ", ".join(f"{name} {value:.4g}" for name, value in terms.items())}
        return {"bound": guide.summary(), **(listed if 0 < len(terms) <= _TERMS else {})}
    amortized = isinstance(guide, AutoAmortized) and guide.amortized
    with run.scope():
        count = sum(leaf.numel() for leaf in parameters_of(lambda: guide(*args, **kwargs)).values())
        facts = {"parameters": describe_parameters(count, posterior.draws, amortized)} if count else {}
        if isinstance(guide, AutoAmortized) and amortized and (posterior.has_weights or not posterior.draws.random):
            facts["amortisation"] = _describe_amortization(guide, call, seed)
    return facts


def _describe_amortization(guide: AutoAmortized, call: Call, seed: int | None) -> str:
    if (size := math.prod(guide.structure(*call).batch_shape)) > _SAMPLE:
        return f"not measured on all {size:,} data: call pplvi.amortization_gap with a sample of them"
    gap = amortization_gap(guide, *call, seed=seed or 0)
    return f"costs {gap.value:.3f} +- {gap.standard_error:.3f} nats for each datum"
