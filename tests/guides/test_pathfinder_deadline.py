"""Pathfinder leaves off when the time is over, with the best of what it has seen."""

import math
from collections.abc import Callable

import pyro
import pyro.distributions as dist
import torch

from pplvi.guides.search.pathfinder import AutoPathfinder
from pplvi.programs.deadline import ending


def narrow() -> None:
    """A normal whose scales differ by a factor of 1,000, so that paths are long."""
    pyro.sample("x", dist.Normal(torch.ones(30), torch.logspace(-3, 0, 30)).to_event(1))


def after(asks: int) -> Callable[[], str]:
    """The time is over once it has been asked for so often."""
    left = [asks]

    def over() -> str:
        left[0] -= 1
        return "budget" if left[0] < 0 else ""

    return over


def run(asks: float) -> AutoPathfinder:
    with ending(after(int(asks)) if asks < math.inf else lambda: ""):
        return AutoPathfinder(narrow, seed=0, exact_hessian=False, moment_matching=0).run()


def test_paths_end_when_the_time_is_over_and_have_a_gaussian_each():
    whole, cut = run(math.inf), run(20)
    assert all(path.reason == "converged" for path in whole.paths)
    assert all(path.reason == "stopped" for path in cut.paths)
    assert max(len(path.log_density) for path in cut.paths) < min(len(path.log_density) for path in whole.paths)
    for path in cut.paths:
        assert path.elbos[-1] > -math.inf
        assert path.elbos[:-1] == (-math.inf,) * (len(path.elbos) - 1)


def test_time_that_is_enough_changes_nothing():
    whole, timed = run(math.inf), run(1e6)
    assert torch.equal(whole.loc, timed.loc)
    assert whole.paths == timed.paths
