"""The families that ``fit(model, "auto")`` tries, from the cheapest to richer ones."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from pyro.infer.autoguide import AutoMultivariateNormal, AutoNormal

from pplvi.fitting.recipes import flow_recipe
from pplvi.guides.flows.flow import AutoFlow
from pplvi.guides.search.batch_and_match import AutoBatchAndMatch
from pplvi.guides.search.deterministic import AutoDeterministicNormal
from pplvi.guides.search.pathfinder import AutoPathfinder
from pplvi.guides.search.students import AutoStudentMixture
from pplvi.losses.elbo import ELBO

FitArguments = Callable[[int], Mapping[str, Any]]


@dataclass(frozen=True)
class Rung:
    """A family of guides: its name, what makes it, and, if trained, arguments of ``fit`` for a number of steps.

    :ivar most: unconstrained dimensions beyond which its parameters times draws are more than memory and time allow.
    :ivar gaussian: whether it is one Gaussian, of no use where a mixture has good weights and only tails are open.
    :ivar nearby: whether it starts at the draws of a guide that is near already, and is of no use elsewhere.
    """

    name: str
    guide: Any
    recipe: FitArguments | None = None
    steps: int = 2000
    most: float = math.inf
    gaussian: bool = False
    nearby: bool = False


def _gaussian_recipe(num_steps: int) -> dict[str, Any]:
    return {"objective": ELBO(16, estimator="stl"), "init": "pathfinder", "num_steps": num_steps}


_FULL_COVARIANCES = 100  # dimensions in which they are refitted at no cost
_FEW_DIMENSIONS = 20  # in which a mixture reaches what one Gaussian does not; in more, particles come first
_MANY_DIMENSIONS = 500  # in which one Gaussian is too far away, and its updates take the time of the particles
FOUND = (
    Rung("AutoPathfinder", partial(AutoPathfinder, num_components=1)),
    Rung("AutoStudentMixture(start=...)", AutoStudentMixture, most=_FULL_COVARIANCES, nearby=True),
    Rung("AutoStudentMixture", AutoStudentMixture, most=_FEW_DIMENSIONS),
    # What the first Gaussians come near, particles reach sooner than a better Gaussian is found.
    Rung("SMC", "smc"),
    Rung("AutoBatchAndMatch", AutoBatchAndMatch, most=_MANY_DIMENSIONS, gaussian=True),
    Rung("AutoDeterministicNormal", AutoDeterministicNormal, gaussian=True),
    Rung("AutoStudentMixture(num_scouts=512)", partial(AutoStudentMixture, num_scouts=512)),
)
# Neither can move the parameters of a model.
TRAINED = (
    Rung("AutoNormal", AutoNormal, _gaussian_recipe, 5000),
    Rung("AutoMultivariateNormal", AutoMultivariateNormal, _gaussian_recipe, 5000),
)
FLOWS = (
    Rung("AutoFlow('quadratic')", partial(AutoFlow, flow="quadratic"), flow_recipe, most=200),
    Rung("AutoFlow('nsf')", partial(AutoFlow, flow="nsf"), flow_recipe, most=30),
)
